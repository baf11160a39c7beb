"""Ensembles of dynamics: known systems, predictions, plans in the ensemble."""

import dataclasses
import functools
import math

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import MODEL
from offline_cases import (
  HIGH,
  LOW,
  STATISTICS,
  UNIT,
  F,
  make_agent,
  make_batch,
  make_observation,
  make_timestep,
  to_unit,
  train,
)
from trees import assert_equal

from agents import dynamics
from agents.core import rollout
from agents.core.rollout import ModelParams
from agents.core.types import ArraySpec, Spec, Transition
from networks import actions, actor_critic, ensemble
from search import sampled

SMALL_SPEC = Spec(ArraySpec((2,)), UNIT)


# The ensemble as a network.


def layers_of(tree, inputs):
  """`(kernel, bias)` of both layers."""
  leaves = jax.tree.leaves(tree)
  kernels = [x for x in leaves if x.ndim == 2]
  kernels = sorted(kernels, key=lambda x: x.shape[0] != inputs)
  biases = {x.size: x for x in leaves if x.ndim == 1}
  return [(kernel, biases[kernel.shape[1]]) for kernel in kernels]


def test_the_ensemble_is_its_equations(key):
  net = ensemble.make(
    F,
    LOW,
    HIGH,
    (5,),
    outcome_sizes=(7,),
    members=2,
    activation='relu',
    statistics=STATISTICS,
  )
  params = net.init(key)
  rng = np.random.default_rng(0)
  noise = lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32)
  params = params | {
    name: jax.tree.map(lambda x: x + noise(x), params[name])
    for name in ('layers', 'max_log_variance', 'min_log_variance')
  }
  batch = make_batch()
  out = net.apply(params, batch.o_tm1, batch.a_tm1)
  flat = np.asarray(actor_critic.flatten(batch.o_tm1), float)
  x = np.concatenate(
    [(flat - STATISTICS[0]) / STATISTICS[1], to_unit(batch.a_tm1)], 1
  )
  softplus = lambda x: np.log1p(np.exp(x))
  std = np.asarray(STATISTICS[1], float)
  # Changes are scaled by the data's deviations, rewards are not.
  scale = np.concatenate([std, np.ones(2)])
  for i in range(2):
    one = jax.tree.map(lambda x, i=i: np.asarray(x[i], float), params)

    def run(name, x, one=one):
      first, last = layers_of(one['layers'][name], x.shape[1])
      return np.maximum(x @ first[0] + first[1], 0) @ last[0] + last[1]

    change, spread = np.split(run('change', x), 2, 1)
    seen = np.concatenate([x, x[:, :F] + change], 1)
    reward, uncertain = np.split(run('reward', seen), 2, 1)
    low, high = one['min_log_variance'], one['max_log_variance']
    raw = high - softplus(high - np.concatenate([spread, uncertain], 1))
    deviation = np.exp((low + softplus(raw - low)) / 2) * scale
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(out.mean[i], change * std)
    close(out.reward[i], reward)
    close(np.exp(out.log_std[i]), deviation[:, :F])
    close(np.exp(out.reward_log_std[i]), deviation[:, F:])
    close(out.logit[i], run('termination', seen)[:, 0])
    np.testing.assert_allclose(
      net.bounds(params)[i], (high - low).sum(), rtol=1e-5
    )


def test_the_terms_are_their_equations():
  losses = dynamics.make_losses()
  mean = jnp.array([[[1.0, 2.0]], [[0.0, -1.0]]])
  std = jnp.array([[[2.0, 0.5]], [[1.0, 4.0]]])
  got = losses.likelihood(mean, jnp.log(std), jnp.array([[3.0, 1.0]]))
  # Squares over variances 1 and 4; 9 and 1/4; plus the logs of the variances.
  want = [(5 + math.log(4 * 0.25)) / 2, (9.25 + math.log(16)) / 2]
  np.testing.assert_allclose(got[:, 0], want, rtol=1e-6)
  logit = jnp.array([[0.3, 0.3, 90.0]])
  got = losses.termination(logit, jnp.array([1.0, 0.0, 1.0]))
  p = 1 / (1 + math.exp(-0.3))
  want = [[-math.log(p), -math.log(1 - p), 0.0]]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_what_a_row_holds_decides_its_numbers():
  rows = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)
  got = np.asarray(ensemble.row_uniforms(jnp.asarray(rows), 3))
  again = ensemble.row_uniforms(jnp.asarray(rows[::-1].copy()), 3)
  np.testing.assert_array_equal(got, np.asarray(again)[:, ::-1])
  assert (got >= 0).all() and (got < 1).all()
  for x in got:
    share = np.histogram(x, 10, (0, 1))[0] / x.size
    np.testing.assert_allclose(share, 0.1, atol=0.01)
  assert np.abs(np.corrcoef(got) - np.eye(3)).max() < 0.03
  counts = np.asarray(ensemble.poisson(jnp.asarray(got)))
  for k in range(4):
    want = math.exp(-1) / math.factorial(k)
    np.testing.assert_allclose((counts == k).mean(), want, atol=0.01)
  np.testing.assert_allclose([counts.mean(), counts.var()], 1, atol=0.02)


