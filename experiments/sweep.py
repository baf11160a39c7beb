"""Runs a grid or random search over several seeds.

  python -m experiments.sweep --preset=muzero_catch --env=jax:catch --seeds=16
    --grid=learning_rate=1e-3,3e-3 --grid=num_simulations=4,8
    --workdir=sweeps/NAME
  python -m experiments.sweep --status --workdir=sweeps/NAME

On a pure-JAX environment, seeds and floats are vmapped into one program, and
each setting that changes shapes gets a program of its own. On any other
environment each row is a process. Running the same command again continues
with the unfinished rows; `--seeds` may be larger than before.
"""

import contextlib

from experiments import presets
from experiments.runtime import config as configs
from experiments.sweeps import run


def define_flags() -> None:
  """The flags of `python -m experiments.sweep`."""
  from absl import flags

  flags.DEFINE_string(
    'preset', presets.DEFAULT, f'the preset to run:\n{presets.help_text()}\n'
  )
  flags.DEFINE_enum(
    'agent', None, presets.AGENTS, "an agent instead of the preset's"
  )
  flags.DEFINE_string(
    'env', None, "an environment instead of the preset's, as for train"
  )
  flags.DEFINE_string(
    'dataset', None, 'a data set to learn from instead of play, as for train'
  )
  flags.DEFINE_string(
    'text', None, 'a text file for a language model to learn from'
  )
  flags.DEFINE_multi_string('set', [], 'FIELD=VALUE of all rows, repeatable')
  flags.DEFINE_integer(
    'steps',
    None,
    "number of decisions of each row; the preset's if left out",
    1,
    configs.MAX_INT,
  )
  flags.DEFINE_integer(
    'seeds', 4, 'number of seeds of each setting: 0, 1, ...', 1, 100_000
  )
  flags.DEFINE_multi_string(
    'grid',
    [],
    'FIELD=VALUE,VALUE to search over, repeatable: the sweep runs all '
    'combinations; separate values by semicolons if they contain commas',
  )
  flags.DEFINE_multi_string(
    'random',
    [],
    'FIELD=DISTRIBUTION to draw from, repeatable: log:LOW:HIGH, '
    'uniform:LOW:HIGH, int:LOW:HIGH or choice:A:B',
  )
  flags.DEFINE_integer(
    'samples', 0, 'number of settings drawn from --random', 0, 10_000
  )
  flags.DEFINE_integer(
    'sweep_seed', 0, 'seed of the draws of --random', 0, configs.MAX_SEED
  )
  flags.DEFINE_string('workdir', None, "the sweep's folder", required=True)
  flags.DEFINE_string(
    'metric',
    None,
    'the column of curves.csv to rank settings by, where higher is better; if '
    'left out, eval_return, or held_log_likelihood for a text',
  )
  flags.DEFINE_enum(
    'engine',
    'auto',
    ['auto', 'vmap', 'processes', 'ray'],
    'how rows are run; auto is vmap on a pure-JAX environment or a data set, '
    'else processes',
  )
  flags.DEFINE_integer(
    'max_rows', 64, 'the most rows that one program runs', 1, 1_000_000
  )
  flags.DEFINE_float(
    'checkpoint_minutes',
    5.0,
    'minutes between checkpoints of a program',
    0.0,
    1_000_000,
  )
  flags.DEFINE_integer(
    'at_once', 2, 'number of processes that run at once', 1, 1024
  )
  flags.DEFINE_integer(
    'retries',
    2,
    'number of times that a row whose process died is started again',
    0,
    1_000_000,
  )
  flags.DEFINE_string(
    'ray_address',
    None,
    'the address of a Ray cluster; if left out, a running local cluster or a '
    'new one',
  )
  flags.DEFINE_float(
    'row_cpus', 1.0, 'number of CPUs that a row takes on Ray', 0.0, 1_000_000
  )
  flags.DEFINE_float(
    'row_gpus', 0.0, 'number of GPUs that a row takes on Ray', 0.0, 1_000_000
  )
  flags.DEFINE_float(
    'row_minutes',
    None,
    "minutes after which a row's process is stopped; no limit if left out",
    0.001,
    1_000_000,
  )
  flags.DEFINE_float(
    'row_gb',
    None,
    "GB of memory at which a row's process is stopped; no limit if left out",
    0.001,
    1_000_000,
  )
  flags.DEFINE_integer(
    'halving',
    0,
    'factor of successive halving: one row in this many continues at each '
    'rung, and the others stop early; 0 to run all rows to the end',
    0,
    1_000,
  )
  flags.DEFINE_integer(
    'halving_first',
    None,
    "number of updates up to the first rung; a row's updates divided by the "
    'square of --halving if left out',
    1,
    configs.MAX_INT,
  )
  flags.DEFINE_string(
    'share',
    None,
    'I/N: run every Nth row beginning with the Ith, where N commands share '
    'a sweep',
  )
  flags.DEFINE_bool(
    'check', False, 'check the settings and stop; make and train nothing'
  )
  flags.DEFINE_bool('status', False, 'print the progress of --workdir and stop')


def main() -> None:
  """Sweeps as the flags say.

  Raises:
    UserError: a flag is wrong, or flags contradict each other.
    SystemExit: rows failed; the code is 1.
  """
  with contextlib.ExitStack() as held:
    run.run(held)


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
