"""The loop with an agent that audits its stream, and exact resume."""

import functools
from fractions import Fraction
from typing import Any, NamedTuple

import chex
import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents import efficientzero
from agents.core import planning, replay
from agents.core.types import Agent, ArraySpec, Discrete, Experience, Info, Spec
from experiments.envs.catch import make_catch
from experiments.envs.envpool import make_envpool
from experiments.runtime import checkpoint, host, loop, sources
from experiments.runtime import replay as host_replay
from experiments.runtime.budget import Budget
from experiments.runtime.loop import Carry, Hooks, Intervals
from experiments.runtime.persistence import Persistence
from experiments.runtime.sources import Measures, Pace, Source
from networks.muzero import NetworkConfig
from search.model import Environment, TimeStep

STEPS = 12
NO_HOOKS = Hooks()


class Audit(NamedTuple):
  """What the agent was handed, one entry an update."""

  params: Any
  batches: Any
  noise: Any


def audit_agent():
  def init(key):
    return Audit(
      params=jnp.zeros((), jnp.int32),
      batches=jnp.full((STEPS, 2), -1.0),
      noise=jnp.full((STEPS,), -1.0) + 0 * jax.random.uniform(key),
    )

  def update(state, batch, key):
    i = state.params
    state = Audit(
      params=i + 1,
      batches=state.batches.at[i].set(batch),
      noise=state.noise.at[i].set(jax.random.uniform(key)),
    )
    return state, Info({'loss': batch[0] * 10}, None)

  return Agent(init=init, act=None, update=update)


class Fed(NamedTuple):
  """A source's state: a start drawn from its key, and what was fed back."""

  start: Any
  fed: Any


def audit_source():
  def init(key):
    return Fed(jax.random.uniform(key), jnp.zeros(()))

  def next_(state, agent_state, step, key):
    batch = jnp.stack([step + state.start, jax.random.uniform(key)])
    even = 1.0 - jnp.float32(step % 2)
    counts = {
      'decisions': jnp.float32(3),
      'episodes': even,
      'return_sum': even * step,
      'length_sum': even * 7,
    }
    gauges = {'seen': jnp.float32(agent_state.params)}
    return state, batch, Measures(counts, gauges)

  def feedback(state, batch, info):
    return state._replace(fed=state.fed + info.metrics['loss'] / 10 - batch[0])

  return Source(init, next_, feedback, lambda: None, is_pure=True)


def run_audited(
  source, key, intervals, hooks=NO_HOOKS, steps=STEPS, carry=None
):
  agent = audit_agent()
  carry = carry or loop.init(agent, source, key)
  return loop.run(
    agent,
    source,
    carry,
    key=key,
    steps=steps,
    intervals=intervals,
    hooks=hooks,
  )


@pytest.mark.parametrize('is_pure', [True, False])
def test_every_step_has_its_own_key_and_batch(is_pure, key):
  source = audit_source()._replace(is_pure=is_pure)
  logged = {}
  hooks = Hooks(log=logged.__setitem__)
  carry = run_audited(source, key, Intervals(log=5), hooks)
  assert (carry.step.shape, carry.step.dtype) == ((), jnp.int32)
  assert carry.step == carry.agent.params == STEPS
  assert carry.source.fed == 0
  start = audit_source().init(loop.source_key(key)).start
  for i in range(STEPS):
    batch_key, update_key = jax.random.split(jax.random.fold_in(key, i))
    want = np.float32([i + start, jax.random.uniform(batch_key)])
    np.testing.assert_allclose(carry.agent.batches[i], want, rtol=1e-6)
    assert carry.agent.noise[i] == jax.random.uniform(update_key)
  assert len(set(np.asarray(carry.agent.noise).tolist())) == STEPS
  # Metrics are means over the interval, counts sums, returns of episodes.
  assert list(logged) == [5, 10, 12]
  for last, first, returned in ((5, 0, 2.0), (10, 5, 7.0), (12, 10, 10.0)):
    steps = range(first, last)
    got = logged[last]
    np.testing.assert_allclose(
      got['loss'], 10 * (np.mean(steps) + start), rtol=1e-5
    )
    np.testing.assert_allclose(got['seen'], np.mean(steps), rtol=1e-6)
    assert got['decisions'] == 3 * len(steps)
    assert got['episodes'] == sum(s % 2 == 0 for s in steps)
    assert got['episode_return'] == returned
    assert got['episode_length'] == 7
    assert got['updates_per_second'] > 0
    assert not {'return_sum', 'length_sum'} & set(got)


