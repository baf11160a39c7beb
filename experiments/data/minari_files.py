"""Minari's folders of hdf5, read and written without the minari package.

    ID/data/metadata.json    spaces as JSON text, counts, reference scores
    ID/data/main_data.hdf5   a group `episode_<i>` each: observations
                             `[T + 1, ...]`, actions `[T, ...]`, rewards,
                             terminations and truncations `[T]`

Observations that are a Dict or Tuple of Boxes become one vector, leaf after
leaf in the order of sorted names or of indices (Gymnasium's `flatten`).
Not read: Arrow and Parquet (Minari converts them), deeper nesting, JPEG
frames, actions that are not a Box.
"""

import json
import os
import pathlib
import re
import shutil
from typing import Any

import numpy as np

from experiments.data import hdf5, layout

# The oldest whose readers know all that is written here.
_MINARI_VERSION = '0.5.3'
_FLAGS = ('terminations', 'truncations')


def is_id(name: str) -> bool:
  """Whether a name is a Minari id, `(namespace/)name-v0`."""
  return re.fullmatch(r'([-\w]+/)*[-\w]+-v\d+', name) is not None


def root() -> pathlib.Path:
  """Where Minari keeps data sets on this machine."""
  default = pathlib.Path.home() / '.minari' / 'datasets'
  return pathlib.Path(os.environ.get('MINARI_DATASETS_PATH', default))


def data_folder(path: pathlib.Path) -> pathlib.Path | None:
  """The folder with `metadata.json`, of an id's folder or of itself."""
  for folder in (path, path / 'data'):
    if (folder / 'metadata.json').is_file():
      return folder
  return None


def load(path: str | os.PathLike) -> layout.Dataset:
  """Reads a data set, in the order of its episodes.

  An episode without a flag at its end was cut there, but for the last one,
  which is unfinished.

  Args:
    path: an id's folder, or the folder `data` in it.

  Raises:
    ValueError: h5py is not installed, a file, key or episode is missing or
      damaged, a space or format that is not read, or rows not in order.
  """
  path = pathlib.Path(path)
  folder = data_folder(path)
  if folder is None:
    raise ValueError(f'{path}: metadata.json is missing: no Minari folder')
  metadata = _metadata(folder / 'metadata.json')
  space = _space(metadata, 'observation_space', folder)
  keys = _leaf_keys(space, folder)
  if _is_image(space) and metadata.get('jpeg_encoding', True):
    raise ValueError(
      f'{folder}: observations are JPEG frames, which are not read; write them '
      'with jpeg_encoding=False'
    )
  action_space = _space(metadata, 'action_space', folder)
  if action_space['type'] != 'Box':
    raise ValueError(
      f'{folder}: action_space is {action_space["type"]}, must be Box'
    )
  file = folder / 'main_data.hdf5'
  with hdf5.open_file(file) as groups:
    episodes = [
      _episode(groups, i, keys, file) for i in range(metadata['total_episodes'])
    ]
  if not episodes:
    raise ValueError(f'{folder}: total_episodes is 0')
  # The last one may be unfinished; the others stop for some reason.
  for *_, terminated, truncated in episodes[:-1]:
    truncated[-1] |= not terminated[-1]
  try:
    columns = [np.concatenate(column) for column in zip(*episodes)]
  except ValueError as error:
    raise ValueError(f'{file}: episodes of several shapes: {error}') from error
  shape = tuple(space.get('shape', columns[0].shape[1:]))
  if columns[0].shape[1:] != shape:
    raise ValueError(
      f'{file}: observations have rows of shape {columns[0].shape[1:]}, '
      f'observation_space says {shape}'
    )
  observation, action, reward, following, terminated, truncated = columns
  dataset = layout.make(
    observation,
    action,
    reward,
    following,
    terminated,
    truncated,
    _about(metadata, action_space, folder),
  )
  return layout.check(dataset, str(file))


