"""Scores of Atari-100k: a random player, a human, and two published agents.

Raw scores after 100,000 decisions (400,000 frames). Random and human are those
of Mnih et al. 2015 and its successors; MuZero and EfficientZero are from Ye et
al. 2021 (EfficientZero: 3 runs of 32 evaluations a game). All are as tabulated
by Alonso et al. 2024 (DIAMOND), Table 6.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.report.statistics import bootstrap_interval, iqm


class Scores(NamedTuple):
  """Raw scores of one game."""

  random: float
  human: float
  muzero: float
  efficientzero: float


GAMES = {
  'Alien': Scores(227.8, 7127.7, 530.0, 808.5),
  'Amidar': Scores(5.8, 1719.5, 38.8, 148.6),
  'Assault': Scores(222.4, 742.0, 500.1, 1263.1),
  'Asterix': Scores(210.0, 8503.3, 1734.0, 25557.8),
  'BankHeist': Scores(14.2, 753.1, 192.5, 351.0),
  'BattleZone': Scores(2360.0, 37187.5, 7687.5, 13871.2),
  'Boxing': Scores(0.1, 12.1, 15.1, 52.7),
  'Breakout': Scores(1.7, 30.5, 48.0, 414.1),
  'ChopperCommand': Scores(811.0, 7387.8, 1350.0, 1117.3),
  'CrazyClimber': Scores(10780.5, 35829.4, 56937.0, 83940.2),
  'DemonAttack': Scores(152.1, 1971.0, 3527.0, 13003.9),
  'Freeway': Scores(0.0, 29.6, 21.8, 21.8),
  'Frostbite': Scores(65.2, 4334.7, 255.0, 296.3),
  'Gopher': Scores(257.6, 2412.5, 1256.0, 3260.3),
  'Hero': Scores(1027.0, 30826.4, 3095.0, 9315.9),
  'Jamesbond': Scores(29.0, 302.8, 87.5, 517.0),
  'Kangaroo': Scores(52.0, 3035.0, 62.5, 724.1),
  'Krull': Scores(1598.0, 2665.5, 4890.8, 5663.3),
  'KungFuMaster': Scores(258.5, 22736.3, 18813.0, 30944.8),
  'MsPacman': Scores(307.3, 6951.6, 1265.6, 1281.2),
  'Pong': Scores(-20.7, 14.6, -6.7, 20.1),
  'PrivateEye': Scores(24.9, 69571.3, 56.3, 96.7),
  'Qbert': Scores(163.9, 13455.0, 3952.0, 13781.9),
  'RoadRunner': Scores(11.5, 7845.0, 2500.0, 17751.3),
  'Seaquest': Scores(68.4, 42054.7, 208.0, 1100.2),
  'UpNDown': Scores(533.4, 11693.2, 2896.9, 17264.2),
}


def game_of(env_name: str) -> str | None:
  """The game of an environment's name, or None if it is none of the 26.

  Takes both of envpool's spellings: `Pong-v5`, `PongNoFrameskip-v4`.
  """
  name = env_name.rpartition('-v')[0] or env_name
  name = name.removesuffix('NoFrameskip')
  return name if name in GAMES else None


def human_normalised(game: str, score: float) -> float:
  """`(score - random) / (human - random)`: 0 is random, 1 human."""
  known = GAMES[game]
  return (score - known.random) / (known.human - known.random)


def score_table(scores: Mapping[str, Sequence[float]]) -> list[list[str]]:
  """Human-normalised scores of one method, next to published ones.

  Rows of text, the header first: a row a game, then mean, median and IQM over
  exactly these games with stratified bootstrap intervals. Published numbers are
  means of games without known intervals. `scores` maps games to raw scores of
  runs.
  """
  aggregates = {
    'mean': lambda s: np.mean([np.mean(x) for x in s]),
    'median': lambda s: np.median([np.mean(x) for x in s]),
    'IQM': lambda s: iqm(np.concatenate(s)),
  }
  printed = ('muzero', 'efficientzero')
  table = [['game', 'runs', 'score', 'normalised', 'MuZero', 'EfficientZero']]
  ours, theirs = [], {name: [] for name in printed}
  for game in sorted(scores):
    ours.append(np.asarray([human_normalised(game, s) for s in scores[game]]))
    for name in printed:
      known = getattr(GAMES[game], name)
      theirs[name].append(np.asarray([human_normalised(game, known)]))
    table.append(
      [
        game,
        str(len(scores[game])),
        f'{np.mean(scores[game]):.1f}',
        f'{np.mean(ours[-1]):.3f}',
        *(f'{theirs[name][-1][0]:.3f}' for name in printed),
      ]
    )
  for name, aggregate in aggregates.items():
    low, high = bootstrap_interval(ours, aggregate)
    table.append(
      [
        f'{name} of {len(ours)}',
        str(sum(map(len, ours))),
        '',
        f'{aggregate(ours):.3f} [{low:.3f}, {high:.3f}]',
        *(f'{aggregate(theirs[n]):.3f}' for n in printed),
      ]
    )
  return table
