"""SimSiam's projector and predictor on latents.

Chen and He 2021, as EfficientZero uses them (Ye et al. 2021, 3.1): the loss
compares `predictor(projector(dynamics(s, a)))` with
`stop_gradient(projector(represent(o)))`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from networks import mlp


class Projector(nn.Module):
  """A latent `[B, ...]`, flattened, to `[B, sizes[-1]]`, float32.

  The last layer is normalised but not rectified.
  """

  sizes: Sequence[int] = (1024, 1024, 1024)
  norm: mlp.ModuleDef = mlp.Norm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, state: jax.Array, train: bool) -> jax.Array:
    x = state.reshape(state.shape[0], -1)
    x = mlp.MLP(self.sizes, norm=self.norm, norm_output=True, dtype=self.dtype)(
      x, train
    )
    return x.astype(jnp.float32)


class Predictor(nn.Module):
  """A projection `[B, P]` to a prediction of another, `[B, P]`, float32."""

  hidden: Sequence[int] = (512,)
  norm: mlp.ModuleDef = mlp.Norm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    sizes = (*self.hidden, x.shape[-1])
    x = mlp.MLP(sizes, norm=self.norm, dtype=self.dtype)(x, train)
    return x.astype(jnp.float32)
