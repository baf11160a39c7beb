"""Probabilistic ensembles of one-step dynamics.

Each member predicts by how much an observation changes, whether the episode
ends, and the reward of either case: a normal for each number with its own
standard deviation (what cannot be known), and a logit. Where members differ is
what could be known and is not.

The end and the reward have networks of their own, which also read the change
that the first one expects. In one network with the change they are hardly
learned: a likelihood weighs each number by its precision, and what moves
smoothly is soon thousands of times as precise. And a reward that comes only
with the end, such as that of a goal, is one of two cases, not the tail of one
normal.

The network sees and predicts observations scaled by a data set's statistics,
where there are any; what goes in and comes out is in raw units.

Axes: `B` batch, `D` components of an action, `F` numbers in an observation,
`E` members.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from networks import mlp
from networks._numerics import hash_bits, mix
from networks.actor_critic import flatten, squash

# Where the learned bounds of the logarithm of the variance start (PETS).
_MAX_LOG_VARIANCE, _MIN_LOG_VARIANCE = 0.5, -10.0
ACTIVATIONS = {'silu': jax.nn.silu, 'relu': jax.nn.relu}


class Prediction(NamedTuple):
  """What each member says, in raw units.

  Attributes:
    mean: float32 `[E, B, F]`, the change of the observation, its leaves laid
      end to end.
    log_std: float32 `[E, B, F]`.
    reward: float32 `[E, B, 2]`, means: of a step after which the episode goes
      on, and of one that ends it.
    reward_log_std: float32 `[E, B, 2]`.
    logit: float32 `[E, B]`, of termination.
  """

  mean: jax.Array
  log_std: jax.Array
  reward: jax.Array
  reward_log_std: jax.Array
  logit: jax.Array

  def cases(self) -> jax.Array:
    """Chances that the episode goes on and that it ends, `[E, B, 2]`."""
    ends = jax.nn.sigmoid(self.logit)
    return jnp.stack([1.0 - ends, ends], -1)

  def expected_reward(self) -> jax.Array:
    """The mean of the reward over both cases, float32 `[E, B]`."""
    return jnp.sum(self.cases() * self.reward, -1)


class Known(NamedTuple):
  """What is known of an environment and need not be predicted.

  Both are functions `(o_tm1, a_tm1, o_t) -> float32 [B]` of observations, which
  are pytrees float32 `[B, ...]`, and actions `[B, D]`; None for what is
  learned.

  Attributes:
    reward: the reward of a step, in the units that are learned from.
    termination: 1 where the step ends the episode, else 0.
  """

  reward: Callable[..., jax.Array] | None = None
  termination: Callable[..., jax.Array] | None = None


class Ensemble(NamedTuple):
  """An ensemble as pure functions.

  Attributes:
    init: `(key) -> params`, every leaf with a leading `E`. Not trained are
      `statistics`.
    apply: `(params, observation, action [B, D]) -> Prediction`. Any number of
      members: those of `params`.
    bounds: `(params) -> float32 [E]`, how far apart the bounds of the
      logarithm of the variance are, the sum over components; a loss keeps it
      small.
    known: what takes the place of what is predicted.
  """

  init: Callable[[jax.Array], Any]
  apply: Callable[..., Prediction]
  bounds: Callable[[Any], jax.Array]
  known: Known = Known()


def make(
  observation_size: int,
  low: np.ndarray,
  high: np.ndarray,
  hidden_sizes: Sequence[int],
  *,
  outcome_sizes: Sequence[int] = (64, 64),
  members: int = 7,
  activation: str = 'silu',
  statistics: tuple[np.ndarray, np.ndarray] | None = None,
  known: Known | None = None,
) -> Ensemble:
  """An ensemble of `members` perceptrons with bounds of their own.

  `log var = softly within [min, max]`, both learned, one for each component.

  Args:
    observation_size: `F`.
    low: `[D]`, bounds of the actions, which enter scaled to the unit box.
    high: `[D]`.
    hidden_sizes: widths of the layers that predict the change.
    outcome_sizes: of those that predict the reward, and of those that predict
      the termination.
    members: `E`.
    activation: `'silu'` or `'relu'`.
    statistics: mean and standard deviation of observations, `[F]` each, to
      scale by; None for 0 and 1.
    known: what need not be predicted; None for nothing.

  Raises:
    ValueError: an unknown activation, no members, or statistics of another
      size.

  Source: Lakshminarayanan et al. (2017); PETS (Chua et al. 2018), Appendix A.1
  (the bounds).
  """
  if activation not in ACTIVATIONS:
    raise ValueError(
      f'activation={activation!r}: must be one of {", ".join(ACTIVATIONS)}'
    )
  if members < 1:
    raise ValueError(f'members={members}: must be 1 or more')
  size, outputs = observation_size, observation_size + 2
  inputs, act = size + int(np.size(low)), ACTIVATIONS[activation]
  outcome = functools.partial(
    mlp.make, inputs + size, outcome_sizes, activation=act
  )
  parts = {
    'change': mlp.make(inputs, hidden_sizes, 2 * size, activation=act),
    'reward': outcome(4),
    'termination': outcome(1),
  }
  box = squash(low, high)
  mean, std = np.zeros(size, np.float32), np.ones(size, np.float32)
  if statistics is not None:
    mean, std = (np.asarray(x, np.float32).reshape(-1) for x in statistics)
  if mean.size != size or std.size != size:
    raise ValueError(
      f'statistics: {mean.size} means and {std.size} deviations, must be '
      f'{size} each'
    )

  def init_one(key):
    keys = jax.random.split(key, len(parts))
    return {
      'statistics': {'mean': jnp.asarray(mean), 'std': jnp.asarray(std)},
      'max_log_variance': jnp.full((outputs,), _MAX_LOG_VARIANCE, jnp.float32),
      'min_log_variance': jnp.full((outputs,), _MIN_LOG_VARIANCE, jnp.float32),
      'layers': {
        name: part.init(key) for key, (name, part) in zip(keys, parts.items())
      },
    }

  def init(key):
    return jax.vmap(init_one)(jax.random.split(key, members))

  def apply(params, observation, action):
    flat, unit = flatten(observation), box.to_unit(action)

    def one(params):
      align = lambda x: jnp.broadcast_to(x, (flat.shape[0], x.size))
      mean, std = (
        align(jax.lax.stop_gradient(params['statistics'][name]))
        for name in ('mean', 'std')
      )
      run = lambda name, x: parts[name].apply(params['layers'][name], x)
      x = (flat - mean) / std
      change, spread = jnp.split(
        run('change', jnp.concatenate([x, unit], -1)), 2, -1
      )
      following = x + jax.lax.stop_gradient(change)
      seen = jnp.concatenate([x, unit, following], -1)
      reward, uncertain = jnp.split(run('reward', seen), 2, -1)
      low = align(params['min_log_variance'])
      high = align(params['max_log_variance'])
      raw = jnp.concatenate([spread, uncertain], -1)
      raw = high - jax.nn.softplus(high - raw)
      log_std = 0.5 * (low + jax.nn.softplus(raw - low))
      return Prediction(
        change * std,
        log_std[:, :size] + jnp.log(std),
        reward,
        log_std[:, size:],
        run('termination', seen)[:, 0],
      )

    number = jax.tree.leaves(params)[0].shape[0]
    # Unrolled: products of matrices are faster on CPUs than batched ones.
    each = [
      one(jax.tree.map(lambda x, i=i: x[i], params)) for i in range(number)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)

  def bounds(params):
    return jnp.sum(params['max_log_variance'] - params['min_log_variance'], -1)

  return Ensemble(init, apply, bounds, known or Known())


def row_uniforms(rows: jax.Array, count: int) -> jax.Array:
  """Numbers in `[0, 1)` that depend on what a row holds and on nothing else.

  The same row gets the same ones whenever it comes and wherever it stands: a
  split of a data set that need not be stored.

  Args:
    rows: float32 `[B, F]`.
    count: how many each row gets.

  Returns:
    float32 `[count, B]`.
  """
  bits = jax.lax.bitcast_convert_type(hash_bits(rows), jnp.uint32)
  place = mix(jnp.arange(1, count + 1, dtype=jnp.uint32))
  mixed = jax.vmap(lambda one: mix(bits ^ jnp.broadcast_to(one, bits.shape)))(
    place
  )
  return (mixed >> 8).astype(jnp.float32) / 2**24


def poisson(uniforms: jax.Array) -> jax.Array:
  """Turns uniform numbers into Poisson(1) ones by the inverse CDF.

  The weights of an online bootstrap (Oza and Russell 2001).

  Args:
    uniforms: float32 `[...]`, in `[0, 1)`.

  Returns:
    float32 `[...]`, whole numbers from 0 to 8.
  """
  mass = [math.exp(-1) / math.factorial(k) for k in range(8)]
  above = jnp.stack([uniforms >= total for total in np.cumsum(mass)])
  return jnp.sum(above, 0, dtype=jnp.float32)


def unflatten(flat: jax.Array, observation: Any) -> Any:
  """Rows float32 `[B, F]` as observations of the kind given.

  Leaves are float32 `[B, ...]`.
  """
  leaves, treedef = jax.tree.flatten(observation)
  sizes = [math.prod(x.shape[1:]) for x in leaves]
  parts = jnp.split(flat, np.cumsum(sizes)[:-1], -1)
  return treedef.unflatten(
    [x.reshape(x.shape[0], *leaf.shape[1:]) for x, leaf in zip(parts, leaves)]
  )
