"""ATAC against a plain float64 re-implementation, its limits, small tasks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import assert_close, assert_equal

from agents import atac
from agents.core.types import ArraySpec, Continuous, Discrete, Spec, Transition
from networks import actor_critic
from networks.mlp import Network
from search.model import TimeStep

B, D, F, H = 6, 2, 3, 5
LOW, HIGH = np.float32([-2, 0.5]), np.float32([-1, 3])
SPEC = Spec(
  {'x': ArraySpec((F - 1,)), 'y': ArraySpec(())}, Continuous((D,), LOW, HIGH)
)
LINE = Spec(
  ArraySpec((1,)), Continuous((1,), np.float32([-1]), np.float32([1]))
)
# Rates so large that a wrong one would show.
RATES = {'fast_rate': 1e-2, 'slow_rate': 3e-3, 'target_rate': 0.1}
SMALL = atac.Config(hidden_sizes=(8,), gamma=0.9, **RATES)


def make_batch(rng, dtype=np.float32):
  observe = lambda: {
    'x': jnp.asarray(np.float32(rng.normal(size=(B, F - 1))), dtype),
    'y': jnp.asarray(np.float32(rng.normal(size=B)), dtype),
  }
  share = 0.05 + 0.9 * rng.random((B, D))
  return Transition(
    o_tm1=observe(),
    a_tm1=jnp.asarray(np.float32(LOW + (HIGH - LOW) * share), dtype),
    r_t=jnp.asarray(rng.normal(size=B), dtype),
    discount_t=jnp.asarray(np.arange(B) % 3 > 0, dtype),
    o_t=observe(),
    o_0=observe(),
  )


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


def lay(observation):
  return jnp.concatenate([observation['x'], observation['y'][:, None]], 1)


def plain_gaussian(params, observation):
  out = plain_net(params, lay(observation))
  return actor_critic.Gaussian(out[:, :D], jnp.exp(0.3 * out[:, D:]))


def plain_q(params, observation, action):
  unit = (action - (LOW + HIGH)[None] / 2) / ((HIGH - LOW)[None] / 2)
  return plain_net(params, jnp.concatenate([lay(observation), unit], 1))[:, 0]


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
    networks, rng = plain_networks(), np.random.default_rng(3)
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
        key, batch = jax.random.key(i), make_batch(rng, np.float64)
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
  batch = make_batch(np.random.default_rng(0))

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


def test_statistics_and_zero_reduce(game):
  _, state, batch = game
  # A step whose gradient is not reduced would move.
  networks = atac.make_networks(SMALL, SPEC)
  zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
  agent = atac.make(SMALL, networks, atac.make_losses(), SPEC, zero)
  new, info = jax.jit(agent.update)(state, batch, jax.random.key(0))
  assert_equal(new.params, state.params)
  assert not any(info.metrics.values())

  statistics = (np.float32([1, 2, 3]), np.float32([2, 4, 8]))
  config = dataclasses.replace(SMALL, normalise=True)
  spec = SPEC._replace(statistics=statistics)
  agent = build(config, spec)
  own = jax.jit(agent.init)(jax.random.key(0))
  assert_equal(own.params.policy['statistics']['mean'], statistics[0])
  new, _ = jax.jit(agent.update)(own, batch, jax.random.key(0))
  for part in ('policy', 'critic'):
    before, after = (getattr(s.params, part)['statistics'] for s in (own, new))
    assert_equal(after, before)


# --- Conformance.


def test_update_is_stable_and_traced_once(key):
  config = dataclasses.replace(SMALL, pessimism='initial')
  agent, traces = build(config), [0]

  def update(state, batch, key):
    traces[0] += 1
    return agent.update(state, batch, key)

  batch = make_batch(np.random.default_rng(1))
  state = jax.jit(agent.init)(key)
  kept = jax.tree.map(np.array, state)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  compiled = jax.jit(update, donate_argnums=0)
  for i in range(3):
    state, info = compiled(state, batch, jax.random.fold_in(key, i))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    for name, x in info.metrics.items():
      assert x.shape == () and x.dtype == jnp.float32, name
      assert np.isfinite(x), name
    assert info.priorities is None
  assert traces[0] == 1
  start = jax.tree.map(jnp.asarray, kept)
  first = compiled(start, batch, jax.random.fold_in(key, 0))
  eager = agent.update(kept, batch, jax.random.fold_in(key, 0))
  assert_close(first, eager, 2e-5)


def test_vmap_over_beta_and_seeds_equals_a_loop(key):
  batch = make_batch(np.random.default_rng(2))

  def train(beta, rate, key):
    config = dataclasses.replace(SMALL, beta=beta, slow_rate=rate)
    agent = build(config)

    def step(state, i):
      state, info = agent.update(state, batch, jax.random.fold_in(key, i))
      return state, info.metrics

    return jax.lax.scan(step, agent.init(key), jnp.arange(3))

  betas = jnp.float32([0, 1 / 256, 1, 64])
  rates = jnp.float32([1e-3, 1e-2, 1e-2, 1e-3])
  keys = jax.random.split(key, 4)
  together = jax.jit(jax.vmap(train))(betas, rates, keys)
  one = jax.jit(train)
  alone = [one(*row) for row in zip(betas, rates, keys)]
  assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *alone), 1e-4)


def test_actions_and_held_out_losses(game, key):
  run, state, batch = game
  agent = build(dataclasses.replace(SMALL, beta=1.0))
  zeros = jnp.zeros(B)
  timestep = TimeStep(
    batch.o_tm1, zeros, zeros + 1, zeros.astype(bool), zeros.astype(bool)
  )
  act, exploit = jax.jit(agent.act), jax.jit(agent.exploit)
  drawn = [
    act(state.params, jax.random.fold_in(key, i), timestep) for i in range(3)
  ]
  for action, extras in drawn:
    assert extras == {} and action.shape == (B, D)
    assert action.dtype == jnp.float32
    assert ((action >= LOW[None]) & (action <= HIGH[None])).all()
  assert (drawn[0][0] != drawn[1][0]).all()
  mode, extras = exploit(state.params, key, timestep)
  assert extras == {}
  assert_equal(exploit(state.params, jax.random.key(5), timestep)[0], mode)

  # With targets that are the critics, it is what an update sees.
  own = state._replace(target_critic=state.params.critic)
  _, info = run(state=own)
  got = jax.jit(agent.evaluate)(state.params, batch, jax.random.key(7))
  assert set(got) < set(info.metrics)
  for name in ('loss_critic', 'pessimism', 'td_error', 'residual', 'entropy'):
    np.testing.assert_allclose(got[name], info.metrics[name], rtol=1e-5)


# --- Small tasks whose answers are known.


def train(agent, state, batch, updates):
  @jax.jit
  def run(state):
    def step(state, i):
      state, info = agent.update(state, batch, jax.random.key(i))
      return state, info.metrics

    return jax.lax.scan(step, state, jnp.arange(updates))

  state, metrics = run(state)
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
    train(agent, state, line(actions, 1.0, discount), 1500)[1]
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
    return train(agent, state, batch, 1500)

  floors = jnp.float32([-2.0, 0.5])
  _, metrics = jax.vmap(clone)(floors)
  assert natural < 0.3
  np.testing.assert_allclose(metrics['entropy'], [natural, 0.5], atol=0.05)
  assert metrics['temperature'][0] < 0.01 < metrics['temperature'][1]


def timestep_of(batch):
  x = batch.r_t
  return TimeStep(batch.o_tm1, x, x, x.astype(bool), x.astype(bool))


def test_the_game_finds_the_better_actions_of_a_bandit():
  actions = np.linspace(-0.95, 0.95, 64)
  batch = line(actions, -4 * (actions - 0.5) ** 2, 0.0)
  config = dataclasses.replace(
    TASK, hidden_sizes=(16, 16), beta=16.0, target_entropy=-2.0, slow_rate=1e-4
  )
  networks = atac.make_networks(config, LINE)
  first, second = atac.make_phases(config, networks, atac.make_losses(), LINE)
  state = jax.jit(first.agent.init)(jax.random.key(0))
  state, _ = train(first.agent, state, batch, 500)
  mode = lambda s: second.agent.exploit(s.params, None, timestep_of(batch))[0]
  # The behaviour's is 0.
  assert abs(mode(state)).max() < 0.2
  state, _ = train(second.agent, second.transfer(state), batch, 3000)
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


def test_bad_specs_and_batches_are_refused(game):
  _, state, batch = game
  with pytest.raises(ValueError, match='continuous actions'):
    atac.make_networks(SMALL, SPEC._replace(action=Discrete(3)))
  endless = Continuous((1,), np.float32([-np.inf]), np.float32([1]))
  with pytest.raises(ValueError, match='low=-inf must be finite'):
    atac.make_networks(SMALL, SPEC._replace(action=endless))
  wanted = dataclasses.replace(SMALL, normalise=True)
  with pytest.raises(ValueError, match='normalise=True'):
    atac.make_networks(wanted, SPEC)
  with pytest.raises(ValueError, match='min_std=2'):
    atac.make_networks(dataclasses.replace(SMALL, min_std=2.0), SPEC)
  initial = build(dataclasses.replace(SMALL, pessimism='initial'))
  with pytest.raises(ValueError, match='no first observations o_0'):
    initial.update(state, batch._replace(o_0=None), jax.random.key(0))
