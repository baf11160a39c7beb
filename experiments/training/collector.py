"""Transitions of simulators on the host, and data sets of them.

Axes: `E` simulators.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.envs.options import parse_options
from experiments.files.errors import shown


class Rows(NamedTuple):
  """One decision of `E` simulators, as numpy arrays.

  Attributes:
    observation: float32 `[E, ...]`.
    action: float32 `[E, ...]`.
    reward: float32 `[E]`.
    next_observation: float32 `[E, ...]`.
    terminated: bool `[E]`.
    truncated: bool `[E]`.
    valid: bool `[E]`, False where a new episode began instead.
  """

  observation: Any
  action: Any
  reward: Any
  next_observation: Any
  terminated: Any
  truncated: Any
  valid: Any


def make_agent(config: Any, spec: Any) -> Any:
  """SAC with an `agents.sac.Config`, for a spec."""
  from agents import sac

  networks = sac.make_networks(config, spec)
  return sac.make(config, networks, sac.make_losses(), spec)


def simulators(env_name: str, num_envs: int, settings: Sequence[str]) -> Any:
  """A `HostEnvironment` of so many, with options of their own, `name=value`.

  Raises:
    ValueError: an environment that is not one, or an option that is none.
  """
  from experiments.envs import make
  from experiments.envs.host import HostEnvironment

  options = parse_options(settings, 'options')
  if 'num_envs' in options:
    raise ValueError(
      'options=num_envs: is not an option of an environment; set num_envs'
    )
  env = make.make(env_name, num_envs, training=False, options=options)
  if not isinstance(env, HostEnvironment):
    raise ValueError(
      f'env={shown(env_name)}: is not a simulator on the host; must be a name '
      "of envpool's, such as Pendulum-v1, or gymnasium:ID"
    )
  # Data name the environment as --env does.
  is_gymnasium = env_name.startswith('gymnasium:')
  name = env_name if is_gymnasium else env.spec.name
  return env._replace(spec=env.spec._replace(name=name))


def transitions(simulator: Any, spec: Any, choose: Callable) -> Iterator[Rows]:
  """Decision after decision of a fresh `host.Simulator`, without end.

  `choose` is `(rows, timestep) -> actions [E, ...]`; `rows` are the decision
  before, None at first.
  """
  low, high = spec.action.low, spec.action.high
  timestep, rows = simulator.reset(), None
  while True:
    # Rounding may leave the bounds; what is stored is what was done.
    action = np.clip(np.asarray(choose(rows, timestep)), low, high)
    action = action.astype(np.float32)
    following, _ = simulator.step(action)
    rows = Rows(
      observation=timestep.observation,
      action=action,
      reward=following.reward,
      next_observation=following.observation,
      terminated=following.discount == 0,
      truncated=following.truncated,
      # The step after an episode's last one does not act: it starts another.
      valid=~following.is_first,
    )
    timestep = following
    yield rows


def uniform(spec: Any, num_envs: int, seed: int) -> Callable:
  """`(...) -> actions [E, ...]`, uniform within their bounds."""
  rng = np.random.default_rng(seed)
  low, high = spec.action.low, spec.action.high

  def choose(*args):
    del args
    return rng.uniform(low, high, (num_envs, *low.shape)).astype(np.float32)

  return choose


def players(agent: Any) -> dict[str, Callable]:
  """Compiled `(params, key, timestep) -> action`: `policy` and `mean`."""
  import jax

  return {
    'policy': jax.jit(lambda *args: agent.act(*args)[0]),
    'mean': jax.jit(lambda *args: agent.exploit(*args)[0]),
  }


def gather(
  env: Any, choose: Callable, num: int, seed: int, report: Callable
) -> list[Rows]:
  """At least `num` transitions of whole episodes, equally many per simulator.

  Every simulator ends the episode in which it reaches its share: stopping all
  at once would favour short episodes. `choose` is `(step, timestep) ->
  actions`; `report` is called with the number so far.
  """
  share = -(-num // env.num_envs)
  taken, done = np.zeros(env.num_envs, int), np.zeros(env.num_envs, bool)
  found: list[Rows] = []
  simulator = env.start(seed)
  act = lambda rows, timestep: choose(np.int32(len(found)), timestep)
  try:
    for rows in transitions(simulator, env.spec, act):
      rows = rows._replace(valid=rows.valid & ~done)
      found.append(rows)
      taken += rows.valid
      done |= rows.valid & (rows.terminated | rows.truncated) & (taken >= share)
      if done.all():
        report(num)
        return found
      # The last one is reported once, however long the last episodes are.
      report(min(int(np.minimum(taken, share).sum()), num - 1))
  finally:
    simulator.close()
  raise AssertionError  # `transitions` has no end.


def by_episode(history: Sequence[Rows], about: Any) -> Any:
  """The valid rows as a `layout.Dataset`, one simulator after the other.

  Cuts all open episodes but the last simulator's, and those in the middle that
  another one follows though they did not end.
  """
  from experiments.data import layout

  columns = Rows(*(np.stack(column) for column in zip(*history)))
  parts = []
  for e in range(columns.valid.shape[1]):
    (index,) = columns.valid[:, e].nonzero()
    over = columns.terminated[index, e] | columns.truncated[index, e]
    cuts = (np.diff(index) > 1) & ~over[:-1]
    parts += [
      layout.make(*(x[some, e] for x in columns[:-1]), about=about)
      for some in np.split(index, cuts.nonzero()[0] + 1)
    ]
  return layout.concatenate(parts, about)


def first_rows(dataset: Any, num: int) -> Any:
  """The first `num` rows; the last episode may become unfinished."""
  rows = [column[:num] for column in dataset[:-1]]
  return type(dataset)(*rows, about=dataset.about)
