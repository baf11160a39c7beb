"""The layer: against a loop over experts, per state, stacked, in a scan."""

import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from networks import mlp, moe, routers

D, E = 6, 4
FLAT = routers.NoisyTopK(k=2)
NESTED = routers.NoisyTopK(k=1, groups=2)
VARIANTS = {
  'flat': FLAT,
  'hierarchical': NESTED,
  'balanced': routers.Balanced(k=2),
  'expert_choice': routers.ExpertChoice(),
  'soft': routers.Soft(slots=2),
  'biased': routers.BiasedTopK(k=2),
  'pruned': routers.NoisyTopK(k=2, prune_below=0.5),
}


def _config(router=FLAT, **fields):
  return moe.Config(**({'num_experts': E, 'hidden': 5} | fields), router=router)


def _layer(router=FLAT):
  return moe.MoE(_config(router), moe.FeedForward(5, D))


@functools.cache
def _start(name):
  """A layer with random gates, its variables, and it compiled twice."""
  layer = _layer(VARIANTS[name])
  x = jnp.zeros((2, 3, D))
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  params = mlp.randomise(variables['params'], jax.random.key(1))
  # Zero at first; this is how they would look later.
  gates = {
    key: jax.tree.map(
      lambda x: jax.random.normal(jax.random.key(2), x.shape), params[key]
    )
    for key in params
    if 'gate' in key or 'noise' in key
  }
  variables = {**variables, 'params': params | gates}
  play = jax.jit(lambda variables, x: layer.apply(variables, x))
  train = jax.jit(
    lambda variables, x, key: layer.apply(
      variables, x, True, rngs={'gate': key}, mutable=['stats']
    )
  )
  return variables, play, train


def _x(seed, *shape):
  return jax.random.normal(jax.random.key(seed), (*shape, D))


def test_it_is_the_gated_sum_of_its_experts():
  variables, play, _ = _start('flat')
  x = _x(0, 2, 3)
  y, aux = play(variables, x)
  params = jax.tree.map(
    lambda x: np.asarray(x, np.float64), variables['params']
  )
  counts = np.zeros(E)
  for place in np.ndindex(2, 3):
    row = np.asarray(x[place], np.float64)
    logits = row @ params['gate']['kernel']
    best = np.argsort(-logits)[:2]
    gates = np.exp(logits[best]) / np.exp(logits[best]).sum()
    hidden = [
      np.maximum(row @ params['experts']['in']['kernel'][e], 0) for e in best
    ]
    outputs = [
      h @ params['experts']['out']['kernel'][e] for h, e in zip(hidden, best)
    ]
    np.testing.assert_allclose(y[place], gates @ outputs, rtol=1e-4, atol=1e-5)
    counts[best] += 1
  np.testing.assert_array_equal(aux.count, counts)
  expected = counts.var() / counts.mean() ** 2
  np.testing.assert_allclose(aux.losses['load'], expected, rtol=1e-5)
  shown = moe.metrics(aux)
  for name in ('cv_load', 'cv_count'):
    np.testing.assert_allclose(shown[name], expected**0.5, rtol=1e-5)
  np.testing.assert_allclose(
    shown['max_over_mean_load'], counts.max() / counts.mean(), rtol=1e-6
  )


@pytest.mark.parametrize('name', [n for n in VARIANTS if n != 'expert_choice'])
def test_a_state_alone_equals_its_row_of_a_batch(name):
  variables, play, _ = _start(name)
  assert _config(VARIANTS[name]).make_router().reads != 'batch'
  x = _x(1, 4, 3)
  whole, _ = play(variables, x)
  for i in range(4):
    alone, _ = play(variables, x[i : i + 1])
    np.testing.assert_allclose(alone[0], whole[i], rtol=1e-5, atol=1e-6)


def test_expert_choice_depends_on_the_batch():
  """Why agents refuse it: what a state gets depends on who else is there."""
  variables, play, _ = _start('expert_choice')
  assert _config(VARIANTS['expert_choice']).make_router().reads == 'batch'
  x = _x(1, 4, 3)
  alone, _ = play(variables, x[:1])
  assert not np.allclose(alone[0], play(variables, x)[0][0], atol=1e-3)


