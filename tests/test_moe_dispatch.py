"""Dispatch: every backend against a plain loop over tokens and experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from networks import dispatch
from networks.routing import ByExpert, ByToken, Mixture

T, E, K, D, OUT = 24, 5, 2, 6, 3
EXACT = ('dense', 'loop', 'ragged', 'capacity')


def _apply(params, x):
  return jnp.tanh(x @ params['in']) @ params['out']


def _grouped(params, x, sizes):
  hidden = jnp.tanh(jax.lax.ragged_dot(x, params['in'], sizes))
  return jax.lax.ragged_dot(hidden, params['out'], sizes)


EXPERT = dispatch.Expert(_apply, _grouped)


def _case(seed):
  """Tokens, experts and a plan with empty places, and expert 1 idle."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {'in': normal(E, D, 4), 'out': normal(E, 4, OUT)}
  chosen = np.stack([rng.permutation([0, 2, 3, 4])[:K] for _ in range(T)])
  gate = rng.uniform(0.1, 1, size=(T, K))
  chosen[3, 1], gate[3, 1] = E, 0
  chosen[7], gate[7] = E, 0
  plan = ByToken(jnp.asarray(chosen, jnp.int32), jnp.asarray(gate, jnp.float32))
  return params, normal(T, D), plan


def _expected(params, x, plan):
  """In float64, one pair after the other."""
  params = {k: np.asarray(v, np.float64) for k, v in params.items()}
  y = np.zeros((x.shape[0], OUT))
  for t in range(x.shape[0]):
    for expert, gate in zip(np.asarray(plan.expert[t]), plan.gate[t]):
      if expert < E:
        hidden = np.tanh(np.asarray(x[t], np.float64) @ params['in'][expert])
        y[t] += float(gate) * hidden @ params['out'][expert]
  return y


def _loss(backend, block, params, x, gate, chosen):
  y, dropped = dispatch.apply(
    ByToken(chosen, gate),
    x,
    params,
    EXPERT,
    backend=backend,
    capacity_factor=float(E),
    block=block,
  )
  return jnp.sum(jnp.sin(y)), (y, dropped)


@functools.cache
def _graded(backend, block=8):
  loss = functools.partial(_loss, backend, block)
  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


@pytest.fixture(scope='module')
def case():
  return _case(0)


@pytest.fixture(scope='module')
def reference(case):
  """Output of a loop over pairs; gradients with parameters copied a pair."""
  params, x, plan = case

  def loss(params, x, gate):
    token, place = np.nonzero(np.asarray(plan.expert) < E)
    own = jax.tree.map(lambda p: p[plan.expert[token, place]], params)
    outputs = jax.vmap(_apply)(own, x[token])
    weighted = gate[token, place][:, None] * outputs
    return jnp.sum(jnp.sin(jnp.zeros((T, OUT)).at[token].add(weighted)))

  return _expected(params, x, plan), jax.jit(jax.grad(loss, (0, 1, 2)))(
    params, x, plan.gate
  )


@pytest.mark.parametrize('backend', EXACT)
def test_output_and_gradients_are_those_of_a_plain_loop(
  case, reference, backend
):
  params, x, plan = case
  expected, gradients = reference
  found, (y, dropped) = _graded(backend)(params, x, plan.gate, plan.expert)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  assert float(dropped) == 0
  # A gate of an empty place has no say; what it would have is no one's.
  real = np.asarray(plan.expert) < E
  found = (*found[:2], jnp.where(real, found[2], 0))
  gradients = (*gradients[:2], jnp.where(real, gradients[2], 0))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradients)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('block', [1, 3, 64])
def test_blocks_of_any_size_give_the_same(case, block):
  params, x, plan = case
  work = functools.partial(_loss, 'loop', block)
  _, (y, _) = jax.jit(work)(params, x, plan.gate, plan.expert)
  np.testing.assert_allclose(
    y, _expected(params, x, plan), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('shared', ['nothing', 'params', 'x'])
def test_the_loop_under_vmap_is_a_loop_over_it(shared):
  cases = [_case(seed) for seed in range(3)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
  axes = [None if shared == name else 0 for name in ('params', 'x')]
  params, x = (
    cases[0][i] if axis is None else stacked[i] for i, axis in enumerate(axes)
  )
  plan = stacked[2]
  every = jax.vmap(_graded('loop'), (*axes, 0, 0))
  found, (y, _) = jax.jit(every)(params, x, plan.gate, plan.expert)
  for i, case in enumerate(cases):
    own = (
      cases[0][0] if shared == 'params' else case[0],
      cases[0][1] if shared == 'x' else case[1],
    )
    alone, (row, _) = _graded('loop')(*own, case[2].gate, case[2].expert)
    np.testing.assert_allclose(y[i], row, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone)):
      np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=2e-6)


