"""The launchers as a user runs them, with sizes of nothing."""

import signal
import subprocess
import time

import numpy as np
import pytest
from launching import ENVIRONMENT, ROOT, command, launch, read_csv

from experiments import build, presets
from experiments.build import saved as saved_run
from experiments.runtime import config as configs
from experiments.runtime import run_config

TINY = (
  '--steps=400',
  *(
    f'--set={setting}'
    for setting in (
      'env.num_envs=4',
      'warmup_decisions=64',
      'decisions_per_update=4',
      'replay_capacity=2000',
      'batch_size=8',
      'num_simulations=2',
      'network.latent_size=8',
      'network.channels=2',
      'network.head_channels=2',
      'network.lstm_size=4',
      'network.projector=4,4',
      'network.predictor=4',
      'network.head_hidden=4',
      'log_every=5',
      'checkpoint_every=20',
      'early_update=20',
      'final_episodes=4',
      'final_simulations=2',
      'acting=synchronous',
    )
  ),
)
# Wall time differs from run to run; a resumed one compiles again.
CLOCKS = ('updates_per_second', 'wait_seconds', 'compiled')


def rows(path):
  return [
    {k: v for k, v in row.items() if k not in CLOCKS} for row in read_csv(path)
  ]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A finished run of the main job's agent, environment and host source."""
  workdir = tmp_path_factory.mktemp('run') / 'whole'
  done = launch('train', *TINY, f'--workdir={workdir}')
  return workdir, done


def test_a_run_leaves_what_it_promises(finished):
  workdir, done = finished
  assert 'efficientzero on Catch-v0' in done.stdout
  assert 'without' in done.stdout
  for name in ('config.json', 'metrics.csv', 'evaluation.csv'):
    assert (workdir / name).stat().st_size > 0
  assert (workdir / 'evaluation.png').read_bytes().startswith(b'\x89PNG')
  table = rows(workdir / 'evaluation.csv')
  assert [(r['checkpoint'], r['simulations']) for r in table] == [
    ('early', '0'),
    ('early', '2'),
    ('final', '0'),
    ('final', '2'),
  ]
  metrics = rows(workdir / 'metrics.csv')
  # 9 decisions are 10 time steps, and simulators start anew at each save.
  assert float(metrics[-1]['decisions']) == 400
  assert int(metrics[-1]['step']) == 95
  # Decisions exclude the ignored actions on last steps, one in ten on Catch.
  assert 340 <= float(metrics[-1]['decisions']) <= 400


def test_nothing_is_compiled_after_the_warm_up(finished):
  workdir, done = finished
  table = read_csv(workdir / 'metrics.csv')
  counts = {int(r['step']): float(r['compiled']) for r in table}
  assert counts[5] > 0
  # The first checkpoint, at 20, is part of the warm-up.
  later = [count for step, count in counts.items() if step > 40]
  assert later and not any(later)
  assert 'waited for experience' in done.stdout
  assert 'GB of the process' in done.stdout


@pytest.mark.slow
def test_a_run_over_sampled_actions(tmp_path):
  workdir = tmp_path / 'pendulum'
  done = launch(
    'train',
    *TINY,
    '--preset=sampled_muzero_pendulum',
    '--steps=160',
    '--set=num_samples=3',
    '--set=policy=factored',
    '--set=final_episodes=2',
    f'--workdir={workdir}',
  )
  assert 'sampled_muzero on jax:pendulum' in done.stdout
  table = rows(workdir / 'evaluation.csv')
  assert [r['simulations'] for r in table if r['checkpoint'] == 'final'] == [
    '0',
    '2',
  ]
  # An episode is 50 decisions of 4 steps, each worth -16.3 to 0.
  assert all(-3300 < float(r['return_mean']) < 0 for r in table)
  metrics = rows(workdir / 'metrics.csv')
  assert int(metrics[-1]['step']) == 24  # (160 - 64) / 4
  # Three draws from 7 bins.
  assert 0 < float(metrics[-1]['target_entropy']) <= np.log(3) + 1e-6
  assert 0 < float(metrics[-1]['entropy']) <= np.log(7) + 1e-6


