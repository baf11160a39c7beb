"""SAC, BC and TD3+BC: against plain equations, their limits, known answers."""

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
  assert_close,
  make_agent,
  make_batch,
  make_timestep,
  stack,
)

from agents import bc, sac, td3_bc
from agents.core.types import (
  Agent,
  ArraySpec,
  Continuous,
  Discrete,
  Spec,
  Transition,
)
from networks import actor_critic
from networks.mlp import Network

SMALL = {'hidden_sizes': (8,)}
AGENTS = {
  'sac': (sac, sac.Config(**SMALL)),
  'sac dqra': (
    sac,
    sac.Config(residual_weight=0.5, layer_norm=True, normalise=True, **SMALL),
  ),
  'bc': (bc, bc.Config(**SMALL)),
  'bc floor': (bc, bc.Config(min_entropy=-2.0, normalise=True, **SMALL)),
  'bc squared': (bc, bc.Config(loss='squared', layer_norm=True, **SMALL)),
  'td3_bc': (td3_bc, td3_bc.Config(**SMALL)),
  'td3': (
    td3_bc,
    td3_bc.Config(behaviour_cloning=False, normalise=False, **SMALL),
  ),
  'td3_bc dqra': (
    td3_bc,
    td3_bc.Config(residual_weight=0.5, layer_norm=True, **SMALL),
  ),
}


class Built(NamedTuple):
  """An agent with its compiled functions and an update's inputs."""

  module: Any
  config: Any
  agent: Agent
  state: Any
  batch: Transition
  donating: Callable
  update: Callable
  traces: list[int]


