"""The grammar of players' names, for games, control and tree searches.

A name is a planner, followed by options after plus signs. For any trained
agent:

  network               the policy alone, its likeliest action

In games, and for the MuZero family:

  gumbel=32, puct=32, efficientzero=32
                        a tree search with 32 simulations

In games:

  lookahead=2           two stages of exact lookahead, then the network's value
  ...+rollout=8         each leaf is valued by 8 moves of the network's policy
                        and the value after them; `8x4` takes the mean of 4
                        trials, `end` plays to the end without a value
  ...+greedy_rollout=8  the same with the policy's likeliest moves
  rollout=8             lookahead=1+rollout=8; in games with dice, trials start
                        from each roll after the best five candidates
  random                a random legal action
  runs/b@early:puct=32  with the early checkpoint of another run

With an actor and a critic, in the exact simulator or in learned dynamics:

  actor                 another name for network
  critic                the candidate with the highest Q
  lookahead=2           two stages over candidates, then the critic
  ...+rollout=8         each leaf is valued by 8 steps of the actor and the
                        critic after them
  ...+no_critic         no value at the leaves
  ...+box               candidates other than the actor's mode are drawn from
                        the box of all actions instead of from the actor
  ...+refined=4         first-stage candidates take 4 gradient steps up Q
"""

import dataclasses
import re
from typing import Any

from experiments.files.errors import UserError, shown

TREES = ('gumbel', 'puct', 'efficientzero')
_FIRST = re.compile(
  r'network|random|actor|critic|(lookahead|gumbel|puct|efficientzero)=(\d+)',
  re.ASCII,
)
_OPTION = re.compile(
  r'(?P<greedy>greedy_)?rollout=(?P<steps>\d+|end)(x(?P<trials>\d+))?'
  r'|no_critic|box|refined=(?P<refined>\d+)',
  re.ASCII,
)
# Larger numbers take too long or too much memory.
_MOST = {'lookahead': 10} | dict.fromkeys(TREES, 1_000_000)
_MOST_STEPS = 100_000


@dataclasses.dataclass(frozen=True)
class Strategy:
  """How a player decides.

  Attributes:
    planner: `network`, `random`, `actor`, `critic`, `lookahead` or one of
      `TREES`.
    budget: number of stages or simulations; 0 for planners without either.
    steps: length of a rollout from each leaf; -1 to the end, None for none.
    trials: number of rollouts from each leaf.
    greedy: whether rollouts take the likeliest moves instead of drawing them.
    critic: whether the critic's value is added at the end.
    proposal: where candidates come from, `actor` or `box`.
    refined: number of gradient steps on first-stage candidates.
  """

  planner: str
  budget: int = 0
  steps: int | None = None
  trials: int = 1
  greedy: bool = False
  critic: bool = True
  proposal: str = 'actor'
  refined: int = 0

  @property
  def depth(self) -> int:
    """Stages of lookahead, 0 for the critic alone and -1 for the policy."""
    return {'network': -1, 'actor': -1, 'critic': 0}.get(
      self.planner, self.budget
    )


def parse(name: str) -> Strategy:
  """Parses a name that has no run in front.

  Raises:
    UserError: the name is not in the grammar.

  >>> parse('lookahead=2+rollout=8x4').trials
  4
  """
  first, *words = name.split('+')
  if _OPTION.fullmatch(first) and 'rollout' in first and not words:
    first, words = 'lookahead=1', [first]
  found = _FIRST.fullmatch(first)
  if found is None:
    raise _unknown(name)
  planner, budget = found[1] or first, found[2]
  _check_most(name, planner, budget, _MOST.get(planner, 0))
  if budget is not None and not int(budget):
    raise _unknown(name)
  fields: dict[str, Any] = {}
  for word in words:
    new = _option(name, word)
    if new.keys() & fields.keys():
      raise _unknown(name)
    fields |= new
  if 'steps' in fields and budget is None:
    raise _unknown(name)
  boxed = planner == 'critic' and fields.keys() == {'proposal'}
  of_critic = fields.keys() & {'critic', 'proposal', 'refined'}
  if of_critic and planner != 'lookahead' and not boxed:
    raise UserError(
      f'player={shown(name)}: no_critic, box and refined=N must follow '
      'lookahead=L (box may also follow critic)'
    )
  return Strategy(planner, int(budget or 0), **fields)


