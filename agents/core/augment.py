"""Random shift and intensity of images.

Axes: `N` images, `H, W, C` height, width, channels.
"""

import chex
import jax
import jax.numpy as jnp


def random_shift(
  key: chex.PRNGKey, images: chex.Array, padding: int = 4
) -> chex.Array:
  """Shifts each image by up to `padding` pixels, edges repeated.

  Args:
    key: consumed.
    images: `[N, H, W, C]`, any dtype.
    padding: the largest shift in pixels.

  Returns:
    `[N, H, W, C]`, the same dtype.

  Source: DrQ (Kostrikov 2020), section 3.1, as EfficientZero (Ye 2021),
  Appendix A.1, uses it.
  """
  chex.assert_rank(images, 4)
  num, height, width, channels = images.shape
  pad = (padding, padding)
  padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)), mode='edge')
  offsets = jax.random.randint(key, (num, 2), 0, 2 * padding + 1)

  def crop(image, offset):
    start = (offset[0], offset[1], 0)
    return jax.lax.dynamic_slice(image, start, (height, width, channels))

  return jax.vmap(crop)(padded, offsets)


def random_intensity(
  key: chex.PRNGKey, images: chex.Array, scale: float = 0.05
) -> chex.Array:
  """Multiplies each image by `1 + scale * clip(N(0, 1), -2, 2)`.

  Args:
    key: consumed.
    images: float32 `[N, H, W, C]`.
    scale: standard deviation.

  Returns:
    float32 `[N, H, W, C]`.

  Source: DrQ (Kostrikov 2020), Appendix E.
  """
  chex.assert_rank(images, 4)
  noise = jax.random.normal(key, (images.shape[0], 1, 1, 1))
  factor = 1.0 + scale * jnp.clip(noise, -2.0, 2.0)
  return images * factor.astype(images.dtype)


def observations(key: chex.PRNGKey, observation: chex.Array) -> chex.Array:
  """Shifts and scales every image of a batch of windows, each by its own draw.

  Only images with sides of 32 pixels or more are changed: a board is not
  shifted.

  Args:
    key: consumed.
    observation: `[B, T, ...]`; uint8 images are brought to [0, 1].

  Returns:
    `[B, T, ...]`.

  Source: EfficientZero (Ye 2021), Appendix A.1.
  """
  if observation.ndim != 5 or observation.shape[2] < 32:
    return observation
  images = observation.reshape((-1,) + observation.shape[2:])
  shift_key, intensity_key = jax.random.split(key)
  images = random_shift(shift_key, images)
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 255.0
  images = random_intensity(intensity_key, images)
  return images.reshape(observation.shape)
