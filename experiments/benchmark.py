"""Measures search, learner, acting and scaling on this machine.

python -m experiments.benchmark --suite=search,learner,acting --out=results.csv
python -m experiments.benchmark --suite=sampled --out=sampled.csv
python -m experiments.benchmark --suite=scale --out=scale.csv
python -m experiments.benchmark --suite=compile --target=h100,v5e:4x4
python -m experiments.benchmark --suite=accelerator --out=card.csv

`sampled` compares search over sampled actions with search over enumerated ones;
`frames` measures what the host does for an update of Atari's images;
`scale` compares many seeds in one program, and updates over several devices,
with the most that the machine can do, and draws a figure next to the CSV;
`compile` reports the memory and time of programs on accelerators that need not
be present (`experiments.benchmarks.compilation`);
`accelerator` is a first look at a card, in minutes and with the most important
figures first (`experiments.benchmarks.accelerator`).

Alternatives are measured in turns, A B C A B C ..., in one process, and
summarised by medians. Compile time is excluded. Speeds are given per wall
second and per CPU second of the whole process (all its threads); on a shared
machine trust the latter, which says little on an accelerator.
"""

import pathlib

from experiments import build, presets
from experiments.benchmarks import cases, timing
from experiments.build.programs import PARTS
from experiments.files.errors import UserError
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks

# In the order in which they are measured.
_SUITES = (
  'search',
  'sampled',
  'learner',
  'acting',
  'frames',
  'scale',
  'offline',
  'experts',
  'compile',
  'accelerator',
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
    'the preset whose learner and environment are measured; '
    f'{presets.DEFAULT} if left out, but with --suite=scale its own presets '
    'and with --suite=compile all that it knows; --suite=compile also takes a '
    'list, which may contain search and experts',
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
  for suite in values.suite:
    if suite not in _SUITES:
      raise UserError(f'suite={suite}: must be one of {", ".join(_SUITES)}')

  if 'accelerator' in values.suite:
    # Without jax: a card's memory is its process's.
    from experiments.benchmarks import accelerator

    accelerator.launch(values)
    return

  from experiments.benchmarks import (
    agents,
    compilation,
    experts,
    figure,
    frames,
    offline,
    scale,
    searches,
  )

  if 'compile' in values.suite:
    compilation.launch(values)
    return
  flag_checks.refuse(
    ['target', 'rows', 'programs', 'compilers'], 'without --suite=compile'
  )
  if 'scale' not in values.suite:
    flag_checks.refuse(['seeds'], 'without --suite=scale')
    if not {'learner', 'acting'} & set(values.suite):
      flag_checks.refuse(['preset', 'set'], 'on these suites')
  configs.check_place('out', values.out)
  find = lambda suite, seeds=(): cases.find(
    suite, values.quick, values.repeats, seeds
  )
  with configs.user_errors():
    case = find('agent')
    experiment = build.describe(
      values.preset or presets.DEFAULT, settings=values.set
    )
    if 'scale' in values.suite:
      larger = find('scale', _integers('seeds', values.seeds))
      subjects = scale.subjects(values.preset, values.set, larger)

  measure = {
    'search': lambda: [searches.search_rows(case)],
    'sampled': lambda: [searches.sampled_rows(case)],
    'learner': lambda: [agents.learner_rows(experiment, case)],
    'acting': lambda: agents.acting_suite(experiment, case, values.quick),
    'frames': lambda: frames.frames_rows(find('frames')),
    'scale': lambda: scale.scale_rows(subjects, larger),
    'offline': lambda: timing.on_one_core(offline.rows_here, find('offline')),
    'experts': lambda: timing.on_one_core(experts.rows_here, find('experts')),
  }
  about = timing.machine()
  terminal.begin(
    f'measuring {", ".join(values.suite)}, {values.repeats} repeats of each',
    compiles=False,
  )
  print(', '.join(f'{name}: {value}' for name, value in about.items()))
  rows: list[timing.Measurement] = []
  for suite in measure:
    if suite not in values.suite:
      continue
    print(f'{suite}: compiling and measuring', flush=True)
    for measured in measure[suite]():
      rows += measured
      timing.print_rows(measured)
      timing.write_rows(values.out, rows, about)
    if suite == 'scale':
      picture = pathlib.Path(values.out).with_suffix('.png')
      figure.scale_figure(rows, picture)
      print(f'figure: {picture}')
  terminal.end(
    values.out, 'python -m experiments.benchmark --suite=scale,offline,experts'
  )


def _integers(name: str, texts: list[str]) -> list[int]:
  for text in texts:
    if not text.isdecimal():
      raise UserError(f'{name}={text}: must be integers separated by commas')
  return [int(text) for text in texts]


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
