"""A descent and a climb as one kernel each, a program a tree (Pallas, Triton).

A loop whose length depends on data costs a card a question to the host at every
turn, and several small kernels. Here a tree walks down in a single kernel and
up in another, which writes the trees in place. The rule is the one that the
loops call; a row of actions is padded to a power of two, and `Node.exists` says
so. On a CPU the kernels are interpreted, for tests.

Not measured on a card.

Axes: `B` batch, `N` nodes, `M = N + 1`, `A` actions.
"""

import warnings
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from search import trees as tree_lib
from search.rules import Rule
from search.trees import ROOT, UNVISITED, Node, Trees


def platform() -> str:
  """What programs are made for: `cpu`, `gpu`, `cuda`, `tpu`."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def can_run(function: Callable, *args: Any) -> bool:
  """Whether a function's kernels can be made; warns in one line if not.

  Args:
    function: that calls a kernel.
    *args: its arguments; their shapes count.
  """
  here = platform()
  if here == 'cpu':
    return True
  here = 'cuda' if here == 'gpu' else here
  try:
    shapes = jax.eval_shape(lambda: args)
    jax.jit(function).trace(*shapes).lower(lowering_platforms=(here,))
  except Exception as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    warnings.warn(
      f'engine=kernels: {reason[:200]}; the search runs in loops', stacklevel=2
    )
    return False
  return True


def descend(
  trees: Trees, carry: Any, rule: Rule, max_depth: int
) -> tuple[chex.Array, chex.Array]:
  """Walks all elements down to an unvisited action, or to `max_depth`.

  Args:
    trees: of a batch.
    carry: from `rule.begin`, a pytree of `[B]`.
    rule: chooses the actions.
    max_depth: the most edges from the root.

  Returns:
    Node and action to expand, int32 `[B]` each.
  """
  batch, _, actions = trees.children.shape
  width = pl.next_power_of_2(max(actions, 2))
  one = lambda x: jnp.asarray(x)[None]
  own = () if rule.own is None else rule.own
  inputs = (
    (trees.edges, trees.children, trees.nodes, trees.logits, own),
    jax.tree.map(one, rule.constants),
    rule.root,
    carry,
  )
  leaves, form = jax.tree.flatten(inputs)

  def descend_tree(*refs):
    *refs, node_out, action_out = refs
    stats, constants, roots, carry = jax.tree.unflatten(form, refs)
    edges, children, nodes, logits, own = stats
    element = pl.program_id(0)
    lane = jnp.arange(width)
    exists = lane < actions
    lanes = jnp.minimum(lane, actions - 1)

    def see(node):
      return Node(
        *(
          # So that no sum counts the last action several times.
          jnp.where(exists, _load(edges, element, node, lanes, column), 0)
          for column in (tree_lib.VISITS, tree_lib.QVALUE, tree_lib.PRIOR)
        ),
        logits=_load(logits, element, node, lanes),
        value=_load(nodes, element, node, tree_lib.VALUE),
        count=_load(nodes, element, node, tree_lib.COUNT),
        raw_value=_load(nodes, element, node, tree_lib.RAW_VALUE),
        exists=exists,
        own=None if rule.own is None else _load(own, element, node, lanes),
      )

    constants = jax.tree.map(lambda ref: _load(ref, 0), constants)
    roots = jax.tree.map(lambda ref: _load(ref, element, lanes), roots)
    carry = jax.tree.map(lambda ref: _load(ref, element), carry)

    def select(node, carry, root=None):
      action, carry = rule.select(constants, see(node), carry, root)
      return action, _load(children, element, node, action), carry

    node = jnp.int32(ROOT)
    action, child, carry = select(node, carry, roots)

    def is_walking(state):
      _, _, child, depth, _ = state
      return (child != UNVISITED) & (depth < max_depth)

    def step(state):
      _, _, node, depth, carry = state
      action, child, carry = select(node, carry)
      return node, action, child, depth + 1, carry

    state = (node, action, child, jnp.int32(1), carry)
    node, action, *_ = jax.lax.while_loop(is_walking, step, state)
    plgpu.store(node_out.at[element], node)
    plgpu.store(action_out.at[element], action)

  number = jax.ShapeDtypeStruct((batch,), jnp.int32)
  return _call(descend_tree, (number, number), batch)(*leaves)


def climb(trees: Trees, leaf: chex.Array) -> Trees:
  """Backs up the values of nodes `leaf`, int32 `[B]`, along their paths.

  Args:
    trees: of a batch, whose `edges` and `nodes` are written in place.
    leaf: int32 `[B]`.
  """

  def climb_tree(links, leaf, _edges, _nodes, edges, nodes):
    element = pl.program_id(0)
    load = lambda ref, *index: _load(ref, element, *index)

    def store(ref, value, *index):
      plgpu.store(ref.at[_place(element, *index)], value)

    def step(state):
      node, returns, value, count = state
      parent, action = (
        load(links, node, column).astype(jnp.int32)
        for column in (tree_lib.PARENT, tree_lib.ACTION)
      )
      reward = load(links, node, tree_lib.REWARD)
      discount = load(links, node, tree_lib.DISCOUNT)
      store(edges, count, parent, action, tree_lib.VISITS)
      store(edges, reward + discount * value, parent, action, tree_lib.QVALUE)
      returns = reward + discount * returns
      count = load(nodes, parent, tree_lib.COUNT)
      value = load(nodes, parent, tree_lib.VALUE)
      value = (value * count + returns) / (count + 1.0)
      store(nodes, value, parent, tree_lib.VALUE)
      store(nodes, count + 1, parent, tree_lib.COUNT)
      return parent, returns, value, count + 1

    node = load(leaf)
    value = load(nodes, node, tree_lib.VALUE)
    count = load(nodes, node, tree_lib.COUNT)
    jax.lax.while_loop(
      lambda state: state[0] != ROOT, step, (node, value, value, count)
    )

  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  edges, nodes = _call(
    climb_tree,
    (like(trees.edges), like(trees.nodes)),
    leaf.shape[0],
    input_output_aliases={2: 0, 3: 1},
  )(trees.links, leaf, trees.edges, trees.nodes)
  return trees._replace(edges=edges, nodes=nodes)


def _place(*index):
  return tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)


def _load(ref, *index):
  return plgpu.load(ref.at[_place(*index)])


def _call(kernel, outputs, batch, **own):
  return pl.pallas_call(
    kernel,
    out_shape=outputs,
    grid=(batch,),
    interpret=platform() == 'cpu',
    compiler_params=plgpu.CompilerParams(num_warps=1),
    **own,
  )
