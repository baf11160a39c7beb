"""Lookahead: against plain recursion, Newton's iterates, and counted work."""

import functools

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from table_games import arrive, random_game, rules, table_model, tree_qvalues

from search import lookahead as la
from search import rollout
from search.exact import bellman
from search.lookahead import lookahead, num_evaluations
from search.model import Game, Model, Move, exact

STATES = np.arange(5)


@functools.cache
def game(chances=1):
  return random_game(3, chances=chances)


@functools.cache
def run(tables_key, depth, **kwargs):
  """The planner's output on `STATES` of `game(tables_key)`, compiled."""
  tables = game(tables_key)
  planner = functools.partial(lookahead(depth, **kwargs), table_model(tables))
  return jax.jit(planner)(
    tables.params, jax.random.key(0), arrive(STATES, tables)
  )


def check(output, expected):
  """A greedy output against Qs `[B, A]`."""
  np.testing.assert_allclose(output.qvalues, expected, rtol=1e-5, atol=1e-6)
  best = np.argmax(expected, axis=-1)
  np.testing.assert_array_equal(output.action, best)
  np.testing.assert_array_equal(
    output.action_weights, np.eye(expected.shape[1])[best]
  )
  np.testing.assert_allclose(output.value, expected.max(-1), rtol=1e-5)


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_chance_is_taken_in_expectation(depth):
  expected = [tree_qvalues(game(2), s, depth) for s in STATES]
  check(run(2, depth), np.array(expected))


def test_either_player_may_move_next_and_nothing_counts_behind_the_end():
  check(run(1, 3), np.array([tree_qvalues(game(), s, 3) for s in STATES]))


def test_chunks_change_nothing():
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6),
    run(2, 2, chunk=4),
    run(2, 2),
  )


def test_widths_keep_the_likeliest_valid_actions():
  tables, widths = game(), (None, 2, 1)

  def keep(state, stage):
    scores = np.where(tables.invalid[state], -np.inf, tables.logits[state])
    best = np.argsort(-scores)[: widths[stage]]
    return best[scores[best] > -np.inf]

  expected = [tree_qvalues(tables, s, 3, keep) for s in STATES]
  check(run(1, 3, widths=widths), np.array(expected))
  # Else the test would not see what is pruned.
  full = np.array([tree_qvalues(tables, s, 3) for s in STATES])
  assert not np.allclose(full, expected)


def test_widths_by_value_keep_the_best_of_one_step():
  tables = game()

  def keep(state, stage):
    scores = tree_qvalues(tables, state, 1)
    best = np.argsort(-scores)[:1]
    return best[scores[best] > -np.inf]

  expected = [tree_qvalues(tables, s, 2, keep) for s in STATES]
  check(run(1, 2, widths=(1, 1), rank='value'), np.array(expected))


def test_compiled_is_eager_and_a_row_is_alone():
  tables = game(2)
  alone = lookahead(1)(
    table_model(tables),
    tables.params,
    jax.random.key(0),
    arrive(STATES[3:4], tables),
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    alone,
    jax.tree.map(lambda x: x[3:4], run(2, 1)),
  )


def test_ties_go_to_the_higher_prior_then_to_the_lower_index():
  inf = jnp.inf
  q = jnp.array([[1, 2, 2], [2, 2, 2], [2, 1, 0], [1, 2, 0]], jnp.float32)
  prior = jnp.array([[9, 0, 1], [0, 0, -1], [-inf, 2, 1], [-inf, -inf, -inf]])
  output = plan(bandit(q, prior), arrive(np.arange(4)))
  # The best of row 2 is invalid by its prior; where all are, all are tried.
  np.testing.assert_array_equal(output.action, [2, 0, 1, 1])
  np.testing.assert_array_equal(output.value, [2, 2, 1, 2])


def test_temperature_draws_by_the_softmax_of_q():
  q = jnp.tile(jnp.array([[0.0, 1.0, -jnp.inf]]), (2000, 1))
  model = bandit(jnp.nan_to_num(q, neginf=50.0), jnp.where(q < -1, q, 0.0))
  output = plan(model, arrive(np.arange(2000)), temperature=0.5)
  share = 1 / (1 + np.exp(2))
  np.testing.assert_allclose(
    output.action_weights[0], [share, 1 - share, 0], rtol=1e-5
  )
  count = np.bincount(output.action, minlength=3) / 2000
  np.testing.assert_allclose(count, [share, 1 - share, 0], atol=0.03)


