"""Backgammon's rules: gnubg's lists of turns, and numbers by hand."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backgammon_tables import TURNS
from trees import assert_equal

from experiments.envs import backgammon
from experiments.envs.self_play import self_play
from experiments.playing import gnubg, match

NUMBER = 640
BATCH = 128


@pytest.fixture(scope='module')
def listed():
  """`(boards [B, 2, 26], dice [B, 2]) -> list of B arrays [N, 2, 26]`."""

  @jax.jit
  @jax.vmap
  def run(position):
    few = backgammon.candidates(position, 3)
    count = backgammon.count(position)
    return backgammon.candidates(position, NUMBER), few, count

  def found(boards, dice):
    lists = []
    for start in range(0, len(boards), BATCH):
      rows = np.arange(start, start + BATCH) % len(boards)
      player = np.zeros(BATCH, np.int32)
      position = backgammon.Position(boards[rows], dice[rows], player)
      after, few, count = map(np.asarray, run(position))
      assert (count <= NUMBER).all()
      # Those beyond the bound are left out.
      np.testing.assert_array_equal(few, after[:, :3])
      for one, n in zip(after, count):
        # What is left repeats the first.
        assert (one[n:] == one[:1]).all()
        lists.append(one[:n])
    return lists[: len(boards)]

  return found


def position(board, dice=(2, 1), player=0):
  return backgammon.Position(
    jnp.asarray(board, jnp.int8),
    jnp.asarray(dice, jnp.int8),
    jnp.int32(player),
  )


def board(mine, theirs):
  """From dicts of place to stones; the rest is borne off."""
  sides = np.zeros((2, 26), np.int8)
  for side, stones in zip(sides, (mine, theirs)):
    for place, number in stones.items():
      side[place] = number
    side[0] = 15 - side[1:].sum()
  return sides


def test_turns_are_those_of_the_golden_table(listed):
  rows = [line.split() for line in TURNS.split('\n') if line]
  parse = lambda text: np.array([int(n, 16) for n in text], np.int8)
  boards = np.stack([[parse(r[0]), parse(r[1])] for r in rows])
  dice = np.stack([parse(r[2]) for r in rows])
  for row, found in zip(rows, listed(boards, dice)):
    assert len(found) == int(row[3]), row
    data = b''.join(sorted(one.tobytes() for one in found))
    assert zlib.crc32(data) == int(row[4], 16), row


def scattered(generator):
  """A random board, more of it blots and stones on the bar than in play."""
  sides = np.zeros((2, 26), np.int8)
  home = generator.random() < 0.4
  for side, other in ((0, 1), (1, 0)):
    number = generator.integers(1, 16) if home else 15
    top = 7 if home and generator.random() < 0.7 else 26
    spots = generator.integers(1, top, generator.integers(1, 16))
    for _ in range(number):
      free = [p for p in spots if p == 25 or not sides[other, 25 - p]]
      if free:
        sides[side, free[generator.integers(len(free))]] += 1
    sides[side, 0] = 15 - sides[side, 1:].sum()
  return sides


def test_turns_are_gnubgs_on_random_boards(listed):
  pytest.importorskip('gnubg_nn')
  generator = np.random.default_rng(0)
  boards = np.stack([scattered(generator) for _ in range(10 * BATCH)])
  boards = boards[(boards[:, :, 0] < 15).all(1)]
  check_against_gnubg(listed, boards, generator)


def test_turns_are_gnubgs_in_play(listed):
  pytest.importorskip('gnubg_nn')
  generator = np.random.default_rng(1)
  boards = np.stack([backgammon.new_board()] * BATCH)
  for _ in range(8):
    # Whole random games, of which every fifth turn is looked at.
    for _ in range(4):
      dice = np.sort(generator.integers(1, 7, (BATCH, 2)))[:, ::-1]
      boards = gnubg.random_player(boards, dice, generator)[:, ::-1]
      over = (boards[:, :, 0] == 15).any(-1)
      boards = np.where(over[:, None, None], backgammon.new_board(), boards)
    check_against_gnubg(listed, boards, generator)


def check_against_gnubg(listed, boards, generator):
  dice = np.sort(generator.integers(1, 7, (len(boards), 2)))[:, ::-1]
  dice = dice.astype(np.int8)
  for one, roll, found in zip(boards, dice, listed(boards, dice)):
    own = [after.tobytes() for after in found]
    theirs = [after.tobytes() for after in gnubg.moves(one, roll)]
    assert len(own) == len(set(own)), (one, roll)
    assert set(own) == set(theirs), (one, roll)


def test_a_win_is_worth_one_two_or_three():
  last = {1: 1}
  for theirs, points in (
    ({6: 14}, 1),
    ({6: 15}, 2),
    ({18: 1, 6: 14}, 2),
    ({19: 1, 6: 14}, 3),
    ({25: 1, 6: 14}, 3),
    ({25: 1, 6: 13}, 1),
  ):
    before, after = board(last, theirs), board({}, theirs)
    game = backgammon.game()
    move = game.step(position(before, player=1), after, jax.random.key(0))
    assert (float(move.reward), float(move.discount)) == (points, 0.0)
    np.testing.assert_array_equal(move.state.board, after[::-1])
    # Nothing changes any more.
    again = game.step(move.state, after, jax.random.key(1))
    assert (float(again.reward), float(again.discount)) == (0.0, 0.0)
    assert_equal(again.state, move.state)


def test_a_turn_passes_to_the_other_player():
  before = position(board({25: 1, 6: 14}, {6: 15}), player=1)
  after = board({23: 1, 6: 14}, {6: 15})
  move = backgammon.game().step(before, after, jax.random.key(0))
  np.testing.assert_array_equal(move.state.board, after[::-1])
  assert int(move.state.player) == 0
  assert (float(move.reward), float(move.discount)) == (0.0, -1.0)


def test_outcomes_are_the_rolls_that_steps_draw():
  game = backgammon.game()
  before = position(backgammon.new_board())
  after = before.board
  probability, moves = game.outcomes(before, after)
  assert len({tuple(roll) for roll in moves.state.dice.tolist()}) == 21
  is_double = moves.state.dice[:, 0] == moves.state.dice[:, 1]
  np.testing.assert_allclose(
    probability, np.where(is_double, 1, 2) / 36, rtol=1e-6
  )
  keys = jax.random.split(jax.random.key(0), 7200)
  drawn = jax.jit(jax.vmap(game.step, (None, None, 0)))(before, after, keys)
  code = lambda dice: np.asarray(dice[:, 0], int) * 10 + np.asarray(dice[:, 1])
  seen = np.array(
    [(code(drawn.state.dice) == c).sum() for c in code(moves.state.dice)]
  )
  expected = 7200 * np.asarray(probability)
  assert seen.sum() == 7200
  assert (abs(seen - expected) < 5 * np.sqrt(expected)).all()
  # But for the dice all is the same.
  one = jax.tree.map(lambda x: x[:21], drawn)
  same = moves._replace(state=moves.state._replace(dice=one.state.dice))
  assert_equal(same, one)


def test_the_first_roll_is_no_double_and_says_who_begins():
  keys = jax.random.split(jax.random.key(0), 3600)
  start = jax.jit(jax.vmap(backgammon.game().init))(keys)
  high, low = np.asarray(start.dice, int).T
  assert (high > low).all()
  pairs, seen = np.unique(
    np.stack([high, low, np.asarray(start.player)]), axis=1, return_counts=True
  )
  # 15 rolls, either player: 120 of each are expected.
  assert pairs.shape[1] == 30
  assert (abs(seen - 120) < 5 * np.sqrt(120)).all()


def test_observations_are_tesauros_units():
  seen = np.asarray(
    backgammon.observe(board({1: 1, 2: 2, 3: 3, 24: 5, 25: 3}, {6: 15}))
  )
  assert seen.shape == (196,) and seen.dtype == np.float32
  mine, theirs = seen[:98], seen[98:]
  np.testing.assert_array_equal(
    mine[:12].reshape(3, 4), [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]]
  )
  np.testing.assert_array_equal(mine[12:92], 0)
  np.testing.assert_array_equal(mine[92:96], [0, 1, 0, 1])
  np.testing.assert_allclose(mine[96:], [1.5, 1 / 15])
  np.testing.assert_array_equal(theirs[20:24], [0, 1, 0, 6])
  assert theirs.sum() == 7


def test_environment_tells_of_its_candidates():
  spec = self_play(backgammon.game(7)).spec
  assert spec.action == ((2, 26), np.int8, 7)
  assert not spec.masks_actions
  with pytest.raises(ValueError, match='num_candidates=0: must be at least 1'):
    backgammon.game(0)


def test_matches_are_fair_and_losses_measured():
  pytest.importorskip('gnubg_nn')
  pubeval, best = gnubg.pubeval(), gnubg.gnubg(0)
  even = gnubg.match(pubeval, pubeval, 20)
  # Either player has had the other one's dice.
  np.testing.assert_array_equal(even.points.reshape(-1, 2).sum(-1), 0)
  assert even.standard_error == 0 and len(even.points) == 20
  assert set(abs(even.points)) <= {1, 2, 3}
  won = gnubg.match(best, gnubg.random_player, 10)
  assert won.mean > 1
  lost = gnubg.match(gnubg.random_player, best, 10)
  assert lost.mean < -1
  judged = gnubg.judge(*gnubg.contact_positions(15), plies=0)
  assert gnubg.equity_loss(best, judged).each.max() < 1e-5
  assert gnubg.equity_loss(pubeval, judged).each.min() >= 0
  assert gnubg.equity_loss(gnubg.random_player, judged).mean > 0.05


def test_opponents_have_names():
  pytest.importorskip('gnubg_nn')
  game = backgammon.game()
  start = jax.tree.map(lambda x: x[None], game.init(jax.random.key(0)))
  for name, best in (
    ('pubeval', gnubg.pubeval()),
    ('gnubg', gnubg.gnubg(0)),
    ('gnubg=1', gnubg.gnubg(1)),
  ):
    player = gnubg.player(name)
    found = player.decide(None, None, match.time_step(game, start)).action
    boards, dice = np.asarray(start.board), np.asarray(start.dice)
    np.testing.assert_array_equal(found, best(boards, dice, None))
    over = start._replace(board=jnp.asarray(board({6: 1}, {})[None]))
    assert player.decide(None, None, match.time_step(game, over)) is not None
  with pytest.raises(ValueError, match="player='gnubg=x': must be pubeval"):
    gnubg.player('gnubg=x')


def test_players_must_play_turns():
  def thief(boards, dice, generator):
    return np.concatenate([boards[:, :, :1], boards[:, :, 1:] * 0], -1)

  with pytest.raises(ValueError, match='without 15 stones'):
    gnubg.match(thief, thief, 2)
  with pytest.raises(ValueError, match='games=0: must be at least 1'):
    gnubg.match(thief, thief, 0)


def test_planned_fills_its_batches():
  player = gnubg.planned(lambda key, t: t.observation.board[:, ::-1], 2)
  boards = np.arange(5 * 52).reshape(5, 2, 26).astype(np.int8)
  dice = np.ones((5, 2), np.int8)
  played = player(boards, dice, np.random.default_rng(0))
  np.testing.assert_array_equal(played, boards[:, ::-1])
