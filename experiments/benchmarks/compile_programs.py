"""Searches and experts that `--suite=compile` compiles."""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from experiments.benchmarks import experts, searches
from experiments.benchmarks.cases import Case
from experiments.build import programs
from experiments.runtime import mesh as meshes
from networks import actions, dispatch
from search import policies, sampled

RULES = ('puct', 'efficientzero', 'gumbel', 'sampled', 'value prefix')
BACKENDS = ('auto', 'loop', 'capacity', 'ragged')
EXPERTS = (8, 32, 128)
# Of experts that are divided: so many in all, and so many of each device.
IN_ALL, OF_EACH = 256, 4


def of_search(
  rule: str,
  mesh: Any,
  rows: int,
  simulations: int = 50,
  engine: str = 'auto',
  evaluate: bool = False,
) -> programs.Program:
  """A search over a table model, its trees split over the devices.

  Args:
    rule: of `RULES`; `value prefix` is EfficientZero's over a model that
      predicts sums of rewards.
    mesh: with the axis `data`.
    rows: trees on each device; 0 for 64 on one, `ROWS` on more.
    simulations: for each root.
    engine: of `search.engine.ENGINES`.
    evaluate: without noise at the root, whose gamma variates are drawn in
      loops of unknown length.
  """
  rows = (rows or (64 if mesh.size == 1 else programs.ROWS)) * mesh.size
  key = jax.eval_shape(lambda: jax.random.key(0))
  params, root, step = searches.table_model(0, rows, 6, 64)
  policy = policies.efficientzero
  if rule == 'value prefix':
    root, step = searches.with_prefix(root, step)
  elif rule == 'sampled':
    distribution = actions.flat(6)
    policy = functools.partial(
      sampled.search, distribution=distribution, num_samples=4
    )
  else:
    policy = getattr(policies, rule)
  # Arrays would be on this machine, not on the one that is compiled for.
  params, root = jax.eval_shape(lambda: (params, root))

  def search(params, key, root):
    own = {'engine': engine, 'evaluate': evaluate}
    return policy(params, key, root, step, simulations, **own)

  whole, split = meshes.replicated(mesh), meshes.split(mesh)
  if mesh.size > 1:
    search = meshes.by_rows(search, mesh, (2,))

  def trace():
    # Kernels ask what they are made for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return jax.jit(
        search, in_shardings=(whole, whole, split), out_shardings=split
      ).trace(params, key, root)

  about = f'roots={rows} actions=6'
  if engine != 'auto':
    about += f' engine={engine}'
  return programs.Program(
    'search',
    rule,
    f'{simulations} simulations',
    f'{about} evaluate' if evaluate else about,
    trace,
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


def of_divided(
  mesh: Any, rows: int, folder: pathlib.Path
) -> Iterator[programs.Program]:
  """What it takes to divide experts over a mesh of several devices.

  Forward and backward of the layer alone, its routing given, and an update of
  a small language model; each with as many experts on any mesh, and with as
  many of each device. The update has the backend that `auto` takes on a TPU:
  here it would ask this machine.

  Args:
    mesh: with the axis `data`.
    rows: of the language model's batch on each device; 0 for the usual ones.
    folder: for the language model's text.
  """
  for number in sorted({IN_ALL, OF_EACH * mesh.size}):
    for backend in ('loop', 'ragged'):
      yield _layer(backend, number, mesh)
    settings = (
      f'network.moe.num_experts={number}',
      'network.moe.backend=ragged',
      'experts=divided',
    )
    for program in programs.of_preset(
      'moe_language_small', mesh, rows, folder, settings
    ):
      if program.part == 'update':
        yield program._replace(
          what='divided', setting=f'{program.setting} experts={number}'
        )


def _layer(backend, number, mesh):
  case = Case(tokens=2048 * mesh.size, features=512, hidden=2048)
  inputs = jax.eval_shape(lambda: experts.inputs(number, case))
  divided = meshes.split(mesh)

  def gradient(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return experts.gradient(backend, meshes.AXIS)(*args)

  return programs.Program(
    'divided',
    backend,
    'layer',
    f'tokens={case.tokens} {case.features}x{case.hidden} k={case.k} '
    f'experts={number}',
    lambda: jax.jit(
      gradient, in_shardings=divided, out_shardings=divided
    ).trace(*inputs),
  )
