"""From an experiment to its environment, networks and agent."""

import importlib
from collections.abc import Callable
from typing import Any

from experiments.build.material import Experiment
from experiments.envs.options import parse_options


def make_env(experiment: Experiment, *, training: bool, num_envs=None):
  """The environment of an experiment; see `experiments.envs.make.make`.

  Raises:
    ValueError: an option that the environment does not take.
  """
  from experiments.envs import make

  return make.make(
    experiment.env_name,
    num_envs or experiment.env.num_envs,
    training=training,
    frame_stack=experiment.env.frame_stack,
    num_threads=experiment.env.num_threads,
    options=parse_options(experiment.env.options),
    action_bins=experiment.env.action_bins,
    recorded=experiment.env.recorded,
  )


def make_networks(experiment: Experiment, spec, reduce: Callable | None = None):
  """The networks of an experiment's agent.

  Raises:
    ValueError: the agent cannot take the spec.
  """
  module = importlib.import_module(f'agents.{experiment.agent_name}')
  return module.make_networks(experiment.config, spec, reduce)


def make_agent(experiment: Experiment, spec, reduce: Callable | None = None):
  """The agent of an experiment for an environment's spec.

  Raises:
    ValueError: the agent cannot take the spec.
  """
  module = importlib.import_module(f'agents.{experiment.agent_name}')
  networks = make_networks(experiment, spec, reduce)
  keywords = {} if reduce is None else {'reduce': reduce}
  return module.make(
    experiment.config, networks, module.make_losses(), spec, **keywords
  )


def make_phases(experiment: Experiment, spec, reduce: Callable | None = None):
  """The phases of an experiment, a tuple of `Phase`; most agents have one.

  All but the last one say how many updates they take.

  Raises:
    ValueError: the agent cannot take the spec, or nothing is left for the last
      phase.
  """
  from agents.core.types import Phase

  module = importlib.import_module(f'agents.{experiment.agent_name}')
  if not hasattr(module, 'make_phases'):
    return (Phase('train', make_agent(experiment, spec, reduce)),)
  networks = module.make_networks(experiment.config, spec, reduce)
  keywords = {} if reduce is None else {'reduce': reduce}
  phases = module.make_phases(
    experiment.config, networks, module.make_losses(), spec, **keywords
  )
  before = sum(phase.updates or 0 for phase in phases[:-1])
  if before >= experiment.updates:
    names = ' and '.join(phase.name for phase in phases[:-1])
    raise ValueError(
      f'steps={experiment.updates}: must be above the {before} updates of '
      f'{names}'
    )
  return phases


def row(experiment: Experiment) -> tuple[Any, Any, Any]:
  """The last phase's agent and source on one device, and their spec.

  Raises:
    ValueError: agent, environment or data set do not fit.
  """
  opened = experiment.material.open(experiment)
  phase = make_phases(experiment, opened.spec)[-1]
  source = opened.make_source(experiment, phase)
  return phase.agent, source, opened.spec
