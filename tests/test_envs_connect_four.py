"""Connect Four, against envpool and plain Python."""

# ruff: noqa: F811 (fixtures of the other half are imported)

import envpool
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_envs_more import COPIES, compiled, envs, keys  # noqa: F401

from experiments.envs import connect_four
from experiments.runtime.sources import select

DRAW = '361313645534311043046626105524515600224220'


@pytest.fixture(scope='module')
def rules():
  """`rules(board, column) -> (board, winner, over, legal, views)`, compiled,
  over 32 boards; the views are of players 0 and 1."""

  def one(board, column):
    board = connect_four.play(board, column)
    views = jnp.stack([connect_four.observe(board, i) for i in range(2)])
    return (
      board,
      connect_four.winner(board),
      connect_four.is_over(board),
      connect_four.legal(board),
      views,
    )

  return jax.jit(jax.vmap(one))


def new_boards():
  board = connect_four.new_board()
  return jax.tree.map(lambda x: jnp.stack([x] * COPIES), board)


def drop(rules, columns):
  """The game's boards `[32]`, all alike, and `[(winner, over), ...]`."""
  board, results = new_boards(), []
  for column in columns:
    board, won, over, *_ = rules(board, np.full(COPIES, int(column)))
    results.append((int(won[0]), bool(over[0])))
  return board, results


def test_connect_four_plays_like_envpools(rules):
  # Rows of observations and rewards go by a game's two player numbers. Which
  # number begins is random; on the board 0 is the player who moved first.
  theirs = envpool.make(
    'ConnectFour-v1',
    env_type='gymnasium',
    num_envs=COPIES,
    seed=7,
    num_threads=1,  # with more, games of two players come in any order
  )
  _, info = theirs.reset()
  rng = np.random.default_rng(0)
  empty, over = new_boards(), np.zeros(COPIES, bool)
  board, beginner = empty, info['current_player'].copy()
  legal, copies, results = np.ones((COPIES, 7), bool), np.arange(COPIES), []
  for _ in range(250):
    column = (rng.random((COPIES, 7)) + legal).argmax(1).astype(np.int32)
    observation, reward, done, _, info = theirs.step(column)
    np.testing.assert_array_equal(info['env_id'], copies)
    begins = over  # The step behind an end is not played.
    board, won, over, legal, views = jax.tree.map(
      np.asarray, rules(board, column)
    )
    board = select(begins, empty, board)
    beginner = np.where(begins, info['current_player'], beginner)
    won, over = np.where(begins, -1, won), over & ~begins
    legal = legal | begins[:, None]
    views = views * ~begins[:, None, None, None, None]
    cells = views[:, 0, ..., 0] - 1 + 2 * views[:, 0, ..., 1]
    np.testing.assert_array_equal(info['board'], cells)
    np.testing.assert_array_equal(done, over)
    # Theirs allows all columns at the end.
    mask = legal | over[:, None]
    np.testing.assert_array_equal(info['legal_action_mask'], mask)
    mover = np.where(board.player == 0, beginner, 1 - beginner)
    on = ~over
    np.testing.assert_array_equal(info['current_player'][on], mover[on])
    observation = observation.reshape(COPIES, 2, 6, 7, 2)
    reward = reward.reshape(COPIES, 2)
    for player in range(2):
      at = copies, np.where(player == 0, beginner, 1 - beginner)
      np.testing.assert_array_equal(observation[at], views[:, player])
      sign = np.where(won < 0, 0, np.where(won == player, 1, -1))
      np.testing.assert_array_equal(reward[at], sign)
    results += won[over].tolist()
  theirs.close()
  assert len(results) > 300
  assert min(results.count(0), results.count(1)) > 100


def test_connect_four_sees_every_line_and_none_around_the_edges():
  boards, want = [], []
  for y, x in np.ndindex(6, 7):
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
      ys, xs = y + dy * np.arange(4), x + dx * np.arange(4)
      inside = ((ys < 6) & (xs >= 0) & (xs < 7)).all()
      for player in range(2):
        cells = np.zeros((2, 6, 7), np.int64)
        cells[player, ys % 6, xs % 7] = 1
        boards.append(cells)
        want.append(player if inside else -1)
        cells = cells.copy()
        cells[player, y, x] = 0  # Three are not enough.
        boards.append(cells)
        want.append(-1)
  assert sum(w >= 0 for w in want) == 2 * 69
  # Row 0 of `cells` is the lowest.
  stones = (np.array(boards) << np.arange(6)[:, None]).sum(2)
  board = connect_four.Board(jnp.uint8(stones), jnp.zeros(len(want), jnp.int32))
  got = jax.jit(jax.vmap(connect_four.winner))(board)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  'columns, winner',
  [
    ('0102030', 0),  # Up,
    ('0011223', 0),  # across,
    ('60615263', 1),
    ('01122323363', 0),  # rising to the right,
    ('65544343303', 0),  # and to the left.
    ('5566001', -1),  # Not around the edge.
    (DRAW, -1),
  ],
)
def test_connect_four_ends(rules, columns, winner):
  board, results = drop(rules, columns)
  assert results[:-1] == [(-1, False)] * (len(columns) - 1)
  full = len(columns) == 42
  assert results[-1] == (winner, winner >= 0 or full)
  legal = np.asarray(jax.vmap(connect_four.legal)(board))
  np.testing.assert_array_equal(legal, not full)


