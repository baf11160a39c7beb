"""What is wrong with a command's flags, before its launcher reads them."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.files import reading
from experiments.files.errors import UserError

# JAX counts in 32 bits.
MAX_INT = 2**31 - 1


def parse(argv: Sequence[str]) -> list[str]:
  """Parses flags, refuses what absl would accept; returns the other arguments.

  If a flag or a field of `--set` is given twice, the last one counts, because
  scripts append to a command.

  Raises:
    UserError: an unknown flag, or a value that is empty or invalid for its
      flag.
    SystemExit: with 0 for help.
  """
  from absl import flags

  given = list(_given(argv[1:]))
  _check_texts(given)
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, ValueError) as error:
    raise UserError(f'{_explained(error)} (--help lists the flags)') from error
  except SystemExit as left:
    # absl ends with 1 once it has shown its help, as if that were an error.
    raise SystemExit(0) from left
  for name, value in flags.FLAGS.flag_values_dict().items():
    _check_value(flags.FLAGS[name], value)
  return rest


def check_arguments(argv: Sequence[str]) -> None:
  """Refuses arguments that are not flags.

  Raises:
    UserError: names the first of them.
  """
  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]!r}: flags are --name=value')


def refuse(names: Sequence[str], where: str, remedy: str = '') -> None:
  """Refuses flags that a command of this kind would ignore.

  `where` says why, such as `with --human`; the usual remedy is to leave them
  out.

  Raises:
    UserError: one of them was given.
  """
  from absl import flags

  for name in names:
    flag = flags.FLAGS[name]
    if flag.present:
      value = flag.value
      if isinstance(value, list | tuple):
        value = ','.join(map(str, value))
      if flag.boolean:
        value = str(value).lower()
      raise UserError(
        f'flag --{name}={value}: has no effect {where}; '
        f'{remedy or "leave it out"}'
      )


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Names and texts of the flags on a command line, as absl reads them."""
  from absl import flags

  left = iter(arguments)
  for argument in left:
    if not argument.startswith('-') or argument == '--':
      return
    name, equals, text = argument.lstrip('-').partition('=')
    if name not in flags.FLAGS and name.startswith('no'):
      name = name[2:]
    elif not equals and name in flags.FLAGS and not flags.FLAGS[name].boolean:
      text = next(left, '')
    yield name, text


def _check_texts(given: Sequence[tuple[str, str]]) -> None:
  """Refuses texts that are bad for file systems, terminals or numbers."""
  from absl import flags

  for name, text in given:
    if '\0' in text:
      raise UserError(f'flag --{name}={text}: must not hold a zero byte')
    try:
      text.encode('utf-8')
    except UnicodeEncodeError as error:
      raise UserError(f'flag --{name}={text}: must be UTF-8') from error
    if name == 'flagfile':
      reading.check_regular(text, _stat(name, text))
    known = name in flags.FLAGS
    number = known and flags.FLAGS[name].flag_type() in ('int', 'float')
    if number and not text.isascii():
      # Python reads the digits of every script.
      raise UserError(f'flag --{name}={text}: must be in the digits 0 to 9')


def _stat(name: str, text: str) -> os.stat_result:
  try:
    return os.stat(text)
  except OSError as error:
    why = (error.strerror or str(error)).lower()
    raise UserError(f'flag --{name}={text}: {why}') from error


def _check_value(flag: Any, value: Any) -> None:
  """Refuses an empty text or item, and numbers out of range."""
  if not flag.present:
    return
  texts = [value] if isinstance(value, str) else value
  if isinstance(texts, list) and not ''.join(map(str, texts)).strip():
    raise UserError(
      f'flag --{flag.name}=: is empty; give a value or leave the flag out'
    )
  if isinstance(value, list) and not all(str(item).strip() for item in value):
    text = ','.join(map(str, value))
    raise UserError(
      f'flag --{flag.name}={text}: has an empty item; leave it out'
    )
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(f'flag --{flag.name}={value}: must be a finite number')
  if type(value) is int and abs(value) > MAX_INT:
    raise UserError(f'flag --{flag.name}={value}: must be at most {MAX_INT}')


def _explained(error: Exception) -> str:
  """What is wrong with a flag and what would be right, from absl's error."""
  from absl import flags

  found = re.match(r'flag --(\w+)=(.*?): ', str(error), re.S)
  if found is None or found[1] not in flags.FLAGS:
    return str(error)
  name, value = found.groups()
  flag = flags.FLAGS[name]
  if 'other than None' in str(error):
    return f'flag --{name}: is needed: {flag.help}'
  right = flag.parser.syntactic_help
  choices = getattr(flag.parser, 'enum_values', ())
  if flag.boolean:
    right = 'true or false'
  elif choices:
    right = f'one of {", ".join(choices)}'
  return f'flag --{name}={value}: must be {right}'
