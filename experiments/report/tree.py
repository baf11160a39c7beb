"""Draws one search tree: visits, actions, Qs and value prefixes.

Axes: `N` nodes (simulations + 1), `A` actions or slots of sampled ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.report import style

_BACK = {'fc': 'white', 'ec': 'none', 'pad': 0.5, 'alpha': 0.85}
_CENTRED = {'ha': 'center', 'va': 'center'}


class Layout(NamedTuple):
  """The places of nodes.

  Attributes:
    nodes: int `[M]`, numbers of the nodes that are shown, parents first.
    x: float64 `[N]`, NaN for nodes that are not shown; leaves are one apart.
    depth: int `[N]`, edges from the root.
  """

  nodes: np.ndarray
  x: np.ndarray
  depth: np.ndarray


def layout(
  parents: Any, visits: Any, order: Any = None, min_visits: int = 1
) -> Layout:
  """Places every node: leaves one apart, parents centred over their children.

  Args:
    parents: int `[N]`, -1 at the root, which is node 0; a parent comes before
      its children, as in `mctx.Tree.parents` of one row.
    visits: int `[N]`, 0 where there is no node.
    order: float `[N]`, of siblings from left to right; their numbers if None.
    min_visits: nodes with fewer are not shown; the root always is.

  Raises:
    ValueError: shapes differ, or node 0 has a parent.
  """
  parents, visits = np.asarray(parents), np.asarray(visits)
  order = np.arange(len(parents)) if order is None else np.asarray(order)
  shapes = parents.shape, visits.shape, order.shape
  if parents.ndim != 1 or len(set(shapes)) > 1:
    raise ValueError(
      f'parents, visits and order have shapes {shapes}: must be [N] each'
    )
  if parents[0] != -1:
    raise ValueError(f'parents[0]={parents[0]}: the root has none, must be -1')
  shown, children, depth = [0], {0: []}, np.zeros(len(parents), int)
  for node in range(1, len(parents)):
    parent = int(parents[node])
    if visits[node] < max(min_visits, 1) or parent not in children:
      continue
    depth[node] = depth[parent] + 1
    shown.append(node)
    children[node] = []
    children[parent].append(node)
  x, free = np.full(len(parents), np.nan), 0
  # Parents come before their children, and are placed after them.
  stack = [0]
  placing = []
  while stack:
    node = stack.pop()
    placing.append(node)
    stack += sorted(children[node], key=lambda child: -order[child])
  for node in placing:
    if not children[node]:
      x[node], free = free, free + 1
  for node in reversed(placing):
    if children[node]:
      x[node] = np.mean(x[children[node]])
  return Layout(np.asarray(shown), x, depth)


def figure(
  tree: Any,
  row: int = 0,
  *,
  actions: Any = None,
  prefix: Any = None,
  horizon: int | None = None,
  min_visits: int = 1,
  title: str = '',
  into: Any = None,
) -> Any:
  """One tree of a batch as a `matplotlib.figure.Figure`, as large as it needs.

  A circle is a node: its number is how often it was visited, its area grows
  with that, its colour is its value. An edge shows the action and, under it,
  its Q; the chosen (most visited) path is drawn dark. With value prefixes the
  number beneath a node is the sum that the model predicts there, and a square
  is a node after which the sum starts from zero.

  Args:
    tree: an `mctx.Tree`, as in `PolicyOutput.search_tree`.
    row: of the batch.
    actions: `[N, A]`, what each node's slots stand for, numbers or texts: for
      sampled actions `tree.embeddings.actions[row]`; the slots' own numbers if
      None. Numbers order siblings.
    prefix: float `[N]`, what the node's children's prefixes count from
      (`search.value_prefix.PrefixEmbedding.prefix` of this row), or None.
    horizon: steps between resets of the prefix; needed with `prefix`.
    min_visits: nodes with fewer are not shown.
    into: an empty figure to draw in, such as pyplot's `plt.figure()`; a new
      one, unknown to pyplot, if None.

  Raises:
    ValueError: `actions` or `prefix` is not of the tree's size, there is no
      such row, or `prefix` comes without `horizon`.
  """
  parts = _parts(tree, row)
  size = parts['children_index'].shape
  names = np.arange(size[1])[None].repeat(size[0], 0)
  if actions is not None:
    names = np.asarray(actions)
  _check('actions', names, size)
  base = None
  if prefix is not None:
    base = np.asarray(prefix)
    _check('prefix', base, size[:1])
    if horizon is None or horizon < 1:
      raise ValueError(f'horizon={horizon}: must be 1 or more with prefix')
  parents, slots = parts['parents'], parts['action_from_parent']
  taken = names[parents, slots]
  is_number = np.issubdtype(names.dtype, np.number)
  places = layout(
    parents, parts['node_visits'], taken if is_number else slots, min_visits
  )
  best = _best_path(parts)
  wide = float(np.nanmax(places.x)) + 1
  deep = int(places.depth[places.nodes].max()) + 1
  size = max(7.0, 0.72 * wide), 1.25 * deep + 0.9
  drawn = style.figure(*size) if into is None else into
  drawn.set_size_inches(*size)
  axes = drawn.subplots()
  _edges(axes, parts, places, taken, best)
  _nodes(drawn, axes, parts, places, base, horizon, best)
  axes.set_xlim(-0.7, wide - 0.3)
  axes.set_ylim(-deep + 0.4, 0.5)
  axes.axis('off')
  axes.set_title(title, fontsize=11)
  if into is not None:
    into.tight_layout()
  return drawn


_FIELDS = (
  'parents',
  'action_from_parent',
  'node_visits',
  'node_values',
  'children_index',
  'children_visits',
  'children_rewards',
  'children_discounts',
  'children_values',
)


def _parts(tree, row):
  """One row's arrays, by their names in `mctx.Tree`."""
  batch = tree.parents.shape[0]
  if not 0 <= row < batch:
    raise ValueError(f'row={row}: the batch has {batch} trees')
  return {name: np.asarray(getattr(tree, name)[row]) for name in _FIELDS}


