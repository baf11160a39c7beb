"""Players of games: any trained agent with any planner; see `planners`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.files.errors import UserError
from experiments.playing.planners import TREES, Strategy

# Candidates of a turn that are looked at further, where there are chances.
_KEPT = 5
_CHUNK = 64
# Rollouts of such candidates that go on together.
_ROWS = 512


class Player(NamedTuple):
  """Somebody who plays.

  Attributes:
    name: as it was asked for.
    decide: `(params, key, timestep) -> PolicyOutput`, compiled or of the host;
      the observation of its time steps is the position.
    params: of its network; None without one.
    evaluations: of its network a decision, if all actions are legal; None
      where games decide how many there are.
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
  """A player of a game.

  Args:
    name: to call it by.
    strategy: from `planners.parse`.
    model: the agent's, an exact one.
    params: its parameters.
    game: the rules.
    search: the agent's `planning.SearchConfig`, for a tree search's constants;
      None for the defaults.
    base: the agent's `exploit`, who plays rollouts where the model has
      candidates without priors; None for the best one step ahead.

  Raises:
    UserError: what needs priors, where actions are candidates without.
  """
  import jax

  from agents.core import planning
  from search import lookahead, policies

  if strategy.planner == 'random':
    return Player(name, jax.jit(_random(game)), None, 0)
  if model.actions is not None:
    _check_candidates(name, strategy)
  if strategy.planner not in TREES and hasattr(game.spec.action, 'factors'):
    # An agent that learned from sampled actions can look at all of them.
    model = model._replace(distribution=None)
  planned = _rolled_out(model, strategy, base)
  if strategy.planner == 'network' and model.actions is None:
    planner = policies.make_planner(policies.raw, evaluate=True)
  elif strategy.planner in ('network', 'lookahead'):
    # Who has no policy but a value plays one step ahead.
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
  """The model whose leaves are worth what the strategy says."""
  from search import candidates, rollout

  if strategy.steps is None:
    return model
  policy = 'mode' if strategy.greedy else 'sample'
  if model.actions is not None:
    policy = rollout.greedy(model._replace(outcomes=None))
    if base is not None:
      # Of places for a turn's boards it values those that are taken.
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
  """`planning.make_planner` that also tells what the moves are worth."""

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
  """How far lookahead looks where hundreds of candidates meet chance.

  As Tesauro's 2-ply: of the first stage the best few by the value behind them
  go on, and the second one sees boards before the dice.
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
    # Hundreds of replies to each of 21 rolls: not for all turns at once.
    'chunk': _CHUNK,
  }


def _random(game):
  """Whoever takes any legal action."""

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
  """Refuses what makes no sense where moves have no priors."""
  if strategy.planner in TREES:
    raise UserError(
      f'player={name}: a tree search needs actions that can be enumerated; '
      'take lookahead=1 or lookahead=2'
    )
  if strategy.steps is not None and strategy.budget > 1:
    raise UserError(
      f'player={name}: of candidates and chance a rollout comes after one '
      'stage; take lookahead=1+rollout=8x4 or lookahead=2'
    )
  if strategy.budget > 2:
    raise UserError(
      f'player={name}: candidates and chance are looked at two stages deep; '
      'take lookahead=2'
    )


def _evaluations(strategy: Strategy, game: Any, model: Any) -> int | None:
  """Network evaluations of one decision."""
  from search import lookahead

  if model.actions is not None:
    number = game.spec.action.number
    chances = _chances(game) if model.outcomes is not None else 1
    kept = min(_KEPT, number)
    # The first stage is ranked by values where not all are kept.
    ranked = number if number > kept else 0
    if strategy.steps is not None:
      # A turn of a rollout values all boards, and the one it leads to.
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
  """How many outcomes a move has."""
  import jax

  def probability(key):
    state = game.init(key)
    return game.outcomes(state, game.candidates(state)[0])[0]

  return jax.eval_shape(probability, jax.random.key(0)).shape[0]
