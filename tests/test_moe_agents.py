"""Mixtures inside agents: their place, their account, searches, sweeps."""

import dataclasses
import functools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import make_agent

from agents import atac, efficientzero, muzero, sampled_muzero
from agents.core import optim, planning, unroll
from agents.core.types import (
  ArraySpec,
  Continuous,
  Discrete,
  Experience,
  Spec,
  Trajectory,
  Transition,
)
from experiments.runtime import config as configs
from experiments.runtime import overrides
from networks import actor_critic, mixture, moe, routers
from networks import muzero as muzero_networks
from search.model import TimeStep

B, A, K, N = 4, 3, 3, 2
KEY = jax.random.key(3)
MOE = moe.Config(3, routers.NoisyTopK(k=2), hidden=4, z_weight=0.01)
NETWORK = dataclasses.replace(conformance.NETWORK, mixture='dynamics', moe=MOE)
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


def shake(tree, seed=0, scale=0.5):
  """Adds noise, so that what starts at zero (gates, heads) says more."""
  leaves, treedef = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  add = lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
  return treedef.unflatten([add(x) for x in leaves])


# Compiled once and run once or twice: what LLVM could do better is not missed.
quick = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def assert_close(got, want, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance
    ),
    got,
    want,
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
    params = shake(block.init(KEY, x, False)['params'])
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
    params = shake(block.init(KEY, x, False)['params'])
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
  return quick(learn), shake(params)


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
    step = functools.partial(networks.dynamics, shake(params))
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


# --- The MuZero family.


def make_observation(spec, *leading):
  rng = np.random.default_rng(0)
  shape = (*leading, *spec.observation.shape)
  if spec.observation.dtype == np.uint8:
    return jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def make_timestep(spec, *leading):
  return TimeStep(
    observation=make_observation(spec, *leading),
    reward=normal(1, *leading),
    discount=jnp.ones(leading),
    is_first=jnp.zeros(leading, bool),
    truncated=jnp.zeros(leading, bool),
    invalid_actions=None,
  )


def make_batch(config, spec):
  length = config.window
  extras = {
    'search_policy': jax.nn.softmax(normal(2, B, length, A)),
    'search_value': normal(3, B, length),
  }
  action = jnp.asarray(np.arange(B * length).reshape(B, length) % A, jnp.int32)
  if isinstance(spec.action, Continuous):
    action = jnp.broadcast_to(jnp.float32([-1.5, 1.0]), (B, length, 2))
    extras['sampled_actions'] = jnp.broadcast_to(
      jnp.float32([-1.5, 1.0]), (B, length, A, 2)
    )
  timestep = make_timestep(spec, B, length)
  experience = Experience(timestep, action, extras)
  return Trajectory(experience, jnp.ones((B, length), bool), None)


CASES = {
  'muzero torso, chunks': (
    muzero,
    muzero.Config(
      **SHARED,
      network=dataclasses.replace(NETWORK, mixture='torso', mixture_tokens=2),
    ),
    VECTOR,
    1 * B * 2,
  ),
  # Batch statistics, an LSTM, and the torso a second time for successors.
  'efficientzero torso, pixels': (
    efficientzero,
    efficientzero.Config(
      **SHARED, network=dataclasses.replace(IMAGE_NETWORK, mixture='torso')
    ),
    IMAGE,
    (1 + K) * B * 6,
  ),
  'sampled_muzero heads': (
    sampled_muzero,
    sampled_muzero.Config(
      **SHARED, network=dataclasses.replace(NETWORK, mixture='heads')
    ),
    VECTOR._replace(action=BOX),
    (1 + K) * B,
  ),
}


