"""Plays an agent that was trained offline with a planner on top of it.

This is model predictive control: at every decision, the planner starts from the
simulator's observation. The actor proposes actions and rolls out, and the
critic gives the terminal cost (`actor_critic_model`). The model is the exact
simulator, or the ensemble that a run of `dynamics` or COMBO learned from data.
`planners` describes the names of players.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.build import evaluation
from experiments.playing import (
  actor_critic_model,
  actor_critic_runs,
  planners,
)
from experiments.report import terminal


class Budget(NamedTuple):
  """Numbers of candidate actions, at the first and at later stages."""

  candidates: int = 8
  later: int = 4


def make_player(
  strategy: planners.Strategy,
  trained: actor_critic_runs.Trained,
  dynamics: Any,
  *,
  budget: Budget,
  value: str = 'min',
) -> Callable[..., Any]:
  """A player that plans over an actor and a critic, not compiled yet.

  It is `(actor_critic_model.Params, key, timestep) -> action [B, D]`; `value`
  is as in `actor_critic_model.critic_value`. Parameters are not read.

  Raises:
    ValueError: an argument is out of range.
  """
  import numpy as np

  from search import candidates, lookahead, rollout

  agent = trained.agent
  low, high = trained.spec.action.low, trained.spec.action.high
  q = actor_critic_model.critic_value(trained.networks, value)

  def make_model(num):
    model = actor_critic_model.planning_model(
      agent,
      q,
      dynamics,
      trained.spec,
      gamma=trained.experiment.config.gamma,
      reward_factor=trained.reward_factor,
      num=num,
      proposal=strategy.proposal,
    )
    if not strategy.steps and strategy.critic:
      return model
    return rollout.truncated(
      model,
      actor_critic_model.base_policy(agent),
      steps=strategy.steps or 0,
      terminal=strategy.critic,
    )

  model = make_model(budget.candidates)
  if strategy.depth < 0:
    planner = actor_critic_model.actor_planner(agent)
  elif not strategy.depth:
    planner = actor_critic_model.critic_planner(q)
  else:
    if strategy.refined:
      # With a slope of 1, the first step crosses half of the box.
      rate = float(np.mean(high - low)) / 2
      model = candidates.refined(model, strategy.refined, rate, low, high)
    later = make_model(budget.later)
    planner = lookahead.lookahead(strategy.depth, later=later)

  def play(params, key, timestep):
    return planner(model, params, key, timestep).action

  return play


def model_steps(strategy: planners.Strategy, budget: Budget) -> int:
  """The number of dynamics steps in one decision."""
  if strategy.depth < 1:
    return 0
  total, nodes, steps = 0, 1, strategy.steps or 0
  for stage in range(strategy.depth):
    nodes *= budget.later if stage else budget.candidates
    total += nodes
  climbs = budget.candidates * (strategy.refined + 1) if strategy.refined else 0
  return total + nodes * steps + climbs * (1 + steps)


def compare(
  row: evaluation.Row,
  strategy: planners.Strategy,
  dynamics: str,
  budget: Budget,
  returns: Any,
  policy: Any,
) -> evaluation.Row:
  """Adds a planner's gain over the policy, and its cost, to its row.

  Args:
    dynamics: `exact` or `learned`.
    returns: the planner's returns, `[episodes]`.
    policy: the policy's returns from the same initial states, `[episodes]`.
  """
  import numpy as np

  gain = returns - policy
  error = np.std(gain, ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else 0.0
  return row._replace(
    dynamics=dynamics,
    candidates=budget.candidates,
    model_steps=model_steps(strategy, budget),
    gain=float(np.mean(gain)),
    gain_se=float(error),
  )


class _Table(NamedTuple):
  """What all players of a run share: its networks, model and parameters."""

  trained: actor_critic_runs.Trained
  dynamics: Any
  params: actor_critic_model.Params
  budget: Budget
  value: str

  def player(self, strategy: planners.Strategy) -> Callable[..., Any]:
    import jax

    return jax.jit(
      make_player(
        strategy,
        self.trained,
        self.dynamics,
        budget=self.budget,
        value=self.value,
      )
    )


def _load(values: Any) -> _Table:
  checkpoint = (values.checkpoint or ['final'])[0]
  trained = actor_critic_runs.load(values.workdir, checkpoint, values.env)
  rules = actor_critic_runs.Rules(values.reward_rule, values.termination_rule)
  dynamics, own = actor_critic_runs.find_dynamics(
    values.dynamics, trained, values.env, rules
  )
  return _Table(
    trained,
    dynamics,
    actor_critic_model.Params(trained.params, own),
    Budget(values.candidates, values.later_candidates),
    values.value,
  )


def _strategy(name: str, experiment: Any) -> planners.Strategy:
  strategy = planners.parse(name)
  planners.refuse(name, strategy, experiment.agent_name, 'actor_critic')
  return strategy


def decider(name: str, experiment: Any, values: Any) -> tuple[Any, Any]:
  """`acting.make_decider`'s kind of player, without values; its parameters.

  Raises:
    UserError: the run, the player or the dynamics cannot be used.
  """
  strategy = _strategy(name, experiment)
  table = _load(values)
  play = table.player(strategy)
  return lambda *args: (play(*args), None), table.params


def launch(experiment: Any, values: Any) -> list[evaluation.Row]:
  """Plays as the flags of `experiments.play` say.

  Raises:
    UserError: the run, a player or the dynamics cannot be used.
  """
  from experiments import build

  strategies = {name: _strategy(name, experiment) for name in values.players}
  checkpoint = (values.checkpoint or ['final'])[0]
  table = _load(values)
  num_envs = values.num_envs or min(32, values.episodes)
  env = build.make_env(experiment, training=False, num_envs=num_envs)
  kind = 'exact' if values.dynamics == 'exact' else 'learned'
  terminal.begin(
    f'{experiment.agent_name} of {values.workdir} on {experiment.env_name}, '
    f'{kind} dynamics: {", ".join(strategies)}; at least '
    f'{values.episodes} episodes per player',
    terminal.parameters(table.trained.params),
  )

  def play(strategy):
    about = values.episodes, values.seed
    return evaluation.timed(env, table.player(strategy), table.params, *about)

  policy = play(planners.Strategy('actor'))
  rows = []
  for name, strategy in strategies.items():
    played, seconds = policy if strategy.depth < 0 else play(strategy)
    row = evaluation.summarise(checkpoint, name, None, played, seconds)
    gains = played.returns, policy[0].returns
    rows.append(compare(row, strategy, kind, table.budget, *gains))
    terminal.say(f'{name}: {row.return_mean:.1f} ± {row.return_se:.1f}')
  evaluation.print_rows(rows)
  out = pathlib.Path(values.out or f'{values.workdir}/play.csv')
  evaluation.write_rows(out, rows)
  others = 'lookahead=2,lookahead=1+rollout=16'
  again = evaluation.command(values.workdir, experiment)
  terminal.end(str(out), f'{again} --players={others}')
  return rows
