"""envpool's simulators: Atari, classic control, bsuite, MuJoCo, DMC, ...

Traps that are handled here: the step after an episode's end is a dummy, and
becomes the next episode's first time step; bad actions never reach C++;
neighbouring seeds do not share streams; a zero `noop_max`, which crashes
envpool, is refused; on Atari, the end of a game that coincides with the time
limit is a termination (elsewhere nothing distinguishes it from a truncation).

Atari defaults are the Atari 100k protocol of EfficientZero (Ye et al. 2021):
frame skip 4 with a maximum over the last two, stack 4, 96x96 RGB, up to 30
no-ops, no sticky actions, 3000 decisions per game; in training a lost life
terminates and rewards are clipped to [-1, 1]. Frames are stacked here, because
envpool's stack continues across a lost life; ours restarts at every first step,
as EfficientZero's does. After a lost life envpool plays the no-ops of a reset,
whose rewards belong to no time step, so returns with `training=True` may miss a
point: report scores with `training=False`.

DeepMind Control and MuJoCo: envpool's `frame_skip` is the number of physics
steps in one simulator step (by default the task's control interval), over which
rewards are not summed; `max_episode_steps` counts simulator steps. To repeat
actions, use `action_repeat`.

Images (`from_pixels=True`) are drawn by OpenGL through EGL. envpool's copy of
that library does not find Mesa's drivers, and the process dies; the system's
copy, loaded before envpool is imported, finds them. A trial in a separate
process turns a failure that remains into a ValueError. From 1.2.6 on, importing
envpool needs OpenGL for MuJoCo and football; without it, `library` leaves out
the families that cannot be loaded.
"""

import ctypes
import difflib
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import types
import warnings
from typing import Any

import jax
import numpy as np

from agents.core.types import Spec
from experiments.envs import contract, host
from search.model import TimeStep

ATARI_100K = {
  'frame_skip': 4,
  'gray_scale': False,
  'img_height': 96,
  'img_width': 96,
  'noop_max': 30,
  'use_fire_reset': False,
  'repeat_action_probability': 0.0,
  'full_action_space': False,
}
# Options for DQN's frames (Mnih et al. 2015).
ATARI_GRAY = {'gray_scale': True, 'img_height': 84, 'img_width': 84}

# Options that num_envs, frame_stack and the seed of `start` set.
_OURS = (
  'seed',
  'env_seed',
  'num_envs',
  'batch_size',
  'stack_num',
  'frame_stack',
  'max_num_players',
  'gym_reset_return_info',
)

# Options of all MuJoCo tasks that no list of fields contains.
_DRAWING = (
  'from_pixels',
  'render_mode',
  'render_width',
  'render_height',
  'render_camera_id',
)

# The Debian packages of the libraries that envpool's binaries load.
_PACKAGES = {
  'libEGL.so.1': 'libegl1',
  'libOpenGL.so.0': 'libopengl0',
  'libstdc++.so.6': 'libstdc++6',
  'libgcc_s.so.1': 'libgcc-s1',
}


@functools.cache
def library() -> types.ModuleType:
  """Imports envpool, without the families whose libraries are missing.

  The names of such a family are registered if they are known without its
  binary; making one of them raises ImportError.

  Raises:
    ValueError: envpool cannot be imported at all.
  """
  try:
    return importlib.import_module('envpool')
  except ImportError as error:
    if isinstance(error, ModuleNotFoundError):
      raise ValueError(f'envpool cannot be imported: {error}') from error
  # `envpool.entry` does nothing but import every family.
  sys.modules['envpool.entry'] = types.ModuleType('envpool.entry')
  try:
    envpool = importlib.import_module('envpool')
  except ImportError as error:
    raise ValueError(f'envpool cannot be imported: {_remedy(error)}') from error
  [root] = envpool.__path__
  for path in sorted(pathlib.Path(root).glob('*/**/registration.py')):
    parts = path.parent.relative_to(root).parts
    _register('.'.join(('envpool', *parts)))
  return envpool


# Families whose names are in their binary, and the error in loading it.
_unloaded: dict[str, ImportError] = {}