@pytest.mark.parametrize('name', list(VARIANTS))
def test_gradients_are_finite_and_reach_gate_and_experts(name):
  variables, _, _ = _start(name)
  layer = _layer(VARIANTS[name])
  x = _x(2, 2, 3)
  rest = {k: v for k, v in variables.items() if k != 'params'}

  def loss(params, train):
    (y, aux), _ = layer.apply(
      {'params': params, **rest},
      x,
      train,
      rngs={'gate': jax.random.key(5)},
      mutable=['stats'],
    )
    return jnp.sum(jnp.sin(y)) + aux.loss

  gradients = jax.jit(jax.grad(loss), static_argnums=1)(
    variables['params'], True
  )
  for path, g in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.isfinite(g).all(), path
    assert np.abs(g).max() > 0, path


def test_noise_is_drawn_in_training_only():
  variables, play, train = _start('flat')
  x = _x(3, 2, 3)
  (a, _), _ = train(variables, x, jax.random.key(0))
  (b, _), _ = train(variables, x, jax.random.key(1))
  assert not np.allclose(a, b)
  np.testing.assert_array_equal(play(variables, x)[0], play(variables, x)[0])


def test_gates_are_zero_at_first_and_noise_spreads_the_load():
  layer = _layer()
  x = _x(4, 50, 2)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  assert not np.any(variables['params']['gate']['kernel'])
  assert not np.any(variables['params']['noise']['kernel'])
  train = lambda v, x, key: layer.apply(v, x, True, rngs={'gate': key})
  _, aux = jax.jit(train)(variables, x, jax.random.key(0))
  assert np.asarray(aux.count).min() > 20


@pytest.mark.parametrize(
  'router',
  [
    routers.NoisyTopK(noise=False),
    routers.BiasedTopK(),
    routers.ExpertChoice(),
  ],
)
def test_without_noise_gates_differ_at_first(router):
  """Equal ones would give all tokens to the same experts for good."""
  layer = _layer(router)
  x = _x(4, 50, 2)
  params = jax.jit(layer.init)(jax.random.key(0), x)['params']
  params = mlp.randomise(params, jax.random.key(1))
  assert np.std(params['gate']['kernel']) > 0.1


def test_thresholds_choose_no_more_than_the_limit():
  # At first every expert is over its threshold.
  for limit, chosen in ((1, 1), (3, 3), (0, E)):
    layer = _layer(routers.Balanced(k=1, limit=limit))
    x = _x(4, 5)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    _, aux = jax.jit(layer.apply)(variables, x)
    assert aux.count.sum() == 5 * chosen


class _Odd(nn.Module):
  """An expert with a bias of its own and another structure."""

  @nn.compact
  def __call__(self, x):
    return jnp.tanh(nn.Dense(7)(nn.LayerNorm()(x)))


def test_any_module_is_an_expert_and_layers_stack():
  class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
      y, first = moe.MoE(_config(), _Odd())(x)
      y, second = moe.MoE(_config(NESTED), moe.FeedForward(5, D))(y)
      return y, first.loss + second.loss

  x = _x(5, 3)
  variables = jax.jit(Two().init)(jax.random.key(0), x)
  shapes = jax.tree.map(jnp.shape, variables['params'])
  assert shapes['MoE_0']['experts']['Dense_0']['kernel'] == (E, D, 7)
  y, loss = jax.jit(Two().apply)(variables, x)
  assert y.shape == (3, D) and np.isfinite(loss)
  kernels = variables['params']['MoE_0']['experts']['Dense_0']['kernel']
  assert not np.allclose(kernels[0], kernels[1])


def test_it_survives_a_scan_and_vmapped_seeds():
  variables, play, _ = _start('flat')
  layer = _layer()

  def unrolled(variables, x):
    def body(x, _):
      y, aux = layer.apply(variables, x)
      return x + y, aux.loss

    return jax.lax.scan(body, x, None, length=3)

  seeds = [jax.tree.map(lambda v, s=s: v * s, variables) for s in (1.0, 0.5)]
  stacked = jax.tree.map(lambda *v: jnp.stack(v), *seeds)
  x = _x(6, 2, 3)
  found, losses = jax.jit(jax.vmap(unrolled, (0, None)))(stacked, x)
  for i, own in enumerate(seeds):
    expected, total = x, []
    for _ in range(3):
      y, aux = play(own, expected)
      expected, total = expected + y, [*total, aux.loss]
    np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses[i], total, rtol=1e-4)


