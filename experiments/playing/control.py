"""Plays an actor-critic with planners on top, and tabulates their returns."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.files.errors import UserError
from experiments.playing import actor_critic_model, actor_critic_runs, planners
from experiments.report import terminal


def play_episodes(
  env: Any, play: Callable[..., Any], params: Any, episodes: int, seed: int
) -> Any:
  """Returns of whole episodes in a simulator, float64 `[episodes]`.

  The same seed has the same starts, whoever plays; planners share their keys.

  Args:
    env: an `Environment`, or of the host.
    play: compiled, from `make_player`.
    params: `actor_critic_model.Params`.
    episodes: on the host rounded up to a multiple of its copies.
    seed: of the starts and of the planner.
  """
  import jax

  from experiments.runtime import evaluate
  from search.model import Environment

  key = jax.random.fold_in(jax.random.key(seed), 7)
  if isinstance(env, Environment):
    played = evaluate.on_device(
      env, play, params, key=key, num_episodes=episodes
    )
  else:
    played = evaluate.on_host(
      env, play, params, key=key, num_episodes=episodes, seed=seed + 1_000_003
    )
  return played.returns


class Row(NamedTuple):
  """One line of control.csv.

  Attributes:
    planner: its name.
    dynamics: `exact` or `learned`.
    candidates: K of the first stage.
    episodes: whole episodes played.
    return_mean: undiscounted.
    return_se: standard error over episodes.
    gain: of the return over the actor's own, the same starts.
    gain_se: standard error of the paired differences.
    model_steps: a decision.
  """

  planner: str
  dynamics: str
  candidates: int
  episodes: int
  return_mean: float
  return_se: float
  gain: float
  gain_se: float
  model_steps: int


def summarise(
  name: str, dynamics: str, budget: planners.Budget, returns: Any, actor: Any
) -> Row:
  """The row of a planner's returns `[episodes]` beside the actor's."""
  import numpy as np

  def error(x):
    return float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else 0.0

  gain = returns - actor
  return Row(
    planner=name,
    dynamics=dynamics,
    candidates=budget.candidates,
    episodes=len(returns),
    return_mean=float(np.mean(returns)),
    return_se=error(returns),
    gain=float(np.mean(gain)),
    gain_se=error(gain),
    model_steps=planners.model_steps(planners.parse(name), budget),
  )


def write_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes control.csv, atomically."""
  from experiments.files import tables

  tables.write_csv(path, [row._asdict() for row in rows])


def print_rows(rows: Sequence[Row]) -> None:
  """A table for people."""
  terminal.print_table(
    ('planner', 'dynamics', 'return', 'gain', 'model steps'),
    [
      (
        row.planner,
        row.dynamics,
        f'{row.return_mean:.1f} ± {row.return_se:.1f}',
        f'{row.gain:+.1f} ± {row.gain_se:.1f}',
        str(row.model_steps),
      )
      for row in rows
    ],
  )


def launch(values: Any) -> list[Row]:
  """Plays as the flags say.

  Raises:
    UserError: a run, a planner or a dynamics is wrong.
  """
  import jax

  from experiments import build
  from experiments.build import saved

  names = [name.strip() for name in values.planners.split(';') if name.strip()]
  if not names:
    raise UserError(f'planners={values.planners}: names none; actor is one')
  strategies = {name: planners.parse(name) for name in names}
  budget = planners.Budget(values.candidates, values.later_candidates)
  trained = actor_critic_runs.load(
    values.workdir, values.checkpoint, values.env
  )
  dynamics, own = actor_critic_runs.find_dynamics(
    values.dynamics, trained, values.env
  )
  env = build.make_env(trained.experiment, training=False, num_envs=32)
  params = actor_critic_model.Params(trained.params, own)
  kind = 'exact' if values.dynamics == 'exact' else 'learned'
  rows, returns = [], {}
  terminal.begin(
    f'{trained.experiment.agent_name} of {values.workdir} on '
    f'{trained.experiment.env_name}, {kind} dynamics: actor, '
    f'{", ".join(names)}; {values.episodes} episodes each',
    terminal.parameters(trained.params),
  )

  def played(strategy):
    player = planners.make_player(
      strategy, trained, dynamics, budget=budget, value=values.value
    )
    compiled = jax.jit(player)
    return play_episodes(env, compiled, params, values.episodes, values.seed)

  returns = {'actor': played(planners.parse('actor'))}
  for name, strategy in strategies.items():
    if name not in returns:
      returns[name] = played(strategy)
    row = summarise(name, kind, budget, returns[name], returns['actor'])
    rows.append(row)
    terminal.say(f'{name}: {row.return_mean:.1f} ± {row.return_se:.1f}')
  print_rows(rows)
  out = pathlib.Path(values.out or f'{values.workdir}/control.csv')
  write_rows(out, rows)
  again = saved.command(values.workdir, trained.experiment, 'control')
  terminal.end(
    str(out), f"{again} --planners='lookahead=2;lookahead=1+rollout=16'"
  )
  return rows
