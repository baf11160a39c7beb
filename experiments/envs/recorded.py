"""Rebuilds the environment that a data set was recorded in.

Minari stores Gymnasium's `EnvSpec`: an id, keyword arguments, a time limit and
wrappers. All affect the agent, so all are rebuilt as far as a file may be
trusted: ids must be registered already, arguments plain numbers and words, and
wrappers in the list below. Other parts are listed, to be reported before
training.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.envs import names
from experiments.files import reading
from experiments.files.errors import UserError, shown

# The keys of both in a data set's `layout.About.extra`.
KEY, LEFT_OUT = 'recorded', 'not_rebuilt'
# Wrappers that depend only on the current step and on their arguments.
WRAPPERS = frozenset(
  (
    *('AtariPreprocessing', 'ClipAction', 'ClipReward', 'DelayObservation'),
    *('FilterObservation', 'FlattenObservation', 'FrameStackObservation'),
    *('GrayscaleObservation', 'MaxAndSkipObservation', 'RepeatAction'),
    *('RescaleAction', 'RescaleObservation', 'ReshapeObservation'),
    *('ResizeObservation', 'StickyAction', 'TimeAwareObservation', 'TimeLimit'),
  )
)
# Wrappers that have no effect on the agent.
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
  """The parts of a recorded environment that are rebuilt.

  Attributes:
    id: Gymnasium's id, without a module; '' if nothing was recorded.
    kwargs: keyword arguments of the environment itself.
    max_episode_steps: the time limit; None for none.
    wrappers: from the innermost to the outermost.
    columns: name and size of each part of an observation that is a dict or
      tuple, in the order of the data; () for other observations.
  """

  id: str = ''
  kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
  max_episode_steps: int | None = None
  wrappers: tuple[Wrapper, ...] = ()
  columns: tuple[tuple[str, int], ...] = ()


NOTHING = Recorded()


@dataclasses.dataclass(frozen=True)
class _WrapperSpec:
  """A wrapper in the JSON of Gymnasium's `EnvSpec`."""

  name: str
  entry_point: str = ''
  kwargs: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class _EnvSpec:
  """The fields of Gymnasium's `EnvSpec` JSON that are used here."""

  id: str
  kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
  max_episode_steps: int | None = None
  additional_wrappers: tuple[_WrapperSpec, ...] = ()


def from_spec(text: str, where: str) -> tuple[Recorded, list[str]]:
  """Splits JSON of an `EnvSpec` into parts that are rebuilt and that are not.

  Returns:
    `Recorded` without columns and without a module in its id, and a phrase for
    each part that is left out.

  Raises:
    UserError: the text is not such JSON.

  >>> text = '{"id": "Ant-v5", "kwargs": {"a": 2, "xml_file": "/x"}}'
  >>> recorded, left_out = from_spec(text, 'env_spec')
  >>> recorded.kwargs, left_out
  ({'a': 2}, ['xml_file=/x'])
  """
  spec = reading.decode_json(text, _EnvSpec, where)
  left_out, kwargs, wrappers = [], {}, []
  for name, value in spec.kwargs.items():
    # Rendering does not affect the agent.
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
  """The id of an `EnvSpec` that `from_spec` has read, with its module."""
  return json.loads(text)['id']


def encode(recorded: Recorded) -> str:
  """Encodes as JSON, for settings and files."""
  return json.dumps(dataclasses.asdict(recorded), sort_keys=True)


def decode(text: str, where: str = 'env.recorded') -> Recorded:
  """Decodes JSON from `encode`; '' and 'none' mean `NOTHING`.

  Raises:
    UserError: the text is not such JSON, or names code.
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
        f'{where}: the wrapper {shown(wrapper.name, 60)} is unknown; must be '
        f'one of {", ".join(sorted(WRAPPERS))}'
      )
  if not names.is_plain([found.kwargs, *(w.kwargs for w in found.wrappers)]):
    raise UserError(
      f'{where}: arguments must be numbers and words, not paths or modules; '
      'give others with --set=env.options=name=value'
    )
  if found.max_episode_steps is not None and found.max_episode_steps < 1:
    raise UserError(
      f'{where}: max_episode_steps={found.max_episode_steps}: must be at '
      'least 1'
    )
  return found


def make(env_id: str, recorded: Recorded, options: Mapping[str, Any]) -> Any:
  """Makes a `gymnasium.Env`, as recorded if its id is the recorded one.

  The user's own options override recorded arguments.

  Raises:
    UserError: a wrapper refused its arguments.
    gymnasium.error.Error: the id is unknown, or it refused its arguments.
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
        f'env={env_id}: the recorded wrapper {wrapper.name} failed: '
        f'{shown(error)}; --set=env.recorded=none ignores what was recorded'
      ) from error
  return env
