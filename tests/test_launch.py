"""Several processes for real, on loopback; the recipes with stand-ins."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from experiments.files.errors import UserError
from experiments.runtime import distributed, processes

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPES = ROOT / 'experiments' / 'recipes'
ENVIRONMENT = {
  **{
    k: v
    for k, v in os.environ.items()
    # The recipes take another interpreter by this name.
    if not k.startswith('OUTPLAY_') and k != 'PYTHON'
  },
  'JAX_PLATFORMS': 'cpu',
  'PYTHONPATH': str(ROOT),
  'PYTHONUNBUFFERED': '1',
}

# What all processes do alike: argv[1] says which end they come to.
PROGRAM = """
import os, signal, sys
import numpy as np
from experiments.runtime import config, distributed, signals

distributed.initialize(*sys.argv[2:3])
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

index, count = distributed.process()
mesh = jax.make_mesh(
  (jax.device_count(),), ('data',), axis_types=(AxisType.Auto,)
)
rows = jax.make_array_from_process_local_data(
  NamedSharding(mesh, PartitionSpec('data')),
  np.arange(2 * jax.local_device_count(), dtype=np.float32) + 100 * index,
)
total = jax.jit(
  jax.shard_map(
    lambda x: jax.lax.psum(x.sum(), 'data'),
    mesh=mesh, in_specs=PartitionSpec('data'), out_specs=PartitionSpec(),
  )
)(rows)
print('total', float(total), jax.device_count(), distributed.is_main())
end = sys.argv[1]
if end == 'raise' and index == 0:
  raise ValueError('boom')
if end == 'kill' and index == 1:
  os.kill(os.getpid(), signal.SIGKILL)
if end == 'refuse' and index == 1:
  config.fail('no')
if end == 'agree':
  # 2^53 + 1 is no float64, and 0.1 no float32.
  counts = {'b': 2.0**53 * index, 'a': 0.1 + index}
  if index:
    counts = dict(reversed(counts.items()))
  print('sums', distributed.sum_over_processes(counts))
  print('main', distributed.of_main({'a': 0.1 + index, 'b': -index}))
  try:
    distributed.sum_over_processes({'x': 1.0, f'only{index}': 1.0})
  except RuntimeError as error:
    print('error', error)
  with signals.graceful_exit() as local:
    stopping = distributed.stopping(local, every=5)
    for step in range(30, 60):
      if step == 37 and index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      if stopping(step):
        break
  print('stopped', step, stopping(step + 1))
