"""Every loader refuses files that are made to do harm, in one line."""

import contextlib
import resource
import signal

import pytest
from hostile_files import (
  CASES,
  ESCAPE,
  MARK,
  OUTSIDE,
  SLOW_CASES,
  Case,
  prepare,
)

from experiments.files.errors import UserError

pytest.importorskip('h5py')
# Files that are refused must not be read: far more than any case may take.
_SECONDS, _KILOBYTES = 20, 600_000
# One of each loader and kind; the rest is slow.
_SAMPLE = CASES[::7]


@contextlib.contextmanager
def limited():
  """Fails where the block waits for ever, or takes too much memory."""

  def late(*_):
    raise TimeoutError(f'still at work after {_SECONDS} s')

  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  handler = signal.signal(signal.SIGALRM, late)
  signal.alarm(_SECONDS)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert grown < _KILOBYTES


def check(case, tmp_path):
  opener = prepare(case, tmp_path)
  with limited(), pytest.raises(UserError) as caught:
    opener()
  message = str(caught.value)
  assert '\n' not in message and message.isprintable(), message
  assert len(message) < 1200 and ESCAPE not in message
  assert 'data' in message
  assert not (tmp_path / MARK).exists()
  assert (tmp_path / OUTSIDE).is_dir()


def ids(case):
  return f'{case.loader}: {case.name}'.encode('unicode_escape').decode()


def test_there_are_many():
  assert len({(case.loader, case.name) for case in CASES}) == len(CASES)
  assert len(CASES) >= 60
  assert {c.loader for c in _SAMPLE} == {c.loader for c in CASES}


@pytest.mark.parametrize(
  'loader', ['folder', 'npz', 'd4rl', 'minari', 'text', 'run', 'statistics']
)
def test_the_good_files_are_read(loader, tmp_path):
  """Or the others would be refused for what nobody has changed."""
  prepare(Case(loader, 'nothing', lambda folder: None), tmp_path)()


@pytest.mark.parametrize('case', _SAMPLE, ids=ids)
def test_hostile_files_are_refused(case, tmp_path):
  check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('case', (*CASES, *SLOW_CASES), ids=ids)
def test_all_hostile_files_are_refused(case, tmp_path):
  check(case, tmp_path)
