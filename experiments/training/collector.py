"""SAC in a compact loop over envpool, and data sets from its simulators.

Everything that `experiments.collect` does with an agent. One call of the
compiled `learn` remembers, updates and acts: the memory stays on the device.

Axes: `E` simulators, `C` rows of the memory.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


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


class Memory(NamedTuple):
  """All transitions so far, on the device.

  Attributes:
    rows: `agents.core.types.Transition` of `[C, ...]`.
    count: int32 scalar, how many of them are written.
  """

  rows: Any
  count: Any


class Evaluation(NamedTuple):
  """A policy on its way.

  Attributes:
    decisions: of the training so far.
    mean_return: of whole episodes of the policy, sampling.
    params: of the agent, on the host.
  """

  decisions: int
  mean_return: float
  params: Any


def make_agent(config: Any, spec: Any) -> Any:
  """SAC with an `agents.sac.Config`, for a spec."""
  from agents import sac

  networks = sac.make_networks(config, spec)
  return sac.make(config, networks, sac.make_losses(), spec)


def transitions(simulator: Any, spec: Any, choose: Callable) -> Iterator[Rows]:
  """Decision after decision, without end.

  Args:
    simulator: a `host.Simulator` that has not begun.
    spec: of its environment.
    choose: `(rows, timestep) -> actions [E, ...]`; `rows` are those of the
      decision before, None at first.
  """
  low, high = spec.action.low, spec.action.high
  timestep, rows = simulator.reset(), None
  while True:
    # Rounding may have left the bounds; what is stored is what was done.
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
      # The step after an episode's last one does not act: it starts anew.
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


def make_memory(spec: Any, capacity: int) -> Memory:
  """An empty memory of `C` rows, of which none is ever overwritten."""
  import jax.numpy as jnp

  from agents.core.types import Transition

  zeros = lambda shape: jnp.zeros((capacity, *shape), jnp.float32)
  observation, action = spec.observation.shape, spec.action.shape
  rows = Transition(
    zeros(observation), zeros(action), zeros(()), zeros(()), zeros(observation)
  )
  return Memory(rows, jnp.zeros((), jnp.int32))


def remember(memory: Memory, rows: Rows) -> Memory:
  """The memory with those of `E` more rows that are valid. Pure."""
  import jax
  import jax.numpy as jnp

  from agents.core.types import Transition

  order = jnp.cumsum(rows.valid, dtype=jnp.int32)
  capacity = memory.rows.r_t.shape[0]
  # What is not valid goes behind the end, where it is dropped.
  index = jnp.where(rows.valid, memory.count + order - 1, capacity)
  new = Transition(
    rows.observation,
    rows.action,
    rows.reward,
    1.0 - jnp.asarray(rows.terminated, jnp.float32),
    rows.next_observation,
  )
  put = lambda old, x: old.at[index].set(x, mode='drop')
  return Memory(jax.tree.map(put, memory.rows, new), memory.count + order[-1])


def make_learn(agent: Any, batch_size: int, updates: int) -> Callable:
  """A compiled step of acting and learning.

  Returns:
    `(state, memory, rows, timestep, key, step) -> (state, memory, action)`:
    remembers, updates `updates` times on uniform draws, acts. State and memory
    are donated.
  """
  import jax

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def learn(state, memory, rows, timestep, key, step):
    memory = remember(memory, rows)
    act_key, update_key = jax.random.split(jax.random.fold_in(key, step))

    def update(state, key):
      draw_key, key = jax.random.split(key)
      index = jax.random.randint(draw_key, (batch_size,), 0, memory.count)
      batch = jax.tree.map(lambda x: x[index], memory.rows)
      return agent.update(state, batch, key)[0], None

    keys = jax.random.split(update_key, updates)
    state, _ = jax.lax.scan(update, state, keys)
    action, _ = agent.act(state.params, act_key, timestep)
    return state, memory, action

  return learn


def train(
  env: Any,
  agent: Any,
  settings: Any,
  evaluate: Callable,
  *,
  steps: int,
  seed: int,
  report: Callable,
) -> tuple[list[Evaluation], list[Rows]]:
  """Trains, evaluating on the way.

  Args:
    env: a `host.HostEnvironment`.
    agent: from `make_agent`.
    settings: `experiments.training.collect.Collection`.
    evaluate: `(params, number of the evaluation) -> mean return`.
    steps: decisions.
    seed: of simulators and agent.
    report: called with each new `Evaluation`.

  Returns:
    All evaluations, and all that was experienced, in order.
  """
  import jax

  key = jax.random.key(seed)
  state = jax.jit(agent.init)(jax.random.fold_in(key, 2**31 - 1))
  memory = make_memory(env.spec, steps + env.num_envs)
  add = jax.jit(remember, donate_argnums=0)
  updates = round(settings.updates * env.num_envs)
  learn = make_learn(agent, settings.batch_size, updates)
  explore = uniform(env.spec, env.num_envs, seed)
  decisions, found, history = 0, [], []

  def choose(rows, timestep):
    nonlocal state, memory
    if rows is None:
      return explore()
    if decisions < settings.warmup:
      memory = add(memory, rows)
      return explore()
    step = np.int32(len(history))
    state, memory, action = learn(state, memory, rows, timestep, key, step)
    return action

  due = max(settings.warmup, settings.evaluate_every)
  simulator = env.start(seed)
  try:
    for rows in transitions(simulator, env.spec, choose):
      history.append(rows)
      decisions += int(rows.valid.sum())
      if decisions >= min(due, steps):
        due += settings.evaluate_every
        params = jax.device_get(state.params)
        mean_return = evaluate(params, len(found))
        found.append(Evaluation(decisions, mean_return, params))
        report(found[-1])
      if decisions >= steps:
        return found, history
  finally:
    simulator.close()
  raise AssertionError  # `transitions` has no end.


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
  """At least `num` transitions of whole episodes, as many of each simulator.

  Every simulator ends the episode in which it has its share: stopping all at
  once would leave more of the short episodes than were played.

  Args:
    env: a `host.HostEnvironment`.
    choose: `(step, timestep) -> actions`.
    num: of transitions.
    seed: of the simulators.
    report: called with how many of them there are.
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
  """The valid rows as a `layout.Dataset`: one simulator behind the other.

  Episodes that are open at the end are cut, but for the last simulator's.
  """
  from experiments.data import layout

  columns = Rows(*(np.stack(column) for column in zip(*history)))
  streams = [
    layout.make(*(x[columns.valid[:, e], e] for x in columns[:-1]), about=about)
    for e in range(columns.valid.shape[1])
  ]
  return layout.concatenate(streams, about)


def first_rows(dataset: Any, num: int) -> Any:
  """The first `num` rows; the last episode may become unfinished."""
  rows = [column[:num] for column in dataset[:-1]]
  return type(dataset)(*rows, about=dataset.about)
