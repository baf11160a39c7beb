"""Random numbers of a batch whose rows lie on several devices.

A search row by row needs no other device. Under `jax.shard_map` over an axis
called `rows` each device holds consecutive rows of one batch, as many as any
other; what is drawn here is then this device's part of what one device would
have drawn for the whole batch, at the cost of its own rows. So neither results
nor a device's work depend on the number of devices. Outside of such a region
`split` and `draw` are what they are in `jax.random`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.extend.random as jex_random
import jax.numpy as jnp
from jax.sharding import AxisType

AXIS = 'rows'
_THREEFRY = 'threefry2x32'


def devices() -> int:
  """Devices that share the batch; 1 outside of a region over `rows`."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  return mesh.shape[AXIS] if kinds.get(AXIS) == AxisType.Manual else 1


def split(key: chex.PRNGKey, batch: int) -> chex.Array:
  """One key for each of this device's rows.

  Args:
    key: consumed.
    batch: rows on this device.

  Returns:
    Keys `[batch]`: this device's part of those that `jax.random.split` makes.
  """
  if devices() == 1 or not _counts(key):
    return _part(jax.random.split, key, (batch,))
  # Threefry's split is its fold of 0, 1, 2, ...
  number = jax.lax.axis_index(AXIS) * batch + jnp.arange(batch)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, number)


def draw(
  function: Callable[[chex.PRNGKey, Any], chex.Array],
  key: chex.PRNGKey,
  shape: tuple[int, ...],
) -> chex.Array:
  """This device's rows of what `function` draws for the whole batch.

  Args:
    function: `(key, shape) -> array [*shape, ...]`: `jax.random.uniform`,
      `normal`, `gumbel`, or another that makes each number of the same number
      of random bits. Not `gamma` and what is made of it; for them `split`
      gives keys.
    key: consumed.
    shape: `[batch, ...]`, rows on this device first.

  Returns:
    `[batch, ...]`, on one device `function(key, shape)`.

  Raises:
    ValueError: on several devices, a function that draws other than 32 bits.
  """
  if devices() == 1 or not _counts(key):
    return _part(function, key, shape)
  start = (jax.lax.axis_index(AXIS) * shape[0]).astype(jnp.uint32)
  data = jnp.concatenate([jax.random.key_data(key), start[None]])
  return function(jax.random.wrap_key_data(data, impl=_from_row()), shape)


def _counts(key):
  """Whether bits are a function of the key and of their place in the array."""
  is_partitionable = jax.config.jax_threefry_partitionable  # pyright: ignore
  return is_partitionable and str(jax.random.key_impl(key)) == _THREEFRY


def _part(function, key, shape):
  """Draws all rows and takes this device's: right for every key."""
  batch, number = shape[0], devices()
  drawn = function(key, (number * batch, *shape[1:]))
  if number == 1:
    return drawn
  start = jax.lax.axis_index(AXIS) * batch
  return jax.lax.dynamic_slice_in_dim(drawn, start, batch)


@functools.cache
def _from_row():
  """Threefry whose arrays of bits start at a row: keys `(k0, k1, row)`."""

  def random_bits(key, bit_width, shape):
    if bit_width != 32:
      raise ValueError(f'bit_width={bit_width}: only 32 bits are drawn by rows')
    size, inner = math.prod(shape), math.prod(shape[1:])
    count = key[2] * jnp.uint32(inner) + jnp.arange(size, dtype=jnp.uint32)
    counts = jnp.concatenate([jnp.zeros_like(count), count])
    high, low = jnp.split(jex_random.threefry_2x32((key[0], key[1]), counts), 2)
    return (high ^ low).reshape(shape)

  def derived(function):
    # Keys of one call stay at their row.
    def apply(key, argument):
      plain = jax.random.wrap_key_data(key[:2], impl=_THREEFRY)
      data = jax.random.key_data(function(plain, argument))
      row = jnp.broadcast_to(key[2], (*data.shape[:-1], 1))
      return jnp.concatenate([data, row], -1)

    return apply

  return jex_random.define_prng_impl(
    key_shape=(3,),
    seed=lambda seed: jnp.stack([jnp.uint32(0), seed, jnp.uint32(0)]),
    split=derived(jax.random.split),
    random_bits=random_bits,
    fold_in=derived(jax.random.fold_in),
    name='threefry2x32_from_row',
    tag='rows',
  )
