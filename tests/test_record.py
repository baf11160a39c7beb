"""Pictures of agents at play: what is drawn where, and what is refused."""

import io
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from agents.core.types import ArraySpec, Continuous, Discrete, Spec
from experiments import build
from experiments.build import saved
from experiments.envs import catch, connect_four, games
from experiments.files.errors import UserError
from experiments.playing import arena, players, record
from experiments.report import pictures
from search.model import PolicyOutput

PENDULUM = Spec(
  ArraySpec((3,)),
  Continuous((1,), np.full(1, -2.0), np.full(1, 2.0)),
  name='Pendulum-v1',
)


def test_pixels_are_enlarged_and_the_newest_frame_is_shown():
  frames = np.zeros((84, 84, 4), np.uint8)
  frames[10, 20, 3] = 200
  frames[:, :, 0] = 255  # the oldest one
  image = pictures.draw_pixels(frames, frame_stack=4)
  assert image.shape == (252, 252, 3) and image.dtype == np.uint8
  assert (image[30:33, 60:63] == 200).all()
  assert image.astype(int).sum() == 200 * 27
  colour = np.zeros((96, 96, 6), np.uint8)
  colour[0, 0] = (1, 2, 3, 40, 50, 60)
  assert pictures.draw_pixels(colour, 2)[0, 0].tolist() == [40, 50, 60]


def test_boards_of_floats_and_planes_are_drawn():
  board = np.zeros((10, 5, 1), np.float32)
  board[9, 2] = 1
  image = pictures.draw_pixels(board)
  assert image.shape == (240, 120, 3)
  assert (image[9 * 24 :, 48:72] == 255).all() and image[:216].max() == 0
  planes = np.zeros((10, 10, 4), bool)
  planes[1, 1, 0] = planes[2, 2, 3] = True
  image = pictures.draw_pixels(planes)
  seen = {tuple(image[row, row].tolist()) for row in (0, 36, 60)}
  assert len(seen) == 3 and (0, 0, 0) in seen


@pytest.mark.parametrize(
  'angle, tip', [(0, (30, 120)), (90, (120, 30)), (180, (210, 120))]
)
def test_a_pendulum_is_at_its_angle(angle, tip):
  turn = np.radians(angle)
  image = pictures.draw_pendulum(np.asarray([np.cos(turn), np.sin(turn), 0.0]))
  assert image.shape == (240, 240, 3)
  # Counter-clockwise from the top; the opposite end is empty.
  assert image[tip].tolist() == list(pictures.ROD)
  assert (image[240 - tip[0], 240 - tip[1]] == 255).all()


def test_a_torque_is_an_arc_of_its_sign():
  down = np.asarray([-1.0, 0.0, 0.0])
  is_red = lambda image: (image == pictures.TORQUE).all(-1)
  left = is_red(pictures.draw_pendulum(down, 1.0))
  right = is_red(pictures.draw_pendulum(down, -1.0))
  assert left[:, :115].sum() > 20 and not left[:, 125:].any()
  np.testing.assert_array_equal(left, right[:, ::-1])
  assert not is_red(pictures.draw_pendulum(down, 0.0)).any()
  draw = pictures.drawing(PENDULUM)
  assert is_red(draw(down, np.asarray([1.0]))).sum() == left.sum()
  assert not is_red(draw(down, None)).any()


def test_stones_have_their_players_colours():
  game = connect_four.game()
  board, step = game.init(None), jax.jit(game.step)
  for column in (3, 3, 0):
    board = step(board, jnp.int32(column), None).state
  image = pictures.draw_board(game.observe(board), int(board.player))
  assert image.shape == (240, 280, 3)
  centre = lambda row, column: tuple(image[20 + 40 * row, 20 + 40 * column])
  assert centre(5, 3) == centre(5, 0) == pictures.STONES[0]
  assert centre(4, 3) == pictures.STONES[1]
  assert centre(5, 1) == centre(0, 0) == pictures.EMPTY
  assert tuple(image[0, 0]) == pictures.BOARD


def _follow(params, key, timestep):
  """Goes where the ball of Catch is, and expects it to work out."""
  seen = timestep.observation[0, ..., 0]
  ball = np.argmax(seen[:-1].any(0))
  action = np.asarray([1 + np.sign(ball - np.argmax(seen[-1]))], np.int32)
  return action, np.asarray([0.75])


def test_an_episode_is_recorded_whole(tmp_path):
  frames = record.episode(catch.make_catch(6, 3), _follow, None)
  assert len(frames) == 6  # five decisions
  assert frames[0].caption == 'step 0   reward +0\nreturn +0   value +0.75'
  assert frames[-1].caption == 'step 5   reward +1\nreturn +1'
  pictures.write(tmp_path / 'new' / 'a.gif', frames)
  with Image.open(tmp_path / 'new' / 'a.gif') as gif:
    assert gif.n_frames == 6
    width, height = gif.size
  assert (width, height) == (210, 240 + 34)
  pictures.write(tmp_path / 'a.png', frames, 3)
  with Image.open(tmp_path / 'a.png') as strip:
    assert strip.size == (3 * width + 2 * 8, height)
  few = record.episode(catch.make_catch(6, 3), _follow, None, limit=2)
  assert [frame.caption for frame in few] == [f.caption for f in frames[:2]]


