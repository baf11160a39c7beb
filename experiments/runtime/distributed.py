"""Many processes that run one program: how they meet, what they agree on.

Every process runs the same command; `initialize` connects them, and from then
on `jax.devices()` are the devices of all. Process 0 writes what people read.

Signals have one owner, `signals.graceful_exit`. jax's own preemption service is
switched off: its handler of SIGTERM is silently displaced by a later Python
handler, and swallows the signal of a process that does not yet poll. `stopping`
makes the processes agree instead.
"""

import atexit
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.files.errors import UserError, shown
from experiments.runtime import signals

VARIABLES = {
  'distributed': 'OUTPLAY_COORDINATOR',
  'num_processes': 'OUTPLAY_NUM_PROCESSES',
  'process_id': 'OUTPLAY_PROCESS_ID',
  'local_devices': 'OUTPLAY_LOCAL_DEVICES',
}
_MAX_NUMBERS = 64
_NAMES_BYTES = 4096
# Seconds of waiting for peers after which a line says so.
_SAID_AFTER = (10, 60, 120, 180, 240)
# Fields and processes that a line names.
_NAMED = 3


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  local_devices: int | None = None,
  timeout: int = 300,
) -> None:
  """Connects this process to the others, before any device is used.

  Missing arguments are read from the environment: OUTPLAY_COORDINATOR,
  OUTPLAY_NUM_PROCESSES, OUTPLAY_PROCESS_ID, OUTPLAY_LOCAL_DEVICES.

  Only a run that ends well calls `shutdown`: a process that exits without it
  has failed, and leaves at once, with code 1 or that of its refusal or signal,
  without waiting for its peers. Processes that do not find each other in time
  exit with code 2 and one line on stderr, which cannot be caught.

  Args:
    coordinator: 'none' or None, a single process unless the environment names a
      coordinator; 'auto', jax asks the TPU pod, Slurm, Kubernetes or Open MPI
      that started this process; HOST:PORT of process 0, with the next two.
    process_id: which of them this is, from 0.
    local_devices: virtual CPU devices of this process; None for jax's choice.
    timeout: seconds to wait for the others.

  Raises:
    UserError: arguments that do not fit each other, devices that are already in
      use, a port in use, or 'auto' where nothing is found.
  """
  coordinator, num_processes, process_id, local_devices = _settings(
    coordinator, num_processes, process_id, local_devices
  )
  if coordinator == 'none' and local_devices is None:
    return
  import jax

  if jax.distributed.is_initialized():
    raise UserError(f'distributed={coordinator}: already initialized')
  try:
    if local_devices is not None:
      jax.config.update('jax_num_cpu_devices', local_devices)
    if coordinator != 'none':
      jax.config.update('jax_enable_preemption_service', False)
      _connect(coordinator, num_processes, process_id, timeout)
  except RuntimeError as error:
    if type(error) is not RuntimeError or 'before' not in str(error):
      raise
    raise UserError(
      f'distributed={coordinator}, local_devices={local_devices}: jax has '
      'used its devices already; initialize before the first computation'
    ) from error


def shutdown() -> None:
  """Waits for all processes and disconnects; for the end of a good run."""
  import jax

  if jax.distributed.is_initialized():
    # jax's own wait is limited: process 0 may be at its figures for longer.
    barrier('outplay_shutdown')
    _disconnect()


def process() -> tuple[int, int]:
  """This process's number, from 0, and how many there are."""
  import jax

  return jax.process_index(), jax.process_count()


def is_main() -> bool:
  """Whether this process writes files and lines for people."""
  return process()[0] == 0


def barrier(name: str) -> None:
  """Waits until all processes have come to the same place."""
  from jax.experimental import multihost_utils

  if process()[1] > 1:
    multihost_utils.sync_global_devices(name)


_REMEDY = 'all processes must have the same flags, data and code'


def agree(given: Mapping[str, Any], remedy: str = _REMEDY) -> None:
  """Refuses to go on if the processes were given different arguments.

  All processes call it before any other collective, in which differences could
  leave one alone. `given` is all that determines the run, as nested JSON types;
  `remedy` ends the message.

  Raises:
    UserError: it is not the same everywhere; in all processes, which are
      disconnected by then, so each may end on its own.
  """
  import jax

  if process()[1] == 1:
    return
  devices = [len(jax.local_devices(p)) for p in range(jax.process_count())]
  if len({*devices}) > 1:
    _disconnect()
    each = [{'local_devices': number} for number in devices]
    raise UserError(disagreement(each, remedy))
  text = json.dumps(given, sort_keys=True).encode()
  digest = hashlib.blake2b(text, digest_size=32).digest()
  if len({*_gather(digest, 32)}) == 1:
    return
  sizes = _gather(len(text).to_bytes(8, 'big'), 8)
  longest = max(int.from_bytes(size, 'big') for size in sizes)
  rows = [row.rstrip(b'\0') for row in _gather(text, longest)]
  _disconnect()
  raise UserError(disagreement([json.loads(row) for row in rows], remedy))


