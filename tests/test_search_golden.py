"""mctx's golden trees, and its own searches, through our loops."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from compiling import exact_jit
from search_tables import (
  make_root,
  noisy_recurrent_fn,
  random_tables,
  recurrent_fn,
)
from trees import assert_equal

from search import _mctx, engine, rules

_GOLDEN = pathlib.Path(mctx.__file__).parent / '_src' / 'tests' / 'test_data'
_NAMES = (
  'muzero_tree',
  'muzero_qtransform_tree',
  'gumbel_muzero_tree',
  'gumbel_muzero_reward_tree',
)


@pytest.mark.parametrize('name', _NAMES)
def test_golden_trees(name, monkeypatch):
  golden = json.loads((_GOLDEN / f'{name}.json').read_text())
  config = dict(golden['algorithm_config'])
  qtransform = functools.partial(
    getattr(mctx, config.pop('qtransform')),
    **config.pop('qtransform_kwargs', {}),
  )
  policy = {
    'muzero': mctx.muzero_policy,
    'gumbel_muzero': mctx.gumbel_muzero_policy,
  }[golden['algorithm']]
  num_actions = len(golden['tree']['child_stats'])
  # The stored tree is row 0; shorter neighbours must not disturb it.
  invalid = np.zeros([3, num_actions])
  invalid[1, 1:] = 1
  invalid[2, 2:] = 1

  calls = []

  def our_search(*args, **kwargs):
    calls.append(name)
    return _mctx.search(*args, **kwargs)

  monkeypatch.setattr('mctx._src.search.search', our_search)
  with jax.threefry_partitionable(False):
    root, step = _golden_model(num_actions, **golden['env_config'])
    tree = jax.jit(
      lambda key: (
        policy(
          (),
          key,
          root,
          step,
          num_simulations=golden['tree']['visit'] - 1,
          qtransform=qtransform,
          invalid_actions=invalid,
          **config,
        ).search_tree
      )
    )(jax.random.PRNGKey(1))
  assert calls == [name]
  _assert_same_node(golden['tree'], jax.tree.map(np.asarray, tree))


def _golden_model(num_actions, *, discount, zero_reward):
  """The model behind the stored trees: a node's state is a random key."""

  def predict(key):
    policy_key, value_key, reward_key = jax.random.split(key, 3)
    return (
      jax.random.normal(policy_key, [num_actions]),
      jax.random.uniform(value_key, minval=-1, maxval=1),
      jax.random.uniform(reward_key, minval=-1, maxval=1),
    )

  def step(params, key, action, embedding):
    del params, key
    keys = jax.vmap(lambda key: jax.random.split(key, num_actions))(embedding)
    embedding = keys[jnp.arange(len(action)), action]
    logits, value, reward = jax.vmap(predict)(embedding)
    output = mctx.RecurrentFnOutput(
      reward=jnp.zeros_like(reward) if zero_reward else reward,
      discount=jnp.full_like(reward, discount),
      prior_logits=logits,
      value=value,
    )
    return output, embedding

  first = jax.random.PRNGKey(0)
  embedding = jnp.stack(
    [first] + [jax.random.fold_in(first, i) for i in (1, 2)]
  )
  logits, value, _ = jax.vmap(predict)(embedding)
  root = mctx.RootFnOutput(
    prior_logits=logits, value=value, embedding=embedding
  )
  return root, step


def _assert_same_node(golden, tree, index=0):
  assert golden['evaluation_index'] == index
  assert golden['visit'] == tree.node_visits[0, index]
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
  close(tree.node_values[0, index], golden['value_view'])
  close(tree.raw_values[0, index], golden['raw_value_view'])
  prior = np.asarray(jax.nn.softmax(tree.children_prior_logits[0, index]))
  for child in golden['child_stats']:
    action = child['action']
    close(prior[action], child['prior'])
    child_index = tree.children_index[0, index, action]
    if 'visit' in child:
      close(tree.children_rewards[0, index, action], child['reward'])
      _assert_same_node(child, tree, child_index)
    else:
      assert child_index == mctx.Tree.UNVISITED


@pytest.mark.parametrize(
  ('rule', 'max_depth'), [('muzero', None), ('muzero', 3), ('gumbel', 2)]
)
def test_same_bits_as_mctx(rule, max_depth):
  tables = jax.tree.map(jnp.asarray, random_tables(3))
  root = make_root(tables, jnp.arange(7))
  invalid = np.zeros([7, 4], bool)
  invalid[1:3, 1:] = True
  num_simulations = 24
  kwargs = {'extra_data': None}
  if rule == 'gumbel':
    gumbel = jax.random.gumbel(jax.random.key(5), [7, 4])
    kwargs['extra_data'] = mctx.GumbelMuZeroExtraData(root_gumbel=gumbel)
    root_fn = functools.partial(
      mctx.gumbel_muzero_root_action_selection,
      num_simulations=num_simulations,
      max_num_considered_actions=4,
    )
    interior_fn = mctx.gumbel_muzero_interior_action_selection
  else:
    interior_fn = mctx.muzero_action_selection
    root_fn = functools.partial(interior_fn, depth=0)

  def run(search, key):
    return search(
      tables,
      key,
      root=root,
      recurrent_fn=noisy_recurrent_fn,
      root_action_selection_fn=root_fn,
      interior_action_selection_fn=interior_fn,
      num_simulations=num_simulations,
      max_depth=max_depth,
      invalid_actions=jnp.asarray(invalid),
      **kwargs,
    )

  key = jax.random.key(11)
  theirs = exact_jit(functools.partial(run, mctx.search))(key)
  ours = exact_jit(functools.partial(run, _mctx.search))(key)
  assert_equal(ours, theirs)
  depth = _depths(ours)
  if max_depth is None:
    assert depth.max() > 3
  else:
    assert depth.max() == max_depth
    # Some leaf at the limit was evaluated again, its visits counted.
    assert (np.asarray(ours.node_visits)[depth == max_depth] > 1).any()


def _depths(tree):
  """Edges from the root to each node, -1 for nodes that do not exist."""
  parents = np.asarray(tree.parents)
  depth = np.full(parents.shape, -1)
  depth[:, 0] = 0
  for i in range(1, parents.shape[1]):
    row = np.arange(len(parents))
    exists = parents[:, i] >= 0
    depth[:, i] = np.where(exists, depth[row, parents[:, i]] + 1, -1)
  return depth


def test_refuses_wrong_sizes(key):
  tables = jax.tree.map(jnp.asarray, random_tables(0))
  root = make_root(tables, jnp.arange(3))

  def run(root=root, **kwargs):
    return engine.batched_search(
      tables,
      key,
      root=root,
      recurrent_fn=recurrent_fn,
      rule=rules.Rule(lambda *_: None, lambda *_: None),
      **({'num_simulations': 4} | kwargs),
    )

  with pytest.raises(ValueError, match=r'num_simulations .* 1, but is 0'):
    run(num_simulations=0)
  with pytest.raises(ValueError, match=r'max_depth .* 1, but is 0'):
    run(max_depth=0)
  with pytest.raises(ValueError, match=r'invalid_actions .*\(3, 4\).*\(4,\)'):
    run(invalid_actions=jnp.zeros([4]))
  with pytest.raises(ValueError, match=r'root.value .*\(3,\).*\(\)'):
    run(root.replace(value=jnp.zeros([])))
  with pytest.raises(ValueError, match=r'root.prior_logits .*\(4,\)'):
    run(root.replace(prior_logits=jnp.zeros([4])))
