"""The tests that `mutants` names fail where its faults are."""

import pathlib
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from mutants import MUTANTS

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ('agents', 'networks', 'search', 'experiments', 'tests')


def copied(folder):
  for name in FOLDERS:
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, folder / name, ignore=ignore)
  shutil.copy(ROOT / 'pyproject.toml', folder)
  if (ROOT / '.jax_cache').is_dir():
    (folder / '.jax_cache').symlink_to((ROOT / '.jax_cache').resolve())


def outcomes(folder, mutant):
  """How many of the named tests failed, and how many there were."""
  report = folder / 'report.xml'
  command = [sys.executable, '-m', 'pytest', mutant.tests, '-k', mutant.select]
  done = subprocess.run(
    [*command, '-p', 'no:cacheprovider', f'--junit-xml={report}'],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )
  # Neither an error of collection nor an empty selection is a failure.
  assert done.returncode in (0, 1), done.stdout + done.stderr
  suite = ElementTree.parse(report).getroot()[0].attrib
  assert suite['errors'] == '0', done.stdout
  return int(suite['failures']), int(suite['tests'])


def test_mutants_change_what_is_there():
  for mutant in MUTANTS:
    text = (ROOT / mutant.path).read_text()
    assert text.count(mutant.old) == 1, mutant
    assert (ROOT / mutant.tests).is_file() and mutant.new != mutant.old


@pytest.mark.slow
@pytest.mark.parametrize('mutant', MUTANTS, ids=lambda m: f'{m.path}:{m.new}')
def test_a_mutant_is_noticed(mutant, tmp_path):
  copied(tmp_path)
  path = tmp_path / mutant.path
  path.write_text(path.read_text().replace(mutant.old, mutant.new))
  failed, number = outcomes(tmp_path, mutant)
  assert failed == number > 0
