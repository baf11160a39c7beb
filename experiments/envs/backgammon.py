"""Backgammon in JAX: an action is a whole turn, given by the board it leads to.

There is no doubling cube: a game is worth 1, a gammon 2, a backgammon 3.

No board is enumerated twice. Of a double, a turn is a multiset of sources,
which can always be played from the highest source down; no two lead to the same
board (the vectors by which a move of given length changes a board are linearly
independent). Of two different dice a turn is a pair of sources, one a die, and
only two kinds of pairs coincide: the same stone moved by either die first
without a hit on the way, and two stones borne off by either die. Sets of points
are words of 26 bits.

Axes: `K` turns, 2 sides (the mover's first), 26 places.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Candidates, Spec
from search.model import Game, Move

STONES = 15
OFF, BAR = 0, 25
# Of 320,000 positions of self-play, 24 had more turns, 827 at most. Constructed
# positions can have over 2,000, but never `comb(18, 4) = 3060`; `count` counts.
NUM_CANDIDATES = 512

# The most partial turns after 0, 1, 2 and 3 of a double's four moves: the ways
# to give moves to 15 stones, `comb(14 + moves, moves)`.
_BEGUN = (1, 15, 120, 680)

_START = np.zeros(26, np.int8)
_START[[24, 13, 8, 6]] = 2, 5, 3, 5

# The 21 rolls, higher die first, and their probabilities.
ROLLS = np.array([(a, b) for a in range(1, 7) for b in range(1, a + 1)])
ROLLS = ROLLS.astype(np.int8)
PROBABILITIES = np.where(ROLLS[:, 0] == ROLLS[:, 1], 1 / 36, 2 / 36)
PROBABILITIES = PROBABILITIES.astype(np.float32)


class Position(NamedTuple):
  """A position after the roll of the dice.

  Attributes:
    board: int8 `[2, 26]`, numbers of stones of the player to move and of the
      opponent: borne off (0), on the points 1 to 24 as that player numbers them
      (its home is 1 to 6), and on the bar (25). Point `i` of one player is
      point `25 - i` of the other.
    dice: int8 `[2]`, the higher one first.
    player: int32 scalar, 0 or 1, the player to move.
  """

  board: chex.Array
  dice: chex.Array
  player: chex.Array


def new_board() -> chex.Array:
  """The board at the start, int8 `[2, 26]`."""
  return jnp.stack([jnp.asarray(_START)] * 2)


def is_over(board: chex.Array) -> chex.Array:
  """Whether a player has borne off all stones of int8 `[2, 26]`, bool `[]`."""
  return (board[:, OFF] == STONES).any()


def points(board: chex.Array) -> chex.Array:
  """The points of a win for the first side of int8 `[2, 26]`: float32 scalar.

  1, 2 or 3, from the final board of a game that this side won.
  """
  other = board[1].astype(jnp.int32)
  gammon = other[OFF] == 0
  # The winner's home is the loser's points 19 to 24.
  backgammon = gammon & (other[19:].sum() > 0)
  return 1.0 + gammon.astype(jnp.float32) + backgammon.astype(jnp.float32)


def observe(board: chex.Array) -> chex.Array:
  """Tesauro's raw inputs, from the first side's view.

  Each side has four units for each of its points 1 to 24, `n == 1`, `n >= 2`,
  `n == 3` and `max(n - 3, 0) / 2`, then `n / 2` for the bar and `n / 15` for
  stones borne off. The two units for the player to move are left out, because
  it is always the first side. The dice are left out, because boards are valued
  before the roll.

  Args:
    board: int8 `[..., 2, 26]`.

  Returns:
    float32 `[..., 196]`.

  Source: Tesauro 1992; Sutton and Barto 2018, section 16.1.
  """
  n = board.astype(jnp.float32)
  on = n[..., 1:25]
  extra = jnp.maximum(on - 3.0, 0.0) / 2.0
  units = jnp.stack(
    [*(x.astype(jnp.float32) for x in (on == 1, on >= 2, on == 3)), extra], -1
  )
  units = units.reshape(*n.shape[:-1], 96)
  rest = jnp.stack([n[..., BAR] / 2.0, n[..., OFF] / STONES], -1)
  return jnp.concatenate([units, rest], -1).reshape(*n.shape[:-2], 196)


def candidates(position: Position, number: int = NUM_CANDIDATES) -> chex.Array:
  """All boards that the turn may lead to, each once, int8 `[K, 2, 26]`.

  Both dice must be played if possible, else the higher one, else the lower one;
  of a double, as many of the four moves as possible. The mover's side is first;
  unused rows repeat the first row. If no move is legal, the only board is the
  current one. Turns beyond K are left out (`count` has the total); those that
  leave the rearmost stones in place come first.
  """
  sources, total = _turns(position, number)
  sources = jnp.where(
    (jnp.arange(number) < total)[:, None], sources, sources[:1]
  )
  high, low = position.dice.astype(jnp.int32)
  return _played(position.board, sources, jnp.stack([high, high, low, low]))


def count(position: Position) -> chex.Array:
  """The number of boards that a turn may lead to, int32 scalar, at least 1."""
  return _turns(position, 1)[1]


def _turns(position, number):
  """Sources int32 `[number, 4]`, 0 for no move, and the number of turns.

  The four moves use the dice `high, high, low, low`; those of a double are in
  descending order of their sources.
  """
  high, low = position.dice.astype(jnp.int32)
  side = _side(position.board)
  double = _doubles(side, high)
  mixed = _pairs(side, high, low)
  is_double = high == low
  pick = lambda a, b: jnp.where(is_double, a, b)
  begun, masks = jax.tree.map(pick, double, mixed)
  parents, last, total = _children(masks, number)
  return jnp.concatenate([begun[parents], last[:, None]], -1), total


class _Side(NamedTuple):
  """The mover's side as bit sets: bit `i` stands for its place `i`.

  Attributes:
    own: int32 `[26]`, its numbers of stones.
    occupied: uint32, the places with stones, including the bar.
    blocked: uint32, the points where it may not land.
    blots: bool `[26]`, the points where it would hit.
  """

  own: chex.Array
  occupied: chex.Array
  blocked: chex.Array
  blots: chex.Array


def _side(board):
  theirs, places = board[1, ::-1], jnp.arange(26)
  is_point = (places >= 1) & (places <= 24)
  own = board[0].astype(jnp.int32)
  return _Side(
    own,
    _word((own > 0) & (places > 0)),
    _word((theirs > 1) & is_point),
    (theirs == 1) & is_point,
  )


def _sources(side, occupied, die):
  """The places that a die can be played from, as a bit set.

  `occupied` overrides the places of the side's stones.
  """
  one, die = jnp.uint32(1), die.astype(jnp.uint32)
  beyond = ~((one << (die + 1)) - 1)
  inside = occupied & ~(side.blocked << die) & beyond
  highest = one << (31 - jax.lax.clz(jnp.maximum(occupied, 1)))
  # With a higher die than any point, the rearmost stone is borne off.
  exact = occupied & (one << die)
  home = jnp.where(occupied >> die == 0, highest & occupied, exact)
  found = inside | jnp.where(occupied >> 7 == 0, home, 0)
  bar = jnp.uint32(1 << BAR)
  return jnp.where(occupied & bar != 0, found & bar, found)


def _vacate(occupied, source, die, left):
  """Occupied places after a move that leaves `left` stones at its source."""
  bit = lambda i: jnp.uint32(1) << i.astype(jnp.uint32)
  target = jnp.maximum(source - die, 0)
  occupied = jnp.where(left == 0, occupied & ~bit(source), occupied)
  return occupied | jnp.where(target > 0, bit(target), 0)


def _doubles(side, die):
  """Turns of a double: sources `[680, 3]` of three moves, masks of the last."""
  sources = jnp.zeros((1, 0), jnp.int32)
  occupied, total = side.occupied[None], jnp.int32(1)
  masks = _sources(side, occupied, die)
  for size in _BEGUN[1:]:
    masks = _or_stay(masks, total)
    parents, source, total = _children(masks, size)
    before, occupied = sources[parents], occupied[parents]
    arrived = jnp.sum(before - die == source[:, None], -1)
    gone = jnp.sum(before == source[:, None], -1) + 1
    left = side.own[source] + arrived - gone
    moved = _vacate(occupied, source, die, left)
    occupied = jnp.where(source > 0, moved, occupied)
    sources = jnp.concatenate([before, source[:, None]], -1)
    # Sources are in descending order.
    until = (jnp.uint32(2) << source.astype(jnp.uint32)) - 1
    masks = _sources(side, occupied, die) & until & ~jnp.uint32(1)
    masks = jnp.where(jnp.arange(size) < total, masks, 0)
  return sources, _or_stay(masks, total)


def _or_stay(masks, total):
  """The masks; bit 0, no move, for all turns if none can be continued."""
  stay = (jnp.arange(masks.shape[0]) < total).astype(jnp.uint32)
  return jnp.where((masks == 0).all(), stay, masks)


def _pairs(side, high, low):
  """Sources `[680, 3]`, the higher die's first, and the lower die's masks."""
  places = jnp.arange(26)
  firsts = [_sources(side, side.occupied, die) for die in (high, low)]

  def seconds(first, die, other):
    """Masks `[26]`, by the source of the first die, of the other's sources."""
    left = side.own - 1
    occupied = _vacate(side.occupied, places, die, left)
    masks = _sources(side, occupied, other)
    return jnp.where(first >> places.astype(jnp.uint32) & 1 == 1, masks, 0)

  forth = _flags(seconds(firsts[0], high, low))
  back = _flags(seconds(firsts[1], low, high)).T
  # Rows are the higher die's sources, columns the lower one's.
  pairs = forth | back
  rows, columns = places[:, None], places[None]
  swapped = (rows < columns) & (columns <= low) & pairs.T
  # The same stone moves by the lower die first, or by the higher one first.
  via = places + low - high
  around = jnp.clip(places + low, 0, 25)
  twin = pairs[around, jnp.clip(via, 0, 25)] & (via >= 1)
  quiet = ~side.blots & ~side.blots[jnp.clip(via, 0, 25)]
  same = (twin & quiet)[:, None] & (columns == rows + low) & (rows >= 1)
  pairs &= ~swapped & ~same
  both = _word(pairs)
  only_high = firsts[0] >> places.astype(jnp.uint32) & 1
  only_low = jnp.where(places == 0, jnp.where(firsts[1] == 0, 1, firsts[1]), 0)
  one = jnp.where(firsts[0] != 0, only_high, only_low)
  masks = jnp.where((both == 0).all(), one, both)
  sources = jnp.zeros((_BEGUN[3], 3), jnp.int32).at[:26, 0].set(places)
  return sources, jnp.zeros((_BEGUN[3],), jnp.uint32).at[:26].set(masks)


