"""Reads and writes Minari's hdf5 folders without the minari package.

    ID/data/metadata.json    spaces as JSON text, counts, reference scores
    ID/data/main_data.hdf5   groups `episode_<i>` with observations
                             `[T + 1, ...]`, actions `[T, ...]`, rewards,
                             terminations and truncations `[T]`

Observations that are a Dict or Tuple become one vector, in the order of the
space that Minari stores, which is the simulator's: both are converted by
`envs.host.observation_codec`. Arrow and Parquet (which Minari can convert),
JPEG frames, texts and actions that are not a Box are not supported.
"""

import dataclasses
import json
import os
import pathlib
import re
import secrets
import shutil
from typing import Any

import numpy as np

from experiments.data import hdf5, layout, spaces
from experiments.envs import host, recorded
from experiments.files import reading
from experiments.files.errors import UserError, shown

# The oldest version that can read what is written here.
_MINARI_VERSION = '0.5.3'
_FLAGS = ('terminations', 'truncations')


def is_id(name: str) -> bool:
  """Whether a name is a Minari id, `(namespace/)name-v0`."""
  return re.fullmatch(r'([-\w]+/)*[-\w]+-v\d+', name) is not None


def root() -> pathlib.Path:
  """Minari's folder of data sets on this machine."""
  default = pathlib.Path.home() / '.minari' / 'datasets'
  return pathlib.Path(os.environ.get('MINARI_DATASETS_PATH', default))


def data_folder(path: pathlib.Path) -> pathlib.Path | None:
  """The folder with `metadata.json`: `path` or the `data` folder in it."""
  for folder in (path, path / 'data'):
    if os.path.lexists(folder / 'metadata.json'):
      return folder
  return None


@dataclasses.dataclass(frozen=True)
class _Ours:
  """The fields that `save` adds to Minari's own."""

  env: str = ''
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Metadata:
  """The fields of `metadata.json` that are read."""

  total_episodes: int
  observation_space: str
  action_space: str
  data_format: str = 'hdf5'
  jpeg_encoding: bool = True
  dataset_id: str | None = None
  env_spec: str | None = None
  eval_env_spec: str | None = None
  ref_min_score: float | None = None
  ref_max_score: float | None = None
  algorithm_name: str | None = None
  outplay: _Ours | None = None


def load(path: str | os.PathLike) -> layout.Dataset:
  """Reads a data set, in the order of its episodes.

  The path is an id's folder, or the folder `data` in it. An episode without a
  flag at its end was truncated, except for the last one, which is unfinished.

  Raises:
    ValueError: h5py is not installed; a file, key or episode is missing or
      damaged; a space or format is not supported; the rows are not a valid data
      set; the folder has links; or the data do not fit into memory.
  """
  path = pathlib.Path(path)
  folder = data_folder(path)
  if folder is None:
    raise UserError(
      f'{shown(path)}: metadata.json is missing; must be a Minari folder'
    )
  reading.check_folder(folder)
  about = f'{folder}/metadata.json'
  metadata = _metadata(folder / 'metadata.json')
  space = spaces.read(metadata.observation_space, f'{about}: observation_space')
  if _is_image(space) and metadata.jpeg_encoding:
    raise UserError(
      f'{shown(folder)}: observations are JPEG frames, which are unsupported; '
      'write them with jpeg_encoding=False'
    )
  bounds = spaces.read_bounds(metadata.action_space, f'{about}: action_space')
  size, lay_out = spaces.laid_out(space, f'{about}: observation_space')
  if metadata.outplay is not None:
    # `save` has already converted the observations.
    lay_out = lambda rows: rows
  file = folder / 'main_data.hdf5'
  with hdf5.open_file(file) as opened:
    reader = hdf5.Reader(opened, file)
    episodes = [
      _episode(reader, i, space, size, lay_out, shown(file))
      for i in range(metadata.total_episodes)
    ]
  # Only the last episode can be unfinished; the others were truncated.
  for *_, terminated, truncated in episodes[:-1]:
    truncated[-1] |= not terminated[-1]
  try:
    columns = [np.concatenate(column) for column in zip(*episodes)]
  except ValueError as error:
    raise UserError(
      f'{shown(file)}: episodes differ in shape: {shown(error)}'
    ) from error
  longest = max(len(episode[2]) for episode in episodes)
  cut = longest if columns[-1].any() else None
  dataset = layout.make(
    *columns, about=_about(metadata, space, bounds, folder, cut)
  )
  return layout.check(dataset, shown(file))


