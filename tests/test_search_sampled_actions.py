"""Sampled search: duplicates, the actions of the root, real actions."""

import functools
import math

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from compiling import exact_jit
from search_tables import make_root, random_tables, recurrent_fn
from test_search_sampled import (
  PRIOR,
  RULES,
  bandit,
  on_device,
  roots,
  row,
  softmax,
)
from trees import assert_equal

from networks import actions
from search import policies, proposals, sampled

# Duplicates.


def test_merge_by_hand():
  got = proposals.merge(
    jnp.int32([[7, 7, 3, 7], [1, 2, 3, 4], [5, 5, 5, 5], [2, -9, -9, 2]])
  )
  want = [[3, 0, 1, 0], [1, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0]]
  np.testing.assert_array_equal(got, want)
  assert got.dtype == jnp.float32


def test_prior_logits_by_hand():
  counts = jnp.float32([[2, 0, 1]])
  log_pi = jnp.log(jnp.float32([[0.2, 0.5, 0.6]]))
  log_beta = jnp.log(jnp.float32([[0.4, 0.1, 0.3]]))
  logits = proposals.prior_logits(counts, log_pi, log_beta)
  weights = np.asarray(jax.nn.softmax(logits))
  np.testing.assert_allclose(weights, [[1 / 3, 0, 2 / 3]], rtol=1e-6)
  assert weights[0, 1] == 0


@pytest.mark.parametrize('rule', RULES)
def test_a_merged_action_is_one_of_twice_the_prior(rule, key):
  # Slots hold actions 0, 0, 1. The enumerated model has them as three of
  # which the second is invalid.
  num_roots, slots = 32, np.array([0, 0, 1])
  tables = random_tables(2, num_actions=2)
  priors = np.float32([2 / 3, 0, 1 / 3])
  with np.errstate(divide='ignore'):
    logits = np.tile(np.log(priors), (200, 1))
  enumerated = tables._replace(
    child=tables.child[:, slots],
    reward=tables.reward[:, slots],
    discount=tables.discount[:, slots],
    logits=logits,
  )

  def draw_twice(draws, parameters):
    del draws
    return jnp.tile(jnp.asarray(slots, jnp.int32), (parameters.shape[0], 1))

  @exact_jit
  def both(tables, enumerated, key):
    states = jnp.arange(num_roots)
    shared = {'num_simulations': 20, 'evaluate': True}
    ours = sampled.search(
      tables,
      key,
      make_root(tables, states),
      recurrent_fn,
      distribution=actions.flat(2)._replace(sample=draw_twice),
      num_samples=3,
      rule=rule,
      evaluate_root=False,
      **shared,
    )
    theirs = rule(
      enumerated,
      key,
      make_root(enumerated, states),
      recurrent_fn,
      invalid_actions=jnp.tile(jnp.array([False, True, False]), (32, 1)),
      **shared,
    )
    return ours, theirs

  ours, theirs = jax.tree.map(
    np.asarray, both(on_device(tables), on_device(enumerated), key)
  )
  assert (ours.action_weights[:, 1] == 0).all()
  for name in ('children_visits', 'children_index', 'node_values'):
    np.testing.assert_array_equal(
      getattr(ours.search_tree, name), getattr(theirs.search_tree, name)
    )
  np.testing.assert_array_equal(ours.action, slots[theirs.action])


# The root's evaluated actions.