def _first_free(params, key, timestep):
  invalid = np.asarray(timestep.invalid_actions)
  none = np.zeros((1, 1))
  return PolicyOutput(np.argmin(invalid, -1), none, np.asarray([0.5]))


def test_a_game_tells_who_plays_what_and_who_wins():
  game = games.make_game('tic_tac_toe')
  sides = [
    players.Player('one', _first_free, (), 0),
    players.Player('two', _first_free, None, 0),
  ]
  frames = record.match_frames(game, sides)
  assert [frame.caption for frame in frames[:2]] == [
    'one (red) - two (yellow)\nmove 0   red to move, value +0.50',
    'one (red) - two (yellow)\nmove 1   yellow to move',
  ]
  # Cells in order: the first one has 0, 2, 4 and 6.
  assert len(frames) == 8
  assert frames[-1].caption.endswith('move 7   red wins')
  assert tuple(frames[-1].image[20, 20]) == pictures.STONES[0]
  assert len(record.match_frames(game, sides, limit=3)) == 3


def test_what_has_no_drawing_is_refused(tmp_path):
  vector = Spec(ArraySpec((17,)), Discrete(2), name='HalfCheetah-v4')
  with pytest.raises(UserError, match=r'HalfCheetah-v4 cannot .* images'):
    pictures.drawing(vector)
  with pytest.raises(UserError, match='backgammon cannot be drawn; must be'):
    pictures.check_board(games.make_game('backgammon'))
  with pytest.raises(UserError, match=r'must end in \.gif .* or \.png'):
    pictures.write(tmp_path / 'a.mp4', [])


def _values(workdir, **changes):
  """The flags of `experiments.play`, as they are if left out."""
  flags = {
    'workdir': str(workdir),
    'checkpoint': ['final'],
    'players': [],
    'opponents': [],
    'simulations': None,
    'planner': None,
    'frames': 0,
    'seed': 0,
    'human': False,
    'begin': True,
  }
  return types.SimpleNamespace(**flags | changes)


@pytest.fixture
def untrained(monkeypatch):
  """Parameters of no run."""

  def load(workdir, agent, names):
    params = jax.jit(lambda key: agent.init(key).params)(jax.random.key(0))
    return dict.fromkeys(names, params)

  monkeypatch.setattr(saved, 'load_params', load)


@pytest.fixture(scope='module')
def connect_four_run():
  return build.describe(
    'alphazero_connect_four',
    settings=('hidden_sizes=4', 'network.head_hidden=4', 'num_simulations=2'),
  )


def test_flags_record_an_agent_with_its_last_budget(
  tmp_path, untrained, capsys
):
  tiny = ('latent_size', 'hidden_size', 'channels', 'head_channels')
  fields = build.describe('muzero_catch', env='jax:catch').config.network
  known = [f'network.{name}=2' for name in tiny if hasattr(fields, name)]
  experiment = build.describe('muzero_catch', env='jax:catch', settings=known)
  path = tmp_path / 'catch.gif'
  record.launch(
    experiment, _values(tmp_path, record=str(path), simulations=['2', '0'])
  )
  with Image.open(path) as gif:
    assert gif.n_frames == 10
  told = capsys.readouterr().out.splitlines()
  assert told[0] == 'recording muzero on jax:catch, the network alone'
  assert told[1].endswith('parameters')
  assert told[-1] == f'results: {path}'


def test_flags_record_a_game(tmp_path, untrained, connect_four_run, capsys):
  path = tmp_path / 'game.png'
  record.launch(
    connect_four_run,
    _values(
      tmp_path,
      record=str(path),
      players=['network'],
      opponents=['random'],
      frames=4,
    ),
  )
  with Image.open(path) as strip:
    assert strip.size == (4 * 280 + 3 * 8, 240 + 34)
  told = capsys.readouterr().out
  assert told.startswith('recording ConnectFour: network against random\n')


def test_flags_let_a_person_play(
  tmp_path, untrained, connect_four_run, capsys, monkeypatch
):
  monkeypatch.setattr('sys.stdin', io.StringIO('hint\n9\n3\nquit\n'))
  arena.launch(
    connect_four_run, _values(tmp_path, human=True, players=['gumbel=2'])
  )
  told = capsys.readouterr().out
  assert told.startswith(f'ConnectFour against gumbel=2 of {tmp_path}\n')
  for words in (
    'it expects you to score',
    'it would play',
    '9: not legal; "moves" lists the legal moves\n',
    'gumbel=2 plays',
  ):
    assert words in told
