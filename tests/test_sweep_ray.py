"""Sweeps on a Ray cluster: machines are asked first, and may be lost."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import launching
import pytest
from launching import ROOT, read_csv

from experiments.files.errors import UserError
from experiments.runtime import distributed
from experiments.sweeps import ray_pool

ENVIRONMENT = launching.ENVIRONMENT | {
  'PYTHONPATH': str(ROOT),
  'RAY_USAGE_STATS_ENABLED': '0',
}
FLAGS = (
  '--preset=muzero_catch',
  '--env=jax:catch',
  '--set=env.num_envs=4',
  '--set=warmup_decisions=64',
  '--set=replay_capacity=400',
  '--set=batch_size=8',
  '--set=num_simulations=2',
  '--set=network.latent_size=8',
  '--set=network.blocks=1',
  '--set=network.torso=vector',
  '--set=unroll_steps=2',
  '--set=td_steps=2',
  '--set=log_every=10',
  '--set=checkpoint_every=10',
  '--set=evaluate_episodes=8',
  '--set=final_episodes=4',
)


def test_an_address_that_does_not_answer_is_one_line():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  with pytest.raises(UserError, match=f'127.0.0.1:{port}: no answer'):
    ray_pool.check_address(f'127.0.0.1:{port}')
  for address in ('here', ':1', 'here:', 'here:70000'):
    with pytest.raises(UserError, match='must be HOST:PORT, auto or local'):
      ray_pool.check_address(address)
  for address in (None, 'auto', 'local'):
    ray_pool.check_address(address)


def test_a_deaf_port_is_one_line(monkeypatch):
  monkeypatch.setattr(ray_pool, '_ANSWERS_WITHIN', 0.5)
  monkeypatch.setattr(ray_pool, '_ASK', 'import time; time.sleep(60)')
  with socket.socket() as deaf:
    deaf.bind(('127.0.0.1', 0))
    deaf.listen()
    address = f'127.0.0.1:{deaf.getsockname()[1]}'
    with pytest.raises(UserError, match=r'no answer within 0\.5 s; is it'):
      ray_pool.check_address(address)
    monkeypatch.setattr(ray_pool, '_ASK', 'raise SystemExit(1)')
    monkeypatch.setattr(ray_pool, '_ANSWERS_WITHIN', 30)
    with pytest.raises(UserError, match='is not the head of a Ray cluster'):
      ray_pool.check_address(address)


def test_odd_machines_are_named_by_what_is_odd():
  here = {**ray_pool.fingerprint(), 'folder': 'x'}
  assert here['source of the suite'] and here['jax'] and here['python']
  assert ray_pool.differences(here, dict(here)) == ''
  odd = here | {'jax': '0.0.1', 'folder': 'y'}
  assert ray_pool.differences(here, odd) == (
    'it does not see the folder of --workdir; jax is 0.0.1 there, '
    f'{here["jax"]} here'
  )
  less = {name: x for name, x in here.items() if name != 'mctx'}
  assert ray_pool.differences(here, less).startswith('mctx is missing there')
  assert ray_pool.differences(here, 'not installed') == 'not installed'


@pytest.mark.parametrize(
  ('wanted', 'room'),
  [
    ((1, 0, 0), 4),
    ((1.5, 0, 0), 2),
    ((1, 1, 0), 1),
    ((1, 2, 0), 0),
    ((1, 0, 3e9), 3),
    ((0.5, 0.5, 0), 2),
    ((0, 0, 0), 4),
  ],
)
def test_room_of_a_machine(wanted, room):
  resources = {'CPU': 4.0, 'GPU': 1.0, 'memory': 10e9}
  assert ray_pool.room_for(resources, *wanted) == room


# A cluster of two machines of one processor, which does as it is asked: one
# word a line on its input.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1})
second = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
  if line.strip() == 'lose':
    cluster.remove_node(second, allow_graceful=False)
    print('lost', flush=True)
cluster.shutdown()
"""


@pytest.fixture
def cluster(tmp_path):
  """`(address, tell)` of a cluster of two machines."""
  pytest.importorskip('ray')
  with (tmp_path / 'cluster.log').open('w') as log:
    process = subprocess.Popen(
      [sys.executable, '-c', CLUSTER],
      cwd=ROOT,
      env=ENVIRONMENT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=log,
      text=True,
    )

  def tell(word):
    process.stdin.write(word + '\n')
    process.stdin.flush()
    assert process.stdout.readline() == 'lost\n'

  address = process.stdout.readline().strip()
  assert address, (tmp_path / 'cluster.log').read_text()
  yield address, tell
  process.stdin.close()
  process.wait(60)
  process.stdout.close()


def sweep(workdir, *flags, engine='ray', **options):
  own = (f'--engine={engine}', f'--workdir={workdir}', *flags)
  return subprocess.Popen(
    launching.command('sweep', *FLAGS, *own),
    cwd=ROOT,
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **options,
  )


def wait_for(pattern, workdir, number, process):
  deadline = time.monotonic() + 600
  while len(list(workdir.glob(pattern))) < number:
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.1)


def numbers(workdir):
  """What a row learned and played, without how long it took."""
  return [
    {n: r[n] for n in ('seed', 'eval_return', 'network_return', 'status')}
    for r in read_csv(workdir / 'sweep.csv')
  ]


