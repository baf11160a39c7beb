"""Checks environment names from files: no code that a file names is executed.

A data set's or run's environment name can mention a module to import
(`gymnasium:module:Id`), and an option a module or program to start. Those are
accepted only from the user's own `--env`; a name from a file must be registered
here.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.envs.options import parse_options
from experiments.files.errors import UserError, shown

# Text that is neither a path nor the dotted name of a class; and the options in
# which plain text can name code: envpool starts the program `vzd_path`.
_PLAIN = re.compile(r'[\w ,;-]*')
_CODE = re.compile(
  r'(.*_)?(path|file|dir|args|entry_point|env_id|module|class|cls|plugin)s?',
  re.IGNORECASE,
)
_KINDS = ('jax', 'self_play', 'gymnasium')


def code_in(name: str, options: Sequence[str] = ()) -> str:
  """The field and value in which an environment names code; '' if none does.

  Raises:
    ValueError: an option has no `=`.

  >>> code_in('gymnasium:CartPole-v1', ['max_episode_steps=50'])
  ''
  >>> code_in('gymnasium:maze:Maze-v0')
  'env_name=gymnasium:maze:Maze-v0'
  >>> code_in('D1Basic-v1', ['vzd_path=./doom'])
  'env.options=vzd_path=./doom'
  """
  kind, _, rest = name.partition(':')
  if ':' in (rest if kind in _KINDS else name):
    return f'env_name={name}'
  for option in options:
    if not is_plain(parse_options([option])):
      return f'env.options={option}'
  return ''


def is_plain(value: Any) -> bool:
  """Whether a value and all its parts can name neither code nor a file."""
  if isinstance(value, Mapping):
    return all(
      is_plain(key)
      and is_plain(inner)
      and not (isinstance(inner, str) and _CODE.fullmatch(str(key)))
      for key, inner in value.items()
    )
  if isinstance(value, list | tuple | set):
    return all(map(is_plain, value))
  if isinstance(value, str):
    return _PLAIN.fullmatch(value) is not None
  return value is None or isinstance(value, bool | int | float)


def check(
  name: str, options: Sequence[str], file: str, asked: str | None = None
) -> None:
  """Refuses an environment from a file if it names code.

  Must be called for every name that was read from a file, before it is used.
  `asked` is the user's own `--env`, which permits the same environment.

  Raises:
    UserError: the name contains code that the user did not ask for, or `asked`
      is another environment.
  """
  if asked and asked != name:
    raise UserError(
      f'env={asked}: differs from {name or "no environment"}, which {file} '
      'names; must be the same or left out'
    )
  code = code_in(name, options)
  if code and not asked:
    # `module:Id`, as Gymnasium itself writes it.
    bare = ':' in name and name.partition(':')[0] not in _KINDS
    flag = shlex.quote(f'gymnasium:{name}' if bare else name)
    raise UserError(
      f'{file}: {shown(code)} names code, and code that a file names is not '
      f'executed; if you trust it, give --env={flag}'
    )


def flag(name: str, options: Sequence[str] = ()) -> str:
  """The flag that a command on a run needs, `' --env=NAME'` or `''`.

  >>> flag('gymnasium:maze:Maze-v0')
  ' --env=gymnasium:maze:Maze-v0'
  """
  return f' --env={shlex.quote(name)}' if code_in(name, options) else ''
