"""Trains everything: `python -m experiments.train [--preset=NAME] [...]`.

Running the same command again resumes the run in its folder.
"""

import contextlib
import functools
import json
import pathlib
import re
import shutil
import sys
import time
from typing import Any, NamedTuple

from experiments import build
from experiments.build import capacity
from experiments.build import saved as saved_run
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.training import stages
from experiments.training import watcher as watching
from experiments.training.keeper import Keeper, alone, peek


def default_workdir(experiment: build.Experiment) -> str:
  """`runs/PRESET_ENV_sSEED`, or with the name of what is read for ENV."""
  name = experiment.material.name(experiment)
  where = re.sub(r'[^\w.,+=@()-]', '-', name)[:80]
  return f'runs/{experiment.name}_{where}_s{experiment.seed}'


def _announce(experiment, trainer, workdir) -> None:
  import jax

  from experiments.runtime import distributed

  layout, agent = trainer.layout, trainer.stages[-1].agent
  state = jax.eval_shape(agent.init, jax.random.key(0))
  material = experiment.material
  about = material.describe(experiment, trainer.spec)
  _, processes = distributed.process()
  deal = f'{layout.mesh.size} learn'
  if layout.acting:
    deal += f', {len(layout.acting) * processes} act'
  length = (
    f'{experiment.steps:,} decisions, about {experiment.updates:,} updates'
  )
  shares = ' of environments and replay'
  first = f'{experiment.run.warmup_decisions:,} time steps before the first'
  first = f'compiling, then {first} update: the first numbers take a while'
  if not material.acts:
    parts = [f'{s.name} to {s.end or 0:,}' for s in trainer.stages]
    length = f'{experiment.updates:,} updates ({", ".join(parts)})'
    shares, first = '', 'compiling: the first numbers take a while'
  for line in about.before:
    terminal.say(line)
  terminal.say(
    f'{experiment.agent_name} on {about.what}',
    *about.after,
    f'{terminal.parameters(state.params)}, {length} of '
    f'{experiment.run.batch_size} rows, seed {experiment.seed}',
    f'{terminal.device()}, '
    f'{processes} process{"es" if processes > 1 else ""}: {deal}, '
    f'{layout.parts} part{"s" if layout.parts > 1 else ""}{shares}',
    f'folder: {workdir}',
    first,
  )


def run(
  experiment: build.Experiment,
  workdir: pathlib.Path,
  *,
  profile: int = 0,
  tensorboard: bool = False,
  wandb: str = '',
  measure: bool = False,
) -> None:
  """Trains in a folder, from its last checkpoint if it has one.

  Where several processes run it together, all compute and all save; the first
  one writes and prints.

  Args:
    experiment: from `build.describe`.
    workdir: the run's folder; its config.json is there.
    profile: updates to trace.
    tensorboard: whether to write events.
    wandb: the project that wandb gets the numbers for; '' for none.
    measure: whether the trained agent is measured at the end just as it is
      every `evaluate_every` updates, into measured.csv.

  A signal stops it with a checkpoint; `signals.received` then says which.

  Raises:
    UserError: the folder cannot be gone on with.
  """
  from experiments.runtime import distributed, signals
  from experiments.training import plan

  started = time.perf_counter()
  with (
    plan.out_of_memory(experiment),
    signals.graceful_exit() as asked,
    contextlib.ExitStack() as held,
  ):
    trained = _train(
      experiment, workdir, held, profile, tensorboard, wandb, measure, asked
    )
  players = None
  agent = trained.trainer.stages[-1].agent
  finish = experiment.material.finish(experiment, agent)
  if trained.ended and finish is not None:
    # Reading is done together, too; playing is not.
    names = [n for n in ('early', 'final') if (workdir / n).is_dir()]
    players = saved_run.load_params(str(workdir), agent, names)
  distributed.shutdown()
  if not distributed.is_main():
    return
  if not trained.ended:
    print(
      f'stopped at update {trained.end:,} of {_planned(experiment)}; the same '
      'command goes on from here'
    )
    return
  seconds = time.perf_counter() - started
  print(f'trained {trained.end - trained.begin:,} updates in {seconds:.0f} s')
  if players is not None and signals.received():
    print('stopped before playing; the same command goes on from here')
    return
  if players is not None and finish is not None:
    finish(workdir, players)


def _decisive(about, device, profile, workdir) -> dict[str, Any]:
  """What all processes of a run must have been given alike."""
  begun = (workdir / 'config.json').exists()
  made_with = configs.made_with(device)
  # Machines may keep data in different places, and differ in Python's patches.
  del made_with['versions']['python']
  given = {n: value for n, value in about.items() if n != 'dataset'}
  return json.loads(
    json.dumps({**given, **made_with, 'profile': profile, 'begun': begun})
  )


class _Trained(NamedTuple):
  """What has been trained from one update to another, and if that is all."""

  trainer: stages.Trainer
  begin: int
  end: int
  ended: bool


def _planned(experiment: build.Experiment) -> str:
  about = 'about ' if experiment.material.acts else ''
  return f'{about}{experiment.updates:,}'