@pytest.mark.slow
@pytest.mark.parametrize('what', ['a row', 'a machine', 'the driver'])
def test_what_is_killed_is_gone_on_with(cluster, tmp_path, what):
  address, tell = cluster
  rows = ('--steps=3000', '--seeds=2')
  kept = tmp_path / 'sweep'
  process = sweep(kept, *rows, f'--ray_address={address}')
  wait_for('rows/*/checkpoints/*0', kept, 2, process)
  if what == 'a row':
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
      try:
        command = (folder / 'cmdline').read_text().split('\0')
      except OSError:
        continue
      if f'--workdir={kept}/rows/s000_seed0' in command:
        os.kill(int(folder.name), signal.SIGKILL)
  elif what == 'a machine':
    tell('lose')
  else:
    process.kill()
    process.communicate()
    process = sweep(kept, *rows, f'--ray_address={address}')
  out, _ = process.communicate(timeout=900)
  assert process.returncode == 0, out
  tries = [len(read_csv(p)) for p in sorted(kept.glob('rows/*.tries.csv'))]
  assert max(tries) >= 2
  if what == 'a row':
    assert 'SIGKILL: killed by the user or for lack of memory' in out
  plain = tmp_path / 'plain'
  process = sweep(plain, *rows, engine='processes')
  out, _ = process.communicate(timeout=900)
  assert process.returncode == 0, out
  assert numbers(kept) == numbers(plain)
  assert all('step ' in p.read_text() for p in kept.glob('rows/*.log'))


@pytest.mark.slow
def test_a_driver_that_is_terminated_writes_its_table(cluster, tmp_path):
  address, _ = cluster
  process = sweep(
    tmp_path / 'sweep',
    '--steps=100000',
    '--seeds=3',
    f'--ray_address={address}',
  )
  wait_for('rows/*/checkpoints/*0', tmp_path / 'sweep', 2, process)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 143, out
  assert 'Traceback' not in out and 'SIGTERM received at' not in out, out
  table = read_csv(tmp_path / 'sweep' / 'sweep.csv')
  assert [r['status'] for r in table] == ['left'] * 3
  states = [
    read_csv(p)[-1]['state']
    for p in (tmp_path / 'sweep').glob('rows/*.tries.csv')
  ]
  assert states == ['stopped'] * 2


@pytest.mark.slow
def test_rows_that_no_machine_has_room_for_are_refused(cluster, tmp_path):
  address, _ = cluster
  process = sweep(
    tmp_path / 'sweep', f'--ray_address={address}', '--row_cpus=7'
  )
  out, _ = process.communicate(timeout=200)
  assert process.returncode == 2, out
  assert out.startswith('error: row_cpus=7: no machine of the 2 has as much')
  assert not (tmp_path / 'sweep').exists()


@pytest.fixture(scope='session')
def without_suite(tmp_path_factory):
  """A folder before ours on the path, whose suite is another."""
  folder = tmp_path_factory.mktemp('other')
  (folder / 'experiments').mkdir()
  (folder / 'experiments' / '__init__.py').write_text('')
  # An editable install would still find the parts of the real one.
  (folder / 'sitecustomize.py').write_text(
    'import sys\n'
    "sys.meta_path[:] = [x for x in sys.meta_path if 'ditable' not in str(x)]\n"
  )
  return folder


def test_a_probe_runs_without_the_suite_and_says_so(
  without_suite, tmp_path, monkeypatch
):
  """What Ray would run on a machine, in a process of its own."""
  cloudpickle = pytest.importorskip('ray.cloudpickle')
  text = cloudpickle.dumps(ray_pool._make_probe())
  (tmp_path / 'token').write_text('seen')
  script = (
    'import pickle, sys\n'
    'probe = pickle.load(sys.stdin.buffer)\n'
    'print(probe(*sys.argv[1:]))\n'
  )

  def probed(path, folder):
    done = subprocess.run(
      [sys.executable, '-c', script, str(tmp_path / 'token'), str(folder)],
      input=text,
      cwd=tmp_path,
      env=ENVIRONMENT | {'PYTHONPATH': str(path)},
      capture_output=True,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)

  here = {**ray_pool.fingerprint(), 'folder': 'seen'}
  assert ray_pool.differences(here, probed(ROOT, ROOT)) == ''
  why = ray_pool.differences(here, probed(without_suite, tmp_path))
  assert why.startswith('the suite is not installed: No module named')


def test_waiting_for_peers_is_said(monkeypatch, capfd):
  """A run whose peers come late, by a stand-in for jax's meeting."""
  import jax

  monkeypatch.setattr(distributed, '_SAID_AFTER', (0.05, 0.1))
  monkeypatch.setattr(distributed, '_check_port', lambda coordinator: None)
  monkeypatch.setattr(distributed.atexit, 'register', lambda f: None)
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda **options: time.sleep(0.5)
  )
  distributed._connect('here:1', 2, 0, 300)
  said = capfd.readouterr().err.splitlines()
  assert said == [
    f'distributed=here:1, process 0 of 2: waiting for the other processes, {s} '
    'of at most 300 s'
    for s in (0.05, 0.1)
  ]
