"""Measures search, learner, acting and scaling on this machine.

python -m experiments.benchmark --suite=search,learner,acting --out=results.csv
python -m experiments.benchmark --suite=sampled --out=sampled.csv
python -m experiments.benchmark --suite=scale --out=scale.csv
python -m experiments.benchmark --suite=compile --target=h100,v5e:4x4

`sampled` compares search over sampled actions with search over enumerated ones;
`scale` compares many seeds in one program, and updates over several devices,
with the most that the machine can do, and draws a figure next to the CSV;
`compile` reports the memory and time of programs on accelerators that need not
be present (`experiments.benchmarks.compilation`).

Alternatives are measured in turns, A B C A B C ..., in one process, and
summarised by medians. Compile time is excluded. Speeds are given per wall
second and per CPU second of the whole process (all its threads); on a shared
machine trust the latter, which says little on an accelerator.
"""

import pathlib

from experiments import build, presets
from experiments.benchmarks.timing import (
  QUICK,
  Row,
  Sizes,
  machine,
  print_rows,
  write_rows,
)
from experiments.build.programs import PARTS
from experiments.files.errors import UserError
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks

_SUITES = (
  'search',
  'sampled',
  'learner',
  'acting',
  'scale',
  'offline',
  'experts',
  'compile',
)
_PONG = (
  # Sizes that two cores can handle; the network and the search are full-size.
  'env.num_envs=4',
  'run.batch_size=8',
  'agent.reanalyze_chunk=0',
  'run.warmup_decisions=64',
  'run.replay_capacity=2000',
)


def define_flags() -> None:
  """The flags of `python -m experiments.benchmark`."""
  from absl import flags

  flags.DEFINE_list(
    'suite',
    ['search', 'learner', 'acting'],
    f'the suites to measure, some of {", ".join(_SUITES)}',
  )
  flags.DEFINE_alias('what', 'suite')
  flags.DEFINE_string('out', 'benchmark.csv', 'the CSV file')
  flags.DEFINE_integer(
    'repeats', 9, 'number of repeats of each measurement', 1, 10_000
  )
  flags.DEFINE_bool('quick', False, 'use tiny sizes, as a smoke test')
  flags.DEFINE_string(
    'preset',
    None,
    'the preset whose learner and environment are measured; if left out, '
    f'{presets.DEFAULT}, or the usual presets of scale, or all that compile '
    'knows; compile takes several, and also the names search and experts',
  )
  flags.DEFINE_list(
    'target',
    [],
    'with --suite=compile: machines to compile for, such as h100, h100:8, '
    'v5e:4x4, v6e:2x2, v5p:2x2x1, cpu',
  )
  flags.DEFINE_integer(
    'rows',
    0,
    'with --suite=compile: rows of the batch, and environments, on each '
    "device; 0 for the preset's own numbers on one device and 8 on several",
    0,
    1_000_000,
  )
  flags.DEFINE_list(
    'programs',
    [],
    f'with --suite=compile: the programs to compile, some of '
    f'{", ".join(PARTS)}; all if left out',
  )
  flags.DEFINE_string(
    'compilers',
    '.compilers',
    'with --suite=compile: the folder that compilers are installed into',
  )
  flags.DEFINE_list(
    'seeds',
    [],
    'with --suite=scale: numbers of seeds in one program, such as 1,64,1024',
  )
  flags.DEFINE_multi_string(
    'set', [], 'FIELD=VALUE of the preset, repeatable: --set=batch_size=32'
  )


