"""Writers: what is on the disk or the terminal after a few rows."""

import builtins
import io
import re

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runtime import metrics
from experiments.runtime.config import UserError


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


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '100')

  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  writer = metrics.progress(10, start=2, columns=('loss',), stream=stream)
  writer.write(5, {'loss': 0.25})
  writer.close()
  text = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', stream.getvalue())
  assert '2/10' in text
  assert re.search(r'5/10 .* 50% loss 0\.25', text)


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


def test_tensorboard_says_what_is_missing(tmp_path, monkeypatch):
  original = builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith('tensorboardX'):
      raise ImportError(name)
    return original(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(UserError, match=r'pip install "outplay\[tensorboard\]"'):
    metrics.tensorboard_writer(tmp_path)
