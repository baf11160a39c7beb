"""Acting on host simulators, in step with the learner and beside it."""

import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.core.types import Agent, ArraySpec, Discrete, Info, Spec
from experiments.envs.host import EpisodeStats, HostEnvironment, Simulator
from experiments.runtime import host, loop
from experiments.runtime.loop import Intervals
from search.model import TimeStep

E, LENGTH = 2, 4


class Learner(NamedTuple):
  """An agent's state: its number of updates."""

  params: Any


class Log:
  """What the simulators did."""

  def __init__(self):
    self.seeds, self.steps, self.open = [], 0, 0


def make_env(fail_at=None):
  """Episodes of `LENGTH` decisions; observes seed and step, rewards actions."""
  log = Log()
  spec = Spec(ArraySpec((2,), np.float32), Discrete(1000), name='Count')

  def start(seed):
    log.seeds.append(seed)
    log.open += 1
    t = -1

    def time_step(reward):
      observation = np.float32([[seed % 1000, t]] * E)
      return TimeStep(
        observation=observation,
        reward=np.full(E, reward, np.float32),
        discount=np.full(E, float(t < LENGTH), np.float32),
        is_first=np.full(E, t == 0),
        truncated=np.zeros(E, bool),
      )

    def reset():
      nonlocal t
      t = 0
      return time_step(0)

    def step(action):
      nonlocal t
      log.steps += 1
      if log.steps == fail_at:
        raise OSError('the simulator broke')
      t = 0 if t == LENGTH else t + 1
      finished = np.full(E, t == LENGTH)
      stats = EpisodeStats(finished, finished * 5.0, finished * LENGTH)
      return time_step(float(action[0]) if t else 0.0), stats

    def close():
      log.open -= 1

    return Simulator(reset, step, close)

  return HostEnvironment(spec, E, start), log


def make_agent():
  """Acts by its number of updates and tells that number and its noise."""

  def act(params, key, timestep):
    action = jnp.full(timestep.reward.shape, params, jnp.int32)
    noise = jax.random.uniform(key, timestep.reward.shape)
    return action, {'version': action, 'noise': noise}

  def init(key):
    del key
    return Learner(jnp.zeros((), jnp.int32))

  def update(state, batch, key):
    info = Info({'version': jnp.float32(batch.extras['version'][0])}, None)
    return Learner(state.params + 1), info

  return Agent(init, act, update)


@pytest.fixture(scope='module')
def agent():
  return make_agent()


def learner(step):
  return Learner(jnp.int32(step))


def threads():
  return set(threading.enumerate())


def take(source, state, count, start=0):
  rows = []
  for step in range(start, start + count):
    key = jax.random.key(step)
    state, row, measures = source.next(state, learner(step), step, key)
    rows.append((row, measures))
  return rows