def _train(
  experiment, workdir, held, profile, tensorboard, wandb, measure, asked
) -> _Trained:
  import jax

  from experiments.runtime import distributed, loop, mesh, watch

  settings = experiment.run
  key = jax.random.key(experiment.seed)
  is_main = distributed.is_main()
  with configs.user_errors():
    # A folder that is not there yet is made when nothing is refused any more.
    is_new = not distributed.of_main({'is_there': workdir.exists()})['is_there']
    device = terminal.device()
    about = experiment.as_dict() | experiment.material.fingerprint(experiment)
    distributed.agree(_decisive(about, device, profile, workdir))
    notes = configs.check_run_config(workdir, about, device, configs.FREE)
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
      _announce(experiment, trainer, workdir)
    fresh = mesh.init(stage.agent, stage.source, key, devices, stage.sharding)
  if is_new:
    held.enter_context(alone(workdir, is_new=True))
  if is_main:
    if notes is None:
      configs.write_run_config(workdir, about, device)
    saved_run.save_spec(workdir, trainer.spec)
    experiment.material.keep(experiment, workdir)
    for note in notes or ():
      terminal.say(f'note: {note} since this run began')
  distributed.barrier('written')
  distributed.agree(
    {'config_is_there': (workdir / 'config.json').exists()},
    f'workdir={workdir}: must be a folder that all processes share',
  )
  keeper = Keeper(
    experiment, stage.source, trainer.layout.parts, workdir, key, saved.phase
  )
  if saved.parts and stage.source.is_pure and stage.source.load is not None:
    # Its rows are loaded again, and there may be no room for them twice.
    fresh = fresh._replace(source=None)
  carry = keeper.restore(fresh) or fresh
  if carry is not fresh and stage.source.close is not None:
    stage.source.close(fresh.source)
  del fresh  # or its state would stay beside the restored one
  begin = int(carry.step)
  if begin and is_main:
    words = f'resumed at update {begin:,} of {_planned(experiment)}'
    print(words, flush=True)

  writer = _writer(experiment, workdir, begin, tensorboard, wandb, keeper)
  watcher = watching.Watcher(experiment, trainer, keeper, writer, begin, key)
  intervals = loop.Intervals(
    log=settings.log_every,
    checkpoint=settings.checkpoint_every,
    evaluate=_common_interval(
      settings.evaluate_every,
      settings.early_update,
      settings.hold_out_every if settings.hold_out else 0,
    ),
  )
  # A vote makes all wait for each other, so it is not taken at every update.
  hooks = loop.Hooks(
    watcher.log,
    keeper.save,
    watcher.evaluate,
    distributed.stopping(asked, every=16),
    distributed.sum_over_processes,
  )
  start = time.perf_counter()
  try:
    for number in range(saved.phase, len(trainer.stages)):
      if number > saved.phase:
        stage = trainer.stages[number]
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
        folder = workdir / 'profile' if is_main else None
        carry = _profiled(run, carry, end, folder, intervals, hooks)
      carry = run(carry, steps=stage.end, intervals=intervals, hooks=hooks)
      if stage.end is not None and int(carry.step) < stage.end:
        break
  finally:
    if stage.source.close is not None:
      stage.source.close(carry.source)
    writer.close()
    keeper.close()
  end, seconds = int(carry.step), time.perf_counter() - start
  ended = end == experiment.updates
  if keeper.budget is not None:
    ended = keeper.budget.stop(end) == end
  if watcher.held_out is not None and ended:
    watcher.held_out.compare(carry.agent, workdir / 'held_out.csv', is_main)
  if measure and ended:
    watcher.measure(end, carry.agent, workdir / 'measured.csv')
  if is_main:
    peaks = watch.peak_memory().items()
    used = ', '.join(f'{x / 1e9:.2f} GB of the {name}' for name, x in peaks)
    # Every process has waited for its own actors.
    share = watcher.waited / distributed.process()[1] / max(seconds, 1e-9)
    print(f'waited for experience: {share:.1%} of the time; memory: {used}')
  return _Trained(trainer, begin, end, ended)


def _plan_here(experiment, trainer, phase: int) -> None:
  """Plans a run on accelerators, which finds the programs in the cache.

  On a CPU it would be seconds of compiling for memory that is the machine's.
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
  tensorboard: bool,
  wandb: str,
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
  if tensorboard:
    writers.append(metrics.tensorboard_writer(workdir / 'tensorboard', resumed))
  if wandb:
    writers.append(
      metrics.wandb_writer(workdir, wandb, experiment.as_dict(), resumed)
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


def _common_interval(*intervals: int) -> int:
  import math

  due = [n for n in intervals if n]
  return math.gcd(*due) if due else 0


def _profiled(run, carry, steps, folder, intervals, hooks):
  """Traces updates up to `steps`; they count as part of the run.

  `folder` is None in processes that do not write.

  Nothing is saved meanwhile, so that simulators of the host do not start
  afresh where they otherwise would.
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