def test_an_interval_without_episodes_has_no_return(key):
  logged = {}
  hooks = Hooks(log=logged.__setitem__)
  run_audited(audit_source(), key, Intervals(log=1), hooks, steps=2)
  assert 'episode_return' in logged[1]
  assert not {'episodes', 'episode_return'} & set(logged[2])


def as_it_is(restart):
  """Of a state that is saved as it is, but for what starts afresh."""
  nothing = lambda *args: None
  return Persistence(nothing, nothing, nothing, restart=restart)


@pytest.mark.parametrize('is_pure', [True, False])
def test_hooks_come_in_order(is_pure, key):
  events = []
  source = audit_source()._replace(is_pure=is_pure)
  restart = lambda state, step: events.append(('restart', step)) or state

  def evaluate(step, state):
    events.append(('evaluate', step))
    return {'score': float(state.params)}

  def log(step, metrics):
    events.append(('log', step, metrics.get('score')))

  save = lambda carry: events.append(('save', int(carry.step)))
  run_audited(
    source._replace(kept=as_it_is(restart)),
    key,
    Intervals(log=4, checkpoint=6, evaluate=4),
    Hooks(log=log, save=save, evaluate=evaluate),
    steps=10,
  )
  assert events == [
    ('evaluate', 4),
    ('log', 4, 4.0),
    ('log', 6, None),
    ('restart', 6),
    ('save', 6),
    ('evaluate', 8),
    ('log', 8, 8.0),
    ('log', 10, None),
    ('restart', 10),
    ('save', 10),
  ]


def test_a_checkpoint_boundary_restarts_also_where_nothing_is_saved(key):
  restarted = []
  source = audit_source()._replace(
    kept=as_it_is(lambda state, step: restarted.append(step) or state)
  )
  run_audited(source, key, Intervals(log=5, checkpoint=4), steps=9)
  assert restarted == [4, 8]


def test_stopping_saves_and_leaves(key):
  for is_pure, wanted in ((True, 4), (False, 4)):
    # It is asked before each interval, on the host behind each update, too.
    asked, saved = [], []

    def stopping(step, asked=asked, is_pure=is_pure):
      asked.append(None)
      return len(asked) > (2 if is_pure else 4)

    hooks = Hooks(stopping=stopping, save=lambda c, s=saved: s.append(c))
    source = audit_source()._replace(is_pure=is_pure)
    intervals = Intervals(log=2 if is_pure else 10)
    carry = run_audited(source, key, intervals, hooks)
    assert carry.step == wanted
    assert [int(c.step) for c in saved] == [wanted]
    # What was left off goes on as if nothing had been.
    carry = run_audited(source, key, Intervals(log=5), carry=carry)
    whole = run_audited(source, key, Intervals(log=5))
    jax.tree.map(np.testing.assert_array_equal, carry, whole)


def test_intervals_stop_at_the_next_multiple_of_any():
  intervals = Intervals(log=10, checkpoint=15)
  stops, step = [], 0
  while step < 50:
    step = intervals.next_stop(step, 50)
    stops.append(step)
  assert stops == [10, 15, 20, 30, 40, 45, 50]


def test_intervals_vmap_over_seeds():
  agent, source = audit_agent(), audit_source()
  interval = loop.compile_interval(agent, source)
  keys = jax.random.split(jax.random.key(3), 2)
  alone = [loop.init(agent, source, k) for k in keys]
  together = jax.tree.map(lambda *x: jnp.stack(x), *alone)
  together = together._replace(step=alone[0].step)
  axes = Carry(0, 0, None)
  many = jax.jit(
    jax.vmap(interval, in_axes=(axes, 0, None), out_axes=(axes, 0, 0))
  )
  carry, means, _ = many(together, keys, 5)
  assert carry.step == 5
  for i in range(2):
    want, metrics, _ = jax.jit(interval)(alone[i], keys[i], 5)
    row = jax.tree.map(lambda x, i=i: x[i], (carry.agent, means))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-6),
      row,
      (want.agent, metrics),
    )


@pytest.mark.parametrize(
  'ratio', [Fraction(1), Fraction(1, 3), Fraction(7, 2), Fraction(8), '0.3']
)
def test_pace_takes_the_rows_that_are_due(ratio):
  pace = Pace(4, 10, Fraction(ratio))
  traced = jax.jit(lambda step: (pace.rows_due(step), pace.rows_until(step)))
  total = 0
  for step in range(60):
    total += pace.rows_due(step)
    want = 3 + step * Fraction(ratio) // 4
    assert total == pace.rows_until(step) == want
    assert traced(jnp.int32(step)) == (pace.rows_due(step), want)


