"""Players of games: any trained agent with any planner of `planners`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.files.errors import UserError
from experiments.playing.planners import TREES, Strategy

# In games with chance, number of candidates that go on to the second stage.
_KEPT = 5
_CHUNK = 64
# Number of rollouts from such candidates that run at once.
_ROWS = 512


class Player(NamedTuple):
  """A player of a game.

  Attributes:
    name: the name that the user gave.
    decide: `(params, key, timestep) -> PolicyOutput`, compiled or on the host;
      the observation of its time steps is the position.
    params: the network's parameters; None if it has no network.
    evaluations: of the network per decision if all actions are legal; None if
      the number depends on the game's length.
  """

  name: str
  decide: Callable[..., Any]
  params: Any
  evaluations: int | None


def make(
  name: str,
  strategy: Strategy,
  model: Any,
  params: Any,
  game: Any,
  search: Any = None,
  base: Callable[..., Any] | None = None,
) -> Player:
  """Makes a player of a game, with the agent's exact model.

  Args:
    search: the agent's `planning.SearchConfig`, for a tree search's constants;
      None for the defaults.
    base: the agent's `exploit`, which plays rollouts if the model has
      candidates without priors; None to roll out greedily, one step ahead.

  Raises:
    UserError: the strategy needs priors, and the model's candidates have none.
  """
  import jax

  from agents.core import planning
  from search import lookahead, policies

  if strategy.planner == 'random':
    return Player(name, jax.jit(_random(game)), None, 0)
  if model.actions is not None:
    _check_candidates(name, strategy)
  if strategy.planner not in TREES and hasattr(game.spec.action, 'factors'):
    # The agent learned from sampled actions, but lookahead enumerates them.
    model = model._replace(distribution=None)
  planned = _rolled_out(model, strategy, base)
  if strategy.planner == 'network' and model.actions is None:
    planner = policies.make_planner(policies.raw, evaluate=True)
  elif strategy.planner in ('network', 'lookahead'):
    # An agent with a value but no policy looks one step ahead.
    planner = lookahead.lookahead(
      max(strategy.budget, 1), **_pruning(model, strategy, game)
    )
  else:
    config = dataclasses.replace(
      search or planning.SearchConfig(),
      rule=strategy.planner,
      num_simulations=strategy.budget,
    )
    planner = _tree_search(config)

  def decide(params, key, timestep):
    return planner(planned, params, key, timestep)._replace(search_tree=None)

  return Player(
    name, jax.jit(decide), params, _evaluations(strategy, game, model)
  )


def _rolled_out(model, strategy: Strategy, base):
  """The model, with leaves valued by the strategy's rollouts."""
  from search import candidates, rollout

  if strategy.steps is None:
    return model
  policy = 'mode' if strategy.greedy else 'sample'
  if model.actions is not None:
    policy = rollout.greedy(model._replace(outcomes=None))
    if base is not None:
      # The agent's own policy ignores the padding of a turn's boards.
      policy = rollout.acting(base)
    model = candidates.best(model, _KEPT)
  return rollout.truncated(
    model,
    policy,
    steps=None if strategy.steps < 0 else strategy.steps,
    trials=strategy.trials,
    terminal=strategy.steps >= 0,
  )


def _tree_search(config):
  """`planning.make_planner`, with the values of moves in its output."""

  def planner(model, params, key, timestep):
    import jax
    import jax.numpy as jnp

    from agents.core import planning

    root_key, search_key = jax.random.split(key)
    output = planning.make_search(config, model.distribution)(
      params,
      search_key,
      model.root(params, timestep, root_key),
      model.step,
      invalid_actions=timestep.invalid_actions,
      evaluate=True,
    )
    summary = output.search_tree.summary()
    seen = summary.visit_counts > 0
    qvalues = jnp.where(seen, summary.qvalues, -jnp.inf)
    return output._replace(qvalues=qvalues)

  return planner


def _pruning(model, strategy: Strategy, game) -> dict[str, Any]:
  """Options that prune lookahead in games with many candidates and chance.

  As in Tesauro's 2-ply, only the best few candidates by value go on to the
  second stage, which evaluates boards before the dice are rolled.
  """
  if model.actions is None or model.outcomes is None:
    return {}
  if strategy.steps is not None:
    rows = _chances(game) * strategy.trials
    return {'chunk': max(1, _ROWS // rows)}
  if strategy.budget < 2:
    return {}
  return {
    'widths': (_KEPT, None),
    'rank': 'value',
    'later': model._replace(outcomes=None),
    # Hundreds of replies to each of 21 rolls do not fit for all turns at once.
    'chunk': _CHUNK,
  }


def _random(game):
  """A decision function that takes a random legal action."""

  def decide(params, key, timestep):
    import jax
    import jax.numpy as jnp

    from experiments.envs.against import random_opponent
    from search.model import PolicyOutput

    del params
    batch = timestep.reward.shape[0]
    choose = random_opponent(game)
    keys = jax.random.split(key, batch)
    action = jax.vmap(choose)(timestep.observation, keys)
    zeros = jnp.zeros((batch,))
    return PolicyOutput(action, zeros[:, None], zeros)

  return decide


def _check_candidates(name: str, strategy: Strategy) -> None:
  """Refuses strategies that need priors, which candidates do not have."""
  if strategy.planner in TREES:
    raise UserError(
      f'player={name}: a tree search needs actions that can be enumerated; '
      'take lookahead=1 or lookahead=2'
    )
  if strategy.steps is not None and strategy.budget > 1:
    raise UserError(
      f'player={name}: in this game a rollout must follow one stage of '
      'lookahead; take lookahead=1+rollout=8x4 or lookahead=2'
    )
  if strategy.budget > 2:
    raise UserError(
      f'player={name}: in this game lookahead is limited to two stages; take '
      'lookahead=2'
    )


def _evaluations(strategy: Strategy, game: Any, model: Any) -> int | None:
  """Network evaluations of one decision."""
  from search import lookahead

  if model.actions is not None:
    number = game.spec.action.number
    chances = _chances(game) if model.outcomes is not None else 1
    kept = min(_KEPT, number)
    # Ranking the first stage takes an evaluation of every candidate.
    ranked = number if number > kept else 0
    if strategy.steps is not None:
      # Each turn of a rollout evaluates all boards and then the chosen one.
      turns = kept * chances * strategy.steps * strategy.trials
      total = ranked + kept + turns * (number + 1)
      return None if strategy.steps < 0 else total
    if strategy.budget < 2:
      return number
    return ranked + kept * chances * number
  if strategy.planner == 'network':
    return 1
  if strategy.steps is not None and strategy.steps < 0:
    return None
  steps = (strategy.steps or 0) * strategy.trials
  if strategy.planner == 'lookahead':
    return lookahead.num_evaluations(
      strategy.budget, game.spec.action.num_actions, steps=steps
    )
  return (strategy.budget + 1) * (1 + steps)


def _chances(game) -> int:
  """The number of chance outcomes of a move."""
  import jax

  def probability(key):
    state = game.init(key)
    return game.outcomes(state, game.candidates(state)[0])[0]

  return jax.eval_shape(probability, jax.random.key(0)).shape[0]
