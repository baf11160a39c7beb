"""Benchmarks: the measuring itself, operation counts, equal searches, CSV."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import launch, read_csv, refused

from experiments import build
from experiments.benchmarks import agents, cases, counting, frames, searches
from experiments.benchmarks import timing as benchmark_timing
from experiments.files.errors import UserError
from search import policies

# A network and a search as small as they come.
TINY = (
  'batch_size=4',
  'num_simulations=2',
  'env.num_envs=2',
  'warmup_decisions=32',
  'network.latent_size=8',
  'network.head_hidden=8',
  'network.lstm_size=8',
  'network.projector=8,8,8',
  'network.predictor=8',
)


@pytest.fixture(scope='module')
def experiment():
  return build.describe('efficientzero_catch', settings=TINY)


class Clock:
  """Two clocks that only tasks move."""

  def __init__(self):
    self.wall, self.cpu, self.calls = 0.0, 0.0, []

  def task(self, name, *walls):
    """Takes the given wall seconds in turn, half of them on the CPU."""
    left = list(walls)

    def run():
      seconds = left.pop(0)
      self.calls.append(name)
      self.wall += seconds
      self.cpu += seconds / 2

    return run

  @property
  def clocks(self):
    return (lambda: self.wall), (lambda: self.cpu)


def test_tasks_are_timed_in_turns_and_the_first_call_is_left_out():
  clock = Clock()
  tasks = {'a': clock.task('a', 100, 1, 3), 'b': clock.task('b', 50, 2, 4)}
  timings = benchmark_timing.interleaved(tasks, 2, clocks=clock.clocks)
  assert clock.calls == ['a', 'b', 'a', 'b', 'a', 'b']
  np.testing.assert_allclose(timings['a'].wall, [1, 3])
  np.testing.assert_allclose(timings['b'].cpu, [1, 2])


def test_short_tasks_are_called_several_times():
  clock = Clock()
  # The first compiles, the second takes 1 of 3 seconds: three calls a turn.
  task = clock.task('a', 100, 1, 1, 2, 3, 4, 5, 6)
  timings = benchmark_timing.interleaved({'a': task}, 2, 3.0, clock.clocks)
  np.testing.assert_allclose(timings['a'].wall, [2, 5])


def test_speeds_are_medians_and_ratios_are_of_medians():
  timing = benchmark_timing.Timing(
    np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.0, 8.0])
  )
  baseline = benchmark_timing.Timing(np.full(3, 8.0), np.full(3, 6.0))
  row = benchmark_timing.speed_row('x', 'y', 'z', 'u/s', 16, timing, baseline)
  assert row[4:10] == (8, 4, 16, 8, 4, 3)
  alone = benchmark_timing.speed_row('x', 'y', 'z', 'u/s', 16, timing)
  assert math.isnan(alone.ratio) and math.isnan(alone.ratio_cpu)


@pytest.mark.parametrize(
  ('number', 'text'),
  [
    (0.07126, '0.0713'),
    (12.0, '12'),
    (999.9, '1.00k'),
    (84_780, '84.8k'),
    (847_800, '848k'),
    (1_257_000, '1.26M'),
    (math.nan, ''),
  ],
)
def test_short_numbers(number, text):
  assert benchmark_timing.short(number) == text


def flops(function, *args):
  return counting.matmul_flops(jax.make_jaxpr(function)(*args))


def test_operations_of_products_by_hand():
  a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
  assert flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7
  # The gradients are two more products of that size.
  gradient = jax.grad(lambda a, b: jnp.sum(jnp.matmul(a, b) ** 2), (0, 1))
  assert flops(gradient, a, b) == 3 * 2 * 3 * 5 * 7
  batched = jax.vmap(jnp.matmul, (0, None))
  assert flops(batched, jnp.ones((4, 3, 5)), b) == 4 * 2 * 3 * 5 * 7


def test_operations_of_loops_and_branches_by_hand():
  square = jnp.ones((4, 4))

  def loop(x):
    body = lambda _, x: jax.jit(jnp.matmul)(x, square)
    x = jax.lax.fori_loop(0, 10, body, x)
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x)

  assert flops(loop, square) == (10 + 2) * 2 * 4**3
  endless = lambda x: jax.lax.while_loop(
    lambda x: x[0, 0] > 0, lambda x: x @ x, x
  )
  with pytest.raises(ValueError, match='length is open'):
    flops(endless, square)


@pytest.mark.parametrize('stride', [1, 2])
def test_operations_of_convolutions_by_hand(stride):
  image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

  def convolve(image, kernel):
    return jax.lax.conv_general_dilated(
      image,
      kernel,
      (stride, stride),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  size = 8 // stride
  once = 2 * (2 * size * size * 5) * (3 * 3 * 3)
  assert flops(convolve, image, kernel) == once
  gradient = jax.grad(lambda *a: jnp.sum(convolve(*a) ** 2), (0, 1))
  assert flops(gradient, image, kernel) == 3 * once


@pytest.mark.slow
def test_update_counts_the_unrolled_steps():
  """Twice the batch is twice the work, more steps are more."""

  def count(*settings):
    changed = build.describe('efficientzero_catch', settings=TINY + settings)
    env = build.make_env(changed, training=True)
    agent = build.make_agent(changed, env.spec)
    batch = agents.made_up_batch(changed, env, agent)
    key = jax.random.key(0)
    state = jax.eval_shape(agent.init, key)
    return flops(agent.update, state, batch, key)

  once = count()
  assert count('batch_size=8') == 2 * once
  three, seven = count('unroll_steps=3'), count('unroll_steps=7')
  assert seven - once == once - three > 0


def test_made_up_batch_fits_the_agent(experiment):
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  batch = agents.made_up_batch(experiment, env, agent)
  shapes = {x.shape[:2] for x in jax.tree.leaves(batch.experience)}
  assert shapes == {(4, experiment.config.window)}
  state = jax.eval_shape(agent.init, jax.random.key(0))
  refreshed = jax.eval_shape(agent.refresh, state, batch, 0, jax.random.key(0))
  assert jax.tree.structure(refreshed) == jax.tree.structure(batch)
  updated, _ = jax.eval_shape(agent.update, state, batch, jax.random.key(0))
  assert jax.tree.structure(updated) == jax.tree.structure(state)
  policy = batch.experience.extras['search_policy']
  np.testing.assert_allclose(policy.sum(-1), 1, rtol=1e-6)


def test_timed_sources_tell_their_seconds():
  from experiments.runtime.sources import Source

  source = Source(None, lambda *args: args, None, None, False)
  waits = []
  timed = agents.timed(source, waits)
  assert timed.next(1, 2, 3, 4) == (1, 2, 3, 4)
  assert len(waits) == 1 and waits[0] >= 0


def test_frames_are_counted_on_atari_alone(experiment):
  assert agents.frames_per_decision(experiment) == 1
  games = [
    build.describe('efficientzero_atari', env='Enduro-v5', settings=settings)
    for settings in ([], ['env.options=frame_skip=2'])
  ]
  assert [*map(agents.frames_per_decision, games)] == [4, 2]


def test_acting_needs_a_host_simulator():
  pure = build.describe('efficientzero_catch', env='jax:catch', settings=TINY)
  with pytest.raises(UserError, match='env=jax:catch'):
    agents.acting_rows(pure, cases.find('agent', quick=True))


def test_wide_embeddings_change_no_search():
  key = jax.random.key(0)
  found = []
  for width in (0, 16):
    model = searches.table_model(0, 4, 3, width)
    params, root, recurrent_fn = model
    assert root.embedding[1].shape == (4, width)
    search = searches.policies_in_turn(6)['puct']
    visits = jax.jit(
      lambda p, k, r, search=search, f=recurrent_fn: search(p, k, r, f)
    )
    found.append(visits(params, key, root))
  np.testing.assert_array_equal(*found)
  assert found[0].sum(-1).tolist() == [6] * 4


def test_paths_are_counted_by_hand():
  # 0 - 1 - 2 - 3, and a star.
  parents = np.array([[-1, 0, 1, 2], [-1, 0, 0, 0]])
  assert searches.mean_path(parents) == (1 + 2 + 3 + 1 + 1 + 1) / 6


def test_turns_are_those_that_a_search_makes(monkeypatch):
  params, root, recurrent_fn = searches.table_model(0, 4, 3, 0)
  counted, plain = [], jax.lax.while_loop

  def while_loop(condition, body, state):
    def counting(state):
      jax.debug.callback(lambda: counted.append(1))
      return body(state)

    return plain(condition, counting, state)

  monkeypatch.setattr(jax.lax, 'while_loop', while_loop)

  @jax.jit
  def search(params, key, root):
    output = policies.gumbel(params, key, root, recurrent_fn, 12, evaluate=True)
    return output.search_tree.parents

  parents = search(params, jax.random.key(0), root)
  jax.effects_barrier()
  assert len(counted) == searches.turns(np.asarray(parents)) > 12


@pytest.mark.parametrize(
  'kind', ['table', pytest.param('network', marks=pytest.mark.slow)]
)
def test_sampled_searches_beside_the_plain_one(kind):
  case = cases.find('agent', quick=True, repeats=1)
  name = 'factored, 7 bins x 6 dimensions'
  chosen = {name: searches.families()[name]}
  rows = searches._sampled(case, kind, chosen)
  names = ['puct, 20 enumerated actions', name, f'{name}, root evaluated']
  assert [row.name for row in rows] == names
  assert all(row.median > 0 and 'paths of' in row.note for row in rows)
  assert rows[0].ratio == 1 and rows[1].ratio > 0


def test_sampled_tables_tell_actions_apart():
  family = searches.families()['tanh-Gaussian, 6 dimensions']
  distribution = searches._distribution(family)
  params, root, step = searches.sampled_table(0, 64, distribution)
  draws = distribution.draw(jax.random.key(0), (64, 2))
  actions = distribution.sample(draws, root.prior_logits)
  first, second = (
    step(params, None, actions[:, i], root.embedding)[0].reward
    for i in range(2)
  )
  assert np.mean(np.asarray(first) == np.asarray(second)) < 0.1


@pytest.mark.slow
def test_launcher(tmp_path):
  out = tmp_path / 'results/benchmark.csv'
  settings = [f'--set={s}' for s in TINY]
  done = launch(
    'benchmark', '--quick', '--repeats=2', f'--out={out}', *settings
  )
  rows = read_csv(out)
  found = {(row['what'], row['name'], row['unit']): row for row in rows}
  for name in ('mctx.muzero_policy', 'efficientzero', 'batched search'):
    assert float(found['search', name, 'simulations/s']['median']) > 0
  for name, theirs in (
    ('puct', 'mctx.muzero_policy'),
    ('gumbel', 'mctx.gumbel_muzero_policy'),
    ('batched search', 'mctx.search'),
  ):
    note = found['search', name, 'simulations/s']['note']
    assert f'visits equal {theirs} at 4 of 4 roots' in note
    assert note.split(';')[1].strip() in ' '.join(done.stdout.split())
  updates = float(found['learner', 'update', 'updates/s']['median'])
  work = float(found['learner', 'update', 'GFLOP/s']['median'])
  both = found['learner', 'reanalyze and update', 'GFLOP/s']
  assert work > 0 and updates > 0 and float(both['ratio']) > 0
  assert ('acting', 'simulator alone', 'decisions/s') in found
  assert ('acting', 'simulator alone', 'frames/s') not in found
  for mode in ('synchronous', 'asynchronous'):
    name = f'learner, {mode} acting'
    share = float(
      found['acting', name, 'of wall time, waiting for experience']['median']
    )
    assert 0 <= share <= 1
  assert {row['compile'] for row in rows} == {'not in'}
  assert all('mctx' in r['versions'] and int(r['threads']) for r in rows)


@pytest.mark.slow
def test_frames_are_measured_at_two_sizes():
  case = cases.find('frames', quick=True, repeats=1)
  rows = [row for some in frames.frames_rows(case) for row in some]
  assert len({row.name for row in rows}) == 3
  sides = [row.setting.split()[0] for row in rows]
  assert sides == 3 * ['96x96', '2x2']
  assert all(0 < row.low <= row.median <= row.high for row in rows)


def test_launcher_errors_are_one_line():
  assert refused('benchmark', '--what=serch') == (
    'error: suite=serch: must be one of search, sampled, learner, acting, '
    'frames, scale, offline, experts, compile, accelerator\n'
  )
