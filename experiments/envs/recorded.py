"""The environment that a data set was recorded in, made again.

Minari keeps Gymnasium's `EnvSpec`: an id, keyword arguments, a time limit and
wrappers. All of it decides what an agent meets, so all of it is made again, as
far as a file may decide: ids are of what is registered already, arguments are
plain numbers and words, and wrappers those of Gymnasium that are listed here.
What is left out is named, so that it can be said before training.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.envs import names
from experiments.files import reading
from experiments.files.errors import UserError, shown

# Where a data set keeps both in `layout.About.extra`.
KEY, LEFT_OUT = 'recorded', 'not_rebuilt'
# Wrappers that are functions of the present step and of their arguments.
WRAPPERS = frozenset(
  (
    *('AtariPreprocessing', 'ClipAction', 'ClipReward', 'DelayObservation'),
    *('FilterObservation', 'FlattenObservation', 'FrameStackObservation'),
    *('GrayscaleObservation', 'MaxAndSkipObservation', 'RepeatAction'),
    *('RescaleAction', 'RescaleObservation', 'ReshapeObservation'),
    *('ResizeObservation', 'StickyAction', 'TimeAwareObservation', 'TimeLimit'),
  )
)
# They change nothing that an agent meets.
_WATCHERS = frozenset(
  (
    *('Autoreset', 'HumanRendering', 'OrderEnforcing', 'PassiveEnvChecker'),
    *('RecordEpisodeStatistics', 'RecordVideo', 'RenderCollection'),
    'DataCollector',
  )
)
_MODULE = re.compile(r'gymnasium\.wrappers(\.\w+)*:(\w+)')


class Wrapper(NamedTuple):
  """One of `WRAPPERS`, by name, and its arguments."""

  name: str
  kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recorded:
  """What of an environment is made again.

  Attributes:
    id: Gymnasium's, without a module; '' where nothing was recorded.
    kwargs: of the environment itself.
    max_episode_steps: the time limit; None for none.
    wrappers: from the innermost to the outermost.
    columns: name and size of each part of an observation that is a dict or
      tuple, in the order in which the data have them; () for others.
  """

  id: str = ''
  kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
  max_episode_steps: int | None = None
  wrappers: tuple[Wrapper, ...] = ()
  columns: tuple[tuple[str, int], ...] = ()


NOTHING = Recorded()


@dataclasses.dataclass(frozen=True)
class _WrapperSpec:
  """Gymnasium's, as JSON."""

  name: str
  entry_point: str = ''
  kwargs: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class _EnvSpec:
  """Of Gymnasium's what matters here, as JSON."""

  id: str
  kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
  max_episode_steps: int | None = None
  additional_wrappers: tuple[_WrapperSpec, ...] = ()


def from_spec(text: str, where: str) -> tuple[Recorded, list[str]]:
  """What is made again of an `EnvSpec`, and what is not.

  Args:
    text: JSON of `gymnasium.envs.registration.EnvSpec.to_json`.
    where: what it is called in messages.

  Returns:
    `Recorded` without columns, its id without a module, and a phrase for each
    thing that is left out.

  Raises:
    UserError: it is no such JSON.

  >>> text = '{"id": "Ant-v5", "kwargs": {"a": 2, "xml_file": "/x"}}'
  >>> recorded, left_out = from_spec(text, 'env_spec')
  >>> recorded.kwargs, left_out
  ({'a': 2}, ['xml_file=/x'])
  """
  spec = reading.decode_json(text, _EnvSpec, where)
  left_out, kwargs, wrappers = [], {}, []
  for name, value in spec.kwargs.items():
    # What is drawn is nobody's to decide here.
    if name == 'render_mode':
      continue
    if names.is_plain({name: value}):
      kwargs[name] = value
    else:
      left_out.append(f'{shown(name, 40)}={shown(value, 60)}')
  for wrapper in spec.additional_wrappers:
    found = _MODULE.fullmatch(wrapper.entry_point)
    name = found[2] if found else ''
    if wrapper.name in _WATCHERS:
      continue
    if name in WRAPPERS and names.is_plain(wrapper.kwargs or {}):
      wrappers.append(Wrapper(name, wrapper.kwargs or {}))
    else:
      left_out.append(f'the wrapper {shown(wrapper.name, 60)}')
  limit = spec.max_episode_steps
  if limit is not None and limit < 1:
    limit = None
  env_id = spec.id.rpartition(':')[2]
  return Recorded(env_id, kwargs, limit, tuple(wrappers)), left_out


def full_id(text: str) -> str:
  """The id of an `EnvSpec` as `from_spec` has read it, with its module."""
  return json.loads(text)['id']


def encode(recorded: Recorded) -> str:
  """As JSON, for settings and files."""
  return json.dumps(dataclasses.asdict(recorded), sort_keys=True)


def decode(text: str, where: str = 'env.recorded') -> Recorded:
  """From JSON; '' and 'none' are nothing.

  Args:
    text: of `encode`, perhaps from a file.
    where: what it is called in messages.

  Raises:
    UserError: it is something else, or has what a file may not decide.
  """
  if text in ('', 'none'):
    return NOTHING
  found = reading.decode_json(text, Recorded, where)
  if ':' in found.id:
    raise UserError(
      f'{where}: id={shown(found.id)} names a module; give --env=gymnasium:'
      f'{shown(found.id)} if you trust it'
    )
  for wrapper in found.wrappers:
    if wrapper.name not in WRAPPERS:
      raise UserError(
        f'{where}: the wrapper {shown(wrapper.name, 60)} is not one of '
        f'{", ".join(sorted(WRAPPERS))}'
      )
  if not names.is_plain([found.kwargs, *(w.kwargs for w in found.wrappers)]):
    raise UserError(
      f'{where}: arguments must be numbers and words, no paths or modules; '
      'give others with --set=env.options=name=value'
    )
  if found.max_episode_steps is not None and found.max_episode_steps < 1:
    raise UserError(
      f'{where}: max_episode_steps={found.max_episode_steps}: must be at '
      'least 1'
    )
  return found


def make(env_id: str, recorded: Recorded, options: Mapping[str, Any]) -> Any:
  """A `gymnasium.Env`; as recorded, if its id is the one recorded.

  Args:
    env_id: registered; a module may stand before it if the user says so.
    recorded: what is made again.
    options: the user's own, which count first.

  Raises:
    UserError: a wrapper does not take its arguments.
    gymnasium.error.Error: there is no such id, or it does not take these.
  """
  import gymnasium

  if env_id.rpartition(':')[2] != recorded.id:
    return gymnasium.make(env_id, **options)
  limit = recorded.max_episode_steps
  kwargs = {'max_episode_steps': -1 if limit is None else limit}
  env = gymnasium.make(env_id, **{**kwargs, **recorded.kwargs, **options})
  for wrapper in recorded.wrappers:
    try:
      env = getattr(gymnasium.wrappers, wrapper.name)(env, **wrapper.kwargs)
    except Exception as error:
      env.close()
      raise UserError(
        f'env={env_id}: the recorded wrapper {wrapper.name} does not fit: '
        f'{shown(error)}; --set=env.recorded=none leaves all that out'
      ) from error
  return env


def told(recorded: Recorded) -> str:
  """In words, what is made again beyond the id."""
  parts = [f'{k}={shown(v, 40)}' for k, v in recorded.kwargs.items()]
  limit = recorded.max_episode_steps
  parts.append('no time limit' if limit is None else f'{limit} steps at most')
  parts += [wrapper.name for wrapper in recorded.wrappers]
  return ', '.join(parts)
