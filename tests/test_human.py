"""A person plays: hints, undo, words for turns, boards in a terminal."""

# ruff: noqa: F811 (a fixture of the other half is imported)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_match import backgammon_model, fixed, last_free  # noqa: F401

from agents.core.types import ArraySpec, Discrete, Spec
from experiments.envs import connect_four, games
from experiments.playing import (
  boards,
  connect_four_solver,
  human,
  match,
  planners,
  players,
)
from search.model import Game, exact


def _said(answers):
  """`ask` that gives the answers, then ends as a closed terminal does."""
  left = iter(answers)

  def ask(prompt):
    answer = next(left, None)
    if answer is None:
      raise EOFError
    return answer

  return ask


def test_a_person_plays_and_leaves():
  game = games.make_game('tic_tac_toe')
  told = []
  answers = ['moves', '9', 'undo', '3', 'UNDO', '0', '1', 'help', '2']
  opponent = fixed('last', last_free)
  points = human.against_person(
    game, opponent, ask=_said(answers), tell=told.append
  )
  assert points == 1
  assert told[0].startswith('you are X, and last is O; a move')
  assert told[2] == 'legal moves: 0, 1, 2, 3, 4, 5, 6, 7, 8'
  assert told[3] == '9: not legal; "moves" lists the legal moves'
  assert told[4] == 'undo: there is no move of yours to take back'
  assert told[5] == '0  . . .\n3  X . .\n6  . . .'
  assert told[6] == 'last plays 8'
  # Back to the empty board, the opponent's answer gone, too.
  assert told[8] == told[1] == '0  . . .\n3  . . .\n6  . . .'
  assert told[-1] == 'you win 1'
  assert told[-2] == '0  X X X\n3  . . .\n6  . O O'
  for answers in (['q'], []):
    leaves = human.against_person(
      game, opponent, ask=_said(answers), tell=told.append
    )
    assert leaves is None


@pytest.fixture(scope='module')
def searcher():
  """Tic-tac-toe, and a tree search in it that knows nothing but the rules."""
  game = games.make_game('tic_tac_toe')
  model = exact(
    game,
    lambda params, x: (jnp.zeros((x.shape[0], 9)), jnp.zeros((x.shape[0],))),
  )
  name = 'puct=32'
  return game, players.make(name, planners.parse(name), model, (), game)


def test_an_agent_tells_what_it_thinks(searcher):
  game, player = searcher
  told = []

  def ask(prompt):
    # Whatever it recommends.
    if not told[-1].startswith('it would play'):
      return 'hint'
    return told[-1].splitlines()[0].removeprefix('it would play ')

  human.against_person(game, player, begins=False, ask=ask, tell=told.append)
  assert told[0].startswith('you are O, and puct=32 is X')
  assert told[-1].startswith(('you win', 'you lose', 'a draw'))
  begins = lambda words: [text for text in told if text.startswith(words)]
  hints, turns = begins('it would play'), begins('puct=32 plays')
  assert len(begins('it expects you to score')) == len(hints) >= 2
  assert len(turns) - len(hints) in (0, 1)
  assert '; it expects' in turns[0] and '  share ' in turns[0]
  # The move itself and four more, each with what it is worth.
  assert len(turns[0].splitlines()) == 6
  assert turns[0].count(' value ') == 5


def test_a_tree_search_tells_what_moves_are_worth(searcher):
  game, player = searcher
  state = game.init(None)
  step = jax.jit(game.step)
  for action in (0, 3, 1, 4):  # X wins by 2
    state = step(state, action, None).state
  batch = jax.tree.map(lambda x: x[None], state)
  output = player.decide((), jax.random.key(0), match.time_step(game, batch))
  assert int(output.action[0]) == 2
  assert float(output.qvalues[0, 2]) == 1
  # What cannot be done was not looked at.
  assert np.isneginf(output.qvalues[0, jnp.asarray([0, 1, 3, 4])]).all()
  legal = boards.legal_moves(game, state)
  best = human.opinion(legal, output).splitlines()[1]
  share = float(output.action_weights[0, 2])
  assert best == f'  2  share {share:.0%}  value +1.00'


def test_a_person_plays_backgammon(backgammon_model):
  game, model = backgammon_model
  player = players.make(
    'lookahead=1', planners.parse('lookahead=1'), model, jnp.float32(0.1), game
  )
  told, asked = [], []

  def ask(prompt):
    # What may be done, and then the first of it.
    asked.append(prompt)
    if len(asked) == 1:
      return 'hint'
    if len(asked) == 2:
      return 'moves'
    if len(asked) == 3:
      return told[-1].removeprefix('legal moves: ').split(', ')[0]
    return 'quit'

  assert human.against_person(game, player, ask=ask, tell=told.append) is None
  hint = next(text for text in told if text.startswith('it would play'))
  assert ' value ' in hint.splitlines()[1]
  (turn,) = [text for text in told if text.startswith('lookahead=1 plays')]
  assert '; it expects' in turn
  boards_shown = [text for text in told if 'dice' in text]
  assert len(boards_shown) == 3 and boards_shown[0] != boards_shown[2]


