"""Rows of a batch on several devices draw what they draw on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from search import roots, rows

_DRAWS = {
  'uniform': (jax.random.uniform, (3,)),
  'gumbel': (jax.random.gumbel, (2, 3)),
  'normal': (jax.random.normal, ()),
  'randint': (lambda key, shape: jax.random.randint(key, shape, 0, 77), ()),
  'bernoulli': (lambda key, shape: jax.random.bernoulli(key, 0.3, shape), (5,)),
}


def over_two(function, out=None):
  """`function` on two devices, each with half of the rows."""
  kinds = (AxisType.Auto,)
  mesh = Mesh(np.array(jax.devices()[:2]), (rows.AXIS,), axis_types=kinds)
  part = PartitionSpec(rows.AXIS)
  mapped = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=PartitionSpec(),
    out_specs=part if out is None else out,
    check_vma=False,
  )
  return jax.jit(mapped)


@pytest.mark.parametrize('name', sorted(_DRAWS))
def test_draws_are_those_of_one_device(name, key):
  draw, inner = _DRAWS[name]
  got = over_two(lambda key: rows.draw(draw, key, (3, *inner)))(key)
  np.testing.assert_array_equal(got, rows.draw(draw, key, (6, *inner)))
  np.testing.assert_array_equal(got, draw(key, (6, *inner)))


def test_keys_and_dirichlet_noise_are_those_of_one_device(key):
  keys = over_two(lambda key: jax.random.key_data(rows.split(key, 3)))(key)
  want = jax.random.key_data(jax.random.split(key, 6))
  np.testing.assert_array_equal(keys, want)
  prior = jnp.full((6, 4), 0.25)
  noise = lambda prior: lambda key: roots.dirichlet(key, prior, 0.3, None)
  got = over_two(noise(prior[:3]))(key)
  np.testing.assert_allclose(got, noise(prior)(key), rtol=1e-6)
  assert rows.devices() == 1


def test_bits_of_another_width_are_refused(key):
  draw = lambda key, shape: jax.random.bits(key, shape, jnp.uint8)
  with pytest.raises(ValueError, match='bit_width=8'):
    over_two(lambda key: rows.draw(draw, key, (3,)))(key)


@pytest.mark.parametrize('kind', ['rbg', 'not partitionable'])
def test_other_keys_are_right_too(kind):
  key = jax.random.key(0, impl='rbg' if kind == 'rbg' else None)
  draw = jax.random.uniform
  with jax.threefry_partitionable(kind == 'rbg'):
    got = over_two(lambda key: rows.draw(draw, key, (3,)))(key)
    keys = over_two(lambda key: jax.random.key_data(rows.split(key, 3)))(key)
    np.testing.assert_array_equal(got, draw(key, (6,)))
    want = jax.random.key_data(jax.random.split(key, 6))
    np.testing.assert_array_equal(keys, want)