def _register(family: str) -> None:
  """Registers a family's names, with its binary if that can be loaded."""
  try:
    importlib.import_module(f'{family}.registration')
    return
  except ImportError as error:
    why = error
  # Most lists of names need only the package's path, so it is not executed.
  # Making one of the names imports the real package, which fails again.
  spec = importlib.util.find_spec(family)
  assert spec is not None
  sys.modules[family] = importlib.util.module_from_spec(spec)  # Not executed.
  try:
    importlib.import_module(f'{family}.registration')
  except ImportError:
    _unloaded[family] = why
  finally:
    del sys.modules[family]


def _remedy(error: ImportError) -> str:
  """One line that names the missing libraries and their packages."""
  found = re.match(r'(lib\S+): cannot open shared object', str(error))
  if not found:
    return str(error).splitlines()[0]
  # The loader reports only the first missing library.
  names = [found[1], *(n for n in _PACKAGES if n != found[1] and not _loads(n))]
  packages = ' '.join(_PACKAGES.get(n, f'what has {n}') for n in names)
  return (
    f'needs {" and ".join(names)}, not found on this machine; on Debian: '
    f'apt-get install {packages}'
  )


def _loads(name: str) -> bool:
  try:
    ctypes.CDLL(name)
  except OSError:
    return False
  return True


def resolve_id(env_id: str) -> str:
  """envpool's name of an environment.

  Atari games may have their other usual names: `Pong`, `PongNoFrameskip-v4` and
  `ALE/Pong-v5` all mean `Pong-v5`.

  Raises:
    ValueError: no such environment; the message has the nearest names.
  """
  envpool = library()
  ids = envpool.list_all_envs()
  if env_id in ids:
    return env_id
  match = re.fullmatch(
    r'(?:ALE/)?(\w+?)(?:NoFrameskip|Deterministic)?(?:-v[045])?', env_id
  )
  if match and f'{match[1]}-v5' in ids:
    game = f'{match[1]}-v5'
    if 'noop_max' in envpool.make_spec(game).config._fields:
      return game
  by_lower = {i.lower(): i for i in ids}
  stem = env_id.lower().removeprefix('ale/')
  for suffix in ('noframeskip', 'deterministic'):
    stem = stem.replace(suffix, '')
  near = difflib.get_close_matches(stem, by_lower, n=4, cutoff=0.5)
  hint = ', '.join(by_lower[n] for n in near) or 'envpool.list_all_envs()'
  for error in _unloaded.values():  # All miss the same libraries.
    families = ', '.join(name.removeprefix('envpool.') for name in _unloaded)
    hint += f'; not loaded: {families}, which {_remedy(error)}'
    break
  raise ValueError(
    f'env={env_id!r}: unknown to envpool; nearest: {hint}; other names begin '
    'with jax:, self_play: or gymnasium: (for your own environment, use '
    '--env=gymnasium:MODULE:ID)'
  )


