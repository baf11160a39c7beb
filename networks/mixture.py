"""A mixture of experts as a block of an agent's network, and its bookkeeping.

The block is residual, `relu(x + MoE(norm(x)))`, on tokens of a latent: the
pixels of an image (Obando-Ceron 2024, arXiv 2402.08609, `PerConv`), or a vector
whole or in chunks. Gates are noisy only where a random stream `gate` is given.

A loss calls a network several times: for each unrolled step, and again for
other observations. A `Listener` around the network's statistics goes through
all these calls, and through `lax.scan`; it deals out the gates' keys and sums
the `Aux` of the mixture. What comes out is balanced over all calls together, as
if they were one batch: that is what Shazeer 2017 (section 3.1) does with
unrolled steps, it lets experts specialise by depth, and a step's few states
have not to be spread evenly by themselves.

`control` makes the baseline that later work asks for (arXiv 2410.01930: tokens
explain the gain, experts do not).

Axes: `B` batch; see `networks.routing` for the others.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from networks import balance, mlp, moe

_GATE = 0x6A7E0000


def check(config: moe.Config, name: str, statistics: bool = True) -> None:
  """Refuses a mixture that an agent cannot plan or act with.

  Args:
    config: of the mixture.
    name: of its field, for the message.
    statistics: whether the network keeps statistics next to its parameters.

  Raises:
    ValueError: no experts; a router with which a state's value depends on the
      batch that it comes in, or a backend that drops; or statistics for
      which the network has no place.
  """
  if config.num_experts < 1:
    raise ValueError(
      f'{name}.num_experts={config.num_experts}: must be 1 or more'
    )
  router = config.make_router()
  if router.reads == 'batch':
    raise ValueError(
      f'{name}.router={config.router.name!r}: makes a state depend on its '
      'batch; take noisy_top_k, balanced, biased_top_k or soft'
    )
  if config.backend == 'capacity':
    raise ValueError(
      f"{name}.backend='capacity': drops by what else is in the batch, must "
      'be auto, loop, ragged or dense'
    )
  if router.keeps and not statistics:
    raise ValueError(
      f'{name}.router={config.router.name!r}: keeps statistics '
      f'({", ".join(router.keeps)}), for which this network has no place; take '
      'noisy_top_k with prune_below=0, or balanced'
    )


def control(config: moe.Config) -> moe.Config:
  """One expert in the place of many, with the same tokens and operations.

  As wide as all that work on a token, without a choice; of `soft`, with all
  slots. Source: arXiv 2410.01930.
  """
  router = config.make_router()
  return dataclasses.replace(
    config,
    num_experts=1,
    router=router.control,
    hidden=router.active * config.hidden,
    # The gate has no choice: no loss on it should reach what is before it.
    z_weight=0.0,
  )


class Block(nn.Module):
  """`(x [B, ..., D], train) -> (relu(x + MoE(norm(x))), moe.Aux)`.

  Attributes:
    config: of the mixture, for which `check` has no objection.
    chunks: tokens that a vector `[B, D]` is cut into; of an image `[B, H, W,
      D]`, every pixel is one.
    norm: makes the normalisation.
    dtype: of the experts' computation; gates have float32.
  """

  config: moe.Config
  chunks: int = 1
  norm: mlp.ModuleDef = mlp.Norm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, moe.Aux]:
    tokens = self.norm()(x, train)
    size = x.shape[-1] // self.chunks
    # One axis of tokens: `soft` mixes those of a state along it.
    tokens = tokens.reshape(x.shape[0], -1, size)
    # Outside of any module: the mixture adopts it.
    expert = moe.FeedForward(self.config.hidden, size, self.dtype, parent=None)
    learns = train and self.has_rng('gate')
    y, aux = moe.MoE(self.config, expert)(tokens, learns)
    return jax.nn.relu(x + y.reshape(x.shape).astype(x.dtype)), aux


class Regressor(nn.Module):
  """`(x [B, F], train) -> ([B, outputs], moe.Aux)`: linear, block, linear.

  Attributes:
    width: of the hidden layer.
    outputs: of the last one.
    config: see `Block`.
    chunks: see `Block`.
    norm: of the hidden layer and in the block.
  """

  width: int
  outputs: int
  config: moe.Config
  chunks: int = 1
  norm: mlp.ModuleDef = mlp.Norm

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, moe.Aux]:
    x = mlp.Linear(self.width, use_bias=False)(x)
    x = jax.nn.relu(self.norm()(x, train))
    x, aux = Block(self.config, self.chunks, self.norm)(x, train)
    return mlp.Linear(self.outputs)(x), aux


def gate_key(key: jax.Array) -> jax.Array:
  """The key of an update's gates, apart from all that `key` itself is used for.

  Another one than any split of it: those are what it makes of small numbers.
  """
  return jax.random.fold_in(key, _GATE)


class Listener(NamedTuple):
  """Statistics on their way through a loss's calls of a network.

  Attributes:
    statistics: the network's.
    key: of all gates' noise, a typed key `[]`.
    calls: int32 scalar, of the mixture so far.
    aux: sums over them.
  """

  statistics: Any
  key: jax.Array
  calls: jax.Array
  aux: moe.Aux


def listen(config: moe.Config, statistics: Any, key: jax.Array) -> Listener:
  """A listener that has heard nothing yet.

  Args:
    config: of the mixture.
    statistics: of the network that has it.
    key: typed, for nothing else.
  """
  names = ('importance', 'load', 'z', *config.make_router().losses)
  zeros = lambda: jnp.zeros((config.num_experts,))
  aux = moe.Aux(
    loss=jnp.zeros(()),
    losses={name: jnp.zeros(()) for name in names},
    importance=zeros(),
    load=zeros(),
    count=zeros(),
    dropped=jnp.zeros(()),
    rounds=jnp.zeros(()),
  )
  return Listener(statistics, key, jnp.zeros((), jnp.int32), aux)


def next_key(listener: Listener) -> jax.Array:
  """The gates' key of the next call."""
  return jax.random.fold_in(listener.key, listener.calls)


