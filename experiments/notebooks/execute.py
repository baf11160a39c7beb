"""Executes notebooks and writes them as Markdown with their figures.

`experiments.notebook` describes their format.
"""

import ast
import importlib
import io
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.files import writing
from experiments.files.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'experiments' / 'notebooks'
DOCS = ROOT / 'docs' / 'notebooks'

# nbconvert's own indents what is printed; Sphinx would take it for Python.
_TEMPLATE = """{% extends 'markdown/index.md.j2' %}
{% block stream %}
```text
{{ output.text.rstrip() }}
```
{% endblock %}
{% block data_png %}
![{{ cell.metadata.alt or 'Figure' }}]({{ output.metadata.filenames['image/png']
  | path2url }})
{% endblock %}"""


class Result(NamedTuple):
  """An executed notebook: its text, and bytes of the figures that it names."""

  markdown: str
  figures: dict[str, bytes]


def names(folder: pathlib.Path = FOLDER) -> list[str]:
  """All notebooks of a folder, in alphabetical order."""
  others = ('__init__', 'execute')
  return sorted(
    path.stem for path in folder.glob('*.py') if path.stem not in others
  )


def read(name: str, folder: pathlib.Path = FOLDER) -> Any:
  """A notebook as nbformat has it.

  Raises:
    UserError: an unknown name; jupytext, nbclient or nbconvert are missing.
  """
  if name not in names(folder):
    raise UserError(
      f'notebook {name}: unknown; must be one of {", ".join(names(folder))}'
    )
  # Refuses missing packages before anything runs.
  for package in ('jupytext', 'nbclient', 'nbconvert'):
    try:
      importlib.import_module(package)
    except ImportError as error:
      raise UserError(
        f"notebook {name}: needs {package}: pip install 'outplay[notebooks]'"
      ) from error
  import jupytext

  return jupytext.read(folder / f'{name}.py')


def set_parameters(notebook: Any, assignments: Sequence[str]) -> None:
  """Replaces values in the notebook's cell of parameters, in place.

  Assignments are `NAME=literal`, a string without its quotation marks.

  Raises:
    UserError: unknown parameter, or a value of another type than its own.
  """
  cells = [c for c in notebook.cells if 'parameters' in _tags(c)]
  if not assignments:
    return
  if len(cells) != 1:
    raise UserError(f'{len(cells)} cells are tagged parameters: must be one')
  for assignment in assignments:
    cells[0].source = _assign(cells[0].source, assignment)


def _tags(cell: Any) -> Sequence[str]:
  return cell.metadata.get('tags', ())


def _assign(source: str, assignment: str) -> str:
  name, equals, text = (part.strip() for part in assignment.partition('='))
  if not (name and equals):
    raise UserError(f'--set={assignment}: should be PARAMETER=value')
  found = {
    node.targets[0].id: node.value
    for node in ast.parse(source).body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
  }
  if name not in found:
    raise UserError(
      f'--set={assignment}: unknown parameter; must be one of '
      f'{", ".join(found)}'
    )
  values: dict[str, Any] = {}
  exec(source, values)
  now, node = values[name], found[name]
  try:
    value = text if isinstance(now, str) else ast.literal_eval(text)
    if isinstance(now, float) and type(value) is int:
      value = float(value)
  except (ValueError, SyntaxError):
    value = None
  if type(value) is not type(now):
    raise UserError(
      f'--set={assignment}: {name} is {now!r}, must be of type '
      f'{type(now).__name__}'
    )
  # Their columns count bytes.
  lines = source.encode().splitlines(keepends=True)
  first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
  tail = lines[last][node.end_col_offset :]
  lines[first : last + 1] = [
    lines[first][: node.col_offset] + repr(value).encode() + tail
  ]
  return b''.join(lines).decode()


def code(
  name: str,
  assignments: Sequence[str] = (),
  folder: pathlib.Path = FOLDER,
) -> list[str]:
  """The code cells of a notebook with its parameters set, in order.

  Raises:
    UserError: see `read` and `set_parameters`.
  """
  notebook = read(name, folder)
  set_parameters(notebook, assignments)
  return [cell.source for cell in notebook.cells if cell.cell_type == 'code']


