"""Rules of games, playing oneself, and playing against an opponent."""

import builtins

import envpool
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_equal

from experiments.envs import against, connect_four, games, make, tic_tac_toe
from experiments.envs.self_play import self_play
from search.model import Environment

COPIES = 16
# A draw, and wins of who began and of the other one.
DRAW = '361313645534311043046626105524515600224220'
GAMES = {
  'connect_four': {DRAW: 0, '0101010': 1, '60101010': 1},
  'tic_tac_toe': {'021364587': 0, '01428': 1, '031485': 1},
}


def compiled(game):
  """`(position, action) -> (Move, invalid, player, observation)`, batched."""

  def one(position, action):
    move = game.step(position, action, jax.random.key(0))
    state = move.state
    return (
      move,
      game.invalid_actions(state),
      game.player(state),
      game.observe(state),
    )

  return jax.jit(jax.vmap(one))


@pytest.fixture(scope='module', params=['connect_four', 'tic_tac_toe'])
def rules(request):
  """A game's name, the game, and its compiled rules over 16 copies."""
  game = games.make_game(request.param)
  return request.param, game, compiled(game)


def start(game):
  position = game.init(jax.random.key(0))
  return jax.tree.map(lambda x: jnp.stack([x] * COPIES), position)


def select(mask, yes, no):
  return jax.tree.map(
    lambda a, b: np.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no
  )


def test_plays_like_envpools(rules):
  name, game, play = rules
  ids = {'connect_four': 'ConnectFour-v1', 'tic_tac_toe': 'TicTacToe-v1'}
  theirs = envpool.make(
    ids[name],
    env_type='gymnasium',
    num_envs=COPIES,
    seed=7,
    num_threads=1,  # with more, games of two players come in any order
  )
  _, info = theirs.reset()
  rng = np.random.default_rng(0)
  empty, over = start(game), np.zeros(COPIES, bool)
  position, copies = empty, np.arange(COPIES)
  # Which of their player numbers begins is drawn.
  beginner = info['current_player'].copy()
  legal = np.ones((COPIES, game.spec.action.num_actions), bool)
  ended = {-1: 0, 0: 0, 1: 0}
  for _ in range(120):
    action = (rng.random(legal.shape) + legal).argmax(1).astype(np.int32)
    mover = np.asarray(jax.vmap(game.player)(position))
    observation, reward, done, _, info = theirs.step(action)
    np.testing.assert_array_equal(info['env_id'], copies)
    begins = over  # The step behind an end is not played.
    move, invalid, player, seen = jax.tree.map(
      np.asarray, play(position, action)
    )
    position = select(begins, empty, move.state)
    beginner = np.where(begins, info['current_player'], beginner)
    over = (move.discount == 0) & ~begins
    np.testing.assert_array_equal(done, over)
    np.testing.assert_array_equal(move.discount[~over & ~begins], -1)
    assert not invalid[over].any()
    legal = ~invalid | begins[:, None]
    np.testing.assert_array_equal(
      info['legal_action_mask'], legal | over[:, None]
    )
    mover, player = (
      np.where(x == 0, beginner, 1 - beginner) for x in (mover, player)
    )
    reward = reward.reshape(COPIES, 2)
    on = ~begins
    mine = reward[copies, mover]
    np.testing.assert_array_equal(mine[on], move.reward[on])
    np.testing.assert_array_equal(reward.sum(1), 0)
    on &= ~over
    np.testing.assert_array_equal(info['current_player'][on], player[on])
    shape = (COPIES, 2, *game.spec.observation.shape)
    observation = observation.reshape(shape)[copies, player]
    np.testing.assert_array_equal(observation[on], seen[on])
    for value in ended:
      ended[value] += int((done & (reward[:, 0] == value)).sum())
  theirs.close()
  assert min(ended[-1], ended[1]) > 10


def test_ends_and_stays_as_it_is(rules):
  name, game, play = rules
  for moves, wins in GAMES[name].items():
    position = start(game)
    for i, letter in enumerate(moves):
      move, invalid, _, _ = play(position, np.full(COPIES, int(letter)))
      last = i == len(moves) - 1
      assert move.discount[0] == (0 if last else -1)
      assert move.reward[0] == (wins if last else 0)
      position = move.state
    assert not invalid.any()
    for action in range(3):
      again, invalid, _, _ = play(position, np.full(COPIES, action))
      assert_equal(again.state, position)
      assert not again.reward.any()
      assert not again.discount.any()
      assert not invalid.any()


