"""The peak rates of a machine, and how near programs come to them.

The roofline (Williams 2009): a program of I operations for each byte that it
moves reaches at most min(peak, I * bandwidth) operations per second. Both are
measured in the run that measures the program.
"""

import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import counting
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import Measurement, interleaved, speed_row


class Roof(NamedTuple):
  """The peak rates, by wall second and by CPU second.

  Attributes:
    flops: float64 `[2]`, float32 operations of a large matrix product, at the
      default precision (TF32 on some GPUs).
    bandwidth: float64 `[2]`, bytes that a large triad reads and writes.
  """

  flops: np.ndarray
  bandwidth: np.ndarray


class Work(NamedTuple):
  """What a program does.

  Attributes:
    flops: operations of its matrix products and convolutions, see
      `counting.matmul_flops`.
    bytes: that these read and write and that gathers, scatters and slices move,
      if nothing stayed in a cache and everything else were fused.
  """

  flops: float
  bytes: float


def work(jaxpr: Any, turns: float = 1.0) -> Work:
  """Counts a jaxpr's work, loops as often as they turn.

  `turns` are the mean turns of loops of unknown length that hold matrix
  products; others (the walk down a tree) count once. Of branches the most
  expensive counts.
  """
  flops, moved = 0.0, 0.0
  for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    name, params = equation.primitive.name, equation.params
    moved += _moved(name, equation)
    if name in ('dot_general', 'conv_general_dilated'):
      flops += counting.product_flops(equation)
      continue
    inner = [
      work(j, turns)
      for value in params.values()
      for j in counting.jaxprs(value)
    ]
    if name == 'cond':
      inner = [max(inner, default=Work(0.0, 0.0))]
    times = params['length'] if name == 'scan' else 1
    if name == 'while' and any(one.flops for one in inner):
      times = turns
    flops += times * sum(one.flops for one in inner)
    moved += times * sum(one.bytes for one in inner)
  return Work(flops, moved)


def _moved(name: str, equation: Any) -> int:
  size = lambda v: math.prod(v.aval.shape) * v.aval.dtype.itemsize
  if name in ('dot_general', 'conv_general_dilated'):
    return sum(map(size, (*equation.invars, *equation.outvars)))
  if name in ('gather', 'dynamic_slice'):
    return 2 * size(equation.outvars[0])
  if name == 'dynamic_update_slice':
    return 2 * size(equation.invars[1])
  if name.startswith('scatter'):
    return 3 * size(equation.invars[2])
  return 0


def measure_roof(case: Case) -> tuple[Roof, list[Measurement]]:
  """Measures the machine's limits by large matrix products and a large triad.

  On accelerators the products are also measured in bfloat16.
  """
  size, length = case.matrix, case.triad
  kinds = ['float32'] + ['bfloat16'] * (jax.default_backend() != 'cpu')
  product = jax.jit(jnp.matmul)
  triad = jax.jit(lambda x, y: x + 3.0 * y)
  tasks, names = {}, {}
  for kind in kinds:
    matrix = jnp.ones((size, size), kind)
    tasks[kind] = lambda m=matrix: product(m, m).block_until_ready()
    names[kind] = f'matrix product of {size} x {size}'
  x = jnp.ones(length)
  y, moved = x + 1, 3 * 4 * length
  tasks['triad'] = lambda: triad(x, y).block_until_ready()
  timings = interleaved(tasks, case.repeats, case.least_seconds)
  giga = 2 * size**3 / 1e9
  rows = [
    speed_row('roofline', names[kind], kind, 'GFLOP/s', giga, timings[kind])
    for kind in kinds
  ]
  rows.append(
    speed_row(
      'roofline',
      f'triad of {moved / 1e6:.3g} MB',
      'float32',
      'GB/s',
      moved / 1e9,
      timings['triad'],
      note='two arrays read, one written',
    )
  )
  rates = [np.array([row.median, row.per_cpu_second]) * 1e9 for row in rows]
  return Roof(rates[0], rates[-1]), rows


def roof_rows(
  name: str, setting: str, does: Work, speed: Measurement, roof: Roof
) -> list[Measurement]:
  """The rates of a program, which `does` some work each update.

  They are GFLOP/s, as a share of what is attainable at its operations a byte,
  and GB/s, as a share of the bandwidth; shares by wall and by CPU second.
  """
  intensity = does.flops / does.bytes
  attainable = np.minimum(roof.flops, intensity * roof.bandwidth)
  rows = []
  for unit, amount, top, note in (
    (
      'GFLOP/s',
      does.flops,
      attainable,
      f'{intensity:.3g} FLOP a byte; ratio to the roof there, '
      f'{attainable[0] / 1e9:.3g} GFLOP/s; '
      f'{speed.median * does.flops / roof.flops[0]:.2g} of the peak',
    ),
    (
      'GB/s',
      does.bytes,
      roof.bandwidth,
      'ratio to the triad; counted: operands and results of products, what '
      'gathers, scatters and slices move, as if nothing stayed in a cache',
    ),
  ):
    giga = amount / 1e9
    rates = np.array([speed.median, speed.per_cpu_second]) * amount
    by_wall, by_cpu = map(float, rates / top)
    rows.append(
      speed._replace(
        what='roofline',
        name=name,
        setting=setting,
        unit=unit,
        median=speed.median * giga,
        low=speed.low * giga,
        high=speed.high * giga,
        per_cpu_second=speed.per_cpu_second * giga,
        ratio=by_wall,
        ratio_cpu=by_cpu,
        note=note,
      )
    )
  return rows


def free_bytes() -> float:
  """Memory that a program may take, of the accelerator or of this machine."""
  stats = _accelerator_stats(jax.devices()[0])
  if stats:
    return stats['bytes_limit'] - stats['bytes_in_use']
  try:
    return float(os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
  except (ValueError, OSError):  # Some systems do not say.
    return math.inf


def memory_in_use(forget: bool = False) -> tuple[float, float]:
  """Bytes in use now and at most, of the accelerator or of this process.

  NaN where the system does not say. `forget` resets the maximum, but not on
  accelerators, so let programs that need more come later.
  """
  stats = _accelerator_stats(jax.devices()[0])
  if stats:
    return stats['bytes_in_use'], stats['peak_bytes_in_use']
  if jax.default_backend() != 'cpu':
    return math.nan, math.nan
  try:
    if forget:
      pathlib.Path('/proc/self/clear_refs').write_text('5', encoding='utf-8')
    status = pathlib.Path('/proc/self/status').read_text(encoding='utf-8')
  except OSError:  # not Linux, or not allowed
    return math.nan, math.nan
  found = dict(re.findall(r'^(VmRSS|VmHWM):\s*(\d+) kB$', status, re.MULTILINE))
  return 1024.0 * int(found['VmRSS']), 1024.0 * int(found['VmHWM'])


def _accelerator_stats(device: Any) -> dict[str, int]:
  stats = {} if device.platform == 'cpu' else device.memory_stats() or {}
  needed = ('bytes_limit', 'bytes_in_use', 'peak_bytes_in_use')
  return stats if all(name in stats for name in needed) else {}
