"""Where batches come from: sources, and sources that wrap sources.

A source is pure (`from_env`, a device replay around it) or lives on the host
(envpool, Gymnasium, a host replay). The loop calls both alike; only a pure one
may be traced.

Axes: `E` parallel environments, one row of experience each a step.
"""

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.replay import Replay
from agents.core.types import Agent, Discrete, Experience, Spec, Trajectory
from experiments.runtime import keys
from experiments.runtime.persistence import Persistence
from search.model import Environment, TimeStep


class Stopped(Exception):
  """The user asked to stop before the first update; nothing is worth saving."""


class Measures(NamedTuple):
  """What a source reports of one call of `next`.

  Attributes:
    counts: dict of float32 scalars that add up over calls: `decisions`,
      `episodes`, `return_sum`, `length_sum`.
    gauges: dict of float32 scalars that are averaged over calls.
  """

  counts: dict[str, Any]
  gauges: dict[str, Any]


class Source(NamedTuple):
  """A stream of batches.

  Attributes:
    init: `(key) -> source_state`.
    next: `(source_state, agent_state, step, key) -> (source_state, batch,
      Measures)`.
    feedback: `(source_state, batch, info) -> source_state`.
    example: `() -> ` a batch of `jax.ShapeDtypeStruct`.
    is_pure: whether `next` and `feedback` may be traced.
    kept: how its state is saved; None for a pure source whose state is saved as
      it is.
    axes: axes of the state, a prefix of its tree, where many runs train in one
      program: 0, or None for what they share, a data set's rows.
    fill: `(rows) -> source_state`, fresh around shared rows; None if it shares
      nothing.
    rest: `(source_state) -> source_state` that takes no more rows from the
      environments, also after loading. None where no updates follow the last
      row.
    derives: whether the key of `next` may be a `keys.Derived`; for host
      sources.
  """

  init: Callable[[chex.PRNGKey], Any]
  next: Callable[..., tuple[Any, Any, Measures]]
  feedback: Callable[..., Any]
  example: Callable[[], Any]
  is_pure: bool
  kept: Persistence | None = None
  axes: Any = 0
  fill: Callable[[Any], Any] | None = None
  rest: Callable[[Any], Any] | None = None
  derives: bool = False

  def close(self, state: Any) -> None:
    """Stops the threads and simulators of a state, if it has any."""
    if self.kept is not None and self.kept.close is not None:
      self.kept.close(state)

  def restart(self, state: Any, step: int) -> Any:
    """The state whose simulators start afresh, if it has any."""
    if self.kept is None or self.kept.restart is None:
      return state
    return self.kept.restart(state, step)


def no_feedback(source_state, batch, info):
  """The feedback of a source that learns nothing from the learner."""
  del batch, info
  return source_state


def timestep_shapes(spec: Spec, rows: int) -> TimeStep:
  """Shapes of time steps of an environment, leaves `[rows, ...]`."""
  row = lambda dtype: jax.ShapeDtypeStruct((rows,), dtype)
  observation = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct((rows, *s.shape), s.dtype),
    spec.observation,
    is_leaf=lambda s: hasattr(s, 'dtype'),
  )
  invalid = None
  if spec.masks_actions:
    assert isinstance(spec.action, Discrete)
    actions = spec.action.num_actions
    invalid = jax.ShapeDtypeStruct((rows, actions), jnp.bool_)
  return TimeStep(
    observation=observation,
    reward=row(jnp.float32),
    discount=row(jnp.float32),
    is_first=row(jnp.bool_),
    truncated=row(jnp.bool_),
    invalid_actions=invalid,
  )


def experience_example(agent: Agent, timestep: TimeStep) -> Experience:
  """Shapes and dtypes of one row, for a batched time step (or its shapes)."""
  key = jax.random.key(0)
  params = jax.eval_shape(agent.init, key).params
  assert agent.act is not None
  action, extras = jax.eval_shape(agent.act, params, key, timestep)
  as_shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  return Experience(jax.tree.map(as_shape, timestep), action, extras)


