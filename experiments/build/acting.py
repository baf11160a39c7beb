"""How a trained agent acts in an evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from experiments.build.material import Experiment
from experiments.runtime import config as configs


def players(experiment: Experiment, agent) -> dict[str, Callable]:
  """How an agent plays in an evaluation, by the prefix of its metrics.

  They are `(params, key, timestep) -> action`, which may be traced. An agent
  with a model plays with search (`eval`) and without (`network`); one with
  `exploit` just plays (`eval`); one that only learns does not.
  """
  from agents.core import planning

  if agent.exploit is not None:
    exploit = agent.exploit
    return {'eval': lambda *args: exploit(*args)[0]}
  if agent.act is None:
    return {}
  search = experiment.config.search
  found = {}
  for prefix, config in (
    ('eval', search),
    ('network', dataclasses.replace(search, num_simulations=0)),
  ):
    planner = planning.make_planner(config, evaluate=True)
    found[prefix] = functools.partial(_plan, planner, agent.model)
  return found


def _plan(planner, model, params, key, timestep):
  return planner(model, params, key, timestep).action


def make_decider(
  experiment: Experiment, agent: Any, budget: int, rule: str | None = None
) -> Callable[..., tuple[Any, Any]]:
  """How an agent plays to win, compiled: 0 simulations are the network alone.

  Returns:
    `(params, key, timestep) -> (action [B, ...], value [B])`; the value is the
    planner's, None for an agent that only has a policy.

  Raises:
    UserError: the agent has no search.
    ValueError: the search, by `rule` if not the agent's, does not suit it.
  """
  import jax

  from agents.core import planning

  if agent.exploit is not None:
    if rule is not None or budget:
      raise configs.UserError(
        f'simulations={budget}: {experiment.agent_name} has no tree search; '
        'take 0'
      )
    exploit = agent.exploit
    return jax.jit(lambda *args: (exploit(*args)[0], None))
  chosen = dataclasses.replace(experiment.config.search, num_simulations=budget)
  if rule is not None:
    chosen = dataclasses.replace(chosen, rule=rule)
  # The agent's config refuses searches that do not suit it.
  dataclasses.replace(experiment.config, search=chosen)
  planner = planning.make_planner(chosen, evaluate=True)

  def decide(params, key, timestep):
    output = planner(agent.model, params, key, timestep)
    return output.action, output.value

  return jax.jit(decide)


def read_budgets(
  texts: Sequence[str] | None, usual: Sequence[int]
) -> list[int]:
  """The numbers of `--simulations`; `usual` if there are none.

  Raises:
    UserError: one is not a whole number, or below 0.
  """
  for text in texts or ():
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
      raise configs.UserError(
        f'simulations={text}: must be whole numbers, 0 or more and below '
        '1000000000, with commas between, such as 0,16,64'
      )
  return [int(text) for text in texts or ()] or list(usual)