def _check(name, array, shape) -> None:
  if array.shape != shape:
    raise ValueError(f'{name} has shape {array.shape}: must be {shape}')


def _best_path(parts) -> Sequence[int]:
  """Nodes of the most visited path from the root."""
  path = [0]
  while parts['children_visits'][path[-1]].max() > 0:
    slot = parts['children_visits'][path[-1]].argmax()
    path.append(int(parts['children_index'][path[-1], slot]))
  return path


def _short(number: float) -> str:
  """Three digits or so, never an exponent."""
  size = abs(number)
  return f'{number:.{0 if size >= 100 else 1 if size >= 10 else 2}f}'


def _edges(axes, parts, places, taken, best) -> None:
  is_number = np.issubdtype(taken.dtype, np.floating)
  for node in places.nodes[1:]:
    parent, slot = parts['parents'][node], parts['action_from_parent'][node]
    x = places.x[[parent, node]]
    y = -places.depth[[parent, node]]
    chosen = node in best
    axes.plot(
      x,
      y,
      color='black' if chosen else style.GREY,
      lw=0.6 + 3 * parts['node_visits'][node] / parts['node_visits'][0],
      zorder=1,
    )
    edge = parent, slot
    q = parts['children_rewards'][edge]
    q = q + parts['children_discounts'][edge] * parts['children_values'][edge]
    action = f'{taken[node]:+.2f}' if is_number else str(taken[node])
    # Near the child, where siblings are one apart.
    axes.text(
      *(0.28 * x[0] + 0.72 * x[1], 0.34 * y[0] + 0.66 * y[1]),
      f'{action}\n$Q$ {_short(q)}',
      fontsize=6.5,
      linespacing=1.1,
      bbox=_BACK,
      zorder=2,
      **_CENTRED,
    )


def _nodes(drawn, axes, parts, places, base, horizon, best) -> None:
  nodes = places.nodes
  values, visits = parts['node_values'][nodes], parts['node_visits'][nodes]
  depth = places.depth[nodes]
  area = 130 + 520 * np.sqrt(visits / visits[0])
  is_reset = np.zeros(len(nodes), bool)
  if base is not None:
    is_reset = depth % horizon == 0
  span = {'vmin': values.min(), 'vmax': max(values.max(), values.min() + 1e-6)}
  painted = None
  for marker, which in (('o', ~is_reset), ('s', is_reset)):
    if not which.any():
      continue
    painted = axes.scatter(
      places.x[nodes][which],
      -depth[which],
      s=area[which],
      c=values[which],
      cmap='viridis',
      marker=marker,
      edgecolors=['black' if n in best else style.GREY for n in nodes[which]],
      zorder=3,
      **span,
    )
  middle = np.mean(list(span.values()))
  for i, node in enumerate(nodes):
    where = places.x[node], -depth[i]
    ink = 'white' if values[i] < middle else 'black'
    axes.annotate(
      str(visits[i]), where, fontsize=8, color=ink, zorder=4, **_CENTRED
    )
    if base is not None and node:
      parent = parts['parents'][node]
      edge = parent, parts['action_from_parent'][node]
      total = base[parent] + parts['children_rewards'][edge]
      axes.annotate(
        f'Σ {_short(total)}',
        where,
        xytext=(0, -0.5 * area[i] ** 0.5 - 6),
        textcoords='offset points',
        fontsize=6.5,
        color=style.RED,
        bbox=_BACK,
        zorder=4,
        **_CENTRED,
      )
  bar = drawn.colorbar(painted, ax=axes, shrink=0.6, pad=0.01, aspect=25)
  bar.set_label('value of the node', fontsize=8)
  bar.ax.tick_params(labelsize=7)
