"""The language model: its network against numpy, its learning, its sizes."""

import dataclasses
import functools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_agents
from language_cases import (
  CONFIG,
  MIXTURE,
  NETWORK,
  SPEC,
  B,
  D,
  E,
  K,
  L,
  V,
  make_tokens,
)

from agents import language as agent_module
from agents.core import optim
from agents.core.types import Continuous, Text
from networks import language, moe, routers


def make_agent(config=CONFIG):
  return small_agents.make_agent(agent_module, config, SPEC)


def with_network(**changes):
  return dataclasses.replace(
    CONFIG, network=dataclasses.replace(NETWORK, **changes)
  )


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


# The network.


def plain_lstm(p, x):
  inputs = x @ p['inputs']['kernel'] + p['inputs']['bias'][None, None]
  c = h = np.zeros((x.shape[0], D))
  outputs = []
  for t in range(x.shape[1]):
    i, f, o, g = np.split(inputs[:, t] + h @ p['kernel'], 4, -1)
    c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    outputs.append(h)
  return np.stack(outputs, 1)


def plain_model(p, tokens, middle):
  x = p['embedding']['embedding'][tokens]
  x = x + plain_lstm(p['lstm_0'], x)
  x = x + sigmoid(middle(x))
  x = x + plain_lstm(p['lstm_1'], x)
  return x @ p['softmax']['kernel'] + p['softmax']['bias'][None, None]


@pytest.fixture(scope='module')
def dense():
  """One wide expert, with biases that are not zero."""
  network = language.make(dataclasses.replace(NETWORK, layer='dense'), V)
  params, stats = jax.jit(network.init)(jax.random.key(1))
  assert stats == {}
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params
  )
  tokens = make_tokens()[:, :-1]
  logits, aux, _ = jax.jit(network.apply)(params, stats, tokens)
  assert aux == ()
  return params, tokens, logits


def test_the_network_is_what_numpy_computes(dense):
  params, tokens, logits = dense
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  first, second = (p['layer_0'][n]['kernel'] for n in ('in', 'out'))
  assert first.shape == (D, K * MIXTURE.hidden)
  want = plain_model(p, tokens, lambda x: np.maximum(x @ first, 0) @ second)
  assert logits.shape == (B, L, V) and logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)


