"""Writers: what is on the disk or the terminal after a few rows."""

import io
import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.files.errors import UserError
from experiments.runtime import metrics


def test_csv_formats_scalars(tmp_path):
  path = tmp_path / 'metrics.csv'
  writer = metrics.csv_writer(path)
  third = np.float32(1 / 3)
  writer.write(
    np.int64(5),
    {'a': 0.1, 'b': jnp.float32(third), 'c': np.int32(7), 'd': 'x,"y"'},
  )
  assert path.read_text() == ('step,a,b,c,d\n5,0.1,0.333333343,7,"x,""y"""\n')
  assert np.float32(float('0.333333343')) == third


def test_csv_grows_columns_and_leaves_blanks(tmp_path):
  path = tmp_path / 'metrics.csv'
  writer = metrics.csv_writer(path)
  writer.write(1, {'loss': 0.5})
  writer.write(2, {'return': 3.0})
  writer.write(3, {'loss': float('nan'), 'return': 4.0})
  assert path.read_text() == ('step,loss,return\n1,0.5,\n2,,3\n3,nan,4\n')


def rows_of(step):
  row = {'loss': 1 / step}
  if step % 4 == 0:
    row['eval'] = step
  if step % 6 == 0:
    row['late'] = step
  return row


@pytest.mark.parametrize('resumed', [2, 3, 5, 8])
@pytest.mark.parametrize('reached', [8, 9])
def test_resumed_csv_equals_the_uninterrupted_one(tmp_path, resumed, reached):
  whole, cut = tmp_path / 'whole.csv', tmp_path / 'cut.csv'
  writer = metrics.csv_writer(whole)
  for step in range(1, 13):
    writer.write(step, rows_of(step))

  writer = metrics.csv_writer(cut)
  for step in range(1, reached + 1):
    writer.write(step, rows_of(step))
  with open(cut, 'a') as file:
    file.write('7,0.14')  # what a kill left of a row
  writer = metrics.csv_writer(cut, resume_step=resumed)
  for step in range(resumed + 1, 13):
    writer.write(step, rows_of(step))
  assert cut.read_bytes() == whole.read_bytes()


def test_csv_begins_anew_without_a_step_to_resume(tmp_path):
  path = tmp_path / 'metrics.csv'
  metrics.csv_writer(path).write(1, {'old': 1})
  metrics.csv_writer(path).write(1, {'new': 2})
  assert path.read_text() == 'step,new\n1,2\n'


def test_csv_resumes_an_empty_file(tmp_path):
  path = tmp_path / 'metrics.csv'
  path.touch()
  metrics.csv_writer(path, resume_step=3).write(4, {'a': 1})
  assert path.read_text() == 'step,a\n4,1\n'


def test_tee_writes_and_closes_all():
  events = []

  def writer(name):
    def close():
      events.append((name, 'close'))
      if name == 'b':
        raise OSError('full')

    return metrics.Writer(
      lambda step, row: events.append((name, step, row)), close
    )

  both = metrics.tee(writer('a'), writer('b'))
  both.write(1, {'x': 2})
  with pytest.raises(OSError, match='full'):
    both.close()
  assert events[:2] == [('a', 1, {'x': 2}), ('b', 1, {'x': 2})]
  assert sorted(events[2:]) == [('a', 'close'), ('b', 'close')]


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_progress_prints_lines_at_intervals():
  stream, clock = io.StringIO(), Clock()
  writer = metrics.progress(
    200, columns=('return', 'loss'), stream=stream, clock=clock
  )
  for step in range(20, 201, 20):
    # 10 steps a second.
    clock.now = step / 10
    row = {'loss': step / 100, 'other': 1.0}
    if step == 40:
      row['return'] = 7
    writer.write(step, row)
  writer.close()
  assert stream.getvalue().splitlines() == [
    'step 20/200  10%  loss 0.2',
    'step 120/200  60%  return 7  loss 1.2  10 steps/s  0:08 left',
    'step 200/200  100%  return 7  loss 2  10 steps/s  0:00 left',
  ]


def test_progress_without_columns_shows_the_first_numbers():
  stream = io.StringIO()
  metrics.progress(2, stream=stream).write(
    1, {'phase': 'x', 'a': 1, 'b': 2, 'c': 3, 'd': 4, 'e': 5}
  )
  assert stream.getvalue() == 'step 1/2  50%  a 1  b 2  c 3  d 4\n'


class Terminal(io.StringIO):
  """Remembers what was written."""

  def isatty(self):
    return True

  def lines(self):
    text = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', self.getvalue())
    return [
      line.rstrip() for line in re.split(r'[\r\n]+', text) if line.strip()
    ]


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '100')
  stream = Terminal()
  writer = metrics.progress(10, start=2, columns=('loss',), stream=stream)
  writer.write(5, {'loss': 0.25})
  writer.close()
  assert re.fullmatch(r'2/10  20% \S+ compiling', stream.lines()[0])
  assert re.fullmatch(r'5/10  50% \S+ loss 0\.25', stream.lines()[-1])


