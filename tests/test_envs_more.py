"""Acrobot, mountain car, Breakout and Connect Four against other simulators.

Gymnasium's and envpool's originals, or a game written again in plain Python.
"""

import dataclasses
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_close

from experiments.envs import breakout
from experiments.envs.acrobot import AcrobotState, make_acrobot
from experiments.envs.make import make
from experiments.envs.mountain_car import MountainCarState, make_mountain_car
from experiments.runtime.sources import select

NAMES = ('acrobot', 'mountain_car', 'breakout', 'connect_four')


class Compiled(NamedTuple):
  """An environment and its compiled functions, over 32 copies of it.

  `reset` takes keys `[32]`; `step` states, actions and keys `[32]`. `traces`
  has one item for each time that `step` was traced.
  """

  env: Any
  reset: Any
  step: Any
  traces: list


COPIES = 32


def compiled(env):
  traces = []

  def step(state, action, key):
    traces.append(None)
    return env.step(state, action, key)

  vmapped = jax.jit(jax.vmap(step))
  return Compiled(env, jax.jit(jax.vmap(env.reset)), vmapped, traces)


@pytest.fixture(scope='module')
def envs():
  """Every environment with its usual options, by name."""
  return {
    name: compiled(make(f'jax:{name}', 1, training=True)) for name in NAMES
  }


def keys(seed):
  return jax.random.split(jax.random.key(seed), COPIES)