def wait_for(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def same(xs, ys):
  xs, ys = ([row for row, _ in rows] for rows in (xs, ys))
  return all(
    jax.tree.all(jax.tree.map(np.array_equal, x, y)) for x, y in zip(xs, ys)
  )


def test_synchronous_rows_are_of_the_learners_own_params(agent, key):
  env, log = make_env()
  source = host.from_host(env, agent, mode='synchronous')
  state = source.init(key)
  rows = take(source, state, 7)
  for step, (row, measures) in enumerate(rows):
    # Row and action belong together; the reward of an action comes next.
    assert (row.action == step).all()
    assert row.timestep.observation[0, 1] == step % (LENGTH + 1)
    assert measures.counts == {
      'decisions': E * (step != LENGTH),
      'episodes': E * (step == LENGTH - 1),
      'return_sum': 5.0 * E * (step == LENGTH - 1),
      'length_sum': LENGTH * E * (step == LENGTH - 1),
    }
    assert measures.gauges == {}
  rewards = [row.timestep.reward[0] for row, _ in rows]
  assert rewards == [0, 0, 1, 2, 3, 0, 5]
  leaves = jax.tree.leaves([row for row, _ in rows])
  assert all(isinstance(x, np.ndarray) for x in leaves)
  source.close(state)
  assert log.open == 0


def test_synchronous_runs_are_equal(agent, key):
  env, log = make_env()
  source = host.from_host(env, agent, mode='synchronous')
  states = [source.init(key), source.init(key)]
  states.append(source.init(jax.random.key(9)))
  one, two, other = (take(source, state, 6) for state in states)
  assert same(one, two)
  assert not same(one, other)
  assert log.seeds[0] == log.seeds[1] != log.seeds[2]
  for state in states:
    source.close(state)


@pytest.mark.parametrize('mode', ['synchronous', 'asynchronous'])
def test_restart_begins_afresh_and_a_load_begins_there(mode, agent, key):
  env, log = make_env()
  source = host.from_host(env, agent, mode=mode)
  state = source.init(key)
  take(source, state, 3)
  state = source.restart(state, 10)
  assert log.open == 1
  assert log.seeds[0] != log.seeds[1]
  arrays, facts = source.kept.save(state, None, 0)
  assert jax.tree.structure(arrays) == jax.tree.structure(
    source.kept.template()
  )
  rows = take(source, state, 2, start=10)
  assert rows[0][0].timestep.is_first.all()
  source.close(state)

  again = source.kept.load(arrays, facts, None, key)
  assert log.seeds[2] == log.seeds[1]
  more = take(source, again, 2, start=10)
  noise = lambda rows: [row.extras['noise'].tolist() for row, _ in rows]
  if mode == 'synchronous':
    assert same(rows, more)
  assert noise(rows) == noise(more)
  source.close(again)
  assert log.open == 0


def test_the_actor_is_bounded_by_its_queue(agent, key):
  env, log = make_env()
  source = host.from_host(env, agent, queue_size=3)
  before = threads()
  state = source.init(key)
  assert threads() == before and log.steps == 0  # not before it is needed
  for taken in (1, 2):
    take(source, state, 1)
    # A full queue and one row in hand.
    wait_for(lambda taken=taken: log.steps == taken + 3 + 1)
    time.sleep(0.3)
    assert log.steps == taken + 3 + 1
  source.close(state)
  assert threads() == before
  assert log.open == 0


@pytest.mark.parametrize('every', [1, 3])
def test_the_lag_is_that_of_the_params_that_acted(every, agent, key):
  env, _ = make_env()
  source = host.from_host(env, agent, publish_every=every, queue_size=2)
  state = source.init(key)
  rows = take(source, state, 40)
  versions = [int(row.extras['version'][0]) for row, _ in rows]
  for step, ((_, measures), version) in enumerate(zip(rows, versions)):
    assert set(measures.gauges) == {'policy_lag'}
    assert measures.gauges['policy_lag'] == step - version
    assert version <= step and version % every == 0
    assert measures.counts['wait_seconds'] >= 0
  assert versions == sorted(versions)
  # Rows wait behind a queue and one in hand, and those were acted with
  # what was published before.
  assert max(np.arange(40) - versions) <= 2 + 2 + every
  assert versions[-1] > 20
  # The stream has no holes.
  places = [row.timestep.observation[0, 1] for row, _ in rows]
  assert places == [i % (LENGTH + 1) for i in range(40)]
  source.close(state)


def test_donated_params_are_not_read(agent, key):
  env, log = make_env()
  source = host.from_host(env, agent)
  carry = loop.init(agent, source, key)
  first = carry.agent.params
  logged = {}
  before = threads()
  carry = loop.run(
    agent,
    source,
    carry,
    key=key,
    steps=30,
    intervals=Intervals(log=15, checkpoint=10),
    hooks=loop.Hooks(log=logged.__setitem__),
  )
  assert first.is_deleted()
  assert carry.agent.params == carry.step == 30
  assert len(log.seeds) == 1 + 3  # it was restarted at every checkpoint
  assert {'policy_lag', 'wait_seconds'} <= set(logged[15])
  source.close(carry.source)
  assert threads() == before
  assert log.open == 0


@pytest.mark.parametrize('mode', ['synchronous', 'asynchronous'])
def test_a_simulators_error_reaches_the_learner(mode, agent, key):
  env, log = make_env(fail_at=4)
  source = host.from_host(env, agent, mode=mode)
  before = threads()
  state = source.init(key)
  assert len(take(source, state, 3)) == 3  # rows before it are not lost
  with pytest.raises(OSError, match='the simulator broke'):
    take(source, state, 1, start=3)
  assert threads() == before
  source.close(state)
  assert log.open == 0


def test_an_agents_error_reaches_the_learner(agent, key):
  def act(params, key, timestep):
    raise KeyError('the agent broke')

  env, _ = make_env()
  source = host.from_host(env, agent._replace(act=act))
  before = threads()
  state = source.init(key)
  with pytest.raises(KeyError, match='the agent broke'):
    take(source, state, 1)
  assert threads() == before
  source.close(state)


def test_closing_while_the_actor_waits_leaves_no_thread(agent, key):
  env, log = make_env()
  source = host.from_host(env, agent, queue_size=1)
  before = threads()
  state = source.init(key)
  take(source, state, 1)
  wait_for(lambda: log.steps == 3)  # the queue is full
  source.close(state)
  assert threads() == before
  assert log.open == 0
  source.close(state)  # again does no harm


def test_bad_arguments_are_refused(agent):
  env, _ = make_env()
  for name, value in (
    ('mode', 'sync'),
    ('queue_size', 0),
    ('publish_every', 0),
  ):
    with pytest.raises(ValueError, match=f'{name}={value!r}'):
      host.from_host(env, agent, **{name: value})