def test_a_pruned_expert_is_never_chosen_again_and_the_rest_stays():
  variables, play, train = _start('pruned')
  x = _x(7, 20, 1)
  before, aux = play(variables, x)
  idle = int(np.argmin(aux.count))
  loads = jnp.ones(E).at[idle].set(0.1)
  pruned = {**variables, 'stats': {'load': loads}}
  after, now = play(pruned, x)
  assert now.count[idle] == 0 and now.count.sum() == aux.count.sum()
  gate = variables['params']['gate']['kernel']
  best = jax.lax.top_k(x[:, 0] @ gate, 2)[1]
  untouched = ~np.any(best == idle, -1)
  assert untouched.any() and not untouched.all()
  np.testing.assert_array_equal(after[untouched], before[untouched])
  for i in range(3):
    (_, now), stats = train(pruned, x, jax.random.key(i))
    pruned = {**pruned, **stats}
    assert now.count[idle] == 0
  assert pruned['stats']['load'][idle] < 0.1


def test_a_selection_bias_moves_towards_balance_and_gets_no_gradient():
  variables, _, train = _start('biased')
  x = _x(8, 30, 1) + 2
  first = last = None
  for i in range(60):
    (_, aux), stats = train(variables, x, jax.random.key(i))
    variables = {**variables, **stats}
    first = aux.count if first is None else first
    last = aux.count
  assert np.std(last) < np.std(first)
  assert 'bias' not in variables['params']


def test_every_router_has_its_name():
  kinds = typing.get_args(routers.Config)
  assert tuple(kind().name for kind in kinds) == typing.get_args(routers.Name)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'router': 'best'}, "router='best': must be a config of networks.routers"),
    ({'num_experts': -1}, 'num_experts=-1: must be 0 or more'),
    ({'load_weight': -1.0}, 'load_weight=-1.0: must be at least 0'),
    ({'backend': 'gpu'}, "backend='gpu': must be one of auto"),
    ({'hidden': 0}, 'hidden=0: must be 1 or more'),
  ],
)
def test_a_wrong_config_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    _config(**fields)


@pytest.mark.parametrize(
  'router, fields, message',
  [
    ('NoisyTopK', {'k': 5}, 'k=5: must be at most num_experts=4'),
    ('Balanced', {'k': 5}, 'k=5: must be at most num_experts=4'),
    ('BiasedTopK', {'k': 5}, 'k=5: must be at most num_experts=4'),
    ('NoisyTopK', {'k': 0}, 'k=0: must be 1 or more'),
    ('NoisyTopK', {'groups': 3}, 'groups=3: must divide num_experts=4'),
    (
      'NoisyTopK',
      {'groups': 2, 'group_k': 3},
      'group_k=3: must be at most groups=2',
    ),
    (
      'NoisyTopK',
      {'groups': 2, 'k': 3},
      'k=3: must be at most the 2 experts of a group',
    ),
    (
      'NoisyTopK',
      {'groups': 2, 'prune_below': 0.1},
      'prune_below=0.1: needs groups=0, not 2',
    ),
    ('NoisyTopK', {'noise_epsilon': 0.0}, 'noise_epsilon=0.0: must be above 0'),
    ('NoisyTopK', {'load_momentum': 2.0}, 'load_momentum=2.0: must be within'),
    ('NoisyTopK', {'name': 'soft'}, "name='soft': must be 'noisy_top_k'"),
    ('Balanced', {'limit': -1}, 'limit=-1: must be 0 or more'),
    (
      'ExpertChoice',
      {'capacity_factor': 4.5},
      'capacity_factor=4.5: must be at most num_experts=4',
    ),
    ('Soft', {'slots': 0}, 'slots=0: must be 1 or more'),
  ],
)
def test_a_wrong_router_is_refused(router, fields, message):
  with pytest.raises(ValueError, match=message):
    _config(getattr(routers, router)(**fields))


def test_an_expert_with_statistics_is_refused():
  layer = moe.MoE(_config(), nn.BatchNorm(use_running_average=True))
  with pytest.raises(ValueError, match='expert=BatchNorm: must have param'):
    layer.init(jax.random.key(0), _x(0, 3))
