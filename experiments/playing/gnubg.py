"""Backgammon opponents and judges on the host: pubeval and GNU Backgammon.

They come from the package gnubg-nn (GPL), an extra that no other module
imports: `pip install 'outplay[opponents]'`. A `Player` chooses whole turns for
many games at once.

Plies are counted as in gnubg: 0-ply evaluates the boards after its own turn,
which is one stage of lookahead.

Axes: `B` games, 2 sides (the mover's first), 26 places as in `envs.backgammon`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.files.errors import UserError
from experiments.playing import players

STONES = 15
OFF, BAR = 0, 25

# `(boards int8 [B, 2, 26], dice int8 [B, 2], generator) -> boards after`.
Player = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


class Match(NamedTuple):
  """The result of games between two players.

  Attributes:
    points: float `[games]`, the first player's; games `2 i` and `2 i + 1` had
      the same dice, and the first player began game `2 i`.
    turns: int `[games]`, of both players.
  """

  points: np.ndarray
  turns: np.ndarray

  @property
  def mean(self) -> float:
    """The first player's points per game."""
    return float(self.points.mean())

  @property
  def standard_error(self) -> float:
    """Standard error of the mean, over pairs of games with the same dice."""
    pairs = self.points.reshape(-1, 2).mean(-1)
    return float(pairs.std(ddof=1) / np.sqrt(len(pairs)))


class Judged(NamedTuple):
  """A turn and the equity of each of its choices.

  Attributes:
    board: int8 `[2, 26]`.
    dice: int8 `[2]`.
    after: int8 `[N, 2, 26]`, the boards that the turn may lead to, the mover's
      side first.
    equity: float `[N]`, the mover's expected points on each of these boards.
  """

  board: np.ndarray
  dice: np.ndarray
  after: np.ndarray
  equity: np.ndarray


class Loss(NamedTuple):
  """The equity that a player's choices lose against the best choices.

  Attributes:
    each: float `[N]`, expected points lost in each turn, at least 0.
  """

  each: np.ndarray

  @property
  def mean(self) -> float:
    """Expected points lost per turn."""
    return float(self.each.mean())

  @property
  def standard_error(self) -> float:
    """Standard error of the mean."""
    return float(self.each.std(ddof=1) / np.sqrt(len(self.each)))


