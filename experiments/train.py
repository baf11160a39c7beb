"""Trains everything: `python -m experiments.train [--preset=NAME] [...]`.

Running the same command again resumes the run in its folder.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import sys
import time
from typing import Any, NamedTuple

from experiments import (
  assess,
  build,
  capacity,
  offline,
  play,
  presets,
  stages,
  terminal,
  text,
)
from experiments.keeper import Keeper, alone, peek
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks
from experiments.settings import refuse_unused


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
  flags.DEFINE_string(
    'dataset',
    None,
    'to learn from instead of from play: a folder or file of ours, D4RL (hdf5) '
    'or Minari, or a name of theirs; --steps are then updates',
  )
  flags.DEFINE_string(
    'text',
    None,
    'a text file for a language model; --steps are then updates',
  )
  flags.DEFINE_multi_string(
    'set', [], 'field=value, repeatable; --show lists the fields'
  )
  flags.DEFINE_integer('seed', 0, 'of everything', 0, configs.MAX_SEED)
  flags.DEFINE_integer(
    'steps', None, 'decisions; the preset has its own', 1, configs.MAX_INT
  )
  flags.DEFINE_string(
    'workdir', None, "the run's folder; runs/PRESET_ENV_sSEED if left out"
  )
  flags.DEFINE_bool('show', False, 'print the settings and their meaning; stop')
  flags.DEFINE_bool(
    'check', False, 'refuse what is wrong, make and train nothing, and stop'
  )
  flags.DEFINE_bool(
    'plan',
    False,
    'compile the programs of the run, print how much memory it needs on each '
    'device and on the host, and stop; the exit code is 2 if it does not fit',
  )
  flags.DEFINE_string(
    'target',
    None,
    'with --plan: a machine to plan for instead of this one, such as h100, '
    'h100:8, v5e:4x4, v6e:2x2 or v5p:2x2x1; its compiler is installed into '
    '.compilers',
  )
  flags.DEFINE_integer(
    'profile',
    0,
    'updates to trace for the profiler into WORKDIR/profile',
    0,
    1_000_000,
  )
  flags.DEFINE_bool(
    'measure',
    False,
    'measure the trained agent as evaluate_every does, into measured.csv',
  )
  flags.DEFINE_bool('tensorboard', False, 'write TensorBoard events, too')
  flags.DEFINE_string(
    'wandb', None, 'a project of Weights & Biases to write to, too'
  )
  flags.DEFINE_string(
    'distributed',
    None,
    'several processes, each started with the same command: auto (a TPU pod, '
    'Slurm or the like tells), HOST:PORT of process 0, or none; see '
    'experiments/recipes',
  )
  flags.DEFINE_integer(
    'num_processes',
    None,
    'how many, with --distributed=HOST:PORT',
    1,
    1_000_000,
  )
  flags.DEFINE_integer(
    'process_id',
    None,
    'which of them, with --distributed=HOST:PORT',
    0,
    1_000_000,
  )


def main() -> None:
  """Trains as the flags say."""
  from absl import flags

  from experiments.runtime import distributed, metrics

  values = flags.FLAGS
  with configs.user_errors():
    experiment = build.describe(
      values.preset,
      agent=values.agent,
      env=values.env,
      steps=values.steps,
      seed=values.seed,
      settings=values.set,
      dataset=text_or_dataset(values),
    )
    refuse_unused(
      values.set,
      on_data=bool(experiment.dataset),
      is_fresh=build.is_fresh(experiment.config),
    )
    if values.show:
      flag_checks.refuse(
        ['profile', 'tensorboard', 'wandb', 'workdir', 'plan', 'target'],
        'with --show',
      )
      return _show(experiment)
    if values.plan:
      return _plan(experiment, values)
    flag_checks.refuse(['target'], 'without --plan')
    metrics.check_installed(values.tensorboard, values.wandb or '')
    if values.check:
      return _check(experiment, values.workdir)
    distributed.initialize(
      values.distributed, values.num_processes, values.process_id
    )
    use_compilation_cache()
    workdir = pathlib.Path(values.workdir or default_workdir(experiment))
    configs.check_place('workdir', workdir, folder=True)
  return run(
    experiment,
    workdir,
    profile=values.profile,
    tensorboard=values.tensorboard,
    wandb=values.wandb or '',
    measure=values.measure,
  )


def text_or_dataset(values) -> str | None:
  """The path that either flag gives.

  Raises:
    UserError: both are given, or a text to an agent that reads none.
  """
  if values.text and values.dataset:
    raise configs.UserError(
      f'text={values.text}: --dataset is given, too; take one of them'
    )
  agent = values.agent or presets.find(values.preset).agent
  if values.text and not build.reads_text(agent):
    raise configs.UserError(
      f'text={values.text}: {agent} does not learn from a text; take '
      '--preset=moe_language_small'
    )
  return values.text or values.dataset


def default_workdir(experiment: build.Experiment) -> str:
  """`runs/PRESET_ENV_sSEED`, or with the data set's name for ENV."""
  where = experiment.env_name
  if experiment.is_text:
    where = pathlib.Path(experiment.dataset).stem
  elif experiment.dataset:
    where = offline.opened(experiment.dataset).about.name
  # A data set may be called anything.
  where = re.sub(r'[^\w.,+=@()-]', '-', where)[:80]
  return f'runs/{experiment.name}_{where}_s{experiment.seed}'