def test_flat_rows_become_observations_again(key):
  observation = make_observation(np.random.default_rng(0))
  flat = actor_critic.flatten(observation)
  back = ensemble.unflatten(flat, observation)
  assert_equal(back, observation)


# Training the ensemble.


def test_held_out_rows_are_never_trained_on(key):
  config = dataclasses.replace(MODEL, weight_decay=0.0, bound_weight=0.0)
  agent = make_agent(dynamics, config)
  pool = make_batch(3, size=64)
  rows = jnp.concatenate(
    [
      actor_critic.flatten(pool.o_tm1),
      pool.a_tm1,
      pool.r_t[:, None],
      actor_critic.flatten(pool.o_t),
    ],
    1,
  )
  is_out = np.asarray(ensemble.row_uniforms(rows, 1)[0] < 0.3)
  assert 10 <= is_out.sum() <= 30
  pick = lambda mask: jax.tree.map(lambda x: x[np.flatnonzero(mask)[:8]], pool)
  update = jax.jit(agent.update)
  start = jax.jit(agent.init)(key)
  state, info = update(start, pick(is_out), key)
  assert info.metrics['gradient_norm'] == 0 and state.rows == 8
  assert_equal(state.params.network, start.params.network)
  # The first update's held-out loss is the loss on those rows.
  by_member = agent.evaluate(start.params, pick(is_out), key)
  np.testing.assert_allclose(
    state.loss_sum / 8, [by_member[f'loss_{i}'] for i in range(3)], rtol=1e-5
  )
  state, info = update(start, pick(~is_out), key)
  assert info.metrics['gradient_norm'] > 0 and state.rows == 0


def test_elites_are_the_better_members(key):
  built = conformance.built('dynamics')
  agent, state = built.agent, built.state
  rng = np.random.default_rng(0)
  noise = jnp.asarray([0.0, 5.0, 0.0], jnp.float32)
  spoil = lambda x: (
    x
    + jnp.asarray(rng.normal(size=x.shape), x.dtype)
    * (noise.reshape(-1, *(1,) * (x.ndim - 1)))
  )
  layers = jax.tree.map(spoil, state.params.network['layers'])
  network = state.params.network | {'layers': layers}
  state = state._replace(params=state.params._replace(network=network))
  state, _ = jax.jit(agent.update)(state, make_batch(5, size=64), key)
  assert sorted(np.asarray(state.params.elites).tolist()) == [0, 2]
  assert state.rows > 0


STD = np.float32([0.1, 0.3, 0.05])  # of both components and of the reward


def system(key):
  """A linear system, its noise known; it ends where the action is high."""
  keys = jax.random.split(key, 3)
  o = jax.random.uniform(keys[0], (128, 2), minval=-1.0)
  a = jax.random.uniform(keys[1], (128, 1), minval=-1.0)
  noise = jax.random.normal(keys[2], (128, 3)) * STD[None]
  step = noise + truth(o, a)
  ends = (a[:, 0] > 0.5).astype(jnp.float32)
  return Transition(o, a, step[:, 2], 1.0 - ends, o + step[:, :2])


def truth(o, a):
  change = 0.5 * o[:, ::-1] - 0.2 * o + a
  return jnp.concatenate([change, o[:, :1] + 2 * a], 1)


@functools.cache
def learned():
  config = dynamics.Config(
    widths=(32,), outcome_widths=(32,), members=4, elites=2
  )
  networks = dynamics.make_networks(config, SMALL_SPEC)
  agent = make_agent(dynamics, config, SMALL_SPEC, networks)
  start = jax.jit(agent.init)(jax.random.key(0))
  state, metrics = train(agent, start, system, 3000)
  return agent, networks, state, metrics


def test_the_ensemble_learns_a_linear_system_and_its_noise(key):
  agent, networks, state, metrics = learned()
  batch = system(key)
  out = networks.apply(state.params.network, batch.o_tm1, batch.a_tm1)
  want = np.asarray(truth(batch.o_tm1, batch.a_tm1))
  # The reward is that of the case that was seen.
  case = np.asarray(batch.discount_t == 0).astype(int)
  rows = np.arange(case.size)
  whole = lambda x, y: np.concatenate(
    [x, np.asarray(y)[:, rows, case, None]], 2
  )
  mean = whole(out.mean, out.reward)
  assert np.abs(mean - want).mean() < 0.04
  std = np.exp(whole(out.log_std, out.reward_log_std)).mean((0, 1))
  np.testing.assert_allclose(std, STD, rtol=0.15)
  # The best that can be had: the noise's own likelihood, nothing of an end.
  best = np.mean(1 + 2 * np.log(STD))
  np.testing.assert_allclose(metrics['held_out_loss'][-1], best, atol=0.3)
  held_out = agent.evaluate(state.params, batch, key)
  np.testing.assert_allclose(held_out['loss'], best, atol=0.5)