def bandit(q, prior):
  """State s: action a earns `q[s, a]` and that is all."""

  def root(params, timestep, key):
    state = timestep.observation
    return mctx.RootFnOutput(
      prior_logits=prior[state], value=jnp.zeros(state.shape), embedding=state
    )

  def step(params, key, action, state):
    zeros = jnp.zeros(state.shape)
    output = mctx.RecurrentFnOutput(
      reward=q[state, action],
      discount=zeros,
      prior_logits=prior[state],
      value=zeros,
    )
    return output, state

  return Model(root, step)


def plan(model, timestep, **kwargs):
  """One step ahead, compiled, without parameters."""
  planner = functools.partial(lookahead(1, **kwargs), model, None)
  return jax.jit(planner)(jax.random.key(0), timestep)


def take_stones(pile, candidates):
  """Take 1 to 3 stones; who takes the last one wins."""

  def step(state, action, key):
    taken = action if candidates else action + 1
    left = jnp.maximum(state - taken, 0)
    won = (left == 0) & (state > 0)
    return Move(left, won.astype(jnp.float32), jnp.where(left == 0, 0.0, -1.0))

  taken = jnp.array([1, 2, 3, 1])
  return Game(
    init=lambda key: jnp.int32(pile),
    step=step,
    observe=lambda state: state,
    invalid_actions=None
    if candidates
    else lambda state: (taken[:3] > state) & (state > 0),
    player=lambda state: jnp.int32(0),
    spec=None,
    # The fourth place repeats the first, as do those of too many stones.
    candidates=(lambda state: jnp.where(taken > state, 1, taken))
    if candidates
    else None,
  )


@pytest.mark.parametrize('candidates', [False, True])
def test_a_game_of_two_is_won(candidates):
  width = 4 if candidates else 3
  evaluate = lambda params, pile: (
    jnp.zeros((pile.shape[0], width)),
    jnp.zeros(pile.shape),
  )
  model = exact(take_stones(7, candidates), evaluate)
  piles = np.array([2, 3, 5, 6, 7])
  timestep = arrive(piles)
  if not candidates:
    invalid = np.arange(1, 4)[None] > piles[:, None]
    timestep = timestep._replace(invalid_actions=jnp.asarray(invalid))
  search = jax.jit(functools.partial(lookahead(4), model, None))
  output = search(jax.random.key(0), timestep)
  taken = output.action if candidates else output.action + 1
  np.testing.assert_array_equal(taken, piles % 4)
  np.testing.assert_array_equal(output.value, np.ones(5))
  if candidates:
    spare = np.array([[0, 0, 1, 1], [0, 0, 0, 1]])
    assert np.isneginf(output.qvalues[:2])[spare == 1].all()
    assert np.isfinite(output.qvalues[:2])[spare == 0].all()
    # A pile of 8 is lost, whatever is taken.
    eight = search(jax.random.key(0), arrive(np.full(5, 8)))
    np.testing.assert_array_equal(eight.value, -np.ones(5))


def test_repetitions_of_the_first_candidate_take_no_place_when_pruned():
  def step(params, key, action, state):
    q = jnp.asarray([4.0, 1.0, 3.0])[action]
    zeros = jnp.zeros(q.shape)
    output = mctx.RecurrentFnOutput(
      reward=q, discount=zeros, prior_logits=zeros[:, None], value=zeros
    )
    return output, state

  model = bandit(jnp.zeros((1, 1)), jnp.zeros((1, 1)))._replace(
    step=step, actions=lambda params, key, state: jnp.array([[0, 1, 2, 0, 0]])
  )
  output = plan(model, arrive([0]), widths=(2,), rank='value')
  inf = np.inf
  np.testing.assert_array_equal(output.qvalues, [[4, -inf, 3, -inf, -inf]])
  np.testing.assert_array_equal(output.sampled_actions, [[0, 1, 2, 0, 0]])
  with pytest.raises(ValueError, match='5 candidates have no prior'):
    plan(model, arrive([0]), widths=(2,))


def newton(transition, reward, discount, point):
  """Newton's iterate for J = TJ from `point`, in numpy."""
  q = reward + discount * transition @ point
  action = q.argmax(1)
  slope = discount * transition[np.arange(len(point)), action]
  return point - np.linalg.solve(np.eye(len(point)) - slope, point - q.max(1))


