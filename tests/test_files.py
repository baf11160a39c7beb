"""Reading and writing: regular, bounded, typed, whole, and where it belongs."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from experiments.files import arrays, locking, reading, tables, writing
from experiments.files.errors import Missing, UserError, shown


@dataclasses.dataclass(frozen=True)
class Facts:
  seed: int
  names: tuple[str, ...] = ()


def place(path: pathlib.Path, kind: str) -> pathlib.Path:
  """Something at a path that is no regular file."""
  if kind == 'link':
    (path.parent / 'elsewhere').write_text('{"seed": 1}')
    path.symlink_to(path.parent / 'elsewhere')
  elif kind == 'dangling':
    path.symlink_to(path.parent / 'nowhere')
  elif kind == 'zero':
    path.symlink_to('/dev/zero')
  elif kind == 'folder':
    path.mkdir()
  elif kind == 'fifo':
    os.mkfifo(path)
  elif kind == 'socket':
    with socket.socket(socket.AF_UNIX) as server:
      here = pathlib.Path.cwd()
      os.chdir(path.parent)  # A socket's path has 108 bytes only.
      server.bind(path.name)
      os.chdir(here)
  return path


KINDS = ('link', 'dangling', 'zero', 'folder', 'fifo', 'socket')


@pytest.mark.parametrize('kind', KINDS)
def test_only_regular_files_are_read_written_and_appended_to(tmp_path, kind):
  path = place(tmp_path / 'file', kind)
  for act in (
    lambda: reading.read_json(path, Facts),
    lambda: writing.write_text(path, 'new'),
    lambda: writing.open_append(path),
  ):
    with pytest.raises(UserError, match=rf'{path}: is a') as caught:
      act()
    assert '\n' not in str(caught.value)
  if kind == 'link':
    assert (tmp_path / 'elsewhere').read_text() == '{"seed": 1}'
  left = {p.name for p in tmp_path.iterdir()}
  assert left <= {'file', 'elsewhere'}


def test_a_path_that_the_user_typed_may_be_a_link(tmp_path):
  path = place(tmp_path / 'file', 'link')
  assert reading.read_bytes(path, follow=True) == b'{"seed": 1}'
  with pytest.raises(UserError, match='is a device'):
    reading.read_bytes(place(tmp_path / 'z', 'zero'), follow=True)


def test_a_folder_holds_files_and_folders_only(tmp_path):
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  (tmp_path / 'a' / 'b' / 'file').write_text('')
  link = tmp_path / 'run'
  link.symlink_to(tmp_path / 'a')
  reading.check_folder(link)
  place(tmp_path / 'a' / 'b' / 'pipe', 'fifo')
  with pytest.raises(UserError, match=r'b/pipe: is a FIFO'):
    reading.check_folder(link)
  with pytest.raises(Missing, match='no such folder'):
    reading.check_folder(tmp_path / 'c')


@pytest.mark.parametrize(
  ('content', 'what'),
  [
    (b'{"seed": "x"}', r'Expected `int`, got `str` - at `\$.seed`'),
    (b'{"seed": 1.5}', 'Expected `int`'),
    (b'{}', 'missing required field `seed`'),
    (b'{"seed": 1, "names": [3]}', r'Expected `str`.*\$.names\[0\]'),
    (b'[1]', 'Expected `object`'),
    (b'{"seed": 1', 'is not JSON'),
    (b'', 'is not JSON'),
    (b'\xff\xfe', 'is not JSON'),
    (b'[' * 100_000, 'nests more than 64 levels'),
    (b'{"seed":' * 100_000, 'nests more than 64 levels'),
    (b'{"seed": "' + b'[' * 1000 + b'"}', 'Expected `int`, got `str`'),
  ],
)
def test_json_is_of_the_type_that_is_expected(tmp_path, content, what):
  path = tmp_path / 'facts.json'
  path.write_bytes(content)
  with pytest.raises(UserError, match=what) as caught:
    reading.read_json(path, Facts)
  assert str(path) in str(caught.value)
  assert len(str(caught.value)) < 600


def test_unbounded_numbers_are_read():
  found = reading.decode_json('[-Infinity, 1]', list[float], 'space')
  assert found == [float('-inf'), 1.0]


def test_sizes_are_bounded_before_reading(tmp_path):
  path = tmp_path / 'large'
  with path.open('wb') as file:
    file.truncate(1 << 40)
  with pytest.raises(UserError, match='must be at most'):
    reading.read_bytes(path)


def test_what_is_written_is_whole_or_as_before(tmp_path):
  path = tmp_path / 'new' / 'file'
  writing.write_text(path, 'one')
  os.link(path, tmp_path / 'hard')
  writing.write_text(path, 'two')
  assert (tmp_path / 'hard').read_text() == 'one'
  with pytest.raises(KeyboardInterrupt), writing.replacing(path) as file:
    file.write(b'three')
    raise KeyboardInterrupt
  assert path.read_text() == 'two'
  assert [p.name for p in path.parent.iterdir()] == ['file']
  with writing.open_append(path) as file:
    file.write(b'!')
  assert path.read_text() == 'two!'


def test_a_name_that_can_be_guessed_is_not_used(tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('mine')
  for name in ('file.tmp', '.file.tmp', f'.file.{os.getpid()}.tmp'):
    (tmp_path / name).symlink_to(victim)
  writing.write_text(tmp_path / 'file', 'new')
  assert victim.read_text() == 'mine'


def test_a_disk_that_refuses_is_one_line():
  with pytest.raises(UserError, match=r'cannot write /proc/x/y: .*make room'):
    writing.write_text('/proc/x/y', '')


def test_escape_sequences_do_not_reach_the_terminal():
  text = 'a\x1b]0;title\x07\u202eb\ud800é中\n'
  assert shown(text) == ('a\\x1b]0;title\\x07\\u202eb\\ud800é中\\n')
  assert len(shown('x' * 10**7)) == 200
  assert len(shown('\x1b' * 10**7)) <= 403


def test_arrays_come_back_and_only_as_expected(tmp_path):
  path = tmp_path / 'file.bin'
  content = {
    'a': np.arange(6.0).reshape(2, 3)[:, ::2],
    'scalar': np.array(5, np.int8),
    'none': np.zeros((0, 3)),
    'yes': np.array([True]),
  }
  stored = arrays.write(path, content)
  assert arrays.stored(path) == stored
  expected = {n: (x.dtype, x.shape) for n, x in content.items()}
  for found in (
    arrays.read(path, expected, stored),
    {n: arrays.mapped(path)(n, *about) for n, about in expected.items()},
  ):
    for name, x in content.items():
      np.testing.assert_array_equal(found[name], x, strict=True)
  for name, about, message in (
    ('a', ('float32', (2, 2)), r'a is float64\[2, 2\], must be float32'),
    ('a', ('float64', (2, 10**12)), 'must be float64'),
    ('b', ('float64', ()), 'lacks b'),
  ):
    with pytest.raises(UserError, match=message):
      arrays.read(path, expected | {name: about}, stored)
  data = bytearray(path.read_bytes())
  for at, message in (
    (0, 'is not a file of arrays'),
    (8, 'not a file of arrays'),
  ):
    path.write_bytes(data[:at] + b'\xff' * 8 + data[at + 8 :])
    with pytest.raises(UserError, match=message):
      arrays.mapped(path)
    with pytest.raises(UserError, match='is garbled'):
      arrays.read(path, expected, stored)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('step,loss\n1,"' + 'x' * 200_000 + '"\n', 'is not CSV'),
    (','.join(map(str, range(10**5))) + '\n', '100,000 columns'),
    ('step,loss\n1\n', 'line 2: 1 cells, must be 2'),
    ('loss\n1\n', 'has no column step; there are loss'),
    ('', 'has no column step; there are none'),
    ('step\0\n', 'is binary'),
    ('step\x1b[2J\n', r'there are step\\x1b'),
  ],
)
def test_a_table_is_csv_or_one_line(tmp_path, text, message):
  path = tmp_path / 'table.csv'
  path.write_text(text)
  with pytest.raises(UserError, match=message) as caught:
    tables.read_csv(path, ['step'])
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 600


def hold(folder, then, before='pass'):
  """A process that holds a folder, or prints why it cannot."""
  script = f"""
