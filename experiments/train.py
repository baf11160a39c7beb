"""Trains everything: `python -m experiments.train [--preset=NAME] [...]`.

Running the same command again resumes the run in its folder.
"""

import dataclasses
import os
import pathlib
import shutil
import time
from typing import Any

from experiments import build, play, presets
from experiments.keeper import Keeper
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


def main() -> None:
  """Trains as the flags say."""
  from absl import flags

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
    env = build.make_env(experiment, training=True)
    _use_compilation_cache()
    agent = build.make_agent(experiment, env.spec)
    _check_devices(experiment)
    workdir = pathlib.Path(values.workdir or default_workdir(experiment))
  return run(
    experiment,
    env,
    agent,
    workdir,
    profile=values.profile,
    tensorboard=values.tensorboard,
  )


def default_workdir(experiment: build.Experiment) -> str:
  """`runs/PRESET_ENV_sSEED`."""
  env = experiment.env_name.replace('/', '-').replace(':', '-')
  return f'runs/{experiment.name}_{env}_s{experiment.seed}'


def _use_compilation_cache() -> None:
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


def _check_devices(experiment: build.Experiment) -> None:
  import jax

  have = len(jax.devices())
  if experiment.run.devices > have:
    raise ValueError(
      f'devices={experiment.run.devices}: this machine has {have}'
    )


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


def _announce(experiment, env, agent, workdir) -> None:
  import jax
  import numpy as np

  state = jax.eval_shape(agent.init, jax.random.key(0))
  size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.params))
  shape = getattr(env.spec.observation, 'shape', env.spec.observation)
  print(
    f'{experiment.agent_name} on {experiment.env_name}: observations {shape}, '
    f'{env.spec.action}\n'
    f'{size:,} parameters, {experiment.steps:,} decisions, '
    f'{experiment.updates:,} updates of {experiment.run.batch_size} windows, '
    f'seed {experiment.seed}, {_device()}\n'
    f'folder: {workdir}\n'
    f'compiling, then {experiment.run.warmup_decisions:,} decisions before the '
    'first update: the first numbers take a while',
    flush=True,
  )


def run(
  experiment: build.Experiment,
  env: Any,
  agent: Any,
  workdir: pathlib.Path,
  *,
  profile: int = 0,
  tensorboard: bool = False,
) -> None:
  """Trains in a folder, from its last checkpoint if it has one.

  Args:
    experiment: from `build.describe`.
    env: from `build.make_env`.
    agent: from `build.make_agent`.
    workdir: the run's folder; its config.json is there.
    profile: updates to trace.
    tensorboard: whether to write events.
  """
  import jax

  from experiments.runtime import checkpoint, loop, mesh, metrics

  started = time.perf_counter()
  settings = experiment.run
  key = jax.random.key(experiment.seed)
  with configs.user_errors():
    device = _device()
    notes = configs.check_run_config(workdir, experiment.as_dict(), device)
    source = build.make_source(experiment, env, agent)
    _announce(experiment, env, agent, workdir)
    fresh = loop.init(agent, source, key)
  if notes is None:
    configs.write_run_config(workdir, experiment.as_dict(), device)
  for note in notes or ():
    print(f'note: {note} since this run began')
  keeper = Keeper(experiment, source, workdir, key)
  carry = keeper.restore(fresh) or fresh
  if carry is not fresh and source.close is not None:
    source.close(fresh.source)
  begin, updates = int(carry.step), experiment.updates
  if begin:
    print(f'resumed at update {begin:,} of {updates:,}', flush=True)

  writers = [metrics.csv_writer(workdir / 'metrics.csv', begin or None)]
  if tensorboard:
    writers.append(
      metrics.tensorboard_writer(workdir / 'tensorboard', begin or None)
    )
  shown = ('episode_return', 'eval_return', 'loss', 'decisions')
  writers.append(metrics.progress(updates, begin, shown))
  writer = metrics.tee(*writers)
  evaluator = _evaluator(experiment, agent)
  held_out = None
  if settings.hold_out:
    untrained = loop.init_agent(agent, key)
    held_out = _HeldOut(experiment, env, agent, untrained)
    if not begin:
      writer.write(0, held_out.losses(untrained.params))

  def log(step: int, row: dict[str, float]) -> None:
    keeper.decisions += row.get('decisions', 0.0)
    writer.write(step, row | {'decisions': keeper.decisions})

  def evaluate(step: int, agent_state) -> dict[str, float]:
    found = {}
    if settings.early_update and step == settings.early_update:
      keeper.save_early(step, agent_state)
    if held_out is not None and step % settings.hold_out_every == 0:
      found |= held_out.losses(agent_state.params)
    if settings.evaluate_every and step % settings.evaluate_every == 0:
      found |= evaluator(agent_state.params, step)
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
  update = None
  if settings.devices > 1:
    update = mesh.compile_update(
      agent, mesh.make_mesh(jax.devices()[: settings.devices])
    )
  with checkpoint.graceful_exit() as stopping:
    try:
      if profile and begin < updates:
        carry = _profiled(
          agent,
          source,
          carry,
          key,
          begin + min(profile, updates - begin),
          workdir / 'profile',
          log,
          update,
        )
      carry = loop.run(
        agent,
        source,
        carry,
        key=key,
        steps=updates,
        intervals=intervals,
        hooks=loop.Hooks(log, keeper.save, evaluate, stopping),
        update=update,
      )
    finally:
      if source.close is not None:
        source.close(carry.source)
      writer.close()
      keeper.close()
    if int(carry.step) < updates:
      print(
        f'stopped at update {int(carry.step):,} of {updates:,}; the same '
        'command goes on from here'
      )
      return
  if held_out is not None:
    held_out.compare(carry.agent, workdir / 'held_out.csv')
  seconds = time.perf_counter() - started
  print(f'trained {updates - begin:,} updates in {seconds:.0f} s')
  finish(experiment, agent, workdir)


