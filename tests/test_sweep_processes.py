"""Rows as processes: retries, limits, other machines, halving, status."""

import json
import sys

import pytest
from launching import read_csv
from test_sweep import SHARED, TINY, run_sweep

from experiments.files.errors import UserError
from experiments.runtime import run_config
from experiments.sweeps import halving, run, status
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps import pool as sweep_pool
from experiments.sweeps import results as sweep_results
from experiments.sweeps import rows as sweep_rows
from experiments.sweeps.plan import Row
from experiments.sweeps.rows import Job

# Stands in for a training: notes that it was called, and ends as it is told.
_STAND_IN = """
import os, pathlib, sys, time
folder, ends = pathlib.Path(sys.argv[1]), sys.argv[2].split(',')
folder.mkdir(parents=True, exist_ok=True)
calls = len(list(folder.glob('call*')))
(folder / f'call{calls}').touch()
if ends[0] == 'wait':
  time.sleep(600)
print('last words', flush=True)
code = int(ends[min(calls, len(ends) - 1)])
if code < 0:
  os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture
def stand_in(monkeypatch):
  monkeypatch.setattr(
    sweep_rows,
    'train_command',
    lambda arguments: [sys.executable, '-c', _STAND_IN, *arguments],
  )


def run_jobs(todo, at_once=3, retries=2, limits=None, **rest):
  """All jobs on this machine."""
  rest = {'stopping': lambda: False, 'report': lambda ended: None} | rest
  pool = sweep_pool.local(at_once, limits or sweep_pool.Limits())
  return sweep_pool.run(todo, pool, retries=retries, **rest)


def make_job(tmp_path, number, ends):
  folder = tmp_path / str(number)
  return Job(Row(number, 0), folder, (str(folder), ends), updates=0)


def calls(job):
  return len(list(job.folder.glob('call*')))


def states(job):
  return [t.state for t in sweep_rows.read_tries(job)]


def test_a_process_that_dies_is_tried_again_a_few_times(
  stand_in, tmp_path, capsys
):
  ends = ['1,0', '1', '2', '-9,0']
  todo = [make_job(tmp_path, i, e) for i, e in enumerate(ends)]
  reported = []
  failed = run_jobs(todo, report=reported.append)
  assert [calls(job) for job in todo] == [2, 3, 1, 2]
  assert sorted(failed) == [Row(1, 0), Row(2, 0)]
  assert failed[Row(1, 0)].startswith('exit code 1, last words (see ')
  assert failed[Row(2, 0)].startswith('exit code 2: refused, last words')
  assert sorted(reported) == [1, 2, 3, 4]
  assert [states(job) for job in todo] == [
    ['again', 'done'], ['again', 'again', 'failed'], ['failed'],
    ['again', 'done'],
  ]  # fmt: skip
  assert sweep_rows.read_tries(todo[3])[0].reason.startswith('SIGKILL: ')
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 4 and said[0].endswith('more times after that')
  # What has finished is not run again.
  run_jobs(todo[:1])
  assert calls(todo[0]) == 2


def test_stopping_ends_the_processes(stand_in, tmp_path):
  todo = [make_job(tmp_path, i, 'wait') for i in range(3)]
  failed = run_jobs(
    todo,
    at_once=2,
    stopping=lambda: calls(todo[0]) + calls(todo[1]) == 2,
  )
  assert failed == {} and [calls(job) for job in todo] == [1, 1, 0]
  assert not any(map(sweep_rows.has_ended, todo))
  assert [states(job) for job in todo] == [['stopped'], ['stopped'], []]
  assert not list(tmp_path.glob('*.stop'))


@pytest.mark.parametrize(
  ('limits', 'why'),
  [
    (sweep_pool.Limits(minutes=0.01), 'row_minutes=0.01: took longer'),
    (sweep_pool.Limits(gigabytes=0.001), 'row_gb=0.001: took 0.0'),
  ],
)
def test_a_row_beyond_its_limits_is_ended_for_good(
  stand_in, tmp_path, limits, why
):
  job = make_job(tmp_path, 0, 'wait')
  failed = run_jobs([job], limits=limits)
  assert failed[job.row].startswith(why) and calls(job) == 1


def test_time_is_that_of_the_processes_and_not_of_the_queue(tmp_path):
  job = make_job(tmp_path, 0, '0')
  job.folder.mkdir()
  for seconds, state in ((2.5, 'again'), (1.5, 'done')):
    sweep_rows.begin_try(job, 'here')
    sweep_rows.end_try(job, seconds, state, 'a\nb')
  assert (job.folder / 'timing.csv').read_text() == 'wall_seconds\n4.0\n'
  first, second = sweep_rows.read_tries(job)
  assert (first.number, second.number, second.where) == ('1', '2', 'here')
  assert first.reason == 'a b'


def test_a_row_is_tried_on_another_machine(tmp_path):
  """Of two machines one loses every row."""
  todo = [make_job(tmp_path, i, '0') for i in range(4)]
  placed, ended = [], []

  def choose(avoid):
    busy = {name for name, _ in ended}
    good = [n for n in ('bad', 'good') if n not in avoid and n not in busy]
    return good[0] if good else None

  def start(name, job):
    job.folder.mkdir(exist_ok=True)
    placed.append((name, job.row.setting))
    code = 0 if name == 'good' else None
    ended.append(
      (name, (job, sweep_pool.Ended(code, 1.0, 'gone' * (not code))))
    )

  def collect():
    found = [how for _, how in ended]
    ended.clear()
    return found

  pool = sweep_pool.Pool(choose, start, collect, lambda: None)
  failed = sweep_pool.run(
    todo,
    pool,
    retries=1,
    stopping=lambda: False,
    report=lambda ended: None,
  )
  assert not failed
  for job in todo:
    tries = [name for name, setting in placed if setting == job.row.setting]
    assert tries in (['bad', 'good'], ['good'])
  assert ('bad', 0) in placed


# --- successive halving


def curves_of(values, step=10):
  return {
    Row(i, 0): [{'step': float(step), 'eval_return': v}]
    for i, v in enumerate(values)
  }


def test_rungs_grow_by_the_factor_and_leave_the_end_out():
  rule = halving.Halving(3, 10, 'eval_return')
  assert rule.rungs(90) == [10, 30]
  assert rule.rungs(91) == [10, 30, 90]
  assert rule.rungs(10) == []


def test_only_the_best_go_on():
  rule = halving.Halving(3, 10, 'eval_return')
  found = curves_of([3.0, 1.0, 2.0, 6.0, 5.0, 4.0, float('nan')])

  def goes_on(i, known, decided):
    known = {row: found[row] for row in list(found)[:known]}
    return not halving.is_poor(rule, Row(i, 0), known, 100, decided)

  decided = set()
  # The first two have nobody to be compared with.
  assert goes_on(0, 1, decided) and goes_on(1, 2, decided)
  assert not goes_on(2, 3, decided)
  # Two of six go on: 6 and 5.
  assert [goes_on(i, 6, set()) for i in range(6)] == [
    False, False, False, True, True, False,
  ]  # fmt: skip
  # What was let on is not asked about again.
  assert goes_on(1, 6, decided)
  assert not goes_on(6, 7, set())


def test_a_rung_is_met_by_the_first_measure_after_it():
  curve = [
    {'step': 5.0, 'eval_return': 9.0},
    {'step': 10.0, 'loss': 1.0},
    {'step': 15.0, 'eval_return': 2.0},
  ]
  at = halving.value_at
  assert at(curve, 'eval_return', 10) == 2.0
  assert at(curve, 'eval_return', 16) is None
  rule = halving.Halving(2, 10, 'eval_return')
  early = {Row(0, 0): curve[:2], Row(1, 0): curve, Row(2, 0): curve}
  assert not halving.is_poor(rule, Row(0, 0), early, 100, set())


# Writes a metric of its own every 0.2 s until it is asked to stop.
_LEARNER = """
import pathlib, signal, sys, time
folder, value = pathlib.Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
folder.mkdir(parents=True, exist_ok=True)
with (folder / 'metrics.csv').open('w') as file:
  print('step,eval_return', file=file, flush=True)
  for step in range(1, 41):
    print(f'{step},{value}', file=file, flush=True)
    time.sleep(0.05 if step != 2 else 0.5)