distributed.barrier('last')
distributed.shutdown()
print('good end')
"""


@pytest.fixture
def program(tmp_path):
  path = tmp_path / 'program.py'
  path.write_text(PROGRAM)
  return str(path)


def run(command, **environment):
  return subprocess.run(
    command,
    cwd=ROOT,
    env={**ENVIRONMENT, **environment},
    capture_output=True,
    text=True,
    timeout=90,
  )


def launched(*command, flags=()):
  return [sys.executable, '-m', 'experiments.launch', *flags, '--', *command]


def start(*command, flags=()):
  return subprocess.Popen(
    launched(*command, flags=flags),
    cwd=ROOT,
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def lines_until(process, ready, number):
  """Reads lines until `number` of them contain `ready`."""
  found = []
  while sum(ready in line for line in found) < number:
    line = process.stdout.readline()
    assert line, found
    found.append(line)
  return found


# --- arguments


@pytest.mark.parametrize(
  ('arguments', 'complaint'),
  [
    (('here', 2, 0), 'distributed=here: must be none, auto, or HOST:PORT'),
    (('host:', 2, 0), 'must be none, auto, or HOST:PORT'),
    ((':80', 2, 0), 'must be none, auto, or HOST:PORT'),
    (('host:70000', 2, 0), 'port from 1 to 65535'),
    (('host:80', 2, 2), 'process_id=2: must be below num_processes=2'),
    (('host:80', 2, -1), 'process_id=-1: must be at least 0'),
    (('host:80', 0, 0), 'num_processes=0: must be at least 1'),
    (('host:80', 2, None), 'needs two numbers, has num_processes=2 and proc'),
    (('host:80', None, 1), 'num_processes=None and process_id=1'),
    (('auto', 2, None), 'belong to distributed=HOST:PORT, this is'),
    ((None, 2, 1), 'belong to distributed=HOST:PORT, this is distributed=none'),
    (('none', None, 1), 'belong to distributed=HOST:PORT'),
  ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, complaint):
  with pytest.raises(UserError, match=complaint) as caught:
    distributed.initialize(*arguments)
  assert '\n' not in str(caught.value)


def test_environment_is_read_where_an_argument_is_left_out(monkeypatch):
  monkeypatch.setenv('OUTPLAY_COORDINATOR', 'host:80')
  monkeypatch.setenv('OUTPLAY_NUM_PROCESSES', '2')
  monkeypatch.setenv('OUTPLAY_PROCESS_ID', '5')
  with pytest.raises(UserError, match='process_id=5: must be below'):
    distributed.initialize('none')
  with pytest.raises(UserError, match='process_id=7: must be below num_pr'):
    distributed.initialize(None, 6, 7)
  monkeypatch.setenv('OUTPLAY_PROCESS_ID', 'one')
  with pytest.raises(UserError, match='OUTPLAY_PROCESS_ID=one: must be a who'):
    distributed.initialize()
  monkeypatch.setenv('OUTPLAY_LOCAL_DEVICES', '0')
  with pytest.raises(UserError, match='OUTPLAY_LOCAL_DEVICES=0: must be at le'):
    distributed.initialize(None, 2, 0)


def test_devices_in_use_are_refused():
  import jax

  jax.devices()
  with pytest.raises(UserError, match='initialize before the first computat'):
    distributed.initialize('127.0.0.1:1234', 2, 0)
  with pytest.raises(UserError, match='local_devices=3: jax has used its dev'):
    distributed.initialize(local_devices=3)


def test_one_process_needs_nothing():
  distributed.initialize()
  assert distributed.process() == (0, 1)
  assert distributed.is_main()
  assert distributed.sum_over_processes({'b': 1, 'a': 0.1}) == {
    'b': 1.0,
    'a': 0.1,
  }
  assert distributed.of_main({'a': 2}) == {'a': 2.0}
  wanted = []
  stopping = distributed.stopping(lambda: bool(wanted), every=100)
  assert not stopping(0)
  wanted.append(1)
  assert stopping(1)
  distributed.barrier('alone')
  distributed.shutdown()


# --- finding each other


CONNECT = """
import sys
from experiments.runtime import config, distributed
def main():
  distributed.initialize(*json, timeout=3)
