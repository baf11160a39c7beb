"""Opens data sets by a path, a Minari id or a D4RL name."""

import os
import pathlib

from experiments.data import d4rl, d4rl_names, layout, minari_files, npz
from experiments.files.errors import UserError, shown

UNDERSTOOD = (
  'a folder or .npz of experiments.collect, a D4RL .hdf5, a Minari folder, a '
  'Minari id (mujoco/hopper/medium-v0) or a D4RL name (hopper-medium-v2)'
)


def open_dataset(name: str | os.PathLike) -> layout.Dataset:
  """Opens a data set on this machine; nothing is downloaded.

  The name is an existing path; a D4RL name, for a file in D4RL_DATASET_DIR
  (`~/.d4rl/datasets`); or a Minari id, for a folder in MINARI_DATASETS_PATH
  (`~/.minari/datasets`).

  Raises:
    ValueError: the data set is missing (the message says what to fetch and
      where to put it), of an unknown format, or damaged.
  """
  return _open_path(locate(name))


def locate(name: str | os.PathLike) -> pathlib.Path:
  """Finds the file or folder of a data set by its name, as `open_dataset` does.

  Raises:
    ValueError: it does not exist.
  """
  name = os.fspath(name)
  path = _expanded(name)
  if os.path.lexists(path):
    return path
  word = shown(name)
  url = d4rl_names.url(name)
  folder = _expanded(os.environ.get('D4RL_DATASET_DIR') or '~/.d4rl/datasets')
  if url is not None:
    # Stored under the file's name, as D4RL does, or under the data set's.
    for stem in (url.rpartition('/')[2], f'{name}.hdf5'):
      if os.path.lexists(folder / stem):
        return folder / stem
  if minari_files.is_id(name):
    found = minari_files.data_folder(minari_files.root() / name)
    if found is not None:
      return found
  if url is not None:
    path = folder / url.rpartition('/')[2]
    raise UserError(
      f'{word}: {shown(path)} is missing; fetch {url} and put it there'
    )
  near = d4rl_names.nearest(name)
  if near:
    raise UserError(
      f'{word}: looks like a D4RL name but is unknown; nearest are '
      f'{", ".join(near)}'
    )
  if minari_files.is_id(name):
    raise UserError(
      f'{word}: no such path, and no such id in {shown(minari_files.root())}; '
      f'fetch it there with: minari download {word}'
    )
  raise UserError(f'{word}: no such path or name; must be {UNDERSTOOD}')


def _expanded(name: str) -> pathlib.Path:
  try:
    return pathlib.Path(name).expanduser()
  except RuntimeError as error:
    raise UserError(f'{shown(name)}: {error}; give the whole path') from error


def _open_path(path):
  # Folders first: other readers refuse anything but regular files.
  if os.path.isdir(path):
    if os.path.lexists(path / 'about.json'):
      return npz.load(path)
    if minari_files.data_folder(path) is not None:
      return minari_files.load(path)
    raise UserError(
      f'{shown(path)}: not a data set, because it has neither about.json nor '
      f'metadata.json; must be {UNDERSTOOD}'
    )
  if path.suffix == '.npz':
    return npz.load(path)
  if path.suffix in ('.hdf5', '.h5'):
    if minari_files.data_folder(path.parent) is not None:
      return minari_files.load(path.parent)
    return d4rl.load(path)
  raise UserError(f'{shown(path)}: not a data set; must be {UNDERSTOOD}')
