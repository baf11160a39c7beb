r"""What programs take on machines that are not here, by their real compilers.

    python -m experiments.benchmark --suite=compile --target=h100,v5e:4x4
    python -m experiments.benchmark --suite=compile --target=v5e:4x4 \
      --preset=efficientzero_catch --rows=8

Compiles init, act, update, refresh and the scanned interval of presets, every
search and every backend of the mixture, in a process for each target, and
writes a line for each program: memory, operations and bytes a device, loops,
kernels, calls of the host, collectives, seconds of compiling. Nothing is run.
"""

import functools
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from experiments import presets
from experiments.benchmarks import compile_programs, counting
from experiments.build import programs
from experiments.files import tables
from experiments.files.errors import UserError
from experiments.report import terminal
from experiments.runtime import compile_targets, compiled
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks

# What a row is of, and what was counted; bytes and operations of one device.
KEY = ('target', 'jax', 'what', 'name', 'part', 'setting')
COUNTED = (
  'devices',
  'temporaries',
  'arguments',
  'results',
  'code',
  'flops',
  'bytes',
  'flops_traced',
  'loops',
  'loops_known',
  'kernels',
  'kernels_in_loops',
  'host',
  'float64',
  *(name.replace('-', '_') for name in compiled.COLLECTIVES),
  'collectives_in_loops',
  'reduced',
  'exchanged',
  'seconds',
  'error',
)


def read_targets(names: Sequence[str]) -> list[compile_targets.Target]:
  """The machines of a flag.

  Raises:
    UserError: one of them is unknown, or there is none.
  """
  if not names:
    raise UserError('target=: name at least one, such as h100 or v5e:4x4')
  return [compile_targets.parse(name) for name in names]


def launch(values: Any) -> None:
  """Compiles as the flags of `experiments.benchmark` say.

  Raises:
    UserError: a flag is wrong, or a compiler cannot be installed.
  """
  if len(values.suite) > 1:
    raise UserError(
      'suite=compile: writes a CSV with other columns; run it without other '
      'suites'
    )
  flag_checks.refuse(['seeds', 'set', 'repeats', 'quick'], 'on this suite')
  targets = read_targets(values.target)
  with configs.user_errors():
    names = read_names(values.preset.split(',') if values.preset else ())
  for part in values.programs:
    if part not in programs.PARTS:
      raise UserError(
        f'programs={part}: must be one of {", ".join(programs.PARTS)}'
      )
  configs.check_place('out', values.out)
  configs.check_place('compilers', values.compilers, folder=True)
  terminal.begin(
    f'compiling {", ".join(names) if len(names) < 4 else len(names)} for '
    f'{", ".join(values.target)}; each program takes a few seconds to two '
    'minutes',
    compiles=False,
  )
  folders = pathlib.Path(values.compilers), pathlib.Path(values.out)
  run(targets, names, values.rows, values.programs, *folders)
  terminal.end(values.out)


def read_names(names: Sequence[str]) -> list[str]:
  """Presets, `search`, `experts`, `divided`; all of them if none is named.

  Raises:
    UserError: one of them is unknown.
  """
  others = ('search', 'experts', 'divided')
  if not names:
    return [*presets.PRESETS, *others]
  for name in names:
    if name not in others:
      presets.find(name)
  return list(names)


def run(
  targets: Sequence[compile_targets.Target],
  names: Sequence[str],
  rows: int,
  parts: Sequence[str],
  compilers: pathlib.Path,
  out: pathlib.Path,
) -> list[dict[str, Any]]:
  """Compiles everything not yet in the CSV, and adds a row per program.

  Returns the CSV's rows.

  Args:
    names: presets, and `search`, `experts` and `divided`.
    rows: batch size and environments per device; 0 for the usual ones.
    parts: of `programs.PARTS`; () for all.
    compilers: folder for the compilers' wheels.

  Raises:
    UserError: a compiler cannot be installed, or ends without a message.
  """
  found: list[dict[str, Any]] = list(tables.read_rows(out, (*KEY, *COUNTED)))
  for target in targets:
    with tempfile.TemporaryDirectory() as folder:
      asked = {
        'target': target.name,
        'names': list(names),
        'rows': rows,
        'parts': list(parts),
        'folder': folder,
        'done': [[row[key] for key in KEY] for row in found],
      }
      module = 'experiments.benchmarks.compilation'
      for row in compile_targets.ask(module, target, compilers, asked):
        found.append(row)
        print(line(row), flush=True)
        _write(out, found)
  return found


