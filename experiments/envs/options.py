"""Parses the options of an environment, `name=value` each."""

import ast
import math
from collections.abc import Sequence
from typing import Any


def parse_options(
  options: Sequence[str], field: str = 'env.options'
) -> dict[str, Any]:
  """An environment's options as a dictionary.

  They are `name=value` each; values are Python literals or plain text. `field`
  is the setting's name, for the message.

  Raises:
    ValueError: an option has no name or no `=`, is given twice, contains
      brackets or quotes that are not a literal, or is an infinite number.

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
  """A Python literal, or plain text that does not look like one."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
    if set(text) & set('()[]{}"\''):
      raise ValueError(
        f'{where}: must be a Python literal, such as 4, True, [1, 2] or '
        "'text', or a plain word"
      ) from error
    return text
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f'{where}: must be a finite number')
  return value
