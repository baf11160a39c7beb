"""The searches' outputs: against mctx, with masks, in evaluation, compiled."""

import functools
from types import SimpleNamespace

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

from search import policies, roots
from search.model import Model, TimeStep

_ROOTS = 32
_ACTIONS = 4
_SIMULATIONS = 30
_SEARCHES = {
  'puct': policies.puct,
  'efficientzero': policies.efficientzero,
  'gumbel': policies.gumbel,
}


@pytest.fixture(scope='module')
def tables():
  return jax.tree.map(jnp.asarray, random_tables(1, invalid=0.25))


@pytest.fixture(scope='module')
def invalid(tables):
  """Row 0 has one valid action, the last row has none."""
  mask = np.isneginf(tables.logits[:_ROOTS])
  mask[0] = [True, True, False, True]
  mask[-1] = True
  return jnp.asarray(mask)


@pytest.fixture(scope='module')
def evaluated(tables, invalid):
  """Each search's evaluation, compiled once: `(name, key) -> PolicyOutput`."""
  root = make_root(tables, jnp.arange(_ROOTS))

  @functools.partial(jax.jit, static_argnums=0)
  def run(name, key):
    return _SEARCHES[name](
      tables,
      key,
      root,
      recurrent_fn,
      _SIMULATIONS,
      invalid_actions=invalid,
      evaluate=True,
    )

  return run


def test_puct_is_muzero(key, monkeypatch):
  drawn = jax.random.dirichlet

  def by_rows(key, alpha, shape=(), dtype=jnp.float32):
    # Our noise has a key a row, so that it does not depend on the devices.
    if not shape:
      return drawn(key, alpha, shape, dtype)
    keys = jax.random.split(key, *shape)
    return jax.vmap(lambda key: drawn(key, alpha, (), dtype))(keys)

  monkeypatch.setattr(jax.random, 'dirichlet', by_rows)
  tables = jax.tree.map(jnp.asarray, random_tables(5))
  root = make_root(tables, jnp.arange(_ROOTS))

  @jax.jit
  def run(key):
    args = (tables, key, root, noisy_recurrent_fn, 50)
    return (
      policies.puct(*args, temperature=0.7),
      mctx.muzero_policy(*args, temperature=0.7),
    )

  ours, theirs = run(key)
  tree = theirs.search_tree
  np.testing.assert_array_equal(
    ours.search_tree.children_visits, tree.children_visits
  )
  np.testing.assert_array_equal(ours.search_tree.node_values, tree.node_values)
  np.testing.assert_array_equal(ours.action_weights, theirs.action_weights)
  np.testing.assert_array_equal(ours.action, theirs.action)
  np.testing.assert_array_equal(ours.value, tree.node_values[:, 0])


def test_puct_is_muzero_with_masks(key, tables, invalid):
  invalid = invalid[:-1]
  root = make_root(tables, jnp.arange(_ROOTS - 1))
  args = (tables, key, root, recurrent_fn, _SIMULATIONS)
  kwargs = {'invalid_actions': invalid, 'max_depth': 3}
  quiet = {'noise': policies.NO_NOISE}, {'dirichlet_fraction': 0.0}
  ours = jax.jit(lambda: policies.puct(*args, **kwargs, **quiet[0]))()
  theirs = jax.jit(lambda: mctx.muzero_policy(*args, **kwargs, **quiet[1]))()
  np.testing.assert_array_equal(ours.action_weights, theirs.action_weights)


def test_gumbel_is_mctx(key, tables, invalid):
  root = make_root(tables, jnp.arange(_ROOTS))

  @jax.jit
  def run(key):
    args = (tables, key, root, noisy_recurrent_fn, _SIMULATIONS)
    kwargs = {'invalid_actions': invalid, 'max_num_considered_actions': 3}
    return (
      policies.gumbel(*args, **kwargs),
      mctx.gumbel_muzero_policy(*args, **kwargs),
    )

  ours, theirs = run(key)
  assert_equal(ours.search_tree, theirs.search_tree)
  np.testing.assert_array_equal(ours.action_weights, theirs.action_weights)
  np.testing.assert_array_equal(ours.action, theirs.action)


