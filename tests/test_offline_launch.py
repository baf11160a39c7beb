"""Launching agents that learn from a data set: runs, resumes, sweeps, play."""

import shutil
import signal
import subprocess
import time
import types

import jax
import numpy as np
import pytest
from test_launchers import ENVIRONMENT, ROOT, command, launch, rows

from experiments import build, presets
from experiments.build import dataset, evaluation
from experiments.data import layout, npz
from experiments.runtime import (
  checkpoint,
  distributed,
  evaluate,
  loop,
  mesh,
  run_config,
)
from experiments.runtime import config as configs
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps import program as sweep_program
from experiments.sweeps import rows as sweep_rows
from experiments.sweeps import run as sweep_run
from experiments.sweeps import train as sweep_train
from experiments.sweeps.plan import Row
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


def leaves_equal(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


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
  leaves_equal(after.target_critic, before.target_critic)
  leaves_equal(after.params.critic, before.params.critic)
  leaves_equal(after.params.policy, before.params.policy)
  leaves_equal(after.opt_state.critic, before.opt_state.critic)
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
  leaves_equal(a, b)


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


# Sweeps.


def make_program(data, values, env='jax:pendulum', field='agent.beta'):
  experiment = describe(data, env=env)
  path = sweep_plan.find_path(experiment, field)
  return sweep_program.Program(
    experiment, (path,), [[v] for v in values], list(range(len(values)))
  )


@pytest.fixture(scope='module')
def program(data):
  # Three rows on two devices.
  return make_program(data, [0.5, 4.0, 64.0])


@pytest.fixture(scope='module')
def points(program, tmp_path_factory):
  folder = tmp_path_factory.mktemp('points')
  return sweep_train.run(program, folder, mesh=mesh.make_mesh())


def alone(experiment):
  """The curve of one run by the plain loop, as the launcher runs it."""
  trainer, carry, curve = make_trainer(experiment), None, []
  key = jax.random.key(experiment.seed)
  for stage in trainer.stages:
    player = experiment.material.evaluate(experiment, stage.agent)
    carry = (
      loop.init(stage.agent, stage.source, key)
      if carry is None
      else staging.enter(stage, carry)
    )
    carry = loop.run(
      stage.agent,
      stage.source,
      carry,
      key=key,
      steps=stage.end,
      intervals=loop.Intervals(log=5, evaluate=EVERY),
      hooks=loop.Hooks(
        log=lambda step, row: curve.append((step, row)),
        evaluate=lambda step, state, player=player: player(state.params, step),
      ),
    )
  return curve


def test_a_row_is_the_run_of_the_same_seed_alone(program, points):
  row = 2
  experiment = sweep_plan.put(program.experiment, *program.paths, 64.0)
  curve = alone(experiment._replace(seed=row))
  assert [p.step for p in points] == [step for step, _ in curve]
  for point, (step, want) in zip(points, curve):
    want.pop('updates_per_second')
    got = {n: x[row] for n, x in point.metrics.items() if np.isfinite(x[row])}
    assert got.pop('finite') == 1
    if step == STEPS:  # a run alone does not evaluate at its end
      want |= {n: got[n] for n in got if n.startswith('eval')}
    assert got.keys() == want.keys()
    for name, value in got.items():
      # The order of sums within a product is the compiler's.
      np.testing.assert_allclose(
        value, want[name], rtol=1e-3, atol=1e-4, err_msg=name
      )


def test_rows_score_by_the_data_sets_own_references(points):
  last = points[-1].metrics
  want = 100 * (last['eval_return'] - REF_MIN) / (REF_MAX - REF_MIN)
  np.testing.assert_allclose(last['eval_score'], want)
  assert len(set(last['eval_return'])) == 3


@pytest.mark.parametrize('stop', [WARM, 35])
def test_a_stopped_sweep_goes_on_as_if_uninterrupted(
  program, points, tmp_path, stop
):
  two, reached = mesh.make_mesh(), []
  shared = {'mesh': two, 'report': lambda step, row: reached.append(step)}
  stopped = sweep_train.run(
    program, tmp_path, stopping=lambda: reached[-1] >= stop, **shared
  )
  assert stopped is None and reached[-1] == stop
  reached.clear()
  again = sweep_train.run(program, tmp_path, **shared)
  assert reached[0] == stop + 5
  for got, want in zip(again, points, strict=True):
    assert got.step == want.step
    for name, column in got.metrics.items():
      np.testing.assert_array_equal(column, want.metrics.get(name, np.nan))
    assert want.metrics.keys() <= got.metrics.keys()


def test_a_sweep_has_the_data_once_on_each_device(data):
  program = make_program(data, [1.0, 2.0])
  one = mesh.make_mesh(jax.devices()[:1])
  first, second = (
    sweep_program.compiled(f, one)
    for f in sweep_program.row_functions(program.experiment, program.paths)
  )
  values = np.asarray(program.values, np.float32)
  seeds = np.asarray(program.seeds, np.uint32)
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  rows = dataset.rows_of(dataset.opened(data))

  def copies():
    shape = rows.transitions.o_tm1.shape
    return sum(
      x.shape == shape and not x.is_deleted() for x in jax.live_arrays()
    )

  before = copies()
  carry = first.init(values, seeds, first.load())
  step = np.int32(1)
  taken = first.interval.lower(values, carry, seeds, step).compile()
  arguments = taken.memory_analysis().argument_size_in_bytes
  expected = size(rows) + size(carry.agent) + size((values, seeds, step))
  assert expected <= arguments + 8 < expected + 1024
  carry, *_ = first.interval(values, carry, seeds, step)
  # Observations and next ones.
  assert copies() - before == 2
  carry = second.enter(values, carry._replace(source=None), carry.source)
  carry, *_ = second.interval(values, carry, seeds, step)
  assert copies() - before == 2


def test_simulators_of_the_host_play_all_rows_at_once(data):
  """Every row plays what its policy plays alone on the same simulators."""
  experiment = describe(
    data,
    env='Pendulum-v1',
    settings=(*ATAC[:-1], 'env.options=max_episode_steps=20'),
  )
  program = make_program(data, [1.0, 2.0])._replace(experiment=experiment)
  whole = mesh.make_mesh()
  first, _ = sweep_program.row_functions(experiment, program.paths)
  phase = sweep_program.compiled(first, whole)
  assert phase.measure is not None and phase.measure.evaluate is None
  act_all = phase.measure.act
  values = np.asarray(program.values, np.float32)
  carry = phase.init(values, np.uint32([0, 1]), phase.load())
  params = carry.agent.params
  played = sweep_train.on_host(experiment, act_all, values, params, 7)
  returns, lengths = played['eval']
  episodes = experiment.run.evaluate_episodes
  assert returns.shape == lengths.shape == (2, episodes)
  np.testing.assert_array_equal(lengths, 20)
  env = build.make_env(experiment, training=False, num_envs=episodes)
  agent = make_trainer(experiment).stages[0].agent
  act = jax.jit(lambda *args: agent.exploit(*args)[0])
  for row in range(2):
    own = jax.tree.map(lambda x, i=row: x[i], params)
    # As a run alone evaluates: every row meets the same episodes.
    want = evaluate.on_host(
      env,
      act,
      jax.device_put(own, jax.devices()[0]),
      key=jax.random.key(7),
      num_episodes=episodes,
      seed=7,
    )
    np.testing.assert_allclose(returns[row], want.returns, rtol=1e-4)

  # A row that has diverged takes none with it.
  spoiled = jax.tree.map(lambda x: x.at[1].set(np.nan), params)
  played = sweep_train.on_host(experiment, act_all, values, spoiled, 7)
  np.testing.assert_allclose(played['eval'][0][0], returns[0], rtol=1e-4)
  assert np.isnan(played['eval'][0][1]).all()


def test_floats_of_both_phases_are_traced(data):
  names = ('beta', 'fast_rate', 'reward_factor', 'gamma', 'target_rate')
  experiment = describe(data)
  paths = tuple(sweep_plan.find_path(experiment, name) for name in names)
  assert sweep_program.traceable(experiment, paths) == paths


@pytest.mark.slow
def test_the_launcher_sweeps_over_a_data_set(tmp_path):
  npz.save(make_dataset(), tmp_path / 'data')
  flags = (
    '--preset=atac',
    '--env=jax:pendulum',
    f'--steps={STEPS}',
    *(f'--set={s}' for s in ATAC),
    '--grid=beta=1,16',
    '--seeds=2',
    f'--workdir={tmp_path}/sweep',
  )
  done = launch('sweep', f'--dataset={tmp_path}/data', *flags)
  assert '2 settings x 2 seeds = 4 rows, engine vmap' in done.stdout
  assert 'seeds and agent.beta vmapped' in done.stdout
  table = rows(tmp_path / 'sweep' / 'sweep.csv')
  assert [(r['beta'], r['seed'], r['status']) for r in table] == [
    (beta, seed, 'done') for beta in ('1', '16') for seed in '01'
  ]
  curves = rows(tmp_path / 'sweep' / 'curves.csv')
  assert all(r['eval_score'] for r in curves if r['eval_return'])

  shutil.rmtree(tmp_path / 'data')
  npz.save(make_dataset(seed=1), tmp_path / 'data')
  done = launch('sweep', f'--dataset={tmp_path}/data', *flags, check=False)
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert 'dataset_checksum was' in done.stderr


def test_rows_of_one_program_need_the_data_on_the_device(data):
  plan = sweep_plan.make_plan('bc', dataset=data, fixed=['data_on=host'])
  with pytest.raises(configs.UserError, match=r'^data_on=host: .*processes$'):
    sweep_run.choose_engine(plan, 'auto')
  assert sweep_run.choose_engine(plan, 'processes') == 'processes'


def test_rows_of_agents_without_search_run_as_processes(data, tmp_path):
  plan = sweep_plan.make_plan('bc', dataset=data, steps=5, fixed=RUN)
  (job,) = sweep_rows.jobs(plan, [Row(0, 3)], tmp_path)
  assert f'--dataset={data}' in job.arguments and job.updates == 5
  assert '--set=final_simulations=' in job.arguments
