"""The host replay on disk: append, prune, kill, damage, compression."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_replay import ROWS, STREAMS, fill, one_stream, stream
from trees import assert_equal

from agents.core.replay import (
  device_replay,
  newest_frame,
)
from agents.core.types import Experience
from experiments.runtime import columns
from experiments.runtime import replay as host
from experiments.runtime.integrity import Damaged
from experiments.runtime.replay import host_replay
from search.model import TimeStep


def equal(a, b):
  """Whether two host replays hold the same."""
  x, y = (
    jax.tree.map(
      lambda c: c.blobs if isinstance(c, columns.ZlibColumn) else c, s.rows
    )
    for s in (a, b)
  )
  assert_equal(x, y)
  np.testing.assert_array_equal(a.priority, b.priority)
  np.testing.assert_array_equal(a.mass, b.mass)
  assert (a.max_priority, a.count) == (b.max_priority, b.count)


@pytest.mark.parametrize('compress', [False, True])
def test_saving_appends_and_loading_restores(tmp_path, compress, key):
  rows = stream(60, 2, shape=(4, 4))
  replay = host_replay(STREAMS * ROWS, 8, 3, 2, compress=compress)
  state = replay.init(rows[0])
  before = {}
  for t, row in enumerate(rows):
    state = replay.add(state, row)
    if t % 7 != 6:
      continue
    batch = replay.sample(state, jax.random.fold_in(key, t), 0.5)
    state = replay.update(state, batch.sample, np.arange(8) * t)
    saved = host.save(state, tmp_path)
    # Old files are neither changed nor gone.
    files = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert before.items() <= files.items()
    written = sum(
      int(p.name.split('_')[2]) - int(p.name.split('_')[1])
      for p in files.keys() - before.keys()
    )
    assert written == 7
    before = files
    back = host.load(replay.init(rows[0]), tmp_path, *saved)
    equal(state, back)
    x, y = replay.sample(state, key, 1.0), replay.sample(back, key, 1.0)
    assert_equal(x, y)
  assert json.loads(json.dumps(saved[1]))['count'] == 56


def test_a_replay_that_was_saved_empty_loads_empty(tmp_path):
  replay = host_replay(8, 1, 1)
  rows = one_stream(1)
  saved = host.save(replay.init(rows[0]), tmp_path)
  assert not list(tmp_path.iterdir())
  equal(host.load(replay.init(rows[0]), tmp_path, *saved), replay.init(rows[0]))


def test_segments_without_a_checkpoint_do_not_count(tmp_path):
  replay = host_replay(STREAMS * ROWS, 4, 2)
  rows, other = stream(30), stream(30, seed=9)
  state = fill(replay, rows[:10])
  saved = host.save(state, tmp_path)
  for row in rows[10:17]:
    state = replay.add(state, row)
  host.save(state, tmp_path)  # Killed before its meta was written.
  (tmp_path / '.rows_000000000017_000000000020_5.bin.tmp').write_bytes(b'x')
  resumed = host.load(replay.init(rows[0]), tmp_path, *saved)
  reference = fill(replay, rows[:10])
  equal(resumed, reference)
  # It goes on otherwise than before, over the same numbers of rows.
  metas = [saved]
  for row in other[10:22]:
    resumed, reference = replay.add(resumed, row), replay.add(reference, row)
    if resumed.count % 6 == 0:
      metas.append(host.save(resumed, tmp_path))
  equal(resumed, reference)
  metas.append(host.save(resumed, tmp_path))
  back = host.load(replay.init(rows[0]), tmp_path, *metas[-1])
  equal(back, reference)
  # Only what the last two need is left, and it is enough.
  host.prune(tmp_path, [host.files_of(meta) for _, meta in metas[-2:]])
  names = {p.name for p in tmp_path.iterdir()}
  assert not any(name.endswith('tmp') for name in names)
  assert names == {n for _, meta in metas[-2:] for n in host.files_of(meta)}
  for priority, meta in metas[-2:]:
    back = host.load(replay.init(rows[0]), tmp_path, priority, meta)
    assert back.count == meta['count']
  equal(back, reference)


def test_pruning_spares_what_is_being_saved_and_drops_what_was_overwritten(
  tmp_path,
):
  replay = host_replay(STREAMS * ROWS, 4, 2)
  rows = stream(40)
  state, metas = replay.init(rows[0]), []
  for row in rows:
    state = replay.add(state, row)
    if state.count % 5 == 0:
      metas.append(host.save(state, tmp_path))
  # The last is still being written.
  host.prune(tmp_path, [host.files_of(meta) for _, meta in metas[-3:-1]])
  for priority, meta in metas[-3:]:
    back = host.load(replay.init(rows[0]), tmp_path, priority, meta)
    assert back.count == meta['count']
  equal(back, state)
  starts = sorted(int(p.name.split('_')[1]) for p in tmp_path.iterdir())
  assert starts[0] >= 30 - ROWS - 5
  with pytest.raises(Damaged, match=r'rows_\S* is missing'):
    host.load(replay.init(rows[0]), tmp_path, *metas[0])


_KILLED = """
import json, os, sys
sys.path[:0] = [{root!r}, os.path.join({root!r}, 'tests')]
from experiments.runtime import columns
from experiments.runtime import replay as host
from experiments.runtime.replay import host_replay
from test_replay import stream
from experiments.files import writing
rows = stream(2000, shape=(24, 24))
replay = host_replay(2 * 64, 4, 2)
state = replay.init(rows[0])
for i, row in enumerate(rows):
  state = replay.add(state, row)
  if i % 5 == 4:
    priority, meta = host.save(state, {directory!r})
    text = json.dumps([priority.tolist(), meta])
    writing.write_text({directory!r} + '/meta.json', text)
    print(i, flush=True)