def disagreement(
  given: Sequence[Mapping[str, Any]], remedy: str = _REMEDY
) -> str:
  """One line on which process was given something other than the others.

  What most have is right, or process 0 if there is no majority; the line names
  the odd ones with their fields and values.
  """
  leaves = [dict(_leaves(each)) for each in given]
  texts = [json.dumps(each, sort_keys=True) for each in leaves]
  usual = max(range(len(texts)), key=lambda i: (texts.count(texts[i]), -i))
  odd = [i for i, text in enumerate(texts) if text != texts[usual]]
  named = [
    _difference(i, leaves[i], usual, leaves[usual]) for i in odd[:_NAMED]
  ]
  if len(odd) > _NAMED:
    named.append(f'{len(odd) - _NAMED} more processes differ')
  return f'{"; ".join(named)}: {remedy}'


def _difference(
  odd: int, here: Mapping[str, Any], usual: int, there: Mapping[str, Any]
) -> str:
  pieces, absent = [], object()
  for name in sorted({*here, *there}):
    if here.get(name, absent) != there.get(name, absent):
      own, other = (
        shown(json.dumps(side[name]), 60) if name in side else 'none'
        for side in (here, there)
      )
      pieces.append(f'{name}={own} (process {usual}: {other})')
  if len(pieces) > _NAMED:
    pieces[_NAMED:] = [f'{len(pieces) - _NAMED} more']
  return f'process {odd} has {", ".join(pieces)}'


def _leaves(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  if isinstance(tree, Mapping):
    for name, value in tree.items():
      yield from _leaves(value, f'{prefix}.{name}' if prefix else name)
  else:
    yield prefix, tree


def _disconnect() -> None:
  """Leaves the others, which do so at the same place."""
  import jax

  jax.distributed.shutdown()
  atexit.unregister(_leave)


def sum_over_processes(counts: Mapping[str, float]) -> dict[str, float]:
  """Sums of up to 64 equal-named counts over all processes, in float64.

  One collective, which all processes must call at the same place.

  Raises:
    ValueError: too many counts.
    RuntimeError: the names differ; on all processes.
  """
  return _combine(counts, lambda rows: rows.sum(axis=0))


def of_main(values: Mapping[str, float]) -> dict[str, float]:
  """The numbers of process 0, on all processes; see `sum_over_processes`.

  Raises:
    ValueError: as `sum_over_processes`.
  """
  return _combine(values, lambda rows: rows[0])


def stopping(
  local: Callable[[], bool], every: int = 1
) -> Callable[[int], bool]:
  """A rule to stop on which all processes agree at the same step.

  A vote of any process, if `local()` is True, counts where all of them ask, so
  that none is left alone in a collective. A single process decides for itself
  at every step. A vote takes a collective of one number (2 ms between two
  processes of one busy machine) and waits for the updates before it; `every`
  steps make it rarer.

  Returns:
    `(step) -> bool`, which all processes must ask at the same steps. Once it is
    True it stays so.
  """
  voted, answer = None, 0

  def ask(step: int) -> bool:
    nonlocal voted, answer
    if process()[1] == 1:
      return local()
    if not answer and (voted is None or step - voted >= every):
      # Its signal, so that all end with the same code.
      own = (signals.received() or 1) if local() else 0
      voted, answer = step, max(row[0] for row in _gather(bytes([own]), 1))
      signals.note(answer)
    return answer > 0

  return ask


def _settings(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  local_devices: int | None,
) -> tuple[str, int | None, int | None, int | None]:
  """The arguments, completed from the environment and checked."""
  if coordinator in (None, '', 'none'):
    coordinator = os.environ.get(VARIABLES['distributed']) or 'none'
  num_processes = _number('num_processes', num_processes, 1)
  process_id = _number('process_id', process_id, 0)
  local_devices = _number('local_devices', local_devices, 1)
  numbers = f'num_processes={num_processes} and process_id={process_id}'
  where = f'distributed={coordinator}'
  if coordinator in ('none', 'auto'):
    if (num_processes, process_id) != (None, None):
      raise UserError(
        f'{numbers} belong to distributed=HOST:PORT, this is {where}'
      )
    return coordinator, None, None, local_devices
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(
      f'{where}: must be none, auto, or HOST:PORT with a port from 1 to 65535'
    )
  if num_processes is None or process_id is None:
    raise UserError(f'{where} needs two numbers, has {numbers}')
  if process_id >= num_processes:
    raise UserError(
      f'process_id={process_id}: must be below num_processes={num_processes}'
    )
  return coordinator, num_processes, process_id, local_devices


def _number(name: str, value: int | None, low: int) -> int | None:
  """A count that was given, or the environment's."""
  said = name
  if value is None:
    said = VARIABLES[name]
    text = os.environ.get(said, '')
    if not text:
      return None
    try:
      value = int(text)
    except ValueError:
      raise UserError(f'{said}={text}: must be a whole number') from None
  if value < low:
    raise UserError(f'{said}={value}: must be at least {low}')
  return value


def _connect(
  coordinator: str,
  num_processes: int | None,
  process_id: int | None,
  timeout: int,
) -> None:
  import jax

  arguments: dict[str, Any] = {}
  where = f'distributed={coordinator}'
  if coordinator != 'auto':
    arguments = {
      'coordinator_address': coordinator,
      'num_processes': num_processes,
      'process_id': process_id,
      # It would look for what has started us, and under Slurm hide all GPUs
      # but one.
      'cluster_detection_method': 'deactivate',
    }
    where += f', process {process_id} of {num_processes}'
    if process_id == 0:
      _check_port(coordinator)

  met = threading.Event()

  def watch() -> None:
    begin, left = time.monotonic(), list(_SAID_AFTER)
    while (spent := time.monotonic() - begin) < timeout:
      due = min(left[0] if left else timeout, timeout)
      if met.wait(max(due - spent, 0)):
        return
      if left and due < timeout:
        print(
          f'{where}: waiting for the other processes, '
          f'{left.pop(0)} of at most {timeout} s',
          file=sys.stderr,
          flush=True,
        )
    if met.is_set():
      return
    print(
      f'error: {where}: not all processes met within {timeout} s; is process 0 '
      'running, is its port open to this machine, have all been started with '
      'the same number of processes?',
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)

  # jax ends a process whose peers do not come by abort() and a stack trace of
  # C++; nothing interrupts it before.
  threading.Thread(target=watch, daemon=True).start()
  try:
    jax.distributed.initialize(
      **arguments, initialization_timeout=timeout + 3600
    )
  except ValueError as error:
    if 'should be defined' not in str(error):
      raise
    raise UserError(
      'distributed=auto: found no TPU pod, Slurm step, Kubernetes job or Open '
      'MPI run here; give HOST:PORT, num_processes and process_id'
    ) from error
  finally:
    met.set()
  atexit.register(_leave)


def _check_port(coordinator: str) -> None:
  """Refuses a port in use, on which jaxlib may crash."""
  port = int(coordinator.rpartition(':')[2])
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('', port))
    except OSError as error:
      raise UserError(
        f'distributed={coordinator}: process 0 cannot listen on port {port} '
        f'({error.strerror}); take another port'
      ) from error


