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
