"""The loop with an agent that audits its stream; its pace and its windows."""

import functools
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_equal

from agents.core import replay
from agents.core.types import Agent, ArraySpec, Discrete, Info, Spec
from experiments.runtime import loop, sources
from experiments.runtime.loop import Carry, Hooks, Intervals
from experiments.runtime.persistence import Persistence
from experiments.runtime.sources import Measures, Pace, Source
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
    assert_equal(carry, whole)


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
