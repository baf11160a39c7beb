"""COMBO: plans and imagines in its model, its limits, its equations."""

import dataclasses

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import AGENTS, MODEL
from offline_cases import (
  HIGH,
  LOW,
  SPEC,
  B,
  D,
  F,
  PlainAdam,
  make_agent,
  make_batch,
  make_mixed,
  make_observation,
  make_timestep,
  plain_batch,
  plain_critic,
  plain_draw,
  plain_gaussian,
  plain_params,
  plain_q,
  to_unit,
)
from test_agents_model import fixed_ensemble
from trees import assert_close, assert_equal

from agents import combo, cql, dynamics
from agents.core import conservative, rollout
from agents.core.types import Mixed, Transition
from networks import actor_critic
from networks.mlp import Network

COMBO = AGENTS['combo'].config


@pytest.mark.parametrize('rollouts', ['policy', 'uniform'])
def test_imagined_rollouts_are_those_of_a_loop(rollouts, key):
  config = dataclasses.replace(COMBO, rollouts=rollouts)
  networks = combo.make_networks(config, SPEC)
  state = conformance.built('combo').state
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
    assert_close(got, want, rtol=1e-4)
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


def test_combos_model_has_its_policy_and_value(key):
  networks = combo.make_networks(COMBO, SPEC)
  built = conformance.built('combo')
  agent, state, batch = built.agent, built.state, built.batch
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
        rtol=1e-6,
      )
    assert_close(state.target_critic, right.target_critic, rtol=1e-6)
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
    assert_close(info.metrics['loss_critic'], want, rtol=1e-10)
    stepped = PlainAdam(0.02).step(critic, gradient)
    assert_close(new.params.critic, stepped, rtol=1e-10)

    def policy_loss(p):
      action, log_prob = plain_draw(p, rows.o_tm1, noise.tm1)
      q = [plain_q(new.params.critic, rows.o_tm1, action, j) for j in range(2)]
      return by_kind(log_prob - jnp.minimum(*q), f)

    want, gradient = jax.value_and_grad(policy_loss)(policy)
    assert_close(info.metrics['loss_policy'], want, rtol=1e-10)
    stepped = PlainAdam(config.policy_rate).step(policy, gradient)
    assert_close(new.params.policy, stepped, rtol=1e-10)


def test_the_model_learns_first_and_is_handed_on(key):
  networks = combo.make_networks(COMBO, SPEC)
  losses = combo.make_losses()
  first, second = combo.make_phases(COMBO, networks, losses, SPEC)
  assert (first.name, first.updates, first.transfer) == ('model', 5, None)
  assert (second.name, second.updates) == ('policy', None)
  assert first.agent.act is None and first.imagine is None
  start = jax.jit(first.agent.init)(key)
  state, _ = jax.jit(first.agent.update)(start, make_batch(0, size=32), key)
  assert_equal(state.policy, start.policy)
  assert_close(
    first.agent.evaluate(state.params, make_batch(1), key)['loss'],
    make_agent(dynamics, MODEL).evaluate(
      state.model.params, make_batch(1), key
    )['loss'],
  )
  after = second.transfer(state)
  assert_equal(after.params.model, state.model.params)
  shapes = jax.eval_shape(second.agent.init, key)
  assert jax.tree.structure(after) == jax.tree.structure(shapes)
  done, _ = conformance.built('combo').update(after, make_mixed(), key)
  assert_equal(done.params.model, state.model.params)
  rows = second.imagine(done, make_observation(np.random.default_rng(0)), key)
  assert rows.r_t.shape == (3 * B,)