import os, time
from experiments.files import locking
{before}
try:
  with locking.locked({str(folder)!r}):
    print('held', flush=True)
    {then}
    time.sleep(1)
except ValueError as error:
  print(error, flush=True)
"""
  return subprocess.Popen(
    [sys.executable, '-c', script],
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).resolve().parent.parent,
  )


def test_one_process_holds_a_folder_and_a_killed_one_none(tmp_path):
  folder = tmp_path / 'new'
  with locking.locked(folder):
    again = locking.locked(folder)
    words = rf'another run writes there \(process {os.getpid()} on '
    with pytest.raises(UserError, match=words):
      again.__enter__()
  # What it forks, as a simulator may be, must not hold the folder for it.
  child = hold(
    folder, "os.fork() or (print('forked', flush=True), time.sleep(9))"
  )
  assert child.stdout.readline() == 'held\n'
  assert child.stdout.readline() == 'forked\n'
  child.kill()
  child.stdout.close()
  child.wait()
  with locking.locked(folder):
    pass


def test_of_several_at_once_one_holds_a_folder(tmp_path):
  go = tmp_path / 'go'
  wait = f'while not os.path.exists({str(go)!r}): time.sleep(0.01)'
  children = [hold(tmp_path / 'run', 'time.sleep(3)', wait) for _ in range(5)]
  go.touch()
  told = [child.communicate()[0] for child in children]
  assert told.count('held\n') == 1
  assert sum('another run writes there' in line for line in told) == 4
