"""Gumbel MuZero's search (Danihelka et al. 2022), one of `search.policies`.

Axes: `B` batch, `A` actions.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx

from search import rows
from search._mctx import batched_search, from_mctx
from search.model import PolicyOutput
from search.roots import as_bool, check_range, checked_qvalues, mask_logits


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
  qtransform = functools.partial(
    mctx.qtransform_completed_by_mix_value,
    value_scale=value_scale,
    maxvisit_init=maxvisit_init,
  )
  root_qvalues = checked_qvalues(root_qvalues, root)
  root_qtransform, make_extra = qtransform, mctx.GumbelMuZeroExtraData
  if root_qvalues is not None:
    make_extra = functools.partial(_GumbelExtraData, root_qvalues=root_qvalues)
    root_qtransform = functools.partial(
      _qtransform_evaluated,
      value_scale=value_scale,
      maxvisit_init=maxvisit_init,
    )
  logits = mask_logits(root.prior_logits, invalid_actions)
  key, gumbel_key = jax.random.split(key)
  if evaluate:
    noise = jnp.zeros_like(logits)
  else:
    noise = rows.draw(jax.random.gumbel, gumbel_key, logits.shape)
    noise *= gumbel_scale

  tree = batched_search(
    params,
    key,
    root=root.replace(prior_logits=logits),
    recurrent_fn=recurrent_fn,
    selector=from_mctx(
      functools.partial(
        mctx.gumbel_muzero_root_action_selection,
        num_simulations=num_simulations,
        max_num_considered_actions=max_num_considered_actions,
        qtransform=root_qtransform,
      ),
      functools.partial(
        mctx.gumbel_muzero_interior_action_selection, qtransform=qtransform
      ),
      needs_key=False,
    ),
    num_simulations=num_simulations,
    max_depth=max_depth,
    invalid_actions=invalid_actions,
    extra_data=make_extra(root_gumbel=noise),
  )
  visits = tree.children_visits[:, mctx.Tree.ROOT_INDEX]
  completed = jax.vmap(lambda tree: root_qtransform(tree, 0))(tree)
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
    value=tree.node_values[:, mctx.Tree.ROOT_INDEX],
    search_tree=tree,
  )


class _GumbelExtraData(NamedTuple):
  """Constants of one search, `[B, A]`; mctx reads `root_gumbel`."""

  root_gumbel: chex.Array
  root_qvalues: chex.Array


def _qtransform_evaluated(tree, node_index, *, value_scale, maxvisit_init):
  """mctx's completed Qs of one root, whose unvisited Qs were evaluated."""
  visits = tree.children_visits[node_index]
  qvalues = tree.qvalues(node_index)
  qvalues = jnp.where(visits > 0, qvalues, tree.extra_data.root_qvalues)
  is_valid = ~as_bool(tree.root_invalid_actions)
  low = jnp.min(qvalues, where=is_valid, initial=jnp.inf)
  high = jnp.max(qvalues, where=is_valid, initial=-jnp.inf)
  scores = (qvalues - low) / jnp.maximum(high - low, 1e-8)
  scores = jnp.where(is_valid, scores, 0)
  return (maxvisit_init + jnp.max(visits)) * value_scale * scores
