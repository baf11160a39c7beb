"""Sources of single transitions, against the rows that they are to give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from trees import assert_equal

from agents.core.types import (
  Agent,
  Experience,
  Info,
  Sample,
  Trajectory,
  Transition,
)
from experiments import build
from experiments.build import dataset as datasets
from experiments.data import layout
from experiments.runtime import loop
from experiments.runtime import mesh as meshes
from experiments.runtime import transitions as runtime
from search.model import TimeStep

N, BATCH, SCALE = 60, 16, 0.5
# Episodes of 7 rows: terminated, truncated, and a last one that goes on.
TERMINATED = np.arange(6, N, 14)
TRUNCATED = np.arange(13, N, 14)


def make_dataset(number=N):
  """Row `i` holds multiples of `i + 1` everywhere."""
  i = np.arange(1, number + 1, dtype=np.float32)
  ends = np.zeros((2, number), bool)
  for flags, rows in zip(ends, (TERMINATED, TRUNCATED)):
    flags[rows] = True
  bound = np.ones(1, np.float32)
  return layout.make(
    observation=i[:, None] * np.float32([1, 10, 100]),
    action=i[:, None] / number,
    reward=i,
    next_observation=i[:, None] * np.float32([2, 20, 200]),
    terminated=ends[0],
    truncated=ends[1],
    about=layout.About('counted', '', -bound, bound),
  )


@pytest.fixture(scope='module')
def dataset():
  return make_dataset()


def make_source(dataset, **options):
  options = {'reward_scale': SCALE} | options
  return runtime.from_dataset(datasets.rows_of(dataset), BATCH, **options)


def draw(source, calls):
  """Batches of so many calls, as one of numpy rows."""
  state = source.init(jax.random.key(0))
  take = jax.jit(source.next) if source.is_pure else source.next
  batches = []
  for i in range(calls):
    state, batch, measures = take(state, None, i, jax.random.key(i))
    assert not measures.counts and not measures.gauges
    batches.append(batch)
  return jax.tree.map(lambda *x: np.concatenate(x), *batches)


@pytest.fixture(scope='module', params=[True, False], ids=['device', 'host'])
def drawn(request, dataset):
  source = make_source(dataset, on_device=request.param)
  assert source.is_pure is request.param
  return draw(source, 400)


def test_batches_are_rows_of_the_data(dataset, drawn):
  row = np.round(drawn.r_t / SCALE).astype(int) - 1
  np.testing.assert_array_equal(drawn.o_tm1, dataset.observation[row])
  np.testing.assert_array_equal(drawn.a_tm1, dataset.action[row])
  np.testing.assert_array_equal(drawn.r_t, SCALE * dataset.reward[row])
  np.testing.assert_array_equal(drawn.o_t, dataset.next_observation[row])
  # Where time was up, values are bootstrapped.
  np.testing.assert_array_equal(drawn.discount_t, ~np.isin(row, TERMINATED))
  assert np.isin(TRUNCATED, row).all() and np.isin(TERMINATED, row).all()
  assert drawn.sample is None
  assert {x.dtype for x in jax.tree.leaves(drawn)} == {np.dtype('float32')}


def test_rows_and_first_observations_are_drawn_uniformly(drawn):
  row = np.round(drawn.r_t / SCALE).astype(int) - 1
  first = np.round(drawn.o_0[:, 0]).astype(int) - 1
  starts = np.arange(0, N, 7)
  assert set(first) == set(starts)
  np.testing.assert_array_equal(
    drawn.o_0, (first[:, None] + 1) * np.float32([1, 10, 100])
  )
  counts = np.bincount(row, minlength=N)
  assert scipy.stats.chisquare(counts).pvalue > 1e-3
  counts = np.bincount(first // 7)
  assert scipy.stats.chisquare(counts).pvalue > 1e-3
  # On their own: which episode says nothing of the row.
  table = np.zeros((len(starts), 2))
  np.add.at(table, (first // 7, (row >= N // 2).astype(int)), 1)
  assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize('on_device', [True, False])
def test_the_key_alone_decides(dataset, on_device):
  source = make_source(dataset, on_device=on_device)
  state = source.init(jax.random.key(0))
  rewards = [
    np.asarray(source.next(state, None, step, jax.random.key(seed))[1].r_t)
    for step, seed in ((0, 1), (5, 1), (0, 2))
  ]
  np.testing.assert_array_equal(rewards[0], rewards[1])
  assert (rewards[0] != rewards[2]).any()


def test_its_example_has_the_shapes_of_its_batches(dataset):
  source = make_source(dataset, on_device=False)
  _, batch, _ = source.next(source.init(None), None, 0, jax.random.key(0))
  about = lambda x: (x.shape, x.dtype)
  example = source.example()
  assert jax.tree.structure(example) == jax.tree.structure(batch)
  assert jax.tree.map(about, example) == jax.tree.map(about, batch)


def test_a_checkpoint_holds_no_rows_and_knows_them(dataset, tmp_path):
  source = make_source(dataset)
  state = source.init(jax.random.key(0))
  arrays, facts = source.kept.save(state, tmp_path, 3)
  assert sum(np.size(x) for x in jax.tree.leaves(arrays)) == 1
  assert jax.tree.structure(arrays) == jax.tree.structure(
    source.kept.template()
  )
  loaded = source.kept.load(arrays, facts, tmp_path, jax.random.key(0))
  assert_equal(loaded, state)

  reward = dataset.reward.copy()
  reward[-1] += 1e-3
  other = make_source(dataset._replace(reward=reward))
  with pytest.raises(ValueError, match=f'checksum .* {facts["dataset"]}$'):
    other.kept.load(arrays, facts, tmp_path, jax.random.key(0))


def test_a_checksum_is_of_numbers_shapes_and_types():
  checksum = lambda *x: runtime.fingerprint(x)
  ones = np.ones((4, 3), np.float32)
  found = [
    checksum(ones),
    checksum(ones.reshape(3, 4)),
    checksum(ones.view(np.int32)),
    checksum(ones, ones),
    checksum(ones * 2),
  ]
  assert len(set(found)) == len(found)
  assert checksum(np.ones((3, 4), np.float32).T) == found[0]


# What learns nothing but how often it was asked.
def _update(state, batch, key):
  del key
  return state + 1, Info({'reward': jnp.mean(jax.tree.leaves(batch)[2])})


COUNTER = Agent(lambda key: jnp.zeros(()), None, _update)


def interval_of(number):
  source = make_source(make_dataset(number))
  carry = loop.init(COUNTER, source, jax.random.key(0))
  interval = jax.jit(loop.compile_interval(COUNTER, source), donate_argnums=0)
  return interval, carry


def test_no_program_holds_the_data_and_none_copies_it():
  sizes = []
  for number in (100, 10_000):
    interval, carry = interval_of(number)
    text = interval.lower(carry, jax.random.key(0), 5).as_text()
    sizes.append(len(text))
  # Only the digits of the number grow.
  assert sizes[1] - sizes[0] < 200
  pointers = lambda carry: [
    x.unsafe_buffer_pointer() for x in jax.tree.leaves(carry.source)
  ]
  first, *_ = interval(carry, jax.random.key(0), 5)
  place = pointers(first)
  second, *_ = interval(first, jax.random.key(0), 5)
  assert pointers(second) == place
  assert all(x.is_deleted() for x in jax.tree.leaves(first.source))


def test_several_devices_share_a_batch(dataset):
  mesh = meshes.make_mesh()
  split = meshes.split(mesh)
  place = lambda batch: jax.lax.with_sharding_constraint(batch, split)
  whole, parted = (
    draw(make_source(dataset, place=f), 2) for f in (lambda x: x, place)
  )
  assert_equal(whole, parted)


def test_the_first_two_steps_of_a_window_are_a_transition():
  grid = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  rows = lambda *x: jnp.asarray(x, jnp.float32)
  timestep = TimeStep(
    observation={'x': jnp.asarray(grid)},
    reward=rows([9, 1, 9], [9, 2, 9]),
    discount=rows([1, 0, 1], [1, 1, 1]),
    is_first=rows([1, 0, 1], [0, 0, 1]) > 0,
    truncated=rows([0, 0, 0], [0, 1, 0]) > 0,
  )
  zeros = jnp.zeros(2)
  sample = Sample(zeros, zeros, zeros, zeros + 7)
  window = Trajectory(
    Experience(timestep, rows([3, 4, 5], [6, 7, 8])[..., None], {}),
    rows([1, 1, 0], [1, 1, 0]) > 0,
    sample,
  )
  got = runtime.to_transition(window)
  want = Transition(
    o_tm1={'x': grid[:, 0]},
    a_tm1=np.float32([[3], [6]]),
    r_t=np.float32([1, 2]),
    discount_t=np.float32([0, 1]),
    o_t={'x': grid[:, 1]},
    sample=sample,
  )
  assert_equal(got, want)


SAC = (
  'hidden_sizes=8',
  'batch_size=64',
  'env.num_envs=4',
  'warmup_decisions=40',
  'replay_capacity=160',
  'acting=synchronous',
)


def pendulum_step(o_tm1, a_tm1):
  """Gymnasium's equations: reward and next observation."""
  angle, speed = np.arctan2(o_tm1[:, 1], o_tm1[:, 0]), o_tm1[:, 2]
  torque = np.clip(a_tm1[:, 0], -2, 2)
  cost = angle**2 + 0.1 * speed**2 + 0.001 * torque**2
  speed = np.clip(speed + 0.05 * (15 * np.sin(angle) + 3 * torque), -8, 8)
  angle = angle + 0.05 * speed
  return -cost, np.stack([np.cos(angle), np.sin(angle), speed], 1)


