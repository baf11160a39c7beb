"""Families of action distributions, as pure functions of a policy head.

What a head puts out becomes a distribution over actions from which a search
draws its candidates (Sampled MuZero, Hubert et al. 2021). Actions are always
in the environment's own units; nothing outside has to rescale them.

Axes: `B` batch, `K` sampled actions, `P` the head's outputs, `R` random
numbers an action, `E` an encoded action, `D` components of an action, `F`
independent categoricals, `n` the largest of them, `A` size of the action set.
Densities of real actions are with respect to the unit box `[-1, 1]^D` to
which `[low, high]` is scaled; the constant factor to the environment's own
units cancels wherever two densities are compared.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from networks._numerics import (
  MASKED,
  MAX_INT,
  dirichlet,
  hash_bits,
  inverse_softplus,
  invert_cdf,
  is_masked,
  log1mexp,
  log_slope,
  one_hots,
  pick,
  ravel,
  safe_log,
  split_logits,
  unravel,
)

# How close to its bounds a squashed action may come.
_EDGE = 1 - 1e-6
# Softly bounds the mean before the squashing: tanh(5) is 1 - 9e-5.
_MEAN_LIMIT = 5.0
_LOG_TINY = float(np.log(np.finfo(np.float32).tiny))


class ActionDistribution(NamedTuple):
  """One family; `parameters` are float32 `[B, P]`, as a head gives them.

  Attributes:
    num_parameters: `P`; all zeros are a sensible start.
    num_actions: size of the action set; None if it is continuous.
    encoded_size: `E`.
    draw: `(key, shape) -> float32 [*shape, R]`, the random numbers of
      actions: normals or uniforms.
    sample: `(draws [B, K, R], parameters) -> actions [B, K, ...]`; for real
      vectors differentiable in the parameters.
    log_prob: `(parameters, actions [B, K, ...]) -> float32 [B, K]`, finite.
    mode: `(parameters) -> actions [B, ...]`, to act without exploring.
    entropy: `(draws [B, K, R], parameters) -> float32 [B]`, in nats; exact
      where it can be (then the draws are ignored), else an estimate that is
      differentiable in the parameters.
    temper: `(parameters, temperature) -> parameters` of the distribution
      proportional to `pi^(1 / temperature)`.
    identity: `(actions [B, K, ...]) -> int32 [B, K]`, equal for equal actions.
    encode: `(actions [..., *action_shape]) -> float32 [..., E]`, how actions
      enter a dynamics network.
    noise: `(keys [B], parameters, alpha) -> noise`, a random distribution for
      each row, Dirichlet(alpha); an array with leading `B`.
    noise_sample: `(keys [B], noise, K) -> actions [B, K, ...]`.
    noise_log_prob: `(noise, actions [B, K, ...]) -> float32 [B, K]`, finite.
    mask: `(parameters, invalid bool [B, A]) -> parameters`, under which
      invalid actions have probability zero; None where the set is not
      enumerated by the head.
    mixture: `(parameters, noise, fraction) -> parameters` of
      `(1 - fraction) pi + fraction noise`; None where the family does not
      contain it.
    distinct: `(keys [B], parameters, K) -> (actions int32 [B, K], log_inclusion
      float32 [B, K])`, K different actions in ascending order, see `flat`;
      None where the set is not enumerated by the head.
  """

  num_parameters: int
  num_actions: int | None
  encoded_size: int
  draw: Callable[[jax.Array, Sequence[int]], jax.Array]
  sample: Callable[[jax.Array, jax.Array], jax.Array]
  log_prob: Callable[[jax.Array, jax.Array], jax.Array]
  mode: Callable[[jax.Array], jax.Array]
  entropy: Callable[[jax.Array, jax.Array], jax.Array]
  temper: Callable[[jax.Array, Any], jax.Array]
  identity: Callable[[jax.Array], jax.Array]
  encode: Callable[[jax.Array], jax.Array]
  noise: Callable[[jax.Array, jax.Array, Any], jax.Array]
  noise_sample: Callable[[jax.Array, jax.Array, int], jax.Array]
  noise_log_prob: Callable[[jax.Array, jax.Array], jax.Array]
  mask: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  mixture: Callable[[jax.Array, jax.Array, Any], jax.Array] | None = None
  distinct: Callable[..., tuple[jax.Array, jax.Array]] | None = None


def tanh_gaussian(
  low: np.ndarray,
  high: np.ndarray,
  *,
  min_std: float = 0.1,
  init_std: float = 1.0,
  noise_bins: int = 7,
) -> ActionDistribution:
  """Real vectors: independent normals, squashed by tanh into `[low, high]`.

  The head gives `[mean, raw_std]`, `P = 2D`. The mean is bounded softly,
  `5 tanh(mean / 5)`; `std = min_std + softplus(raw_std + c)` with the `c` for
  which a head at zero gives `init_std`. Squashed actions keep a distance of
  1e-6 from the unit box's bounds, in samples and in densities, so that
  densities and their gradients are finite. What lies beyond is drawn at the
  bound itself and has the density there, not its mass: tempered, and with a
  mean beyond 4, such samples weigh up to twice what they should.

  `mode` is the squashed mean (the median). `entropy` is exact for the normal
  and estimates the squashing's share. `temper` takes the power with respect
  to the measure before squashing, where it only scales the standard deviation
  by `sqrt(temperature)`; this cannot fall below `min_std`. `noise` is
  piecewise constant: in each dimension, independently, `noise_bins` equal
  parts with Dirichlet weights. `identity` is a hash: two different actions
  share one with probability `2^-32`, some pair of K with about
  `K^2 / 2^33` (5e-8 for 20).

  Args:
    low, high: bounds `[*shape]`, finite; any shape.
    min_std, init_std: before squashing, `0 < min_std < init_std`.
    noise_bins: parts of each dimension under the noise.

  Raises:
    ValueError: bounds or standard deviations make no sense.
  """
  box = _box(low, high)
  # Under a sweep's vmap these may be tracers, which have no value to check.
  if isinstance(min_std, int | float) and not 0 < min_std < math.inf:
    raise ValueError(f'min_std={min_std}: must be positive')
  concrete = isinstance(init_std - min_std, int | float)
  if concrete and not min_std < init_std < math.inf:
    raise ValueError(
      f'init_std={init_std}: must be greater than min_std={min_std}'
    )
  if noise_bins < 1:
    raise ValueError(f'noise_bins={noise_bins}: must be at least 1')
  shift = lambda: inverse_softplus(jnp.float32(init_std - min_std))

  def moments(parameters):
    mean, raw = jnp.split(parameters, 2, -1)
    mean = _MEAN_LIMIT * jnp.tanh(mean / _MEAN_LIMIT)
    return mean, min_std + jax.nn.softplus(raw + shift())

  def draw(key, shape):
    return jax.random.normal(key, (*shape, box.size))

  def inner(draws, parameters):
    mean, std = moments(parameters)
    return mean[:, None] + std[:, None] * draws

  def sample(draws, parameters):
    return box.to_units(jnp.tanh(inner(draws, parameters)))

  def log_prob(parameters, actions):
    mean, std = moments(parameters)
    x = jnp.arctanh(box.clip(box.to_box(actions)))
    z = (x - mean[:, None]) / std[:, None]
    normal = -0.5 * (z**2 + math.log(2 * math.pi)) - jnp.log(std)[:, None]
    return (normal - log_slope(x)).sum(-1)

  def mode(parameters):
    return box.to_units(jnp.tanh(moments(parameters)[0]))

  def entropy(draws, parameters):
    _, std = moments(parameters)
    normal = 0.5 * (1 + math.log(2 * math.pi)) + jnp.log(std)
    return (normal + log_slope(inner(draws, parameters)).mean(1)).sum(-1)

  def temper(parameters, temperature):
    mean, _ = jnp.split(parameters, 2, -1)
    std = moments(parameters)[1] * jnp.sqrt(temperature)
    raw = inverse_softplus(jnp.maximum(std - min_std, 1e-6)) - shift()
    return jnp.concatenate([mean, raw], -1)

  def identity(actions):
    return hash_bits(box.flatten(actions))

  def noise(keys, parameters, alpha):
    logits = jnp.zeros((parameters.shape[0], box.size, noise_bins))
    return dirichlet(keys, logits, alpha)

  def noise_sample(keys, noise, num_samples):
    shape = (2, num_samples, box.size)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, shape), out_axes=1)
    which, where = uniform(keys)
    index = invert_cdf(noise, which)
    return box.to_units(2 * (index + where) / noise_bins - 1)

  def noise_log_prob(noise, actions):
    position = (box.clip(box.to_box(actions)) + 1) * (noise_bins / 2)
    index = jnp.minimum(position.astype(jnp.int32), noise_bins - 1)
    log_density = safe_log(noise) + math.log(noise_bins / 2)
    return pick(log_density, index).sum(-1)

  return ActionDistribution(
    num_parameters=2 * box.size,
    num_actions=None,
    encoded_size=box.size,
    draw=draw,
    sample=sample,
    log_prob=log_prob,
    mode=mode,
    entropy=entropy,
    temper=temper,
    identity=identity,
    encode=box.to_box,
    noise=noise,
    noise_sample=noise_sample,
    noise_log_prob=noise_log_prob,
  )


def factored_bins(
  low: np.ndarray, high: np.ndarray, num_bins: int
) -> ActionDistribution:
  """Real vectors of equally spaced values: a categorical for each dimension.

  Values go from `low` to `high` inclusive; `log_prob` is the log-probability
  of the bins nearest to a real action, which may lie anywhere. Actions are
  encoded as `tanh_gaussian`'s, scaled to `[-1, 1]^D`: real actions from
  elsewhere can be, too. `identity` is the joint bin's index, or where that
  would not fit int32 a hash (see `tanh_gaussian`).

  Args:
    low, high: bounds `[*shape]`, finite; any shape.
    num_bins: in each dimension; `P = D num_bins`.

  Raises:
    ValueError: bounds make no sense or there are fewer than two bins.
  """
  box = _box(low, high)
  if num_bins < 2:
    raise ValueError(f'num_bins={num_bins}: must be at least 2')
  sizes = (num_bins,) * box.size
  # Looked up and not computed: equal bins are equal values to the last bit.
  ends = np.ravel(low), np.ravel(high)
  values = np.linspace(*ends, num_bins, axis=1, dtype=np.float32)
  offsets = np.arange(box.size, dtype=np.int32) * num_bins

  def to_digits(actions):
    position = (box.to_box(actions) + 1) * ((num_bins - 1) / 2)
    nearest = jnp.round(position).astype(jnp.int32)
    return jnp.clip(nearest, 0, num_bins - 1)

  def from_digits(digits):
    index = digits + jnp.broadcast_to(offsets, digits.shape)
    actions = jnp.asarray(values.ravel())[index]
    return actions.reshape(*digits.shape[:-1], *box.shape)

  return _categoricals(sizes, to_digits, from_digits)._replace(
    encoded_size=box.size, encode=box.to_box
  )


def factored_index(factors: tuple[int, ...]) -> ActionDistribution:
  """A product of finite sets, an independent categorical for each of them.

  Actions are int32 joint indices in C order; they are encoded as one one-hot
  vector a factor, side by side.

  Args:
    factors: sizes of the sets; `P = E = sum(factors)`.

  Raises:
    ValueError: a factor is empty, or joint indices would not fit int32.
  """
  _check_factors(factors)
  if math.prod(factors) > MAX_INT:
    raise ValueError(
      f'factors={factors}: {math.prod(factors)} joint actions do not fit'
      ' int32; use factored_bins, whose actions are vectors'
    )
  digits_of = functools.partial(unravel, factors)
  family = _categoricals(factors, digits_of, functools.partial(ravel, factors))
  return family._replace(
    encode=functools.partial(one_hots, factors), identity=lambda x: x
  )


def flat(num_actions: int, factors: tuple[int, ...] = ()) -> ActionDistribution:
  """One categorical over all of a large set; actions are int32 indices.

  Logits at or below half of float32's least number count as masked: their
  actions have probability zero and no noise. Sampling inverts the cumulative
  sum: one uniform number an action, whatever the size of the set (its 23 bits
  leave probabilities below 1e-7 coarse).

  `distinct` draws without replacement: the K largest of `log p + Gumbel`.
  Given `kappa`, the next largest, an action is among them with probability
  `q = 1 - exp(-exp(log p - kappa))`, whose logarithm it returns, so that
  `sum_k p(a_k) / q(a_k) X(a_k)` is an unbiased estimate of the mean of X
  (Kool et al. 2019, section 4.2). With `K = A` these are all actions in
  their order and q = 1. Masked actions come only where fewer than K others
  exist, with q = 1.

  Args:
    num_actions: `A = P`.
    factors: sizes whose product is `num_actions`: actions are then encoded
      as one one-hot vector a factor (C order) and not as a single one.

  Raises:
    ValueError: there are no actions, or the factors do not make them.
  """
  if not 1 <= num_actions <= MAX_INT:
    raise ValueError(f'num_actions={num_actions}: must be at least 1, int32')
  factors = tuple(factors) or (num_actions,)
  _check_factors(factors)
  if math.prod(factors) != num_actions:
    raise ValueError(
      f'factors={factors}: their product must be num_actions={num_actions}'
    )
  family = _categoricals(
    (num_actions,), lambda actions: actions[..., None], lambda x: x[..., 0]
  )

  def mask(parameters, invalid):
    return jnp.where(invalid, MASKED, parameters)

  def mixture(parameters, noise, fraction):
    probs = jax.nn.softmax(parameters)
    mixed = safe_log((1 - fraction) * probs + fraction * noise[:, 0])
    return jnp.where(is_masked(parameters), MASKED, mixed)

  def distinct(keys, parameters, num_samples):
    if not 1 <= num_samples <= num_actions:
      raise ValueError(
        f'K={num_samples}: must be in [1, {num_actions}], for there are'
        f' {num_actions} distinct actions'
      )
    if num_samples == num_actions:
      shape = parameters.shape
      actions = jnp.broadcast_to(
        jnp.arange(num_actions, dtype=jnp.int32), shape
      )
      return actions, jnp.zeros(shape)
    masked = is_masked(parameters)
    log_probs = jnp.where(masked, MASKED, jax.nn.log_softmax(parameters))
    gumbel = lambda key: jax.random.gumbel(key, log_probs.shape[1:])
    perturbed = log_probs + jax.vmap(gumbel)(keys)
    # Without the barrier XLA merges the slices below into this one, no longer
    # sees a top-k and sorts everything: 30 times slower on a CPU.
    largest, actions = jax.lax.optimization_barrier(
      jax.lax.top_k(perturbed, num_samples + 1)
    )
    actions = jnp.sort(actions[:, :-1], -1)
    pick = lambda x: jnp.take_along_axis(x, actions, -1)
    # Bounded where q is 1 in float32 already, or its gradient would be NaN.
    rate = jnp.exp(jnp.minimum(pick(log_probs) - largest[:, -1:], 5.0))
    return actions, jnp.where(pick(masked), 0.0, log1mexp(rate))

  return family._replace(
    encoded_size=sum(factors),
    encode=functools.partial(one_hots, factors),
    mask=mask,
    mixture=mixture,
    distinct=distinct,
  )


def _categoricals(sizes, to_digits, from_digits) -> ActionDistribution:
  """Independent categoricals; digits int32 `[..., F]` say which of each.

  `encode` is None and for the caller to put in.
  """
  num_actions = math.prod(sizes)
  split = functools.partial(split_logits, sizes)

  def log_probs(parameters):
    log_p = jax.nn.log_softmax(split(parameters))
    return jnp.maximum(log_p, _LOG_TINY)

  def draw(key, shape):
    return jax.random.uniform(key, (*shape, len(sizes)))

  def sample(draws, parameters):
    probs = jax.lax.stop_gradient(jax.nn.softmax(split(parameters)))
    return from_digits(invert_cdf(probs, draws))

  def log_prob(parameters, actions):
    return pick(log_probs(parameters), to_digits(actions)).sum(-1)

  def mode(parameters):
    return from_digits(split(parameters).argmax(-1).astype(jnp.int32))

  def entropy(draws, parameters):
    del draws
    probs = jax.nn.softmax(split(parameters))
    return -(probs * log_probs(parameters)).sum((1, 2))

  def temper(parameters, temperature):
    masked = is_masked(parameters)
    return jnp.where(masked, parameters, parameters / temperature)

  def identity(actions):
    digits = to_digits(actions)
    return ravel(sizes, digits) if num_actions <= MAX_INT else hash_bits(digits)

  def noise(keys, parameters, alpha):
    return dirichlet(keys, split(parameters), alpha)

  def noise_sample(keys, noise, num_samples):
    draws = jax.vmap(lambda key: draw(key, (num_samples,)))(keys)
    return from_digits(invert_cdf(noise, draws))

  def noise_log_prob(noise, actions):
    return pick(safe_log(noise), to_digits(actions)).sum(-1)

  return ActionDistribution(
    num_parameters=sum(sizes),
    num_actions=num_actions,
    encoded_size=sum(sizes),
    draw=draw,
    sample=sample,
    log_prob=log_prob,
    mode=mode,
    entropy=entropy,
    temper=temper,
    identity=identity,
    encode=None,  # pyright: ignore[reportArgumentType]
    noise=noise,
    noise_sample=noise_sample,
    noise_log_prob=noise_log_prob,
  )


class _Box(NamedTuple):
  """Bounds of real actions and the way to the unit box and back.

  `centre` and `half` width, float32 `[D]`, scale symmetric bounds without
  rounding.
  """

  shape: tuple[int, ...]
  size: int
  centre: np.ndarray
  half: np.ndarray

  def flatten(self, actions):
    """`[..., *shape]` to `[..., D]`."""
    leading = actions.shape[: actions.ndim - len(self.shape)]
    return actions.reshape(*leading, self.size)

  def to_box(self, actions):
    """`[..., *shape]` in units to `[..., D]` in the unit box."""
    x = self.flatten(actions)
    fit = functools.partial(jnp.broadcast_to, shape=x.shape)
    return (x - fit(self.centre)) / fit(self.half)

  def to_units(self, x):
    """`[..., D]` in the unit box to `[..., *shape]`, clipped."""
    fit = functools.partial(jnp.broadcast_to, shape=x.shape)
    actions = fit(self.centre) + fit(self.half) * self.clip(x)
    return actions.reshape(*x.shape[:-1], *self.shape)

  def clip(self, x):
    return jnp.clip(x, -_EDGE, _EDGE)


def _box(low, high) -> _Box:
  """The box of these bounds, or a ValueError."""
  low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
  if low.shape != high.shape:
    raise ValueError(
      f'low has shape {low.shape}, high {high.shape}: must be the same'
    )
  if not low.size:
    raise ValueError(f'low has shape {low.shape}: needs a component')
  with np.errstate(all='ignore'):
    half = (high - low).ravel() / 2
  for i, (a, b) in enumerate(zip(low.ravel(), high.ravel())):
    where = f'low={a}, high={b} in component {i}: '
    if np.isnan(a) or np.isnan(b):
      raise ValueError(where + 'must not be NaN')
    if not np.isfinite(half[i]):
      raise ValueError(
        where + 'unbounded, but this family needs finite bounds: clip or'
        ' rescale the actions of the environment'
      )
    if not a < b:
      raise ValueError(where + 'low must be less than high')
  return _Box(low.shape, low.size, low.ravel() + half, half)


def _check_factors(factors):
  if not factors or min(factors) < 1:
    raise ValueError(f'factors={factors}: needs sizes of at least 1')
