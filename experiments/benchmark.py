"""Measures search, learner and acting on this machine.

python -m experiments.benchmark --what=search,learner,acting --out=results.csv
python -m experiments.benchmark --what=sampled --out=sampled.csv

`sampled` is the search over sampled actions beside that over enumerated ones.

What is compared is measured in turns, A B C A B C ..., in one process, and
summarised by medians. Compiling is never in. Speeds are given by wall second
and by CPU second of the whole process (all its threads); on a machine that
others use, the latter is the one to trust. On an accelerator it says little.
"""

from experiments import build, presets
from experiments.measure import (
  QUICK,
  Row,
  Sizes,
  machine,
  print_rows,
  write_rows,
)
from experiments.runtime import config as configs
from experiments.runtime.config import UserError

_PONG = (
  # Sizes that two cores can carry; the network and the search are full-size.
  'env.num_envs=4',
  'run.batch_size=8',
  'agent.reanalyze_chunk=0',
  'run.warmup_decisions=64',
  'run.replay_capacity=2000',
)


def define_flags() -> None:
  """The flags of `python -m experiments.benchmark`."""
  from absl import flags

  flags.DEFINE_list('what', ['search', 'learner', 'acting'], 'what to measure')
  flags.DEFINE_string('out', 'benchmark.csv', 'the CSV')
  flags.DEFINE_integer('repeats', 9, 'of every measurement', 1)
  flags.DEFINE_bool('quick', False, 'tiny sizes, to see that it runs')
  flags.DEFINE_string(
    'preset', presets.DEFAULT, 'whose learner and environment'
  )
  flags.DEFINE_multi_string(
    'set', [], 'field=value of the preset, repeatable: --set=batch_size=32'
  )


def main() -> None:
  """Measures as the flags say."""
  from absl import flags

  values = flags.FLAGS
  from experiments import benchmark_agent, benchmark_search

  known = ('search', 'sampled', 'learner', 'acting')
  for what in values.what:
    if what not in known:
      raise UserError(f'what={what}: must be of {", ".join(known)}')
  sizes = (QUICK if values.quick else Sizes())._replace(repeats=values.repeats)
  with configs.user_errors():
    experiment = build.describe(values.preset, settings=values.set)
    pong = build.describe('efficientzero_atari', settings=_PONG)
  about = machine()
  print(', '.join(f'{name}: {value}' for name, value in about.items()))
  rows: list[Row] = []

  def done(measured: list[Row]) -> None:
    rows.extend(measured)
    print_rows(measured)
    write_rows(values.out, rows, about)

  if 'search' in values.what:
    done(benchmark_search.search_rows(sizes))
  if 'sampled' in values.what:
    done(benchmark_search.sampled_rows(sizes))
  if 'learner' in values.what:
    done(benchmark_agent.learner_rows(experiment, sizes))
  if 'acting' in values.what:
    done(benchmark_agent.acting_rows(experiment, sizes))
    if not values.quick:
      done(
        benchmark_agent.acting_rows(pong, sizes._replace(steps=100, updates=8))
      )
  print(f'results: {values.out}')


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