def test_pace_is_exact_for_long_runs():
  pace = Pace(8, 0, Fraction(999, 1000))
  step = 2_000_000_000
  want = step * 999 // 8000
  assert pace.rows_until(step) == want
  assert jax.jit(pace.rows_until)(jnp.int32(step)) == want


@pytest.mark.parametrize('per_update', ['2', '1/2', '3', '4', '13/2', '8'])
def test_pace_reaches_no_further_than_its_decisions(per_update):
  pace = Pace(4, 10, Fraction(per_update))
  rows = [pace.rows_until(step) for step in range(200)]
  for step in range(20):
    taken = rows[step - 1] if step else 0
    # No row more; then as many as hold the decisions, one at the least.
    for left in (-3, 0, 1, 4, 7, 8, 40):
      allowed = taken + (max(left // 4, 1) if left > 0 else 0)
      want = next(k for k, n in enumerate(rows) if n > allowed)
      want = max(want, step + (left > 0))
      assert pace.reach(step, left) == want, (step, left)


def test_pace_counts_updates():
  pace = Pace(4, 10, Fraction(1, 2))
  assert [pace.updates(d) for d in (0, 10, 11, 60)] == [1, 1, 2, 100]


# Sources of rows and windows.


def counting_env(length=3):
  """Observes and rewards the number of the step; ends after `length`."""

  def timestep(t, first):
    return TimeStep(
      observation=jnp.float32(t)[None],
      reward=jnp.float32(t),
      discount=jnp.float32(t < length),
      is_first=jnp.asarray(first),
      truncated=jnp.asarray(False),
    )

  def step(t, action, key):
    return t + 1, timestep(t + 1, False)

  reset = lambda key: (jnp.int32(0), timestep(0, True))
  spec = Spec(ArraySpec((1,), np.float32), Discrete(2))
  return Environment(reset, step, spec)


def counting_agent():
  def act(params, key, timestep):
    action = jnp.zeros(timestep.reward.shape, jnp.int32) + params
    return action, {'seen': timestep.observation[:, 0]}

  init = lambda key: Audit(jnp.int32(1), (), ())
  update = lambda state, batch, key: (state, Info({}, None))
  return Agent(init, act, update)


def test_from_env_restarts_behind_the_last_step(key):
  agent = counting_agent()
  source = sources.from_env(counting_env(), agent, 2)
  state, agent_state = source.init(key), agent.init(key)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), source.example())
  next_ = jax.jit(source.next)
  rows, counts = [], []
  for i in range(9):
    state, row, measures = next_(state, agent_state, i, key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), row) == shapes
    rows.append(row)
    counts.append(measures.counts)
  column = lambda f: [float(f(row)[1]) for row in rows]
  assert column(lambda r: r.timestep.reward) == [0, 1, 2, 3, 0, 1, 2, 3, 0]
  assert column(lambda r: r.extras['seen']) == [0, 1, 2, 3, 0, 1, 2, 3, 0]
  assert column(lambda r: r.timestep.discount) == [1, 1, 1, 0, 1, 1, 1, 0, 1]
  assert column(lambda r: r.timestep.is_first) == [1, 0, 0, 0, 1, 0, 0, 0, 1]
  assert column(lambda r: r.action) == [1] * 9
  # The row of an episode's end holds no decision; two environments.
  got = [c['decisions'] for c in counts]
  assert got == [2, 2, 2, 0, 2, 2, 2, 0, 2]
  assert [c['episodes'] for c in counts] == [0, 0, 2, 0, 0, 0, 2, 0, 0]
  assert [c['return_sum'] for c in counts][2::4] == [12, 12]
  assert [c['length_sum'] for c in counts][2::4] == [6, 6]