def train(agent, state, batch, updates, seed=2):
  """Many updates on one batch in one program: the state, the last metrics."""

  def one(state, key):
    state, info = agent.update(state, batch, key)
    return state, info.metrics

  @jax.jit
  def run(state):
    keys = jax.random.split(jax.random.key(seed), updates)
    return jax.lax.scan(one, state, keys)

  state, metrics = run(state)
  return state, jax.tree.map(lambda x: x[-updates // 10 :].mean(), metrics)


@pytest.fixture(scope='module', params=AGENTS)
def built(request):
  module, config = AGENTS[request.param]
  agent = make_agent(module, config)
  traces = [0]

  def update(state, batch, key):
    traces[0] += 1
    return agent.update(state, batch, key)

  donating = jax.jit(update, donate_argnums=0)
  return Built(
    module=module,
    config=config,
    agent=agent,
    state=jax.jit(agent.init)(jax.random.key(1)),
    batch=make_batch(),
    donating=donating,
    update=lambda state, *rest: donating(jax.tree.map(jnp.copy, state), *rest),
    traces=traces,
  )


def pick(*names):
  return pytest.mark.parametrize('built', names, indirect=True)


one_of_each = pick('sac dqra', 'bc floor', 'td3_bc dqra')


def due(state):
  """The state where the next update is one of the policy, too."""
  return (
    state._replace(step=state.step + 1) if hasattr(state, 'step') else state
  )


# Conformance.


def test_update_is_stable_and_traced_once(built, key):
  state = built.state
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for i in range(3):
    old, key = state, jax.random.fold_in(key, i)
    state, info = built.update(state, built.batch, key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    for name, x in info.metrics.items():
      assert (x.shape, x.dtype) == ((), jnp.float32), name
      assert np.isfinite(x), name
    assert any(
      (np.asarray(a) != np.asarray(b)).any()
      for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(state))
    )
  assert built.traces[0] == 1


def test_state_can_be_donated(built, key):
  # Two leaves in one buffer would be refused.
  state = jax.jit(built.agent.init)(key)
  for _ in range(2):
    state, _ = built.donating(state, built.batch, key)
  assert np.isfinite(jax.tree.leaves(state)[0]).all()


def test_actions_are_within_bounds_and_explore(built, key):
  timestep = make_timestep(built.batch.o_tm1)
  act, exploit = jax.jit(built.agent.act), jax.jit(built.agent.exploit)
  drawn = []
  for i in range(5):
    action, extras = act(
      built.state.params, jax.random.fold_in(key, i), timestep
    )
    assert extras == {}
    assert (action.shape, action.dtype) == ((B, D), jnp.float32)
    assert (action >= LOW[None]).all() and (action <= HIGH[None]).all()
    drawn.append(np.asarray(action))
  best, _ = exploit(built.state.params, key, timestep)
  again, _ = exploit(built.state.params, jax.random.key(7), timestep)
  np.testing.assert_array_equal(best, again)
  assert (best >= LOW[None]).all() and (best <= HIGH[None]).all()
  is_deterministic = getattr(built.config, 'loss', '') == 'squared'
  assert (np.ptp(drawn, 0).max() > 0) != is_deterministic


def test_td3_explores_as_far_as_its_config_says(key):
  config = td3_bc.Config(exploration_noise=0.02, target_noise=0.4, **SMALL)
  agent = make_agent(td3_bc, config)
  params = agent.init(key).params
  timestep = make_timestep(make_batch().o_tm1)
  best, _ = agent.exploit(params, key, timestep)
  unit = lambda key: to_unit(agent.act(params, key, timestep)[0])
  step = jax.vmap(unit)(jax.random.split(key, 500)) - to_unit(best)[None]
  np.testing.assert_allclose(jnp.std(step), 0.02, rtol=0.1)


def test_evaluation_tells_of_the_losses(built, key):
  metrics = jax.jit(built.agent.evaluate)(built.state.params, built.batch, key)
  _, info = built.update(built.state, built.batch, key)
  assert set(metrics) <= set(info.metrics)
  # At first the targets are the parameters, and the critics' loss the update's.
  name = 'loss_policy' if built.module is bc else 'loss_critic'
  if built.config != AGENTS['bc floor'][1]:  # whose temperature moved first
    np.testing.assert_allclose(metrics[name], info.metrics[name], rtol=1e-5)


@pick('sac', 'bc floor', 'td3_bc dqra')
@pytest.mark.slow
def test_jit_equals_eager(built, key):
  assert_close(
    built.update(built.state, built.batch, key),
    built.agent.update(built.state, built.batch, key),
  )


@one_of_each
def test_seeds_in_one_scan_equal_a_loop(built, key):
  keys = jax.random.split(key, (2, 3))
  states = [jax.jit(built.agent.init)(k) for k in keys[:, 0]]

  @jax.jit
  @jax.vmap
  def together(state, keys):
    one = lambda s, k: built.agent.update(s, built.batch, k)
    return jax.lax.scan(one, state, keys)

  got, _ = together(stack(*states), keys)
  for i, state in enumerate(states):
    for k in keys[i]:
      state, _ = built.update(state, built.batch, k)
    states[i] = state
  assert_close(got, stack(*states))


@one_of_each
def test_every_float_of_a_config_may_be_traced(built, key):
  config = built.config
  names = [
    f.name
    for f in dataclasses.fields(config)
    if isinstance(getattr(config, f.name), float)
  ]
  if built.module is sac:
    names.append('target_entropy')
  values = {
    name: np.float32([0.9, 1.1]) * (getattr(config, name) or -1.0)
    for name in names
  }
  for name in {'gamma', 'residual_weight'} & set(names):
    values[name] = np.float32([0.9, 1.0])

  def run(floats):
    agent = make_agent(built.module, dataclasses.replace(config, **floats))
    state, info = agent.update(due(built.state), built.batch, key)
    return state, info.metrics

  got = jax.jit(jax.vmap(run))(values)
  plain_floats = {name: float(x[0]) for name, x in values.items()}
  want = jax.jit(functools.partial(run, plain_floats))()
  assert_close(jax.tree.map(lambda x: x[0], got), want)
  for leaf in jax.tree.leaves(got[0].params.policy['layers']):
    assert (np.asarray(leaf[0]) != np.asarray(leaf[1])).any()


@one_of_each
def test_two_devices_equal_one(built, key):
  # No noise, each half of the batch on its own, gradients and means of both.
  config = built.config
  if built.module is td3_bc:
    config = dataclasses.replace(config, target_noise=0.0)
  networks = built.module.make_networks(config, SPEC)
  sample = networks.box.sample
  networks = networks._replace(
    box=networks.box._replace(sample=lambda e, g: sample(jnp.zeros_like(e), g))
  )
  alone = make_agent(built.module, config, networks=networks)
  mean = functools.partial(jax.lax.pmean, axis_name='devices')
  shared = make_agent(built.module, config, networks=networks, reduce=mean)
  halves = jax.tree.map(
    lambda x: x.reshape(2, B // 2, *x.shape[1:]), built.batch
  )

  @jax.jit
  def both(state):
    together = jax.vmap(shared.update, (None, 0, None), axis_name='devices')
    want = alone.update(state, built.batch, key)
    return together(state, halves, key), want

  got, want = both(due(built.state))
  # Adam divides gradients by their size: rounding errors of small ones show.
  assert_close(got, stack(want, want), tolerance=2e-5)


# The equations, in float64, with networks of the test's own.


def make_plain(rng, outputs, inputs, members=None):
  """Parameters of `tanh(x A + a) C + c`, an ensemble's with members."""
  head = () if members is None else (members,)
  normal = lambda *shape: jnp.asarray(rng.normal(size=head + shape) * 0.5)
  return {
    'A': normal(inputs, 5),
    'a': normal(5),
    'C': normal(5, outputs),
    'c': normal(outputs),
  }


def plain(p, x):
  tile = lambda v: jnp.tile(v, (x.shape[0], 1))
  return jnp.tanh(x @ p['A'] + tile(p['a'])) @ p['C'] + tile(p['c'])


MIDDLE, HALF = (LOW + HIGH) / 2, (HIGH - LOW) / 2


def to_unit(a):
  return (a - np.tile(MIDDLE, (B, 1))) / np.tile(HALF, (B, 1))


def plain_q(p, o, unit, i):
  one = {name: x[i] for name, x in p.items()}
  return plain(one, jnp.concatenate([o, unit], -1))[:, 0]


def plain_mean_std(p, o):
  out = plain(p, o)
  return out[:, :D], jnp.exp(out[:, D:])


def plain_log_prob(mean, std, raw):
  normal = -jnp.square((raw - mean) / std) / 2 - jnp.log(std)
  normal = normal - math.log(2 * math.pi) / 2
  return jnp.sum(normal - jnp.log(1 - jnp.tanh(raw) ** 2), -1)


def plain_draw(p, o, noise):
  mean, std = plain_mean_std(p, o)
  raw = mean + std * noise
  return jnp.tanh(raw), plain_log_prob(mean, std, raw)


def plain_networks(module):
  def policy(p, o):
    return actor_critic.Gaussian(*plain_mean_std(p, o))

  def critic(p, o, a):
    members = range(p['A'].shape[0])
    return jnp.stack([plain_q(p, o, to_unit(a), i) for i in members])

  none = lambda key: None
  nets = {
    'policy': Network(none, policy),
    'critic': Network(none, critic),
    'box': actor_critic.squash(LOW, HIGH),
  }
  return module.Networks(**{n: nets[n] for n in module.Networks._fields})


def plain_batch(rng):
  discount = np.ones(B)
  discount[1::4] = 0
  return Transition(
    o_tm1=jnp.asarray(rng.normal(size=(B, F))),
    a_tm1=jnp.asarray(LOW + (HIGH - LOW) * rng.uniform(0.1, 0.9, (B, D))),
    r_t=jnp.asarray(rng.normal(size=B)),
    discount_t=jnp.asarray(discount),
    o_t=jnp.asarray(rng.normal(size=(B, F))),
  )


class PlainAdam:
  """Kingma and Ba's Algorithm 1, in NumPy."""

  def __init__(self, rate):
    self.rate, self.count, self.m, self.v = rate, 0, None, None

  def step(self, params, gradients):
    if self.m is None:
      self.m = self.v = jax.tree.map(np.zeros_like, gradients)
    self.count += 1
    mix = lambda rate, old, new: rate * old + (1 - rate) * new
    self.m = jax.tree.map(lambda m, g: mix(0.9, m, g), self.m, gradients)
    self.v = jax.tree.map(lambda v, g: mix(0.999, v, g * g), self.v, gradients)
    hat = lambda x, beta: np.asarray(x) / (1 - beta**self.count)
    return jax.tree.map(
      lambda p, m, v: (
        p - self.rate * hat(m, 0.9) / (np.sqrt(hat(v, 0.999)) + 1e-8)
      ),
      params,
      self.m,
      self.v,
    )


def plain_state(module, config, params, targets):
  """The agent's state with the parameters of the test's own networks."""
  networks = plain_networks(module)
  fill = networks._asdict()
  for name in ('policy', 'critic'):
    if name in fill:
      own = params._asdict()[name]
      fill[name] = fill[name]._replace(init=lambda key, own=own: own)
  agent = make_agent(module, config, networks=module.Networks(**fill))
  # `init` makes the optimisers' states; the targets are others.
  state = agent.init(jax.random.key(0))._replace(params=params, **targets)
  if hasattr(params, 'log_temperature'):
    wide = lambda x: x.astype(float) if x.dtype == jnp.float32 else x
    moments = jax.tree.map(wide, state.opt_state.log_temperature)
    opt_state = state.opt_state._replace(log_temperature=moments)
    state = state._replace(opt_state=opt_state)
  return agent, state


@pytest.mark.parametrize('weight', [1.0, 0.3])
def test_sac_is_its_equations(weight):
  config = sac.Config(
    gamma=0.8,
    policy_rate=0.03,
    critic_rate=0.02,
    temperature_rate=0.05,
    target_rate=0.1,
    target_entropy=-1.3,
    residual_weight=weight,
  )
  with jax.enable_x64(True):
    rng = np.random.default_rng(3)
    policy, critic = make_plain(rng, 2 * D, F), make_plain(rng, 1, F + D, 2)
    bar, log_alpha = make_plain(rng, 1, F + D, 2), jnp.asarray(-0.4)
    params = sac.Params(policy, critic, log_alpha)
    agent, state = plain_state(sac, config, params, {'target_critic': bar})
    rates = {'policy': 0.03, 'critic': 0.02, 'alpha': 0.05}
    adam = {name: PlainAdam(rate) for name, rate in rates.items()}

    def soft(bar, policy, alpha, batch, noise):
      a, log_prob = plain_draw(policy, batch.o_t, noise)
      q_bar = [plain_q(bar, batch.o_t, a, j) for j in range(2)]
      return a, -alpha * log_prob, jnp.minimum(*q_bar) - alpha * log_prob

    def critic_loss(p, batch, a, bonus, v):
      total, d = 0.0, 0.8 * batch.discount_t
      for j in range(2):
        q = plain_q(p, batch.o_tm1, to_unit(batch.a_tm1), j)
        td = q - (batch.r_t + d * v)
        rs = q - (batch.r_t + d * (plain_q(p, batch.o_t, a, j) + bonus))
        total += jnp.mean(weight * td**2 + (1 - weight) * rs**2)
      return total

    def policy_loss(p, critic, alpha, batch, noise):
      a, log_prob = plain_draw(p, batch.o_tm1, noise)
      q = [plain_q(critic, batch.o_tm1, a, j) for j in range(2)]
      return jnp.mean(alpha * log_prob - jnp.minimum(*q)), log_prob

    critic_grad = jax.jit(jax.value_and_grad(critic_loss))
    policy_grad = jax.jit(jax.value_and_grad(policy_loss, has_aux=True))
    soft, update = jax.jit(soft), jax.jit(agent.update)
    for i in range(3):
      batch, key = plain_batch(rng), jax.random.key(i)
      noise, alpha = sac.draw_noise(key, batch.a_tm1), np.exp(log_alpha)
      a_bonus_v = soft(bar, policy, alpha, batch, noise.t)
      loss_critic, gradient = critic_grad(critic, batch, *a_bonus_v)
      critic = adam['critic'].step(critic, gradient)
      (loss_policy, log_prob), gradient = policy_grad(
        policy, critic, alpha, batch, noise.tm1
      )
      policy = adam['policy'].step(policy, gradient)
      gradient = np.mean(-alpha * (np.asarray(log_prob) - 1.3))
      log_alpha = adam['alpha'].step(log_alpha, gradient)
      bar = jax.tree.map(lambda n, o: 0.1 * n + 0.9 * o, critic, bar)

      state, info = update(state, batch, key)
      want = sac.Params(policy, critic, log_alpha)
      assert_close(state.params, want, tolerance=1e-10)
      assert_close(state.target_critic, bar, tolerance=1e-10)
      metrics = info.metrics
      assert_close(metrics['loss_critic'], loss_critic, tolerance=1e-10)
      assert_close(metrics['loss_policy'], loss_policy, tolerance=1e-10)
      assert_close(metrics['entropy'], -log_prob.mean(), tolerance=1e-10)


@pytest.mark.parametrize('weight', [1.0, 0.3])
@pytest.mark.parametrize('cloning', [True, False], ids=['td3_bc', 'td3'])
def test_td3_is_its_equations_with_and_without_the_cloning(cloning, weight):
  config = td3_bc.Config(
    behaviour_cloning=cloning,
    alpha=1.7,
    gamma=0.8,
    policy_rate=0.03,
    critic_rate=0.02,
    target_rate=0.1,
    policy_delay=2,
    target_noise=0.4,
    residual_weight=weight,
  )
  with jax.enable_x64(True):
    rng = np.random.default_rng(4)
    policy, critic = make_plain(rng, 2 * D, F), make_plain(rng, 1, F + D, 2)
    slow = td3_bc.Params(
      make_plain(rng, 2 * D, F), make_plain(rng, 1, F + D, 2)
    )
    params = td3_bc.Params(policy, critic)
    agent, state = plain_state(td3_bc, config, params, {'target_params': slow})
    adam = {'policy': PlainAdam(0.03), 'critic': PlainAdam(0.02)}
    pi = lambda p, o: jnp.tanh(plain_mean_std(p, o)[0])

    def backup(slow, batch, noise):
      noise = jnp.clip(0.4 * noise, -0.5, 0.5)
      a = jnp.clip(pi(slow.policy, batch.o_t) + noise, -1, 1)
      q_bar = [plain_q(slow.critic, batch.o_t, a, j) for j in range(2)]
      return a, batch.r_t + 0.8 * batch.discount_t * jnp.minimum(*q_bar)

    def critic_loss(p, batch, a, y):
      total, d = 0.0, 0.8 * batch.discount_t
      for j in range(2):
        q = plain_q(p, batch.o_tm1, to_unit(batch.a_tm1), j)
        rs = q - (batch.r_t + d * plain_q(p, batch.o_t, a, j))
        total += jnp.mean(weight * (q - y) ** 2 + (1 - weight) * rs**2)
      return total

    def policy_loss(p, critic, scale, batch):
      a = pi(p, batch.o_tm1)
      q = plain_q(critic, batch.o_tm1, a, 0)
      if not cloning:
        return -jnp.mean(q), q
      square = jnp.mean((a - to_unit(batch.a_tm1)) ** 2)
      return square - scale * jnp.mean(q), q

    critic_grad = jax.jit(jax.value_and_grad(critic_loss))
    policy_grad = jax.jit(jax.value_and_grad(policy_loss, has_aux=True))
    backup, update = jax.jit(backup), jax.jit(agent.update)
    for i in range(1, 5):
      batch, key = plain_batch(rng), jax.random.key(i)
      a_y = backup(slow, batch, jax.random.normal(key, (B, D)))
      loss_critic, gradient = critic_grad(critic, batch, *a_y)
      critic = adam['critic'].step(critic, gradient)
      (_, q), _ = policy_grad(policy, critic, 0.0, batch)
      scale = 1.7 / np.mean(np.abs(q))
      (loss_policy, _), gradient = policy_grad(policy, critic, scale, batch)
      if i % 2 == 0:
        policy = adam['policy'].step(policy, gradient)
        new = td3_bc.Params(policy, critic)
        slow = jax.tree.map(lambda n, o: 0.1 * n + 0.9 * o, new, slow)

      state, info = update(state, batch, key)
      want = td3_bc.Params(policy, critic)
      assert_close(state.params, want, tolerance=1e-10)
      assert_close(state.target_params, slow, tolerance=1e-10)
      assert_close(info.metrics['loss_critic'], loss_critic, tolerance=1e-10)
      assert_close(info.metrics['loss_policy'], loss_policy, tolerance=1e-10)
      if cloning:
        assert_close(info.metrics['lambda'], scale, tolerance=1e-10)


@pytest.mark.parametrize('kind', ['likelihood', 'squared', 'floor', 'high'])
def test_bc_is_its_equations(kind):
  has_floor = kind in ('floor', 'high')
  log_alpha = 0.5 if kind == 'high' else -0.4  # on both sides of alpha = 1
  config = bc.Config(
    loss='squared' if kind == 'squared' else 'likelihood',
    min_entropy=-1.3 if has_floor else None,
    policy_rate=0.03,
    temperature_rate=0.05,
  )
  with jax.enable_x64(True):
    rng = np.random.default_rng(5)
    policy, log_alpha = make_plain(rng, 2 * D, F), jnp.asarray(log_alpha)
    params = bc.Params(policy, log_alpha)
    agent, state = plain_state(bc, config, params, {})
    adam = {'policy': PlainAdam(0.03), 'alpha': PlainAdam(0.05)}

    def loss(p, alpha, batch, noise):
      done = to_unit(batch.a_tm1)
      mean, std = plain_mean_std(p, batch.o_tm1)
      _, drawn = plain_draw(p, batch.o_tm1, noise)
      entropy = -jnp.mean(drawn)
      nll = -jnp.mean(plain_log_prob(mean, std, jnp.arctanh(done)))
      total = {
        'likelihood': nll,
        'squared': jnp.mean((jnp.tanh(mean) - done) ** 2),
        'floor': nll - alpha * entropy,
        'high': nll / alpha - entropy,
      }
      return total[kind], entropy

    loss_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    update = jax.jit(agent.update)
    for i in range(3):
      batch, key = plain_batch(rng), jax.random.key(i)
      noise = jax.random.normal(key, (B, D))
      if has_floor:
        (_, entropy), _ = loss_grad(policy, np.exp(log_alpha), batch, noise)
        log_alpha = adam['alpha'].step(log_alpha, entropy + 1.3)
      (want, _), gradient = loss_grad(policy, np.exp(log_alpha), batch, noise)
      policy = adam['policy'].step(policy, gradient)
      state, info = update(state, batch, key)
      params = bc.Params(policy, log_alpha)
      assert_close(state.params, params, tolerance=1e-10)
      assert_close(info.metrics['loss_policy'], want, tolerance=1e-10)


# Limits and identities.


@pick('td3_bc')
def test_td3_bc_lies_between_td3_and_cloning(built, key):
  # Adam does not see the size of a gradient: alpha to infinity is TD3's step,
  # alpha 0 that of behaviour cloning by least squares.
  state, batch = due(built.state), built.batch

  @jax.jit
  def step(alpha):
    config = dataclasses.replace(built.config, alpha=alpha)
    return make_agent(td3_bc, config).update(state, batch, key)[0].params

  config = dataclasses.replace(built.config, behaviour_cloning=False)
  td3 = jax.jit(make_agent(td3_bc, config).update)(state, batch, key)[0].params
  clone = make_agent(bc, bc.Config(loss='squared', normalise=True, **SMALL))
  start = clone.init(key)
  start = start._replace(
    params=start.params._replace(policy=state.params.policy)
  )
  cloned = jax.jit(clone.update)(start, batch, key)[0].params

  assert_close(step(1e6), td3, tolerance=2e-6)
  assert_close(step(0.0).policy, cloned.policy, tolerance=1e-6)
  # One step moves a weight by 3e-4: the two ends are not the same.
  gap = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), td3.policy, cloned.policy
  )
  assert max(jax.tree.leaves(gap)) > 1e-4


@pick('sac', 'td3_bc')
def test_a_residual_weight_of_one_is_the_plain_loss(built, key):
  @jax.jit
  def run(weight):  # a tracer takes the long way
    config = dataclasses.replace(built.config, residual_weight=weight)
    return make_agent(built.module, config).update(
      built.state, built.batch, key
    )

  want = built.update(built.state, built.batch, key)
  assert_close(run(1.0), want)
  _, mixed = run(0.2)
  gap = mixed.metrics['loss_critic'] - want[1].metrics['loss_critic']
  assert abs(gap) > 1e-4


@pick('sac', 'sac dqra', 'td3_bc', 'td3_bc dqra')
def test_termination_cuts_the_bootstrap(built, key):
  far = jax.tree.map(lambda x: x + 1.0, built.batch.o_t)
  for discount, is_cut in ((jnp.zeros(B), True), (jnp.ones(B), False)):
    here = built.batch._replace(discount_t=discount)
    one, two = (
      built.update(built.state, batch, key)[0].params.critic
      for batch in (here, here._replace(o_t=far))
    )
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, two)
    assert (max(jax.tree.leaves(gap)) == 0) == is_cut


