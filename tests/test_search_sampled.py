"""Search over sampled actions: against enumeration, and a plain tree."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from compiling import exact_jit
from search_tables import Tables, make_root, random_tables, recurrent_fn

from networks import actions
from search import policies, sampled, value_prefix

RULES = (policies.puct, policies.efficientzero, policies.gumbel)
PRIOR = np.float32([0.95, 0.01, 0.01, 0.01, 0.01, 0.01])


def with_key(rule, key):
  """The rule with a key of its own, whatever a search hands to it."""

  @functools.wraps(rule)
  def keyed(params, _, *args, **kwargs):
    return rule(params, key, *args, **kwargs)

  return keyed


def on_device(tables):
  return jax.tree.map(jnp.asarray, tables)


def bandit(probs, qvalues=0.0):
  """Tables of one state where each action has its prior and its reward."""
  shape = (1, len(probs))
  return Tables(
    child=np.zeros(shape, np.int32),
    reward=np.broadcast_to(np.float32(qvalues), shape),
    discount=np.zeros(shape, np.float32),
    logits=np.log(np.float32(probs))[None],
    value=np.zeros(1, np.float32),
  )


def roots(num):
  return jnp.zeros(num, jnp.int32)


def row(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


# All actions at once: the tree of the enumerated model.


@pytest.mark.parametrize('rule', RULES)
def test_all_actions_give_the_tree_of_the_enumerated_model(rule, key):
  num_roots, num_actions, fraction = 24, 4, 0.25
  tables = random_tables(3, invalid=0.2)
  rng = np.random.default_rng(0)
  invalid = rng.random((num_roots, num_actions)) < 0.3
  invalid |= np.isneginf(tables.logits[:num_roots])
  invalid[invalid.all(axis=1), 0] = False
  noise = np.where(invalid, 0, rng.random(invalid.shape))
  noise = np.float32(noise / noise.sum(-1, keepdims=True))
  # A root's mask overrides its logits, which may be -inf where it is valid.
  logits = np.maximum(tables.logits[:num_roots], -20)
  prior = softmax(np.where(invalid, -np.inf, logits))
  mixed = (1 - fraction) * prior + fraction * noise
  with np.errstate(divide='ignore'):
    mixed = np.maximum(np.log(np.float32(mixed)), np.finfo(np.float32).min)
  no_noise = {}
  if rule is not policies.gumbel:
    no_noise['noise'] = policies.Noise(0.0)
  distribution = actions.flat(num_actions)._replace(
    noise=lambda *_, **__: jnp.asarray(noise)[:, None]
  )

  @jax.jit
  def both(tables, key, fraction, root_logits):
    root = make_root(tables, jnp.arange(num_roots))
    root = root.replace(prior_logits=jnp.asarray(logits))
    shared = {'invalid_actions': jnp.asarray(invalid)}
    ours = sampled.search(
      tables,
      key,
      root,
      recurrent_fn,
      20,
      distribution=distribution,
      num_samples=num_actions,
      rule=with_key(rule, key),
      replacement=False,
      evaluate_root=False,
      noise=policies.Noise(fraction),
      **shared,
    )
    root = root.replace(prior_logits=root_logits)
    theirs = rule(tables, key, root, recurrent_fn, 20, **shared, **no_noise)
    return ours, theirs

  for share, root_logits in ((0.0, logits), (fraction, mixed)):
    ours, theirs = both(on_device(tables), key, share, root_logits)
    for name in ('children_visits', 'children_index', 'node_values'):
      np.testing.assert_array_equal(
        getattr(ours.search_tree, name), getattr(theirs.search_tree, name)
      )
    np.testing.assert_array_equal(ours.action, theirs.action)
    np.testing.assert_array_equal(ours.value, theirs.value)
    np.testing.assert_allclose(
      ours.action_weights, theirs.action_weights, rtol=1e-5, atol=1e-7
    )
    assert (np.asarray(ours.action_weights)[invalid] == 0).all()
    np.testing.assert_array_equal(
      ours.sampled_actions, np.tile(np.arange(num_actions), (num_roots, 1))
    )


# A plain tree, one node and number at a time.


class _Node:
  def __init__(self, tables, state, actions, tau, reward=0.0, discount=0.0):
    self.state, self.actions = int(state), [int(a) for a in actions]
    self.reward, self.discount = float(reward), float(discount)
    self.value, self.visits = float(tables.value[state]), 1
    self.children = {}
    pi = softmax(tables.logits[state])
    beta = pi ** (1 / tau)
    beta /= beta.sum()
    counts = collections.Counter(self.actions)
    prior = [
      counts[a] / len(self.actions) / beta[a] * pi[a]
      if self.actions.index(a) == slot
      else 0.0
      for slot, a in enumerate(self.actions)
    ]
    self.prior = [p / sum(prior) for p in prior]

  def qvalue(self):
    return self.reward + self.discount * self.value

  def scores(self, evaluated=None):
    """PUCT's, of the slots that are no spare ones."""
    slots = [s for s, p in enumerate(self.prior) if p > 0]
    qs = {s: child.qvalue() for s, child in self.children.items()}
    if evaluated is not None:
      qs = {s: qs.get(s, evaluated[s]) for s in slots}
    low = min([*qs.values(), self.value])
    scale = max(max([*qs.values(), self.value]) - low, 1e-8)
    c = 1.25 + math.log((self.visits + 19652 + 1) / 19652)
    scores = {}
    for s in slots:
      visits = self.children[s].visits if s in self.children else 0
      scores[s] = (qs.get(s, low) - low) / scale
      scores[s] += c * math.sqrt(self.visits) * self.prior[s] / (1 + visits)
    return scores


