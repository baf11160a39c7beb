"""Calls of functions with what their docstrings say, without computing.

Arrays of the documented shapes go in, and `jax.eval_shape` says what comes
out, which is compared with what is documented. See `tests/docstrings.py` for
what is read.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import docstrings
import jax
import jax.numpy as jnp
import numpy as np
from docstrings import Documented, Shape

# Sizes of axes. Letters of one docstring differ, and none is 1.
SIZES = dict(zip('KBATDFNSEMCPRHVOWJIQXYUZL', range(2, 27)))
SIZES |= {'E': 24, 'G': 8, 'L': 40, 'N': 10, 'S': 9, 'U': 26}
SIZES |= dict(zip('nhlmcdbtpwr', range(27, 38)))
# `a int32 [B, K]` of a signature, of which each part may be missing.
_DTYPE = '|'.join(docstrings.DTYPES)
_NAMED = re.compile(
  rf'(?:(?!(?:{_DTYPE})\b)([\w.]+)\s*)?(?:({_DTYPE})\s*)?'
  r'(\[[^\]]*\])?(?: or .*)?'
)
# What `...` stands for.
REST = (38, 39)


class Wrong(AssertionError):
  """A docstring says something else than the function does."""


class Unbuildable(Exception):
  """A docstring does not say how to call the function."""


class Sizes:
  """Numbers for the axes of one docstring.

  Attributes:
    known: by name.
    rest: what `...` stands for.
  """

  def __init__(self, known: Mapping[str, Any], rest: tuple[int, ...]):
    self.known: dict[str, Any] = SIZES | dict(known)
    self.rest = rest

  def shape(self, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The shape that documented axes stand for."""
    found: list = []
    for axis in axes:
      if axis == '...':
        found += self.rest
      elif axis.startswith('*'):
        found += self.known.get(axis[1:], self.rest)
      else:
        found.append(self.number(axis))
    return tuple(found)

  def number(self, axis: str) -> int:
    """`K + 1`, `2N`, `N A`, `E/G`: what these are in algebra."""
    tokens = re.findall(r'\d+|[A-Za-z_]\w*|[-+*/()]', axis)
    text, before = '', None
    for token in tokens:
      is_operand = token not in '-+*/)'
      if before is not None and before not in '-+*/(' and is_operand:
        text += '*'
      text += '//' if token == '/' else token
      before = token
    numbers = {k: v for k, v in self.known.items() if isinstance(v, int)}
    for name in re.findall(r'[A-Za-z_]\w*', text):
      # A word that nobody has bound is an axis of its own.
      numbers.setdefault(name, 41 + len(numbers))
      self.known.setdefault(name, numbers[name])
    return eval(text, {'__builtins__': {}}, numbers)


def struct(sizes: Sizes, shape: Shape) -> jax.ShapeDtypeStruct:
  """An array as documented; floats are float32."""
  said = shape.dtypes[0] if shape.dtypes else 'float'
  any_kind = sizes.known.get('any', 'float32')
  same = {'float': 'float32', 'any': any_kind, 'int': 'int32'}
  dtype = same.get(said, said)
  return jax.ShapeDtypeStruct(sizes.shape(shape.axes), dtype)


def key() -> jax.ShapeDtypeStruct:
  """A typed key."""
  return jax.eval_shape(lambda: jax.random.key(0))


def fields(kind: Any) -> dict[str, str]:
  """What a `NamedTuple`'s docstring says of its fields."""
  return docstrings.parse(kind.__doc__ or '').sections.get('Attributes', {})


def is_named_tuple(kind: Any) -> bool:
  return inspect.isclass(kind) and hasattr(kind, '_fields')


