"""Acting on host simulators: in step with the learner, or ahead of it.

`synchronous`: a row is taken when the learner asks for it, with the learner's
own parameters; the same seed gives the same numbers. `asynchronous`: a thread
acts ahead into a bounded queue with a published copy of the parameters, so the
simulator works while the learner does; the lag is measured.
"""

import queue
import threading
import time
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import Agent, Experience
from experiments.envs.host import HostEnvironment
from experiments.runtime import keys
from experiments.runtime.persistence import Persistence
from experiments.runtime.sources import (
  Measures,
  Source,
  experience_example,
  no_feedback,
  timestep_shapes,
)


def _seed(key: chex.PRNGKey, step: int) -> int:
  bits = jax.random.bits(jax.random.fold_in(key, step), (), jnp.uint32)
  return int(bits) & 0x7FFFFFFF


@jax.jit
def _copy(params):
  return jax.tree.map(jnp.copy, params)


def _compiled(act):
  """`agent.act` compiled; its key may be a `keys.Derived`."""

  def acting(params, key, timestep):
    return act(params, keys.typed(key), timestep)

  return jax.jit(acting)


class _Stream:
  """Simulators that one thread steps; mutable, so it never leaves here."""

  def __init__(self, env: HostEnvironment, act, key: chex.PRNGKey, step: int):
    self._env, self._act, self._key = env, act, key
    self._simulator = None
    self._timestep: Any = None
    self.restart(step)

  def restart(self, step: int) -> None:
    self.close()
    self.started_at = step
    self._simulator = self._env.start(_seed(self._key, step))
    self._timestep = self._simulator.reset()

  def row(self, params, key) -> tuple[Experience, dict[str, float]]:
    assert self._simulator is not None
    timestep = self._timestep
    action, extras = self._act(params, key, timestep)
    action, extras = jax.device_get((action, extras))
    self._timestep, stats = self._simulator.step(action)
    done = np.asarray(stats.finished)
    counts = {
      'decisions': float(np.sum(~timestep.is_last())),
      'episodes': float(np.sum(done)),
      'return_sum': float(np.sum(stats.returns[done])),
      'length_sum': float(np.sum(stats.lengths[done])),
    }
    return Experience(timestep, action, extras), counts

  def close(self) -> None:
    if self._simulator is not None:
      self._simulator.close()
      self._simulator = None


class _Actor:
  """A thread that acts ahead of the learner into a bounded queue."""

  def __init__(self, stream: _Stream, key: chex.PRNGKey, size: int, device):
    self._stream, self._base, self._size = stream, key, size
    self._device = device
    self._key = keys.fold_in(keys.Derived(key), stream.started_at)
    self._published: tuple[Any, int] | None = None
    self._rows = 0
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None

  @property
  def started_at(self) -> int:
    return self._stream.started_at

  def publish(self, params, step: int) -> None:
    # The learner donates its buffers: actors read a copy of their own.
    params = _copy(params)
    if self._device is not None:
      params = jax.device_put(params, self._device)
    self._published = (params, step)

  def start(self) -> None:
    self._queue: queue.Queue = queue.Queue(self._size)
    self._stopping = threading.Event()
    self._thread = threading.Thread(target=self._work, daemon=True)
    self._thread.start()

  def _put(self, item) -> None:
    while not self._stopping.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        break
      except queue.Full:
        continue

  def _work(self) -> None:
    try:
      while not self._stopping.is_set():
        assert self._published is not None
        params, version = self._published
        key = keys.fold_in(self._key, self._rows)
        row, counts = self._stream.row(params, key)
        self._rows += 1
        self._put((row, counts, version))
    except BaseException as error:  # the learner raises it
      self._error = error
      self._put(error)

  def take(self):
    if self._thread is None:
      self.start()
    item = self._queue.get()
    if isinstance(item, BaseException):
      self.stop()
      raise item
    return item

  def stop(self) -> None:
    if self._thread is not None:
      self._stopping.set()
      self._thread.join()
      self._thread = None

  def restart(self, step: int) -> None:
    # Rows still in the queue are dropped: the replay takes a row that is
    # followed by a first one for the last of a truncated episode.
    self.stop()
    if self._error is not None:  # it would be dropped with the queue
      raise self._error
    self._stream.restart(step)
    self._rows = 0
    self._key = keys.fold_in(keys.Derived(self._base), step)

  def close(self) -> None:
    self.stop()
    self._stream.close()


def from_host(
  env: HostEnvironment,
  agent: Agent,
  *,
  mode: Literal['synchronous', 'asynchronous'] = 'asynchronous',
  publish_every: int = 1,
  queue_size: int = 4,
  device: Any = None,
) -> Source:
  """Fresh `Experience` rows `[E, ...]`, numpy arrays, from host simulators.

  An asynchronous source measures the gauge `policy_lag`, updates between the
  parameters that acted and the learner's, and the count `wait_seconds`, how
  long the learner waited for the row.

  Args:
    mode: see the module's docstring; the rest is for the asynchronous one.
    publish_every: updates between copies of the parameters for the actor.
    queue_size: rows that the actor may be ahead.
    device: where the network acts; None for where the parameters are.

  Raises:
    ValueError: an argument out of range.
  """
  if mode not in ('synchronous', 'asynchronous'):
    raise ValueError(f"mode={mode!r}: must be 'synchronous' or 'asynchronous'")
  for name, size in (
    ('publish_every', publish_every),
    ('queue_size', queue_size),
  ):
    if size < 1:
      raise ValueError(f'{name}={size}: must be 1 or more')
  assert agent.act is not None
  act = _compiled(agent.act)

  def start(key, step):
    stream_key, actor_key = jax.random.split(key)
    stream = _Stream(env, act, stream_key, step)
    if mode == 'synchronous':
      return stream
    return _Actor(stream, actor_key, queue_size, device)

  def next_(state, agent_state, step, key):
    if mode == 'synchronous':
      row, counts = state.row(agent_state.params, key)
      return state, row, Measures(counts, {})
    if state._published is None or step >= state._published[1] + publish_every:
      state.publish(agent_state.params, step)
    before = time.perf_counter()
    row, counts, version = state.take()
    counts = counts | {'wait_seconds': time.perf_counter() - before}
    gauges = {'policy_lag': float(step - version)}
    return state, row, Measures(counts, gauges)

  def restart(state, step):
    state.restart(step)
    return state

  def save(state, directory, step):
    del directory, step
    # Simulators cannot be saved: a run starts them afresh when it saves, and
    # they start at the same seed again when it is resumed.
    return {}, {'started_at': state.started_at}

  def load(arrays, facts, directory, key):
    del arrays, directory
    return start(key, facts['started_at'])

  def example():
    return experience_example(agent, timestep_shapes(env.spec, env.num_envs))

  return Source(
    lambda key: start(key, 0),
    next_,
    no_feedback,
    example,
    is_pure=False,
    kept=Persistence(
      save,
      load,
      dict,
      restart=restart,
      close=lambda state: state.close(),
    ),
    derives=True,
  )
