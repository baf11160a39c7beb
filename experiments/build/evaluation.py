"""Plays the checkpoints of a run with several budgets of search."""

import os
import pathlib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.build import acting
from experiments.build.material import Experiment
from experiments.files import tables
from experiments.report import terminal
from experiments.runtime import metrics


class Row(NamedTuple):
  """One line of evaluation.csv; a field that is None in all rows has no column.

  Attributes:
    checkpoint: `final`, `best` or `early`.
    planner: the search's rule, or `network` without one; or a player's name.
    simulations: a decision; 0 is the network alone.
    return_mean: undiscounted, unclipped.
    return_se: standard error over episodes.
    length_mean: decisions.
    seconds_per_decision: wall time of all play, without compilation, over the
      counted decisions of all copies.
    dynamics: `exact` or `learned`, of planners over an actor and a critic.
    candidates: K of their first stage.
    model_steps: steps of the dynamics a decision.
    gain: of the return over the policy's own, from the same starts.
    gain_se: standard error of the paired differences.
  """

  checkpoint: str
  planner: str
  simulations: int | None
  episodes: int
  return_mean: float
  return_se: float
  length_mean: float
  seconds_per_decision: float | None = None
  dynamics: str | None = None
  candidates: int | None = None
  model_steps: int | None = None
  gain: float | None = None
  gain_se: float | None = None


def _columns(rows: Sequence[Row]) -> list[str]:
  known = zip(Row._fields, zip(*rows, strict=True), strict=True)
  return [name for name, cells in known if any(x is not None for x in cells)]


def write_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes evaluation.csv, atomically."""
  columns = _columns(rows)
  lines = [[getattr(row, name) for name in columns] for row in rows]
  tables.write_lines(path, [columns, *lines])


_SHOWN = {
  'checkpoint': lambda row: row.checkpoint,
  'planner': lambda row: row.planner,
  'simulations': lambda row: str(row.simulations),
  'return': lambda row: f'{row.return_mean:.3f} ± {row.return_se:.3f}',
  'gain': lambda row: f'{row.gain:+.3f} ± {row.gain_se:.3f}',
  'episodes': lambda row: str(row.episodes),
  'model_steps': lambda row: str(row.model_steps),
  'ms': lambda row: f'{1e3 * row.seconds_per_decision:.2f}',
}


def print_rows(rows: Sequence[Row]) -> None:
  """Prints a table."""
  known = {*_columns(rows), 'return', 'ms'}
  columns = [name for name in _SHOWN if name in known]
  lines = [[_SHOWN[name](row) for name in columns] for row in rows]
  terminal.print_table(
    [name.replace('_', ' ') for name in columns],
    lines,
    'return of an episode; ms: wall milliseconds a decision',
  )


def run(env: Any, play: Callable, params: Any, episodes: int, seed: int) -> Any:
  """Plays whole episodes; equal seeds have equal starts for all players.

  `play` is `(params, key, timestep) -> action`, compiled. On the host, episodes
  are rounded up to a multiple of the copies. Returns
  `runtime.evaluate.Episodes`.
  """
  import jax

  from experiments.runtime import evaluate as playing
  from search.model import Environment

  key = jax.random.fold_in(jax.random.key(seed), 7)
  shared = {'key': key, 'num_episodes': episodes}
  if isinstance(env, Environment):
    return playing.on_device(env, play, params, **shared)
  return playing.on_host(env, play, params, seed=seed + 1_000_003, **shared)


def timed(
  env: Any, play: Callable, params: Any, episodes: int, seed: int
) -> tuple[Any, float]:
  """`run`, and the wall seconds that it took without compilation."""
  import jax

  from search.model import Environment

  # First a call that is not timed, so that timings hold no compilation.
  if isinstance(env, Environment):
    run(env, play, params, episodes, seed)
  else:
    simulator = env.start(0)
    key = jax.random.fold_in(jax.random.key(seed), 7)
    play(params, key, simulator.reset()).block_until_ready()
    simulator.close()
  start = time.perf_counter()
  played = run(env, play, params, episodes, seed)
  return played, time.perf_counter() - start


def summarise(
  checkpoint: str,
  planner: str,
  simulations: int | None,
  played: Any,
  seconds: float | None = None,
) -> Row:
  """The row of a player's episodes, from `run`; see `Row`."""
  summary = played.summary()
  if seconds is not None:
    seconds /= max(float(played.lengths.sum()), 1.0)
  return Row(
    checkpoint=checkpoint,
    planner=planner,
    simulations=simulations,
    episodes=len(played.returns),
    return_mean=summary['eval_return'],
    return_se=summary['eval_return_se'],
    length_mean=summary['eval_length'],
    seconds_per_decision=seconds,
  )


def evaluate(
  experiment: Experiment,
  env: Any,
  agent: Any,
  checkpoints: Mapping[str, Any],
  *,
  simulations: Sequence[int],
  episodes: int,
  rule: str | None = None,
  seed: int = 0,
) -> list[Row]:
  """Plays every checkpoint (name to params) with every budget.

  0 simulations are the network alone. The simulators are seeded alike for all,
  so that differences are not luck.

  Raises:
    UserError: the agent does not search as asked.
  """
  players = deciders(experiment, agent, simulations, rule)
  return play_all(env, players, checkpoints, episodes, seed)


def deciders(
  experiment: Experiment,
  agent: Any,
  simulations: Sequence[int],
  rule: str | None = None,
) -> list[tuple[str, int, Callable]]:
  """Name, simulations and compiled function for each budget; see `evaluate`.

  Raises:
    UserError: the agent does not search as asked.
  """
  found = []
  for budget in simulations:
    label = 'policy' if agent.exploit is not None else 'network'
    if budget:
      label = rule or experiment.config.search.rule
    decide = acting.make_decider(experiment, agent, budget, rule)
    found.append((label, budget, decide))
  return found


def play_all(
  env: Any,
  players: Sequence[tuple[str, int, Callable]],
  checkpoints: Mapping[str, Any],
  episodes: int,
  seed: int = 0,
) -> list[Row]:
  """Plays every checkpoint with each of `deciders`, from the same starts."""
  rows = []
  total = len(players) * len(checkpoints)
  bar = metrics.progress(total, columns=('return',))
  for label, budget, decide in players:
    play = lambda *args, decide=decide: decide(*args)[0]
    for name, params in checkpoints.items():
      played, seconds = timed(env, play, params, episodes, seed)
      rows.append(summarise(name, label, budget, played, seconds))
      bar.write(len(rows), {'return': rows[-1].return_mean})
  bar.close()
  rows.sort(key=lambda row: list(checkpoints).index(row.checkpoint))
  return rows


def command(
  workdir: str | os.PathLike, experiment: Experiment, name: str = 'play'
) -> str:
  """The shell command that plays a run by the launcher `name`."""
  from experiments.envs import names

  flag = names.flag(experiment.env_name, experiment.env.options)
  place = shlex.quote(str(workdir))
  return f'python -m experiments.{name} --workdir={place}{flag}'
