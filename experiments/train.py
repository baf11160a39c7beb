"""Trains an agent: `python -m experiments.train [--preset=NAME] [...]`.

Running the same command again resumes the run in its folder.
"""

import pathlib

from experiments import build, presets
from experiments.build.unused import refuse_unused
from experiments.runtime import config as configs
from experiments.runtime import devices
from experiments.runtime import flags as flag_checks
from experiments.training import fields, run
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
  from experiments.training import plan

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
      [experiment.config],
      on_data=not experiment.material.acts,
      is_fresh=build.is_fresh(experiment.config),
    )
    if values.show:
      flag_checks.refuse(
        ['profile', 'tensorboard', 'wandb', 'workdir', 'plan', 'target'],
        'with --show',
      )
      return fields.show(experiment)
    if values.plan:
      folder = pathlib.Path(values.workdir or run.default_workdir(experiment))
      return plan.launch(experiment, values, folder)
    flag_checks.refuse(['target'], 'without --plan')
    metrics.check_installed(values.tensorboard, values.wandb or '')
    if values.check:
      return run.check(experiment, values.workdir)
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


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
