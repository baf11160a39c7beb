"""Truncated rollout and candidates: against plain loops and closed forms."""

import functools

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from table_games import (
  TableGame,
  arrive,
  random_game,
  table_model,
  tree_qvalues,
)

from networks import actions
from search import candidates, policies, rollout
from search.exact import bellman
from search.lookahead import lookahead
from search.model import Model

GAMMA = 0.9
STATES = np.arange(5)
TABLES = random_game(5)


def walk(tables, state, steps, terminal=True):
  """Return of the likeliest valid actions from a state, by a plain loop."""
  total, discount = 0.0, 1.0
  while steps and discount:
    logits = np.where(tables.invalid[state], -np.inf, tables.logits[state])
    at = (state, np.argmax(logits), 0)
    total += discount * tables.reward[at]
    discount *= GAMMA * tables.discount[at]
    state, steps = tables.child[at], steps - 1
  return total + terminal * discount * tables.value[state]


def plan(planner, model, params, timestep):
  """A planner's output, compiled."""
  run = jax.jit(functools.partial(planner, model))
  return run(params, jax.random.key(0), timestep)


@pytest.mark.parametrize(
  'depth, steps, terminal', [(1, 0, True), (2, 3, True), (1, 3, False)]
)
def test_leaves_are_worth_what_the_base_policy_earns(depth, steps, terminal):
  model = rollout.truncated(
    table_model(TABLES, GAMMA), 'mode', steps=steps, terminal=terminal
  )
  output = plan(lookahead(depth), model, TABLES.params, arrive(STATES, TABLES))
  leaf = lambda state: walk(TABLES, state, steps, terminal)
  expected = [
    tree_qvalues(TABLES, s, depth, leaf=leaf, gamma=GAMMA) for s in STATES
  ]
  np.testing.assert_allclose(output.qvalues, expected, rtol=1e-4, atol=1e-5)


def test_without_a_bound_rollouts_go_on_until_the_end():
  # A line of states where action 0 advances, which ends in the fifth.
  states = np.arange(6)
  shape = (6, 2, 1)
  advance = np.minimum(states + 1, 5)
  tables = TableGame(
    child=np.stack([advance, states], 1)[..., None].astype('i4'),
    probability=np.ones(shape, 'f4'),
    reward=np.broadcast_to(2.0 ** states[:, None, None], shape).astype('f4'),
    discount=np.where(states < 4, -1.0, 0.0)[:, None, None].astype('f4')
    * np.ones(shape, 'f4'),
    invalid=np.zeros((6, 2), bool),
    logits=np.tile(np.array([[1.0, 0.0]], 'f4'), (6, 1)),
    value=np.full(6, 100.0, 'f4'),
  )
  model = rollout.truncated(table_model(tables), 'mode', steps=None)
  root = jax.jit(model.root)(
    tables.params, arrive([0, 2, 4]), jax.random.key(0)
  )
  # Signs alternate, and the terminal value is never added.
  np.testing.assert_array_equal(
    root.value, [1 - 2 + 4 - 8 + 16, 4 - 8 + 16, 16]
  )


def test_rollout_moves_newtons_point_along_the_base_policy():
  """T_mu T^(l-1) T_base^m J = T^l T_base^m J, in a deterministic MDP."""
  depth, steps = 2, 3
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    following = rng.integers(6, size=(6, 3))
    base = rng.integers(3, size=6)
    mdp = bellman.MDP(
      jnp.eye(6)[following],
      jnp.asarray(rng.normal(size=(6, 3))),
      jnp.asarray(GAMMA),
      jnp.ones(6) / 6,
    )
    guess = jnp.asarray(rng.normal(size=6))
    mu = jnp.asarray(base)
    model = rollout.truncated(
      bellman.model(mdp),
      lambda params, key, prior_logits, state: mu[state],
      steps=steps,
    )
    output = plan(lookahead(depth), model, guess, arrive(np.arange(6)))
    reward, point = np.asarray(mdp.reward), np.asarray(guess)
  rows = np.arange(6)
  for _ in range(steps):
    point = reward[rows, base] + GAMMA * point[following[rows, base]]
  for _ in range(depth - 1):
    point = (reward + GAMMA * point[following]).max(1)
  q = reward + GAMMA * point[following]
  np.testing.assert_allclose(output.value, q.max(1), atol=1e-12)
  chosen = np.asarray(output.action)
  np.testing.assert_allclose(q[rows, chosen], q.max(1), atol=1e-12)


