"""What a checkout promises: packages, pins, commands."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
CONSTRAINTS = (ROOT / 'constraints.txt').read_text()
OURS = ('agents', 'networks', 'search', 'experiments')


def name_of(requirement):
  name = re.match(r'[\w.-]+', requirement)[0]
  return re.sub(r'[-_.]+', '-', name).lower()


PINS = {}
for pin in CONSTRAINTS.splitlines():
  PINS.setdefault(name_of(pin), []).append(pin)


def test_all_packages_are_found_and_tests_are_not():
  import setuptools

  own = {
    path.parent.relative_to(ROOT).as_posix().replace('/', '.')
    for package in OURS
    for path in (ROOT / package).rglob('__init__.py')
  }
  options = PROJECT['tool']['setuptools']['packages']['find']
  assert not options['namespaces']
  assert set(setuptools.find_packages(ROOT, include=options['include'])) == own


def test_constraints_pin_every_requirement_and_name_no_host():
  requirements = PROJECT['project']['dependencies'] + [
    requirement
    for extra in PROJECT['project']['optional-dependencies'].values()
    for requirement in extra
  ]
  # An extra may name others of ours.
  assert {name_of(r) for r in requirements} - {'outplay'} <= PINS.keys()
  line = re.compile(r'[\w.-]+==[\w.!+-]+( ; [\w\s\'"().=<>!*]+)?')
  for pin in CONSTRAINTS.splitlines():
    assert line.fullmatch(pin), pin


def test_constraints_serve_both_generations_of_jax():
  assert [p.partition(' ; ')[2] for p in PINS['jax']] == [
    "python_full_version < '3.12'",
    "python_full_version >= '3.12'",
  ]


def test_environment_is_the_pinned_one():
  from packaging.requirements import Requirement

  for requirement in PROJECT['project']['dependencies']:
    name = name_of(requirement)
    installed = importlib.metadata.version(name)
    assert installed in Requirement(requirement).specifier
    pins = [Requirement(p) for p in PINS[name]]
    (pin,) = [p for p in pins if not p.marker or p.marker.evaluate()]
    assert installed in pin.specifier, name


def commands(text):
  """Shell lines, with continuations joined and spaces made single."""
  joined = re.sub(r'\\\n\s*', '', text)
  return [' '.join(line.split()) for line in joined.splitlines()]


SETUP = (
  'python3 -m venv .venv && '
  '.venv/bin/pip install -q -c constraints.txt uv && '
  '.venv/bin/uv pip install -q -p .venv -c constraints.txt -e '
)


def test_ci_does_what_the_readme_says():
  readme = (ROOT / 'README.md').read_text()
  if not readme:
    pytest.skip('README.md is yet to be written')
  assert SETUP + '. && .venv/bin/python -m experiments.train' in commands(
    readme
  )
  assert SETUP + "'.[dev]' && .venv/bin/python -m pytest -n 2" in commands(
    readme
  )
  if shutil.which('make') is None:
    pytest.skip('there is no make here, and the commands need none')
  # Not what an outer make or shell has set.
  outer = ('MAKEFLAGS', 'MAKEOVERRIDES', 'MAKELEVEL', 'MFLAGS', 'PYTHON')
  planned = subprocess.run(
    ['make', '-n', 'setup', 'check', 'VENV=.venv'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
    env={k: v for k, v in os.environ.items() if k not in outer},
  ).stdout.splitlines()
  setup = [
    *(SETUP + "'.[dev]'").split(' && '),
    '.venv/bin/python -m pytest -n 2',
  ]
  assert planned[:4] == setup
  ci = (ROOT / '.ci' / 'run').read_text()
  assert 'set -euo pipefail' in ci
  assert 'make setup ' in ci
  assert 'make extras ' in ci
  # What `check` makes, its parts after the tests at once.
  assert 'make test ' in ci
  assert 'make --keep-going --jobs lint types docs ' in ci


def launchers():
  return sorted(
    path.stem
    for path in (ROOT / 'experiments').glob('*.py')
    if re.search(r"^if __name__ == '__main__':", path.read_text(), re.M)
  )


@pytest.mark.parametrize('launcher', launchers())
def test_launchers_start_without_jax(launcher):
  # `--help` is to answer within a second, and importing JAX alone takes that.
  script = (
    f'import sys, experiments.{launcher}\n'
    "print([m for m in ('jax', 'flax', 'envpool')"
    ' if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == '[]\n'


def test_the_wheel_holds_all_rooms_and_each_module_imports(tmp_path):
  tree, wheel, site = (tmp_path / n for n in ('tree', 'wheel', 'site'))
  for package in OURS:
    skip = shutil.ignore_patterns('__pycache__', 'results')
    shutil.copytree(ROOT / package, tree / package, ignore=skip)
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, tree)
  run = lambda *command: subprocess.run(
    command, cwd=tmp_path, capture_output=True, text=True
  )
  uv = pathlib.Path(sys.executable).with_name('uv')
  done = run(uv, 'build', '-q', '--wheel', f'-o={wheel}', tree)
  assert done.returncode == 0, done.stderr
  (archive,) = wheel.glob('*.whl')
  shutil.unpack_archive(archive, site, 'zip')
  modules = {
    path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')
    for package in OURS
    for path in (ROOT / package).rglob('*.py')
  }
  # A notebook runs when it is imported.
  notebooks = {m for m in modules if m.startswith('experiments.notebooks.')}
  modules -= notebooks - {'experiments.notebooks.execute'}
  code = (
    'import importlib, sys\n'
    f'sys.path.insert(0, {str(site)!r})\n'
    f'for name in {sorted(modules)!r}:\n'
    '  found = importlib.import_module(name)\n'
    f'  assert found.__file__.startswith({str(site)!r}), found\n'
  )
  done = run(sys.executable, '-c', code)
  assert done.returncode == 0, done.stderr
