"""The two replays against each other, brute force and numbers by hand."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_equal

from agents.core.replay import (
  EPSILON,
  Replay,
  device_replay,
  to_window,
)
from agents.core.types import Experience, Sample
from experiments.envs.envpool import make_envpool
from experiments.runtime.replay import host_replay
from search.model import TimeStep

# Small on purpose: rings of 12 rows, two streams.
STREAMS, ROWS, BATCH = 2, 12, 32


def stream(
  num_rows, frame_stack=1, streams=STREAMS, seed=0, shape=(), channels=1
):
  """Rows of random short episodes; frames count, stacks as simulators do."""
  rng = np.random.default_rng(seed)
  stack, last, rows = None, np.ones(streams, bool), []
  for t in range(num_rows):
    first = last | (rng.random(streams) < 0.05)  # Some start out of the blue.
    base = 2 * t + np.arange(streams)
    frame = np.broadcast_to(
      base.reshape(-1, *[1] * (len(shape) + 1)),
      (streams, *shape, channels),
    ).astype(np.uint8)
    repeated = np.concatenate([frame] * frame_stack, -1)
    if stack is None:
      stack = repeated
    stack = np.concatenate([stack[..., channels:], frame], -1)
    stack[first] = repeated[first]
    ended = ~first & (rng.random(streams) < 0.2)
    cut = ~first & ~ended & (rng.random(streams) < 0.1)
    last = ended | cut
    timestep = TimeStep(
      observation=stack.copy(),
      reward=np.where(first, 0, base).astype(np.float32),
      discount=(~ended).astype(np.float32),
      is_first=first,
      truncated=cut,
    )
    rows.append(
      Experience(
        timestep,
        (base % 5).astype(np.int32),
        {'search_value': base.astype(np.float32)},
      )
    )
  return rows


class Compiled(NamedTuple):
  """A replay with its pure functions compiled, and its settings."""

  replay: Replay
  window: int
  frame_stack: int


def compiled(replay, window, frame_stack):
  if replay.is_pure:
    replay = Replay(*map(jax.jit, replay[:5]), is_pure=True)
  return Compiled(replay, window, frame_stack)


CASES = [(1, 1), (3, 1), (4, 3)]


@pytest.fixture(scope='module', params=CASES, ids=str)
def both(request):
  """The device's and the host's replay of one setting."""
  window, frame_stack = request.param
  arguments = {
    'capacity': STREAMS * ROWS,
    'batch_size': BATCH,
    'window': window,
    'frame_stack': frame_stack,
    'alpha': 0.6,
  }
  return (
    compiled(device_replay(**arguments), window, frame_stack),
    compiled(host_replay(**arguments), window, frame_stack),
  )


def fill(replay, rows):
  return functools.reduce(replay.add, rows, replay.init(rows[0]))


def with_cuts(rows):
  """The rows, truncated where another episode follows unannounced."""
  rows = list(rows)
  for t in range(len(rows) - 1):
    timestep = rows[t].timestep
    cut = rows[t + 1].timestep.is_first & (timestep.discount != 0)
    truncated = timestep.truncated | cut
    rows[t] = rows[t]._replace(timestep=timestep._replace(truncated=truncated))
  return rows


def eligible(rows, window, frame_stack, size=ROWS):
  """All `(t, e)` where a window may start, by enumeration."""
  rows = with_cuts(rows)
  oldest, found = max(len(rows) - size, 0), set()
  for t in range(oldest, len(rows) - window + 1):
    for e in range(STREAMS):
      if rows[t].timestep.is_last()[e]:
        continue
      back = t
      while back > t - frame_stack + 1 and not rows[back].timestep.is_first[e]:
        back -= 1
      if back >= oldest:
        found.add((t, e))
  return found


def drawn_starts(trajectory, count, size=ROWS):
  """`(t, e)` of every window, and what generation it says."""
  slot, e = np.divmod(np.asarray(trajectory.sample.index), STREAMS)
  t = count - 1 - (count - 1 - slot) % size
  return list(zip(t.tolist(), e.tolist()))


@pytest.mark.parametrize('num_rows', [1, 5, 11, 12, 13, 40])
def test_windows_are_those_of_brute_force(both, key, num_rows):
  rows = stream(num_rows, both[0].frame_stack)
  truth = with_cuts(rows)
  for replay, window, frame_stack in both:
    want = eligible(rows, window, frame_stack)
    state = fill(replay, rows)
    assert bool(replay.ready(state)) == bool(want)
    if not want:
      continue
    seen = set()
    for i in range(6):
      batch = replay.sample(state, jax.random.fold_in(key, i), 0.4)
      starts = drawn_starts(batch, num_rows)
      seen |= set(starts)
      for b, (t, e) in enumerate(starts):
        chosen = truth[t : t + window]
        get = lambda leaf, b=b: np.asarray(leaf)[b]
        got = jax.tree.map(get, batch.experience)
        last = [bool(r.timestep.is_last()[e]) for r in chosen]
        valid = [not any(last[:k]) for k in range(window)]
        np.testing.assert_array_equal(batch.valid[b], valid)
        for k in range(window):
          if valid[k]:
            row = jax.tree.map(lambda x, e=e: x[e], chosen[k])
            assert_equal(jax.tree.map(lambda x, k=k: x[k], got), row)
        assert batch.sample.generation[b] == t // ROWS + 1
        assert batch.sample.age[b] == (num_rows - 1 - t) * STREAMS
    # 192 draws from at most 24 rows find them all.
    assert seen == want


def test_host_and_device_draw_the_same(both, key):
  device, there = both[0].replay, both[1].replay
  rows = stream(30, both[0].frame_stack, seed=3)
  a, b = device.init(rows[0]), there.init(rows[0])
  for t, row in enumerate(rows):
    a, b = device.add(a, row), there.add(b, row)
    assert bool(device.ready(a)) == there.ready(b)
    if t < 8 or not there.ready(b):
      continue
    step_key = jax.random.fold_in(key, t)
    x, y = device.sample(a, step_key, 0.7), there.sample(b, step_key, 0.7)
    np.testing.assert_allclose(x.sample.weight, y.sample.weight, rtol=1e-5)
    np.testing.assert_allclose(x.sample.scale, y.sample.scale, rtol=1e-5)
    weightless = lambda z: z._replace(
      sample=z.sample._replace(weight=None, scale=None)
    )
    assert_equal(weightless(x), weightless(y))
    priorities = 3 * jax.random.normal(step_key, (BATCH,))
    a = device.update(a, x.sample, priorities)
    b = there.update(b, y.sample, priorities)
    np.testing.assert_array_equal(a.priority, b.priority)
    assert float(a.max_priority) == b.max_priority


def one_stream(num_rows, streams=1):
  """An endless episode."""
  rows = []
  for t in range(num_rows):
    timestep = TimeStep(
      observation={'x': np.full((streams, 2), t, np.float32)},
      reward=np.full(streams, t, np.float32),
      discount=np.ones(streams, np.float32),
      is_first=np.full(streams, t == 0),
      truncated=np.zeros(streams, bool),
    )
    rows.append(Experience(timestep, np.zeros(streams, np.int32), {}))
  return rows


def sample_of(index, generation):
  index = np.array(index, np.int32)
  n = np.zeros(len(index), np.float32)
  return Sample(index, np.array(generation, np.int32), n, n)


@pytest.fixture(scope='module', params=[device_replay, host_replay])
def small(request):
  """Four rows, one stream, alpha 1/2, 4096 single rows at a time."""
  replay = request.param(4, 4096, 1, alpha=0.5)
  return compiled(replay, 1, 1).replay


def test_priorities_and_weights_by_hand(small, key):
  state = fill(small, one_stream(4))
  np.testing.assert_array_equal(state.priority[:, 0], [1, 1, 1, 1])
  # Raw 0, -4, 16; row 3 keeps the 1 it was given.
  state = small.update(
    state, sample_of([0, 1, 2], [1, 1, 1]), np.array([0.0, -4.0, 16.0])
  )
  want = np.array([0, 4, 16, 1 - EPSILON]) + EPSILON
  np.testing.assert_allclose(state.priority[:, 0], want, rtol=1e-6)
  assert float(state.max_priority) == pytest.approx(16 + EPSILON)
  batch = small.sample(state, key, 0.5)
  # Masses 0.001, 2, 4, 1: probabilities over 7.001.
  mass = np.array([1e-3, 2, 4, 1])
  counts = np.bincount(batch.sample.index, minlength=4)
  expected = 4096 * mass / mass.sum()
  deviation = np.sqrt(expected * (1 - mass / mass.sum()))
  assert (np.abs(counts - expected) < 5 * deviation + 1).all()
  index = np.asarray(batch.sample.index)
  # (N P) ** -1/2 over the batch's largest.
  least = mass[index].min()
  np.testing.assert_allclose(
    batch.sample.weight, np.sqrt(least / mass[index]), rtol=1e-5
  )
  np.testing.assert_array_equal(batch.sample.age, 3 - index)
  # A new row takes the largest so far, in the oldest slot.
  state = small.add(state, one_stream(5)[4])
  np.testing.assert_allclose(state.priority[0, 0], 16 + EPSILON, rtol=1e-6)


def test_stale_generations_and_bad_priorities_are_dropped(small):
  state = fill(small, one_stream(6))  # Slots 0 and 1 were written twice.
  state = small.update(
    state,
    sample_of([0, 1, 2, 3], [1, 2, 1, 1]),
    np.array([9.0, 2.0, np.nan, np.inf], np.float32),
  )
  np.testing.assert_allclose(
    state.priority[:, 0], [1, 2 + EPSILON, 1, 1], rtol=1e-6
  )
  assert float(state.max_priority) == pytest.approx(2 + EPSILON)


def test_a_batch_of_nothing_but_bad_priorities_changes_nothing(small):
  state = fill(small, one_stream(4))
  before = np.array(state.priority)
  state = small.update(
    state, sample_of([0, 1], [1, 1]), np.full(2, np.nan, np.float32)
  )
  np.testing.assert_array_equal(state.priority, before)
  assert float(state.max_priority) == 1


def test_of_duplicates_the_largest_holds(small):
  state = fill(small, one_stream(4))
  for order in ([0.5, 0.25, 0.125], [0.125, 0.5, 0.25]):
    state = small.update(
      state, sample_of([2, 2, 2], [1, 1, 1]), np.array(order, np.float32)
    )
    assert float(state.priority[2, 0]) == pytest.approx(0.5 + EPSILON)
  # Stale ones among them do not count.
  state = small.update(
    state, sample_of([2, 2], [1, 0]), np.array([0.25, 9.0], np.float32)
  )
  assert float(state.priority[2, 0]) == pytest.approx(0.25 + EPSILON)


def test_alpha_zero_is_uniform_over_what_may_start(key):
  rows = stream(20, seed=1)
  want = eligible(rows, 2, 1)
  for factory in (device_replay, host_replay):
    replay = compiled(factory(24, 4096, 2, alpha=0), 2, 1).replay
    state = fill(replay, rows)
    batch = replay.sample(state, key, 1.0)
    starts = drawn_starts(batch, 20)
    assert set(starts) == want
    share = np.bincount([2 * t + e for t, e in starts])
    share = share[share > 0] / 4096
    p = 1 / len(want)
    assert np.abs(share - p).max() < 5 * np.sqrt(p * (1 - p) / 4096)
    np.testing.assert_array_equal(batch.sample.weight, 1)


def test_an_episode_that_is_broken_off_counts_as_truncated(small):
  rows = one_stream(3)
  again = rows[2].timestep._replace(is_first=np.array([True]))
  rows[2] = rows[2]._replace(timestep=again)
  state = fill(small, rows)
  np.testing.assert_array_equal(
    state.rows.timestep.truncated[:3, 0], [False, True, False]
  )


def test_the_device_replay_scans_and_vmaps(key):
  rows = jax.tree.map(lambda *x: jnp.stack(x), *stream(20, 2))

  def run(alpha, key):
    replay = device_replay(STREAMS * ROWS, 4, 3, 2, alpha)
    state = replay.init(jax.tree.map(lambda x: x[0], rows))

    def body(state, row_t):
      row, t = row_t
      state = replay.add(state, row)
      batch = replay.sample(state, jax.random.fold_in(key, t), 0.5)
      priorities = batch.sample.index.astype(jnp.float32)
      new = replay.update(state, batch.sample, priorities)
      ready = replay.ready(state)
      return jax.tree.map(
        lambda x, y: jnp.where(ready, x, y), new, state
      ), batch

    return jax.lax.scan(body, state, (rows, jnp.arange(20)))

  alphas, keys = jnp.array([0.2, 0.9]), jax.random.split(key, 2)
  state, batches = jax.jit(jax.vmap(run))(alphas, keys)
  for i in range(2):
    replay = host_replay(STREAMS * ROWS, 4, 3, 2, float(alphas[i]))
    there = replay.init(stream(1, 2)[0])
    for t, row in enumerate(stream(20, 2)):
      there = replay.add(there, row)
      if not replay.ready(there):
        continue
      batch = replay.sample(there, jax.random.fold_in(keys[i], t), 0.5)
      got = jax.tree.map(lambda x, i=i, t=t: x[i, t], batches)
      np.testing.assert_array_equal(batch.sample.index, got.sample.index)
      np.testing.assert_array_equal(
        batch.experience.timestep.observation,
        got.experience.timestep.observation,
      )
      priorities = np.asarray(batch.sample.index, np.float32)
      there = replay.update(there, batch.sample, priorities)
    np.testing.assert_array_equal(state.priority[i], there.priority)


def test_to_window_by_hand():
  frames = np.arange(6, dtype=np.uint8).reshape(1, 6, 1)
  first = np.array([[False, False, True, False, False, True]])
  timestep = TimeStep(
    frames,
    np.arange(6, dtype=np.float32)[None],
    np.array([[1, 0, 1, 1, 0, 1]], np.float32),
    first,
    np.zeros((1, 6), bool),
  )
  rows = Experience(timestep, np.zeros((1, 6), np.int32), {})
  got, valid = to_window(rows, 3)
  assert got.timestep.observation[0].tolist() == [
    [2, 2, 2],
    [2, 2, 3],
    [2, 3, 4],
    [5, 5, 5],
  ]
  assert got.timestep.reward[0].tolist() == [2, 3, 4, 5]
  assert valid[0].tolist() == [True, True, True, False]


@pytest.mark.parametrize('game', ['Pong-v5', 'Breakout-v5'])
def test_stacks_are_the_simulators_own(game, key):
  # Short games by the limit, lives in Breakout.
  env = make_envpool(game, 2, img_height=16, img_width=16, max_episode_steps=60)
  simulator, rng = env.start(0), np.random.default_rng(0)
  replay = host_replay(2 * 150, 256, 5, env.spec.frame_stack)
  timestep, rows, state = simulator.reset(), [], None
  for _ in range(200):
    action = rng.integers(env.spec.action.num_actions, size=2)
    row = Experience(timestep, action.astype(np.int32), {})
    rows.append(row)
    state = replay.add(replay.init(row) if state is None else state, row)
    timestep, _ = simulator.step(action)
  simulator.close()
  ends = sum(int(r.timestep.is_last().sum()) for r in rows)
  assert ends >= 6
  batch = replay.sample(state, key, 0.0)
  valid = np.asarray(batch.valid)
  assert not valid.all()
  got = np.asarray(batch.experience.timestep.observation)
  for b, (t, e) in enumerate(drawn_starts(batch, 200, 150)):
    for k in np.flatnonzero(valid[b]):
      np.testing.assert_array_equal(
        got[b, k], rows[t + k].timestep.observation[e]
      )
