"""ATAC against a plain float64 re-implementation, its limits, small tasks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import AGENTS
from offline_cases import HIGH, LOW, SPEC, UNIT, D, F, make_batch_with_starts
from trees import assert_close

from agents import atac
from agents.core.types import ArraySpec, Spec
from networks import actor_critic
from networks.actor_critic import flatten
from networks.mlp import Network

H = 5  # the width of the test's own networks
LINE = Spec(ArraySpec((1,)), UNIT)
SMALL = AGENTS['atac'].config


def build(config, spec=SPEC, networks=None, is_game=True, **changes):
  networks = networks or atac.make_networks(config, spec)
  losses = atac.make_losses()._replace(**changes)
  warm_start, game = atac.make_phases(config, networks, losses, spec)
  return game.agent if is_game else warm_start.agent


# --- One update, written again: each critic on its own, in float64.


def plain_net(params, x):
  """A hidden layer and a linear one."""
  hidden = x @ params['in']['kernel'] + params['in']['bias'][None]
  hidden = jnp.maximum(hidden, 0)
  return hidden @ params['out']['kernel'] + params['out']['bias'][None]


def plain_gaussian(params, observation):
  out = plain_net(params, flatten(observation))
  return actor_critic.Gaussian(out[:, :D], jnp.exp(0.3 * out[:, D:]))


def plain_q(params, observation, action):
  unit = (action - (LOW + HIGH)[None] / 2) / ((HIGH - LOW)[None] / 2)
  return plain_net(params, jnp.concatenate([flatten(observation), unit], 1))[
    :, 0
  ]


def plain_networks():
  """Networks that compute in the dtype of their parameters."""

  def init(inputs, outputs):
    def of(key):
      one, two = jax.random.split(key)
      return {
        'in': {
          'kernel': jax.random.normal(one, (inputs, H)) * 0.7,
          'bias': jnp.full(H, 0.1),
        },
        'out': {
          'kernel': jax.random.normal(two, (H, outputs)) * 0.5,
          'bias': jnp.full(outputs, -0.2),
        },
      }

    return of

  return atac.Networks(
    Network(init(F, 2 * D), plain_gaussian),
    Network(
      lambda key: jax.vmap(init(F + D, 1))(jax.random.split(key)),
      jax.vmap(plain_q, (0, None, None)),
    ),
    actor_critic.squash(LOW, HIGH),
  )


def log_normal(raw, gaussian):
  """Log-density `[B, D]` of tanh(raw) in the unit box."""
  normal = -0.5 * ((raw - gaussian.mean) / gaussian.std) ** 2
  normal = normal - jnp.log(gaussian.std) - 0.5 * np.log(2 * np.pi)
  # The slope of tanh is cosh^-2.
  return normal + 2 * (jnp.logaddexp(raw, -raw) - np.log(2))


def to_box(raw):
  return (LOW + HIGH)[None] / 2 + (HIGH - LOW)[None] / 2 * jnp.tanh(raw)


def adam(params, memory, gradient, rate):
  count, first, second = memory
  count += 1
  first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
  second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, gradient)
  step = lambda p, m, v: (
    p
    - rate * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8)
  )
  params = jax.tree.map(step, params, first, second)
  return params, (count, first, second)


def over(loss, regulariser, weight):
  if weight > 1:
    return loss / weight + regulariser
  return loss + weight * regulariser


class Plain:
  """The official order of steps, with as little structure as possible."""

  def __init__(self, config, state, is_game):
    copy = lambda tree: jax.tree.map(jnp.array, tree)
    zeros = lambda x: (0, *(jax.tree.map(jnp.zeros_like, x),) * 2)
    self.config, self.is_game = config, is_game
    self.policy = copy(state.params.policy)
    take = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    self.critics = [take(state.params.critic, i) for i in (0, 1)]
    self.targets = [take(state.target_critic, i) for i in (0, 1)]
    self.log_alpha = state.params.log_temperature
    self.policy_memory = zeros(self.policy)
    self.critic_memory = [zeros(c) for c in self.critics]
    self.alpha_memory = zeros(self.log_alpha)

  def update(self, batch, noise):
    c, (s, a, r, live, s2, _, s0) = self.config, batch
    mean_dims = c.entropy_mode == 'per_dim'
    total = lambda x: jnp.mean(x.mean(1) if mean_dims else x.sum(1))

    def act(policy, observation, noise):
      gaussian = plain_gaussian(policy, observation)
      raw = gaussian.mean + gaussian.std * noise
      return to_box(raw), -total(log_normal(raw, gaussian)), gaussian

    a2, _, _ = act(self.policy, s2, noise.t)
    new, entropy, _ = act(self.policy, s, noise.tm1)
    first, _, _ = act(self.policy, s0, noise.first)
    least = jnp.minimum(*(plain_q(t, s2, a2) for t in self.targets))
    if c.value_clip:
      least = jnp.clip(least, *c.value_clip)
    y = r + c.gamma * live * least

    def critic_loss(f):
      td = jnp.mean((plain_q(f, s, a) - y) ** 2)
      own = r + c.gamma * live * plain_q(f, s2, a2)
      residual = jnp.mean((plain_q(f, s, a) - own) ** 2)
      bellman = c.residual_weight * td + (1 - c.residual_weight) * residual
      if not self.is_game:
        return bellman
      if c.pessimism == 'initial':
        pessimism = jnp.mean(plain_q(f, s0, first))
      else:
        pessimism = jnp.mean(plain_q(f, s, new) - plain_q(f, s, a))
      return over(pessimism, bellman, c.beta)

    losses = [critic_loss(f) for f in self.critics]
    for i in (0, 1):
      gradient = jax.grad(critic_loss)(self.critics[i])
      f, self.critic_memory[i] = adam(
        self.critics[i], self.critic_memory[i], gradient, c.fast_rate
      )
      for layer in f.values():
        norm = np.sqrt(np.sum(np.asarray(layer['kernel']) ** 2))
        layer['kernel'] = layer['kernel'] * min(c.radius / norm, 1)
      self.critics[i] = f

    floor = -D if c.target_entropy is None else c.target_entropy
    self.log_alpha, self.alpha_memory = adam(
      self.log_alpha, self.alpha_memory, entropy - floor, c.fast_rate
    )
    alpha = float(jnp.exp(self.log_alpha))

    def policy_loss(policy):
      new, entropy, gaussian = act(policy, s, noise.tm1)
      if self.is_game:
        score = jnp.mean(plain_q(self.critics[c.actor_critic], s, new))
      else:
        unit = (a - (LOW + HIGH)[None] / 2) / ((HIGH - LOW)[None] / 2)
        score = total(log_normal(jnp.arctanh(unit), gaussian))
      return over(-score, -entropy, alpha)

    loss, gradient = jax.value_and_grad(policy_loss)(self.policy)
    rate = c.slow_rate if self.is_game else c.fast_rate
    self.policy, self.policy_memory = adam(
      self.policy, self.policy_memory, gradient, rate
    )
    self.targets = [
      jax.tree.map(
        lambda t, f: (1 - c.target_rate) * t + c.target_rate * f, *both
      )
      for both in zip(self.targets, self.critics)
    ]
    return {
      'loss_critic': losses[0] + losses[1],
      'loss_policy': loss,
      'entropy': entropy,
      'temperature': alpha,
    }


def stacked(critics):
  return jax.tree.map(lambda *x: jnp.stack(x), *critics)


PLAIN = dataclasses.replace(SMALL, fast_rate=2e-3, slow_rate=1e-3)
VARIANTS = {
  'relative': ({}, True),
  'initial': ({'pessimism': 'initial', 'actor_critic': 1}, True),
  'per_dim': (
    {'entropy_mode': 'per_dim', 'value_clip': (-0.2, 0.3), 'radius': 1.2},
    True,
  ),
  'warm start': ({'residual_weight': 0.7, 'target_entropy': 0.5}, False),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_updates_equal_a_plain_reimplementation(variant):
  changes, is_game = VARIANTS[variant]
  with jax.enable_x64(True):
    networks = plain_networks()
    config = dataclasses.replace(PLAIN, **changes)

    @jax.jit
    def update(beta, state, batch, key):
      traced = dataclasses.replace(config, beta=beta)
      return build(traced, networks=networks, is_game=is_game).update(
        state, batch, key
      )

    state = build(config, networks=networks).init(jax.random.key(1))
    # Targets of their own.
    other = networks.critic.init(jax.random.key(2))
    start = jax.tree.map(
      lambda x: x.astype(float) if x.dtype == jnp.float32 else x,
      state._replace(target_critic=other),
    )
    for beta in (
      (0.0, 0.3, 1.0, 16.0) if variant in ('relative', 'initial') else (4.0,)
    ):
      state = start
      plain = Plain(dataclasses.replace(config, beta=beta), state, is_game)
      for i in range(3):
        key, batch = jax.random.key(i), make_batch_with_starts(i)
        batch = jax.tree.map(lambda x: x.astype(float), batch)
        noise = atac.draw_noise(key, batch.a_tm1)
        state, info = update(beta, state, batch, key)
        metrics = plain.update(batch, noise)
        assert state.params.policy['in']['kernel'].dtype == np.float64
        assert_close(
          {name: info.metrics[name] for name in metrics}, metrics, 1e-10
        )
        assert_close(state.params.policy, plain.policy, 1e-10)
        assert_close(state.params.critic, stacked(plain.critics), 1e-10)
        assert_close(state.target_critic, stacked(plain.targets), 1e-10)
        assert_close(state.params.log_temperature, plain.log_alpha, 1e-10)
      # Something has happened to each part; without Bellman's equation nothing
      # moves a critic up or down.
      if beta == 0:
        continue
      moved = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a - b)).max(), state.params, start.params
      )
      assert min(jax.tree.leaves(moved)) > 1e-4