def hear(listener: Listener, statistics: Any, aux: moe.Aux | None) -> Listener:
  """The listener after a call of the network.

  Args:
    listener: before the call.
    statistics: the network's, after the call.
    aux: of the mixture; None where the call did not pass it.
  """
  if aux is None:
    return listener._replace(statistics=statistics)
  total = jax.tree.map(jnp.add, listener.aux, aux)
  return Listener(statistics, listener.key, listener.calls + 1, total)


def told(config: moe.Config, listener: Listener) -> tuple[Any, moe.Aux]:
  """The statistics, and one account of all calls.

  Importance, load and counts are sums over calls, and the two losses of
  balance are those of the sums where the router has them. Other losses,
  `dropped` and `rounds` are means over calls. Pruned experts count as idle in
  the losses of balance, which moves no minimum.
  """
  _, _, calls, total = listener
  mean = lambda x: x / jnp.maximum(calls, 1)
  losses = jax.tree.map(mean, total.losses)
  if config.make_router().balances:
    losses |= {
      'importance': balance.cv_squared(total.importance),
      'load': balance.cv_squared(total.load),
    }
  aux = total._replace(
    loss=moe.weighted(config, losses),
    losses=losses,
    dropped=mean(total.dropped),
    rounds=mean(total.rounds),
  )
  return listener.statistics, aux


def metrics(aux: moe.Aux) -> dict[str, jax.Array]:
  """`moe.metrics` under names of their own, `moe_cv_load` and so on.

  Args:
    aux: of one mixture, or of an ensemble's, leaves `[members, ...]`: the
      means over them.

  Returns:
    float32 scalars by name.
  """
  found = moe.metrics
  if aux.loss.ndim:
    found = jax.vmap(found)
  return {f'moe_{k}': jnp.mean(x) for k, x in found(aux).items()}
