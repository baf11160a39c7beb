"""A task whose reward comes with its end: push a point to a goal.

As a simulator, `gymnasium:push:Push-v0` with this folder in PYTHONPATH, and as
a data set of a noisy player.
"""

import gymnasium
import numpy as np
from gymnasium import spaces

from experiments.data import layout

GOAL, RADIUS, STEPS = np.array([0.5, 0.5]), 0.1, 50
COLUMNS = (
  'observation',
  'action',
  'reward',
  'next_observation',
  'terminated',
  'truncated',
)


def move(position, action):
  """`(next position [..., 2], reward [...], ended [...])`, in the plane.

  The reward is 10 at the goal, where the episode ends, and else minus the
  distance.
  """
  following = np.clip(position + 0.1 * np.clip(action, -1, 1), -1, 1)
  distance = np.linalg.norm(following - GOAL, axis=-1)
  ended = distance < RADIUS
  return following, np.where(ended, 10.0, -distance), ended


class Push(gymnasium.Env):
  """The task, one copy."""

  observation_space = spaces.Box(-1, 1, (2,), np.float32)
  action_space = spaces.Box(-1, 1, (2,), np.float32)

  def reset(self, *, seed=None, options=None):
    """Starts anywhere."""
    super().reset(seed=seed)
    self.position = self.np_random.uniform(-1, 1, 2)
    self.time = 0
    return self.position.astype(np.float32), {}

  def step(self, action):
    """Moves; see `move`."""
    self.position, reward, ended = move(self.position, np.asarray(action))
    self.time += 1
    observation = self.position.astype(np.float32)
    return observation, float(reward), bool(ended), self.time >= STEPS, {}


gymnasium.register('Push-v0', entry_point='push:Push')


def goes_to_goal(observation, action, following):
  """The rule by which an episode ends, for planners; float32 `[B]`."""
  import jax.numpy as jnp

  del observation, action
  away = following - jnp.asarray(GOAL, jnp.float32)[None]
  return (jnp.sum(away**2, -1) < RADIUS**2).astype(jnp.float32)


def make_rows(size, seed):
  """Transitions of a player that moves to the goal half of the time.

  Returns:
    A `layout.Dataset` of `size` rows or a few more.
  """
  rng = np.random.default_rng(seed)
  rows = {name: [] for name in COLUMNS}
  while len(rows['reward']) < size:
    position = rng.uniform(-1, 1, 2)
    for time in range(STEPS):
      aim = 3 * (GOAL - position) * (rng.random() < 0.5)
      action = np.clip(aim + rng.normal(size=2), -1, 1)
      following, reward, ended = move(position, action)
      new = position, action, reward, following, ended
      for name, value in zip(rows, new):
        rows[name].append(value)
      rows['truncated'].append(not ended and time == STEPS - 1)
      position = following
      if ended:
        break
  high = np.ones(2, np.float32)
  about = layout.About('push', 'gymnasium:push:Push-v0', -high, high)
  return layout.make(**{k: np.asarray(v) for k, v in rows.items()}, about=about)
