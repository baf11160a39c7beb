"""Search over sampled actions: against enumeration, and a plain tree."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import exact_jit
from search_tables import Tables, make_root, random_tables, recurrent_fn

from networks import actions
from search import policies, proposals, sampled, value_prefix

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

  @exact_jit
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
  counts = np.asarray(proposals.merge(output.sampled_actions))
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
    proposals.propose,
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
    lambda key: proposals.propose(
      key, distribution, pi, 5, temperature=2.0, noise=policies.Noise(0.25)
    )
  )(key)
  share = np.mean(np.asarray(proposal.actions) == 2)
  assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 10_000)
