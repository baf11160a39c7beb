"""What docstrings say of arrays, read by the tests of docstrings.

The convention that is read:

* An array is documented by its dtype and its shape in backquotes, float32
  `[B, A]`, or by the word `scalar`. One without a dtype has that of the floats
  that go in.
* A function with a section `Args` says the shape of each array there. In one
  without it the shapes of the prose are those of the array arguments, in
  order, and then those of the results.
* Results are in the section `Returns`; without it, they are the last shapes
  of the first paragraph. A `NamedTuple` says them among its attributes.
* A pytree without a dtype has any.
* Letters are axes; `2N`, `N A`, `K + 1` are what they are in algebra, and
  `...` is the same axes everywhere in a docstring.

Nothing here imports JAX.
"""

import ast
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ('agents', 'networks', 'search', 'experiments')
DTYPES = ('float', 'float32', 'float64', 'int', 'int32', 'int64', 'uint32')
DTYPES += ('uint8', 'uint16', 'int8', 'bool')

_SECTION = re.compile(r'(Args|Returns|Raises|Attributes|Yields):$')
_ENTRY = re.compile(r'  (\*{0,2}\w+(?:, \*{0,2}\w+)*): *(.*)')
_SPAN = re.compile(r'(?P<before>\w*)(?P<gap>[\s(]*)`(?P<code>[^`]+)`')
_WORD = re.compile(rf'\b({"|".join(DTYPES)})\b', re.IGNORECASE)
_SCALAR = re.compile(rf'\b({"|".join(DTYPES)}) scalars?\b', re.IGNORECASE)
# Said of an array whose shape is no list of axes.
_LIKE = re.compile(r"any shape|same shape|shape of|\w's shape|shape that")
_ARRAY = re.compile(r'\b(Array|ArrayTree|ndarray)\b')


class Shape(NamedTuple):
  """A documented array.

  Attributes:
    axes: such as `('B', 'K + 1', '...')`.
    dtypes: of `DTYPES`, any of which it may have; () where none is said, and
      `('any',)` for a pytree.
  """

  axes: tuple[str, ...]
  dtypes: tuple[str, ...] = ()


class Docstring(NamedTuple):
  """A docstring in parts.

  Attributes:
    prose: what belongs to no section, paragraphs.
    sections: text by name; of `Args`, `Attributes` and `Raises` the text of
      each entry by its name.
  """

  prose: tuple[str, ...]
  sections: dict


class Documented(NamedTuple):
  """A public module, class or function, as it stands in a file.

  Attributes:
    name: with its module's, `search.exact.bellman.newton`.
    node: of the syntax tree.
    doc: its docstring; '' without.
    around: docstrings of its class and its module.
    module: the syntax tree of its module.
  """

  name: str
  node: Any
  doc: str
  around: str
  module: ast.Module


def parse(doc: str) -> Docstring:
  """A docstring in parts; see `Docstring`."""
  prose, sections = [[]], {}
  lines = inspect.cleandoc(doc).splitlines()
  section = entry = None
  for line in lines:
    heading = _SECTION.match(line)
    if heading:
      section, entry = heading[1], None
      has_entries = section in ('Args', 'Attributes', 'Raises')
      sections[section] = {} if has_entries else ''
    elif line and not line.startswith(' '):
      if section:
        prose.append([])
      section = None
      prose[-1].append(line)
    elif section is None:
      if line:
        prose[-1].append(line)
      else:
        prose.append([])
    elif isinstance(sections[section], str):
      sections[section] += ' ' + line.strip()
    else:
      begins = _ENTRY.match(line)
      if begins:
        entry = [name.strip(' *') for name in begins[1].split(',')]
        sections[section] |= dict.fromkeys(entry, begins[2])
      elif entry:
        for name in entry:
          sections[section][name] += ' ' + line.strip()
  return Docstring(tuple(' '.join(x) for x in prose if x), sections)


def shapes(text: str) -> list[Shape]:
  """The arrays that a text documents, in order.

  Intervals such as `[0, 1]` and signatures are none.
  """
  found, end = [], 0
  pieces = []
  for match in _SPAN.finditer(text):
    code = match['code'].strip()
    both = [_axes(x.strip()) for x in code.split('->')]
    if len(both) > 1 and None not in both:
      pieces += [
        (match.start('code'), match.end(), axes, None) for axes in both
      ]
      continue
    dtype, _, rest = code.partition(' ')
    if dtype in DTYPES and rest.startswith('['):
      code = rest
    else:
      dtype = None
    if match['before'] in ('in', 'within', 'into'):
      continue
    axes = _axes(code)
    if axes is not None:
      pieces.append((match.start('code'), match.end(), axes, dtype))
  for match in _SCALAR.finditer(text):
    pieces.append((match.end(1), match.end(), (), None))
  for start, stop, axes, dtype in sorted(pieces, key=lambda x: x[:2]):
    dtypes = (dtype,)
    if dtype is None:
      words = _WORD.findall(text[end:start])
      dtypes = tuple(word.lower() for word in words)
      if not dtypes and 'pytree' in text[end:start]:
        dtypes = ('any',)
    found.append(Shape(axes, dtypes))
    end = stop
  return found