@one_of_each
def test_statistics_normalise_and_are_not_trained(built, key):
  params = built.state.params
  flat = actor_critic.flatten(built.batch.o_tm1)
  mean, std = (np.tile(x, (B, 1)) for x in STATISTICS)
  flat = (flat - mean) / std
  scaled = {'angle': flat[:, :2, None], 'speed': flat[:, 2:]}
  raw_config = dataclasses.replace(built.config, normalise=False)
  raw = make_agent(built.module, raw_config)
  identity = {'mean': jnp.zeros(F), 'std': jnp.ones(F)}
  other = params._replace(policy=params.policy | {'statistics': identity})
  got, _ = built.agent.exploit(params, key, make_timestep(built.batch.o_tm1))
  want, _ = raw.exploit(other, key, make_timestep(scaled))
  assert_close(got, want)
  state = built.state
  for _ in range(3):
    state, _ = built.update(state, built.batch, key)
  kept = state.params.policy['statistics']
  np.testing.assert_array_equal(kept['mean'], STATISTICS[0])
  np.testing.assert_array_equal(kept['std'], STATISTICS[1])


# Known answers.


@pytest.mark.parametrize('module', [sac, td3_bc])
def test_time_limits_bootstrap_and_terminations_do_not(module):
  # Reward 1 for ever, cut by a time limit only: 1 / (1 - gamma). Else 1.
  shared = {'gamma': 0.8, 'target_rate': 0.1, 'critic_rate': 0.01, **SMALL}
  if module is sac:
    shared |= {'init_temperature': 1e-6, 'temperature_rate': 0.0}
  else:
    shared |= {'normalise': False}
  spec = Spec(ArraySpec((2,)), UNIT)
  state_of = jnp.repeat(jnp.eye(2), 16, 0)
  batch = Transition(
    o_tm1=state_of,
    a_tm1=jnp.tile(jnp.linspace(-1, 1, 16)[:, None], (2, 1)),
    r_t=jnp.ones(32),
    discount_t=jnp.repeat(jnp.array([1.0, 0.0]), 16),
    o_t=state_of,
  )

  @jax.jit
  @jax.vmap
  def run(weight):
    config = module.Config(residual_weight=weight, **shared)
    agent = make_agent(module, config, spec)
    state, _ = train(agent, agent.init(jax.random.key(0)), batch, 1500)
    critic = module.make_networks(config, spec).critic
    return critic.apply(state.params.critic, batch.o_tm1, batch.a_tm1)

  q = run(jnp.array([1.0, 0.5]))
  want = np.tile(np.repeat([5.0, 1.0], 16), (2, 2, 1))
  np.testing.assert_allclose(q, want, atol=0.2)


