"""The exact rules of games, by name."""

import difflib

from search.model import Game


def make_game(name: str) -> Game:
  """The rules of a game.

  The name is `backgammon`, `connect_four`, `tic_tac_toe`, or one of
  `pgx_games.NAMES` such as `othello` and `go_9x9`.

  Raises:
    ValueError: the name is unknown, or a library is not installed.
  """
  from experiments.envs import (
    backgammon,
    connect_four,
    pgx_games,
    tic_tac_toe,
  )

  makers = {
    'backgammon': backgammon.game,
    'connect_four': connect_four.game,
    'tic_tac_toe': tic_tac_toe.game,
  }
  if name in makers:
    return makers[name]()
  if name in pgx_games.NAMES:
    return pgx_games.make_pgx(name)
  known = (*makers, *pgx_games.NAMES)
  near = difflib.get_close_matches(name, known, 1)
  hint = f'; did you mean {near[0]}?' if near else ''
  raise ValueError(
    f'env=self_play:{name}: unknown; must be one of {", ".join(known)}{hint}'
  )