def test_the_mean_of_trials_is_the_base_policys_value():
  tables = random_game(11, chances=2)
  trials, steps = 3000, 2
  model = rollout.truncated(
    table_model(tables, GAMMA), 'sample', steps=steps, trials=trials
  )
  root = jax.jit(model.root)(
    tables.params, arrive(STATES, tables), jax.random.key(1)
  )

  policy = np.where(tables.invalid, 0, np.exp(tables.logits))
  policy /= policy.sum(1, keepdims=True)
  value = tables.value
  for _ in range(steps):
    total = tables.reward + GAMMA * tables.discount * value[tables.child]
    value = np.einsum('sa,sac,sac->s', policy, tables.probability, total)
  # A rollout's standard deviation is below 2, so this is five of a mean's.
  np.testing.assert_allclose(
    root.value, value[STATES], atol=5 * 2 / trials**0.5
  )


@functools.cache
def noisy_differences(common):
  """Q of action 0, and minus Q of action 1, over 200 roots `[2, 200]`.

  The actions lead to twins, whose rewards depend on luck alone: action 1 is
  worth 1 more.
  """
  states, luck = 3, 4
  child = np.broadcast_to(
    np.array([[1, 2], [1, 1], [2, 2]])[..., None], (states, 2, luck)
  )
  reward = np.zeros(child.shape, 'f4')
  reward[1] = 10 * np.arange(luck)
  reward[2] = 10 * np.arange(luck)
  reward[0, 1] = 1.0
  tables = TableGame(
    child=child.astype('i4'),
    probability=np.full(child.shape, 1 / luck, 'f4'),
    reward=reward,
    discount=np.ones(child.shape, 'f4'),
    invalid=np.zeros((states, 2), bool),
    logits=np.zeros((states, 2), 'f4'),
    value=np.zeros(states, 'f4'),
  )
  model = rollout.truncated(table_model(tables), steps=5, common=common)
  output = plan(lookahead(1), model, tables.params, arrive(np.zeros(200)))
  q = np.asarray(output.qvalues)
  return q[:, 0], q[:, 1] - q[:, 0]


def test_common_numbers_cancel_in_differences():
  # Five draws of deviation 11.2 are one of 25; the first stage averages 4,
  # whose numbers are their own whether actions share them or not.
  q, difference = noisy_differences(True)
  assert 10 < q.std() < 15
  np.testing.assert_allclose(difference, 1, atol=1e-4)
  q, difference = noisy_differences(False)
  assert 10 < q.std() < 15
  assert 10 < difference.std() < 25


@pytest.mark.parametrize('rule', [policies.puct, policies.gumbel])
def test_tree_searches_evaluate_their_leaves_by_rollout(rule):
  tables, steps = TABLES, 3
  model = rollout.truncated(table_model(tables, GAMMA), 'mode', steps=steps)
  search = policies.make_planner(rule, num_simulations=6, evaluate=True)
  tree = plan(search, model, tables.params, arrive(STATES, tables)).search_tree
  state = np.asarray(tree.embeddings.state)
  parent, action = np.asarray(tree.parents), np.asarray(tree.action_from_parent)
  raw = np.asarray(tree.raw_values)
  for row in range(len(STATES)):
    assert raw[row, 0] == pytest.approx(walk(tables, row, steps), abs=1e-4)
    for node in range(1, 7):
      above = state[row, parent[row, node]]
      discount = tables.discount[above, action[row, node], 0]
      expected = walk(tables, state[row, node], steps) if discount else 0
      assert raw[row, node] == pytest.approx(expected, abs=1e-4)


def test_greedy_base_policy_looks_one_step_ahead():
  model = table_model(TABLES, GAMMA)
  act = jax.jit(rollout.greedy(model))
  logits = np.where(TABLES.invalid, -np.inf, TABLES.logits)
  chosen = act(
    TABLES.params, jax.random.key(0), jnp.asarray(logits), jnp.arange(12)
  )
  expected = [tree_qvalues(TABLES, s, 1, gamma=GAMMA) for s in range(12)]
  np.testing.assert_array_equal(chosen, np.argmax(expected, axis=1))


