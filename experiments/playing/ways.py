"""The way of playing that the flags of `play` ask for."""

from typing import Any

from experiments import build
from experiments.playing import (
  actor_critic_play,
  actor_critic_runs,
  arena,
  episodes,
  record,
)
from experiments.runtime import flags as flag_checks

# Flags that only some ways of playing read.
OF_TEXT = ('tokens', 'temperature')
_OF_MATCH = ('openings', 'opening_plies')
_OF_SEARCH = ('planner', 'simulations')
_OF_EPISODES = ('episodes', 'num_envs')
_OF_CONTROL = ('dynamics', 'candidates', 'later_candidates', 'value')
_OF_CONTROL += actor_critic_runs.RULES
_OF_GAME = ('opponents', 'human', 'begin')
ALL = (*_OF_MATCH, *_OF_SEARCH, *_OF_EPISODES, *_OF_CONTROL, *_OF_GAME)
ALL += ('players', 'record', 'frames')


def choose(experiment: build.Experiment, values: Any) -> Any:
  """The function that plays what the flags ask for.

  Raises:
    UserError: a flag was given that would be ignored.
  """
  refuse = flag_checks.refuse
  one = ['checkpoint'] if len(values.checkpoint) > 1 else []
  actor_critic = experiment.agent_name in actor_critic_runs.AGENTS
  of_control = () if actor_critic and values.players else _OF_CONTROL
  refuse(of_control, 'without --players of an actor and a critic')
  if values.dynamics == 'exact':
    refuse(actor_critic_runs.RULES, 'without --dynamics=RUN')
  if values.record:
    refuse(
      ['human', 'begin', *_OF_EPISODES, 'out', *_OF_MATCH, *one],
      'with --record',
    )
    if values.players and values.opponents:
      refuse(['simulations'], 'with --players and --opponents')
    return record.launch
  refuse(['frames'], 'without --record')
  if values.human:
    others = ('opponents', 'out', *_OF_SEARCH, *_OF_EPISODES, *_OF_MATCH)
    refuse([*others, *one], 'with --human')
    if len(values.players) > 1:
      refuse(['players'], 'beyond the first with --human', 'take one')
    return arena.launch
  refuse(['begin'], 'without --human')
  if values.opponents or (values.players and _is_game(experiment)):
    others = (*_OF_SEARCH, *_OF_EPISODES, *one)
    refuse(others, 'with --players and --opponents')
    return arena.launch
  refuse(_OF_MATCH, 'without --players or --opponents of a game')
  if not values.players:
    return episodes.launch
  refuse(_OF_SEARCH, 'with --players')
  if not actor_critic:
    return episodes.launch
  refuse(one, 'with --players')
  return actor_critic_play.launch


def _is_game(experiment: build.Experiment) -> bool:
  env = build.make_env(experiment, training=False, num_envs=1)
  return env.spec.game is not None
