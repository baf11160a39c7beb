"""Scaling: operations and bytes by hand, shares of a roof, one small run."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import launch, read_csv, refused

from experiments import build
from experiments.benchmarks import agents, cases, counting, roofline, scale
from experiments.benchmarks.timing import Measurement

TINY = (
  'batch_size=4',
  'num_simulations=2',
  'env.num_envs=2',
  'warmup_decisions=32',
  'network.latent_size=8',
  'network.head_hidden=8',
  'network.projector=8,8,8',
  'network.predictor=8',
)
CASE = cases.Case(seeds=(2,), more_seeds=())


def work(function, *args, turns=1.0):
  return roofline.work(jax.make_jaxpr(function)(*args), turns)


def test_work_of_products_by_hand():
  a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
  once = (2 * 3 * 5 * 7, 4 * (3 * 5 + 5 * 7 + 3 * 7))
  assert work(jnp.matmul, a, b) == once
  assert work(lambda a, b: jnp.tanh(a) @ b, a, b) == once

  def loop(a, b, n):
    return jax.lax.fori_loop(0, n, lambda _, x: x + a @ b, a @ b)

  assert work(lambda a, b: loop(a, b, 4), a, b) == tuple(5 * x for x in once)
  unknown = work(loop, a, b, jnp.int32(4), turns=0.25)
  assert unknown == tuple(1.25 * x for x in once)


def test_work_of_the_dearest_branch():
  a = jnp.ones((4, 4))
  either = lambda a: jax.lax.cond(
    a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a @ a, a
  )
  assert work(either, a).flops == 2 * 2 * 4**3


def test_moved_bytes_by_hand():
  table, index = jnp.ones((100, 8)), jnp.arange(3)
  assert work(lambda t, i: t[i], table, index) == (0, 2 * 4 * 3 * 8)
  add = lambda t, i: t.at[i].add(jnp.ones((3, 8)))
  assert work(add, table, index) == (0, 3 * 4 * 3 * 8)
  put = lambda t, i: jax.lax.dynamic_update_slice(t, jnp.ones((2, 8)), (i, 0))
  assert work(put, table, jnp.int32(3)) == (0, 2 * 4 * 2 * 8)
  # A walk of unknown length without products counts once, whatever `turns`.
  walk = lambda t, i: jax.lax.while_loop(
    lambda i: t[i, 0] > 0, lambda i: i + 1, i
  )
  few, many = (work(walk, table, jnp.int32(3), turns=n) for n in (1, 9))
  assert few == many and few.bytes > 0


@pytest.fixture(scope='module')
def subject():
  settings = (*TINY, 'decisions_per_update=3')
  experiment = build.describe(
    'muzero_catch', env='jax:catch', settings=settings
  )
  return scale.Subject('tiny', experiment, (2,))


def test_work_of_a_whole_update_is_that_of_its_parts(subject):
  experiment = subject.experiment
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  batch = agents.made_up_batch(experiment, env, agent)
  key = jax.random.key(0)
  state = jax.eval_shape(agent.init, key)
  timestep = jax.tree.map(lambda x: x[:2, 0], batch.experience.timestep)
  parts = (
    (agent.update, (state, batch, key), 1),
    (agent.refresh, (state, batch, 0, key), 1),
    # 3 decisions an update of 2 environments.
    (agent.act, (state.params, key, timestep), 1.5),
  )
  flops = [
    n * counting.matmul_flops(jax.make_jaxpr(f)(*args)) for f, args, n in parts
  ]
  assert all(flops)
  assert scale.update_work(subject).flops == sum(flops)


def test_shares_of_the_roof_by_hand():
  roof = roofline.Roof(np.array([100e9, 60e9]), np.array([10e9, 5e9]))
  speed = Measurement('seeds', 'x', '', 'updates/s', 4, 3, 5, 2)
  # 2 operations a byte: memory allows 20 (and 10) GFLOP/s.
  does = roofline.Work(2e9, 1e9)
  rate, traffic = roofline.roof_rows('x', 'y', does, speed, roof)
  assert rate[3:10] == ('GFLOP/s', 8, 6, 10, 4, 8 / 20, 4 / 10)
  assert traffic[3:10] == ('GB/s', 4, 3, 5, 2, 4 / 10, 2 / 5)
  # 20 a byte: the peak is what bounds.
  does = roofline.Work(20e9, 1e9)
  rate, _ = roofline.roof_rows('x', 'y', does, speed, roof)
  assert rate[8:10] == (80 / 100, 40 / 60)


def test_peak_memory_remembers_what_was_freed():
  before, highest = roofline.memory_in_use(forget=True)
  if math.isnan(before):
    pytest.skip('this system does not say')
  assert highest - before < 2**22
  block = np.ones(2**26, np.uint8)
  now, _ = roofline.memory_in_use()
  assert now - before > 0.9 * block.nbytes
  del block
  now, peak = roofline.memory_in_use()
  assert now - before < 2**25 and peak - before > 0.9 * 2**26


def test_whole_periods_are_measured(monkeypatch):
  clock = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(
    scale,
    'time',
    types.SimpleNamespace(perf_counter=lambda: clock.now),
  )
  calls = []

  def task(updates):
    # The first call fills the replay.
    clock.now += 0.1 * updates + (0 if calls else 50)
    calls.append(updates)

  # 4 updates take 0.4 of 1.5 seconds.
  assert scale._enough(task, 4, 1.5) == 16
  assert calls == [4, 4]


def test_what_needs_too_much_memory_is_not_run(subject, monkeypatch):
  started = []

  def trainer(subject, number):
    train = lambda updates: started.append(number)
    memory = 1000 * (number or 1)
    return scale._Trainer(lambda: train, 0.0, memory, memory, memory)

  monkeypatch.setattr(scale, '_trainer', trainer)
  monkeypatch.setattr(scale, 'free_bytes', lambda: 8001.0)
  roof = roofline.Roof(np.ones(2), np.ones(2))
  case = CASE._replace(memory_share=0.5, repeats=1, least_seconds=0.0)
  found = scale.seed_rows(subject._replace(seeds=(2, 3)), roof, case)
  rows = [row for some in found for row in some]
  speeds = {row.name for row in rows if row.unit == 'updates/s'}
  assert speeds == {'one seed beside 2 seeds', '2 seeds'}
  assert 3 not in started and 2 in started
  notes = [row.note for row in rows if row.name.startswith('3 seeds')]
  assert notes and all('not run: more than 4e-06 GB' in note for note in notes)
  state = next(row for row in rows if row.name == '3 seeds, state')
  assert (state.median, state.unit) == (1e-3, 'MB a seed')


def test_cases_and_sizes():
  case = cases.find('scale', seeds=(2, 8), repeats=3)
  assert (case.seeds, case.more_seeds, case.repeats) == ((2, 8), (2, 8), 3)
  found = scale.subjects(None, ('td_steps=3',), case)
  names = ['muzero_small', 'muzero_catch', 'efficientzero_catch']
  assert [one.name for one in found] == names
  assert {one.experiment.env_name for one in found} == {'jax:catch'}
  assert {one.experiment.config.td_steps for one in found} == {3}
  assert found[0].experiment.run.batch_size < found[1].experiment.run.batch_size
  quick = cases.find('scale', quick=True)
  assert len(scale.subjects(None, (), quick)) == 1
  own = scale.subjects('sampled_muzero_pendulum', (), case)
  assert [one.experiment.env_name for one in own] == ['jax:pendulum']


@pytest.mark.parametrize('flag', ['--seeds=4,0', '--seeds=4,x'])
def test_wrong_seeds_are_one_line(flag):
  said = refused('benchmark', '--suite=scale', flag)
  assert said.startswith(f'error: seeds={flag[-1]}: must be ')


@pytest.mark.slow
def test_launcher(tmp_path):
  out = tmp_path / 'scale.csv'
  settings = [f'--set={s}' for s in TINY]
  launch('benchmark', '--suite=scale', '--quick', f'--out={out}', *settings)
  rows = read_csv(out)
  found = {(row['what'], row['name'], row['unit']): row for row in rows}
  speed = found['seeds', '2 seeds', 'updates/s']
  assert float(speed['median']) > 0 and float(speed['ratio_cpu']) > 0
  assert speed['setting'].endswith(', one core')
  assert ('seeds', '2 seeds', 'seconds to compile') in found
  one, two = (
    found['memory', f'{name}, state', 'MB a seed']
    for name in ('one seed', '2 seeds')
  )
  # Two seeds hold twice as much, but for the step; no copy is made of it.
  np.testing.assert_allclose(float(two['median']), float(one['median']), 1e-4)
  assert {one['note'], two['note']} == {'100% written in place'}
  settings = {row['setting'] for row in rows if row['what'] == 'devices'}
  assert {s.partition(', ')[2].split(':')[0] for s in settings} == {
    'strong',
    'weak',
  }
  many = [row for row in rows if row['name'] == '2 devices']
  assert len(many) == 2 and all(float(row['ratio_cpu']) > 0 for row in many)
  assert all('overhead only' in row['note'] for row in many)
  rate = found['roofline', 'muzero_small, 2 seeds', 'GFLOP/s']
  work = found['roofline', 'muzero_small, update', 'GFLOP/s']
  assert float(rate['ratio']) > 0 and float(work['ratio']) > 0
  assert out.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
