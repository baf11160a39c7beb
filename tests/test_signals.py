"""Signals end a launcher with 130 or 143, at every moment of its life."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from experiments.files.errors import UserError
from experiments.runtime import children, distributed, signals
from experiments.runtime import config as configs
from experiments.runtime.signals import SIGNALS
from experiments.studies import control

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = dict(
  os.environ,
  JAX_PLATFORMS='cpu',
  PYTHONPATH=str(ROOT),
  JAX_COMPILATION_CACHE_DIR=str(ROOT / '.jax_cache'),
)


@pytest.mark.parametrize('signum', SIGNALS)
def test_a_signal_where_nothing_is_saved_ends_a_launcher(signum, capsys):
  # A loop outside of launchers, of another test, may have been stopped.
  before, cleaned = (signals.handlers(), signals.received()), []
  with pytest.raises(SystemExit) as ended, signals.launcher():
    try:
      signal.raise_signal(signum)
    finally:
      cleaned.append(1)
  assert ended.value.code == 128 + signum
  assert cleaned
  assert (signals.handlers(), signals.received()) == before
  assert capsys.readouterr().err == f'stopped by {signum.name}\n'


@pytest.mark.parametrize('signum', SIGNALS)
def test_a_loop_that_saves_ends_with_the_same_code(signum):
  with pytest.raises(SystemExit) as ended, signals.launcher():
    with signals.graceful_exit() as stopping:
      assert not stopping()
      signal.raise_signal(signum)
      assert stopping()
    saved = True
  assert ended.value.code == 128 + signum and saved


def test_a_swallowed_interrupt_still_stops_the_loop():
  with pytest.raises(SystemExit) as ended, signals.launcher():
    with contextlib.suppress(KeyboardInterrupt):
      signal.raise_signal(signal.SIGTERM)
    with signals.graceful_exit() as stopping:
      assert stopping()
  assert ended.value.code == 143


def test_what_a_library_makes_of_an_interrupt_is_no_fault():
  with pytest.raises(SystemExit) as ended, signals.launcher():
    try:
      signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
      raise ImportError('half imported') from error
  assert ended.value.code == 130


def test_a_fault_while_saving_stays_one():
  with pytest.raises(OSError), signals.launcher(), signals.graceful_exit():
    signal.raise_signal(signal.SIGTERM)
    raise OSError('no room')


def test_without_a_signal_nothing_changes():
  with signals.launcher():
    pass
  with pytest.raises(SystemExit) as ended, signals.launcher():
    raise SystemExit(3)
  assert ended.value.code == 3


def test_peers_that_were_signalled_give_their_code():
  with pytest.raises(SystemExit) as ended, signals.launcher():
    signals.note(0)
    signals.note(1)  # no signal: a loop that wanted to stop
    assert not signals.received()
    signals.note(signal.SIGTERM)
    assert signals.exit_code() == 143
  assert ended.value.code == 143


def test_what_ends_the_process_after_its_launcher_has_its_code(monkeypatch):
  codes = []
  monkeypatch.setattr(os, '_exit', codes.append)
  with pytest.raises(SystemExit), signals.launcher():
    configs.fail('seed=-1: must be at least 0')
  distributed._leave()
  with pytest.raises(SystemExit), signals.launcher():
    signals.note(signal.SIGTERM)
  distributed._leave()
  with pytest.raises(ZeroDivisionError), signals.launcher():
    _ = 1 / 0
  distributed._leave()
  assert codes == [2, 143, 1]


def test_processes_agree_on_the_signal(monkeypatch):
  """The second of three was terminated: its vote is that of all."""
  monkeypatch.setattr(distributed, 'process', lambda: (0, 3))
  votes = [[b'\0', b'\0', b'\0'], [b'\0', bytes([signal.SIGTERM]), b'\0']]
  monkeypatch.setattr(distributed, '_gather', lambda own, size: votes.pop(0))
  with pytest.raises(SystemExit) as ended, signals.launcher():
    stopping = distributed.stopping(lambda: False, every=2)
    assert [stopping(step) for step in range(4)] == [False, False, True, True]
  assert ended.value.code == 143


def test_exit_codes_in_words():
  assert [signals.is_stop(c) for c in (0, 1, 2, 130, 143, -2, -15, -9)] == [
    *(False,) * 3, *(True,) * 4, False,
  ]  # fmt: skip
  assert signals.explain(-9).startswith('SIGKILL: ')
  assert signals.explain(137).startswith('SIGKILL: ')
  assert signals.explain(143) == signals.explain(-15) == 'stopped by SIGTERM'
  assert signals.explain(-11) == 'SIGSEGV'
  assert signals.explain(1) == 'exit code 1'


# Each prints `ready` and is then deaf to a `KeyboardInterrupt`.
DEAF = {
  'swallows': """
    print('ready', flush=True)
    while True:
      try:
        time.sleep(60)
      except KeyboardInterrupt:
        pass
  """,
  'is in a call': """
    print('ready', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
  """,
  # As weak references and the garbage collector call.
  'loses it in a callback': """
    class Lossy:
      def __del__(self):
        print('ready', flush=True)
        time.sleep(60)
    signals._PATIENCE = 60
    Lossy()
    time.sleep(60)
  """,
  # Its loop takes one signal and is stuck.
  'is asked twice': """
    with signals.graceful_exit():
      print('ready', flush=True)
      hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
  """,
}


def deaf(body):
  script = (
    'import hashlib, os, signal, time\n'
    'from experiments.runtime import signals\n'
    'signals._PATIENCE = 0.3\n'
    'with signals.launcher():\n'
    + textwrap.indent(textwrap.dedent(body).strip('\n'), '  ')
  )
  process = subprocess.Popen(
    [sys.executable, '-c', script],
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'ready\n'
  return process


@pytest.mark.parametrize('what', DEAF)
def test_a_deaf_launcher_is_ended(what):
  with deaf(DEAF[what]) as process:
    time.sleep(0.2)  # from the line into the call
    process.send_signal(signal.SIGTERM)
    if what == 'is asked twice':
      with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
      process.send_signal(signal.SIGINT)
      assert process.wait(30) == 130
    assert process.wait(30) in (130, 143)


def test_a_forked_child_has_its_own_signals():
  body = """
    print('ready', flush=True)
    child = os.fork()
    if not child:
      time.sleep(60)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    time.sleep(0.6)
    print('alive', signals.received(), flush=True)
  """
  with deaf(body) as process:
    assert process.stdout.read() == '-15\nalive 0\n'
    assert process.wait(30) == 0


TINY = (
  '--preset=muzero_catch',
  '--set=num_simulations=2',
  '--set=log_every=5',
  '--steps=200000',
)
# Seconds after the start: Python, jax, building, compiling, training.
MOMENTS = (0.4, 0.8, 1.2, 1.8, 2.5, 3.5, 5.0, 8.0, 14.0)


# Real processes and moments: what a loaded machine makes of them varies.
@pytest.mark.slow
@pytest.mark.parametrize('env', ['jax:catch', 'Catch-v0'])
@pytest.mark.parametrize('signum', SIGNALS)
@pytest.mark.parametrize('moment', MOMENTS)
def test_a_run_ends_with_its_signal(tmp_path, env, signum, moment):
  command = [sys.executable, '-m', 'experiments.train', *TINY]
  with (tmp_path / 'log').open('w') as log:
    process = subprocess.Popen(
      [*command, f'--env={env}', f'--workdir={tmp_path}/run'],
      cwd=ROOT,
      env=ENVIRONMENT,
      stdout=log,
      stderr=log,
    )
    time.sleep(moment)
    process.send_signal(signum)
    try:
      code = process.wait(120)
    finally:
      process.kill()
  # Before there is a launcher, Python itself ends.
  text = (tmp_path / 'log').read_text()
  assert code == 128 + signum or (code == -signum and moment < 1), text
  assert 'Traceback' not in text or moment < 1, text


CHILD = """
import signal, sys, time
def leave(*_):
  print('saved', flush=True)
  sys.exit(143)
signal.signal(signal.SIGTERM, leave)
print('ready', flush=True)
time.sleep(60)
"""


def test_a_child_is_asked_once_and_waited_for(tmp_path):
  path = tmp_path / 'said'
  with path.open('w') as file:
    code, usage = children.run(
      [sys.executable, '-c', CHILD],
      lambda: path.read_text() == 'ready\n',
      stdout=file,
    )
  # It was not asked before it listened, and its second line is the last.
  assert code == 143 and path.read_text() == 'ready\nsaved\n'
  assert usage.ru_utime + usage.ru_stime > 0


def test_no_child_begins_once_all_is_to_stop():
  assert children.run(['no such program'], lambda: True) == (143, None)


def test_memory_of_a_child_and_what_it_starts():
  big = "x = bytearray(60 << 20); print('ready', flush=True); input()"
  script = (
    f'import subprocess, sys\nsubprocess.run([sys.executable, "-c", {big!r}])\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    assert 60 << 20 < children.memory(process.pid) < 400 << 20
    process.stdin.write('\n')
  assert children.memory(process.pid) == 0


STUDY = """
import sys
from experiments import study
from experiments.runtime import children
train = [sys.executable, '-c', sys.argv.pop(1)]
def run(command, stopping, **options):
  return study_run(train, stopping, **options)
study_run, children.run = children.run, run
study.main(sys.argv)
"""


def test_a_study_stops_with_its_runs(tmp_path):
  with (tmp_path / 'log').open('w') as log:
    process = subprocess.Popen(
      [sys.executable, '-c', STUDY, CHILD, 'catch', '--at_once=2']
      + [f'--folder={tmp_path}/runs', f'--results={tmp_path}/results'],
      env=ENVIRONMENT,
      stdout=log,
      stderr=log,
    )
    logs = lambda: [p.read_text() for p in tmp_path.glob('runs/catch/*.log')]
    end = time.monotonic() + 60
    while logs() != ['ready\n'] * 2 and time.monotonic() < end:
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code = process.wait(30)
  said = (tmp_path / 'log').read_text()
  assert code == 143, said
  assert logs() == ['ready\nsaved\n'] * 2
  assert '10 runs are left; the same command resumes from here' in said


def test_a_study_of_planners_lets_its_run_save(tmp_path, monkeypatch):
  run, log = children.run, tmp_path / 'iql_medium_s0.log'

  def train(command, stopping, **options):
    assert command[1:4] == ['-m', 'experiments.train', '--preset=iql_small']
    return run([sys.executable, '-c', CHILD], stopping, **options)

  def stop():
    while not log.exists() or log.read_text() != 'ready\n':
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(children, 'run', train)
  stopper = threading.Thread(target=stop)
  with pytest.raises(SystemExit) as ended, signals.launcher():
    stopper.start()
    control.train('iql', 'medium', 0, tmp_path, tmp_path)
  stopper.join()
  assert ended.value.code == 143
  assert log.read_text() == 'ready\nsaved\n'
  assert {p.name for p in tmp_path.iterdir()} == {log.name}
  monkeypatch.setattr(children, 'run', lambda *_, **__: (-9, None))
  with pytest.raises(UserError, match='training failed: SIGKILL: killed by'):
    control.train('iql', 'medium', 0, tmp_path, tmp_path)
  monkeypatch.setattr(children, 'run', lambda *_, **__: (0, None))
  workdir = control.train('iql', 'medium', 0, tmp_path, tmp_path)
  assert workdir.with_suffix('.done').exists()


def test_a_stopped_run_does_not_stop_the_next_one():
  """Two runs in one process that is no launcher, as in a notebook."""
  with signals.graceful_exit() as should_stop:
    signal.raise_signal(signal.SIGTERM)
    assert should_stop()
    assert signals.received() == signal.SIGTERM
  with signals.graceful_exit() as should_stop:
    assert not should_stop()
    assert not signals.received()
