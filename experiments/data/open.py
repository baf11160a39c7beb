"""One name for any data set: a path, a Minari id or a D4RL name."""

import os
import pathlib

from experiments.data import d4rl, layout, minari_files, npz

UNDERSTOOD = (
  'a folder or .npz of experiments.collect, a .hdf5 of D4RL, a folder of '
  "Minari's, a Minari id (mujoco/hopper/medium-v0), a D4RL name "
  '(hopper-medium-v2)'
)


def open_dataset(name: str | os.PathLike) -> layout.Dataset:
  """Opens a data set on this machine; nothing is downloaded.

  Args:
    name: a path that exists; or a D4RL name, looked for in D4RL_DATASET_DIR
      (`~/.d4rl/datasets`); or a Minari id, looked for in MINARI_DATASETS_PATH
      (`~/.minari/datasets`).

  Raises:
    ValueError: nothing is there (the message says what to fetch and where to
      put it), what is there is not understood, or it is damaged.
  """
  path = pathlib.Path(name).expanduser()
  if path.exists():
    return _open_path(path)
  name = os.fspath(name)
  url = d4rl.url(name)
  if url is not None:
    folder = os.environ.get('D4RL_DATASET_DIR') or '~/.d4rl/datasets'
    path = pathlib.Path(folder).expanduser() / url.rpartition('/')[2]
    if path.exists():
      return d4rl.load(path)
  if minari_files.is_id(name):
    found = minari_files.data_folder(minari_files.root() / name)
    if found is not None:
      return minari_files.load(found)
  if url is not None:
    raise ValueError(f'{name}: {path} is missing; fetch {url} and put it there')
  if minari_files.is_id(name):
    raise ValueError(
      f'{name}: no such path, and no such id in {minari_files.root()}; fetch '
      f'it there with: minari download {name}'
    )
  raise ValueError(f'{name}: no such path or name; understood is {UNDERSTOOD}')


def _open_path(path):
  if path.is_dir():
    if (path / 'about.json').is_file():
      return npz.load(path)
    if minari_files.data_folder(path) is not None:
      return minari_files.load(path)
  elif path.suffix == '.npz':
    return npz.load(path)
  elif path.suffix in ('.hdf5', '.h5'):
    if minari_files.data_folder(path.parent) is not None:
      return minari_files.load(path.parent)
    return d4rl.load(path)
  raise ValueError(f'{path}: not a data set; understood is {UNDERSTOOD}')
