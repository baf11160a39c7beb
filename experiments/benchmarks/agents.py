"""How fast an agent learns and acts, and how long the learner waits."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import Discrete, Sample, Trajectory
from experiments import build
from experiments.benchmarks import counting
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import (
  Measurement,
  interleaved,
  once,
  speed_row,
)
from experiments.envs import envpool as ours
from experiments.files.errors import UserError
from experiments.runtime import host, loop, replay, sources, updates
from search.model import Environment

_PONG = (
  # Sizes that two cores can handle; the network and the search are full-size.
  'env.num_envs=4',
  'run.batch_size=8',
  'agent.reanalyze_chunk=0',
  'run.warmup_decisions=64',
  'run.replay_capacity=2000',
)


def made_up_batch(experiment: build.Experiment, env: Any, agent: Any) -> Any:
  """A `Trajectory` of an experiment's shapes with random observations.

  Leaves are `[B, L, ...]`: one long episode without rewards.
  """
  if isinstance(env, Environment):
    source = sources.from_env(env, agent, experiment.env.num_envs)
  else:
    source = host.from_host(env, agent)
  size, length = experiment.run.batch_size, experiment.config.window
  rng = np.random.default_rng(0)

  def noise(x):
    shape = (size, length, *x.shape[1:])
    if jnp.issubdtype(x.dtype, jnp.integer):
      high = min(int(jnp.iinfo(x.dtype).max), 255)
      return jnp.asarray(rng.integers(high, size=shape, endpoint=True), x.dtype)
    return jnp.asarray(rng.random(shape), x.dtype)

  example = source.example()
  zeros = jax.tree.map(
    lambda x: jnp.zeros((size, length, *x.shape[1:]), x.dtype), example
  )
  timestep = zeros.timestep._replace(
    observation=jax.tree.map(noise, example.timestep.observation),
    discount=jnp.ones((size, length)),
  )
  policy = zeros.extras['search_policy']
  extras = zeros.extras | {
    'search_policy': jnp.full_like(policy, 1 / policy.shape[-1])
  }
  index = jnp.arange(size, dtype=jnp.int32)
  ones = jnp.ones(size)
  return Trajectory(
    zeros._replace(timestep=timestep, extras=extras),
    jnp.ones((size, length), bool),
    Sample(index, jnp.zeros_like(index), ones, ones),
  )


def learner_rows(experiment: build.Experiment, case: Case) -> list[Measurement]:
  """Updates per second, and FLOP/s relative to the machine's matrix products.

  `update` is the gradient step alone, `reanalyze and update` includes the
  searches that make its targets.
  """
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  batch = made_up_batch(experiment, env, agent)
  key = jax.random.key(0)
  state = jax.jit(agent.init)(key)
  update = jax.jit(agent.update, donate_argnums=0)
  flops = {
    'update': counting.matmul_flops(update.trace(state, batch, key).jaxpr)
  }

  def updated(batch):
    nonlocal state
    state, info = update(state, batch, key)
    jax.block_until_ready((state, info))

  size = case.matrix
  matrix = jnp.ones((size, size))
  product = jax.jit(jnp.matmul)
  peak = f'matrix product of {size} x {size}'
  tasks = {
    peak: lambda: product(matrix, matrix).block_until_ready(),
    'update': lambda: updated(batch),
  }
  if agent.refresh is not None:
    refresh = jax.jit(agent.refresh)
    trace = refresh.trace(state, batch, 0, key)
    both = 'reanalyze and update'
    flops[both] = flops['update'] + counting.matmul_flops(trace.jaxpr)
    tasks[both] = lambda: updated(refresh(state, batch, 0, key))
  timings = interleaved(tasks, case.repeats, case.least_seconds)

  setting = (
    f'{experiment.name} {experiment.env_name} batch={experiment.run.batch_size}'
  )
  giga = 2 * size**3 / 1e9
  rows = [speed_row('learner', peak, 'float32', 'GFLOP/s', giga, timings[peak])]
  for name, count in flops.items():
    about = 'learner', name, setting
    row = speed_row(*about, 'GFLOP/s', count / 1e9, timings[name])
    rows.append(speed_row(*about, 'updates/s', 1, timings[name]))
    rows.append(
      row._replace(
        ratio=row.median / rows[0].median,
        ratio_cpu=row.per_cpu_second / rows[0].per_cpu_second,
        note='ratio to the matrix product; counted: matrix products and '
        'convolutions, loops in full',
      )
    )
  return rows


def acting_rows(experiment: build.Experiment, case: Case) -> list[Measurement]:
  """Decisions and frames per second, and how long the learner waits for them.

  Raises:
    UserError: the environment is not a host simulator.
  """
  env = build.make_env(experiment, training=True)
  if isinstance(env, Environment):
    raise UserError(
      f'env={experiment.env_name}: acting measures simulators on the '
      'host; take one, such as Catch-v0'
    )
  agent = build.make_agent(experiment, env.spec)
  return [
    *_simulator_rows(experiment, env, agent, case),
    *_waiting_rows(experiment, env, agent, case),
  ]


def acting_suite(
  experiment: build.Experiment, case: Case, quick: bool
) -> Iterator[list[Measurement]]:
  """`acting_rows` of an experiment and, unless `quick`, of Pong."""
  yield acting_rows(experiment, case)
  if not quick:
    pong = build.describe('efficientzero_atari', settings=_PONG)
    yield acting_rows(pong, case._replace(steps=100, updates=8))


def _simulator_rows(experiment, env, agent, case: Case) -> list[Measurement]:
  key = jax.random.key(0)
  params = jax.jit(agent.init)(key).params
  act = jax.jit(agent.act)
  kind = env.spec.action
  assert isinstance(kind, Discrete)
  rng = np.random.default_rng(0)
  actions = rng.integers(kind.num_actions, size=(case.steps, env.num_envs))
  simulator = env.start(0)
  timestep = simulator.reset()
  few = max(case.steps // 10, 1)

  def alone():
    for action in actions:
      simulator.step(action)

  def decided():
    for _ in range(few):
      jax.block_until_ready(act(params, key, timestep))

  def together():
    now = timestep
    for _ in range(few):
      now, _ = simulator.step(np.asarray(act(params, key, now)[0]))

  search = experiment.config.search
  setting = (
    f'{experiment.env_name} E={env.num_envs} {search.rule} '
    f'N={search.num_simulations}'
  )
  try:
    timings = interleaved(
      {
        'simulator alone': alone,
        'network and search': decided,
        'simulator, network and search': together,
      },
      case.repeats,
    )
  finally:
    simulator.close()
  rows, frames = [], frames_per_decision(experiment)
  for name, timing in timings.items():
    steps = case.steps if name == 'simulator alone' else few
    amount = steps * env.num_envs
    about = 'acting', name, setting
    rows.append(speed_row(*about, 'decisions/s', amount, timing))
    if frames > 1 and name != 'network and search':
      rows.append(speed_row(*about, 'frames/s', amount * frames, timing))
  return rows


def frames_per_decision(experiment: build.Experiment) -> int:
  """The simulator's frames per decision: the frame skip on Atari, else 1."""
  if ':' in experiment.env_name:
    return 1
  task = ours.resolve_id(experiment.env_name)
  if 'noop_max' not in ours.library().make_spec(task).config._fields:
    return 1
  for option in experiment.env.options:
    name, _, text = option.partition('=')
    if name == 'frame_skip':
      return int(text)
  return int(ours.ATARI_100K['frame_skip'])