def _axes(code: str) -> tuple[str, ...] | None:
  """Axes of `[...]`; None where it is something else."""
  if not (code.startswith('[') and code.endswith(']')):
    return None
  inside = code[1:-1].strip()
  if not inside:
    return ()
  axes = tuple(x.strip() for x in inside.split(','))
  for axis in axes:
    fine = re.fullmatch(
      r'\.\.\.|\*?[A-Za-z_][\w .+*/()-]*|[1-9][\w +*/()]*', axis
    )
    if not fine:
      return None
  return axes


def says_shape(text: str) -> bool:
  """Whether a text documents an array, at least by another's shape."""
  return bool(shapes(text) or _LIKE.search(text))


def modules() -> Iterator[tuple[str, ast.Module]]:
  """All modules of ours, by name."""
  for room in ROOMS:
    for path in sorted((ROOT / room).rglob('*.py')):
      parts = path.relative_to(ROOT).with_suffix('').parts
      if 'notebooks' in parts or path.name == '__init__.py':
        continue
      yield '.'.join(parts), ast.parse(path.read_text())


def public() -> Iterator[Documented]:
  """All that is public: modules, their classes and functions, methods."""
  for name, tree in modules():
    about = ast.get_docstring(tree) or ''
    yield Documented(name, tree, about, '', tree)
    yield from _members(name, tree, about, tree)


def _members(name, parent, around, module) -> Iterator[Documented]:
  for node in parent.body:
    kinds = (ast.FunctionDef, ast.ClassDef)
    if not isinstance(node, kinds) or node.name.startswith('_'):
      continue
    doc = ast.get_docstring(node) or ''
    own = f'{name}.{node.name}'
    yield Documented(own, node, doc, around, module)
    if isinstance(node, ast.ClassDef):
      yield from _members(own, node, f'{around}\n{doc}', module)


def is_array(annotation: ast.AST | None) -> bool:
  """Whether an annotation names an array, other than a function's."""
  if annotation is None:
    return False
  text = ast.unparse(_WithoutCallables().visit(_copy(annotation)))
  return bool(_ARRAY.search(text))


def _copy(annotation: ast.AST) -> ast.AST:
  return ast.parse(ast.unparse(annotation), mode='eval').body


class _WithoutCallables(ast.NodeTransformer):
  def visit_Subscript(self, node):
    if ast.unparse(node.value).endswith('Callable'):
      return ast.Name('Callable')
    return self.generic_visit(node)


def arrays(node: ast.FunctionDef) -> list[str]:
  """Arguments that are arrays by their annotation, keys excepted."""
  given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
  is_key = re.compile(r'(.*_)?keys?')
  return [
    x.arg
    for x in given
    if is_array(x.annotation) and not is_key.fullmatch(x.arg)
  ]


def undocumented_arrays(doc: str, node: ast.FunctionDef) -> list[str]:
  """Which arrays that go in or come out have no documented shape."""
  parts, names = parse(doc), arrays(node)
  args = parts.sections.get('Args')
  results = is_array(node.returns) and not _is_key(node)
  returns = parts.sections.get('Returns', parts.sections.get('Yields'))
  missing = []
  if args is None:
    said = ' '.join(parts.prose)
    number = len(shapes(said)) + len(_LIKE.findall(said))
    needed = len(names) + (results and returns is None)
    if number < needed:
      missing += [*names, 'its result'][: max(needed, 1)]
  else:
    missing += [x for x in names if not says_shape(args.get(x, ''))]
    if results and returns is None and not says_shape(parts.prose[0]):
      missing.append('its result')
  if results and returns is not None and not says_shape(returns):
    missing.append('its result')
  return missing


def _is_key(node: ast.FunctionDef) -> bool:
  return bool(re.search(r'key$|^key', node.name))


def raised(node: ast.FunctionDef, module: ast.Module) -> set[str]:
  """Names of exceptions that a function raises, or a helper that it calls.

  Helpers are private functions of the same module, called directly. Those that
  nobody can provoke are left out: an `AssertionError` of what cannot be
  reached, a `NotImplementedError` of what a contract forbids to call.
  """
  helpers = {
    x.name: x
    for x in module.body
    if isinstance(x, ast.FunctionDef) and x.name.startswith('_')
  }
  found = _raises(node)
  for call in ast.walk(node):
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
      helper = helpers.get(call.func.id)
      if helper is not None:
        found |= _raises(helper)
  # `raise _unknown(name)`: what the helper returns.
  made = {name for name in found if name in helpers}
  returns = [helpers[x].returns for x in made]
  found |= {ast.unparse(x).split('.')[-1] for x in returns if x}
  return found - made - {'AssertionError', 'NotImplementedError'}


def undocumented_errors(doc: str, errors: set[str]) -> list[str]:
  """Which of the errors the section `Raises` does not name."""
  named = set(parse(doc).sections.get('Raises', ()))
  if 'ValueError' in named:
    named.add('UserError')  # Which is one.
  return sorted(errors - named)


def _raises(node: ast.AST) -> set[str]:
  found = set()
  for x in ast.walk(node):
    if isinstance(x, ast.Raise) and x.exc is not None:
      kind = x.exc.func if isinstance(x.exc, ast.Call) else x.exc
      found.add(ast.unparse(kind).split('.')[-1])
  return found
