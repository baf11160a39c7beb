"""Trains one run in its folder, new or resumed, and keeps what it leaves."""

import contextlib
import functools
import json
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import build
from experiments.build import capacity
from experiments.build import saved as saved_run
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import run_config
from experiments.training import stages, words
from experiments.training import watcher as watching
from experiments.training.keeper import Keeper, Saved, alone, peek


class Also(NamedTuple):
  """What is done besides training.

  Attributes:
    profile: updates to trace.
    tensorboard: whether to write events.
    wandb: the project for the numbers; '' for none.
    measure: whether to evaluate the trained agent, as every `evaluate_every`
      updates, into measured.csv.
  """

  profile: int = 0
  tensorboard: bool = False
  wandb: str = ''
  measure: bool = False


NOTHING = Also()


class Trained(NamedTuple):
  """A run after training, from update `begin` to `end`.

  The carry's simulators and threads are closed; `ended` says whether that is
  all.
  """

  trainer: stages.Trainer
  carry: Any
  begin: int
  end: int
  ended: bool


def train(
  experiment: build.Experiment,
  workdir: pathlib.Path,
  asked: Callable[[], bool],
  also: Also = NOTHING,
) -> Trained:
  """Trains in a folder, from its last checkpoint if it has one.

  `asked` says whether the user wants to stop.

  Raises:
    UserError: the run in the folder cannot be resumed.
  """
  import jax

  from experiments.runtime import distributed

  key = jax.random.key(experiment.seed)
  is_main = distributed.is_main()
  with contextlib.ExitStack() as held:
    trainer, saved, fresh = _admitted(
      experiment, workdir, key, held, asked, also.profile
    )
    stage = trainer.stages[saved.phase]
    keeper = Keeper(
      experiment, stage.source, trainer.layout.parts, workdir, key, saved.phase
    )
    carry = keeper.restore(fresh) or fresh
    if carry is not fresh:
      stage.source.close(fresh.source)
    del fresh  # or its state would stay in memory with the restored one
    begin = int(carry.step)
    if begin and is_main:
      planned = words.planned(experiment)
      print(f'resumed at update {begin:,} of {planned}', flush=True)
    writer = _writer(experiment, workdir, begin, also, keeper)
    watcher = watching.Watcher(experiment, trainer, keeper, writer, begin, key)
    start = time.perf_counter()
    carry = _through_phases(
      experiment,
      workdir,
      carry,
      key,
      asked,
      also.profile,
      trainer,
      keeper,
      watcher,
      writer,
    )
    end, seconds = int(carry.step), time.perf_counter() - start
    ended = end == experiment.updates
    if keeper.budget is not None:
      ended = keeper.budget.stop(end) == end
    if watcher.held_out is not None and ended:
      watcher.held_out.compare(carry.agent, workdir / 'held_out.csv', is_main)
    if also.measure and ended:
      watcher.measure(end, carry.agent, workdir / 'measured.csv')
    if is_main:
      words.tell_work(watcher.waited, seconds)
    return Trained(trainer, carry, begin, end, ended)


def _admitted(
  experiment, workdir, key, held, asked, profile
) -> tuple[stages.Trainer, Saved, Any]:
  """The trainer, what is saved, and a fresh carry.

  Refuses what is wrong before anything is written; `held` gets the folder's
  lock.
  """
  from experiments.runtime import distributed, mesh

  is_main = distributed.is_main()
  with configs.user_errors():
    # A missing folder is made once nothing can be refused any more.
    is_new = not distributed.of_main({'is_there': workdir.exists()})['is_there']
    device = terminal.device()
    about = experiment.as_dict() | experiment.material.fingerprint(experiment)
    distributed.agree(_decisive(about, device, profile, workdir))
    notes = run_config.check_run_config(workdir, about, device, run_config.FREE)
    if not is_new:
      held.enter_context(alone(workdir, is_new=notes is None))
    # Whatever is refused is refused by all, before the first one writes.
    distributed.barrier('config')
    saved = peek(workdir)
    trainer = stages.make(experiment, saved, asked)
    capacity.check_run(experiment, trainer, saved.phase)
    _plan_here(experiment, trainer, saved.phase)
    stage, devices = trainer.stages[saved.phase], trainer.layout.mesh
    if is_main:
      words.announce(experiment, trainer, workdir)
    fresh = mesh.init(stage.agent, stage.source, key, devices, stage.sharding)
  if is_new:
    held.enter_context(alone(workdir, is_new=True))
  if is_main:
    if notes is None:
      run_config.write_run_config(workdir, about, device)
    saved_run.save_spec(workdir, trainer.spec)
    experiment.material.keep(experiment, workdir)
    for note in notes or ():
      terminal.say(f'note: {note} since this run began')
  distributed.barrier('written')
  distributed.agree(
    {'config_is_there': (workdir / 'config.json').exists()},
    f'workdir={workdir}: must be a folder that all processes share',
  )
  if saved.parts and stage.source.is_pure and stage.source.kept is not None:
    # Its rows are loaded again, and there may be no room for them twice.
    fresh = fresh._replace(source=None)
  return trainer, saved, fresh