def _metadata(file):
  metadata = reading.read_json(file, dict[str, Any])
  kind = metadata.get('data_format', 'hdf5')
  if kind != 'hdf5':
    raise UserError(
      f"{shown(file)}: data_format is {shown(repr(kind), 40)}, must be 'hdf5'; "
      'convert it with Minari'
    )
  metadata = reading.decode_json(json.dumps(metadata), _Metadata, str(file))
  if metadata.total_episodes < 1:
    raise UserError(
      f'{shown(file)}: total_episodes is {metadata.total_episodes}, must be at '
      'least 1'
    )
  return metadata


def _is_image(space):
  shape = getattr(space, 'shape', None) or ()
  return (
    type(space).__name__ == 'Box'
    and space.dtype == np.uint8
    and len(shape) in (2, 3)
    and min(shape[:2]) >= 32
  )


def _episode(reader, i, space, size, lay_out, where):
  """The columns of one episode, with the file's dtypes."""
  name = f'episode_{i}'
  if not reader.has(name):
    raise UserError(f'{where}: {name} is missing')
  rows = spaces.read_rows(reader, f'{name}/observations', space, where)
  action, reward, terminated, truncated = (
    reader.read(f'{name}/{key}') for key in ('actions', 'rewards', *_FLAGS)
  )
  for key, value in (
    ('rewards', reward),
    *zip(_FLAGS, (terminated, truncated)),
  ):
    if value.ndim != 1:
      raise UserError(
        f'{where}: {name}/{key} has shape {value.shape}, must be a number per '
        'row'
      )
  if action.ndim < 1:
    raise UserError(f'{where}: {name}/actions is a single number, must be rows')
  steps = len(reward)
  lengths = {
    'actions': len(action),
    'terminations': len(terminated),
    'truncations': len(truncated),
  }
  found = [('observations', n - 1) for n in spaces.lengths(rows)]
  for key, length in (*found, *lengths.items()):
    if length != steps or not steps:
      raise UserError(
        f'{where}: {name}/{key} has {length} steps, rewards has {steps}: must '
        'be equal and at least 1'
      )
  reader.claim(f'{name}/observations', 4 * size * steps)
  observations = lay_out(rows)
  terminated, truncated = terminated.astype(bool), truncated.astype(bool)
  early = (terminated | truncated)[:-1]
  if early.any():
    raise UserError(
      f'{where}: {name} has a flag at step {int(np.argmax(early))} of {steps}, '
      'must have flags at its last step only'
    )
  return (
    *(observations[:-1], action, reward, observations[1:]),
    *(terminated, truncated),
  )


def _about(metadata, space, bounds, folder, cut):
  """The description; `cut` is the length at which episodes were truncated."""
  ours = metadata.outplay or _Ours()
  env, extra = ours.env, dict(ours.extra)
  # The environment for evaluation takes precedence, if there is one.
  for key in ('eval_env_spec', 'env_spec'):
    text = getattr(metadata, key)
    if text is not None and metadata.outplay is None:
      where = f'{folder}/metadata.json: {key}'
      found, left_out = recorded.from_spec(text, where)
      if found.max_episode_steps is None:
        found = dataclasses.replace(found, max_episode_steps=cut)
      parts = host.columns(space, where)
      found = dataclasses.replace(found, columns=parts)
      # The id may name a module, which `envs.names` refuses.
      env = f'gymnasium:{recorded.full_id(text)}'
      extra[recorded.KEY] = dataclasses.asdict(found)
      if left_out:
        extra[recorded.LEFT_OUT] = left_out
      break
  return layout.About(
    name=shown(metadata.dataset_id or folder.parent.name, 100),
    env=env,
    action_low=bounds[0],
    action_high=bounds[1],
    ref_min=metadata.ref_min_score,
    ref_max=metadata.ref_max_score,
    source=shown(metadata.algorithm_name or '', 1000),
    extra=extra,
  )


def save(
  dataset: layout.Dataset, dataset_id: str, folder: str | os.PathLike = ''
) -> pathlib.Path:
  """Writes a folder that Minari's own reader can open, and returns its path.

  `dataset_id` is `(namespace/)name-v0`; its folder is Minari's if left out.

  Raises:
    ValueError: the id is invalid, the folder exists already, or the next
      observation of a row differs from the next row's observation, which Minari
      cannot represent.
  """
  if not is_id(dataset_id):
    raise UserError(f'dataset_id={dataset_id!r} must be like outplay/name-v0')
  path = pathlib.Path(folder or root()) / dataset_id
  if path.exists():
    raise UserError(f'{path}: exists already; remove it or name another')
  layout.check(dataset, str(path))
  _check_chained(dataset, path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.partial')
  partial.mkdir()  # Fails if it exists.
  try:
    (partial / 'data').mkdir()
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
    raise UserError(
      f'{path}: next_observation in row {row} differs from observation in row '
      f'{row + 1}: must be equal, because Minari stores it once'
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
    # Frames are stored uncompressed.
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
