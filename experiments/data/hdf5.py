"""Opening hdf5 files and reading arrays of them, with errors for people."""

import pathlib
from typing import Any

import numpy as np


def open_file(path: pathlib.Path, mode: str = 'r') -> Any:
  """An `h5py.File`, to be used as a context.

  Raises:
    ValueError: h5py is not installed, no such file, or not an hdf5 file.
  """
  try:
    import h5py
  except ImportError as error:
    raise ValueError(
      f"{path}: hdf5 needs h5py: pip install 'outplay[hdf5]'"
    ) from error
  try:
    return h5py.File(path, mode)
  except FileNotFoundError as error:
    raise ValueError(f'{path}: no such file') from error
  except OSError as error:
    raise ValueError(
      f'{path}: torn, or not an hdf5 file ({error}); fetch it again'
    ) from error


def read(group: Any, key: str, path: pathlib.Path) -> np.ndarray:
  """One array of numbers of a file or group, whole, of the file's shape.

  Raises:
    ValueError: it is missing, a group, not numbers, or damaged.
  """
  import h5py

  name = f'{group.name}/{key}'.lstrip('/')
  try:
    value = group.get(key)
    if value is None:
      raise ValueError(
        f'{path}: {name} is missing; there are {", ".join(sorted(group))}'
      )
    if not isinstance(value, h5py.Dataset):
      raise ValueError(f'{path}: {name} is a group, must be an array')
    if value.dtype.kind not in 'biuf':
      raise ValueError(f'{path}: {name} is {value.dtype}, must be numbers')
    return value[()]
  except (OSError, RuntimeError, KeyError) as error:
    raise ValueError(f'{path}: {name} is damaged ({error})') from error
