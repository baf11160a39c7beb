"""What a run costs besides its updates: compilations, memory, waiting."""

import resource
import sys
from collections.abc import Callable


def compilations() -> Callable[[], int]:
  """`() -> int`, the programs that JAX compiled or loaded since the last call.

  After a run has warmed up it must be 0: more means that something is traced
  again and again.
  """
  import jax

  counted = 0

  def listen(event: str, duration_secs: float, **kwargs) -> None:
    nonlocal counted
    del duration_secs, kwargs
    counted += event == '/jax/core/compile/backend_compile_duration'

  jax.monitoring.register_event_duration_secs_listener(listen)
  reported = 0

  def since() -> int:
    nonlocal reported
    new, reported = counted - reported, counted
    return new

  return since


def peak_memory() -> dict[str, float]:
  """Peak bytes in use so far: of this process, and of its first device.

  A device that does not report it is left out (CPUs: see the process).
  """
  import jax

  # Linux counts in kilobytes, macOS in bytes.
  unit = 1 if sys.platform == 'darwin' else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  found = {'process': float(peak)}
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    found['device'] = float(stats['peak_bytes_in_use'])
  return found