def _plain_puct(tables, state, tree, num_simulations, tau, evaluate_root):
  """Sampled MuZero's search by the book, for one root.

  Of `tree`, one row of mctx's, it takes the nodes' actions, and the slot where
  several have the best score: counts make such ties, and roundings break them.

  Returns:
    The root, and how many choices were made and how many of these were ties.
  """
  sets = tree.embeddings.actions
  root = _Node(tables, state, sets[0], tau)
  evaluated = None
  if evaluate_root:
    at = state, root.actions
    evaluated = tables.value[tables.child[at]]
    evaluated = tables.reward[at] + tables.discount[at] * evaluated
  choices = ties = 0
  for index in range(1, num_simulations + 1):
    wanted, at = [], index
    while at != 0:
      wanted.append(int(tree.action_from_parent[at]))
      at = tree.parents[at]
    path, node = [root], root
    for slot in wanted[::-1]:
      scores = node.scores(evaluated if node is root else None)
      best = [s for s, x in scores.items() if x >= max(scores.values()) - 1e-6]
      assert slot in best
      choices, ties = choices + 1, ties + (len(best) > 1)
      if slot not in node.children:
        break
      node = node.children[slot]
      path.append(node)
    edge = node.state, node.actions[slot]
    assert slot not in node.children
    leaf = _Node(
      tables,
      tables.child[edge],
      sets[index],
      tau,
      tables.reward[edge],
      tables.discount[edge],
    )
    node.children[slot] = leaf
    returns, child = leaf.value, leaf
    for parent in path[::-1]:
      returns = child.reward + child.discount * returns
      total = parent.value * parent.visits + returns
      parent.visits += 1
      parent.value = total / parent.visits
      child = parent
  return root, choices, ties


def _prefix_step(tables, key, action, state, carry):
  """Predicts prefixes without error; its carry is the sum so far."""
  output, child = recurrent_fn(tables, key, action, state)
  prefix = carry + output.reward
  return value_prefix.PrefixStep(
    prefix, output.discount, output.prior_logits, output.value, child, prefix
  )


