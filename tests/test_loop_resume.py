"""The loop with a real agent: resume to the last bit, seeds, decisions."""

import dataclasses
import functools
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import AGENTS
from small_agents import make_agent
from test_loop import (
  STEPS,
  audit_agent,
  audit_source,
  counting_agent,
  counting_env,
  run_audited,
)

from agents import efficientzero
from agents.core import planning, replay
from agents.core.types import Experience
from experiments.envs.catch import make_catch
from experiments.envs.envpool import make_envpool
from experiments.runtime import checkpoint, host, loop, sources, updates
from experiments.runtime import replay as host_replay
from experiments.runtime.budget import Budget
from experiments.runtime.loop import Carry, Hooks, Intervals
from experiments.runtime.sources import Pace

# The whole with a real agent: one program, the host loop, and resume.


CONFIG = dataclasses.replace(
  AGENTS['efficientzero'].config,
  search=planning.SearchConfig(num_simulations=3),
  unroll_steps=2,
  td_steps=2,
  augmentation=False,
  learning_rate=0.05,
  target_period=4,
  total_updates=20,
  total_decisions=200,
)
NUM_ENVS, BATCH = 4, 4
PACE = Pace(NUM_ENVS, 48, Fraction(6))


def make_source(agent, inner, kept):
  source = sources.replayed(inner, kept, PACE, total_updates=20)
  return sources.reanalyzed(source, agent)


def compiled(agent, source):
  """What `loop.run` compiles of a pure source, to share between runs."""
  return jax.jit(loop.watched_interval(agent, source), donate_argnums=0)


def run(agent, source, interval, carry, key, steps, **hooks):
  intervals = Intervals(log=10, checkpoint=10)
  return loop.run(
    agent,
    source,
    carry,
    key=key,
    steps=steps,
    intervals=intervals,
    hooks=Hooks(**hooks),
    interval=interval,
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
  agent = make_agent(efficientzero, CONFIG, env.spec)
  inner = sources.from_env(env, agent, NUM_ENVS)
  kept = replay.device_replay(160, BATCH, CONFIG.window)
  source = make_source(agent, inner, kept)
  return agent, source, compiled(agent, source)


@pytest.fixture(scope='module')
def uninterrupted(pure):
  agent, source, _ = pure
  key = jax.random.key(5)
  logged = {}
  carry = loop.init(agent, source, key)
  carry = run(*pure, carry, key, 20, log=logged.__setitem__)
  return carry, logged


def test_a_pure_run_resumes_bitwise(pure, uninterrupted, tmp_path):
  (agent, source, _), (want, _) = pure, uninterrupted
  key = jax.random.key(5)
  checkpoints = checkpoint.open(tmp_path)
  save = lambda carry: checkpoints.save(int(carry.step), carry)
  run(*pure, loop.init(agent, source, key), key, 10, save=save)
  checkpoints.close()

  checkpoints = checkpoint.open(tmp_path)
  carry, _ = checkpoints.restore(loop.init(agent, source, key))
  checkpoints.close()
  assert carry.step == 10
  got = run(*pure, carry, key, 20)
  assert_same(got, want)
  assert got.agent.params.step == 20
  assert got.source.replay.count == PACE.rows_until(19)


def test_a_pure_run_equals_the_host_loop(pure, uninterrupted):
  (agent, source, _), (want, scanned) = pure, uninterrupted
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
  got = run(agent, jitted, None, carry, key, 20, log=logged.__setitem__)
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
  agent = make_agent(efficientzero, CONFIG, env.spec)
  inner = host.from_host(env, agent, mode='synchronous')
  kept = host_replay.host_replay(160, BATCH, CONFIG.window)
  update = updates.compiled(agent)
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


@functools.cache
def counting(most, length, rests, host):
  """An agent, its pace, its source and, of a pure one, the interval."""
  agent = counting_agent()
  pace = Pace(2, 8, Fraction(1, 2), max_decisions=most)
  inner = sources.from_env(counting_env(length), agent, num_envs=2)
  kept = replay.device_replay(capacity=400, batch_size=2, window=2)
  source = sources.replayed(inner, kept, pace, total_updates=10, rests=rests)
  if host:  # the same rows, step by step
    source = source._replace(is_pure=False, next=jax.jit(source.next))
  return agent, pace, source, None if host else compiled(agent, source)


def run_by_decisions(
  most, *, length=3, extra=0, log_every=10, host=False, upto=None
):
  """Rows of metrics, and the budget, of counting environments."""
  agent, pace, source, interval = counting(most, length, extra > 0, host)
  budget, rows, key = Budget(pace, extra), [], jax.random.key(0)
  carry = loop.init(agent, source, key)
  log = lambda step, row: rows.append((step, row))
  run = lambda carry, steps: loop.run(
    agent, source, carry, key=key, steps=steps, budget=budget,
    intervals=Intervals(log=log_every), hooks=Hooks(log=log),
    interval=interval,
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


@pytest.mark.parametrize('extra', [0, 5])
def test_the_end_depends_on_no_interval_and_no_resume(extra):
  whole, _, _ = run_by_decisions(40, extra=extra)
  for log_every in (1, 7, 1000):
    other, rows, budget = run_by_decisions(40, extra=extra, log_every=log_every)
    chex.assert_trees_all_equal(whole, other)
    steps = [step for step, _ in rows]
    assert steps == sorted(set(steps))
    regular = [s for s in steps if s % log_every]
    assert set(regular) <= {int(whole.step) - extra, int(whole.step)}
    assert budget.taken == 40
  for upto in (3, 88, int(whole.step) - 2):
    resumed, _, _ = run_by_decisions(40, extra=extra, upto=upto)
    chex.assert_trees_all_equal(whole, resumed)


def test_updates_after_the_last_decision_take_no_row():
  carry, rows, budget = run_by_decisions(40, extra=30, log_every=1)
  assert budget.acted == int(carry.step) - 30
  late = [row for step, row in rows if step > budget.acted]
  assert len(late) == 30
  assert sum(row['decisions'] for row in late) == 0
