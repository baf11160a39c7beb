"""Trains everything: `python -m experiments.train [--preset=NAME] [...]`.

Running the same command again resumes the run in its folder.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import assess, build, play, presets
from experiments.keeper import Keeper, saved_parts
from experiments.runtime import config as configs


def define_flags() -> None:
  """The flags of `python -m experiments.train`."""
  from absl import flags

  flags.DEFINE_string(
    'preset', presets.DEFAULT, f'what to run:\n{presets.help_text()}\n'
  )
  flags.DEFINE_enum('agent', None, presets.AGENTS, 'another agent')
  flags.DEFINE_string(
    'env',
    None,
    "another environment: envpool's name (Catch-v0, PongNoFrameskip-v4), "
    'gymnasium:NAME, jax:catch, jax:cartpole',
  )
  flags.DEFINE_multi_string(
    'set', [], 'field=value, repeatable; --show lists the fields'
  )
  flags.DEFINE_integer('seed', 0, 'of everything', 0)
  flags.DEFINE_integer('steps', None, 'decisions; the preset has its own', 1)
  flags.DEFINE_string(
    'workdir', None, "the run's folder; runs/PRESET_ENV_sSEED if left out"
  )
  flags.DEFINE_bool('show', False, 'print the settings and their meaning; stop')
  flags.DEFINE_integer(
    'profile', 0, 'updates to trace for the profiler into WORKDIR/profile', 0
  )
  flags.DEFINE_bool('tensorboard', False, 'write TensorBoard events, too')
  flags.DEFINE_string(
    'distributed',
    None,
    'several processes, each started with the same command: auto (a TPU pod, '
    'Slurm or the like tells), HOST:PORT of process 0, or none; see '
    'experiments/recipes',
  )
  flags.DEFINE_integer(
    'num_processes', None, 'how many, with --distributed=HOST:PORT', 1
  )
  flags.DEFINE_integer(
    'process_id', None, 'which of them, with --distributed=HOST:PORT', 0
  )


def main() -> None:
  """Trains as the flags say."""
  from absl import flags

  from experiments.runtime import distributed

  values = flags.FLAGS
  with configs.user_errors():
    experiment = build.describe(
      values.preset,
      agent=values.agent,
      env=values.env,
      steps=values.steps,
      seed=values.seed,
      settings=values.set,
    )
    if values.show:
      return _show(experiment)
    distributed.initialize(
      values.distributed, values.num_processes, values.process_id
    )
    use_compilation_cache()
    workdir = pathlib.Path(values.workdir or default_workdir(experiment))
  return run(
    experiment,
    workdir,
    profile=values.profile,
    tensorboard=values.tensorboard,
  )


def default_workdir(experiment: build.Experiment) -> str:
  """`runs/PRESET_ENV_sSEED`."""
  env = experiment.env_name.replace('/', '-').replace(':', '-')
  return f'runs/{experiment.name}_{env}_s{experiment.seed}'


def use_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache folder, if none is set."""
  import jax

  # Compiling takes most of a short run; the next one finds it done.
  folder = pathlib.Path.home() / '.cache' / 'outplay' / 'jax'
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def _device() -> str:
  import jax

  devices = jax.devices()
  return f'{len(devices)} x {devices[0].device_kind} ({devices[0].platform})'


def _show(experiment: build.Experiment) -> None:
  from rich.console import Console
  from rich.table import Table

  table = Table(title=f'{experiment.name}: --set=FIELD=VALUE')
  for column in ('field', 'value', 'meaning'):
    table.add_column(column)

  def add(prefix, config):
    docs = {field.name: field for field in configs.describe(config)}
    for field in dataclasses.fields(config):
      value = getattr(config, field.name)
      if dataclasses.is_dataclass(value):
        add(f'{prefix}{field.name}.', value)
      else:
        doc = docs[field.name].doc or ''
        table.add_row(prefix + field.name, str(value), doc)

  add('', experiment.config)
  add('env.', experiment.env)
  add('run.', experiment.run)
  Console().print(table)


