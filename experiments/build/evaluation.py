"""Plays the checkpoints of a run with several budgets of search."""

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.build import acting
from experiments.build.experiment import Experiment
from experiments.report import terminal
from experiments.runtime import metrics


class Row(NamedTuple):
  """One line of evaluation.csv.

  Attributes:
    checkpoint: `final`, `best` or `early`.
    planner: the search's rule, or `network` without one.
    simulations: a decision; 0 is the network alone.
    episodes: whole episodes played.
    return_mean: undiscounted, unclipped.
    return_se: standard error over episodes.
    length_mean: decisions.
    seconds_per_decision: wall time over the counted decisions of all copies,
      compilation excluded; what is played beyond the counted episodes is in.
  """

  checkpoint: str
  planner: str
  simulations: int
  episodes: int
  return_mean: float
  return_se: float
  length_mean: float
  seconds_per_decision: float


def write_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes evaluation.csv, atomically."""
  metrics.write_lines(path, [Row._fields, *rows])


def print_rows(rows: Sequence[Row]) -> None:
  """A table for people."""
  terminal.print_table(
    ('checkpoint', 'planner', 'simulations', 'return', 'episodes', 'ms'),
    [
      (
        row.checkpoint,
        row.planner,
        str(row.simulations),
        f'{row.return_mean:.3f} ± {row.return_se:.3f}',
        str(row.episodes),
        f'{1e3 * row.seconds_per_decision:.2f}',
      )
      for row in rows
    ],
    'return of an episode; ms: wall milliseconds a decision',
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
  """Plays every checkpoint with every budget.

  The simulators are seeded alike for all of them, so that differences are
  not of luck.

  Args:
    experiment: what was run.
    env: from `build.make_env(training=False)`.
    agent: from `build.make_agent`.
    checkpoints: name to the agent's `params`.
    simulations: budgets; 0 is the network alone.
    episodes: for each row.
    rule: another search rule than the agent's.
    seed: of simulators and planner.

  Returns:
    Rows in that order.

  Raises:
    UserError: the agent does not search as is asked.
  """
  import jax

  from experiments.runtime import evaluate as playing
  from experiments.runtime import metrics
  from search.model import Environment

  rows = []
  total = len(simulations) * len(checkpoints)
  bar = metrics.progress(total, columns=('return',))
  for label, budget, play in _planners(experiment, agent, simulations, rule):
    for name, params in checkpoints.items():
      key = jax.random.fold_in(jax.random.key(seed), 7)
      run = lambda play, count, params=params, key=key: (
        playing.on_device(env, play, params, key=key, num_episodes=count)
        if isinstance(env, Environment)
        else playing.on_host(
          env, play, params, key=key, num_episodes=count, seed=seed + 1_000_003
        )
      )
      # First a call that is not timed, so that timings hold no compilation.
      if isinstance(env, Environment):
        run(play, episodes)
      else:
        _decide_once(env, play, params, key)
      start = time.perf_counter()
      played = run(play, episodes)
      seconds = time.perf_counter() - start
      summary = played.summary()
      rows.append(
        Row(
          checkpoint=name,
          planner=label,
          simulations=budget,
          episodes=len(played.returns),
          return_mean=summary['eval_return'],
          return_se=summary['eval_return_se'],
          length_mean=summary['eval_length'],
          seconds_per_decision=seconds / max(float(played.lengths.sum()), 1.0),
        )
      )
      bar.write(len(rows), {'return': rows[-1].return_mean})
  bar.close()
  rows.sort(key=lambda row: list(checkpoints).index(row.checkpoint))
  return rows


def _planners(experiment, agent, simulations, rule):
  """Name, budget and compiled function of everyone who plays."""
  found = []
  for budget in simulations:
    decide = acting.make_decider(experiment, agent, budget, rule)
    label = 'policy' if agent.exploit is not None else 'network'
    if budget:
      label = rule or experiment.config.search.rule
    play = lambda *args, decide=decide: decide(*args)[0]
    found.append((label, budget, play))
  return found


def _decide_once(env, play, params, key):
  simulator = env.start(0)
  play(params, key, simulator.reset()).block_until_ready()
  simulator.close()