import json
json = json.loads(sys.argv.pop())
config.run_main(main)
"""


@pytest.mark.parametrize('index', [0, 1])
def test_peers_that_do_not_come_are_one_line(index):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    where = f'127.0.0.1:{probe.getsockname()[1]}'
  done = run([sys.executable, '-c', CONNECT, json.dumps([where, 2, index])])
  assert done.returncode == 2
  lines = [x for x in done.stderr.splitlines() if x.startswith('error: d')]
  assert len(lines) == 1
  assert lines[0].startswith(
    f'error: distributed={where}, process {index} of 2: not all processes met '
    'within 3 s; is process 0 running'
  )
  assert 'Traceback' not in done.stderr


def test_a_port_in_use_is_one_line():
  with socket.socket() as taken:
    taken.bind(('', 0))
    taken.listen()
    where = f'127.0.0.1:{taken.getsockname()[1]}'
    done = run([sys.executable, '-c', CONNECT, json.dumps([where, 2, 0])])
  assert done.returncode == 2
  assert done.stderr.startswith(
    f'error: distributed={where}: process 0 cannot listen on port'
  )
  assert 'Traceback' not in done.stderr


def test_auto_without_an_engine_is_one_line():
  done = run([sys.executable, '-c', CONNECT, json.dumps(['auto', None, None])])
  assert done.returncode == 2
  assert done.stderr.startswith('error: distributed=auto: found no TPU pod')


# --- the launcher


def test_commands_get_this_python():
  here = sys.executable
  assert processes.resolve(['-m', 'x', '--y']) == [here, '-m', 'x', '--y']
  assert processes.resolve(['x.py', 'y']) == [here, 'x.py', 'y']
  assert processes.resolve(['python', '-m', 'x']) == [here, '-m', 'x']
  assert processes.resolve(['sh', '-c', ':']) == ['sh', '-c', ':']
  with pytest.raises(UserError, match='no command: put it after --'):
    processes.resolve([])
  with pytest.raises(UserError, match='command nowhere: no such program'):
    processes.resolve(['nowhere'])


def test_odd_processes_are_named():
  given = {'seed': 0, 'run': {'batch_size': 8, 'acting': 'x'}, 'commit': None}
  odd = {**given, 'seed': 1, 'run': {'batch_size': 16, 'acting': 'x'}}
  less = {'seed': 0, 'run': {'acting': '\x1b[2J'}, 'commit': None}
  say = distributed.disagreement
  assert say([given, given | {'seed': 1}]) == (
    'process 1 has seed=1 (process 0: 0): all processes must have the same '
    'flags, data and code'
  )
  # What most have is right.
  assert say([odd, given, given]).startswith(
    'process 0 has run.batch_size=16 (process 1: 8), seed=1 (process 1: 0): '
  )
  found = say([given, less, given, odd])
  assert 'process 1 has run.acting="\\u001b[2J" (process 0: "x"), ' in found
  assert 'run.batch_size=none (process 0: 8)' in found
  assert '; process 3 has run.batch_size=16' in found
  many = [given, *({'seed': i + 1} for i in range(5)), given]
  assert '; 2 more processes differ: all' in say(many)
  wide = {str(i): i for i in range(9)}
  assert ', 6 more: all' in say([wide, dict.fromkeys(wide)])


def test_one_process_agrees_with_itself():
  distributed.agree({'seed': 0})


def test_processes_get_their_numbers_and_their_gpus():
  first, second = processes.environments(2, 3)
  assert first['OUTPLAY_COORDINATOR'] == second['OUTPLAY_COORDINATOR']
  assert second['OUTPLAY_NUM_PROCESSES'] == '2'
  assert [x['OUTPLAY_PROCESS_ID'] for x in (first, second)] == ['0', '1']
  assert [x['JAX_LOCAL_DEVICE_IDS'] for x in (first, second)] == [
    '0,1,2',
    '3,4,5',
  ]
  assert 'OUTPLAY_LOCAL_DEVICES' not in processes.environments(1)[0]


def test_processes_add_up_and_agree(program):
  done = run(launched(program, 'agree', flags=['--devices_per_process=2']))
  assert done.returncode == 0, done.stdout
  out = done.stdout.splitlines()
  total = float(sum(range(4)) + sum(range(100, 104)))
  for i in (0, 1):
    assert f'[{i}] total {total} 4 {i == 0}' in out
    assert f'[{i}] good end' in out
    assert f"[{i}] main {{'a': 0.1, 'b': 0.0}}" in out
    # Voted at 30, 35, 40.
    assert f'[{i}] stopped 40 True' in out
    other = 1 - i
    assert (
      f'[{i}] error names differ between processes; to process {i}: process '
      f"{other} has also ['only{other}'] and lacks ['only{i}']"
    ) in out
  a, b = 0.1 + 1.1, 2.0**53
  assert f"[0] sums {{'b': {b}, 'a': {a}}}" in out
  assert f"[1] sums {{'a': {a}, 'b': {b}}}" in out


@pytest.mark.parametrize(
  ('end', 'code', 'said'),
  [
    # Of real runs this is in test_distributed.py.
    pytest.param(
      'kill', 137, 'process 1 was ended by SIGKILL', marks=pytest.mark.slow
    ),
    ('raise', 1, 'process 0 ended with code 1'),
    ('refuse', 2, 'process 1 ended with code 2'),
  ],
)
def test_the_first_that_fails_is_named(program, end, code, said):
  done = run(launched(program, end, flags=['--devices_per_process=2']))
  assert done.returncode == code
  assert f'launch: {said}; stopping the others' in done.stderr
  assert f'launch: {said}; it was the first of 2 that failed' in done.stderr
  assert ('[0] ValueError: boom' in done.stdout) == (end == 'raise')
  assert 'good end' not in done.stdout


WAITER = """
import os, signal, sys, time
def stop(signum, frame):
  print('got', signal.Signals(signum).name, flush=True)
  sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print('ready', os.getpid(), flush=True)
