"""EfficientZero's rule against a plain tree, one node and number at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from search_tables import make_root, random_tables, recurrent_fn

from search import policies

_DELTA = 0.01


class _Node:
  """One node: its model's outputs, its statistics, the edge that led here."""

  def __init__(self, tables, index, state, reward=0.0, discount=0.0):
    self.index, self.state = index, state
    self.reward, self.discount = reward, discount
    self.logits = tables.logits[state]
    self.value, self.visits = float(tables.value[state]), 1
    self.children = {}

  def qvalue(self):
    return self.reward + self.discount * self.value


def _softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def _plain_search(tables, state, num_simulations, order, invalid, max_depth):
  """EfficientZero's search by the book, for one root.

  Args:
    tables: the model.
    state: the root's.
    num_simulations: simulations.
    order: `[N, A]`, decides ties, the highest first.
    invalid: bool `[A]`, at the root.
    max_depth: edges, or None.

  Returns:
    The root, all nodes in order of creation, and the number of ties.
  """
  root = _Node(tables, 0, state)
  nodes, ties = [root], 0
  for simulation in range(num_simulations):
    qs = [node.qvalue() for node in nodes[1:]]
    low, high = (min(qs), max(qs)) if qs else (0.0, 0.0)
    path, node, mean = [root], root, 0.0
    while True:
      is_root = node is root
      prior = (
        _softmax(np.where(invalid, -np.inf, node.logits))
        if is_root
        else (_softmax(node.logits))
      )
      visited = [child.qvalue() for child in node.children.values()]
      if is_root:
        mean = sum(visited) / len(visited) if visited else 0.0
      else:
        mean = (mean + sum(visited)) / (len(visited) + 1)
      count = node.visits - 1
      scores = {}
      for action in np.flatnonzero(prior > 0):
        child = node.children.get(action)
        q = child.qvalue() if child else mean
        score = min(max((q - low) / max(high - low, _DELTA), 0.0), 1.0)
        pb_c = math.log((count + 19652 + 1) / 19652) + 1.25
        pb_c *= math.sqrt(count) / ((child.visits if child else 0) + 1)
        scores[action] = score + pb_c * prior[action]
      best = max(scores.values())
      tied = [a for a, score in scores.items() if score >= best - 1e-6]
      ties += len(tied) > 1
      action = max(tied, key=lambda a: order[node.index, a])
      is_cut = max_depth is not None and len(path) == max_depth
      if action not in node.children or is_cut:
        break
      node = node.children[action]
      path.append(node)

    leaf = node.children.get(action)
    if leaf is None:
      leaf = _Node(
        tables,
        # mctx numbers a node by its simulation, also where some made none.
        simulation + 1,
        tables.child[node.state, action],
        float(tables.reward[node.state, action]),
        float(tables.discount[node.state, action]),
      )
      node.children[action] = leaf
      nodes.append(leaf)
    else:
      leaf.value = float(tables.value[leaf.state])
      leaf.visits += 1
    path.append(leaf)
    returns = leaf.value
    for parent, child in zip(path[-2::-1], path[:0:-1], strict=True):
      returns = child.reward + child.discount * returns
      total = parent.value * parent.visits + returns
      parent.visits += 1
      parent.value = total / parent.visits
  return root, nodes, ties


@pytest.mark.parametrize(
  ('scale', 'max_depth', 'invalid_share'),
  [(1.0, None, 0.0), (1e-3, None, 0.3), (30.0, 3, 0.3)],
)
def test_equals_plain_tree(scale, max_depth, invalid_share):
  num_roots, num_simulations, num_actions = 24, 40, 4
  tables = random_tables(
    7, scale=scale, invalid=invalid_share, num_actions=num_actions, dtype='f8'
  )
  rng = np.random.default_rng(1)
  invalid = rng.random([num_roots, num_actions]) < invalid_share
  invalid |= np.isneginf(tables.logits[:num_roots])
  invalid[invalid.all(axis=1), 0] = False

  # In double precision no score is a tie in one and not in the other.
  with jax.enable_x64(True):
    device_tables = jax.tree.map(jnp.asarray, tables)
    output = jax.jit(
      lambda key: policies.efficientzero(
        device_tables,
        key,
        make_root(device_tables, jnp.arange(num_roots)),
        recurrent_fn,
        num_simulations,
        invalid_actions=jnp.asarray(invalid),
        max_depth=max_depth,
        noise=policies.Noise(0.0),
        minmax_delta=_DELTA,
      )
    )(jax.random.key(2))
    output = jax.tree.map(np.asarray, output)
  tree = output.search_tree
  assert tree.node_values.dtype == np.float64

  total_ties = 0
  for b in range(num_roots):
    root, nodes, ties = _plain_search(
      tables, b, num_simulations, tree.extra_data[b], invalid[b], max_depth
    )
    total_ties += ties
    for node in nodes:
      assert tree.node_visits[b, node.index] == node.visits
      np.testing.assert_allclose(
        tree.node_values[b, node.index], node.value, rtol=1e-9, atol=1e-12
      )
      for action, child in node.children.items():
        assert tree.children_index[b, node.index, action] == child.index
    visits = [
      root.children[a].visits if a in root.children else 0
      for a in range(num_actions)
    ]
    np.testing.assert_array_equal(tree.children_visits[b, 0], visits)
    np.testing.assert_allclose(
      output.action_weights[b], np.array(visits) / num_simulations
    )
    np.testing.assert_allclose(output.value[b], root.value, rtol=1e-9)
  # Every fresh node with two valid actions is a tie: the table was needed.
  assert total_ties > num_roots


def test_ties_are_broken_at_random_by_key():
  """The first visit is uniform over the valid actions, whatever the prior."""
  tables = jax.tree.map(jnp.asarray, random_tables(0))
  invalid = jnp.zeros([4096, 4], bool).at[:, 1].set(True)
  root = make_root(tables, jnp.zeros([4096], jnp.int32))

  @jax.jit
  def first(key):
    return policies.efficientzero(
      tables, key, root, recurrent_fn, 1, invalid_actions=invalid
    ).action_weights

  counts = first(jax.random.key(0)).sum(0)
  assert counts[1] == 0
  # Three standard deviations of a binomial with p = 1/3.
  deviation = 3 * math.sqrt(4096 * (1 / 3) * (2 / 3))
  assert (abs(counts - 4096 / 3)[jnp.array([0, 2, 3])] < deviation).all()
  assert (first(jax.random.key(0)) == first(jax.random.key(0))).all()
  assert (first(jax.random.key(0)) != first(jax.random.key(1))).any()