"""


def test_kill_at_any_moment_leaves_the_last_checkpoint(tmp_path):
  root = os.path.dirname(os.path.dirname(__file__))
  code = _KILLED.format(root=root, directory=str(tmp_path))
  process = subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, text=True
  )
  for _ in range(8):
    assert process.stdout.readline()
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  saved = json.loads((tmp_path / 'meta.json').read_text())
  rows = stream(2000, shape=(24, 24))
  replay = host_replay(2 * 64, 4, 2)
  back = host.load(replay.init(rows[0]), tmp_path, *saved)
  assert back.count >= 40
  equal(back, fill(replay, rows[: back.count]))


def test_loading_into_something_else_is_refused(tmp_path):
  rows = stream(6, shape=(4, 4))
  replay = host_replay(STREAMS * ROWS, 4, 2)
  priority, meta = host.save(fill(replay, rows), tmp_path)
  load = lambda r, row, meta=meta: host.load(
    r.init(row), tmp_path, priority, meta
  )
  with pytest.raises(ValueError, match=r'saved with rows x streams = \(12, 2'):
    load(host_replay(40, 4, 2), rows[0])
  with pytest.raises(ValueError, match='version 99'):
    load(replay, rows[0], {**meta, 'version': 99})
  with pytest.raises(ValueError, match=r'timestep\.observation is uint8'):
    load(host_replay(24, 4, 2, compress=True), rows[0])
  with pytest.raises(
    ValueError, match=r'timestep.observation is uint8\[6, 2, 4, 4, 1\], must'
  ):
    load(replay, stream(1, shape=(5, 4))[0])
  renamed = rows[0]._replace(extras={'other': rows[0].extras['search_value']})
  with pytest.raises(
    ValueError, match=r'extras\.search_value, which is not expected'
  ):
    load(replay, renamed)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda p, m: (p * np.nan, m), 'a priority is negative or not finite'),
    (lambda p, m: (p - 1, m), 'a priority is negative or not finite'),
    (lambda p, m: (p + np.inf, m), 'a priority is negative or not finite'),
    (lambda p, m: (p, m | {'max_priority': 0.0}), 'max_priority=0.0'),
    (lambda p, m: (p, m | {'max_priority': 'a'}), 'max_priority'),
    (lambda p, m: (p, m | {'count': 5}), 'not those of 5 rows'),
    (lambda p, m: (p, m | {'segments': m['segments'][1:]}), 'are not those'),
    (lambda p, m: (p, m | {'segments': m['segments'][:1]}), 'are not those'),
  ],
)
def test_numbers_that_no_replay_has_are_damage(tmp_path, change, message):
  rows = stream(12)
  replay = host_replay(STREAMS * ROWS, 4, 2)
  state = fill(replay, rows[:6])
  host.save(state, tmp_path)
  for row in rows[6:10]:
    state = replay.add(state, row)
  priority, meta = host.save(state, tmp_path)
  host.load(replay.init(rows[0]), tmp_path, priority, meta)
  with pytest.raises(Damaged, match=message):
    host.load(replay.init(rows[0]), tmp_path, *change(priority, meta))


def test_compression_loses_nothing(key):
  rows = stream(20, 2, shape=(8, 8), channels=3)
  rng = np.random.default_rng(0)
  states, batches = [], []
  for compress in (False, True):
    replay = host_replay(STREAMS * ROWS, 16, 3, 2, compress=compress)
    states.append(fill(replay, rows))
    batches.append(replay.sample(states[-1], key, 0.5))
  jax.tree.map(np.testing.assert_array_equal, *batches)
  column = states[1].rows.timestep.observation
  assert isinstance(column, columns.ZlibColumn)
  assert column.nbytes < states[0].rows.timestep.observation.nbytes / 4
  noise = rng.integers(256, size=(2, 8, 8, 3), dtype=np.uint8)
  column[0] = noise
  zeros = np.zeros(2, int)
  np.testing.assert_array_equal(column[zeros, np.arange(2)], noise)


def test_atari_100k_stays_under_3_gib():
  shape = lambda dtype, *x: jax.ShapeDtypeStruct((1, *x), dtype)
  example = Experience(
    TimeStep(
      shape(np.uint8, 96, 96, 12),
      shape(np.float32),
      shape(np.float32),
      shape(bool),
      shape(bool),
    ),
    shape(np.int32),
    {'search_policy': shape(np.float32, 18), 'search_value': shape(np.float32)},
  )
  # The pages are never touched, so this takes no memory here.
  state = host_replay(100_000, 256, 11, 4).init(example)
  assert state.rows.timestep.observation.shape == (100_000, 1, 96, 96, 3)
  arrays = [*jax.tree.leaves(state.rows), state.priority, state.mass]
  assert sum(x.nbytes for x in arrays) < 3 * 2**30


@pytest.mark.parametrize('factory', [device_replay, host_replay])
def test_bad_settings_are_refused(factory):
  for name in ('capacity', 'batch_size', 'window', 'frame_stack'):
    good = {'capacity': 8, 'batch_size': 1, 'window': 1, 'frame_stack': 1}
    with pytest.raises(ValueError, match=f'{name}=0'):
      factory(**{**good, name: 0})
  with pytest.raises(ValueError, match='alpha=-1'):
    factory(8, 1, 1, alpha=-1)
  with pytest.raises(ValueError, match='capacity=8: must be at least 10'):
    factory(8, 1, 5).init(stream(1)[0])
  with pytest.raises(ValueError, match='multiple of frame_stack=2'):
    factory(80, 1, 5, 2).init(stream(1)[0])


def test_rows_of_another_shape_are_refused_on_the_host(key):
  replay = host_replay(24, 1, 2)
  rows = stream(2)
  state = fill(replay, rows[:1])
  with pytest.raises(ValueError, match='1 rows'):
    replay.sample(state, key, 1.0)
  wrong = rows[1]._replace(action=np.zeros((), np.int32))
  with pytest.raises(ValueError, match=r'action: shape \(\) must be \(2,\)'):
    replay.add(state, wrong)


def test_newest_frame_is_the_last():
  x = np.arange(24).reshape(2, 12)
  np.testing.assert_array_equal(newest_frame(x, 4), [[9, 10, 11], [21, 22, 23]])