def library() -> Any:
  """The module gnubg_nn.

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.import_module('gnubg_nn')
  except ImportError as error:
    raise UserError(
      'opponent: needs gnubg-nn, which is not installed; run pip install '
      "'outplay[opponents]'"
    ) from error


def _start():
  from experiments.envs import backgammon

  return np.asarray(backgammon.new_board())


def moves(board: np.ndarray, dice: np.ndarray) -> np.ndarray:
  """gnubg's list of the boards that a turn may lead to.

  Args:
    board: int8 `[2, 26]`.
    dice: int8 `[2]`.

  Returns:
    int8 `[N, 2, 26]`; the board itself if no move is legal.
  """
  keys = library().moves(_theirs(board), int(dice[0]), int(dice[1]))
  if not keys:
    return board[None]
  # Keys have the mover's side last, and the mover stays the same.
  return np.stack([_board(key)[::-1] for key in keys])


def _theirs(board):
  """gnubg's board: points 1 to 24 and the bar, with the mover's side last."""
  return [[int(n) for n in side[1:]] for side in board[::-1]]


def _board(key):
  """The two sides of a position's key, in the key's order."""
  board = np.zeros((2, 26), np.int8)
  board[:, 1:] = library().board_from_position_key(key)
  board[:, OFF] = STONES - board[:, 1:].sum(-1)
  return board


def random_player(
  boards: np.ndarray, dice: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
  """A `Player` that chooses uniformly among the boards a turn may lead to.

  Args:
    boards: int8 `[B, 2, 26]`.
    dice: int8 `[B, 2]`.

  Returns:
    Boards after the turn, int8 `[B, 2, 26]`.
  """
  listed = [moves(board, roll) for board, roll in zip(boards, dice)]
  return np.stack([found[generator.integers(len(found))] for found in listed])


def pubeval() -> Player:
  """Tesauro's public linear evaluation, the classical yardstick.

  Raises:
    UserError: gnubg-nn is not installed.
  """
  best = library().pub_best_move

  def one(board, dice):
    flat = best(_theirs(board), int(dice[0]), int(dice[1]))
    after = board.copy()
    # Sources and targets are counted from 0; -1 is off, 24 is the bar.
    for source, target in zip(flat[::2], flat[1::2]):
      _move(after, source + 1, max(target + 1, 0))
    return after

  return _one_by_one(one)


def _move(board, source, target):
  board[0, source] -= 1
  board[0, target] += 1
  if target != OFF and board[1, 25 - target] == 1:
    board[1, 25 - target] -= 1
    board[1, BAR] += 1


def gnubg(plies: int = 0) -> Player:
  """GNU Backgammon's networks, for play without the doubling cube.

  Raises:
    UserError: gnubg-nn is not installed.
    ValueError: negative plies.
  """
  if plies < 0:
    raise ValueError(f'plies={plies}: must be 0 or more')
  best = library().best_move

  def one(board, dice):
    found = best(_theirs(board), int(dice[0]), int(dice[1]), n=plies, b=1)
    moved, key = found[:2]
    # In this key, the side that has moved is first.
    return _board(key) if moved else board

  return _one_by_one(one)


def _one_by_one(one) -> Player:
  def choose(boards, dice, generator):
    del generator
    return np.stack([one(board, roll) for board, roll in zip(boards, dice)])

  return choose


def player(name: str) -> players.Player:
  """An opponent for `match`: `pubeval`, `gnubg` or `gnubg=PLIES`.

  Raises:
    UserError: any other name, or gnubg-nn is not installed.
  """
  kind, _, plies = name.partition('=')
  if name == 'pubeval':
    choose = pubeval()
  elif kind == 'gnubg' and (plies.isdecimal() or name == kind):
    choose = gnubg(int(plies or 0))
  else:
    raise UserError(f'player={name!r}: must be pubeval, gnubg or gnubg=PLIES')

  def decide(params, key, timestep):
    from search.model import PolicyOutput

    del params, key
    boards = np.asarray(timestep.observation.board)
    dice, after = np.asarray(timestep.observation.dice), boards.copy()
    # Finished games keep their board until the last one ends.
    going = np.flatnonzero((boards[:, :, OFF] < STONES).all(1))
    if len(going):
      generator = np.random.default_rng(0)
      after[going] = choose(boards[going], dice[going], generator)
    zeros = np.zeros(len(boards), np.float32)
    return PolicyOutput(after, zeros[:, None], zeros)

  return players.Player(name, decide, None, 0)


def planned(choose: Callable[[Any, Any], Any], size: int) -> Player:
  """Makes a `Player` from a compiled function of batched time steps.

  It is `(key, timestep) -> action [B, 2, 26]`; batches are padded to B.
  """
  import jax
  import jax.numpy as jnp

  from experiments.envs import backgammon
  from search.model import TimeStep

  def decide(seed, boards, dice):
    zeros, no = jnp.zeros((size,)), jnp.zeros((size,), bool)
    player = jnp.zeros((size,), jnp.int32)
    at = jnp.asarray(boards), jnp.asarray(dice)
    position = backgammon.Position(*at, player)
    timestep = TimeStep(position, zeros, zeros + 1.0, no, no)
    return choose(jax.random.key(seed), timestep)

  def play(boards, dice, generator):
    after = []
    for start in range(0, len(boards), size):
      rows = np.arange(start, start + size)
      rows = np.where(rows < len(boards), rows, start)
      seed = generator.integers(2**32, dtype=np.uint32)
      after.append(np.asarray(decide(seed, boards[rows], dice[rows])))
    return np.concatenate(after)[: len(boards)]

  return play


def match(first: Player, second: Player, games: int, seed: int = 0) -> Match:
  """Plays games in pairs with the same dice; each player begins once.

  `games` are rounded up to an even number; the first player's points count.

  Raises:
    ValueError: fewer than one game, or a player returned an impossible board.
    RuntimeError: a game did not end.
  """
  if games < 1:
    raise ValueError(f'games={games}: must be at least 1')
  pairs = -(-games // 2)
  boards = np.tile(_start(), (2 * pairs, 1, 1))
  points, turns = np.zeros(2 * pairs), np.zeros(2 * pairs, int)
  going = np.ones(2 * pairs, bool)
  generator = np.random.default_rng([seed, 1])
  dice_generator = np.random.default_rng([seed, 0])
  for turn in range(10_000):
    dice = np.repeat(_roll(dice_generator, pairs, turn == 0), 2, axis=0)
    # The first player is to move in every other game.
    of_first = np.arange(2 * pairs) % 2 == turn % 2
    for player, own, sign in ((first, of_first, 1), (second, ~of_first, -1)):
      rows = np.flatnonzero(own & going)
      if not len(rows):
        continue
      after = player(boards[rows], dice[rows], generator)
      if (after.sum(-1) != STONES).any() or (after < 0).any():
        raise ValueError(
          f'match: a player returned boards without {STONES} stones a side'
        )
      won = after[:, 0, OFF] == STONES
      points[rows] = np.where(won, sign * _points(after), 0.0)
      going[rows] = ~won
      turns[rows] += 1
      boards[rows] = after[:, ::-1]
    if not going.any():
      return Match(points, turns)
  raise RuntimeError('match: a game did not end within 10,000 turns')


def _roll(generator, number, is_opening):
  """Dice int8 `[number, 2]`, the higher one first; no doubles in an opening."""
  dice = generator.integers(1, 7, (number, 2))
  if is_opening:
    further = generator.integers(1, 6, number)
    dice[:, 1] = (dice[:, 0] - 1 + further) % 6 + 1
  return -np.sort(-dice, axis=-1).astype(np.int8)


def _points(boards):
  """The points of a win for the first side, `[B]`."""
  gammon = boards[:, 1, OFF] == 0
  return 1 + gammon + (gammon & (boards[:, 1, 19:].sum(-1) > 0))


def contact_positions(
  number: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Turns with a choice and with contact, from pubeval's games with itself.

  Each is from a different game.

  Returns:
    Boards int8 `[number, 2, 26]` and dice int8 `[number, 2]`.
  """
  player, nn = pubeval(), library()
  generator = np.random.default_rng([seed, 2])
  found = []
  while len(found) < number:
    board, wait = _start(), generator.integers(2, 40)
    for turn in range(wait + 1):
      dice = _roll(generator, 1, turn == 0)
      if turn == wait:
        is_contact = nn.classify(_theirs(board)) == nn.c_contact
        if is_contact and len(moves(board, dice[0])) > 1:
          found.append((board, dice[0]))
        break
      board = player(board[None], dice, generator)[0][::-1]
      if (board[:, OFF] == STONES).any():
        break
  boards, dice = zip(*found)
  return np.stack(boards), np.stack(dice)


