"""Value prefixes in the tree: rewards as differences of predicted sums.

EfficientZero (Ye et al. 2021, "Mastering Atari games with limited data", 4.2)
predicts the *sum* of rewards since the last reset by an LSTM, which is easier
than to say at which step a reward falls. In the tree the reward of an edge is
`prefix(child) - prefix(parent)`. The LSTM's carry is zeroed after every node
whose depth is a multiple of the horizon, and its children's prefixes count
from zero.

Depth, carry and prefix ride in the embedding, so that parent and depth are
each node's own: a batch's elements are at different depths, and a search
expands nodes in any order.

Axes: `B` batch, `A` actions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx


class PrefixStep(NamedTuple):
  """What a model with value prefixes predicts for one action.

  Attributes:
    prefix: float `[B]`, the sum of rewards since the last reset, in raw units
      and undiscounted.
    discount: float `[B]`, the model's own: gamma inside, 0 at termination.
    prior_logits: float `[B, A]`.
    value: float `[B]`, in raw units.
    state: pytree `[B, ...]`, the next latent state.
    carry: pytree `[B, ...]`, the LSTM's carry after this step.
  """

  prefix: chex.Array
  discount: chex.Array
  prior_logits: chex.Array
  value: chex.Array
  state: Any
  carry: Any


class PrefixEmbedding(NamedTuple):
  """A node's embedding.

  Attributes:
    state: pytree `[B, ...]`, the latent state.
    carry: pytree `[B, ...]`, the LSTM's carry for the node's children.
    prefix: float `[B]`, what the children's prefixes count from.
    depth: int32 `[B]`, edges from the root.
  """

  state: Any
  carry: Any
  prefix: chex.Array
  depth: chex.Array


def root_embedding(
  state: Any, carry: Any, dtype: Any = jnp.float32
) -> PrefixEmbedding:
  """The embedding of a root: depth 0, prefix 0, carry zero.

  Args:
    state: pytree `[B, ...]`, the root's latent state.
    carry: pytree `[B, ...]`, an LSTM carry, of which only shapes and dtypes
      count: a root is a reset.
    dtype: of the model's prefix.
  """
  batch_size = jax.tree.leaves(state)[0].shape[0]
  return PrefixEmbedding(
    state=state,
    carry=jax.tree.map(jnp.zeros_like, carry),
    prefix=jnp.zeros([batch_size], dtype),
    depth=jnp.zeros([batch_size], jnp.int32),
  )


def recurrent_fn(
  prefix_step: Callable[..., PrefixStep], horizon: chex.Numeric
) -> Callable[..., tuple[mctx.RecurrentFnOutput, PrefixEmbedding]]:
  """mctx's `recurrent_fn` from a model that predicts value prefixes.

  Args:
    prefix_step: `(params, key, action int32 [B], state, carry) ->
      PrefixStep`.
    horizon: steps between resets of the LSTM, at least 1; EfficientZero's is
      5. It must be the one that the model was trained with.

  Returns:
    `(params, key, action, PrefixEmbedding) -> (mctx.RecurrentFnOutput,
    PrefixEmbedding)`.

  Raises:
    ValueError: if `horizon` is below 1.

  >>> def prefix_step(params, key, action, state, carry):
  ...   one = jnp.ones(1)  # What every step earns; the carry adds it up.
  ...   return PrefixStep(carry + 1, one, one[None], one, state, carry + 1)
  >>> step = recurrent_fn(prefix_step, horizon=2)
  >>> node = root_embedding(jnp.zeros((1, 1)), jnp.zeros(1))
  >>> for _ in range(3):
  ...   output, node = step(None, None, jnp.zeros(1, int), node)
  ...   print(output.reward.item(), node.prefix.item(), node.depth.item())
  1.0 1.0 1
  1.0 0.0 2
  1.0 1.0 3
  """
  if isinstance(horizon, int) and horizon < 1:
    raise ValueError(f'horizon={horizon}: must be at least 1')

  def step_fn(params, key, action, embedding):
    step = prefix_step(params, key, action, embedding.state, embedding.carry)
    depth = embedding.depth + 1
    is_reset = depth % horizon == 0

    def zero_at_reset(x):
      mask = jnp.expand_dims(is_reset, tuple(range(1, x.ndim)))
      return jnp.where(mask, jnp.zeros_like(x), x)

    output = mctx.RecurrentFnOutput(
      reward=step.prefix - embedding.prefix,
      discount=step.discount,
      prior_logits=step.prior_logits,
      value=step.value,
    )
    carry, prefix = jax.tree.map(zero_at_reset, (step.carry, step.prefix))
    return output, PrefixEmbedding(step.state, carry, prefix, depth)

  return step_fn
