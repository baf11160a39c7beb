"""Checkpoints: all leaves come back, errors are clear, kills do no harm."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.files.errors import UserError
from experiments.runtime import checkpoint, integrity, signals

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Carry(NamedTuple):
  params: Any
  optimiser: Any
  source: Any
  step: Any


def make_carry(offset=0):
  params = {
    'w': jnp.arange(6.0).reshape(2, 3) + offset,
    'half': jnp.full((3,), 1.5 + offset, jnp.bfloat16),
  }
  optimiser = optax.chain(optax.clip(1.0), optax.adam(1e-3))
  source = {
    'key': jax.random.fold_in(jax.random.key(3), offset),
    'keys': jax.random.split(jax.random.key(offset, impl='rbg'), 2),
    'frames': np.arange(24, dtype=np.uint8)[::2] + np.uint8(offset),
    'doubles': np.array([0.1, 1e300]) + offset,
    'zero_d': np.array(2**40 + offset),
    'empty': np.zeros((0, 3), np.int16),
    'empty_device': jnp.zeros((2, 0)),
    'empty_keys': jax.random.split(jax.random.key(0), 2)[:0],
    'count': np.int64(5 + offset),
    'flag': np.bool_(offset == 0),
    'ratio': np.float64(0.1 + offset),
    'blob': bytes(range(3 + offset)),
    'no_bytes': b'',
    'big': 2**100 + offset,
    'real': 0.1 + offset,
    'name': f'phase-{offset}',
    'yes': offset == 0,
    'nothing': None,
    'no_dict': {},
    'no_tuple': ((), []),
  }
  return Carry(params, optimiser.init(params), source, jnp.int32(offset))


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  paths = jax.tree.leaves_with_path(want)
  for (path, w), g in zip(paths, jax.tree.leaves(got)):
    name = jax.tree_util.keystr(path)
    assert isinstance(g, jax.Array) == isinstance(w, jax.Array), name
    if isinstance(w, jax.Array) and jax.dtypes.issubdtype(
      w.dtype, jax.dtypes.prng_key
    ):
      assert g.dtype == w.dtype, name
      g, w = jax.random.key_data(g), jax.random.key_data(w)
    elif not isinstance(w, jax.Array):
      assert type(g) is type(w), name
    if hasattr(w, 'dtype'):
      assert (g.dtype, g.shape) == (w.dtype, w.shape), name
      np.testing.assert_array_equal(np.asarray(g), np.asarray(w), name)
    else:
      assert g == w, name


def test_whole_carry_comes_back(tmp_path):
  carry = make_carry(1)
  checkpoints = checkpoint.open(tmp_path / 'checkpoints')
  assert checkpoints.latest_step() is None
  assert checkpoints.peek() is None
  assert checkpoints.restore(carry) is None
  extra = {'phase': 2, 'replay': {'blocks': [1, 2]}}
  checkpoints.save(7, carry, extra)
  # What was handed over may change at once.
  extra['phase'] = 3
  carry.source['frames'][:] = 0
  carry.params['w'].delete()
  checkpoints.close()

  checkpoints = checkpoint.open(tmp_path / 'checkpoints')
  assert checkpoints.latest_step() == 7
  assert checkpoints.peek() == (7, {'phase': 2, 'replay': {'blocks': [1, 2]}})
  restored, extra = checkpoints.restore(make_carry(0))
  assert_same(restored, make_carry(1))
  assert extra == {'phase': 2, 'replay': {'blocks': [1, 2]}}
  # The restored arrays are as free as the template's: they may be donated.
  donated = jax.jit(lambda x: x + 1, donate_argnums=0)(restored.params['w'])
  np.testing.assert_array_equal(donated, make_carry(1).params['w'] + 1)
  assert not restored.params['w'].committed
  checkpoints.close()


def test_template_of_shapes_gives_arrays(tmp_path):
  make = lambda: {'w': jnp.ones((2, 2)), 'key': jax.random.key(4)}
  checkpoints = checkpoint.open(tmp_path)
  checkpoints.save(1, make())
  restored, _ = checkpoints.restore(jax.eval_shape(make))
  assert_same(restored, make())
  checkpoints.close()


def test_sharding_is_the_templates(tmp_path):
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  split = NamedSharding(mesh, PartitionSpec('data'))
  whole = NamedSharding(mesh, PartitionSpec())
  values = {
    'x': jnp.arange(4.0),
    'keys': jax.random.split(jax.random.key(1), 2),
    'none': jnp.zeros((0,)),
  }
  checkpoints = checkpoint.open(tmp_path)
  checkpoints.save(1, jax.device_put(values, split))
  for sharding in (split, whole):
    template = jax.device_put(jax.tree.map(jnp.zeros_like, values), sharding)
    restored, _ = checkpoints.restore(template)
    assert_same(restored, values)
    for leaf in jax.tree.leaves(restored):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  checkpoints.close()


def test_latest_steps_stay_and_a_saved_step_is_left_alone(tmp_path):
  checkpoints = checkpoint.open(tmp_path, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, {'x': np.full(2, step)})
  checkpoints.save(3, {'x': np.full(2, 99)})
  checkpoints.wait()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['2', '3']
  restored, extra = checkpoints.restore({'x': np.zeros(2, int)})
  assert (restored['x'].tolist(), extra) == ([3, 3], {})
  checkpoints.close()


def test_field_order_does_not_matter(tmp_path):
  class Old(NamedTuple):
    a: Any
    b: Any

  class New(NamedTuple):
    b: Any
    a: Any

  checkpoints = checkpoint.open(tmp_path)
  checkpoints.save(1, Old(a=np.arange(2), b=np.arange(2) + 5))
  restored, _ = checkpoints.restore(New(b=np.zeros(2, int), a=np.zeros(2, int)))
  assert isinstance(restored, New)
  assert (restored.a.tolist(), restored.b.tolist()) == ([0, 1], [5, 6])
  checkpoints.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  root = tmp_path_factory.mktemp('saved')
  checkpoints = checkpoint.open(root)
  carry = {'w': jnp.zeros((2, 3)), 'n': 3, 'key': jax.random.key(0)}
  checkpoints.save(4, carry)
  checkpoints.wait()
  yield root, carry, checkpoints
  checkpoints.close()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'w': jnp.zeros((2, 4))},
      "['w'] is float32[2, 3] in the checkpoint, float32[2, 4] here",
    ),
    (
      {'w': np.zeros((2, 3))},
      "['w'] is float32[2, 3] in the checkpoint, float64[2, 3] here",
    ),
    ({'n': 3.0}, "['n'] is python int in the checkpoint, python float here"),
    (
      {'key': jax.random.key(0, impl='rbg')},
      "['key'] is key<fry>[] in the checkpoint, key<rbg>[] here",
    ),
    ({'more': 1}, "['more'] is not in the checkpoint"),
    ({'w': None}, "['w'] is only in the checkpoint"),
    (
      {'a': 1, 'b': 1, 'c': 1, 'n': None, 'w': None},
      "['a'] is not in the checkpoint; ['b'] is not in the checkpoint; "
      "['c'] is not in the checkpoint; and 2 more",
    ),
  ],
)
def test_another_template_is_refused_in_one_line(saved, change, message):
  root, carry, checkpoints = saved
  with pytest.raises(UserError) as caught:
    checkpoints.restore(carry | change)
  assert str(caught.value) == (
    f'the checkpoint {root}/4 does not fit this run: {message}; another agent, '
    'network or release has written it'
  )


def test_newer_schema_is_refused(saved, monkeypatch):
  root = saved[0]
  monkeypatch.setattr(integrity, 'SCHEMA', 1)
  with pytest.raises(UserError, match=f'{root}/4 has schema 3, this release'):
    checkpoint.open(root, read_only=True)


def write_schema_1(root, step, carry, extra):
  """A step as releases before the manifest wrote it."""
  from orbax.checkpoint import v1 as ocp

  contents = {}
  entries = checkpoint._pack(carry, contents)
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='meta')
  context = ocp.Context()
  context.checkpointables.registry = registry
  leaves = [dataclasses.asdict(leaf) for leaf in entries]
  for leaf in leaves:
    if not leaf['dtype'].startswith('python'):
      del leaf['value']
  meta = {'schema': 1, 'extra': extra, 'leaves': leaves}
  with ocp.training.Checkpointer(root, context=context) as old:
    items = {'meta': json.loads(json.dumps(meta)), 'leaves': contents}
    old.save_checkpointables(step, items)
  sums = {}
  for part in ('meta', 'leaves'):
    for path in (root / str(step) / part).rglob('*'):
      if path.is_file():
        data = path.read_bytes()
        name = path.relative_to(root / str(step)).as_posix()
        sums[name] = [len(data), zlib.crc32(data)]
  (root / str(step) / 'meta' / 'sums.json').write_text(json.dumps(sums))


def test_checkpoints_of_older_releases_are_read(tmp_path, capsys):
  for step in (1, 2):
    write_schema_1(tmp_path, step, make_carry(step), {'of': step})
  shutil.copytree(tmp_path, tmp_path / 'copy', ignore=lambda *_: ['copy'])
  for read_only in (True, False):
    checkpoints = checkpoint.open(tmp_path, read_only=read_only)
    assert checkpoints.peek() == (2, {'of': 2})
    restored, extra = checkpoints.restore(make_carry(0))
    assert_same(restored, make_carry(2))
    assert extra == {'of': 2}
  checkpoints.save(3, make_carry(3), {'of': 3})
  assert_same(checkpoints.restore(make_carry(0))[0], make_carry(3))
  checkpoints.close()
  assert not capsys.readouterr().out
  largest = max(
    (p for p in (tmp_path / 'copy' / '2').rglob('*') if p.is_file()),
    key=lambda path: path.stat().st_size,
  )
  largest.write_bytes(largest.read_bytes()[:-1] + b'x')
  checkpoints = checkpoint.open(tmp_path / 'copy')
  assert_same(checkpoints.restore(make_carry(0))[0], make_carry(1))
  assert '/2 is damaged (' in capsys.readouterr().out
  checkpoints.close()


@pytest.mark.parametrize(
  ('leaf', 'what'),
  [
    (object(), 'object'),
    (np.random.default_rng(0), 'Generator'),
    (np.array(['a']), 'ndarray of <U1'),
    (np.array([None]), 'ndarray of object'),
    (1j, 'complex'),
  ],
)
def test_leaf_that_cannot_be_saved_is_named(saved, leaf, what):
  checkpoints = saved[2]
  with pytest.raises(UserError, match=r"cannot save \['x'\]: it is a ") as e:
    checkpoints.save(5, {'x': leaf})
  assert what in str(e.value) or type(leaf).__name__ in str(e.value)
  assert checkpoints.latest_step() == 4


def test_reader_makes_and_tidies_nothing(saved, tmp_path):
  root, carry, _ = saved
  unfinished = root / '.5.0123abc.tmp'
  unfinished.mkdir()
  reader = checkpoint.open(root, read_only=True)
  assert reader.latest_step() == 4
  assert_same(reader.restore(carry)[0], carry)
  reader.close()
  assert unfinished.is_dir()
  unfinished.rmdir()
  with pytest.raises(UserError, match='no checkpoints in'):
    checkpoint.open(tmp_path / 'none', read_only=True)
  assert not (tmp_path / 'none').exists()


def test_keep_is_checked(tmp_path):
  with pytest.raises(UserError, match='keep=0: must be at least 1'):
    checkpoint.open(tmp_path, keep=0)


def test_best_keeps_the_best_across_runs(tmp_path):
  template = {'w': np.zeros(1)}
  best = checkpoint.best(tmp_path)
  assert best.metric() is None
  assert best.restore(template) is None
  scores = [(10, float('nan')), (20, 1.0), (30, 0.5), (40, 2.0), (50, 2.0)]
  kept = [s for s, m in scores if best.save(s, m, {'w': np.full(1, s * 1.0)})]
  assert kept == [20, 40]
  best.close()

  best = checkpoint.best(tmp_path)
  assert best.metric() == 2.0
  assert not best.save(60, 1.5, {'w': np.full(1, 60.0)})
  params, extra = best.restore(template)
  assert (params['w'].item(), extra) == (40, {'step': 40, 'metric': 2.0})
  # After a kill the run may be at an earlier step than the best.
  assert best.save(30, 3.0, {'w': np.full(1, 30.0)}, {'episodes': 5})
  params, extra = best.restore(template)
  assert params['w'].item() == 30
  assert extra == {'step': 30, 'metric': 3.0, 'episodes': 5}
  best.close()


# Each step's carry is a function of the step alone, so that a mixture of two
# steps shows. The array is big enough to be caught while it is written.
CHILD = textwrap.dedent("""
  import sys
  import jax.numpy as jnp, numpy as np
  from experiments.runtime import checkpoint

  def carry(step):
    rows = np.random.default_rng(step).integers(0, 256, (1 << 21), np.uint8)
    return {'params': jnp.full((8,), step), 'rows': rows, 'step': step}

  checkpoints = checkpoint.open(sys.argv[1])
  found = checkpoints.restore(carry(0))
  step = 0
  if found is not None:
    got, extra = found
    step = got['step']
    want = carry(step)
    assert extra == {'step': step} and checkpoints.latest_step() == step
    assert (got['params'] == want['params']).all()
    assert (got['rows'] == want['rows']).all()
  print('restored', step, flush=True)
  while True:
    step += 1
    checkpoints.save(step, carry(step), {'step': step})
    if step > 1:
      # `save` has waited for the step before.
      print('saved', step - 1, flush=True)
