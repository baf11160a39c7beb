"""Sweeps over a data set: rows equal runs, resume, devices, processes."""

# ruff: noqa: F811 (a fixture of the other half is imported)

import shutil

import jax
import numpy as np
import pytest
from launching import launch
from test_launchers import rows
from test_offline_launch import (  # noqa: F401
  ATAC,
  EVERY,
  REF_MAX,
  REF_MIN,
  RUN,
  STEPS,
  WARM,
  data,
  describe,
  make_dataset,
  make_trainer,
)

from experiments import build
from experiments.build import dataset
from experiments.data import npz
from experiments.runtime import config as configs
from experiments.runtime import (
  evaluate,
  loop,
  mesh,
)
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps import program as sweep_program
from experiments.sweeps import rows as sweep_rows
from experiments.sweeps import run as sweep_run
from experiments.sweeps import train as sweep_train
from experiments.sweeps.plan import Row
from experiments.training import stages as staging

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