def _word(flags):
  """bool `[..., 26]` as bit sets, uint32 `[...]`."""
  bits = jnp.asarray(1 << np.arange(26), jnp.uint32)
  bits = bits.reshape((1,) * (flags.ndim - 1) + (26,))
  return jnp.where(flags, bits, 0).sum(-1, dtype=jnp.uint32)


def _flags(words):
  """Bit sets `[N]` as bool `[N, 26]`."""
  return words[:, None] >> jnp.arange(26, dtype=jnp.uint32)[None] & 1 == 1


def _children(masks, size):
  """Lists the set bits of bit sets, uint32 `[P]`, in order.

  Returns the row of each bit, int32 `[size]`, its number, int32 `[size]`, and
  the number of bits, int32 `[]`; entries beyond it are arbitrary.
  """
  counts = jax.lax.population_count(masks).astype(jnp.int32)
  ends = jnp.cumsum(counts)
  place = jnp.arange(size)
  parents = jnp.searchsorted(ends, place, side='right', method='scan')
  parents = jnp.minimum(parents, masks.shape[0] - 1)
  word, rank = masks[parents], place - (ends - counts)[parents]
  bit = jnp.zeros_like(rank)
  for width in (16, 8, 4, 2, 1):
    low = jax.lax.population_count(word & jnp.uint32((1 << width) - 1))
    is_above = rank >= low.astype(jnp.int32)
    rank = jnp.where(is_above, rank - low.astype(jnp.int32), rank)
    word = jnp.where(is_above, word >> width, word)
    bit = jnp.where(is_above, bit + width, bit)
  return parents, jnp.minimum(bit, 25), ends[-1]