""")


def kill_and_restart(root, times, seed):
  """Restored steps, each with the last step known complete before the kill."""
  rng, restored, complete = random.Random(seed), [], [0]
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  for number in range(times):
    child = subprocess.Popen(
      [sys.executable, '-c', CHILD, str(root)],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    first, early = child.stdout.readline().split(), ''
    if first and number == 0:
      # The first process saves something, however slow the machine is.
      early = child.stdout.readline()
    if first:
      time.sleep(rng.uniform(0.05, 0.4))
    child.kill()
    out, err = child.communicate()
    out = early + out
    assert first, err
    assert first[0] == 'restored'
    restored.append(int(first[1]))
    saved = [int(line.split()[1]) for line in out.splitlines() if ' ' in line]
    complete.append(max(saved, default=restored[-1]))
  return list(zip(restored, complete))


def check_kills(root, times, seed):
  pairs = kill_and_restart(root, times, seed)
  assert len(pairs) == times
  for restored, complete in pairs:
    assert restored >= complete
  assert pairs[-1][0] > pairs[0][0]


def test_kill_loses_nothing_complete(tmp_path):
  check_kills(tmp_path, times=2, seed=0)


@pytest.mark.slow
def test_many_kills_lose_nothing_complete(tmp_path):
  check_kills(tmp_path, times=30, seed=1)


def test_first_signal_sets_the_flag_and_handlers_come_back():
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  for signum in (signal.SIGTERM, signal.SIGINT):
    with signals.graceful_exit() as should_stop:
      assert not should_stop()
      signal.raise_signal(signum)
      assert should_stop()
  after = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  assert after == before


def test_second_signal_ends_the_process():
  script = textwrap.dedent("""
    import signal
    from experiments.runtime import signals
    with signals.graceful_exit():
      signal.raise_signal(signal.SIGTERM)
      print('first', flush=True)
      signal.raise_signal(signal.SIGTERM)
      print('second', flush=True)
  """)
  done = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, 'first\n')


def test_other_threads_get_a_flag_that_stays_down():
  seen = []

  def body():
    with signals.graceful_exit() as should_stop:
      seen.append(should_stop())

  thread = threading.Thread(target=body)
  thread.start()
  thread.join()
  assert seen == [False]
