"""Aggregates over runs and games, with their intervals.

Agarwal et al. 2021, Deep RL at the edge of the statistical precipice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def iqm(scores: Any) -> float:
  """Interquartile mean of `[...]`, without the lowest and highest quarter.

  `scores` are all runs of all games; a quarter of them is rounded down.

  >>> iqm([0, 1, 2, 3, 4, 5, 6, 1000])
  3.5
  """
  from scipy import stats

  return float(stats.trim_mean(np.ravel(scores), 0.25))


def bootstrap_interval(
  strata: Sequence[Any],
  statistic: Callable[[list[np.ndarray]], Any],
  *,
  level: float = 0.95,
  resamples: int = 2000,
  seed: int = 0,
) -> tuple[Any, Any]:
  """Percentile interval of a statistic, by a stratified bootstrap.

  Runs are drawn with replacement within each stratum (a game), so that every
  resample has all games.

  Args:
    strata: one array `[S_i, ...]` of `S_i` runs each.
    statistic: of a list of such arrays; a scalar or an array.

  Returns:
    Lower and upper end, shaped like the statistic. One run a stratum has no
    spread: both are then the statistic.

  Raises:
    ValueError: a stratum is empty.

  >>> mean = lambda strata: np.mean([s.mean() for s in strata])
  >>> low, high = bootstrap_interval([[0, 1, 2], [10, 10, 10]], mean)
  >>> float(low), float(high)
  (5.0, 6.0)
  """
  strata = [np.asarray(s, np.float64) for s in strata]
  if not strata or min(map(len, strata)) == 0:
    raise ValueError(
      f'strata={[len(s) for s in strata]}: each must have at least one run'
    )
  rng = np.random.default_rng(seed)
  drawn = [
    statistic([s[rng.integers(len(s), size=len(s))] for s in strata])
    for _ in range(resamples)
  ]
  tail = (1 - level) / 2
  low, high = np.quantile(np.asarray(drawn), (tail, 1 - tail), axis=0)
  return low, high


def mean_interval(values: Any, level: float = 0.95) -> tuple[float, float]:
  """Student's interval of the mean of independent values, `[S]`.

  For a handful of seeds, where the bootstrap's is too narrow. NaN for one
  value.

  >>> [round(x, 2) for x in mean_interval([1, 2, 3])]
  [-0.48, 4.48]
  """
  from scipy import stats

  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return math.nan, math.nan
  mean, error = mean_error(values)
  half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * error)
  return mean - half, mean + half


def mean_error(values: Any, alone: float = 0.0) -> tuple[float, float]:
  """The mean of independent values `[S]` and its standard error.

  `alone` is the error of a single value.

  >>> mean_error([1, 3])
  (2.0, 1.0)
  """
  if len(values) > 1:
    alone = float(np.std(values, ddof=1) / math.sqrt(len(values)))
  return float(np.mean(values)), alone


def probability_of_improvement(
  scores: Mapping[str, Any], others: Mapping[str, Any]
) -> float:
  """How likely a run beats another's on a game, averaged over the games.

  `P(X > Y) + P(X = Y) / 2` over all pairs of runs; both arguments map the same
  games to scores of runs, `[S]`.

  Raises:
    ValueError: the games differ, or there are none.

  >>> probability_of_improvement({'pong': [1, 3]}, {'pong': [0, 3]})
  0.625
  """
  if set(scores) != set(others) or not scores:
    raise ValueError(
      f'games={sorted(scores)} and {sorted(others)}: must be the same games, '
      'at least one'
    )
  chances = []
  for game in scores:
    x = np.asarray(scores[game])[:, None]
    y = np.asarray(others[game])[None]
    chances.append(np.mean((x > y) + 0.5 * (x == y)))
  return float(np.mean(chances))


def performance_profile(scores: Mapping[str, Any], taus: Any) -> np.ndarray:
  """Share of runs above each score, averaged over games.

  Args:
    scores: game -> (normalised) scores of its runs, `[S]`.
    taus: `[P]` scores.

  Returns:
    float64 `[P]` in [0, 1], never rising.
  """
  above = [
    np.mean(np.asarray(s)[:, None] > np.asarray(taus), axis=0)
    for s in scores.values()
  ]
  return np.mean(above, axis=0)
