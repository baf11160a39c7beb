"""A finished run, read back from its folder."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.build.experiment import describe
from experiments.build.material import Experiment
from experiments.files import reading, writing
from experiments.files.errors import Missing, shown
from experiments.runtime import config as configs
from experiments.runtime import run_config

# An experiment's fields in config.json.
_KINDS = {
  **dict.fromkeys(('name', 'agent_name', 'env_name'), str),
  **dict.fromkeys(('steps', 'seed'), int),
  **dict.fromkeys(('agent', 'env', 'run'), dict),
}


def load_experiment(workdir: str, env: str | None = None) -> Experiment:
  """The experiment that a run's config.json describes.

  `env` is the user's, which must be the run's; it is needed if that brings
  code, see `envs.names`.

  Raises:
    UserError: no such run, one that this version cannot read, or one whose
      environment brings code that the user has not asked for.
  """
  from experiments.envs import names

  saved = run_config.read_run_config(workdir)
  file = f'{workdir}/config.json'
  try:
    for name, kind in _KINDS.items():
      if not isinstance(saved[name], kind):
        raise configs.UserError(
          f'{file}: {name} is {shown(repr(saved[name]), 60)}, must be of type '
          f'{kind.__name__}'
        )
    settings = [
      f'{section}.{name}={text}'
      for section in ('agent', 'env', 'run')
      for name, text in _assignments(saved[section])
    ]
    if saved.get('dataset') and 'recorded' not in saved['env']:
      settings.append('env.recorded=none')
    experiment = describe(
      saved['name'],
      agent=saved['agent_name'],
      # A run without an environment may be played in the user's.
      env=saved['env_name'] or env,
      steps=saved['steps'],
      seed=saved['seed'],
      settings=settings,
      dataset=saved.get('dataset') or None,
    )
  except KeyError as error:
    raise configs.UserError(
      f'{file} lacks {shown(error)}: was it written by another version?'
    ) from error
  except ValueError as error:
    message = str(error).removeprefix(f'{file}: ')
    raise configs.UserError(f'{file}: {shown(message, 4000)}') from error
  names.check(experiment.env_name, experiment.env.options, file, env)
  return experiment


def _assignments(config: Mapping[str, Any], prefix: str = ''):
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from _assignments(value, f'{prefix}{name}.')
    elif isinstance(value, list):
      yield prefix + name, ','.join(map(str, value))
    elif value is None or isinstance(value, bool):
      yield prefix + name, str(value).lower()
    else:
      yield prefix + name, str(value)


_STATISTICS = 'statistics.json'


def save_spec(workdir: str | os.PathLike, spec: Any) -> None:
  """Writes what the environment does not know: observations' statistics."""
  if spec.statistics is not None:
    named = zip(('mean', 'std'), (x.tolist() for x in spec.statistics))
    path = pathlib.Path(workdir) / _STATISTICS
    writing.write_text(path, json.dumps(dict(named)) + '\n')


def load_spec(workdir: str | os.PathLike, env_spec: Any) -> Any:
  """The spec of a run's agent; its data set need not be there any more.

  Raises:
    UserError: the statistics that the run keeps are damaged.
  """
  import jax
  import numpy as np

  path = pathlib.Path(workdir) / _STATISTICS
  try:
    saved = reading.read_json(path, dict[str, list[float]])
  except Missing:
    return env_spec
  leaves = jax.tree.leaves(
    env_spec.observation, is_leaf=lambda x: hasattr(x, 'shape')
  )
  size = sum(int(np.prod(leaf.shape, dtype=int)) for leaf in leaves)
  found = []
  for name in ('mean', 'std'):
    numbers = np.asarray(saved.get(name, ()), np.float64)
    if numbers.shape != (size,) or not (np.abs(numbers) < 1e38).all():
      raise configs.UserError(
        f'{shown(path)}: {name} must be {size} finite numbers; restore the '
        'file from a copy'
      )
    found.append(numbers.astype(np.float32))
  if not (found[1] > 0).all():
    raise configs.UserError(
      f'{shown(path)}: std must be above 0 everywhere; restore the file from '
      'a copy'
    )
  return env_spec._replace(statistics=tuple(found))


def load_params(workdir: str, agent: Any, names: Sequence[str]) -> dict:
  """Parameters of a run's checkpoints, by `final`, `best`, `early`.

  If `final` is damaged, the newest whole checkpoint has them, too.

  Raises:
    UserError: one that is not there.
    Damaged: one that is not whole.
  """
  import jax

  from experiments.runtime import checkpoint, integrity, loop

  params = jax.eval_shape(agent.init, jax.random.key(0)).params
  folder, run = pathlib.Path(workdir), run_config.read_identity(workdir)

  def restore(where: pathlib.Path, inside: str = '') -> Any:
    keeper = checkpoint.open(where, read_only=True, run=run, check_rows=False)
    try:
      found = keeper.restore(params, inside)
    finally:
      keeper.close()
    if found is None:
      raise integrity.Damaged(f'{shown(where)} is empty')
    bad = loop.not_finite(found[0])
    if bad:
      raise integrity.Damaged(f'{shown(where)}: {bad[0]} is not finite')
    return found[0]

  loaded = {}
  for name in names:
    where = folder / name
    if not where.is_dir():
      raise configs.UserError(
        f'checkpoint={shown(name)}: {shown(workdir)} has none; there are '
        f'{", ".join(available(workdir)) or "none yet"}'
      )
    try:
      loaded[name] = restore(where)
    except integrity.Damaged as error:
      whole = folder / 'checkpoints'
      if name != 'final' or not whole.is_dir():
        raise
      loaded[name] = restore(whole, '.agent.params')
      print(f'note: {error}; the newest checkpoint is taken')
  return loaded


def available(workdir: str) -> list[str]:
  """Names of the checkpoints that a run holds."""
  folder = pathlib.Path(workdir)
  return [n for n in ('final', 'best', 'early') if (folder / n).is_dir()]
