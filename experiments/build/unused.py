"""Settings that a kind of run would not read."""

from collections.abc import Sequence
from typing import Any

from experiments.runtime import overrides

# Fields of `RunConfig` that only one kind of run reads.
_OF_ACTING = (
  'replay_capacity',
  'replay_alpha',
  'replay_beta',
  'frames_on',
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
  'frames_on',
  'compress_replay',
)


def refuse_unused(
  assignments: Sequence[str],
  configs: Sequence[Any],
  *,
  on_data: bool,
  is_fresh: bool = False,
) -> None:
  """Refuses a user's settings that this kind of run does not read.

  `configs` are the agent's, of the run or of each setting of a sweep, with the
  assignments (`field=value`) made; a setting of a mixture may be read by some
  of them only. `on_data` and `is_fresh` say whether the agent learns from a
  data set or text, or from each step once, without a replay.

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
    remedies = [_without_experts(name, config) for config in configs]
    if all(remedies):
      raise ValueError(
        f'{assignment}: there is no mixture of experts; set {remedies[0]}, or '
        'leave it out'
      )


def _without_experts(name: str, config: Any) -> str | None:
  """What makes the mixture that a setting is of, if there is none."""
  paths = list(overrides.paths(config, ('agent',)))
  for path in overrides.matching(paths, tuple(name.split('.'))):
    if 'moe' in path[:-1] and _get(config, 'network.mixture') == 'none':
      return 'network.mixture=torso, dynamics or heads'
    is_inside = 'critic_moe' in path[:-1] and path[-1] != 'num_experts'
    if is_inside and not config.critic_moe.num_experts:
      return 'critic_moe.num_experts=8, say'
  return None


def _get(config: Any, path: str) -> Any:
  """The value at a path, or None where the config has none."""
  for name in path.split('.'):
    config = getattr(config, name, None)
  return config
