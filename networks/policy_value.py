"""A policy and a value of a board: one trunk, two heads.

Axes: `B` batch, `A` actions.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from networks import heads, mlp, resnet
from networks.mlp import Network


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
  """Sizes and kinds.

  Attributes:
    kind: `mlp` takes the board as a vector, `resnet` as an image.
    hidden_sizes: widths of the layers of an MLP.
    channels: of a residual network.
    blocks: residual blocks.
    head_channels: to which a residual network's heads squeeze the image.
    head_hidden: widths of its heads' hidden layers.
    norm: `layer` or `none`, everywhere.
  """

  kind: Literal['mlp', 'resnet'] = 'mlp'
  hidden_sizes: tuple[int, ...] = (192, 192)
  channels: int = 32
  blocks: int = 3
  head_channels: int = 4
  head_hidden: tuple[int, ...] = (64,)
  norm: Literal['none', 'layer'] = 'none'

  def __post_init__(self):
    if not self.hidden_sizes:
      raise ValueError('hidden_sizes=(): needs at least one width')
    for name in ('channels', 'head_channels'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: must be 1 or more')
    if self.blocks < 0:
      raise ValueError(f'blocks={self.blocks}: must be 0 or more')
    if min(*self.hidden_sizes, *self.head_hidden, 1) < 1:
      raise ValueError(
        f'hidden_sizes={self.hidden_sizes}, head_hidden={self.head_hidden}: '
        'every width must be 1 or more'
      )


class _Module(nn.Module):
  """`(x [B, ...]) -> (logits [B, A], value [B])`, both zero at first."""

  config: NetworkConfig
  num_actions: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    config = self.config
    norm = functools.partial(mlp.Norm, config.norm)
    x = x.astype(jnp.float32)
    hidden: Sequence[int] = ()
    if config.kind == 'mlp':
      x = x.reshape(x.shape[0], -1)
      x = mlp.MLP(config.hidden_sizes, norm=norm, norm_output=True)(x)
      x = jax.nn.relu(x)
    else:
      hidden = config.head_hidden
      x = resnet.ImageTorso(config.channels, norm=norm)(x, False)
      for _ in range(config.blocks):
        x = resnet.ResidualBlock(config.channels, norm=norm)(x, False)
    head = functools.partial(
      heads.Head, channels=config.head_channels, hidden=hidden, norm=norm
    )
    logits = head(self.num_actions)(x, False)
    value = head(1)(x, False)
    return logits, jnp.tanh(value[:, 0])


def make(config: NetworkConfig, observation: Any, num_actions: int) -> Network:
  """The network for boards of a shape.

  Args:
    config: sizes and kinds.
    observation: has the `shape` of one observation, `[H, W, C]` for `resnet`.
    num_actions: `A`.

  Returns:
    `init(key) -> params` and `apply(params, x [B, ...]) -> (logits [B, A],
    value [B] in [-1, 1])`, float32.

  Raises:
    ValueError: a residual network for observations that are not images.
  """
  shape = tuple(observation.shape)
  if config.kind == 'resnet' and len(shape) != 3:
    raise ValueError(
      f'kind=resnet: observations have shape {shape}, not that of an image; '
      'use mlp'
    )
  if not math.prod(shape):
    raise ValueError(f'observation: shape {shape} is empty')
  module = _Module(config, num_actions)

  def init(key):
    variables = module.init(key, jnp.zeros((1, *shape)))
    return mlp.randomise(variables['params'], key)

  return Network(
    init=init, apply=lambda params, x: module.apply({'params': params}, x)
  )