@pytest.mark.parametrize('name', sorted(_SEARCHES))
def test_invalid_actions_are_never_taken(evaluated, tables, invalid, name):
  output = evaluated(name, jax.random.key(0))
  assert np.isfinite(output.action_weights).all()
  assert np.isfinite(output.value).all()
  # The last row has no valid action: it is finite, and that is all.
  output = jax.tree.map(lambda x: np.asarray(x[:-1]), output)
  invalid = np.asarray(invalid[:-1])
  tree = output.search_tree
  visits = tree.children_visits
  assert (visits[:, 0][invalid] == 0).all()
  assert (visits[:, 0].sum(-1) == _SIMULATIONS).all()
  assert (output.action_weights[invalid] == 0).all()
  np.testing.assert_allclose(output.action_weights.sum(-1), 1, rtol=1e-6)
  assert output.action[0] == 2
  inside = np.isneginf(tables.logits)[tree.embeddings]
  assert inside[:, 1:].any()
  assert (visits[:, 1:][inside[:, 1:]] == 0).all()
  # An edge to an invalid action would have paid 1e6.
  assert abs(tree.node_values).max() < 100


@pytest.mark.parametrize('name', ['puct', 'efficientzero'])
def test_noise_stays_on_valid_actions(key, tables, invalid, name):
  """With nothing but noise for a prior, the valid share is still whole."""
  root = make_root(tables, jnp.arange(_ROOTS))
  output = jax.jit(
    lambda key: _SEARCHES[name](
      tables,
      key,
      root,
      recurrent_fn,
      2,
      invalid_actions=invalid,
      noise=policies.Noise(1.0),
    )
  )(key)
  noise = jax.nn.softmax(output.search_tree.children_prior_logits[:, 0])
  noise, weights = noise[:-1], output.action_weights[:-1]
  invalid = invalid[:-1]
  assert (noise[invalid] == 0).all()
  assert (weights[invalid] == 0).all()
  several = (~invalid).sum(-1) > 1
  policy = jax.nn.softmax(
    jnp.where(invalid, -jnp.inf, root.prior_logits[:-1]), axis=-1
  )
  assert (abs(noise - policy).max(-1) > 1e-3)[several].all()


@pytest.mark.parametrize('max_depth', [None, 3])
@pytest.mark.parametrize('name', sorted(_SEARCHES))
def test_embeddings_in_bfloat16_are_rounded(name, max_depth):
  """The tree is that of a model which rounds all of its states."""
  weights = jax.random.normal(jax.random.key(1), (5, 8))
  rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)

  def step(weights, key, action, embedding, put=lambda x: x):
    del key
    state, number = embedding
    seen = jnp.concatenate([state, action[:, None].astype(float)], -1)
    state = jnp.tanh(seen @ weights)
    output = mctx.RecurrentFnOutput(
      reward=state[:, 0],
      discount=jnp.full_like(state[:, 0], 0.9),
      prior_logits=state[:, 1:4],
      value=state[:, 4],
    )
    return output, (put(state[:, 4:]), number + 1)

  state = jax.random.normal(jax.random.key(2), (6, 4))
  number = jnp.arange(6) + 2**20
  root = mctx.RootFnOutput(
    prior_logits=state[:, :3], value=state[:, 3], embedding=(state, number)
  )
  run = functools.partial(
    _SEARCHES[name], num_simulations=20, evaluate=True, max_depth=max_depth
  )
  key = jax.random.key(0)
  ours = exact_jit(
    lambda: run(weights, key, root, step, embedding_dtype='bfloat16')
  )()
  plain = exact_jit(
    lambda: run(
      weights,
      key,
      root.replace(embedding=(rounded(state), number)),
      functools.partial(step, put=rounded),
    )
  )()
  jax.tree.map(np.testing.assert_array_equal, ours, plain)
  # Whole numbers are kept as they are.
  assert ours.search_tree.embeddings[1].max() > 2**20


@pytest.mark.parametrize('name', sorted(_SEARCHES))
def test_evaluation_needs_no_key(evaluated, name):
  first = evaluated(name, jax.random.key(1))
  second = evaluated(name, jax.random.key(2))
  assert_equal(first, second)
  visits = first.search_tree.children_visits[:, 0]
  best = jnp.take_along_axis(visits, first.action[:, None], axis=1)[:, 0]
  np.testing.assert_array_equal(best, visits.max(-1))


def test_visit_ties_go_to_q_then_prior():
  summary = SimpleNamespace(
    visit_counts=jnp.array([[2.0, 2, 1], [3, 3, 3], [0, 2, 2]]),
    qvalues=jnp.array([[0.1, 0.2, 9], [0.5, 0.5, 0.1], [9, 1, 1]]),
  )
  prior = jnp.array([[0.8, 0.1, 0.1], [0.2, 0.3, 0.5], [0.4, 0.3, 0.3]])
  best = roots.most_visited(summary, prior)
  np.testing.assert_array_equal(best, [1, 1, 1])