def test_replayed_windows_take_turns_with_rows(key):
  agent = counting_agent()
  inner = sources.from_env(counting_env(), agent, 2)
  pace = Pace(2, 12, Fraction(1))
  kept = replay.device_replay(64, 4, 3)
  source = sources.replayed(inner, kept, pace, total_updates=10)
  state, agent_state = source.init(key), agent.init(key)
  next_ = jax.jit(source.next)
  counts = []
  for i in range(5):
    state, batch, measures = next_(state, agent_state, jnp.int32(i), key)
    counts.append(int(state.replay.count))
    assert counts[-1] == pace.rows_until(i)
    assert 'replay_age' in measures.gauges
    reward = np.asarray(batch.experience.timestep.reward)
    valid = np.asarray(batch.valid)
    assert (np.diff(reward, axis=1)[valid[:, 1:]] == 1).all()
  assert counts == [6, 6, 7, 7, 8]
  # Priorities come back to their rows.
  info = Info({}, jnp.full((4,), 5.0))
  state = source.feedback(state, batch, info)
  priority = np.asarray(state.replay.priority).reshape(-1)
  np.testing.assert_allclose(priority[batch.sample.index], 5, rtol=1e-5)


def test_a_warm_up_shorter_than_a_window_is_refused(key):
  agent = counting_agent()
  inner = sources.from_env(counting_env(), agent, 2)
  kept = replay.device_replay(64, 4, 3)
  source = sources.replayed(
    inner, kept, Pace(2, 4, Fraction(1)), total_updates=1
  )
  with pytest.raises(
    ValueError, match='warmup_decisions=4: must be at least 6'
  ):
    source.init(key)


def test_reanalyzed_hands_batches_through_refresh(key):
  def refresh(state, batch, step, key):
    return batch + 100 * state.params + 1000 * step

  agent = audit_agent()._replace(refresh=refresh)
  for is_pure in (True, False):
    inner = audit_source()._replace(is_pure=is_pure)
    source = sources.reanalyzed(inner, agent)
    state = inner.init(key)
    inner_key = jax.random.split(key)[0]
    _, want, _ = inner.next(state, agent.init(key), 3, inner_key)
    _, got, _ = source.next(state, agent.init(key), 3, key)
    np.testing.assert_allclose(got, want + 3000, rtol=1e-6)
  assert sources.reanalyzed(inner, agent._replace(refresh=None)) is inner


# The whole with a real agent: one program, the host loop, and resume.


NETWORK = NetworkConfig(
  torso='vector',
  latent_size=8,
  blocks=0,
  norm='batch',
  lstm_size=4,
  value_bins=11,
  reward_bins=11,
  projector=(6,),
  predictor=(4,),
  head_hidden=(6,),
)
CONFIG = efficientzero.Config(
  network=NETWORK,
  search=planning.SearchConfig(num_simulations=3),
  unroll_steps=2,
  td_steps=2,
  augmentation=False,
  warmup_updates=0,
  learning_rate=0.05,
  target_period=4,
  total_updates=20,
  total_decisions=200,
)
NUM_ENVS, BATCH = 4, 4
PACE = Pace(NUM_ENVS, 48, Fraction(6))


def make_agent(spec, config=CONFIG):
  return conformance.make_agent(efficientzero, config, spec)


def make_source(agent, inner, kept):
  source = sources.replayed(inner, kept, PACE, total_updates=20)
  return sources.reanalyzed(source, agent)


def run(agent, source, carry, key, steps, **hooks):
  intervals = Intervals(log=10, checkpoint=10)
  return loop.run(
    agent,
    source,
    carry,
    key=key,
    steps=steps,
    intervals=intervals,
    hooks=Hooks(**hooks),
  )


def assert_same(got, want, **tolerance):
  check = np.testing.assert_array_equal
  if tolerance:
    check = functools.partial(np.testing.assert_allclose, **tolerance)

  def one(path, a, b):
    name = jax.tree_util.keystr(path)
    assert (a.shape, a.dtype) == (b.shape, b.dtype), name
    check(a, b, err_msg=name)

  jax.tree.map_with_path(one, got, want)


@pytest.fixture(scope='module')
def pure():
  env = make_catch(rows=4, columns=3)
  agent = make_agent(env.spec)
  inner = sources.from_env(env, agent, NUM_ENVS)
  kept = replay.device_replay(160, BATCH, CONFIG.window)
  return agent, make_source(agent, inner, kept)


@pytest.fixture(scope='module')
def uninterrupted(pure):
  agent, source = pure
  key = jax.random.key(5)
  logged = {}
  carry = loop.init(agent, source, key)
  carry = run(agent, source, carry, key, 20, log=logged.__setitem__)
  return carry, logged


