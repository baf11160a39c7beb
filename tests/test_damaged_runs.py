"""Damaged folders of all kinds of runs: one line, or the same numbers."""

import damaged_runs
import pytest

# Of a kind's cases every so many are tried by default.
SAMPLE = {'host': 17}


def check(kind, root, every=1):
  """Tries a kind's cases; returns how many there were."""
  wrong, endings = {}, []
  with damaged_runs.make(kind, root) as run:
    chosen = damaged_runs.cases(run)[::every]
    for number, case in enumerate(chosen):
      folder = root / f'case{number}'
      folder.mkdir()
      ending = damaged_runs.tried(run, case, folder)
      endings.append(ending.kind)
      fine = ending.kind in ('refused', 'equal') and case.must in ending.told
      if not fine:
        wrong[case.name] = ending
  assert not wrong, '\n'.join(
    f'{name}: {kind}: {told[-1500:]}' for name, (kind, told) in wrong.items()
  )
  return len(endings), endings.count('equal')


@pytest.mark.parametrize('kind', SAMPLE)
def test_some_damages_end_in_a_line_or_the_same_numbers(kind, tmp_path):
  # Whether some are refused depends on which are tried.
  _, equal = check(kind, tmp_path, SAMPLE[kind])
  assert equal


@pytest.mark.slow
@pytest.mark.parametrize('kind', damaged_runs.KINDS)
def test_all_damages_end_in_a_line_or_the_same_numbers(kind, tmp_path):
  count, equal = check(kind, tmp_path)
  assert count >= 15
  assert 0 < equal < count
