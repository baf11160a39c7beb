"""Actors and critics on vectors: squashed Gaussians and ensembles of Q.

Observations are arrays or pytrees of arrays, laid end to end. Actions are in
the environment's own units everywhere; inside they are scaled to the unit box
`[-1, 1]^D`, and densities are with respect to that box.

What an observation is shifted and divided by lies among the parameters, under
`statistics`: it is saved with them and no gradient reaches it.

Axes: `B` batch, `D` components of an action, `E` members of an ensemble.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from networks import mixture, mlp, moe
from networks._numerics import log_slope
from networks.mlp import Network

# How near to its bounds a stored action is taken to be: atanh(1) is infinite.
_EDGE = 1 - 1e-6
_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


class Gaussian(NamedTuple):
  """Normals before the squashing.

  Attributes:
    mean: float32 `[..., D]`.
    std: float32 `[..., D]`, positive.
  """

  mean: jax.Array
  std: jax.Array


class Squash(NamedTuple):
  """Normals squashed by tanh into a box.

  Attributes:
    sample: `(noise [..., D], Gaussian) -> (actions [..., D], log_prob [...])`;
      `noise` is standard normal, both results are differentiable.
    log_prob: `(Gaussian, actions [..., D]) -> [...]`, of stored actions; those
      at a bound are moved inside by 1e-6 of the unit box.
    mode: `(Gaussian) -> actions [..., D]`, tanh of the mean.
    to_unit: `(actions [..., D]) -> [..., D]`, the same in the unit box.
    from_unit: `(unit [..., D]) -> [..., D]`, back.
  """

  sample: Callable[..., tuple[jax.Array, jax.Array]]
  log_prob: Callable[[Gaussian, jax.Array], jax.Array]
  mode: Callable[[Gaussian], jax.Array]
  to_unit: Callable[[jax.Array], jax.Array]
  from_unit: Callable[[jax.Array], jax.Array]


def squash(low: np.ndarray, high: np.ndarray) -> Squash:
  """Functions of squashed Gaussians over a box.

  Args:
    low: float32 `[D]`, bounds of the actions.
    high: float32 `[D]`.

  Source: SAC (Haarnoja et al. 2018), Appendix C; the logarithm of the slope of
  tanh in the form that does not cancel.
  """
  middle = jnp.asarray((low + high) / 2, jnp.float32)
  half = jnp.asarray((high - low) / 2, jnp.float32)

  def align(vector, x):
    return jnp.broadcast_to(vector, x.shape).astype(x.dtype)

  def to_unit(actions):
    return (actions - align(middle, actions)) / align(half, actions)

  def from_unit(unit):
    return align(middle, unit) + align(half, unit) * unit

  def density(noise, std, raw):
    # Summed over components: nothing of them is averaged.
    normal = -0.5 * jnp.square(noise) - jnp.log(std) - _HALF_LOG_TAU
    return jnp.sum(normal - log_slope(raw), axis=-1)

  def sample(noise, gaussian):
    raw = gaussian.mean + gaussian.std * noise
    return from_unit(jnp.tanh(raw)), density(noise, gaussian.std, raw)

  def log_prob(gaussian, actions):
    raw = jnp.arctanh(jnp.clip(to_unit(actions), -_EDGE, _EDGE))
    noise = (raw - gaussian.mean) / gaussian.std
    return density(noise, gaussian.std, raw)

  def mode(gaussian):
    return from_unit(jnp.tanh(gaussian.mean))

  return Squash(sample, log_prob, mode, to_unit, from_unit)


def flatten(observation: Any) -> jax.Array:
  """Leaves `[B, ...]` of an observation end to end, float32 `[B, F]`."""
  leaves = jax.tree.leaves(observation)
  rows = [jnp.reshape(x, (x.shape[0], -1)) for x in leaves]
  return jnp.concatenate([x.astype(jnp.float32) for x in rows], axis=-1)


def gaussian_policy(
  observation_size: int,
  action_size: int,
  hidden_sizes: Sequence[int],
  *,
  std: str = 'state',
  min_std: float = 1e-5,
  max_std: float = math.e**2,
  init_std: float = 1.0,
  norm: str = 'none',
  statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> Network:
  """A policy `apply(params, observation) -> Gaussian` of `[B, D]`.

  Args:
    observation_size: numbers in an observation, all leaves together.
    action_size: `D`.
    hidden_sizes: widths of the layers, each followed by a ReLU.
    std: `'state'`, an output of the network; `'free'`, a parameter of its own,
      the same in all states.
    min_std: the least standard deviation.
    max_std: the largest.
    init_std: where it is when its output is zero.
    norm: of the hidden layers, `'none'` or `'layer'`.
    statistics: mean and standard deviation of observations, `[F]` each, to
      normalise by; None for 0 and 1.

  Raises:
    ValueError: an unknown kind of std, or `init_std` not between the others.

  Source: SAC (Haarnoja et al. 2018), Appendix C.
  """
  if std not in ('state', 'free'):
    raise ValueError(f"std={std!r}: must be 'state' or 'free'")
  if not min_std < init_std <= max_std:
    raise ValueError(
      f'init_std={init_std}: must be above min_std={min_std} and at most '
      f'max_std={max_std}'
    )
  outputs = action_size * (2 if std == 'state' else 1)
  body = mlp.make(observation_size, hidden_sizes, outputs, norm=norm)
  offset = math.log(init_std)

  def init(key):
    params = {
      'statistics': _statistics(statistics, observation_size),
      'layers': body.init(key),
    }
    if std == 'free':
      params['log_std'] = jnp.zeros((action_size,))
    return params

  def apply(params, observation):
    x = _normalise(params['statistics'], flatten(observation))
    x = body.apply(params['layers'], x)
    mean, raw = x[..., :action_size], x[..., action_size:]
    if std == 'free':
      raw = jnp.broadcast_to(params['log_std'], mean.shape)
    deviation = jnp.exp(
      jnp.clip(raw + offset, math.log(min_std), math.log(max_std))
    )
    return Gaussian(mean, deviation)

  return Network(init, apply)


def q_ensemble(
  observation_size: int,
  low: np.ndarray,
  high: np.ndarray,
  hidden_sizes: Sequence[int],
  *,
  members: int = 2,
  norm: str = 'none',
  statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> Network:
  """Critics `apply(params, observation, action [B, D]) -> float32 [E, B]`.

  All leaves of the parameters have a leading `E`. One member alone is
  `apply(member(params, i), ...)`, `[1, B]`.

  Args:
    observation_size: numbers in an observation.
    low: `[D]`, bounds of the actions, which enter scaled to the unit box.
    high: `[D]`.
    hidden_sizes: widths of the layers, each followed by a ReLU.
    members: `E`.
    norm: of the hidden layers, `'none'` or `'layer'`.
    statistics: mean and standard deviation of observations, `[F]` each, to
      normalise by; None for 0 and 1.

  Raises:
    ValueError: statistics of another size; a size or a norm that
      `networks.mlp.make` refuses.

  Source: TD3 (Fujimoto et al. 2018), section 4: two critics.
  """
  size = observation_size + int(np.size(low))
  body = mlp.make(size, hidden_sizes, 1, norm=norm)
  box = squash(low, high)

  def init_one(key):
    return {
      'statistics': _statistics(statistics, observation_size),
      'layers': body.init(key),
    }

  def init(key):
    return jax.vmap(init_one)(jax.random.split(key, members))

  def apply(params, observation, action):
    flat, unit = flatten(observation), box.to_unit(action)

    def one(params):
      x = _normalise(params['statistics'], flat)
      return body.apply(params['layers'], jnp.concatenate([x, unit], -1))[:, 0]

    number = jax.tree.leaves(params)[0].shape[0]
    # Unrolled: products of matrices are faster on CPUs than batched ones.
    each = [
      one(jax.tree.map(lambda x, i=i: x[i], params)) for i in range(number)
    ]
    return jnp.stack(each)

  return Network(init, apply)


class MixtureCritics(NamedTuple):
  """Critics with a mixture of experts.

  Attributes:
    init: `(key) -> params`, all leaves with a leading `E`.
    apply: `(params, observation, action [B, D]) -> float32 [E, B]`, with the
      gates of acting.
    learn: `(params, observation, action, key) -> (q [E, B], moe.Aux)`, with
      noisy gates; leaves of the `Aux` have a leading `E`. With None for the
      key the gates are those of acting.
  """

  init: Callable[[jax.Array], Any]
  apply: Callable[..., jax.Array]
  learn: Callable[..., tuple[jax.Array, moe.Aux]]


def q_mixture(
  observation_size: int,
  low: np.ndarray,
  high: np.ndarray,
  width: int,
  config: moe.Config,
  *,
  tokens: int = 1,
  members: int = 2,
  norm: str = 'none',
  statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> MixtureCritics:
  """Critics of a hidden layer, a residual mixture of experts, and a linear one.

  Each member has experts and gates of its own.

  Args:
    observation_size: as in `q_ensemble`.
    low: `[D]`, as in `q_ensemble`.
    high: `[D]`, as in `q_ensemble`.
    width: of the hidden layer, the mixture's input and output.
    config: of the mixture; without statistics, see `mixture.check`.
    tokens: chunks that the hidden layer is cut into.
    members: `E`.
    norm: of the hidden layer and of the mixture's input.
    statistics: `[F]` each, as in `q_ensemble`.

  Raises:
    ValueError: what `mixture.check` refuses, or tokens that do not divide the
      width.

  Source: the place of the mixture is that of Obando-Ceron 2024.
  """
  mixture.check(config, 'moe', statistics=False)
  if tokens < 1 or width % tokens:
    raise ValueError(f'tokens={tokens}: must divide the width, {width}')
  size = observation_size + int(np.size(low))
  body = mixture.Regressor(width, 1, config, tokens, lambda: mlp.Norm(norm))
  box = squash(low, high)

  def init_one(key):
    layers = body.init(key, jnp.zeros((1, size)), False)['params']
    return {
      'statistics': _statistics(statistics, observation_size),
      'layers': mlp.randomise(layers, key),
    }

  def init(key):
    return jax.vmap(init_one)(jax.random.split(key, members))

  def learn(params, observation, action, key):
    flat, unit = flatten(observation), box.to_unit(action)

    def one(params, key):
      x = _normalise(params['statistics'], flat)
      q, aux = body.apply(
        {'params': params['layers']},
        jnp.concatenate([x, unit], -1),
        key is not None,
        rngs=None if key is None else {'gate': key},
      )
      return q[:, 0], aux

    number = jax.tree.leaves(params)[0].shape[0]
    keys = [None] * number if key is None else jax.random.split(key, number)
    each = [
      one(jax.tree.map(lambda x, i=i: x[i], params), keys[i])
      for i in range(number)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)

  def apply(params, observation, action):
    return learn(params, observation, action, None)[0]

  return MixtureCritics(init, apply, learn)


def v_network(
  observation_size: int,
  hidden_sizes: Sequence[int],
  *,
  norm: str = 'none',
  statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> Network:
  """A state's value, `apply(params, observation) -> float32 [B]`.

  Args:
    observation_size: numbers in an observation.
    hidden_sizes: widths of the layers, each followed by a ReLU.
    norm: of the hidden layers, `'none'` or `'layer'`.
    statistics: mean and standard deviation of observations, `[F]` each, to
      normalise by; None for 0 and 1.

  Raises:
    ValueError: as `q_ensemble`.
  """
  body = mlp.make(observation_size, hidden_sizes, 1, norm=norm)

  def init(key):
    return {
      'statistics': _statistics(statistics, observation_size),
      'layers': body.init(key),
    }

  def apply(params, observation):
    x = _normalise(params['statistics'], flatten(observation))
    return body.apply(params['layers'], x)[:, 0]

  return Network(init, apply)


def member(params: Any, index: int) -> Any:
  """One member of an ensemble's parameters, as an ensemble of one."""
  return jax.tree.map(lambda x: x[index : index + 1], params)


def _statistics(statistics, size: int) -> dict[str, jax.Array]:
  if statistics is None:
    return {'mean': jnp.zeros((size,)), 'std': jnp.ones((size,))}
  mean, std = (jnp.asarray(x, jnp.float32).reshape(-1) for x in statistics)
  if mean.size != size or std.size != size:
    raise ValueError(
      f'statistics: {mean.size} means and {std.size} deviations, must be '
      f'{size} each'
    )
  return {'mean': mean, 'std': std}


def _normalise(statistics: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  mean, std = (
    jax.lax.stop_gradient(statistics[name])[None] for name in ('mean', 'std')
  )
  return (x - mean) / std
