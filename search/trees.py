"""The trees of a batch of searches, as the engines keep them.

mctx keeps a statistic of an edge with the parent and most of them once more
with the child. Here each number is kept once, next to those that are read with
it: what a rule reads of a node is one row of `edges`, what a climb reads and
writes are two short rows of `links` and `nodes`. `to_mctx` makes mctx's layout
of it, bit for bit.

Axes: `B` batch, `N` nodes (simulations + 1), `M = N + 1`: the last row of the
nodes is written by elements of the batch that have nothing to write, and never
read; `A` actions.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx

ROOT = mctx.Tree.ROOT_INDEX
UNVISITED = mctx.Tree.UNVISITED
NO_PARENT = mctx.Tree.NO_PARENT
# What float32 embeddings may be kept as.
DTYPES = ('float32', 'bfloat16')

# Columns of `Trees.edges`, `nodes` and `links`.
VISITS, QVALUE, PRIOR = 0, 1, 2
VALUE, COUNT, RAW_VALUE = 0, 1, 2
PARENT, ACTION, REWARD, DISCOUNT = 0, 1, 2, 3


class Node(NamedTuple):
  """What a rule sees of a node; leading axes are `[B]`, or none in a kernel.

  Attributes:
    visits: float `[..., A]`, of the actions; a whole number.
    qvalues: float `[..., A]`, 0 of unvisited actions.
    prior: float `[..., A]`, probabilities.
    logits: float `[..., A]`, of the prior; scores may be added to them.
    value: float `[...]`, the mean of all that was backed up.
    count: float `[...]`, visits of the node, its own evaluation included.
    raw_value: float `[...]`, the model's.
    exists: bool `[A]`, false where a kernel's row is longer than there are
      actions; None where all are actions.
    own: whatever the rule keeps for each node, `[..., A]`, or None.
  """

  visits: chex.Array
  qvalues: chex.Array
  prior: chex.Array
  logits: chex.Array
  value: chex.Array
  count: chex.Array
  raw_value: chex.Array
  exists: chex.Array | None = None
  own: Any = None


class Trees(NamedTuple):
  """The trees; whole numbers in float arrays are exact up to 2**24.

  Attributes:
    edges: float `[B, M, A, 3]`, visits, Q-value and prior probability.
    children: int32 `[B, M, A]`, the child's number, or `UNVISITED`.
    nodes: float `[B, M, 3]`, value, visits and the model's own value.
    links: float `[B, M, 4]`, parent and its action (`NO_PARENT` of what does
      not exist), and that edge's reward and discount.
    logits: float `[B, M, A]`, of the priors.
    embeddings: pytree `[B, N, ...]`, as they are stored.
  """

  edges: chex.Array
  children: chex.Array
  nodes: chex.Array
  links: chex.Array
  logits: chex.Array
  embeddings: Any


class Summary(NamedTuple):
  """What the roots came to.

  Attributes:
    visit_counts: float `[B, A]`, of the root's actions.
    visit_probs: float `[B, A]`, over their sum.
    qvalues: float `[B, A]`, 0 of unvisited actions.
    value: float `[B]`, of the root.
  """

  visit_counts: chex.Array
  visit_probs: chex.Array
  qvalues: chex.Array
  value: chex.Array


def at(x: chex.Array, node: Any) -> chex.Array:
  """Row `[B, ...]` of each element's node.

  Args:
    x: `[B, M, ...]`, rows of nodes.
    node: int32 `[B]`, or one int for all.
  """
  if isinstance(node, int):
    return x[:, node]
  return x[jnp.arange(x.shape[0]), node]


def view(trees: Trees, node: Any, own: Any = None) -> Node:
  """What a rule sees of each element's node.

  Args:
    trees: of a batch.
    node: int32 `[B]`, or one int for all.
    own: `[B, N, A]`, whatever the rule keeps for each node; None for nothing.
  """
  edges, stats = at(trees.edges, node), at(trees.nodes, node)
  return Node(
    visits=edges[..., VISITS],
    qvalues=edges[..., QVALUE],
    prior=edges[..., PRIOR],
    logits=at(trees.logits, node),
    value=stats[..., VALUE],
    count=stats[..., COUNT],
    raw_value=stats[..., RAW_VALUE],
    own=None if own is None else at(own, node),
  )


def plant(
  root: mctx.RootFnOutput, num_simulations: int, embedding_dtype: str
) -> Trees:
  """Trees that have only a root.

  Args:
    root: prior logits `[B, A]`, value `[B]`, embedding pytree `[B, ...]`.
    num_simulations: that there is room for.
    embedding_dtype: of `DTYPES`.
  """
  batch, actions = root.prior_logits.shape
  num_nodes = num_simulations + 1
  shape = (batch, num_nodes + 1)
  # Counts of visits need the digits.
  dtype = jnp.promote_types(root.value.dtype, jnp.float32)

  def embeddings(x):
    if embedding_dtype == 'bfloat16':
      x = _stored(x)
    # Each node is written before it is read.
    room = jax.lax.empty((batch, num_nodes, *x.shape[1:]), x.dtype)
    return room.at[:, ROOT].set(x)

  trees = Trees(
    edges=jnp.zeros((*shape, actions, 3), dtype),
    children=jnp.full((*shape, actions), UNVISITED, jnp.int32),
    nodes=jnp.zeros((*shape, 3), dtype),
    links=jnp.zeros((*shape, 4), dtype).at[..., :2].set(NO_PARENT),
    logits=jnp.zeros((*shape, actions), root.prior_logits.dtype),
    embeddings=jax.tree.map(embeddings, root.embedding),
  )
  put = lambda x, row: x.at[:, ROOT].set(row)
  return _node(trees, put, root.prior_logits, root.value, 1)


def expand(
  trees: Trees,
  params: Any,
  key: chex.PRNGKey,
  recurrent_fn: mctx.RecurrentFn,
  parent: chex.Array,
  action: chex.Array,
  number: chex.Array,
  is_cut: bool,
  like: Any,
) -> tuple[Trees, chex.Array]:
  """Evaluates an action of each element's node.

  Args:
    trees: of a batch.
    params: passed to `recurrent_fn`.
    key: passed to `recurrent_fn`.
    recurrent_fn: a `Model.step`.
    parent: int32 `[B]`.
    action: int32 `[B]`.
    number: int32 scalar, of the new nodes.
    is_cut: whether the action may have been evaluated before, for a limit of
      the depth ended the descent; its node is then evaluated again.
    like: pytree `[B, ...]`, an embedding as the model has it.

  Returns:
    The trees, and the numbers of the nodes that were evaluated, int32 `[B]`.
  """
  batch = parent.shape[0]
  rows = jnp.arange(batch)
  embedding = jax.tree.map(
    lambda x, like: _restored(at(x, parent), like), trees.embeddings, like
  )
  step, embedding = recurrent_fn(params, key, action, embedding)
  chex.assert_shape(step.prior_logits, trees.logits.shape[::2])
  chex.assert_shape([step.reward, step.discount, step.value], (batch,))
  leaf = jnp.full_like(parent, number)
  count = 1
  if is_cut:
    child = trees.children[rows, parent, action]
    leaf = jnp.where(child == UNVISITED, leaf, child)
    count = trees.nodes[rows, leaf, COUNT] + 1

  def put(x, row):
    row = row.astype(x.dtype)
    if is_cut:
      return x.at[rows, leaf].set(row, **_OWN_ROWS)
    return jax.lax.dynamic_update_index_in_dim(x, row, number, 1)

  trees = _node(trees, put, step.prior_logits, step.value, count)
  link = _columns(parent, action, step.reward, step.discount)
  return trees._replace(
    children=trees.children.at[rows, parent, action].set(leaf, **_OWN_ROWS),
    links=put(trees.links, link),
    embeddings=jax.tree.map(
      lambda x, row: put(x, row if x.dtype == row.dtype else _stored(row)),
      trees.embeddings,
      embedding,
    ),
  ), leaf


# Of scatters that write one row for each element of the batch.
_OWN_ROWS = {
  'mode': 'promise_in_bounds',
  'unique_indices': True,
  'indices_are_sorted': True,
}


def _stored(x):
  """Float32 rounded to bfloat16, as its bits; anything else as it is.

  XLA's own conversion works on one number at a time on a CPU.
  """
  if x.dtype != jnp.float32:
    return x
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
  return jnp.where(jnp.isnan(x), 0x7FC0, rounded).astype(jnp.uint16)


def _restored(x, like):
  if x.dtype == like.dtype:
    return x
  bits = x.astype(jnp.uint32) << 16
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _node(trees, put, logits, value, count):
  """Writes a node without visited actions; `put(x, row)` knows where."""
  prior = jax.nn.softmax(logits)
  zero = jnp.zeros_like(prior)
  return trees._replace(
    edges=put(trees.edges, _columns(zero, zero, prior)),
    nodes=put(trees.nodes, _columns(value, count, value)),
    logits=put(trees.logits, logits),
  )


def climb(trees: Trees, leaf: chex.Array) -> Trees:
  """Backs up the values of nodes `leaf`, int32 `[B]`, along their paths.

  Elements that have arrived at their root write to the last row, which costs
  less than a scatter that drops them. Whatever is read of an array is an
  ancestor of what is written to it: otherwise XLA may order the write first,
  and copies the whole array at every step to keep the old numbers.
  """
  rows = jnp.arange(leaf.shape[0])
  nowhere = trees.nodes.shape[1] - 1

  def is_climbing(state):
    return jnp.any(state[-1] != ROOT)

  def step(state):
    edges, nodes, stats, returns, node = state
    is_live = node != ROOT
    link = trees.links[rows, node]
    parent, action = (link[:, i].astype(jnp.int32) for i in (PARENT, ACTION))
    parent = jnp.where(is_live, parent, nowhere)
    action = jnp.where(is_live, action, 0)
    reward, discount = link[:, REWARD], link[:, DISCOUNT]
    value, count = stats
    edges = edges.at[rows, parent, action, :PRIOR].set(
      _columns(count, reward + discount * value), **_OWN_ROWS
    )
    returns = reward + discount * returns
    above = nodes[rows, parent]
    value, count = above[:, VALUE], above[:, COUNT]
    mean = (value * count + returns) / (count + 1.0)
    stats = mean, count + 1
    nodes = nodes.at[rows, parent, :RAW_VALUE].set(
      _columns(*stats), **_OWN_ROWS
    )
    return edges, nodes, stats, returns, jnp.where(is_live, parent, ROOT)

  stats = trees.nodes[rows, leaf]
  value = stats[:, VALUE]
  state = (trees.edges, trees.nodes, (value, stats[:, COUNT]), value, leaf)
  edges, nodes, *_ = jax.lax.while_loop(is_climbing, step, state)
  return trees._replace(edges=edges, nodes=nodes)


def summary(trees: Trees) -> Summary:
  """What the roots came to."""
  root = view(trees, ROOT)
  total = jnp.sum(root.visits, axis=-1, keepdims=True)
  probs = root.visits / jnp.maximum(total, 1)
  probs = jnp.where(total > 0, probs, 1 / root.visits.shape[-1])
  return Summary(root.visits, probs, root.qvalues, root.value)


def to_mctx(
  trees: Trees,
  root: mctx.RootFnOutput,
  invalid_actions: chex.Array,
  extra_data: Any,
) -> mctx.Tree:
  """The trees as mctx lays them out.

  Args:
    trees: of a batch.
    root: that they were planted with.
    invalid_actions: `[B, A]`, put into the tree.
    extra_data: pytree `[B, ...]`, put into the tree.
  """
  number = trees.nodes.shape[1] - 1
  nodes, links = trees.nodes[:, :number], trees.links[:, :number]
  children = trees.children[:, :number]
  dtype = root.value.dtype
  exists = children != UNVISITED
  element = jnp.arange(children.shape[0])[:, None, None]

  def of_child(x):
    x = x.astype(dtype)[element, jnp.maximum(children, 0)]
    return jnp.where(exists, x, 0)

  def embeddings(x, like):
    # What was never written is anything.
    is_there = (nodes[..., COUNT] > 0).reshape(
      nodes.shape[:2] + like.ndim * (1,)
    )
    return jnp.where(is_there[:, :, 0], _restored(x, like), 0)

  integer = lambda x: x.astype(jnp.int32)
  return mctx.Tree(
    node_visits=integer(nodes[..., COUNT]),
    raw_values=nodes[..., RAW_VALUE].astype(dtype),
    node_values=nodes[..., VALUE].astype(dtype),
    parents=integer(links[..., PARENT]),
    action_from_parent=integer(links[..., ACTION]),
    children_index=children,
    children_prior_logits=trees.logits[:, :number],
    children_values=of_child(nodes[..., VALUE]),
    children_visits=integer(trees.edges[:, :number, :, VISITS]),
    children_rewards=of_child(links[..., REWARD]),
    children_discounts=of_child(links[..., DISCOUNT]),
    embeddings=jax.tree.map(embeddings, trees.embeddings, root.embedding),
    root_invalid_actions=invalid_actions,
    extra_data=extra_data,
  )


def _columns(*columns):
  return jnp.stack(jnp.broadcast_arrays(*columns), -1)
