"""Residual networks for images: `[B, H, W, C]`, channels last.

Only 3x3 convolutions live here; a 1x1 convolution is a `Dense`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from networks import mlp

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def _convolve(x, kernel, stride=1):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=_LAYOUT
  )


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """3x3 convolution with stride 1 and zero padding, fast to differentiate.

  On CPUs, XLA compiles the gradient with respect to a kernel to a naive loop
  when it stands in the body of a `scan`, which is where an unrolled model has
  it. Written as an ordinary convolution with batch and channels exchanged it
  stays fast. Other backends get XLA's own gradient.

  Args:
    x: `[B, H, W, C]`.
    kernel: `[3, 3, C, D]`, of x's dtype.

  Returns:
    `[B, H, W, D]`. Reverse mode only, first derivatives only.
  """
  return _convolve(x, kernel)


def _forward(x, kernel):
  return _convolve(x, kernel), (x, kernel)


def _backward(residuals, dy):
  x, kernel = residuals
  return jax.lax.platform_dependent(
    x, kernel, dy, cpu=_backward_cpu, default=_backward_default
  )


def _backward_default(x, kernel, dy):
  return jax.vjp(_convolve, x, kernel)[1](dy)


def _backward_cpu(x, kernel, dy):
  dx = _convolve(dy, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
  # The barriers keep XLA from folding the transposes into the convolution.
  x, dy = jax.lax.optimization_barrier(
    (x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3))
  )
  dkernel = jax.lax.optimization_barrier(_convolve(x, dy))
  return dx, dkernel.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)


class Conv(nn.Module):
  """3x3 convolution without bias, padded by one zero on every side.

  Attributes:
    channels: of the output.
    stride: 1 keeps the resolution, 2 halves it (rounding up).
    dtype: of the computation.
  """

  channels: int
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (3, 3, x.shape[-1], self.channels)
    kernel = self.param('kernel', mlp.spread, shape, jnp.float32)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if self.stride == 1:
      return convolve(x, kernel)
    return _convolve(x, kernel, self.stride)


class ResidualBlock(nn.Module):
  """`relu(skip(x) + norm(conv(relu(norm(conv(x))))))`.

  The skip is the identity, or a convolution of its own where the stride or
  the number of channels changes (He et al. 2016, as in MuZero).
  """

  channels: int
  stride: int = 1
  norm: mlp.ModuleDef = mlp.Norm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = Conv(self.channels, self.stride, dtype=self.dtype)(x)
    y = jax.nn.relu(self.norm()(y, train))
    y = Conv(self.channels, dtype=self.dtype)(y)
    y = self.norm()(y, train)
    if self.stride != 1 or x.shape[-1] != self.channels:
      x = Conv(self.channels, self.stride, dtype=self.dtype)(x)
    return jax.nn.relu(x + y)


class AtariTorso(nn.Module):
  """96x96 or 84x84 frames to 6x6 (Schrittwieser et al. 2020, App. F, scaled).

  Convolution of stride 2 to `channels / 2`, block, block of stride 2 to
  `channels`, block, average pooling, block, average pooling: a sixteenth of
  the resolution, each halving rounded up.
  """

  channels: int
  norm: mlp.ModuleDef = mlp.Norm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    style = {'norm': self.norm, 'dtype': self.dtype}
    x = Conv(self.channels // 2, stride=2, dtype=self.dtype)(x)
    x = jax.nn.relu(self.norm()(x, train))
    x = ResidualBlock(self.channels // 2, **style)(x, train)
    x = ResidualBlock(self.channels, stride=2, **style)(x, train)
    x = ResidualBlock(self.channels, **style)(x, train)
    x = _halve(x)
    x = ResidualBlock(self.channels, **style)(x, train)
    return _halve(x)


def _halve(x):
  """3x3 average pooling with stride 2, zeros around the image.

  As sums of slices, because on CPUs XLA's `reduce_window` is several times
  slower, its gradient above all.
  """
  height, width = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  rows = [x[:, i : i + height : 2] for i in range(3)]
  x = rows[0] + rows[1] + rows[2]
  columns = [x[:, :, j : j + width : 2] for j in range(3)]
  return (columns[0] + columns[1] + columns[2]) / 9


class ImageTorso(nn.Module):
  """A convolution for small images, at full resolution if `stride` is 1."""

  channels: int
  stride: int = 1
  norm: mlp.ModuleDef = mlp.Norm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = Conv(self.channels, self.stride, dtype=self.dtype)(x)
    return jax.nn.relu(self.norm()(x, train))
