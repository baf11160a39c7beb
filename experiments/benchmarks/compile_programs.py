"""Searches and experts that `--suite=compile` compiles."""

from typing import Any

import jax

from experiments.benchmarks import experts, searches
from experiments.benchmarks.cases import Case
from experiments.build import programs
from experiments.runtime import mesh as meshes
from networks import actions, dispatch
from search import policies, sampled

RULES = ('puct', 'efficientzero', 'gumbel', 'sampled')
BACKENDS = ('auto', 'loop', 'capacity', 'ragged')
EXPERTS = (8, 32, 128)


def of_search(
  rule: str, mesh: Any, rows: int, simulations: int = 50
) -> programs.Program:
  """A search over a table model, its trees split over the devices.

  Args:
    rule: of `RULES`.
    mesh: with the axis `data`.
    rows: trees on each device; 0 for 64 on one, `ROWS` on more.
  """
  rows = (rows or (64 if mesh.size == 1 else programs.ROWS)) * mesh.size
  key = jax.eval_shape(lambda: jax.random.key(0))
  params, root, step = searches.table_model(0, rows, 6, 64)
  # Arrays would be on this machine, not on the one that is compiled for.
  params, root = jax.eval_shape(lambda: (params, root))
  if rule == 'sampled':
    distribution = actions.flat(6)

    def search(params, key, root):
      return sampled.search(
        params,
        key,
        root,
        step,
        simulations,
        distribution=distribution,
        num_samples=4,
      )

  else:
    search = lambda params, key, root: getattr(policies, rule)(
      params, key, root, step, simulations
    )
  whole, split = meshes.replicated(mesh), meshes.split(mesh)
  if mesh.size > 1:
    search = meshes.by_rows(search, mesh, (2,))
  return programs.Program(
    'search',
    rule,
    f'{simulations} simulations',
    f'roots={rows} actions=6',
    lambda: jax.jit(
      search, in_shardings=(whole, whole, split), out_shardings=split
    ).trace(params, key, root),
  )


def of_experts(backend: str, number: int, mesh: Any) -> programs.Program:
  """Forward and backward of a mixture's experts on the mesh's first device.

  `backend` is one of `BACKENDS`; `number` counts the experts.
  """
  case = Case(tokens=16_384, features=512, hidden=2048)
  devices = mesh.devices.flatten()[:1]
  one, taken, note = meshes.make_mesh(devices), backend, ''
  if backend == 'auto':
    grouped = dispatch.Expert(lambda p, x: x, lambda p, x, sizes: x)
    taken = dispatch.exact_backend(grouped, devices[0])
    note = f' takes={taken}'
  inputs = jax.eval_shape(lambda: experts.inputs(number, case))
  whole = meshes.replicated(one)
  return programs.Program(
    'experts',
    backend,
    f'{number} experts',
    f'tokens={case.tokens} {case.features}x{case.hidden} k={case.k}{note}',
    lambda: jax.jit(
      experts.gradient(taken), in_shardings=whole, out_shardings=whole
    ).trace(*inputs),
  )
