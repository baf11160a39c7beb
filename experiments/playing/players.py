"""Players of games by their names: any trained agent with any planner.

A name is a planner, over the run's own network unless another run stands in
front of it:

  network               the network's policy alone, its likeliest action
  lookahead=2           two stages of exact lookahead, then the network's value
  gumbel=32, puct=32    a tree search of so many simulations
  ...+rollout=8         leaves are worth 8 moves of the network's policy and the
                        value behind them; `8x4` for the mean of 4 trials,
                        `end` to play to the end without a value
  ...+greedy_rollout=8  the same with the policy's likeliest moves
  rollout=8             lookahead=1+rollout=8; where a turn meets dice, of its
                        best five candidates, for each roll, every trial
  random                any legal action
  runs/b@early:puct=32  with the early checkpoint of another run
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.files.errors import UserError

_TREES = ('gumbel', 'puct')
# Candidates of a turn that are looked at further, where there are chances.
_KEPT = 5
_CHUNK = 64
# Rollouts of such candidates that go on together.
_ROWS = 512
_PATTERN = re.compile(
  r'((?P<planner>network|random|lookahead|gumbel|puct)(=(?P<budget>\d+))?)?'
  r'(?P<plus>\+)?((?P<greedy>greedy_)?rollout=(?P<steps>\d+|end)'
  r'(x(?P<trials>\d+))?)?',
  re.ASCII,
)
# More than this nobody waits for, and no memory holds.
_MOST = {'lookahead': 10, 'gumbel': 1_000_000, 'puct': 1_000_000}
_MOST_STEPS = 100_000


@dataclasses.dataclass(frozen=True)
class Strategy:
  """How a player decides.

  Attributes:
    planner: `network`, `random`, `lookahead`, `gumbel` or `puct`.
    budget: stages or simulations; 0 where there is nothing to count.
    steps: moves of a rollout from each leaf; -1 to the end, None for none.
    trials: rollouts from each leaf.
    greedy: whether rollouts take the likeliest moves instead of drawing them.
  """

  planner: str
  budget: int = 0
  steps: int | None = None
  trials: int = 1
  greedy: bool = False


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


def parse(name: str) -> Strategy:
  """The strategy that a name (without a run in front) stands for.

  Raises:
    UserError: it stands for none.

  >>> parse('lookahead=2+rollout=8x4')
  Strategy(planner='lookahead', budget=2, steps=8, trials=4, greedy=False)
  """
  found = _PATTERN.fullmatch(name)
  if not name or found is None:
    raise _unknown(name)
  planner, budget, steps = found['planner'], found['budget'], found['steps']
  if bool(found['plus']) != (planner is not None and steps is not None):
    raise _unknown(name)
  if planner is None:
    planner, budget = 'lookahead', '1'
  counts = planner in (*_TREES, 'lookahead')
  if counts != (budget is not None) or (counts and not int(budget)):
    raise _unknown(name)
  if steps is not None and not counts:
    raise _unknown(name)
  trials = int(found['trials'] or 1)
  if not trials:
    raise _unknown(name)
  _check_most(name, planner, budget, _MOST.get(planner, 0))
  _check_most(name, 'rollout', None if steps == 'end' else steps, _MOST_STEPS)
  _check_most(name, 'trials', found['trials'], _MOST_STEPS)
  length = None
  if steps is not None:
    length = -1 if steps == 'end' else int(steps)
  return Strategy(
    planner, int(budget or 0), length, trials, bool(found['greedy'])
  )


def _check_most(name: str, what: str, number: str | None, most: int) -> None:
  # What is longer is larger, and Python refuses to read very long numbers.
  if number and (len(number) > len(str(most)) or int(number) > most):
    raise UserError(f'player={name!r}: {what} must be at most {most}')


def split(name: str) -> tuple[str, str, str]:
  """Run, checkpoint and strategy of a name: `runs/b@early:puct=32`.

  Returns:
    The run's folder, `''` for the one at hand; the checkpoint, `final` if
    none is named; the rest.
  """
  run, colon, rest = name.rpartition(':')
  if not colon:
    return '', 'final', name
  folder, _, checkpoint = run.partition('@')
  return folder, checkpoint or 'final', rest


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
    strategy: from `parse`.
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
  if strategy.planner not in _TREES and hasattr(game.spec.action, 'factors'):
    # Who learned from sampled actions can look at all of them.
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
  if strategy.planner in _TREES:
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


def _unknown(name: str) -> UserError:
  return UserError(
    f'player={name!r}: must be network, random, lookahead=L, gumbel=N or '
    'puct=N, the last three also with +rollout=M, +rollout=MxTRIALS, '
    '+rollout=end or +greedy_rollout=M; of another run runs/NAME:network'
  )
