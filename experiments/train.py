"""Trains everything: `python -m experiments.train [--preset=NAME] [...]`.

Running the same command again resumes the run in its folder.
"""

import dataclasses
import pathlib

from experiments import build, presets
from experiments.build import dataset
from experiments.presets.settings import refuse_unused
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import devices
from experiments.runtime import flags as flag_checks
from experiments.training import run, stages
from experiments.training.keeper import peek


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
      dataset=build.text_or_dataset(values),
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
    devices.use_compilation_cache()
    workdir = pathlib.Path(values.workdir or run.default_workdir(experiment))
    configs.check_place('workdir', workdir, folder=True)
  return run.run(
    experiment,
    workdir,
    profile=values.profile,
    tensorboard=values.tensorboard,
    wandb=values.wandb or '',
    measure=values.measure,
  )


def _check(experiment: build.Experiment, workdir: str | None) -> None:
  """Refuses what a run would, other devices and processes apart."""
  devices.use_compilation_cache()
  if experiment.dataset:
    folder = workdir or run.default_workdir(experiment)
    stages.make(experiment, peek(pathlib.Path(folder)), lambda: False)
  else:
    env = build.make_env(experiment, training=True)
    build.make_agent(experiment, env.spec)
  folder = pathlib.Path(workdir or run.default_workdir(experiment))
  configs.check_place('workdir', folder, folder=True)
  about = experiment.as_dict()
  if experiment.dataset:
    about |= {'dataset_checksum': dataset.checksum_of(experiment)}
  configs.check_run_config(folder, about, terminal.device(), configs.FREE)
  print('nothing is wrong with it')


def _plan(experiment: build.Experiment, values) -> None:
  """Prints how much memory a run needs, and refuses one that does not fit."""
  from experiments.runtime import distributed
  from experiments.training import plan

  flag_checks.refuse(
    ['check', 'profile', 'measure', 'tensorboard', 'wandb'], 'with --plan'
  )
  if values.target is None:
    distributed.initialize(
      values.distributed, values.num_processes, values.process_id
    )
    devices.use_compilation_cache()
    folder = pathlib.Path(values.workdir or run.default_workdir(experiment))
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
      'dataset': build.text_or_dataset(values),
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


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
