"""Prints boards as text and reads moves, for play in a terminal."""

import functools
import itertools
import re
from typing import Any

import numpy as np

_LETTERS = 'abcdefghijklmnopqrstuvwxyz'
_BAR = 25


def show(game: Any, state: Any, side: int = 0) -> str:
  """A position as text, `X` for player 0 and `O` for player 1.

  The game is backgammon, shown from one side, or has observations `[rows,
  columns, planes]`, with the mover's stones in the first plane and the
  opponent's in the second.
  """
  if hasattr(state, 'dice'):
    return _backgammon(state, side)
  planes = np.asarray(game.observe(state))
  own, other = ('X', 'O') if int(game.player(state)) == 0 else ('O', 'X')
  rows = [
    ' '.join(own if cell[0] else other if cell[1] else '.' for cell in row)
    for row in planes
  ]
  width = planes.shape[1]
  if game.spec.action.num_actions == width:
    return '\n'.join([*rows, ' '.join(map(str, range(width)))])
  if width > 3:
    named = [f'{i + 1:>2} {row}' for i, row in enumerate(rows)]
    return '\n'.join([f'   {" ".join(_LETTERS[:width])}', *named])
  # Each row is labelled with the number of its first cell.
  label = len(str(planes.shape[0] * width - 1))
  return '\n'.join(f'{i * width:>{label}}  {row}' for i, row in enumerate(rows))


def legal_moves(game: Any, state: Any) -> dict[str, Any]:
  """The legal actions in a position, by the name that a person types.

  The name is the action's number if actions are columns or the board is small;
  `d3` for column d and row 3 of a larger board; for a turn of backgammon the
  moves of its stones, in the mover's numbering of the points, and the points
  where they hit; or `pass`.
  """
  if game.candidates is None:
    invalid = np.asarray(game.invalid_actions(state))
    name = _namer(game)
    return {name(n): np.int32(n) for n in np.flatnonzero(~invalid).tolist()}
  actions = np.asarray(_compiled(game.candidates)(state))
  board, dice = np.asarray(state.board), np.asarray(state.dice)
  # Unused rows repeat the first action.
  again = (actions[1:] == actions[0]).all((1, 2))
  some = [actions[0], *actions[1:][~again]]
  return {_change(board, action, dice): action for action in some}


@functools.cache
def _compiled(function):
  import jax

  return jax.jit(function)


def _namer(game):
  """`(action) -> str` for games with numbered actions."""
  shape, number = game.spec.observation.shape, game.spec.action.num_actions
  if len(shape) != 3 or number - shape[0] * shape[1] not in (0, 1):
    return str
  cells, width = shape[0] * shape[1], shape[1]

  def name(action):
    if action == cells:
      # Hex has no pass; its second player may take over the first stone.
      return 'swap' if game.spec.name.lower().startswith('hex') else 'pass'
    row, column = divmod(action, width)
    return f'{_LETTERS[column]}{row + 1}' if width > 3 else str(action)

  return name


def read_move(text: str, legal: dict[str, Any]) -> str:
  """The name in `legal` of the move that a person has typed.

  A turn of backgammon may be given in any order, in any steps and without its
  hits: `8/7 13/7`, `13/8/7`, `24/22(2)`.

  Raises:
    ValueError: the text fits no legal move, or more than one.
  """
  if text in legal:
    return text
  wanted = _stones(text)
  found = [name for name in legal if wanted and _stones(name) == wanted]
  if len(found) == 1:
    return found[0]
  if found:
    raise ValueError(f'{text}: ambiguous; type {" or ".join(found)}')
  raise ValueError(f'{text}: not legal; "moves" lists the legal moves')


def _stones(text: str) -> dict[int, int] | None:
  """The change in stones at each point; None if the text is not a turn."""
  change: dict[int, int] = {}
  words = text.partition('hits')[0].replace('*', '').split()
  for word in words:
    found = re.fullmatch(r'((?:bar|\d+)(?:/(?:off|\d+))+)(?:\((\d)\))?', word)
    if found is None:
      return None
    named = {'bar': str(_BAR), 'off': '0'}
    points = [int(named.get(p, p)) for p in found[1].split('/')]
    for point, by in ((points[0], -1), (points[-1], 1)):
      change[point] = change.get(point, 0) + by * int(found[2] or 1)
  return {point: by for point, by in change.items() if by}


def _change(before, after, dice) -> str:
  """The notation of a turn of backgammon: `13/7 8/7`."""
  own = after[0].astype(int) - before[0].astype(int)
  left = [p for p in range(own.size) for _ in range(max(-own[p], 0))]
  reached = [p for p in range(own.size) for _ in range(max(own[p], 0))]
  name = lambda p: 'bar' if p == _BAR else 'off' if p == 0 else str(p)
  pairs = _pairs(sorted(left, reverse=True), reached, dice)
  moves = ' '.join(f'{name(a)}/{name(b)}' for a, b in pairs) or 'pass'
  # The opponent numbers the points from the other end.
  fewer = np.flatnonzero(after[1][1:25] < before[1][1:25]) + 1
  hits = ' '.join(name(25 - p) for p in fewer[::-1])
  return f'{moves} hits {hits}' if hits else moves


def _pairs(left, reached, dice) -> list[tuple[int, int]]:
  """The start and end of each stone, consistent with the dice if possible."""
  low, high = sorted(map(int, dice))
  steps = {low, high, low + high}
  if low == high:
    steps = {low * n for n in range(1, 5)}

  def wrong(places):
    gone = [a - b for a, b in zip(left, places)]
    # A stone that is borne off may use only a part of its die.
    bad = [
      g not in steps and not (b == 0 and 0 < g < max(steps))
      for g, b in zip(gone, places)
    ]
    return sum(bad), max(gone, default=0)

  orders = itertools.permutations(sorted(reached, reverse=True))
  return list(zip(left, min(orders, key=wrong)))


def _backgammon(state, side) -> str:
  """The board from one side's view, with that side's numbering."""
  own, other = np.asarray(state.board, int)
  if int(state.player) != side:
    own, other = other, own
  me, them = 'XO' if side == 0 else 'OX'
  cell = lambda p: (
    f'{me}{own[p]}'
    if own[p]
    else f'{them}{other[25 - p]}'
    if other[25 - p]
    else ' .'
  )
  line = lambda points, show: ' '.join(f'{show(p):>3}' for p in points)
  upper, lower = range(13, 25), range(12, 0, -1)
  return '\n'.join(
    (
      line(upper, str),
      line(upper, cell),
      line(lower, cell),
      line(lower, str),
      f'bar {me}{own[25]} {them}{other[25]}   off {me}{own[0]} '
      f'{them}{other[0]}   '
      f'dice {int(state.dice[0])} {int(state.dice[1])}',
    )
  )
