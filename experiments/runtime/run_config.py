"""A run's config.json: written, read, and compared with a new command's."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.files import reading, writing
from experiments.files.errors import Missing, UserError, shown

# Whose versions may change a run's numbers.
_PACKAGES = (
  'outplay',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'chex',
  'mctx',
  'rlax',
  'envpool',
  'gymnasium',
  'numpy',
)


def made_with(device: str | None = None) -> dict[str, Any]:
  """What a run was made with: versions, commit, device.

  If `device` is None JAX is asked and thereby started (so call this after
  `jax.distributed.initialize`).
  """
  if device is None:
    import jax

    device = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  versions = {'python': platform.python_version()}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {'versions': versions, 'commit': _commit(), 'device': device}


def _commit() -> str | None:
  """The commit of this checkout, with `-dirty` if it is changed, or None."""
  here = pathlib.Path(__file__).resolve().parents[2]
  if not (here / '.git').exists():
    return None
  try:
    described = subprocess.run(
      ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
      cwd=here,
      capture_output=True,
      text=True,
      timeout=10,
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return described.stdout.strip() or None


# Settings that may differ when a run is resumed.
FREE = ('run.devices', 'run.acting_devices', 'dataset')


def write_run_config(
  workdir: str | os.PathLike,
  config: Mapping[str, Any],
  device: str | None = None,
) -> None:
  """Makes a run's folder and its `config.json`, atomically.

  `config` is all that decides the run's numbers: preset, agent, env, seed,
  steps and the sections of settings (dataclasses become dictionaries).
  `made_with` is added.

  Raises:
    UserError: something in it cannot be written as JSON.
  """
  path = pathlib.Path(workdir) / 'config.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  content = {**_plain(config), 'made_with': made_with(device)}
  writing.write_text(path, json.dumps(content, indent=2) + '\n')


def read_run_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """A run's `config.json`; dataclasses are dictionaries, tuples lists.

  Settings that an older version wrote elsewhere are moved.

  Raises:
    UserError: `workdir` is not a run's folder, or the file cannot be read.
  """
  return _upgraded(_read(workdir))


def _read(workdir: str | os.PathLike) -> dict[str, Any]:
  try:
    return reading.read_json(pathlib.Path(workdir) / 'config.json')
  except Missing as error:
    raise UserError(
      f"workdir={shown(workdir)}: is not a run's folder, has no config.json; "
      'name the --workdir of python -m experiments.train'
    ) from error


# A mixture's fields that its router used, before routers had configs.
_ROUTERS = {
  'noisy_top_k': (
    *('k', 'groups', 'group_k', 'noise', 'noise_epsilon'),
    *('prune_below', 'load_momentum'),
  ),
  'balanced': ('k', 'limit', 'threshold_weight'),
  'expert_choice': ('capacity_factor',),
  'soft': ('slots',),
  'biased_top_k': ('k', 'bias_rate', 'prune_below', 'load_momentum'),
}


# Fields that sections have now, by one that they had before: their values then.
_ADDED = (
  ('agent', 'consistency_weight', 'variance_weight', 0.0),
  ('agent.search', 'num_simulations', 'embedding_dtype', 'float32'),
  ('agent.search', 'num_simulations', 'engine', 'auto'),
  ('run', 'replay_capacity', 'frames_on', 'host'),
  ('run', 'evaluate_episodes', 'evaluate_decisions', 0),
  ('agent.search', 'num_samples', 'wide_samples', 0),
  ('agent.search', 'num_samples', 'wide_temperature', 9.0),
  ('agent.search', 'num_samples', 'leaf_samples', 0),
  ('agent.network', 'projector', 'action_embedding', 0),
  ('agent.network.moe', 'num_experts', 'room_factor', 2.0),
  ('agent.critic_moe', 'num_experts', 'room_factor', 2.0),
)


def _upgraded(saved: Any) -> Any:
  """Settings of an older version as this one would have written them."""
  for path, known, name, value in _ADDED:
    section = _section(saved, path)
    if known in section:
      section.setdefault(name, value)
  network = _section(saved, 'agent.network')
  if {'projector', 'norm'} <= set(network):
    network.setdefault('projection_norm', network['norm'])
  for path in ('agent.network.moe', 'agent.critic_moe'):
    moe = _section(saved, path)
    router = moe.get('router')
    if not isinstance(router, str) or router not in _ROUTERS:
      continue
    own = {n: moe[n] for n in _ROUTERS[router] if n in moe}
    for name in {n for names in _ROUTERS.values() for n in names}:
      if name != 'capacity_factor':  # it is the mixture's, too
        moe.pop(name, None)
    moe['router'] = {'name': router, **own}
  agent = _section(saved, 'agent')
  if 'off_policy_correction' in agent:
    both = agent.pop('off_policy_correction')
    agent |= dict.fromkeys(('dynamic_horizon', 'searched_values'), both)
  return saved


def _section(saved: Any, path: str) -> dict[str, Any]:
  """The settings at a path, or an empty section."""
  for name in path.split('.'):
    saved = saved.get(name) if isinstance(saved, dict) else None
  return saved if isinstance(saved, dict) else {}


def read_identity(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """A run's seed and a digest of its settings; None without a config.json.

  Raises:
    UserError: it cannot be read.
  """
  if not os.path.lexists(pathlib.Path(workdir) / 'config.json'):
    return None
  # As it was written, for the checkpoints were written then.
  config = _read(workdir)
  config.pop('made_with', None)
  return {'seed': config.get('seed'), 'settings': digest(config)}


def digest(config: Mapping[str, Any]) -> str:
  """SHA-256 of the settings that must not change during a run.

  Raises:
    UserError: something in it cannot be written as JSON.
  """
  leaves = [leaf for leaf in _leaves(_plain(config)) if leaf[0] not in FREE]
  text = json.dumps(sorted(leaves, key=lambda leaf: leaf[0]))
  return hashlib.sha256(text.encode()).hexdigest()


def check_run_config(
  workdir: str | os.PathLike,
  config: Mapping[str, Any],
  device: str | None = None,
  free: Sequence[str] = (),
) -> list[str] | None:
  """Whether a folder's run may resume with this config.

  `free` are paths of settings that may change (`run.devices`); the rest is as
  for `write_run_config`.

  Returns:
    None if there is no run yet; else how what it was made with differs now
    (versions, commit, device), which may change numbers: `['versions.jax was
    0.10.1, is 0.10.2']`.

  Raises:
    UserError: the folder holds a run of another config; names the fields.
  """
  if not os.path.lexists(pathlib.Path(workdir) / 'config.json'):
    return None
  saved = read_run_config(workdir)
  then = saved.pop('made_with', {})
  differences = [
    change
    for change in _changes(saved, _plain(config))
    if change.partition(' ')[0] not in free
  ]
  if differences:
    raise UserError(
      f'{workdir} holds another run: {"; ".join(differences)}. '
      'Take another --workdir, or delete it'
    )
  return _changes(then, made_with(device))


def _changes(then: Any, now: Any) -> list[str]:
  """`'a.b was 1, is 2'` for each leaf of two JSON dictionaries."""
  then, now = dict(_leaves(then)), dict(_leaves(now))
  # As JSON: there NaN equals itself, and True is not 1.
  text = {
    name: tuple(
      json.dumps(side[name]) if name in side else 'unset'
      for side in (then, now)
    )
    for name in (*then, *(n for n in now if n not in then))
  }
  return [
    f'{name} was {before}, is {after}'
    for name, (before, after) in text.items()
    if before != after
  ]


def _leaves(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict) and tree:
    for name, value in tree.items():
      yield from _leaves(value, f'{prefix}.{name}' if prefix else name)
  elif prefix:
    yield prefix, tree


def _plain(value: Any) -> Any:
  """Dataclasses, tuples and numpy scalars as JSON would return them."""

  def default(x: Any) -> Any:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
      return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    as_python = getattr(x, 'tolist', None)  # numpy's
    if as_python is not None:
      return as_python()
    raise UserError(
      f'{x!r}: cannot be written to config.json; use numbers, text, lists or '
      'dataclasses'
    )

  return json.loads(json.dumps(value, default=default))