_OLDEST_JAX = (0, 10)


def _check_jax() -> None:
  import jax

  if jax.__version_info__ < _OLDEST_JAX:
    raise configs.UserError(
      f'jax={jax.__version__}: must be {".".join(map(str, _OLDEST_JAX))} or '
      'newer: pip install -c constraints.txt -e .'
    )
  try:
    jax.devices()
  except RuntimeError as error:
    asked = os.environ.get('JAX_PLATFORMS', '')
    raise configs.UserError(
      f'JAX_PLATFORMS={asked}: {error}; take JAX_PLATFORMS=cpu, or install '
      'what these devices need'
    ) from error


def use_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache folder, if none is set.

  Raises:
    UserError: JAX is too old, or has not the devices that it was asked for.
  """
  import jax

  _check_jax()
  # Compiling takes most of a short run; the next one finds it done.
  folder = pathlib.Path.home() / '.cache' / 'outplay' / 'jax'
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def _check(experiment: build.Experiment, workdir: str | None) -> None:
  """Refuses what a run would, other devices and processes apart."""
  use_compilation_cache()
  if experiment.dataset:
    folder = workdir or default_workdir(experiment)
    stages.make(experiment, peek(pathlib.Path(folder)), lambda: False)
  else:
    env = build.make_env(experiment, training=True)
    build.make_agent(experiment, env.spec)
  folder = pathlib.Path(workdir or default_workdir(experiment))
  configs.check_place('workdir', folder, folder=True)
  about = experiment.as_dict()
  if experiment.dataset:
    about |= {'dataset_checksum': offline.checksum_of(experiment)}
  configs.check_run_config(folder, about, terminal.device(), configs.FREE)
  print('nothing is wrong with it')


def _plan(experiment: build.Experiment, values) -> None:
  """Prints how much memory a run needs, and refuses one that does not fit."""
  from experiments import plan
  from experiments.runtime import distributed

  flag_checks.refuse(
    ['check', 'profile', 'measure', 'tensorboard', 'wandb'], 'with --plan'
  )
  if values.target is None:
    distributed.initialize(
      values.distributed, values.num_processes, values.process_id
    )
    use_compilation_cache()
    folder = pathlib.Path(values.workdir or default_workdir(experiment))
    plans = plan.here(experiment, peek(folder).parts)
  else:
    flag_checks.refuse(
      ['workdir', 'distributed', 'num_processes', 'process_id'],
      'with --target',
    )
    flags = ('agent', 'env', 'steps', 'seed')
    about = {name: getattr(values, name) for name in flags} | {
      'preset_name': values.preset,
      'settings': values.set,
      'dataset': text_or_dataset(values),
    }
    plans = plan.elsewhere(experiment, values.target, about)
  if distributed.is_main():
    plan.show(plans)
  plan.check(plans)
  if distributed.is_main():
    print('it fits')


def _show(experiment: build.Experiment) -> None:
  rows = []

  def add(prefix, config):
    docs = {field.name: field for field in configs.describe(config)}
    for field in dataclasses.fields(config):
      value = getattr(config, field.name)
      if dataclasses.is_dataclass(value):
        add(f'{prefix}{field.name}.', value)
      else:
        doc = docs[field.name].doc or ''
        rows.append((prefix + field.name, str(value), doc))

  add('', experiment.config)
  add('env.', experiment.env)
  add('run.', experiment.run)
  title = f'{experiment.name}: --set=FIELD=VALUE'
  terminal.print_table(('field', 'value', 'meaning'), rows, title, left=3)


def _announce(experiment, trainer, workdir) -> None:
  import jax

  from experiments.runtime import distributed

  layout, agent = trainer.layout, trainer.stages[-1].agent
  state = jax.eval_shape(agent.init, jax.random.key(0))
  spec = trainer.spec
  seen = _seen(spec)
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
  where = experiment.env_name or 'no environment: nothing is played'
  seen, network = f'{where}: {seen}, {spec.action}', ()
  if experiment.is_text:
    seen, *network = text.told(experiment, text.opened(experiment))
  elif experiment.dataset:
    terminal.say(offline.told(offline.opened(experiment.dataset)))
    for note in offline.notes(experiment):
      terminal.say(note)
  if experiment.dataset:
    parts = [f'{s.name} to {s.end or 0:,}' for s in trainer.stages]
    length = f'{experiment.updates:,} updates ({", ".join(parts)})'
    shares, first = '', 'compiling: the first numbers take a while'
  terminal.say(
    f'{experiment.agent_name} on {seen}',
    *network,
    f'{terminal.parameters(state.params)}, {length} of '
    f'{experiment.run.batch_size} rows, seed {experiment.seed}',
    f'{terminal.device()}, '
    f'{processes} process{"es" if processes > 1 else ""}: {deal}, '
    f'{layout.parts} part{"s" if layout.parts > 1 else ""}{shares}',
    f'folder: {workdir}',
    first,
  )


def _seen(spec) -> str:
  """What the agent observes; of an image, which axis has its channels."""
  shape = getattr(spec.observation, 'shape', spec.observation)
  if len(shape) != 3:
    return f'observations {shape}'
  height, width, channels = shape
  return f'images of {height} x {width} with {channels} channels'


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
  from experiments import plan
  from experiments.runtime import distributed, signals

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
  plays = experiment.run.final_episodes and experiment.env_name
  if trained.ended and (plays or experiment.is_text):
    # Reading is done together, too; playing is not.
    names = [n for n in ('early', 'final') if (workdir / n).is_dir()]
    players = play.load_params(str(workdir), agent, names)
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
  if players is not None and experiment.is_text:
    text.finish(experiment, agent, workdir, players)
  elif players is not None:
    finish(experiment, agent, workdir, players)


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
  about = 'about ' if experiment.ends_by_decisions else ''
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
    about = experiment.as_dict()
    if experiment.dataset:
      about |= {'dataset_checksum': offline.checksum_of(experiment)}
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
    play.save_spec(workdir, trainer.spec)
    if experiment.is_text:
      text.save_vocabulary(workdir, text.opened(experiment))
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
  watcher = assess.Watcher(experiment, trainer, keeper, writer, begin, key)
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
  from experiments import plan, plan_memory
  from experiments.runtime import distributed

  if trainer.layout.mesh.devices.flat[0].platform == 'cpu':
    return
  plans = []
  for stage in trainer.stages[phase:]:
    # Simulators are not asked for what a program takes.
    on_host = not stage.source.is_pure and not experiment.dataset
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

  searches = agent.exploit is None
  about = 'without and with search' if searches else ''
  print(f'playing the trained network {about}'.rstrip(), flush=True)
  env = build.make_env(
    experiment, training=False, num_envs=min(settings.final_episodes, 50)
  )
  rows = play.evaluate(
    experiment,
    env,
    agent,
    players,
    simulations=(0, *settings.final_simulations) if searches else (0,),
    episodes=settings.final_episodes,
    seed=experiment.seed,
  )
  play.print_rows(rows)
  play.write_rows(workdir / 'evaluation.csv', rows)
  files, budgets = 'evaluation.csv', ''
  if searches:
    plots.budget_figure(workdir / 'evaluation.csv', workdir / 'evaluation.png')
    files, budgets = 'evaluation.csv, evaluation.png', ' --simulations=0,32'
  if experiment.dataset:
    terminal.say(offline.scored(experiment.dataset, rows[-1].return_mean))
  terminal.end(
    f'{workdir}/{files}, metrics.csv',
    play.command(workdir, experiment) + budgets,
    f'python -m experiments.plots --workdirs={workdir} --out=curve.png',
  )


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
