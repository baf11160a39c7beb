"""Trains an agent: `python -m experiments.train [--preset=NAME] [...]`.

Running the same command again resumes the run in its folder.
"""

import dataclasses
import pathlib

from experiments import build, presets
from experiments.presets.settings import refuse_unused
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import devices, overrides, run_config
from experiments.runtime import flags as flag_checks
from experiments.training import run, stages
from experiments.training.keeper import peek
from experiments.training.train import Also


def define_flags() -> None:
  """The flags of `python -m experiments.train`."""
  from absl import flags

  flags.DEFINE_string(
    'preset', presets.DEFAULT, f'the preset to run:\n{presets.help_text()}\n'
  )
  flags.DEFINE_enum(
    'agent', None, presets.AGENTS, "an agent instead of the preset's"
  )
  flags.DEFINE_string(
    'env',
    None,
    "an environment instead of the preset's: an envpool name (Catch-v0, "
    'PongNoFrameskip-v4), gymnasium:NAME, jax:catch, jax:cartpole',
  )
  flags.DEFINE_string(
    'dataset',
    None,
    'a data set to learn from instead of play: a folder or file in our format, '
    "D4RL's (hdf5) or Minari's, or a D4RL or Minari name; --steps then counts "
    'updates',
  )
  flags.DEFINE_string(
    'text',
    None,
    'a text file for a language model to learn from; --steps then counts '
    'updates',
  )
  flags.DEFINE_multi_string(
    'set', [], 'FIELD=VALUE, repeatable; --show lists the fields'
  )
  flags.DEFINE_integer(
    'seed', 0, 'seed of all random numbers', 0, configs.MAX_SEED
  )
  flags.DEFINE_integer(
    'steps',
    None,
    "number of decisions to train for; the preset's if left out",
    1,
    configs.MAX_INT,
  )
  flags.DEFINE_string(
    'workdir', None, "the run's folder; runs/PRESET_ENV_sSEED if left out"
  )
  flags.DEFINE_bool(
    'show', False, 'print the settings and their meanings, and stop'
  )
  flags.DEFINE_bool(
    'check', False, 'check the settings and stop; make and train nothing'
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
    'number of updates to trace for the profiler, into WORKDIR/profile',
    0,
    1_000_000,
  )
  flags.DEFINE_bool(
    'measure',
    False,
    'evaluate the trained agent, as evaluate_every does, into measured.csv',
  )
  flags.DEFINE_bool('tensorboard', False, 'also write TensorBoard events')
  flags.DEFINE_string(
    'wandb', None, 'the Weights & Biases project to also write metrics to'
  )
  flags.DEFINE_string(
    'distributed',
    None,
    'how several processes, each started with the same command, find each '
    'other: auto (from a TPU pod, Slurm or similar), HOST:PORT of process 0, '
    'or none; experiments/recipes has examples',
  )
  flags.DEFINE_integer(
    'num_processes',
    None,
    'number of processes, with --distributed=HOST:PORT',
    1,
    1_000_000,
  )
  flags.DEFINE_integer(
    'process_id',
    None,
    "this process's number, from 0, with --distributed=HOST:PORT",
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
      on_data=not experiment.material.acts,
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
  also = Also(
    values.profile, values.tensorboard, values.wandb or '', values.measure
  )
  return run.run(experiment, workdir, also)


def _check(experiment: build.Experiment, workdir: str | None) -> None:
  """Refuses what a run would refuse, except for devices and processes."""
  devices.use_compilation_cache()
  if not experiment.material.acts:
    folder = workdir or run.default_workdir(experiment)
    stages.make(experiment, peek(pathlib.Path(folder)), lambda: False)
  else:
    env = build.make_env(experiment, training=True)
    build.make_agent(experiment, env.spec)
  folder = pathlib.Path(workdir or run.default_workdir(experiment))
  configs.check_place('workdir', folder, folder=True)
  about = experiment.as_dict() | experiment.material.fingerprint(experiment)
  run_config.check_run_config(folder, about, terminal.device(), run_config.FREE)
  print('no problem found')


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
    docs = {field.name: field for field in overrides.describe(config)}
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
