"""Two properties of value prefixes in the tree.

A model whose prefixes are exact sums of rewards gives the tree that the plain
rewards give, and every node's LSTM is as old as its depth says.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from compiling import exact_jit

from search import policies, value_prefix

_ROOTS = 256
_SIMULATIONS = 50
_STATES = 512
_ACTIONS = 4
_HORIZONS = (1, 2, 3, 5, 10)
_RULES = {
  'efficientzero': policies.efficientzero,
  'puct': policies.puct,
}


class _Carry(NamedTuple):
  """A perfect LSTM: it has counted steps and rewards since its reset."""

  age: jax.Array
  total: jax.Array


class _State(NamedTuple):
  """A table's row, and the age of the LSTM that made it (0 at the root)."""

  row: jax.Array
  age: jax.Array


@pytest.fixture(scope='module')
def tables():
  rng = np.random.default_rng(0)
  shape = (_STATES, _ACTIONS)
  # Peaked priors make some trees deeper than every horizon.
  peak = rng.choice([1.0, 6.0], size=(_STATES, 1))
  return {
    'child': jnp.asarray(rng.integers(_STATES, size=shape), jnp.int32),
    # Multiples of 1/64 of few digits: sums and differences are exact.
    'reward': jnp.asarray(rng.integers(-64, 65, shape) / 64, jnp.float32),
    'logits': jnp.asarray(peak * rng.normal(size=shape), jnp.float32),
    'value': jnp.asarray(rng.normal(size=_STATES), jnp.float32),
  }


def _root(tables, scale, embedding):
  rows = jnp.arange(_ROOTS)
  return mctx.RootFnOutput(
    prior_logits=tables['logits'][rows],
    value=scale * tables['value'][rows],
    embedding=embedding,
  )


def _plain_step(params, key, action, row):
  del key
  tables, scale = params
  child = tables['child'][row, action]
  output = mctx.RecurrentFnOutput(
    reward=scale * tables['reward'][row, action],
    discount=jnp.full(row.shape, 0.997),
    prior_logits=tables['logits'][child],
    value=scale * tables['value'][child],
  )
  return output, child


def _prefix_step(params, key, action, state, carry):
  plain, row = _plain_step(params, key, action, state.row)
  carry = _Carry(carry.age + 1, carry.total + plain.reward)
  return value_prefix.PrefixStep(
    prefix=carry.total,
    discount=plain.discount,
    prior_logits=plain.prior_logits,
    value=plain.value,
    state=_State(row, carry.age),
    carry=carry,
  )


@pytest.fixture(scope='module', params=sorted(_RULES))
def searches(request, tables):
  """Two compiled searches: with plain rewards, and `(horizon)` prefixes."""
  search = functools.partial(
    _RULES[request.param], num_simulations=_SIMULATIONS
  )
  rows = jnp.arange(_ROOTS)

  @exact_jit
  def plain(key, scale):
    root = _root(tables, scale, rows)
    return search((tables, scale), key, root, _plain_step)

  @exact_jit
  def prefixed(key, scale, horizon):
    zeros = jnp.zeros([_ROOTS], jnp.int32)
    embedding = value_prefix.root_embedding(
      # The carry's content must not matter at a root.
      _State(rows, zeros),
      _Carry(zeros + 7, jnp.full([_ROOTS], 3.0)),
    )
    root = _root(tables, scale, embedding)
    step = value_prefix.recurrent_fn(_prefix_step, horizon)
    return search((tables, scale), key, root, step)

  return plain, prefixed


@pytest.mark.parametrize('scale', [2.0**-10, 1.0, 2.0**12])
def test_equals_plain_rewards(searches, scale):
  plain, prefixed = searches
  key = jax.random.key(3)
  expected = plain(key, scale)
  for horizon in _HORIZONS:
    output = prefixed(key, scale, horizon)
    jax.tree.map(
      functools.partial(np.testing.assert_array_equal, err_msg=str(horizon)),
      output._replace(search_tree=_without_embeddings(output.search_tree)),
      expected._replace(search_tree=_without_embeddings(expected.search_tree)),
    )


def _without_embeddings(tree):
  return tree.replace(embeddings=None)


def test_age_of_every_node(searches):
  _, prefixed = searches
  for horizon in _HORIZONS:
    tree = prefixed(jax.random.key(4), 1.0, horizon).search_tree
    tree = jax.tree.map(np.asarray, tree)
    depth = np.zeros([_ROOTS, _SIMULATIONS + 1], int)
    for i in range(1, _SIMULATIONS + 1):
      depth[:, i] = depth[np.arange(_ROOTS), tree.parents[:, i]] + 1
    assert depth.max() > horizon
    # Depths differ between roots at the same simulation.
    assert (depth.min(axis=0)[1:] < depth.max(axis=0)[1:]).any()
    embedding = tree.embeddings
    np.testing.assert_array_equal(embedding.depth, depth)
    age = (depth[:, 1:] - 1) % horizon + 1
    np.testing.assert_array_equal(embedding.state.age[:, 1:], age)
    # Behind a reset the children find a carry and a prefix of zero.
    is_reset = depth % horizon == 0
    np.testing.assert_array_equal(embedding.carry.age == 0, is_reset)
    assert (embedding.carry.total[is_reset] == 0).all()
    assert (embedding.prefix[is_reset] == 0).all()
    np.testing.assert_array_equal(embedding.prefix, embedding.carry.total)


def test_by_hand():
  """Prefixes 2, 5 at horizon 2 are rewards 2, 3; then counting starts anew."""
  prefixes = iter([2.0, 5.0, 4.0, 1.0])
  seen = []

  def step_fn(params, key, action, state, carry):
    seen.append(float(carry[0, 0]))
    return value_prefix.PrefixStep(
      prefix=jnp.array([next(prefixes)]),
      discount=jnp.ones([1]),
      prior_logits=jnp.zeros([1, 2]),
      value=jnp.zeros([1]),
      state=state,
      carry=carry + 1,
    )

  step = value_prefix.recurrent_fn(step_fn, 2)
  embedding = value_prefix.root_embedding(jnp.zeros([1, 3]), jnp.ones([1, 4]))
  rewards = []
  for _ in range(4):
    output, embedding = step(None, None, jnp.zeros([1], jnp.int32), embedding)
    rewards.append(float(output.reward[0]))
  assert rewards == [2.0, 3.0, 4.0, -3.0]
  assert seen == [0.0, 1.0, 0.0, 1.0]


def test_refuses_horizon_zero():
  with pytest.raises(ValueError, match='horizon=0: must be at least 1'):
    value_prefix.recurrent_fn(_prefix_step, 0)