BANDIT = Spec(ArraySpec((1,)), UNIT)
CONTEXT = jnp.repeat(jnp.array([[-1.0], [1.0]]), 64, 0)


def make_bandit():
  """Best action 0.4 times the context; the data's lie around -0.1 times it."""
  noise = np.random.default_rng(0).normal(size=(128, 1))
  raw = -0.1 * np.asarray(CONTEXT) + 0.8 * noise
  action = jnp.asarray(np.tanh(raw), jnp.float32)
  reward = 5 - 4 * jnp.abs(action - 0.4 * CONTEXT)[:, 0]
  batch = Transition(CONTEXT, action, reward, jnp.zeros(128), CONTEXT)
  return batch, raw


def best_of(agent, state):
  timestep = make_timestep(jnp.array([[-1.0], [1.0]]))
  action, _ = agent.exploit(state.params, jax.random.key(0), timestep)
  return np.asarray(action)[:, 0]


def learn(module, batch, updates=1500, **changes):
  changes = {'hidden_sizes': (32, 32), 'policy_rate': 3e-3} | changes
  config = module.Config(**changes)
  agent = make_agent(module, config, BANDIT)
  state = agent.init(jax.random.key(0))
  state, metrics = train(agent, state, batch, updates)
  return agent, state, metrics


