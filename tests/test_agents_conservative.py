"""CQL and IQL: against plain equations, their limits, known answers."""

import math

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import AGENTS
from offline_cases import (
  HIGH,
  LOW,
  SPEC,
  UNIT,
  B,
  D,
  F,
  PlainAdam,
  make_agent,
  make_batch,
  make_timestep,
  plain,
  plain_batch,
  plain_critic,
  plain_draw,
  plain_gaussian,
  plain_params,
  plain_q,
  to_unit,
  train,
)
from trees import assert_close

from agents import cql, iql, sac
from agents.core import conservative
from agents.core.types import (
  ArraySpec,
  Spec,
  Transition,
)
from networks import actor_critic
from networks.actor_critic import Gaussian
from networks.mlp import Network

SMALL = {'hidden_sizes': (8,)}


def test_iql_acts_as_widely_as_its_policy(key):
  networks = iql.make_networks(iql.Config(), SPEC)
  narrow = networks._replace(
    policy=Network(
      networks.policy.init,
      lambda p, o: networks.policy.apply(p, o)._replace(
        std=jnp.full((B, D), 0.03)
      ),
    )
  )
  agent = make_agent(iql, iql.Config(), networks=narrow)
  params = agent.init(key).params
  timestep = make_timestep(make_batch().o_tm1)
  best, _ = agent.exploit(params, key, timestep)
  unit = lambda key: to_unit(agent.act(params, key, timestep)[0])
  step = jax.vmap(unit)(jax.random.split(key, 500)) - to_unit(best)[None]
  np.testing.assert_allclose(jnp.std(step), 0.03, rtol=0.05)


# The equations, in float64, with networks of the test's own.


def plain_state(module, config, params, **changes):
  """The agent and its state, with the test's networks and parameters."""
  networks = {
    'policy': plain_gaussian,
    'critic': plain_critic,
    'value': lambda p, o: plain(p, o)[:, 0],
  }
  if module is iql:
    networks['policy'] = lambda p, o: Gaussian(
      plain(p, o), jnp.tile(jnp.exp(p['log_std']), (o.shape[0], 1))
    )
  constant = lambda x: lambda key: x
  parts = {
    name: Network(constant(getattr(params, name)), networks[name])
    for name in module.Networks._fields
    if name != 'box'
  }
  networks = module.Networks(**parts, box=actor_critic.squash(LOW, HIGH))
  agent = make_agent(module, config, networks=networks)
  state = agent.init(jax.random.key(0))
  widen = lambda x: (
    x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x
  )
  opt_state = jax.tree.map(widen, state.opt_state)
  return agent, state._replace(params=params, opt_state=opt_state, **changes)


