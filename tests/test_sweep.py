"""Sweeps: one program of many rows; what is finished stays; the launcher."""

import pathlib

import jax
import numpy as np
import pytest
from launching import launch, read_csv

from experiments import build
from experiments.runtime import evaluate, loop, mesh
from experiments.sweeps import engines, kept
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps import program as sweep_program
from experiments.sweeps import train as sweep_train
from experiments.sweeps.plan import Row

TINY = (
  'env.num_envs=4',
  'warmup_decisions=64',
  'decisions_per_update=4',
  'replay_capacity=400',
  'batch_size=8',
  'num_simulations=2',
  'network.latent_size=8',
  'network.blocks=1',
  'network.torso=vector',
  'network.norm=layer',
  'network.head_hidden=4',
  'network.value_bins=5',
  'network.reward_bins=5',
  'network.projector=4,4',
  'network.predictor=4',
  'unroll_steps=2',
  'td_steps=2',
  'log_every=5',
  'evaluate_every=10',
  'evaluate_episodes=8',
  'reanalyze_fraction=0',
)
STEPS = 112  # 12 updates: the last interval is a short one
SHARED = {'env': 'jax:catch', 'steps': STEPS, 'fixed': TINY}


@pytest.fixture(scope='module')
def plan():
  return sweep_plan.make_plan(
    'muzero_catch', grid=['learning_rate=1e-3,1e-2,1e38'], **SHARED
  )


@pytest.fixture(scope='module')
def program(plan):
  # Three rows on two devices; the last one diverges.
  part = engines.Part(
    pathlib.Path('none'),
    (Row(0, 0), Row(1, 3), Row(2, 0)),
    ('agent.learning_rate',),
  )
  return engines.program_of(plan, part)