@pytest.mark.parametrize(
  ('width', 'tail'),
  [
    (40, '1:17:36 left'),
    (60, '1:17:36 left  188 steps/s'),
    (80, '1:17:36 left  188 steps/s  episode_return -12.35'),
    (100, '1:17:36 left  188 steps/s  episode_return -12.35'),
    (120, '1:17:36 left  188 steps/s  episode_return -12.35  eval_return 0.5'),
  ],
)
def test_what_has_no_room_in_a_line_is_left_out_whole(monkeypatch, width, tail):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', str(width))
  stream, clock = Terminal(), Clock()
  columns = ('episode_return', 'eval_return')
  writer = metrics.progress(1_000_000, 0, columns, 10, stream, clock)
  row = {'episode_return': -12.345678, 'eval_return': 0.5}
  writer.write(10_000, row)
  clock.now = 600.0
  writer.write(123_000, row)
  writer.close()
  last = stream.lines()[-1]
  assert len(last) <= width
  done, bar, rest = re.fullmatch(r'(\S+  \S+) (\S+) ?(.*)', last).groups()
  assert (done, rest) == ('123000/1000000  12%', tail)
  assert len(bar) == (24 if width >= 100 else width // 8)


def test_tensorboard_writes_what_it_can_read_back(tmp_path):
  pytest.importorskip('tensorboardX')
  from tensorboardX.proto import event_pb2

  writer = metrics.tensorboard_writer(tmp_path)
  writer.write(3, {'loss': jnp.float32(0.5), 'phase': 'x'})
  writer.close()
  (path,) = tmp_path.iterdir()
  data, found = path.read_bytes(), []
  while data:
    size = int.from_bytes(data[:8], 'little')
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    data = data[16 + size :]
  assert found == [(3, 'loss', 0.5)]


@pytest.fixture
def offline_wandb(monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  return pytest.importorskip('wandb')


def logged(path):
  """`[(step, name, number)]` of a run's file: a LevelDB log of its records."""
  from wandb.proto import wandb_internal_pb2

  data, at, record, found = path.read_bytes(), 7, b'', []
  while at < len(data):
    # A block of 32 KiB ends with zeros where no header has room.
    if 2**15 - at % 2**15 < 7:
      at += 2**15 - at % 2**15
      continue
    size, kind = int.from_bytes(data[at + 4 : at + 6], 'little'), data[at + 6]
    record += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # whole, or the last part
      items = wandb_internal_pb2.Record.FromString(record).history.item
      row = {
        (x.key or x.nested_key[0]): json.loads(x.value_json) for x in items
      }
      found += [
        (row['_step'], name, value)
        for name, value in row.items()
        if not name.startswith('_')
      ]
      record = b''
  return found


def test_wandb_keeps_the_numbers_and_the_run(tmp_path, offline_wandb):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  ids = []
  for resumed, steps in ((None, (3, 6)), (6, (9,)), (None, (3,))):
    writer = metrics.wandb_writer(workdir, 'probe', {'seed': 1}, resumed)
    for step in steps:
      # The last one goes back, as who resumes behind a lost future does.
      writer.write(step, {'loss': jnp.float32(step / 2), 'phase': 'x'})
      writer.write(step - 1, {'loss': 99.0})
    writer.close()
    ids.append((workdir / 'wandb_id.txt').read_text().strip())
  assert ids[0] == ids[1] != ids[2]
  first, *_ = sorted(workdir.glob(f'wandb/offline-run-*/run-{ids[0]}.wandb'))
  assert logged(first) == [(3, 'loss', 1.5), (6, 'loss', 3.0)]


@pytest.mark.parametrize(
  'make, package, extra',
  [
    (metrics.tensorboard_writer, 'tensorboardX', 'tensorboard'),
    (lambda path: metrics.wandb_writer(path, 'p', {}), 'wandb', 'wandb'),
    (lambda path: metrics.check_installed(True, ''), 'tensorboardX', '.*'),
    (lambda path: metrics.check_installed(False, 'p'), 'wandb', 'wandb'),
  ],
)
def test_a_missing_package_is_told(tmp_path, monkeypatch, make, package, extra):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(UserError, match=rf'pip install "outplay\[{extra}\]"'):
    make(tmp_path)


def test_rows_that_two_runs_wrote_are_kept_once(tmp_path):
  path = tmp_path / 'metrics.csv'
  path.write_text('step,loss\n10,1\n20,2\n10,1\n20,3\n30,4\n20,2\n')
  assert metrics.last_step(path) == 30
  metrics.csv_writer(path, resume_step=20)
  assert path.read_text() == 'step,loss\n10,1\n20,2\n'


def test_rows_that_are_not_as_they_were_are_said(tmp_path, capsys):
  path = tmp_path / 'metrics.csv'
  writer = metrics.csv_writer(path)
  writer.write(10, {'loss': 1.0})
  digest = writer.digest()
  writer.write(20, {'loss': 1.0, 'more': 2.0})
  metrics.csv_writer(path, 10, digest)
  assert not capsys.readouterr().out
  path.write_text(path.read_text().replace('10,1', '10,2'))
  metrics.csv_writer(path, 10, digest)
  assert (
    'metrics.csv is not what it was at update 10' in capsys.readouterr().out
  )
