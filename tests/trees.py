"""Trees of arrays: stacked, shaken, compared."""

import jax
import jax.numpy as jnp
import numpy as np


def shake(tree, seed=0, scale=0.3):
  """Adds noise to the floats, so that heads which start at zero say more."""
  leaves, treedef = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  noisy = [
    x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating)
    else x
    for x in leaves
  ]
  return treedef.unflatten(noisy)


def stack(*trees):
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_close(got, want, rtol=1e-5, atol=None):
  """`atol` is `rtol` unless it is given."""
  atol = rtol if atol is None else atol
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    got,
    want,
  )
