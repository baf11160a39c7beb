"""A search tree as a picture: where nodes stand and what is written at them."""

import re

import mctx
import numpy as np
import pytest

from experiments.report import tree

# The root has children 1 and 2, node 1 has 3 and 4, node 4 has 5.
_PARENTS = np.array([-1, 0, 0, 1, 1, 4])
_SLOTS = np.array([-1, 1, 0, 0, 1, 0])
_VISITS = np.array([6, 4, 1, 1, 2, 1])


def _tree():
  size, actions = len(_PARENTS), 2
  empty = lambda fill, kind: np.full((size, actions), fill, kind)
  fields = {
    'children_index': empty(-1, int),
    'children_visits': empty(0, int),
    'children_rewards': empty(0, float),
    'children_discounts': empty(0.5, float),
    'children_values': empty(0, float),
  }
  for node in range(1, size):
    edge = _PARENTS[node], _SLOTS[node]
    fields['children_index'][edge] = node
    fields['children_visits'][edge] = _VISITS[node]
    fields['children_rewards'][edge] = node
    fields['children_values'][edge] = 20 * node
  own = {
    'node_visits': _VISITS,
    'node_values': 20.0 * np.arange(size),
    'raw_values': np.zeros(size),
    'parents': _PARENTS,
    'action_from_parent': _SLOTS,
    'children_prior_logits': empty(0, float),
    'root_invalid_actions': np.zeros(actions),
  }
  batched = {n: np.stack([0 * x, x]) for n, x in (own | fields).items()}
  return mctx.Tree(embeddings=None, extra_data=None, **batched)


def _texts(figure):
  return [text.get_text() for text in figure.axes[0].texts]


def test_layout_places_leaves_one_apart_and_parents_amid_their_children():
  found = tree.layout(_PARENTS, _VISITS)
  assert found.nodes.tolist() == [0, 1, 2, 3, 4, 5]
  assert found.depth.tolist() == [0, 1, 1, 2, 2, 3]
  assert found.x.tolist() == [1.25, 0.5, 2, 0, 1, 1]


def test_layout_orders_siblings():
  found = tree.layout(_PARENTS, _VISITS, order=-np.arange(6))
  assert found.x.tolist() == [0.75, 1.5, 0, 2, 1, 1]


def test_layout_leaves_out_what_was_hardly_visited():
  found = tree.layout(_PARENTS, _VISITS, min_visits=2)
  assert found.nodes.tolist() == [0, 1, 4]
  np.testing.assert_array_equal(found.x, [0, 0, np.nan, np.nan, 0, np.nan])


def test_figure_tells_visits_actions_and_qs():
  texts = _texts(
    tree.figure(_tree(), 1, actions=np.tile(['left', 'right'], (6, 1)))
  )
  # Q is the reward and half of the value behind it.
  assert sorted(t for t in texts if 'Q' in t) == sorted(
    f'{("left", "right")[_SLOTS[n]]}\n$Q$ {11 * n:.{2 if n < 1 else 1}f}'
    for n in range(1, 6)
  )
  assert sorted(t for t in texts if t.isdigit()) == sorted(map(str, _VISITS))


def test_figure_adds_rewards_to_the_prefix_that_they_count_from():
  base = np.array([0, 1, 2, 0, 0, 7.0])  # depth 2 is a reset
  figure = tree.figure(_tree(), 1, prefix=base, horizon=2)
  found = [t for t in _texts(figure) if t.startswith('Σ')]
  # Rewards are the nodes' numbers.
  expected = [1 + 0, 2 + 0, 3 + 1, 4 + 1, 5 + 0]
  assert found == [f'Σ {x:.2f}' for x in expected]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'row': 2}, 'row=2: the batch has 2 trees'),
    ({'actions': np.zeros((6, 3))}, 'actions has shape (6, 3): must be (6, 2)'),
    (
      {'prefix': np.zeros(5), 'horizon': 2},
      'prefix has shape (5,): must be (6,)',
    ),
    ({'prefix': np.zeros(6)}, 'horizon=None: must be 1 or more with prefix'),
  ],
)
def test_figure_refuses_what_does_not_fit(arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    tree.figure(_tree(), **arguments)


def test_layout_refuses_a_root_with_a_parent():
  with pytest.raises(ValueError, match=re.escape('parents[0]=0')):
    tree.layout([0, 0], [2, 1])