def build(sizes: Sizes, kind: Any) -> Any:
  """A `NamedTuple` of arrays as its attributes are documented.

  Raises:
    Unbuildable: a field without a default is neither documented as an array
      nor of such a type.
  """
  said, found = fields(kind), {}
  for name in kind._fields:
    shapes = docstrings.shapes(said.get(name, ''))
    hint = kind.__annotations__.get(name)
    if is_named_tuple(hint):
      found[name] = build(sizes, hint)
    elif shapes:
      found[name] = struct(sizes, shapes[0])
    elif name not in kind._field_defaults:
      raise Unbuildable(f'{kind.__name__}.{name}')
  return kind(**found)


def from_text(sizes: Sizes, tree: Any) -> Any:
  """A tree whose texts, such as `int32 [B]`, and `NamedTuple`s are built."""

  def one(leaf):
    if is_named_tuple(leaf):
      return build(sizes, leaf)
    said = docstrings.shapes(f'`{leaf}`') if isinstance(leaf, str) else ()
    return struct(sizes, said[0]) if said else leaf

  return jax.tree.map(one, tree)


def load(name: str) -> Any:
  """An object by its dotted name."""
  parts = name.split('.')
  for count in range(len(parts) - 1, 0, -1):
    try:
      found = importlib.import_module('.'.join(parts[:count]))
    except ModuleNotFoundError:
      continue
    for part in parts[count:]:
      found = getattr(found, part)
    return found
  raise ModuleNotFoundError(name)


def arguments(
  what: Documented, function: Callable, given: Mapping[str, Any], sizes: Sizes
) -> tuple[dict[str, Any], list[Shape]]:
  """Arguments for a call, and the shapes of the prose that are left over.

  Args:
    what: the function's docstring.
    function: itself.
    given: arguments that a docstring cannot say, by name.
    sizes: of axes; numbers that the docstring names by a letter are taken from
      it.

  Raises:
    Unbuildable: a required argument is neither given nor documented.
  """
  parts = docstrings.parse(what.doc)
  args = parts.sections.get('Args')
  prose = docstrings.shapes(' '.join(parts.prose)) if args is None else []
  of_arrays = docstrings.arrays(what.node)
  made = {}
  for name, parameter in inspect.signature(function).parameters.items():
    text = (args or {}).get(name, '')
    found = docstrings.shapes(text)
    hint, default = parameter.annotation, parameter.default
    symbol = re.match(r'`?([A-Za-z])`?(?=[.,;]|$)', text)
    is_open = name in of_arrays or hint in (Any, parameter.empty)
    if name in given:
      made[name] = from_text(sizes, given[name])
    elif re.fullmatch(r'(.*_)?key', name):
      made[name] = key()
    elif is_named_tuple(hint):
      rest = sizes.shape(found[0].axes)[:-1] if found else sizes.rest
      made[name] = build(Sizes(sizes.known, rest), hint)
    elif found and hint is not int:
      made[name] = struct(sizes, found[0])
    elif args is None and prose and is_open:
      made[name] = struct(sizes, prose.pop(0))
    elif hint is int and symbol:
      made[name] = sizes.known[symbol[1]]
    elif (
      default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD
    ):
      continue
    elif hint is float or ('bool' in str(hint) and 'int' in str(hint)):
      made[name] = 0.5  # `float` and `chex.Numeric`.
    else:
      raise Unbuildable(f'{what.name}: {name}')
    if isinstance(made[name], int):
      sizes.known.setdefault(name, made[name])
  return made, prose


