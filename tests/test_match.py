"""Matches between players of games, judged positions, play in a terminal."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import arena, boards, judge, match, players
from experiments.envs import connect_four, games, tic_tac_toe
from experiments.runtime.config import UserError
from search.model import PolicyOutput, exact


def _fixed(name, choose):
  """A player that takes `choose(position) -> action`."""

  def decide(params, key, timestep):
    action = jax.vmap(choose)(timestep.observation)
    zeros = jnp.zeros(action.shape)
    return PolicyOutput(action, jnp.full((action.shape[0], 9), 1 / 9), zeros)

  return players.Player(name, jax.jit(decide), None, 0)


def _first_free(board):
  return jnp.argmin(board.stones.any(0)).astype(jnp.int32)


def _last_free(board):
  return 8 - jnp.argmin(board.stones.any(0)[::-1]).astype(jnp.int32)


@pytest.mark.parametrize(
  'name, strategy',
  [
    ('network', players.Strategy('network')),
    ('random', players.Strategy('random')),
    ('lookahead=3', players.Strategy('lookahead', 3)),
    ('puct=64', players.Strategy('puct', 64)),
    ('gumbel=8+rollout=4', players.Strategy('gumbel', 8, 4)),
    ('rollout=4x3', players.Strategy('lookahead', 1, 4, 3)),
    ('lookahead=2+rollout=end', players.Strategy('lookahead', 2, -1)),
    (
      'lookahead=2+greedy_rollout=8',
      players.Strategy('lookahead', 2, 8, greedy=True),
    ),
  ],
)
def test_a_name_says_how_a_player_decides(name, strategy):
  assert players.parse(name) == strategy


@pytest.mark.parametrize(
  'name',
  [
    '',
    'minimax=3',
    'lookahead',
    'lookahead=0',
    'network=3',
    'random+rollout=3',
    'gumbel=8rollout=4',
    'gumbel=8+',
    '+rollout=4',
    'rollout=4x0',
  ],
)
def test_a_name_that_is_none_is_refused(name):
  with pytest.raises(UserError, match=r'^player=.*must be network, random'):
    players.parse(name)


def test_runs_and_checkpoints_stand_in_front():
  assert players.split('puct=3') == ('', 'final', 'puct=3')
  assert players.split('runs/a:puct=3') == ('runs/a', 'final', 'puct=3')
  assert players.split('a@best:puct=3') == ('a', 'best', 'puct=3')


def test_a_match_counts_both_sides():
  # First free cells against last ones, X first: X has 0 1 2 before O has 8 7
  # 6, whoever X is.
  game = tic_tac_toe.game()
  starts = match.openings(game, 2, 0)
  first, last = _fixed('first', _first_free), _fixed('last', _last_free)
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
  first = _fixed('first', _first_free)
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
  with pytest.raises(ValueError, match=r'^openings=400: after 2 random moves'):
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
  full = players.make('l', players.parse('lookahead=5'), model, (), game)
  other = players.make('r', players.parse('random'), None, None, game)
  # After four moves five are left: it sees to the end.
  starts = match.openings(game, 12, 4, seed=0)
  reply = match.play(game, full, other, starts)
  first = _fixed('first', _first_free)
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
  judged = judge.read()
  starts = judge.positions(judged.moves)
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
  judged = judge.Judged(
    ('', '3'),
    np.asarray([[1, 1, -1, 0, np.nan, -1, -1], [0, -1, -1, 0, -1, -1, -1.0]]),
    np.asarray([[5, 9, -1, 0, np.nan, -1, -1], [0, -1, -1, 0, -1, -1, -1.0]]),
  )
  verdict = judge.judge(np.asarray([0, 3]), judged)
  assert (verdict.kept, verdict.optimal) == (1.0, 0.5)
  np.testing.assert_allclose(verdict.chance, (2 / 6 + 2 / 7) / 2)
  assert judge.judge(np.asarray([3, 1]), judged).kept == 0


@pytest.mark.skipif(
  importlib.util.find_spec('bitbully') is None, reason='needs the solver'
)
def test_the_solver_keeps_every_judged_value():
  judged = judge.read()
  some = judge.Judged(judged.moves[:40], judged.value[:40], judged.score[:40])
  game = connect_four.game()
  timestep = match.time_step(game, judge.positions(some.moves))
  action = judge.solver().decide(None, None, timestep).action
  verdict = judge.judge(np.asarray(action), some)
  assert (verdict.kept, verdict.optimal) == (1.0, 1.0)


def test_a_person_plays_and_leaves():
  game = games.make_game('tic_tac_toe')
  told = []
  answers = iter(['?', '9', '0', '1', '2'])
  opponent = _fixed('last', _last_free)
  points = arena.against_person(
    game, opponent, ask=lambda prompt: next(answers), tell=told.append
  )
  assert points == 1
  assert told[0] == 'you are X, and last is O'
  assert told[2] == 'legal moves: 0, 1, 2, 3, 4, 5, 6, 7, 8'
  assert told[3] == 'not legal: 9'
  assert told[-1] == 'you win 1'
  assert told[-2] == '0  X X X\n3  . . .\n6  . O O'
  leaves = arena.against_person(
    game, opponent, ask=lambda prompt: 'q', tell=told.append
  )
  assert leaves is None


def test_a_board_shows_who_is_where():
  game = connect_four.game()
  board = jax.tree.map(lambda x: x[0], judge.positions(['3345']))
  shown = boards.show(game, board).splitlines()
  assert shown[-1] == '0 1 2 3 4 5 6'
  assert shown[-2] == '. . . X X O .'
  assert shown[-3] == '. . . O . . .'