"""


def test_poor_rows_are_ended_early_and_stay_so(monkeypatch, tmp_path):
  monkeypatch.setattr(
    sweep_rows,
    'train_command',
    lambda arguments: [sys.executable, '-c', _LEARNER, *arguments],
  )
  todo = [
    make_job(tmp_path, i, str(v))._replace(updates=40)
    for i, v in enumerate([4, 3, 2, 1])
  ]
  rule = halving.Halving(2, 2, 'eval_return')
  assert run_jobs(todo, at_once=4, halving=rule) == {}
  # Which came to a rung first is chance, but the best one never is ended.
  assert states(todo[0]) == ['done']
  ended = [job for job in todo if states(job) == ['halved']]
  assert ended and all(map(sweep_rows.has_ended, todo))
  results = sweep_rows.read(todo, {})
  for job in ended:
    assert results[job.row].status == 'halved'
    assert 'below the best' in sweep_rows.read_tries(job)[0].reason
  # Another start leaves them alone.
  assert run_jobs(todo, halving=rule) == {}
  assert all(len(states(job)) == 1 for job in todo)


@pytest.mark.slow
def test_halving_ends_processes_that_train(tmp_path):
  """Of four rows at least one ends early, saved; the others as without."""
  flags = (
    *('--preset=muzero_catch', '--env=jax:catch', '--steps=8000'),
    *(f'--set={s}' for s in TINY),
    *('--set=evaluate_every=50', '--set=final_episodes=4'),
    *('--set=checkpoint_every=50', '--grid=learning_rate=3e-3,1e-7'),
    *('--engine=processes', '--seeds=2', '--halving=2', '--halving_first=50'),
    f'--workdir={tmp_path}',
  )
  done = run_sweep(*flags)
  table = read_csv(tmp_path / 'sweep.csv')
  statuses = [row['status'] for row in table]
  assert set(statuses) == {'halved', 'done'}, done.stdout
  whole = max(
    int(read_csv(p)[-1]['step']) for p in tmp_path.glob('rows/*/m*s.csv')
  )
  names = [f's{i:03}_seed{seed}' for i in (0, 1) for seed in (0, 1)]
  for name, row in zip(names, table, strict=True):
    folder = tmp_path / 'rows' / name
    step = int(read_csv(folder / 'metrics.csv')[-1]['step'])
    tries = read_csv(folder.with_suffix('.tries.csv'))
    assert [t['state'] for t in tries] == [row['status']]
    if row['status'] == 'halved':
      assert step < whole and 'below the best' in tries[0]['reason']
      assert any(p.name.isdecimal() for p in folder.glob('checkpoints/*'))
    else:
      assert step == whole
  # They stay as they are.
  before = [p.read_text() for p in sorted(tmp_path.glob('rows/*.tries.csv'))]
  run_sweep(*flags)
  after = [p.read_text() for p in sorted(tmp_path.glob('rows/*.tries.csv'))]
  assert before == after and read_csv(tmp_path / 'sweep.csv') == table


def test_rows_that_ended_early_are_in_no_mean():
  plan = sweep_plan.make_plan('muzero_catch', grid=['learning_rate=1e-3,1e-2'])
  curve = [{'step': 1.0, 'eval_return': 9.0}]
  results = {
    Row(0, 0): sweep_results.from_curve(curve, 'halved'),
    Row(1, 0): sweep_results.from_curve([curve[0] | {'eval_return': 1.0}]),
  }
  best, other = sweep_results.summarise(plan, results, 'eval_return')
  assert (best.setting, best.iqm, best.lost) == (1, 1.0, 0)
  assert (other.seeds, other.lost) == (0, 1)


# --- what a sweep is doing


def test_status_tells_each_row(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  swept = sweep_plan.make_plan(
    'muzero_catch', grid=['learning_rate=1e-3,1e-2'], **SHARED
  )
  content = swept._asdict() | {'engine': 'processes'}
  workdir = tmp_path / 'sweep'
  run_config.write_run_config(workdir, content, 'none')
  status.note_rows(workdir, swept, 2)
  rows = sweep_plan.rows(swept, 2)
  done, runs, fails, _ = sweep_rows.jobs(swept, rows, workdir)
  for job in (done, runs, fails):
    job.folder.mkdir(parents=True)
    job.log.write_text('a word\n')
    sweep_rows.begin_try(job, 'there')
  sweep_rows.end_try(done, 1.0, 'done', '')
  sweep_rows.end_try(runs, 1.0, 'again', 'SIGKILL')
  sweep_rows.begin_try(runs, 'elsewhere')
  (runs.folder / 'metrics.csv').write_text('step,loss\n5,1\n7,')
  sweep_rows.end_try(fails, 1.0, 'failed', 'exit code 1\x1b[2J')
  lines = status.read(workdir)
  assert [(x.state, x.where, x.number) for x in lines] == [
    ('done', 'there', '1'),
    ('running', 'elsewhere', '2'),
    ('failed', 'there', '1'),
    ('waiting', '', ''),
  ]
  assert lines[1].updates == '5/16' and lines[1].heard.endswith(' s ago')
  assert lines[1].log == 'rows/s000_seed1.log'
  assert lines[2].name == 'learning_rate=1e-2 seed=0'
  status.show(workdir)
  said = capsys.readouterr().out
  assert '4 rows: 1 done, 1 running, 1 failed, 1 waiting; 3 left' in said
  assert '\x1b[2J' not in said
  for other in (tmp_path, tmp_path / 'none', done.folder):
    with pytest.raises(UserError, match="is not a sweep's folder"):
      status.read(other)


def test_status_of_programs(tmp_path):
  swept = sweep_plan.make_plan('muzero_catch', **SHARED)
  content = swept._asdict() | {'engine': 'vmap'}
  run_config.write_run_config(tmp_path, content, 'none')
  status.note_rows(tmp_path, swept, 3)
  for number, steps in enumerate(('10', '')):
    folder = tmp_path / 'programs' / f'00{number}'
    (folder / 'checkpoints' / steps).mkdir(parents=True)
    (folder / 'program.json').write_text(
      json.dumps({'rows': [[0, number]], 'traced': []})
    )
  (folder / 'curves.csv').write_text('')
  found = status.read(tmp_path)
  assert [(x.state, x.where, x.updates) for x in found] == [
    ('begun', '000', '10/16'),
    ('done', '001', '16/16'),
    ('waiting', '', ''),
  ]


def test_a_share_takes_every_nth_row():
  assert run.read_share(None) == (0, 1)
  assert run.read_share('2/4') == (2, 4)
  for text in ('4/4', '1', '1/', '-1/4', '٤/8', '1/2/3', 'a/b'):
    with pytest.raises(UserError, match=f'share={text}: must be I/N'):
      run.read_share(text)
