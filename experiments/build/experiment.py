"""What is run: a preset with changes, checked before anything is made."""

import dataclasses
import importlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from experiments import presets
from experiments.build import corpus, environment
from experiments.build import dataset as datasets
from experiments.build.material import Experiment, Material, is_fresh
from experiments.files.errors import shown
from experiments.presets.table import EnvConfig, Preset, RunConfig
from experiments.runtime import config as configs
from experiments.runtime import overrides


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
  """A preset with changes; nothing is made or compiled yet.

  Args:
    agent: in place of the preset's, whose settings for fields that it does not
      have are left out.
    steps: decisions (or updates on a data set).
    settings: `field=value`.
    dataset: to learn from in place of play; a data set or a text.

  Raises:
    ValueError: one line on what is wrong and what would be right.
  """
  preset: Preset = presets.find(preset_name)
  agent_name = presets.find_agent(agent or preset.agent)
  module = importlib.import_module(f'agents.{agent_name}')
  sections = {'agent': module.Config(), 'env': EnvConfig(), 'run': RunConfig()}
  own = preset.settings
  if agent_name != preset.agent:
    own = [s for s in own if _has(sections, s)]
  sections = overrides.override(sections, own)
  sections = overrides.override(sections, settings)
  experiment = Experiment(
    name=preset_name,
    agent_name=agent_name,
    env_name=env or preset.env,
    material=_material(preset, agent_name, sections['agent'], dataset),
    dataset=dataset or '',
    steps=preset.steps if steps is None else steps,
    seed=seed,
    config=sections['agent'],
    env=sections['env'],
    run=sections['run'],
  )
  _check_integers(experiment)
  _check_recorded(experiment.env.recorded)
  experiment = experiment.material.complete(experiment, env)
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
  # The agent's fields that depend on the size of the run.
  fields = {f.name for f in dataclasses.fields(experiment.config)}
  lengths = {'total_updates': experiment.updates}
  if experiment.material.acts:
    lengths = {
      # The schedule of acting ends where acting does.
      'total_updates': experiment.pace.updates(planned),
      'total_decisions': planned,
    }
  lengths |= {'streams': experiment.env.num_envs}
  known = {n: v for n, v in lengths.items() if n in fields}
  config = dataclasses.replace(experiment.config, **known)
  return experiment._replace(config=config)


def _material(
  preset: Preset, agent_name: str, config: Any, dataset: str | None
) -> Material:
  """What an experiment learns from."""
  if is_fresh(config):
    return environment.MATERIAL
  # A preset without an environment is not for play, whatever env is given.
  if dataset or not preset.env or presets.is_offline(agent_name):
    return corpus.MATERIAL if hasattr(config, 'text') else datasets.MATERIAL
  return environment.MATERIAL


def _check_integers(experiment: Experiment) -> None:
  """Refuses integers that no array of JAX can hold."""

  def check(name, value):
    if dataclasses.is_dataclass(value):
      for field in dataclasses.fields(value):
        check(field.name, getattr(value, field.name))
    elif isinstance(value, tuple):
      for item in value:
        check(name, item)
    elif name in ('replay_capacity', 'model_capacity'):
      return  # `experiments.build.capacity` says what it would take
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
  try:
    overrides.override(sections, [setting])
  except configs.UserError:
    return False
  return True


def reads_text(agent_name: str) -> bool:
  """Whether an agent learns from a text.

  Raises:
    ValueError: there is no such agent.
  """
  module = importlib.import_module(f'agents.{presets.find_agent(agent_name)}')
  return 'text' in {field.name for field in dataclasses.fields(module.Config)}


def text_or_dataset(values) -> str | None:
  """The path that `--text` or `--dataset` gives.

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
