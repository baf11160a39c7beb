"""Seeds times grid or random search: `python -m experiments.sweep`.

  python -m experiments.sweep --preset=muzero_catch --env=jax:catch --seeds=16
    --grid=learning_rate=1e-3,3e-3 --grid=num_simulations=4,8
    --workdir=sweeps/NAME
  python -m experiments.sweep --status --workdir=sweeps/NAME

On a pure-JAX environment seeds and floats are vmapped into one program, and
what changes shapes becomes another one; any other environment runs as one
process a row. The same command goes on with what is left, also with more
`--seeds`.
"""

import contextlib

from experiments import presets
from experiments.runtime import config as configs
from experiments.sweeps import run


def define_flags() -> None:
  """The flags of `python -m experiments.sweep`."""
  from absl import flags

  flags.DEFINE_string(
    'preset', presets.DEFAULT, f'what to run:\n{presets.help_text()}\n'
  )
  flags.DEFINE_enum('agent', None, presets.AGENTS, 'another agent')
  flags.DEFINE_string('env', None, 'another environment, as for train')
  flags.DEFINE_string(
    'dataset', None, 'to learn from instead of from play, as for train'
  )
  flags.DEFINE_string('text', None, 'to learn from, as for train')
  flags.DEFINE_multi_string('set', [], 'field=value of every row, repeatable')
  flags.DEFINE_integer(
    'steps', None, 'decisions; the preset has its own', 1, configs.MAX_INT
  )
  flags.DEFINE_integer('seeds', 4, 'of every setting: 0, 1, ...', 1, 100_000)
  flags.DEFINE_multi_string(
    'grid',
    [],
    'field=value,value; repeated ones are multiplied; semicolons where a '
    'value has commas',
  )
  flags.DEFINE_multi_string(
    'random',
    [],
    'field=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:A:B; '
    'repeated ones are drawn together',
  )
  flags.DEFINE_integer('samples', 0, 'settings drawn from --random', 0, 10_000)
  flags.DEFINE_integer('sweep_seed', 0, 'of that drawing', 0, configs.MAX_SEED)
  flags.DEFINE_string('workdir', None, "the sweep's folder", required=True)
  flags.DEFINE_string(
    'metric',
    None,
    'a column of curves.csv, higher is better; if left out eval_return, or '
    'held_log_likelihood of a text',
  )
  flags.DEFINE_enum(
    'engine',
    'auto',
    ['auto', 'vmap', 'processes', 'ray'],
    'auto is vmap on a pure-JAX environment or a data set, else processes',
  )
  flags.DEFINE_integer('max_rows', 64, 'rows in one program', 1, 1_000_000)
  flags.DEFINE_float(
    'checkpoint_minutes',
    5.0,
    'between checkpoints of a program',
    0.0,
    1_000_000,
  )
  flags.DEFINE_integer('at_once', 2, 'processes at the same time', 1, 1024)
  flags.DEFINE_integer(
    'retries', 2, 'of a row whose process died', 0, 1_000_000
  )
  flags.DEFINE_string(
    'ray_address', None, "a cluster's; a running or a new local one if left out"
  )
  flags.DEFINE_float('row_cpus', 1.0, 'that a row takes on Ray', 0.0, 1_000_000)
  flags.DEFINE_float('row_gpus', 0.0, 'that a row takes on Ray', 0.0, 1_000_000)
  flags.DEFINE_float(
    'row_minutes',
    None,
    'after which a process of a row is ended',
    0.001,
    1_000_000,
  )
  flags.DEFINE_float(
    'row_gb',
    None,
    'of memory at which a process of a row is ended',
    0.001,
    1_000_000,
  )
  flags.DEFINE_integer(
    'halving',
    0,
    'end poor rows early: one of so many goes on at every rung; 0 for none',
    0,
    1_000,
  )
  flags.DEFINE_integer(
    'halving_first',
    None,
    'updates of the first rung; left out, those of a row by halving squared',
    1,
    configs.MAX_INT,
  )
  flags.DEFINE_string(
    'share', None, 'I/N: every Nth row from the Ith on, for N such commands'
  )
  flags.DEFINE_bool(
    'check', False, 'refuse what is wrong, make and train nothing, and stop'
  )
  flags.DEFINE_bool('status', False, 'print what --workdir is doing; stop')


def main() -> None:
  """Sweeps as the flags say.

  Raises:
    UserError: what the flags ask for cannot be done.
    SystemExit: with 1, where rows failed.
  """
  with contextlib.ExitStack() as held:
    run.run(held)


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
