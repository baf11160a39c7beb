"""Settings that a kind of run would not read."""

from collections.abc import Sequence
from typing import Any

from experiments.runtime import overrides

# Fields of `RunConfig` that only one kind of run reads.
_OF_ACTING = (
  'replay_capacity',
  'replay_alpha',
  'replay_beta',
  'compress_replay',
  'warmup_decisions',
  'decisions_per_update',
  'extra_updates',
  'acting',
  'queue_size',
  'publish_every',
  'acting_devices',
)
_OF_DATA = ('reward_factor', 'data_on')
_OF_REPLAY = (
  'replay_capacity',
  'replay_alpha',
  'replay_beta',
  'compress_replay',
)


def refuse_unused(
  assignments: Sequence[str],
  config: Any,
  *,
  on_data: bool,
  is_fresh: bool = False,
) -> None:
  """Refuses a user's settings that this kind of run does not read.

  `config` is the agent's, with the assignments (`field=value`) made; `on_data`
  and `is_fresh` say whether it learns from a data set or text, or from each
  step once, without a replay.

  Raises:
    ValueError: a setting would have no effect.
  """
  unused, reason = _OF_DATA, 'needs a data set (--dataset)'
  if on_data:
    unused, reason = _OF_ACTING, 'a run on data does not act and has no replay'
  elif is_fresh:
    unused += _OF_REPLAY
    reason = 'this agent learns from fresh steps, without data or a replay'
  for assignment in assignments:
    name = assignment.partition('=')[0].strip()
    section, _, field = name.rpartition('.')
    if section in ('', 'run') and field in unused:
      raise ValueError(f'{assignment}: {reason}; leave it out')
    _refuse_without_experts(assignment, config)


def _refuse_without_experts(assignment: str, config: Any) -> None:
  """Refuses a setting of a mixture of experts that no network has."""
  name = assignment.partition('=')[0].strip()
  paths = list(overrides.paths(config, ('agent',)))
  for path in overrides.matching(paths, tuple(name.split('.'))):
    if 'moe' in path[:-1] and _get(config, 'network.mixture') == 'none':
      remedy = 'network.mixture=torso, dynamics or heads'
    elif 'critic_moe' in path[:-1] and not config.critic_moe.num_experts:
      remedy = 'critic_moe.num_experts=8, say'
    else:
      continue
    raise ValueError(
      f'{assignment}: there is no mixture of experts; set {remedy}, or leave '
      'it out'
    )


def _get(config: Any, path: str) -> Any:
  """The value at a path, or None where the config has none."""
  for name in path.split('.'):
    config = getattr(config, name, None)
  return config
