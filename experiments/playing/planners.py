"""Plays an agent that was trained off-line with a planner on top of it.

python -m experiments.control --workdir=runs/iql_small_Pendulum-v1-random_s0 \
  --planners='actor;lookahead=1;lookahead=1+rollout=8'
python -m experiments.control --workdir=runs/... --dynamics=runs/dynamics_...
python -m experiments.study control --data=data/pendulum

The agent's actor proposes actions and rolls out, its critic is the cost at the
end (`playing.actor_critic_model`), and each decision is made anew from what the
real simulator shows: model predictive control. The model between
them is the exact simulator, or the ensemble that a run of `dynamics` or COMBO
learned from a data set. Planners are named

  actor                 the policy's mode; no planning
  critic                l = 0: the candidate of the highest Q
  lookahead=2           two stages over candidates, then the critic
  ...+rollout=8         leaves are worth 8 steps of the actor and the critic
                        behind them
  ...+no_critic         nothing behind them
  ...+box               candidates from the box of all actions, but for the
                        actor's mode; else the actor draws them
  ...+refined=4         first-stage candidates climb the gradient of Q, 4 steps

Later stages have fewer candidates, `--later_candidates`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.files.errors import UserError
from experiments.playing import actor_critic_model, actor_critic_runs

# Each stage multiplies the sequences of actions.
_DEEPEST = 10
_FIRST = re.compile(r'actor|critic|lookahead=([1-9]\d*)')


@dataclasses.dataclass(frozen=True)
class Strategy:
  """How a planner decides.

  Attributes:
    depth: l; 0 for the critic alone, -1 for the actor alone.
    steps: m of the rollouts from the leaves.
    critic: whether the critic's value is added at the end.
    proposal: where candidates come from, `actor` or `box`.
    refined: steps of gradient ascent of first-stage candidates.
  """

  depth: int
  steps: int = 0
  critic: bool = True
  proposal: str = 'actor'
  refined: int = 0


def parse(name: str) -> Strategy:
  """The strategy that a planner's name stands for.

  Raises:
    UserError: it stands for none.
  """
  numbers = re.findall(r'\d+', name)
  if not name.isascii() or any(len(n) > 6 for n in numbers):
    raise UserError(f'planner={name!r}: numbers must be below 1000000')
  first, *rest = name.split('+')
  found = _FIRST.fullmatch(first)
  if found is None:
    raise _unknown(name)
  depth = {'actor': -1, 'critic': 0}.get(first) or int(found[1] or 0)
  if depth > _DEEPEST:
    raise UserError(f'planner={name!r}: lookahead must be at most {_DEEPEST}')
  fields: dict[str, Any] = {}
  for word in rest:
    option, _, number = word.partition('=')
    if word == 'no_critic':
      new = {'critic': False}
    elif word == 'box':
      new = {'proposal': 'box'}
    elif option in ('rollout', 'refined') and number.isdecimal():
      new = {'steps' if option == 'rollout' else option: int(number)}
    else:
      raise _unknown(name)
    if new.keys() & fields.keys():
      raise _unknown(name)
    fields |= new
  if fields and (depth < 0 or (not depth and fields != {'proposal': 'box'})):
    raise UserError(f'planner={name}: options need lookahead=L')
  return Strategy(depth, **fields)


def _unknown(name: str) -> UserError:
  return UserError(
    f'planner={name!r}: must be actor, critic[+box] or lookahead=L, the last '
    'also with +rollout=M, +no_critic, +box, +refined=N'
  )


class Budget(NamedTuple):
  """How many actions are looked at.

  Attributes:
    candidates: K of the first stage.
    later: of each later one.
  """

  candidates: int = 8
  later: int = 4


def make_player(
  strategy: Strategy,
  trained: actor_critic_runs.Trained,
  dynamics: Any,
  *,
  budget: Budget,
  value: str = 'min',
) -> Callable[..., Any]:
  """A planner over an agent's model, as who plays.

  Args:
    strategy: from `parse`.
    trained: from `actor_critic_runs.load`; its parameters are not looked at.
    dynamics: a `actor_critic_model.Dynamics`.
    budget: numbers of candidates.
    value: of several critics, see `actor_critic_model.critic_value`.

  Returns:
    `(plan_models.Params, key, timestep) -> action [B, D]`, to be compiled.

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
      steps=strategy.steps,
      terminal=strategy.critic,
    )

  model = make_model(budget.candidates)
  if strategy.depth < 0:
    planner = actor_critic_model.actor_planner(agent)
  elif not strategy.depth:
    planner = actor_critic_model.critic_planner(q)
  else:
    if strategy.refined:
      # With a slope of 1 the first step goes across half of the box.
      rate = float(np.mean(high - low)) / 2
      model = candidates.refined(model, strategy.refined, rate, low, high)
    later = make_model(budget.later)
    planner = lookahead.lookahead(strategy.depth, later=later)

  def play(params, key, timestep):
    return planner(model, params, key, timestep).action

  return play


def model_steps(strategy: Strategy, budget: Budget) -> int:
  """Steps of the dynamics that one decision takes."""
  if strategy.depth < 1:
    return 0
  total, nodes = 0, 1
  for stage in range(strategy.depth):
    nodes *= budget.later if stage else budget.candidates
    total += nodes
  climbs = budget.candidates * (strategy.refined + 1) if strategy.refined else 0
  return total + nodes * strategy.steps + climbs * (1 + strategy.steps)
