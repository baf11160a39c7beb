"""What the host's loop asks of the device in an update, counted."""

import collections
import contextlib
import functools
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import array

from agents.core.types import Agent, Info
from experiments.envs.envpool import make_envpool
from experiments.runtime import (
  host,
  keys,
  loop,
  mesh,
  parts,
  replay,
  sources,
  updates,
)
from experiments.runtime.loop import Intervals

ENVS, BATCH, WINDOW = 4, 8, 3
UPDATES, LOG_EVERY, METRICS = 40, 20, 5
LEAVES = [str(i) for i in range(20)]


class Learner(NamedTuple):
  """Parameters, of which there are many leaves."""

  params: Any


def make_agent() -> Agent:
  """Draws in all its functions; its priorities are of the batch's rows."""

  def act(params, key, timestep):
    action = jax.random.randint(key, timestep.reward.shape, 0, 3)
    extras = {'search_value': timestep.reward + 0 * params['0'][0]}
    return action, extras

  def init(key):
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), (4,))
    return Learner({name: draw(int(name)) for name in LEAVES})

  def update(state, batch, key):
    noise = jax.random.normal(key, (4,))
    reward = jnp.mean(batch.experience.timestep.reward)
    params = jax.tree.map(lambda x: 0.9 * x + noise, state.params)
    metrics = {f'metric_{i}': reward + i for i in range(METRICS)}
    priorities = jnp.abs(batch.experience.extras['search_value'][:, 0]) + 1
    return Learner(params), Info(metrics, priorities)

  def refresh(state, batch, step, key):
    value = jax.random.uniform(key, batch.valid.shape) + state.params['0'][0]
    experience = batch.experience
    extras = experience.extras | {'search_value': value}
    return batch._replace(experience=experience._replace(extras=extras))

  return Agent(init, act, update, refresh)


def make_source(agent, mode):
  env = make_envpool('Catch-v0', ENVS)
  inner = host.from_host(env, agent, mode=mode)
  kept = replay.host_replay(400, BATCH, WINDOW)
  pace = sources.Pace(ENVS, 40, Fraction(2))
  source = sources.replayed(inner, kept, pace, total_updates=100)
  source = parts.hosted([source], 1, mesh.make_mesh(jax.devices()[:1]), BATCH)
  return sources.reanalyzed(source, agent)


@contextlib.contextmanager
def counting(monkeypatch, folder):
  """Programs that are called meanwhile, and arrays that are read."""
  calls: collections.Counter = collections.Counter()
  found = Found(calls, [])
  with monkeypatch.context() as patch:
    as_numpy, value = np.asarray, array.ArrayImpl._value

    def read(x, *args, **kwargs):
      # On a CPU a buffer is read without asking the array.
      if isinstance(x, jax.Array):
        found.reads.append(x.shape)
      return as_numpy(x, *args, **kwargs)

    def of_value(self):
      found.reads.append(self.shape)
      return value.fget(self)

    patch.setattr(np, 'asarray', read)
    patch.setattr(array.ArrayImpl, '_value', property(of_value))
    # What is called eagerly is a program, too.
    with jax.profiler.trace(str(folder)):
      yield found
  [path] = folder.glob('**/*.xplane.pb')
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      for event in line.events:
        if event.name.startswith('PjitFunction('):
          calls[event.name[len('PjitFunction(') : -1]] += 1


class Found(NamedTuple):
  """Calls by the program's name, and the shapes of what was read."""

  calls: collections.Counter
  reads: list


def measured(agent, source, monkeypatch, folder):
  update, key = updates.compiled(agent), jax.random.key(1)
  run = functools.partial(
    loop.run, agent, source, key=key, update=update,
    intervals=Intervals(log=LOG_EVERY),
  )  # fmt: skip
  carry = loop.init(agent, source, key)
  try:
    carry = run(carry, steps=UPDATES)
    with counting(monkeypatch, folder) as found:
      carry = run(carry, steps=2 * UPDATES)
  finally:
    source.close(carry.source)
  return found


# Of every update; of every row; of 64 updates; of every interval.
PROGRAMS = {'refresh', 'update', 'acting', 'some', '_are_finite'}


@pytest.mark.parametrize('mode', ['synchronous', 'asynchronous'])
def test_an_update_runs_nothing_eagerly(mode, monkeypatch, tmp_path):
  agent = make_agent()
  found = measured(agent, make_source(agent, mode), monkeypatch, tmp_path)
  published = {'_copy'} if mode == 'asynchronous' else set()
  assert set(found.calls) == PROGRAMS | published


