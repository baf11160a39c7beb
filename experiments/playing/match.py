"""Matches: the same openings twice, each player with either side once.

Axes: `P` openings, so 2 P games.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.playing.players import Player

# Draws of openings before the game is called too short for them.
_TRIES = 64


class Games(NamedTuple):
  """Points of one player, numpy arrays.

  Attributes:
    first: float64 `[P]`, in the games that it began.
    second: float64 `[P]`, in those that its opponent began.
    plies: the length of the longest.
  """

  first: np.ndarray
  second: np.ndarray
  plies: int


class Result(NamedTuple):
  """One line of match.csv.

  Attributes:
    player: its name.
    opponent: its name.
    games: twice the number of openings.
    wins: of the player.
    draws: games without points.
    losses: of the player.
    score: wins and half the draws, over the games.
    score_se: standard error over openings, whose two games are not
      independent.
    points: a game; where a win counts more than one it says more than `score`.
    points_se: standard error likewise.
    elo: difference that the score stands for; infinite where all is won.
    elo_low: end of its 95% interval; where all openings went alike it is that
      of a binomial with half a point more on either side.
    elo_high: the other end.
    evaluations: of the player's network a decision, all actions legal; None
      where they depend on the game's length.
    ms_per_decision: wall time of the player's, in a batch of P decisions;
      None for players without a network.
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
  """Different positions after so many random moves, none of them over.

  Args:
    game: the rules.
    num: P, at least 1.
    plies: random moves, at least 0; where 0 leads to one position only, it is
      given as often as asked for.
    seed: of the moves.

  Returns:
    Positions, a pytree of `[P, ...]`.

  Raises:
    ValueError: a number is out of range, or there are not so many.
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
      # What players see, for positions may hold a name that nobody sees.
      seen_by = state if game.outcomes is not None else game.observe(state)
      mark = b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(seen_by))
      if goes_on[row] and (mark not in seen or not plies):
        seen.add(mark)
        kept.append(state)
      if len(kept) == num:
        return jax.tree.map(lambda *rows: np.stack(rows), *kept)
  raise ValueError(
    f'openings={num}: after {plies} random moves {game.spec.name} has '
    f'{len(kept)} that are not over; take fewer, or more opening_plies'
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
  """Plays every opening twice, with sides changed.

  Both games of an opening meet the same chances: move t of either has the same
  random numbers.

  Args:
    game: the rules; sides move in turn.
    player: whose points are counted.
    opponent: the other one.
    starts: from `openings`.
    seed: of chance and of players that draw.
    max_plies: after which a game that goes on is given up with an error.
    progress: told the ply before it is played.

  Raises:
    ValueError: a side moves twice.
    RuntimeError: `max_plies` did not suffice.
  """
  import jax
  import jax.numpy as jnp

  number = jax.tree.leaves(starts)[0].shape[0]

  @jax.jit
  def advance(states, action, key):
    keys = jax.random.split(key, number)
    move = jax.vmap(game.step)(states, action, keys)
    return move.state, move.reward, move.discount

  # `mine` are the games in which the player is to move; they change names
  # with every ply.
  mine = theirs = jax.tree.map(jnp.asarray, starts)
  total = {'mine': np.zeros(number), 'theirs': np.zeros(number)}
  over = {'mine': np.zeros(number, bool), 'theirs': np.zeros(number, bool)}
  key = jax.random.key(seed)
  for ply in range(max_plies):
    if over['mine'].all() and over['theirs'].all():
      # After an even number of plies everything has its first name again.
      names = ('mine', 'theirs') if ply % 2 == 0 else ('theirs', 'mine')
      return Games(total[names[0]], total[names[1]], ply)
    progress(ply)
    chance, *own = jax.random.split(jax.random.fold_in(key, ply), 3)
    after = []
    for who, states, sign, own_key in (
      (player, mine, 1, own[0]),
      (opponent, theirs, -1, own[1]),
    ):
      side = 'mine' if sign == 1 else 'theirs'
      decided = who.decide(who.params, own_key, time_step(game, states))
      states, reward, discount = advance(states, decided.action, chance)
      discount = np.asarray(discount)
      if np.any((discount > 0) & ~over[side]):
        raise ValueError(f'{game.spec.name}: a side may move twice in a match')
      total[side] += sign * np.where(over[side], 0, np.asarray(reward))
      over[side] |= discount == 0
      after.append(states)
    theirs, mine = after
    total = {'mine': total['theirs'], 'theirs': total['mine']}
    over = {'mine': over['theirs'], 'theirs': over['mine']}
  raise RuntimeError(
    f'{game.spec.name}: a game is not over after {max_plies} moves'
  )


def time_step(game: Any, states: Any) -> Any:
  """What planners are shown of positions `[B, ...]`: a batched `TimeStep`."""
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
  """Wall milliseconds of a decision in a batch, compilation excluded."""
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
  """A line of the table; intervals are over openings."""
  points = np.stack([games.first, games.second], axis=1)
  scores = np.sign(points) / 2 + 0.5
  error = lambda x: (
    float(np.std(x.mean(1), ddof=1) / np.sqrt(len(x)))
    if len(x) > 1
    else math.nan
  )
  score, score_se = float(scores.mean()), error(scores)
  # Half a point on either side: an interval that ends where all is won.
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
