"""Two processes with two devices each train as one with four, and resume."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from launching import ENVIRONMENT, ROOT, read_csv

from experiments.runtime import processes as supervision

TRAIN = (
  'experiments.train',
  '--preset=muzero_catch',
  '--steps=184',
  *(
    f'--set={setting}'
    for setting in (
      'env.num_envs=4',
      'parts=4',
      'warmup_decisions=64',
      'decisions_per_update=4',
      'replay_capacity=800',
      'batch_size=8',
      'num_simulations=2',
      'network.latent_size=8',
      'network.channels=2',
      'network.head_channels=2',
      'network.head_hidden=4',
      'optimiser=sgd',
      'log_every=5',
      'checkpoint_every=10',
      'early_update=0',
      'final_episodes=2',
      'final_simulations=2',
      'acting=synchronous',
    )
  ),
)


def alone(devices, workdir):
  subprocess.run(
    [sys.executable, '-m', *TRAIN, f'--workdir={workdir}'],
    cwd=ROOT,
    env=ENVIRONMENT | {'OUTPLAY_LOCAL_DEVICES': str(devices)},
    check=True,
    timeout=600,
  )


def together(workdir, log):
  command = [sys.executable, '-m', 'experiments.launch', '--processes=2']
  command += ['--devices_per_process=2', '--', '-m', *TRAIN]
  return subprocess.Popen(
    [*command, f'--workdir={workdir}'],
    cwd=ROOT,
    env=ENVIRONMENT,
    stdout=log,
    stderr=subprocess.STDOUT,
  )


def children(process):
  path = f'/proc/{process.pid}/task/{process.pid}/children'
  return [int(pid) for pid in pathlib.Path(path).read_text().split()]


def losses(workdir):
  """Numbers of each row of metrics.csv, by update."""
  rows = read_csv(workdir / 'metrics.csv')
  names = ('loss', 'loss_policy', 'gradient_norm', 'replay_age', 'decisions')
  return {int(r['step']): [float(r[name]) for name in names] for r in rows}


def assert_equal(got, want):
  assert got.keys() == want.keys() and len(want) >= 6
  for step, row in want.items():
    # Sums over a batch are taken in another order; float32.
    np.testing.assert_allclose(got[step], row, rtol=1e-3, err_msg=str(step))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A run of one process, and one of two of which one was killed."""
  folder = tmp_path_factory.mktemp('distributed')
  alone(4, folder / 'one')
  log = folder / 'log'
  with log.open('w') as file:
    process = together(folder / 'two', file)
    saved = folder / 'two' / 'checkpoints' / '10'
    deadline = time.monotonic() + 300
    while not saved.exists():
      assert process.poll() is None, log.read_text()
      assert time.monotonic() < deadline, log.read_text()
      time.sleep(0.05)
    os.kill(children(process)[1], signal.SIGKILL)
    status = process.wait(60)
  return folder, status, log.read_text()


def test_who_was_killed_is_said(runs):
  folder, status, log = runs
  assert status == 128 + signal.SIGKILL, log
  assert 'process 1 was ended by SIGKILL; it was the first of 2' in log
  assert 30 not in losses(folder / 'two')


def test_it_goes_on_with_one_process(runs, tmp_path):
  folder, _, _ = runs
  shutil.copytree(folder / 'two', tmp_path / 'two')
  alone(2, tmp_path / 'two')
  assert_equal(losses(tmp_path / 'two'), losses(folder / 'one'))


@pytest.mark.slow
def test_it_goes_on_with_two_processes(runs, tmp_path):
  folder, _, _ = runs
  shutil.copytree(folder / 'two', tmp_path / 'two')
  with (tmp_path / 'log').open('w') as file:
    status = together(tmp_path / 'two', file).wait(600)
  log = (tmp_path / 'log').read_text()
  assert status == 0, log
  assert (tmp_path / 'two' / 'evaluation.png').exists()
  assert '[0] resumed at update' in log and '[1] resumed' not in log
  assert_equal(losses(tmp_path / 'two'), losses(folder / 'one'))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('odd', 'said'),
  [
    ('--seed=1', 'process 1 has seed=1 (process 0: 0): '),
    ('--set=batch_size=16', 'process 1 has run.batch_size=16 (process 0: 8): '),
    ('--steps=200', 'steps=200 (process 0: 184)'),
    ('--profile=3', 'process 1 has profile=3 (process 0: 0): '),
    (
      '--workdir=other',
      'config_is_there=false (process 0: true): workdir=other: must be a',
    ),
    ('', 'process 1 has local_devices=2 (process 0: 1): '),
  ],
)
def test_processes_that_were_given_other_things_end(odd, said, tmp_path):
  """All of them with the same line, code 2 and nothing written."""
  each = supervision.environments(2, 1)
  if not odd:
    each[1]['OUTPLAY_LOCAL_DEVICES'] = '2'
  flags = [f'--workdir={tmp_path / "run"}']
  processes = [
    subprocess.Popen(
      [sys.executable, '-m', *TRAIN, *flags, *([odd] if i and odd else [])],
      cwd=tmp_path,
      env=ENVIRONMENT | variables | {'PYTHONPATH': str(ROOT)},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i, variables in enumerate(each)
  ]
  try:
    for process in processes:
      _, message = process.communicate(timeout=120)
      assert process.returncode == 2, message
      assert message.count('\n') == 1, message
      assert said in message or said.startswith('config'), message
    assert said in message, message
  finally:
    for process in processes:
      process.kill()
  # What all share is found out by writing.
  assert (tmp_path / 'run').exists() == (odd == '--workdir=other')