@pytest.mark.parametrize('case', CASES)
def test_the_loss_has_the_mixture_in_it(case, monkeypatch):
  module, config, spec, tokens = CASES[case]
  agent = make_agent(module, config, spec)
  metrics = mixture.metrics
  count = lambda aux: metrics(aux) | {'moe_count': aux.count.sum()}
  monkeypatch.setattr(mixture, 'metrics', count)
  state, batch = quick(agent.init)(KEY), make_batch(config, spec)
  found = quick(agent.evaluate)(state.params, batch, KEY)
  assert found['moe_count'] == tokens * MOE.router.k
  weights = {'policy': 1, 'value': 0.25, 'reward': 1}
  weights |= {'consistency': 2, 'entropy': 5e-3}
  terms = [w * found.get(f'loss_{k}', 0) for k, w in weights.items()]
  want = sum(terms) / K + found['moe_balance_loss']
  np.testing.assert_allclose(found['loss'], want, rtol=1e-5)
  # Gates say nothing yet and have no noise here: two of three have it all.
  share = 0.1 * (0.5 + 0.5) + 0.01 * np.log(3) ** 2
  np.testing.assert_allclose(found['moe_balance_loss'], share, rtol=1e-5)
  assert (found['moe_idle_experts'], found['moe_dropped']) == (1, 0)
  after, info = jax.eval_shape(agent.update, state, batch, KEY)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert set(info.metrics) == {*found, 'gradient_norm'}


def test_an_agent_of_traced_floats_is_traced_once():
  batch, traces = make_batch(muzero.Config(**SHARED), VECTOR), []

  def row(seed, load_weight):
    traces.append(0)
    config = muzero.Config(**SHARED, network=steep(load_weight))
    agent = make_agent(muzero, config, VECTOR)
    state = agent.init(jax.random.key(seed))
    return agent.update(state, batch, jax.random.key(seed))[1].metrics

  seeds, weights = jnp.arange(2), jnp.float32([0.1, 3.0])
  found = jax.eval_shape(jax.vmap(row), seeds, weights)
  assert found['moe_balance_loss'].shape == (2,)
  assert len(traces) == 1


def test_a_search_alone_is_its_row_of_a_batch():
  config = muzero.Config(**SHARED, network=NETWORK)
  networks = muzero.make_networks(config, VECTOR)
  model = unroll.learned_model(networks, gamma=0.9)
  network, stats = quick(networks.init)(KEY)
  params = unroll.Params(shake(network), stats, jnp.int32(0))
  search = planning.make_planner(SEARCH, evaluate=True)

  @quick
  def plan(timestep):
    return search(model, params, KEY, timestep)

  roots = make_timestep(VECTOR, 8)
  together = plan(roots)
  for row in (0, 5):
    single = plan(jax.tree.map(lambda x, i=row: x[i : i + 1], roots))
    for name in ('action', 'action_weights', 'value'):
      assert_close(getattr(single, name)[0], getattr(together, name)[row])

  # States go to different experts, or this would say little.
  @quick
  def first(timestep):
    state = model.root(params, timestep, KEY).embedding
    action, listener = jnp.zeros(8, jnp.int32), networks.listen(stats, KEY)
    heard = networks.dynamics(params.network, listener, state, action, False)[1]
    return networks.told(heard)[1].count

  assert (first(roots) > 0).sum() > MOE.router.k


# --- ATAC's critics.


ATAC = atac.Config(hidden_sizes=(8,), critic_moe=MOE, radius=0.5)
STATES = Spec(ArraySpec((3,)), BOX)


def make_transitions():
  return Transition(
    o_tm1=normal(0, B, 3),
    a_tm1=jnp.asarray([[-1.5, 1.0], [-1.2, 2.0], [-1.9, 0.7], [-1.4, 2.9]]),
    r_t=normal(1, B),
    discount_t=jnp.ones(B),
    o_t=normal(2, B, 3),
    o_0=None,
  )


def test_experts_are_projected_one_by_one():
  experts = np.float32(np.random.default_rng(0).normal(size=(2, 3, 4, 5)))
  experts *= np.float32([0.1, 1, 2])[None, :, None, None]
  gate = np.float32(np.random.default_rng(1).normal(size=(2, 4, 3)))
  params = {
    'gate': {'kernel': gate},
    'experts': {'in': {'kernel': experts, 'bias': experts[..., 0]}},
  }
  got = optim.project_kernels(params, 2.0, stacked=True)
  kernel = got['experts']['in']['kernel']
  for place in np.ndindex(2, 3):
    norm = np.linalg.norm(experts[place])
    want = experts[place] * min(1, 2 / norm)
    np.testing.assert_allclose(kernel[place], want, rtol=1e-6)
    assert (norm < 2) == (place[1] == 0)
  for member in range(2):
    want = gate[member] * min(1, 2 / np.linalg.norm(gate[member]))
    np.testing.assert_allclose(got['gate']['kernel'][member], want, rtol=1e-6)
  np.testing.assert_array_equal(got['experts']['in']['bias'], experts[..., 0])
  # A single network's, without members.
  one = jax.tree.map(lambda x: x[0], params)
  assert_close(
    optim.project_kernels(one, 2.0), jax.tree.map(lambda x: x[0], got), 1e-6
  )


