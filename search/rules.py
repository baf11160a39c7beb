"""Rules by which a descent chooses.

MuZero's PUCT (Schrittwieser et al. 2020) and EfficientZero's (Ye et al. 2021).
A rule is a pure function of one node's numbers, so that every engine of
`search.engine` can call it: for the rows of a batch, or for one tree inside of
a kernel. Gumbel MuZero's is in `search.gumbel`.

Axes: `B` batch, `A` actions; `[..., A]` is `[B, A]` or `[A]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

from search import trees as tree_lib
from search.roots import as_bool
from search.trees import Node, Trees

# Scores so near to the best are ties for EfficientZero.
_TIE = 1e-6


class Rule(NamedTuple):
  """How descents choose their actions.

  Attributes:
    begin: `(key, sim int32, Trees) -> carry`, once a simulation: a pytree of
      `[B]`, or of `[B, ...]` where no kernel is wanted. One descent passes it
      along; rows of elements whose descent has ended hold garbage.
    select: `(constants, Node, carry, root) -> (action int32 [...], carry)`;
      `root` is None below the root.
    constants: pytree of numbers that `select` needs.
    root: pytree of `[B, A]` that `select` needs at the root.
    own: float `[B, N, A]`, given to `select` as `Node.own`; None for nothing.
    has_kernel: whether `select` may run in a kernel.
  """

  begin: Callable[[chex.PRNGKey, chex.Array, Trees], Any]
  select: Callable[..., tuple[chex.Array, Any]]
  constants: Any = ()
  root: Any = ()
  own: chex.Array | None = None
  has_kernel: bool = True


class Puct(NamedTuple):
  """Constants of the PUCT formula; N visits of a node, n of an action.

  `q + prior * sqrt(N) / (1 + n) * (init + log((N + base + 1) / base))`
  (Schrittwieser et al. 2020, equation 2).

  Attributes:
    init: c1; may be traced.
    base: c2; may be traced.
  """

  init: chex.Numeric = 1.25
  base: chex.Numeric = 19652.0


class Known(NamedTuple):
  """What is known of a root's actions beforehand.

  Attributes:
    is_invalid: bool `[B, A]`, True (or 1) where an action may not be taken.
    qvalues: float `[B, A]` of actions without a visit, or None.
  """

  is_invalid: chex.Array
  qvalues: chex.Array | None


def puct(known: Known, constants: Puct) -> Rule:
  """The rule of `policies.puct`.

  Args:
    known: of the roots.
    constants: of the formula.
  """
  return Rule(lambda key, sim, trees: (), _puct, constants, known)


def _puct(constants: Puct, node: Node, carry, root: Known | None):
  value = node.value[..., None]
  is_visited = node.visits > 0
  known = None if root is None else root.qvalues
  qvalues = jnp.where(
    is_visited, node.qvalues, value if known is None else known
  )
  if root is not None:
    # The value is in the range anyway, so it may stand for what is invalid.
    qvalues = jnp.where(as_bool(root.is_invalid), value, qvalues)
  qvalues = only(node, qvalues, value)
  low = jnp.min(qvalues, axis=-1, keepdims=True)
  high = jnp.max(qvalues, axis=-1, keepdims=True)
  low, high = jnp.minimum(low, value), jnp.maximum(high, value)
  if known is None:
    qvalues = jnp.where(is_visited, qvalues, low)
  scores = (qvalues - low) / jnp.maximum(high - low, 1e-8)
  scores += _exploration(node, node.count[..., None], constants)
  scores = _mask(scores, node, root)
  return jnp.argmax(scores, axis=-1).astype(jnp.int32), carry


def efficientzero(
  known: Known, constants: Puct, minmax_delta: chex.Numeric, order: chex.Array
) -> Rule:
  """The rule of `policies.efficientzero`.

  Args:
    known: of the roots.
    constants: of the PUCT formula.
    minmax_delta: the least range of Qs that is stretched to [0, 1].
    order: float `[B, N, A]`, decides ties, the highest first.
  """

  def begin(key, sim, trees):
    del key, sim
    low, high = extremes(trees)
    if known.qvalues is not None:
      # What was evaluated counts until the tree knows better.
      root = tree_lib.view(trees, tree_lib.ROOT)
      best = jnp.where(root.visits > 0, root.qvalues, known.qvalues)
      is_valid = ~as_bool(known.is_invalid)
      least = jnp.min(best, axis=-1, where=is_valid, initial=jnp.inf)
      most = jnp.max(best, axis=-1, where=is_valid, initial=-jnp.inf)
      low, high = jnp.minimum(low, least), jnp.maximum(high, most)
    # Before the first visit all scores are equal, whatever the range.
    is_empty = low > high
    low, high = jnp.where(is_empty, 0, low), jnp.where(is_empty, 0, high)
    return low, high, jnp.zeros_like(low)

  return Rule(begin, _efficientzero, (constants, minmax_delta), known, order)


def extremes(trees: Trees) -> tuple[chex.Array, chex.Array]:
  """The least and the largest Q of all visited actions.

  A visited action has a child of its own, whose value is the action's, so that
  there are as many as nodes.

  Args:
    trees: of a batch.

  Returns:
    Float `[B]` each, infinite where nothing was visited.
  """
  links = trees.links
  values = trees.nodes[..., tree_lib.VALUE]
  rewards, discounts = (
    links[..., i] for i in (tree_lib.REWARD, tree_lib.DISCOUNT)
  )
  qvalues = rewards + discounts * values
  exists = links[..., tree_lib.PARENT] >= 0
  low = jnp.min(jnp.where(exists, qvalues, jnp.inf), axis=1)
  return low, jnp.max(jnp.where(exists, qvalues, -jnp.inf), axis=1)


def _efficientzero(constants, node: Node, carry, root: Known | None):
  constants, minmax_delta = constants
  low, high, parent_mean = carry
  is_visited = node.visits > 0
  total = jnp.sum(jnp.where(is_visited, node.qvalues, 0), axis=-1)
  num_visited = jnp.sum(is_visited.astype(total.dtype), axis=-1)
  if root is not None:
    mean = total / jnp.maximum(num_visited, 1)
  else:
    mean = (parent_mean + total) / (num_visited + 1)
  unvisited = mean[..., None]
  if root is not None and root.qvalues is not None:
    unvisited = root.qvalues
  qvalues = jnp.where(is_visited, node.qvalues, unvisited)
  low_, high_ = low[..., None], high[..., None]
  scores = (qvalues - low_) / jnp.maximum(high_ - low_, minmax_delta)
  scores = jnp.clip(scores, 0, 1)
  scores += _exploration(node, node.count[..., None] - 1, constants)
  scores = _mask(scores, node, root)
  is_best = scores >= jnp.max(scores, axis=-1, keepdims=True) - _TIE
  action = jnp.argmax(jnp.where(is_best, node.own, -1), axis=-1)
  return action.astype(jnp.int32), (low, high, mean)


def _exploration(node, count, constants):
  """The prior's term of the PUCT formula, for `count` visits `[..., 1]`."""
  weight = constants.init + jnp.log(
    (count + constants.base + 1.0) / constants.base
  )
  return jnp.sqrt(count) * weight * node.prior / (node.visits + 1)


def _mask(scores, node, root):
  """Takes invalid actions out of the choice."""
  is_valid = node.prior > 0 if root is None else ~as_bool(root.is_invalid)
  return only(node, jnp.where(is_valid, scores, -jnp.inf), -jnp.inf)


def only(node, x, otherwise):
  """`x [..., A]`, with another number where a kernel's row has no action.

  Args:
    node: says where.
    x: of the node's actions.
    otherwise: the number.
  """
  return x if node.exists is None else jnp.where(node.exists, x, otherwise)
