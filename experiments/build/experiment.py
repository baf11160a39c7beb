"""What is run: a preset with changes, checked before anything is made."""

import dataclasses
import importlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from experiments import presets
from experiments.build import dataset as datasets
from experiments.files.errors import shown
from experiments.presets.table import EnvConfig, Preset, RunConfig
from experiments.runtime import config as configs


class Experiment(NamedTuple):
  """All that a run needs.

  Attributes:
    name: the preset's.
    agent_name: a module of `agents/`.
    env_name: for `experiments.envs.make`; '' where a data set has none.
    steps: decisions; updates where it learns from a data set.
    time_steps: in which so many decisions are expected to be taken; see
      `runtime.sources.Pace`.
    seed: the run's.
    config: the agent's `Config`.
    env: `EnvConfig`.
    run: `RunConfig`.
    dataset: what `experiments.data.open_dataset` opens, or the path of a text;
      '' for none.
  """

  name: str
  agent_name: str
  env_name: str
  steps: int
  seed: int
  config: Any
  env: EnvConfig
  run: RunConfig
  dataset: str = ''
  time_steps: int = 0

  def as_dict(self) -> dict[str, Any]:
    """What config.json holds."""
    # The schedules that follow from the time steps are in the agent's part.
    sections = ('config', 'env', 'run', 'time_steps')
    fields = {n: v for n, v in self._asdict().items() if n not in sections}
    plain = {n: dataclasses.asdict(getattr(self, n)) for n in sections[:3]}
    if not self.env.recorded:  # Folders from before it was known go on.
      del plain['env']['recorded']
    return fields | {'agent': plain.pop('config')} | plain

  @property
  def is_text(self) -> bool:
    """Whether its agent learns from a text."""
    return hasattr(self.config, 'text')

  @property
  def pace(self):
    """When rows are taken, see `runtime.sources.Pace`."""
    from experiments.runtime.sources import Pace

    ratio = Fraction(self.run.decisions_per_update).limit_denominator(1000)
    return Pace(
      num_envs=self.env.num_envs,
      warmup_decisions=self.run.warmup_decisions,
      decisions_per_update=ratio,
      max_decisions=self.steps,
    )

  @property
  def updates(self) -> int:
    """Updates of the whole run; a plan where it ends by its decisions."""
    if self.dataset:
      return self.steps
    return self.pace.updates(self.time_steps) + self.run.extra_updates

  @property
  def ends_by_decisions(self) -> bool:
    """Whether it acts, so that `budget` ends it and not its updates."""
    return not self.dataset

  @property
  def budget(self):
    """A fresh `runtime.budget.Budget`, for a run that acts."""
    from experiments.runtime.budget import Budget

    return Budget(self.pace, self.run.extra_updates)


def describe(
  preset_name: str,
  *,
  agent: str | None = None,
  env: str | None = None,
  steps: int | None = None,
  seed: int = 0,
  settings: Sequence[str] = (),
  dataset: str | None = None,
) -> Experiment:
  """A preset with changes.

  Args:
    preset_name: a row of `experiments.presets`.
    agent: another agent; the preset's settings for fields that it does not
      have are then left out.
    env: another environment.
    steps: other decisions (or updates on a data set).
    seed: of the run.
    settings: `field=value`.
    dataset: to learn from, instead of from play; a data set or a text.

  Returns:
    `Experiment`; nothing is made or compiled yet.

  Raises:
    ValueError: with one line that names what is wrong and what would be right.
  """
  from experiments.runtime import config as configs

  preset: Preset = presets.find(preset_name)
  agent_name = presets.find_agent(agent or preset.agent)
  module = importlib.import_module(f'agents.{agent_name}')
  sections = {'agent': module.Config(), 'env': EnvConfig(), 'run': RunConfig()}
  own = preset.settings
  if agent_name != preset.agent:
    own = [s for s in own if _has(sections, s)]
  sections = configs.override(sections, own)
  sections = configs.override(sections, settings)
  experiment = Experiment(
    name=preset_name,
    agent_name=agent_name,
    env_name=env or preset.env,
    dataset=dataset or '',
    steps=preset.steps if steps is None else steps,
    seed=seed,
    config=sections['agent'],
    env=sections['env'],
    run=sections['run'],
  )
  _check_integers(experiment)
  _check_recorded(experiment.env.recorded)
  if is_fresh(experiment.config):
    experiment = _complete_fresh(experiment)
  # A preset without an environment is not for play, whatever env is given.
  elif dataset or not preset.env or presets.is_offline(agent_name):
    experiment = datasets.complete(experiment, env)
  else:
    _check(experiment)
  # Whole rows, at the preset's rate.
  planned = math.ceil(
    experiment.steps * Fraction(preset.time_steps or preset.steps, preset.steps)
  )
  planned += -planned % experiment.env.num_envs
  experiment = experiment._replace(time_steps=planned)
  if experiment.updates > configs.MAX_INT:
    raise ValueError(
      f'steps={experiment.steps}: makes {experiment.updates} updates, must be '
      f'at most {configs.MAX_INT}; take fewer steps'
    )
  # What of the agent depends on the size of the run.
  fields = {f.name for f in dataclasses.fields(experiment.config)}
  lengths = {'total_updates': experiment.updates}
  if not dataset:
    lengths = {
      # The schedule of acting ends where acting does.
      'total_updates': experiment.pace.updates(planned),
      'total_decisions': planned,
    }
  lengths |= {'streams': experiment.env.num_envs}
  known = {n: v for n, v in lengths.items() if n in fields}
  config = dataclasses.replace(experiment.config, **known)
  return experiment._replace(config=config)


