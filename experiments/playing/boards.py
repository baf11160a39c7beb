"""Boards as text, and moves as people name them, for play in a terminal."""

import functools
import itertools
import re
from typing import Any

import numpy as np

_LETTERS = 'abcdefghijklmnopqrstuvwxyz'
_BAR = 25


def show(game: Any, state: Any, side: int = 0) -> str:
  """A position as text, `X` for player 0 and `O` for player 1.

  Args:
    game: the rules; what it observes is `[rows, columns, planes]`, one's own
      stones in the first plane and the other one's in the second, or it is
      backgammon.
    state: one position.
    side: the player from whose side backgammon is seen.
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
  # A cell's number is its row's first one and its place.
  label = len(str(planes.shape[0] * width - 1))
  return '\n'.join(f'{i * width:>{label}}  {row}' for i, row in enumerate(rows))


def legal_moves(game: Any, state: Any) -> dict[str, Any]:
  """What may be done in a position: what is typed for it, and the action.

  Args:
    game: the rules.
    state: one position.

  Returns:
    Of columns and of small boards the actions' numbers; of larger boards
    cells, `d3` in column d and row 3; of turns of backgammon where stones go,
    as the mover counts points, and where they hit. `pass` where there is one.
  """
  if game.candidates is None:
    invalid = np.asarray(game.invalid_actions(state))
    name = _namer(game)
    return {name(n): np.int32(n) for n in np.flatnonzero(~invalid).tolist()}
  actions = np.asarray(_compiled(game.candidates)(state))
  board, dice = np.asarray(state.board), np.asarray(state.dice)
  # In the places that are left the first one is repeated.
  again = (actions[1:] == actions[0]).all((1, 2))
  some = [actions[0], *actions[1:][~again]]
  return {_change(board, action, dice): action for action in some}


@functools.cache
def _compiled(function):
  import jax

  return jax.jit(function)


def _namer(game):
  """`(action) -> str` of actions with numbers."""
  shape, number = game.spec.observation.shape, game.spec.action.num_actions
  if len(shape) != 3 or number - shape[0] * shape[1] not in (0, 1):
    return str
  cells, width = shape[0] * shape[1], shape[1]

  def name(action):
    if action == cells:
      # Hex has no pass: its second player may take over the first stone.
      return 'swap' if game.spec.name.lower().startswith('hex') else 'pass'
    row, column = divmod(action, width)
    return f'{_LETTERS[column]}{row + 1}' if width > 3 else str(action)

  return name


def read_move(text: str, legal: dict[str, Any]) -> str:
  """Which of the legal moves a person means.

  Args:
    text: a name of `legal`; a turn of backgammon may be said in any order, in
      any steps and without what it hits: `8/7 13/7`, `13/8/7`, `24/22(2)`.
    legal: from `legal_moves`.

  Returns:
    A name of `legal`.

  Raises:
    ValueError: none, or more than one.
  """
  if text in legal:
    return text
  wanted = _stones(text)
  found = [name for name in legal if wanted and _stones(name) == wanted]
  if len(found) == 1:
    return found[0]
  if found:
    raise ValueError(f'{text}: which one, {" or ".join(found)}?')
  raise ValueError(f'not legal: {text}; "moves" lists what is')


def _stones(text: str) -> dict[int, int] | None:
  """By how many stones each point changes; None for what is no turn."""
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
  """How a turn of backgammon is written: `13/7 8/7`."""
  own = after[0].astype(int) - before[0].astype(int)
  left = [p for p in range(own.size) for _ in range(max(-own[p], 0))]
  reached = [p for p in range(own.size) for _ in range(max(own[p], 0))]
  name = lambda p: 'bar' if p == _BAR else 'off' if p == 0 else str(p)
  pairs = _pairs(sorted(left, reverse=True), reached, dice)
  moves = ' '.join(f'{name(a)}/{name(b)}' for a, b in pairs) or 'pass'
  # The other side counts from its own end.
  fewer = np.flatnonzero(after[1][1:25] < before[1][1:25]) + 1
  hits = ' '.join(name(25 - p) for p in fewer[::-1])
  return f'{moves} hits {hits}' if hits else moves


def _pairs(left, reached, dice) -> list[tuple[int, int]]:
  """Which stone went where: as the dice say, if that is possible."""
  low, high = sorted(map(int, dice))
  steps = {low, high, low + high}
  if low == high:
    steps = {low * n for n in range(1, 5)}

  def wrong(places):
    gone = [a - b for a, b in zip(left, places)]
    # A stone that leaves the board may waste some of its die.
    bad = [
      g not in steps and not (b == 0 and 0 < g < max(steps))
      for g, b in zip(gone, places)
    ]
    return sum(bad), max(gone, default=0)

  orders = itertools.permutations(sorted(reached, reverse=True))
  return list(zip(left, min(orders, key=wrong)))


def _backgammon(state, side) -> str:
  """The board as one side sees it, whose points are counted."""
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