class _HeldOut:
  """Windows that are never trained on, from the untrained network's play.

  While training their targets stay as they were recorded, so that figures of
  different times compare; what they say of policy and value is then that of
  the untrained search. At the end they are searched again by the trained
  agent, and both networks are measured by these targets.
  """

  def __init__(self, experiment: build.Experiment, env, agent, agent_state):
    import jax

    settings = dataclasses.replace(
      experiment.run, batch_size=experiment.run.hold_out, acting='synchronous'
    )
    apart = experiment._replace(run=settings)
    source = build.make_source(apart, env, agent._replace(refresh=None))
    self._key = jax.random.fold_in(jax.random.key(experiment.seed), 2**31 - 2)
    state = source.init(self._key)
    state, self._batch, _ = source.next(state, agent_state, 0, self._key)
    if source.close is not None:
      source.close(state)
    self._agent, self._untrained = agent, agent_state.params
    self._losses = jax.jit(agent.evaluate)

  def losses(self, params, batch=None) -> dict[str, float]:
    """Metrics `held_...` of parameters on the recorded or other targets."""
    batch = self._batch if batch is None else batch
    found = self._losses(params, batch, self._key)
    return {f'held_{name}': float(value) for name, value in found.items()}

  def compare(self, agent_state, path: pathlib.Path) -> None:
    """Writes the losses of both networks on the trained agent's targets."""
    import jax

    refresh = self._agent.refresh or (lambda state, batch, step, key: batch)
    batch = jax.jit(refresh)(agent_state, self._batch, 0, self._key)
    rows = {
      'untrained': self.losses(self._untrained, batch),
      'trained': self.losses(agent_state.params, batch),
    }
    names = list(rows['trained'])
    lines = [['network', *names]]
    lines += [
      [network, *(f'{row[name]:.6g}' for name in names)]
      for network, row in rows.items()
    ]
    configs.write_text(path, '\n'.join(map(','.join, lines)) + '\n')


def _common_interval(*intervals: int) -> int:
  import math

  due = [n for n in intervals if n]
  return math.gcd(*due) if due else 0


def _profiled(agent, source, carry, key, steps, folder, log, update):
  """Traces updates up to `steps`; they count as part of the run.

  Nothing is saved meanwhile, so that simulators of the host do not start
  afresh where they otherwise would.
  """
  import jax

  from experiments.runtime import loop

  shutil.rmtree(folder, ignore_errors=True)
  with jax.profiler.trace(str(folder)):
    carry = loop.run(
      agent,
      source,
      carry,
      key=key,
      steps=steps,
      intervals=loop.Intervals(log=steps),
      hooks=loop.Hooks(log=log),
      update=update,
    )
  print(f'profile: {folder}')
  return carry


def _evaluator(experiment: build.Experiment, agent):
  """`(params, step) -> metrics`: whole episodes with and without search."""
  import jax

  from agents.core import planning
  from experiments.runtime import evaluate as playing
  from search.model import Environment

  search = experiment.config.search
  players = {
    prefix: playing.player(
      planning.make_planner(config, evaluate=True), agent.model
    )
    for prefix, config in (
      ('eval', search),
      ('network', dataclasses.replace(search, num_simulations=0)),
    )
  }
  episodes = experiment.run.evaluate_episodes
  env = build.make_env(experiment, training=False, num_envs=min(episodes, 32))

  def evaluate(params, step):
    key = jax.random.fold_in(jax.random.key(experiment.seed), step)
    shared = {'key': key, 'num_episodes': episodes}
    found = {}
    for prefix, act in players.items():
      if isinstance(env, Environment):
        played = playing.on_device(env, act, params, **shared)
      else:
        played = playing.on_host(env, act, params, seed=step, **shared)
      summary = played.summary()
      found |= {
        name.replace('eval', prefix, 1): x for name, x in summary.items()
      }
    return found

  return evaluate


def finish(experiment: build.Experiment, agent, workdir: pathlib.Path) -> None:
  """Plays without search and with more and more of it; table and figure."""
  settings = experiment.run
  if not settings.final_episodes:
    return
  from experiments import plots

  print('playing the trained network without and with search', flush=True)
  env = build.make_env(
    experiment, training=False, num_envs=min(settings.final_episodes, 50)
  )
  names = [n for n in ('early', 'final') if (workdir / n).is_dir()]
  rows = play.evaluate(
    experiment,
    env,
    agent,
    play.load_params(str(workdir), agent, names),
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