def line(row: dict[str, Any]) -> str:
  """A row as a sentence."""
  begin = f'{row["target"]:>9}  {row["name"]} {row["part"]} {row["setting"]}'
  if row['error']:
    return f'{begin}: {row["error"]}'
  memory = sum(
    int(row[name]) for name in ('temporaries', 'arguments', 'results', 'code')
  )
  unknown = int(row['loops']) - int(row['loops_known'])
  collectives = ', '.join(
    f'{row[name.replace("-", "_")]} {name}'
    for name in compiled.COLLECTIVES
    if int(row[name.replace('-', '_')])
  )
  return (
    f'{begin}: {memory / 2**20:,.0f} MiB, {float(row["flops"]) / 1e9:.4g} '
    f'GFLOP, {float(row["bytes"]) / 1e6:,.0f} MB, {row["loops"]} loops '
    f'({unknown} of unknown length), {row["kernels"]} kernels, '
    f'{collectives or "no collective"}, {float(row["seconds"]):.0f} s'
  )


def _write(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  fields = (*KEY, *COUNTED)
  tables.write_lines(
    path, [fields, *([row[field] for field in fields] for row in rows)]
  )


# What follows runs in a target's own process.


def compile_all(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Compiles what is asked for and is not there yet."""
  import jax

  from experiments.runtime import mesh as meshes

  target = compile_targets.parse(asked['target'])
  mesh = meshes.make_mesh(compile_targets.devices(target))
  done = {tuple(key) for key in asked['done']}
  for name in asked['names']:
    try:
      for program in _programs(name, asked, mesh):
        key = (target.name, jax.__version__, *program[:4])
        part = program.part.partition(' ')[0]
        wanted = not asked['parts'] or part in asked['parts']
        if key not in done and (wanted or program.what != 'agent'):
          yield dict(zip(KEY, key)) | compile_program(program, target)
    except ValueError as error:
      key = (target.name, jax.__version__, 'agent', name, '', '')
      yield dict(zip(KEY, key)) | _failed(target, error)


def _programs(name, asked, mesh) -> Iterator[programs.Program]:
  folder = pathlib.Path(asked['folder'])
  if name == 'search':
    for rule in compile_programs.RULES:
      of_rule = functools.partial(
        compile_programs.of_search, rule, mesh, asked['rows']
      )
      yield of_rule()
      if asked['target'] == 'h100':
        yield of_rule(engine='kernels')
        for engine in ('loops', 'kernels'):
          yield of_rule(engine=engine, evaluate=True)
  elif name == 'experts':
    for number in compile_programs.EXPERTS:
      for backend in compile_programs.BACKENDS:
        yield compile_programs.of_experts(backend, number, mesh)
  elif name == 'divided':
    if mesh.size > 1:
      yield from compile_programs.of_divided(mesh, asked['rows'], folder)
  else:
    yield from programs.of_preset(name, mesh, asked['rows'], folder)


def _failed(target, error: Exception, seconds: float = 0.0) -> dict[str, Any]:
  text = ' '.join(str(error).split())[:300] or type(error).__name__
  return dict.fromkeys(COUNTED, 0) | {
    'devices': target.devices,
    'seconds': round(seconds, 1),
    'error': text,
  }


def compile_program(
  program: programs.Program, target: compile_targets.Target
) -> dict[str, Any]:
  """What a program takes on a target, by the names of `COUNTED`.

  If its compiler refuses, `error` is the message.
  """
  start = time.perf_counter()
  try:
    traced = program.trace()
    ready = traced.lower().compile()
  except Exception as error:
    return _failed(target, error, time.perf_counter() - start)
  counts = compiled.count(ready)
  error = ''
  if 0 < target.memory < counts.memory:
    error = (
      f'needs {counts.memory / 2**30:.1f} GiB, a device has '
      f'{target.memory / 2**30:.1f}'
    )
  try:
    flops = counting.matmul_flops(traced.jaxpr) / target.devices
  except ValueError:  # A loop of unknown length.
    flops = math.nan
  own = {n: v for n, v in counts._asdict().items() if n in COUNTED}
  kinds = {n.replace('-', '_'): v for n, v in counts.collectives.items()}
  return (
    dict.fromkeys(COUNTED, 0)
    | own
    | kinds
    | {
      'devices': target.devices,
      'flops_traced': flops,
      'seconds': round(time.perf_counter() - start, 1),
      'error': error,
    }
  )


def _main() -> None:
  for row in compile_all(json.load(sys.stdin)):
    print(json.dumps(row), flush=True)


if __name__ == '__main__':
  _main()
