"""Mixtures as blocks of networks: their place and their account."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import searching_cases
from trees import assert_close, shake

from agents import atac, efficientzero
from agents.core import planning, unroll
from agents.core.types import (
  ArraySpec,
  Continuous,
  Discrete,
  Spec,
)
from experiments.runtime import config as configs
from experiments.runtime import overrides
from networks import mixture, moe, routers
from networks import muzero as muzero_networks

B, A, K, N = 4, 3, 3, 2
KEY = jax.random.key(3)
MOE = moe.Config(3, routers.NoisyTopK(k=2), hidden=4, z_weight=0.01)
NETWORK = dataclasses.replace(
  searching_cases.NETWORK, mixture='dynamics', moe=MOE
)
IMAGE_NETWORK = dataclasses.replace(
  NETWORK, torso='image', channels=4, head_channels=2, norm='batch'
)
BOX = Continuous((2,), np.float32([-2, 0.5]), np.float32([-1, 3]))
VECTOR = Spec(ArraySpec((4,), np.float32), Discrete(A))
IMAGE = Spec(ArraySpec((3, 2, 1), np.uint8), Discrete(A))
SEARCH = planning.SearchConfig(num_simulations=4, num_samples=3)
SHARED = {
  'search': SEARCH,
  'gamma': 0.9,
  'unroll_steps': K,
  'td_steps': N,
  'warmup_updates': 0,
  'learning_rate': 0.03,
}


# Compiled once and run once or twice: what LLVM could do better is not missed.
quick = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def make_networks(config, spec=VECTOR):
  return muzero_networks.make(config, spec.observation, A)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), 'float32')


# --- The block.


def make_block(chunks=1, **fields):
  config = dataclasses.replace(MOE, **fields)
  norm = functools.partial(mixture.mlp.Norm, 'none')
  return mixture.Block(config, chunks, norm)


@pytest.mark.parametrize(
  ('shape', 'chunks', 'fields'),
  [
    ((2, 2, 3, 4), 1, {}),  # a token a pixel
    ((2, 8), 1, {}),
    ((2, 8), 2, {}),
    ((2, 2, 3, 4), 1, {'router': routers.Soft()}),  # pixels of one image mix
  ],
  ids=['pixels', 'vector', 'chunks', 'soft'],
)
def test_the_block_is_residual_on_its_tokens(shape, chunks, fields):
  block, size = make_block(chunks, **fields), shape[-1] // chunks

  @quick
  def run(x):
    params = shake(block.init(KEY, x, False)['params'], scale=0.5)
    tokens = x + params['Norm_0']['bias'].reshape((1,) * (x.ndim - 1) + (-1,))
    layer = moe.MoE(block.config, moe.FeedForward(MOE.hidden, size))
    variables = {'params': params['MoE_0']}
    # State by state: none of them has to do with another.
    each = [layer.apply(variables, one.reshape(1, -1, size)) for one in tokens]
    return block.apply({'params': params}, x, False), each

  x = normal(0, *shape)
  (got, aux), each = run(x)
  want = np.stack([np.asarray(y)[0] for y, _ in each]).reshape(shape)
  np.testing.assert_allclose(got, np.maximum(x + want, 0), atol=1e-5)
  assert_close(aux.importance, sum(told.importance for _, told in each))
  assert np.ptp(aux.importance) > 0.01


def test_the_control_has_the_same_tokens_and_operations():
  pairs = [
    (MOE, (2, 0, 8)),
    (
      dataclasses.replace(
        MOE,
        num_experts=8,
        router=routers.NoisyTopK(k=2, groups=4, group_k=3),
      ),
      (6, 0, 24),
    ),
    (dataclasses.replace(MOE, router=routers.Soft(slots=2)), (1, 6, 4)),
  ]
  for config, (active, slots, hidden) in pairs:
    one = mixture.control(config)
    assert config.make_router().active == active
    assert (one.num_experts, one.make_router().active) == (1, 1)
    assert one.hidden == hidden
    assert getattr(one.router, 'slots', 0) == slots
  config = dataclasses.replace(NETWORK, mixture_control=True)
  params, _ = jax.eval_shape(make_networks(config).init, KEY)
  assert params['mixture']['MoE_0']['experts']['in']['kernel'].shape == (
    1,
    8,
    8,
  )


def test_the_control_says_what_its_one_expert_says():
  block = make_block()
  block = block.clone(config=mixture.control(block.config))

  @quick
  def run(x):
    params = shake(block.init(KEY, x, False)['params'], scale=0.5)
    return params, block.apply({'params': params}, x, False)

  x = normal(1, 2, 8)
  params, (y, aux) = run(x)
  expert = jax.tree.map(lambda x: np.asarray(x[0]), params['MoE_0']['experts'])
  inputs = np.asarray(x) + np.asarray(params['Norm_0']['bias'])
  hidden = np.maximum(inputs @ expert['in']['kernel'], 0)
  want = np.maximum(x + hidden @ expert['out']['kernel'], 0)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
  assert (aux.loss, aux.count) == (0, 2)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'router': routers.ExpertChoice()},
      r"^moe\.router='expert_choice': makes a stat",
    ),
    ({'backend': 'capacity'}, r"^moe\.backend='capacity': drops by what else"),
    ({'num_experts': 0}, r'^moe\.num_experts=0: must be 1 or more'),
  ],
)
def test_what_planning_cannot_bear_is_refused(fields, message):
  bad = dataclasses.replace(MOE, **fields)
  dataclasses.replace(NETWORK, mixture='none', moe=bad)
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(NETWORK, moe=bad)
  if bad.num_experts:  # 0 of them are no mixture to a critic
    with pytest.raises(ValueError, match='^critic_' + message[1:]):
      atac.Config(critic_moe=bad)


@pytest.mark.parametrize(
  ('router', 'kept'),
  [
    (routers.BiasedTopK(k=2), 'bias'),
    (routers.NoisyTopK(k=2, prune_below=0.1), 'load'),
  ],
)
def test_critics_keep_no_statistics(router, kept):
  bad = dataclasses.replace(MOE, router=router)
  dataclasses.replace(NETWORK, moe=bad)
  message = rf"^critic_moe\.router='{router.name}': keeps statistics \({kept}\)"
  with pytest.raises(ValueError, match=message):
    atac.Config(critic_moe=bad)


def test_latents_that_do_not_make_the_tokens_are_refused():
  with pytest.raises(ValueError, match='mixture_tokens=3: must divide latent_'):
    make_networks(dataclasses.replace(NETWORK, mixture_tokens=3))
  config = dataclasses.replace(IMAGE_NETWORK, mixture_tokens=2)
  with pytest.raises(ValueError, match='mixture_tokens=2: an image latent has'):
    make_networks(config, IMAGE)
  with pytest.raises(ValueError, match='critic_tokens=3: must divide the firs'):
    atac.Config(hidden_sizes=(8,), critic_moe=MOE, critic_tokens=3)
  with pytest.raises(ValueError, match=r'hidden_sizes=\(\): critic_moe needs'):
    atac.Config(hidden_sizes=(), critic_moe=MOE)


def test_settings_are_set_by_their_path():
  sections = {'agent': efficientzero.Config(), 'critic': atac.Config()}
  changed = overrides.override(
    sections,
    [
      'network.mixture=heads',
      'network.moe.k=3',
      'network.moe.num_experts=3',
      'critic_moe.num_experts=4',
      'critic_moe.load_weight=0.5',
    ],
  )
  network, critic = changed['agent'].network, changed['critic'].critic_moe
  assert (network.mixture, network.moe.router.k, network.moe.num_experts) == (
    'heads',
    3,
    3,
  )
  assert (critic.num_experts, critic.load_weight) == (4, 0.5)
  with pytest.raises(configs.UserError, match='expert_choice'):
    overrides.override(
      changed | {'critic': atac.Config()},
      ['network.moe.router=expert_choice'],
    )


# --- Its account over many calls.


def cv_squared(x):
  x = np.asarray(x, np.float64)
  return x.var() / x.mean() ** 2


def steep(load_weight):
  """`NETWORK` as a sweep has it: built past its checks, with a tracer."""

  def put(config, name, value):
    changed = object.__new__(type(config))
    for field in dataclasses.fields(config):
      object.__setattr__(changed, field.name, getattr(config, field.name))
    object.__setattr__(changed, name, value)
    return changed

  return put(NETWORK, 'moe', put(MOE, 'load_weight', load_weight))


def learn(params, key, load_weight):
  """The gradient of an unroll's values and balance, and what it is of."""
  networks = make_networks(steep(load_weight))

  def loss(params):
    listener = networks.listen({}, key)
    out = unroll.unroll(networks, params, listener, STATE, ACTION, train=True)
    left, aux = networks.told(out.statistics)
    assert left == {}
    return aux.loss + jnp.mean(out.value_logits**2), (aux, out.states)

  return jax.grad(loss, has_aux=True)(params)