@pytest.mark.parametrize(
  ('tau', 'evaluate_root'), [(1.0, False), (1.0, True), (2.0, True)]
)
def test_equals_a_plain_tree(tau, evaluate_root, key):
  num_roots, num_simulations, num_samples = 32, 40, 5
  tables = random_tables(5, num_actions=6, invalid=0.2, dtype='f8')
  # Sums of these are exact, so that prefixes lose nothing.
  tables = tables._replace(reward=np.round(tables.reward * 256) / 256)
  with jax.enable_x64(True):

    @exact_jit
    def search(tables, key):
      run = functools.partial(
        sampled.search,
        tables,
        key,
        num_simulations=num_simulations,
        distribution=actions.flat(6),
        num_samples=num_samples,
        sample_temperature=tau,
        evaluate_root=evaluate_root,
        noise=policies.Noise(0.0),
      )
      root = make_root(tables, jnp.arange(num_roots))
      prefixes = value_prefix.root_embedding(
        root.embedding, root.value, root.value.dtype
      )
      plain = run(root=root, recurrent_fn=recurrent_fn)
      if not (evaluate_root and tau == 2):
        return plain, plain
      step = value_prefix.recurrent_fn(_prefix_step, horizon=3)
      root = root.replace(embedding=prefixes)
      return plain, run(root=root, recurrent_fn=step)

    output, by_prefix = jax.tree.map(np.asarray, search(on_device(tables), key))
  tree = output.search_tree
  sets = tree.embeddings.actions
  assert sets.shape == (num_roots, num_simulations + 1, num_samples)
  np.testing.assert_array_equal(sets[:, 0], output.sampled_actions)
  choices, ties, duplicates = 0, 0, 0
  for b in range(num_roots):
    root, *counted = _plain_puct(
      tables, b, row(tree, b), num_simulations, tau, evaluate_root
    )
    choices, ties = choices + counted[0], ties + counted[1]
    duplicates += len(set(root.actions)) < num_samples
    visits = [
      root.children[s].visits if s in root.children else 0
      for s in range(num_samples)
    ]
    np.testing.assert_array_equal(tree.children_visits[b, 0], visits)
    np.testing.assert_allclose(
      output.action_weights[b], np.array(visits) / num_simulations
    )
    np.testing.assert_allclose(output.value[b], root.value, rtol=1e-9)
    spare = np.array(root.prior) == 0
    assert (output.action_weights[b][spare] == 0).all()
  assert duplicates > num_roots // 2
  # Deep trees, and few ties where priors are not just counts.
  assert choices > 2 * num_roots * num_simulations
  assert ties < (0.3 if tau == 1 else 0.1) * choices

  for name in ('children_visits', 'children_index', 'node_values'):
    np.testing.assert_array_equal(
      getattr(tree, name), getattr(by_prefix.search_tree, name)
    )
  np.testing.assert_array_equal(output.action, by_prefix.action)


def test_inner_nodes_draw_from_the_tempered_policy():
  """Over keys, as nodes of one search may share their random numbers."""
  num_keys, num_samples, tau = 400, 6, 2.0
  pi = np.array([0.6, 0.3, 0.1])
  beta = pi ** (1 / tau) / (pi ** (1 / tau)).sum()
  tables = on_device(bandit(pi))

  @jax.jit
  @jax.vmap
  def draw(key):
    output = sampled.search(
      tables,
      key,
      make_root(tables, roots(2)),
      recurrent_fn,
      3,
      distribution=actions.flat(3),
      num_samples=num_samples,
      sample_temperature=tau,
    )
    # All nodes but the root.
    drawn = output.search_tree.embeddings.actions[:, 1:]
    return jax.nn.one_hot(drawn, 3)

  drawn = np.asarray(draw(jax.random.split(jax.random.key(0), num_keys)))
  shares = drawn.mean((1, 2, 3))
  error = shares.std(0, ddof=1) / math.sqrt(num_keys)
  assert (abs(shares.mean(0) - beta) < 4 * error).all()
  assert (error < 0.02).all()
  # Nodes of a search and rows of a batch have sets of their own.
  for one, other in (
    (drawn[:, 0], drawn[:, 1]),
    (drawn[:, :, 0], drawn[:, :, 1]),
  ):
    assert (one != other).any((-1, -2)).mean() > 0.9
  # Slots of a node are independent: pairs agree as often as they should.
  pairs = np.einsum('nbsia,nbsja->nij', drawn, drawn) / drawn[0, ..., 0, 0].size
  off = ~np.eye(num_samples, dtype=bool)
  agree = pairs[:, off].mean(-1)
  error = agree.std(ddof=1) / math.sqrt(num_keys)
  assert abs(agree.mean() - (beta**2).sum()) < 4 * error