def test_one_component_at_a_time_improves_every_state():
  factors, states = (2, 3, 2), 10
  size = 12
  rng = np.random.default_rng(2)
  transition = rng.dirichlet(np.full(states, 0.3), (states, size))
  reward = rng.normal(size=(states, size))
  base = rng.integers(size, size=states)
  rows = np.arange(states)

  def value(action):
    matrix = np.eye(states) - GAMMA * transition[rows, action]
    return np.linalg.solve(matrix, reward[rows, action])

  expected = base.copy()
  q = reward + GAMMA * transition @ value(base)
  for number, size_of in enumerate(factors):
    for s in range(states):
      parts = list(np.unravel_index(expected[s], factors))
      scores = []
      for part in range(size_of):
        parts[number] = part
        scores.append(q[s, np.ravel_multi_index(parts, factors)])
      parts[number] = int(np.argmax(scores))
      expected[s] = np.ravel_multi_index(parts, factors)

  with jax.enable_x64(True):
    mdp = bellman.MDP(*map(jnp.asarray, (transition, reward, GAMMA)), None)
    model = bellman.model(mdp)
    evaluated = []

    def outcomes(params, action, embedding):
      evaluated.append(action.shape[0] // states)
      return model.outcomes(params, action, embedding)

    mu = jnp.asarray(base)
    planner = rollout.one_at_a_time(
      factors, lambda params, key, prior_logits, state: mu[state]
    )
    output = plan(
      planner,
      model._replace(outcomes=outcomes),
      jnp.asarray(value(base)),
      arrive(rows),
    )
  np.testing.assert_array_equal(output.action, expected)
  assert evaluated == list(factors)
  gain = value(expected) - value(base)
  assert np.all(gain > -1e-12) and np.max(gain) > 0.1


LOW, HIGH = -1.5, 1.5
A, B, Q, R, K = 1.0, 2.0, 1.0, 0.5, 4.0


def linear_model():
  """x+ = a x + b u at a cost of q x^2 + r u^2, and K x^2 behind."""
  family = actions.tanh_gaussian(np.float32([LOW]), np.float32([HIGH]))
  logits = lambda state: jnp.zeros((state.shape[0], family.num_parameters))
  value = lambda state: -K * state[:, 0] ** 2

  def root(params, timestep, key):
    state = timestep.observation
    return mctx.RootFnOutput(
      prior_logits=logits(state), value=value(state), embedding=state
    )

  def step(params, key, action, state):
    new = A * state + B * action
    output = mctx.RecurrentFnOutput(
      reward=-(Q * state**2 + R * action**2)[:, 0],
      discount=jnp.ones(state.shape[0]),
      prior_logits=logits(new),
      value=value(new),
    )
    return output, new

  return Model(root, step, distribution=family)


def at(states):
  """Time steps at `x [B]`."""
  return arrive(np.zeros(len(states)))._replace(
    observation=jnp.asarray(states, jnp.float32)[:, None]
  )


@pytest.mark.parametrize('rate', [0.02, 5.0])
def test_candidates_climb_to_the_gain_of_the_riccati_equation(rate):
  model = candidates.refined(
    candidates.sampled(linear_model(), 3), 60, rate, LOW, HIGH
  )
  x = np.float32([1.0, -0.5, 3.0, 6.0])
  output = plan(lookahead(1), model, None, at(x))
  gain = -A * B * K / (R + B**2 * K)
  u = np.clip(gain * x, LOW, HIGH)
  np.testing.assert_allclose(output.action[:, 0], u, atol=1e-4)
  cost = Q * x**2 + R * u**2 + K * (A * x + B * u) ** 2
  np.testing.assert_allclose(output.value, -cost, rtol=1e-4)


def test_drawn_candidates_begin_with_the_mode():
  model = candidates.sampled(linear_model(), 4)
  output = plan(lookahead(2), model, None, at([1.0, 2.0]))
  drawn = np.asarray(output.sampled_actions)
  assert drawn.shape == (2, 4, 1)
  np.testing.assert_array_equal(drawn[:, 0], 0)
  assert len(np.unique(drawn[:, 1:])) == 6
  best = np.argmax(output.qvalues, axis=1)
  np.testing.assert_array_equal(output.action, drawn[[0, 1], best])


def _listed(model):
  """Four candidates, and as many prior logits."""
  number = jnp.arange(4.0)[None, :, None]

  def root(params, timestep, key):
    found = model.root(params, timestep, key)
    return found.replace(prior_logits=jnp.zeros((found.value.shape[0], 4)))

  return model._replace(
    root=root,
    actions=lambda params, key, state: number + 0 * state[:, None],
    distribution=None,
  )


@pytest.mark.parametrize('num, chances', [(4, 1), (3, 2), (9, 1)])
def test_the_best_few_candidates_are_those_of_the_highest_q(num, chances):
  tables = random_game(7, num_actions=4, chances=chances)
  model = table_model(tables, GAMMA)
  # In each state 4 is proposed where an action is invalid: the first again.
  invalid = jnp.asarray(tables.invalid)
  first = jnp.argmin(invalid, -1)
  order = jnp.where(invalid, first[:, None], jnp.arange(4)[None])
  order = jnp.concatenate([first[:, None], order], -1)
  listed = model._replace(actions=lambda params, key, state: order[state])
  output = plan(
    lookahead(1),
    candidates.best(listed, num)._replace(outcomes=None),
    tables.params,
    arrive(STATES, tables),
  )
  everywhere = plan(
    lookahead(1), listed._replace(outcomes=None), tables.params, arrive(STATES)
  )
  for s in STATES:
    q = np.asarray(everywhere.qvalues[s])
    found = np.asarray(output.qvalues[s])
    found = found[np.isfinite(found)]
    assert len(found) == min(num, np.isfinite(q).sum())
    if chances == 1:  # Else what ranks is one draw, as it is here, of others.
      expected = np.sort(q[np.isfinite(q)])[::-1][: len(found)]
      kept = found if num < 5 else np.sort(found)[::-1]
      np.testing.assert_allclose(kept, expected, rtol=1e-5)
  chosen = [set(x) for x in np.asarray(output.sampled_actions).tolist()]
  assert all(
    not np.any(tables.invalid[s, list(x)]) for s, x in zip(STATES, chosen)
  )


def test_continuous_base_policies():
  x = np.float32([1.0, -2.0])
  model = rollout.truncated(linear_model(), 'mode', steps=2)
  root = jax.jit(model.root)(None, at(x), jax.random.key(0))
  # The mode is 0, and a = 1: the state stays.
  np.testing.assert_allclose(root.value, -(2 * Q + K) * x**2, rtol=1e-6)
  drawn = rollout.truncated(linear_model(), steps=1)
  root = jax.jit(drawn.root)(None, at(x), jax.random.key(0))
  assert np.all(root.value != -(Q + K) * x**2)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda m: rollout.truncated(m, steps=-1), 'steps must be at least 0'),
    (
      lambda m: rollout.truncated(m, steps=1, trials=0),
      'trials must be at least 1',
    ),
    (lambda m: rollout.truncated(m, 'best', steps=1), "policy='best': must be"),
    (lambda m: rollout.one_at_a_time(()), 'factors=.*one component or more'),
    (lambda m: rollout.one_at_a_time((2, 0)), r'factors\[1\] must be at least'),
    (lambda m: candidates.sampled(m, 0), 'num must be at least 1'),
    (lambda m: candidates.refined(m, 1, 0.1, 0, 1), 'model.actions is None'),
    (lambda m: candidates.best(m, 2), 'model.actions is None'),
    (
      lambda m: jax.eval_shape(
        rollout.truncated(
          candidates.best(_listed(linear_model()), 2), 'sample', steps=1
        ).root,
        None,
        at([1.0]),
        jax.random.key(0),
      ),
      "policy='sample': 2 candidates have no prior",
    ),
    (lambda m: candidates.best(m, 0), 'num must be at least 1'),
    (lambda m: candidates.refined(m, 0, 0.1, 0, 1), 'steps must be at least 1'),
  ],
)
def test_what_cannot_be_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make(table_model(TABLES))


def test_factors_that_are_not_the_actions_are_refused():
  with pytest.raises(ValueError, match='number of enumerated actions'):
    rollout.one_at_a_time((2, 2))(
      table_model(TABLES), TABLES.params, jax.random.key(0), arrive([0])
    )
