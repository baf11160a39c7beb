"""Loss terms: functions of arrays, one number a row.

Axes: `B` batch, `A` categories, `F` features, `N` bins.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from networks import heads


def cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Cross-entropy `-sum_a labels_a log softmax(logits)_a`.

  Args:
    logits: float32 `[B, A]`.
    labels: float32 `[B, A]`, a distribution (no gradient flows into it).

  Returns:
    float32 `[B]`.
  """
  chex.assert_rank([logits, labels], 2)
  chex.assert_equal_shape([logits, labels])
  log_probs = jax.nn.log_softmax(logits)
  return -jnp.sum(jax.lax.stop_gradient(labels) * log_probs, axis=-1)


def two_hot_cross_entropy(logits: chex.Array, target: chex.Array) -> chex.Array:
  """Cross-entropy of a categorical head with a scalar as a two-hot label.

  Args:
    logits: float32 `[B, N]`, over the bins of `networks.heads`.
    target: float32 `[B]`, raw units.

  Returns:
    float32 `[B]`.

  Source: MuZero (Schrittwieser 2020), Appendix F.
  """
  return cross_entropy(logits, heads.to_two_hot(target, logits.shape[-1]))


def sampled_kl(log_probs: chex.Array, weights: chex.Array) -> chex.Array:
  """KL divergence of a search's weights from a policy, on sampled actions.

  `sum_k w_k (log w_k - log pi(a_k))`, the projection of the sample-based
  improvement `beta_hat / beta * f` onto the policies that the network can
  express: the correction is in the weights already, through the priors of the
  search. Actions drawn twice have one slot with all their weight; spare slots
  weigh 0 and count for nothing.

  Args:
    log_probs: float32 `[B, K]`, the policy's, of the sampled actions; for a
      real-valued action a log-density, so that the result can be negative.
    weights: float32 `[B, K]`, sum to 1; no gradient flows into them.

  Returns:
    float32 `[B]`.

  Source: Sampled MuZero (Hubert 2021), section 5.
  """
  chex.assert_rank([log_probs, weights], 2)
  chex.assert_equal_shape([log_probs, weights])
  weights = jax.lax.stop_gradient(weights)
  # What a spare slot holds must not matter, not even if it is not finite.
  log_probs = jnp.where(weights > 0, log_probs, 0.0)
  entropy = jax.scipy.special.xlogy(weights, weights)
  return jnp.sum(entropy - weights * log_probs, axis=-1)


def double_q_residual(
  q_tm1: chex.Array,
  r_t: chex.Array,
  discount_t: chex.Array,
  target_q_t: chex.Array,
  q_t: chex.Array,
  weight: chex.Numeric = 0.5,
) -> chex.Array:
  """Temporal difference and residual error of one critic, mixed (DQRA).

  `w (q - (r + d sg(min fbar')))^2 + (1 - w) (q - (r + d q'))^2`. The first
  term has a target network's value, the second the critic's own, and its
  gradient flows through both sides.

  Args:
    q_tm1: float32 `[B]`, of the recorded actions.
    r_t: float32 `[B]`.
    discount_t: float32 `[B]`, gamma in it, 0 at termination.
    target_q_t: float32 `[B]`, of the target networks, the least of them; no
      gradient flows into it.
    q_t: float32 `[B]`, of the same critic at the next state and the policy's
      action there.
    weight: w, in [0, 1]: 1 is temporal difference alone, 0 the residual.

  Returns:
    float32 `[B]`.

  Source: ATAC (Cheng et al. 2022), section 4.2; official code, `q_eval_mode`.

  >>> q, r, d, target, q_t = (jnp.array([x]) for x in (1.0, 1.0, 0.5, 4.0, 2.0))
  >>> [double_q_residual(q, r, d, target, q_t, w).item() for w in (1.0, 0.0)]
  [4.0, 1.0]
  """
  chex.assert_rank([q_tm1, r_t, discount_t, target_q_t, q_t], 1)
  chex.assert_equal_shape([q_tm1, r_t, discount_t, target_q_t, q_t])
  target = jax.lax.stop_gradient(r_t + discount_t * target_q_t)
  difference = jnp.square(q_tm1 - target)
  residual = jnp.square(q_tm1 - (r_t + discount_t * q_t))
  return weight * difference + (1.0 - weight) * residual


def squared_error(
  q_tm1: chex.Array,
  r_t: chex.Array,
  discount_t: chex.Array,
  v_t: chex.Array,
) -> chex.Array:
  """Squared temporal difference `(q - sg(r + d v))^2` of one critic.

  Args:
    q_tm1: float32 `[B]`, of the recorded actions.
    r_t: float32 `[B]`.
    discount_t: float32 `[B]`, gamma in it, 0 at termination.
    v_t: float32 `[B]`, the next state's value.

  Returns:
    float32 `[B]`.

  Source: SAC (Haarnoja et al. 2018), equation 5.
  """
  target = jax.lax.stop_gradient(r_t + discount_t * v_t)
  return jnp.square(q_tm1 - target)


def expectile(x: chex.Array, tau: chex.Numeric) -> chex.Array:
  """Asymmetric square `|tau - 1(x < 0)| x^2`.

  Args:
    x: float32 `[B]`, target less prediction.
    tau: in (0, 1); above 0.5 what lies above the prediction counts more.

  Returns:
    float32 `[B]`.

  Source: IQL (Kostrikov et al. 2021), equation 5.

  >>> expectile(jnp.array([-2.0, 2.0]), 0.75).tolist()
  [1.0, 3.0]
  """
  chex.assert_rank(x, 1)
  return jnp.where(x < 0, 1.0 - tau, tau) * jnp.square(x)


def negative_cosine(
  prediction: chex.Array, target: chex.Array, epsilon: float = 1e-5
) -> chex.Array:
  """Negative cosine similarity `-<p / |p|, sg(z) / |z|>`.

  Args:
    prediction: float32 `[B, F]`.
    target: float32 `[B, F]`, no gradient flows into it.
    epsilon: the least norm that is divided by.

  Returns:
    float32 `[B]`, in `[-1, 1]`.

  Source: SimSiam (Chen and He 2021), equation 1, as EfficientZero (Ye 2021),
  equation 2, uses it.
  """
  chex.assert_rank([prediction, target], 2)
  chex.assert_equal_shape([prediction, target])
  target = jax.lax.stop_gradient(target)

  def unit(x):
    norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + epsilon**2)
    return x / norm

  return -jnp.sum(unit(prediction) * unit(target), axis=-1)


def lowest(q: chex.Array) -> chex.Array:
  """The smallest of some critics, with a gradient that is always finite.

  The gradient of `jnp.min` looks for the entries that equal the result, and
  is 0 / 0 where a compiler rounds two copies of them differently.

  Args:
    q: float32 `[N, B]`, of N critics.

  Returns:
    float32 `[B]`.
  """
  chex.assert_rank(q, 2)
  return functools.reduce(jnp.minimum, q)


def masked_mean(x: chex.Array, mask: chex.Array) -> chex.Array:
  """Mean over the entries whose mask is 1; 0 where there are none.

  Args:
    x: float32 `[...]`.
    mask: float32 `[...]`, 0 or 1.

  Returns:
    float32 scalar.
  """
  chex.assert_equal_shape([x, mask])
  return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)
