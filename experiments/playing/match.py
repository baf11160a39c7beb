"""Matches: every opening is played twice, with sides swapped.

Axes: `P` openings, so 2 P games.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.playing.players import Player

# Rounds of draws after which a game is declared to have too few openings.
_TRIES = 64


class Games(NamedTuple):
  """The points of one player in a match, numpy arrays.

  Attributes:
    first: float64 `[P]`, in the games that it began.
    second: float64 `[P]`, in the games that its opponent began.
    plies: of the longest game.
  """

  first: np.ndarray
  second: np.ndarray
  plies: int


class Result(NamedTuple):
  """One line of match.csv.

  Attributes:
    games: twice the number of openings.
    score: share of games won, with a draw as half a win.
    score_se: standard error over openings, because the two games of an opening
      are not independent.
    points: the player's points per game; differs from `score` if a win may
      count more than one point.
    elo: Elo difference for this score; infinite if all games are won or lost.
    elo_low: of its 95% interval; binomial, with half a game added to either
      side, if all openings have the same score.
    elo_high: likewise.
    evaluations: network evaluations per decision of the player if all actions
      are legal; None if they depend on the game's length.
    ms_per_decision: wall milliseconds per decision of the player, in a batch of
      P decisions; None without a network.
  """

  player: str
  opponent: str
  games: int
  wins: int
  draws: int
  losses: int
  score: float
  score_se: float
  points: float
  points_se: float
  elo: float
  elo_low: float
  elo_high: float
  evaluations: int | None
  ms_per_decision: float | None


def openings(game: Any, num: int, plies: int, seed: int = 0) -> Any:
  """Draws P distinct unfinished positions, `[P, ...]`, after random moves.

  With 0 plies, positions repeat.

  Raises:
    ValueError: a number is out of range, or too few positions were found.
  """
  import jax

  from experiments.envs.against import random_opponent

  if num < 1:
    raise ValueError(f'openings={num}: must be 1 or more')
  if plies < 0:
    raise ValueError(f'opening_plies={plies}: must be 0 or more')
  choose = random_opponent(game)

  def draw(key):
    def move(number, carry):
      state, goes_on = carry
      choice_key, step_key = jax.random.split(jax.random.fold_in(key, number))
      after = game.step(state, choose(state, choice_key), step_key)
      return after.state, goes_on & (after.discount != 0)

    return jax.lax.fori_loop(0, plies, move, (game.init(key), True))

  drawn = jax.jit(jax.vmap(draw))
  kept, seen = [], set()
  key = jax.random.key(seed)
  for number in range(_TRIES):
    keys = jax.random.split(jax.random.fold_in(key, number), num)
    states, goes_on = jax.tree.map(np.asarray, drawn(keys))
    for row in range(num):
      state = jax.tree.map(lambda x, row=row: x[row], states)
      # Compares observations, because a state may hold invisible fields.
      seen_by = state if game.outcomes is not None else game.observe(state)
      mark = b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(seen_by))
      if goes_on[row] and (mark not in seen or not plies):
        seen.add(mark)
        kept.append(state)
      if len(kept) == num:
        return jax.tree.map(lambda *rows: np.stack(rows), *kept)
  raise ValueError(
    f'openings={num}: only {len(kept)} unfinished positions of '
    f'{game.spec.name} were found after {plies} random moves; take fewer '
    'openings or more opening_plies'
  )


def play(
  game: Any,
  player: Player,
  opponent: Player,
  starts: Any,
  *,
  seed: int = 0,
  max_plies: int = 1000,
  progress: Callable[[int], None] = lambda ply: None,
) -> Games:
  """Plays every opening (from `openings`) twice, with sides swapped.

  Sides move in turn. Move t has the same random numbers of chance in both games
  of an opening. `progress` is called with the number of each ply before it is
  played.

  Raises:
    ValueError: a side moves twice in a row.
    RuntimeError: a game took more than `max_plies`.
  """
  import jax
  import jax.numpy as jnp

  number = jax.tree.leaves(starts)[0].shape[0]

  @jax.jit
  def advance(states, action, key):
    keys = jax.random.split(key, number)
    move = jax.vmap(game.step)(states, action, keys)
    return move.state, move.reward, move.discount

  # `mine` are the games in which the player is to move; the two halves swap
  # names at every ply.
  mine = theirs = jax.tree.map(jnp.asarray, starts)
  total = {'mine': np.zeros(number), 'theirs': np.zeros(number)}
  over = {'mine': np.zeros(number, bool), 'theirs': np.zeros(number, bool)}
  key = jax.random.key(seed)
  for ply in range(max_plies):
    if over['mine'].all() and over['theirs'].all():
      # After an even number of plies the names are those of the start.
      names = ('mine', 'theirs') if ply % 2 == 0 else ('theirs', 'mine')
      return Games(total[names[0]], total[names[1]], ply)
    progress(ply)
    chance, *own = jax.random.split(jax.random.fold_in(key, ply), 3)
    after = []
    for mover, states, sign, own_key in (
      (player, mine, 1, own[0]),
      (opponent, theirs, -1, own[1]),
    ):
      side = 'mine' if sign == 1 else 'theirs'
      decided = mover.decide(mover.params, own_key, time_step(game, states))
      states, reward, discount = advance(states, decided.action, chance)
      discount = np.asarray(discount)
      if np.any((discount > 0) & ~over[side]):
        raise ValueError(
          f'{game.spec.name}: a side moved twice in a row; in a match sides '
          'must alternate'
        )
      total[side] += sign * np.where(over[side], 0, np.asarray(reward))
      over[side] |= discount == 0
      after.append(states)
    theirs, mine = after
    total = {'mine': total['theirs'], 'theirs': total['mine']}
    over = {'mine': over['theirs'], 'theirs': over['mine']}
  raise RuntimeError(
    f'{game.spec.name}: a game did not end within {max_plies} moves'
  )


def time_step(game: Any, states: Any) -> Any:
  """Positions `[B, ...]` as a batched `TimeStep` for planners."""
  import jax
  import jax.numpy as jnp

  from search.model import TimeStep

  batch = jax.tree.leaves(states)[0].shape[0]
  invalid = None
  if game.invalid_actions is not None:
    invalid = jax.vmap(game.invalid_actions)(states)
  no = jnp.zeros((batch,), bool)
  return TimeStep(
    observation=jax.tree.map(jnp.asarray, states),
    reward=jnp.zeros((batch,)),
    discount=jnp.ones((batch,)),
    is_first=no,
    truncated=no,
    invalid_actions=invalid,
  )


def measure(game: Any, player: Player, states: Any) -> float:
  """Wall milliseconds per decision in a batch, without compilation."""
  import jax

  timestep = time_step(game, states)
  number = timestep.reward.shape[0]
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    output = player.decide(player.params, jax.random.key(0), timestep)
    jax.block_until_ready(output.action)
    seconds.append(time.perf_counter() - start)
  return 1e3 * min(seconds[1:]) / number


def elo(score: float) -> float:
  """The rating difference at which a score is expected, in Elo points.

  >>> [round(elo(score)) for score in (0.5, 0.75)]
  [0, 191]
  """
  if score <= 0 or score >= 1:
    return math.copysign(math.inf, score - 0.5)
  return 400 * math.log10(score / (1 - score))


def summarise(
  player: Player,
  opponent: Player,
  games: Games,
  ms_per_decision: float | None,
) -> Result:
  """Summarises a match as a line of the table; errors are over openings."""
  points = np.stack([games.first, games.second], axis=1)
  scores = np.sign(points) / 2 + 0.5
  error = lambda x: (
    float(np.std(x.mean(1), ddof=1) / np.sqrt(len(x)))
    if len(x) > 1
    else math.nan
  )
  score, score_se = float(scores.mean()), error(scores)
  # Half a game is added to either side, so the interval is finite at one end
  # even if all games are won.
  middle, width = (scores.sum() + 0.5) / (scores.size + 1), score_se
  if not width > 0:
    width = math.sqrt(middle * (1 - middle) / (scores.size + 1))
  return Result(
    player=player.name,
    opponent=opponent.name,
    games=points.size,
    wins=int(np.sum(points > 0)),
    draws=int(np.sum(points == 0)),
    losses=int(np.sum(points < 0)),
    score=score,
    score_se=score_se,
    points=float(points.mean()),
    points_se=error(points),
    elo=elo(score),
    elo_low=elo(min(score, middle) - 1.96 * width),
    elo_high=elo(max(score, middle) + 1.96 * width),
    evaluations=player.evaluations,
    ms_per_decision=ms_per_decision,
  )
