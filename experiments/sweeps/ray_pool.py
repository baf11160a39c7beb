"""Rows of a sweep on a Ray cluster, on machines that were checked before.

A machine takes rows if it has the suite with the same source, Python and
packages, and sees the sweep's folder. Which row goes where is decided here, so
that a row that failed on one machine is tried on another.
"""

import hashlib
import importlib
import json
import logging
import os
import pathlib
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.files import writing
from experiments.files.errors import UserError, shown
from experiments.report import terminal
from experiments.runtime import run_config, signals
from experiments.sweeps.pool import Ended, Limits, Pool
from experiments.sweeps.rows import Job

_ANSWERS_WITHIN = 20.0
# Other releases have no such client: then Ray itself reports it.
_ASK = """
import sys
try:
  from ray._raylet import GcsClient
except ImportError:
  sys.exit(0)
GcsClient(address=sys.argv[1])
"""
# A machine's first task may wait until its workers have started.
_PROBE_WITHIN = 120.0
# Between looks at which machines there are.
_LOOKS_EVERY = 10.0


class Node(NamedTuple):
  """A machine of a cluster.

  Attributes:
    name: host name and the start of its number.
    id: Ray's.
    room: rows that fit.
  """

  name: str
  id: str
  room: int


def check_address(address: str | None) -> None:
  """Checks that a cluster answers at HOST:PORT or ray://HOST:PORT within 20 s.

  Ray itself looks for None, `auto` and `local`, which takes no time.

  Raises:
    UserError: it does not.
  """
  if address in (None, '', 'auto', 'local'):
    return
  assert address is not None
  host, _, port = address.removeprefix('ray://').rpartition(':')
  field = f'ray_address={address}'
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(f'{field}: must be HOST:PORT, auto or local')
  try:
    socket.create_connection((host, int(port)), _ANSWERS_WITHIN).close()
  except OSError as error:
    raise UserError(
      f'{field}: no answer ({error.strerror or error}); is the cluster up, and '
      'its port open to this machine?'
    ) from error
  if address.startswith('ray://'):
    return
  # In a process that can be ended: Ray itself tries for a quarter of an hour.
  try:
    done = subprocess.run(
      [sys.executable, '-c', _ASK, address],
      capture_output=True,
      timeout=_ANSWERS_WITHIN,
    )
  except subprocess.TimeoutExpired as error:
    raise UserError(
      f'{field}: no answer within {_ANSWERS_WITHIN:g} s; is it the port of the '
      "cluster's head?"
    ) from error
  if done.returncode == 1:
    raise UserError(
      f'{field}: what answers there is not the head of a Ray cluster'
    )


def fingerprint() -> dict[str, str]:
  """What must be equal wherever rows of one sweep run."""
  root = pathlib.Path(__file__).resolve().parents[2]
  digest = hashlib.sha256()
  for room in ('agents', 'experiments', 'networks', 'search'):
    for path in sorted((root / room).rglob('*.py')):
      digest.update(str(path.relative_to(root)).encode() + b'\0')
      digest.update(path.read_bytes())
  versions = run_config.made_with('')['versions']
  return {**versions, 'source of the suite': digest.hexdigest()[:12]}


def differences(here: dict[str, str], there: dict[str, str] | str) -> str:
  """Why a machine takes no rows; '' if it may.

  Args:
    here: `fingerprint` of the driver, and `folder`.
    there: the machine's, or what went wrong on it.
  """
  if isinstance(there, str):
    return there
  found = [
    f'{name} is {there.get(name, "missing")} there, {here[name]} here'
    for name in here
    if name != 'folder' and there.get(name) != here[name]
  ]
  if there.get('folder') != here['folder']:
    found.insert(0, 'it does not see the folder of --workdir')
  return '; '.join(found)


def _make_probe() -> Callable:
  """What a machine runs; within a function, so that Ray sends its text."""

  def probe(token: str, folder: str) -> str:
    import json
    import os
    import subprocess
    import sys

    if os.path.isdir(folder):
      os.chdir(folder)
    code = (
      'import json, sys\n'
      'from experiments.sweeps import ray_pool\n'
      'print(json.dumps(ray_pool.fingerprint()))\n'
    )
    try:
      import experiments.sweeps.pool  # noqa: F401  (a worker needs it, too)
    except Exception as error:
      return json.dumps(f'the suite is not installed: {error}')
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True
    )
    if done.returncode:
      said = (done.stderr.strip() or 'no word').splitlines()[-1]
      return json.dumps(f'the suite does not start: {said}')
    found = json.loads(done.stdout.splitlines()[-1])
    try:
      with open(token, encoding='ascii') as file:
        found['folder'] = file.read()
    except OSError:
      found['folder'] = 'not seen'
    return json.dumps(found)

  return probe


