"""A device's work and what it exchanges stay the same on more devices."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import scaling

_QUICK = (
  'planted',
  'efficientzero_update',
  'muzero_refresh',
  'atac_update',
  'language_update',
)
_SLOW = tuple(sorted(set(scaling.programs()) - set(_QUICK)))
# Bytes a row. Priorities go back to the replay whole; a CPU chooses the k best
# of 4 experts' scores for 4 tokens on every device.
_PRIORITY = 4
_GATHERED = {
  'planted': _PRIORITY,
  'muzero_update': _PRIORITY,
  'efficientzero_update': _PRIORITY,
  'efficientzero_v2_update': _PRIORITY,
  'sampled_muzero_update': _PRIORITY,
  'language_update': 4 * 4 * 4,
}
_TESTS = pathlib.Path(__file__).resolve().parent


def _count(names):
  """What `scaling` counts in a process with 8 devices."""
  done = subprocess.run(
    [sys.executable, _TESTS / 'scaling.py', *names],
    env={**os.environ, 'PYTHONPATH': str(_TESTS.parent)},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


@pytest.fixture(scope='module')
def quick():
  return _count(_QUICK)


@pytest.fixture(scope='module')
def slow():
  return _count(_SLOW)


def _grows(name, few, many):
  """What is wrong with a program's counts on 2 and on 8 devices."""
  wrong, kinds = [], {'all-reduce'}
  more_rows = (8 - 2) * scaling.ROWS
  if many['flops'] > 1.05 * few['flops']:
    wrong.append('operations')
  if many['exchanges'] != few['exchanges']:
    wrong.append('number of exchanges')
  if name.endswith(('_refresh', '_act')):
    kinds = set()
  gathered = _GATHERED.get(name, 0)
  if many['exchanges'].get('all-gather', 0) != (gathered > 0):
    wrong.append('gathers')
  if not set(many['exchanges']) <= kinds | {'all-gather'}:
    wrong.append('kinds of exchanges')
  if many['bytes'] != few['bytes'] + gathered * more_rows:
    wrong.append('bytes exchanged')
  return wrong


@pytest.mark.parametrize('name', _QUICK[1:])
def test_work_does_not_grow_with_the_devices(name, quick):
  few, many = quick[name]
  assert few['flops'] > 0
  assert _grows(name, few, many) == []


@pytest.mark.slow
@pytest.mark.parametrize('name', _SLOW)
def test_work_of_the_rest_does_not_grow_either(name, slow):
  assert _grows(name, *slow[name]) == []


def test_a_flattening_that_mixes_the_batch_is_seen(quick):
  found = _grows('planted', *quick['planted'])
  # Rows move between devices.
  assert {'kinds of exchanges', 'bytes exchanged'} <= set(found)