def cost(mdp, action):
  """Value of a deterministic policy `[S]`."""
  transition, reward = np.asarray(mdp.transition), np.asarray(mdp.reward)
  rows = np.arange(len(action))
  return np.linalg.solve(
    np.eye(len(action)) - float(mdp.discount) * transition[rows, action],
    reward[rows, action],
  )


@pytest.mark.parametrize(
  'depth, is_certain', [(1, False), (2, False), (3, False), (3, True)]
)
def test_lookahead_is_newtons_step_from_the_stages_behind(depth, is_certain):
  with jax.enable_x64(True):
    mdp = bellman.random_mdp(jax.random.key(7), 6, 3, spread=1.0)
    guess = jax.random.normal(jax.random.key(8), (6,))
    model = bellman.model(mdp)
    later = la.certainty_equivalent(model) if is_certain else None
    search = jax.jit(functools.partial(lookahead(depth, later=later), model))
    output = search(guess, jax.random.key(0), arrive(np.arange(6)))
    transition, reward, point = map(
      np.asarray, (mdp.transition, mdp.reward, guess)
    )
  discount = float(mdp.discount)
  behind = transition
  if is_certain:
    behind = np.eye(6)[transition.argmax(-1)]
  for _ in range(depth - 1):
    point = (reward + discount * behind @ point).max(1)
  np.testing.assert_allclose(
    output.value, (reward + discount * transition @ point).max(1), atol=1e-12
  )
  np.testing.assert_allclose(
    cost(mdp, np.asarray(output.action)),
    newton(transition, reward, discount, point),
    rtol=0,
    atol=1e-10,
  )


@pytest.mark.parametrize(
  'kwargs, steps',
  [
    ({}, 0),
    ({}, 1),
    ({'widths': (None, 2)}, 0),
    ({'widths': (2, 1), 'rank': 'value'}, 0),
  ],
)
def test_the_network_runs_as_often_as_is_reported(kwargs, steps):
  size, tables = 128, game()

  def evaluate(params, state):
    """One large product a state, besides which nothing weighs."""
    inputs = jnp.sin(state[:, None] * jnp.arange(1.0, size + 1)[None])
    hidden = inputs @ params
    return hidden[:, :3], hidden[:, 3]

  model = exact(rules(tables), evaluate)
  if steps:
    model = rollout.truncated(model, 'mode', steps=steps)
  search = jax.jit(functools.partial(lookahead(2, **kwargs), model))
  params = jnp.ones((size, size))
  compiled = search.lower(
    params, jax.random.key(0), arrive([0], tables)
  ).compile()
  evaluations = compiled.cost_analysis()['flops'] / (2 * size**2)
  assert round(evaluations) == num_evaluations(2, 3, steps=steps, **kwargs)


def test_number_of_evaluations():
  assert num_evaluations(1, 7) == 1 + 7
  assert num_evaluations(3, 7) == 1 + 7 + 49 + 343
  assert num_evaluations(2, 4, chances=8) == 1 + 32 + 32**2
  assert num_evaluations(2, 20, chances=21, interior=False) == 20 * 21 * 420
  assert num_evaluations(2, 7, widths=(None, 3)) == 1 + 7 + 21
  assert num_evaluations(1, 7, steps=4, trials=10) == 1 + 7 * 41
  assert num_evaluations(1, 7, steps=4, per_step=8) == 1 + 7 * 33


@pytest.mark.parametrize(
  'kwargs, message',
  [
    ({'depth': 0}, 'depth must be at least 1, but is 0'),
    ({'depth': 2, 'widths': (3,)}, r'widths=\(3,\): must have one entry'),
    ({'depth': 1, 'widths': (0,)}, r'widths\[0\] must be at least 1'),
    ({'depth': 1, 'rank': 'luck'}, "rank='luck': must be one of prior, value"),
    ({'depth': 1, 'chunk': -1}, 'chunk must be at least 0'),
    ({'depth': 1, 'temperature': -1.0}, 'temperature must be at least 0'),
  ],
)
def test_what_cannot_be_is_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    lookahead(**kwargs)


def test_models_without_what_is_needed_are_refused():
  model = table_model(game())
  with pytest.raises(ValueError, match='the model must list them'):
    la.certainty_equivalent(model)
  drawn = model._replace(distribution='any')
  with pytest.raises(ValueError, match='plan with candidates'):
    lookahead(1)(drawn, game().params, jax.random.key(0), arrive([0]))
