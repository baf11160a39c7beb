"""The actions that a node chooses among, where a set cannot be enumerated.

Sampled MuZero (Hubert et al. 2021), Section 5. K actions are drawn from a
proposal beta; equal ones share the first of their slots. See `search.sampled`
for what the priors are.

Axes: `B` batch, `K` slots for sampled actions, `A` actions, `P` parameters of
a distribution; an action is `[...]`.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from search import policies, rows
from search.roots import as_bool, check_range

_LOWEST = float(jnp.finfo(jnp.float32).min)
# What distributions give for the logarithm of zero.
_LOG_TINY = float(np.log(np.finfo(np.float32).tiny))


class Proposal(NamedTuple):
  """Actions to choose among.

  Attributes:
    actions: int32 or float32 `[B, K, ...]`.
    logits: float32 `[B, K]`, of the priors; the lowest number at spare slots.
    is_spare: bool `[B, K]`.
  """

  actions: chex.Array
  logits: chex.Array
  is_spare: chex.Array


class Wide(NamedTuple):
  """Which of the draws are from a flattened policy (EfficientZero V2).

  Attributes:
    count: how many, the last of K; static.
    temperature: of the power that flattens it, above 0; may be traced. With 9
      a Gaussian's standard deviation is three times as large.
  """

  count: int = 0
  temperature: chex.Numeric = 9.0


NOT_WIDE = Wide()


def check(
  distribution: Any,
  num_samples: int,
  replacement: bool,
  wide: Wide = NOT_WIDE,
) -> None:
  """Checks that K actions can be drawn.

  Args:
    distribution: a `networks.actions.ActionDistribution`.
    num_samples: K.
    replacement: as in `propose`.
    wide: as in `propose`.

  Raises:
    ValueError: naming what the distribution cannot do.
  """
  if num_samples < 1:
    raise ValueError(f'num_samples={num_samples}: must be at least 1')
  if not 0 <= wide.count <= num_samples:
    raise ValueError(
      f'wide_samples={wide.count}: must be from 0 to '
      f'num_samples={num_samples}, of which they are part'
    )
  if replacement:
    return
  if wide.count:
    raise ValueError(
      f'replacement=False: excludes wide_samples={wide.count}, which are drawn '
      'with replacement; take 0'
    )
  if distribution.distinct is None:
    raise ValueError(
      'replacement=False: needs a flat categorical over enumerated actions; '
      'other distributions draw with replacement'
    )
  if num_samples > distribution.num_actions:
    raise ValueError(
      f'num_samples={num_samples}: without replacement at most the '
      f'{distribution.num_actions} actions that there are'
    )


def merge(identity: chex.Array) -> chex.Array:
  """Counts equal actions in the first slot that holds one.

  Args:
    identity: int32 `[B, K]`, equal where actions are.

  Returns:
    float32 `[B, K]`, how often each action was drawn, 0 at spare slots; a row
    sums to K.

  >>> merge(jnp.array([[7, 5, 7, 7]])).tolist()
  [[3.0, 1.0, 0.0, 0.0]]
  """
  chex.assert_rank(identity, 2)
  size = identity.shape[1]
  same = identity[:, :, None] == identity[:, None, :]
  # One sum for both questions, how often and whether before: an earlier equal
  # weighs more than all counts. Over the middle axis, which vectorises.
  before = np.tri(size, size, -1, dtype=np.int32).T
  total = jnp.sum(jnp.where(same, 1 + (size + 1) * before[None], 0), axis=1)
  return jnp.where(total > size, 0, total).astype(jnp.float32)


def prior_logits(
  counts: chex.Array, log_pi: chex.Array, log_beta: chex.Array
) -> chex.Array:
  """Logits of `beta_hat / beta * pi` over the slots, float32 `[B, K]`.

  Args:
    counts: float32 `[B, K]`, draws of each slot's action; 0 if spare.
    log_pi: float32 `[B, K]`, the policy's log-probability of it.
    log_beta: float32 `[B, K]`, the proposal's.
  """
  chex.assert_equal_shape([counts, log_pi, log_beta])
  logits = jnp.log(jnp.maximum(counts, 1)) + log_pi - log_beta
  return jnp.where(counts > 0, logits, _LOWEST)


def propose(
  key: chex.PRNGKey,
  distribution: Any,
  parameters: chex.Array,
  num_samples: int,
  *,
  temperature: chex.Numeric = 1.0,
  replacement: bool = True,
  noise: policies.Noise = policies.NO_NOISE,
  invalid_actions: chex.Array | None = None,
  draws: chex.Array | None = None,
  with_mode: bool = False,
  wide: Wide = NOT_WIDE,
) -> Proposal:
  """Draws the action set of a node.

  Args:
    key: consumed.
    distribution: a `networks.actions.ActionDistribution`.
    parameters: float32 `[B, P]`, of pi.
    num_samples: K; static.
    temperature: tau of the proposal `pi ** (1 / tau)`, above 0.
    replacement: draw independently; else K distinct actions.
    noise: in both pi and beta.
    invalid_actions: bool `[B, A]`; None for none.
    draws: float32 `[B, K, R]`, random numbers of `distribution.draw`; None to
      draw them here.
    with_mode: the first draw is the mode of pi (with replacement only).
    wide: which draws are from a flattened policy. If any are, all draws weigh
      alike: none is corrected for what it was drawn from.

  Returns:
    `Proposal`.

  Raises:
    ValueError: if `num_samples` or `temperature` is out of range, or the
      distribution cannot do what is asked.
  """
  check(distribution, num_samples, replacement, wide)
  check_range('sample_temperature', temperature, above=0)
  check_range('wide_temperature', wide.temperature, above=0)
  if invalid_actions is not None:
    if distribution.mask is None:
      raise ValueError(
        'invalid_actions: only a flat categorical over enumerated actions can '
        'be masked'
      )
    parameters = distribution.mask(parameters, invalid_actions)
  is_plain = _is(temperature, 1)
  beta = parameters
  if not is_plain:
    beta = distribution.temper(parameters, temperature)
  noise_key, *keys = jax.random.split(key, 4)
  mixed, batch = None, parameters.shape[0]
  if not noise.is_none:
    drawn = distribution.noise(
      rows.split(noise_key, batch), parameters, noise.alpha
    )
    mixed = _Mixed(drawn, noise.fraction)
  if replacement:
    numbers = draws
    if numbers is None:
      numbers = rows.draw(distribution.draw, keys[0], (batch, num_samples))
    actions = distribution.sample(numbers, beta)
    if wide.count:
      flat = distribution.temper(parameters, wide.temperature)
      others = distribution.sample(numbers[:, -wide.count :], flat)
      actions = actions.at[:, -wide.count :].set(others)
    if with_mode:
      actions = actions.at[:, 0].set(distribution.mode(parameters))
    if mixed is not None:
      actions = _with_noise(keys[1:], distribution, actions, mixed)
    counts = merge(distribution.identity(actions))
    # Where pi is beta, nothing is left of their ratio.
    log_pi = log_beta = jnp.zeros_like(counts)
    if not is_plain and not wide.count:
      log_pi, log_beta = (
        _log_mixture(distribution, x, mixed, actions)
        for x in (parameters, beta)
      )
  else:
    if mixed is not None:
      parameters, beta = (
        distribution.mixture(x, *mixed) for x in (parameters, beta)
      )
    actions, log_beta = distribution.distinct(
      rows.split(keys[0], batch), beta, num_samples
    )
    log_pi = distribution.log_prob(parameters, actions)
    # An action without probability only fills a slot that was left over.
    counts = (log_pi > _LOG_TINY).astype(log_pi.dtype)

  if invalid_actions is not None:
    # An invalid one too.
    is_invalid = jnp.take_along_axis(as_bool(invalid_actions), actions, axis=1)
    counts = jnp.where(is_invalid, 0, counts)
  return Proposal(actions, prior_logits(counts, log_pi, log_beta), counts == 0)


def pad(proposal: Proposal, count: int) -> Proposal:
  """Adds spare slots.

  Args:
    proposal: `[B, K]`.
    count: how many, above 0; they repeat the first action.
  """
  more = lambda x, filled: jnp.concatenate([x, filled], axis=1)
  repeated = jnp.repeat(proposal.actions[:, :1], count, axis=1)
  empty = jnp.full((proposal.logits.shape[0], count), _LOWEST)
  return Proposal(
    more(proposal.actions, repeated),
    more(proposal.logits, empty),
    more(proposal.is_spare, empty < 0),
  )


class _Mixed(NamedTuple):
  """What is mixed into a policy: noise drawn for each row, and its share."""

  noise: Any
  fraction: chex.Numeric


def _with_noise(keys, distribution, actions, mixed):
  """Actions `[B, K, ...]`, some of them replaced by draws of the noise."""
  shape = actions.shape[:2]
  others = distribution.noise_sample(
    rows.split(keys[0], shape[0]), mixed.noise, shape[1]
  )
  pick = rows.draw(
    lambda key, shape: jax.random.bernoulli(key, mixed.fraction, shape),
    keys[1],
    shape,
  )
  pick = pick.reshape(pick.shape + (1,) * (actions.ndim - 2))
  return jnp.where(pick, others, actions)


def _log_mixture(distribution, parameters, mixed, actions):
  """Log-probabilities `[B, K]` of a policy with the noise mixed in."""
  log_prob = distribution.log_prob(parameters, actions)
  if mixed is None:
    return log_prob
  return jnp.logaddexp(
    jnp.log1p(-mixed.fraction) + log_prob,
    jnp.log(mixed.fraction) + distribution.noise_log_prob(mixed.noise, actions),
  )


def _is(value, number) -> bool:
  """Whether a value is known, before tracing, to be that number."""
  return isinstance(value, int | float) and value == number