def _metadata(file):
  try:
    metadata = json.loads(file.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{file}: torn or damaged ({error})') from error
  kind = metadata.get('data_format', 'hdf5')
  if kind != 'hdf5':
    raise ValueError(
      f"{file}: data_format is {kind!r}, must be 'hdf5'; convert it with Minari"
    )
  if not isinstance(metadata.get('total_episodes'), int):
    raise ValueError(f'{file}: total_episodes is missing or not a number')
  return metadata


def _space(metadata, key, folder):
  try:
    return json.loads(metadata[key])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{folder}/metadata.json: {key} is missing or damaged ({error}); save '
      'it again with a newer Minari'
    ) from error


def _is_image(space):
  shape = space.get('shape', ())
  return (
    space.get('dtype') == 'uint8'
    and len(shape) in (2, 3)
    and min(shape[:2]) >= 32
  )


def _leaf_keys(space, folder):
  """Names of the leaves below `observations`; None for a single Box."""
  kind = space['type']
  if kind == 'Box':
    return None
  leaves = space.get('subspaces')
  if kind == 'Dict':
    leaves = {key: leaves[key] for key in sorted(leaves)}
  elif kind == 'Tuple':
    leaves = {f'_index_{i}': leaf for i, leaf in enumerate(leaves)}
  else:
    raise ValueError(f'{folder}: observation_space is {kind}, must be Box')
  for key, leaf in leaves.items():
    if leaf['type'] != 'Box':
      raise ValueError(
        f'{folder}: observation_space is a {kind} whose {key} is '
        f'{leaf["type"]}; only a flat {kind} of Boxes is read'
      )
  return list(leaves)


def _episode(groups, i, keys, file):
  """The columns of one episode, before their types are settled."""
  if f'episode_{i}' not in groups:
    raise ValueError(f'{file}: episode_{i} is missing')
  group = groups[f'episode_{i}']
  if keys is None:
    observations = hdf5.read(group, 'observations', file)
  else:
    leaves = [hdf5.read(group, f'observations/{key}', file) for key in keys]
    observations = np.concatenate(
      [leaf.reshape(len(leaf), -1).astype(np.float32) for leaf in leaves], 1
    )
  action, reward, terminated, truncated = (
    hdf5.read(group, key, file) for key in ('actions', 'rewards', *_FLAGS)
  )
  steps = len(reward)
  lengths = {
    'observations': len(observations) - 1,
    'actions': len(action),
    'terminations': len(terminated),
    'truncations': len(truncated),
  }
  for key, length in lengths.items():
    if length != steps or not steps:
      raise ValueError(
        f'{file}: episode_{i}/{key} is of {length} steps, rewards of {steps}: '
        'must be equal and at least 1'
      )
  terminated, truncated = terminated.astype(bool), truncated.astype(bool)
  early = (terminated | truncated)[:-1]
  if early.any():
    raise ValueError(
      f'{file}: episode_{i} ends in step {int(np.argmax(early))} of {steps}'
    )
  return (
    *(observations[:-1], action, reward, observations[1:]),
    *(terminated, truncated),
  )


def _about(metadata, action_space, folder):
  ours = metadata.get('outplay', {})
  env = ours.get('env')
  if env is None:
    try:
      env = json.loads(metadata['env_spec'])['id']
    except (KeyError, TypeError, ValueError):
      env = ''
  shape = action_space['shape']
  bound = lambda key: np.asarray(action_space[key], np.float32).reshape(shape)
  return layout.About(
    name=metadata.get('dataset_id', folder.parent.name),
    env=env,
    action_low=bound('low'),
    action_high=bound('high'),
    ref_min=metadata.get('ref_min_score'),
    ref_max=metadata.get('ref_max_score'),
    source=metadata.get('algorithm_name', ''),
    extra=ours.get('extra', {}),
  )