def test_critics_are_their_layers_with_noise_in_their_loss():
  critics = actor_critic.q_mixture(3, BOX.low, BOX.high, 8, MOE, tokens=2)
  batch = make_transitions()

  @quick
  def run(observation, action):
    params = critics.init(KEY)
    params |= {'layers': shake(params['layers'])}
    told = [
      critics.learn(params, observation, action, key) for key in (None, KEY)
    ]
    return params['layers'], critics.apply(params, observation, action), told

  layers, q, ((quiet, aux), (noisy, _)) = run(batch.o_tm1, batch.a_tm1)
  np.testing.assert_array_equal(q, quiet)
  assert (np.abs(q - noisy).max(1) > 1e-3).all()  # both, by noise of their own
  middle, half = (BOX.high + BOX.low) / 2, (BOX.high - BOX.low) / 2
  unit = (np.asarray(batch.a_tm1) - middle) / half
  x = np.concatenate([batch.o_tm1, unit], 1)
  apply = make_block(chunks=2).apply
  block = quick(lambda variables, x: apply(variables, x, False))
  for member in range(2):
    own = jax.tree.map(lambda x, i=member: np.asarray(x[i]), layers)
    hidden = x @ own['Dense_0']['kernel'] + own['Norm_0']['bias']
    variables = {'params': own['Block_0']}
    hidden, told = block(variables, np.maximum(hidden, 0))
    last = own['Dense_1']
    want = np.asarray(hidden) @ last['kernel'] + last['bias']
    np.testing.assert_allclose(q[member], want[:, 0], rtol=1e-5, atol=1e-5)
    assert_close(aux.count[member], told.count)
    assert aux.count[member].sum() == 2 * B * MOE.router.k


def test_the_critics_loss_has_the_balance_once():
  networks = atac.make_networks(ATAC, STATES)
  phases = atac.make_phases(ATAC, networks, atac.make_losses(), STATES)
  warm_start, game = (phase.agent for phase in phases)
  batch = make_transitions()

  def row(key):
    state = game.init(key)
    critic = shake(state.params.critic, scale=0.2)
    state = state._replace(params=state.params._replace(critic=critic))
    after, info = game.update(state, batch, key)
    return after.params.critic, info.metrics

  # Two seeds: experts of two critics of two runs, all in one product.
  critic, metrics = quick(jax.vmap(row))(jax.random.split(KEY))
  for seed in range(2):
    found = {name: x[seed] for name, x in metrics.items()}
    # Two critics; beta is above 1, which divides the pessimism.
    want = found['bellman'] + found['pessimism'] / ATAC.beta
    want = 2 * (want + found['moe_balance_loss'])
    np.testing.assert_allclose(found['loss_critic'], want, rtol=1e-5)
    assert found['moe_balance_loss'] > 0
    assert found['kernel_norm'] > 0.5
  experts = critic['layers']['Block_0']['MoE_0']['experts']['in']['kernel']
  norms = np.linalg.norm(experts, axis=(-2, -1))
  assert norms.shape == (2, 2, 3) and norms.max() < 0.5 + 1e-5
  assert norms.min() > 0.49  # each on its own: together none is so long
  state, info = jax.eval_shape(
    lambda: warm_start.update(warm_start.init(KEY), batch, KEY)
  )
  assert jax.tree.structure(state.params.critic) == jax.tree.structure(critic)
  assert 'moe_balance_loss' in info.metrics


def test_plain_critics_stay_plain():
  networks = atac.make_networks(atac.Config(hidden_sizes=(8,)), STATES)
  assert networks.learn is None
  params = jax.eval_shape(networks.critic.init, KEY)
  assert set(params['layers']) == {'Dense_0', 'Dense_1', 'Norm_0'}
