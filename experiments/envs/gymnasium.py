"""Any Gymnasium environment as a host environment, including your own.

`contract` checks each call: a violation of Gymnasium's interface becomes an
error of one line.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from agents.core.types import Discrete, Spec
from experiments.envs import contract, host
from experiments.envs import recorded as recording
from experiments.files.errors import UserError
from search.model import TimeStep


def make_gymnasium(
  env_id_or_fn: str | Callable[[], Any],
  num_envs: int,
  *,
  frame_stack: int = 1,
  channels: Any = None,
  recorded: recording.Recorded = recording.NOTHING,
  **options: Any,
) -> host.HostEnvironment:
  """Makes `num_envs` copies of a Gymnasium environment, stepped one by one.

  Rewards, observations and ends of episodes are the environment's own; put
  wrappers (clipping, frame skip) into the function that makes it. Like
  envpool's, a copy is reset at the step after its episode's end.

  Args:
    env_id_or_fn: a registered id, `module:id` for an id that the module
      registers, or `() -> gymnasium.Env`.
    frame_stack: number of observations stacked along the last axis.
    channels: the axis of an image's channels, `first` or `last` as in
      `host.observation_codec`; another value is the environment's own option.
    recorded: the environment of a data set, rebuilt if its id is the same; the
      parts of observations then come in its order.
    **options: of `gymnasium.make`, for an id only.

  Raises:
    ValueError: an unknown id or option, or an unsupported space.
    SimulatorError: the environment cannot be made, or it (also later, when it
      runs) breaks Gymnasium's interface.
  """
  host.check_num_envs(num_envs)
  if channels not in (None, 'first', 'last'):
    options, channels = options | {'channels': channels}, None
  env, make = _maker(env_id_or_fn, options, recorded)
  probe = make()
  name = _name(probe)
  observation_space = _space(env, probe, 'observation_space')
  action_space = _space(env, probe, 'action_space')
  where, notes = f'env={env}', []
  frame, convert = host.observation_codec(observation_space, where, channels)
  ours = host.columns(observation_space, where)
  if len(ours) > 1 and recorded.columns:
    convert = _ordered(convert, host.in_order(ours, recorded.columns, env))
  action = host.action_spec(action_space, where)
  # Checks a reset and a step of a spare copy before anything else is made.
  copy = _Copy(env, 0, probe, observation_space, 0, notes)
  copy.reset()
  action_space.seed(0)
  copy.step(action_space.sample())
  copy.close()
  spec = Spec(
    observation=host.stacked(frame, frame_stack, where),
    action=action,
    frame_stack=frame_stack,
    name=name,
  )

  def start(seed: int) -> host.Simulator:
    seeds = host.env_seeds(seed, num_envs)
    copies = [
      _Copy(env, i, make(), observation_space, seeds[i], notes)
      for i in range(num_envs)
    ]
    stack, tally = None, host.Tally(num_envs)
    last = np.ones(num_envs, bool)

    def time_step(results):
      nonlocal stack, last
      observations, rewards, ended, cut = zip(*results)
      frame = convert(jax.tree.map(lambda *x: np.stack(x), *observations))
      stack = host.push_frame(stack, frame, last, frame_stack)
      ended = np.array(ended, bool)
      timestep = TimeStep(
        observation=stack,
        reward=np.array(rewards, np.float32),
        discount=(~ended).astype(np.float32),
        is_first=last,
        truncated=np.array(cut, bool) & ~ended,
      )
      last = timestep.is_last()
      return timestep

    def reset():
      nonlocal stack, last, tally
      stack, tally = None, host.Tally(num_envs)
      last = np.ones(num_envs, bool)
      return time_step([copy.reset() for copy in copies])

    def step(action):
      action = host.check_action(action, spec, num_envs)
      if isinstance(spec.action, Discrete):
        action = [
          int(a) + int(getattr(action_space, 'start', 0)) for a in action
        ]
      else:
        action = action.astype(action_space.dtype)
      results = [
        copy.reset() if over else copy.step(action[i])
        for i, (copy, over) in enumerate(zip(copies, np.asarray(last)))
      ]
      timestep = time_step(results)
      rewards = np.array([r[1] for r in results], np.float64)
      stats = tally.add(rewards, timestep.is_first, last)
      return timestep, stats

    def close():
      for copy in copies:
        copy.close()

    return host.Simulator(reset, step, close)

  return host.HostEnvironment(spec, num_envs, start)


def _ordered(convert, order):
  return lambda x: convert(x)[:, order]


def _maker(env_id_or_fn, options, recorded) -> tuple[str, Callable[[], Any]]:
  """The environment's name for messages, and `() -> gymnasium.Env`."""
  import gymnasium

  if callable(env_id_or_fn):
    if options:
      raise ValueError(f'options {sorted(options)} need an id, not a function')
    env = getattr(env_id_or_fn, '__qualname__', type(env_id_or_fn).__name__)
    return env, lambda: contract.call(env, 'making it', '', env_id_or_fn)
  env = f'gymnasium:{env_id_or_fn}'
  module, colon, _ = env_id_or_fn.partition(':')
  if colon:
    remedy = 'its folder must be in PYTHONPATH, or the package installed'
    what = f'importing {module}'
    contract.call(env, what, remedy, importlib.import_module, module)
  # Gymnasium's own checker only warns of errors that are refused here.
  options = {'disable_env_checker': True} | options

  def make():
    try:
      return recording.make(env_id_or_fn, recorded, options)
    except gymnasium.error.Error as error:
      why = str(error).rstrip('.')
      raise UserError(
        f'env={env!r}: {why}; must be in gymnasium.registry with its libraries '
        'installed, or your own --env=gymnasium:MODULE:ID'
      ) from error

  remedy = (
    'its constructor must accept the options of '
    '--set=env.options=NAME=VALUE,... and return a gymnasium.Env'
  )
  return env, lambda: contract.call(env, 'making it', remedy, make)