def execute(
  name: str,
  assignments: Sequence[str] = (),
  folder: pathlib.Path = FOLDER,
) -> Result:
  """Runs a notebook in a kernel of its own, at the root of the repository.

  Prints each cell's first line as it begins.

  Raises:
    UserError: see `read` and `set_parameters`; or the file and line at which a
      cell raised.
  """
  notebook = read(name, folder)
  import nbclient
  from nbclient.exceptions import CellExecutionError, DeadKernelError

  set_parameters(notebook, assignments)
  total = sum(cell.cell_type == 'code' for cell in notebook.cells)
  running: list[Any] = []

  def begin(cell, **_):
    if cell.cell_type == 'code':
      running.append(cell)
      first = cell.source.partition('\n')[0]
      print(f'{name}: cell {len(running)} of {total}: {first}', flush=True)

  client = nbclient.NotebookClient(
    notebook,
    timeout=None,
    coalesce_streams=True,
    kernel_name='python3',
    extra_arguments=['--InteractiveShell.ast_node_interactivity=none'],
    resources={'metadata': {'path': str(ROOT)}},
    on_cell_start=begin,
  )
  # Not by TCP, which any user of the machine could connect to.
  client.create_kernel_manager().transport = 'ipc'
  try:
    client.execute(env=_environment())
  except CellExecutionError as error:
    cell, path = running[-1], folder / f'{name}.py'
    print(_marked(cell.source, _line(cell)), file=sys.stderr)
    place = f'{path.name}:{_offset(path, cell.source) + _line(cell)}'
    lines = (error.evalue or 'no message').strip().splitlines()
    raise UserError(
      f'notebook {name}, cell {len(running)} ({place}): {error.ename}: '
      f'{lines[0]}; nothing was written'
    ) from error
  except DeadKernelError as error:
    raise UserError(
      f'notebook {name}, cell {len(running)}: its process died (out of '
      'memory?); nothing was written'
    ) from error
  return _as_markdown(notebook, name, assignments)


def _environment() -> dict[str, str]:
  """The same compilation cache as `devices.use_compilation_cache`."""
  cache = pathlib.Path.home() / '.cache' / 'outplay' / 'jax'
  return {
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    **os.environ,
    # Importing envpool sets another one, which shows nothing in a notebook.
    'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
  }


def _line(cell: Any) -> int:
  """The line of a cell's source, from 1, in which it raised."""
  traceback = '\n'.join(
    line
    for output in cell.outputs
    if output.output_type == 'error'
    for line in output.traceback
  )
  plain = re.sub(r'\x1b\[[0-9;]*m', '', traceback)
  found = re.search(r'Cell In\[\d+\], line (\d+)', plain)
  return int(found[1]) if found else 1


def _offset(path: pathlib.Path, source: str) -> int:
  """Lines of a percent file before a cell's first one; 0 if it is changed."""
  text = path.read_text(encoding='utf-8')
  return text[: max(text.find(source), 0)].count('\n')


def _marked(source: str, line: int) -> str:
  return '\n'.join(
    f'{">" if number == line else " "} {text}'
    for number, text in enumerate(source.splitlines(), 1)
  )


def _as_markdown(
  notebook: Any, name: str, assignments: Sequence[str]
) -> Result:
  from nbconvert import MarkdownExporter

  for cell in notebook.cells:
    if cell.cell_type == 'code':
      # Progress and logs, not results.
      cell.outputs = [x for x in cell.outputs if x.get('name') != 'stderr']
  exporter = MarkdownExporter(raw_template=_TEMPLATE)
  text, resources = exporter.from_notebook_node(
    notebook,
    {'unique_key': name, 'output_files_dir': f'{name}_files'},
  )
  sets = ''.join(f' --set={assignment}' for assignment in assignments)
  note = (
    f'*`experiments/notebooks/{name}.py`, as executed by `python -m '
    f'experiments.notebook {name}{sets}`.*'
  )
  title, _, body = text.strip().partition('\n')
  # Blank lines between blocks, not those in them.
  parts = re.split(r'(^```\w+\n.*?\n```$)', body, flags=re.M | re.S)
  parts[::2] = [re.sub(r'\n{3,}', '\n\n', part) for part in parts[::2]]
  body = ''.join(parts)
  figures = {path: _small(png) for path, png in resources['outputs'].items()}
  return Result(f'{title}\n\n{note}\n{body}\n', figures)


def _small(png: bytes) -> bytes:
  """A figure in 256 colours, a third of its size."""
  from PIL import Image

  out = io.BytesIO()
  Image.open(io.BytesIO(png)).convert('RGB').quantize(256).save(
    out, 'PNG', optimize=True
  )
  return out.getvalue()


def write(name: str, result: Result, out: pathlib.Path) -> pathlib.Path:
  """Writes a notebook's Markdown and figures, and removes older figures.

  Returns:
    The path of the Markdown.
  """
  figures = out / f'{name}_files'
  figures.mkdir(parents=True, exist_ok=True)
  for relative, content in result.figures.items():
    writing.write_bytes(out / relative, content)
  path = out / f'{name}.md'
  writing.write_text(path, result.markdown)
  for file in figures.iterdir():
    if file.relative_to(out).as_posix() not in result.figures:
      file.unlink()
  return path


def written_code(markdown: str) -> list[str]:
  """The Python of a notebook's Markdown, cell after cell."""
  return re.findall(r'^```python\n(.*?)\n```$', markdown, re.M | re.S)


def check(
  name: str, out: pathlib.Path = DOCS, folder: pathlib.Path = FOLDER
) -> None:
  """Compares the written Markdown's code with the notebook's.

  Raises:
    UserError: it is of another version of the notebook, or there is none.
  """
  path, again = out / f'{name}.md', f'python -m experiments.notebook {name}'
  if not path.exists():
    raise UserError(f'{path}: there is none; {again} writes it')
  if written_code(path.read_text(encoding='utf-8')) != code(name, (), folder):
    raise UserError(
      f'{path}: its code is not that of {name}.py; {again} writes it again'
    )
