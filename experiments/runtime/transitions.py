"""Sources of single transitions: a fixed data set, a replay, a learned model.

A data set is part of the source's state, never a constant of a compiled
program: it lies in memory once, whatever is compiled and however many seeds
train on it. A checkpoint holds only its fingerprint.

Axes: `N` transitions of the data set, `B` of a batch, `M` imagined ones.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import Agent, Mixed, Trajectory, Transition
from experiments.files.errors import UserError
from experiments.runtime.persistence import Persistence
from experiments.runtime.sources import Measures, Source, no_feedback


class Rows(NamedTuple):
  """A data set as the source holds it.

  Attributes:
    transitions: `Transition` of `[N, ...]`, without `sample` and `o_0`.
    firsts: observations at the beginning of episodes, `[F, ...]`.
  """

  transitions: Transition
  firsts: Any


def fingerprint(rows: Rows) -> str:
  """A checksum of all rows, their shapes and dtypes."""
  checksum = 0
  for leaf in jax.tree.leaves(rows):
    leaf = np.ascontiguousarray(leaf)
    about = f'{leaf.dtype}{leaf.shape}'.encode()
    checksum = zlib.crc32(about, checksum)
    checksum = zlib.crc32(leaf.data, checksum)
  return f'{checksum:08x}'


def from_dataset(
  rows: Rows,
  batch_size: int,
  *,
  reward_scale: chex.Numeric = 1.0,
  on_device: bool = True,
  place: Callable[[Any], Any] = lambda batch: batch,
) -> Source:
  """Uniform draws of `Transition`s with `o_0`, by the step's key.

  Checkpoints hold no rows.

  Args:
    rows: numpy arrays or memory maps.
    reward_scale: a factor, which may be traced.
    on_device: whether all rows are copied to the device, which makes the source
      pure; else batches are gathered on the host.
    place: applied to a batch of a pure source, to divide it over devices.

  Raises:
    UserError: by the source's `load`, if the data set is another one.
  """
  number = len(rows.transitions.r_t)
  begins = len(jax.tree.leaves(rows.firsts)[0])

  def picked(state: Rows, index, first, take):
    batch = jax.tree.map(lambda x: take(x, index), state.transitions)
    o_0 = jax.tree.map(lambda x: take(x, first), state.firsts)
    return batch._replace(r_t=batch.r_t * reward_scale, o_0=o_0)

  def pure_next(state, agent_state, step, key):
    del agent_state, step
    keys = jax.random.split(key)
    index = jax.random.randint(keys[0], (batch_size,), 0, number)
    first = jax.random.randint(keys[1], (batch_size,), 0, begins)
    batch = place(picked(state, index, first, lambda x, i: x[i]))
    return state, batch, Measures({}, {})

  def host_next(state, agent_state, step, key):
    del agent_state, step
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    index = rng.integers(number, size=batch_size)
    first = rng.integers(begins, size=batch_size)
    take = lambda x, i: np.asarray(x[i])
    return state, picked(state, index, first, take), Measures({}, {})

  def init(key):
    del key
    return jax.tree.map(jnp.asarray, rows) if on_device else rows

  def example():
    shape = lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype)
    shapes = jax.tree.map(shape, rows.transitions)
    return shapes._replace(o_0=jax.tree.map(shape, rows.firsts))

  known = functools.cache(lambda: fingerprint(rows))

  def save(state, directory, step):
    del state, directory, step
    return template(), {'dataset': known()}

  def load(arrays, facts, directory, key):
    del arrays, directory
    if facts['dataset'] != known():
      raise UserError(
        f'dataset: has the checksum {known()}, but the run was begun with '
        f'{facts["dataset"]}'
      )
    return init(key)

  def template():
    return {'rows': np.asarray(number, np.int64)}

  return Source(
    init,
    pure_next if on_device else host_next,
    no_feedback,
    example,
    is_pure=on_device,
    kept=Persistence(save, load, template),
    axes=None,
    fill=lambda shared: shared,
  )


def transitions(inner: Source) -> Source:
  """The first step of windows `[B, 2]` from a replay as `Transition`s."""

  def next_(state, agent_state, step, key):
    state, batch, measures = inner.next(state, agent_state, step, key)
    return state, to_transition(batch), measures

  return inner._replace(next=next_)


def to_transition(window: Trajectory) -> Transition:
  """Steps 0 and 1 of windows `[B, L]`, `L` at least 2."""
  experience = window.experience
  timestep = experience.timestep
  at = lambda tree, k: jax.tree.map(lambda x: x[:, k], tree)
  return Transition(
    o_tm1=at(timestep.observation, 0),
    a_tm1=experience.action[:, 0],
    r_t=timestep.reward[:, 1],
    discount_t=timestep.discount[:, 1],
    o_t=at(timestep.observation, 1),
    sample=window.sample,
  )


class Imagined(NamedTuple):
  """State of `mixed`.

  Attributes:
    real: state of the inner source.
    ring: `Transition` of `[capacity, ...]`, what a model has imagined.
    count: int32 scalar, rows written so far.
  """

  real: Any
  ring: Transition
  count: chex.Array


_BATCHED: Any = (0, 0)


def _some(tree, count):
  """`count` of the rows that were drawn, equally many of each device."""

  def one(x):
    groups = math.gcd(x.shape[0], count)
    apart = x.reshape(groups, -1, *x.shape[1:])
    return apart[:, : count // groups].reshape(count, *x.shape[1:])

  return jax.tree.map(one, tree)


def mixed(
  inner: Source,
  imagine: Callable[[Any, Any, chex.PRNGKey], Transition],
  agent: Agent,
  *,
  starts: int,
  capacity: int,
  real: int,
  model: int,
) -> Source:
  """`Mixed` batches of a pure inner source and of what a model imagines.

  At every step rollouts begin in `starts` observations of their own batch and
  are written to a ring: as much as a large batch of rollouts now and then, but
  even in time, and without a branch that `vmap` over seeds would always take. A
  batch has `real` and `model` rows; the inner source's have at least `real` and
  `starts`.

  Args:
    imagine: `(agent_state, observations [starts, ...], key) -> Transition` of
      `[M, ...]`.
    capacity: rows of the ring, a multiple of `M`.

  Raises:
    ValueError: in `init`, a capacity that is not a multiple of `M`.
  """

  def shapes():
    state = jax.eval_shape(agent.init, jax.random.key(0))
    source = jax.eval_shape(inner.init, jax.random.key(0))

    def rolled(state, source, key):
      _, batch, _ = inner.next(source, state, 0, key)
      begin = _some(batch.o_tm1, starts)
      return imagine(state, begin, key)

    return jax.eval_shape(rolled, state, source, jax.random.key(0))

  def empty():
    rows = shapes()
    number = rows.r_t.shape[0]
    if capacity % number:
      raise ValueError(
        f'model_capacity={capacity}: must be a multiple of {number}, the '
        'number of transitions imagined per update'
      )
    ring = jax.tree.map(
      lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), rows
    )
    return ring, jnp.zeros((), jnp.int32)

  def init(key):
    return Imagined(inner.init(key), *empty())

  def fill(shared):
    assert inner.fill is not None
    return Imagined(inner.fill(shared), *empty())

  def next_(state: Imagined, agent_state, step, key):
    keys = jax.random.split(key, 4)
    kept, batch, measures = inner.next(state.real, agent_state, step, keys[0])
    # Rollouts do not begin in what is learned from in the same step.
    kept, begin, _ = inner.next(kept, agent_state, step, keys[1])
    begin = _some(begin.o_tm1, starts)
    rows = imagine(agent_state, begin, keys[2])
    number = rows.r_t.shape[0]
    slot = state.count % capacity
    ring = jax.tree.map(
      lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, slot, 0),
      state.ring,
      rows,
    )
    count = state.count + number
    filled = jnp.minimum(count, capacity)
    index = jax.random.randint(keys[3], (model,), 0, filled)
    batch = Mixed(
      real=_some(batch, real),
      model=jax.tree.map(lambda x: x[index], ring),
    )
    gauges = measures.gauges | {
      'imagined_reward': jnp.mean(rows.r_t),
      'imagined_ends': jnp.mean(1.0 - rows.discount_t),
    }
    state = Imagined(kept, ring, count)
    return state, batch, measures._replace(gauges=gauges)

  def save(state: Imagined, directory, step):
    assert inner.kept is not None
    arrays, facts = inner.kept.save(state.real, directory, step)
    own = {'real': arrays, 'ring': state.ring, 'count': state.count}
    return own, facts

  def load(arrays, facts, directory, key):
    assert inner.kept is not None
    real_state = inner.kept.load(arrays['real'], facts, directory, key)
    return Imagined(real_state, arrays['ring'], arrays['count'])

  def template():
    assert inner.kept is not None
    ring, count = empty()
    return {'real': inner.kept.template(), 'ring': ring, 'count': count}

  return Source(
    init,
    next_,
    no_feedback,
    inner.example,
    is_pure=True,
    kept=Persistence(save, load, template),
    # Axes in the place of arrays.
    axes=Imagined(inner.axes, *_BATCHED),
    fill=fill,
  )