def test_killed_and_run_again_equals_uninterrupted(finished, tmp_path):
  whole, _ = finished
  workdir = tmp_path / 'cut'
  flags = (*TINY, f'--workdir={workdir}')
  with open(tmp_path / 'log', 'w') as log:
    process = subprocess.Popen(
      command('train', *flags),
      cwd=ROOT,
      env=ENVIRONMENT,
      stdout=log,
      stderr=log,
    )
    deadline = time.monotonic() + 300
    while not (workdir / 'checkpoints' / '40').is_dir():
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
  done = launch('train', *flags)
  assert 'resumed at update' in done.stdout
  assert rows(workdir / 'metrics.csv') == rows(whole / 'metrics.csv')

  experiment = saved_run.load_experiment(str(whole))
  env = build.make_env(experiment, training=False)
  agent = build.make_agent(experiment, env.spec)
  one = saved_run.load_params(str(whole), agent, ['final'])['final']
  two = saved_run.load_params(str(workdir), agent, ['final'])['final']
  for a, b in zip(
    *(map(np.asarray, _leaves(params)) for params in (one, two)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def _leaves(params):
  import jax

  return jax.tree.leaves(params)


def test_sigterm_saves_and_exits_cleanly(tmp_path):
  workdir = tmp_path / 'stopped'
  flags = (*TINY, '--steps=100000', f'--workdir={workdir}')
  with open(tmp_path / 'log', 'w') as log:
    process = subprocess.Popen(
      command('train', *flags),
      cwd=ROOT,
      env=ENVIRONMENT,
      stdout=log,
      stderr=log,
    )
    deadline = time.monotonic() + 300
    while not (workdir / 'checkpoints' / '20').is_dir():
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
  text = (tmp_path / 'log').read_text()
  assert 'stopped at update' in text and 'Traceback' not in text


def test_play_writes_what_it_played(finished, tmp_path):
  workdir, _ = finished
  out = tmp_path / 'played.csv'
  done = launch(
    'play',
    f'--workdir={workdir}',
    '--checkpoint=final,early',
    '--planner=gumbel',
    '--simulations=0,2',
    '--episodes=4',
    f'--out={out}',
  )
  assert 'gumbel' in done.stdout
  table = rows(out)
  assert {r['planner'] for r in table} == {'network', 'gumbel'}
  assert all(-1 <= float(r['return_mean']) <= 1 for r in table)


def test_a_folder_of_another_run_is_refused(finished):
  workdir, _ = finished
  done = launch('train', *TINY, '--seed=1', f'--workdir={workdir}', check=False)
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and 'seed was 0, is 1' in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
  'module, flag',
  [
    *(('train', '--'), ('play', '--'), ('plots', '--'), ('benchmark', '--')),
    ('sweep', '--grid'),
  ],
)
def test_help_needs_no_jax(module, flag):
  broken = str(ROOT / 'tests' / 'without_jax')
  done = launch(module, '--help', check=False, PYTHONPATH=broken)
  assert 'Traceback' not in done.stdout + done.stderr
  assert flag in done.stdout


MISTAKES = {
  'preset': ({'preset_name': 'efficientzero_cach'}, 'efficientzero_catch'),
  'agent': ({'agent': 'muzer'}, 'muzero'),
  'env': ({'env': 'Cach-v0'}, 'Catch-v0'),
  'env kind': ({'env': 'brax:ant'}, 'self_play or gymnasium'),
  'jax env': ({'env': 'jax:catc'}, 'jax:catch'),
  'field': ({'settings': ['learning_rte=1']}, 'learning_rate'),
  'type': ({'settings': ['learning_rate=fast']}, 'float'),
  'choice': ({'settings': ['optimiser=lion']}, 'adam'),
  'range': ({'settings': ['unroll_steps=0']}, 'unroll_steps=0'),
  'search': ({'settings': ['num_simulations=-1']}, 'num_simulations=-1'),
  'depth': ({'settings': ['max_depth=-1']}, 'max_depth=-1'),
  'considered': ({'settings': ['max_considered=0']}, 'max_considered=0'),
  'pace': ({'settings': ['decisions_per_update=1e-4']}, '0.001'),
  'budgets': ({'settings': ['final_simulations=-1']}, 'final_simulations'),
  'norm': ({'settings': ['norm=group']}, 'layer'),
  'steps': ({'steps': 10}, 'warmup_decisions'),
  'warm-up': ({'settings': ['warmup_decisions=20']}, 'warmup_decisions=20'),
  'layout': (
    {'settings': ['acting_devices=1', 'acting=synchronous']},
    'acting_devices=1: needs acting=asynchronous',
  ),
  'actions': ({'env': 'Pendulum-v1'}, 'discrete actions'),
  'option': ({'settings': ['env.options=colour=1']}, 'colour'),
  'not an option': ({'settings': ['env.options=colour']}, 'name=value'),
  'players': ({'env': 'ConnectFour-v1'}, 'players'),
}


@pytest.mark.parametrize('what', MISTAKES)
def test_mistakes_are_one_line_that_says_what_is_right(what):
  changes, hint = MISTAKES[what]
  changes = {'preset_name': presets.DEFAULT} | changes
  with pytest.raises(ValueError) as caught, configs.user_errors():
    experiment = build.describe(changes.pop('preset_name'), **changes)
    env = build.make_env(experiment, training=True)
    build.make_agent(experiment, env.spec)
  message = str(caught.value)
  assert hint in message and '\n' not in message


# Those of data sets are in test_offline_launch.py.
@pytest.mark.parametrize(
  'name', [n for n, p in presets.PRESETS.items() if p.env]
)
def test_every_preset_builds(name):
  experiment = build.describe(name)
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  assert experiment.updates > 0
  assert presets.PRESETS[name].source
  if agent.exploit is None:
    assert agent.model is not None
  if agent.refresh is not None:
    _refresh_fits(experiment, env.spec, agent)


def _refresh_fits(experiment, spec, agent):
  """Reanalysis takes a batch of the preset's own size; nothing is computed."""
  import jax
  import jax.numpy as jnp

  from agents.core.types import Continuous, Experience, Sample, Trajectory
  from search.model import TimeStep

  size, steps = experiment.run.batch_size, experiment.config.window
  per_row = lambda dtype: jax.ShapeDtypeStruct((size,), dtype)

  def per_step(shape=(), dtype=jnp.float32):
    return jax.ShapeDtypeStruct((size, steps, *shape), dtype)

  timestep = TimeStep(
    observation=per_step(spec.observation.shape, spec.observation.dtype),
    reward=per_step(),
    discount=per_step(),
    is_first=per_step(dtype=jnp.bool_),
    truncated=per_step(dtype=jnp.bool_),
  )
  action, kind = per_step(dtype=jnp.int32), spec.action
  is_sampled = experiment.agent_name == 'sampled_muzero' or (
    experiment.agent_name == 'efficientzero_v2' and isinstance(kind, Continuous)
  )
  if isinstance(kind, Continuous):
    action = per_step(kind.shape)
  if is_sampled:
    slots = experiment.config.search.num_samples
  else:
    slots = kind.num_actions
  extras = {'search_value': per_step(), 'search_policy': per_step((slots,))}
  if is_sampled:
    extras['sampled_actions'] = per_step(
      (slots, *action.shape[2:]), action.dtype
    )
  drawn = Sample(
    per_row(jnp.int32),
    per_row(jnp.int32),
    per_row(jnp.float32),
    per_row(jnp.float32),
  )
  batch = Trajectory(
    Experience(timestep, action, extras),
    per_step(dtype=jnp.bool_),
    drawn,
  )
  state = jax.eval_shape(agent.init, jax.random.key(0))
  fresh = jax.eval_shape(agent.refresh, state, batch, 0, jax.random.key(0))
  fresh.experience.extras.pop('network_value', None)
  shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
  assert shapes(fresh) == shapes(batch)


def test_a_saved_config_is_read_back(finished):
  workdir, _ = finished
  experiment = saved_run.load_experiment(str(workdir))
  saved = run_config.read_run_config(workdir)
  saved.pop('made_with')
  assert run_config._plain(experiment.as_dict()) == saved