@pytest.mark.parametrize(
  ('env', 'options'),
  [
    ('jax:pendulum', 'max_steps=7'),
    ('Pendulum-v1', 'max_episode_steps=7'),
  ],
)
def test_sac_learns_from_single_steps_of_its_own_play(env, options):
  experiment = build.describe(
    'sac_pendulum',
    env=env,
    steps=52,
    settings=(*SAC, f'env.options={options}'),
  )
  stage = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, stage.spec)
  source = build.make_source(experiment, stage, agent)
  key = jax.random.key(0)
  carry = loop.init(agent, source, key)
  take = jax.jit(source.next) if source.is_pure else source.next
  state, batch, _ = take(carry.source, carry.agent, 0, key)
  if not source.is_pure:
    source.close(state)
    carry = loop.init(agent, source, key)
  # Steps across episodes would not follow the equations.
  reward, o_t = pendulum_step(np.asarray(batch.o_tm1), np.asarray(batch.a_tm1))
  np.testing.assert_allclose(batch.r_t, reward, atol=1e-3)
  np.testing.assert_allclose(batch.o_t, o_t, atol=1e-4)
  np.testing.assert_array_equal(batch.discount_t, np.ones(64))
  assert batch.sample is not None and batch.o_0 is None

  rows = []
  carry = loop.run(
    agent,
    source,
    carry,
    key=key,
    steps=12,
    intervals=loop.Intervals(log=6),
    hooks=loop.Hooks(log=lambda step, row: rows.append((step, row))),
  )
  source.close(carry.source)
  assert [step for step, _ in rows] == [6, 12]
  for _, row in rows:
    assert {'loss_critic', 'entropy', 'decisions'} <= row.keys()
    assert np.isfinite(list(row.values())).all()