def test_terminations_are_learned(key):
  _, networks, state, _ = learned()
  o, a = jnp.zeros((4, 2)), jnp.array([[-0.8], [0.3], [0.7], [0.95]])
  logit = networks.apply(state.params.network, o, a).logit
  assert (np.asarray(logit) > 0).tolist() == [[False, False, True, True]] * 4
  out = rollout.expect(networks, state.params, o, a)
  assert (out.discount_t[:2] > 0.9).all() and (out.discount_t[2:] < 0.1).all()


def test_uncertainty_grows_off_the_data():
  _, networks, state, _ = learned()
  rng = np.random.default_rng(0)
  inside = jnp.asarray(rng.uniform(-1, 1, (64, 2)), jnp.float32)
  a = jnp.asarray(rng.uniform(-1, 1, (64, 1)), jnp.float32)
  near, far = (
    rollout.expect(networks, state.params, o, a)
    for o in (inside, inside + 8 * jnp.sign(inside))
  )
  assert far.disagreement.mean() > 5 * near.disagreement.mean()
  # What cannot be known is the noise's size wherever data are.
  np.testing.assert_allclose(
    near.aleatoric, np.full(64, np.sqrt((STD**2).sum())), rtol=0.3
  )


# Predicting and imagining.


def fixed_ensemble(logit=0.0, at_end=0.0, known=None):
  """Two members that say known things: changes by a and 3 a, rewards o_0.

  `at_end` is added to the reward of a step that ends the episode.
  """

  def apply(params, observation, action):
    n = action.shape[0]
    reward = observation[:, :1]
    mean = jnp.stack([jnp.tile(action, (1, 2)), jnp.tile(3 * action, (1, 2))])
    std = jnp.array([[0.1, 0.2, 0.3], [0.4, 0.1, 0.1]])[params]
    log_std = jnp.tile(jnp.log(std)[:, None], (1, n, 1))
    reward = jnp.stack([reward, reward + at_end], -1)
    return ensemble.Prediction(
      mean[params],
      log_std[..., :2],
      jnp.tile(reward[None, :, 0], (params.size, 1, 1)),
      jnp.tile(log_std[..., 2:], (1, 1, 2)),
      jnp.full((params.size, n), logit),
    )

  return ensemble.Ensemble(
    lambda key: jnp.arange(2), apply, lambda p: p, known or ensemble.Known()
  )


def test_predictions_are_draws_of_the_elites(key):
  net, n = fixed_ensemble(logit=-1.0), 40_000
  o, a = jnp.full((n, 2), 0.5), jnp.full((n, 1), 0.2)
  both = ModelParams(jnp.arange(2), jnp.arange(2))
  out = rollout.predict(net, both, key, o, a)
  change = np.asarray(out.o_t - o)
  # Half the draws from either: 0.2 or 0.6 of deviations 0.1 and 0.4.
  np.testing.assert_allclose(change.mean(0), [0.4, 0.4], atol=0.01)
  variance = [0.04 + (0.01 + 0.16) / 2, 0.04 + (0.04 + 0.01) / 2]
  np.testing.assert_allclose(change.var(0), variance, rtol=0.05)
  np.testing.assert_allclose(out.r_t.mean(), 0.5, atol=0.01)
  goes_on = 1 - 1 / (1 + math.e)
  np.testing.assert_allclose(out.discount_t.mean(), goes_on, atol=0.01)
  assert set(np.unique(out.discount_t)) == {0.0, 1.0}
  # The larger of two norms; both means are as far from the middle.
  wide = math.sqrt(0.16 + 0.01 + 0.01)
  np.testing.assert_allclose(out.aleatoric, np.full(n, wide), rtol=1e-5)
  away = math.sqrt(2 * 0.2**2)
  np.testing.assert_allclose(out.disagreement, np.full(n, away), rtol=1e-4)
  # With one elite there is only that one.
  one = ModelParams(jnp.arange(2), jnp.array([1]))
  out = rollout.predict(net, one, key, o, a)
  np.testing.assert_allclose((out.o_t - o).mean(0), [0.6, 0.6], atol=0.01)
  np.testing.assert_array_equal(out.disagreement, np.zeros(n))
  out = rollout.expect(net, both, o, a)
  np.testing.assert_allclose(out.o_t[0], [0.9, 0.9], rtol=1e-6)
  np.testing.assert_allclose(out.discount_t[0], goes_on, rtol=1e-6)