def timed(source: Any, waits: list[float]) -> Any:
  """The same source; it appends the seconds of each `next` to `waits`."""

  def next_(*args):
    start = time.perf_counter()
    result = source.next(*args)
    waits.append(time.perf_counter() - start)
    return result

  return source._replace(next=next_)


def _waiting_rows(experiment, env, agent, case: Case) -> list[Measurement]:
  compiled = updates.compiled(agent)

  def update(state, batch, key):
    # Otherwise the learner's own work would count as waiting for the actor.
    return jax.block_until_ready(compiled(state, batch, key))

  # Not in turns: an actor would fill its queue while the other learner works,
  # and its own learner would not have to wait.
  timings, waited = {}, {}
  for mode in ('synchronous', 'asynchronous'):
    learner = _learner(experiment, env, agent, update, mode, case.updates)
    try:
      timings |= interleaved({mode: learner.work}, case.repeats)
    finally:
      learner.close()
    # The first entry is of the call that compiled.
    waited[mode] = np.asarray(learner.waited[1:])
  run = experiment.run
  setting = (
    f'{experiment.name} {experiment.env_name} E={env.num_envs} '
    f'batch={run.batch_size} decisions/update={run.decisions_per_update:g}'
  )
  rows = []
  for mode, timing in timings.items():
    share = waited[mode] / timing.wall
    name = f'learner, {mode} acting'
    note = 'ratio to synchronous, measured before'
    row = speed_row(
      *('acting', name, setting, 'updates/s'),
      case.updates,
      timing,
      timings['synchronous'],
      '' if mode == 'synchronous' else note,
    )
    rows.append(row)
    unit = 'of wall time, waiting for experience'
    middle = once('acting', name, setting, unit, float(np.median(share)))
    rows.append(
      middle._replace(low=float(share.min()), high=float(share.max()))
    )
  return rows


class _Learner(NamedTuple):
  """A run that continues for some updates at each call of `work`."""

  work: Callable[[], None]
  close: Callable[[], None]
  waited: list[float]


def _learner(experiment, env, agent, update, mode: Any, updates: int):
  run, waits, waited = experiment.run, [], []
  inner = host.from_host(
    env,
    agent,
    mode=mode,
    publish_every=run.publish_every,
    queue_size=run.queue_size,
  )
  memory = replay.host_replay(
    capacity=run.replay_capacity,
    batch_size=run.batch_size,
    window=experiment.config.window,
    alpha=run.replay_alpha,
    frame_stack=env.spec.frame_stack,
    compress=run.compress_replay,
    device=jax.local_devices()[0] if run.frames_on == 'device' else None,
  )
  pace = experiment.pace._replace(max_decisions=None)
  source = sources.reanalyzed(
    sources.replayed(
      timed(inner, waits), memory, pace, total_updates=experiment.updates
    ),
    agent,
  )
  key = jax.random.key(0)
  carry = loop.init(agent, source, key)

  def work():
    nonlocal carry
    waits.clear()
    carry = loop.run(
      agent,
      source,
      carry,
      key=key,
      steps=int(carry.step) + updates,
      intervals=loop.Intervals(log=updates),
      update=update,
    )
    waited.append(sum(waits))

  def close():
    source.close(carry.source)

  return _Learner(work, close, waited)
