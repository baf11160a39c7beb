"""What the documentation says: its code runs, its commands and links exist."""

import functools
import pathlib
import re
import shlex

import launching
import pytest

from experiments import presets

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
WRITTEN = sorted(
  path
  for path in [ROOT / 'README.md', *DOCS.rglob('*.md')]
  # Notebooks are written, and run, by their own test.
  if path.parent.name not in ('notebooks', 'reference', 'generated')
)
_BLOCK = re.compile(
  r'(<!-- not run: .+ -->\n)?^```python\n(.*?)^```', re.M | re.S
)


def name_of(path):
  return path.relative_to(ROOT).as_posix()


def blocks(path):
  """Python of a page that is to be run."""
  return [code for mark, code in _BLOCK.findall(path.read_text()) if not mark]


@pytest.mark.parametrize(
  'path', [path for path in WRITTEN if blocks(path)], ids=name_of
)
def test_python_of_a_page_runs(path, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  # From top to bottom, as who reads it would type it.
  names = {'__name__': 'page'}
  for number, code in enumerate(blocks(path)):
    exec(compile(code, f'{name_of(path)}, block {number + 1}', 'exec'), names)
  assert 'nan' not in capsys.readouterr().out


def test_what_tells_people_how_is_run():
  for page in ('environment', 'loss', 'planner', 'd4rl', 'experts'):
    assert blocks(DOCS / 'tasks' / f'{page}.md'), page


def links(text):
  """Targets of links and images to files, without anchors."""
  text = re.sub(r'```.*?```', '', text, flags=re.S)
  found = re.findall(r'\]\(([^)\s]+)\)', text)
  return [t.partition('#')[0] for t in found if '://' not in t and t[0] != '#']


@pytest.mark.parametrize('path', WRITTEN, ids=name_of)
def test_links_lead_somewhere(path):
  missing = [
    link
    for link in links(path.read_text())
    if not (path.parent / link).exists()
  ]
  assert missing == []


def commands(text):
  """Command lines of our launchers: module and arguments."""
  text = re.sub(r'\\\n\s*', '', text)
  for found in re.finditer(r'python -m experiments\.(\w+)([^`\n]*)', text):
    rest = re.split(r'\s#\s| -- | && |;\s', found[2])[0]
    yield found[1], shlex.split(rest.replace('…', ''), comments=True)


@functools.cache
def flags_of(words):
  """Names of the flags that a command defines."""
  from absl import flags

  known = set(flags.FLAGS)
  launching.find(words)[1].define_flags()
  own = set(flags.FLAGS) - known
  for flag in own:
    delattr(flags.FLAGS, flag)
  return own


@pytest.mark.parametrize('path', WRITTEN, ids=name_of)
def test_commands_name_launchers_and_their_flags(path):
  for launcher, arguments in commands(path.read_text()):
    words = (launcher, *arguments[:1]) if launcher == 'study' else (launcher,)
    flags = [a[2:].partition('=')[0] for a in arguments if a[:2] == '--']
    unknown = set(flags) - flags_of(words) - {'help'}
    # A boolean flag has its negation.
    assert {f for f in unknown if f[2:] not in flags_of(words)} == set()


def folder_of(launcher, flags):
  """The folder of a command that trains, by its flags; None of another."""
  if launcher not in ('train', 'sweep') or flags.keys() & {
    *('check', 'help', 'plan', 'show', 'status', 'text')
  }:
    return None
  if 'workdir' in flags:
    return flags['workdir']
  name = flags.get('preset', presets.DEFAULT)
  if name not in presets.PRESETS:  # it stands for any
    return None
  env = flags.get('dataset') or flags.get('env') or presets.PRESETS[name].env
  return name, env, flags.get('seed', '0')


def test_commands_of_all_pages_can_be_given_one_after_the_other():
  """No two that differ meet in a folder: the second would be refused."""
  found = {}
  for path in WRITTEN:
    for launcher, arguments in commands(path.read_text()):
      words = [a.lstrip('-').partition('=') for a in arguments]
      folder = folder_of(launcher, {name: value for name, _, value in words})
      if folder is not None and '...' not in arguments:
        given = sorted(a for a in arguments if not a.startswith('--workdir'))
        first = found.setdefault(folder, (given, path))
        assert given == first[0], (folder, name_of(path), name_of(first[1]))
  assert {'runs/c4', 'sweeps/catch'} <= found.keys()


def test_pages_are_reached():
  # A page that no table of contents names is one that nobody finds.
  for folder in (DOCS, *DOCS.iterdir()):
    index = folder / 'index.md'
    if not index.is_file() or folder.name == 'notebooks':
      continue
    text = index.read_text()
    for page in folder.glob('*.md'):
      if page.stem not in ('index', 'README'):
        assert re.search(rf'^{page.stem}$', text, re.M), name_of(page)