def _played(board, sources, dice):
  """Boards `[K, 2, 26]` after moves from `sources [K, 4]` by `dice [4]`."""
  dice = dice[None]
  targets = jnp.where(sources > 0, jnp.maximum(sources - dice, 0), -1)
  places = jnp.arange(26, dtype=jnp.int8)
  at = lambda x: x.astype(jnp.int8)[..., None] == places[None, None]
  goes = at(jnp.where(sources > 0, sources, -1))
  comes = at(targets)
  change = comes.astype(jnp.int8) - goes.astype(jnp.int8)
  own = board[0][None] + change.sum(1, dtype=jnp.int8)
  theirs = board[1][None]
  landed = comes.any(1) & ((places >= 1) & (places <= 24))[None]
  hit = landed[:, ::-1] & (theirs == 1)
  theirs = jnp.where(hit, 0, theirs)
  on_bar = theirs[:, BAR] + hit.sum(-1, dtype=jnp.int8)
  return jnp.stack([own, theirs.at[:, BAR].set(on_bar)], 1)


def _step(position, board, key):
  """Plays the turn that leads to a board and rolls the dice (`Game.step`)."""
  roll = jax.random.randint(key, (2,), 1, 7).astype(jnp.int8)
  return _moved(position, board, jnp.sort(roll, descending=True))


