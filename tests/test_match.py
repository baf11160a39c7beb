"""Matches between players of games, and judged positions."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.envs import connect_four, tic_tac_toe
from experiments.files import tables
from experiments.files.errors import UserError
from experiments.playing import (
  connect_four_solver,
  match,
  planners,
  players,
)
from experiments.studies import connect_four_players
from search.model import PolicyOutput, exact


def fixed(name, choose):
  """A player that takes `choose(position) -> action`."""

  def decide(params, key, timestep):
    action = jax.vmap(choose)(timestep.observation)
    zeros = jnp.zeros(action.shape)
    return PolicyOutput(action, jnp.full((action.shape[0], 9), 1 / 9), zeros)

  return players.Player(name, jax.jit(decide), None, 0)


def first_free(board):
  return jnp.argmin(board.stones.any(0)).astype(jnp.int32)


def last_free(board):
  return 8 - jnp.argmin(board.stones.any(0)[::-1]).astype(jnp.int32)


@pytest.mark.parametrize(
  'name, strategy',
  [
    ('network', planners.Strategy('network')),
    ('random', planners.Strategy('random')),
    ('lookahead=3', planners.Strategy('lookahead', 3)),
    ('puct=64', planners.Strategy('puct', 64)),
    ('gumbel=8+rollout=4', planners.Strategy('gumbel', 8, 4)),
    ('rollout=4x3', planners.Strategy('lookahead', 1, 4, 3)),
    ('lookahead=2+rollout=end', planners.Strategy('lookahead', 2, -1)),
    (
      'lookahead=2+greedy_rollout=8',
      planners.Strategy('lookahead', 2, 8, greedy=True),
    ),
    ('actor', planners.Strategy('actor')),
    ('critic+box', planners.Strategy('critic', proposal='box')),
    (
      'lookahead=2+rollout=8+no_critic+refined=4',
      planners.Strategy('lookahead', 2, 8, critic=False, refined=4),
    ),
  ],
)
def test_a_name_says_how_a_player_decides(name, strategy):
  assert planners.parse(name) == strategy


@pytest.mark.parametrize(
  'name',
  [
    '',
    'minimax=3',
    'lookahead',
    'lookahead=0',
    'network=3',
    'random+rollout=3',
    'lookahead=1+rollout=4+rollout=4',
    'lookahead=1+box+box',
    'actor+rollout=2',
    'critic+rollout=2',
    'lookahead=1+rollout=-1',
    'gumbel=8rollout=4',
    'gumbel=8+',
    '+rollout=4',
    'rollout=4x0',
  ],
)
def test_a_name_that_is_none_is_refused(name):
  with pytest.raises(UserError, match=r'^player=.*must be network, random'):
    planners.parse(name)


@pytest.mark.parametrize(
  ('kind', 'name', 'take'),
  [
    ('game', 'actor', 'take network, random'),
    ('game', 'lookahead=1+box', 'take network, random'),
    ('actor_critic', 'gumbel=8', 'take actor, critic'),
    ('actor_critic', 'random', 'take actor, critic'),
    ('actor_critic', 'lookahead=1+rollout=4x2', 'take actor, critic'),
    ('actor_critic', 'lookahead=1+rollout=end', 'take actor, critic'),
    ('actor_critic', 'lookahead=1+greedy_rollout=2', 'take actor, critic'),
    ('tree', 'lookahead=1', 'take network or gumbel=16'),
    ('tree', 'gumbel=8+rollout=2', 'take network or gumbel=16'),
    ('policy', 'critic', 'take network'),
  ],
)
def test_what_an_agent_cannot_be_played_with_names_what_it_can(
  kind, name, take
):
  with pytest.raises(UserError, match=rf'^player={re.escape(name)}: .*{take}'):
    planners.refuse(name, planners.parse(name), 'iql', kind)


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('game', 'gumbel=8+rollout=2'),
    ('game', 'network'),
    ('actor_critic', 'network'),
    ('actor_critic', 'lookahead=2+rollout=4+box+no_critic+refined=3'),
    ('tree', 'efficientzero=4'),
    ('policy', 'actor'),
  ],
)
def test_what_it_can_be_played_with_passes(kind, name):
  planners.refuse(name, planners.parse(name), 'iql', kind)


def test_runs_and_checkpoints_stand_in_front():
  assert planners.split('puct=3') == ('', 'final', 'puct=3')
  assert planners.split('runs/a:puct=3') == ('runs/a', 'final', 'puct=3')
  assert planners.split('a@best:puct=3') == ('a', 'best', 'puct=3')


def test_a_match_counts_both_sides():
  # First free cells against last ones, X first: X has 0 1 2 before O has 8 7
  # 6, whoever X is.
  game = tic_tac_toe.game()
  starts = match.openings(game, 2, 0)
  first, last = fixed('first', first_free), fixed('last', last_free)
  played = match.play(game, first, last, starts)
  np.testing.assert_array_equal(played.first, [1, 1])
  np.testing.assert_array_equal(played.second, [-1, -1])
  assert played.plies == 5
  result = match.summarise(first, last, played, 0.0)
  assert (result.wins, result.draws, result.losses) == (2, 0, 2)
  assert (result.score, result.score_se, result.elo) == (0.5, 0.0, 0.0)


def test_two_of_the_same_play_even():
  # Paired openings: whatever one side gets, the other one gets too.
  game = tic_tac_toe.game()
  starts = match.openings(game, 16, 3, seed=1)
  first = fixed('first', first_free)
  played = match.play(game, first, first, starts)
  np.testing.assert_array_equal(played.first, -played.second)
  assert np.any(played.first != 0)


def test_openings_differ_and_go_on():
  game = tic_tac_toe.game()
  starts = match.openings(game, 40, 4, seed=3)
  marks = {
    x.tobytes() for x in np.concatenate([starts.stones], 0).reshape(40, -1)
  }
  assert len(marks) == 40
  assert (starts.stones.sum((1, 2)) == 4).all()
  with pytest.raises(ValueError, match='openings=400: only 72 unfinished'):
    match.openings(game, 400, 2)


def test_elo_is_that_of_the_formula():
  assert match.elo(0.5) == 0
  np.testing.assert_allclose(match.elo(10 / 11), 400)
  assert match.elo(1.0) == np.inf and match.elo(-0.1) == -np.inf


def test_perfect_lookahead_does_not_lose_tic_tac_toe():
  game = tic_tac_toe.game()
  model = exact(
    game,
    lambda params, x: (
      (jnp.zeros((x.shape[0], 9)),) + (jnp.zeros((x.shape[0],)),)
    ),
  )
  full = players.make('l', planners.parse('lookahead=4'), model, (), game)
  other = players.make('r', planners.parse('random'), None, None, game)
  # After five moves four are left: it sees to the end.
  starts = match.openings(game, 12, 5, seed=0)
  reply = match.play(game, full, other, starts)
  first = fixed('first', first_free)
  worse = match.play(game, first, other, starts)
  assert reply.first.sum() + reply.second.sum() > (
    worse.first.sum() + worse.second.sum()
  )
  # Whoever sees to the end gets the game's value or more: both of the same
  # kind get exactly that.
  even = match.play(game, full, full, starts)
  np.testing.assert_array_equal(even.first, -even.second)
  assert (reply.first >= even.first).all()
  assert (reply.second >= even.second).all()


def test_judged_positions_are_those_of_the_rules():
  judged = connect_four_solver.read()
  starts = connect_four_solver.positions(judged.moves)
  game = connect_four.game()
  invalid = np.asarray(jax.jit(jax.vmap(game.invalid_actions))(starts))
  np.testing.assert_array_equal(np.isnan(judged.value), invalid)
  count = np.asarray([len(moves) for moves in judged.moves])
  bits = np.unpackbits(np.asarray(starts.stones), axis=-1)
  np.testing.assert_array_equal(bits.sum((1, 2)), count)
  # A move that wins at once is worth a win.
  for column in range(7):
    column_of = jnp.full(count.shape, column)
    move = jax.vmap(game.step, (0, 0, None))(starts, column_of, None)
    wins = (np.asarray(move.reward) > 0) & ~invalid[:, column]
    assert (judged.value[wins, column] == 1).all()


def test_a_judge_counts_what_was_kept():
  judged = connect_four_solver.Judged(
    ('', '3'),
    np.asarray([[1, 1, -1, 0, np.nan, -1, -1], [0, -1, -1, 0, -1, -1, -1.0]]),
    np.asarray([[5, 9, -1, 0, np.nan, -1, -1], [0, -1, -1, 0, -1, -1, -1.0]]),
  )
  verdict = connect_four_solver.judge(np.asarray([0, 3]), judged)
  assert (verdict.kept, verdict.optimal) == (1.0, 0.5)
  np.testing.assert_allclose(verdict.chance, (2 / 6 + 2 / 7) / 2)
  assert connect_four_solver.judge(np.asarray([3, 1]), judged).kept == 0


@pytest.mark.skipif(
  importlib.util.find_spec('bitbully') is None, reason='needs the solver'
)
def test_the_solver_keeps_every_judged_value():
  judged = connect_four_solver.read()
  some = connect_four_solver.Judged(
    judged.moves[:40], judged.value[:40], judged.score[:40]
  )
  game = connect_four.game()
  timestep = match.time_step(game, connect_four_solver.positions(some.moves))
  action = connect_four_solver.solver().decide(None, None, timestep).action
  verdict = connect_four_solver.judge(np.asarray(action), some)
  assert (verdict.kept, verdict.optimal) == (1.0, 1.0)


@pytest.fixture(scope='module')
def backgammon_model():
  """Backgammon of 8 candidates, valued by the mover's pips alone."""
  from experiments.envs import backgammon

  game = backgammon.game(8)
  pips = jnp.arange(26.0) / 100

  def evaluate(params, seen):
    value = params * seen[:, :4].sum(-1)
    return jnp.zeros((seen.shape[0], 8)), value + 0 * pips.sum()

  return game, exact(game, evaluate)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, evaluations',
  # 8 turns; each of 5 of them meets 21 rolls, each with 8 replies.
  [('network', 8), ('lookahead=1', 8), ('lookahead=2', 8 + 5 * 21 * 8)],
)
def test_players_of_candidates(backgammon_model, name, evaluations):
  game, model = backgammon_model
  player = players.make(
    name, planners.parse(name), model, jnp.float32(0.1), game
  )
  assert player.evaluations == evaluations
  starts = match.openings(game, 2, 6)
  timestep = match.time_step(game, starts)
  action = player.decide(player.params, jax.random.key(0), timestep).action
  legal = np.asarray(jax.vmap(game.candidates)(timestep.observation))
  assert (legal == np.asarray(action)[:, None]).all((2, 3)).any(1).all()


