"""The unroll, the learned model and searching again, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_equal

from agents.core import planning, unroll
from agents.core.types import ArraySpec
from networks import heads, muzero
from networks.muzero import MuZeroNetworks, NetworkConfig
from search.model import Model, PolicyOutput, TimeStep

B, A = 3, 2


def linear_networks():
  """`s_k = w s_{k-1}`; a value `s`, a policy of actions, a counting reward."""

  def dynamics(params, stats, state, action, train):
    return state * params + 0.0 * action[:, None], stats + 1

  def predict(params, stats, state, train):
    return jnp.concatenate([state, -state], -1), state, stats

  def reward(params, stats, state_tm1, action_tm1, state_t, carry, train):
    carry = carry + 1.0 + action_tm1[:, None]
    return carry, carry, stats

  unused = lambda *args: None
  return MuZeroNetworks(
    init=unused,
    represent=unused,
    dynamics=dynamics,
    predict=predict,
    reward=reward,
    initial_carry=lambda size: jnp.zeros((size, 1)),
    project=unused,
    predict_projection=unused,
  )


def test_gradients_are_halved_at_the_dynamics_entrance():
  def loss(w, state):
    out = unroll.unroll(
      linear_networks(), w, 0, state, jnp.zeros((1, 3), jnp.int32), train=True
    )
    return jnp.sum(out.value_logits), out.value_logits[:, 0, 0]

  (w, state), values = jax.grad(loss, argnums=(0, 1), has_aux=True)(
    2.0, jnp.float32([[3.0]])
  )
  np.testing.assert_array_equal(values, [3, 6, 12, 24])
  # What reaches s_k: G_3 = 1, G_2 = 1 + w G_3 / 2 = 2, G_1 = 3; every head
  # and every use of w counts in full.
  assert w == 3 * 3 + 2 * 6 + 1 * 12
  assert state == 1 + 2 * 3 / 2


def test_the_gradient_scale_is_an_argument():
  def loss(state, scale):
    action = jnp.zeros((1, 2), jnp.int32)
    out = unroll.unroll(
      linear_networks(), 2.0, 0, state, action, train=True, gradient_scale=scale
    )
    return jnp.sum(out.states[-1])

  for scale in (1.0, 0.25):
    got = jax.grad(loss)(jnp.float32([[1.0]]), scale)
    assert got == 4 * scale**2


@pytest.mark.parametrize(
  ('reset_every', 'want'),
  [(None, [1, 2, 1, 2, 1]), (2, [1, 3, 1, 3, 1]), (3, [1, 3, 4, 2, 3])],
)
def test_the_carry_is_reset(reset_every, want):
  # Each reward counts 1, and 1 more for its action.
  action = jnp.int32([[0, 1, 0, 1, 0]])
  out = unroll.unroll(
    linear_networks(),
    1.0,
    jnp.int32(0),
    jnp.ones((1, 1)),
    action,
    train=True,
    reset_every=reset_every,
  )
  np.testing.assert_array_equal(out.reward_logits[:, 0, 0], want)
  assert out.policy_logits.shape == (6, 1, 2)
  assert out.states.shape == (5, 1, 1)
  assert out.statistics == 5


def make_params(networks, key):
  network, statistics = jax.jit(networks.init)(key)
  rng = np.random.default_rng(0)
  network = jax.tree.map(
    lambda x: x + jnp.float32(0.3 * rng.normal(size=x.shape)), network
  )
  return unroll.Params(network, statistics, jnp.int32(0))


def make_networks(reward):
  config = NetworkConfig(
    torso='vector',
    latent_size=6,
    blocks=0,
    norm='batch',
    reward=reward,
    lstm_size=4,
    value_bins=7,
    reward_bins=7,
    head_hidden=(5,),
    projector=(4,),
    predictor=(3,),
  )
  return muzero.make(config, ArraySpec((4,)), A)


def make_timestep(*leading):
  rng = np.random.default_rng(1)
  return TimeStep(
    observation=jnp.float32(rng.normal(size=(*leading, 4))),
    reward=jnp.zeros(leading),
    discount=jnp.ones(leading),
    is_first=jnp.zeros(leading, bool),
    truncated=jnp.zeros(leading, bool),
  )


@pytest.mark.parametrize('horizon', [None, 2])
def test_model_and_unroll_against_networks_by_hand(horizon, key):
  networks = make_networks('reward' if horizon is None else 'value_prefix')
  params = make_params(networks, key)
  network, statistics = params.network, params.statistics
  timestep = make_timestep(B)
  action = jnp.int32([[0, 1, 1], [1, 1, 0], [0, 0, 1]])

  model = unroll.learned_model(networks, gamma=0.9, prefix_horizon=horizon)
  root = model.root(params, timestep, key)
  step = jax.jit(model.step)
  embedding, outputs = root.embedding, []
  for k in range(3):
    output, embedding = step(params, key, action[:, k], embedding)
    outputs.append(output)

  state, _ = networks.represent(
    network, statistics, timestep.observation, False
  )
  out = jax.jit(
    lambda state: unroll.unroll(
      networks,
      network,
      statistics,
      state,
      action,
      train=False,
      reset_every=horizon,
    )
  )(state)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  policy, value, _ = networks.predict(network, statistics, state, False)
  close(root.prior_logits, policy)
  close(root.value, heads.from_logits(value))
  close(out.policy_logits[0], policy)
  close(out.value_logits[0], value)

  carry, base = networks.initial_carry(B), 0.0
  for k in range(3):
    if horizon and k % horizon == 0:
      carry, base = networks.initial_carry(B), 0.0
    new, _ = networks.dynamics(network, statistics, state, action[:, k], False)
    reward, carry, _ = networks.reward(
      network, statistics, state, action[:, k], new, carry, False
    )
    state = new
    policy, value, _ = networks.predict(network, statistics, state, False)
    close(out.states[k], state)
    close(out.reward_logits[k], reward)
    close(out.policy_logits[k + 1], policy)
    close(out.value_logits[k + 1], value)
    total = heads.from_logits(reward)
    close(outputs[k].reward, total - base)
    close(outputs[k].value, heads.from_logits(value))
    close(outputs[k].prior_logits, policy)
    np.testing.assert_array_equal(outputs[k].discount, np.float32([0.9] * B))
    base = total if horizon else 0.0
  assert np.abs(outputs[1].reward).min() > 1e-3  # there was something to see


def test_visit_temperature():
  steps = [0, 49, 50, 74, 75, 1000]
  got = [unroll.visit_temperature(jnp.int32(s), 100) for s in steps]
  assert got == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_flatten_steps_and_back():
  x = {'a': jnp.arange(12).reshape(3, 2, 2), 'b': jnp.arange(6).reshape(3, 2)}
  flat = unroll.flatten_steps(x)
  np.testing.assert_array_equal(flat['b'], range(6))
  assert flat['a'].shape == (6, 2)
  assert_equal(unroll.unflatten_steps(flat, 3), x)


def test_re_search_in_chunks(key):
  networks = make_networks('reward')
  params = make_params(networks, key)
  model = unroll.learned_model(networks, gamma=0.9)
  # Without simulations there is no noise: chunks change nothing.
  search = planning.make_search(planning.SearchConfig(num_simulations=0))
  timestep = make_timestep(B, 4)
  whole = planning.re_search(search, model, params, key, timestep)
  parts = planning.re_search(search, model, params, key, timestep, chunk=6)
  # 12 roots, 5 at most: three chunks of 4.
  uneven = planning.re_search(search, model, params, key, timestep, chunk=5)
  assert whole.action_weights.shape == (B, 4, A)
  assert whole.value.shape == (B, 4)
  for other in (parts, uneven):
    for name in ('action_weights', 'value'):
      np.testing.assert_allclose(
        getattr(other, name), getattr(whole, name), rtol=1e-5
      )
  flat = unroll.flatten_steps(timestep)
  root = model.root(params, flat, key)
  np.testing.assert_allclose(whole.value.reshape(-1), root.value, rtol=1e-5)


@pytest.mark.parametrize(
  ('batch', 'fraction', 'chosen'),
  [
    (16, 0.25, [0, 1, 8, 9]),
    (16, 0.99, range(16)),
    (16, 0.01, [0, 8]),
    (16, 0.0, []),
    (6, 0.5, range(3)),
  ],
)
def test_a_share_is_spread_over_the_batch(batch, fraction, chosen):
  share = planning.share(fraction, batch)
  assert share.count == len(chosen)
  x = jnp.arange(2.0 * batch).reshape(batch, 2)
  taken = share.take({'x': x})['x']
  np.testing.assert_array_equal(taken, x[jnp.asarray(chosen, int)])
  put = np.array(x)
  put[list(chosen)] = -1
  np.testing.assert_array_equal(share.put(x, jnp.full_like(taken, -1)), put)


@pytest.mark.parametrize(
  ('chunk', 'most'), [(1000, 64), (20, 16), (7, 4), (1, 1), (31, 16)]
)
def test_chunks_are_equal_and_within_the_bound(chunk, most, key):
  # 16 rows of 4 steps; the search notes how many roots it was given.
  sizes = []

  def search(params, key, root, step, invalid_actions):
    sizes.append(root.shape[0])
    return PolicyOutput(jnp.zeros_like(root), root[:, None], root, None)

  model = Model(lambda params, timestep, key: timestep.reward, None)
  timestep = make_timestep(16, 4)
  output = planning.re_search(search, model, None, key, timestep, chunk)
  np.testing.assert_array_equal(output.value, timestep.reward)
  assert set(sizes) == {most}


@pytest.mark.parametrize('rule', ['efficientzero', 'puct', 'gumbel'])
def test_planners_evaluate_without_noise(rule, key):
  networks = make_networks('reward')
  params = make_params(networks, key)
  model = unroll.learned_model(networks, gamma=0.9)
  config = planning.SearchConfig(rule=rule, num_simulations=6)
  timestep = make_timestep(8)
  plan = jax.jit(
    lambda key: planning.make_planner(config, evaluate=True)(
      model, params, key, timestep
    )
  )
  outputs = [plan(jax.random.key(seed)) for seed in range(3)]
  for output in outputs[1:]:
    np.testing.assert_array_equal(output.value, outputs[0].value)
    np.testing.assert_array_equal(
      output.action_weights, outputs[0].action_weights
    )
  assert outputs[0].search_tree is None
