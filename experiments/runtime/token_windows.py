"""A pure source of windows of a text.

The tokens are part of the source's state: on the device once, whatever is
compiled and however many seeds train on them.

Axes: `N` tokens, `W` windows of the text, `B` of a batch, `L` steps.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import Text
from experiments.files.errors import UserError
from experiments.runtime.persistence import Persistence
from experiments.runtime.sources import Measures, Source, no_feedback

_ROUNDS = 6


class Stream(NamedTuple):
  """State of `from_tokens`.

  Attributes:
    tokens: uint8, uint16 or uint32 `[N]`.
    order: uint32 `[2]`, decides the order of the windows in this epoch.
  """

  tokens: chex.Array
  order: chex.Array


def fingerprint(tokens: np.ndarray) -> str:
  """A checksum of tokens `[N]`."""
  return f'{zlib.crc32(np.ascontiguousarray(tokens).data):08x}'


def num_windows(tokens: np.ndarray, length: int) -> int:
  """W, the windows of tokens `[N]`: each has `length` inputs.

  Its last target is the first input of the next one.
  """
  return max(len(tokens) - 1, 0) // length


def take_windows(tokens: Any, index: Any, length: int) -> Any:
  """Windows `[B, L + 1]` by their number `[B]`, of numpy or JAX."""
  return tokens[index[:, None] * length + np.arange(length + 1)[None]]


def from_tokens(
  tokens: np.ndarray,
  batch_size: int,
  length: int,
  *,
  place: Callable[[Any], Any] = lambda batch: batch,
) -> Source:
  """`Text` windows, each once an epoch, in a new order each time.

  An epoch has `W // B` updates; the few windows that fill no batch are others
  in each epoch. The order is drawn from the key of an epoch's first step, and
  checkpoints keep it, but no tokens. Tokens are unsigned `[N]`; `place` is
  applied to a batch, to divide it over devices.

  Raises:
    ValueError: fewer windows than a batch has.
    UserError: by the source's `load`, if the text is another one.
  """
  windows = num_windows(tokens, length)
  if windows < batch_size:
    raise ValueError(
      f'batch_size={batch_size}: must be at most {windows}, the windows of '
      f'{length} tokens of a text of {len(tokens):,}'
    )
  updates = windows // batch_size

  def next_(state: Stream, agent_state, step, key):
    del agent_state
    at = jnp.asarray(step, jnp.int32) % updates
    fresh = jax.random.key_data(key).reshape(-1)[:2]
    order = jnp.where(at == 0, fresh, state.order)
    number = at * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    index = shuffled(number, windows, order)
    # Gathered before they are widened: the text stays as it is.
    batch = take_windows(state.tokens, index, length).astype(jnp.int32)
    return Stream(state.tokens, order), place(Text(batch)), _none()

  def _none():
    return Measures({}, {})

  def fill(shared):
    return Stream(shared, jnp.zeros((2,), jnp.uint32))

  def init(key):
    del key
    return fill(jnp.asarray(tokens))

  def example():
    raise NotImplementedError('a text cannot be replayed')

  known = functools.cache(lambda: fingerprint(tokens))

  def save(state: Stream, directory, step):
    del directory, step
    return {'order': state.order}, {'text': known()}

  def load(arrays, facts, directory, key):
    del directory, key
    if facts['text'] != known():
      raise UserError(
        f'text: its tokens have the checksum {known()}, but the run was begun '
        f'with {facts["text"]}'
      )
    return Stream(jnp.asarray(tokens), jnp.asarray(arrays['order']))

  def template():
    return {'order': np.zeros(2, np.uint32)}

  return Source(
    init,
    next_,
    no_feedback,
    example,
    is_pure=True,
    kept=Persistence(save, load, template),
    # Axes in the place of arrays.
    axes=Stream(*_AXES),
    fill=fill,
  )


_AXES: Any = (None, 0)


def shuffled(index: chex.Array, number: int, key: chex.Array) -> chex.Array:
  """Where a random permutation of `range(number)` sends some of its members.

  A Feistel network permutes the next power of four, and is applied again to
  what lands outside of the range (Black and Rogaway 2002, "Ciphers with
  arbitrary finite domains", section 3).

  Args:
    index: int32 `[B]`, below `number`.
    number: from 1 to 2^30.
    key: uint32 `[2]`.

  Returns:
    int32 `[B]`.
  """
  bits = max((max(number - 1, 1).bit_length() + 1) // 2, 1)
  mask = np.uint32((1 << bits) - 1)
  first, second = key[0][None], key[1][None]
  keys = [
    _mix(first ^ _mix(second + np.uint32(0x9E3779B9 * i & 0xFFFFFFFF)))
    for i in range(1, _ROUNDS + 1)
  ]

  def once(x):
    left, right = x >> bits, x & mask
    for one in keys:
      left, right = right, left ^ (_mix(right ^ one) & mask)
    return left << bits | right

  def outside(x):
    return x >= np.uint32(number)

  start = once(index.astype(jnp.uint32))
  found = jax.lax.while_loop(
    lambda x: jnp.any(outside(x)),
    lambda x: jnp.where(outside(x), once(x), x),
    start,
  )
  return found.astype(jnp.int32)


def _mix(x):
  """A bijection of uint32; each bit depends on all (Murmur3's finalizer)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def continuation(
  predict: Callable[[chex.Array], chex.Array],
  prompt: np.ndarray,
  count: int,
  *,
  length: int,
  temperature: float,
  key: chex.PRNGKey,
) -> np.ndarray:
  """Draws tokens, int32 `[count]`, each from up to `L` before it.

  Args:
    predict: `(tokens int32 [1, L]) -> logits [1, L, V]`, compiled.
    prompt: integers `[P]`, at least one.
    temperature: logits are divided by it; 0 takes the likeliest token.
  """
  tokens = [int(t) for t in prompt]
  for i in range(count):
    seen = tokens[-length:]
    # Later steps do not reach earlier ones.
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(seen)] = seen
    logits = np.asarray(predict(padded))[0, len(seen) - 1].astype(np.float64)
    if temperature:
      rng = np.random.default_rng(
        np.asarray(jax.random.key_data(jax.random.fold_in(key, i)))
      )
      logits = logits / temperature + rng.gumbel(size=logits.shape)
    tokens.append(int(logits.argmax()))
  return np.asarray(tokens[len(prompt) :], np.int32)
