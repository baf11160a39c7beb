"""Notebooks run, what the documentation shows is theirs, and what is wrong in
one is told with its place.
"""

import re

import matplotlib
import pytest

from experiments.files.errors import UserError
from experiments.notebooks import execute

GOOD = """# %% [markdown]
# # A title
#
# Prose with $x^2$.

# %%
import matplotlib.pyplot as plt

# %% tags=["parameters"]
TINY = False
SIZES = (1, 2)
RATE = 0.5
NAME = 'a'
NUMBER = 4 if TINY else 32  # of nothing

# %% alt="A line"
for i in range(2):
  print(NUMBER, i)


def draw():
  return plt.subplots(figsize=(1, 1))


figure, axes = draw()
axes.plot([1, 2])
NUMBER
"""


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'good.py').write_text(GOOD)
  return tmp_path


@pytest.fixture(scope='module', autouse=True)
def without_windows():
  import matplotlib.pyplot as plt

  backend = matplotlib.get_backend()
  matplotlib.use('Agg')
  yield
  plt.close('all')
  matplotlib.use(backend)


# What these call other tests call, too.
SLOW = ('atac', 'experts', 'newton', 'runs', 'tree')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in execute.names()
  ],
)
def test_notebook_runs_with_tiny_sizes(name):
  cells = execute.code(name, ['TINY=True'])
  assert len(cells) > 2
  # As a module of its own would be, so that it sees nothing of ours.
  namespace = {'__name__': f'notebook_{name}'}
  for i, cell in enumerate(cells):
    exec(compile(cell, f'{name}, cell {i + 1}', 'exec'), namespace)
  assert namespace['TINY'] is True


@pytest.mark.parametrize('name', execute.names())
def test_documentation_shows_the_notebook(name):
  execute.check(name)
  text = (execute.DOCS / f'{name}.md').read_text(encoding='utf-8')
  lines = text.splitlines()
  assert lines[0].startswith('# ')
  assert f'`python -m experiments.notebook {name}`' in lines[2]
  figures = re.findall(r'!\[(.*?)\]\((.*?)\)', text)
  assert figures
  for alt, path in figures:
    file = execute.DOCS / path
    assert file.read_bytes().startswith(b'\x89PNG')
    assert file.stat().st_size < 200_000
    assert alt != 'Figure', f'{path}: its cell has no alt text'
  shown = {(execute.DOCS / path).name for _, path in figures}
  folder = execute.DOCS / f'{name}_files'
  assert {file.name for file in folder.iterdir()} == shown


def test_kernel_runs_a_notebook_and_its_markdown_is_written(folder, capsys):
  result = execute.execute('good', ['TINY=True', 'RATE=1'], folder)
  stale = folder / 'out' / 'good_files' / 'old.png'
  stale.parent.mkdir(parents=True)
  stale.touch()
  path = execute.write('good', result, folder / 'out')
  text = path.read_text(encoding='utf-8')
  command = 'experiments.notebook good --set=TINY=True --set=RATE=1`'
  assert text.startswith('# A title\n\n*`experiments/notebooks/good.py`')
  assert command in text.splitlines()[2]
  assert 'Prose with $x^2$.' in text
  # Lines printed one by one are one block; a last expression is not shown.
  assert '```text\n4 0\n4 1\n```\n\n![A line](good_files/' in text
  assert text.count('```text') == 1
  (figure,) = result.figures
  assert (folder / 'out' / figure).read_bytes().startswith(b'\x89PNG')
  assert not stale.exists()
  assert 'good: cell 2 of 3: TINY = True' in capsys.readouterr().out
  assert execute.written_code(text) == execute.code(
    'good', ['TINY=True', 'RATE=1'], folder
  )


def test_cell_that_raises_is_named_and_the_old_markdown_stays(
  folder, capsys, monkeypatch
):
  bad = GOOD + "\n# %%\nx = 1\nraise KeyError('no\\nsuch')\n"
  (folder / 'bad.py').write_text(bad)
  out = folder / 'out'
  out.mkdir()
  (out / 'bad.md').write_text('old')
  line = bad.splitlines().index("raise KeyError('no\\nsuch')") + 1
  with pytest.raises(UserError) as error:
    execute.write('bad', execute.execute('bad', (), folder), out)
  assert str(error.value) == (
    f"notebook bad, cell 4 (bad.py:{line}): KeyError: 'no\\nsuch'; nothing "
    'was written'
  )
  assert "  x = 1\n> raise KeyError('no\\nsuch')" in capsys.readouterr().err
  assert (out / 'bad.md').read_text() == 'old'
  assert not (out / 'bad_files').exists()


def test_parameters_are_replaced_and_nothing_else(folder):
  sets = ['NUMBER=7', 'NAME=b c', 'SIZES=(3,)', 'RATE=2']
  changed = execute.code('good', sets, folder)
  assert changed[1].splitlines() == [
    'TINY = False',
    'SIZES = (3,)',
    'RATE = 2.0',
    "NAME = 'b c'",
    'NUMBER = 7  # of nothing',
  ]
  own = execute.code('good', (), folder)
  assert [changed[0], *changed[2:]] == [own[0], *own[2:]]


@pytest.mark.parametrize(
  ('assignment', 'words'),
  [
    ('NUMBER', 'should be PARAMETER=value'),
    ('NUMBR=3', 'unknown parameter; must be one of TINY, SIZES, RATE'),
    ('NUMBER=many', 'NUMBER is 32, must be of type int'),
    ('NUMBER=1.5', 'NUMBER is 32, must be of type int'),
    ('SIZES=3', 'SIZES is (1, 2), must be of type tuple'),
    ('TINY=1', 'TINY is False, must be of type bool'),
  ],
)
def test_wrong_parameters_are_refused(folder, assignment, words):
  with pytest.raises(UserError, match=re.escape(words)) as error:
    execute.code('good', [assignment], folder)
  assert f'--set={assignment}: ' in str(error.value)


def test_unknown_notebook_is_refused_with_those_there_are(folder):
  with pytest.raises(UserError, match='god: unknown; must be one of good'):
    execute.execute('god', (), folder)


def test_parameters_without_a_cell_are_refused(folder):
  (folder / 'good.py').write_text(GOOD.replace('["parameters"]', '[]'))
  with pytest.raises(UserError, match='0 cells are tagged parameters'):
    execute.code('good', ['TINY=True'], folder)


def test_check_finds_changed_code_and_missing_markdown(folder):
  out = folder / 'out'
  with pytest.raises(UserError, match=r'good\.md: there is none'):
    execute.check('good', out, folder)
  out.mkdir()
  blocks = [f'```python\n{x}\n```' for x in execute.code('good', (), folder)]
  (out / 'good.md').write_text('\n\n'.join(blocks))
  execute.check('good', out, folder)
  (folder / 'good.py').write_text(GOOD.replace('NUMBER, i', 'i, NUMBER'))
  with pytest.raises(UserError, match=r'its code is not that of good\.py'):
    execute.check('good', out, folder)