def test_sac_finds_the_best_action_at_its_entropy():
  batch, _ = make_bandit()
  agent, state, metrics = learn(
    sac,
    batch,
    critic_rate=3e-3,
    policy_rate=1e-3,
    temperature_rate=1e-2,
    target_entropy=-0.5,
  )
  np.testing.assert_allclose(best_of(agent, state), [-0.4, 0.4], atol=0.1)
  np.testing.assert_allclose(metrics['entropy'], -0.5, atol=0.1)


def test_td3_finds_the_best_action_and_cloning_holds_it_back():
  batch, raw = make_bandit()
  shared = {'critic_rate': 3e-3, 'policy_rate': 1e-3, 'normalise': False}
  agent, state, _ = learn(td3_bc, batch, behaviour_cloning=False, **shared)
  np.testing.assert_allclose(best_of(agent, state), [-0.4, 0.4], atol=0.1)
  agent, state, metrics = learn(td3_bc, batch, alpha=0.5, **shared)
  # Where 2 (a - behaviour) is lambda 4, short of the best action.
  behaviour = np.tanh(raw).reshape(2, 64).mean(-1)
  held = behaviour + 2 * metrics['lambda'] * np.array([-1, 1])
  np.testing.assert_allclose(best_of(agent, state), held, atol=0.05)
  assert (np.abs(held) < 0.3).all()


