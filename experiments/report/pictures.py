"""Draws an episode: pictures of time steps, written as a .gif or .png."""

import itertools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.files import writing
from experiments.files.errors import UserError

# The stones of player 0 and of player 1.
STONES = ((214, 69, 65), (244, 196, 48))
BOARD, EMPTY = (38, 70, 110), (232, 236, 240)
PAPER, ROD, TORQUE, INK = (255, 255, 255), (60, 90, 140), (214, 69, 65), 32
# Colours of planes, on black.
_PLANES = (
  (244, 196, 48),
  (70, 130, 200),
  (214, 69, 65),
  (90, 170, 90),
  (160, 110, 190),
  (200, 200, 200),
)
_HEIGHT = 240
_CAPTION = 34
_GAP = 8
_STRIP, LONGEST = 8, 300


class Frame(NamedTuple):
  """A time step that is shown.

  Attributes:
    image: uint8 `[H, W, 3]`.
    caption: one or two lines.
  """

  image: np.ndarray
  caption: str


def draw_pixels(observation: np.ndarray, frame_stack: int = 1) -> np.ndarray:
  """The newest frame of an observation, enlarged by a whole number.

  Args:
    observation: `[H, W, C]`, uint8 or float in [0, 1]; the newest frame is the
      last `C / frame_stack` channels: one is grey, three of uint8 are RGB, and
      others are planes with a colour each.

  Returns:
    uint8 `[h, w, 3]`, about 240 high, at least H by W.
  """
  frame = np.asarray(observation)
  frame = frame[..., -(frame.shape[-1] // frame_stack) :]
  channels = frame.shape[-1]
  if frame.dtype == np.uint8 and channels in (1, 3):
    image = np.broadcast_to(frame, (*frame.shape[:2], 3))
  elif channels == 1:
    grey = 255 * np.clip(frame, 0, 1)
    image = np.broadcast_to(grey, (*frame.shape[:2], 3)).astype(np.uint8)
  else:
    # A later plane covers an earlier one.
    image = np.zeros((*frame.shape[:2], 3), np.uint8)
    for plane, colour in zip(
      np.moveaxis(frame, -1, 0), itertools.cycle(_PLANES)
    ):
      image[plane > 0] = colour
  times = max(1, round(_HEIGHT / image.shape[0]))
  return image.repeat(times, 0).repeat(times, 1)


def draw_pendulum(
  observation: np.ndarray, torque: float | None = None
) -> np.ndarray:
  """A rod at its angle, and an arc for the torque, both counter-clockwise.

  Args:
    observation: float `[3]`, cosine and sine of the angle, 0 upright, and the
      angular speed.
    torque: in [-2, 2]; an arc from the top, 75 degrees for a torque of 1.

  Returns:
    uint8 `[240, 240, 3]`.
  """
  from PIL import Image, ImageDraw

  cosine, sine, _ = map(float, observation)
  size = 2 * _HEIGHT  # Drawn twice as large, for smooth edges.
  image = Image.new('RGB', (size, size), PAPER)
  draw = ImageDraw.Draw(image)
  middle, length, radius = size / 2, 0.4 * size, 0.14 * size
  tip = (middle - length * sine, middle - length * cosine)
  draw.line([(middle, middle), tip], fill=ROD, width=36)
  for x, y in ((middle, middle), tip):
    draw.ellipse((x - 18, y - 18, x + 18, y + 18), fill=ROD)
  draw.ellipse(
    (middle - 8, middle - 8, middle + 8, middle + 8), fill=(INK, INK, INK)
  )
  if torque:
    # The library's angles are clockwise from the right.
    end = -90 - 75 * float(np.clip(torque, -2, 2))
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    draw.arc(box, min(-90, end), max(-90, end), fill=TORQUE, width=8)
    x = middle + radius * math.cos(math.radians(end))
    y = middle + radius * math.sin(math.radians(end))
    draw.ellipse((x - 12, y - 12, x + 12, y + 12), fill=TORQUE)
  return np.asarray(image.resize((_HEIGHT, _HEIGHT), Image.Resampling.LANCZOS))


def draw_board(planes: np.ndarray, player: int) -> np.ndarray:
  """A board with stones, the first player's red and the second's yellow.

  Args:
    planes: `[R, C, 2]`, the stones of the player to move and of the other one,
      the top row first.
    player: 0 or 1, the one to move.

  Returns:
    uint8 `[40 R, 40 C, 3]`, or smaller cells on more than 9 rows.
  """
  from PIL import Image, ImageDraw

  planes = np.asarray(planes)
  rows, columns = planes.shape[:2]
  cell = 2 * min(40, 360 // rows)
  image = Image.new('RGB', (columns * cell, rows * cell), BOARD)
  draw = ImageDraw.Draw(image)
  gap = cell // 10
  for row, column in np.ndindex(rows, columns):
    colour = EMPTY
    for plane, side in ((0, player), (1, 1 - player)):
      if planes[row, column, plane]:
        colour = STONES[side]
    x, y = column * cell, row * cell
    box = (x + gap, y + gap, x + cell - gap, y + cell - gap)
    draw.ellipse(box, fill=colour)
  half = (columns * cell // 2, rows * cell // 2)
  return np.asarray(image.resize(half, Image.Resampling.LANCZOS))


def captioned(frame: Frame) -> np.ndarray:
  """The image with its caption above it, uint8 `[H + 34, max(W, 210), 3]`."""
  from PIL import Image, ImageDraw, ImageFont

  height, width = frame.image.shape[:2]
  wide = max(width, 210)
  image = Image.new('RGB', (wide, height + _CAPTION), PAPER)
  image.paste(Image.fromarray(frame.image), ((wide - width) // 2, _CAPTION))
  draw = ImageDraw.Draw(image)
  font = ImageFont.load_default(12)
  draw.multiline_text(
    (5, 2), frame.caption, fill=(INK, INK, INK), font=font, spacing=2
  )
  return np.asarray(image)


def drawing(spec: Any) -> Callable[[Any, Any], np.ndarray]:
  """The function that draws time steps of an environment.

  It is `(observation, action) -> uint8 [H, W, 3]`, both without batch; the
  action is None on the last time step.

  Raises:
    UserError: its observations cannot be drawn.
  """
  shape = getattr(spec.observation, 'shape', ())
  if spec.name.startswith('Pendulum') and shape == (3,):
    torques = hasattr(spec.action, 'low')
    return lambda observation, action: draw_pendulum(
      observation, float(action[0]) if torques and action is not None else None
    )
  if len(shape) == 3:
    return lambda observation, action: draw_pixels(
      observation, spec.frame_stack
    )
  raise UserError(
    f'record: {spec.name} cannot be drawn, its observations are '
    f'{shape or "positions"}; must be images (Atari, Catch, MinAtar-like '
    'boards), Pendulum, Connect Four, tic-tac-toe or Othello'
  )


def is_drawn(spec: Any) -> bool:
  """Whether an environment can be recorded."""
  try:
    if spec.game is not None:
      check_board(spec.game)
    else:
      drawing(spec)
  except UserError:
    return False
  return True


def check_board(game: Any) -> None:
  """Refuses games whose boards cannot be drawn.

  Raises:
    UserError: its actions are neither columns nor cells, or its observations
      are not the stones of two players.
  """
  shape = game.spec.observation.shape
  cells = math.prod(shape[:2])
  numbers = getattr(game.spec.action, 'num_actions', 0)
  grid = len(shape) == 3 and numbers in (shape[1], cells, cells + 1)
  if not grid or shape[2] != 2:
    raise UserError(
      f'record: {game.spec.name} cannot be drawn; must be Connect Four, '
      'tic-tac-toe or Othello'
    )


def write(path: pathlib.Path, frames: Sequence[Frame], count: int = 0) -> None:
  """Writes an animation (.gif), or a strip (.png) of at most `count` frames.

  0 stands for 8; the first and the last frame are among them.

  Raises:
    UserError: another ending, or a folder that cannot be written to.
  """
  from PIL import Image

  check_path(path)
  some = list(frames)
  if path.suffix == '.png':
    count = min(count or _STRIP, len(some))
    places = np.linspace(0, len(some) - 1, count).round().astype(int)
    some = [some[place] for place in places]
  images = [captioned(frame) for frame in some]
  with writing.replacing(path) as file:
    if path.suffix == '.png':
      gap = np.full_like(images[0][:, :_GAP], 255)
      parts = [part for image in images for part in (image, gap)]
      strip = np.concatenate(parts[:-1], axis=1)
      Image.fromarray(strip).quantize(64).save(file, 'PNG', optimize=True)
      return
    # One palette for all, so that a file holds only what changes.
    sample = images[:: max(1, len(images) // 8)]
    colours = Image.fromarray(np.concatenate(sample)).quantize(64)
    shown = [
      Image.fromarray(x).quantize(palette=colours, dither=Image.Dither.NONE)
      for x in images
    ]
    shown[0].save(
      file,
      'GIF',
      save_all=True,
      append_images=shown[1:],
      duration=[120] * (len(shown) - 1) + [1500],
      loop=0,
      optimize=True,
    )


def check_path(path: pathlib.Path) -> None:
  """Refuses files that are neither animations nor strips.

  Raises:
    UserError: another ending than .gif or .png.
  """
  if path.suffix not in ('.gif', '.png'):
    raise UserError(
      f'record={path}: must end in .gif (an animation) or .png (a strip)'
    )
