"""CQL and IQL: against plain equations, their limits, known answers."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
  make_timestep,
  plain,
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

from agents import cql, iql, sac
from agents.core import conservative
from agents.core.types import (
  Agent,
  ArraySpec,
  Continuous,
  Discrete,
  Spec,
  Transition,
)
from networks import actor_critic
from networks.actor_critic import Gaussian
from networks.mlp import Network

SMALL = {'hidden_sizes': (8,)}
AGENTS = {
  'cql': (
    cql,
    cql.Config(num_samples=3, layer_norm=True, normalise=True, **SMALL),
  ),
  'cql lagrange': (
    cql,
    cql.Config(
      num_samples=2, gap_target=1.0, deterministic_backup=False, **SMALL
    ),
  ),
  'iql': (iql, iql.Config(**SMALL)),
  'iql constant rate': (
    iql,
    iql.Config(cosine=False, layer_norm=True, normalise=True, **SMALL),
  ),
}


class Built(NamedTuple):
  """An agent with its compiled update and an update's inputs."""

  module: Any
  config: Any
  agent: Agent
  state: Any
  batch: Transition
  update: Callable
  traces: list[int]


@functools.cache
def build(name):
  module, config = AGENTS[name]
  agent, traces = make_agent(module, config), [0]

  def update(state, batch, key):
    traces[0] += 1
    return agent.update(state, batch, key)

  return Built(
    module=module,
    config=config,
    agent=agent,
    state=jax.jit(agent.init)(jax.random.key(1)),
    batch=make_batch(),
    update=jax.jit(update),
    traces=traces,
  )


@pytest.fixture(params=AGENTS)
def built(request):
  return build(request.param)


one_of_each = pytest.mark.parametrize(
  'built', ['cql lagrange', 'iql'], indirect=True
)


# Conformance.


def test_update_is_stable_and_traced_once(built, key):
  state = built.state
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for i in range(3):
    old = state
    state, info = built.update(state, built.batch, jax.random.fold_in(key, i))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    for name, x in info.metrics.items():
      assert (x.shape, x.dtype) == ((), jnp.float32), name
      assert np.isfinite(x), name
    for name in ('policy', 'critic'):
      before, after = (
        jax.tree.leaves(getattr(x.params, name)['layers']) for x in (old, state)
      )
      assert all((a != b).any() for a, b in zip(before, after))
  assert built.traces[0] == 1


@one_of_each
def test_state_can_be_donated(built, key):
  update = jax.jit(built.agent.update, donate_argnums=0)
  state = jax.jit(built.agent.init)(key)
  for _ in range(2):
    state, _ = update(state, built.batch, key)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_actions_are_within_bounds_and_explore(built, key):
  timestep = make_timestep(built.batch.o_tm1)
  act, exploit = jax.jit(built.agent.act), jax.jit(built.agent.exploit)
  params, drawn = built.state.params, []
  for i in range(5):
    action, extras = act(params, jax.random.fold_in(key, i), timestep)
    assert extras == {}
    assert (action.shape, action.dtype) == ((B, D), jnp.float32)
    assert (action >= LOW[None]).all() and (action <= HIGH[None]).all()
    drawn.append(np.asarray(action))
  assert (np.std(drawn, 0) > 0).all()
  best, _ = exploit(params, key, timestep)
  again, _ = exploit(params, jax.random.key(7), timestep)
  np.testing.assert_array_equal(best, again)
  # A policy whose noise is none would do that.
  gaussian = built.module.make_networks(built.config, SPEC).policy.apply(
    params.policy, built.batch.o_tm1
  )
  unit = np.tanh(gaussian.mean)
  want = (LOW + HIGH)[None] / 2 + (HIGH - LOW)[None] / 2 * unit
  np.testing.assert_allclose(best, want, rtol=1e-5)


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


def test_evaluation_tells_of_the_losses(built, key):
  metrics = jax.jit(built.agent.evaluate)(built.state.params, built.batch, key)
  _, info = built.update(built.state, built.batch, key)
  assert set(metrics) <= set(info.metrics)
  # At first the targets are the parameters; what comes first is the update's.
  name = 'loss_value' if built.module is iql else 'loss_critic'
  np.testing.assert_allclose(metrics[name], info.metrics[name], rtol=1e-5)


@one_of_each
@pytest.mark.slow
def test_jit_equals_eager(built, key):
  assert_close(
    built.update(built.state, built.batch, key),
    built.agent.update(built.state, built.batch, key),
  )


