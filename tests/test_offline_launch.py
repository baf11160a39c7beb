"""Runs that learn from a data set: resumes, devices, mistakes, play."""

import shutil
import signal
import subprocess
import time
import types

import jax
import numpy as np
import pytest
from launching import ENVIRONMENT, ROOT, command, launch
from test_launchers import rows
from trees import assert_equal

from experiments import build, presets
from experiments.build import dataset, evaluation
from experiments.data import layout, npz
from experiments.runtime import (
  checkpoint,
  distributed,
  loop,
  run_config,
)
from experiments.runtime import config as configs
from experiments.training import run as training_run
from experiments.training import stages as staging
from experiments.training import watcher
from experiments.training.keeper import Saved

N = 240
REF_MIN, REF_MAX = -100.0, 0.0
EVERY = 10
WARM, STEPS = 20, 45
RUN = (
  'hidden_sizes=8',
  'batch_size=16',
  'devices=1',
  'log_every=5',
  f'checkpoint_every={EVERY}',
  'keep_checkpoints=10',
  f'evaluate_every={EVERY}',
  'evaluate_episodes=4',
  'final_episodes=4',
  'env.options=max_steps=20',
)
ATAC = (*RUN, f'warm_start_updates={WARM}', 'slow_rate=1e-3')
COMBO = (
  *RUN,
  'model.widths=8',
  'model.elites=1',
  'model.members=2',
  'model_updates=20',
  'rollout_batch=4',
  'rollout_length=2',
  'model_capacity=64',
)


