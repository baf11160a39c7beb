"""No loop of a compiled program copies a tree or a replay at every turn.

Each program is compiled at two sizes of its trees and buffers; what its loops
copy at the larger must be no larger.
"""

import dataclasses
import functools
from collections import Counter

import conformance
import jax
import jax.numpy as jnp
import pytest
from compiling import exact_jit
from search_tables import make_root, random_tables, recurrent_fn

from experiments.runtime import compiled
from networks import actions
from search import policies, sampled

_SIZES = (24, 96)


def largest(function, *args):
  """Bytes of the largest array that a loop copies at every turn."""
  text = exact_jit(function).lower(*args).compile().as_text()
  return max(compiled.copies(text), default=0)


def planted(size, is_ancestor):
  """Climbs in two arrays of `[4, size]`, as the search once did."""
  rows = jnp.arange(4)
  write = {'unique_indices': True, 'mode': 'promise_in_bounds'}

  def climb(state):
    values, visits, index = state
    value, count = values[rows, index], visits[rows, index]
    mean = (value * count + 1.0) / (count + 1.0)
    values = values.at[rows, index].set(mean, **write)
    if is_ancestor:
      visits = visits.at[rows, index].set(count + 1, **write)
    else:
      visits = visits.at[rows, index].add(1, **write)
    return values, visits, index - 1

  return jax.lax.while_loop(
    lambda state: jnp.any(state[-1] > 0),
    climb,
    (
      jnp.zeros([4, size]),
      jnp.zeros([4, size], jnp.int32),
      jnp.full([4], size - 1),
    ),
  )


@pytest.mark.parametrize('is_ancestor', [True, False])
def test_a_copy_at_every_turn_is_found(is_ancestor):
  small, large = (
    largest(functools.partial(planted, size, is_ancestor)) for size in _SIZES
  )
  if is_ancestor:
    assert small == large
  else:
    assert (small, large) == tuple(4 * 4 * size for size in _SIZES)


def _sampled(*args, **kwargs):
  return sampled.search(
    *args, distribution=actions.flat(4), num_samples=3, **kwargs
  )


_SEARCHES = {
  'puct': policies.puct,
  'efficientzero': policies.efficientzero,
  'gumbel': policies.gumbel,
  'sampled': _sampled,
  'sampled gumbel': functools.partial(_sampled, rule=policies.gumbel),
}


@pytest.mark.parametrize(
  ('name', 'max_depth'),
  [
    *((name, None) for name in _SEARCHES),
    ('puct', 3),
    # A bound on the depth is the same code under every rule.
    *(
      pytest.param(name, 3, marks=pytest.mark.slow)
      for name in _SEARCHES
      if name != 'puct'
    ),
  ],
)
def test_searches_copy_no_tree(name, max_depth):
  tables = jax.tree.map(jnp.asarray, random_tables(0))
  root = make_root(tables, jnp.arange(5))

  def search(number, key):
    output = _SEARCHES[name](
      tables, key, root, recurrent_fn, number, max_depth=max_depth
    )
    return output.action_weights

  small, large = (
    largest(functools.partial(search, number), jax.random.key(0))
    for number in _SIZES
  )
  # Of what an element has; one number for each node is 480 bytes more.
  assert small == large


def grown(lowered):
  """Bytes of what the loops of the second of two programs copy in addition."""
  small, large = (
    Counter(compiled.copies(one.compile().as_text())) for one in lowered
  )
  return sorted((large - small).elements())


# A search over enumerated actions and one over sampled ones.
_AGENTS = ['muzero', pytest.param('sampled_muzero', marks=pytest.mark.slow)]


def _part(name, part, **changes):
  """An agent's update or refresh, compiled for shapes."""
  row = conformance.AGENTS[name]
  config = dataclasses.replace(row.config, **changes)
  agent = row.make(row.module, config, row.spec)
  key = jax.random.key(0)
  state = jax.eval_shape(agent.init, key)
  batch = row.make_batch(config, row.spec)
  if part == 'update':
    return exact_jit(agent.update).lower(state, batch, key)
  return exact_jit(agent.refresh).lower(state, batch, 0, key)


@pytest.mark.parametrize('name', _AGENTS)
def test_reanalysis_copies_no_tree(name):
  search = conformance.AGENTS[name].config.search
  make = lambda number: _part(
    name, 'refresh', search=dataclasses.replace(search, num_simulations=number)
  )
  assert grown(map(make, _SIZES)) == []


@pytest.mark.parametrize('name', _AGENTS)
def test_updates_copy_no_window(name):
  make = lambda steps: _part(name, 'update', unroll_steps=steps)
  assert grown(map(make, (3, 12))) == []