def make_envpool(
  env_id: str,
  num_envs: int,
  *,
  num_threads: int = 0,
  frame_stack: int | None = None,
  training: bool = True,
  action_repeat: int = 1,
  channels: str | None = None,
  **options: Any,
) -> host.HostEnvironment:
  """Makes copies of one of envpool's environments; `start` runs them.

  Args:
    env_id: envpool's name, or a usual name of an Atari game (`resolve_id`).
    num_threads: of the simulator; 0 takes `min(2, num_envs)`. Streams do not
      depend on it.
    frame_stack: number of frames in an observation, along its last axis; None
      takes 4 for Atari and 1 elsewhere.
    training: on Atari, a lost life terminates, rewards are clipped and games
      are truncated after 3,000 decisions instead of 27,000 (unless `options`
      set `episodic_life`, `reward_clip` or `max_episode_steps`). False is the
      evaluation protocol. `EpisodeStats` always count true games.
    action_repeat: simulator steps per decision, their rewards summed; an
      episode's last decision may be shorter. `max_episode_steps` counts
      simulator steps, lengths in `EpisodeStats` decisions.
    channels: the axis of an image's channels, as in `host.observation_codec`.
    **options: envpool's own options, e.g. `max_episode_steps=27000`,
      `repeat_action_probability=0.25`, `**ATARI_GRAY`; they override
      `ATARI_100K`.

  Raises:
    ValueError: an unknown environment or option, a value out of range, a game
      for several players, an unsupported action or observation space, or MuJoCo
      images on a machine that cannot draw them.
  """
  host.check_num_envs(num_envs)
  if options.get('from_pixels'):
    _load_renderer()
  envpool = library()
  task = resolve_id(env_id)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # envpool casts its bounds to float32.
    try:
      usual = envpool.make_spec(task).config
    except ImportError as error:
      raise ValueError(f'env={env_id!r}: {_remedy(error)}') from error
    is_atari = 'noop_max' in usual._fields
    if is_atari:
      protocol = {
        'episodic_life': training,
        'reward_clip': training,
        'max_episode_steps': 3000 if training else 27_000,
      }
      options = {**ATARI_100K, **protocol, **options}
    _check_options(task, options, usual, num_threads)
    if not isinstance(action_repeat, int) or action_repeat < 1:
      raise ValueError(
        f'{task}: action_repeat={action_repeat!r} must be an integer >= 1'
      )
    if is_atari and action_repeat > 1:
      raise ValueError(
        f'{task}: action_repeat={action_repeat} must be 1 on Atari; use '
        'frame_skip'
      )
    if is_atari:
      options['stack_num'] = 1
    spec = envpool.make_spec(task, **options)
    if options.get('from_pixels'):
      _try_renderer()
    observation_space, action_space = spec.observation_space, spec.action_space
  if spec.config.max_num_players > 1:
    raise ValueError(
      f'env_id={env_id!r}: is for {spec.config.max_num_players} players, which '
      'is not supported; take a single-player environment'
    )
  if frame_stack is None:
    frame_stack = 4 if is_atari else 1
  frame, convert = host.observation_codec(observation_space, task, channels)
  mask_key = 'legal_action_mask'
  our_spec = Spec(
    observation=host.stacked(frame, frame_stack, task),
    action=host.action_spec(action_space, task),
    frame_stack=frame_stack,
    masks_actions=f'info:{mask_key}' in spec.state_array_spec,
    name=task,
  )

  def start(seed: int) -> host.Simulator:
    seeds = host.env_seeds(seed, num_envs)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      pool = envpool.make_gymnasium(
        task,
        num_envs=num_envs,
        num_threads=min(num_threads or 2, num_envs),
        seed=seeds,
        **options,
      )
      action_dtype = pool.action_space.dtype
      _ = pool.observation_space  # Made on first use, with the same warnings.
    stack, tally = None, host.Tally(num_envs)
    last = np.ones(num_envs, bool)

    def time_step(observation, reward, discount, truncated, info):
      nonlocal stack, last
      is_first = last
      stack = host.push_frame(
        stack, convert(observation), is_first, frame_stack
      )
      mask = info.get(mask_key)
      timestep = TimeStep(
        observation=stack,
        reward=np.where(is_first, 0, reward).astype(np.float32),
        discount=discount.astype(np.float32),
        is_first=is_first,
        truncated=truncated,
        invalid_actions=None if mask is None else ~np.asarray(mask, bool),
      )
      last = timestep.is_last()
      return timestep

    def reset():
      nonlocal stack, last, tally
      observation, info = pool.reset()
      contract.check_finite(task, 'reset()', observation=observation)
      stack, tally = None, host.Tally(num_envs)
      last = np.ones(num_envs, bool)
      no = np.zeros(num_envs, bool)
      return time_step(observation, np.zeros(num_envs), ~no, no, info)

    def step(action):
      action = host.check_action(action, our_spec, num_envs)
      observation, reward, ended, cut, info = _step_pool(
        pool, action.astype(action_dtype), action_repeat, last
      )
      contract.check_finite(
        task, 'step(action)', observation=observation, reward=reward
      )
      over = info['terminated'].astype(bool) if is_atari else ended
      ended = ended | over
      truncated = cut & ~ended
      timestep = time_step(observation, reward, ~ended, truncated, info)
      true_reward = info['reward'] if is_atari else reward
      return timestep, tally.add(true_reward, timestep.is_first, over | cut)

    return host.Simulator(reset, step, pool.close)

  return host.HostEnvironment(our_spec, num_envs, start)


