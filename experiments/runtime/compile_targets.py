"""Machines that programs are compiled for, which need not be there.

The compilers for TPU and CUDA come with wheels of jax's extras. Each has a
folder of its own outside the environment, for one process cannot have both:

    'h100'          one NVIDIA H100 with 80 GB
    'h100:8'        eight in one machine
    'v5e:4x4'       a slice of TPU v5e; also v5p, v6e, with their topologies
    'cpu'           this machine
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.files.errors import UserError

_GIB = 2**30
# Memory of a chip as its makers give it.
_TPU_MEMORY = {'v5e': 16 * _GIB, 'v5p': 95 * _GIB, 'v6e': 32 * _GIB}
_EXTRAS = {'tpu': 'tpu', 'cuda': 'cuda13'}

# Figures of the card, from NVIDIA's data sheet and the CUDA programming guide.
_H100 = {
  'threads_per_block_limit': 1024,
  'threads_per_warp': 32,
  'shared_memory_per_block': 49152,
  'shared_memory_per_core': 233472,
  'threads_per_core_limit': 2048,
  'core_count': 132,
  'fpus_per_core': 128,
  'block_dim_limit_x': 2147483647,
  'block_dim_limit_y': 65535,
  'block_dim_limit_z': 65535,
  'memory_bandwidth': 3352320000000,
  'l2_cache_size': 52428800,
  'clock_rate_ghz': 1.98,
  'device_memory_size': 84942979072,
  'shared_memory_per_block_optin': 232448,
  'registers_per_core_limit': 65536,
  'registers_per_block_limit': 65536,
}
_H100_NAME = 'NVIDIA H100 80GB HBM3'


class Target(NamedTuple):
  """A machine: platform `tpu`, `cuda` or `cpu`, number of devices.

  `topology` is the compiler's; `memory` is bytes of each device, 0 if unknown.
  """

  name: str
  platform: str
  topology: str
  devices: int
  memory: int


def parse(name: str) -> Target:
  """The machine of a name.

  Raises:
    UserError: an unknown name.
  """
  kind, _, shape = name.partition(':')
  if name == 'cpu':
    return Target(name, 'cpu', '', 1, 0)
  if kind == 'h100' and re.fullmatch(r'|[1-8]', shape):
    number = int(shape or 1)
    memory = int(_H100['device_memory_size'])
    return Target(name, 'cuda', f'1x1x{number}', number, memory)
  dimensions = 3 if kind == 'v5p' else 2
  if kind in _TPU_MEMORY and re.fullmatch(r'[1-9]\d?(x[1-9]\d?)*', shape):
    sizes = [int(n) for n in shape.split('x')]
    number = 1
    for size in sizes:
      number *= size
    if len(sizes) == dimensions:
      return Target(name, 'tpu', name, number, _TPU_MEMORY[kind])
  raise UserError(
    f'target={name}: must be h100, h100:8, v5e:4x4, v6e:2x2, v5p:2x2x1 or '
    'other sizes of these, or cpu'
  )


def usable(target: Target) -> int:
  """Bytes of a device that jax takes; 0 if unknown."""
  if target.platform != 'cuda':
    return target.memory
  # What jax reserves of a card unless it is asked for another share.
  share = os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '')
  with contextlib.suppress(ValueError):
    return int(float(share) * target.memory)
  return int(0.75 * target.memory)


def requirements(platform: str) -> list[str]:
  """The wheels of a platform's compiler for this jax that are missing."""
  wanted = []
  for text in importlib.metadata.requires('jax') or ():
    need, _, marker = (part.strip() for part in text.partition(';'))
    if marker != f'extra == "{_EXTRAS[platform]}"':
      continue
    name = re.match(r'[\w.-]+', need)
    assert name is not None
    try:
      importlib.metadata.version(name[0])
    except importlib.metadata.PackageNotFoundError:
      wanted.append(need)
  return wanted