@one_of_each
def test_vmap_over_seeds_equals_a_loop(built, key):
  keys = jax.random.split(key)
  states = [built.agent.init(k) for k in keys]
  together = jax.jit(jax.vmap(built.agent.update, in_axes=(0, None, 0)))
  got = together(stack(*states), built.batch, keys)
  alone = [built.update(s, built.batch, k) for s, k in zip(states, keys)]
  assert_close(got, stack(*alone))


@one_of_each
def test_scan_equals_a_loop(built, key):
  keys = jax.random.split(key, 3)
  run = lambda s: jax.lax.scan(
    lambda s, k: built.agent.update(s, built.batch, k), s, keys
  )
  got, _ = jax.jit(run)(built.state)
  want = built.state
  for k in keys:
    want, _ = built.update(want, built.batch, k)
  assert_close(got, want)


@one_of_each
def test_every_float_of_a_config_may_be_traced(built, key):
  config = built.config
  values = {
    f.name: np.float32([0.9, 0.95]) * getattr(config, f.name)
    for f in dataclasses.fields(config)
    if isinstance(getattr(config, f.name), float)
  }

  def run(floats):
    agent = make_agent(built.module, dataclasses.replace(config, **floats))
    state, info = agent.update(agent.init(key), built.batch, key)
    return state, info.metrics

  got = jax.jit(jax.vmap(run))(values)
  second = {name: float(x[1]) for name, x in values.items()}
  want = jax.jit(functools.partial(run, second))()
  assert_close(jax.tree.map(lambda x: x[1], got), want, tolerance=1e-4)


@one_of_each
def test_two_devices_equal_one(built, key):
  # No noise, each half of the batch on its own, gradients and means of both.
  networks = built.module.make_networks(built.config, SPEC)
  sample, from_unit = networks.box.sample, networks.box.from_unit
  box = networks.box._replace(
    sample=lambda e, g: sample(jnp.zeros_like(e), g),
    from_unit=lambda u: from_unit(jnp.zeros_like(u)),
  )
  networks = networks._replace(box=box)
  mean = functools.partial(jax.lax.pmean, axis_name='devices')
  alone, shared = (
    make_agent(built.module, built.config, networks=networks, **reduce)
    for reduce in ({}, {'reduce': mean})
  )
  halves = jax.tree.map(
    lambda x: x.reshape(2, B // 2, *x.shape[1:]), built.batch
  )

  @jax.jit
  def both(state):
    together = jax.vmap(shared.update, (None, 0, None), axis_name='devices')
    return together(state, halves, key), alone.update(state, built.batch, key)

  got, want = both(built.state)
  # Adam divides gradients by their size: rounding errors of small ones show.
  assert_close(got, stack(want, want), tolerance=2e-5)


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
      assert_close(state.params, want, tolerance=1e-10)
      assert_close(state.target_critic, bar, tolerance=1e-10)
      metrics = info.metrics
      assert_close(metrics['loss_critic'], loss_critic, tolerance=1e-10)
      assert_close(metrics['loss_policy'], loss_policy, tolerance=1e-10)
      assert_close(metrics['gap'], gap, tolerance=1e-10)


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
      assert_close(state.params, want, tolerance=1e-10)
      assert_close(state.target_critic, bar, tolerance=1e-10)
      metrics = info.metrics
      assert_close(metrics['loss_value'], loss_value, tolerance=1e-10)
      assert_close(metrics['loss_policy'], loss_policy, tolerance=1e-10)
      assert_close(metrics['loss_critic'], loss_critic, tolerance=1e-10)
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
    assert_close(getattr(state.params, name), x, tolerance=1e-6)
  assert_close(state.target_critic, want.target_critic, tolerance=1e-6)


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
  module, config = AGENTS['cql lagrange']
  batch = make_batch()

  @jax.jit
  def run(gap_target):
    agent = make_agent(
      module, dataclasses.replace(config, gap_target=gap_target)
    )
    state, info = agent.update(agent.init(key), batch, key)
    return jnp.exp(state.params.log_multiplier), info.metrics['penalty']

  low, start = run(-50.0)
  high, _ = run(50.0)
  np.testing.assert_allclose(start, config.penalty, rtol=1e-6)
  # Adam's first step is its rate.
  assert_close(low, config.penalty * np.exp(3e-4), tolerance=1e-5)
  assert_close(high, config.penalty * np.exp(-3e-4), tolerance=1e-5)


@pytest.mark.parametrize('built', ['cql', 'iql'], indirect=True)
def test_termination_cuts_the_bootstrap(built, key):
  far = jax.tree.map(lambda x: x + 1.0, built.batch.o_t)
  config = built.config
  if built.module is cql:
    # The penalty looks at next states, too; that is not the bootstrap.
    config = dataclasses.replace(config, penalty=0.0)
  update = jax.jit(make_agent(built.module, config).update)
  for discount, is_cut in ((jnp.zeros(B), True), (jnp.ones(B), False)):
    here = built.batch._replace(discount_t=discount)
    one, two = (
      update(built.state, batch, key)[0].params.critic
      for batch in (here, here._replace(o_t=far))
    )
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, two)
    assert (max(jax.tree.leaves(gap)) == 0) == is_cut


