"""Two processes of one run, one of them killed: the others end, it goes on."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from launching import ROOT, read_csv
from test_sweep_ray import ENVIRONMENT, FLAGS

pytestmark = pytest.mark.slow
RUN = (*FLAGS, '--set=parts=2', '--steps=800', '--set=final_episodes=0')


def start(workdir):
  command = [sys.executable, '-m', 'experiments.launch', '--processes=2']
  command += ['--grace=5', '--', *('python', '-m', 'experiments.train'), *RUN]
  return subprocess.Popen(
    [*command, f'--workdir={workdir}'],
    cwd=ROOT,
    env=ENVIRONMENT | {'JAX_NUM_CPU_DEVICES': '1'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def numbers(workdir):
  """What a run learned, without how long it took."""
  rows = read_csv(workdir / 'metrics.csv')
  timed = ('second', 'compiled', 'memory')
  return [
    {n: x for n, x in row.items() if not any(t in n for t in timed)}
    for row in rows
  ]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  with start(folder) as process:
    said = process.stdout.read()
  assert process.returncode == 0, said
  return numbers(folder)


def process_of(workdir, number):
  """The id of one of the run's processes; None before there is one."""
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if f'--workdir={workdir}' not in (folder / 'cmdline').read_text():
        continue
      variables = (folder / 'environ').read_text().split('\0')
    except OSError:
      continue
    if f'OUTPLAY_PROCESS_ID={number}' in variables:
      return int(folder.name)
  return None


def has_config(workdir):
  return (workdir / 'config.json').exists()


def has_metrics(workdir):
  path = workdir / 'metrics.csv'
  return path.exists() and path.read_text().count('\n') > 2


def is_saving(workdir):
  """A step, or what is to become one, is there; the next is on its way."""
  return any((workdir / 'checkpoints').glob('*'))


MOMENTS = {
  'compiling': has_config,
  'training': has_metrics,
  'saving': is_saving,
}


@pytest.mark.parametrize('signum', [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('moment', MOMENTS)
def test_one_of_two_is_killed(tmp_path, whole, moment, victim, signum):
  with start(tmp_path) as process:
    end = time.monotonic() + 400
    has_come = functools.partial(MOMENTS[moment], tmp_path)
    while not has_come():
      assert process.poll() is None and time.monotonic() < end
      time.sleep(0.01)
    os.kill(process_of(tmp_path, victim), signum)
    said = process.stdout.read()
  # Where both were stopped they agreed on it.
  assert process.returncode == 128 + signum, said
  if signum == signal.SIGKILL:
    assert f'launch: process {victim} was ended by SIGKILL' in said
  with start(tmp_path) as process:
    said = process.stdout.read()
  assert process.returncode == 0, said
  assert numbers(tmp_path) == whole