def test_temperature():
  """Traced; the draws are by `weights ** (1 / temperature)`, 0 is the best."""
  probs = jnp.array([[0.1, 0.2, 0.3, 0.4]])
  root = mctx.RootFnOutput(
    prior_logits=jnp.tile(jnp.log(probs), (2000, 1)),
    value=jnp.zeros([2000]),
    embedding=(),
  )
  act = jax.jit(
    lambda key, temperature: (
      policies.raw(None, key, root, temperature=temperature).action
    )
  )
  key = jax.random.key(0)
  assert (act(key, 0.0) == 3).all()
  for temperature, expected in (
    (1.0, np.array([0.1, 0.2, 0.3, 0.4])),
    (0.5, np.array([1, 4, 9, 16]) / 30),
  ):
    counts = np.bincount(act(key, temperature), minlength=4)
    deviation = np.sqrt(2000 * expected * (1 - expected))
    assert (abs(counts - 2000 * expected) < 3 * deviation).all()


def test_raw_is_the_masked_network(key, tables, invalid):
  root = make_root(tables, jnp.arange(_ROOTS))
  output = policies.raw(None, key, root, invalid_actions=invalid, evaluate=True)
  weights = np.where(invalid, 0, np.exp(root.prior_logits))[:-1]
  np.testing.assert_allclose(
    output.action_weights[:-1],
    weights / weights.sum(-1, keepdims=True),
    rtol=1e-5,
  )
  assert (output.action == output.action_weights.argmax(-1)).all()
  np.testing.assert_array_equal(output.value, root.value)


def test_planner_over_seeds(tables, invalid):
  """jit of vmap over keys gives what single calls give."""
  model = Model(
    root=lambda params, timestep, key: make_root(params, timestep.observation),
    step=recurrent_fn,
  )
  rows = jnp.arange(_ROOTS)
  zeros = jnp.zeros([_ROOTS])
  timestep = TimeStep(rows, zeros, zeros, zeros > 0, zeros > 0, invalid)
  keys = jax.random.split(jax.random.key(9), 3)
  planner = policies.make_planner(policies.efficientzero, num_simulations=8)

  @jax.jit
  def plan(key):
    return planner(model, tables, key, timestep)._replace(search_tree=None)

  together = jax.jit(jax.vmap(plan))(keys)
  singly = jax.tree.map(lambda *x: jnp.stack(x), *map(plan, keys))
  # A program for three seeds may round a mean in another order.
  np.testing.assert_allclose(together.value, singly.value, rtol=2e-6)
  together, singly = (x._replace(value=None) for x in (together, singly))
  assert_equal(together, singly)
  assert (together.action_weights[0] != together.action_weights[1]).any()
  assert together.action.dtype == jnp.int32
  assert (together.action_weights[:, :-1][:, invalid[:-1]] == 0).all()


def test_refuses_wrong_arguments(key, tables):
  root = make_root(tables, jnp.arange(2))
  cases = [
    (policies.puct, {'noise': policies.Noise(1.5)}, r'noise\.fraction.*1\.5'),
    (
      policies.puct,
      {'noise': policies.Noise(alpha=0.0)},
      r'noise\.alpha.*0\.0',
    ),
    (policies.puct, {'temperature': -1.0}, r'temperature .* -1.0'),
    (policies.puct, {'num_simulations': 0}, r'num_simulations .* 0'),
    (policies.efficientzero, {'minmax_delta': 0.0}, r'minmax_delta .* 0.0'),
    (policies.gumbel, {'embedding_dtype': 'f2'}, r'embedding_dtype=f2: must'),
    (policies.efficientzero, {'max_depth': 0}, r'max_depth .* 0'),
    (policies.gumbel, {'gumbel_scale': -1}, r'gumbel_scale .* -1'),
    (
      policies.gumbel,
      {'max_num_considered_actions': 0},
      r'max_num_considered_actions .* 0',
    ),
    (policies.raw, {'invalid_actions': jnp.zeros([4])}, r'invalid_actions'),
  ]
  for search, kwargs, message in cases:
    kwargs = {'num_simulations': 4} | kwargs
    with pytest.raises(ValueError, match=message):
      search(tables, key, root, recurrent_fn, **kwargs)


def test_make_planner_refuses_unknown_arguments():
  with pytest.raises(ValueError, match=r'puct.*num_simulation'):
    policies.make_planner(policies.puct, num_simulation=4)
  with pytest.raises(ValueError, match=r'puct.*missing.*num_simulations'):
    policies.make_planner(policies.puct)