def _announce(experiment, layout, env, agent, workdir) -> None:
  import jax
  import numpy as np

  from experiments.runtime import distributed

  state = jax.eval_shape(agent.init, jax.random.key(0))
  size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.params))
  shape = getattr(env.spec.observation, 'shape', env.spec.observation)
  _, processes = distributed.process()
  deal = f'{layout.mesh.size} learn'
  if layout.acting:
    deal += f', {len(layout.acting) * processes} act'
  print(
    f'{experiment.agent_name} on {experiment.env_name}: observations {shape}, '
    f'{env.spec.action}\n'
    f'{size:,} parameters, {experiment.steps:,} decisions, '
    f'{experiment.updates:,} updates of {experiment.run.batch_size} windows, '
    f'seed {experiment.seed}\n'
    f'{_device()}, {processes} process{"es" if processes > 1 else ""}: {deal}, '
    f'{layout.parts} part{"s" if layout.parts > 1 else ""} of environments and '
    'replay\n'
    f'folder: {workdir}\n'
    f'compiling, then {experiment.run.warmup_decisions:,} decisions before the '
    'first update: the first numbers take a while',
    flush=True,
  )


# May differ when a run is resumed.
_FREE = ('run.devices', 'run.acting_devices')


class _Trainer(NamedTuple):
  """What a run is made of once it is known who does what."""

  agent: Any
  source: Any
  env: Any
  layout: build.Layout
  update: Callable | None
  interval: Callable | None


def _make(
  experiment: build.Experiment, saved_parts: int, asked: Callable[[], bool]
) -> _Trainer:
  from experiments.runtime import distributed, mesh

  layout = build.make_layout(experiment, saved_parts)
  env = build.make_env(
    experiment,
    training=True,
    num_envs=experiment.env.num_envs // layout.parts,
  )
  how = experiment.run.parallel
  agent = build.make_agent(experiment, env.spec)
  # One process alone need not vote, and may leave while it fills its replay.
  alone = distributed.process()[1] == 1
  stopping = asked if alone else lambda: False
  source = build.make_source(experiment, env, agent, layout, stopping)
  update = interval = None
  if source.is_pure and how == 'pmap':
    raise ValueError(
      f'parallel=pmap: {experiment.env_name} is compiled into one program with '
      'the agent; take parallel=jit'
    )
  if layout.mesh.size > 1 or how == 'pmap':
    if source.is_pure:
      interval = mesh.compile_interval(agent, source, layout.mesh)
    else:
      reduce = mesh.pmean if how == 'pmap' else None
      learner = build.make_agent(experiment, env.spec, reduce)
      update = mesh.compile_update(learner, layout.mesh, how)
  return _Trainer(agent, source, env, layout, update, interval)


def run(
  experiment: build.Experiment,
  workdir: pathlib.Path,
  *,
  profile: int = 0,
  tensorboard: bool = False,
) -> None:
  """Trains in a folder, from its last checkpoint if it has one.

  Where several processes run it together, all compute and all save; the first
  one writes and prints.

  Args:
    experiment: from `build.describe`.
    workdir: the run's folder; its config.json is there.
    profile: updates to trace.
    tensorboard: whether to write events.
  """
  from experiments.runtime import checkpoint, distributed

  started = time.perf_counter()
  with checkpoint.graceful_exit() as asked:
    trained = _train(experiment, workdir, profile, tensorboard, asked)
  players = None
  if trained.end == experiment.updates and experiment.run.final_episodes:
    # Reading is done together, too; playing is not.
    names = [n for n in ('early', 'final') if (workdir / n).is_dir()]
    players = play.load_params(str(workdir), trained.agent, names)
  distributed.shutdown()
  if not distributed.is_main():
    return
  if trained.end < experiment.updates:
    print(
      f'stopped at update {trained.end:,} of {experiment.updates:,}; the same '
      'command goes on from here'
    )
    return
  seconds = time.perf_counter() - started
  print(f'trained {trained.end - trained.begin:,} updates in {seconds:.0f} s')
  if players is not None:
    finish(experiment, trained.agent, workdir, players)