def _through_phases(
  experiment,
  workdir,
  carry,
  key,
  asked,
  profile,
  trainer,
  keeper,
  watcher,
  writer,
):
  """The carry at the end of the last phase, or where the user stopped."""
  from experiments.runtime import distributed, loop

  begin, intervals = int(carry.step), _intervals(experiment.run)
  # A vote makes all wait for each other, so it is not taken at every update.
  hooks = loop.Hooks(
    watcher.log,
    keeper.save,
    watcher.evaluate,
    distributed.stopping(asked, every=16),
    distributed.sum_over_processes,
  )
  first = keeper.phase
  stage = trainer.stages[first]
  try:
    for number, stage in enumerate(trainer.stages[first:], first):
      if number > first:
        carry = stages.enter(stage, carry)
        keeper.enter(number, stage.source)
        watcher.enter(stage)
      run = functools.partial(
        loop.run,
        stage.agent,
        stage.source,
        key=key,
        update=stage.update,
        interval=stage.interval,
        budget=keeper.budget,
      )
      if profile and begin <= int(carry.step) < begin + profile:
        end = min(begin + profile, stage.end or sys.maxsize)
        folder = workdir / 'profile' if distributed.is_main() else None
        carry = _profiled(run, carry, end, folder, intervals, hooks)
      carry = run(carry, steps=stage.end, intervals=intervals, hooks=hooks)
      if stage.end is not None and int(carry.step) < stage.end:
        break
  finally:
    stage.source.close(carry.source)
    writer.close()
    keeper.close()
  return carry


def _intervals(settings):
  from experiments.runtime import loop

  due = [
    settings.evaluate_every,
    settings.early_update,
    settings.hold_out_every if settings.hold_out else 0,
  ]
  return loop.Intervals(
    log=settings.log_every,
    checkpoint=settings.checkpoint_every,
    # The watcher decides what is due at each multiple.
    evaluate=math.gcd(*due),
  )


def _decisive(about, device, profile, workdir) -> dict[str, Any]:
  """What must be the same in all processes of a run."""
  begun = (workdir / 'config.json').exists()
  made_with = run_config.made_with(device)
  # Machines may keep data in different places, and differ in Python's patches.
  del made_with['versions']['python']
  given = {n: value for n, value in about.items() if n != 'dataset'}
  return json.loads(
    json.dumps({**given, **made_with, 'profile': profile, 'begun': begun})
  )


def _plan_here(experiment, trainer, phase: int) -> None:
  """Plans a run on accelerators; it then finds the programs in the cache.

  On a CPU it would cost seconds of compiling.
  """
  from experiments.runtime import distributed
  from experiments.training import plan, plan_memory

  if trainer.layout.mesh.devices.flat[0].platform == 'cpu':
    return
  plans = []
  for stage in trainer.stages[phase:]:
    # Simulators are not asked for what a program takes.
    on_host = not stage.source.is_pure and experiment.material.acts
    source = None if on_host else stage.source
    about = (stage.name, stage.agent, source, trainer.spec)
    plans.append(plan_memory.of_phase(experiment, trainer.layout, about))
  if distributed.is_main():
    plan.show(plans)
  plan.check(plans)


def _writer(
  experiment: build.Experiment,
  workdir: pathlib.Path,
  begin: int,
  also: Also,
  keeper: Keeper,
):
  """Where metrics go: files and the terminal of the first process."""
  from experiments.runtime import distributed, metrics

  if not distributed.is_main():
    return metrics.tee()
  resumed = begin or None
  table = metrics.csv_writer(workdir / 'metrics.csv', resumed, keeper.metrics)
  assert table.digest is not None
  keeper.digest = table.digest
  writers = [table]
  if also.tensorboard:
    writers.append(metrics.tensorboard_writer(workdir / 'tensorboard', resumed))
  if also.wandb:
    writers.append(
      metrics.wandb_writer(workdir, also.wandb, experiment.as_dict(), resumed)
    )
  shown = (
    'episode_return',
    'eval_return',
    'loss',
    'held_perplexity',
    'decisions',
  )
  writers.append(metrics.progress(experiment.updates, begin, shown))
  return metrics.tee(*writers)


def _profiled(run, carry, steps, folder, intervals, hooks):
  """Traces updates up to `steps`, which count as part of the run.

  Nothing is saved meanwhile, so that host simulators do not start afresh.
  `folder` is None in processes that do not write.
  """
  import jax

  trace = contextlib.nullcontext()
  if folder is not None:
    shutil.rmtree(folder, ignore_errors=True)
    trace = jax.profiler.trace(str(folder))
  with trace:
    carry = run(
      carry,
      steps=steps,
      intervals=intervals._replace(checkpoint=0),
      hooks=hooks._replace(save=None),
    )
  if folder is not None:
    terminal.say(f'profile: {folder}')
  return carry
