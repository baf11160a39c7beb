"""Files stay short: a long one tells several stories."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ('agents', 'experiments', 'networks', 'search')

LONGEST = 700
# Longer files want a second thought; there may be so many of them. Lower a
# number when files have become shorter.
LONG = 500
LONG_TESTS = 12
LONG_MODULES = 4


def lengths(*rooms: str) -> dict[str, int]:
  """Lines of each Python file below folders of the repository."""
  return {
    str(path.relative_to(ROOT)): len(path.read_text().splitlines())
    for room in rooms
    for path in (ROOT / room).rglob('*.py')
  }


def longer(than: int, *rooms: str) -> dict[str, int]:
  return {name: n for name, n in lengths(*rooms).items() if n > than}


def test_no_file_is_very_long():
  assert longer(LONGEST, 'tests', *ROOMS) == {}


def test_few_tests_are_long():
  found = longer(LONG, 'tests')
  assert len(found) <= LONG_TESTS, found


def test_few_modules_are_long():
  found = longer(LONG, *ROOMS)
  assert len(found) <= LONG_MODULES, found