@pytest.mark.parametrize(
  'gap_target, has_entropy', [(None, False), (0.7, True)]
)
def test_cql_is_its_equations(gap_target, has_entropy):
  n = 4
  config = cql.Config(
    gamma=0.8,
    policy_rate=0.03,
    critic_rate=0.02,
    temperature_rate=0.05,
    multiplier_rate=0.04,
    target_rate=0.1,
    target_entropy=-1.3,
    penalty=1.7,
    num_samples=n,
    gap_target=gap_target,
    deterministic_backup=not has_entropy,
  )
  with jax.enable_x64(True):
    rng = np.random.default_rng(3)
    policy, critic = (
      plain_params(rng, F, 2 * D),
      plain_params(rng, F + D, 1, 2),
    )
    bar, log_alpha = plain_params(rng, F + D, 1, 2), jnp.asarray(-0.4)
    log_w = None if gap_target is None else jnp.asarray(np.log(1.7))
    params = cql.Params(policy, critic, log_alpha, log_w)
    agent, state = plain_state(cql, config, params, target_critic=bar)
    adam = {
      name: PlainAdam(rate)
      for name, rate in zip('pcaw', (0.03, 0.02, 0.05, 0.04))
    }
    update = jax.jit(agent.update)
    for i in range(3):
      batch, key = plain_batch(rng), jax.random.key(i)
      noise = conservative.draw_noise(key, batch.a_tm1, n)
      d, alpha = 0.8 * batch.discount_t, jnp.exp(log_alpha)
      weight = 1.7 if log_w is None else float(np.exp(log_w))
      next_a, next_log_prob = plain_draw(policy, batch.o_t, noise.t)
      v = jnp.minimum(*(plain_q(bar, batch.o_t, next_a, j) for j in range(2)))
      y = batch.r_t + d * (v - has_entropy * alpha * next_log_prob)

      def gaps(p, batch=batch, noise=noise, policy=policy):
        each = []
        for j in range(2):
          terms = []
          for k in range(n):
            u = noise.uniform[:, k]
            here, log_here = plain_draw(
              policy, batch.o_tm1, noise.samples_tm1[:, k]
            )
            there, log_there = plain_draw(
              policy, batch.o_t, noise.samples_t[:, k]
            )
            terms += [
              jnp.exp(plain_q(p, batch.o_tm1, u, j)) * 2**D,
              jnp.exp(plain_q(p, batch.o_tm1, here, j) - log_here),
              jnp.exp(plain_q(p, batch.o_tm1, there, j) - log_there),
            ]
          data = plain_q(p, batch.o_tm1, to_unit(batch.a_tm1), j)
          each.append(jnp.mean(jnp.log(sum(terms) / (3 * n)) - data))
        return each

      def critic_loss(p, batch=batch, y=y, weight=weight, gaps=gaps):
        total = weight * sum(gaps(p))
        for j in range(2):
          q = plain_q(p, batch.o_tm1, to_unit(batch.a_tm1), j)
          total += jnp.mean((q - y) ** 2)
        return total

      gap = np.mean(gaps(critic))
      loss_critic, gradient = jax.value_and_grad(critic_loss)(critic)
      critic = adam['c'].step(critic, gradient)
      if log_w is not None:
        slope = -np.exp(log_w) * (gap - gap_target)
        log_w = adam['w'].step(log_w, slope)

      def policy_loss(p, batch=batch, critic=critic, noise=noise, alpha=alpha):
        a, log_prob = plain_draw(p, batch.o_tm1, noise.tm1)
        q = [plain_q(critic, batch.o_tm1, a, j) for j in range(2)]
        return jnp.mean(alpha * log_prob - jnp.minimum(*q))

      _, log_prob = plain_draw(policy, batch.o_tm1, noise.tm1)
      loss_policy, gradient = jax.value_and_grad(policy_loss)(policy)
      policy = adam['p'].step(policy, gradient)
      slope = np.mean(-np.exp(log_alpha) * (np.asarray(log_prob) - 1.3))
      log_alpha = adam['a'].step(log_alpha, slope)
      bar = jax.tree.map(lambda n, o: 0.1 * n + 0.9 * o, critic, bar)

      state, info = update(state, batch, key)
      want = cql.Params(policy, critic, log_alpha, log_w)
      assert_close(state.params, want, rtol=1e-10)
      assert_close(state.target_critic, bar, rtol=1e-10)
      metrics = info.metrics
      assert_close(metrics['loss_critic'], loss_critic, rtol=1e-10)
      assert_close(metrics['loss_policy'], loss_policy, rtol=1e-10)
      assert_close(metrics['gap'], gap, rtol=1e-10)


