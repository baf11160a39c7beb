"""The study on data sets: what is run again, what is counted, what is drawn."""

import csv
import json
import subprocess

import numpy as np
import pytest

from experiments.build import dataset
from experiments.data import layout, npz
from experiments.studies import offline

CELL = offline.Cell('bc', 'medium', ('--preset=bc_small',))


@pytest.fixture
def data(tmp_path):
  """Two episodes of returns 10 and 30, and one that has not ended."""
  about = layout.About(
    'one', '', np.float32([-1]), np.float32([1]), ref_min=0.0, ref_max=200.0
  )
  dataset = layout.make(
    observation=np.zeros((5, 2)),
    action=np.zeros((5, 1)),
    reward=[4, 6, 30, 1, 1],
    next_observation=np.zeros((5, 2)),
    terminated=[False, True, True, False, False],
    truncated=np.zeros(5, bool),
    about=about,
  )
  place = tmp_path / 'data' / 'task'
  place.mkdir(parents=True)
  npz.save(dataset, place / 'medium')
  return place


def finished(folder, returns, data, **changes):
  workdir = folder / 'bc_medium'
  workdir.mkdir(parents=True)
  mark = {
    'arguments': list(CELL.arguments),
    'seeds': len(returns),
    'checksum': dataset.checksum(str(data / 'medium')),
    'cpu_seconds': 7.0,
    'wall_seconds': 9.0,
    'done': True,
  }
  (workdir / 'cell.json').write_text(json.dumps(mark | changes))
  with (workdir / 'sweep.csv').open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['seed', 'eval_return', 'network_return', 'status'])
    writer.writerows([i, x, '', 'done'] for i, x in enumerate(returns))


def test_a_lost_seed_is_counted_and_spoils_nothing(data, tmp_path):
  finished(tmp_path / 'runs', ['20', '40', 'nan', '', '60'], data)
  rows = offline.collected([CELL], data, tmp_path / 'runs')
  behaviour, *seeds = rows
  # The open episode does not count: (10 + 30) / 2 of 200.
  assert (behaviour['return'], behaviour['score']) == ('20.00', '10.00')
  assert [row['score'] for row in seeds] == ['10.00', '20.00', '', '', '30.00']
  [row] = offline.summarised(rows)
  assert (row['seeds'], row['lost'], row['behaviour']) == (3, 2, '10.00')
  assert (row['mean'], row['worst']) == ('20.00', '10.00')
  assert 10 <= float(row['low']) <= float(row['iqm']) <= float(row['high'])
  offline.draw([row], tmp_path / 'figure.png')
  assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')


def test_nothing_but_lost_seeds_is_told_and_not_drawn(data, tmp_path):
  finished(tmp_path / 'runs', ['nan', 'nan'], data)
  rows = offline.collected([CELL], data, tmp_path / 'runs')
  [row] = offline.summarised(rows)
  assert (row['seeds'], row['lost'], row['iqm']) == (0, 2, '')
  offline.draw([row], tmp_path / 'figure.png')
  assert not (tmp_path / 'figure.png').exists()


@pytest.mark.parametrize(
  ('changes', 'runs'),
  [
    ({}, 0),
    ({'seeds': 1}, 1),
    ({'checksum': 'other'}, 1),
    ({'arguments': []}, 1),
    ({'done': False}, 1),
  ],
)
def test_a_cell_is_left_alone_while_it_is_the_same(
  data, tmp_path, monkeypatch, changes, runs
):
  finished(tmp_path / 'runs', ['1', '2'], data, **changes)
  started = []
  real = subprocess.Popen

  def popen(command, **options):
    started.append(command)
    return real(['true'], **options)

  monkeypatch.setattr(subprocess, 'Popen', popen)
  assert offline.run_one(CELL, data, tmp_path / 'runs', 2)
  assert len(started) == runs
  mark = json.loads((tmp_path / 'runs/bc_medium/cell.json').read_text())
  assert mark['done'] and mark['seeds'] == 2
  assert mark['wall_seconds'] >= 9.0


def test_a_cell_without_all_its_rows_has_not_finished(
  data, tmp_path, monkeypatch
):
  finished(tmp_path / 'runs', ['1'], data, done=False)
  real = subprocess.Popen
  popen = lambda command, **options: real(['true'], **options)
  monkeypatch.setattr(subprocess, 'Popen', popen)
  assert not offline.run_one(CELL, data, tmp_path / 'runs', 2)