STATE, ACTION = jnp.abs(normal(0, B, 8)), jnp.arange(B * K).reshape(B, K) % A


@pytest.fixture(scope='module')
def alone():
  """`learn` compiled, and parameters of a network whose gates matter."""
  params, _ = quick(make_networks(NETWORK).init)(KEY)
  return quick(learn), shake(params, scale=0.5)


def test_the_account_is_that_of_all_unrolled_steps_together(alone):
  compiled, params = alone
  gradient, (aux, states) = compiled(params, KEY, 0.1)
  networks, seen = make_networks(NETWORK), STATE
  start = networks.listen({}, KEY)
  # Each call by itself: its noise is told by its number.
  one = quick(lambda *args: networks.dynamics(params, *args, True))
  each = []
  for step in range(K):
    nth = start._replace(calls=jnp.int32(step))
    seen, heard = one(nth, seen, ACTION[:, step])
    assert heard.calls == step + 1
    each.append(heard.aux)
    np.testing.assert_allclose(seen, states[step], rtol=1e-5, atol=1e-5)
  for name in ('importance', 'load', 'count'):
    total = sum(np.asarray(getattr(x, name)) for x in each)
    np.testing.assert_allclose(getattr(aux, name), total, rtol=1e-5)
  assert aux.count.sum() == K * B * MOE.router.k
  z = np.mean([x.losses['z'] for x in each])
  want = 0.1 * (cv_squared(aux.importance) + cv_squared(aux.load)) + 0.01 * z
  np.testing.assert_allclose(aux.loss, want, rtol=1e-4)
  assert aux.loss > 0.01
  # Another call, another noise; and gates learn.
  _, other = one(start, seen, ACTION[:, 0])
  start = start._replace(calls=jnp.int32(1))
  _, again = one(start, seen, ACTION[:, 0])
  assert np.abs(other.aux.load - again.aux.load).max() > 1e-3
  for name in ('gate', 'noise'):
    kernel = gradient['mixture']['MoE_0'][name]['kernel']
    assert np.abs(kernel).max() > 1e-6


