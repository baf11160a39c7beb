"""Searches of a batch of trees at once.

mctx writes its descent and its climb for one tree and maps them over the
batch, so that every step up a path rewrites all `[B, N, A]` statistics (mctx's
issues 81 and 93) and every step down draws random numbers. Here one loop serves
the batch, gathering and scattering one row an element. The trees are the same
bit for bit.

Axes: `B` batch, `N` nodes (simulations + 1), `A` actions.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import mctx

from search import kernels
from search import trees as tree_lib
from search.rules import Rule
from search.trees import ROOT, UNVISITED, Trees

ENGINES = ('auto', 'loops', 'kernels')


def batched_search(
  params: Any,
  rng_key: chex.PRNGKey,
  *,
  root: mctx.RootFnOutput,
  recurrent_fn: mctx.RecurrentFn,
  rule: Rule,
  num_simulations: int,
  max_depth: int | None = None,
  invalid_actions: chex.Array | None = None,
  embedding_dtype: str = 'float32',
  engine: str = 'auto',
  extra_data: Any = None,
  loop_fn: mctx.LoopFn = jax.lax.fori_loop,
) -> tuple[Trees, mctx.Tree]:
  """Grows one tree for each of `B` roots.

  Args:
    params: passed to `recurrent_fn`.
    rng_key: consumed.
    root: prior logits `[B, A]`, value `[B]`, embedding pytree `[B, ...]`.
    recurrent_fn: `(params, key, action [B], embedding) ->
      (mctx.RecurrentFnOutput, embedding)`.
    rule: chooses actions on the way down.
    num_simulations: simulations for each root, at least 1.
    max_depth: the most edges from the root to a leaf, at least 1; a leaf at
      that depth is evaluated again. None for no limit.
    invalid_actions: `[B, A]`, true (or 1) where the root's action may not be
      taken; put into mctx's tree. None for none.
    embedding_dtype: what float32 embeddings are kept as, 'float32' or
      'bfloat16'; the model gets them back as float32.
    engine: 'loops' for loops over the batch, 'kernels' for `search.kernels`;
      'auto' takes loops, until a run on a card shows kernels faster.
    extra_data: pytree `[B, ...]` put into mctx's tree.
    loop_fn: stands in for `jax.lax.fori_loop`.

  Returns:
    The searched trees, and the same in the layout of `mctx.Tree`: whichever is
    not used costs nothing in a compiled function.

  Raises:
    ValueError: if a size, shape, dtype or the engine is wrong.
  """
  if engine not in ENGINES:
    raise ValueError(f'engine={engine}: must be auto, loops or kernels')
  if engine == 'kernels' and not rule.has_kernel:
    raise ValueError(
      "engine=kernels: mctx's own selection functions run in loops; "
      'must be auto or loops'
    )
  if embedding_dtype not in tree_lib.DTYPES:
    raise ValueError(
      f'embedding_dtype={embedding_dtype}: must be float32 or bfloat16'
    )
  _check_sizes(root, num_simulations, max_depth, invalid_actions)
  # So deep a tree needs all simulations.
  depth = min(max_depth or num_simulations, num_simulations)
  is_cut = depth < num_simulations
  if invalid_actions is None:
    invalid_actions = jnp.zeros_like(root.prior_logits)

  trees = tree_lib.plant(root, num_simulations, embedding_dtype)
  descend, climb = _descend, tree_lib.climb
  if engine == 'kernels' and _can_run(rule, trees, depth):
    descend, climb = kernels.descend, kernels.climb

  def simulation(sim, loop_state):
    key, trees = loop_state
    key, select_key, expand_key = jax.random.split(key, 3)
    carry = rule.begin(select_key, sim, trees)
    parent, action = descend(trees, carry, rule, depth)
    trees, leaf = tree_lib.expand(
      trees,
      params,
      expand_key,
      recurrent_fn,
      parent,
      action,
      sim + 1,
      is_cut,
      root.embedding,
    )
    return key, climb(trees, leaf)

  _, trees = loop_fn(0, num_simulations, simulation, (rng_key, trees))
  return trees, tree_lib.to_mctx(trees, root, invalid_actions, extra_data)


def _can_run(rule, trees, depth):
  trees = trees._replace(embeddings=())
  carry = jax.eval_shape(
    lambda trees: rule.begin(jax.random.key(0), jnp.int32(0), trees), trees
  )

  def kernel_calls(trees, carry, leaf, constants, root, own):
    its = rule._replace(constants=constants, root=root, own=own)
    kernels.descend(trees, carry, its, depth)
    return kernels.climb(trees, leaf)

  leaf = jnp.zeros(trees.nodes.shape[0], jnp.int32)
  mine = rule.constants, rule.root, rule.own
  return kernels.can_run(kernel_calls, trees, carry, leaf, *mine)


def _descend(
  trees: Trees, carry: Any, rule: Rule, max_depth: int
) -> tuple[chex.Array, chex.Array]:
  """Walks all elements down to an unvisited action, or to `max_depth`.

  Returns:
    Node and action to expand, int32 `[B]` each.
  """
  rows = jnp.arange(trees.nodes.shape[0])

  def select(carry, node, root=None):
    seen = tree_lib.view(trees, node, rule.own)
    return rule.select(rule.constants, seen, carry, root)

  node = jnp.zeros(rows.shape, jnp.int32)
  action, carry = select(carry, ROOT, rule.root)
  child = trees.children[rows, node, action]

  def is_walking(state):
    _, _, child, depth, _ = state
    return jnp.any(child != UNVISITED) & (depth < max_depth)

  def step(state):
    node, action, child, depth, carry = state
    is_live = child != UNVISITED
    node = jnp.where(is_live, child, node)
    next_action, carry = select(carry, node)
    action = jnp.where(is_live, next_action, action)
    # For an ended element this finds its unvisited child once more.
    child = trees.children[rows, node, action]
    return node, action, child, depth + 1, carry

  state = (node, action, child, jnp.asarray(1, jnp.int32), carry)
  node, action, *_ = jax.lax.while_loop(is_walking, step, state)
  return node, action


def _check_sizes(root, num_simulations, max_depth, invalid_actions):
  """Raises `ValueError` naming the first size that is wrong."""
  logits = root.prior_logits
  if logits.ndim != 2:
    raise ValueError(
      f'root.prior_logits must be [B, A], but its shape is {logits.shape}.'
    )
  if root.value.shape != logits.shape[:1]:
    raise ValueError(
      f'root.value must be [B] = {logits.shape[:1]}, but its shape is '
      f'{root.value.shape}.'
    )
  if num_simulations < 1:
    raise ValueError(
      f'num_simulations must be at least 1, but is {num_simulations}.'
    )
  if max_depth is not None and max_depth < 1:
    raise ValueError(f'max_depth must be at least 1, but is {max_depth}.')
  if invalid_actions is not None and invalid_actions.shape != logits.shape:
    raise ValueError(
      f'invalid_actions must be [B, A] = {logits.shape}, but its shape is '
      f'{invalid_actions.shape}.'
    )