class EnvStream(NamedTuple):
  """State of `from_env`: simulators and the returns of open episodes.

  Attributes:
    env_state: of the simulators, leaves `[E, ...]`.
    timestep: the last one, `[E]` rows.
    returns: float32 `[E]`, undiscounted, so far.
    lengths: int32 `[E]`, decisions so far.
  """

  env_state: Any
  timestep: TimeStep
  returns: chex.Array
  lengths: chex.Array


def select(mask: chex.Array, yes: Any, no: Any) -> Any:
  """Rows of `yes` where the mask `[E]` is True, else of `no`, on a pytree."""

  def one(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b)
    shaped = jnp.reshape(mask, mask.shape + (1,) * (a.ndim - mask.ndim))
    return jnp.where(shaped, a, b)

  return jax.tree.map(one, yes, no)


def from_env(env: Environment, agent: Agent, num_envs: int) -> Source:
  """Fresh `Experience` rows `[E, ...]` from an unbatched JAX environment."""
  reset = lambda key: jax.vmap(env.reset)(jax.random.split(key, num_envs))

  def init(key):
    env_state, timestep = reset(key)
    zeros = jnp.zeros((num_envs,))
    return EnvStream(env_state, timestep, zeros, zeros)

  def next_(state: EnvStream, agent_state, step, key):
    del step
    act_key, step_key, reset_key = jax.random.split(key, 3)
    assert agent.act is not None
    timestep = state.timestep
    action, extras = agent.act(agent_state.params, act_key, timestep)
    stepped = jax.vmap(env.step)(
      state.env_state, action, jax.random.split(step_key, num_envs)
    )
    over = timestep.is_last()
    env_state, next_timestep = select(over, reset(reset_key), stepped)
    returns = jnp.where(over, 0.0, state.returns) + next_timestep.reward
    lengths = jnp.where(over, 0.0, state.lengths + 1.0)
    ends = next_timestep.is_last().astype(jnp.float32)
    counts = {
      'decisions': jnp.sum(1.0 - over.astype(jnp.float32)),
      'episodes': jnp.sum(ends),
      'return_sum': jnp.sum(ends * returns),
      'length_sum': jnp.sum(ends * lengths),
    }
    state = EnvStream(env_state, next_timestep, returns, lengths)
    return state, Experience(timestep, action, extras), Measures(counts, {})

  def example():
    stream = jax.eval_shape(init, jax.random.key(0))
    return experience_example(agent, stream.timestep)

  return Source(init, next_, no_feedback, example, is_pure=True)


def _mean_age(batch: Trajectory) -> chex.Array:
  assert batch.sample is not None
  age = batch.sample.age
  return np.mean(age) if isinstance(age, np.ndarray) else jnp.mean(age)


class Replayed(NamedTuple):
  """State of `replayed`: the inner source's, and the rows.

  Attributes:
    rests: bool scalar, whether no more rows are taken; None if that never
      happens.
  """

  inner: Any
  replay: Any
  rests: Any = None


