"""Frames on a device: the host replay's windows, files and runs, to the bit."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_host_calls import UPDATES, make_agent, measured
from test_replay import CASES, ROWS, STREAMS, fill, stream
from trees import assert_equal

from agents.core.types import Experience
from experiments import build
from experiments.build import capacity, programs
from experiments.envs.envpool import make_envpool
from experiments.files.errors import UserError
from experiments.runtime import (
  checkpoint,
  columns,
  host,
  loop,
  mesh,
  parts,
  replay,
  sources,
  updates,
)
from experiments.runtime.integrity import Damaged
from experiments.runtime.loop import Carry, Hooks, Intervals
from experiments.training import plan, stages
from experiments.training.keeper import Saved
from search.model import TimeStep

SHAPE = (3, 4, 2)


def images(num_rows, frame_stack, seed=0):
  """Rows of `test_replay.stream`, each of whose frames is an image of noise."""
  rng = np.random.default_rng(seed)
  table = rng.integers(256, size=(256, *SHAPE), dtype=np.uint8)

  def one(row):
    numbers = row.timestep.observation[:, 0, 0]  # [E, S]
    seen = np.moveaxis(table[numbers], 1, 3)  # [E, H, W, S, C]
    seen = seen.reshape(*seen.shape[:3], -1)
    return row._replace(timestep=row.timestep._replace(observation=seen))

  return [one(row) for row in stream(num_rows, frame_stack, shape=(1, 1))]


def both(batch, window, frame_stack, rows=ROWS):
  """The replay with its frames on the host, and on the second device."""
  settings = rows * STREAMS, batch, window, frame_stack
  return (
    replay.host_replay(*settings),
    replay.host_replay(*settings, device=jax.devices()[1]),
  )


def frames(state):
  """Its columns, read to the host."""

  def one(column):
    if isinstance(column, columns.DeviceColumn):
      return column.read(0, column.shape[0])
    return column

  return jax.tree.map(one, state.rows)


def assert_same(there, here):
  assert_equal(frames(there), frames(here))
  np.testing.assert_array_equal(there.priority, here.priority)
  np.testing.assert_array_equal(there.mass, here.mass)
  assert (there.count, there.max_priority) == (here.count, here.max_priority)


@pytest.mark.parametrize(('window', 'frame_stack'), CASES)
def test_windows_are_those_of_frames_on_the_host(window, frame_stack, key):
  # Episodes end, are cut and begin unannounced; the ring turns three times.
  rows, late = images(3 * ROWS + 3, frame_stack), []
  replays = both(16, window, frame_stack)
  states = [kept.init(rows[0]) for kept in replays]
  column = states[1].rows.timestep.observation
  assert isinstance(column, columns.DeviceColumn)
  assert column.ring.devices() == {jax.devices()[1]}
  assert column.shape == (ROWS, STREAMS, *SHAPE)
  overwritten = 0
  for t, row in enumerate(rows):
    states = [kept.add(s, row) for kept, s in zip(replays, states)]
    ready = [kept.ready(s) for kept, s in zip(replays, states)]
    assert ready[0] == ready[1]
    if not ready[0]:
      continue
    own = jax.random.fold_in(key, t)
    host_batch, batch = (
      kept.sample(s, own, 0.5) for kept, s in zip(replays, states)
    )
    assert_equal(batch, host_batch)
    seen = batch.experience.timestep.observation
    assert seen.dtype == np.uint8 and seen.shape[2:4] == SHAPE[:2]
    assert seen.devices() == {jax.devices()[1]}
    # Priorities come rows later, when some windows are overwritten.
    late.append((batch.sample, jax.random.normal(own, (16,))))
    if len(late) > 5:
      drawn, priorities = late.pop(0)
      states = [
        kept.update(s, drawn, priorities) for kept, s in zip(replays, states)
      ]
      slot = drawn.index // STREAMS
      order = t - (t - slot) % ROWS
      overwritten += (order // ROWS + 1 != drawn.generation).sum()
    assert_same(states[1], states[0])
  assert overwritten > 20


def test_a_window_outlives_the_rows_that_it_was_drawn_from(key):
  rows, kept = images(40, 2), both(4, 3, 2)[1]
  state = fill(kept, rows[:20])
  batch = kept.sample(state, key, 0.5)
  before = np.array(batch.experience.timestep.observation)
  batch = kept.sample(state, key, 0.5)  # not read before what follows
  for row in rows[20:]:
    state = kept.add(state, row)
  seen = batch.experience.timestep.observation
  np.testing.assert_array_equal(seen, before)


def test_a_write_copies_the_frame_and_not_the_ring():
  column = columns.DeviceColumn((64, 2, *SHAPE), jax.devices()[0])
  frame = np.zeros((2, *SHAPE), np.uint8)
  lowered = columns._write.lower(column.ring, 0, frame.reshape(2, -1))
  text = lowered.compile().as_text()
  assert 'input_output_alias={ {}: (0' in text
  ring = 'u8[128,24]'
  assert ring in text
  for line in text.splitlines():
    assert not (' copy(' in line and f'= {ring}' in line), line
  # A simulator may use its array again at once.
  column[3] = frame
  frame[:] = 7
  np.testing.assert_array_equal(column.read(3, 4)[0], 0)


@pytest.fixture
def small_pieces(monkeypatch):
  """Frames are copied three at a time, and a file has up to four rows."""
  monkeypatch.setattr(columns, '_CHUNK', 3 * 24)
  monkeypatch.setattr(columns, '_FILE', 4 * STREAMS * 24)


def test_only_new_frames_go_to_the_disk(small_pieces, tmp_path):
  replays = both(4, 3, 2)
  rows = images(45, 2)
  states = [kept.init(rows[0]) for kept in replays]
  folders = [tmp_path / 'host', tmp_path / 'device']
  metas, sizes = [], []
  for t, row in enumerate(rows):
    states = [kept.add(s, row) for kept, s in zip(replays, states)]
    if t % 7 != 6:
      continue
    before = {p.name for p in folders[1].glob('*')}
    saved = [replay.save(s, d) for s, d in zip(states, folders)]
    metas.append(saved)
    new = {p.name for p in folders[1].glob('*')} - before
    sizes.append(sum((folders[1] / name).stat().st_size for name in new))
    written = sorted(tuple(map(int, n.split('_')[1:3])) for n in new)
    assert written[0][0] == t - 6 and written[-1][1] == t + 1
    assert all(b - a <= 4 for a, b in written)
    for directory, some in zip(folders, zip(*metas)):
      needed = [replay.files_of(meta) for _, meta in some[-2:]]
      replay.prune(directory, needed)
      names = {p.name for p in directory.iterdir()}
      assert names == {name for files in needed for name in files}
  # Not the whole ring: each checkpoint adds its seven rows.
  assert max(sizes) < 1.5 * sizes[0]
  # Either kind reads what the other has written.
  for kept in replays:
    for saved, directory in zip(metas[-1], folders):
      back = replay.load(kept.init(rows[0]), directory, *saved)
      assert_same(back, fill_late(kept, rows, metas[-1][0][1]['count']))
  # A run that goes on from there goes on as it would have.
  kept = replays[1]
  back = replay.load(kept.init(rows[0]), folders[1], *metas[-2][1])
  for row in rows[back.count :]:
    back = kept.add(back, row)
  assert_same(back, states[0])


def fill_late(kept, rows, count):
  """A replay of the first rows."""
  return functools.reduce(kept.add, rows[:count], kept.init(rows[0]))


def test_damaged_frames_are_refused(small_pieces, tmp_path):
  kept = both(4, 3, 2)[1]
  rows = images(9, 2)
  saved = replay.save(fill(kept, rows), tmp_path)
  path = max(tmp_path.iterdir(), key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[-30] ^= 1
  path.write_bytes(content)
  with pytest.raises(Damaged, match='is garbled'):
    replay.load(kept.init(rows[0]), tmp_path, *saved)
  path.unlink()
  with pytest.raises(Damaged, match=f'{path.name} is missing'):
    replay.load(kept.init(rows[0]), tmp_path, *saved)


# Runs: real frames of Pong, an agent that a moment trains.


ENVS, BATCH, WINDOW = 2, 8, 3
PONG = {'img_height': 12, 'img_width': 10, 'max_episode_steps': 12}


def make_source(agent, device, number=1, devices=1):
  """Synchronous Pong in so many parts."""
  own = mesh.make_mesh(jax.devices()[:devices])
  env = make_envpool('Pong-v5', ENVS, **PONG)
  pace = sources.Pace(ENVS, 40, Fraction(2))
  made = []
  for home in parts.homes(number, own):
    inner = host.from_host(env, agent, mode='synchronous')
    kept = replay.host_replay(
      60, BATCH // number, WINDOW, env.spec.frame_stack,
      device=home if device else None,
    )  # fmt: skip
    made.append(sources.replayed(inner, kept, pace, total_updates=40))
  source = parts.hosted(made, number, own, BATCH)
  return sources.reanalyzed(source, agent), own


def test_parts_keep_their_frames_on_their_devices(key):
  agent = make_agent()
  found = []
  for device in (False, True):
    source, own = make_source(agent, device, number=2, devices=2)
    update = mesh.compile_update(agent, own)
    carry = mesh.init(agent, source, key, own)
    batches = []
    for step in range(3):
      state, batch, _ = source.next(carry.source, carry.agent, step, key)
      learner, info = update(carry.agent, batch, key)
      carry = Carry(learner, source.feedback(state, batch, info), step)
      batches.append(batch)
    found.append((jax.device_get(batches), jax.device_get(carry.agent)))
    seen = batches[-1].experience.timestep.observation
    assert seen.sharding == mesh.split(own)
    if device:
      rings = [p.replay.rows.timestep.observation.ring for p in state.parts]
      assert [r.devices() for r in rings] == [{d} for d in jax.devices()[:2]]
    source.close(state)
  assert_equal(*found)


def test_a_killed_run_goes_on_to_the_bit(key, tmp_path):
  agent, last = make_agent(), 30
  update = updates.compiled(agent)
  folder = tmp_path / 'replay'
  checkpoints = checkpoint.open(tmp_path / 'checkpoints')

  def run(source, carry, steps, save=None):
    return loop.run(
      agent, source, carry, key=key, steps=steps, update=update,
      intervals=Intervals(log=10, checkpoint=10), hooks=Hooks(save=save),
    )  # fmt: skip

  finals = []
  for device in (False, True):
    source, _ = make_source(agent, device)
    finals.append(run(source, loop.init(agent, source, key), last))
    source.close(finals[-1].source)

  def save(carry):
    step = int(carry.step)
    held, _ = source.kept.save(carry.source, folder, step)
    [(arrays, facts)] = held.parts.values()
    checkpoints.save(step, carry._replace(source=arrays), facts)

  source.close(
    run(source, loop.init(agent, source, key), last - 10, save).source
  )
  checkpoints.wait()
  # Nothing but the files is left.
  source, _ = make_source(agent, True)
  template = source.kept.template()
  [(name, (arrays, _))] = template.parts.items()
  carry, facts = checkpoints.restore(
    Carry(jax.eval_shape(agent.init, key), arrays, jnp.int32(0))
  )
  checkpoints.close()
  held = template._replace(parts={name: (carry.source, facts)})
  state = source.kept.load(held, {}, folder, loop.source_key(key))
  finals.append(run(source, carry._replace(source=state), last))
  source.close(finals[-1].source)
  want, *others = finals
  for got in others:
    assert_equal(jax.device_get(got.agent), jax.device_get(want.agent))
    assert_same(got.source.parts[0].replay, want.source.parts[0].replay)


def test_an_update_moves_no_image_to_the_device(key, monkeypatch):
  agent, moved = make_agent(), []
  gather = replay.stacked

  def counted(rows, frame_stack):
    leaves = jax.tree.leaves(rows)
    moved.append(sum(x.nbytes for x in leaves if isinstance(x, np.ndarray)))
    return gather(rows, frame_stack)

  monkeypatch.setattr(replay, 'stacked', counted)
  totals = []
  for device in (False, True):
    source, _ = make_source(agent, device)
    state, learner = source.init(key), jax.jit(agent.init)(key)
    for step in range(4):
      state, batch, _ = source.next(state, learner, step, key)
      assert isinstance(batch.experience.timestep.observation, jax.Array)
    source.close(state)
    totals.append(sum(moved))
    moved.clear()
  frame = np.prod((12, 10, 3))
  rows = 4 * BATCH * (WINDOW + 3)
  # A place in the ring for each frame, of four bytes.
  assert totals[0] - totals[1] == rows * (frame - 4)


def test_frames_on_the_device_cost_a_call_a_row(monkeypatch, tmp_path):
  agent = make_agent()
  calls = []
  for device in (False, True):
    source, _ = make_source(agent, device)
    folder = tmp_path / str(device)
    calls.append(measured(agent, source, monkeypatch, folder).calls)
  # The profiler may list a call twice.
  times, rows = calls[0]['update'] // UPDATES, UPDATES * 2 // ENVS
  for found in calls:
    each = {name: found[name] for name in ('stacked', 'refresh', 'update')}
    assert set(each.values()) == {times * UPDATES}
    assert found['acting'] == times * rows
  assert calls[1] - calls[0] == {'_write': times * rows}
  assert not calls[0] - calls[1]


def test_what_an_update_at_ataris_size_moves(key, monkeypatch):
  moved = []

  def counted(rows, frame_stack):
    leaves = jax.tree.leaves(rows)
    moved.append(sum(x.nbytes for x in leaves if isinstance(x, np.ndarray)))
    return rows, None

  monkeypatch.setattr(replay, 'stacked', counted)
  none, no = np.zeros(1, np.float32), np.zeros(1, bool)
  seen = np.zeros((1, 96, 96, 12), np.uint8)
  timestep = TimeStep(seen, none, none + 1, no, no)
  extras = {
    'search_policy': np.zeros((1, 6), np.float32),
    'search_value': none,
  }
  row = Experience(timestep, np.zeros(1, np.int32), extras)
  for device in (None, jax.devices()[0]):
    kept = replay.host_replay(40, 256, 11, 4, device=device)
    state = kept.init(row)
    for _ in range(20):
      state = kept.add(state, row)
    kept.sample(state, key, 0.5)
  rows = 256 * (11 + 3)
  # Rewards, discounts, two flags, actions, policies and values.
  others = rows * (4 + 4 + 1 + 1 + 4 + 24 + 4)
  assert moved == [rows * 96 * 96 * 3 + others, rows * 4 + others]
  assert moved[0] > 99e6 and moved[1] < 170e3


# What a run is refused, before anything is made.


ATARI = (
  'env.options=img_height=32,img_width=32',
  'compress_replay=false',
  'frames_on=device',
)


def described(*settings, env='Pong-v5'):
  return build.describe(
    'efficientzero_atari', env=env, settings=[*ATARI, *settings]
  )


def test_frames_that_a_device_cannot_hold_are_refused(monkeypatch):
  # Two devices share it.
  monkeypatch.setattr(capacity, 'device_memory', lambda: 3_000_000_000)
  experiment = described('replay_capacity=2000000')
  trainer = stages.make(experiment, Saved(), lambda: False)
  message = (
    'replay_capacity=2000000: takes 3.07 GB of memory at least, its device has '
    r'3 GB; take at most \d+0000, or frames_on=host'
  )
  with pytest.raises(UserError, match=message):
    capacity.check_run(experiment, trainer, 0)


def test_frames_are_of_the_device_in_a_plan():
  experiment = described('replay_capacity=200000')
  host_bytes, frames = capacity.host_replay(*_made(experiment))
  assert frames == 200_000 * 32 * 32 * 3
  other, none = capacity.host_replay(*_made(described('frames_on=host')))
  assert none == 0 and other / 100_000 > 32 * 32 * 3
  rows = (
    plan.Need('frames of the replay', ('frames_on=device',), frames),
    plan.Need('replay', ('replay_capacity=9',), 0.0, host_bytes),
  )
  found = plan.Plan('train', rows, '1 x small', int(frames) - 1, 0)
  with pytest.raises(UserError, match=r'^frames_on=device: needs 614 MB of a'):
    plan.check([found])


def test_the_program_that_gathers_frames_has_the_shapes_of_a_run():
  experiment = described('replay_capacity=4000', 'batch_size=8')
  _, agent, spec = _made(experiment)
  layout = build.make_layout(experiment)
  found = programs.of_agent(experiment, agent, None, spec, layout.mesh)
  [program] = [p for p in found if p.part == 'frames']
  traced = program.trace()
  seen = traced.out_info[0].timestep.observation
  # Each of the two devices has its half of the batch and of the ring.
  assert seen.shape == (4, experiment.config.window, 32, 32, 12)
  assert 'u8[2000,3072]' in traced.lower().compile().as_text()
  # Frames on the host are moved with each batch: there is no such program.
  plain = described('frames_on=host', 'batch_size=8')
  found = programs.of_agent(plain, agent, None, spec, layout.mesh)
  assert 'frames' not in {p.part for p in found}


def _made(experiment):
  env = build.make_env(experiment, training=True)
  return experiment, build.make_agent(experiment, env.spec), env.spec


def test_what_has_no_images_is_refused():
  experiment = build.describe('muzero_cartpole', settings=['frames_on=device'])
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  with pytest.raises(ValueError, match='frames_on=device: CartPole-v1 has no'):
    build.make_source(experiment, env, agent)