def _option(name: str, word: str) -> dict[str, Any]:
  """The fields of a strategy that an option, after a plus sign, sets."""
  found = _OPTION.fullmatch(word)
  if found is None:
    raise _unknown(name)
  if word == 'no_critic':
    return {'critic': False}
  if word == 'box':
    return {'proposal': 'box'}
  if found['refined']:
    _check_most(name, 'refined', found['refined'], _MOST_STEPS)
    return {'refined': int(found['refined'])}
  steps, trials = found['steps'], found['trials']
  _check_most(name, 'rollout', None if steps == 'end' else steps, _MOST_STEPS)
  _check_most(name, 'trials', trials, _MOST_STEPS)
  if trials and not int(trials):
    raise _unknown(name)
  return {
    'steps': -1 if steps == 'end' else int(steps),
    'trials': int(trials or 1),
    'greedy': bool(found['greedy']),
  }


def _check_most(name: str, what: str, number: str | None, most: int) -> None:
  # Compares lengths first, because Python refuses to parse very long numbers.
  if number and (len(number) > len(str(most)) or int(number) > most):
    raise UserError(f'player={shown(name)}: {what} must be at most {most}')


def _unknown(name: str) -> UserError:
  return UserError(
    f'player={shown(repr(name))}: must be network, random, actor, critic, '
    'lookahead=L, gumbel=N, puct=N or efficientzero=N; the last four may be '
    'followed by +rollout=M, +rollout=MxTRIALS, +rollout=end or '
    '+greedy_rollout=M, and lookahead by +no_critic, +box or +refined=N; '
    'runs/NAME: in front names another run'
  )


def split(name: str) -> tuple[str, str, str]:
  """Splits a name into run, checkpoint and strategy: `runs/b@early:puct=32`.

  Without a run, the first two are `''` and `final`.
  """
  run, colon, rest = name.rpartition(':')
  if not colon:
    return '', 'final', name
  folder, _, checkpoint = run.partition('@')
  return folder, checkpoint or 'final', rest


def refuse(name: str, strategy: Strategy, agent: str, kind: str) -> None:
  """Refuses a strategy that an agent cannot be combined with.

  `kind` is what the agent can plan with: `game`, the rules of a game;
  `actor_critic`; `tree`, its own model; `policy`, nothing but its policy.

  Raises:
    UserError: the strategy needs something that the agent lacks.
  """
  rollout = strategy.steps is not None
  of_critic = strategy.planner in ('actor', 'critic')
  of_critic |= strategy != dataclasses.replace(
    strategy, critic=True, proposal='actor', refined=0
  )
  if kind == 'game':
    wrong, has = of_critic, 'plays by the rules of a game'
    take = 'network, random, lookahead=2, gumbel=16 or lookahead=1+rollout=8'
  elif kind == 'actor_critic':
    wrong = strategy.planner in ('random', *TREES) or (
      rollout and (strategy.steps == -1 or strategy.trials > 1)
    )
    wrong |= strategy.greedy
    has = 'has an actor and a critic, and no tree search'
    take = 'actor, critic, lookahead=1 or lookahead=1+rollout=8'
  elif kind == 'tree':
    wrong = rollout or strategy.planner not in ('network', *TREES)
    has, take = 'plans by tree search in its own model', 'network or gumbel=16'
  else:
    wrong = strategy.planner not in ('network', 'actor')
    has, take = 'has a policy and nothing to plan with', 'network'
  if wrong:
    raise UserError(f'player={shown(name)}: {agent} {has}; take {take}')