@pytest.mark.parametrize(
  'name, complaint',
  [
    ('gumbel=4', 'take lookahead=1 or lookahead=2'),
    (
      'lookahead=2+rollout=4',
      r'one stage of lookahead; take lookahead=1\+roll',
    ),
    ('lookahead=3', 'limited to two stages; take lookahead=2'),
  ],
)
def test_what_candidates_cannot_do_is_refused(
  backgammon_model, name, complaint
):
  game, model = backgammon_model
  with pytest.raises(UserError, match=complaint):
    players.make(name, planners.parse(name), model, 0.1, game)


@pytest.mark.parametrize(
  'name, evaluations',
  [
    ('network', 1),
    ('lookahead=2', 1 + 9 + 81),
    ('gumbel=4', 5),
    ('gumbel=4+rollout=3x2', 5 * 7),
    ('rollout=end', None),
  ],
)
def test_evaluations_are_counted(name, evaluations):
  game = tic_tac_toe.game()
  model = exact(game, lambda params, x: (jnp.zeros((x.shape[0], 9)), 0.0))
  player = players.make(name, planners.parse(name), model, (), game)
  assert player.evaluations == evaluations


def test_an_interval_ends_where_all_is_won():
  game = tic_tac_toe.game()
  player = fixed('first', first_free)
  won = match.Games(np.ones(4), np.ones(4), 5)
  result = match.summarise(player, player, won, None)
  assert (result.elo, result.elo_high) == (np.inf, np.inf)
  assert 0 < result.elo_low < 400
  one = match.summarise(player, player, match.Games(*won[:2], 5), None)
  assert one.score == 1
  assert game.spec.name == 'TicTacToe'


