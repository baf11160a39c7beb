"""Our own data files: a folder with a `.npy` for each key, or one `.npz`.

A folder opens as memory maps, so that rows are read only when they are used and
a data set may be larger than memory. A `.npz` is read whole. Both are written
under another name and then renamed, so that they are always complete.

    NAME/observation.npy, action.npy, reward.npy, next_observation.npy,
         terminated.npy, truncated.npy, episode.npy, about.json
"""

import dataclasses
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.data import layout, npy
from experiments.files import arrays, reading, writing
from experiments.files.arrays import Stored
from experiments.files.errors import Missing, UserError, shown

_VERSION = 1


def save(dataset: layout.Dataset, path: str | os.PathLike) -> None:
  """Writes a folder, or one compressed file if the path ends in `.npz`.

  Raises:
    ValueError: the path exists already, or the data set is invalid.
    UserError: the disk refused.
  """
  path = pathlib.Path(path)
  if os.path.lexists(path):
    raise ValueError(f'{path}: exists already; remove it or name another')
  layout.check(dataset, str(path))
  about = json.dumps(_to_json(dataset.about), indent=1)
  columns = {key: getattr(dataset, key) for key in layout.KEYS}
  if path.suffix == '.npz':
    with writing.replacing(path) as file:
      np.savez_compressed(file, about=np.array(about), **columns)
    return
  partial = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.partial')
  try:
    for key, value in columns.items():
      with writing.replacing(partial / f'{key}.npy') as file:
        np.save(file, value)
    writing.write_text(partial / 'about.json', about)
    with writing.writing(path):
      partial.rename(path)
      writing.flush_folder(path.parent)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def load(path: str | os.PathLike) -> layout.Dataset:
  """Reads what `save` wrote; a folder's arrays are read-only memory maps.

  Raises:
    ValueError: a key is missing or damaged, the folder has a link, FIFO or
      device, the data set is invalid, or a `.npz` is larger than memory.
  """
  path = pathlib.Path(path)
  read = _read_npz if path.suffix == '.npz' else _read_folder
  about, columns = read(path)
  return layout.check(layout.Dataset(**columns, about=about), shown(path))


def stored(path: str | os.PathLike) -> dict[str, Stored]:
  """Size and digest of each file of a folder that `save` wrote, by name.

  Raises:
    UserError: the folder has a link, FIFO or device, or cannot be read.
  """
  path = pathlib.Path(path)
  reading.check_folder(path)
  return {p.name: arrays.stored(p) for p in sorted(path.iterdir())}


def check_stored(
  path: str | os.PathLike, must_be: Mapping[str, Stored]
) -> None:
  """Compares the files of a folder with an earlier result of `stored`.

  Raises:
    UserError: a file is missing or has changed.
  """
  found = stored(path)
  for name, file in must_be.items():
    if found.get(name) != file:
      what = 'is garbled' if name in found else 'is missing'
      raise UserError(f'{shown(path)}: {shown(name)} {what}')


def _read_folder(path):
  reading.check_folder(path)
  where = f'{path}: about'
  try:
    text = reading.read_bytes(path / 'about.json')
  except Missing as error:
    raise UserError(f'{shown(where)}.json is missing') from error
  about = _from_json(text, where)
  return about, {key: _map(path, key) for key in layout.KEYS}


def _map(path, key):
  try:
    array = npy.open_map(path / f'{key}.npy', key)
  except Missing as error:
    raise UserError(f'{shown(path)}: {key} is missing') from error
  if array.dtype.kind not in 'biuf':
    raise UserError(f'{shown(path)}: {key} is {array.dtype}, must be numbers')
  return array


def _read_npz(path):
  kinds = {'about': 'U', **dict.fromkeys(layout.KEYS, 'biuf')}
  columns = npy.read_archive(path, kinds, follow=True)
  about = columns.pop('about')
  if about.ndim:
    raise UserError(
      f'{shown(path)}: about is truncated or damaged: must be a text'
    )
  return _from_json(str(about), f'{path}: about'), columns


def _to_json(about):
  arrays = {
    key: np.asarray(getattr(about, key), np.float64).tolist()
    for key in ('action_low', 'action_high')
  }
  return {'version': _VERSION, **about._asdict(), **arrays}


@dataclasses.dataclass(frozen=True)
class _Fields:
  """`about.json`: `layout.About` and the version of the format."""

  version: int
  name: str
  env: str
  action_low: Any
  action_high: Any
  ref_min: float | None = None
  ref_max: float | None = None
  source: str = ''
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def _from_json(text, where):
  plain = reading.decode_json(text, dict[str, Any], where)
  version = plain.get('version')
  if version != _VERSION or isinstance(version, bool):
    raise UserError(
      f'{shown(where)} has version {shown(version, 40)}, must be {_VERSION}'
    )
  fields = reading.decode_json(text, _Fields, where)
  known = {field.name for field in dataclasses.fields(_Fields)}
  for name in plain.keys() - known:
    raise UserError(
      f'{shown(where)} has an unknown field {shown(name, 40)}, must be one of '
      f'{", ".join(sorted(known))}'
    )
  return layout.About(
    name=shown(fields.name, 100),
    env=fields.env,
    action_low=layout.bounds(fields.action_low, f'{where}: action_low'),
    action_high=layout.bounds(fields.action_high, f'{where}: action_high'),
    ref_min=fields.ref_min,
    ref_max=fields.ref_max,
    source=shown(fields.source, 1000),
    extra=fields.extra,
  )
