"""Ensembles of dynamics and COMBO: known systems, rollouts by hand, limits."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from offline_cases import (
  HIGH,
  LOW,
  SPEC,
  STATISTICS,
  UNIT,
  B,
  D,
  F,
  PlainAdam,
  assert_close,
  make_agent,
  make_batch,
  make_observation,
  make_timestep,
  plain_batch,
  plain_critic,
  plain_draw,
  plain_gaussian,
  plain_params,
  plain_q,
  stack,
  to_unit,
  train,
)

from agents import combo, cql, dynamics
from agents.core import conservative, rollout
from agents.core.rollout import ModelParams
from agents.core.types import ArraySpec, Discrete, Mixed, Spec, Transition
from networks import actions, actor_critic, ensemble
from networks.mlp import Network
from search import sampled

MODEL = dynamics.Config(widths=(8,), members=3, elites=2, held_out=0.3)
COMBO = combo.Config(
  hidden_sizes=(8,),
  num_samples=2,
  rollout_length=3,
  rollout_batch=4,
  model_capacity=24,
  model_updates=5,
  model=MODEL,
)
SMALL_SPEC = Spec(ArraySpec((2,)), UNIT)


def make_mixed():
  return Mixed(make_batch(0), make_batch(1, size=4))


@functools.cache
def built(name):
  """An agent, its state, a batch, its compiled update and its traces."""
  module, config = {'dynamics': (dynamics, MODEL), 'combo': (combo, COMBO)}[
    name
  ]
  agent, traces = make_agent(module, config), [0]

  def update(state, batch, key):
    traces[0] += 1
    return agent.update(state, batch, key)

  state = jax.jit(agent.init)(jax.random.key(1))
  batch = make_batch() if name == 'dynamics' else make_mixed()
  return agent, state, batch, jax.jit(update), traces


each = pytest.mark.parametrize('name', ['dynamics', 'combo'])


# Conformance.


@each
def test_update_is_stable_and_traced_once(name, key):
  _, state, batch, update, traces = built(name)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for i in range(3):
    old = state
    state, info = update(state, batch, jax.random.fold_in(key, i))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    for metric, x in info.metrics.items():
      assert (x.shape, x.dtype) == ((), jnp.float32), metric
      assert np.isfinite(x), metric
    trained = lambda s: (
      s.params.network['layers'] if name == 'dynamics' else s.params.critic
    )
    changed = jax.tree.map(
      lambda a, b: (a != b).any(), *map(trained, (old, state))
    )
    assert any(jax.tree.leaves(changed))
  assert traces[0] == 1


@each
def test_state_can_be_donated(name, key):
  agent, _, batch, _, _ = built(name)
  update = jax.jit(agent.update, donate_argnums=0)
  state = jax.jit(agent.init)(key)
  for _ in range(2):
    state, _ = update(state, batch, key)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@each
@pytest.mark.slow
def test_jit_equals_eager(name, key):
  agent, state, batch, update, _ = built(name)
  assert_close(update(state, batch, key), agent.update(state, batch, key))


@each
def test_vmap_over_seeds_equals_a_loop(name, key):
  agent, _, batch, update, _ = built(name)
  keys = jax.random.split(key)
  states = [agent.init(k) for k in keys]
  together = jax.jit(jax.vmap(agent.update, in_axes=(0, None, 0)))
  got = together(stack(*states), batch, keys)
  assert_close(got, stack(*(update(s, batch, k) for s, k in zip(states, keys))))


@each
def test_scan_equals_a_loop(name, key):
  agent, want, batch, update, _ = built(name)
  keys = jax.random.split(key, 3)
  run = lambda s: jax.lax.scan(lambda s, k: agent.update(s, batch, k), s, keys)
  got, _ = jax.jit(run)(want)
  for k in keys:
    want, _ = update(want, batch, k)
  assert_close(got, want)


@each
def test_every_float_of_a_config_may_be_traced(name, key):
  _, _, batch, _, _ = built(name)
  module, config = (dynamics, MODEL) if name == 'dynamics' else (combo, COMBO)
  values = {
    f.name: np.float32([0.9, 0.95]) * getattr(config, f.name)
    for f in dataclasses.fields(config)
    if isinstance(getattr(config, f.name), float)
  }

  def run(floats):
    agent = make_agent(module, dataclasses.replace(config, **floats))
    state, info = agent.update(agent.init(key), batch, key)
    return state, info.metrics

  got = jax.jit(jax.vmap(run))(values)
  second = {field: float(x[1]) for field, x in values.items()}
  want = jax.jit(functools.partial(run, second))()
  assert_close(jax.tree.map(lambda x: x[1], got), want, tolerance=1e-4)


@each
def test_two_devices_equal_one(name, key):
  module, config = (dynamics, MODEL) if name == 'dynamics' else (combo, COMBO)
  _, state, batch, _, _ = built(name)
  networks = module.make_networks(config, SPEC)
  if module is combo:  # no noise
    draw, scale = networks.box.sample, networks.box.from_unit
    box = networks.box._replace(
      sample=lambda e, g: draw(jnp.zeros_like(e), g),
      from_unit=lambda u: scale(jnp.zeros_like(u)),
    )
    networks = networks._replace(box=box)
  mean = functools.partial(jax.lax.pmean, axis_name='devices')
  alone, shared = (
    make_agent(module, config, networks=networks, **reduce)
    for reduce in ({}, {'reduce': mean})
  )
  halves = jax.tree.map(
    lambda x: x.reshape(2, x.shape[0] // 2, *x.shape[1:]), batch
  )

  @jax.jit
  def both(state):
    together = jax.vmap(shared.update, (None, 0, None), axis_name='devices')
    return together(state, halves, key), alone.update(state, batch, key)

  (got, got_info), (want, want_info) = both(state)
  if module is dynamics:
    # Sums over rows that are means over devices: their ratio is what counts.
    halve = lambda s: s._replace(loss_sum=s.loss_sum / 2, rows=s.rows / 2)
    want = halve(want)
  # Adam divides gradients by their size: rounding errors of small ones show.
  assert_close(
    (got, got_info.metrics),
    stack(*[(want, want_info.metrics)] * 2),
    tolerance=2e-5,
  )


# The ensemble as a network.


def test_the_ensemble_is_its_equations(key):
  net = ensemble.make(
    F, LOW, HIGH, (5,), members=2, activation='relu', statistics=STATISTICS
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
  scale = np.append(STATISTICS[1], 1.0)
  for i in range(2):
    one = jax.tree.map(lambda x, i=i: np.asarray(x[i], float), params)
    leaves = jax.tree.leaves(one['layers'])
    kernels = [x for x in leaves if x.ndim == 2]
    first, last = sorted(kernels, key=lambda x: x.shape[0] != F + D)
    biases = {x.size: x for x in leaves if x.ndim == 1}
    hidden = np.maximum(x @ first + biases[5], 0)
    y = hidden @ last + biases[2 * (F + 1) + 1]
    mean, raw, logit = y[:, : F + 1], y[:, F + 1 : -1], y[:, -1]
    low, high = one['min_log_variance'], one['max_log_variance']
    raw = high - softplus(high - raw)
    log_variance = low + softplus(raw - low)
    np.testing.assert_allclose(out.mean[i], mean * scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      np.exp(out.log_std[i]), np.exp(log_variance / 2) * scale, rtol=1e-4
    )
    np.testing.assert_allclose(out.logit[i], logit, rtol=1e-4, atol=1e-5)
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
  jax.tree.map(np.testing.assert_array_equal, back, observation)


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
  jax.tree.map(
    np.testing.assert_array_equal, state.params.network, start.params.network
  )
  # The first update's held-out loss is the loss on those rows.
  by_member = agent.evaluate(start.params, pick(is_out), key)
  np.testing.assert_allclose(
    state.loss_sum / 8, [by_member[f'loss_{i}'] for i in range(3)], rtol=1e-5
  )
  state, info = update(start, pick(~is_out), key)
  assert info.metrics['gradient_norm'] > 0 and state.rows == 0


def test_elites_are_the_better_members(key):
  agent, state, _, _, _ = built('dynamics')
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
  config = dynamics.Config(widths=(32,), members=4, elites=2)
  config = dataclasses.replace(config, learning_rate=3e-3)
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
  assert np.abs(np.asarray(out.mean) - want).mean() < 0.04
  std = np.exp(np.asarray(out.log_std)).mean((0, 1))
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


def fixed_ensemble(logit=0.0):
  """Two members that say known things: changes by a and 3 a, rewards o_0."""

  def apply(params, observation, action):
    n = action.shape[0]
    reward = observation[:, :1]
    one = lambda factor, offset: jnp.concatenate(
      [factor * action, factor * action + offset, reward], 1
    )
    mean = jnp.stack([one(1.0, 0.0), one(3.0, 0.0)])
    mean = mean[params]
    std = jnp.array([[0.1, 0.2, 0.3], [0.4, 0.1, 0.1]])[params]
    log_std = jnp.tile(jnp.log(std)[:, None], (1, n, 1))
    return ensemble.Prediction(mean, log_std, jnp.full((params.size, n), logit))

  return ensemble.Ensemble(lambda key: jnp.arange(2), apply, lambda p: p)


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


@pytest.mark.parametrize('rollouts', ['policy', 'uniform'])
def test_imagined_rollouts_are_those_of_a_loop(rollouts, key):
  config = dataclasses.replace(COMBO, rollouts=rollouts)
  networks = combo.make_networks(config, SPEC)
  _, state, _, _, _ = built('combo')
  begin = make_observation(np.random.default_rng(4), 6)
  rows = jax.jit(combo.make_imagine(config, networks))(state, begin, key)
  o, ended = begin, 0
  for k, step_key in enumerate(jax.random.split(key, 3)):
    policy_key, model_key = jax.random.split(step_key)
    gaussian = networks.policy.apply(state.params.policy, o)
    if rollouts == 'uniform':
      unit = jax.random.uniform(policy_key, (6, D), minval=-1.0)
    else:
      noise = jax.random.normal(policy_key, (6, D))
      unit = jnp.tanh(gaussian.mean + gaussian.std * noise)
    a = (LOW + HIGH)[None] / 2 + (HIGH - LOW)[None] / 2 * unit
    out = rollout.predict(networks.model, state.params.model, model_key, o, a)
    got = jax.tree.map(lambda x, k=k: x[6 * k : 6 * k + 6], rows)
    want = Transition(o, a, out.r_t, out.discount_t, out.o_t)
    assert_close(got, want, tolerance=1e-4)
    # An ended rollout begins anew; it must not go on from behind the end.
    ends = np.asarray(out.discount_t) == 0
    ended += ends.sum()
    o = jax.tree.map(
      lambda first, x, ends=ends: jnp.where(
        ends.reshape(-1, *(1,) * (x.ndim - 1)), first, x
      ),
      begin,
      out.o_t,
    )
  assert 0 < ended < 18


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


def test_combos_model_has_its_policy_and_value(key):
  networks = combo.make_networks(COMBO, SPEC)
  agent, state, batch, _, _ = built('combo')
  timestep = make_timestep(batch.real.o_tm1)
  root = agent.model.root(state.params, timestep, key)
  gaussian = networks.policy.apply(state.params.policy, timestep.observation)
  action, log_prob = networks.box.sample(
    jax.random.normal(key, gaussian.mean.shape), gaussian
  )
  got = agent.model.distribution.log_prob(root.prior_logits, action[:, None])
  np.testing.assert_allclose(got[:, 0], log_prob, rtol=1e-3, atol=1e-3)
  mode, _ = agent.exploit(state.params, key, timestep)
  got = agent.model.distribution.mode(root.prior_logits)
  np.testing.assert_allclose(got, mode, rtol=1e-4)
  q = networks.critic.apply(state.params.critic, timestep.observation, mode)
  np.testing.assert_allclose(root.value, q.min(0), rtol=1e-5)


# COMBO.


def test_combo_with_real_rows_alone_is_cql(key):
  names = (
    *('hidden_sizes', 'policy_rate', 'critic_rate', 'temperature_rate'),
    *('num_samples', 'penalty', 'gamma', 'target_rate'),
  )
  shared = {name: getattr(COMBO, name) for name in names}
  theirs = make_agent(cql, cql.Config(**shared))
  config = dataclasses.replace(COMBO, real_fraction=1.0)
  ours = make_agent(combo, config)
  batch = make_mixed()
  nothing = jax.tree.map(lambda x: x[:0], batch.model)
  update = jax.jit(ours.update)
  want = jax.jit(theirs.update)(theirs.init(key), batch.real, key)
  got = update(ours.init(key), batch._replace(model=nothing), key)
  # Imagined rows without weight change the real rows' noise, and no more.
  other = batch._replace(model=make_batch(2, size=4))
  beside = [update(ours.init(key), mixed, key) for mixed in (batch, other)]
  for (state, info), (right, right_info) in ((got, want), beside):
    for name in ('policy', 'critic', 'log_temperature'):
      assert_close(
        getattr(state.params, name),
        getattr(right.params, name),
        tolerance=1e-6,
      )
    assert_close(state.target_critic, right.target_critic, tolerance=1e-6)
    for name in ('loss_critic', 'gap', 'value', 'loss_policy', 'entropy'):
      np.testing.assert_allclose(
        info.metrics[name], right_info.metrics[name], rtol=1e-5
      )


@pytest.mark.parametrize('states', ['mixed', 'model'])
def test_combos_critics_and_policy_are_their_equations(states):
  f, n, size = 0.3, 2, B + 4
  config = combo.Config(
    gamma=0.8,
    critic_rate=0.02,
    penalty=1.7,
    num_samples=n,
    real_fraction=f,
    penalty_states=states,
    model=MODEL,
  )
  with jax.enable_x64(True):
    rng = np.random.default_rng(3)
    policy = plain_params(rng, F, 2 * D)
    critic, bar = (plain_params(rng, F + D, 1, 2) for _ in range(2))
    networks = combo.Networks(
      Network(lambda key: policy, plain_gaussian),
      Network(lambda key: critic, plain_critic),
      actor_critic.squash(LOW, HIGH),
      fixed_ensemble(),
    )
    agent = make_agent(combo, config, networks=networks)
    state = agent.init(jax.random.key(0))._replace(target_critic=bar)
    batch = Mixed(plain_batch(rng), plain_batch(rng, 4))
    key = jax.random.key(1)
    # Four groups, each of two real rows and an imagined one.
    order = np.array([0, 1, 8, 2, 3, 9, 4, 5, 10, 6, 7, 11])
    is_real = order < B
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[order], *batch)
    noise = conservative.draw_noise(key, rows.a_tm1, n)
    next_a, _ = plain_draw(policy, rows.o_t, noise.t)
    v = jnp.minimum(*(plain_q(bar, rows.o_t, next_a, j) for j in range(2)))
    y = rows.r_t + 0.8 * rows.discount_t * v
    by_kind = lambda x, f: (
      f * jnp.mean(x[is_real]) + (1 - f) * jnp.mean(x[~is_real])
    )

    def loss(p):
      total = 0.0
      for j in range(2):
        q = plain_q(p, rows.o_tm1, to_unit(rows.a_tm1), j)
        terms = []
        for k in range(n):
          here, log_here = plain_draw(
            policy, rows.o_tm1, noise.samples_tm1[:, k]
          )
          there, log_there = plain_draw(policy, rows.o_t, noise.samples_t[:, k])
          u = noise.uniform[:, k]
          terms += [
            jnp.exp(plain_q(p, rows.o_tm1, u, j)) * 2**D,
            jnp.exp(plain_q(p, rows.o_tm1, here, j) - log_here),
            jnp.exp(plain_q(p, rows.o_tm1, there, j) - log_there),
          ]
        high = jnp.log(sum(terms) / (3 * n))
        down = by_kind(high, f if states == 'mixed' else 0.0)
        total += by_kind((q - y) ** 2, f) + 1.7 * (down - jnp.mean(q[is_real]))
      return total

    assert rows.r_t.shape == (size,)
    want, gradient = jax.value_and_grad(loss)(critic)
    new, info = jax.jit(agent.update)(state, batch, key)
    assert_close(info.metrics['loss_critic'], want, tolerance=1e-10)
    stepped = PlainAdam(0.02).step(critic, gradient)
    assert_close(new.params.critic, stepped, tolerance=1e-10)

    def policy_loss(p):
      action, log_prob = plain_draw(p, rows.o_tm1, noise.tm1)
      q = [plain_q(new.params.critic, rows.o_tm1, action, j) for j in range(2)]
      return by_kind(log_prob - jnp.minimum(*q), f)

    want, gradient = jax.value_and_grad(policy_loss)(policy)
    assert_close(info.metrics['loss_policy'], want, tolerance=1e-10)
    stepped = PlainAdam(config.policy_rate).step(policy, gradient)
    assert_close(new.params.policy, stepped, tolerance=1e-10)


def test_the_model_learns_first_and_is_handed_on(key):
  networks = combo.make_networks(COMBO, SPEC)
  losses = combo.make_losses()
  first, second = combo.make_phases(COMBO, networks, losses, SPEC)
  assert (first.name, first.updates, first.transfer) == ('model', 5, None)
  assert (second.name, second.updates) == ('policy', None)
  assert first.agent.act is None and first.imagine is None
  start = jax.jit(first.agent.init)(key)
  state, _ = jax.jit(first.agent.update)(start, make_batch(0, size=32), key)
  jax.tree.map(np.testing.assert_array_equal, state.policy, start.policy)
  assert_close(
    first.agent.evaluate(state.params, make_batch(1), key)['loss'],
    make_agent(dynamics, MODEL).evaluate(
      state.model.params, make_batch(1), key
    )['loss'],
  )
  after = second.transfer(state)
  jax.tree.map(
    np.testing.assert_array_equal, after.params.model, state.model.params
  )
  shapes = jax.eval_shape(second.agent.init, key)
  assert jax.tree.structure(after) == jax.tree.structure(shapes)
  done, _ = built('combo')[3](after, make_mixed(), key)
  jax.tree.map(
    np.testing.assert_array_equal, done.params.model, state.model.params
  )
  rows = second.imagine(done, make_observation(np.random.default_rng(0)), key)
  assert rows.r_t.shape == (3 * B,)


def test_actions_are_within_bounds_and_explore(key):
  agent, state, batch, _, _ = built('combo')
  timestep, act = make_timestep(batch.real.o_tm1), jax.jit(agent.act)
  drawn = [
    np.asarray(act(state.params, jax.random.fold_in(key, i), timestep)[0])
    for i in range(3)
  ]
  best, extras = agent.exploit(state.params, key, timestep)
  assert extras == {} and (np.std(drawn, 0) > 0).all()
  for a in (*drawn, best):
    assert (np.asarray(a) >= LOW).all() and (np.asarray(a) <= HIGH).all()


def test_time_limits_bootstrap_and_terminations_do_not():
  # Reward 1 for ever, cut by a time limit only: 1 / (1 - gamma). Else 1.
  config = dataclasses.replace(
    COMBO, gamma=0.8, target_rate=0.1, critic_rate=0.01, penalty=0.0
  )
  state_of = jnp.repeat(jnp.eye(2), 16, 0)
  rows = Transition(
    o_tm1=state_of,
    a_tm1=jnp.tile(jnp.linspace(-1, 1, 16)[:, None], (2, 1)),
    r_t=jnp.ones(32),
    discount_t=jnp.repeat(jnp.array([1.0, 0.0]), 16),
    o_t=state_of,
  )
  half = lambda start: jax.tree.map(lambda x: x[start::2], rows)
  networks = combo.make_networks(config, SMALL_SPEC)
  agent = make_agent(combo, config, SMALL_SPEC, networks)
  start = jax.jit(agent.init)(jax.random.key(0))
  state, _ = train(agent, start, lambda key: Mixed(half(0), half(1)), 1500)
  q = networks.critic.apply(state.params.critic, rows.o_tm1, rows.a_tm1)
  want = np.tile(np.repeat([5.0, 1.0], 16), (2, 1))
  np.testing.assert_allclose(q, want, atol=0.2)


# Errors.


@pytest.mark.parametrize(
  'module, field, value',
  [
    (dynamics, 'elites', 8),
    (dynamics, 'learning_rate', -1.0),
    (dynamics, 'held_out', 1.0),
    (dynamics, 'held_out_decay', math.nan),
    (dynamics, 'planning_gamma', 1.1),
    (combo, 'gamma', -0.1),
    (combo, 'real_fraction', 1.5),
    (combo, 'penalty', math.inf),
    (combo, 'rollout_length', 0),
    (combo, 'model_updates', 0),
    (combo, 'init_temperature', 0.0),
    (combo, 'rollouts', 'random'),
    (combo, 'penalty_states', 'real'),
  ],
)
def test_a_bad_setting_is_refused(module, field, value):
  with pytest.raises(ValueError, match=f'^{field}={value}: must be'):
    module.Config(**{field: value})


def test_a_bad_spec_is_refused():
  bad = SPEC._replace(action=Discrete(3))
  for module, config in ((dynamics, MODEL), (combo, COMBO)):
    with pytest.raises(ValueError, match='needs vectors of continuous actions'):
      module.make_networks(config, bad)
  with pytest.raises(ValueError, match="activation='tanh': must be one of"):
    ensemble.make(F, LOW, HIGH, (4,), activation='tanh')
  with pytest.raises(ValueError, match='1 means and 1 deviations, must be 3'):
    ensemble.make(F, LOW, HIGH, (4,), statistics=(np.ones(1), np.ones(1)))
  config = dataclasses.replace(COMBO, normalise=True)
  with pytest.raises(ValueError, match=r'normalise=True: .*no statistics'):
    combo.make_networks(config, SPEC._replace(statistics=None))
