"""ATAC: its limits, its parts, its phases, small tasks with known answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from offline_cases import SPEC, B, make_batch_with_starts, make_timestep, train
from test_agents_atac import LINE, SMALL, build
from trees import assert_close, assert_equal

from agents import atac
from agents.core.types import Transition

# --- Limits and parts, on the networks that are used, in float32.


@pytest.fixture(scope='module')
def game():
  """`update(floats, state, batch, key)` of the game, a state and a batch."""

  @jax.jit
  def update(floats, state, batch, key):
    config = dataclasses.replace(SMALL, **floats)
    return build(config).update(state, batch, key)

  floats = {
    'beta': 1.0,
    'residual_weight': 0.5,
    'radius': 100.0,
    'target_entropy': -2.0,
    'gamma': 0.9,
  }
  state = jax.jit(build(SMALL).init)(jax.random.key(0))
  state = state._replace(
    target_critic=jax.tree.map(lambda x: 1.1 * x, state.target_critic)
  )
  batch = make_batch_with_starts(0)

  def run(batch=batch, state=state, key=7, **changes):
    values = {k: jnp.float32(v) for k, v in (floats | changes).items()}
    return update(values, state, batch, jax.random.key(key))

  return run, state, batch


@pytest.fixture(scope='module')
def warm_start():
  """The compiled update of the warm start."""
  return jax.jit(build(SMALL, is_game=False).update)


def test_without_beta_critics_do_not_hear_of_rewards(game):
  run, _, batch = game
  other = batch._replace(r_t=batch.r_t + 50.0, discount_t=1 - batch.discount_t)
  critic = lambda state: state.params.critic
  assert_equal(critic(run(beta=0.0)[0]), critic(run(other, beta=0.0)[0]))
  info = run(beta=0.0)[1]
  np.testing.assert_allclose(
    info.metrics['loss_critic'], 2 * info.metrics['pessimism'], rtol=1e-5
  )
  changed = jax.tree.leaves(critic(run(other, beta=0.3)[0]))
  pairs = zip(changed, jax.tree.leaves(critic(run(beta=0.3)[0])))
  assert any((x != y).any() for x, y in pairs)


def test_a_large_beta_is_bellmans_equation_alone(game, warm_start):
  run, state, batch = game
  alone, _ = warm_start(state, batch, jax.random.key(7))
  got, info = run(beta=1e12)
  assert_close(got.params.critic, alone.params.critic, 1e-6)
  np.testing.assert_allclose(
    info.metrics['loss_critic'], 2 * info.metrics['bellman'], rtol=1e-5
  )
  far = run(beta=1.0)[0].params.critic
  assert (
    max(
      np.abs(x - y).max()
      for x, y in zip(
        jax.tree.leaves(far), jax.tree.leaves(alone.params.critic)
      )
    )
    > 1e-3
  )


def test_the_scale_at_beta_1_has_no_jump(game):
  run, _, _ = game
  below, above = (run(beta=b)[1].metrics['loss_critic'] for b in (1, 1 + 1e-6))
  np.testing.assert_allclose(below, above, rtol=1e-5)
  x = atac.normalised_sum(jnp.float32(3), jnp.float32(5), jnp.float32(4))
  assert x == 3 / 4 + 5
  assert atac.normalised_sum(jnp.float32(3), jnp.float32(5), 0.5) == 3 + 5 / 2


def test_residual_weight_1_is_temporal_difference(game):
  run, state, batch = game

  def squared(q_tm1, r_t, discount_t, target_q_t, q_t, weight):
    del q_t, weight
    return jnp.square(r_t + discount_t * target_q_t - q_tm1)

  config = dataclasses.replace(SMALL, beta=1.0)
  plain = jax.jit(build(config, bellman=squared).update)
  want, _ = plain(state, batch, jax.random.key(7))
  got, info = run(residual_weight=1.0)
  assert_close(got.params, want.params, 1e-6)
  np.testing.assert_allclose(
    info.metrics['bellman'], info.metrics['td_error'], rtol=1e-6
  )
  metrics = run(residual_weight=0.0)[1].metrics
  np.testing.assert_allclose(metrics['bellman'], metrics['residual'], rtol=1e-6)
  assert abs(metrics['residual'] - metrics['td_error']) > 0.01


def test_the_projection_binds_at_kernels_alone(game):
  run, state, _ = game
  free, info = run(radius=1e6)
  bound, bound_info = run(radius=0.5)
  assert info.metrics['kernel_norm'] == bound_info.metrics['kernel_norm'] > 0.5
  free, bound = (
    dict(jax.tree_util.tree_leaves_with_path(s.params.critic))
    for s in (free, bound)
  )
  kernels = 0
  for path, x in free.items():
    y = bound[path]
    if path[-1].key != 'kernel':
      np.testing.assert_array_equal(x, y)
      continue
    kernels += 1
    for one, other in zip(np.asarray(x), np.asarray(y)):
      norm = np.linalg.norm(one)
      assert norm > 0.5
      np.testing.assert_allclose(other, one * 0.5 / norm, rtol=1e-5)
  assert kernels == 2
  # The policy is not projected.
  policy = run(radius=1e-3)[0].params.policy
  moved = jax.tree.map(
    lambda a, b: np.abs(np.asarray(a - b)).max(), policy, state.params.policy
  )
  assert max(jax.tree.leaves(moved)) < 1.01 * SMALL.slow_rate


@pytest.mark.parametrize(('floor', 'sign'), [(5.0, 1), (-9.0, -1)])
def test_the_temperature_defends_the_floor(game, floor, sign):
  run, _, _ = game
  state, info = run(target_entropy=floor)
  assert (floor - info.metrics['entropy']) * sign > 0
  # Adam's first step is its rate, and the actor's loss has the new one.
  want = np.exp(sign * SMALL.fast_rate)
  np.testing.assert_allclose(info.metrics['temperature'], want, rtol=1e-5)
  np.testing.assert_allclose(
    state.params.log_temperature, sign * SMALL.fast_rate, rtol=1e-4
  )


def test_terminals_cut_the_bootstrap(game):
  run, _, batch = game
  ended = batch._replace(discount_t=jnp.zeros(B))
  other = ended._replace(o_t=jax.tree.map(lambda x: 9 * x + 5, ended.o_t))
  assert_equal(run(ended)[0], run(other)[0])
  assert_equal(run(ended)[0].params, run(batch, gamma=0.0)[0].params)
  np.testing.assert_allclose(
    run(ended)[1].metrics['value_target'], batch.r_t.mean(), rtol=1e-5
  )


def test_transfer_keeps_critics_and_targets(warm_start, game):
  _, state, batch = game
  for i in range(3):
    state, _ = warm_start(state, batch, jax.random.key(i))
  config = dataclasses.replace(SMALL, init_temperature=2.0)
  networks = atac.make_networks(config, SPEC)
  phases = atac.make_phases(config, networks, atac.make_losses(), SPEC)
  assert [p.name for p in phases] == ['warm_start', 'game']
  assert [p.updates for p in phases] == [config.warm_start_updates, None]
  assert phases[0].transfer is None
  new = jax.jit(phases[1].transfer)(state)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  fresh = jax.jit(phases[1].agent.init)(jax.random.key(0))
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(new) == shapes(state) == shapes(fresh)
  assert_equal(new.params.policy, state.params.policy)
  assert_equal(new.params.critic, state.params.critic)
  assert_equal(new.target_critic, state.target_critic)
  assert_equal(new.opt_state.critic, state.opt_state.critic)
  assert_equal(new.opt_state.policy, fresh.opt_state.policy)
  assert_equal(new.opt_state.log_temperature, fresh.opt_state.log_temperature)
  np.testing.assert_allclose(new.params.log_temperature, np.log(2), rtol=1e-6)
  # None of this is so trivially.
  differs = lambda a, b: any(
    (x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )
  assert differs(state.opt_state.policy, fresh.opt_state.policy)
  assert differs(state.target_critic, state.params.critic)
  assert state.params.log_temperature != 0


def test_what_is_reduced_to_nothing_moves_nothing(game):
  _, state, batch = game
  # A step whose gradient is not reduced would move.
  networks = atac.make_networks(SMALL, SPEC)
  zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
  agent = atac.make(SMALL, networks, atac.make_losses(), SPEC, zero)
  new, info = jax.jit(agent.update)(state, batch, jax.random.key(0))
  assert_equal(new.params, state.params)
  assert not any(info.metrics.values())


# --- Sweeps.


def test_vmap_over_beta_and_seeds_equals_a_loop(key):
  # Without Bellman's equation gradients at units that are active everywhere
  # cancel, and Adam makes steps of their rounding errors: none is such here.
  batch = make_batch_with_starts(0)

  def run(beta, rate, key, batch):
    config = dataclasses.replace(SMALL, beta=beta, slow_rate=rate)
    agent = build(config)

    def step(state, i):
      state, info = agent.update(state, batch, jax.random.fold_in(key, i))
      return state, info.metrics

    return jax.lax.scan(step, agent.init(key), jnp.arange(3))

  betas = jnp.float32([0, 1 / 256, 1, 64])
  rates = jnp.float32([1e-3, 1e-2, 1e-2, 1e-3])
  keys = jax.random.split(key, 4)
  together = jax.jit(jax.vmap(run, (0, 0, 0, None)))(betas, rates, keys, batch)
  one = jax.jit(run)
  alone = [one(*row, batch) for row in zip(betas, rates, keys)]
  assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *alone), 1e-4)


# --- Small tasks whose answers are known.


def train_on(agent, state, batch, updates):
  state, metrics = train(agent, state, lambda key: batch, updates)
  return state, jax.tree.map(lambda x: x[-100:].mean(), metrics)


def line(actions, rewards, discount):
  size = len(actions)
  o = jnp.ones((size, 1))
  column = lambda x: jnp.broadcast_to(jnp.float32(x), size)
  return Transition(
    o, jnp.float32(actions)[:, None], column(rewards), column(discount), o
  )


TASK = dataclasses.replace(
  SMALL, fast_rate=1e-2, slow_rate=1e-3, target_rate=0.05
)


def test_a_time_limit_is_no_end_and_an_end_is():
  # Reward 1 for ever: 1 / (1 - 0.9), but 1 where every step is the last.
  agent = build(dataclasses.replace(TASK, gamma=0.9), LINE, is_game=False)
  state = jax.jit(agent.init)(jax.random.key(0))
  actions = np.linspace(-0.9, 0.9, 16)
  cut, ended = (
    train_on(agent, state, line(actions, 1.0, discount), 1500)[1]
    for discount in (1.0, 0.0)
  )
  np.testing.assert_allclose(cut['value'], 10, rtol=0.02)
  np.testing.assert_allclose(ended['value'], 1, rtol=0.02)


def test_the_warm_start_clones_above_an_entropy_floor():
  # Two actions: the likeliest Gaussian behind tanh has this deviation.
  batch = line(np.tile([-0.3, 0.3], 16), 0.0, 0.0)
  std = np.arctanh(0.3)
  z, weight = np.polynomial.hermite_e.hermegauss(40)
  slope = np.log(1 - np.tanh(std * z) ** 2) @ weight / weight.sum()
  natural = 0.5 * np.log(2 * np.pi * np.e * std**2) + slope

  def clone(floor):
    config = dataclasses.replace(TASK, target_entropy=floor)
    agent = build(config, LINE, is_game=False)
    state = agent.init(jax.random.key(0))
    return train_on(agent, state, batch, 1500)

  floors = jnp.float32([-2.0, 0.5])
  _, metrics = jax.vmap(clone)(floors)
  assert natural < 0.3
  np.testing.assert_allclose(metrics['entropy'], [natural, 0.5], atol=0.05)
  assert metrics['temperature'][0] < 0.01 < metrics['temperature'][1]


def test_the_game_finds_the_better_actions_of_a_bandit():
  actions = np.linspace(-0.95, 0.95, 64)
  batch = line(actions, -4 * (actions - 0.5) ** 2, 0.0)
  config = dataclasses.replace(
    TASK, hidden_sizes=(16, 16), beta=16.0, target_entropy=-2.0, slow_rate=1e-4
  )
  networks = atac.make_networks(config, LINE)
  first, second = atac.make_phases(config, networks, atac.make_losses(), LINE)
  state = jax.jit(first.agent.init)(jax.random.key(0))
  state, _ = train_on(first.agent, state, batch, 500)
  mode = lambda s: second.agent.exploit(
    s.params, None, make_timestep(batch.o_tm1)
  )[0]
  # The behaviour's is 0.
  assert abs(mode(state)).max() < 0.2
  state, _ = train_on(second.agent, second.transfer(state), batch, 3000)
  np.testing.assert_allclose(mode(state), 0.5, atol=0.1)


# --- Errors.


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('beta', -1.0, 'beta=-1.0: must be 0 or more'),
    ('radius', 0.0, 'radius=0.0: must be above 0'),
    ('residual_weight', 1.5, r'residual_weight=1.5: must be within \[0, 1\]'),
    ('gamma', -0.1, r'gamma=-0.1: must be within \[0, 1\]'),
    ('init_temperature', 0.0, 'init_temperature=0.0: must be above 0'),
    ('target_entropy', float('nan'), 'target_entropy=nan: must be finite'),
    ('pessimism', 'none', 'pessimism=none: must be relative or initial'),
    ('entropy_mode', 'max', 'entropy_mode=max: must be sum or per_dim'),
    ('actor_critic', 2, 'actor_critic=2: must be 0 or 1'),
    ('value_clip', (1.0, -1.0), 'the first must be below the second'),
    ('warm_start_updates', -1, 'warm_start_updates=-1: must be'),
  ],
)
def test_bad_fields_are_refused(field, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **{field: value})


def test_bad_networks_and_batches_are_refused(game):
  _, state, batch = game
  with pytest.raises(ValueError, match='min_std=2'):
    atac.make_networks(dataclasses.replace(SMALL, min_std=2.0), SPEC)
  initial = build(dataclasses.replace(SMALL, pessimism='initial'))
  with pytest.raises(ValueError, match='no first observations o_0'):
    initial.update(state, batch._replace(o_0=None), jax.random.key(0))
