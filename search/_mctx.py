"""mctx's own selection functions in our trees.

Axes: `B` batch, `N` nodes (simulations + 1), `A` actions.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import mctx

from search import rows
from search.engine import batched_search
from search.rules import Rule
from search.trees import Node


def from_mctx(
  root_fn: mctx.RootActionSelectionFn,
  interior_fn: mctx.InteriorActionSelectionFn,
  invalid_actions: chex.Array,
  extra_data: Any = None,
) -> Rule:
  """A `Rule` from mctx's selection functions.

  They get a tree of one node, whose edges' values are their Q-values: rewards
  are zero and discounts one.

  Args:
    root_fn: `(key, tree, node_index) -> action`, unbatched.
    interior_fn: `(key, tree, node_index, depth) -> action`, unbatched.
    invalid_actions: `[B, A]`, ones where the root's action may not be taken.
    extra_data: pytree `[B, ...]` of their tree.

  Returns:
    A rule whose keys are mctx's own, so that its trees are reproduced.
  """

  def begin(key, sim, trees):
    del sim
    batch_size = trees.nodes.shape[0]
    return rows.split(key, batch_size), jnp.zeros(batch_size, jnp.int32)

  def select(constants, node, carry, root):
    del constants
    keys, depth = carry
    pairs = jax.vmap(jax.random.split)(keys)
    tree = _one_node(node, invalid_actions, extra_data)
    if root is not None:
      choose = jax.vmap(lambda key, tree: root_fn(key, tree, 0))
      action = choose(pairs[:, 1], tree)
    else:
      choose = jax.vmap(interior_fn, in_axes=(0, 0, None, 0))
      action = choose(pairs[:, 1], tree, 0, depth)
    return action, (pairs[:, 0], depth + 1)

  return Rule(begin, select, has_kernel=False)


def _one_node(node: Node, invalid_actions, extra_data) -> mctx.Tree:
  integer = lambda x: x.astype(jnp.int32)
  one = lambda x: x[:, None]
  none = jnp.full_like(integer(node.value), mctx.Tree.NO_PARENT)
  return mctx.Tree(
    node_visits=one(integer(node.count)),
    raw_values=one(node.raw_value),
    node_values=one(node.value),
    parents=one(none),
    action_from_parent=one(none),
    children_index=one(jnp.full_like(integer(node.visits), -1)),
    children_prior_logits=one(node.logits),
    children_values=one(node.qvalues),
    children_visits=one(integer(node.visits)),
    children_rewards=one(jnp.zeros_like(node.qvalues)),
    children_discounts=one(jnp.ones_like(node.qvalues)),
    embeddings=(),
    root_invalid_actions=invalid_actions,
    extra_data=extra_data,
  )


def search(
  params: Any,
  rng_key: chex.PRNGKey,
  *,
  root: mctx.RootFnOutput,
  recurrent_fn: mctx.RecurrentFn,
  root_action_selection_fn: mctx.RootActionSelectionFn,
  interior_action_selection_fn: mctx.InteriorActionSelectionFn,
  num_simulations: int,
  max_depth: int | None = None,
  invalid_actions: chex.Array | None = None,
  extra_data: Any = None,
  loop_fn: mctx.LoopFn = jax.lax.fori_loop,
) -> mctx.Tree:
  """`mctx.search`, argument for argument and bit for bit, but faster.

  The selection functions see one node of the tree; see `from_mctx`. Shapes of
  roots, invalid actions bool `[B, A]` and the tree are those of
  `engine.batched_search`.

  Raises:
    ValueError: if a size or shape is wrong.
  """
  invalid = invalid_actions
  if invalid is None:
    invalid = jnp.zeros_like(root.prior_logits)
  _, tree = batched_search(
    params,
    rng_key,
    root=root,
    recurrent_fn=recurrent_fn,
    rule=from_mctx(
      root_action_selection_fn,
      interior_action_selection_fn,
      invalid,
      extra_data,
    ),
    num_simulations=num_simulations,
    max_depth=max_depth,
    invalid_actions=invalid_actions,
    extra_data=extra_data,
    loop_fn=loop_fn,
  )
  return tree
