"""Any Gymnasium environment, as a host environment: bring your own."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from agents.core.types import Discrete, Spec
from experiments.envs import host
from search.model import TimeStep


def make_gymnasium(
  env_id_or_fn: str | Callable[[], Any],
  num_envs: int,
  *,
  frame_stack: int = 1,
  **options: Any,
) -> host.HostEnvironment:
  """`num_envs` copies of a Gymnasium environment, stepped one by one.

  Rewards, observations and ends are the environment's own; put wrappers
  (clipping, frame skip) into the function that makes it. A copy is not reset
  when it ends but on the step after, like envpool's.

  Args:
    env_id_or_fn: a registered id, or `() -> gymnasium.Env`.
    num_envs: `E`.
    frame_stack: observations stacked along the last axis.
    **options: of `gymnasium.make`, for an id only.

  Returns:
    The environment.

  Raises:
    ValueError: an unknown id or option, spaces that do not fit.
  """
  import gymnasium

  host.check_num_envs(num_envs)
  if callable(env_id_or_fn):
    if options:
      raise ValueError(f'options {sorted(options)} need an id, not a function')
    make = env_id_or_fn
  else:
    make = lambda: gymnasium.make(env_id_or_fn, **options)
  try:
    probe = make()
  except (gymnasium.error.Error, TypeError) as e:
    why = str(e).rstrip('.')
    name = env_id_or_fn
    name = f'gymnasium:{name}' if isinstance(name, str) else name
    raise ValueError(
      f'env={name!r}: {why}; must be one of gymnasium.registry, and its '
      'libraries installed, or --env=gymnasium:MODULE:ID of your own'
    ) from e
  name = probe.spec.id if probe.spec else type(probe.unwrapped).__name__
  frame, convert = host.observation_codec(probe.observation_space, name)
  action = host.action_spec(probe.action_space, name)
  first_action = int(getattr(probe.action_space, 'start', 0))
  action_dtype = probe.action_space.dtype
  probe.close()
  spec = Spec(
    observation=host.stacked(frame, frame_stack, name),
    action=action,
    frame_stack=frame_stack,
    name=name,
  )

  def start(seed: int) -> host.Simulator:
    envs = [make() for _ in range(num_envs)]
    seeds: list[int | None] = list(host.env_seeds(seed, num_envs))
    stack, tally = None, host.Tally(num_envs)
    last = np.ones(num_envs, bool)

    def first(i):
      # The seed counts once; later episodes go on with the same generator.
      observation, _ = envs[i].reset(seed=seeds[i])
      seeds[i] = None
      return observation, 0.0, False, False

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
      return time_step([first(i) for i in range(num_envs)])

    def step(action):
      action = host.check_action(action, spec, num_envs)
      if isinstance(spec.action, Discrete):
        action = [int(a) + first_action for a in action]
      else:
        action = action.astype(action_dtype)
      results = [
        first(i) if over else envs[i].step(action[i])[:4]
        for i, over in enumerate(np.asarray(last))
      ]
      timestep = time_step(results)
      rewards = np.array([r[1] for r in results], np.float64)
      stats = tally.add(rewards, timestep.is_first, last)
      return timestep, stats

    def close():
      for env in envs:
        env.close()

    return host.Simulator(reset, step, close)

  return host.HostEnvironment(spec, num_envs, start)