def tic_tac_toe_wins(stones):
  cells = stones.reshape(3, 3)
  lines = [*cells, *cells.T, cells.diagonal(), cells[:, ::-1].diagonal()]
  return any(line.all() for line in lines)


def test_tic_tac_toe_has_the_known_number_of_positions():
  # A plain search through all games: 5,478 positions, of 255,168 games 131,184
  # are won by who begins, 77,904 by the other one, 46,080 drawn. The positions
  # are then judged by ours.
  results, seen = {0: 0, 1: 0, -1: 0}, {}

  def visit(first, second):
    """How many games go on from here, by who wins them."""
    stones = first, second
    if stones not in seen:
      boards = [np.array([c == '1' for c in s]) for s in stones]
      player = int(boards[0].sum() - boards[1].sum())
      if tic_tac_toe_wins(boards[1 - player]):
        seen[stones] = {1 - player: 1}
      elif (boards[0] | boards[1]).all():
        seen[stones] = {-1: 1}
      else:
        seen[stones] = found = {}
        for cell in np.flatnonzero(~(boards[0] | boards[1])):
          after = list(stones)
          own = after[player]
          after[player] = own[:cell] + '1' + own[cell + 1 :]
          for who, count in visit(*after).items():
            found[who] = found.get(who, 0) + count
    return seen[stones]

  results |= visit('0' * 9, '0' * 9)
  assert results == {0: 131_184, 1: 77_904, -1: 46_080}
  assert len(seen) == 5_478
  stones = np.array([[[c == '1' for c in s] for s in pair] for pair in seen])
  boards = tic_tac_toe.Board(
    jnp.asarray(stones), jnp.zeros(len(stones), jnp.int32)
  )
  got = np.asarray(jax.jit(jax.vmap(tic_tac_toe.is_over))(boards))
  full = stones.any(1).all(1)
  lines = np.array([any(map(tic_tac_toe_wins, pair)) for pair in stones])
  np.testing.assert_array_equal(got, full | lines)


@pytest.fixture(scope='module')
def tree():
  """Tic-tac-toe against oneself and against whoever takes the first cell."""
  game = games.make_game('tic_tac_toe')
  first = lambda position, key: jnp.argmin(game.invalid_actions(position))
  env = against.against(game, first)
  return game, env, jax.jit(jax.vmap(env.reset)), jax.jit(jax.vmap(env.step))


def test_an_opponent_answers(tree):
  _, env, reset, step = tree
  state, timestep = reset(jax.random.split(jax.random.key(0), COPIES))
  side = np.asarray(state.side)
  assert 0 < side.sum() < COPIES
  np.testing.assert_array_equal(timestep.observation.player, side)
  np.testing.assert_array_equal(timestep.observation.stones.sum((1, 2)), side)
  keys = jax.random.split(jax.random.key(1), COPIES)
  # Whoever begins: cells 4, 2, 6 (or 3, 4, 5 for who comes second and leaves
  # the other one 0, 1, 2).
  own = np.where(side == 0, [[4], [2], [6]], [[3], [4], [5]])
  for i in range(3):
    np.testing.assert_array_equal(timestep.discount, 1)
    np.testing.assert_array_equal(timestep.reward, 0)
    state, timestep = step(state, own[i], keys)
    if i == 1:
      # 0 and 1 are taken; the third answer to who comes second wins.
      np.testing.assert_array_equal(timestep.discount, side == 0)
      np.testing.assert_array_equal(timestep.reward, np.where(side, -1, 0))
      break
  state, timestep = step(state, own[2], keys)
  on = side == 0
  np.testing.assert_array_equal(timestep.reward[on], 1)
  np.testing.assert_array_equal(timestep.discount[on], 0)
  assert env.spec.game is tree[0]


def test_self_play_shows_positions(tree):
  game, versus, _, _ = tree
  env = self_play(game)
  assert env.spec.observation == versus.spec.observation
  assert env.spec.observation.stones.shape == (2, 9)
  made = [
    make.make('self_play:tic_tac_toe', 1, training=t) for t in (True, False)
  ]
  assert all(isinstance(env, Environment) for env in made)
  assert 'itself' in made[0].spec.name
  assert 'opponent' in made[1].spec.name


