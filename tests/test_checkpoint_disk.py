"""Checkpoints on disk: descriptors, names, what is set aside, packed."""

import dataclasses
import gc
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import assert_same, make_carry

from experiments.files import arrays
from experiments.files.errors import UserError
from experiments.runtime import checkpoint, integrity, orbax_arrays


def descriptors_and_threads():
  return [len(os.listdir(f'/proc/self/{name}')) for name in ('fd', 'task')]


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='no /proc')
def test_two_hundred_saves_leave_no_descriptors_or_threads(
  tmp_path, monkeypatch
):
  # Flushing takes most of the time and opens nothing.
  monkeypatch.setattr(os, 'fsync', lambda handle: None)
  carry = {'w': jnp.arange(10.0), 'n': 1}
  checkpoints = checkpoint.open(tmp_path)
  for step in range(10):
    checkpoints.save(step, carry)
  checkpoints.wait()
  before = descriptors_and_threads()
  for step in range(10, 210):
    checkpoints.save(step, carry)
    if step % 50 == 0:
      checkpoints.restore(carry)
  checkpoints.wait()
  gc.collect()
  descriptors, threads = descriptors_and_threads()
  # tensorstore's pool has as many threads as there is work; a thread a save
  # would be two hundred.
  assert descriptors <= before[0] and threads < before[1] + 20
  checkpoints.close()


NAMES = (
  'plain', 'with blank', 'a[1]', 'a*b', 'a?b', 'a\\b', '[', '{a,b}', 'ñ-文字',
  '%s-{}', "quote'\"", '-dash', '~home', 'new\nline', '#1&$(x);', '.hidden',
)  # fmt: skip


@pytest.mark.parametrize('name', NAMES)
def test_a_folder_may_have_any_name(tmp_path, name):
  (tmp_path / 'real').mkdir()
  (tmp_path / name).symlink_to(tmp_path / 'real')  # the run's own may be a link
  folder = tmp_path / name / 'checkpoints'
  for step in (1, 2, 3):
    checkpoints = checkpoint.open(folder)
    checkpoints.save(step, {'x': np.full(3, step)})
    checkpoints.close()
  reader = checkpoint.open(folder, read_only=True)
  assert reader.restore({'x': np.zeros(3, int)})[0]['x'].tolist() == [3] * 3
  reader.close()
  assert {p.name for p in folder.iterdir()} == {'2', '3'}


def test_a_disk_that_gives_back_something_else_is_noticed(
  tmp_path, monkeypatch
):
  save = orbax_arrays.save
  monkeypatch.setattr(
    orbax_arrays,
    'save',
    lambda folder, content: save(
      folder, {n: x + 1 for n, x in content.items()}
    ),
  )
  checkpoints = checkpoint.open(tmp_path)
  checkpoints.save(1, {'x': np.zeros(3)})
  with pytest.raises(UserError, match='/1: was written but cannot be read ba'):
    checkpoints.wait()


def test_what_another_run_saved_is_passed_over(tmp_path, capsys):
  for seed, step in ((0, 10), (1, 20)):
    checkpoints = checkpoint.open(tmp_path, run={'seed': seed, 'settings': 'a'})
    if step == 20:  # as if its folder had been copied here
      shutil.move(tmp_path / '10', tmp_path / 'kept')
    checkpoints.save(step, {'x': np.zeros(1)})
    checkpoints.close()
  shutil.move(tmp_path / 'kept', tmp_path / '10')
  checkpoints = checkpoint.open(tmp_path, run={'seed': 0, 'settings': 'a'})
  assert checkpoints.latest_step() == 10
  assert '/20 is damaged (is of another run: seed 1)' in capsys.readouterr().out
  checkpoints.close()


def test_what_was_set_aside_comes_back_once_it_is_whole(tmp_path, capsys):
  rows = tmp_path / 'replay' / 'rows.bin'
  stored = arrays.write(rows, {'x': np.arange(3)})
  root = tmp_path / 'checkpoints'
  checkpoints = checkpoint.open(root)
  for step in (10, 20):
    named = {'replay/rows.bin': stored} if step == 20 else {}
    checkpoints.save(step, {'x': np.full(1, step)}, rows=named)
  checkpoints.close()
  content = rows.read_bytes()
  for found, step, said in (
    (None, 10, 'replay/rows.bin is missing'),
    (content[:-1] + b'x', 10, ''),
    (content, 20, '20.corrupt is the checkpoint of step 20 and whole'),
  ):
    rows.unlink(missing_ok=True)
    if found is not None:
      rows.write_bytes(found)
    reader = checkpoint.open(root, read_only=True)
    assert reader.latest_step() == step
    checkpoints = checkpoint.open(root)
    assert checkpoints.restore({'x': np.zeros(1, int)})[0]['x'] == step
    assert said in capsys.readouterr().out
    checkpoints.close()