def test_a_pure_run_resumes_bitwise(pure, uninterrupted, tmp_path):
  (agent, source), (want, _) = pure, uninterrupted
  key = jax.random.key(5)
  checkpoints = checkpoint.open(tmp_path)
  save = lambda carry: checkpoints.save(int(carry.step), carry)
  run(agent, source, loop.init(agent, source, key), key, 10, save=save)
  checkpoints.close()

  checkpoints = checkpoint.open(tmp_path)
  carry, _ = checkpoints.restore(loop.init(agent, source, key))
  checkpoints.close()
  assert carry.step == 10
  got = run(agent, source, carry, key, 20)
  assert_same(got, want)
  assert got.agent.params.step == 20
  assert got.source.replay.count == PACE.rows_until(19)


def test_a_pure_run_equals_the_host_loop(pure, uninterrupted):
  (agent, source), (want, scanned) = pure, uninterrupted
  key = jax.random.key(5)
  # Compiled apart, numbers differ in their last bits; while these do not
  # tip a choice, the whole state stays close.
  jitted = source._replace(
    next=jax.jit(source.next), feedback=jax.jit(source.feedback), is_pure=False
  )
  as_array = lambda s: jnp.asarray(s, jnp.int32)
  jitted = jitted._replace(
    next=lambda state, agent_state, step, key, f=jitted.next: f(
      state, agent_state, as_array(step), key
    )
  )
  logged = {}
  carry = loop.init(agent, source, key)
  got = run(agent, jitted, carry, key, 20, log=logged.__setitem__)
  assert_same(got.agent, want.agent, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(
    got.source.replay.rows.action, want.source.replay.rows.action
  )
  assert got.step == want.step
  for step in (10, 20):
    assert set(logged[step]) == set(scanned[step])
    for name in set(logged[step]) - {'updates_per_second'}:
      np.testing.assert_allclose(
        logged[step][name], scanned[step][name], rtol=1e-3, atol=1e-4,
        err_msg=name,
      )  # fmt: skip


@pytest.fixture(scope='module')
def simulated():
  env = make_envpool('Catch-v0', NUM_ENVS)
  agent = make_agent(env.spec)
  inner = host.from_host(env, agent, mode='synchronous')
  kept = host_replay.host_replay(160, BATCH, CONFIG.window)
  update = jax.jit(agent.update, donate_argnums=0)
  return agent, make_source(agent, inner, kept), update


def test_an_envpool_run_resumes_bitwise(simulated, tmp_path):
  agent, source, update = simulated
  key = jax.random.key(6)
  checkpoints = checkpoint.open(tmp_path / 'checkpoints')
  directory = tmp_path / 'replay'

  def save(carry):
    arrays, facts = source.kept.save(carry.source, directory, int(carry.step))
    step = int(carry.step)
    checkpoints.save(step, carry._replace(source=arrays), {'source': facts})

  def go(carry, steps, **hooks):
    return loop.run(
      agent, source, carry, key=key, steps=steps, update=update,
      intervals=Intervals(log=10, checkpoint=10), hooks=Hooks(**hooks),
    )  # fmt: skip

  carry = loop.init(agent, source, key)
  source.close(go(carry, 10, save=save).source)
  checkpoints.wait()

  # As after a kill: nothing but the files.
  agent_state = jax.eval_shape(agent.init, key)
  template = Carry(agent_state, source.kept.template(), jnp.int32(0))
  carry, extra = checkpoints.restore(template)
  kept = source.kept.load(
    carry.source, extra['source'], directory, loop.source_key(key)
  )
  got = go(carry._replace(source=kept), 20)

  want = go(loop.init(agent, source, key), 20)  # saves nothing
  assert got.step == want.step == 20
  assert_same(got.agent, want.agent)
  ours, theirs = got.source.replay, want.source.replay
  assert ours.count == theirs.count == PACE.rows_until(19)
  assert_same(ours.rows, theirs.rows)
  np.testing.assert_array_equal(ours.priority, theirs.priority)
  assert ours.max_priority == theirs.max_priority
  # A boundary cuts the episodes that were open.
  boundary = PACE.rows_until(9)
  assert theirs.rows.timestep.is_first[boundary].all()
  for final in (got, want):
    source.close(final.source)
  checkpoints.close()


def test_rows_of_experience_fit_the_example(simulated, key):
  agent, _, _ = simulated
  env = make_envpool('Catch-v0', NUM_ENVS)
  inner = host.from_host(env, agent, mode='synchronous')
  state = inner.init(key)
  params = jax.jit(agent.init)(key)
  _, row, _ = inner.next(state, params, 0, key)
  assert isinstance(row, Experience)
  describe = lambda x: (x.shape, np.dtype(x.dtype))
  assert jax.tree.map(describe, row) == jax.tree.map(describe, inner.example())
  inner.close(state)


# The run's seed.


def test_every_step_draws_from_the_key_of_the_run():
  def noise(seed):
    carry = run_audited(audit_source(), jax.random.key(seed), Intervals(log=5))
    return np.asarray(carry.agent.noise)

  first, other = noise(0), noise(1)
  np.testing.assert_array_equal(first, noise(0))
  assert len(set(first)) == STEPS
  assert not set(first) & set(other)


def test_agent_and_source_begin_from_the_key_of_the_run():
  draw = lambda key: jax.random.uniform(key)
  agent = audit_agent()._replace(init=draw)
  source = audit_source()._replace(init=draw)
  begin = lambda seed: loop.init(agent, source, jax.random.key(seed))
  seen = [float(x) for s in range(3) for x in begin(s)[:2]]
  assert len(set(seen)) == 6
  assert [float(x) for x in begin(0)[:2]] == seen[:2]


# The end of a run by its decisions.


def run_by_decisions(
  most, *, length=3, extra=0, every=4, log_every=10, host=False, upto=None
):
  """Rows of metrics, and the budget, of counting environments."""
  agent = counting_agent()
  pace = Pace(2, 8, Fraction(1, 2), max_decisions=most)
  inner = sources.from_env(counting_env(length), agent, num_envs=2)
  kept = replay.device_replay(capacity=400, batch_size=2, window=2)
  source = sources.replayed(
    inner, kept, pace, total_updates=10, rests=extra > 0
  )
  if host:  # the same rows, step by step
    source = source._replace(is_pure=False, next=jax.jit(source.next))
  budget, rows, key = Budget(pace, extra), [], jax.random.key(0)
  carry = loop.init(agent, source, key)
  log = lambda step, row: rows.append((step, row))
  run = lambda carry, steps: loop.run(
    agent, source, carry, key=key, steps=steps, budget=budget,
    intervals=Intervals(log=log_every), hooks=Hooks(log=log),
  )  # fmt: skip
  if upto is not None:
    carry = run(carry, upto)
    taken, acted = budget.taken, budget.acted
    budget = Budget(pace, extra)  # as after a resume
    budget.taken, budget.acted = taken, acted
  return run(carry, None), rows, budget


@pytest.mark.parametrize('host', [False, True])
@pytest.mark.parametrize('length', [1, 3, 100])
def test_a_run_takes_the_decisions_that_were_asked_for(length, host):
  carry, rows, budget = run_by_decisions(40, length=length, host=host)
  # 2 environments: 40 decisions are 20 rows without those of episodes' ends.
  ends = (20 - 1) // length
  taken = 20 + ends
  assert budget.taken == 40
  # 4 rows before the first update, and one in 4 updates from there on.
  assert int(carry.step) == 4 * (taken - 4) + 4
  assert sum(row['decisions'] for _, row in rows) == 40


@pytest.mark.parametrize('log_every', [1, 7, 1000])
@pytest.mark.parametrize('extra', [0, 5])
def test_the_end_depends_on_no_interval_and_no_resume(extra, log_every):
  whole, _, _ = run_by_decisions(40, extra=extra)
  other, rows, budget = run_by_decisions(40, extra=extra, log_every=log_every)
  chex.assert_trees_all_equal(whole, other)
  steps = [step for step, _ in rows]
  assert steps == sorted(set(steps))
  regular = [s for s in steps if s % log_every]
  assert set(regular) <= {int(whole.step) - extra, int(whole.step)}
  found, total = [], 0.0
  for step, row in rows:
    total += row.get('decisions', 0.0)
    found.append((step, total))
  assert Budget(Pace(2, 8, Fraction(1, 2), 40), extra).is_spent(found)
  assert not Budget(Pace(2, 8, Fraction(1, 2), 40), extra).is_spent(found[:-1])
  for upto in (3, 88, int(whole.step) - 2):
    resumed, _, _ = run_by_decisions(40, extra=extra, upto=upto)
    chex.assert_trees_all_equal(whole, resumed)
  assert budget.taken == 40


def test_updates_after_the_last_decision_take_no_row():
  carry, rows, budget = run_by_decisions(40, extra=30, log_every=1)
  assert budget.acted == int(carry.step) - 30
  late = [row for step, row in rows if step > budget.acted]
  assert len(late) == 30
  assert sum(row['decisions'] for row in late) == 0