time.sleep(60)
"""
STUBBORN = """
import os, signal, subprocess, sys, time
if os.environ['OUTPLAY_PROCESS_ID'] == '0':
  sys.stdin.read()  # has none: it ends at once
  time.sleep(1)
  sys.exit(7)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(['sleep', '60'])
print('ready', os.getpid(), child.pid, flush=True)
time.sleep(60)
"""


def pids(lines):
  return [
    int(word)
    for line in lines
    if ' ready ' in line
    for word in line.split()[2:]
  ]


def is_running(pid):
  try:
    status = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except FileNotFoundError:
    return False
  return status.rpartition(')')[2].split()[0] != 'Z'


def wait_for_end(numbers):
  end = time.monotonic() + 10
  while any(map(is_running, numbers)) and time.monotonic() < end:
    time.sleep(0.05)
  assert not any(map(is_running, numbers))


@pytest.mark.parametrize(
  'signum',
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_signals_reach_all_and_the_parent_waits(signum):
  parent = start('python', '-c', WAITER)
  lines = lines_until(parent, 'ready', 2)
  parent.send_signal(signum)
  rest = parent.communicate(timeout=30)[0].splitlines()
  # Whatever they make of it: the next command must not go on.
  assert parent.returncode == 128 + signum
  name = signal.Signals(signum).name
  assert sorted(rest) == [f'[0] got {name}', f'[1] got {name}']
  assert not any(map(is_running, pids(lines)))


@pytest.mark.skipif(sys.platform != 'linux', reason='asks the kernel for it')
def test_children_do_not_outlive_a_killed_parent():
  parent = start('python', '-c', WAITER)
  numbers = pids(lines_until(parent, 'ready', 2))
  assert len(numbers) == 2 and all(map(is_running, numbers))
  parent.kill()
  parent.communicate(timeout=30)
  wait_for_end(numbers)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_who_does_not_stop_is_killed_with_all_that_it_started():
  parent = start('python', '-c', STUBBORN, flags=['--grace=0.3'])
  out = parent.communicate(timeout=30)[0].splitlines()
  assert parent.returncode == 7
  numbers = pids(out)
  assert len(numbers) == 2
  wait_for_end(numbers)
  assert (
    out[-1]
    == 'launch: process 0 ended with code 7; it was the first of 2 that failed'
  )


@pytest.mark.parametrize(
  ('fails_with', 'restarts', 'code', 'tries'),
  [(3, 1, 3, 2), (3, 2, 0, 3), (2, 5, 2, 1), (143, 5, 143, 1)],
)
def test_restarts_are_counted(tmp_path, fails_with, restarts, code, tries):
  # Fails twice.
  text = (
    'import pathlib, sys\n'
    f'path = pathlib.Path({str(tmp_path / "tries")!r})\n'
    'tries = path.read_text() if path.exists() else ""\n'
    'path.write_text(tries + "x")\n'
    f'sys.exit({fails_with} if len(tries) < 2 else 0)\n'
  )
  done = run(
    launched(
      'python',
      '-c',
      text,
      flags=['--processes=1', f'--restarts={restarts}'],
    )
  )
  assert done.returncode == code
  assert len((tmp_path / 'tries').read_text()) == tries
  assert done.stderr.count('starting again') == tries - 1


def test_a_wrong_command_line_is_one_line():
  for command, complaint in (
    (launched(), 'no command: put it after --'),
    (launched('x.py', flags=['--processes=0']), 'processes'),
    (launched('x.py', flags=['y']), "unexpected argument 'y'"),
  ):
    done = run(command)
    assert done.returncode == 2
    assert done.stderr.startswith('error: ') and complaint in done.stderr
    assert 'Traceback' not in done.stderr


# --- the recipes