def _check_integers(experiment: Experiment) -> None:
  """Refuses integers that no array of JAX can hold."""
  from experiments.runtime import config as configs

  def check(name, value):
    if dataclasses.is_dataclass(value):
      for field in dataclasses.fields(value):
        check(field.name, getattr(value, field.name))
    elif isinstance(value, tuple):
      for item in value:
        check(name, item)
    elif name in ('replay_capacity', 'model_capacity'):
      return  # `experiments.build.capacity` tells what it would take
    elif type(value) is int and abs(value) > configs.MAX_INT:
      raise ValueError(f'{name}={value}: must be at most {configs.MAX_INT}')

  check('steps', experiment.steps)
  for section in (experiment.config, experiment.env, experiment.run):
    check('', section)


def _check_recorded(text: str) -> None:
  """Refuses a description of an environment that no data set gives."""
  from experiments.envs import recorded

  if not text:
    return
  try:
    recorded.decode(text, 'recorded')
  except ValueError as error:
    raise ValueError(
      f'recorded={shown(text, 60)}: must be none, or what a data set gives: '
      f'{error}'
    ) from error


def _has(sections, setting: str) -> bool:
  from experiments.runtime import config as configs

  try:
    configs.override(sections, [setting])
  except configs.UserError:
    return False
  return True


def _check(experiment: Experiment) -> None:
  run, envs = experiment.run, experiment.env.num_envs
  if experiment.steps <= run.warmup_decisions:
    raise ValueError(
      f'steps={experiment.steps}: must be above warmup_decisions='
      f'{run.warmup_decisions}'
    )
  window = window_of(experiment.config)
  need = (window + 1) * envs
  if run.warmup_decisions < need:
    raise ValueError(
      f'warmup_decisions={run.warmup_decisions}: must be at least {need}, so '
      f'that {envs} environments have a window of {window} '
      'steps each'
    )
  if run.replay_capacity < need:
    raise ValueError(
      f'replay_capacity={run.replay_capacity}: must be at least {need}'
    )
  if run.acting_devices and run.acting == 'synchronous':
    raise ValueError(
      f'acting_devices={run.acting_devices}: needs acting=asynchronous'
    )


def is_fresh(config: Any) -> bool:
  """Whether an agent takes all steps of its streams, once and in order.

  Such agents keep memory of each stream in their state, and say so by a class
  attribute of their `Config`. They have no replay: a batch is one row of each
  environment.
  """
  return getattr(config, 'fresh', False)


def _complete_fresh(experiment: Experiment) -> Experiment:
  """The experiment, its pace that of fresh rows."""
  if experiment.dataset:
    raise ValueError(
      f'dataset={experiment.dataset}: {experiment.agent_name} learns from '
      'fresh steps of its own play, not from a data set'
    )
  if experiment.run.hold_out:
    raise ValueError(
      f'hold_out={experiment.run.hold_out}: {experiment.agent_name} learns '
      'from fresh steps and not from windows; set it to 0'
    )
  if experiment.run.extra_updates:
    raise ValueError(
      f'extra_updates={experiment.run.extra_updates}: '
      f'{experiment.agent_name} makes an update of each fresh step and has no '
      'replay for more; set it to 0'
    )
  num, usual = experiment.env.num_envs, RunConfig()
  pace = {
    'batch_size': num,
    'warmup_decisions': num,
    'decisions_per_update': float(num),
  }
  for name, value in pace.items():
    asked = getattr(experiment.run, name)
    if asked not in (value, getattr(usual, name)):
      raise ValueError(
        f'{name}={asked:g}: {experiment.agent_name} takes one step of each of '
        f'its {num} games an update; set env.num_envs instead'
      )
  if experiment.steps <= num:
    raise ValueError(
      f'steps={experiment.steps}: must be above env.num_envs={num}'
    )
  run = dataclasses.replace(experiment.run, **pace)
  return experiment._replace(run=run)


def reads_text(agent_name: str) -> bool:
  """Whether an agent learns from a text.

  Raises:
    ValueError: there is no such agent.
  """
  module = importlib.import_module(f'agents.{presets.find_agent(agent_name)}')
  return 'text' in {field.name for field in dataclasses.fields(module.Config)}


def window_of(config: Any) -> int:
  """Steps of what an agent learns from; single transitions take two."""
  return getattr(config, 'window', 2)


def text_or_dataset(values) -> str | None:
  """The path that either flag gives.

  Raises:
    UserError: both are given, or a text to an agent that reads none.
  """
  if values.text and values.dataset:
    raise configs.UserError(
      f'text={values.text}: --dataset is given, too; take one of them'
    )
  agent = values.agent or presets.find(values.preset).agent
  if values.text and not reads_text(agent):
    raise configs.UserError(
      f'text={values.text}: {agent} does not learn from a text; take '
      '--preset=moe_language_small'
    )
  return values.text or values.dataset