def main() -> None:
  """Measures as the flags say.

  Raises:
    UserError: an unknown suite.
  """
  from absl import flags

  values = flags.FLAGS
  from experiments.benchmarks import agents, experts, figure, offline, searches
  from experiments.benchmarks import scale as scaling

  for suite in values.suite:
    if suite not in _SUITES:
      raise UserError(f'suite={suite}: must be one of {", ".join(_SUITES)}')
  if 'compile' in values.suite:
    _compile(values)
    return
  flag_checks.refuse(
    ['target', 'rows', 'programs', 'compilers'], 'without --suite=compile'
  )
  if 'scale' not in values.suite:
    flag_checks.refuse(['seeds'], 'without --suite=scale')
    if not {'learner', 'acting'} & set(values.suite):
      flag_checks.refuse(['preset', 'set'], 'on these suites')
  configs.check_place('out', values.out)
  sizes = (QUICK if values.quick else Sizes())._replace(repeats=values.repeats)
  with configs.user_errors():
    experiment = build.describe(
      values.preset or presets.DEFAULT, settings=values.set
    )
    if 'scale' in values.suite:
      seeds = _integers('seeds', values.seeds)
      scale = scaling.sizes_here(values.quick, seeds, values.repeats)
      chosen = scaling.cases(values.preset, values.set, scale)
    pong = build.describe('efficientzero_atari', settings=_PONG)
  about = machine()
  terminal.begin(
    f'measuring {", ".join(values.suite)}, {values.repeats} repeats of each',
    compiles=False,
  )
  print(', '.join(f'{name}: {value}' for name, value in about.items()))
  rows: list[Row] = []

  def done(measured: list[Row]) -> None:
    rows.extend(measured)
    print_rows(measured)
    write_rows(values.out, rows, about)

  say = lambda suite: print(f'{suite}: compiling and measuring', flush=True)
  if 'search' in values.suite:
    say('search')
    done(searches.search_rows(sizes))
  if 'sampled' in values.suite:
    say('sampled')
    done(searches.sampled_rows(sizes))
  if 'learner' in values.suite:
    say('learner')
    done(agents.learner_rows(experiment, sizes))
  if 'acting' in values.suite:
    say('acting')
    done(agents.acting_rows(experiment, sizes))
    if not values.quick:
      done(agents.acting_rows(pong, sizes._replace(steps=100, updates=8)))
  if 'scale' in values.suite:
    say('scale')
    for measured in scaling.scale_rows(chosen, scale):
      done(measured)
    picture = pathlib.Path(values.out).with_suffix('.png')
    figure.scale_figure(rows, picture)
    print(f'figure: {picture}')
  if 'offline' in values.suite:
    say('offline')
    least = offline.sizes_here(values.quick, values.repeats)
    for measured in offline.offline_rows(least):
      done(measured)
  if 'experts' in values.suite:
    say('experts')
    few = experts.sizes_here(values.quick, values.repeats)
    for measured in experts.expert_rows(few):
      done(measured)
  terminal.end(
    values.out, 'python -m experiments.benchmark --suite=scale,offline,experts'
  )


def _compile(values) -> None:
  from experiments.benchmarks import compilation

  if len(values.suite) > 1:
    raise UserError(
      'suite=compile: writes a CSV with other columns; run it without other '
      'suites'
    )
  flag_checks.refuse(['seeds', 'set', 'repeats', 'quick'], 'on this suite')
  targets = compilation.read_targets(values.target)
  with configs.user_errors():
    names = values.preset.split(',') if values.preset else ()
    names = compilation.read_names(names)
  for part in values.programs:
    if part not in PARTS:
      raise UserError(f'programs={part}: must be one of {", ".join(PARTS)}')
  configs.check_place('out', values.out)
  configs.check_place('compilers', values.compilers, folder=True)
  terminal.begin(
    f'compiling {", ".join(names) if len(names) < 4 else len(names)} for '
    f'{", ".join(values.target)}; each program takes a few seconds to two '
    'minutes',
    compiles=False,
  )
  compilation.run(
    targets,
    names,
    values.rows,
    values.programs,
    pathlib.Path(values.compilers),
    pathlib.Path(values.out),
  )
  terminal.end(values.out)


def _integers(name: str, texts: list[str]) -> list[int]:
  for text in texts:
    if not text.isdecimal():
      raise UserError(f'{name}={text}: must be integers separated by commas')
  return [int(text) for text in texts]


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