def _attend_there(
  arguments: tuple[str, ...], log: str, stop: str, limits: Limits, folder: str
) -> Ended:
  """`pool.attend` on the machine that this is called on."""
  from experiments.sweeps import pool as sweep_pool

  options = {'cwd': folder} if os.path.isdir(folder) else {}
  command = [sys.executable, '-m', 'experiments.train', *arguments]
  return sweep_pool.attend(command, log, stop, limits, **options)


def room_for(
  resources: dict[str, float], cpus: float, gpus: float, memory: float
) -> int:
  """Rows that a machine has room for.

  `resources` has `CPU`, `GPU` and `memory`; memory is in bytes.
  """
  wanted = {'CPU': cpus, 'GPU': gpus, 'memory': memory}
  rooms = [
    int(resources.get(name, 0.0) / amount)
    for name, amount in wanted.items()
    if amount
  ]
  return min(rooms, default=int(resources.get('CPU', 0.0)))


class Cluster:
  """The machines of a Ray cluster; rows go to those that pass the check."""

  def __init__(self, ray, workdir, cpus, gpus, limits):
    self._ray = ray
    self._exceptions = importlib.import_module('ray.exceptions')
    self._affinity = importlib.import_module(
      'ray.util.scheduling_strategies'
    ).NodeAffinitySchedulingStrategy
    self._limits = limits
    self._workdir = workdir
    memory = (limits.gigabytes or 0.0) * 1e9
    self._wanted = (cpus, gpus, memory)
    self._placed = {
      'num_cpus': cpus,
      'num_gpus': gpus,
      'memory': memory or None,
    }
    self.nodes: dict[str, Node] = {}
    self._odd: set[str] = set()
    self._running: dict[Any, tuple[Job, str, float]] = {}
    self._looked = -_LOOKS_EVERY
    self._folder = os.getcwd()

  def _alive(self) -> list[Node]:
    """All machines that there are now."""
    return [
      Node(
        f'{node["NodeManagerHostname"]}-{node["NodeID"][:6]}',
        node['NodeID'],
        room_for(node['Resources'], *self._wanted),
      )
      for node in self._ray.nodes()
      if node['Alive']
    ]

  def check_room(self) -> None:
    """Refuses rows that no machine has room for.

    Raises:
      UserError: none has.
    """
    alive = self._alive()
    if any(node.room for node in alive):
      return
    cpus, gpus, memory = self._wanted
    said = {'row_cpus': cpus, 'row_gpus': gpus, 'row_gb': memory / 1e9}
    asked = ', '.join(f'{name}={x:g}' for name, x in said.items() if x)
    have = ['CPU', 'GPU'] + ['memory'] * bool(memory)
    largest = ', '.join(
      f'{max(n["Resources"].get(x, 0.0) for n in self._ray.nodes()):g} {x}'
      for x in have
    )
    raise UserError(
      f'{asked}: no machine of the {len(alive)} has as much; the most that any '
      f'has is {largest}'
    )

  def look(self) -> None:
    """Checks machines that have joined since the last look."""
    now = time.monotonic()
    if now - self._looked < _LOOKS_EVERY:
      return
    self._looked = now
    alive = self._alive()
    self.nodes = {node.name: node for node in alive if node.name in self.nodes}
    new = [
      n for n in alive if n.name not in {*self.nodes, *self._odd} and n.room
    ]
    for node, why in self._probe(new):
      if why:
        self._odd.add(node.name)
        terminal.say(f'note: {node.name} takes no rows: {shown(why)}')
      else:
        self.nodes[node.name] = node

  def _probe(self, nodes: list[Node]) -> list[tuple[Node, str]]:
    if not nodes:
      return []
    token = self._workdir / f'.seen-{secrets.token_hex(8)}'
    text = secrets.token_hex(16)
    writing.write_text(token, text)
    here = {**fingerprint(), 'folder': text}
    ray = self._ray
    try:
      probe = ray.remote(num_cpus=0, max_retries=0)(_make_probe())
      asked = [
        probe.options(
          scheduling_strategy=self._affinity(node.id, soft=False)
        ).remote(str(token), self._folder)
        for node in nodes
      ]
      ray.wait(asked, num_returns=len(asked), timeout=_PROBE_WITHIN)
      return [
        (node, differences(here, self._answer(reference)))
        for node, reference in zip(nodes, asked)
      ]
    finally:
      token.unlink(missing_ok=True)

  def _answer(self, reference: Any) -> Any:
    try:
      return json.loads(self._ray.get(reference, timeout=0.1))
    except self._exceptions.GetTimeoutError:
      self._ray.cancel(reference, force=True)
      return f'no answer within {_PROBE_WITHIN:g} s'
    except self._exceptions.RayError as error:
      return f'cannot be asked: {_first_line(error)}'

  def choose(self, avoid: frozenset[str]) -> str | None:
    """See `Pool`.

    Raises:
      UserError: no machine is left that takes rows.
    """
    self.look()
    if not self.nodes and not self._running:
      raise UserError(
        'engine=ray: no machine takes rows; the lines above say why'
      )
    used = [where for _, where, _ in self._running.values()]
    free = {
      name: node.room - used.count(name)
      for name, node in self.nodes.items()
      if name not in avoid or self.nodes.keys() <= avoid
    }
    name = max(free, key=lambda n: free[n], default=None)
    return name if name is not None and free[name] > 0 else None

  def start(self, name: str, job: Job) -> None:
    """See `Pool`."""
    task = self._ray.remote(max_calls=1, max_retries=0, **self._placed)(
      _attend_there
    )
    strategy = self._affinity(self.nodes[name].id, soft=False)
    reference = task.options(scheduling_strategy=strategy).remote(
      job.arguments, str(job.log), str(job.stop), self._limits, self._folder
    )
    self._running[reference] = job, name, time.monotonic()

  def ended(self) -> list[tuple[Job, Ended]]:
    """See `Pool`."""
    if not self._running:
      return []
    ready, _ = self._ray.wait(
      list(self._running), num_returns=len(self._running), timeout=0
    )
    found = []
    for reference in ready:
      job, name, begin = self._running.pop(reference)
      try:
        how = Ended(*self._ray.get(reference))
      except self._exceptions.RayError as error:
        seconds = time.monotonic() - begin
        how = Ended(None, seconds, _lost(error, name))
      found.append((job, how))
      self._looked = -_LOOKS_EVERY  # the machine may be gone
    return found

  def close(self) -> None:
    """See `Pool`."""
    for reference in self._running:
      self._ray.cancel(reference, force=True)
    self._ray.shutdown()

  def pool(self) -> Pool:
    """The cluster as a `Pool`."""
    return Pool(self.choose, self.start, self.ended, self.close)


