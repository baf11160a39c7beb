"""Board games of pgx (Koyama et al. 2023) as `Game`s; an optional extra.

A position is pgx's own state without its observation, which is recomputed when
needed, because replays and search trees store positions. As in pgx, all actions
are legal when a game is over.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Discrete, Spec
from search.model import Game, Move

# Games of two players with perfect information and without chance.
NAMES = (
  'animal_shogi',
  'chess',
  'gardner_chess',
  'go_9x9',
  'go_19x19',
  'hex',
  'othello',
  'shogi',
)


class Position(NamedTuple):
  """A position: pgx's state, its observation replaced by one never read."""

  state: Any


def make_pgx(name: str) -> Game:
  """The rules of one of `NAMES`.

  Raises:
    ValueError: an unknown name, or pgx is not installed.
  """
  if name not in NAMES:
    raise ValueError(f'game={name!r}: must be one of {", ".join(NAMES)}')
  try:
    import pgx
  except ImportError as error:
    raise ValueError(
      f"game={name!r}: needs pgx; run pip install 'outplay[games]'"
    ) from error
  env = pgx.make(name)

  def keep(state: Any) -> Position:
    return Position(state.replace(observation=jnp.zeros((1,), bool)))

  def step(position, action, key):
    before = position.state
    over = before.terminated | before.truncated
    state: Any = env.step(before, action, key)
    same = state.current_player == before.current_player
    ended = over | state.terminated | state.truncated
    return Move(
      # Rewards belong to the move that led here, not to the position.
      state=keep(state.replace(rewards=jnp.zeros_like(state.rewards))),
      reward=jnp.where(over, 0.0, state.rewards[before.current_player]),
      discount=jnp.where(ended, 0.0, jnp.where(same, 1.0, -1.0)),
    )

  shape = jax.eval_shape(env.init, jax.random.key(0)).observation.shape
  return Game(
    init=lambda key: keep(env.init(key)),
    step=step,
    observe=lambda p: env.observe(p.state).astype(jnp.float32),
    invalid_actions=lambda p: ~p.state.legal_action_mask,
    player=lambda p: p.state.current_player.astype(jnp.int32),
    spec=Spec(
      ArraySpec(shape, np.float32),
      Discrete(env.num_actions),
      masks_actions=True,
      name=name,
    ),
  )
