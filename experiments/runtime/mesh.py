"""Learner steps over several devices.

No agent contains a collective: a batch is split over the mesh's `data` axis,
the state is replicated, and the compiler inserts the sums, so that one device
and several give the same numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from agents.core.types import Agent


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh with one axis, `data`, over all or given devices."""
  devices = list(devices or jax.devices())
  # The default axis type has changed between releases of jax.
  return jax.make_mesh(
    (len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices
  )


def compile_update(agent: Agent, mesh: Mesh) -> Callable:
  """`agent.update` compiled over a mesh, its state donated.

  Args:
    agent: the agent.
    mesh: from `make_mesh`.

  Returns:
    `(state, batch, key) -> (state, info)`; leaves of the batch are split
    along their first axis, which the number of devices must divide.

  Raises:
    ValueError: by the returned function, if it does not divide.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec('data'))
  compiled = jax.jit(
    agent.update,
    donate_argnums=0,
    in_shardings=(replicated, split, replicated),
    out_shardings=replicated,
  )

  def update(state, batch, key):
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % mesh.size:
      raise ValueError(
        f'batch_size={size}: must be a multiple of the {mesh.size} devices'
      )
    # What a program over the mesh has made (reanalysis) lies elsewhere, and
    # jit would refuse to move it.
    return compiled(state, jax.device_put(batch, split), key)

  return update