@pytest.mark.parametrize('rule', RULES)
def test_evaluated_actions_decide_the_first_simulation(rule, key):
  # Q = (1, 3, 2) and value 0. PUCT scores them (Q / 3 + 1.25 prior) .96, 1.25
  # and 1.04, and by their priors alone the first; EfficientZero's first visit
  # knows no prior; Gumbel adds logits and 5 times (0, 1, .5).
  tables = on_device(bandit([0.5, 0.2, 0.3], [1.0, 3.0, 2.0]))
  root = make_root(tables, roots(2))
  outputs = {}
  for evaluate_root in (True, False)[: 2 if rule is policies.puct else 1]:
    outputs[evaluate_root] = jax.jit(
      lambda key, on=evaluate_root: sampled.search(
        tables,
        key,
        root,
        recurrent_fn,
        1,
        distribution=actions.flat(3),
        num_samples=3,
        rule=rule,
        replacement=False,
        evaluate_root=on,
        evaluate=True,
      )
    )(key)
  np.testing.assert_array_equal(outputs[True].action, [1, 1])
  visits = outputs[True].search_tree.children_visits[:, 0]
  np.testing.assert_array_equal(visits, [[0, 1, 0]] * 2)
  if False in outputs:
    np.testing.assert_array_equal(outputs[False].action, [0, 0])
  # The evaluation changes nothing else.
  for on in outputs:
    np.testing.assert_array_equal(outputs[on].sampled_actions, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(
      jax.nn.softmax(outputs[on].search_tree.children_prior_logits[:, 0]),
      [[0.5, 0.2, 0.3]] * 2,
      rtol=1e-5,
    )
    np.testing.assert_array_equal(
      outputs[on].search_tree.node_visits.sum(-1), [3, 3]
    )


@pytest.mark.parametrize('rule', RULES)
def test_an_invalid_action_leaves_evaluated_ones_as_they_are(rule, key):
  """Its Q enters no range, neither before the others' first visits nor after.

  Evaluated Qs are not what a visit finds here, so that ranges move.
  """
  num_roots, rng = 64, np.random.default_rng(0)
  tables = random_tables(6, num_states=num_roots)
  tables = tables._replace(
    child=np.zeros_like(tables.child),
    discount=np.zeros_like(tables.discount),
  )
  # All nodes below the roots are alike: how they break ties does not matter.
  tables.reward[0] = 0
  known = np.float32(2 * rng.normal(size=(num_roots, 4)))
  # PUCT has the node's value in its range; the others have no use for it.
  far = 1.0 if rule is policies.puct else 100.0
  weights = []
  for size in (3, 4):
    cut = jax.tree.map(lambda x, n=size: x[:, :n], tables._replace(value=known))
    cut = on_device(cut._replace(value=far * tables.value))
    search = functools.partial(
      rule,
      cut,
      recurrent_fn=recurrent_fn,
      root=make_root(cut, jnp.arange(num_roots)),
      num_simulations=12,
      invalid_actions=jnp.zeros((num_roots, size), bool).at[:, 3:].set(True),
      root_qvalues=jnp.asarray(known[:, :size]),
      evaluate=True,
    )
    output = jax.jit(lambda key, search=search: search(key=key))(key)
    weights.append(np.asarray(output.action_weights))
  assert (weights[1][:, 3] == 0).all()
  np.testing.assert_allclose(weights[1][:, :3], weights[0], rtol=1e-4)


def test_evaluated_actions_are_one_step_qs(key):
  tables = random_tables(1)
  drawn = np.int32([[3, 0], [1, 1], [2, 3]])
  states = np.int32([5, 9, 5])
  got = sampled.evaluate_actions(
    on_device(tables), key, recurrent_fn, jnp.asarray(drawn), states
  )
  at = states[:, None], drawn
  want = (
    tables.reward[at] + tables.discount[at] * tables.value[tables.child[at]]
  )
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('rule', RULES)
def test_evaluated_qvalues_of_another_shape_are_refused(rule, key):
  tables = on_device(random_tables(1))
  root = make_root(tables, jnp.arange(2))
  with pytest.raises(ValueError, match=r'root_qvalues.*\(2, 4\).*\(2, 3\)'):
    rule(tables, key, root, recurrent_fn, 2, root_qvalues=jnp.zeros((2, 3)))


# Invalid actions.


@pytest.mark.parametrize(
  ('rule', 'replacement'),
  [*((rule, False) for rule in RULES), (policies.puct, True)],
)
def test_invalid_actions_have_no_weight(rule, replacement, key):
  num_actions, num_samples, num_roots = 6, 4, 32
  tables = random_tables(4, num_actions=num_actions, invalid=0.6)
  invalid = np.isneginf(tables.logits[:num_roots])
  logits = np.random.default_rng(1).normal(size=invalid.shape)

  @jax.jit
  def search(tables, key):
    # The mask alone tells: the network knows nothing of the rules.
    root = make_root(tables, jnp.arange(num_roots))
    return sampled.search(
      tables,
      key,
      root.replace(prior_logits=jnp.float32(logits)),
      recurrent_fn,
      12,
      distribution=actions.flat(num_actions),
      num_samples=num_samples,
      rule=rule,
      replacement=replacement,
      invalid_actions=jnp.asarray(invalid),
    )

  output = jax.tree.map(np.asarray, search(on_device(tables), key))
  drawn, weights = output.sampled_actions, output.action_weights
  rows = np.arange(num_roots)
  assert (weights[invalid[rows[:, None], drawn]] == 0).all()
  assert not invalid[rows, output.action].any()
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
  # Below the root their logits mask them: a visit would show as a value of 1e6.
  assert (abs(output.search_tree.node_values) < 1e3).all()
  few = (~invalid).sum(-1) < num_samples
  assert few.sum() > 5
  if not replacement:
    for b in rows:
      valid = set(np.flatnonzero(~invalid[b]))
      seen = [a for a in drawn[b] if a in valid]
      assert len(seen) == len(set(seen)) == min(len(valid), num_samples)


# Actions that are not indices of an enumerated set.


def _line_model(distribution, shape):
  """A smooth model of vectors: `(root, recurrent_fn, weights)`."""
  size, rng = 3, np.random.default_rng(0)
  draw = lambda *dims: jnp.asarray(rng.normal(size=dims), jnp.float32)
  weights = {
    'state': draw(size, size),
    'action': draw(distribution.encoded_size, size),
    'policy': 0.5 * draw(size, distribution.num_parameters),
    'value': draw(size),
  }

  def step(weights, key, action, state):
    del key
    assert action.shape == (state.shape[0], *shape)
    mixed = state @ weights['state']
    state = jnp.tanh(mixed + distribution.encode(action) @ weights['action'])
    output = mctx.RecurrentFnOutput(
      reward=state[:, 0],
      discount=jnp.full(state.shape[:1], 0.9),
      prior_logits=state @ weights['policy'],
      value=state @ weights['value'],
    )
    return output, state

  state = draw(4, size)
  root = mctx.RootFnOutput(
    prior_logits=state @ weights['policy'],
    value=state @ weights['value'],
    embedding=state,
  )
  return root, step, weights


LOW, HIGH = np.float32([-2.0, 0.5]), np.float32([-1.0, 3.0])
FAMILIES = {
  'gaussian': (actions.tanh_gaussian(LOW, HIGH), (2,)),
  'bins': (actions.factored_bins(LOW, HIGH, 5), (2,)),
  'index': (actions.factored_index((3, 4)), ()),
}


@pytest.fixture(scope='module', params=FAMILIES)
def line(request):
  """The family's name, `search(key, **options)` and the same compiled."""
  distribution, shape = FAMILIES[request.param]
  root, step, weights = _line_model(distribution, shape)

  def search(key):
    return sampled.search(
      weights,
      key,
      root,
      step,
      6,
      distribution=distribution,
      num_samples=5,
      sample_temperature=1.5,
    )

  return request.param, search, jax.jit(search)


def test_actions_are_real_and_the_chosen_slots(line, key):
  name, _, compiled = line
  output = jax.tree.map(np.asarray, compiled(key))
  shape = FAMILIES[name][1]
  assert output.sampled_actions.shape == (4, 5, *shape)
  assert output.action.shape == (4, *shape)
  sets = output.search_tree.embeddings.actions
  np.testing.assert_array_equal(sets[:, 0], output.sampled_actions)
  if shape:
    assert sets.dtype == np.float32
    assert (sets >= LOW).all() and (sets <= HIGH).all()
  else:
    assert sets.dtype == np.int32 and sets.min() >= 0 and sets.max() < 12
  # The action is one that was visited.
  flat = output.sampled_actions.reshape(4, 5, -1)
  same = (flat == output.action.reshape(4, 1, -1)).all(-1)
  assert (same & (output.action_weights > 0)).any(-1).all()
  np.testing.assert_allclose(output.action_weights.sum(-1), 1, rtol=1e-6)


def test_the_action_is_that_of_the_best_slot(key):
  distribution, shape = FAMILIES['gaussian']
  root, step, weights = _line_model(distribution, shape)
  search = functools.partial(
    sampled.search,
    weights,
    root=root,
    recurrent_fn=step,
    num_simulations=6,
    distribution=distribution,
    num_samples=5,
    evaluate=True,
  )
  output = jax.jit(lambda key: search(key=key))(key)
  visits = output.search_tree.children_visits[:, 0]
  for b in range(4):
    chosen = output.sampled_actions[b] == output.action[b][None]
    slot = int(np.flatnonzero(chosen.all(-1))[0])
    assert visits[b, slot] == visits[b].max()


def test_vmap_equals_a_loop_and_keys_decide(line, key):
  _, search, compiled = line
  keys = jax.random.split(key)
  alone = [jax.tree.map(np.asarray, compiled(k)) for k in keys]
  together = jax.tree.map(np.asarray, jax.jit(jax.vmap(search))(keys))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  for i, want in enumerate(alone):
    got = row(together, i)
    close(got.sampled_actions, want.sampled_actions)
    close(got.action, want.action)
    close(got.search_tree.node_values, want.search_tree.node_values)
    np.testing.assert_array_equal(
      got.search_tree.children_visits, want.search_tree.children_visits
    )
  again = jax.tree.map(np.asarray, compiled(keys[0]))
  assert_equal(again, alone[0])
  assert (alone[0].sampled_actions != alone[1].sampled_actions).any()


def test_jit_equals_eager(key):
  distribution, _ = FAMILIES['bins']
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10)), 'f4')
  propose = functools.partial(
    proposals.propose,
    distribution=distribution,
    parameters=logits,
    num_samples=5,
    temperature=1.5,
    noise=policies.Noise(0.5),
  )
  got, want = propose(key), jax.jit(propose)(key)
  np.testing.assert_array_equal(got.actions, want.actions)
  np.testing.assert_array_equal(got.is_spare, want.is_spare)
  np.testing.assert_allclose(got.logits, want.logits, rtol=1e-5, atol=1e-6)