def prepare(platform: str, folder: pathlib.Path) -> pathlib.Path | None:
  """Installs a platform's compiler outside the environment, once.

  Returns a folder, in `folder`, that must be on the path of a process that
  compiles, or None.

  Raises:
    UserError: the wheels cannot be installed.
  """
  if platform == 'cpu' or not (wanted := requirements(platform)):
    return None
  # Another version of jax has another compiler.
  place = folder / f'{platform}-jax-{importlib.metadata.version("jax")}'
  done = place / 'installed.txt'
  if done.is_file() and done.read_text() == '\n'.join(wanted):
    return place
  command = [sys.executable, '-m', 'pip', 'install', '-q', '--target', place]
  if importlib.util.find_spec('uv') is not None:
    command[2:4] = ['uv', 'pip', 'install']
  print(f'installing the compiler for {platform} into {place}', flush=True)
  ran = subprocess.run(
    [*map(str, command), '--upgrade', *wanted],
    capture_output=True,
    text=True,
    check=False,
  )
  if ran.returncode:
    last = (ran.stderr.strip().splitlines() or ['no message'])[-1]
    raise UserError(
      f'target: the compiler for {platform} cannot be installed: {last}; it '
      f'needs {" ".join(wanted)}'
    )
  done.write_text('\n'.join(wanted))
  return place


def environment(target: Target, place: pathlib.Path | None) -> dict[str, str]:
  """Variables of a process that compiles for a target; see `prepare`."""
  own = dict(os.environ) | {'JAX_PLATFORMS': 'cpu'}
  path = [os.getcwd(), *filter(None, own.get('PYTHONPATH', '').split(':'))]
  if place is not None:
    path.append(str(place))
  own['PYTHONPATH'] = ':'.join(path)
  if target.platform == 'tpu':
    # Without these libtpu looks for a TPU machine's metadata for minutes.
    own.setdefault('TPU_SKIP_MDS_QUERY', '1')
    own.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
    own.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    # It holds no chip; several may compile at once.
    own.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  return own


def ask(
  module: str, target: Target, folder: pathlib.Path, asked: dict[str, Any]
) -> Iterator[dict[str, Any]]:
  """What a module answers in a process that can compile for a target.

  `python -m MODULE` reads one JSON object, `asked`, and prints one a line; the
  target's compiler is installed first, see `prepare`.

  Raises:
    UserError: the compiler cannot be installed, or the process fails.
  """
  place = prepare(target.platform, folder)
  with (
    tempfile.TemporaryFile('w+') as stderr,
    subprocess.Popen(
      [sys.executable, '-m', module],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=stderr,
      env=environment(target, place),
      text=True,
    ) as process,
  ):
    assert process.stdin is not None and process.stdout is not None
    try:
      json.dump(asked, process.stdin)
      process.stdin.close()
      for text in process.stdout:
        if text.startswith('{'):
          yield json.loads(text)
    except BaseException:
      process.kill()
      raise
    process.wait()
    stderr.seek(0)
    last = stderr.read().strip().splitlines()[-1:] or ['no message']
  if process.returncode:
    raise UserError(
      f'target={target.name}: its compiler ended with '
      f'{process.returncode}: {last[0]}'
    )


def devices(target: Target) -> list[Any]:
  """A target's devices, which programs can be compiled for.

  Raises:
    UserError: its compiler is missing, or does not know the topology.
  """
  import jax
  from jax.experimental import topologies

  if target.platform == 'cpu':
    return jax.devices()[:1]
  options: dict[str, Any] = {'topology_name': target.topology}
  if target.platform == 'cuda':
    options = {
      'topology_name': '',
      'topology': target.topology,
      'target_config': h100(),
    }
  elif target.devices == 1:
    options['chips_per_host_bounds'] = [1] * target.topology.count('x') + [1]
    if len(options['chips_per_host_bounds']) < 3:
      options['chips_per_host_bounds'].append(1)
  try:
    found = topologies.get_topology_desc(platform=target.platform, **options)
  except Exception as error:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(f'target={target.name}: {lines[0]}') from error
  return list(found.devices)


def h100() -> str:
  """The card's description in the compiler's format."""
  figures = '\n'.join(f'  {name}: {value}' for name, value in _H100.items())
  return (
    f'gpu_device_info {{\n{figures}\n'
    '  cuda_compute_capability { major: 9 }\n}\n'
    'platform_name: "CUDA"\n'
    'dnn_version_info { major: 9 minor: 10 patch: 0 }\n'
    f'device_description_str: "{_H100_NAME}"\n'
  )
