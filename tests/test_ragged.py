"""Products of sorted rows with their groups' matrices, beside dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from networks import dispatch, ragged

D, F = 3, 5


def dense(x, kernel, sizes):
  """One-hot groups; rows behind the last group get zeros."""
  ends = jnp.cumsum(sizes)
  row = jnp.arange(x.shape[0])[:, None]
  member = (row >= (ends - sizes)[None]) & (row < ends[None])
  return jnp.einsum('ne,nd,edf->nf', member.astype(x.dtype), x, kernel)


def case(sizes, spare, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  rows = sum(sizes) + spare
  return normal(rows, D), normal(len(sizes), D, F), jnp.int32(sizes)


@pytest.mark.parametrize(
  ('sizes', 'spare'),
  [
    ((70, 0, 33, 1, 96), 0),  # odd, empty, single
    ((0, 0, 200, 0), 0),  # all in one
    ((0, 0, 0), 4),  # none at all
    ((64, 64, 64, 64), 0),  # whole blocks
    ((1, 0, 40), 17),  # rows of no group
    ((7,), 0),
  ],
)
def test_products_and_gradients_are_the_dense_ones(sizes, spare):
  x, kernel, sizes = case(sizes, spare)
  real = jnp.arange(x.shape[0]) < sizes.sum()

  def loss(function):
    def scored(x, kernel):
      y = jnp.where(real[:, None], function(x, kernel, sizes), 0)
      return jnp.sum(jnp.sin(y) * jnp.arange(1, F + 1)[None])

    return jax.jit(jax.value_and_grad(scored, (0, 1)))(x, kernel)

  (want, bars), (got, own) = loss(dense), loss(ragged.ragged_dot)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(own, bars):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_lies_behind_the_last_group_does_not_reach_the_gradient():
  x, kernel, sizes = case((3, 2), 6)

  def bar(x):
    y, pull = jax.vjp(lambda w: ragged.ragged_dot(x, w, sizes), kernel)
    return pull(jnp.ones_like(y))[0]

  other = x.at[5:].set(jnp.inf)
  np.testing.assert_array_equal(bar(x), bar(other))
  assert np.isfinite(bar(other)).all()


def test_many_seeds_are_as_each():
  cases = [case(sizes, 0, seed) for seed, sizes in enumerate([(8, 2), (0, 10)])]
  gradient = jax.grad(
    lambda kernel, x, sizes: jnp.sum(ragged.ragged_dot(x, kernel, sizes) ** 2)
  )
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
  together = jax.vmap(gradient)(stacked[1], stacked[0], stacked[2])
  for one, (x, kernel, sizes) in zip(together, cases):
    want = gradient(kernel, x, sizes)
    np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-5)


def test_half_precision_sums_in_float32():
  x = jnp.ones((4096, 1), jnp.bfloat16)
  kernel, sizes = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.int32([4096])
  bar = jax.grad(
    lambda w: jnp.sum(ragged.ragged_dot(x, w, sizes).astype(jnp.float32))
  )(kernel)
  # Summed in bfloat16 it would stop at 256.
  assert bar.dtype == jnp.bfloat16 and bar[0, 0, 0] == 4096


def test_the_compiler_is_asked_and_not_the_platforms_name(monkeypatch):
  # On a CPU every row meets every group.
  assert not ragged.is_grouped()
  expert = dispatch.Expert(lambda p, x: x, lambda p, x, sizes: x)
  assert dispatch.exact_backend(expert) == 'loop'
  monkeypatch.setattr(dispatch.jax, 'default_backend', lambda: 'gpu')
  for grouped, backend in ((False, 'loop'), (True, 'ragged')):
    monkeypatch.setattr(ragged, 'is_grouped', lambda device, g=grouped: g)
    assert dispatch.exact_backend(expert) == backend
    alone = dispatch.Expert(lambda p, x: x)
    assert dispatch.exact_backend(alone) == 'loop'