def call(
  what: Documented, function: Callable, given: Mapping[str, Any], rest=REST
) -> None:
  """Calls a function as documented and compares what comes out.

  Args:
    what: its docstring.
    function: itself.
    given: arguments and sizes of axes by name, where the docstring does not
      say them.
    rest: what `...` stands for.

  Raises:
    Unbuildable: a required argument is neither given nor documented, or no
      result is.
    Wrong: the results are not the documented ones, or the call fails.
  """
  sizes = Sizes({}, rest)
  # `S = 3n` among the axes of the module.
  axes = re.search(r'^Axes\b.*?(?:\n\n|\Z)', what.around, re.M | re.S)
  for name, number in re.findall(r'`(\w) = ([^`]+)`', axes[0] if axes else ''):
    sizes.known[name] = sizes.number(number)
  sizes.known |= given
  made, prose = arguments(what, function, given, sizes)
  is_traced = lambda x: all(
    isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x)
  )
  traced = {k: v for k, v in made.items() if is_traced(v)}
  static = {k: v for k, v in made.items() if not is_traced(v)}
  try:
    result = jax.eval_shape(
      lambda traced: _arrays_only(function(**traced, **static)), traced
    )
  except (TypeError, ValueError, AssertionError, IndexError) as error:
    raise Wrong(f'{what.name}: called as documented: {error}') from error
  parts = docstrings.parse(what.doc)
  returns = parts.sections.get('Returns')
  if returns is not None:
    said = docstrings.shapes(returns)
  elif 'Args' in parts.sections:
    said = docstrings.shapes(parts.prose[0])
    number = 1
    if isinstance(result, tuple) and not hasattr(result, '_fields'):
      number = len(result)
    said = said[-number:]
  else:
    said = prose
  checked = compare(what.name, result, said, sizes)
  if not checked:
    raise Unbuildable(f'{what.name}: no documented result')


def _arrays_only(tree: Any) -> Any:
  """The tree with None in the place of what is no array, such as functions."""
  arrays = jax.Array | np.ndarray | np.generic | int | float | bool
  return jax.tree.map(lambda x: x if isinstance(x, arrays) else None, tree)


def compare(
  name: str, result: Any, said: list[Shape], sizes: Sizes, rest: bool = True
) -> int:
  """Compares what came out with what is documented.

  Args:
    name: for messages.
    result: tree of `ShapeDtypeStruct`.
    said: the documented arrays, in order; not read for a `NamedTuple`, which
      documents itself.
    sizes: of axes.
    rest: whether `...` stands for `sizes.rest`; else for any axes.

  Returns:
    How many arrays were compared.

  Raises:
    Wrong: they differ.
  """
  if hasattr(result, '_fields'):
    # `[K, ...]` of a nested one: its fields have K in front.
    before = said[0].axes[:-1] if said and said[0].axes[-1:] == ('...',) else ()
    about, count = fields(type(result)), 0
    for field in result._fields:
      value = getattr(result, field)
      own = docstrings.shapes(about.get(field, ''))[:1]
      own = [x._replace(axes=(*before, *x.axes)) for x in own]
      if value is not None and (own or hasattr(value, '_fields')):
        count += compare(f'{name}: {field}', value, own, sizes, False)
    return count
  if isinstance(result, tuple):
    own, count = list(said), 0
    for i, value in enumerate(result):
      if hasattr(value, '_fields'):
        count += compare(f'{name}[{i}]', value, [], sizes, rest)
      elif own:
        count += compare(f'{name}[{i}]', value, [own.pop(0)], sizes, rest)
    return count
  if not said:
    return 0
  leaves, one = jax.tree.leaves(result), said[0]
  if hasattr(result, '__dataclass_fields__'):
    # One of mctx's: these axes come first in all its arrays.
    one, rest = one._replace(axes=(*one.axes, '...')), False
  for leaf in leaves:
    _compare_one(name, leaf, one, sizes, rest)
  return len(leaves)


def _compare_one(name, leaf, said, sizes, rest):
  own = sizes
  if not rest and '...' in said.axes:
    fixed = len(said.axes) - 1
    place = said.axes.index('...')
    own = Sizes(sizes.known, leaf.shape[place : leaf.ndim - fixed + place])
  wanted = own.shape(said.axes)
  if leaf.shape != wanted:
    raise Wrong(
      f'{name}: documented as [{", ".join(said.axes)}] = {wanted}, is '
      f'{leaf.shape}'
    )
  kinds = {'float': jnp.floating, 'int': jnp.integer, 'any': np.generic}
  dtypes = said.dtypes or ('float',)
  if not any(
    jnp.issubdtype(leaf.dtype, kinds.get(dtype) or jnp.dtype(dtype))
    for dtype in dtypes
  ):
    raise Wrong(f'{name}: documented as {" or ".join(dtypes)}, is {leaf.dtype}')


