"""Gumbel MuZero's search (Danihelka et al. 2022), one of `search.policies`.

Axes: `B` batch, `A` actions.
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx
import numpy as np

from search import rows
from search import trees as tree_lib
from search.engine import batched_search
from search.model import PolicyOutput
from search.roots import as_bool, check_range, checked_qvalues, mask_logits
from search.rules import Rule, only
from search.trees import Node


def gumbel(
  params: Any,
  key: chex.PRNGKey,
  root: mctx.RootFnOutput,
  recurrent_fn: mctx.RecurrentFn,
  num_simulations: int,
  *,
  invalid_actions: chex.Array | None = None,
  root_qvalues: chex.Array | None = None,
  max_depth: int | None = None,
  embedding_dtype: str = 'float32',
  engine: str = 'auto',
  max_num_considered_actions: int = 16,
  gumbel_scale: chex.Numeric = 1.0,
  value_scale: chex.Numeric = 0.1,
  maxvisit_init: chex.Numeric = 50.0,
  evaluate: bool = False,
) -> PolicyOutput:
  """Full Gumbel MuZero (Danihelka et al. 2022).

  Result for result `mctx.gumbel_muzero_policy` with its default Q transform,
  for the same key.

  Args:
    params: passed to `recurrent_fn`.
    key: consumed.
    root: prior logits `[B, A]`, value `[B]`, embedding pytree `[B, ...]`.
    recurrent_fn: a `Model.step`.
    num_simulations: simulations for each root, at least 1; static.
    invalid_actions: bool `[B, A]`, True where an action may not be taken.
    root_qvalues: float `[B, A]`, Qs of the root's actions before their first
      visit; None for the rule's own idea of an unvisited action.
    max_depth: the most edges from the root to a leaf; static.
    embedding_dtype: what the tree keeps float32 embeddings as: 'float32', or
      'bfloat16'; static.
    engine: of `search.engine.batched_search`: 'auto', 'loops' or 'kernels';
      static.
    max_num_considered_actions: actions that Sequential Halving starts from,
      at least 1; static.
    gumbel_scale: scale of the root's Gumbel noise.
    value_scale: c_scale of the paper's sigma.
    maxvisit_init: c_visit of the paper's sigma.
    evaluate: no Gumbel noise.

  Returns:
    `action_weights` are the improved policy, softmax(logits + sigma(completed
    Q)), not visit counts.

  Raises:
    ValueError: if an argument is out of range.
  """
  check_range('max_num_considered_actions', max_num_considered_actions, low=1)
  check_range('gumbel_scale', gumbel_scale, low=0)
  qvalues = checked_qvalues(root_qvalues, root)
  logits = mask_logits(root.prior_logits, invalid_actions)
  key, gumbel_key = jax.random.split(key)
  if evaluate:
    noise = jnp.zeros_like(logits)
  else:
    noise = rows.draw(jax.random.gumbel, gumbel_key, logits.shape)
    noise *= gumbel_scale
  invalid = invalid_actions
  if invalid is None:
    invalid = jnp.zeros_like(logits, bool)
  known, scales = _Root(invalid, qvalues, noise), (value_scale, maxvisit_init)
  trees, tree = batched_search(
    params,
    key,
    root=root.replace(prior_logits=logits),
    recurrent_fn=recurrent_fn,
    rule=_rule(known, scales, num_simulations, max_num_considered_actions),
    num_simulations=num_simulations,
    max_depth=max_depth,
    embedding_dtype=embedding_dtype,
    engine=engine,
    invalid_actions=invalid_actions,
    extra_data=mctx.GumbelMuZeroExtraData(root_gumbel=noise),
  )
  node = tree_lib.view(trees, tree_lib.ROOT)
  visits, completed = node.visits, _completed(scales, node, known)
  # The floor lets a valid action of logit -inf win against invalid ones.
  top = jnp.max(logits, axis=-1, keepdims=True)
  scores = jnp.maximum(-1e9, noise + (logits - top) + completed)
  is_best = visits == jnp.max(visits, axis=-1, keepdims=True)
  if invalid_actions is not None:
    is_best &= ~as_bool(invalid_actions)
  action = jnp.argmax(jnp.where(is_best, scores, -jnp.inf), axis=-1)
  weights = jax.nn.softmax(mask_logits(logits + completed, invalid_actions))
  return PolicyOutput(
    action=action.astype(jnp.int32),
    action_weights=weights,
    value=node.value,
    search_tree=tree,
  )


class _Root(NamedTuple):
  """What the rule knows at a root.

  Attributes:
    is_invalid: bool `[B, A]`, True (or 1) where an action may not be taken.
    qvalues: float `[B, A]`, of actions without a visit, or None.
    gumbel: float `[B, A]`, the noise.
  """

  is_invalid: chex.Array
  qvalues: chex.Array | None
  gumbel: chex.Array


def _rule(known, scales, num_simulations, max_considered) -> Rule:
  """Sequential Halving at the root, and no chance below."""
  considered = range(max_considered + 1)
  table = np.asarray(
    [visits_in_turn(number, num_simulations) for number in considered]
  )
  valid = jnp.sum(~as_bool(known.is_invalid), axis=-1)
  considered = jnp.asarray(table)[jnp.minimum(max_considered, valid)]

  def begin(key, sim, trees):
    del key, trees
    return considered[:, sim]

  return Rule(begin, _select, scales, known)


def _select(scales, node: Node, considered, root: _Root | None):
  completed = _completed(scales, node, root)
  if root is None:
    policy = jax.nn.softmax(only(node, node.logits + completed, -jnp.inf))
    total = jnp.sum(node.visits, axis=-1, keepdims=True)
    scores = policy - node.visits / (1 + total)
  else:
    logits = only(node, node.logits, -jnp.inf)
    logits -= jnp.max(logits, axis=-1, keepdims=True)
    # The only action that is considered is taken, whatever its score.
    scores = jnp.maximum(-1e9, root.gumbel + logits + completed)
    is_considered = node.visits == considered[..., None]
    is_considered &= ~as_bool(root.is_invalid)
    scores = jnp.where(is_considered, scores, -jnp.inf)
  scores = only(node, scores, -jnp.inf)
  return jnp.argmax(scores, axis=-1).astype(jnp.int32), considered


def _completed(scales, node: Node, root: _Root | None):
  """Qs of all actions, rescaled and weighted: the paper's sigma, `[..., A]`.

  An action without a visit has the mixed value of the paper's Appendix D, or
  what was evaluated beforehand.
  """
  value_scale, maxvisit_init = scales
  is_visited, exists = node.visits > 0, None
  if root is not None and root.qvalues is not None:
    qvalues = jnp.where(is_visited, node.qvalues, root.qvalues)
    exists = ~as_bool(root.is_invalid)
  else:
    unvisited = _mixed_value(node, is_visited)[..., None]
    qvalues = jnp.where(is_visited, node.qvalues, unvisited)
  low = high = qvalues
  for mask in (exists, node.exists):
    if mask is not None:
      low, high = jnp.where(mask, low, jnp.inf), jnp.where(mask, high, -jnp.inf)
  low = jnp.min(low, axis=-1, keepdims=True)
  high = jnp.max(high, axis=-1, keepdims=True)
  scores = (qvalues - low) / jnp.maximum(high - low, 1e-8)
  if exists is not None:
    scores = jnp.where(exists, scores, 0)
  most = jnp.max(node.visits, axis=-1, keepdims=True)
  return (maxvisit_init + most) * value_scale * scores


def _mixed_value(node: Node, is_visited):
  # Visited actions may have no probability at all.
  prior = jnp.maximum(jnp.finfo(node.prior.dtype).tiny, node.prior)
  share = jnp.sum(jnp.where(is_visited, prior, 0), axis=-1, keepdims=True)
  weighted = prior * node.qvalues / jnp.where(is_visited, share, 1)
  weighted = jnp.sum(jnp.where(is_visited, weighted, 0), axis=-1)
  total = jnp.sum(node.visits, axis=-1)
  return (node.raw_value + total * weighted) / (total + 1)


def visits_in_turn(max_considered: int, num_simulations: int) -> list[int]:
  """How often an action that Sequential Halving visits was visited before.

  Args:
    max_considered: actions that it starts from.
    num_simulations: in all.

  Returns:
    One number for each simulation (Karnin et al. 2013; Danihelka et al. 2022,
    Section 4).

  >>> visits_in_turn(4, 8)
  [0, 0, 0, 0, 1, 1, 2, 2]
  """
  if max_considered <= 1:
    return list(range(num_simulations))
  rounds = math.ceil(math.log2(max_considered))
  found, visits, left = [], 0, max_considered
  while len(found) < num_simulations:
    for _ in range(max(1, num_simulations // (rounds * left))):
      found += [visits] * left
      visits += 1
    left = max(2, left // 2)
  return found[:num_simulations]