def save(
  dataset: layout.Dataset, dataset_id: str, folder: str | os.PathLike = ''
) -> pathlib.Path:
  """Writes a folder that Minari's own reader opens.

  Args:
    dataset: what to write.
    dataset_id: `(namespace/)name-v0`.
    folder: where ids are folders; Minari's own place if left out.

  Returns:
    The id's folder.

  Raises:
    ValueError: not an id, something is there already, or rows whose next
      observation is not the one of the next row: Minari stores it once.
  """
  if not is_id(dataset_id):
    raise ValueError(f'dataset_id={dataset_id!r} must be like outplay/name-v0')
  path = pathlib.Path(folder or root()) / dataset_id
  if path.exists():
    raise ValueError(f'{path}: is there already; remove it or name another')
  layout.check(dataset, str(path))
  _check_chained(dataset, path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    (partial / 'data').mkdir(parents=True)
    file = partial / 'data' / 'main_data.hdf5'
    starts = layout.first_rows(dataset)
    with hdf5.open_file(file, 'w') as groups:
      for i, rows in enumerate(_slices(starts, len(dataset.reward))):
        _write_episode(groups.create_group(f'episode_{i}'), i, dataset, rows)
    size = round(file.stat().st_size / 1e6, 1)
    metadata = {**_to_metadata(dataset, dataset_id), 'dataset_size': size}
    text = json.dumps(metadata)
    (partial / 'data' / 'metadata.json').write_text(text, encoding='utf-8')
    partial.rename(path)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return path


def _check_chained(dataset, path):
  inside = np.diff(dataset.episode) == 0
  same = np.asarray(dataset.next_observation[:-1]) == dataset.observation[1:]
  broken = inside & ~same.reshape(len(inside), -1).all(-1)
  if broken.any():
    row = int(np.argmax(broken))
    raise ValueError(
      f'{path}: next_observation in row {row} is not the observation in row '
      f'{row + 1}: Minari cannot hold both'
    )


def _slices(starts, n):
  return [slice(a, b) for a, b in zip(starts, [*starts[1:], n])]


def _write_episode(group, i, dataset, rows):
  last = dataset.next_observation[rows.stop - 1 : rows.stop]
  arrays = {
    'observations': np.concatenate([dataset.observation[rows], last]),
    'actions': dataset.action[rows],
    'rewards': np.asarray(dataset.reward[rows], np.float64),
    'terminations': dataset.terminated[rows],
    'truncations': dataset.truncated[rows],
  }
  for key, value in arrays.items():
    group.create_dataset(key, data=value, chunks=True)
  group.attrs.update(id=i, total_steps=rows.stop - rows.start)


def _to_metadata(dataset, dataset_id):
  about, observation = dataset.about, dataset.observation
  is_frame = observation.dtype == np.uint8
  bound = 0.0 if is_frame else -np.inf, 255.0 if is_frame else np.inf
  full = lambda value: np.full(observation.shape[1:], value).tolist()
  metadata: dict[str, Any] = {
    'dataset_id': dataset_id,
    'data_format': 'hdf5',
    # Frames are stored as they are.
    'jpeg_encoding': False,
    'minari_version': _MINARI_VERSION,
    'total_episodes': int(dataset.episode[-1]) + 1,
    'total_steps': len(dataset.reward),
    'observation_space': _box(observation, full(bound[0]), full(bound[1])),
    'action_space': _box(
      dataset.action, about.action_low.tolist(), about.action_high.tolist()
    ),
    'algorithm_name': about.source,
    'outplay': {'env': about.env, 'extra': about.extra},
  }
  for key, value in (
    ('ref_min_score', about.ref_min),
    ('ref_max_score', about.ref_max),
  ):
    if value is not None:
      metadata[key] = value
  return metadata


def _box(array, low, high):
  shape, dtype = list(array.shape[1:]), str(array.dtype)
  space = {'type': 'Box', 'dtype': dtype, 'shape': shape}
  return json.dumps({**space, 'low': low, 'high': high})
