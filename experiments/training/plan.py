"""Memory before anything runs: plans of a run, as tables and as refusals.

Plans for other machines are made in a process that runs this module; see
`compile_targets`.
"""

import contextlib
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from experiments import build
from experiments.build import capacity, programs
from experiments.files.errors import UserError, shown
from experiments.report import terminal
from experiments.runtime import compile_targets, devices
from experiments.runtime import flags as flag_checks
from experiments.training.keeper import peek
from experiments.training.plan_memory import (
  FULL,
  Need,
  Plan,
  of_phase,
  settings,
)


def launch(
  experiment: build.Experiment, values: Any, folder: pathlib.Path
) -> None:
  """Prints how much memory a run needs, and refuses one that does not fit.

  `values` are the flags of `experiments.train`; the run's folder may hold a
  checkpoint, which fixes its parts.

  Raises:
    UserError: it does not fit, or a flag would be ignored.
  """
  from experiments.runtime import distributed

  flag_checks.refuse(
    ['check', 'profile', 'measure', 'tensorboard', 'wandb'], 'with --plan'
  )
  if values.target is None:
    distributed.initialize(
      values.distributed, values.num_processes, values.process_id
    )
    devices.use_compilation_cache()
    plans = here(experiment, peek(folder).parts)
  else:
    flag_checks.refuse(
      ['workdir', 'distributed', 'num_processes', 'process_id'],
      'with --target',
    )
    flags = ('agent', 'env', 'steps', 'seed')
    about = {name: getattr(values, name) for name in flags} | {
      'preset_name': values.preset,
      'settings': values.set,
      'dataset': build.text_or_dataset(values),
    }
    plans = elsewhere(experiment, values.target, about)
  if distributed.is_main():
    show(plans)
  check(plans)
  if distributed.is_main():
    print('it fits')


def here(experiment: build.Experiment, saved_parts: int = 0) -> list[Plan]:
  """Plans of a run's phases on this machine.

  `saved_parts` are those of the checkpoint to resume from; 0 for none.

  Raises:
    ValueError: agent, environment, data set and devices do not fit.
  """
  layout = build.make_layout(experiment, saved_parts)
  phases = programs.phases(experiment, layout)
  return [of_phase(experiment, layout, phase) for phase in phases]


def elsewhere(
  experiment: build.Experiment, name: str, about: dict[str, Any]
) -> list[Plan]:
  """Plans of a run's phases on a machine of `compile_targets`.

  `about` are the arguments of `build.describe`.

  Raises:
    UserError: an unknown machine, or the run does not fit it.
  """
  target = compile_targets.parse(name)
  for field in ('devices', 'acting_devices'):
    if value := getattr(experiment.run, field):
      raise UserError(
        f'{field}={value}: all devices of target={name} learn; take 0'
      )
  plans, asked = [], {'target': target.name, 'about': about}
  module, folder = 'experiments.training.plan', pathlib.Path('.compilers')
  for found in compile_targets.ask(module, target, folder, asked):
    if 'error' in found:
      raise UserError(found['error'])
    rows = [
      Need(what, tuple(some), *rest) for what, some, *rest in found['rows']
    ]
    found['rows'] = tuple(rows)
    plans.append(Plan(**found))
  return plans


def show(plans: Sequence[Plan]) -> None:
  """Prints a table for each plan."""
  text = lambda size: capacity.in_units(size) if 0 < size < math.inf else '-'
  for plan in plans:
    rows = [
      (
        row.what,
        (*row.fields, '')[0][:24],
        'too much' if row.device == math.inf else text(row.device),
        text(row.host),
      )
      for row in plan.rows
    ]
    rows.append(('largest at once', '', text(plan.device), text(plan.host)))
    there = "the host's" if plan.on_host else text(plan.has)
    rows.append(('there is', '', there, text(plan.host_has)))
    title = f'memory of {plan.phase} on {plan.machine}'
    columns = ('what', 'changed by', 'a device', 'a host')
    terminal.print_table(columns, rows, title, left=2)


def check(plans: Sequence[Plan]) -> None:
  """Refuses a run that does not fit.

  Raises:
    UserError: names the settings that change what takes most.
  """
  for plan in plans:
    for place, need, have in (
      ('device', plan.device, plan.has),
      ('host', plan.host, plan.host_has),
    ):
      if need == math.inf or (have and need > have):
        raise UserError(_refusal(plan, place, need, have))


def _refusal(plan: Plan, place: str, need: float, have: float) -> str:
  """A message: what takes most memory, and the settings that change it."""
  size = lambda row: row.device
  if place == 'host':
    size = lambda row: row.host + row.device * plan.on_host
  # Changing what takes less than a tenth does not help. A program that its
  # compiler refuses may be too large for its arguments, such as a replay.
  least = (have if need == math.inf else need) / 10
  most = [row for row in plan.counted if size(row) >= least]
  most.sort(key=size, reverse=True)
  fields = list(dict.fromkeys(field for row in most for field in row.fields))
  there = (
    f'a {place}, which has {capacity.in_units(have)}' if have else f'a {place}'
  )
  if need == math.inf:
    takes = f'{most[0].what} is too large for {there}'
  else:
    parts = ', '.join(f'{r.what} {capacity.in_units(size(r))}' for r in most)
    takes = f'needs {capacity.in_units(need)} of {there} ({parts})'
  return f'{", ".join(fields)}: {takes}; {_remedy(fields)}'


def _remedy(fields: Sequence[str]) -> str:
  whole = 'reanalyze_chunk=0' in fields
  more = ' (reanalyze_chunk=0 searches all roots at once)' if whole else ''
  return f'take less{more}, or more devices'


@contextlib.contextmanager
def out_of_memory(experiment: build.Experiment) -> Iterator[None]:
  """Turns a device's running out of memory into one line.

  Raises:
    UserError: names the settings that change what is needed.
  """
  import jax

  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if FULL not in str(error):
      raise
    fields = settings(experiment, *experiment.material.memory)
    what = shown(' '.join(str(error).split()))
    raise UserError(
      f'{", ".join(fields)}: a device has run out of memory ({what}); '
      f'{_remedy(fields)}; --plan shows what needs how much'
    ) from error


def _main() -> None:
  """Prints the plans that `elsewhere` asks for."""
  from experiments.runtime import mesh as meshes

  asked = json.load(sys.stdin)
  try:
    target = compile_targets.parse(asked['target'])
    experiment = build.describe(**asked['about'])
    mesh = meshes.make_mesh(compile_targets.devices(target))
    layout = build.lay_out(experiment, mesh)
    for phase in programs.phases(experiment, layout):
      plan = of_phase(experiment, layout, phase, target)
      print(json.dumps(plan._asdict()), flush=True)
  except ValueError as error:
    print(json.dumps({'error': str(error)}), flush=True)


if __name__ == '__main__':
  _main()