@pytest.fixture(scope='module')
def points(program, tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  return sweep_train.run(program, folder, mesh=mesh.make_mesh())


def alone(experiment):
  """The curve of one run by the plain loop, as the launcher runs it."""
  from agents.core import planning

  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  source = build.make_source(experiment, env, agent)
  key = jax.random.key(experiment.seed)
  curve = []

  def played(step, state):
    planner = planning.make_planner(experiment.config.search, evaluate=True)
    return evaluate.on_device(
      env,
      evaluate.player(planner, agent.model),
      state.params,
      key=jax.random.fold_in(key, step),
      num_episodes=8,
    ).summary()

  loop.run(
    agent,
    source,
    loop.init(agent, source, key),
    key=key,
    steps=experiment.updates,
    intervals=loop.Intervals(log=5, evaluate=10),
    hooks=loop.Hooks(
      log=lambda step, row: curve.append((step, row)), evaluate=played
    ),
  )
  return curve


def test_a_row_is_the_run_of_the_same_seed_alone(plan, points):
  curve = alone(plan.describe(Row(1, 3)))
  assert [p.step for p in points] == [step for step, _ in curve]
  assert [p.step for p in points] == [5, 10, 15, 16]
  assert points[-1].metrics['decisions'].tolist() == [112] * 3
  decisions = 0
  for point, (step, want) in zip(points, curve):
    got = {name: x[1] for name, x in point.metrics.items()}
    assert got.pop('finite') == 1
    want.pop('updates_per_second')
    decisions += want.pop('decisions')
    assert got.pop('decisions') == decisions
    if step == 16:  # a run alone does not evaluate at its end
      assert np.isfinite(got['eval_return'])
      want |= {n: got[n] for n in got if n.startswith('eval')}
    got = {n: x for n, x in got.items() if n in want or np.isfinite(x)}
    got = {n: x for n, x in got.items() if not n.startswith('network')}
    assert got.keys() == want.keys()
    for name, value in got.items():
      # The order of sums within a product is the compiler's.
      np.testing.assert_allclose(
        value, want[name], rtol=1e-4, atol=1e-5, err_msg=name
      )


def test_rows_differ_in_their_float(points):
  first, second = points[-1].metrics['gradient_norm'][:2]
  assert abs(first - second) > 1e-3


def test_a_row_of_nans_is_kept_as_such(points):
  last = points[-1].metrics
  assert last['finite'].tolist() == [1, 1, 0]
  assert np.isnan(last['eval_return'][2])
  assert np.isfinite(last['eval_return'][:2]).all()


@pytest.mark.slow
def test_stopped_and_run_again_equals_uninterrupted(program, points, tmp_path):
  two = mesh.make_mesh()
  stopped = sweep_train.run(program, tmp_path, mesh=two, stopping=lambda: True)
  assert stopped is None
  steps = []
  again = sweep_train.run(
    program, tmp_path, mesh=two, report=lambda step, row: steps.append(step)
  )
  assert steps == [10, 12]
  for got, want in zip(again, points, strict=True):
    assert got.step == want.step
    for name in want.metrics:
      np.testing.assert_array_equal(got.metrics[name], want.metrics[name])
  kept.forget(tmp_path)
  assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_what_changes_shapes_is_another_program(tmp_path):
  mine = ('num_simulations', 'reanalyze_fraction')
  fixed = [s for s in TINY if not s.startswith(mine)]
  swept = sweep_plan.make_plan(
    'muzero_catch',
    grid=[
      'gamma=0.9,0.99',
      'num_simulations=1,2',
      'reanalyze_fraction=0,0.5',
    ],
    **SHARED | {'fixed': fixed},
  )
  rows = sweep_plan.rows(swept, 2)
  found = engines.parts(swept, rows, tmp_path, max_rows=3)
  # A fraction is a number of searches; gamma and the seed are traced.
  assert {part.traced for part in found} == {('agent.gamma',)}
  assert [len(part.rows) for part in found] == [3, 1] * 4
  assert sorted(row for part in found for row in part.rows) == sorted(rows)
  for part in found:
    values = {swept.settings[row.setting][1:] for row in part.rows}
    assert len(values) == 1


@pytest.mark.parametrize(
  ('preset', 'env', 'floats'),
  [
    (
      'efficientzero_catch',
      'jax:catch',
      ('off_policy_fraction', 'consistency_weight', 'replay_alpha'),
    ),
    (
      'sampled_muzero_pendulum',
      'jax:pendulum',
      ('min_std', 'temperature', 'sample_temperature', 'replay_beta'),
    ),
  ],
)
def test_floats_of_agents_search_and_replay_are_traced(preset, env, floats):
  settings = [
    s
    for s in TINY
    if preset.startswith('eff') or not s.startswith('network.lstm')
  ]
  swept = sweep_plan.make_plan(preset, env=env, steps=STEPS, fixed=settings)
  experiment = swept.describe(Row(0, 0))
  paths = tuple(sweep_plan.find_path(experiment, name) for name in floats)
  assert sweep_program.traceable(experiment, paths) == paths


def run_sweep(*flags, check=True):
  return launch('sweep', *flags, check=check, JAX_NUM_CPU_DEVICES='2')


@pytest.mark.slow
def test_the_launcher_sweeps_goes_on_and_refuses(tmp_path):
  flags = (
    '--preset=muzero_catch',
    '--env=jax:catch',
    f'--steps={STEPS}',
    *(f'--set={s}' for s in TINY),
    '--grid=learning_rate=1e-3,3e-3,1e-2,3e-2',
    f'--workdir={tmp_path}',
  )
  done = run_sweep(*flags, '--seeds=1')
  assert 'best: learning_rate=' in done.stdout
  assert '--set=learning_rate=' in done.stdout
  first = read_csv(tmp_path / 'sweep.csv')
  rates = ['1e-3', '3e-3', '1e-2', '3e-2']
  assert [r['learning_rate'] for r in first] == rates
  assert (tmp_path / 'sweep.png').exists()
  assert not (tmp_path / 'programs' / '000' / 'checkpoints').exists()

  run_sweep(*flags, '--seeds=2')
  second = read_csv(tmp_path / 'sweep.csv')
  assert [r for r in second if r['seed'] == '0'] == first
  assert [r['status'] for r in second] == ['done'] * 8
  assert [r['seeds'] for r in read_csv(tmp_path / 'summary.csv')] == ['2'] * 4
  curves = read_csv(tmp_path / 'curves.csv')
  assert len(curves) == 8 * 3
  assert {r['step'] for r in curves if r['network_return']} == {'10', '12'}

  done = run_sweep(*flags, '--grid=gamma=0.9,0.99', check=False)
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert 'fields' in done.stderr and 'holds another run' in done.stderr


@pytest.mark.slow
def test_engines_report_the_same_returns(tmp_path):
  """As many episodes, of the same seeds, by the same parameters."""
  tables = {}
  for engine in ('vmap', 'processes'):
    run_sweep(
      *('--preset=muzero_catch', '--env=jax:catch', f'--steps={STEPS}'),
      *(f'--set={s}' for s in TINY),
      # What a row of a program is.
      *('--set=parts=1', '--set=devices=1', '--set=final_episodes=4'),
      *('--seeds=3', f'--engine={engine}', f'--workdir={tmp_path / engine}'),
    )
    tables[engine] = [
      {n: row[n] for n in ('seed', 'status', 'eval_return', 'network_return')}
      for row in read_csv(tmp_path / engine / 'sweep.csv')
    ]
  assert len({row['eval_return'] for row in tables['vmap']}) > 1
  assert tables['processes'] == tables['vmap']


def test_vmap_needs_a_pure_environment(tmp_path):
  done = run_sweep(
    '--engine=vmap',
    '--env=Catch-v0',
    f'--workdir={tmp_path}/none',
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: engine=vmap: Catch-v0')


@pytest.mark.slow
def test_rows_of_the_host_run_as_processes(tmp_path):
  done = run_sweep(
    '--preset=muzero_catch',
    f'--steps={STEPS}',
    *(f'--set={s}' for s in TINY),
    '--set=final_episodes=4',
    '--set=acting=synchronous',
    '--seeds=2',
    '--at_once=1',
    f'--workdir={tmp_path}',
  )
  assert 'engine processes' in done.stdout
  table = read_csv(tmp_path / 'sweep.csv')
  assert [r['seed'] for r in table] == ['0', '1']
  for row, name in zip(table, ('s000_seed0', 's000_seed1')):
    played = read_csv(tmp_path / 'rows' / name / 'evaluation.csv')
    assert [r['simulations'] for r in played] == ['0', '2']
    assert float(row['final_return']) == float(played[1]['return_mean'])
    [measured] = read_csv(tmp_path / 'rows' / name / 'measured.csv')
    assert float(row['eval_return']) == float(measured['eval_return'])
    assert float(row['network_return']) == float(measured['network_return'])
    # Measured as it is while training, of the last of these updates, too.
    [last] = [
      r
      for r in read_csv(tmp_path / 'rows' / name / 'metrics.csv')
      if r['step'] == measured['step']
    ]
    assert last['eval_return'] in ('', measured['eval_return'])
