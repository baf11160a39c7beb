"""Runs several processes of one program on this machine and supervises them.

`python -m experiments.launch --processes=2 -- python -m experiments.train ...`

Every printed line begins with the number of its process. When a process fails,
the others are stopped, and the one that failed first is named. A run that
was refused (exit code 2) or stopped (130, 143) is not restarted. Running the
same command again resumes the run.
"""

import sys
from collections.abc import Sequence

from experiments.runtime import config as configs
from experiments.runtime import processes as supervision
from experiments.runtime import signals


def define_flags() -> None:
  """The flags of `python -m experiments.launch`."""
  from absl import flags

  flags.DEFINE_integer('processes', 2, 'number of processes to start', 1, 1_024)
  flags.DEFINE_integer(
    'devices_per_process',
    None,
    'number of devices of each process: virtual ones on the CPU, else GPUs; '
    'if left out, each process sees all devices',
    1,
    1_024,
  )
  flags.DEFINE_integer(
    'restarts',
    0,
    'number of times that a failed run is started again, unless it was '
    'refused (exit code 2) or stopped (130, 143)',
    0,
    1_000_000,
  )
  flags.DEFINE_float(
    'grace',
    10,
    'seconds between SIGTERM and SIGKILL for the others when a process fails',
    0,
    1_000_000,
  )


def main(command: Sequence[str]) -> None:
  """Runs a command as the flags say.

  Raises:
    SystemExit: a process failed; the code is that of the first failure.
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
