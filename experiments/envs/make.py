"""Makes an environment by its name."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from experiments.envs.host import HostEnvironment
from search.model import Environment


def make(
  name: str,
  num_envs: int,
  *,
  training: bool,
  frame_stack: int | None = None,
  num_threads: int = 0,
  options: Mapping[str, Any] | None = None,
  action_bins: int = 0,
  recorded: str = '',
) -> Environment | HostEnvironment:
  """Makes an environment; no simulation starts yet.

  Args:
    name: `jax:catch` for one of our own, `self_play:connect_four` for a game of
      `games.make_game`, `gymnasium:CartPole-v1` for one from Gymnasium, any
      other name for envpool (`Catch-v0`, `Pong-v5`, `PongNoFrameskip-v4`,
      `HopperHop-v1`).
    num_envs: copies stepped together on the host; ignored by pure environments,
      which are unbatched.
    training: on Atari, whether a lost life ends an episode and rewards are
      clipped; in a game, whether the agent plays itself or an opponent.
    frame_stack: frames in an observation; None for the default.
    num_threads: envpool's threads; 0 for the default.
    action_bins: bins per dimension of continuous actions (`discretise`); 0
      leaves actions continuous.
    recorded: JSON of `recorded.Recorded`, for Gymnasium only; '' for none.

  Returns:
    An `Environment` for `jax:` and `self_play:` names, else a
    `HostEnvironment`.

  Raises:
    ValueError: an unknown name or option, an unsupported space, or actions that
      cannot be divided into bins.
  """
  env: Any = _make(
    name, num_envs, training, frame_stack, num_threads, options, recorded
  )
  if action_bins:
    from experiments.envs.discretise import discretise

    env = discretise(env, action_bins)
  return env


# Arguments of the makers that are fields of the settings, not options.
_FIELDS = ('num_envs', 'num_threads', 'frame_stack', 'training')


def _make(
  name, num_envs, training, frame_stack, num_threads, options, recorded
):
  options = dict(options or {})
  for option in _FIELDS:
    if option in options:
      raise ValueError(
        f'env.options={option}={options[option]}: is not an option; '
        + (f'set env.{option}' if option != 'training' else 'leave it out')
      )
  kind, colon, rest = name.partition(':')
  if not colon:
    from experiments.envs import envpool

    return envpool.make_envpool(
      name,
      num_envs,
      num_threads=num_threads,
      frame_stack=frame_stack,
      training=training,
      **options,
    )
  if kind == 'gymnasium':
    from experiments.envs import gymnasium
    from experiments.envs import recorded as recording

    stack = 1 if frame_stack is None else frame_stack
    return gymnasium.make_gymnasium(
      rest,
      num_envs,
      frame_stack=stack,
      recorded=recording.decode(recorded),
      **options,
    )
  if kind not in ('jax', 'self_play'):
    raise ValueError(
      f'env={name!r}: the part before the colon must be jax, self_play or '
      'gymnasium'
    )
  if frame_stack not in (None, 1):
    raise ValueError(
      f'frame_stack={frame_stack}: {name} has no frames; leave it out'
    )
  if kind == 'self_play':
    return _make_game(name, rest, training, options)
  from experiments.envs import (
    acrobot,
    breakout,
    cartpole,
    catch,
    connect_four,
    mountain_car,
    pendulum,
    point_mass,
    swingup,
  )

  makers = {
    'acrobot': acrobot.make_acrobot,
    'breakout': breakout.make_breakout,
    'connect_four': connect_four.make_connect_four,
    'mountain_car': mountain_car.make_mountain_car,
    'catch': catch.make_catch,
    'cartpole': cartpole.make_cartpole,
    'pendulum': pendulum.make_pendulum,
    'point_mass': point_mass.make_point_mass,
    'swingup': swingup.make_swingup,
  }
  if rest not in makers:
    near = difflib.get_close_matches(rest, makers, 1)
    hint = f'; did you mean jax:{near[0]}?' if near else ''
    raise ValueError(
      f'env={name!r}: unknown; must be jax: and one of {", ".join(makers)}'
      f'{hint}'
    )
  known = inspect.signature(makers[rest]).parameters
  for option, value in options.items():
    if option not in known:
      raise ValueError(
        f'env.options={option}={value}: unknown; {name} has '
        f'{", ".join(known) or "no options"}; env.options= clears the '
        "preset's options"
      )
    _check_kind(option, value, known[option].default)
  return makers[rest](**options)


def _check_kind(option: str, value: Any, usual: Any) -> None:
  """Refuses a value whose type differs from the default's."""
  if type(usual) not in (bool, int, float):
    return
  kinds = (int, float) if type(usual) is float else (type(usual),)
  if type(value) not in kinds:
    raise ValueError(
      f'env.options={option}={value}: must be of type {kinds[-1].__name__}, '
      f'such as {usual}'
    )


def _make_game(name, rest, training, options):
  from experiments.envs import against, games, self_play

  opponent = options.pop('opponent', 'random')
  plies = options.pop('opening_plies', 0)
  if options:
    raise ValueError(
      f'options={options}: {name} has opponent and opening_plies only'
    )
  if not isinstance(plies, int) or plies < 0:
    raise ValueError(
      f'opening_plies={plies!r}: must be a whole number, 0 or more'
    )
  game = games.make_game(rest)
  versus = against.against(game, opponent)
  return self_play.self_play(game, plies) if training else versus
