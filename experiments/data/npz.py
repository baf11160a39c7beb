"""Our own files: a folder with one `.npy` a key, or all in one `.npz`.

A folder opens as memory maps: nothing is read before it is used, and a data
set may be larger than memory. A `.npz` is read whole. Either is written
beside its place and renamed into it, so that what has its name is complete.

    NAME/observation.npy, action.npy, reward.npy, next_observation.npy,
         terminated.npy, truncated.npy, episode.npy, about.json
"""

import json
import os
import pathlib
import shutil
import zipfile
import zlib

import numpy as np

from experiments.data import layout

_VERSION = 1
_DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def save(dataset: layout.Dataset, path: str | os.PathLike) -> None:
  """Writes a folder, or one compressed file if the path ends in `.npz`.

  Raises:
    ValueError: something is there already, or the data set is not in order.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise ValueError(f'{path}: is there already; remove it or name another')
  layout.check(dataset, str(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  about = json.dumps(_to_json(dataset.about), indent=1)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  columns = {key: getattr(dataset, key) for key in layout.KEYS}
  try:
    if path.suffix == '.npz':
      # A file object: numpy would add its own suffix to a name.
      with partial.open('wb') as file:
        np.savez_compressed(file, about=np.array(about), **columns)
    else:
      partial.mkdir()
      for key, value in columns.items():
        np.save(partial / f'{key}.npy', value)
      (partial / 'about.json').write_text(about, encoding='utf-8')
    partial.rename(path)
  except BaseException:
    if partial.is_dir():
      shutil.rmtree(partial)
    else:
      partial.unlink(missing_ok=True)
    raise


def load(path: str | os.PathLike) -> layout.Dataset:
  """Reads what `save` wrote; a folder's arrays are read-only memory maps.

  Raises:
    ValueError: a key is missing or torn, or the data set is not in order.
  """
  path = pathlib.Path(path)
  read = _read_npz if path.suffix == '.npz' else _read_folder
  about, columns = read(path)
  return layout.check(layout.Dataset(**columns, about=about), str(path))


def _read_folder(path):
  text = _guarded(
    path,
    'about.json',
    lambda: (path / 'about.json').read_text(encoding='utf-8'),
  )
  about = _from_json(text, path)
  columns = {
    key: _guarded(path, key, lambda key=key: _open_map(path / f'{key}.npy'))
    for key in layout.KEYS
  }
  return about, columns


def _open_map(file):
  size = file.stat().st_size
  array = np.load(file, mmap_mode='r', allow_pickle=False)
  if array.offset + array.nbytes != size:
    raise ValueError(f'{size} bytes, not {array.offset + array.nbytes}')
  return array


def _read_npz(path):
  with path.open('rb') as file:
    archive = _guarded(path, 'archive', lambda: _open_archive(file))
    read = lambda key: _guarded(path, key, lambda: archive[key])
    about = _from_json(str(read('about')), path)
    return about, {key: read(key) for key in layout.KEYS}


def _open_archive(file):
  archive = np.load(file, allow_pickle=False)
  if not isinstance(archive, np.lib.npyio.NpzFile):
    raise ValueError('a single array')
  return archive


def _guarded(path, key, read):
  try:
    return read()
  except (FileNotFoundError, KeyError) as error:
    raise ValueError(f'{path}: {key} is missing') from error
  except _DAMAGE as error:
    raise ValueError(
      f'{path}: {key} is torn or damaged ({error}); collect or copy it again'
    ) from error


def _to_json(about):
  arrays = {
    key: np.asarray(getattr(about, key), np.float64).tolist()
    for key in ('action_low', 'action_high')
  }
  return {'version': _VERSION, **about._asdict(), **arrays}


def _from_json(text, path):
  try:
    fields = json.loads(text)
    version = fields.pop('version')
    for key in ('action_low', 'action_high'):
      fields[key] = np.asarray(fields[key], np.float32)
    about = layout.About(**fields)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{path}: about is torn or damaged ({error})') from error
  if version != _VERSION:
    raise ValueError(f'{path}: about has version {version}, must be {_VERSION}')
  return about
