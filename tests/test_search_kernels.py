"""Searches by kernels: the trees of the loops, and programs for a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from search_tables import make_root, random_tables, recurrent_fn

from experiments.benchmarks.searches import with_prefix
from networks import actions
from search import _mctx, kernels, policies, sampled

_SAMPLED = functools.partial(
  sampled.search, distribution=actions.flat(5), num_samples=3
)
_SEARCHES = {
  'puct': policies.puct,
  'efficientzero': policies.efficientzero,
  'gumbel': policies.gumbel,
  'sampled': _SAMPLED,
  'value prefix': policies.efficientzero,
}


def _run(name, engine, key, roots=8, simulations=16, first=0, **own):
  # Five actions are fewer than a kernel's row has places.
  tables = random_tables(1, invalid=0.2, num_actions=5, num_states=256)
  tables = jax.tree.map(jnp.asarray, tables)
  states = first + jnp.arange(roots)
  root, step = make_root(tables, states), recurrent_fn
  if name == 'value prefix':
    root, step = with_prefix(root, step)
  invalid = jnp.isneginf(tables.logits[states])
  args = (tables, key, root, step, simulations)
  return _SEARCHES[name](*args, invalid_actions=invalid, engine=engine, **own)


def _assert_same(name, roots, simulations, max_depth=None, at_once=None):
  at_once = at_once or roots

  def search(engine, key):
    some = functools.partial(
      _run, name, engine, key, at_once, simulations, max_depth=max_depth
    )
    # Interpreted, a kernel copies the trees of its batch at every store.
    found = jax.lax.map(
      lambda first: some(first=first), jnp.arange(0, roots, at_once)
    )
    return jax.tree.map(lambda x: x.reshape(roots, *x.shape[2:]), found)

  loops, interpreted = (
    jax.jit(functools.partial(search, engine))(jax.random.key(3))
    for engine in ('loops', 'kernels')
  )
  np.testing.assert_array_equal(
    interpreted.search_tree.children_visits, loops.search_tree.children_visits
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(interpreted.search_tree.node_values, loops.search_tree.node_values)
  close(interpreted.action_weights, loops.action_weights)
  close(interpreted.value, loops.value)
  np.testing.assert_array_equal(interpreted.action, loops.action)


@pytest.mark.parametrize(
  ('name', 'max_depth'),
  [
    ('puct', 3),
    ('efficientzero', None),
    ('gumbel', 3),
    ('sampled', None),
    ('value prefix', None),
  ],
)
def test_kernels_grow_the_trees_of_the_loops(name, max_depth):
  _assert_same(name, 8, 16, max_depth)


@pytest.mark.slow
@pytest.mark.parametrize('simulations', [50, 200])
@pytest.mark.parametrize('name', _SEARCHES)
def test_many_deep_trees_are_the_same(name, simulations):
  _assert_same(name, 256, simulations, at_once=2)


@pytest.mark.parametrize(
  'name',
  [
    'puct',
    *(pytest.param(name, marks=pytest.mark.slow) for name in [*_SEARCHES][1:]),
  ],
)
def test_seeds_share_the_kernels(name):
  keys = jax.random.split(jax.random.key(0), 2)
  run = lambda key: _run(name, 'kernels', key, 4, 6)
  together = jax.jit(jax.vmap(run))(keys)
  run = jax.jit(run)
  for i, key in enumerate(keys):
    one = run(key)
    visits = together.search_tree.children_visits[i]
    np.testing.assert_array_equal(visits, one.search_tree.children_visits)
    np.testing.assert_array_equal(together.action[i], one.action)


@pytest.mark.parametrize('name', _SEARCHES)
def test_kernels_lower_for_a_card(name):
  card = AbstractDevice(
    platform='cuda', device_kind='NVIDIA H100 80GB HBM3', num_cores=132
  )
  mesh = AbstractMesh((1,), ('x',), abstract_device=card)
  with jax.sharding.use_abstract_mesh(mesh):
    search = jax.jit(lambda key: _run(name, 'kernels', key).action_weights)
    traced = search.trace(jax.random.key(0))
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  # One on the way down, one on the way up.
  assert text.count('triton') == 2


def test_what_does_not_lower_runs_in_loops(monkeypatch):
  monkeypatch.setattr(kernels, 'platform', lambda: 'tpu')
  with pytest.warns(UserWarning, match='engine=kernels: .*runs in loops'):
    found = jax.jit(lambda key: _run('puct', 'kernels', key, 4, 6))(
      jax.random.key(0)
    )
  assert (found.search_tree.children_visits[:, 0].sum(-1) == 6).all()


def test_wrong_engines_are_refused(key):
  with pytest.raises(ValueError, match='engine=fast: must be auto, loops or'):
    _run('puct', 'fast', key)
  select = lambda key, tree, node, depth=0: 0
  rule = _mctx.from_mctx(select, select, jnp.zeros([4, 5]))
  assert not rule.has_kernel
