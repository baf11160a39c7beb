"""The contracts: what an agent is, and what passes between it and a source.

Axes: `B` batch of independent streams or samples, `L` steps of a window,
`A` actions.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from search.model import Model, TimeStep


class ArraySpec(NamedTuple):
  """Shape (without batch) and dtype of one array of an observation."""

  shape: tuple[int, ...]
  dtype: Any = np.float32


class Discrete(NamedTuple):
  """`num_actions` enumerable actions, int32 scalars in `[0, num_actions)`.

  Attributes:
    num_actions: how many.
    factors: sizes of the independent choices that an action is made of, in C
      order; () for one choice.
  """

  num_actions: int
  factors: tuple[int, ...] = ()


class Continuous(NamedTuple):
  """Real vectors of `shape`, each component within `[low, high]`.

  Attributes:
    shape: of an action, without batch.
    low: float32 numpy array of that shape, `[*shape]`.
    high: float32 numpy array, `[*shape]`.
  """

  shape: tuple[int, ...]
  low: np.ndarray
  high: np.ndarray


class Candidates(NamedTuple):
  """Arrays, of which a game lists the legal ones of a position.

  Attributes:
    shape: of one action, without batch.
    dtype: of its numbers.
    number: how many `search.model.Game.candidates` lists, repeats included.
  """

  shape: tuple[int, ...]
  dtype: Any
  number: int


class Spec(NamedTuple):
  """What an agent must know of an environment.

  Attributes:
    observation: pytree of `ArraySpec`, as the agent sees it (frames stacked
      along the last axis, channels last).
    action: `Discrete` or `Continuous`; `Candidates` only for games.
    frame_stack: how many consecutive frames one observation holds. A replay
      stores single frames: the last `C / frame_stack` channels.
    masks_actions: whether time steps carry `invalid_actions`.
    name: the environment's name, for error messages.
    statistics: mean and standard deviation, float32 `[F]` each, of a data
      set's observations, their leaves laid end to end; None where nothing is
      known beforehand.
    game: the exact rules (`search.model.Game`) where the environment is a game
      against oneself whose observations are positions; None elsewhere.
  """

  observation: Any
  # `Any` for `Candidates`, so that code that never meets them need not check.
  action: Discrete | Continuous | Any
  frame_stack: int = 1
  masks_actions: bool = False
  name: str = 'environment'
  statistics: tuple[np.ndarray, np.ndarray] | None = None
  game: Any = None


def check_bounds(spec: Spec) -> None:
  """Refuses continuous actions without finite bounds; all others pass.

  Agents that scale, sample or divide actions within their bounds call it.

  Raises:
    ValueError: a bound is NaN or infinite, or a low one is not below its high
      one.
  """
  if not isinstance(spec.action, Continuous):
    return
  bounds = {'low': spec.action.low, 'high': spec.action.high}
  for field, value in bounds.items():
    bad = ~np.isfinite(value)
    if bad.any():
      raise ValueError(
        f'{spec.name}: action bound {field}={value[bad][0]:g} must be finite; '
        'rescale the actions to [-1, 1] in a wrapper of the environment'
      )
  bad = spec.action.low >= spec.action.high
  if bad.any():
    raise ValueError(
      f'{spec.name}: action bound low={spec.action.low[bad][0]:g} must be '
      f'below high={spec.action.high[bad][0]:g}; drop the actions without a '
      'choice in a wrapper of the environment'
    )


class Vectors(NamedTuple):
  """What networks of actors and critics on vectors must know of a spec.

  Attributes:
    observation_size: numbers in an observation, all leaves together.
    action: `Continuous` of shape `[D]`, with finite bounds.
    statistics: mean and standard deviation of observations, float32 `[F]`
      each, see `Spec`; None where they are not wanted.
  """

  observation_size: int
  action: Continuous
  statistics: tuple[np.ndarray, np.ndarray] | None


def as_vectors(spec: Spec, agent: str, normalise: bool) -> Vectors:
  """The spec of real vectors for an agent that needs them.

  Args:
    spec: of the environment or the data set.
    agent: its name, for messages.
    normalise: whether observations are normalised by the spec's statistics.

  Raises:
    ValueError: the actions are not vectors within finite bounds, or statistics
      are wanted that the spec has not.
  """
  action = spec.action
  if not isinstance(action, Continuous) or len(action.shape) != 1:
    raise ValueError(
      f'{agent} needs vectors of continuous actions; {spec.name} has {action}: '
      'take another env, or an agent for such actions'
    )
  check_bounds(spec)
  if normalise and spec.statistics is None:
    raise ValueError(
      f'normalise=True: {spec.name} has no statistics of observations; set '
      'normalise=False or train from a data set'
    )
  leaves = jax.tree.leaves(
    spec.observation, is_leaf=lambda x: isinstance(x, ArraySpec)
  )
  size = sum(math.prod(leaf.shape) for leaf in leaves)
  return Vectors(size, action, spec.statistics if normalise else None)


def as_discrete(spec: Spec, agent: str) -> Discrete:
  """The actions of a spec, for the agent of a name that enumerates them.

  Raises:
    ValueError: the actions are not discrete.
  """
  if isinstance(spec.action, Discrete):
    return spec.action
  raise ValueError(
    f'{agent} needs discrete actions; {spec.name} has actions of shape '
    f'{spec.action.shape}: set env.action_bins where they are continuous, or '
    'take another agent'
  )


def as_array(spec: Spec, agent: str) -> ArraySpec:
  """The observation of a spec, for the agent of a name that needs one array.

  Raises:
    ValueError: the observation is not one array.
  """
  if hasattr(spec.observation, 'shape'):
    return spec.observation
  raise ValueError(
    f'{agent} needs one observation array; {spec.name} has a '
    f'{type(spec.observation).__name__}; agent=alphazero takes positions'
  )


class Experience(NamedTuple):
  """One row of a stream: a time step and what the agent did on it.

  Attributes:
    timestep: `[B]` rows of `TimeStep`.
    action: int32 or float32 `[B, ...]`, ignored by the environment where
      `timestep.is_last()`.
    extras: dict of arrays float32 `[B, ...]` that `act` returned (search policy
      and value, log-probabilities).
  """

  timestep: TimeStep
  action: chex.Array
  extras: dict[str, chex.Array]


class Sample(NamedTuple):
  """Where a batch's rows came from, so that feedback finds them again.

  Attributes:
    index: int32 `[B]`, slots in the replay.
    generation: int32 `[B]`, how often the slot had been written when it was
      drawn; a priority whose generation is stale is dropped.
    weight: float32 `[B]`, importance weights, at most 1.
    age: float32 `[B]`, decisions that the source has taken since the row was
      written.
    scale: float32 `[B]`, equal within a draw: `weight * scale` is comparable
      with draws from other replays of the same experience; None where there is
      only one replay.
  """

  index: chex.Array
  generation: chex.Array
  weight: chex.Array
  age: chex.Array
  scale: chex.Array | None = None


class Transition(NamedTuple):
  """Single transitions, for agents that bootstrap one step.

  Attributes:
    o_tm1: observation pytree, `[B, ...]`.
    a_tm1: int32 or float32 `[B, ...]`.
    r_t: float32 `[B]`.
    discount_t: float32 `[B]`, 0 at termination, else 1.
    o_t: observation pytree, `[B, ...]`, the true next one.
    sample: where the rows came from; None for a fixed dataset.
    o_0: observation pytree, `[B, ...]`, first ones of episodes drawn on their
      own; None where the source has none.
  """

  o_tm1: Any
  a_tm1: chex.Array
  r_t: chex.Array
  discount_t: chex.Array
  o_t: Any
  sample: Sample | None = None
  o_0: Any = None


class Mixed(NamedTuple):
  """Transitions of the environment and of a learned model, a batch each.

  Attributes:
    real: from the environment or the data set, `[B]` rows.
    model: imagined, `[M]` rows.
  """

  real: Transition
  model: Transition


class Trajectory(NamedTuple):
  """Windows of consecutive steps, for agents that unroll.

  All leaves of `experience` are `[B, L, ...]`: `experience.timestep.reward[:,
  k]` is received on arriving at step `k`, after `experience.action[:, k - 1]`.

  Attributes:
    experience: the rows.
    valid: bool `[B, L]`, step `k` belongs to the episode of step 0. The
      episode's last time step is valid (a value may be bootstrapped from it
      if it was truncated); rows after it are not.
    sample: where the windows came from; None for a fresh trajectory.
  """

  experience: Experience
  valid: chex.Array
  sample: Sample | None = None


class Info(NamedTuple):
  """What `update` returns in addition to its new state.

  Attributes:
    metrics: dict of float32 scalars.
    priorities: float32 `[B]`, new priorities of the batch's rows in raw
      units; None for agents that do not prioritise.
  """

  metrics: dict[str, chex.Array]
  priorities: chex.Array | None = None


class Phase(NamedTuple):
  """A part of a run with an agent of its own.

  Attributes:
    name: a word.
    agent: the one that learns in it.
    updates: how many; None for all that are left.
    transfer: `(state of the phase before) -> state`; None in the first.
    imagine: `(state, observations [B, ...], key) -> Transition`, rollouts of
      the policy in a model; None if it learns only from real ones.
  """

  name: str
  agent: 'Agent'
  updates: int | None = None
  transfer: Callable[[Any], Any] | None = None
  imagine: Callable[..., Transition] | None = None


class Agent(NamedTuple):
  """An agent: pure functions over a state that is a pytree.

  `state.params` is all that actors receive.

  Attributes:
    init: `(key) -> state`.
    act: `(params, key, timestep) -> (action, extras)`, batched over `B`
      streams; explores. None for a thing that only learns.
    update: `(state, batch, key) -> (state, Info)`.
    refresh: `(state, batch, step, key) -> batch`, new targets for old data
      with the state's target parameters (reanalyze); None without.
    model: the learned `Model`, for planners; None without.
    evaluate: `(params, batch, key) -> metrics`, losses on held-out data.
    exploit: like `act`, without exploring; None where a planner plays.
  """

  init: Callable[[chex.PRNGKey], Any]
  act: Callable[..., tuple[chex.Array, dict[str, chex.Array]]] | None
  update: Callable[..., tuple[Any, Info]]
  refresh: Callable[..., Any] | None = None
  model: Model | None = None
  evaluate: Callable[..., dict[str, chex.Array]] | None = None
  exploit: Callable[..., tuple[chex.Array, dict[str, chex.Array]]] | None = None


class Text(NamedTuple):
  """Windows of a text, for agents that predict the next token.

  Attributes:
    tokens: int32 `[B, L + 1]`: the first `L` are read, the last `L` predicted.
  """

  tokens: chex.Array