STARTS, LENGTH, REAL, MODEL = 3, 2, 5, 24
IMAGINED = STARTS * LENGTH
CAPACITY = 4 * IMAGINED


def imagine(state, observation, key):
  """Rows that tell the update, the start and the place among all."""
  del key
  start = jnp.tile(observation[:, 0], LENGTH)
  place = jnp.arange(IMAGINED, dtype=jnp.float32)
  return Transition(
    o_tm1=jnp.tile(observation, (LENGTH, 1)),
    a_tm1=start[:, None],
    r_t=1 + state * IMAGINED + place,
    discount_t=(place % 2).astype(jnp.float32),
    o_t=jnp.tile(observation, (LENGTH, 1)),
  )


def make_mixed(dataset, capacity=CAPACITY, model=MODEL):
  return runtime.mixed(
    make_source(dataset),
    imagine,
    COUNTER,
    starts=STARTS,
    capacity=capacity,
    real=REAL,
    model=model,
  )


@pytest.fixture(scope='module')
def mixed(dataset):
  source = make_mixed(dataset)
  return source._replace(next=jax.jit(source.next))


def test_what_is_imagined_is_kept_in_a_ring(dataset, mixed):
  state, kept, seen = mixed.init(jax.random.key(0)), {}, set()
  for update in range(6):
    state, batch, measures = mixed.next(
      state, jnp.float32(update), update, jax.random.key(update)
    )
    # A Python loop beside it: row n goes to slot n modulo the capacity.
    new = np.arange(update * IMAGINED, (update + 1) * IMAGINED)
    kept |= {n % CAPACITY: 1.0 + n for n in new}
    want = [kept.get(slot, 0.0) for slot in range(CAPACITY)]
    np.testing.assert_array_equal(state.ring.r_t, want)
    assert int(state.count) == (update + 1) * IMAGINED
    # Rollouts start in rows of the data.
    start = np.asarray(state.ring.o_tm1)[new % CAPACITY]
    assert np.isin(start[:, 0], dataset.observation[:, 0]).all()
    np.testing.assert_array_equal(start[:STARTS], start[STARTS:])

    drawn = np.asarray(batch.model.r_t)
    assert drawn.shape == (MODEL,) and np.isin(drawn, list(kept.values())).all()
    seen |= set(drawn)
    slot = (drawn - 1).astype(int) % CAPACITY
    np.testing.assert_array_equal(batch.model.o_tm1, state.ring.o_tm1[slot])
    np.testing.assert_array_equal(batch.model.discount_t, (drawn - 1) % 2)
    row = np.round(np.asarray(batch.real.r_t) / SCALE).astype(int) - 1
    assert row.shape == (REAL,)
    np.testing.assert_array_equal(batch.real.o_tm1, dataset.observation[row])
    assert float(measures.gauges['imagined_reward']) == 1.0 + np.mean(new)
    assert float(measures.gauges['imagined_ends']) == 0.5
  # The newest are drawn as well as the oldest that are left.
  assert {1.0, 36.0} <= seen