def test_a_mixture_of_one_expert_is_the_dense_layer(dense):
  params, tokens, logits = dense
  one = moe.Config(1, routers.NoisyTopK(k=1), K * MIXTURE.hidden)
  network = language.make(dataclasses.replace(NETWORK, moe=one), V)
  own, stats = jax.jit(network.init)(jax.random.key(0))
  experts = jax.tree.map(lambda x: x[None], params['layer_0'])
  assert jax.tree.structure(own['layer_0']['experts']) == jax.tree.structure(
    experts
  )
  own = {**params, 'layer_0': {**own['layer_0'], 'experts': experts}}
  got, aux, _ = jax.jit(network.apply)(own, stats, tokens)
  np.testing.assert_allclose(got, logits, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(aux[0].count, [B * L])


@pytest.fixture
def built():
  return conformance.built('language')


def test_no_step_sees_what_comes_behind_it(built):
  state = built.state
  network = language.make(NETWORK, V)
  params, stats = state.params
  # At first all gates are equal and the softmax decides for the same two.
  params = jax.tree.map(lambda x: x, params)
  kernel = jax.random.normal(jax.random.key(2), (D, E))
  params['layer_0']['gate']['kernel'] = kernel
  predict = jax.jit(lambda tokens: network.apply(params, stats, tokens)[:2])
  tokens = make_tokens()[:, :-1]
  logits, aux = predict(tokens)
  assert (aux[0].count > 0).sum() > K
  for t in (1, L - 1):
    changed, _ = predict(tokens.at[:, t:].add(7) % V)
    np.testing.assert_array_equal(changed[:, :t], logits[:, :t])
    assert (np.abs(changed[:, t:] - logits[:, t:]).max((1, 2)) > 1e-4).all()


def test_noise_and_dropout_are_in_training_only(built):
  state, update, evaluate = built.state, built.update, built.evaluate
  batch = Text(make_tokens())
  keys = [jax.random.key(i) for i in (0, 0, 1)]
  losses = [float(update(state, batch, k)[1].metrics['loss']) for k in keys]
  assert losses[0] == losses[1] != losses[2]
  held = evaluate(state.params, batch)
  # A uniform distribution's, nearly: kernels are small.
  assert abs(float(held['loss']) - np.log(V)) < 0.5
  assert float(held['perplexity']) == pytest.approx(np.exp(float(held['loss'])))


# Sizes.

NESTED = {'router': routers.NoisyTopK(k=2, groups=16)}


@pytest.mark.parametrize(
  ('layer', 'mixture', 'operations', 'parameters'),
  [
    ('lstm', {}, 8.4, 8.4),  # 4xLSTM-512
    ('dense', {}, 8.4, 8.4),  # MoE-1-Wide
    ('deep', {}, 8.4, 8.4),  # MoE-1-Deep
    ('moe', {'num_experts': 4}, 8.4, 8.4),
    ('moe', {'num_experts': 32}, 8.4, 37.8),
    ('moe', {'num_experts': 256}, 8.6, 272.9),
    ('moe', {'num_experts': 256, **NESTED}, 8.4, 272.9),
    ('moe', {'num_experts': 1024, **NESTED}, 8.5, 1079.0),
    ('moe', {'num_experts': 4096, **NESTED}, 8.9, 4303.4),
  ],
)
def test_sizes_are_those_of_table_7(layer, mixture, operations, parameters):
  config = language.Config(layer=layer, moe=moe.Config(**mixture))
  size = language.size_of(config)
  # One printed number, 8.6 for 8.651, is not rounded but cut.
  assert size.operations / 1e6 == pytest.approx(operations, abs=0.052)
  assert size.parameters / 1e6 == pytest.approx(parameters, abs=0.05)


@pytest.mark.parametrize(
  'changes',
  [
    {'layer': 'lstm'},
    {'layer': 'dense'},
    {'layer': 'deep'},
    {'num_layers_moe': 2},
    {'moe': moe.Config(E, routers.NoisyTopK(k=1, groups=2), 8)},
    {'moe': moe.Config(E, routers.Balanced(k=K), 8)},
    {'moe': moe.Config(E, routers.NoisyTopK(k=K, noise=False), 8)},
  ],
)
def test_sizes_are_those_of_the_networks(changes):
  config = dataclasses.replace(NETWORK, **changes)
  network = language.make(config, V)
  params, _ = jax.eval_shape(network.init, jax.random.key(0))
  matrices = [
    x.size
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key == 'kernel' and path[0].key != 'softmax'
  ]
  assert language.size_of(config).parameters == sum(matrices)


# The agent.


def test_every_token_is_predicted_from_those_before_it():
  # A network that knows the next token, and is sure of it with e^9 to 1.
  knows = lambda params, stats, tokens, train, key: (
    9.0 * jax.nn.one_hot((tokens + 3) % V, V),
    (),
    stats,
  )
  networks = agent_module.make_networks(CONFIG, SPEC)._replace(apply=knows)
  losses = agent_module.make_losses()
  agent = agent_module.make(CONFIG, networks, losses, SPEC)
  assert agent.evaluate is not None
  params = agent_module.Params({}, {})
  loss = agent.evaluate(params, Text(make_tokens()), None)['loss']
  assert float(loss) == pytest.approx(np.log1p((V - 1) * np.exp(-9)), rel=1e-4)


def test_it_learns(built):
  state, update, evaluate = built.state, built.update, built.evaluate
  assert built.agent.act is None
  held = Text(make_tokens(seed=99, size=16))
  before = float(evaluate(state.params, held)['perplexity'])
  for i in range(80):
    state, info = update(state, Text(make_tokens(i)), jax.random.key(i))
  metrics = {name: float(x) for name, x in info.metrics.items()}
  assert np.isfinite(list(metrics.values())).all()
  # Every token goes to K experts.
  shares = [metrics[f'load_{e}'] for e in range(E)]
  assert sum(shares) == pytest.approx(K)
  mean = np.mean(shares)
  assert metrics['max_over_mean_load'] == pytest.approx(max(shares) / mean)
  after = float(evaluate(state.params, held)['perplexity'])
  assert after < V / 4 < before


def test_rows_of_a_sweep_are_runs_alone(built):
  """Seeds, dropout and the balance's weight, traced in one program."""
  state, update = built.state, built.update
  batch = Text(make_tokens())

  def one(seed, dropout, weight):
    mixture = dataclasses.replace(MIXTURE, importance_weight=weight)
    own = make_agent(with_network(dropout=dropout, moe=mixture))
    after, info = own.update(state, batch, jax.random.key(seed))
    return after.params, info.metrics

  # The second row is the one that the agent alone has.
  floats = jnp.float32([0.5, 0.1]), jnp.float32([3.0, 0.1])
  params, metrics = jax.jit(jax.vmap(one))(jnp.arange(1, -1, -1), *floats)
  after, info = update(state, batch, jax.random.key(0))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  row = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  jax.tree.map(close, row(metrics, 1), info.metrics)
  jax.tree.map(close, row(params, 1), after.params)
  mixture = dataclasses.replace(MIXTURE, importance_weight=3.0)
  other = make_agent(with_network(dropout=0.5, moe=mixture))
  after, info = jax.jit(other.update)(state, batch, jax.random.key(1))
  jax.tree.map(close, row(metrics, 0), info.metrics)
  jax.tree.map(close, row(params, 0), after.params)


def test_metrics_of_two_mixtures_have_their_number():
  config = dataclasses.replace(
    with_network(num_layers_moe=2), optimiser='factored'
  )
  agent = make_agent(config)
  state = jax.eval_shape(agent.init, jax.random.key(0))
  batch = Text(jax.ShapeDtypeStruct((B, L + 1), jnp.int32))
  after, info = jax.eval_shape(agent.update, state, batch, jax.random.key(0))
  assert {'layer0_cv_load', 'layer1_cv_load', 'layer1_load_3'} <= {
    *info.metrics
  }
  assert jax.tree.structure(after) == jax.tree.structure(state)
  # Of the experts' matrices no moment of their size is kept.
  kept = [x.shape for x in jax.tree.leaves(state.opt_state)]
  assert (E, D, 8) not in kept and (E, D) in kept


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: language.Config(layer='wide'), 'layer=wide: must be one of moe'),
    (lambda: language.Config(num_layers_moe=3), 'num_layers_moe=3'),
    (lambda: language.Config(dropout=1.0), 'dropout=1.0: must be from 0'),
    (
      lambda: language.Config(moe=moe.Config(router=routers.Soft())),
      'router=soft: sees the tokens',
    ),
    (lambda: language.Config(size=0), 'size=0'),
    (lambda: language.Config(moe=moe.Config(num_experts=0)), 'num_experts=0'),
    (lambda: language.make(NETWORK, 1), 'vocabulary=1: must be 2 or more'),
    (lambda: agent_module.TextConfig(vocabulary=9), 'vocabulary=9: must be at'),
    (lambda: agent_module.TextConfig(length=0), 'length=0'),
    (lambda: agent_module.TextConfig(held_out=1.0), 'held_out=1.0'),
    (lambda: agent_module.TextConfig(encoding='x'), 'encoding=x'),
    (lambda: agent_module.Config(optimiser='sgd'), 'optimiser=sgd'),
    (lambda: agent_module.Config(learning_rate=-1.0), 'learning_rate=-1.0'),
    (lambda: agent_module.Config(warmup_updates=-1), 'warmup_updates=-1'),
    (
      lambda: agent_module.make_networks(
        CONFIG, SPEC._replace(action=Continuous((1,), -np.ones(1), np.ones(1)))
      ),
      'language needs tokens; numbers has Continuous',
    ),
  ],
)
def test_mistakes_are_told(make, message):
  with pytest.raises(ValueError, match=f'^{message}') as caught:
    make()
  assert '\n' not in str(caught.value)


