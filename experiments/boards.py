"""Boards as text, and moves as people name them, for play in a terminal."""

from typing import Any

import numpy as np


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
  # A cell's number is its row's first one and its place.
  label = len(str(planes.shape[0] * width - 1))
  return '\n'.join(f'{i * width:>{label}}  {row}' for i, row in enumerate(rows))


def legal_moves(game: Any, state: Any) -> dict[str, Any]:
  """What may be done in a position: what is typed for it, and the action.

  Args:
    game: the rules.
    state: one position.

  Returns:
    Of numbered actions their numbers; of turns of backgammon where stones
    go, as the mover counts points, and where they hit.
  """
  if game.candidates is None:
    invalid = np.asarray(game.invalid_actions(state))
    return {str(n): np.int32(n) for n in np.flatnonzero(~invalid)}
  actions = np.asarray(game.candidates(state))
  board = np.asarray(state.board)
  return {_change(board, action): action for action in actions}


def _change(before, after) -> str:
  """How a turn of backgammon is written: `13/7 8/7`, in steps of one point."""
  own = after[0].astype(int) - before[0].astype(int)
  left = [p for p in range(own.size) for _ in range(max(-own[p], 0))]
  reached = [p for p in range(own.size) for _ in range(max(own[p], 0))]
  name = lambda p: 'bar' if p == 25 else 'off' if p == 0 else str(p)
  pairs = zip(sorted(left, reverse=True), sorted(reached, reverse=True))
  moves = ' '.join(f'{name(a)}/{name(b)}' for a, b in pairs) or 'pass'
  # The other side counts from its own end.
  fewer = np.flatnonzero(after[1][1:25] < before[1][1:25]) + 1
  hits = ' '.join(name(25 - p) for p in fewer[::-1])
  return f'{moves} hits {hits}' if hits else moves


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