def make_dataset(seed=0, size=3, bound=2.0, env='Pendulum-v1', ref=True):
  """Looks like the pendulum's; episodes of 20, every third one terminates."""
  rng = np.random.default_rng(seed)
  last = np.arange(N) % 20 == 19
  terminated = last & (np.arange(N) // 20 % 3 == 2)
  high = np.full(1, bound, np.float32)
  return layout.make(
    observation=rng.normal(size=(N, size)),
    action=rng.uniform(-bound, bound, (N, 1)),
    reward=rng.normal(size=N) - 1,
    next_observation=rng.normal(size=(N, size)),
    terminated=terminated,
    truncated=last & ~terminated,
    about=layout.About(
      f'noise{seed}',
      env,
      -high,
      high,
      REF_MIN if ref else None,
      REF_MAX if ref else None,
    ),
  )


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'noise'
  npz.save(make_dataset(), path)
  return str(path)


def describe(data, preset='atac', **changes):
  changes = {
    'env': 'jax:pendulum',
    'steps': STEPS,
    'settings': COMBO if preset == 'combo' else ATAC,
  } | changes
  return build.describe(preset, dataset=data, **changes)


def make_trainer(experiment):
  return staging.make(experiment, Saved(), lambda: False)


def read_carry(stage, workdir):
  """All that a run's newest checkpoint holds, and its `extra`."""
  state = jax.eval_shape(stage.agent.init, jax.random.key(0))
  rows = stage.source.kept.template()
  template = loop.Carry(state, rows, np.zeros((), np.int32))
  saved = checkpoint.open(workdir / 'checkpoints', read_only=True)
  try:
    return saved.restore(template)
  finally:
    saved.close()


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
  """An uninterrupted run of a warm start and a game."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  experiment = describe(data)
  training_run.run(experiment, workdir)
  return workdir, experiment


def test_the_seed_of_a_run_draws_its_network_and_batches(tmp_path):
  npz.save(make_dataset(env=''), tmp_path / 'data')
  settings = ('hidden_sizes=8', 'batch_size=16', 'devices=1', 'log_every=1')
  seen = []
  for seed in (0, 1):
    workdir = tmp_path / str(seed)
    experiment = describe(
      str(tmp_path / 'data'), 'bc', env=None, steps=1, seed=seed,
      settings=settings,
    )  # fmt: skip
    training_run.run(experiment, workdir)
    (row,) = rows(workdir / 'metrics.csv')
    seen.append((row['loss_policy'], row['squared_error']))
  assert seen[0] != seen[1]


def test_a_run_has_its_phases_and_scores(whole, data):
  workdir, _ = whole
  metrics = rows(workdir / 'metrics.csv')
  assert [int(r['step']) for r in metrics] == list(range(5, STEPS + 1, 5))
  number = [int(float(r['phase'])) for r in metrics]
  assert number == [0] * (WARM // 5) + [1] * ((STEPS - WARM) // 5)
  for row in metrics:
    # The warm start has a likelihood, the game a pessimism.
    is_game = row['phase'].startswith('1')
    assert bool(row['pessimism']) is is_game
    assert bool(row['log_prob']) is not is_game
    assert 'decisions' not in row
    assert bool(row['eval_return']) is (int(row['step']) % EVERY == 0)
    if row['eval_return']:
      want = 100 * (float(row['eval_return']) - REF_MIN) / (REF_MAX - REF_MIN)
      np.testing.assert_allclose(float(row['eval_score']), want, rtol=1e-4)
  saved = run_config.read_run_config(workdir)
  assert saved['dataset'] == data
  assert saved['dataset_checksum'] == dataset.checksum(data)
  (played,) = rows(workdir / 'evaluation.csv')
  assert (played['checkpoint'], played['planner']) == ('final', 'policy')
  # 20 steps, each worth -16.3 to 0.
  assert -330 < float(played['return_mean']) < 0


def test_what_crosses_the_border(whole):
  workdir, experiment = whole
  first, second = make_trainer(experiment).stages
  assert (first.name, first.end, second.end) == ('warm_start', WARM, STEPS)
  # The checkpoint of the border, and the next one.
  found = {}
  for step, stage in ((WARM, first), (WARM + EVERY, second)):
    folder = workdir.parent / f'only{step}' / 'checkpoints'
    shutil.copytree(workdir / 'checkpoints' / str(step), folder / str(step))
    found[step] = read_carry(stage, folder.parent)
  carry, extra = found[WARM]
  assert extra['phase'] == 0 and found[WARM + EVERY][1]['phase'] == 1
  entered = staging.enter(second, carry)
  assert int(entered.step) == WARM
  before, after = carry.agent, entered.agent
  assert_equal(after.target_critic, before.target_critic)
  assert_equal(after.params.critic, before.params.critic)
  assert_equal(after.params.policy, before.params.policy)
  assert_equal(after.opt_state.critic, before.opt_state.critic)
  # Targets lag behind, and the temperature and the policy's Adam are fresh.
  kernels = lambda x: np.concatenate([k.ravel() for k in jax.tree.leaves(x)])
  lag = kernels(before.params.critic) - kernels(before.target_critic)
  assert np.abs(lag).max() > 1e-4
  assert float(before.params.log_temperature) != 0
  assert float(after.params.log_temperature) == 0
  for leaf in jax.tree.leaves(after.opt_state.policy):
    assert not np.any(leaf)


class Crash(Exception):
  """What ends a run without its doing."""


def crash_at(monkeypatch, what):
  """Ends a run inside a phase, by its number of updates, or between two."""

  def enter(stage, carry):
    del stage, carry
    raise Crash

  def log(self, step, row):
    write(self, step, row)
    if step == what:
      raise Crash

  write = watcher.Watcher.log
  if what == 'border':
    monkeypatch.setattr(staging, 'enter', enter)
  else:
    monkeypatch.setattr(watcher.Watcher, 'log', log)


def assert_equal_runs(experiment, one, two):
  assert rows(one / 'metrics.csv') == rows(two / 'metrics.csv')
  last = make_trainer(experiment).stages[-1]
  (a, about), (b, _) = (read_carry(last, folder) for folder in (one, two))
  assert int(a.step) == experiment.updates and about['phase'] == 1
  assert_equal(a, b)


@pytest.mark.parametrize(
  'where',
  [
    pytest.param(15, marks=pytest.mark.slow),
    'border',
    pytest.param(35, marks=pytest.mark.slow),
  ],
)
def test_a_run_goes_on_as_if_uninterrupted(
  whole, tmp_path, monkeypatch, capsys, where
):
  workdir, experiment = whole
  with monkeypatch.context() as patch, pytest.raises(Crash):
    crash_at(patch, where)
    training_run.run(experiment, tmp_path)
  capsys.readouterr()
  training_run.run(experiment, tmp_path)
  begin = {15: 10, 'border': 20, 35: 30}[where]
  assert f'resumed at update {begin} of {STEPS}' in capsys.readouterr().out
  assert_equal_runs(experiment, tmp_path, workdir)


@pytest.mark.slow
def test_killed_in_the_game_and_moved_data(whole, data, tmp_path):
  """The whole process is gone, and so is the data, to another folder."""
  workdir, experiment = whole
  flags = [
    '--preset=atac',
    '--env=jax:pendulum',
    f'--steps={STEPS}',
    *(f'--set={s}' for s in ATAC),
    f'--workdir={tmp_path}/cut',
  ]
  with open(tmp_path / 'log', 'w') as log:
    process = subprocess.Popen(
      command('train', f'--dataset={data}', *flags),
      cwd=ROOT,
      env=ENVIRONMENT,
      stdout=log,
      stderr=log,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / 'cut' / 'checkpoints' / '30').is_dir():
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
  shutil.copytree(data, tmp_path / 'moved')
  done = launch('train', f'--dataset={tmp_path}/moved', *flags)
  assert 'resumed at update' in done.stdout
  assert f'warm_start to {WARM}, game to {STEPS}' in done.stdout
  assert 'data set noise0: 240 transitions, 12 whole episodes' in done.stdout
  assert 'normalised score' in done.stdout and 'the data plays' in done.stdout
  assert_equal_runs(experiment, tmp_path / 'cut', workdir)


@pytest.mark.slow
def test_a_model_and_then_its_policy(data, tmp_path, monkeypatch):
  experiment = describe(data, 'combo', steps=40)
  training_run.run(experiment, tmp_path / 'whole')
  metrics = rows(tmp_path / 'whole' / 'metrics.csv')
  # Nobody plays while the model is learned.
  assert not any(r['eval_return'] for r in metrics[:4])
  assert metrics[-1]['eval_return'] and metrics[-1]['imagined_reward']
  with monkeypatch.context() as patch, pytest.raises(Crash):
    crash_at(patch, 35)
    training_run.run(experiment, tmp_path / 'cut')
  training_run.run(experiment, tmp_path / 'cut')
  assert_equal_runs(experiment, tmp_path / 'cut', tmp_path / 'whole')


@pytest.mark.slow
def test_two_devices_give_what_one_gives(whole, data, tmp_path):
  workdir, _ = whole
  settings = [s for s in ATAC if not s.startswith('devices')]
  training_run.run(describe(data, settings=(*settings, 'devices=2')), tmp_path)
  for got, want in zip(
    rows(tmp_path / 'metrics.csv'), rows(workdir / 'metrics.csv'), strict=True
  ):
    assert got.keys() == want.keys()
    for name in got:
      one, two = (float(x[name] or 'nan') for x in (got, want))
      np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_batches_of_the_host(data, tmp_path):
  settings = (*ATAC, 'data_on=host', 'final_episodes=0')
  experiment = describe(data, settings=settings)
  training_run.run(experiment, tmp_path)
  last = rows(tmp_path / 'metrics.csv')[-1]
  assert int(last['step']) == STEPS and np.isfinite(float(last['loss_critic']))


def test_a_data_set_without_environment(tmp_path, capsys):
  npz.save(make_dataset(env=''), tmp_path / 'data')
  experiment = describe(str(tmp_path / 'data'), env=None)
  assert experiment.env_name == ''
  training_run.run(experiment, tmp_path / 'run')
  assert 'no environment: nothing is played' in capsys.readouterr().out
  metrics = rows(tmp_path / 'run' / 'metrics.csv')
  assert int(metrics[-1]['step']) == STEPS
  assert not any('eval' in name for name in metrics[-1])
  assert not (tmp_path / 'run' / 'evaluation.csv').exists()
  done = launch('play', f'--workdir={tmp_path}/run', check=False)
  assert done.returncode == 2
  assert 'names no environment to play in' in done.stderr


@pytest.mark.slow
def test_a_run_is_played_when_its_data_is_gone(tmp_path):
  path = tmp_path / 'data'
  npz.save(make_dataset(), path)
  # TD3+BC needs the data's statistics to act.
  experiment = describe(str(path), 'td3_bc', settings=RUN, steps=20)
  assert experiment.config.normalise
  training_run.run(experiment, tmp_path / 'run')
  shutil.rmtree(path)
  flags = (f'--workdir={tmp_path}/run', '--episodes=4')
  done = launch('play', *flags, '--checkpoint=final,best')
  assert 'policy' in done.stdout
  played = rows(tmp_path / 'run' / 'play.csv')
  (then,) = rows(tmp_path / 'run' / 'evaluation.csv')
  assert [r['checkpoint'] for r in played] == ['final', 'best']
  assert played[0]['return_mean'] == then['return_mean']

  agent = types.SimpleNamespace(exploit=lambda *args: args)
  with pytest.raises(
    configs.UserError, match=r'^simulations=16: td3_bc has no'
  ):
    evaluation.evaluate(
      experiment, None, agent, {}, simulations=[16], episodes=1
    )


MISTAKES = {
  'no data': ({'dataset': None, 'env': None}, 'learns from a data set'),
  'no data, env': ({'dataset': None}, 'learns from a data set'),
  'agent': ({'preset': 'muzero_catch', 'settings': ()}, 'windows of its own'),
  'missing': ({'dataset': 'nowhere'}, 'nowhere: no such path'),
  'shape': ({'env': 'jax:acrobot'}, 'env=Acrobot: its observation has shape'),
  'no actions': ({'env': 'jax:cartpole'}, 'env=CartPole: its observation'),
  'steps': ({'steps': WARM}, f'steps={WARM}: must be above the {WARM} updates'),
  'pmap': ({'settings': (*ATAC, 'parallel=pmap')}, 'parallel=pmap'),
  'hold out': ({'settings': (*ATAC, 'hold_out=8')}, 'hold_out'),
  'rollouts': (
    {'preset': 'combo', 'settings': (*COMBO, 'rollout_batch=17')},
    'rollout_batch=17: must be at most batch_size=16',
  ),
  'ring': (
    {'preset': 'combo', 'settings': (*COMBO, 'model_capacity=63')},
    'model_capacity=63',
  ),
  'imagined on the host': (
    {'preset': 'combo', 'settings': (*COMBO, 'data_on=host')},
    'data_on=host',
  ),
}


def refused(data, **changes):
  """The one line that a mistake is told in, before anything compiles."""
  changes = {'preset': 'atac', 'dataset': data} | changes
  dataset = changes.pop('dataset')
  with pytest.raises(ValueError) as caught, configs.user_errors():
    experiment = describe(dataset, **changes)
    trainer = make_trainer(experiment)
    for stage in trainer.stages:
      jax.eval_shape(stage.source.init, jax.random.key(0))
  assert '\n' not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize('what', MISTAKES)
def test_mistakes_are_one_line_that_says_what_is_right(data, what):
  changes, hint = MISTAKES[what]
  assert hint in refused(data, **changes)


def test_bounds_of_another_simulator_are_refused(tmp_path):
  npz.save(make_dataset(bound=1.0), tmp_path / 'data')
  message = refused(str(tmp_path / 'data'))
  assert message.startswith('env=Pendulum: action bound low=[-2.]')


def test_one_process_learns_from_a_data_set(data, monkeypatch):
  monkeypatch.setattr(distributed, 'process', lambda: (0, 2))
  assert refused(data).startswith('distributed: ')


def test_other_data_of_the_same_name_is_refused(tmp_path):
  flags = (
    '--preset=bc',
    '--env=jax:pendulum',
    f'--dataset={tmp_path}/data',
    '--steps=5',
    *(f'--set={s}' for s in RUN),
    '--set=final_episodes=0',
    f'--workdir={tmp_path}/run',
  )
  npz.save(make_dataset(), tmp_path / 'data')
  settings = (*RUN, 'final_episodes=0')
  experiment = describe(f'{tmp_path}/data', 'bc', settings=settings, steps=5)
  training_run.run(experiment, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'data')
  npz.save(make_dataset(seed=1), tmp_path / 'data')
  done = launch('train', *flags, check=False)
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert done.stderr.startswith('error: ')
  assert 'dataset_checksum was' in done.stderr

  done = launch('train', '--preset=atac', '--env=jax:pendulum', check=False)
  assert done.returncode == 2
  assert done.stderr.startswith('error: dataset: atac learns from')


OFFLINE = [
  name
  for name, p in presets.PRESETS.items()
  if not p.env and p.agent != 'language'
]


@pytest.mark.parametrize('name', OFFLINE)
def test_every_preset_of_a_data_set_builds(data, name):
  experiment = build.describe(name, dataset=data)
  assert experiment.env_name == 'Pendulum-v1'
  assert experiment.updates == presets.PRESETS[name].steps
  trainer = make_trainer(experiment._replace(env_name='jax:pendulum'))
  assert trainer.stages[-1].end == experiment.updates
  for stage in trainer.stages:
    source = jax.eval_shape(stage.source.init, jax.random.key(0))
    state = jax.eval_shape(stage.agent.init, jax.random.key(0))
    carry = loop.Carry(state, source, jax.ShapeDtypeStruct((), np.int32))
    after, *_ = jax.eval_shape(
      loop.compile_interval(stage.agent, stage.source),
      carry,
      jax.random.key(0),
      1,
    )
    assert jax.tree.structure(after) == jax.tree.structure(carry)