def _leave() -> None:
  """Ends a process that has not called `shutdown`.

  jax's own exit handler would wait for the others while they wait in a
  collective for this one: minutes of silence, then all are aborted at once.
  """
  print(
    'error: this process ends before the run does; the others cannot continue',
    file=sys.stderr,
    flush=True,
  )
  sys.stdout.flush()
  # A refusal and a signal keep theirs.
  os._exit(signals.exit_code() or 1)


def _combine(
  numbers: Mapping[str, float], rule: Callable[[np.ndarray], np.ndarray]
) -> dict[str, float]:
  """`rule` of the named numbers of all processes, `[P, n]` to `[n]`."""
  index, count = process()
  if count == 1:
    return {name: float(value) for name, value in numbers.items()}
  if len(numbers) > _MAX_NUMBERS:
    raise ValueError(
      f'{len(numbers)} numbers, at most {_MAX_NUMBERS} can be sent'
    )
  names = sorted(numbers)
  digest = hashlib.blake2b('\0'.join(names).encode(), digest_size=8).digest()
  values = np.asarray([numbers[name] for name in names], np.float64)
  # As bytes: jax would round float64 to float32.
  rows = _gather(digest + values.tobytes(), 8 * (1 + _MAX_NUMBERS))
  if any(row[:8] != digest for row in rows):
    _explain_names(names, index)
  table = np.stack([np.frombuffer(row[8:])[: len(names)] for row in rows])
  found = dict(zip(names, rule(table).tolist()))
  return {name: found[name] for name in numbers}


def _gather(data: bytes, size: int) -> list[bytes]:
  """`data` of every process, padded to `size` bytes."""
  from jax.experimental import multihost_utils

  padded = np.frombuffer(data.ljust(size, b'\0'), np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [row.tobytes() for row in rows]


def _explain_names(names: list[str], index: int) -> None:
  """Raises: which process has other names than this one."""
  rows = _gather('\0'.join(names).encode()[:_NAMES_BYTES], _NAMES_BYTES)
  here, lines = set(names), []
  for i, row in enumerate(rows):
    there = {name for name in row.decode(errors='replace').split('\0') if name}
    if there != here:
      more, less = sorted(there - here), sorted(here - there)
      lines.append(f'process {i} has also {more} and lacks {less}')
  raise RuntimeError(
    f'names differ between processes; to process {index}: ' + '; '.join(lines)
  )