def test_bc_finds_the_behaviour():
  batch, raw = make_bandit()
  agent, state, _ = learn(bc, batch)
  rows = raw.reshape(2, 64)
  # The likelihood is largest at the mean and deviation before the squashing.
  np.testing.assert_allclose(
    best_of(agent, state), np.tanh(rows.mean(-1)), atol=0.02
  )
  config = bc.Config(hidden_sizes=(32, 32))
  policy = bc.make_networks(config, BANDIT).policy
  std = policy.apply(state.params.policy, jnp.array([[-1.0], [1.0]])).std
  np.testing.assert_allclose(std[:, 0], rows.std(-1), rtol=0.05)
  agent, state, _ = learn(bc, batch, loss='squared')
  means = np.tanh(rows).mean(-1)
  np.testing.assert_allclose(best_of(agent, state), means, atol=0.02)


def test_the_floor_holds_the_entropy_where_data_have_less():
  # Theirs, of deviation 0.05 before the squashing, is -1.75.
  batch, raw = make_bandit()
  noise = (raw + 0.1 * np.asarray(CONTEXT)) / 0.8
  raw = np.arctanh(0.4) * np.asarray(CONTEXT) + 0.05 * noise
  batch = batch._replace(a_tm1=jnp.asarray(np.tanh(raw), jnp.float32))
  agent, state, metrics = learn(
    bc, batch, min_entropy=-1.0, temperature_rate=1e-2
  )
  np.testing.assert_allclose(metrics['entropy'], -1.0, atol=0.1)
  np.testing.assert_allclose(best_of(agent, state), [-0.4, 0.4], atol=0.05)