def test_an_update_reads_one_array(monkeypatch, tmp_path):
  agent = make_agent()
  source = make_source(agent, 'synchronous')
  found = measured(agent, source, monkeypatch, tmp_path)
  count = collections.Counter(found.reads)
  assert count.pop((BATCH,)) == UPDATES  # priorities
  # Metrics, when they are logged, with what else is read then.
  assert count.pop((METRICS,)) == UPDATES
  assert count.pop((64, BATCH)) == 1  # random numbers
  assert count.pop((len(LEAVES),)) == UPDATES // LOG_EVERY
  rows = UPDATES * 2 // ENVS
  assert count == {(ENVS,): 2 * rows}  # actions and their extras


def test_the_counters_see_an_eager_call_and_a_read(monkeypatch, tmp_path):
  agent = make_agent()
  source = make_source(agent, 'synchronous')

  def next_(*args):
    state, batch, measures = source.next(*args)
    value = batch.experience.extras['search_value']
    gauges = {'mean': float(jax.lax.neg(jnp.mean(value)))}
    return state, batch, measures._replace(gauges=gauges)

  faulty = source._replace(next=next_)
  found = measured(agent, faulty, monkeypatch, tmp_path)
  assert {'neg', '_mean'} <= set(found.calls) - PROGRAMS
  assert found.reads.count(()) >= UPDATES


# Keys that are derived where they are used.


def test_derived_keys_are_those_of_jax_random():
  key = jax.random.key(3)
  derived = keys.fold_in(keys.Derived(key), 2**31 - 1)
  first, second = keys.split(keys.split(derived)[1])
  last = keys.fold_in(second, 7)
  want = jax.random.fold_in(key, 2**31 - 1)
  want_first, want_second = jax.random.split(jax.random.split(want)[1])
  want_last = jax.random.fold_in(want_second, 7)
  for got, wanted in ((first, want_first), (last, want_last)):
    data = jax.jit(lambda k: jax.random.key_data(keys.typed(k)))(got)
    np.testing.assert_array_equal(data, jax.random.key_data(wanted))
  # The same functions take typed keys as they are.
  for got, wanted in zip(keys.split(want), jax.random.split(want)):
    assert got == wanted
  assert keys.fold_in(want, 4) == jax.random.fold_in(want, 4)


def test_numbers_drawn_ahead_are_those_of_each_step():
  key, calls = jax.random.key(5), []

  def draw(key):
    calls.append(1)
    return jax.random.uniform(key, (3,))

  ahead = keys.Ahead(draw, steps=4)
  path = lambda key, step: keys.split(keys.fold_in(key, step))[1]
  for step in (0, 1, 2, 3, 4, 2, 9):  # forth, back, and past the end
    got = ahead(path(keys.Derived(key), step))
    np.testing.assert_array_equal(
      got, jax.random.uniform(path(key, step), (3,))
    )
  assert len(calls) == 1  # one trace serves all steps
  other = jax.random.key(6)
  got = ahead(path(keys.Derived(other), 9))
  np.testing.assert_array_equal(got, jax.random.uniform(path(other, 9), (3,)))
  np.testing.assert_array_equal(
    ahead(path(key, 1)), jax.random.uniform(path(key, 1), (3,))
  )


def test_a_host_run_draws_as_one_with_typed_keys():
  agent = make_agent()
  plain = make_source(agent, 'synchronous')
  found = []
  for source in (plain, plain._replace(derives=False)):
    key = jax.random.key(1)
    carry = loop.run(
      agent, source, loop.init(agent, source, key), key=key, steps=12,
      intervals=Intervals(log=12),
    )  # fmt: skip
    [part] = source.restart(carry.source, 12).parts
    found.append((carry.agent, part.replay.rows, part.replay.priority))
    source.close(carry.source)
  jax.tree.map(np.testing.assert_array_equal, *found)


# Priorities, one update late.


def test_priorities_arrive_one_update_late_and_before_a_restart():
  agent = make_agent()
  source = make_source(agent, 'synchronous')
  state, key = source.init(jax.random.key(0)), jax.random.key(2)
  learner = jax.jit(agent.init)(key)
  try:
    drawn = []
    for step in range(2):
      state, batch, _ = source.next(state, learner, step, key)
      drawn.append(np.asarray(batch.sample.index))
      before = state.parts[0].replay.priority.copy()
      priorities = jnp.full(BATCH, 10.0 * (step + 1))
      state = source.feedback(state, batch, Info({}, priorities))
      after = state.parts[0].replay.priority
      if step == 0:
        np.testing.assert_array_equal(after, before)
      else:
        np.testing.assert_allclose(after.reshape(-1)[drawn[0]], 10, rtol=1e-5)
    # A restart, before each save, brings what is still to come.
    state = source.restart(state, 2)
    after = state.parts[0].replay.priority.reshape(-1)
    np.testing.assert_allclose(after[drawn[1]], 20, rtol=1e-5)
    assert state.pending is None
  finally:
    source.close(state)