def _step_pool(pool, action, times, last):
  """envpool's step, repeated in environments whose episode continues.

  `last`, bool `[E]`, marks environments whose step is a dummy, which is not
  repeated.
  """
  observation, reward, ended, cut, info = pool.step(action)
  live = ~last
  for _ in range(times - 1):
    live = live & ~(ended | cut)
    some = np.flatnonzero(live).astype(np.int32)
    if not some.size:
      break
    news = pool.step(action[some], some)
    some = news[4]['env_id']
    total = reward[some] + news[1]

    def put(old, new, some=some):
      old[some] = new

    jax.tree.map(put, (observation, reward, ended, cut, info), tuple(news))
    reward[some] = total
  return observation, reward, ended, cut, info


_RENDERER = 'libEGL.so.1'
_TRIAL = f"""
import ctypes
ctypes.CDLL('{_RENDERER}', mode=ctypes.RTLD_GLOBAL)
import envpool
envpool.make_gymnasium(
  'CartpoleSwingup-v1', num_envs=1, from_pixels=True, render_width=8,
  render_height=8,
).reset()
"""


@functools.cache
def _load_renderer() -> None:
  """Loads the system's EGL before envpool's own, once per process."""
  if _RENDERER in os.environ.get('LD_PRELOAD', ''):
    return
  if 'envpool' in sys.modules:
    raise ValueError(
      'from_pixels=True: envpool was imported before the renderer; make the '
      f'first such environment earlier or set LD_PRELOAD={_RENDERER}'
    )
  try:
    ctypes.CDLL(_RENDERER, mode=ctypes.RTLD_GLOBAL)
  except OSError as error:
    raise ValueError(
      f'from_pixels=True: needs OpenGL through EGL ({error}); install libegl1'
    ) from error


@functools.cache
def _try_renderer() -> None:
  """Draws one image in a separate process, which may crash."""
  trial = subprocess.run(
    [sys.executable, '-c', _TRIAL],
    capture_output=True,
    text=True,
    cwd=tempfile.gettempdir(),  # MuJoCo writes a log of errors.
  )
  if trial.returncode:
    lines = (trial.stderr + trial.stdout).strip().splitlines()
    reason = lines[-1] if lines else f'exit status {trial.returncode}'
    raise ValueError(
      f'from_pixels=True: images cannot be drawn on this machine ({reason}); '
      'install libegl1 and a driver (libgl1-mesa-dri draws on the CPU)'
    )


# More threads than this and than four per core slow down or kill the process.
_MAX_THREADS = 64


def _check_options(task, options, usual, num_threads):
  """Refuses options that envpool would ignore, or that would crash it."""
  fields = usual._fields
  for name, value in options.items():
    if name in _OURS:
      raise ValueError(
        f'{task}: option {name} cannot be set; use num_envs, frame_stack and '
        'the seed of start'
      )
    if name not in fields and name not in _DRAWING:
      known = ', '.join(sorted(f for f in fields if f not in _OURS))
      raise ValueError(f'{task}: unknown option {name}; known are {known}')
    if name in (
      'noop_max',
      'frame_skip',
      'img_height',
      'img_width',
      'max_episode_steps',
      'render_width',
      'render_height',
    ) and not (isinstance(value, int) and value >= 1):
      raise ValueError(f'{task}: {name}={value!r} must be an integer >= 1')
    _check_kind(task, name, value, getattr(usual, name, None))
    if name == 'repeat_action_probability' and not 0 <= value <= 1:
      raise ValueError(f'{task}: {name}={value!r} must be in [0, 1]')
  cores = os.cpu_count() or 1
  most = max(_MAX_THREADS, 4 * cores)
  if not 0 <= num_threads <= most:
    raise ValueError(
      f'{task}: num_threads={num_threads} must be from 0 to {most} on this '
      f'machine of {cores} cores'
    )


def _check_kind(task, name, value, usual):
  """Refuses a value of a type or range that C++ does not accept."""
  kind = type(usual)
  if kind not in (bool, int, float, str):
    return
  kinds = (int, float) if kind is float else (kind,)
  if type(value) not in kinds:
    raise ValueError(
      f'{task}: {name}={value!r} must be of type {kind.__name__}, such as '
      f'{usual!r}'
    )
  if kind is int and not -(2**31) <= value < 2**31:
    raise ValueError(f'{task}: {name}={value!r} must be a 32-bit integer')
