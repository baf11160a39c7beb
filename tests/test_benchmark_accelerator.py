"""The accelerator suite: who keeps the time, what is resumed, small sizes."""

import sys

import pytest
from launching import read_csv, refused

from experiments.benchmarks import accelerator, accelerator_groups, cases
from experiments.benchmarks.timing import Measurement, once
from experiments.files.errors import UserError

# Stands in for the process that measures: groups a, b, ... by what they do.
_CHILD = """
import json, os, sys, time
asked = json.loads(sys.argv[1])
say = lambda **message: print(json.dumps(message), flush=True)
print('a warning of a library')
say(about={'machine': 'M', 'versions': 'V', 'load': '1.0'}, seconds=SECONDS)
does = {DOES}
for number, (name, what) in enumerate(does.items(), 1):
  if [name, 'M', 'V'] in asked['done'] or name in asked['left_out']:
    continue
  say(begin=name, limit=LIMIT, number=number, groups=len(does))
  if what == 'hang':
    time.sleep(60)
  if what == 'die':
    print('out of memory', file=sys.stderr, flush=True)
    os._exit(1)
  if what == 'fail':
    say(failed='no such card')
  else:
    say(rows=[['search', what, 's', 'u/s', 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, '']])
say(end=True)
"""


@pytest.fixture
def groups(tmp_path, monkeypatch):
  """Sets what the process does, by group."""

  def set_(limit=20.0, seconds=60.0, **does):
    text = _CHILD.replace('{DOES}', repr(does))
    text = text.replace('SECONDS', repr(seconds)).replace('LIMIT', repr(limit))
    script = tmp_path / 'child.py'
    script.write_text(text)
    monkeypatch.setattr(
      accelerator, 'COMMAND', (sys.executable, '-IS', str(script))
    )

  return set_


def found(path):
  return [
    (row['group'], row['name'], row['unit'], row['note'])
    for row in read_csv(path)
  ]


def test_a_group_that_hangs_or_dies_takes_no_other_down(tmp_path, groups):
  out = tmp_path / 'card.csv'
  groups(limit=1.0, a='one', b='hang', c='two', d='die', e='fail', f='three')
  accelerator.run(out)
  assert found(out) == [
    ('a', 'one', 'u/s', ''),
    ('b', 'b', 'not measured', 'took longer than its 1 s'),
    ('c', 'two', 'u/s', ''),
    ('d', 'd', 'not measured', 'its process ended: out of memory'),
    ('e', 'e', 'not measured', 'no such card'),
    ('f', 'three', 'u/s', ''),
  ]
  assert [row['median'] for row in read_csv(out)] == ['1', '', '1', '', '', '1']


def test_what_is_measured_is_kept_and_the_rest_tried_again(tmp_path, groups):
  out = tmp_path / 'card.csv'
  groups(a='one', b='fail', c='two')
  accelerator.run(out)
  groups(a='other', b='mended', c='other')
  accelerator.run(out)
  assert found(out) == [
    ('a', 'one', 'u/s', ''),
    ('c', 'two', 'u/s', ''),
    ('b', 'mended', 'u/s', ''),
  ]
  # On another machine nothing is measured yet.
  out.write_text(out.read_text().replace(',M,V', ',M2,V'))
  accelerator.run(out)
  assert [name for _, name, *_ in found(out)[3:]] == [
    'other',
    'mended',
    'other',
  ]


def test_a_run_ends_when_its_time_is_over(tmp_path, groups, capsys):
  out = tmp_path / 'card.csv'
  groups(seconds=2.0, a='one', b='hang', c='two')
  accelerator.run(out)
  assert found(out) == [('a', 'one', 'u/s', '')]
  said = capsys.readouterr().out
  assert 'no time is left' in said
  assert '[2 of 3,' in said and 'b: at most 20 s' in said


def test_a_process_that_cannot_begin_is_an_error(tmp_path, monkeypatch):
  command = (sys.executable, '-ISc', 'raise SystemExit("no device")')
  monkeypatch.setattr(accelerator, 'COMMAND', command)
  with pytest.raises(UserError, match=r'suite=accelerator: .*no device'):
    accelerator.run(tmp_path / 'card.csv')
  out = tmp_path / 'other.csv'
  out.write_text('a,b\n1,2\n')
  with pytest.raises(UserError, match=r'other\.csv'):
    accelerator.run(out)


def test_wrong_flags_are_one_line():
  assert refused('benchmark', '--suite=accelerator,search').startswith(
    'error: suite=accelerator: writes a CSV with other columns'
  )
  assert 'seeds=' in refused('benchmark', '--suite=accelerator', '--seeds=2')


def test_groups_fit_into_eight_minutes_and_are_told_apart():
  card = cases.CASES['accelerator', 'accelerator', 'full']
  known = accelerator_groups.groups(card)
  assert len({group.name for group in known}) == len(known)
  assert accelerator_groups.SECONDS < 480
  small = cases.find('accelerator')
  # The same rows, smaller.
  assert len(accelerator_groups.groups(small)) == len(known)


def test_groups_report_rows_and_errors(monkeypatch):
  row = once('search', 'a', 's', 'u/s', 2.0)
  Group = accelerator_groups.Group

  def broken():
    raise ValueError('too\nlarge')

  monkeypatch.setattr(
    accelerator_groups,
    'groups',
    lambda case: [
      Group('done', 1.0, broken),
      Group('left out', 1.0, broken),
      Group('broken', 1.0, broken),
      Group('right', 2.0, lambda: [row]),
    ],
  )
  about = accelerator_groups.timing.machine()
  asked = {
    'quick': True,
    'repeats': 1,
    'done': [['done', about['machine'], about['versions']]],
    'left_out': ['left out'],
  }
  first, *rest = accelerator_groups.measure(asked)
  assert first['about']['machine'] == about['machine']
  assert rest[1] == {'failed': 'too large'}
  assert rest[2]['begin'] == 'right' and rest[2]['number'] == 4
  assert Measurement(*rest[3]['rows'][0]) == row
  assert rest[-1] == {'end': True}


def test_a_search_that_cannot_be_compiled_leaves_the_others(monkeypatch):
  from experiments.benchmarks import searches

  monkeypatch.setattr(
    searches, 'ours', lambda rule, number, **own: lambda *args: 1 / 0
  )
  case = cases.find('accelerator', repeats=1)._replace(simulations=2)
  rows = accelerator_groups.search_rows('puct', 2, 0, case)
  speeds = {row.name: row for row in rows}
  assert speeds['mctx.muzero_policy'].median > 0
  for name in ('puct', 'puct, kernels'):
    assert speeds[name].median != speeds[name].median
    assert speeds[name].note == 'failed: division by zero'


@pytest.mark.slow
def test_all_rows_at_small_sizes():
  asked = {'quick': True, 'repeats': 1, 'done': [], 'left_out': []}
  messages = [*accelerator_groups.measure(asked)]
  assert not [message for message in messages if 'failed' in message]
  groups = [m['begin'] for m in messages if 'begin' in m]
  rows = [m['rows'] for m in messages if 'rows' in m]
  assert len(groups) == len(rows) == 20
  for some in rows:
    for row in (Measurement(*fields) for fields in some):
      assert row.median > 0 and not row.note.startswith('failed'), row