def _moved(position, board, dice):
  was_over = is_over(position.board)
  won = ~was_over & (board[0, OFF] == STONES)
  keep = lambda new, old: jnp.where(was_over, old, new)
  after = Position(
    keep(board[::-1], position.board),
    keep(dice, position.dice),
    keep(1 - position.player, position.player),
  )
  return Move(
    state=after,
    reward=jnp.where(won, points(board), 0.0),
    discount=jnp.where(won | was_over, 0.0, -1.0),
  )


def _init(key):
  """Each player rolls one die; the higher one begins and plays both."""
  first, more = jax.random.randint(
    key, (2,), jnp.array([1, 1]), jnp.array([7, 6])
  )
  # All pairs of different dice are equally likely.
  second = (first - 1 + more) % 6 + 1
  dice = jnp.sort(jnp.stack([first, second]), descending=True)
  player = (second > first).astype(jnp.int32)
  return Position(new_board(), dice.astype(jnp.int8), player)


def game(num_candidates: int = NUM_CANDIDATES) -> Game:
  """The rules, with at most K = `num_candidates` turns listed.

  An action is the board after the turn, int8 `[2, 26]`, the mover's side first:
  one of `candidates`. The next position has the opponent to move and a new
  roll; the outcomes of a turn differ only in their `dice`.

  Raises:
    ValueError: less than 1.
  """
  if num_candidates < 1:
    raise ValueError(f'num_candidates={num_candidates}: must be at least 1')

  def outcomes(position: Position, board: Any):
    moved = jax.vmap(_moved, (None, None, 0))
    return jnp.asarray(PROBABILITIES), moved(position, board, ROLLS)

  return Game(
    init=_init,
    step=_step,
    observe=lambda position: observe(position.board),
    invalid_actions=None,
    player=lambda position: position.player,
    spec=Spec(
      ArraySpec((196,), np.float32),
      Candidates((2, 26), np.int8, num_candidates),
      name='backgammon',
    ),
    candidates=lambda position: candidates(position, num_candidates),
    outcomes=outcomes,
  )
