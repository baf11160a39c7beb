"""The value prefix: the sum of rewards since a horizon began, by an LSTM.

Ye et al. 2021, 3.2 and App. A. The caller resets the carry to zeros, row by
row, where a new horizon begins.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from networks import heads, mlp

Carry = tuple[jax.Array, jax.Array]


def initial_carry(batch_size: int, lstm_size: int) -> Carry:
  """Fresh memory: cell and hidden state, zeros, float32 `[B, lstm_size]`."""
  # Two arrays: one used twice could not be donated.
  shape = (batch_size, lstm_size)
  return jnp.zeros(shape), jnp.zeros(shape)


class LSTMCell(nn.Module):
  """One step of an LSTM (Hochreiter and Schmidhuber 1997, with forget gate).

  `(carry, x [B, F]) -> (carry, h [B, size])`; the carry stays float32.
  """

  size: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
    c_tm1, h_tm1 = carry
    x = jnp.concatenate([x, h_tm1.astype(x.dtype)], -1)
    gates = mlp.Linear(4 * self.size, dtype=self.dtype)(x).astype(jnp.float32)
    i, f, o, g = jnp.split(gates, 4, -1)
    c_t = jax.nn.sigmoid(f) * c_tm1 + jax.nn.sigmoid(i) * jnp.tanh(g)
    h_t = jax.nn.sigmoid(o) * jnp.tanh(c_t)
    return (c_t, h_t), h_t


class ValuePrefix(nn.Module):
  """Logits of the prefix up to and with the reward of arriving at a state.

  `(state [B, ...], carry, train) -> (logits [B, outputs], carry)`: squeeze,
  LSTM, norm, relu, hidden layers, and a last layer that is zero at first.
  """

  outputs: int
  channels: int = 16
  lstm_size: int = 512
  hidden: Sequence[int] = (32,)
  norm: mlp.ModuleDef = mlp.Norm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, state: jax.Array, carry: Carry, train: bool
  ) -> tuple[jax.Array, Carry]:
    style = {'norm': self.norm, 'dtype': self.dtype}
    x = heads.Squeeze(self.channels, **style)(state, train)
    carry, x = LSTMCell(self.lstm_size, dtype=self.dtype)(carry, x)
    x = jax.nn.relu(self.norm()(x, train))
    sizes = (*self.hidden, self.outputs)
    x = mlp.MLP(sizes, zero_init=True, **style)(x, train)
    return x.astype(jnp.float32), carry