def test_the_mode_takes_the_place_of_a_draw(key):
  logits = jnp.tile(jnp.float32([[0, 1, 0.5]]), (50, 1))
  first, second = (
    jax.jit(
      lambda key, on=on: proposals.propose(
        key, actions.flat(3), logits, 3, with_mode=on
      )
    )(key)
    for on in (True, False)
  )
  np.testing.assert_array_equal(first.actions[:, 0], np.ones(50))
  np.testing.assert_array_equal(first.actions[:, 1:], second.actions[:, 1:])
  assert (second.actions[:, 0] != 1).any()
  # It is a draw like the others: drawn again, it has that much more weight.
  again = 1 + (np.asarray(first.actions[:, 1:]) == 1).sum(-1)
  np.testing.assert_allclose(
    jax.nn.softmax(first.logits)[:, 0], again / 3, rtol=1e-5
  )
  assert len(set(again)) == 3


def test_gaussian_noise_brings_in_its_actions(key):
  distribution, shape = FAMILIES['gaussian']
  root, step, weights = _line_model(distribution, shape)
  # All in the last of seven parts of each dimension.
  noise = jnp.zeros((4, 2, 7)).at[:, :, -1].set(1)
  search = functools.partial(
    sampled.search,
    weights,
    root=root,
    recurrent_fn=step,
    num_simulations=2,
    distribution=distribution._replace(noise=lambda *_, **__: noise),
    num_samples=5,
    noise=policies.Noise(1.0),
  )
  output = jax.jit(lambda key: search(key=key))(key)
  edge = jnp.broadcast_to(HIGH - (HIGH - LOW) / 7, output.sampled_actions.shape)
  assert (output.sampled_actions >= edge).all()


