"""Random keys of the host's loop, derived where they are used.

Outside a compiled program each split or fold of a key is several calls of the
device, and to read a random number is to wait for all that the device has been
given before. A `Derived` key is a recipe instead: a program takes it as an
argument and derives the key within (`typed`), and what the host itself must
know is drawn for many steps at once (`Ahead`). The numbers are those of the
key that `jax.random` derives.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('base', 'numbers'),
  meta_fields=('path',),
)
@dataclasses.dataclass(frozen=True)
class Derived:
  """How a key follows from another one; a pytree.

  Attributes:
    base: a typed key.
    numbers: integers that are folded in, in order.
    path: what is done, in order: `'fold'`, or 0 or 1 for a half of a split.
  """

  base: chex.PRNGKey
  numbers: tuple[Any, ...] = ()
  path: tuple[Any, ...] = ()


Key = chex.PRNGKey | Derived


def split(key: Any) -> tuple[Any, Any]:
  """`jax.random.split(key)`, as two keys of the kind that was given."""
  if not isinstance(key, Derived):
    first, second = jax.random.split(key)
    return first, second
  one = lambda half: dataclasses.replace(key, path=(*key.path, half))
  return one(0), one(1)


def fold_in(key: Any, number: Any) -> Any:
  """`jax.random.fold_in(key, number)`, of the kind that was given."""
  if not isinstance(key, Derived):
    return jax.random.fold_in(key, number)
  return dataclasses.replace(
    key, numbers=(*key.numbers, number), path=(*key.path, 'fold')
  )


def typed(key: Any) -> chex.PRNGKey:
  """The key itself; in a compiled program, which then derives it."""
  if not isinstance(key, Derived):
    return key
  numbers, found = iter(key.numbers), key.base
  for done in key.path:
    if done == 'fold':
      found = jax.random.fold_in(found, next(numbers))
    else:
      found = jax.random.split(found)[done]
  return found


def derived(function: Callable) -> Callable:
  """A function whose last argument, a key, may be a `Derived` one.

  It is to be compiled.
  """

  @functools.wraps(function)
  def taken(*args):
    *others, key = args
    return function(*others, typed(key))

  return taken


class Ahead:
  """A function of a step's key, computed for many steps in one call.

  Attributes:
    function: `(typed key) -> array`, to be read on the host.
    steps: how many.
  """

  def __init__(self, function: Callable[[Any], Any], steps: int = 64):
    def some(key: Derived):
      first, *others = key.numbers
      one = lambda n: function(
        typed(dataclasses.replace(key, numbers=(n, *others)))
      )
      return jax.vmap(one)(first + jnp.arange(steps, dtype=jnp.int32))

    self.function, self.steps = function, steps
    self._some = jax.jit(some)
    self._known: tuple[Derived, np.ndarray] | None = None

  def __call__(self, key: Any) -> np.ndarray:
    """The array for a key; a `Derived` one has the step folded in first."""
    if not isinstance(key, Derived):
      return np.asarray(self.function(key))
    if self._known is not None:
      known, table = self._known
      row = key.numbers[0] - known.numbers[0]
      same = (
        key.base is known.base
        and key.path == known.path
        and key.numbers[1:] == known.numbers[1:]
      )
      if same and 0 <= row < self.steps:
        return table[row]
    table = np.asarray(self._some(key))
    self._known = key, table
    return table[0]
