"""Several processes of one program on this machine, watched by a parent.

`python -m experiments.launch --processes=2 -- python -m experiments.train ...`

Every line of a process is printed behind its number. When one fails, the
others are stopped, and the one that failed first is named. A refusal (exit
code 2) and a stop (130, 143) are not tried again. Running the same command
again resumes, as it does for one process.
"""

import sys
from collections.abc import Sequence

from experiments.runtime import config as configs
from experiments.runtime import processes as supervision
from experiments.runtime import signals


def define_flags() -> None:
  """The flags of `python -m experiments.launch`."""
  from absl import flags

  flags.DEFINE_integer('processes', 2, 'how many', 1, 1_024)
  flags.DEFINE_integer(
    'devices_per_process',
    None,
    'virtual devices on the CPU; on GPUs how many each process sees; all if '
    'left out',
    1,
    1_024,
  )
  flags.DEFINE_integer(
    'restarts',
    0,
    'how often a failed run is started again; one that was refused (exit code '
    '2) or stopped (130, 143) is not',
    0,
    1_000_000,
  )
  flags.DEFINE_float(
    'grace',
    10,
    'seconds from SIGTERM to SIGKILL once a process has failed',
    0,
    1_000_000,
  )


def main(command: Sequence[str]) -> None:
  """Runs a command as the flags say; exits with the first failure's code.

  Raises:
    SystemExit: with the first failure's code, where a process failed.
  """
  from absl import flags

  values = flags.FLAGS
  command = supervision.resolve(command)
  supervision.say(
    f'{values.processes} processes; lines of process i begin with [i]'
  )
  for left in range(values.restarts, -1, -1):
    outcome = supervision.supervise(
      command,
      supervision.environments(values.processes, values.devices_per_process),
      values.grace,
    )
    if outcome.first is None:
      return
    stopped = signals.is_stop(outcome.first.returncode)
    what = 'stopped' if stopped else 'failed'
    supervision.say(
      f'{outcome.first}; it was the first of {values.processes} that {what}'
    )
    if outcome.signal is not None or outcome.first.is_final() or not left:
      raise SystemExit(outcome.first.status())
    supervision.say(f'starting again, {left - 1} restarts left')


if __name__ == '__main__':
  split = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
  sys.argv, rest = sys.argv[:split], sys.argv[split + 1 :]
  define_flags()
  configs.run_main(lambda: main(rest))
