"""Plays whole episodes with a trained agent and tabulates their returns."""

import pathlib
from typing import Any

from experiments import build
from experiments.build import acting, capacity, evaluation, saved
from experiments.files.errors import UserError
from experiments.playing import planners
from experiments.report import pictures, terminal


def launch(experiment: Any, values: Any) -> None:
  """Plays as the flags of `experiments.play` say.

  Raises:
    UserError: a player, a number of simulations or a checkpoint is wrong.
  """
  if values.num_envs > values.episodes:
    raise UserError(
      f'num_envs={values.num_envs}: exceeds the number of episodes; must be at '
      f'most {values.episodes}'
    )
  names = values.checkpoint or ['final']
  env = build.make_env(
    experiment, training=False, num_envs=values.num_envs or None
  )
  agent = build.make_agent(
    experiment, saved.load_spec(values.workdir, env.spec)
  )
  players = _players(experiment, agent, values)
  num = getattr(env, 'num_envs', values.episodes)
  most = max(budget for _, budget, _ in players)
  capacity.check(capacity.of_search(agent, env.spec, num, most, 'simulations'))
  checkpoints = saved.load_params(values.workdir, agent, names)
  shown = ', '.join(
    label if values.players or not budget else f'{label} {budget}'
    for label, budget, _ in players
  )
  terminal.begin(
    f'{experiment.agent_name} on {experiment.env_name}: checkpoint '
    f'{", ".join(names)}; {shown}; at least '
    f'{values.episodes} episodes per player',
    terminal.parameters(checkpoints[names[0]]),
  )
  rows = evaluation.play_all(
    env, players, checkpoints, values.episodes, values.seed
  )
  evaluation.print_rows(rows)
  out = pathlib.Path(values.out or f'{values.workdir}/play.csv')
  evaluation.write_rows(out, rows)
  again = evaluation.command(values.workdir, experiment)
  following = f'python -m experiments.plots --workdirs={values.workdir}'
  if env.spec.game is not None:
    following = f'{again} --human'
  elif pictures.is_drawn(env.spec):
    following = f'{again} --record=agent.gif'
  terminal.end(str(out), following)


def _players(experiment, agent, values):
  """The name, simulations and compiled function of each player."""
  if not values.players:
    usual = [0] if agent.exploit is not None else [0, 16]
    budgets = acting.read_budgets(values.simulations, usual)
    return evaluation.deciders(experiment, agent, budgets, values.planner)
  return [(n, *decider(n, experiment, agent)) for n in values.players]


def decider(name: str, experiment: Any, agent: Any) -> tuple[int, Any]:
  """A player's number of simulations and its `acting.make_decider` function.

  Raises:
    UserError: the agent cannot be combined with this planner.
  """
  strategy = planners.parse(name)
  kind = 'policy' if agent.exploit is not None else 'tree'
  planners.refuse(name, strategy, experiment.agent_name, kind)
  rule = strategy.planner if strategy.budget else None
  decide = acting.make_decider(experiment, agent, strategy.budget, rule)
  return strategy.budget, decide
