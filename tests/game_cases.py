"""Small agents that learn games by self-play, and batches for them."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import small_agents

from agents import alphazero, td_gammon
from agents.core import planning
from agents.core.types import (
  ArraySpec,
  Candidates,
  Experience,
  Sample,
  Spec,
  Trajectory,
)
from experiments.envs import games
from experiments.envs.self_play import self_play
from experiments.runtime import sources
from networks import policy_value
from search.model import Game, Move, TimeStep

B, A, P = 4, 9, 2
ENV = self_play(games.make_game('tic_tac_toe'))
GAME = ENV.spec.game
SEARCH = planning.SearchConfig(rule='gumbel', num_simulations=8)
CONFIG = alphazero.Config(
  network=policy_value.NetworkConfig(hidden_sizes=(8,)),
  search=SEARCH,
  positions=P,
  td_steps=3,
  warmup_updates=0,
)


def make_batch(config, spec, seed=0):
  """Windows of random play: of row 1 the game ends at step 1."""
  del spec
  rng = np.random.default_rng(1 + seed)
  length = config.window
  stones = rng.random((B, length, 9)) < 0.4
  first = rng.random((B, length, 9)) < 0.5
  board = type(GAME.init(jax.random.key(0)))(
    jnp.asarray(np.stack([stones & first, stones & ~first], 2)),
    jnp.asarray(rng.integers(0, 2, (B, length)), jnp.int32),
  )
  invalid = stones.copy()
  invalid[..., 0] = False
  discount, valid = np.ones((B, length)), np.ones((B, length), bool)
  discount[1, 1], valid[1, 2:] = 0, False
  slots = config.search.num_samples if config.sampled else A
  weights = rng.random((B, length, slots)) * ~invalid[..., :slots]
  extras = {
    'search_policy': weights / weights.sum(-1, keepdims=True),
    'search_value': rng.uniform(-1, 1, (B, length)),
  }
  extras = {k: jnp.asarray(x, jnp.float32) for k, x in extras.items()}
  if config.sampled:
    extras['sampled_actions'] = jnp.broadcast_to(
      jnp.arange(slots), (B, length, slots)
    )
  timestep = TimeStep(
    observation=board,
    reward=jnp.asarray(rng.normal(size=(B, length)), jnp.float32),
    discount=jnp.asarray(discount, jnp.float32),
    is_first=jnp.zeros((B, length), bool),
    truncated=jnp.zeros((B, length), bool),
    invalid_actions=jnp.asarray(invalid),
  )
  sample = Sample(
    jnp.arange(B),
    jnp.ones(B, jnp.int32),
    jnp.float32([1, 0.5, 0.25, 0.75]),
    jnp.zeros(B),
  )
  action = jnp.zeros((B, length), jnp.int32)
  return Trajectory(
    Experience(timestep, action, extras), jnp.asarray(valid), sample
  )


STREAMS = 3


class Race(NamedTuple):
  """Distances int8 `[2]`, the mover's first; a roll of 1 or 2; who moves."""

  board: chex.Array
  roll: chex.Array
  player: chex.Array


def race() -> Game:
  """A stone may go by 1 or by the roll; who is far behind loses 2 or 3."""

  def moved(state, board, roll):
    over = (state.board <= 0).any()
    won = ~over & (board[0] <= 0)
    points = 1.0 + (board[1] > 2) + (board[1] > 3)
    keep = lambda new, old: jnp.where(over, old, new)
    after = Race(
      keep(board[::-1], state.board),
      keep(roll, state.roll),
      keep(1 - state.player, state.player),
    )
    reward = jnp.where(won, points, 0.0)
    return Move(after, reward, jnp.where(won | over, 0.0, -1.0))

  def roll(key):
    return jax.random.randint(key, (), 1, 3).astype(jnp.int8)

  def candidates(state):
    steps = jnp.stack([jnp.int8(1), state.roll, jnp.int8(1), jnp.int8(1)])
    after = state.board[0] - steps
    return jnp.stack([after, jnp.full((4,), state.board[1])], -1)

  def outcomes(state, board):
    rolls = jnp.array([1, 2], jnp.int8)
    each = jax.vmap(moved, (None, None, 0))(state, board, rolls)
    return jnp.array([0.5, 0.5]), each

  return Game(
    init=lambda key: Race(jnp.array([4, 4], jnp.int8), roll(key), jnp.int32(0)),
    step=lambda state, board, key: moved(state, board, roll(key)),
    observe=lambda state: state.board.astype(jnp.float32) / 4.0,
    invalid_actions=None,
    player=lambda state: state.player,
    spec=Spec(
      ArraySpec((2,), np.float32), Candidates((2,), np.int8, 4), name='race'
    ),
    candidates=candidates,
    outcomes=outcomes,
  )


RACE = self_play(race())
RACER = td_gammon.Config(hidden=3, learning_rate=1.5, chunk=3, streams=STREAMS)


def make_row(config, spec, seed=0):
  """The third row of an untrained agent's play, where no game begins."""
  agent = small_agents.make_agent(td_gammon, config, spec)
  source = sources.from_env(RACE, agent, STREAMS)
  key = jax.random.key(seed)
  play, state = jax.jit(source.init)(key), agent.init(key)
  for i in range(3):
    play, row, _ = source.next(play, state, i, jax.random.fold_in(key, i))
  return row