def test_nothing_drops_where_nothing_fits(rules):
  board, _ = drop(rules, '333333')
  columns = np.resize([3, 7, -1], COPIES)
  after, _, over, legal, _ = rules(board, columns)
  np.testing.assert_array_equal(after.stones, board.stones)
  np.testing.assert_array_equal(after.player, 1 - board.player)
  np.testing.assert_array_equal(legal, np.arange(7)[None] != [[3]] * COPIES)
  assert not over.any()


def test_random_columns_are_legal_and_all_alike(rules, key):
  board, _ = drop(rules, '000000111111333333444444')
  board = jax.tree.map(lambda x: x[0], board)
  columns = jax.vmap(connect_four.random_column, (None, 0))(
    board, jax.random.split(key, 900)
  )
  counts = np.bincount(columns, minlength=7)
  assert counts[[0, 1, 3, 4]].sum() == 0
  # Expected 300 each, standard deviation 14.
  assert (np.abs(counts[[2, 5, 6]] - 300) < 60).all()


def has_four(cells):
  """Whether a bool `[6, 7]` has four in a line, looking along all lines."""
  lines = [*cells, *cells.T]
  for k in range(-5, 7):
    lines += [cells.diagonal(k), cells[::-1].diagonal(k)]
  return any('1111' in ''.join(map(str, line.astype(int))) for line in lines)


def test_the_opponent_answers_and_the_result_is_the_agents(envs):
  _, reset, step, _ = envs['connect_four']
  rng = np.random.default_rng(0)
  state, got = reset(keys(6))
  opened = np.asarray(got.observation).sum((1, 2, 3))
  np.testing.assert_array_equal(opened, state.side)
  assert 8 < opened.sum() < 24
  rewards = []
  for t in range(60):
    before = np.asarray(got.observation)
    over = np.asarray(got.is_last())
    legal = ~np.asarray(got.invalid_actions)
    action = (rng.random((COPIES, 7)) + legal).argmax(1).astype(np.int32)
    state, got = select(
      over, reset(keys(t)), step(state, action, keys(100 + t))
    )
    after = np.asarray(got.observation)
    for i in np.flatnonzero(~over):
      mine = before[i].copy()
      height = mine[:, action[i]].sum().astype(int)
      mine[5 - height, action[i], 0] = 1
      np.testing.assert_array_equal(after[i, ..., 0], mine[..., 0])
      won = has_four(mine[..., 0])
      extra = after[i, ..., 1] - mine[..., 1]
      assert extra.sum() == (0 if won else 1)
      assert extra.min() == 0
      occupied = after[i].sum(-1)
      assert occupied.max() == 1
      assert (np.diff(occupied, axis=0) >= 0).all()  # Nothing floats.
      lost = has_four(after[i, ..., 1])
      ended = won or lost or occupied.all()
      assert got.reward[i] == won - lost
      assert got.discount[i] == (not ended)
      mask = (occupied[0] == 1) & (not ended)
      np.testing.assert_array_equal(got.invalid_actions[i], mask)
      if ended:
        rewards.append(won - lost)
  assert min(rewards.count(1), rewards.count(-1)) > 20
  assert not got.truncated.any()


def test_a_full_column_loses_at_once(envs, rules):
  board, _ = drop(rules, '333333')
  state = connect_four.ConnectFourState(board, board.player)
  action = np.resize([3, 2], COPIES).astype(np.int32)
  state, got = envs['connect_four'].step(state, action, keys(0))
  foul = action == 3
  np.testing.assert_array_equal(got.reward, np.where(foul, -1, 0))
  np.testing.assert_array_equal(got.discount, ~foul)
  np.testing.assert_array_equal(
    got.observation.sum((1, 2, 3)), np.where(foul, 6, 8)
  )
  np.testing.assert_array_equal(got.invalid_actions.any(-1), ~foul)


@pytest.mark.parametrize('side', [0, 1])
def test_a_full_board_is_a_draw(envs, rules, side):
  # The opponent has one column left, or the agent has.
  board, _ = drop(rules, DRAW[: 40 + side])
  state = connect_four.ConnectFourState(board, jnp.full(COPIES, side))
  action = np.full(COPIES, int(DRAW[40 + side]), np.int32)
  _, got = envs['connect_four'].step(state, action, keys(0))
  np.testing.assert_array_equal(got.reward, 0)
  np.testing.assert_array_equal(got.discount, 0)
  np.testing.assert_array_equal(got.observation.sum(-1), 1)
  assert not got.invalid_actions.any()


def test_another_opponent_may_answer():
  leftmost = lambda board, key: jnp.argmax(connect_four.legal(board))
  env = compiled(connect_four.make_connect_four(leftmost))
  state, got = env.reset(keys(0))
  side = np.asarray(state.side)
  assert set(side.tolist()) == {0, 1}
  # Both stack a column: who began is first to have four.
  for t in range(1, 5):
    state, now = env.step(state, np.full(COPIES, 6, np.int32), keys(t))
    got = select(np.asarray(got.is_last()), got, now)
    np.testing.assert_array_equal(
      got.reward, np.where(side == 1, -(t >= 3), t >= 4)
    )
    np.testing.assert_array_equal(got.is_last(), t >= np.where(side, 3, 4))
