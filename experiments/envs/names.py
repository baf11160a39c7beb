"""Environments that files name: nothing that a file names is executed.

A data set and a run's folder say which environment they are of, and such a
name can be that of a module to import (`gymnasium:module:Id`) or have an option
that is one, or a program to start. What brings code comes from the user's own
`--env`; a name from a file is that of what is registered here already.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.envs.options import parse_options
from experiments.files.errors import UserError, shown

# Text that is neither a path nor the dotted name of a class, and options whose
# text is one or the other even so: envpool starts the program `vzd_path`.
_PLAIN = re.compile(r'[\w ,;-]*')
_CODE = re.compile(
  r'(.*_)?(path|file|dir|args|entry_point|env_id|module|class|cls|plugin)s?',
  re.IGNORECASE,
)
_KINDS = ('jax', 'self_play', 'gymnasium')


def code_in(name: str, options: Sequence[str] = ()) -> str:
  """What of an environment names code: a field and its value; '' for nothing.

  Args:
    name: of the environment, as for `make.make`.
    options: `name=value` each.

  Raises:
    ValueError: an option without `=`.

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
  """Whether a value, with all within it, can name neither code nor a file."""
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
  """Refuses an environment that a file names if it brings code.

  To be called wherever a name has been read from a file, before anything is
  made of it.

  Args:
    name: of the environment; '' for none.
    options: of it, from the file, too.
    file: what has named them, for the message.
    asked: the user's own `--env`, which vouches for the same environment; None
      without the flag.

  Raises:
    UserError: code that the user did not ask for, or `asked` is another
      environment.
  """
  if asked and asked != name:
    raise UserError(
      f'env={asked}: {file} names {name or "no environment"}; must be the same '
      'one, or left out'
    )
  code = code_in(name, options)
  if code and not asked:
    # `module:Id`, as Gymnasium itself has it.
    bare = ':' in name and name.partition(':')[0] not in _KINDS
    flag = shlex.quote(f'gymnasium:{name}' if bare else name)
    raise UserError(
      f'{file}: {shown(code)} names code, and nothing that a file names is '
      f'executed; if you trust it, give --env={flag}'
    )


def flag(name: str, options: Sequence[str] = ()) -> str:
  """What a command on a run's folder needs: `' --env=NAME'`, or nothing.

  Args:
    name: of the run's environment.
    options: of it.

  >>> flag('gymnasium:maze:Maze-v0')
  ' --env=gymnasium:maze:Maze-v0'
  """
  return f' --env={shlex.quote(name)}' if code_in(name, options) else ''
