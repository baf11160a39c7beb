"""Matches between players of games, judged positions, play in a terminal."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.core.types import ArraySpec, Discrete, Spec
from experiments.envs import connect_four, games, tic_tac_toe
from experiments.files import tables
from experiments.files.errors import UserError
from experiments.playing import (
  boards,
  connect_four_solver,
  human,
  match,
  planners,
  players,
)
from experiments.studies import connect_four_players
from search.model import Game, PolicyOutput, exact


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
  opponent = _fixed('last', _last_free)
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


def test_an_interval_ends_where_all_is_won():
  game = tic_tac_toe.game()
  player = _fixed('first', _first_free)
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
    ([], ['network'], ['third'], [0], 'there is one run'),
    ([_row(games=4)], ['network'], ['third'], [0, 1], 'rows of 2 and 4'),
    ([_row(other=2)], ['network'], ['third'], [0, 1], 'it would meet 1'),
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
