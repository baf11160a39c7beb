"""Evaluation: whole episodes of a planner, on the host or on the device.

Every environment plays equally many episodes, so that short ones are not
counted more often than long ones.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.envs.host import HostEnvironment
from experiments.runtime import mesh as meshes
from experiments.runtime.sources import select
from search import rows
from search.model import Environment, Model


class Episodes(NamedTuple):
  """Finished episodes, numpy arrays of one entry each.

  Attributes:
    returns: float64 `[N]`, undiscounted and unclipped.
    lengths: int64 `[N]`, decisions.
  """

  returns: np.ndarray
  lengths: np.ndarray

  def summary(self) -> dict[str, float]:
    """Mean, standard error and mean length, as metrics."""
    count = len(self.returns)
    error = np.std(self.returns, ddof=1) / np.sqrt(count) if count > 1 else 0.0
    return {
      'eval_return': float(np.mean(self.returns)),
      'eval_return_se': float(error),
      'eval_length': float(np.mean(self.lengths)),
    }


def player(planner: Callable, model: Model) -> Callable:
  """A compiled `(params, key, timestep) -> action` of a planner and a model."""

  @jax.jit
  def play(params, key, timestep):
    return planner(model, params, key, timestep).action

  return play


def on_host(
  env: HostEnvironment,
  play: Callable,
  params: Any,
  *,
  key: chex.PRNGKey,
  num_episodes: int,
  seed: int,
  max_steps: int = 30_000,
) -> Episodes:
  """Plays episodes on simulators of the host.

  Args:
    env: with the evaluation's protocol.
    play: from `player`, or any `(params, key, timestep) -> action`.
    num_episodes: rounded up to a multiple of `env.num_envs`.
    max_steps: decisions after which an episode is cut, with a printed note, and
      counts with its return so far; Atari's longest have 27,000. A simulator
      cannot be reset alone, so that environment plays no other.
  """
  quota = -(-num_episodes // env.num_envs)
  returns = [[] for _ in range(env.num_envs)]
  lengths = [[] for _ in range(env.num_envs)]
  simulator = env.start(seed)
  try:
    timestep = simulator.reset()
    total = np.zeros(env.num_envs, np.float64)
    length, cut = np.zeros(env.num_envs, np.int64), np.zeros(env.num_envs, bool)
    for step in itertools.count():
      action = play(params, jax.random.fold_in(key, step), timestep)
      timestep, stats = simulator.step(np.asarray(action))
      total += np.asarray(timestep.reward)
      length += ~np.asarray(timestep.is_first)
      done = [len(r) >= quota for r in returns]
      stuck = (length >= max_steps) & ~stats.finished & ~cut & ~np.array(done)
      for e in np.flatnonzero(stats.finished | stuck):
        if not (done[e] or cut[e]):
          whole = bool(stats.finished[e])
          returns[e].append(float(stats.returns[e] if whole else total[e]))
          lengths[e].append(int(stats.lengths[e] if whole else length[e]))
        total[e] = length[e] = 0
      cut |= stuck
      if all(c or len(r) >= quota for c, r in zip(cut, returns)):
        break
  finally:
    simulator.close()
  if cut.any():
    print(
      f'note: evaluation: {cut.sum()} of {sum(map(len, returns))} episodes did '
      f'not end within {max_steps:,} decisions; they were cut, and count with '
      'their return so far',
      flush=True,
    )
  return Episodes(np.concatenate(returns), np.concatenate(lengths))


def on_device(
  env: Environment,
  play: Callable,
  params: Any,
  *,
  key: chex.PRNGKey,
  num_episodes: int,
  max_steps: int = 10_000,
  devices: Sequence[Any] = (),
) -> Episodes:
  """Plays episodes of an unbatched JAX environment, one per parallel copy.

  They are cut after `max_steps`. As many of the devices as can equally share
  them; () stands for the parameters' own. The result does not depend on it.
  """
  size = max(len(devices), 1)
  size = next(n for n in range(size, 0, -1) if num_episodes % n == 0)
  own = (env.reset, env.step, play, num_episodes // size, max_steps)
  if size == 1:
    returns, lengths = device_episodes(*own, params, key)
  else:
    mesh = meshes.make_mesh(devices[:size])
    params = jax.device_put(params, meshes.replicated(mesh))
    returns, lengths = _shared_episodes(mesh, *own)(params, key)
  return Episodes(
    np.asarray(returns, np.float64), np.asarray(lengths, np.int64)
  )


@functools.lru_cache(maxsize=8)
def _shared_episodes(mesh, *own):
  """`device_episodes` compiled over devices, each with an equal share."""
  some = lambda params, key: device_episodes(*own, params, key)
  return jax.jit(meshes.by_rows(some, mesh, ()))


# Not the whole environment: a spec may hold arrays, which have no hash.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def device_episodes(
  reset: Callable,
  step_env: Callable,
  play: Callable,
  num: int,
  max_steps: int,
  params: Any,
  key: chex.PRNGKey,
) -> tuple[chex.Array, chex.Array]:
  """What `on_device` compiles; it may be traced and vmapped.

  Traced by `runtime.mesh.by_rows`, `num` counts those of one device. Returns
  are float32 `[num]` and lengths int32 `[num]`.
  """
  reset_key, key = jax.random.split(key)
  env_state, timestep = jax.vmap(reset)(rows.split(reset_key, num))

  def going(carry):
    _, timestep, _, _, over, step = carry
    del timestep
    return ~jnp.all(over) & (step < max_steps)

  def body(carry):
    env_state, timestep, returns, lengths, over, step = carry
    act_key, step_key = jax.random.split(jax.random.fold_in(key, step))
    action = play(params, act_key, timestep)
    keys = rows.split(step_key, num)
    stepped = jax.vmap(step_env)(env_state, action, keys)
    env_state, timestep = select(over, (env_state, timestep), stepped)
    returns += jnp.where(over, 0.0, timestep.reward)
    lengths += jnp.where(over, 0, 1)
    return (
      env_state,
      timestep,
      returns,
      lengths,
      over | timestep.is_last(),
      step + 1,
    )

  start = (
    env_state,
    timestep,
    jnp.zeros((num,)),
    jnp.zeros((num,), jnp.int32),
    jnp.zeros((num,), bool),
    jnp.zeros((), jnp.int32),
  )
  _, _, returns, lengths, _, _ = jax.lax.while_loop(going, body, start)
  return returns, lengths
