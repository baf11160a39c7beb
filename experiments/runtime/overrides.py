"""Settings by text: `--set=field=value` on frozen dataclasses.

Their `__post_init__` or a `validate` function refuses bad ranges, always on
concrete values.
"""

import contextlib
import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.files.errors import UserError
from experiments.runtime import config as configs


def override(
  sections: Mapping[str, Any],
  assignments: Sequence[str],
  validate: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Applies `field=value` assignments to frozen dataclasses.

  A field that may hold one of several dataclasses, each with a field `name`, is
  set by that name, `router=balanced`; fields that both have keep their values.

  Args:
    sections: instances by the section's name, with dataclasses in them;
      `matching` says how fields are named.
    assignments: the later one wins, but those that choose a dataclass come
      first; those that their dataclass refuses are tried again after the
      others. Values are read by the field's annotation: int (`1e5` too), float,
      bool (true, false), str, `Literal`, `tuple` (`1,2,3`; nothing for an empty
      one), `T | None` (`none`).
    validate: called with the result; raises `ValueError` to refuse it.

  Raises:
    UserError: unknown or ambiguous field, value of a wrong type, or refused by
      the dataclass or `validate`.

  >>> @dataclasses.dataclass(frozen=True)
  ... class Config:
  ...   widths: tuple[int, ...] = (64,)
  ...   steps: int = 100
  >>> override({'agent': Config()}, ['widths=32,32', 'agent.steps=1e5'])
  {'agent': Config(widths=(32, 32), steps=100000)}
  """
  result, left = dict(sections), list(enumerate(assignments))
  left.sort(key=lambda item: not _chooses(sections, item[1]))
  applied: dict[tuple[str, ...], int] = {}
  while left:
    refused: list[tuple[int, str]] = []
    first: ValueError | None = None
    for number, assignment in left:
      name, equals, text = assignment.partition('=')
      name, text = name.strip(), text.strip()
      if not (name and equals):
        raise UserError(f'--set={assignment}: should be field=value')
      where = _find(result, name)
      if applied.get(where, -1) > number:
        continue
      section, *path = where
      try:
        result[section] = _replace(result[section], path, name, text)
        applied[where] = number
      except UserError:
        raise
      except ValueError as error:
        # Fields that only fit together may come in any order.
        refused.append((number, assignment))
        first = first or error
    if len(refused) == len(left):
      raise UserError(f'--set={refused[0][1]}: {first}') from first
    left = refused
  if validate is not None:
    with configs.user_errors():
      validate(result)
  return result


def _replace(config: Any, path: list[str], name: str, text: str) -> Any:
  """The config with the field at `path` read from `text`."""
  field, *rest = path
  annotation = typing.get_type_hints(type(config))[field]
  if rest == ['name'] and typing.get_args(annotation):
    value = _chosen(annotation, getattr(config, field), name, text)
  elif rest:
    value = _replace(getattr(config, field), rest, name, text)
  else:
    try:
      value = _parse(annotation, text)
    except ValueError as error:
      why = str(error) if isinstance(error, _Refused) else ''
      why = why if why[:1] in ('', ';') else f' {why}'
      raise UserError(
        f'{name} is {text!r}, must be {_type_name(annotation)}{why}'
      ) from None
  return dataclasses.replace(config, **{field: value})


def _chosen(annotation: Any, old: Any, name: str, text: str) -> Any:
  """A union's dataclass with this name; shared fields keep their old values."""
  kinds = {kind.name: kind for kind in typing.get_args(annotation)}
  if text not in kinds:
    raise UserError(f'{name} is {text!r}, must be one of {", ".join(kinds)}')
  if type(old) is kinds[text]:
    return old
  shared = {f.name for f in dataclasses.fields(kinds[text])} - {'name'}
  return kinds[text](**{n: getattr(old, n) for n in shared if hasattr(old, n)})


def _chooses(sections: Mapping[str, Any], assignment: str) -> bool:
  """Whether an assignment chooses among dataclasses."""
  known = [p for s, config in sections.items() for p in paths(config, (s,))]
  asked = tuple(assignment.partition('=')[0].strip().split('.'))
  return [p[-1] for p in matching(known, asked)] == ['name']


def matching(
  known: Sequence[tuple[str, ...]], asked: tuple[str, ...]
) -> list[tuple[str, ...]]:
  """Paths of fields that a name may mean; none or several for a bad name.

  The parts of the name, `asked`, are a whole path; else the end of it; else
  some of its parts in order, the last one included: `('network', 'moe', 'k')`
  for `('agent', 'network', 'moe', 'router', 'k')`. A last part `name` may be
  left out.
  """
  if asked in known:
    return [asked]
  if asked == ('name',):  # of whatever is inside, it says too little
    return [p for p in known if p[1:] == asked]
  for name in (asked, (*asked, 'name')):
    ends = [p for p in known if p[-1] == name[-1]]
    whole = [p for p in ends if p[-len(name) :] == name]
    found = whole or [p for p in ends if _in_order(name, p)]
    if found:
      return found
  return []


def _in_order(parts: Sequence[str], path: Sequence[str]) -> bool:
  rest = iter(path)
  return all(part in rest for part in parts)


def paths(config: Any, prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
  """Paths of all fields of a dataclass, nested ones too, after a prefix."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from paths(value, (*prefix, field.name))
    elif field.init:
      yield (*prefix, field.name)


def _find(sections: Mapping[str, Any], name: str) -> tuple[str, ...]:
  """The path that a name on the command line means."""
  known = [p for s, config in sections.items() for p in paths(config, (s,))]
  asked = tuple(name.split('.'))
  found = matching(known, asked)
  if len(found) == 1:
    return found[0]
  if found:
    choices = ' or '.join('.'.join(p) for p in found)
    raise UserError(f'{name} is ambiguous: say {choices}')
  inner = lambda p: p[-1] == 'name' and len(p) > 2
  known = [p[:-1] if inner(p) else p for p in known]
  fields = [p[-1] for p in known]
  names = sorted(
    p[-1] if fields.count(p[-1]) == 1 else '.'.join(p) for p in known
  )
  if others := sorted(set(_with_field(sections.values(), asked[-1]))):
    raise UserError(f'no field {name}: it needs {" or ".join(others)}')
  near = difflib.get_close_matches(asked[-1], sorted(set(fields)), n=3)
  hint = f'did you mean {" or ".join(near)}? ' if near else ''
  raise UserError(f'no field {name}: {hint}fields are {", ".join(names)}')


def _with_field(configs: Iterable[Any], name: str) -> Iterator[str]:
  """Choices of a dataclass, not taken, that have a field of this name."""
  for config in configs:
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
      value = getattr(config, field.name)
      if not dataclasses.is_dataclass(value):
        continue
      yield from _with_field([value], name)
      for kind in typing.get_args(hints[field.name]):
        if any(f.name == name for f in dataclasses.fields(kind)):
          yield f'{field.name}={kind.name}'


# The largest int of a file of settings, and the longest number to read.
_MAX_INT = 2**63 - 1
_LONGEST_NUMBER = 400
_CLOSING = {'(': ')', '[': ']', '{': '}'}


class _Refused(ValueError):
  """A text that is not a value; says what is wrong besides its type."""


def _parse(annotation: Any, text: str) -> Any:
  """Reads a value by its annotation, or raises `ValueError`."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    if type(None) in args and text.lower() == 'none':
      return None
    for arg in args:
      with contextlib.suppress(ValueError):
        if arg is not type(None):
          return _parse(arg, text)
    raise ValueError
  if origin is typing.Literal:
    for choice in args:
      with contextlib.suppress(ValueError):
        if _parse(type(choice), text) == choice:
          return choice
    raise ValueError
  if origin is tuple:
    parts = _split(text)
    if len(args) == 2 and args[1] is Ellipsis:
      args = (args[0],) * len(parts)
    if len(parts) != len(args):
      raise ValueError
    return tuple(_parse(arg, part) for arg, part in zip(args, parts))
  if annotation is bool and text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  if annotation in (int, float):
    return _parse_number(annotation, text)
  if annotation is str:
    return text
  raise ValueError


def _parse_number(kind: type, text: str) -> Any:
  """An int or a float, or raises `ValueError`."""
  if not text.isascii() or len(text) > _LONGEST_NUMBER:
    raise ValueError
  if kind is int:
    with contextlib.suppress(ValueError):
      return _bounded(int(text))
  value = float(text)
  # A number too large for a float is refused; only `inf` is infinity.
  overflown = math.isinf(value) and any(c.isdigit() for c in text)
  if math.isnan(value) or overflown:
    raise ValueError
  if kind is float:
    return value
  if value.is_integer():
    return _bounded(int(value))
  raise ValueError


def _bounded(value: int) -> int:
  if abs(value) > _MAX_INT:
    raise _Refused(f'of at most {_MAX_INT}')
  return value


def _split(text: str) -> list[str]:
  """What stands between commas outside brackets and quotes."""
  parts, open_, quote = [''], [], ''
  for c in text:
    if quote:
      quote = '' if c == quote else quote
    elif c in '"\'':
      quote = c
    elif c in _CLOSING:
      open_.append(_CLOSING[c])
    elif c in _CLOSING.values() and (not open_ or open_.pop() != c):
      raise _Refused('; a bracket is closed that is not open')
    if c == ',' and not (quote or open_):
      parts.append('')
    else:
      parts[-1] += c
  if quote or open_:
    raise _Refused(f'; {quote or open_[-1]} is missing at the end')
  parts = [part.strip() for part in parts]
  if len(parts) == 1 and parts[0][:1] in ('(', '['):
    return _split(parts[0][1:-1])
  if not parts[-1]:
    del parts[-1]  # an empty tuple, or a trailing comma as Python writes it
  if not all(parts):
    raise _Refused('; an item is empty')
  return parts


def _type_name(annotation: Any) -> str:
  """A type in words: what a user has to write."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(map(_type_name, args))
  if origin is typing.Literal:
    return 'one of ' + ', '.join(map(str, args))
  if origin is tuple:
    if len(args) == 2 and args[1] is Ellipsis:
      return f'{_type_name(args[0])},{_type_name(args[0])},...'
    return ','.join(map(_type_name, args))
  if annotation is type(None):
    return 'none'
  if annotation is bool:
    return 'true or false'
  return getattr(annotation, '__name__', str(annotation))


class Field(NamedTuple):
  """One setting, for help texts: path, type in words, default, meaning."""

  name: str
  type: str
  default: Any
  doc: str


def describe(config: Any) -> list[Field]:
  """All settings of a dataclass, nested ones with dots, in order.

  `config` is an instance, whose values are the defaults, or a class that has a
  default for every field. Meanings are from `Attributes:` of its docstring.
  """
  config = config() if isinstance(config, type) else config
  hints = typing.get_type_hints(type(config))
  docs = _attribute_docs(type(config))
  found = []
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      found += [
        inner._replace(name=f'{field.name}.{inner.name}')
        for inner in describe(value)
      ]
    else:
      name = _type_name(hints[field.name])
      found.append(Field(field.name, name, value, docs.get(field.name, '')))
  return found


def _attribute_docs(cls: type) -> dict[str, str]:
  """The `Attributes:` of a docstring, name -> text on one line."""
  text = inspect.cleandoc(cls.__doc__ or '').partition('Attributes:\n')[2]
  # Names stand at the section's own indentation, continuations deeper.
  entries = re.findall(
    r'^  (\w+): (.*(?:\n {3,}.*)*)', text.partition('\n\n')[0], re.M
  )
  return {name: ' '.join(doc.split()) for name, doc in entries}