@pytest.mark.parametrize('built', ['cql', 'iql constant rate'], indirect=True)
def test_statistics_normalise_and_are_not_trained(built, key):
  flat = actor_critic.flatten(built.batch.o_tm1)
  flat = (flat - STATISTICS[0][None]) / STATISTICS[1][None]
  scaled = {'angle': flat[:, :2, None], 'speed': flat[:, 2:]}
  plain_agent = make_agent(
    built.module, dataclasses.replace(built.config, normalise=False)
  )
  identity = {'mean': jnp.zeros(F), 'std': jnp.ones(F)}
  params = built.state.params
  other = params._replace(policy=params.policy | {'statistics': identity})
  got, _ = built.agent.exploit(params, key, make_timestep(built.batch.o_tm1))
  want, _ = plain_agent.exploit(other, key, make_timestep(scaled))
  assert_close(got, want)
  state, _ = built.update(built.state, built.batch, key)
  for part in (state.params.policy, state.params.critic):
    for name, x in zip(('mean', 'std'), STATISTICS):
      kept = part['statistics'][name]
      np.testing.assert_array_equal(kept, np.broadcast_to(x, kept.shape))


# Known answers.


@pytest.mark.parametrize('module', [cql, iql])
def test_time_limits_bootstrap_and_terminations_do_not(module):
  # Reward 1 for ever, cut by a time limit only: 1 / (1 - gamma). Else 1.
  shared = {'gamma': 0.8, 'target_rate': 0.1, 'critic_rate': 0.01, **SMALL}
  if module is cql:
    shared |= {'penalty': 0.0, 'num_samples': 1}
  config, spec = module.Config(**shared), Spec(ArraySpec((2,)), UNIT)
  state_of = jnp.repeat(jnp.eye(2), 16, 0)
  batch = Transition(
    o_tm1=state_of,
    a_tm1=jnp.tile(jnp.linspace(-1, 1, 16)[:, None], (2, 1)),
    r_t=jnp.ones(32),
    discount_t=jnp.repeat(jnp.array([1.0, 0.0]), 16),
    o_t=state_of,
  )
  networks = module.make_networks(config, spec)
  agent = make_agent(module, config, spec, networks)
  start = agent.init(jax.random.key(0))
  state, _ = train(agent, start, lambda key: batch, 1500)
  q = networks.critic.apply(state.params.critic, batch.o_tm1, batch.a_tm1)
  want = np.tile(np.repeat([5.0, 1.0], 16), (2, 1))
  np.testing.assert_allclose(q, want, atol=0.2)


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


# Errors.


@pytest.mark.parametrize(
  'module, field, value',
  [
    (cql, 'gamma', 1.5),
    (cql, 'target_rate', -0.1),
    (cql, 'penalty', -1.0),
    (cql, 'num_samples', 0),
    (cql, 'critic_rate', math.inf),
    (cql, 'init_temperature', 0.0),
    (cql, 'gap_target', math.nan),
    (iql, 'gamma', math.nan),
    (iql, 'expectile', 1.0),
    (iql, 'temperature', -1.0),
    (iql, 'max_weight', 0.0),
    (iql, 'total_updates', 0),
  ],
)
def test_a_bad_setting_is_refused(module, field, value):
  with pytest.raises(ValueError, match=f'^{field}={value}: must be'):
    module.Config(**{field: value})


def test_a_multiplier_cannot_grow_from_nothing():
  with pytest.raises(ValueError, match='penalty=0: must be above 0'):
    cql.Config(penalty=0.0, gap_target=1.0)


@pytest.mark.parametrize('module', [cql, iql])
def test_a_bad_spec_is_refused(module):
  config = module.Config(**SMALL)
  unbounded = Continuous((1,), np.float32([-np.inf]), np.float32([1]))
  for spec, message in (
    (SPEC._replace(action=Discrete(3)), 'needs vectors of continuous actions'),
    (SPEC._replace(action=unbounded), 'low=-inf must be finite'),
  ):
    with pytest.raises(ValueError, match=message):
      module.make_networks(config, spec)
  config = dataclasses.replace(config, normalise=True)
  with pytest.raises(ValueError, match=r'normalise=True: .*no statistics'):
    module.make_networks(config, SPEC._replace(statistics=None))
