"""SAC, BC and TD3+BC: against plain equations, their limits, known answers."""

import math

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from offline_cases import (
  HIGH,
  LOW,
  UNIT,
  B,
  D,
  F,
  PlainAdam,
  make_agent,
  make_batch,
  make_timestep,
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

from agents import bc, sac, td3_bc
from agents.core.types import (
  ArraySpec,
  Spec,
  Transition,
)
from networks import actor_critic
from networks.mlp import Network

SMALL = {'hidden_sizes': (8,)}


def test_td3_explores_as_far_as_its_config_says(key):
  config = td3_bc.Config(exploration_noise=0.02, target_noise=0.4, **SMALL)
  agent = make_agent(td3_bc, config)
  params = agent.init(key).params
  timestep = make_timestep(make_batch().o_tm1)
  best, _ = agent.exploit(params, key, timestep)
  unit = lambda key: to_unit(agent.act(params, key, timestep)[0])
  step = jax.vmap(unit)(jax.random.split(key, 500)) - to_unit(best)[None]
  np.testing.assert_allclose(jnp.std(step), 0.02, rtol=0.1)


# The equations, in float64, with networks of the test's own.


def plain_log_prob(mean, std, raw):
  normal = -jnp.square((raw - mean) / std) / 2 - jnp.log(std)
  normal = normal - math.log(2 * math.pi) / 2
  return jnp.sum(normal - jnp.log(1 - jnp.tanh(raw) ** 2), -1)


def plain_networks(module):
  none = lambda key: None
  nets = {
    'policy': Network(none, plain_gaussian),
    'critic': Network(none, plain_critic),
    'box': actor_critic.squash(LOW, HIGH),
  }
  return module.Networks(**{n: nets[n] for n in module.Networks._fields})


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
    policy, critic = plain_params(rng, F, 2 * D), plain_params(rng, F + D, 1, 2)
    bar, log_alpha = plain_params(rng, F + D, 1, 2), jnp.asarray(-0.4)
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
      assert_close(state.params, want, rtol=1e-10)
      assert_close(state.target_critic, bar, rtol=1e-10)
      metrics = info.metrics
      assert_close(metrics['loss_critic'], loss_critic, rtol=1e-10)
      assert_close(metrics['loss_policy'], loss_policy, rtol=1e-10)
      assert_close(metrics['entropy'], -log_prob.mean(), rtol=1e-10)


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
    policy, critic = plain_params(rng, F, 2 * D), plain_params(rng, F + D, 1, 2)
    slow = td3_bc.Params(
      plain_params(rng, F, 2 * D), plain_params(rng, F + D, 1, 2)
    )
    params = td3_bc.Params(policy, critic)
    agent, state = plain_state(td3_bc, config, params, {'target_params': slow})
    adam = {'policy': PlainAdam(0.03), 'critic': PlainAdam(0.02)}
    pi = lambda p, o: jnp.tanh(plain_gaussian(p, o).mean)

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
      assert_close(state.params, want, rtol=1e-10)
      assert_close(state.target_params, slow, rtol=1e-10)
      assert_close(info.metrics['loss_critic'], loss_critic, rtol=1e-10)
      assert_close(info.metrics['loss_policy'], loss_policy, rtol=1e-10)
      if cloning:
        assert_close(info.metrics['lambda'], scale, rtol=1e-10)


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
    policy, log_alpha = plain_params(rng, F, 2 * D), jnp.asarray(log_alpha)
    params = bc.Params(policy, log_alpha)
    agent, state = plain_state(bc, config, params, {})
    adam = {'policy': PlainAdam(0.03), 'alpha': PlainAdam(0.05)}

    def loss(p, alpha, batch, noise):
      done = to_unit(batch.a_tm1)
      mean, std = plain_gaussian(p, batch.o_tm1)
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
      assert_close(state.params, params, rtol=1e-10)
      assert_close(info.metrics['loss_policy'], want, rtol=1e-10)


# Limits and identities.


def test_td3_bc_lies_between_td3_and_cloning(key):
  built = conformance.built('td3_bc')
  # Adam does not see the size of a gradient: alpha to infinity is TD3's step,
  # alpha 0 that of behaviour cloning by least squares.
  # The next update is one of the policy, too.
  state = built.state._replace(step=built.state.step + 1)
  batch = built.batch

  @jax.jit
  def step(alpha):
    agent = conformance.make('td3_bc', alpha=alpha)
    return agent.update(state, batch, key)[0].params

  td3 = jax.jit(conformance.make('td3_bc', behaviour_cloning=False).update)
  td3 = td3(state, batch, key)[0].params
  clone = make_agent(bc, bc.Config(loss='squared', normalise=True, **SMALL))
  start = clone.init(key)
  start = start._replace(
    params=start.params._replace(policy=state.params.policy)
  )
  cloned = jax.jit(clone.update)(start, batch, key)[0].params

  assert_close(step(1e6), td3, rtol=2e-6)
  assert_close(step(0.0).policy, cloned.policy, rtol=1e-6)
  # One step moves a weight by 3e-4: the two ends are not the same.
  gap = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), td3.policy, cloned.policy
  )
  assert max(jax.tree.leaves(gap)) > 1e-4


@pytest.mark.parametrize('name', ['sac', 'td3_bc'])
def test_a_residual_weight_of_one_is_the_plain_loss(name, key):
  built = conformance.built(name)

  @jax.jit
  def run(weight):  # a tracer takes the long way
    agent = conformance.make(name, residual_weight=weight)
    return agent.update(built.state, built.batch, key)

  want = built.update(built.state, built.batch, key)
  assert_close(run(1.0), want)
  _, mixed = run(0.2)
  gap = mixed.metrics['loss_critic'] - want[1].metrics['loss_critic']
  assert abs(gap) > 1e-4


# Known answers.


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
  state, metrics = train(agent, state, lambda key: batch, updates)
  late = jax.tree.map(lambda x: x[-updates // 10 :].mean(), metrics)
  return agent, state, late


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
