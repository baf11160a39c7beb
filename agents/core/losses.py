"""Loss terms: functions of arrays, one number a row.

Axes: `B` batch, `A` categories, `F` features.
"""

import chex
import jax
import jax.numpy as jnp


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


def masked_mean(x: chex.Array, mask: chex.Array) -> chex.Array:
  """Mean over the entries whose mask is 1; 0 where there are none.

  Args:
    x: float32, any shape.
    mask: float32, the same shape.

  Returns:
    float32 scalar.
  """
  chex.assert_equal_shape([x, mask])
  return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)
