"""An agent's update as the host's loop calls it: once a step, read seldom."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from agents.core.types import Agent
from experiments.runtime import keys


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('array',),
  meta_fields=('names',),
)
@dataclasses.dataclass(frozen=True)
class Packed(Mapping[str, Any]):
  """An update's metrics as one array, which is read in one piece.

  To look one up before they are read is a call of the device.

  Attributes:
    array: float32 `[M]`.
    names: of the M metrics.
  """

  array: chex.Array
  names: tuple[str, ...]

  def __getitem__(self, name: str) -> Any:
    return self.array[self.names.index(name)]

  def __iter__(self) -> Iterator[str]:
    return iter(self.names)

  def __len__(self) -> int:
    return len(self.names)


def packed(update: Callable) -> Callable:
  """An `agent.update` whose metrics are `Packed`, to be compiled."""

  @functools.wraps(update)
  def compact(state, batch, key):
    state, info = update(state, batch, key)
    names = tuple(sorted(info.metrics))
    if names:
      rows = [jnp.asarray(info.metrics[n], jnp.float32) for n in names]
      info = info._replace(metrics=Packed(jnp.stack(rows), names))
    return state, info

  return compact


def compiled(agent: Agent) -> Callable:
  """`agent.update` compiled for sources on the host, its state donated.

  Its metrics are `Packed`, and its key may be a `keys.Derived`.
  """
  return jax.jit(keys.derived(packed(agent.update)), donate_argnums=0)


def read(
  measured: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> list[dict[str, Any]]:
  """Numbers of some updates, read together.

  Args:
    measured: of each update its metrics and the source's gauges.

  Returns:
    Both of each update as one dict.
  """
  # A packed one is sliced on the host.
  return [{**m, **gauges} for m, gauges in jax.device_get(list(measured))]