# A bandit of 7 ** 4 = 2401 joint actions.


def test_the_correction_takes_the_bias_away():
  num_roots, tau, factors = 2048, 2.0, (7, 7, 7, 7)
  rng = np.random.default_rng(0)
  logits = np.float32(rng.normal(size=28))
  factor_probs = softmax(np.float64(logits).reshape(4, 7))
  pi = functools.reduce(np.multiply.outer, factor_probs).ravel()
  beta = pi ** (1 / tau)
  beta /= beta.sum()
  # Better where pi is high: there the two expectations are far apart.
  qvalues = np.log(pi) - np.log(pi).mean() + rng.normal(size=pi.size)
  qvalues = np.float32(qvalues / qvalues.std())
  want = pi @ qvalues
  uncorrected = beta @ qvalues
  weights = pi / beta
  # What a ratio of means is off by, to first order in 1 / K.
  slope = -beta @ (weights**2 * (qvalues - want))

  def step(params, key, action, state):
    del key
    zero = jnp.zeros(state.shape)
    logits_ = jnp.tile(jnp.asarray(logits), (state.shape[0], 1))
    output = mctx.RecurrentFnOutput(
      reward=params[action], discount=zero, prior_logits=logits_, value=zero
    )
    return output, state

  def estimate(num_samples):
    def run(key):
      root = mctx.RootFnOutput(
        prior_logits=jnp.tile(jnp.asarray(logits), (num_roots, 1)),
        value=jnp.zeros(num_roots),
        embedding=jnp.zeros(num_roots),
      )
      output = sampled.search(
        jnp.asarray(qvalues),
        key,
        root,
        step,
        1,
        distribution=actions.factored_index(factors),
        num_samples=num_samples,
        sample_temperature=tau,
        evaluate_root=False,
        noise=policies.Noise(0.0),
      )
      prior = output.search_tree.children_prior_logits[:, 0]
      return output.sampled_actions, jax.nn.softmax(prior)

    drawn, prior = jax.jit(run)(jax.random.key(1))
    drawn, prior = np.asarray(drawn), np.asarray(prior)
    corrected = (prior * qvalues[drawn]).sum(-1)
    return corrected, qvalues[drawn].mean(-1)

  biases = []
  for num_samples in (4, 32):
    corrected, plain = estimate(num_samples)
    error = corrected.std() / math.sqrt(num_roots)
    biases.append(corrected.mean() - want)
    plain_error = plain.std() / math.sqrt(num_roots)
    assert abs(plain.mean() - uncorrected) < 4 * plain_error
    assert abs(uncorrected - want) > 20 * plain_error
  assert abs(biases[0]) > 4 * abs(biases[1])
  assert abs(biases[1] - slope / 32) < 4 * error
  assert abs(biases[1]) < 0.1 * abs(uncorrected - want)