@pytest.mark.parametrize('cosine', [True, False])
def test_iql_is_its_equations(cosine):
  config = iql.Config(
    gamma=0.8,
    policy_rate=0.03,
    critic_rate=0.02,
    target_rate=0.1,
    expectile=0.8,
    temperature=2.0,
    max_weight=3.0,
    cosine=cosine,
    total_updates=4,
  )
  with jax.enable_x64(True):
    rng = np.random.default_rng(3)
    policy = plain_params(rng, F, D) | {'log_std': jnp.array([-0.3, 0.2])}
    critic, bar = (plain_params(rng, F + D, 1, 2) for _ in range(2))
    value = plain_params(rng, F, 1)
    params = iql.Params(policy, critic, value)
    agent, state = plain_state(iql, config, params, target_critic=bar)
    adam = {n: PlainAdam(r) for n, r in zip('pcv', (0.03, 0.02, 0.02))}
    update, clipped = jax.jit(agent.update), 0
    for i in range(5):
      batch = plain_batch(rng)
      done, d = to_unit(batch.a_tm1), 0.8 * batch.discount_t
      q_bar = np.min([plain_q(bar, batch.o_tm1, done, j) for j in (0, 1)], 0)

      def value_loss(p, batch=batch, q_bar=q_bar):
        u = q_bar - plain(p, batch.o_tm1)[:, 0]
        return jnp.mean(jnp.abs(0.8 - (u < 0)) * u**2)

      loss_value, gradient = jax.value_and_grad(value_loss)(value)
      value = adam['v'].step(value, gradient)
      advantage = q_bar - np.asarray(plain(value, batch.o_tm1))[:, 0]
      weight = np.minimum(np.exp(2 * advantage), 3.0)
      clipped += (weight == 3.0).sum()

      def policy_loss(p, batch=batch, done=done, weight=weight):
        mean = jnp.tanh(plain(p, batch.o_tm1))
        log_std = jnp.tile(p['log_std'], (B, 1))
        z = (done - mean) / jnp.exp(log_std)
        each = -(z**2) / 2 - log_std - math.log(2 * math.pi) / 2
        return -jnp.mean(weight * each.sum(-1))

      loss_policy, gradient = jax.value_and_grad(policy_loss)(policy)
      share = 0.5 * (1 + np.cos(np.pi * min(i / 4, 1))) if cosine else 1.0
      policy = adam['p'].step(policy, gradient, rate=0.03 * share)
      y = batch.r_t + d * plain(value, batch.o_t)[:, 0]

      def critic_loss(p, batch=batch, done=done, y=y):
        q = [plain_q(p, batch.o_tm1, done, j) for j in range(2)]
        return sum(jnp.mean((x - y) ** 2) for x in q)

      loss_critic, gradient = jax.value_and_grad(critic_loss)(critic)
      critic = adam['c'].step(critic, gradient)
      bar = jax.tree.map(lambda n, o: 0.1 * n + 0.9 * o, critic, bar)

      state, info = update(state, batch, jax.random.key(i))
      want = iql.Params(policy, critic, value)
      assert_close(state.params, want, rtol=1e-10)
      assert_close(state.target_critic, bar, rtol=1e-10)
      metrics = info.metrics
      assert_close(metrics['loss_value'], loss_value, rtol=1e-10)
      assert_close(metrics['loss_policy'], loss_policy, rtol=1e-10)
      assert_close(metrics['loss_critic'], loss_critic, rtol=1e-10)
    assert clipped > 0


# Limits and identities.


def test_cql_without_its_penalty_is_sac(key):
  batch = make_batch()
  names = ('policy_rate', 'critic_rate', 'temperature_rate')
  shared = dict.fromkeys(names, 3e-3) | SMALL
  config = cql.Config(penalty=0.0, deterministic_backup=False, **shared)
  ours = make_agent(cql, config)
  theirs = make_agent(sac, sac.Config(**shared))
  state, want = ours.init(key), theirs.init(key)
  update, plain_update = jax.jit(ours.update), jax.jit(theirs.update)
  for i in range(3):
    k = jax.random.fold_in(key, i)
    state, info = update(state, batch, k)
    want, want_info = plain_update(want, batch, k)
    for name, x in want_info.metrics.items():
      np.testing.assert_allclose(info.metrics[name], x, rtol=1e-5, err_msg=name)
  for name, x in want.params._asdict().items():
    assert_close(getattr(state.params, name), x, rtol=1e-6)
  assert_close(state.target_critic, want.target_critic, rtol=1e-6)


def test_the_soft_maximum_is_an_integral(key):
  # Of exp(q) over the unit square, by importance sampling and by a grid.
  box = actor_critic.squash(LOW, HIGH)
  rows = lambda *x: jnp.array([x], jnp.float32)
  gaussians = (
    Gaussian(rows(0.5, -0.2), rows(1.2, 1.4)),
    Gaussian(rows(-0.9, 0.3), rows(1.5, 1.1)),
  )
  noise = conservative.draw_noise(key, jnp.zeros((1, D)), 100_000)
  actions, densities = conservative.candidates(box, *gaussians, noise)
  assert actions.shape == (1, 300_000, D) and densities.shape == (1, 300_000)

  def q(unit):
    return 2 * unit[..., 0] - 3 * np.square(unit[..., 1] - 0.5)

  centre, half = (LOW + HIGH) / 2, (HIGH - LOW) / 2
  unit = (np.asarray(actions) - centre) / half
  got = conservative.soft_maximum(jnp.asarray(q(unit)), densities)
  line = (np.arange(400) + 0.5) / 200 - 1
  grid = np.stack(np.meshgrid(line, line), -1)
  want = np.log(np.exp(q(grid)).mean() * 4)
  np.testing.assert_allclose(got, [want], atol=0.01)