class Pace(NamedTuple):
  """When rows are taken from the environments, and how many decisions in all.

  A *row* is one time step of every environment. A *decision* is an action that
  an environment acted upon. An episode of `T` decisions has `T + 1` time steps:
  what is chosen at the last one is ignored.

  Updates are paced by rows, so that a compiled program knows when they are
  taken. The run's end is counted in decisions: after `max_decisions` no row is
  added, and the updates due for the rows so far are still made. Their number
  depends on the lengths of episodes (`runtime.budget`); schedules use a planned
  one (`updates`).

  Attributes:
    num_envs: time steps a row.
    warmup_decisions: time steps before the first update.
    decisions_per_update: time steps an update afterwards, an exact fraction.
    max_decisions: of the whole run; None for no bound.
  """

  num_envs: int
  warmup_decisions: int
  decisions_per_update: Fraction
  max_decisions: int | None = None

  def rows_until(self, step):
    """Rows taken in all before update number `step` (int or traced)."""
    ratio = self.decisions_per_update / self.num_envs
    rows = -(-self.warmup_decisions // self.num_envs)
    # floor(step * ratio), in parts that int32 holds as long as it holds the
    # result and the square of the denominator.
    whole, part = divmod(ratio.numerator, ratio.denominator)
    turns, rest = step // ratio.denominator, step % ratio.denominator
    return rows + step * whole + turns * part + rest * part // ratio.denominator

  def rows_due(self, step):
    """Rows to take just before update number `step`."""
    before = self.rows_until(step - 1)
    if hasattr(step, 'dtype'):
      return self.rows_until(step) - jnp.where(step > 0, before, 0)
    return self.rows_until(step) - (before if step > 0 else 0)

  def updates(self, time_steps: int) -> int:
    """Updates that so many time steps are due, at least 1."""
    left = max(time_steps - self.warmup_decisions, 0)
    return max(int(left / self.decisions_per_update), 1)

  def reach(self, step: int, decisions: int) -> int:
    """The update up to which a run may go before it counts its decisions.

    It is the largest number of updates whose rows cannot hold more than
    `decisions`, those left to take (0 or less for none), but above `step`, the
    updates made, if any are left: a row, and all rows before one update, are
    taken as a whole.
    """
    rows = self.rows_until(step - 1) if step else 0
    if decisions > 0:
      rows += max(decisions // self.num_envs, 1)
    # rows_until(k) = warm + floor(k * ratio): the first k above `rows`.
    ratio = self.decisions_per_update / self.num_envs
    above = rows + 1 - self.rows_until(0)
    first = max(-(-above // ratio), 0)
    return max(int(first), step + (decisions > 0))


def replayed(
  inner: Source,
  replay: Replay,
  pace: Pace,
  *,
  total_updates: int,
  beta: tuple[float, float] = (0.4, 1.0),
  stopping: Callable[[], bool] = lambda: False,
  rests: bool = False,
) -> Source:
  """Keeps an inner source's `Experience` rows and returns `Trajectory`s.

  It is pure if both parts are.

  Args:
    total_updates: over which `beta` rises.
    beta: exponent of the importance weights at the start and at the end.
    stopping: asked on the host at each of the rows before the first update.
    rests: whether updates follow the last row; the source then has `rest`.

  Raises:
    ValueError: by a pure source's `init`, if the warm-up fills no window.
    Stopped: by its `next`, if `stopping` says so.
  """
  is_pure = inner.is_pure and replay.is_pure

  def init(key):
    kept = replay.init(inner.example())
    if is_pure:  # a host replay says so itself
      windows = jax.eval_shape(replay.sample, kept, key, 1.0)
      need = windows.valid.shape[1] * pace.num_envs
      if pace.rows_until(0) * pace.num_envs < need:
        raise ValueError(
          f'warmup_decisions={pace.warmup_decisions}: must be at least {need}, '
          'one window of each environment'
        )
    return Replayed(inner.init(key), kept, no_rest())

  def no_rest():
    if not rests:
      return None
    return jnp.zeros((), jnp.bool_) if is_pure else False

  def rest(state: Replayed):
    # Works on the stacked states of several parts, too.
    return state._replace(rests=state.rests | True)

  def sampled(state: Replayed, step, key):
    exponent = beta[0] + (beta[1] - beta[0]) * step / max(total_updates, 1)
    least = jnp.minimum if is_pure else lambda x, y: np.float32(min(x, y))
    return replay.sample(state.replay, key, least(exponent, 1.0))

  def pure_next(state: Replayed, agent_state, step, key):
    act_key, sample_key = jax.random.split(key)
    shapes = jax.eval_shape(inner.next, state.inner, agent_state, step, act_key)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), shapes[2].counts
    )

    def take(i, carry):
      inner_state, kept, counts = carry
      inner_state, row, measures = inner.next(
        inner_state, agent_state, step, jax.random.fold_in(act_key, i)
      )
      counts = jax.tree.map(jnp.add, counts, measures.counts)
      return inner_state, replay.add(kept, row), counts

    due = pace.rows_due(step)
    if state.rests is not None:
      due = jnp.where(state.rests, 0, due)
    inner_state, kept, counts = jax.lax.fori_loop(
      0, due, take, (state.inner, state.replay, zeros)
    )
    state = state._replace(inner=inner_state, replay=kept)
    batch = sampled(state, step, sample_key)
    gauges = {'replay_age': _mean_age(batch)}
    return state, batch, Measures(counts, gauges)

  def host_next(state: Replayed, agent_state, step, key):
    act_key, sample_key = keys.split(key)
    counts: dict[str, float] = {}
    gauges: dict[str, Any] = {}
    for i in range(0 if state.rests else pace.rows_due(step)):
      # Later, a half-done call would leave rows that no checkpoint knows.
      if step == 0 and stopping():
        raise Stopped
      inner_state, row, measures = inner.next(
        state.inner, agent_state, step, keys.fold_in(act_key, i)
      )
      kept = replay.add(state.replay, row)
      state = state._replace(inner=inner_state, replay=kept)
      for name, value in measures.counts.items():
        counts[name] = counts.get(name, 0.0) + float(value)
      gauges = measures.gauges or gauges
    batch = sampled(state, step, sample_key)
    gauges = gauges | {'replay_age': _mean_age(batch)}
    return state, batch, Measures(counts, gauges)

  def feedback(state: Replayed, batch, info):
    inner_state = inner.feedback(state.inner, batch, info)
    kept = state.replay
    if info.priorities is not None:
      kept = replay.update(kept, batch.sample, info.priorities)
    return state._replace(inner=inner_state, replay=kept)

  def example():
    raise NotImplementedError('windows of a replay cannot be replayed')

  source = Source(
    init,
    pure_next if is_pure else host_next,
    feedback,
    example,
    is_pure,
    rest=rest if rests else None,
  )
  if is_pure:
    return source
  return source._replace(
    kept=_of_replayed(inner, replay, no_rest), derives=inner.derives
  )


def _of_replayed(
  inner: Source, replay: Replay, no_rest: Callable[[], Any]
) -> Persistence:
  """How the inner source and the replay are saved, together."""
  own, of = inner.kept, replay.kept
  assert own is not None and of is not None
  # Lazily: it needs the shapes of the inner source's rows.
  memory = functools.cache(lambda: of(inner.example()))

  def save(state: Replayed, directory, step):
    arrays, facts = own.save(state.inner, directory, step)
    priority, rows = memory().save(state.replay, directory, step)
    return {'inner': arrays, 'priority': priority}, {'inner': facts} | rows

  def load(arrays, facts, directory, key):
    inner_state = own.load(arrays['inner'], facts['inner'], directory, key)
    kept = memory().load(arrays['priority'], facts, directory, key)
    return Replayed(inner_state, kept, no_rest())

  def template():
    return {'inner': own.template(), 'priority': memory().template()}

  def prune(directory, rows):
    drop = memory().prune
    assert drop is not None
    drop(directory, rows)

  def restart(state: Replayed, step):
    return state._replace(inner=inner.restart(state.inner, step))

  return Persistence(
    save,
    load,
    template,
    prune,
    restart,
    lambda state: inner.close(state.inner),
  )


def reanalyzed(
  inner: Source, agent: Agent, refresh: Callable | None = None
) -> Source:
  """Passes each batch through the agent's `refresh`, if it has one.

  `refresh` is that function over a mesh (`runtime.mesh`); None compiles it here
  if needed.
  """
  if agent.refresh is None:
    return inner
  if refresh is None:
    refresh = agent.refresh
    if not inner.is_pure:
      refresh = jax.jit(keys.derived(refresh))

  def next_(state, agent_state, step, key):
    inner_key, refresh_key = keys.split(key)
    state, batch, measures = inner.next(state, agent_state, step, inner_key)
    batch = refresh(agent_state, batch, step, refresh_key)
    return state, batch, measures

  return inner._replace(next=next_)
