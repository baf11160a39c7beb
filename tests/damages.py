"""Ways to damage a file, a folder of steps and what lies in a run."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

# Damages to a file.


def flip(path, outside):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def cut(path, outside):
  os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path, outside):
  os.truncate(path, 0)


def lengthen(path, outside):
  with path.open('ab') as file:
    file.write(b'\0' * 100)


def overwrite(path, outside):
  path.write_bytes(bytes(path.stat().st_size))


def noise(path, outside):
  path.write_bytes(np.random.default_rng(0).bytes(3000))


def remove(path, outside):
  path.unlink()


def link(path, outside):
  path.rename(outside / 'target')
  path.symlink_to(outside / 'target')


def dangle(path, outside):
  path.unlink()
  path.symlink_to(outside / 'nothing')


def endless(path, outside):
  path.unlink()
  path.symlink_to('/dev/zero')


def fifo(path, outside):
  path.unlink()
  os.mkfifo(path)


def folder(path, outside):
  path.unlink()
  path.mkdir()


def unreadable(path, outside):
  path.chmod(0)


def read_only(path, outside):
  path.chmod(0o500)


def nested(path, outside):
  path.write_text('[' * 100_000)


def many_keys(path, outside):
  path.write_text(json.dumps({f'k{i}': i for i in range(100_000)}))


def another_type(path, outside):
  path.write_text('[1, 2]')


def escapes(path, outside):
  path.write_text('{"seed": "\\u001b[2J", "name": "\\u001b]0;x\\u0007"}')


def wide(path, outside):
  path.write_text('step,loss\n1,"' + 'x' * 200_000 + '"\n')


def many_columns(path, outside):
  path.write_text(','.join(map(str, range(100_000))) + '\n')


def escaped_cells(path, outside):
  path.write_text('step,loss\n\x1b[2J,1\n')


def half_a_line(path, outside):
  with path.open('a') as file:
    file.write('9,0.')


def twice(path, outside):
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(lines + lines[1:]))


ANY = (
  flip, cut, empty, lengthen, overwrite, noise, remove, link, dangle, endless,
  fifo, folder, unreadable,
)  # fmt: skip
JSON = (nested, many_keys, another_type, escapes)
CSV = (wide, many_columns, escaped_cells, half_a_line, twice)


# Damages to a folder of steps.


def newest(steps: pathlib.Path) -> pathlib.Path:
  return max(
    (p for p in steps.iterdir() if p.name.isdecimal()),
    key=lambda path: int(path.name),
  )


def renamed(name):
  def damage(steps, outside):
    newest(steps).rename(steps / name)

  return damage


def beside(name, kind='file'):
  def damage(steps, outside):
    path = steps / name
    if kind == 'file':
      path.write_text('x')
    elif kind == 'folder':
      path.mkdir()
    else:
      path.symlink_to(outside / 'nothing')

  return damage


def lose_all(steps, outside):
  shutil.rmtree(steps)


def lose_the_steps(steps, outside):
  lose_all(steps, outside)
  steps.mkdir()


def lose_the_newest(steps, outside):
  shutil.rmtree(newest(steps))


def a_file_instead(steps, outside):
  lose_all(steps, outside)
  steps.write_text('x')


def a_link_instead(steps, outside):
  steps.rename(outside / 'steps')
  steps.symlink_to(outside / 'steps')


def aside_is_taken(steps, outside):
  flip(max(newest(steps).glob('leaves/*/.zarray')), outside)
  (steps / f'{newest(steps).name}.corrupt').mkdir()


def newest_unreadable(steps, outside):
  unreadable(newest(steps), outside)


def newest_arrays_unreadable(steps, outside):
  unreadable(newest(steps) / 'leaves', outside)


def newest_read_only(steps, outside):
  read_only(newest(steps), outside)


def all_damaged(steps, outside):
  for path in steps.glob('*/leaves/*/.zarray'):
    cut(path, outside)


def manifest_of_an_older_step(steps, outside):
  older = min(p for p in steps.iterdir() if p != newest(steps))
  shutil.copy(older / 'manifest.json', newest(steps))


def arrays_of_an_older_step(steps, outside):
  older = min(p for p in steps.iterdir() if p != newest(steps))
  shutil.copytree(
    older / 'leaves', newest(steps) / 'leaves', dirs_exist_ok=True
  )


def unfinished(steps, outside):
  shutil.copytree(newest(steps), steps / '.9.0123456789abcde.tmp')


STEPS = {
  'renamed to 1000': renamed('1000'),
  'renamed to 9': renamed('9'),
  'set aside though whole': renamed('8.corrupt'),
  'beside a file of a step': beside('9'),
  'beside a link of a step': beside('9', 'link'),
  'beside 045': beside('045', 'folder'),
  'beside another script': beside('٤٥', 'folder'),
  'beside another script, a file': beside('٤٥'),
  'beside an empty step': beside('9', 'folder'),
  'beside an unfinished one': unfinished,
  'lost': lose_all,
  'without its steps': lose_the_steps,
  'without its newest step': lose_the_newest,
  'a file instead': a_file_instead,
  'a link instead': a_link_instead,
  'newest damaged, its place aside taken': aside_is_taken,
  'all damaged': all_damaged,
  'unreadable': unreadable,
  'read-only': read_only,
  'newest unreadable': newest_unreadable,
  'arrays of the newest unreadable': newest_arrays_unreadable,
  'newest read-only': newest_read_only,
}
TWO_STEPS = {
  'manifest of an older step': manifest_of_an_older_step,
  'arrays of an older step': arrays_of_an_older_step,
}


def at(place: pathlib.PurePath, damage) -> Callable:
  """A damage to what is at a place in the run's folder."""
  return lambda run, outside: damage(run / place, outside)


def swap(place: pathlib.PurePath, other: pathlib.Path) -> Callable:
  """What another seed's run has there instead."""

  def damage(run, outside):
    shutil.rmtree(run / place, ignore_errors=True)
    shutil.copytree(other / place, run / place)

  return damage


def trap(name: str) -> Callable:
  """A link at a name that a writer might use for a moment."""

  def damage(run, outside):
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / 'sentinel')

  return damage