# Priors and noise.


def assert_greedy(visits, prior):
  """Visits that maximise `prior / (1 + visits)` one after the other.

  At equal Qs PUCT is the method of D'Hondt: no action's last visit was worth
  less than what another's next would be.
  """
  visits, prior = np.float64(visits), np.float64(prior)
  with np.errstate(divide='ignore', invalid='ignore'):
    last = np.where(visits > 0, prior / visits, np.inf).min(-1)
  upcoming = (prior / (1 + visits)).max(-1)
  assert (last >= upcoming * (1 - 1e-5)).all()


@pytest.fixture(scope='module')
def zero_search():
  """`(key, noise [B, A], fraction, replacement, evaluate) -> PolicyOutput`.

  All Qs are zero. Where nothing below the root matters it is not searched.
  """
  tables = on_device(bandit(PRIOR))

  @functools.partial(jax.jit, static_argnums=(3, 4))
  def search(key, noise, fraction, replacement, evaluate):
    distribution = actions.flat(6)
    return sampled.search(
      tables,
      key,
      make_root(tables, roots(noise.shape[0])),
      recurrent_fn,
      200,
      distribution=distribution._replace(noise=lambda *_, **__: noise[:, None]),
      num_samples=6,
      replacement=replacement,
      noise=policies.Noise(fraction),
      evaluate=evaluate,
      max_depth=1,
    )

  return search


def test_visits_follow_the_prior(zero_search, key):
  output = zero_search(key, jnp.ones((256, 6)) / 6, 0.0, False, False)
  visits = np.asarray(output.search_tree.children_visits[:, 0])
  # By hand: .95 / k > .01 / 2 for k < 190, which makes 189 visits, and one
  # for each of the others; then six are worth .005, and 200 are full.
  np.testing.assert_array_equal(visits, [[190, 2, 2, 2, 2, 2]] * 256)
  # The closed form (1 + n_a) / (N + A) = p_a, to a visit of each other action.
  np.testing.assert_allclose((1 + visits[0]) / 206, PRIOR, atol=5 / 206)
  assert (output.search_tree.summary().visit_counts.argmax(-1) == 0).all()


def test_visits_follow_the_prior_in_expectation_over_draws(zero_search, key):
  num_roots = 256
  output = zero_search(key, jnp.ones((num_roots, 6)) / 6, 0.0, True, False)
  drawn = np.asarray(output.sampled_actions)
  visits = np.asarray(output.search_tree.children_visits[:, 0])
  counts = np.asarray(sampled.merge(output.sampled_actions))
  assert_greedy(visits, counts / 6)
  by_action = np.stack(
    [np.where(drawn == a, visits, 0).sum(-1) for a in range(6)], -1
  )
  assert (by_action.argmax(-1) == 0).mean() > 0.99
  shares = by_action / 200
  error = np.sqrt(PRIOR * (1 - PRIOR) / (6 * num_roots))
  # A slot's share is its prior's within the closed form's rounding.
  rounding = (counts > 0).sum(-1).max() / 206
  assert rounding < 0.025
  assert (abs(shares.mean(0) - PRIOR) < 4 * error + rounding * PRIOR).all()


