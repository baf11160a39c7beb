"""From a data set to a run: its environment, rows and score."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.build import capacity, environment
from experiments.build.agent import make_env
from experiments.build.material import (
  About,
  Experiment,
  Kept,
  Material,
  Measure,
  Opened,
)
from experiments.build.source import place_over
from experiments.envs.options import parse_options
from experiments.files.errors import UserError, shown


def opened(name: str):
  """The data set of a name, read and checked once while its files stay.

  Raises:
    ValueError: one line that names file, key and row.
  """
  return _opened(name, _stamp(name))


@functools.lru_cache(maxsize=2)
def _opened(name: str, stamp: tuple):
  from experiments.data import open as data

  del stamp
  try:
    return data.open_dataset(name)
  except ValueError as error:
    what = str(error).removeprefix(f'{shown(name)}: ')
    raise UserError(f'dataset={shown(name)}: {what}') from error


# The most files of a data set; to walk a whole disk would take minutes.
_MOST_FILES = 10_000


def _stamp(name: str) -> tuple:
  """Changes when the files of a data set do; () if there are none."""
  from experiments.data import open as data

  with contextlib.suppress(UserError):
    name = str(data.locate(name))
  # Links are not followed, and what cannot be read is refused later.
  walk = (os.path.join(at, f) for at, _, some in os.walk(name) for f in some)
  files = list(itertools.islice(walk, _MOST_FILES + 1))
  if len(files) > _MOST_FILES:
    raise UserError(
      f'dataset={name}: is a folder of more than {_MOST_FILES} files; name '
      'that of one data set'
    )
  found = []
  for file in sorted(files) or [name]:
    with contextlib.suppress(OSError, ValueError):
      about = os.stat(file, follow_symlinks=file == name)
      found.append((file, about.st_ino, about.st_size, about.st_mtime_ns))
  return tuple(found)


def complete(experiment: Experiment, env: str | None) -> Experiment:
  """An experiment on a data set, with the environment that it was recorded in.

  `env` is the user's, to evaluate in; None for the data set's, with the options
  that it was recorded with unless others are given.

  Raises:
    UserError: there is no data set, the agent cannot learn from one, or its
      environment brings code.
  """
  if not experiment.dataset:
    raise UserError(
      f'dataset: {experiment.agent_name} learns from a data set: '
      '--dataset=PATH (python -m experiments.collect makes one)'
    )
  if hasattr(experiment.config, 'window'):
    raise UserError(
      f'dataset={experiment.dataset}: {experiment.agent_name} learns from '
      'windows of its own play, not from a data set'
    )
  if experiment.run.hold_out or experiment.run.early_update:
    field = 'hold_out' if experiment.run.hold_out else 'early_update'
    value = getattr(experiment.run, field)
    raise UserError(f'{field}={value}: needs a run that acts; set it to 0')
  place = place_of(experiment, env)
  settings = dataclasses.replace(
    experiment.env, options=place.options, recorded=place.recorded
  )
  return experiment._replace(env_name=place.env_name, env=settings)


class Place(NamedTuple):
  """The environment in which a run on a data set is evaluated.

  Attributes:
    env_name: for `envs.make` with `options`; '' for nowhere.
    recorded: JSON of `envs.recorded.Recorded`; '' for nothing.
    notes: lines to print on how it differs from the data's environment.
  """

  env_name: str
  options: tuple[str, ...]
  recorded: str
  notes: tuple[str, ...] = ()


def place_of(experiment: Experiment, env: str | None) -> Place:
  """Where an experiment on a data set is evaluated; its settings come first.

  `env` is as for `complete`.

  Raises:
    UserError: the data set cannot be read, or its environment has what a file
      may not decide.
  """
  from experiments.envs import names
  from experiments.envs import recorded as recording

  own = experiment.env
  if env and own.recorded:
    # A saved run has it all, and its data need not be there any more.
    return Place(env, own.options, own.recorded)
  try:
    dataset = opened(experiment.dataset)
  except UserError:
    if not env:
      raise
    # The error comes again if its rows are needed.
    return Place(env, own.options, own.recorded)
  about, where = dataset.about, f'dataset={shown(experiment.dataset)}'
  options = own.options or tuple(about.extra.get('options', ()))
  text, notes = own.recorded, ()
  if not text and recording.KEY in about.extra:
    text = json.dumps(about.extra[recording.KEY], sort_keys=True)
    notes = tuple(about.extra.get(recording.LEFT_OUT, ()))
  recorded = recording.decode(text, f'{where}: {recording.KEY}')
  if notes:
    left_out = shown(', '.join(map(str, notes)))
    notes = (
      f'note: {about.name} was recorded with {left_out}, which is not rebuilt '
      'from a file; --env=gymnasium:MODULE:ID brings an environment of your '
      'own',
    )
  if not env:
    names.check(about.env, () if own.options else options, where)
    return _own_place(dataset, options, text, notes)
  theirs = about.env.rpartition(':')[2]
  if env.rpartition(':')[2] == theirs:
    # The user vouches for the environment, not for a file's options.
    plain = own.options or not names.code_in('', options)
    return Place(env, options if plain else (), text, notes)
  order = ', '.join(part for part, _ in recorded.columns)
  parts = f', its observations are {shown(order)} in this order' * bool(order)
  note = f'note: {about.name} was recorded in {shown(theirs)}{parts}; it is '
  notes = (*notes, f'{note}evaluated in {env}, as asked') if theirs else ()
  return Place(env, own.options, text, notes)


def _own_place(dataset, options, text, notes) -> Place:
  """The environment that a data set names, or none if it is not here."""
  from experiments.envs import make

  about = dataset.about
  if not about.env:
    return Place('', options, text, notes)
  parsed = parse_options(options)
  try:
    env = make.make(about.env, 1, training=False, options=parsed, recorded=text)
    if text:
      spec_of(dataset, env.spec)
  except ValueError as error:
    if not text:
      # Ours are envpool's: the name or an option is wrong.
      return Place(about.env, options, text, notes)
    why = shown(str(error).partition('; ')[0], 300)
    note = (
      f'note: {about.name} is trained without an environment and nothing is '
      f'played: {why}; --env=NAME gives one'
    )
    return Place('', options, text, (note,))
  return Place(about.env, options, text, notes)


def notes(experiment: Experiment) -> tuple[str, ...]:
  """Lines on how the evaluation differs from where the data are from.

  Raises:
    UserError: see `place_of`.
  """
  from experiments.envs import names

  unset = experiment._replace(
    env=dataclasses.replace(experiment.env, recorded='')
  )
  own = opened(experiment.dataset).about.env
  # One that names code is here only because it was asked for.
  is_asked = experiment.env_name != own or names.code_in(own)
  return place_of(unset, (is_asked and experiment.env_name) or None).notes


def checksum(name: str) -> str:
  """A checksum of a data set's rows, which a resumed run must find again.

  Raises:
    UserError: its folder has more files than a data set can.
  """
  return _checksum(name, _stamp(name))


@functools.lru_cache(maxsize=2)
def _checksum(name: str, stamp: tuple) -> str:
  from experiments.runtime import transitions as runtime

  return runtime.fingerprint(rows_of(_opened(name, stamp)))


def summary(dataset: Any) -> str:
  """One line about a data set: its size and its returns."""
  from experiments.data import layout

  about, returns = dataset.about, layout.returns(dataset)
  line = f'data set {about.name}: {len(dataset.reward):,} transitions'
  if not len(returns):
    return f'{line}, no whole episode'
  line += f', {len(returns):,} whole episodes, mean return {returns.mean():.1f}'
  found = score(about, float(returns.mean()))
  return line if found is None else f'{line} (score {found:.1f})'


def scored(name: str, mean_return: float) -> str:
  """One line that compares a mean return with those of a data set."""
  from experiments.data import layout

  dataset = opened(name)
  returns = layout.returns(dataset)
  found = score(dataset.about, mean_return)
  line = (
    'no reference returns: no score'
    if found is None
    else (f'normalised score {found:.1f}')
  )
  own = f'; the data plays {returns.mean():.1f}' if len(returns) else ''
  return f'{line}{own}'


def score(about: Any, returns: Any) -> Any:
  """The normalised score of returns; None without a reference pair."""
  from experiments.data import layout

  low, high = about.ref_min, about.ref_max
  if low is None or high is None or not low < high:
    return None
  return layout.normalised_score(about, returns)


def spec_of(dataset: Any, env_spec: Any | None):
  """The agent's spec: the simulator's if any, with the data's statistics.

  Raises:
    UserError: they do not fit together.
  """
  import numpy as np

  from experiments.data import layout

  own = layout.spec(dataset)
  if env_spec is not None:
    for what, ours, theirs in (
      ('observation', _shapes(own), _shapes(env_spec)),
      (
        'action',
        getattr(own.action, 'shape', None),
        getattr(env_spec.action, 'shape', None),
      ),
    ):
      if ours != theirs:
        raise UserError(
          f'env={env_spec.name}: its {what} has shape {theirs}, but '
          f'{dataset.about.name} has {ours}'
        )
    for bound in ('low', 'high'):
      ours, theirs = getattr(own.action, bound), getattr(env_spec.action, bound)
      if not np.allclose(ours, theirs):
        raise UserError(
          f'env={env_spec.name}: action bound {bound}={theirs}, but '
          f'{dataset.about.name} has {ours}'
        )
  statistics = own.statistics
  if statistics is not None:
    # Constants must not be divided by 0 (as in TD3+BC).
    statistics = (statistics[0], statistics[1] + np.float32(1e-3))
  return (env_spec or own)._replace(statistics=statistics)


def _shapes(spec):
  import jax

  leaves = jax.tree.leaves(spec.observation, is_leaf=_is_spec)
  return tuple(tuple(leaf.shape) for leaf in leaves)


def _is_spec(x):
  return hasattr(x, 'dtype') and hasattr(x, 'shape')


def rows_of(dataset: Any) -> Any:
  """`transitions.Rows` of a data set."""
  import numpy as np

  from agents.core.types import Transition
  from experiments.data import layout
  from experiments.runtime.transitions import Rows

  transitions = Transition(
    o_tm1=dataset.observation,
    a_tm1=dataset.action,
    r_t=np.asarray(dataset.reward, np.float32),
    # Time limits bootstrap.
    discount_t=1.0 - np.asarray(dataset.terminated, np.float32),
    o_t=dataset.next_observation,
  )
  return Rows(transitions, layout.initial_observations(dataset))


def make_source(
  experiment: Experiment, dataset: Any, phase: Any, mesh: Any = None
):
  """The source of a phase of an experiment on a data set.

  A batch is divided over the devices of `mesh`, if any.

  Raises:
    UserError: rows on the host for an agent that imagines, or rollouts of more
      rows than a batch has.
  """
  from experiments.runtime import transitions as runtime

  run, config = experiment.run, experiment.config
  source = runtime.from_dataset(
    rows_of(dataset),
    run.batch_size,
    reward_scale=run.reward_factor,
    on_device=run.data_on == 'device',
    place=place_over(mesh),
  )
  if phase.imagine is None:
    return source
  if run.data_on != 'device':
    raise UserError(
      f'data_on={run.data_on}: {experiment.agent_name} imagines in the program '
      'that learns; take device'
    )
  if config.rollout_batch > run.batch_size:
    raise UserError(
      f'rollout_batch={config.rollout_batch}: must be at most batch_size='
      f'{run.batch_size}'
    )
  real = max(round(config.real_fraction * run.batch_size), 1)
  return runtime.mixed(
    source,
    phase.imagine,
    phase.agent,
    starts=config.rollout_batch,
    capacity=config.model_capacity,
    real=real,
    model=max(run.batch_size - real, 1),
  )


def prepared(experiment: Experiment, parts: int = 1) -> Opened:
  """The rows that an experiment learns from; `parts` do not divide them.

  Raises:
    ValueError: they cannot be read, or do not fit the environment.
  """
  del parts
  data, stage = opened(experiment.dataset), None
  if experiment.env_name:
    stage = make_env(experiment, training=False, num_envs=1)

  def source(
    experiment: Experiment, phase: Any, layout: Any = None, stopping: Any = None
  ):
    del stopping
    return make_source(experiment, data, phase, layout and layout.mesh)

  return Opened(spec_of(data, stage and stage.spec), False, source)


def kept(experiment: Experiment, agent: Any, spec: Any) -> Kept:
  """What a model imagines, if there is one."""
  del agent
  # At least the observations before and after.
  each = 2 * capacity.bytes_of(capacity.timestep(spec).observation)
  value = getattr(experiment.config, 'model_capacity', 0)
  return Kept('model_capacity', value, value * each, each)


def about(experiment: Experiment, spec: Any) -> About:
  """The environment's lines, after the data's own line and notes."""
  before = summary(opened(experiment.dataset)), *notes(experiment)
  return environment.about(experiment, spec)._replace(before=before)


def evaluator(
  experiment: Experiment, agent: Any
) -> Callable[[Any, int], dict[str, float]] | None:
  """`environment.evaluator`, with the normalised score if there is one."""
  play = environment.evaluator(experiment, agent)
  if play is None:
    return None

  def evaluate(params, step):
    return _with_score(experiment, play(params, step))

  return evaluate


def measure(experiment: Experiment, agent: Any) -> Measure | None:
  """`environment.measure`, likewise."""
  found = environment.measure(experiment, agent)
  if found is None:
    return None
  summarise = lambda played: _with_score(experiment, found.summarise(played))
  return found._replace(summarise=summarise)


def _with_score(experiment, found):
  about = opened(experiment.dataset).about
  scores = score(about, found['eval_return'])
  return found if scores is None else found | {'eval_score': scores}


def columns(experiment: Experiment, agent: Any) -> set[str]:
  """Names of the metrics that `evaluator` finds."""
  names = environment.columns(experiment, agent)
  if names and score(opened(experiment.dataset).about, 0.0) is not None:
    names |= {'eval_score'}
  return names


def finisher(experiment: Experiment, agent: Any):
  """`environment.finisher`, with a line on the score and the data's returns."""
  remark = functools.partial(scored, experiment.dataset)
  return environment.finisher(experiment, agent, remark)


MATERIAL = Material(
  flag='dataset',
  acts=False,
  plays=True,
  metric='eval_return',
  memory=('batch_size', 'rollout_batch', 'data_on'),
  sizes=('model_capacity', 'data_on'),
  complete=complete,
  # The path may be any.
  name=lambda experiment: opened(experiment.dataset).about.name,
  fingerprint=lambda experiment: {
    'dataset_checksum': checksum(experiment.dataset)
  },
  open=prepared,
  rows=lambda experiment: rows_of(opened(experiment.dataset)),
  kept=kept,
  describe=about,
  evaluate=evaluator,
  measure=measure,
  columns=columns,
  keep=lambda experiment, workdir: None,
  finish=finisher,
)