def test_a_random_opponent_is_legal_and_plays_everything():
  game = games.make_game('connect_four')
  stones = (
    jnp.zeros((2, 7), jnp.uint8).at[:, 3].set(jnp.uint8([0b101010, 0b010101]))
  )
  board = connect_four.Board(stones, jnp.int32(0))
  choose = jax.jit(jax.vmap(against.random_opponent(game), (None, 0)))
  columns = np.asarray(choose(board, jax.random.split(jax.random.key(0), 600)))
  counts = np.bincount(columns, minlength=7)
  assert counts[3] == 0
  # 100 expected of each, with a deviation of 9.
  assert np.delete(counts, 3).min() > 60


def test_a_random_opponent_picks_among_candidates():
  listed = jnp.array([[5, 1], [7, 2], [5, 1], [5, 1]])
  game = games.make_game('tic_tac_toe')._replace(
    candidates=lambda position: listed, invalid_actions=None
  )
  choose = jax.jit(jax.vmap(against.random_opponent(game), (None, 0)))
  keys = jax.random.split(jax.random.key(0), 400)
  chosen = np.asarray(choose(None, keys))
  share = (chosen == [5, 1]).all(1).mean()
  assert 0.4 < share < 0.6
  assert (chosen[(chosen != [5, 1]).any(1)] == [7, 2]).all()


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('self_play:conect_four', {}, 'did you mean connect_four'),
    (
      'self_play:tic_tac_toe',
      {'oponent': 1},
      'has opponent and opening_plies only',
    ),
    ('self_play:tic_tac_toe', {'opponent': 'best'}, "opponent='best'"),
    ('selfplay:tic_tac_toe', {}, 'must be jax, self_play or gymnasium'),
  ],
)
def test_what_is_wrong_is_said(name, options, message):
  with pytest.raises(ValueError, match=message) as error:
    make.make(name, 1, training=False, options=options)
  assert '\n' not in str(error.value)


def test_pgx_is_asked_for(monkeypatch):
  imported = builtins.__import__

  def refuse(name, *args, **kwargs):
    if name == 'pgx':
      raise ImportError(name)
    return imported(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', refuse)
  with pytest.raises(ValueError, match=r"pip install 'outplay\[games\]'"):
    games.make_game('othello')


@pytest.mark.slow
def test_othello_of_pgx_is_scored_by_its_stones():
  pytest.importorskip('pgx')
  game = games.make_game('othello')
  play = compiled(game)
  rng = np.random.default_rng(0)
  position = jax.vmap(game.init)(jax.random.split(jax.random.key(0), COPIES))
  legal = ~np.asarray(jax.vmap(game.invalid_actions)(position))
  over, scored = np.zeros(COPIES, bool), []
  for _ in range(130):
    mover = np.asarray(jax.vmap(game.player)(position))
    action = (rng.random(legal.shape) + legal).argmax(1)
    move, invalid, player, seen = jax.tree.map(
      np.asarray, play(position, action)
    )
    ends = ~over & (move.discount == 0)
    for i in np.flatnonzero(ends):
      # Channel 0 holds the stones of who would move next.
      own, other = seen[i, ..., 0].sum(), seen[i, ..., 1].sum()
      better = np.sign(own - other) * (1 if player[i] == mover[i] else -1)
      assert move.reward[i] == better
      scored.append(better)
    np.testing.assert_array_equal(move.reward[~ends], 0)
    going = ~over & ~ends
    np.testing.assert_array_equal(
      move.discount[going], np.where(player == mover, 1, -1)[going]
    )
    position, legal, over = move.state, ~invalid, over | ends
  assert over.all()
  assert {-1, 1} <= set(scored)


def test_games_begin_with_random_moves():
  game = tic_tac_toe.game()
  reset = jax.jit(jax.vmap(self_play(game, opening_plies=7).reset))
  state, timestep = reset(jax.random.split(jax.random.key(0), 400))
  stones = np.asarray(state.stones).sum((1, 2))
  assert set(stones) == set(range(8))
  # Those that end on the way are thrown away for the start.
  np.testing.assert_array_equal(timestep.discount, 1)
  np.testing.assert_array_equal(timestep.reward, 0)
  assert not jax.vmap(tic_tac_toe.is_over)(state).any()
  assert (stones == 0).sum() > (stones == 1).sum() * 1.5
  with pytest.raises(ValueError, match=r'^opening_plies=-1: must be 0'):
    self_play(game, opening_plies=-1)