def test_rollouts_begin_apart_from_the_rows_of_the_batch(mixed):
  state = mixed.init(jax.random.key(0))
  state, batch, _ = mixed.next(state, jnp.float32(0), 0, jax.random.key(3))
  starts = np.asarray(state.ring.o_tm1)[:STARTS, 0]
  assert (starts != np.asarray(batch.real.o_tm1)[:STARTS, 0]).any()


def test_a_ring_takes_whole_rollouts_only(dataset):
  match = f'^model_capacity=13: .* of {IMAGINED}, '
  with pytest.raises(ValueError, match=match):
    make_mixed(dataset, capacity=13).init(jax.random.key(0))


def test_a_ring_is_saved_without_the_data(dataset, mixed, tmp_path):
  state = mixed.init(jax.random.key(0))
  for update in range(2):
    state, *_ = mixed.next(
      state, jnp.float32(update), update, jax.random.key(update)
    )
  arrays, facts = mixed.kept.save(state, tmp_path, 2)
  template = mixed.kept.template()
  shapes = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
  assert shapes(arrays) == shapes(template)
  assert not any(np.shape(x)[:1] == (N,) for x in jax.tree.leaves(arrays))
  loaded = mixed.kept.load(arrays, facts, tmp_path, jax.random.key(0))
  again, one, _ = mixed.next(loaded, jnp.float32(2), 2, jax.random.key(2))
  kept, two, _ = mixed.next(state, jnp.float32(2), 2, jax.random.key(2))
  assert_equal((again, one), (kept, two))


def test_rows_of_a_sweep_share_the_data(dataset, mixed):
  """`axes` and `fill`: the data once, a ring each."""
  rows = mixed.init(jax.random.key(0)).real

  def first(seed, shared):
    state = mixed.fill(shared)
    key = jax.random.key(seed)
    return mixed.next(state, jnp.float32(seed), 0, key)[:2]

  together = jax.jit(jax.vmap(first, (0, None), (mixed.axes, 0)))
  states, batches = together(jnp.arange(3), rows)
  alone = jax.jit(first)
  assert_equal(states.real, rows)
  assert states.ring.r_t.shape == (3, CAPACITY)
  for seed in range(3):
    state, batch = alone(jnp.int32(seed), rows)
    assert_equal(
      (state.ring, batch),
      jax.tree.map(lambda x, i=seed: x[i], (states.ring, batches)),
    )