@pytest.mark.parametrize(
  'text, meant',
  [
    ('8/7 13/7', '13/7 8/7'),
    ('13/8/6', '13/6'),
    ('24/22(2)', '24/22 24/22'),
    ('bar/20*', 'bar/20 hits 20'),
    ('6/off', '6/off'),
  ],
)
def test_a_turn_may_be_said_in_other_words(text, meant):
  legal = dict.fromkeys(
    ('13/7 8/7', '13/6', '24/22 24/22', 'bar/20 hits 20', '6/off', 'pass')
  )
  assert boards.read_move(text, legal) == meant


@pytest.mark.parametrize(
  'text, complaint',
  [
    ('8/7', '8/7: not legal; "moves" lists the legal moves'),
    ('8-7', '8-7: not legal'),
    ('13/6', '13/6: ambiguous; type 13/6 hits 7 or 13/6 hits 8'),
  ],
)
def test_what_is_no_turn_is_said_in_a_line(text, complaint):
  with pytest.raises(ValueError, match=complaint):
    boards.read_move(text, dict.fromkeys(('13/6 hits 7', '13/6 hits 8')))


def test_stones_move_by_the_dice():
  board = np.zeros((2, 26), np.int8)
  board[0, [8, 6]] = 1
  after = np.zeros((2, 26), np.int8)
  after[0, [5, 2]] = 1
  assert boards._change(board, after, np.asarray([6, 1])) == '8/2 6/5'
  assert boards._change(board, after, np.asarray([3, 4])) == '8/5 6/2'


def test_cells_of_large_boards_have_letters():
  planes = np.zeros((8, 8, 2), np.float32)
  planes[2, 3, 0] = 1  # d3
  spec = Spec(ArraySpec((8, 8, 2)), Discrete(65), name='othello')
  game = Game(
    init=lambda key: 0,
    step=lambda *args: None,
    observe=lambda state: planes,
    invalid_actions=lambda state: np.arange(65) % 19 != 7,
    player=lambda state: 0,
    spec=spec,
  )
  assert list(boards.legal_moves(game, 0)) == ['h1', 'c4', 'f6', 'pass']
  shown = boards.show(game, 0).splitlines()
  assert shown[0] == '   a b c d e f g h'
  assert shown[3] == ' 3 . . . X . . . .'


def test_a_board_shows_who_is_where():
  game = connect_four.game()
  board = jax.tree.map(lambda x: x[0], connect_four_solver.positions(['3345']))
  shown = boards.show(game, board).splitlines()
  assert shown[-1] == '0 1 2 3 4 5 6'
  assert shown[-2] == '. . . X X O .'
  assert shown[-3] == '. . . O . . .'


@pytest.mark.slow
def test_every_turn_of_backgammon_has_a_name_of_its_own():
  from experiments.envs import backgammon

  game = backgammon.game(64)
  starts = match.openings(game, 60, 10, seed=5)
  count = np.asarray(jax.jit(jax.vmap(backgammon.count))(starts))
  for row in range(60):
    state = jax.tree.map(lambda x, row=row: x[row], starts)
    assert len(boards.legal_moves(game, state)) == min(count[row], 64)


def test_backgammon_is_seen_from_ones_own_side():
  from experiments.envs import backgammon

  game = backgammon.game(8)
  state = jax.tree.map(np.asarray, game.init(jax.random.key(3)))
  moved = state._replace(board=state.board[::-1], player=1 - state.player)
  # The same board, whoever is to move.
  assert boards.show(game, state, 1) == boards.show(game, moved, 1)
  assert 'X5' in boards.show(game, state, 0).splitlines()[1]


def test_a_person_meets_a_random_player_who_has_no_opinion():
  game = games.make_game('tic_tac_toe')
  told = []
  other = players.make('random', planners.parse('random'), None, None, game)
  answers = ['hint', *map(str, [0, 1, 2, 3, 4, 5, 6, 7, 8] * 9)]
  human.against_person(game, other, ask=_said(answers), tell=told.append)
  assert not any('expects' in text or 'value' in text for text in told)
  assert told[-1].startswith(('you win', 'you lose', 'a draw'))