@pytest.mark.parametrize('is_packed', [True, False])
def test_numbers_that_a_manifest_makes_up_are_refused_before_any_is_read(
  tmp_path, monkeypatch, is_packed
):
  if not is_packed:
    monkeypatch.setattr(orbax_arrays, '_SMALL', 0)
  checkpoints = checkpoint.open(tmp_path)
  checkpoints.save(1, {'x': np.zeros(3), 'n': 1})
  checkpoints.close()
  whole = integrity.read_manifest(tmp_path / '1')
  n, x = whole.leaves

  def refused(message, **changes):
    integrity.seal(tmp_path / '1', dataclasses.replace(whole, **changes))
    reader = checkpoint.open(tmp_path, read_only=True)
    with pytest.raises(UserError, match=message):
      reader.restore({'x': np.zeros(3), 'n': 1})

  for leaves, message in (
    ((n, dataclasses.replace(x, shape=(10**12,))), r'\[1000000000000\] in the'),
    ((n, dataclasses.replace(x, dtype='int32')), 'is int32'),
    ((dataclasses.replace(n, value='a'), x), 'must be of type int'),
  ):
    refused(message, leaves=leaves)
  assert whole.packs == ({'1': ('pack0', 0)} if is_packed else {})
  for pack, offset, message in (
    ('pack0', -8, r'pack0: has no float64\[3\] at byte -8'),
    ('pack0', 8, 'at byte 8'),
    ('pack0', 10**12, 'at byte 1000000000000'),
    ('pack1', 0, 'no such file'),
    ('../../1/leaves/pack0', 0, 'is not the name of a pack'),
  ):
    if is_packed:
      refused(message, packs={'1': integrity.Place(pack, offset)})
  name, dtype, size = ('pack0', r'\|u1', 24) if is_packed else ('1', '<f8', 3)
  other = '<i8' if size == 3 else '<f8'
  far = 'not a pack' if is_packed else r'<f8\[1000000000000\], must be <f8\[3\]'
  path = tmp_path / '1' / 'leaves' / name / '.zarray'
  zarr = json.loads(path.read_text())
  for content, message in (
    (zarr | {'shape': [10**12]}, far),
    (zarr | {'dtype': other}, rf'is {other}\[64|3\], must be {dtype}\[64|3\]'),
    (zarr | {'chunks': [10**12]}, 'its chunks, filters or compressor'),
    (zarr | {'chunks': []}, 'its chunks, filters or compressor'),
    ('[' * 10**5, 'nests more than'),
    ([1], 'Expected `object`'),
  ):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)
    stored = {f'leaves/{name}/.zarray': arrays.stored(path)}
    refused(message, files=whole.files | stored)


def test_small_arrays_are_packed_and_come_back(tmp_path, monkeypatch):
  """Many of all sizes, several packs, one that is too large for any."""
  monkeypatch.setattr(orbax_arrays, '_PACK', 2_048)
  monkeypatch.setattr(orbax_arrays, '_SMALL', 2_000)
  rng = np.random.default_rng(0)
  carry = {
    f'{i}': rng.integers(0, 99, (size,)).astype(dtype)
    for i, size in enumerate((1, 250, 3, 77, 249, 300, 31, 8, 200))
    for dtype in [(np.uint8, np.float64, jnp.bfloat16, bool)[i % 4]]
  }
  checkpoints = checkpoint.open(tmp_path)
  checkpoints.save(1, carry)
  assert_same(checkpoints.restore(jax.tree.map(np.zeros_like, carry))[0], carry)
  checkpoints.close()
  names = {p.name for p in (tmp_path / '1' / 'leaves').iterdir() if p.is_dir()}
  sizes = {n: x.nbytes for n, x in carry.items()}
  assert max(sizes, key=lambda n: sizes[n]) == '5' and sizes['5'] > 2_000
  # 64 bytes and 2,000 do not go into one.
  assert names == {'5', 'pack0', 'pack1', 'pack2'}


def test_steps_of_schema_2_are_read(tmp_path, monkeypatch):
  """Every array has its own files there."""
  monkeypatch.setattr(orbax_arrays, '_SMALL', -1)
  monkeypatch.setattr(integrity, 'SCHEMA', 2)
  checkpoints = checkpoint.open(tmp_path)
  checkpoints.save(1, make_carry(1))
  checkpoints.close()
  path = tmp_path / '1' / 'manifest.json'
  content = json.loads(path.read_text())['manifest']
  assert content.pop('packs') == {}
  sealed = {'digest': integrity._digest(content), 'manifest': content}
  path.write_text(json.dumps(sealed))
  monkeypatch.undo()
  checkpoints = checkpoint.open(tmp_path)
  assert_same(checkpoints.restore(make_carry(0))[0], make_carry(1))
  checkpoints.close()
