"""Options of an environment, `name=value` each."""

import ast
import math
from collections.abc import Sequence
from typing import Any


def parse_options(
  options: Sequence[str], field: str = 'env.options'
) -> dict[str, Any]:
  """An environment's options as a dictionary.

  Args:
    options: `name=value` each; values are Python's literals, or text.
    field: where they stand, for the message.

  Raises:
    ValueError: one without a name or `=`, one that is given twice, brackets or
      quotes that are no literal, an infinite number.

  >>> parse_options(('action_repeat=8', 'rules=pgx'))
  {'action_repeat': 8, 'rules': 'pgx'}
  """
  parsed: dict[str, Any] = {}
  for option in options:
    name, equals, text = option.partition('=')
    name = name.strip()
    if not (name.isidentifier() and equals):
      raise ValueError(f'{field}={option}: should be name=value')
    if name in parsed:
      raise ValueError(f'{field}={option}: {name} is given twice')
    parsed[name] = _literal(text, f'{field}={option}')
  return parsed


def _literal(text: str, where: str) -> Any:
  """A Python literal, or a text that does not try to be one."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
    if set(text) & set('()[]{}"\''):
      raise ValueError(
        f'{where}: must be a literal of Python, such as 4, True, [1, 2] or '
        "'text', or a plain word"
      ) from error
    return text
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f'{where}: must be a finite number')
  return value