def _row(**changes):
  row = connect_four_players.Strength(
    0, 'network', 'third', 8, 0.5, 0.1, None, 1, 0.1, 1, 4
  )
  return row._replace(**changes)


@pytest.mark.parametrize(
  'rows, names, opponents, seeds, complaint',
  [
    ([], ['netwrk'], ['third'], [0, 1], 'must be network, random'),
    ([], ['network'], ['sovler'], [0, 1], 'opponents=sovler: must be one of'),
    ([], ['network'], ['third'], [0], 'there is only one run'),
    ([_row(games=4)], ['network'], ['third'], [0, 1], 'rows of 2 and 4'),
    ([_row(other=2)], ['network'], ['third'], [0, 1], 'would now meet 1'),
  ],
)
def test_a_study_refuses_before_it_plays(
  rows, names, opponents, seeds, complaint
):
  with pytest.raises(UserError, match=complaint):
    connect_four_players._check(rows, names, opponents, seeds, 4, 4)
  connect_four_players._check([_row()], ['network'], ['third'], [0, 1], 4, 4)


def test_rows_of_a_study_are_read_as_written(tmp_path):
  rows = [_row(), _row(seed=1, optimal=0.25, evaluations=None, other=None)]
  path = tmp_path / 'rows.csv'
  assert tables.read_records(path, connect_four_players.Strength) == []
  tables.write_records(path, rows, digits=5)
  assert tables.read_records(path, connect_four_players.Strength) == rows
  path.write_text(path.read_text().replace('0.25', 'x'))
  with pytest.raises(UserError, match=r'rows\.csv: is damaged'):
    tables.read_records(path, connect_four_players.Strength)