@pytest.mark.parametrize('replacement', [True, False])
def test_noise_on_one_action_moves_its_visits(zero_search, replacement, key):
  noise = jax.nn.one_hot(jnp.full(256, 4), 6)
  share = lambda output: np.asarray(
    jnp.sum(
      jnp.where(output.sampled_actions == 4, output.action_weights, 0), -1
    )
  )
  all_of_it = zero_search(key, noise, 1.0, replacement, False)
  np.testing.assert_array_equal(share(all_of_it), np.ones(256))
  np.testing.assert_array_equal(all_of_it.action, np.full(256, 4))
  without = share(zero_search(key, noise, 0.0, replacement, False))
  assert without.mean() < 0.03
  evaluated = zero_search(key, noise, 1.0, replacement, True)
  np.testing.assert_array_equal(share(evaluated), without)
  if not replacement:
    mixed = zero_search(key, noise, 0.25, replacement, False)
    visits = np.asarray(mixed.search_tree.children_visits[:, 0])
    prior = 0.75 * PRIOR + 0.25 * np.eye(6)[4]
    assert_greedy(visits, np.tile(prior, (256, 1)))
    assert (visits[:, 4] > 45).all()


def test_noise_enters_policy_and_proposal_alike(key):
  """Hand-computed weights of the mixtures, at tau = 2."""
  pi = np.array([0.5, 0.3, 0.15, 0.05])
  noise = np.array([0.1, 0.1, 0.1, 0.7])
  tau, fraction = 2.0, 0.3
  beta = pi ** (1 / tau) / (pi ** (1 / tau)).sum()
  mix = lambda p: (1 - fraction) * p + fraction * noise
  drawn = jnp.tile(jnp.int32([3, 0, 3, 1, 2]), (2, 1))
  noise_rows = jnp.tile(jnp.float32(noise), (2, 1))[:, None]
  # All slots are the noise's or the policy's, and the same in both.
  distribution = actions.flat(4)._replace(
    noise=lambda *_, **__: noise_rows,
    sample=lambda *_: drawn,
    noise_sample=lambda *_, **__: drawn,
  )
  propose = functools.partial(
    sampled.propose,
    distribution=distribution,
    parameters=jnp.tile(jnp.log(jnp.float32(pi)), (2, 1)),
    num_samples=5,
    temperature=tau,
    noise=policies.Noise(fraction),
  )
  proposal = jax.jit(propose)(key)
  want = np.array([2, 1, 0, 1, 1]) * (mix(pi) / mix(beta))[[3, 0, 3, 1, 2]]
  got = jax.nn.softmax(proposal.logits)[0]
  np.testing.assert_allclose(got, want / want.sum(), rtol=1e-5)
  np.testing.assert_array_equal(proposal.is_spare[0], [0, 0, 1, 0, 0])


def test_noise_proposes_its_share(key):
  """Slots come from the mixture of proposal and noise."""
  pi = jnp.tile(jnp.log(jnp.float32([0.9, 0.1, 1e-9])), (2000, 1))
  noise = jnp.tile(jnp.float32([0, 0, 1]), (2000, 1))[:, None]
  distribution = actions.flat(3)._replace(noise=lambda *_, **__: noise)
  proposal = jax.jit(
    lambda key: sampled.propose(
      key, distribution, pi, 5, temperature=2.0, noise=policies.Noise(0.25)
    )
  )(key)
  share = np.mean(np.asarray(proposal.actions) == 2)
  assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 10_000)


# Duplicates.


def test_merge_by_hand():
  got = sampled.merge(
    jnp.int32([[7, 7, 3, 7], [1, 2, 3, 4], [5, 5, 5, 5], [2, -9, -9, 2]])
  )
  want = [[3, 0, 1, 0], [1, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0]]
  np.testing.assert_array_equal(got, want)
  assert got.dtype == jnp.float32


def test_prior_logits_by_hand():
  counts = jnp.float32([[2, 0, 1]])
  log_pi = jnp.log(jnp.float32([[0.2, 0.5, 0.6]]))
  log_beta = jnp.log(jnp.float32([[0.4, 0.1, 0.3]]))
  logits = sampled.prior_logits(counts, log_pi, log_beta)
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
  # Below the root they are told by logits: a visit would show by its 1e6.
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
  jax.tree.map(np.testing.assert_array_equal, again, alone[0])
  assert (alone[0].sampled_actions != alone[1].sampled_actions).any()


def test_jit_equals_eager(key):
  distribution, _ = FAMILIES['bins']
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10)), 'f4')
  propose = functools.partial(
    sampled.propose,
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
      lambda key, on=on: sampled.propose(
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
