"""What `--suite=accelerator` measures, in the order of importance.

`python -m experiments.benchmarks.accelerator_groups JSON` measures here and
prints a JSON object a line: the device, then each group as it begins, and its
rows. `experiments.benchmarks.accelerator` listens and keeps the time.
"""

import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import build
from experiments.benchmarks import (
  agents,
  cases,
  experts,
  offline,
  roofline,
  scale,
  searches,
  timing,
)
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import Measurement

# Of a whole run, in seconds, before `Case.patience`: under eight minutes.
SECONDS = 460
_FAST = 'efficientzero_atari_fast'
# Presets with changes: as a card wants it; with a search that takes a third of
# the model's steps; by kernels; and as the paper has it.
LEARNERS = {
  'as a card wants it': (_FAST,),
  'Gumbel of 16 simulations': (_FAST, 'rule=gumbel', 'num_simulations=16'),
  'kernels': (_FAST, 'engine=kernels'),
  'as in the paper': ('efficientzero_atari',),
}


class Group(NamedTuple):
  """Rows that are measured together.

  Attributes:
    name: in the CSV.
    limit: seconds.
    measure: measures them.
  """

  name: str
  limit: float
  measure: Callable[[], list[Measurement]]


def groups(case: Case) -> list[Group]:
  """All groups, the most important first."""
  few, many = case.roots
  narrow, wide = case.embeddings
  fast, gumbel, kernels, paper = LEARNERS
  group = lambda name, limit, function, *args: Group(
    name, limit * case.patience, functools.partial(function, *args, case)
  )
  search = lambda rule, roots, width, limit: group(
    f'search, {rule}, {roots} roots, embeddings of {4 * width + 4} bytes',
    limit,
    search_rows,
    rule,
    roots,
    width,
  )
  learner = lambda name, limit: group(
    f'learner, {name}', limit, learner_rows, name
  )
  return [
    group('peaks', 25, peak_rows),
    search('puct', few, narrow, 50),
    search('puct', many, narrow, 40),
    learner(fast, 90),
    group('seeds in one program', 90, seed_rows),
    search('efficientzero', few, narrow, 40),
    search('efficientzero', many, narrow, 40),
    learner(gumbel, 60),
    *(
      group(f'mixture, {n} experts', 40, experts.backend_rows, n)
      for n in case.experts
    ),
    learner(kernels, 90),
    search('puct', few, wide, 40),
    search('puct', many, wide, 40),
    group('acting', 60, acting_rows),
    group('ATAC', 40, offline.seed_rows),
    search('gumbel', few, narrow, 40),
    search('gumbel', many, narrow, 40),
    *(
      group(f'mixture, {n} experts, bfloat16', 40, mixture_rows, n)
      for n in case.experts
    ),
    learner(paper, 120),
  ]


def peak_rows(case: Case) -> list[Measurement]:
  """The largest rates: products, memory, and from the host to the device."""
  _, rows = roofline.measure_roof(case)
  sent = np.zeros(case.transfer, np.uint8)
  send = lambda: jax.device_put(sent).block_until_ready()
  times = timing.interleaved({'send': send}, case.repeats, case.least_seconds)
  setting = f'{case.transfer / 1e6:.3g} MB of uint8'
  giga = case.transfer / 1e9
  about = 'transfer', 'host to device', setting, 'GB/s'
  return [*rows, timing.speed_row(*about, giga, times['send'])]


def search_rows(
  rule: str, roots: int, width: int, case: Case
) -> list[Measurement]:
  """A rule in loops and by kernels, in turns with mctx's."""
  number = case.simulations
  name = 'mctx.gumbel_muzero_policy' if rule == 'gumbel' else None
  name = name or 'mctx.muzero_policy'
  contenders = {
    name: searches.theirs(number)[name],
    rule: searches.ours(rule, number),
    f'{rule}, kernels': searches.ours(rule, number, engine='kernels'),
  }
  if width:
    contenders[searches.BFLOAT16] = searches.rounded_puct(number)
    contenders[searches.ALONE] = searches.embeddings_alone(number)
  sized = case._replace(batch=roots)
  return searches.measured(sized, number, width, contenders)


def learner_rows(name: str, case: Case) -> list[Measurement]:
  """EfficientZero's update and reanalysis, as a share of a matrix product."""
  preset, *settings = LEARNERS[name]
  experiment = build.describe(preset, settings=[*settings, *case.smaller])
  rows = agents.learner_rows(experiment, case)
  product, *rest = rows
  return [product, *(row._replace(name=f'{row.name}, {name}') for row in rest)]


def seed_rows(case: Case) -> list[Measurement]:
  """One seed of a small agent, and many in one program."""
  (subject,) = scale.subjects(None, (), case)
  return scale.together_rows(subject, case)


def acting_rows(case: Case) -> list[Measurement]:
  """Decisions of EfficientZero, by the number of environments."""
  experiment = build.describe(_FAST, settings=case.smaller)
  return agents.deciding_rows(experiment, case)


def mixture_rows(number: int, case: Case) -> list[Measurement]:
  """The mixture in bfloat16."""
  return experts.backend_rows(number, case, 'bfloat16')


def measure(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Measures what is asked for, and says so.

  Args:
    asked: `quick`, `repeats`, groups that are `left_out`, and those that are
      `done`: lists of group, machine and versions.
  """
  case = cases.find('accelerator', asked['quick'], asked['repeats'])
  about = timing.machine()
  yield {'about': about, 'seconds': SECONDS * case.patience}
  done = {tuple(each) for each in asked['done']}
  known = groups(case)
  for number, group in enumerate(known, 1):
    key = group.name, about['machine'], about['versions']
    if key in done or group.name in asked['left_out']:
      continue
    yield {
      'begin': group.name,
      'limit': group.limit,
      'number': number,
      'groups': len(known),
    }
    try:
      yield {'rows': group.measure()}
    except Exception as error:
      text = ' '.join(str(error).split()) or type(error).__name__
      yield {'failed': text[:200]}
  yield {'end': True}


def _main() -> None:
  # A search that would run in loops instead is no search by kernels.
  warnings.filterwarnings('error', 'engine=kernels')
  for message in measure(json.loads(sys.argv[1])):
    print(json.dumps(message), flush=True)


if __name__ == '__main__':
  _main()