def test_the_multiplier_follows_the_gap(key):
  config = AGENTS['cql lagrange'].config
  batch = make_batch()

  @jax.jit
  def run(gap_target):
    agent = conformance.make('cql lagrange', gap_target=gap_target)
    state, info = agent.update(agent.init(key), batch, key)
    return jnp.exp(state.params.log_multiplier), info.metrics['penalty']

  low, start = run(-50.0)
  high, _ = run(50.0)
  np.testing.assert_allclose(start, config.penalty, rtol=1e-6)
  # Adam's first step is its rate.
  assert_close(low, config.penalty * np.exp(3e-4), rtol=1e-5)
  assert_close(high, config.penalty * np.exp(-3e-4), rtol=1e-5)


# Known answers.


ONE_STATE = Spec(ArraySpec((1,)), UNIT)


def test_iql_finds_expectile_and_weighted_imitation():
  # Actions -1/2 and 1/2, as often, give 0 and 1. Where tau (1 - v) is
  # (1 - tau) v the value is tau; a normal's likelihood under weights
  # exp(3 (q - tau)) is largest at their mean and deviation.
  config = iql.Config(
    hidden_sizes=(16,),
    policy_rate=3e-3,
    critic_rate=3e-3,
    target_rate=0.05,
    expectile=0.7,
    temperature=3.0,
    cosine=False,
  )
  action = jnp.repeat(jnp.array([[-0.5], [0.5]]), 8, 0)
  reward = (action[:, 0] > 0).astype(jnp.float32)
  here = jnp.ones((16, 1))
  batch = Transition(here, action, reward, jnp.zeros(16), here)
  networks = iql.make_networks(config, ONE_STATE)
  agent = make_agent(iql, config, ONE_STATE, networks)
  start = agent.init(jax.random.key(0))
  state, _ = train(agent, start, lambda key: batch, 3000)
  v = networks.value.apply(state.params.value, here)
  np.testing.assert_allclose(v, np.full(16, 0.7), atol=0.01)
  gaussian = networks.policy.apply(state.params.policy, here)
  mean = 0.5 * math.tanh(1.5)
  np.testing.assert_allclose(np.tanh(gaussian.mean[0]), [mean], atol=0.01)
  std = math.sqrt(0.25 - mean**2)
  np.testing.assert_allclose(gaussian.std[0], [std], atol=0.01)


def test_cql_stays_where_the_data_are():
  # Rewards rise with the action, and data end at 0: whoever goes on beyond
  # them relies on what has never been seen.
  action = jnp.linspace(-0.8, 0.0, 64)[:, None]
  here = jnp.ones((64, 1))
  batch = Transition(here, action, action[:, 0], jnp.zeros(64), here)
  spec, line = ONE_STATE, jnp.linspace(-1, 1, 41)[:, None]

  @jax.jit
  @jax.vmap
  def run(penalty):
    config = cql.Config(
      hidden_sizes=(16, 16),
      policy_rate=3e-3,
      critic_rate=3e-3,
      temperature_rate=3e-3,
      num_samples=8,
      penalty=penalty,
    )
    networks = cql.make_networks(config, spec)
    agent = make_agent(cql, config, spec, networks)
    start = agent.init(jax.random.key(0))
    state, metrics = train(agent, start, lambda key: batch, 1000)
    q = networks.critic.apply(state.params.critic, jnp.ones((41, 1)), line)
    best, _ = agent.exploit(
      state.params, jax.random.key(0), make_timestep(jnp.ones((1, 1)))
    )
    return q.min(0), best[0, 0], metrics['gap'][-1]

  q, best, gap = run(jnp.array([0.0, 2.0]))
  beyond = np.asarray(line)[:, 0] > 0.3
  within = (np.asarray(line)[:, 0] > -0.7) & (np.asarray(line)[:, 0] < -0.1)
  assert q[0][beyond].mean() > q[0][within].mean()
  assert q[1][beyond].max() < q[1][within].min()
  assert best[0] > 0.2 and -0.8 < best[1] < 0.1
  assert gap[1] < gap[0] - 0.2
