"""envpool's simulators: Atari, classic control, bsuite, MuJoCo, DMC, ...

Traps that are dealt with here: the step after an episode's end is a dummy and
comes out as the next episode's first time step; bad actions never reach C++;
neighbouring seeds do not share streams; a zero `noop_max` is refused (envpool
would crash); the end of a game that coincides with the time limit is a
termination on Atari (elsewhere envpool reports a truncation, and the two
cannot be told apart).

Atari defaults are the Atari 100k protocol of EfficientZero (Ye et al. 2021):
frame skip 4 with a maximum over the last two, stack 4, 96x96 RGB, up to 30
no-ops, no sticky actions, 3000 decisions a game; in training a lost life
terminates and rewards are clipped to [-1, 1].

Departure: we stack frames ourselves. envpool's stack runs on over a lost
life; ours starts anew at every first step, as in EfficientZero's games.

After a lost life envpool plays the no-ops of a reset. What they earn belongs
to no time step, so returns under `training=True` may miss a point here and
there; scores to report come from `training=False`.
"""

import difflib
import re
import warnings
from typing import Any

import numpy as np

from agents.core.types import Spec
from experiments.envs import host
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
# The frames of DQN (Mnih et al. 2015), to be passed as options.
ATARI_GRAY = {'gray_scale': True, 'img_height': 84, 'img_width': 84}

# Ours to set: by num_envs, frame_stack and the seed of `start`.
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


def resolve_id(env_id: str) -> str:
  """envpool's name of an environment.

  Atari games may be called as elsewhere: `Pong`, `PongNoFrameskip-v4`,
  `ALE/Pong-v5` are all `Pong-v5`.

  Raises:
    ValueError: no such environment; names the nearest ones.
  """
  import envpool

  ids = envpool.list_all_envs()
  if env_id in ids:
    return env_id
  match = re.fullmatch(
    r'(?:ALE/)?(\w+?)(?:NoFrameskip|Deterministic)?(?:-v\d)?', env_id
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
  raise ValueError(f'env_id={env_id!r}: envpool has none; nearest: {hint}')


def make_envpool(
  env_id: str,
  num_envs: int,
  *,
  num_threads: int = 0,
  frame_stack: int | None = None,
  training: bool = True,
  **options: Any,
) -> host.HostEnvironment:
  """`num_envs` copies of one of envpool's environments.

  Args:
    env_id: envpool's name, or a usual name of an Atari game (`resolve_id`).
    num_envs: `E`.
    num_threads: of the simulator; 0 takes `min(2, num_envs)`. Streams do not
      depend on it.
    frame_stack: frames in an observation, along its last axis; None takes 4
      for Atari and 1 elsewhere.
    training: on Atari, a lost life terminates, rewards are clipped and games
      are cut after 3,000 decisions instead of 27,000 (the options
      `episodic_life`, `reward_clip`, `max_episode_steps` override). False is
      the evaluation protocol. `EpisodeStats` are of true games in both.
    **options: envpool's own, e.g. `max_episode_steps=27000`,
      `repeat_action_probability=0.25`, `**ATARI_GRAY`; they override
      `ATARI_100K`.

  Returns:
    The environment; nothing is simulated before `start`.

  Raises:
    ValueError: unknown environment or option, a value out of range, a game
      for several players, an action or observation space that does not fit.
  """
  import envpool

  host.check_num_envs(num_envs)
  task = resolve_id(env_id)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # envpool casts its bounds to float32.
    try:
      fields = envpool.make_spec(task).config._fields
    except ImportError as e:
      raise ValueError(f'env_id={env_id!r}: {e}') from e
    is_atari = 'noop_max' in fields
    if is_atari:
      protocol = {
        'episodic_life': training,
        'reward_clip': training,
        'max_episode_steps': 3000 if training else 27_000,
      }
      options = {**ATARI_100K, **protocol, **options}
    _check_options(task, options, fields, num_threads)
    if is_atari:
      options['stack_num'] = 1
    spec = envpool.make_spec(task, **options)
    observation_space, action_space = spec.observation_space, spec.action_space
  if spec.config.max_num_players > 1:
    raise ValueError(
      f'env_id={env_id!r}: games for {spec.config.max_num_players} players '
      'are not supported here yet; take a single-player environment'
    )
  if frame_stack is None:
    frame_stack = 4 if is_atari else 1
  frame, convert = host.observation_codec(observation_space, task)
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
        num_threads=num_threads or min(2, num_envs),
        seed=seeds,
        **options,
      )
      action_dtype = pool.action_space.dtype
      _ = pool.observation_space  # Made on first use, with those warnings.
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
      stack, tally = None, host.Tally(num_envs)
      last = np.ones(num_envs, bool)
      no = np.zeros(num_envs, bool)
      return time_step(observation, np.zeros(num_envs), ~no, no, info)

    def step(action):
      action = host.check_action(action, our_spec, num_envs)
      observation, reward, ended, cut, info = pool.step(
        action.astype(action_dtype)
      )
      over = info['terminated'].astype(bool) if is_atari else ended
      ended = ended | over
      truncated = cut & ~ended
      timestep = time_step(observation, reward, ~ended, truncated, info)
      true_reward = info['reward'] if is_atari else reward
      return timestep, tally.add(true_reward, timestep.is_first, over | cut)

    return host.Simulator(reset, step, pool.close)

  return host.HostEnvironment(our_spec, num_envs, start)


def _check_options(task, options, fields, num_threads):
  """Refuses what envpool would ignore, abort on or crash on."""
  for name, value in options.items():
    if name in _OURS:
      raise ValueError(
        f'{task}: option {name} cannot be passed; use num_envs, frame_stack '
        'and the seed of start'
      )
    if name not in fields and name not in ('from_pixels', 'render_mode'):
      known = ', '.join(sorted(f for f in fields if f not in _OURS))
      raise ValueError(f'{task}: unknown option {name}; known are {known}')
    if name in (
      'noop_max',
      'frame_skip',
      'img_height',
      'img_width',
      'max_episode_steps',
    ) and not (isinstance(value, int) and value >= 1):
      raise ValueError(f'{task}: {name}={value!r} must be an integer >= 1')
    if name == 'repeat_action_probability' and not 0 <= value <= 1:
      raise ValueError(f'{task}: {name}={value!r} must be in [0, 1]')
  if num_threads < 0:
    raise ValueError(f'{task}: num_threads={num_threads} must be at least 0')