def judge(boards: np.ndarray, dice: np.ndarray, plies: int = 1) -> list[Judged]:
  """gnubg's equity of every choice in each turn.

  Args:
    boards: int8 `[B, 2, 26]`.
    dice: int8 `[B, 2]`.
    plies: that gnubg looks ahead after the turn.
  """
  nn, judged = library(), []
  for board, roll in zip(boards, dice):
    after = moves(board, roll)
    equity = []
    for one in after:
      if one[0, OFF] == STONES:
        equity.append(float(_points(one[None])[0]))
        continue
      win, win_2, win_3, lose_2, lose_3 = nn.probabilities(
        _theirs(one[::-1]), plies
      )
      equity.append(-(2 * win - 1 + win_2 - lose_2 + win_3 - lose_3))
    judged.append(Judged(board, roll, after, np.asarray(equity)))
  return judged


def equity_loss(
  player: Player, judged: Sequence[Judged], seed: int = 0
) -> Loss:
  """The equity that a player loses against a judge's best choices.

  Raises:
    ValueError: the player chose a board that the judge does not list.

  Source: Tesauro and Galperin 1996, Table 3.
  """
  boards = np.stack([one.board for one in judged])
  dice = np.stack([one.dice for one in judged])
  chosen = player(boards, dice, np.random.default_rng(seed))
  losses = []
  for one, board in zip(judged, chosen):
    same = (one.after == board[None]).all((1, 2))
    if not same.any():
      raise ValueError(f'equity_loss: {board.tolist()} is not a legal choice')
    losses.append(one.equity.max() - one.equity[same.argmax()])
  return Loss(np.asarray(losses))