@pytest.mark.slow
def test_rows_of_a_sweep_are_what_they_are_alone(alone):
  compiled, params = alone
  keys, weights = jax.random.split(KEY), jnp.float32([0.1, 3.0])
  rows = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), params)
  together = quick(jax.vmap(learn))(rows, keys, weights)
  for i in range(2):
    own, row = jax.tree.map(lambda x, i=i: x[i], (rows, together))
    assert_close(compiled(own, keys[i], weights[i]), row)
  assert together[1][0].loss[1] > 3 * together[1][0].loss[0]


def test_noise_needs_a_listener_and_training():
  networks = make_networks(NETWORK)

  @quick
  def run(state, action):
    params, stats = networks.init(KEY)
    step = functools.partial(networks.dynamics, shake(params, scale=0.5))
    listener = networks.listen(stats, KEY)
    return [
      step(heard, state, action, train)
      for heard in (stats, listener)
      for train in (False, True)
    ]

  (want, _), (unheard, _), (quiet, heard), (noisy, _) = run(
    jnp.abs(normal(0, B, 8)), jnp.zeros(B, jnp.int32)
  )
  np.testing.assert_array_equal(want, unheard)
  np.testing.assert_array_equal(want, quiet)
  assert heard.aux.count.sum() == B * MOE.router.k
  assert np.abs(want - noisy).max() > 1e-3


@pytest.mark.parametrize(
  'router',
  [
    routers.NoisyTopK(k=2),
    routers.Balanced(k=2),
    routers.BiasedTopK(k=2),
    routers.Soft(),
  ],
  ids=lambda router: router.name,
)
def test_every_router_goes_through_a_scan(router, key):
  experts = dataclasses.replace(MOE, router=router, hidden=2)
  config = dataclasses.replace(NETWORK, mixture='heads', moe=experts)
  networks = make_networks(config)

  def account(key):
    params, stats = networks.init(key)
    state = jnp.zeros((6, 8))
    out = unroll.unroll(
      networks,
      params,
      networks.listen(stats, key),
      state,
      jnp.zeros((6, K), jnp.int32),
      train=True,
    )
    return stats, networks.told(out.statistics)

  stats, (after, aux) = jax.eval_shape(account, key)
  assert jax.tree.structure(stats) == jax.tree.structure(after)
  assert bool(stats) == (router.name == 'biased_top_k')
  assert aux.count.shape == (3,) and aux.loss.shape == ()


def test_without_a_mixture_nobody_listens(key):
  networks = make_networks(dataclasses.replace(NETWORK, mixture='none'))
  params, stats = jax.eval_shape(networks.init, key)
  assert 'mixture' not in params
  assert networks.listen(stats, key) is stats
  assert networks.told(stats) == (stats, None)