class _Trained(NamedTuple):
  """An agent that has been trained from one update to another."""

  agent: Any
  begin: int
  end: int


def _train(experiment, workdir, profile, tensorboard, asked) -> _Trained:
  import jax

  from experiments.runtime import distributed, loop, mesh, watch

  settings = experiment.run
  key = jax.random.key(experiment.seed)
  is_main = distributed.is_main()
  with configs.user_errors():
    device = _device()
    notes = configs.check_run_config(
      workdir, experiment.as_dict(), device, _FREE
    )
    # Whatever is refused is refused by all, before the first one writes.
    distributed.barrier('config')
    trainer = _make(experiment, saved_parts(workdir), asked)
    agent, source = trainer.agent, trainer.source
    if is_main:
      _announce(experiment, trainer.layout, trainer.env, agent, workdir)
    fresh = mesh.init(agent, source, key, trainer.layout.mesh)
  if is_main:
    if notes is None:
      configs.write_run_config(workdir, experiment.as_dict(), device)
    for note in notes or ():
      print(f'note: {note} since this run began')
  distributed.barrier('written')
  if not (workdir / 'config.json').exists():
    raise configs.UserError(
      f'workdir={workdir}: process {distributed.process()[0]} does not see '
      'what process 0 wrote there; it must be a folder that all share'
    )
  keeper = Keeper(experiment, source, trainer.layout.parts, workdir, key)
  carry = keeper.restore(fresh) or fresh
  if carry is not fresh and source.close is not None:
    source.close(fresh.source)
  del fresh  # or its state would stay beside the restored one
  begin, updates = int(carry.step), experiment.updates
  if begin and is_main:
    print(f'resumed at update {begin:,} of {updates:,}', flush=True)

  writer = _writer(workdir, updates, begin, tensorboard)
  evaluator = assess.evaluator(experiment, agent)
  held_out = None
  if settings.hold_out:
    untrained = loop.init_agent(agent, key)
    held_out = assess.HeldOut(experiment, agent, untrained)
    if not begin:
      writer.write(0, held_out.losses(untrained.params))
    del untrained

  compiled_since, waited = watch.compilations(), 0.0

  def log(step: int, row: dict[str, float]) -> None:
    nonlocal waited
    keeper.decisions += row.get('decisions', 0.0)
    waited += row.get('wait_seconds', 0.0)
    row |= {'decisions': keeper.decisions, 'compiled': compiled_since()}
    writer.write(step, row)

  def evaluate(step: int, agent_state) -> dict[str, float]:
    found = {}
    if settings.early_update and step == settings.early_update:
      keeper.save_early(step, agent_state)
    if held_out is not None and step % settings.hold_out_every == 0:
      found |= held_out.losses(agent_state.params)
    if settings.evaluate_every and step % settings.evaluate_every == 0:
      # All play the same episodes; one's figures decide for all.
      found |= distributed.of_main(evaluator(agent_state.params, step))
      keeper.save_best(step, found['eval_return'], agent_state)
    return found

  every = _common_interval(
    settings.evaluate_every,
    settings.early_update,
    settings.hold_out_every if settings.hold_out else 0,
  )
  intervals = loop.Intervals(
    log=settings.log_every,
    checkpoint=settings.checkpoint_every,
    evaluate=every,
  )
  compiled = {'update': trainer.update, 'interval': trainer.interval}
  sum_counts = distributed.sum_over_processes
  # A vote makes all wait for each other, so it is not taken at every update.
  stopping = distributed.stopping(asked, every=16)
  start = time.perf_counter()
  try:
    if profile and begin < updates:
      carry = _profiled(
        agent,
        source,
        carry,
        key,
        begin + min(profile, updates - begin),
        workdir / 'profile' if is_main else None,
        intervals._replace(checkpoint=0),
        loop.Hooks(log, None, evaluate, stopping, sum_counts),
        compiled,
      )
    carry = loop.run(
      agent,
      source,
      carry,
      key=key,
      steps=updates,
      intervals=intervals,
      hooks=loop.Hooks(log, keeper.save, evaluate, stopping, sum_counts),
      **compiled,
    )
  finally:
    if source.close is not None:
      source.close(carry.source)
    writer.close()
    keeper.close()
  end, seconds = int(carry.step), time.perf_counter() - start
  if held_out is not None and end == updates:
    held_out.compare(carry.agent, workdir / 'held_out.csv', is_main)
  if is_main:
    peaks = watch.peak_memory().items()
    used = ', '.join(f'{x / 1e9:.2f} GB of the {name}' for name, x in peaks)
    # Every process has waited for its own actors.
    share = waited / distributed.process()[1] / max(seconds, 1e-9)
    print(f'waited for experience: {share:.1%} of the time; memory: {used}')
  return _Trained(agent, begin, end)


