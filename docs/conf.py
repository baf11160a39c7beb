"""How Sphinx builds the documentation: `make docs`."""

import os
import pathlib
import re
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

project = 'Outplay'
author = 'the authors of Outplay'
extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.napoleon',
  'sphinx_copybutton',
]
exclude_patterns = ['_templates']
templates_path = ['_templates']
html_theme = 'furo'
html_title = project
html_show_sphinx = False
html_copy_source = False
default_role = 'code'
myst_heading_anchors = 3
# Notebooks write formulas in dollars.
myst_enable_extensions = ['dollarmath']

# What a page says of a function must exist: a reference that finds nothing is
# a warning. Names of exceptions and of fields are text.
nitpicky = True
nitpick_ignore_regex = [
  ('py:exc', '.*'),
  ('py:obj', '.*'),
  ('py:class', r'(jax|jaxlib|numpy)\..*'),
]
# Notebooks are written by `python -m experiments.notebook`, one by one.
suppress_warnings = ['toc.empty_glob']

autosummary_generate = True
autodoc_default_options = {'members': True, 'member-order': 'bysource'}
# Docstrings give shapes and units, which annotations do not.
autodoc_typehints = 'none'
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

# Pages of the reference: title, and where their modules lie.
_REFERENCE = {
  'agents': ('Agents, a file each', 'agents/*.py'),
  'core': ('What agents share', 'agents/core/*.py'),
  'networks': ('Networks', 'networks/*.py'),
  'search': ('Search', 'search/*.py'),
  'exact': ('What has closed forms', 'search/exact/*.py'),
  'commands': ('Commands', 'experiments/*.py'),
  'studies': ('Studies', 'experiments/studies/*.py'),
  'sweeps': ('Many runs', 'experiments/sweeps/*.py'),
  'training': ('One run', 'experiments/training/*.py'),
  'playing': ('Players and their opponents', 'experiments/playing/*.py'),
  'benchmarks': ('What it costs', 'experiments/benchmarks/*.py'),
  'build': ('From names to objects', 'experiments/build/*.py'),
  'presets': ('What is run, as a table', 'experiments/presets/*.py'),
  'report': ('Tables and figures', 'experiments/report/*.py'),
  'environments': ('Environments', 'experiments/envs/*.py'),
  'runtime': ('Loop, devices, threads, clocks', 'experiments/runtime/*.py'),
  'files': ('Reading and writing', 'experiments/files/*.py'),
  'data': ('Data sets and texts', 'experiments/data/*.py'),
}
_SECTION = re.compile(r'(Args|Attributes|Raises|Returns|Yields):$')
_ARGS = re.compile(r'(Args\b.*):$')
_NAMES = re.compile(r'  \w+(?:, \w+)+:')
_CODE = re.compile(r'(`[^`]+`)')


def _modules(pattern):
  """Names of the public modules of a page."""
  for path in sorted(_ROOT.glob(pattern)):
    if path.stem[0] != '_':
      yield '.'.join(path.relative_to(_ROOT).with_suffix('').parts)


def write_reference():
  """Writes the lists of modules, so that a new one is never forgotten."""
  for page, (title, pattern) in _REFERENCE.items():
    rows = ''.join(f'   {name}\n' for name in _modules(pattern))
    text = (
      f'# {title}\n\n```{{eval-rst}}\n.. autosummary::\n'
      f'   :toctree: generated\n\n{rows}```\n'
    )
    path = _ROOT / 'docs' / 'reference' / f'{page}.md'
    if not path.exists() or path.read_text() != text:
      path.write_text(text)


def _inline(paragraph):
  """Text with `code`, escaped where reStructuredText would read more."""
  pieces = _CODE.split(paragraph)
  for number, piece in enumerate(pieces):
    if number % 2:
      before = pieces[number - 1][-1:]
      after = pieces[number + 1][:1]
      # Where a letter touches the code, an escaped space parts them.
      pieces[number] = (
        ('' if not before or before in ' \n\'"([{<-/:' else '\\ ')
        + f'`{piece}`'
        + ('' if not after or after in ' \n\'")]}>-/\\:.,;!?' else '\\ ')
      )
    else:
      piece = re.sub(r'[\\|*`]', r'\\\g<0>', piece)
      piece = re.sub(r'(?<=\w)_(?!\w)', r'\_', piece)
      pieces[number] = re.sub(r'(^|\n)( *)\\\* ', r'\1\2* ', piece)
  return ''.join(pieces)


def _blocks(lines):
  """Runs of lines between blank ones."""
  block = []
  for line in [*lines, '']:
    if line.strip():
      block.append(line)
    elif block:
      yield block
      block = []


def _returns(block):
  """The section `Returns` as a field, so that no colon in it is a type's."""
  body = [line.strip() for line in block[1:]]
  return [':returns: ' + body[0]] + ['  ' + line for line in body[1:]]


def as_restructured_text(lines):
  """A docstring of ours, Google's sections and plain text, for Sphinx.

  An indented block that belongs to no section and no bullet is code or an
  equation, and is shown as it is.

  Args:
    lines: of the docstring, without indentation.

  Returns:
    list of lines.
  """
  found = []
  inside = ''
  for block in _blocks(lines):
    first = block[0]
    if first[0] != ' ':
      more = _ARGS.match(first)
      if more and more[1] != 'Args':  # Args, where they are not `puct`'s:
        found += [_inline(first), '']
        block = ['Args:', *block[1:]]
      section = _SECTION.match(block[0])
      bullet = first.startswith(('* ', '- '))
      inside = section[1] if section else 'bullet' if bullet else ''
    if first.startswith('>>>'):
      found += [*block, '']
      continue
    if first[0] == ' ' and not inside:
      if found[-3:-2] != ['::']:
        found += ['::', '']
      found += ['  ' + line for line in block] + ['']
      continue
    if inside == 'Returns' and first[0] != ' ' and len(block) > 1:
      block = _returns(block)
    if inside in ('Args', 'Attributes'):  # Sphinx would split at the space.
      block = [
        _NAMES.sub(lambda m: '  ' + re.sub(' ', '', m[0]), line)
        for line in block
      ]
    found += [*_inline('\n'.join(block)).split('\n'), '']
  return found


def setup(app):
  """Hooks into autodoc, before napoleon reads the sections."""

  def rewrite(app, what, name, obj, options, lines):
    lines[:] = as_restructured_text(lines)

  def skip(app, what, name, obj, skipped, options):
    # A NamedTuple's fields are in its docstring.
    return True if type(obj).__name__ == '_tuplegetter' else None

  write_reference()
  app.connect('autodoc-process-docstring', rewrite, priority=400)
  app.connect('autodoc-skip-member', skip)