# Its optimiser.


def test_the_rate_rises_and_falls_as_one_over_the_root():
  rate = optim.warmup_inverse_sqrt(0.5, warmup_steps=4)
  got = [float(rate(count)) for count in (0, 1, 3, 15, 99)]
  np.testing.assert_allclose(got, [0.125, 0.25, 0.5, 0.25, 0.1], rtol=1e-6)


def test_factored_moments_against_a_loop():
  rule = optim.scale_by_factored_adam(decay=0.9)
  rng = np.random.default_rng(0)
  gradients = rng.normal(size=(3, 2, 4, 5))
  state = rule.init({'w': jnp.zeros((2, 4, 5))})
  update = jax.jit(rule.update)
  rows, columns = np.zeros((2, 4)), np.zeros((2, 5))
  for n, g in enumerate(gradients, 1):
    got, state = update({'w': jnp.asarray(g, jnp.float32)}, state)
    for e in range(2):
      rows[e] = 0.9 * rows[e] + 0.1 * (g[e] ** 2).mean(1)
      columns[e] = 0.9 * columns[e] + 0.1 * (g[e] ** 2).mean(0)
      second = np.outer(rows[e], columns[e]) / rows[e].mean() / (1 - 0.9**n)
      np.testing.assert_allclose(got['w'][e], g[e] / np.sqrt(second), rtol=1e-5)

  # An expert that has never had a token stays where it is.
  got, _ = rule.update({'w': jnp.zeros((2, 4, 5))}, rule.init(got))
  np.testing.assert_array_equal(got['w'], 0)
  with pytest.raises(ValueError, match=r'^optimiser=factored: needs matrices'):
    rule.init({'b': jnp.zeros(3)})


def test_factored_moments_of_rank_one_are_adams():
  outer = jnp.outer(jnp.arange(1.0, 4.0), jnp.arange(1.0, 6.0))
  signs = jnp.where(jnp.arange(15).reshape(3, 5) % 2, 1, -1)
  ours, adam = optim.scale_by_factored_adam(), optax.scale_by_adam(b1=0.0)

  @jax.jit
  def steps(g):
    return [rule.update(g, rule.init(g))[0] for rule in (ours, adam)]

  got, want = steps(outer * signs)
  np.testing.assert_allclose(got, want, rtol=1e-5)