class Signature(NamedTuple):
  """What a text says of a function that is a field or a result.

  Attributes:
    inputs: names, and shapes or None.
    outputs: the same.
  """

  inputs: list[tuple[str, Shape | None]]
  outputs: list[tuple[str, Shape | None]]


def signature(text: str, name: str = '') -> Signature | None:
  """The first `(a [B], b) -> c [B, A]` in backquotes; None without one.

  Args:
    text: of a docstring.
    name: in front of it, if it has any.
  """
  for code in re.findall(r'`([^`]+)`', text):
    match = re.match(rf'(?:{name})?\((.*?)\) -> (.+)$', code)
    if match and match[1].count('(') == match[1].count(')'):
      outputs = match[2].strip()
      if outputs.startswith('('):
        outputs = outputs.strip('()')
      return Signature(_named(match[1]), _named(outputs))
  return None


def _named(text: str) -> list[tuple[str, Shape | None]]:
  """`a int32 [B, K], b` as names and shapes."""
  found = []
  for part in re.split(r',\s*(?![^\[]*\])', text):
    match = _NAMED.fullmatch(part.strip())
    name, dtype, axes = match.groups() if match else (part, None, None)
    shape = None
    if axes:
      (shape,) = docstrings.shapes(f'`{axes}`')
      shape = shape._replace(dtypes=(dtype or 'any',))
    found.append((name or '', shape))
  return found


def _compare_same(name, value, wanted) -> int:
  about = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  if about(value) != about(wanted):
    raise Wrong(f'{name}: is {about(value)}, went in as {about(wanted)}')
  return len(jax.tree.leaves(value))


def call_signature(
  name: str, function: Callable, text: str, given: Mapping[str, Any], rest=REST
) -> int:
  """Calls a function as a signature in a text says; see `call`.

  Args:
    name: for messages.
    function: to call.
    text: has a signature; an array in it without a dtype may have any.
    given: its arguments without a shape, by name, and sizes of axes.
    rest: what `...` stands for.

  Returns:
    How many arrays were compared.

  Raises:
    Unbuildable: the text has no signature, or an argument is unknown.
    Wrong: the results are not the documented ones, or the call fails.
  """
  found = signature(text, name.split('.')[-1])
  if found is None:
    raise Unbuildable(f'{name}: no signature')
  sizes, made = Sizes(given, rest), []
  for argument, shape in found.inputs:
    if argument in given:
      made.append(from_text(sizes, given[argument]))
    elif argument == 'key':
      made.append(key())
    elif shape is not None:
      made.append(struct(sizes, shape))
    else:
      raise Unbuildable(f'{name}: {argument}')
  is_struct = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  traced = [
    x if all(map(is_struct, jax.tree.leaves(x))) else None for x in made
  ]

  def run(traced):
    return _arrays_only(
      function(*(y if x is None else x for x, y in zip(traced, made)))
    )

  try:
    result = jax.eval_shape(run, traced)
  except (TypeError, ValueError, AssertionError, IndexError) as error:
    raise Wrong(f'{name}: called as documented: {error}') from error
  values = result if len(found.outputs) > 1 else (result,)
  if len(values) != len(found.outputs):
    raise Wrong(f'{name}: {len(values)} results, documented {found.outputs}')
  count = 0
  for value, (output, shape) in zip(values, found.outputs):
    said = [] if shape is None else [shape]
    if shape is None and output in given:
      if given[output] is not None:
        wanted = from_text(sizes, given[output])
        count += _compare_same(name, value, wanted)
    elif said or hasattr(value, '_fields'):
      count += compare(name, value, said, sizes)
  return count
