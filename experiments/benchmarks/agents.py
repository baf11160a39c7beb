"""How fast an agent learns and acts, and how long the learner waits."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import Discrete, Sample, Trajectory
from experiments import build
from experiments.benchmarks import counting, timing
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import (
  Measurement,
  interleaved,
  once,
  speed_row,
)
from experiments.build import capacity
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

  `update` is the gradient step alone, `reanalyze` the searches that make its
  targets. The product has the numbers that the network computes with.
  """
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  batch = made_up_batch(experiment, env, agent)
  key = jax.random.key(0)
  state = jax.jit(agent.init)(key)
  size, dtype = case.matrix, experiment.config.network.compute_dtype
  peak = f'matrix product of {size} x {size}'
  update = jax.jit(agent.update, donate_argnums=0)
  traces = {'update': update.trace(state, batch, key)}
  if agent.refresh is not None:
    traces['reanalyze'] = jax.jit(agent.refresh).trace(state, batch, 0, key)
  flops = {
    name: counting.matmul_flops(trace.jaxpr) for name, trace in traces.items()
  }
  programs = {}

  def compiled(name):
    programs[name] = traces[name].lower().compile()
    return lambda: None

  _, refused = timing.prepared(
    {name: functools.partial(compiled, name) for name in traces}
  )

  def updated(batch):
    nonlocal state
    state, info = programs['update'](state, batch, key)
    jax.block_until_ready((state, info))

  searched = lambda: programs['reanalyze'](state, batch, 0, key)
  matrix = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  tasks = {peak: lambda: product(matrix, matrix).block_until_ready()}
  if 'update' in programs:
    tasks['update'] = lambda: updated(batch)
  if 'reanalyze' in programs:
    tasks['reanalyze'] = lambda: jax.block_until_ready(searched())
  if len(programs) == 2:
    both = 'reanalyze and update'
    tasks[both] = lambda: updated(searched())
    flops[both] = sum(flops.values())
  timings = interleaved(tasks, case.repeats, case.least_seconds)

  setting = (
    f'{experiment.name} {experiment.env_name} batch={experiment.run.batch_size}'
  )
  giga = 2 * size**3 / 1e9
  rows = [speed_row('learner', peak, dtype, 'GFLOP/s', giga, timings[peak])]
  for name, reason in refused.items():
    rows.append(timing.failed('learner', name, setting, 'updates/s', reason))
  for name in [name for name in timings if name != peak]:
    about = 'learner', name, setting
    row = speed_row(*about, 'GFLOP/s', flops[name] / 1e9, timings[name])
    speed = speed_row(*about, 'updates/s', 1, timings[name])
    hours = experiment.updates / speed.median / 3600
    note = f'{experiment.updates:,} updates in {hours:.3g} h'
    rows.append(speed._replace(note=note))
    rows.append(
      row._replace(
        ratio=row.median / rows[0].median,
        ratio_cpu=row.per_cpu_second / rows[0].per_cpu_second,
        note='ratio to the matrix product; counted: matrix products and '
        'convolutions, loops in full',
      )
    )
  return rows


def deciding_rows(
  experiment: build.Experiment, case: Case
) -> list[Measurement]:
  """Decisions a second of network and search, without a simulator.

  Args:
    experiment: its agent acts on zeros.
    case: its numbers of environments and repeats count.
  """
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  params = jax.jit(agent.init)(jax.random.key(0)).params
  search = experiment.config.search
  network = experiment.config.network
  about = (
    f'{experiment.name} {search.rule} N={search.num_simulations} '
    f'{network.compute_dtype}',
    'decisions/s',
  )
  names = {f'network and search, {n} environments': n for n in case.envs}

  def make(number):
    timestep = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), capacity.timestep(env.spec, number)
    )
    args = params, jax.random.key(1), timestep
    act = jax.jit(agent.act).lower(*args).compile()
    return lambda: jax.block_until_ready(act(*args))

  tasks, refused = timing.prepared(
    {name: functools.partial(make, number) for name, number in names.items()}
  )
  timings = interleaved(tasks, case.repeats, case.least_seconds)
  return [
    speed_row('acting', name, *about, names[name], seconds)
    for name, seconds in timings.items()
  ] + [
    timing.failed('acting', name, *about, reason)
    for name, reason in refused.items()
  ]


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
  for name, seconds in timings.items():
    steps = case.steps if name == 'simulator alone' else few
    amount = steps * env.num_envs
    about = 'acting', name, setting
    rows.append(speed_row(*about, 'decisions/s', amount, seconds))
    if frames > 1 and name != 'network and search':
      rows.append(speed_row(*about, 'frames/s', amount * frames, seconds))
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
  for mode, seconds in timings.items():
    share = waited[mode] / seconds.wall
    name = f'learner, {mode} acting'
    note = 'ratio to synchronous, measured before'
    row = speed_row(
      *('acting', name, setting, 'updates/s'),
      case.updates,
      seconds,
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
