"""Fully connected layers, and the normalisation that every network shares.

Modules here take one leading batch axis `B`, compute in `dtype` and keep
their parameters and statistics in float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

ModuleDef = Callable[..., nn.Module]

_EPSILON = 1e-5


def spread(key: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
  """A kernel's initialiser: the standard deviation of its entries, everywhere.

  `randomise` then draws all kernels of a network at once: one program of
  random numbers instead of one for each kernel, whose compilation would cost
  as much as that of a whole training step. LeCun's `1 / sqrt(fan_in)`.

  Args:
    key: not used.
    shape: of the kernel, its outputs last.
    dtype: of the kernel.

  Returns:
    `[*shape]`.
  """
  del key
  return jnp.full(shape, math.prod(shape[:-1]) ** -0.5, dtype)


def randomise(params: Any, key: jax.Array) -> Any:
  """Multiplies every leaf named `kernel` by noise of mean 0 and variance 1.

  Args:
    params: parameters of a module whose kernels `spread` initialised (or
      zeros, which stay zeros).
    key: a typed key.

  Returns:
    The parameters, kernels uniform within `sqrt(3)` standard deviations.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
  is_kernel = [path[-1].key == 'kernel' for path, _ in leaves]
  sizes = [leaf.size for (_, leaf), yes in zip(leaves, is_kernel) if yes]
  noise = jax.random.uniform(
    key, (sum(sizes),), minval=-math.sqrt(3), maxval=math.sqrt(3)
  )
  drawn, start = [], 0
  for (_, leaf), yes in zip(leaves, is_kernel):
    if yes:
      part = noise[start : start + leaf.size]
      leaf, start = leaf * part.reshape(leaf.shape), start + leaf.size
    drawn.append(leaf)
  return treedef.unflatten(drawn)


Linear = functools.partial(nn.Dense, kernel_init=spread)


class Network(NamedTuple):
  """A network as two pure functions.

  Attributes:
    init: `(key) -> params`.
    apply: `(params, *inputs) -> output`.
  """

  init: Callable[[jax.Array], Any]
  apply: Callable[..., Any]


class Norm(nn.Module):
  """Normalises the last axis, scales and shifts it.

  `'batch'` keeps running averages in the collection `stats` and uses them
  when `train` is False; `'layer'` needs no statistics; `'none'` only shifts
  (it is the bias of the layer before it, which therefore has none).

  Attributes:
    kind: `'batch'`, `'layer'` or `'none'`.
    momentum: weight of the old running average (torch's `1 - momentum`).
    reduce: mean over devices of an array, where `pmap` splits the batch.
    dtype: of the output; moments are formed in float32.
  """

  kind: str = 'batch'
  momentum: Any = 0.9
  reduce: Callable[[Any], Any] | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    size = x.shape[-1]
    if self.kind == 'layer':
      return nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype)(x)
    shift = self.param('bias', nn.initializers.zeros, (size,))
    if self.kind == 'batch':
      scale = self.param('scale', nn.initializers.ones, (size,))
      mean, variance = self._moments(x, train)
      scale = scale * jax.lax.rsqrt(variance + _EPSILON)
      shift = shift - mean * scale
      x = x * _align(scale, x)
    return (x + _align(shift, x)).astype(self.dtype)

  def _moments(self, x, train):
    size = x.shape[-1]
    old_mean = self.variable('stats', 'mean', jnp.zeros, (size,))
    old_variance = self.variable('stats', 'variance', jnp.ones, (size,))
    if not train:
      return old_mean.value, old_variance.value
    # Two passes over x, because E[x^2] - E[x]^2 cancels where |mean| is large.
    axes = tuple(range(x.ndim - 1))
    x = x.astype(jnp.float32)
    reduce = self.reduce or (lambda x: x)
    mean = reduce(x.mean(axes))
    variance = reduce(jnp.square(x - _align(mean, x)).mean(axes))
    if not self.is_initializing():
      average = lambda old, new: old + (1 - self.momentum) * (new - old)
      old_mean.value = average(old_mean.value, mean)
      old_variance.value = average(old_variance.value, variance)
    return mean, variance


def _align(vector, x):
  """`[C] -> [1, ..., 1, C]`: no implicit rank promotion."""
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


class MLP(nn.Module):
  """Layers of `sizes`, each normalised and rectified, the last one linear.

  Attributes:
    sizes: widths, the output's last.
    norm: makes the normalisation of the hidden layers.
    zero_init: whether the output is zero at first.
    norm_output: whether the last layer is normalised too (it never is
      rectified).
    activation: of the hidden layers.
    dtype: of the computation.
  """

  sizes: Sequence[int]
  norm: ModuleDef = Norm
  zero_init: bool = False
  norm_output: bool = False
  activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    for size in self.sizes[:-1]:
      x = Linear(size, use_bias=False, dtype=self.dtype)(x)
      x = self.activation(self.norm()(x, train))
    x = Linear(
      self.sizes[-1],
      use_bias=not self.norm_output,
      kernel_init=nn.initializers.zeros if self.zero_init else spread,
      dtype=self.dtype,
    )(x)
    return self.norm()(x, train) if self.norm_output else x


class ResidualMLP(nn.Module):
  """`relu(x + norm(linear(relu(norm(linear(x))))))`, width unchanged.

  `resnet.ResidualBlock` for vectors.
  """

  norm: ModuleDef = Norm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    size = x.shape[-1]
    y = Linear(size, use_bias=False, dtype=self.dtype)(x)
    y = jax.nn.relu(self.norm()(y, train))
    y = Linear(size, use_bias=False, dtype=self.dtype)(y)
    return jax.nn.relu(x + self.norm()(y, train))


def make(
  input_size: int,
  hidden_sizes: Sequence[int],
  output_size: int,
  activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
  norm: str = 'none',
  zero_init: bool = False,
) -> Network:
  """A multi-layer perceptron as `Network(init, apply)`.

  Args:
    input_size: length of the input's last axis.
    hidden_sizes: widths of the hidden layers; empty for a linear map.
    output_size: length of the output's last axis.
    activation: of the hidden layers.
    norm: `'none'` or `'layer'`, of the hidden layers.
    zero_init: whether the output is zero at first.

  Returns:
    `init(key) -> params` and `apply(params, x [..., input_size]) ->
    [..., output_size]`, float32.

  Raises:
    ValueError: a size below 1 or an unknown norm.
  """
  sizes = (input_size, *hidden_sizes, output_size)
  if min(sizes) < 1:
    raise ValueError(f'sizes={sizes}: every size must be at least 1')
  if norm not in ('none', 'layer'):
    raise ValueError(f"norm={norm!r}: must be 'none' or 'layer'")
  module = MLP(
    sizes[1:],
    norm=lambda: Norm(norm),
    zero_init=zero_init,
    activation=activation,
  )

  def init(key):
    variables = module.init(key, jnp.zeros((1, input_size)))
    return randomise(variables['params'], key)

  return Network(
    init=init, apply=lambda params, x: module.apply({'params': params}, x)
  )
