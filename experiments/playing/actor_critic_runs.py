"""What finished runs bring to planning: actors and critics, and dynamics."""

from typing import Any, NamedTuple

from experiments.files.errors import UserError
from experiments.playing import actor_critic_model

# Those with an actor and a critic on vectors.
AGENTS = ('atac', 'combo', 'cql', 'iql', 'sac', 'td3_bc')


class Trained(NamedTuple):
  """A finished run of an actor and a critic.

  Attributes:
    experiment: what was run.
    agent: its agent.
    networks: its networks.
    params: of the agent.
    spec: of its environment.
  """

  experiment: Any
  agent: Any
  networks: Any
  params: Any
  spec: Any

  @property
  def reward_factor(self) -> float:
    """What rewards were multiplied by when it was trained."""
    experiment = self.experiment
    return experiment.run.reward_factor if experiment.dataset else 1.0


class Learned(NamedTuple):
  """A finished run that learned a model.

  Attributes:
    dynamics: a `actor_critic_model.Dynamics`.
    params: its parameters.
    spec: of its environment.
    env_name: the environment's.
  """

  dynamics: Any
  params: Any
  spec: Any
  env_name: str


def load(
  workdir: str, checkpoint: str = 'final', env: str | None = None
) -> Trained:
  """The actor and critic of a run.

  Args:
    workdir: the run's folder.
    checkpoint: which parameters.
    env: see `saved.load_experiment`.

  Raises:
    UserError: there is no such run, or its agent is of another kind.
  """
  from agents.core.types import Continuous
  from experiments import build
  from experiments.build import saved

  experiment = saved.load_experiment(workdir, env)
  if not experiment.env_name:
    raise UserError(
      f'workdir={workdir}: its data set names no environment to play in'
    )
  simulators = build.make_env(experiment, training=False, num_envs=1)
  spec = saved.load_spec(workdir, simulators.spec)
  if not isinstance(spec.action, Continuous):
    raise UserError(
      f'workdir={workdir}: {experiment.env_name} has discrete actions; '
      'python -m experiments.play plans there'
    )
  agent = build.make_agent(experiment, spec)
  networks = build.make_networks(experiment, spec)
  if agent.exploit is None or not hasattr(networks, 'critic'):
    raise UserError(
      f'workdir={workdir}: {experiment.agent_name} has no actor with a critic; '
      f'{", ".join(AGENTS)} have'
    )
  params = saved.load_params(workdir, agent, [checkpoint])[checkpoint]
  return Trained(experiment, agent, networks, params, spec)


def load_dynamics(
  workdir: str, checkpoint: str = 'final', env: str | None = None
) -> Learned:
  """The ensemble of a run of COMBO, or of `dynamics` alone.

  Args:
    workdir: the run's folder.
    checkpoint: which parameters.
    env: see `saved.load_experiment`.

  Raises:
    UserError: there is no such run, or it has learned no ensemble.
  """
  from experiments import build
  from experiments.build import saved

  experiment = saved.load_experiment(workdir, env)
  if experiment.agent_name not in ('combo', 'dynamics'):
    raise UserError(
      f'dynamics={workdir}: {experiment.agent_name} learns no ensemble of '
      'dynamics; dynamics and combo do'
    )
  simulators = build.make_env(experiment, training=False, num_envs=1)
  spec = saved.load_spec(workdir, simulators.spec)
  agent = build.make_agent(experiment, spec)
  networks = build.make_networks(experiment, spec)
  params = saved.load_params(workdir, agent, [checkpoint])[checkpoint]
  ensemble = getattr(networks, 'model', networks)
  found = actor_critic_model.learned(ensemble, experiment.run.reward_factor)
  return Learned(
    found, getattr(params, 'model', params), spec, experiment.env_name
  )


def simulator(experiment: Any) -> Any:
  """The simulator of ours that moves like an experiment's environment.

  Raises:
    UserError: there is none.
  """
  from experiments import build

  known = actor_critic_model.EXACT
  if experiment.env_name not in known:
    raise UserError(
      f'env={experiment.env_name}: there is no exact model of it; there is one '
      f'of {", ".join(known)}; give --dynamics=RUN of a dynamics or combo run'
    )
  ours = experiment._replace(env_name=known[experiment.env_name])
  return build.make_env(ours, training=False)


def find_dynamics(
  name: str, trained: Trained, env: str | None = None
) -> tuple[Any, Any]:
  """The dynamics of a name, and its parameters.

  Args:
    name: `exact`, or the folder of a run.
    trained: who is to plan in it.
    env: see `saved.load_experiment`.

  Raises:
    UserError: there is none, or it is one of another environment.
  """
  if name == 'exact':
    return actor_critic_model.exact(simulator(trained.experiment)), None
  found = load_dynamics(name, env=env)
  own, other = trained.experiment.env_name, found.env_name
  if own != other or trained.spec.observation != found.spec.observation:
    raise UserError(
      f'dynamics={name}: learned from {other}, but the agent is of {own}'
    )
  return found.dynamics, found.params
