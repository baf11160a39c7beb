"""Products of sorted rows with their groups' matrices, grouped both ways.

`jax.lax.ragged_dot` computes each row with its own group's matrix where the
compiler has a kernel for that. Its gradient in the matrices has none: for a TPU
it becomes a masked product over all groups, E times the work (jax 0.10.2 for
v5e, seen in the compiled program). Here that gradient is a loop over blocks of
rows, whose length is known when it is compiled. On an H100 the forward product
is dense, too; `is_grouped` asks the compiler.

Axes: `N` rows sorted by group, `E` groups, `D` inputs, `F` outputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_vjp
def ragged_dot(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  """`x[n] @ kernel[g]` for every row n of group g.

  Differentiable in reverse, in x and kernel.

  Args:
    x: float `[N, D]`, sorted by group.
    kernel: float `[E, D, F]`.
    sizes: int32 `[E]`, rows of each group; their sum may be below N.

  Returns:
    `[N, F]`; rows after the last group mean nothing.
  """
  return jax.lax.ragged_dot(x, kernel, sizes)


def _forward(x, kernel, sizes):
  return jax.lax.ragged_dot(x, kernel, sizes), (x, kernel, sizes)


def _backward(residuals, g):
  x, kernel, sizes = residuals
  x_bar = jax.lax.ragged_dot(g, jnp.swapaxes(kernel, 1, 2), sizes)
  real = jnp.arange(x.shape[0]) < jnp.sum(sizes)
  x_bar = jnp.where(real[:, None], x_bar, 0)
  return x_bar, _products(x, g, sizes).astype(kernel.dtype), None


ragged_dot.defvjp(_forward, _backward)


def _products(x, g, sizes):
  """`sum of x[n]^T g[n]` over the rows of each group, float32 `[E, D, F]`."""
  rows, groups = x.shape[0], sizes.shape[0]
  block = block_size(rows, groups)
  # No group has more blocks than its rows fill, and one that is not full.
  number = rows // block + groups
  blocks = -(-sizes // block)
  start = jnp.cumsum(sizes) - sizes
  owner = jnp.repeat(jnp.arange(groups), blocks, total_repeat_length=number)
  within = jnp.arange(number) - (jnp.cumsum(blocks) - blocks)[owner]
  begin = start[owner] + within * block
  end = (start + sizes)[owner]
  pad = lambda a: jnp.pad(a, ((0, block), (0, 0)))
  x, g = pad(x), pad(g)

  def one(i, total):
    take = lambda a: jax.lax.dynamic_slice_in_dim(a, begin[i], block)
    # Blocks that are left over begin after the end of the last group.
    real = begin[i] + jnp.arange(block) < end[i]
    own = jnp.where(real[:, None], take(x), 0)
    product = jax.lax.dot_general(
      own,
      jnp.where(real[:, None], take(g), 0),
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    return total.at[owner[i]].add(product)

  zeros = jnp.zeros((groups, x.shape[1], g.shape[1]), jnp.float32)
  return jax.lax.fori_loop(0, number, one, zeros)


def block_size(pairs: int, experts: int) -> int:
  """Rows of a block: a quarter of an expert's even share, from 32 to 256.

  Larger ones waste more work on rows that are not the expert's, smaller ones
  make products of matrices slow; measured for 8 to 128 experts on CPU.
  """
  share = max(pairs // experts, 1)
  even = 1 << (share - 1).bit_length()
  return max(min(even // 4, 256), min(even, 32))


@functools.cache
def is_grouped(device: Any = None) -> bool:
  """Whether a device's compiler multiplies each row with its own group only.

  The product and its gradient are compiled for 4 and for 16 groups and as many
  rows. Neither operations nor memory may double: a dense product takes four
  times as many.

  Args:
    device: whose compiler is asked; None for the default one.
  """

  def loss(x, kernel, sizes):
    return jnp.sum(jnp.square(ragged_dot(x, kernel, sizes)))

  def taken(groups):
    x, kernel, sizes = (
      jax.ShapeDtypeStruct(shape, dtype)
      for shape, dtype in (
        ((8192, 64), jnp.float32),
        ((groups, 64, 128), jnp.float32),
        ((groups,), jnp.int32),
      )
    )
    where: dict[str, Any] = {}
    if device is not None:
      whole = jax.sharding.SingleDeviceSharding(device)
      where = {'in_shardings': whole, 'out_shardings': whole}
    gradient = jax.jit(jax.grad(loss, (0, 1)), **where)
    compiled = gradient.lower(x, kernel, sizes).compile()
    operations = (compiled.cost_analysis() or {}).get('flops', 0.0)
    memory = compiled.memory_analysis()
    return operations, 0 if memory is None else memory.temp_size_in_bytes

  return all(many < 2 * few + 1 for few, many in zip(taken(4), taken(16)))
