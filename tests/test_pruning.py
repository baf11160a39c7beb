"""The study of coarse stages: its ends are known, its order is the theory's."""

import pytest
from launching import read_csv

from experiments.files import tables
from experiments.studies import pruning


@pytest.fixture(scope='module')
def rows():
  return pruning.models(64, num_states=8, num_actions=3)


def _score(rows, stage, share):
  (row,) = [r for r in rows if r.stage == stage and r.coarse == share]
  return row.score


def test_without_a_wrong_model_no_stage_matters(rows):
  scores = {_score(rows, stage, 0.0) for stage in (1, 2, 3)}
  assert len(scores) == 1
  # Three stages of the right model lose less than none of the wrong one.
  assert 0.5 < scores.pop() <= 1


def test_a_wrong_first_stage_hurts_the_most(rows):
  first, second, third = (_score(rows, stage, 0.8) for stage in (1, 2, 3))
  error = max(r.score_se for r in rows if r.coarse == 0.8)
  assert first + 3 * error < second < third + 3 * error


def test_rows_are_written_and_drawn(rows, tmp_path):
  pruned = [pruning.Coarsened('pruning', s, 1, 2, 0.5, 0.1, 9) for s in (0, 1)]
  tables.write_records(tmp_path / 'rows.csv', [*rows, *pruned], digits=5)
  read = read_csv(tmp_path / 'rows.csv')
  assert len(read) == len(rows) + 2
  assert float(read[0]['score']) == pytest.approx(rows[0].score, rel=1e-4)
  figure = pruning.draw([*rows, *pruned])
  assert [a.get_title() for a in figure.axes] == [
    'random processes',
    'Connect Four',
  ]
