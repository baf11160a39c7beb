"""The pure-JAX environments against bsuite's and Gymnasium's originals."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.envs.cartpole import CartPoleState, make_cartpole
from experiments.envs.catch import CatchState, make_catch
from experiments.envs.envpool import make_envpool


@pytest.fixture(scope='module')
def cartpole_step():
  return jax.jit(make_cartpole(max_steps=500).step)


def test_catch_plays_like_bsuites(key):
  env, num_envs = make_catch(), 8
  theirs = make_envpool('Catch-v0', num_envs)
  assert theirs.spec._replace(name='Catch') == env.spec
  simulator = theirs.start(3)
  step = jax.jit(jax.vmap(env.step, in_axes=(0, 0, None)))
  rng = np.random.default_rng(0)
  want = simulator.reset()
  rewards = set()
  for _ in range(3):
    assert want.is_first.all()
    column = want.observation[:, 0, :, 0].argmax(-1).astype(np.int32)
    zero = np.zeros(num_envs, np.int32)
    state = CatchState(zero, column, zero + 2)
    for _ in range(9):
      action = rng.integers(3, size=num_envs).astype(np.int32)
      want, _ = simulator.step(action)
      state, got = step(state, action, key)
      np.testing.assert_array_equal(got.observation, want.observation)
      np.testing.assert_array_equal(got.reward, want.reward)
      np.testing.assert_array_equal(got.discount, want.discount)
      np.testing.assert_array_equal(got.is_first, want.is_first)
      np.testing.assert_array_equal(got.truncated, want.truncated)
    assert want.is_last().all()
    rewards |= set(want.reward.tolist())
    want, _ = simulator.step(zero)  # The dummy: a first step.
  assert rewards == {-1.0, 1.0}
  simulator.close()


def test_catch_starts_in_every_column(key):
  env = make_catch(rows=4, columns=3)
  _, timestep = jax.vmap(env.reset)(jax.random.split(key, 64))
  np.testing.assert_array_equal(timestep.observation[0, 3, :, 0], [0, 1, 0])
  balls = np.asarray(timestep.observation[:, 0, :, 0])
  np.testing.assert_array_equal(balls.sum(1), 1)
  assert (balls.sum(0) > 0).all()
  assert timestep.is_first.all()
  assert not timestep.is_last().any()


def test_cartpole_moves_like_gymnasiums(cartpole_step, key):
  theirs = gymnasium.make('CartPole-v1').unwrapped
  rng = np.random.default_rng(0)
  falls = 0
  for _ in range(200):
    physics = rng.uniform(-1, 1, 4) * [2.5, 2.0, 0.3, 2.0]
    action = int(rng.integers(2))
    theirs.reset(seed=0)
    theirs.state = tuple(physics)
    want, reward, fallen, _, _ = theirs.step(action)
    state = CartPoleState(jnp.float32(physics), jnp.int32(0))
    _, got = cartpole_step(state, action, key)
    np.testing.assert_allclose(got.observation, want, rtol=1e-5, atol=1e-6)
    assert got.reward == reward == 1.0
    assert got.discount == float(not fallen)
    assert not got.truncated
    falls += fallen
  assert 10 < falls < 190


def test_cartpole_is_cut_after_its_steps_unless_it_falls(cartpole_step, key):
  upright, fallen = jnp.zeros(4), jnp.array([0.0, 0.0, 0.3, 0.0])
  for physics, steps, discount, truncated in (
    (upright, 498, 1, False),
    (upright, 499, 1, True),
    (fallen, 499, 0, False),
  ):
    state = CartPoleState(physics, jnp.int32(steps))
    state, got = cartpole_step(state, 0, key)
    assert (got.discount, got.truncated) == (discount, truncated)
    assert state.steps == steps + 1


def test_cartpole_starts_near_upright(key):
  env = make_cartpole()
  _, timestep = jax.vmap(env.reset)(jax.random.split(key, 256))
  assert timestep.observation.dtype == jnp.float32
  assert 0.045 < float(jnp.abs(timestep.observation).max()) <= 0.05
  np.testing.assert_array_equal(timestep.reward, 0)
  assert timestep.is_first.all()


def test_bad_sizes_are_refused():
  with pytest.raises(ValueError, match='rows=1'):
    make_catch(rows=1)
  with pytest.raises(ValueError, match='max_steps=0'):
    make_cartpole(max_steps=0)
