"""Loads actors, critics and dynamics from finished runs, for planning."""

from typing import Any, NamedTuple

from experiments.files.errors import UserError
from experiments.playing import actor_critic_model

# Flags of a user's own rules.
RULES = ('reward_rule', 'termination_rule')
# The agents that have an actor and a critic, on vector observations.
AGENTS = ('atac', 'combo', 'cql', 'iql', 'sac', 'td3_bc')


class Trained(NamedTuple):
  """A finished run of an agent with an actor and a critic."""

  experiment: Any
  agent: Any
  networks: Any
  params: Any
  spec: Any

  @property
  def reward_factor(self) -> float:
    """The factor by which rewards were multiplied in training."""
    experiment = self.experiment
    return 1.0 if experiment.material.acts else experiment.run.reward_factor


class Learned(NamedTuple):
  """The model of a finished run: an `actor_critic_model.Dynamics`."""

  dynamics: Any
  params: Any
  spec: Any
  env_name: str


def load(
  workdir: str, checkpoint: str = 'final', env: str | None = None
) -> Trained:
  """Loads the actor and critic of a run.

  `env` is the user's, as in `saved.load_experiment`.

  Raises:
    UserError: no such run, or its agent has no actor with a critic.
  """
  from agents.core.types import Continuous
  from experiments import build
  from experiments.build import saved

  experiment = saved.load_experiment(workdir, env)
  if not experiment.env_name:
    raise UserError(
      f'workdir={workdir}: its data set names no environment to play in; '
      'give --env=NAME'
    )
  simulators = build.make_env(experiment, training=False, num_envs=1)
  spec = saved.load_spec(workdir, simulators.spec)
  if not isinstance(spec.action, Continuous):
    raise UserError(
      f'workdir={workdir}: {experiment.env_name} has discrete actions; '
      'use python -m experiments.play with --simulations'
    )
  agent = build.make_agent(experiment, spec)
  networks = build.make_networks(experiment, spec)
  if agent.exploit is None or not hasattr(networks, 'critic'):
    raise UserError(
      f'workdir={workdir}: {experiment.agent_name} has no actor with a critic; '
      f'give a run of {", ".join(AGENTS)}'
    )
  params = saved.load_params(workdir, agent, [checkpoint])[checkpoint]
  return Trained(experiment, agent, networks, params, spec)


class Rules(NamedTuple):
  """The user's own rules, as in `known.load`; '' for what is learned."""

  reward: str = ''
  termination: str = ''


def load_dynamics(
  workdir: str,
  checkpoint: str = 'final',
  env: str | None = None,
  rules: Rules | None = None,
) -> Learned:
  """Loads the ensemble of a run of COMBO or of `dynamics`; see `load`.

  Raises:
    UserError: no such run, it has learned no ensemble, or a rule is invalid.
  """
  from experiments import build
  from experiments.build import saved
  from experiments.playing import known

  experiment = saved.load_experiment(workdir, env)
  if experiment.agent_name not in ('combo', 'dynamics'):
    raise UserError(
      f'dynamics={workdir}: {experiment.agent_name} learns no ensemble of '
      'dynamics; give a run of dynamics or combo'
    )
  simulators = build.make_env(experiment, training=False, num_envs=1)
  spec = saved.load_spec(workdir, simulators.spec)
  agent = build.make_agent(experiment, spec)
  networks = build.make_networks(experiment, spec)
  params = saved.load_params(workdir, agent, [checkpoint])[checkpoint]
  ensemble = getattr(networks, 'model', networks)
  factor = experiment.run.reward_factor
  ensemble = ensemble._replace(
    known=known.load(*(rules or Rules()), spec, factor)
  )
  found = actor_critic_model.learned(ensemble, factor)
  return Learned(
    found, getattr(params, 'model', params), spec, experiment.env_name
  )


def simulator(experiment: Any) -> Any:
  """Our simulator with the dynamics of an experiment's environment.

  Raises:
    UserError: there is no such simulator.
  """
  from experiments import build

  known = actor_critic_model.EXACT
  if experiment.env_name not in known:
    raise UserError(
      f'env={experiment.env_name}: has no exact model, only {", ".join(known)} '
      'have one; give --dynamics=RUN, the folder of a dynamics or combo run'
    )
  ours = experiment._replace(env_name=known[experiment.env_name])
  return build.make_env(ours, training=False)


def find_dynamics(
  name: str,
  trained: Trained,
  env: str | None = None,
  rules: Rules | None = None,
) -> tuple[Any, Any]:
  """Dynamics for an actor and critic, and their parameters.

  `name` is `exact`, or the folder of a run; `env` is as for `load`, `rules` as
  for `load_dynamics`.

  Raises:
    UserError: not found, or they belong to another environment.
  """
  if name == 'exact':
    return actor_critic_model.exact(simulator(trained.experiment)), None
  found = load_dynamics(name, env=env, rules=rules)
  own, other = trained.experiment.env_name, found.env_name
  if own != other or trained.spec.observation != found.spec.observation:
    raise UserError(
      f'dynamics={name}: were learned from {other}; must be from {own}, as the '
      'agent is'
    )
  return found.dynamics, found.params