# Errors.


@pytest.mark.parametrize(
  'module, field, value',
  [
    (sac, 'gamma', 1.5),
    (sac, 'target_rate', -0.1),
    (sac, 'residual_weight', math.nan),
    (sac, 'critic_rate', -1.0),
    (sac, 'init_temperature', 0.0),
    (sac, 'target_entropy', math.inf),
    (bc, 'loss', 'hinge'),
    (bc, 'policy_rate', math.inf),
    (bc, 'init_temperature', -1.0),
    (bc, 'min_entropy', math.nan),
    (td3_bc, 'policy_delay', 0),
    (td3_bc, 'alpha', -2.5),
    (td3_bc, 'target_noise', -0.2),
    (td3_bc, 'gamma', -0.1),
  ],
)
def test_a_bad_config_is_refused(module, field, value):
  with pytest.raises(ValueError, match=f'{field}={value}: must be'):
    module.Config(**{field: value})


def test_a_floor_under_a_deterministic_policy_is_refused():
  with pytest.raises(ValueError, match=r'min_entropy=-1.0: must be None'):
    bc.Config(loss='squared', min_entropy=-1.0)


@pytest.mark.parametrize('module', [sac, bc, td3_bc])
def test_a_spec_that_does_not_fit_is_refused(module):
  make = lambda **changes: module.make_networks(
    module.Config(normalise=True, **SMALL), SPEC._replace(**changes)
  )
  with pytest.raises(ValueError, match='continuous actions; environment has D'):
    make(action=Discrete(3))
  square = np.ones((2, 2), np.float32)
  with pytest.raises(ValueError, match='vectors of continuous actions'):
    make(action=Continuous((2, 2), -square, square))
  with pytest.raises(ValueError, match='high=inf must be finite'):
    make(action=Continuous((2,), LOW, np.float32([1, np.inf])))
  with pytest.raises(ValueError, match='normalise=True: environment has no'):
    make(statistics=None)
  with pytest.raises(ValueError, match='must be 3 each'):
    short = tuple(x[:2] for x in STATISTICS)
    module.make_networks(
      module.Config(normalise=True, **SMALL), SPEC._replace(statistics=short)
    ).policy.init(jax.random.key(0))