def test_a_reward_comes_with_the_end_that_brings_it(key):
  net, n = fixed_ensemble(logit=-1.0, at_end=10.0), 40_000
  o, a = jnp.full((n, 2), 0.5), jnp.full((n, 1), 0.2)
  both = ModelParams(jnp.arange(2), jnp.arange(2))
  out = rollout.predict(net, both, key, o, a)
  ended = np.asarray(out.discount_t) == 0
  np.testing.assert_allclose(out.r_t[ended].mean(), 10.5, atol=0.02)
  np.testing.assert_allclose(out.r_t[~ended].mean(), 0.5, atol=0.02)
  p = 1 / (1 + math.e)
  # A normal of either case, mixed: its deviation is mostly that of the cases.
  wide = math.sqrt(0.16 + 0.01 + 0.01 + 100 * p * (1 - p))
  other = math.sqrt(0.01 + 0.04 + 0.09 + 100 * p * (1 - p))
  np.testing.assert_allclose(out.aleatoric, max(wide, other), rtol=1e-5)
  out = rollout.expect(net, both, o, a)
  np.testing.assert_allclose(out.r_t, 0.5 + 10 * p, rtol=1e-5)
  np.testing.assert_allclose(out.discount_t, 1 - p, rtol=1e-5)


def test_what_is_known_takes_the_place_of_what_is_predicted(key):
  right = lambda o_tm1, a_tm1, o_t: (o_t[:, 0] > 0.8).astype(jnp.float32)
  cost = lambda o_tm1, a_tm1, o_t: o_t[:, 0] - o_tm1[:, 0] - a_tm1[:, 0]
  o = jnp.array([[0.5, 0.0], [0.0, 0.0]])
  a = jnp.array([[0.2], [0.2]])
  both = ModelParams(jnp.arange(2), jnp.arange(2))
  known = ensemble.Known(termination=right)
  net = fixed_ensemble(logit=-1.0, at_end=10.0, known=known)
  out = rollout.expect(net, both, o, a)
  np.testing.assert_allclose(out.o_t[:, 0], [0.9, 0.4], rtol=1e-6)
  np.testing.assert_array_equal(out.discount_t, [0, 1])
  np.testing.assert_allclose(out.r_t, [10.5, 0.0], rtol=1e-5, atol=1e-6)
  net = net._replace(known=ensemble.Known(cost, right))
  out = rollout.expect(net, both, o, a)
  np.testing.assert_allclose(out.r_t, [0.2, 0.2], rtol=1e-5)
  # Drawn steps end where they arrive.
  out = rollout.predict(
    net, both, key, jnp.tile(o, (500, 1)), jnp.tile(a, (500, 1))
  )
  np.testing.assert_array_equal(out.discount_t == 0, out.o_t[:, 0] > 0.8)
  assert 0 < out.discount_t.mean() < 1


def planned(key):
  """A model of the fixed ensemble, its parameters and its root."""
  model = rollout.planning_model(
    fixed_ensemble(logit=-1.0),
    lambda params: params,
    actions.tanh_gaussian(UNIT.low, UNIT.high),
    gamma=0.9,
  )
  params = ModelParams(jnp.arange(2), jnp.arange(2))
  root = model.root(params, make_timestep(jnp.zeros((2, 2))), key)
  return model, params, root


@pytest.mark.slow
def test_planners_plan_in_the_ensemble(key):
  # Reward o_0 where one arrives is what o_0 was; so the value of a first
  # action is seen a step later, and the highest is best.
  model, params, root = planned(key)
  found = sampled.search(
    params,
    key,
    root,
    model.step,
    64,
    distribution=model.distribution,
    num_samples=8,
    evaluate=True,
  )
  # Of 8 candidates at most one that was hardly told apart is higher.
  is_higher = found.sampled_actions[..., 0] > found.action
  assert (is_higher.sum(-1) <= 1).all()


def test_a_planned_step_is_the_ensembles(key):
  model, params, root = planned(key)
  out, after = model.step(
    params, key, jnp.array([[0.5], [-0.5]]), root.embedding
  )
  np.testing.assert_allclose(after[:, 0], [1.0, -1.0], rtol=1e-6)
  np.testing.assert_allclose(out.reward, [0.0, 0.0], atol=1e-7)
  goes_on = 1 - 1 / (1 + math.e)
  np.testing.assert_allclose(out.discount, [0.9 * goes_on] * 2, rtol=1e-6)


# Errors.


def test_a_bad_ensemble_is_refused():
  with pytest.raises(ValueError, match="activation='tanh': must be one of"):
    ensemble.make(F, LOW, HIGH, (4,), activation='tanh')
  with pytest.raises(ValueError, match='1 means and 1 deviations, must be 3'):
    ensemble.make(F, LOW, HIGH, (4,), statistics=(np.ones(1), np.ones(1)))
