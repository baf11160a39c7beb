"""Studies that are a table of training runs: what they say of failed ones."""

import os

import pytest
from test_text_runs import by_flags

from experiments import study
from experiments.runtime import children


def test_a_study_of_refused_runs_says_why_and_has_no_results(
  tmp_path, monkeypatch, capsys
):
  def refuse(command, stopping, *, stdout, **options):
    os.write(stdout.fileno(), b'error: text=data/a.txt: no such file\n')
    return 2, None

  monkeypatch.setattr(children, 'run', refuse)
  folders = f'--folder={tmp_path}/runs', f'--results={tmp_path}/results'
  with pytest.raises(SystemExit) as ended:
    by_flags(study.find('moe_balance'), *folders, '--seeds=1')
  assert ended.value.code == 1
  told = capsys.readouterr()
  first, *_ = told.err.splitlines()
  assert first.endswith('_s0.log: error: text=data/a.txt: no such file')
  assert told.err.count('failed: exit code 2: refused') == 9
  assert 'results' not in told.out and not (tmp_path / 'results').exists()
