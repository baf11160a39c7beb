"""Prioritised replay of windows; here as pure functions for the device.

Axes: `T` rows of the ring, `E` streams that write a row together, `B` windows,
`L` their steps, `S` frames stacked in an observation.

A row is an `Experience`: a time step and the action on it. Only the newest
frame of a stack is stored; stacks are built again when a window is drawn,
and repeat the first frame of an episode as the simulators do.

A window starts at any row that

* is not an episode's last (the action there is ignored, nothing is learned);
* has its `L` rows in the ring, `L - 1` of them after it, so that no window
  crosses from the newest row to the oldest;
* has its `S - 1` frames of history in the ring, back to its episode's start.

Rows of a window after an episode's end belong to the next episode and are
marked invalid: the ends of episodes are trained on like any other step.

Where an episode begins although the one before did not end (a simulator was
restarted), the row before counts as truncated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core.types import Experience, Sample, Trajectory

# Added to abs(priority), so that every row can be drawn (EfficientZero).
EPSILON = 1e-6


class Replay(NamedTuple):
  """A memory of experience; on the device (pure) or on the host.

  Attributes:
    init: `(example) -> state`; `example` is one `Experience` of `[E, ...]`
      rows, arrays or `ShapeDtypeStruct`s.
    add: `(state, experience) -> state`, writes one row of all `E` streams.
    sample: `(state, key, beta) -> Trajectory` of `B` windows of `L` steps,
      drawn with replacement in proportion to priority ** alpha. Their weights
      are P ** -beta, divided by the batch's largest. Only when `ready`.
    update: `(state, sample, priorities) -> state`; float `[B]` in raw units.
      Dropped where the slot was overwritten since or the priority is not
      finite; where a row was drawn twice, the larger one holds.
    ready: `(state) -> bool`, whether something can be drawn.
    is_pure: whether all of these can be traced; if not, the state is mutated.
    kept: `(example) -> Persistence`, of a state that is not saved as it is;
      None where it is.
  """

  init: Callable[[Experience], Any]
  add: Callable[[Any, Experience], Any]
  sample: Callable[[Any, chex.PRNGKey, Any], Trajectory]
  update: Callable[[Any, Sample, chex.Array], Any]
  ready: Callable[[Any], Any]
  is_pure: bool
  kept: Callable[[Experience], Any] | None = None


class ReplayState(NamedTuple):
  """A ring on the device.

  Attributes:
    rows: `Experience` of `[T, E, ...]`, observations as single frames.
    priority: float32 `[T, E]`, abs(raw) + EPSILON; 0 before the first write.
    max_priority: float32 scalar, the largest so far: what new rows get.
    count: int32 scalar, rows written so far.
  """

  rows: Experience
  priority: chex.Array
  max_priority: chex.Array
  count: chex.Array


def num_rows(
  capacity: int, num_streams: int, window: int, frame_stack: int
) -> int:
  """`T`, the rows of a ring that holds `capacity` decisions.

  Raises:
    ValueError: they do not hold one window and its history.

  >>> num_rows(capacity=1000, num_streams=8, window=5, frame_stack=4)
  125
  """
  rows = capacity // num_streams
  need = window + frame_stack - 1
  if rows < need:
    raise ValueError(
      f'capacity={capacity}: must be at least {need * num_streams}, for '
      f'{num_streams} streams and a window of {window} steps with '
      f'{frame_stack} frames stacked'
    )
  return rows


def check_arguments(capacity, batch_size, window, frame_stack, alpha) -> None:
  """Refuses arguments of a replay that are out of range.

  Raises:
    ValueError: naming the argument.
  """
  for name, value in (
    ('capacity', capacity),
    ('batch_size', batch_size),
    ('window', window),
    ('frame_stack', frame_stack),
  ):
    if not isinstance(value, int) or value < 1:
      raise ValueError(f'{name}={value!r}: must be an integer of at least 1')
  # In a sweep it is traced, and checked before.
  if isinstance(alpha, int | float) and alpha < 0:
    raise ValueError(f'alpha={alpha!r}: must be at least 0')


def newest_frame(observation: Any, frame_stack: int) -> Any:
  """The last `C / S` channels of every leaf `[..., C]`.

  Raises:
    ValueError: `C` is not a multiple of `frame_stack`.
  """
  if frame_stack == 1:
    return observation

  def newest(x):
    if x.ndim < 2 or x.shape[-1] % frame_stack:
      raise ValueError(
        f'observation: shape {x.shape} has a last axis that is not a multiple '
        f'of frame_stack={frame_stack}'
      )
    return x[..., -(x.shape[-1] // frame_stack) :]

  return jax.tree.map(newest, observation)


def to_window(
  rows: Experience, frame_stack: int
) -> tuple[Experience, chex.Array]:
  """Builds stacks and finds where a window's episode ends.

  Args:
    rows: consecutive rows `[B, S - 1 + L, ...]`, history first, observations
      as single frames `[..., c]`.
    frame_stack: `S`.

  Returns:
    `Experience` of `[B, L, ...]` with observations `[..., S * c]`, oldest
    frame first, and `valid`, bool `[B, L]`.
  """
  history = frame_stack - 1
  is_first = jnp.asarray(rows.timestep.is_first)
  window = jax.tree.map(lambda x: x[:, history:], rows)
  if history:
    steps = jnp.arange(is_first.shape[1], dtype=jnp.int32)
    start = jax.lax.cummax(
      jnp.where(is_first, steps, jnp.zeros_like(steps)), axis=1
    )
    shifts = jnp.arange(-history, 1, dtype=jnp.int32)
    # Position of every frame of every stack [B, L, S].
    index = steps[None, history:, None] + shifts[None, None]
    index = jnp.maximum(index, start[:, history:, None])

    def stack(frames):
      take = jax.vmap(lambda x, i: x[i])
      picked = [take(frames, index[..., s]) for s in range(frame_stack)]
      return jnp.concatenate(picked, axis=-1)

    observation = jax.tree.map(stack, rows.timestep.observation)
    timestep = window.timestep._replace(observation=observation)
    window = window._replace(timestep=timestep)
  ended = window.timestep.is_last()[:, :-1].astype(jnp.int32)
  behind = jnp.cumsum(ended, axis=1) > 0
  valid = jnp.pad(~behind, ((0, 0), (1, 0)), constant_values=True)
  return window, valid


def weights(mass: chex.Array, beta: chex.Numeric) -> chex.Array:
  """Importance weights of drawn rows, float `[B]`, the largest is 1.

  P ** -beta over the batch's largest (Schaul et al. 2016, section 3.4); the
  sum of masses and the number of rows cancel.

  Args:
    mass: priority ** alpha of the drawn rows, `[B]`, positive.
    beta: exponent, 0 for none.

  >>> weights(jnp.array([1.0, 4.0, 16.0]), 0.5).tolist()
  [1.0, 0.5, 0.25]
  """
  return (mass.min() / mass) ** beta


def scale(
  mass: chex.Array, total: chex.Numeric, beta: chex.Numeric
) -> chex.Array:
  """The factor that makes weights of several replays comparable, float `[B]`.

  A replay that is one of several parts is drawn from as often as the others,
  whatever its total mass M. For the expectation of one replay of all rows, a
  row drawn with m / M needs a weight in proportion to M m ** -beta, which is
  `weights` times M times the batch's smallest m ** -beta.

  Args:
    mass: priority ** alpha of the drawn rows, `[B]`, positive.
    total: M, the sum over all rows of this replay that may be drawn.
    beta: exponent, 0 for none.
  """
  one_each = mass**0  # numpy's or JAX's, as `mass` is
  return total * mass.min() ** -beta * one_each


def joined_weights(drawn: Sample) -> Sample:
  """Weights of a batch that was drawn from several replays, the largest 1.

  Args:
    drawn: `[B]` rows of all of them, with `scale`.

  Returns:
    The same with `weight` comparable and `scale` None.
  """
  assert drawn.scale is not None
  # Through logarithms nothing overflows.
  log = jnp.log(drawn.weight) + jnp.log(drawn.scale)
  return drawn._replace(weight=jnp.exp(log - jnp.max(log)), scale=None)


def device_replay(
  capacity: int,
  batch_size: int,
  window: int,
  frame_stack: int = 1,
  alpha: chex.Numeric = 0.6,
) -> Replay:
  """A replay that lives in a pytree: jit, vmap and scan it, donate its state.

  Args:
    capacity: decisions it holds, over all streams.
    batch_size: `B`.
    window: `L`.
    frame_stack: `S`.
    alpha: exponent of the priorities, 0 for uniform; may be traced.

  Returns:
    The `Replay`.

  Raises:
    ValueError: an argument out of range; in `init`, a capacity too small.

  >>> from search.model import TimeStep
  >>> replay = device_replay(capacity=3, batch_size=2, window=2)
  >>> def row(t):
  ...   reward, no = jnp.full(1, t, jnp.float32), jnp.zeros(1, bool)
  ...   timestep = TimeStep(reward[:, None], reward, jnp.ones(1), no, no)
  ...   return Experience(timestep, action=jnp.zeros(1, jnp.int32), extras={})
  >>> state = replay.init(row(0))
  >>> for t in range(4):
  ...   state = replay.add(state, row(t))
  >>> state.rows.timestep.reward[:, 0].tolist()
  [3.0, 1.0, 2.0]
  """
  check_arguments(capacity, batch_size, window, frame_stack, alpha)
  history = frame_stack - 1

  def init(example):
    streams = example.timestep.reward.shape[0]
    size = num_rows(capacity, streams, window, frame_stack)
    timestep = example.timestep
    frame = jax.eval_shape(
      lambda o: newest_frame(o, frame_stack), timestep.observation
    )
    example = example._replace(timestep=timestep._replace(observation=frame))
    return ReplayState(
      rows=jax.tree.map(
        lambda x: jnp.zeros((size, *x.shape), x.dtype), example
      ),
      priority=jnp.zeros((size, streams), jnp.float32),
      max_priority=jnp.ones((), jnp.float32),
      count=jnp.zeros((), jnp.int32),
    )

  def add(state, experience):
    size = state.priority.shape[0]
    slot, before = state.count % size, (state.count - 1) % size
    timestep = experience.timestep
    frame = newest_frame(timestep.observation, frame_stack)
    experience = experience._replace(
      timestep=timestep._replace(observation=frame)
    )
    old = state.rows.timestep
    cut = timestep.is_first & (old.discount[before] != 0) & (state.count > 0)
    rows = state.rows._replace(
      timestep=old._replace(
        truncated=old.truncated.at[before].set(old.truncated[before] | cut)
      )
    )
    return state._replace(
      rows=jax.tree.map(lambda x, y: x.at[slot].set(y), rows, experience),
      priority=state.priority.at[slot].set(state.max_priority),
      count=state.count + 1,
    )

  def mass(state):
    return _mass(state, window, history, alpha)

  def sample(state, key, beta):
    size, streams = state.priority.shape
    flat = mass(state).reshape(-1)
    cdf = jnp.cumsum(flat)
    index = _draw(key, flat, cdf, batch_size)
    slot, stream = index // streams, index % streams
    steps = jnp.arange(-history, window, dtype=jnp.int32)
    slots = (slot[:, None] + steps[None]) % size
    rows = jax.tree.map(lambda x: x[slots, stream[:, None]], state.rows)
    experience, valid = to_window(rows, frame_stack)
    order = _order(state.count, size)[slot]
    drawn = Sample(
      index=index,
      generation=order // size + 1,
      weight=weights(flat[index], beta),
      scale=scale(flat[index], cdf[-1], beta),
      age=((state.count - 1 - order) * streams).astype(jnp.float32),
    )
    return Trajectory(experience, valid, drawn)

  def update(state, drawn, priorities):
    size, streams = state.priority.shape
    order = _order(state.count, size)[drawn.index // streams]
    fresh = (order // size + 1 == drawn.generation) & jnp.isfinite(priorities)
    new = jnp.where(fresh, jnp.abs(priorities) + EPSILON, 0.0)
    index = jnp.where(fresh, drawn.index, size * streams)
    flat = state.priority.reshape(-1)
    flat = flat.at[index].set(0.0, mode='drop').at[index].max(new, mode='drop')
    return state._replace(
      priority=flat.reshape(size, streams),
      max_priority=jnp.maximum(state.max_priority, new.max()),
    )

  def ready(state):
    return (mass(state) > 0).any()

  return Replay(init, add, sample, update, ready, is_pure=True)


def _order(count, size):
  """Number (from 0) of the row last written to each slot, int32 `[T]`.

  Negative where none was.
  """
  slots = jnp.arange(size, dtype=jnp.int32)
  return count - 1 - (count - 1 - slots) % size


def _mass(state, window, history, alpha):
  """priority ** alpha of the rows where a window may start, else 0."""
  size = state.priority.shape[0]
  oldest = jnp.maximum(state.count - size, 0)
  order = _order(state.count, size)
  starts = (order >= oldest) & (order <= state.count - window)
  timestep = state.rows.timestep
  # [T, E]: the frames between here and the episode's start are in the ring.
  whole = jnp.broadcast_to(
    (order >= oldest + history)[:, None], timestep.is_first.shape
  )
  for back in range(history):
    in_ring = (order - back >= oldest)[:, None]
    whole |= jnp.roll(timestep.is_first, back, axis=0) & in_ring
  eligible = starts[:, None] & whole & ~timestep.is_last()
  # Rows without priority must not be raised to a power: 0 ** 0 is 1.
  return jnp.where(eligible, state.priority**alpha, 0.0)


def _draw(key, mass, cdf, count):
  """Rows drawn in proportion to their mass `[T E]`, int32 `[count]`."""
  u = jax.random.uniform(key, (count,))
  index = jnp.searchsorted(cdf, u * cdf[-1], side='right')
  # Parallel sums round: step back from a row that may not be drawn.
  places = jnp.arange(mass.size, dtype=jnp.int32)
  may = mass > 0
  nearest = jax.lax.cummax(jnp.where(may, places, -1))
  nearest = jnp.where(nearest < 0, jnp.argmax(may), nearest)
  return nearest[jnp.minimum(index, mass.size - 1)].astype(jnp.int32)