def _name(env) -> str:
  spec = getattr(env, 'spec', None)
  return spec.id if spec else type(getattr(env, 'unwrapped', env)).__name__


def _space(env, made, which):
  import gymnasium

  remedy = f'the constructor must set self.{which}'
  get = lambda: getattr(made, which)
  space = contract.call(env, f'its {which}', remedy, get)
  if not isinstance(space, gymnasium.Space):
    raise contract.SimulatorError(
      f'env={env}: {which} is {contract.described(space)}; must be a space of '
      'gymnasium.spaces'
    )
  return space


def _close(env, made) -> None:
  # A failure to close loses no results, so it is only noted.
  try:
    contract.call(env, 'close()', '', made.close)
  except contract.SimulatorError as error:
    contract.note(str(error))


class _Copy:
  """A running environment whose results are checked."""

  def __init__(self, env, index, made, space, seed, notes):
    self._env, self._index, self._made, self._space = env, index, made, space
    self._seed: int | None = seed
    # All copies share the notes, so that each is printed once.
    self._steps, self._notes = 0, notes

  def reset(self):
    # Only the first reset has a seed; later episodes continue its generator.
    seed, self._seed = self._seed, None
    call, remedy = 'reset()', contract.RESET
    result = contract.call(self._env, call, remedy, self._made.reset, seed=seed)
    observation = self._check(call, contract.checked_reset, result)
    self._look(call, observation)
    return observation, 0.0, False, False

  def step(self, action):
    self._steps += 1
    call = f'step {self._steps} of copy {self._index}'
    result = contract.call(
      self._env, call, contract.STEP, self._made.step, action
    )
    checked = self._check(call, contract.checked_step, result)
    self._look(call, checked[0])
    return checked

  def _check(self, call, check, result):
    try:
      return check(result, self._space)
    except contract.Wrong as wrong:
      raise contract.SimulatorError(
        f'env={self._env}: {call} {wrong}'
      ) from wrong.__cause__

  def _look(self, call, observation):
    if self._notes:
      return
    far = contract.far_outside(observation, self._space)
    if far:
      note = (
        f'env={self._env}: {call} returned an observation outside its space: '
        f'{far}; this note is printed once'
      )
      self._notes.append(note)
      contract.note(note)

  def close(self):
    _close(self._env, self._made)