def row(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


# --- What all of them must do -----------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_time_steps_are_what_the_spec_says(envs, name):
  env, reset, step, _ = envs[name]
  state, first = reset(keys(0))
  action = jnp.zeros(COPIES, jnp.int32)
  state, second = step(state, action, keys(1))
  for timestep, is_first in ((first, True), (second, False)):
    observation = timestep.observation
    assert observation.shape == (COPIES, *env.spec.observation.shape)
    assert observation.dtype == env.spec.observation.dtype == np.float32
    assert timestep.reward.dtype == timestep.discount.dtype == np.float32
    assert timestep.truncated.dtype == timestep.is_first.dtype == bool
    np.testing.assert_array_equal(timestep.is_first, is_first)
    if env.spec.masks_actions:
      shape = (COPIES, env.spec.action.num_actions)
      assert timestep.invalid_actions.shape == shape
      assert timestep.invalid_actions.dtype == bool
    else:
      assert timestep.invalid_actions is None
  np.testing.assert_array_equal(first.reward, 0)
  assert not first.is_last().any()


@pytest.mark.parametrize('name', NAMES)
def test_reset_and_step_return_one_type(envs, name, key):
  # Weak types too: they would trace a loop twice.
  env = envs[name].env
  fresh = jax.eval_shape(env.reset, key)
  state, _ = fresh
  after = jax.eval_shape(env.step, state, jnp.int32(0), key)
  kind = lambda x: (x.shape, x.dtype, x.weak_type)
  assert jax.tree.map(kind, fresh) == jax.tree.map(kind, after)


@pytest.mark.parametrize('name', NAMES)
def test_a_batch_moves_as_each_alone_and_is_traced_once(envs, name):
  env, reset, step, traces = envs[name]
  state, timestep = reset(keys(2))
  rng = np.random.default_rng(0)
  for t in range(4):
    action = rng.integers(env.spec.action.num_actions, size=COPIES)
    action = action.astype(np.int32)
    before, (state, timestep) = state, step(state, action, keys(t))
    if t == 0:
      traces.clear()
  assert not traces
  for i in (0, COPIES - 1):
    # Not compiled.
    alone = env.step(row(before, i), action[i], keys(t)[i])
    assert_close(alone, row((state, timestep), i), 1e-05, 1e-06)


@pytest.mark.parametrize('name', NAMES)
def test_keys_decide_the_start(envs, name):
  reset = envs[name].reset
  one, again, other = (reset(keys(seed))[1].observation for seed in (3, 3, 4))
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
  assert (np.asarray(one) != np.asarray(one)[:1]).any()


@pytest.mark.parametrize('name', NAMES[:3])
def test_episodes_are_cut_at_their_limit(name, key):
  env = make(f'jax:{name}', 1, training=True, options={'max_steps': 2})
  state, _ = env.reset(key)
  step = jax.jit(env.step)
  state, timestep = step(state, jnp.int32(0), key)
  assert not timestep.is_last()
  _, timestep = step(state, jnp.int32(0), key)
  assert timestep.truncated
  assert timestep.discount == 1


@pytest.mark.parametrize(
  'name, options, message',
  [
    ('acrobot', {'max_steps': 0}, 'max_steps=0'),
    ('mountain_car', {'max_steps': 0}, 'max_steps=0'),
    ('breakout', {'max_steps': 0}, 'max_steps=0'),
    ('breakout', {'sticky': 1.0}, r'sticky=1\.0'),
    ('breakout', {'sticky': -0.1}, r'sticky=-0\.1'),
    ('connect_four', {'opponent': 'perfect'}, "opponent='perfect'"),
  ],
)
def test_bad_options_are_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    make(f'jax:{name}', 1, training=True, options=options)


# --- Classic control, against Gymnasium ---------------------------------------


def batches(states):
  """`[N, ...]` arrays in batches of `COPIES`."""
  return states.reshape(-1, COPIES, *states.shape[1:])


def test_acrobot_moves_like_gymnasiums(envs):
  theirs = gymnasium.make('Acrobot-v1').unwrapped
  rng = np.random.default_rng(0)
  high = np.array([np.pi, np.pi, 4 * np.pi, 9 * np.pi])
  physics = rng.uniform(-1, 1, (512, 4)) * high
  physics[::2, 2:] *= 0.2  # Slow ones, which no limit holds back.
  physics = physics.astype(np.float32)
  action = rng.integers(3, size=512).astype(np.int32)
  ends, limits = 0, 0
  for state, a in zip(batches(physics), batches(action)):
    ours = AcrobotState(jnp.asarray(state), jnp.zeros(COPIES, jnp.int32))
    _, got = envs['acrobot'].step(ours, a, keys(0))
    for i in range(COPIES):
      theirs.reset(seed=0)
      theirs.state = state[i].astype(np.float64)
      want, reward, ended, _, _ = theirs.step(int(a[i]))
      # float32 over four evaluations, with accelerations up to 1,000 rad/s^2.
      np.testing.assert_allclose(got.observation[i], want, rtol=1e-4, atol=1e-4)
      height = -np.cos(theirs.state[0]) - np.cos(theirs.state[:2].sum())
      assert abs(height - 1) > 1e-4, 'too near the line to tell'
      assert got.discount[i] == float(not ended)
      assert got.reward[i] == reward
      ends += ended
      limits += np.abs(theirs.state[3]) == 9 * np.pi
  assert 20 < ends < 490
  assert limits > 10


def test_mountain_car_moves_like_gymnasiums(envs):
  theirs = gymnasium.make('MountainCar-v0').unwrapped
  rng = np.random.default_rng(0)
  physics = rng.uniform(-1, 1, (512, 2)) * [0.9, 0.07] - [0.3, 0]
  physics[::4, 0] = rng.uniform(0.4, 0.55, 128)  # Before the flag,
  physics[1::4, 0] = rng.uniform(-1.2, -1.15, 128)  # at the wall.
  physics = physics.astype(np.float32)
  action = rng.integers(3, size=512).astype(np.int32)
  ends, stops = 0, 0
  for state, a in zip(batches(physics), batches(action)):
    zeros = jnp.zeros(COPIES, jnp.int32)
    ours = MountainCarState(*jnp.asarray(state).T, zeros)
    _, got = envs['mountain_car'].step(ours, a, keys(0))
    for i in range(COPIES):
      theirs.reset(seed=0)
      theirs.state = tuple(state[i].astype(np.float64))
      want, reward, ended, _, _ = theirs.step(int(a[i]))
      np.testing.assert_allclose(got.observation[i], want, rtol=1e-6, atol=1e-7)
      assert got.discount[i] == float(not ended)
      assert got.reward[i] == reward == -1
      ends += ended
      stops += theirs.state == (-1.2, 0)
  assert 20 < ends < 490
  assert stops > 10


def test_the_flag_is_not_reached_backwards(envs):
  # Rolling back over it does not count: the velocity must not be negative.
  state = MountainCarState(
    jnp.full(COPIES, 0.56),
    jnp.linspace(-0.05, 0.03, COPIES),
    jnp.zeros(COPIES, jnp.int32),
  )
  state, got = envs['mountain_car'].step(state, np.full(COPIES, 1), keys(0))
  there = (state.position >= 0.5) & (state.velocity >= 0)
  np.testing.assert_array_equal(got.discount == 0, there)
  assert ((state.position >= 0.5) & (state.velocity < 0)).any()
  assert there.any()


@pytest.mark.parametrize(
  'name, make_env, low, high',
  [
    ('Acrobot-v1', make_acrobot, [-0.1] * 4, [0.1] * 4),
    ('MountainCar-v0', make_mountain_car, [-0.6, 0], [-0.4, 0]),
  ],
)
def test_starts_and_limits_are_gymnasiums(name, make_env, low, high, key):
  limit = gymnasium.spec(name).max_episode_steps
  env = make_env()
  state, _ = jax.vmap(env.reset)(jax.random.split(key, 256))
  *physics, _ = (np.asarray(x).reshape(256, -1) for x in state)
  physics = np.concatenate(physics, 1)
  low, high = np.float32(low), np.float32(high)
  assert ((physics >= low) & (physics <= high)).all()
  near = 0.05 * (high - low)
  assert (physics.min(0) <= low + near).all()
  assert (physics.max(0) >= high - near).all()
  start = row(state, 0)
  step = jax.jit(env.step)
  for steps, truncated in ((limit - 2, False), (limit - 1, True)):
    _, got = step(start._replace(steps=jnp.int32(steps)), jnp.int32(1), key)
    assert got.truncated == truncated
    assert got.discount == 1


def test_an_end_at_the_limit_is_no_cut(key):
  state = MountainCarState(jnp.float32(0.49), jnp.float32(0.05), jnp.int32(199))
  _, got = make_mountain_car().step(state, jnp.int32(2), key)
  assert (got.discount, got.truncated) == (0, False)
  # Straight up, at rest.
  state = AcrobotState(jnp.float32([np.pi, 0, 0, 0]), jnp.int32(499))
  _, got = jax.jit(make_acrobot().step)(state, jnp.int32(1), key)
  assert (got.discount, got.truncated, got.reward) == (0, False, 0)


# --- Breakout, against the same game in plain Python --------------------------


@dataclasses.dataclass
class PlainBreakout:
  """MinAtar's rules, one case after the other, on sets of cells `(x, y)`."""

  x: int
  dx: int
  y: int = 3
  dy: int = 1
  paddle: int = 4
  last: int = 0
  inside: bool = False
  lost: bool = False

  def __post_init__(self):
    self.trail = (self.x, self.y)
    self.bricks = self.wall()
    self.events = set()

  def wall(self):
    return {(x, y) for x in range(10) for y in (1, 2, 3)}

  def step(self, action, repeats):
    if repeats:
      action = self.last
    self.last = action
    if action == 1 and self.paddle > 0:
      self.paddle -= 1
    if action == 2 and self.paddle < 9:
      self.paddle += 1
    self.trail = old_x, old_y = self.x, self.y
    x, y = old_x + self.dx, old_y + self.dy
    if x in (-1, 10):
      x = old_x
      self.dx = -self.dx
      self.events.add('side')
    if y == -1:
      self.events.add('corner' if 'side' in self.events else 'ceiling')
      y, self.dy, self.inside = 0, -self.dy, False
    elif (x, y) in self.bricks:
      if self.inside:
        self.events.add('passed through')
      else:
        self.bricks.remove((x, y))
        y, self.dy, self.inside = old_y, -self.dy, True
        self.x, self.y = x, y
        return 1
    else:
      self.inside = False
      if y == 9:
        if not self.bricks:
          self.bricks = self.wall()
          self.events.add('new wall')
        if self.paddle == old_x:
          y, self.dy = old_y, -self.dy
          self.events.add('paddle')
        elif self.paddle == x:
          y, self.dy, self.dx = old_y, -self.dy, -self.dx
          self.events.add('edge')
        else:
          self.lost = True
          self.events.add('lost')
    self.x, self.y = x, y
    return 0

  def observation(self):
    cells = np.zeros((10, 10, 4), np.float32)
    cells[9, self.paddle, 0] = 1
    cells[self.y, self.x, 1] = 1
    cells[self.trail[1], self.trail[0], 2] = 1
    for x, y in self.bricks:
      cells[y, x, 3] = 1
    return cells


def test_breakout_plays_like_plain_python(envs):
  _, reset, step, _ = envs['breakout']
  rng = np.random.default_rng(0)
  state, got = reset(keys(5))
  xs = np.asarray(got.observation[:, 3, :, 1].argmax(-1))
  assert set(xs.tolist()) == {0, 9}
  new_game = lambda x: PlainBreakout(int(x), 1 if x == 0 else -1)
  plain = [new_game(x) for x in xs]
  # The first games have three bricks, so that walls are cleared.
  few = {(1, 3), (4, 2), (7, 1)}
  for p in plain:
    p.bricks = set(few)
  cells = np.zeros((COPIES, 10, 10), bool)
  for x, y in few:
    cells[:, y, x] = True
  state = state._replace(bricks=jnp.asarray(cells))
  seen, broken, repeated = set(), 0, 0
  sticks = jax.jit(jax.vmap(lambda key: jax.random.bernoulli(key, 0.1)))
  for t in range(600):
    # Mostly below the ball, where it is or where it goes, so that games last.
    offset = rng.integers(2, size=COPIES)
    target = [p.x + o * p.dx for p, o in zip(plain, offset)]
    aim = 1.5 + 0.5 * np.sign(np.subtract(target, [p.paddle for p in plain]))
    action = np.where(aim == 1.5, 0, aim).astype(np.int32)
    random = rng.random(COPIES) < 0.05
    action = np.where(random, rng.integers(3, size=COPIES), action)
    action = action.astype(np.int32)
    step_keys = keys(100 + t)
    repeats = np.asarray(sticks(step_keys))
    state, got = step(state, action, step_keys)
    for p in plain:
      p.events = set()
    reward = [p.step(a, r) for p, a, r in zip(plain, action, repeats)]
    want = np.stack([p.observation() for p in plain])
    np.testing.assert_array_equal(got.observation, want)
    np.testing.assert_array_equal(got.reward, reward)
    np.testing.assert_array_equal(got.discount == 0, [p.lost for p in plain])
    seen = seen.union(*(p.events for p in plain))
    broken += sum(reward)
    repeated += repeats.sum()
    # Those that lost begin anew.
    over = np.array([p.lost for p in plain])
    fresh, first = reset(keys(1000 + t))
    xs = np.asarray(first.observation[:, 3, :, 1].argmax(-1))
    plain = [new_game(x) if p.lost else p for p, x in zip(plain, xs)]
    state = select(over, fresh, state)
  seen -= {'side', 'ceiling', 'corner', 'paddle', 'edge', 'lost'}
  assert seen == {'passed through', 'new wall'}
  assert broken > 500
  assert repeated > 1000


@pytest.fixture(scope='module')
def bounce():
  """`bounce(row, column, down, right, paddle=, bricks=, action=)`: one step of
  the game without sticky actions, as `(state, timestep)`."""
  env = breakout.make_breakout(sticky=0)
  step = jax.jit(env.step)
  start, _ = jax.jit(env.reset)(jax.random.key(0))

  def one(y, x, down, right, *, paddle=4, bricks=((1, 0),), action=0):
    cells = np.zeros((10, 10), bool)
    for cell in bricks:
      cells[cell] = True
    state = start._replace(
      ball=jnp.int32([y, x]),
      velocity=jnp.int32([down, right]),
      paddle=jnp.int32(paddle),
      bricks=jnp.asarray(cells),
    )
    return step(state, jnp.int32(action), jax.random.key(1))

  return one


@pytest.mark.parametrize(
  'ball, paddle, action, want',
  [
    # Open air; a side wall is slid along; the ceiling; the corner of both.
    ((5, 5, -1, 1), 4, 0, (4, 6, -1, 1)),
    ((5, 9, -1, 1), 4, 0, (4, 9, -1, -1)),
    ((5, 0, 1, -1), 4, 0, (6, 0, 1, 1)),
    ((0, 5, -1, 1), 4, 0, (0, 6, 1, 1)),
    ((0, 9, -1, 1), 4, 0, (0, 9, 1, -1)),
    ((0, 0, -1, -1), 4, 0, (0, 0, 1, 1)),
    # The paddle below the ball; where it is going; moved there just now.
    ((8, 4, 1, 1), 4, 0, (8, 5, -1, 1)),
    ((8, 3, 1, 1), 4, 0, (8, 4, -1, -1)),
    ((8, 4, 1, 1), 3, 2, (8, 5, -1, 1)),
    ((8, 3, 1, 1), 5, 1, (8, 4, -1, -1)),
    # In a corner of the floor the wall turns it first.
    ((8, 9, 1, 1), 9, 0, (8, 9, -1, -1)),
    ((8, 0, 1, -1), 0, 1, (8, 0, -1, 1)),
  ],
)
def test_breakout_bounces(bounce, ball, paddle, action, want):
  state, got = bounce(*ball, paddle=paddle, action=action)
  assert (*state.ball.tolist(), *state.velocity.tolist()) == want
  assert (got.reward, got.discount) == (0, 1)
  np.testing.assert_array_equal(
    np.argwhere(got.observation[..., 2]), [ball[:2]]
  )


def test_breakout_loses_beside_the_paddle(bounce):
  for paddle, action in ((2, 0), (5, 0), (4, 2), (3, 1)):
    # From column 3 to 4: neither is the paddle's, after its move.
    state, got = bounce(8, 3, 1, 1, paddle=paddle, action=action)
    assert state.ball.tolist() == [9, 4]
    assert (got.reward, got.discount, got.truncated) == (0, 0, False)


def test_breakout_breaks_one_brick_and_a_new_wall_comes_at_the_bottom(bounce):
  state, got = bounce(4, 4, -1, 1, bricks=((3, 5),))
  assert got.reward == 1
  assert not state.bricks.any()
  assert state.ball.tolist() == [4, 5]
  assert state.velocity.tolist() == [1, 1]
  state, got = bounce(7, 4, 1, 1, bricks=())
  assert not state.bricks.any()
  for paddle, discount in ((4, 1), (0, 0)):
    state, got = bounce(8, 4, 1, 1, paddle=paddle, bricks=())
    np.testing.assert_array_equal(state.bricks.sum(1), [0] + [10] * 3 + [0] * 6)
    assert (got.reward, got.discount) == (0, discount)


# --- Connect Four -------------------------------------------------------------