# No search, and what is refused.


def test_raw_takes_the_mode_or_draws(key):
  tables = bandit(PRIOR)
  root = make_root(on_device(tables), roots(500))

  @functools.partial(jax.jit, static_argnums=0)
  def run(evaluate=False, invalid_actions=None):
    return sampled.raw(
      None,
      key,
      root,
      distribution=actions.flat(6),
      num_samples=3,
      evaluate=evaluate,
      invalid_actions=invalid_actions,
    )

  drawn = run()
  assert abs(np.mean(drawn.action == 0) - 0.95) < 4 * math.sqrt(0.0475 / 500)
  np.testing.assert_allclose(drawn.action_weights.sum(-1), 1, rtol=1e-6)
  chosen = (drawn.sampled_actions == drawn.action[:, None]).any(-1)
  assert chosen.all()
  np.testing.assert_array_equal(run(True).action, np.zeros(500))
  first = jnp.zeros((500, 6), bool).at[:, 0].set(True)
  assert (run(True, invalid_actions=first).action == 1).all()
  assert (run(False, invalid_actions=first).action != 0).all()


@pytest.mark.parametrize(
  ('family', 'changes', 'message'),
  [
    ('flat', {'num_samples': 0}, 'num_samples=0: must be at least 1'),
    (
      'flat',
      {'num_samples': 7, 'replacement': False},
      'num_samples=7: without replacement at most the 6 ',
    ),
    ('gaussian', {'replacement': False}, 'replacement=False: .*flat'),
    ('bins', {'replacement': False}, 'replacement=False: .*flat'),
    ('gaussian', {'invalid_actions': True}, 'invalid_actions: only a flat'),
    ('index', {'invalid_actions': True}, 'invalid_actions: only a flat'),
    ('flat', {'sample_temperature': 0}, 'sample_temperature.*above 0.*0'),
    ('flat', {'sample_temperature': -1.0}, r'sample_temperature.*-1\.0'),
    ('flat', {'noise': policies.Noise(2.0)}, r'noise\.fraction.*most 1.*2\.0'),
    ('flat', {'noise': policies.Noise(-0.5)}, r'noise\.fraction.*-0\.5'),
    ('flat', {'noise': policies.Noise(alpha=0)}, r'noise\.alpha.*above 0'),
    ('flat', {'num_simulations': 0}, 'num_simulations.*least 1.*0'),
  ],
)
def test_bad_arguments_are_refused(family, changes, message, key):
  families = FAMILIES | {'flat': (actions.flat(6), ())}
  distribution, shape = families[family]
  root, step, weights = _line_model(distribution, shape)
  if 'invalid_actions' in changes:
    changes = {'invalid_actions': jnp.zeros((4, 6), bool)}
  changes = {'num_simulations': 2, 'num_samples': 3} | changes
  with pytest.raises(ValueError, match=message) as caught:
    sampled.search(
      weights, key, root, step, distribution=distribution, **changes
    )
  assert '\n' not in str(caught.value)