def test_vmap_within_vmap_folds_twice(case):
  params, x, plan = case
  xs = jnp.stack([x, 2 * x, -x, x + 1]).reshape(2, 2, T, D)
  run = lambda x: dispatch.apply(plan, x, params, EXPERT, backend='loop')[0]
  found = jax.jit(jax.vmap(jax.vmap(run)))(xs)
  for i, j in np.ndindex(2, 2):
    expected = _expected(params, xs[i, j], plan)
    np.testing.assert_allclose(found[i, j], expected, rtol=1e-5, atol=1e-5)


def test_vmap_is_one_pass_over_the_rows_of_all_seeds(case):
  """Rows of S seeds and one block, not S times those of one seed."""
  params, x, plan = case
  run = lambda x: dispatch.apply(
    plan, x, params, EXPERT, backend='loop', block=8
  )[0]
  text = str(jax.make_jaxpr(jax.vmap(run))(jnp.stack([x, x])))
  assert f'f32[{2 * T * K + 8},{OUT}]' in text
  assert f'f32[2,{T * K + 8},{OUT}]' not in text


def test_capacity_drops_and_counts_what_has_no_place():
  chosen = jnp.zeros((6, 1), jnp.int32).at[4, 0].set(1).at[5, 0].set(2)
  plan = ByToken(chosen, jnp.ones((6, 1)))
  params = {'scale': jnp.asarray([1.0, 10.0])}
  scale = dispatch.Expert(lambda p, x: p['scale'] * x)
  x = jnp.arange(1.0, 7.0)[:, None]
  y, dropped = dispatch.apply(
    plan, x, params, scale, backend='capacity', capacity_factor=0.7
  )
  # Places: 0.7 * 6 / 2, rounded up: 3 an expert; the last token has none.
  np.testing.assert_array_equal(y[:, 0], [1, 2, 3, 0, 50, 0])
  np.testing.assert_allclose(dropped, 1 / 5, rtol=1e-6)


def test_plans_of_experts_and_of_mixtures(case):
  params, x, _ = case
  rng = np.random.default_rng(1)
  token = np.stack([rng.permutation(T)[:4] for _ in range(E)])
  gate = rng.uniform(size=(E, 4)).astype(np.float32)
  plan = ByExpert(jnp.asarray(token), jnp.asarray(gate))
  y, _ = dispatch.apply(plan, x, params, EXPERT)
  expected = np.zeros((T, OUT))
  for e, c in np.ndindex(E, 4):
    own = {k: v[e] for k, v in params.items()}
    expected[token[e, c]] += gate[e, c] * np.asarray(
      _apply(own, x[token[e, c]])
    )
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)

  weights = rng.dirichlet(np.ones(T), (E, 2)).transpose(2, 0, 1)
  shares = rng.dirichlet(np.ones(E * 2), T).reshape(T, E, 2)
  plan = Mixture(
    jnp.asarray(weights, jnp.float32), jnp.asarray(shares, jnp.float32)
  )
  y, _ = dispatch.apply(plan, x, params, EXPERT)
  expected = np.zeros((T, OUT))
  for e, s in np.ndindex(E, 2):
    own = {k: v[e] for k, v in params.items()}
    slot = jnp.asarray(weights[:, e, s] @ np.asarray(x), jnp.float32)
    expected += shares[:, e, s, None] * np.asarray(_apply(own, slot))
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('backend', ['loop', 'capacity'])
def test_empty_places_leave_gradients_finite(case, backend):
  """Of an expert that has no gradient at zero."""
  params, x, plan = case

  def unit(params, x):
    h = x @ params['in']
    return h / jnp.linalg.norm(h, axis=-1, keepdims=True)

  def loss(params, x):
    y, _ = dispatch.apply(
      plan, x, params, dispatch.Expert(unit), backend=backend
    )
    return jnp.sum(jnp.sin(y))

  gradients = jax.jit(jax.grad(loss, (0, 1)))({'in': params['in']}, x)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_places_are_rounded_up_but_for_errors():
  assert dispatch.places(1.1 * 100 / 10) == 11
  assert dispatch.places(10.1) == 11


def test_wrong_backends_are_refused(case):
  params, x, plan = case
  with pytest.raises(ValueError, match="backend='fast': must be one of auto"):
    dispatch.apply(plan, x, params, EXPERT, backend='fast')
  with pytest.raises(ValueError, match="backend='ragged': this expert has no"):
    dispatch.apply(plan, x, params, dispatch.Expert(_apply), backend='ragged')