def _writer(workdir: pathlib.Path, updates: int, begin: int, tensorboard: bool):
  """Where metrics go: files and the terminal of the first process."""
  from experiments.runtime import distributed, metrics

  if not distributed.is_main():
    return metrics.tee()
  writers = [metrics.csv_writer(workdir / 'metrics.csv', begin or None)]
  if tensorboard:
    writers.append(
      metrics.tensorboard_writer(workdir / 'tensorboard', begin or None)
    )
  shown = ('episode_return', 'eval_return', 'loss', 'decisions')
  writers.append(metrics.progress(updates, begin, shown))
  return metrics.tee(*writers)


def _common_interval(*intervals: int) -> int:
  import math

  due = [n for n in intervals if n]
  return math.gcd(*due) if due else 0


def _profiled(
  agent, source, carry, key, steps, folder, intervals, hooks, compiled
):
  """Traces updates up to `steps`; they count as part of the run.

  `folder` is None in processes that do not write.

  Nothing is saved meanwhile, so that simulators of the host do not start
  afresh where they otherwise would.
  """
  import jax

  from experiments.runtime import loop

  trace = contextlib.nullcontext()
  if folder is not None:
    shutil.rmtree(folder, ignore_errors=True)
    trace = jax.profiler.trace(str(folder))
  with trace:
    carry = loop.run(
      agent,
      source,
      carry,
      key=key,
      steps=steps,
      intervals=intervals,
      hooks=hooks,
      **compiled,
    )
  if folder is not None:
    print(f'profile: {folder}')
  return carry


def finish(
  experiment: build.Experiment,
  agent: Any,
  workdir: pathlib.Path,
  players: dict[str, Any],
) -> None:
  """Plays without search and with more and more of it; table and figure.

  Args:
    experiment: from `build.describe`.
    agent: from `build.make_agent`.
    workdir: the run's folder.
    players: parameters by the checkpoint's name, from `play.load_params`.
  """
  from experiments import plots

  settings = experiment.run

  print('playing the trained network without and with search', flush=True)
  env = build.make_env(
    experiment, training=False, num_envs=min(settings.final_episodes, 50)
  )
  rows = play.evaluate(
    experiment,
    env,
    agent,
    players,
    simulations=(0, *settings.final_simulations),
    episodes=settings.final_episodes,
    seed=experiment.seed,
  )
  play.print_rows(rows)
  play.write_rows(workdir / 'evaluation.csv', rows)
  plots.budget_figure(workdir / 'evaluation.csv', workdir / 'evaluation.png')
  print(
    f'results: {workdir}/evaluation.csv, evaluation.png, metrics.csv\n'
    f'next: python -m experiments.play --workdir={workdir} --simulations=0,32\n'
    f'      python -m experiments.plots --workdirs={workdir} --out=curve.png'
  )


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