def _first_line(error: BaseException) -> str:
  cause = getattr(error, 'cause', None) or error
  return f'{type(cause).__name__}: {cause}'.splitlines()[0]


def _lost(error: BaseException, name: str) -> str:
  """What Ray says of a row whose process was lost."""
  kind = type(error).__name__
  if kind in ('WorkerCrashedError', 'NodeDiedError', 'RaySystemError'):
    return f'{name} or its worker is gone (killed, or without memory)'
  if kind == 'TaskUnschedulableError':
    return f'{name} is gone'
  return f'{name}: {_first_line(error)}'


def connect(
  address: str | None,
  workdir: pathlib.Path,
  *,
  cpus: float,
  gpus: float,
  limits: Limits,
) -> Pool:
  """Connects to a cluster, whose machines are checked before their first row.

  They must share `workdir`. Ray also reserves the limits' memory. An `address`
  of None finds a running cluster or starts one here. Ray's own SIGTERM handler,
  which ends the driver with a C++ stack trace, is removed again.

  Raises:
    UserError: Ray is not installed, there is no cluster, or no machine has room
      for a row.
  """
  try:
    # By name, for a checker of types without it.
    ray = importlib.import_module('ray')
  except ImportError as error:
    raise UserError('engine=ray: needs Ray: pip install "ray>=2.50"') from error
  check_address(address)
  before = signals.handlers()
  try:
    ray.init(
      address=address or None,
      log_to_driver=False,
      logging_level=logging.WARNING,
    )
  except (ConnectionError, ValueError, RuntimeError) as error:
    raise UserError(f'ray_address={address}: {error}') from error
  finally:
    signals.take_back(before)
  try:
    cluster = Cluster(ray, workdir.resolve(), cpus, gpus, limits)
    cluster.check_room()
  except BaseException:
    ray.shutdown()
    raise
  return cluster.pool()
