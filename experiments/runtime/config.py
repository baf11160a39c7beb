"""What a run is: its settings, the file that keeps them, errors for people.

Settings are frozen dataclasses; ranges are refused by their `__post_init__`
or by a `validate` function, always on concrete values.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from experiments.files import reading, writing
from experiments.files.errors import Missing, UserError, shown
from experiments.runtime import flags as flags_of
from experiments.runtime import signals
from experiments.runtime.flags import MAX_INT as MAX_INT

# An unknown field's line lists all fields.
_LONGEST_ERROR = 4000

# Whose versions may change a run's numbers.
_PACKAGES = (
  'outplay',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'chex',
  'mctx',
  'rlax',
  'envpool',
  'gymnasium',
  'numpy',
)

# A simulator's seeds are int32, and some are counted up from the run's own.
MAX_SEED = 2_000_000_000


def fail(message: str, cause: BaseException | None = None) -> NoReturn:
  """Prints `error: message` as one line on stderr and exits with code 2.

  Args:
    message: what is wrong, and what would be right.
    cause: the exception behind it; `OUTPLAY_TRACEBACK` in the environment
      shows its traceback below the line.

  Raises:
    SystemExit: always.
  """
  line = shown(' '.join(str(message).split()), _LONGEST_ERROR)
  print('error:', line, file=sys.stderr)
  if cause is not None and os.environ.get('OUTPLAY_TRACEBACK'):
    traceback.print_exception(cause)
  signals.set_exit_code(2)
  raise SystemExit(2)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Makes every `ValueError` in its block a `UserError`.

  For the part of a launcher that builds agents and environments from flags:
  they refuse bad input with a plain `ValueError`.

  Raises:
    UserError: in place of a `ValueError`.
  """
  try:
    yield
  except UserError:
    raise
  except ValueError as error:
    raise UserError(str(error)) from error


def run_main(main: Callable[[], None]) -> None:
  """Parses absl's flags and calls a launcher's `main()`.

  A `UserError`, a wrong flag or a stray argument becomes one line and exit
  code 2 (`OUTPLAY_TRACEBACK=1` shows what caused it); any other exception
  keeps its traceback. An interrupted launcher exits with 130, a terminated one
  with 143; see `runtime.signals`.

  Raises:
    SystemExit: with the exit code.
  """
  from absl import app, flags, logging

  def parse(argv: list[str]) -> list[str]:
    with _one_line(unread=0):  # it prints nothing but help
      return flags_of.parse(argv)

  def guarded(argv: list[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      # Libraries tell each file that they write.
      logging.set_verbosity(logging.WARNING)
    with _one_line():
      flags_of.check_arguments(argv)
      main()

  with signals.launcher():
    try:
      app.run(guarded, flags_parser=parse)
    except SystemExit as stop:
      if stop.code not in (None, 0):
        raise


# As a shell says it of a program that SIGPIPE has ended.
_NOBODY_READS = 128 + 13


@contextlib.contextmanager
def _one_line(unread: int = _NOBODY_READS) -> Iterator[None]:
  """Ends the process in one line for a mistake of the person who runs it.

  It ends without any where nobody reads what it prints any more, as in
  `... --help | head`.

  Args:
    unread: the code that it then ends with, unless it was to end anyway.

  Raises:
    SystemExit: with 2 for a mistake; else as the block leaves.
  """
  try:
    try:
      yield
    except UserError as error:
      fail(str(error), error.__cause__)
    finally:
      sys.stdout.flush()
  except BrokenPipeError as error:
    left = error.__context__
    # Or Python would complain at the very end when it empties its buffer.
    with contextlib.suppress(OSError, ValueError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = left.code if isinstance(left, SystemExit) else unread
    raise SystemExit(code) from None


# What the kernel shows as files. Some of it may be written to, nothing kept.
_KERNEL = ('/proc', '/sys', '/dev')
_KERNEL_MEMORY = '/dev/shm'
# What `files.writing` adds to a name while it writes.
_LONGEST_NAME = 255 - len('..0123456789abcdef.tmp')


def check_place(
  field: str, path: str | os.PathLike, *, folder: bool = False
) -> None:
  """Refuses a place where nothing can be written; makes nothing.

  Args:
    field: the flag that names it.
    path: of the file to write, which may be there already.
    folder: whether it is a folder and not a file; neither need be there.

  Raises:
    UserError: a folder in the place of a file, or the reverse, at the path or
      above it; a name that cannot be written or shown; the root folder or one
      of the kernel's; or the operating system does not let us write there.
  """
  named = f'{field}={shown(path)}'
  _check_name(named, str(path), folder)
  path = pathlib.Path(path)
  above = path if folder else path.parent
  try:
    if not folder and path.is_dir():
      raise UserError(f'{named}: is a folder, must be the name of a file')
    real = pathlib.Path(os.path.realpath(path))
    if not folder and (path.is_symlink() or real.exists()):
      writing.check_replaceable(path)
    while not above.exists():
      above = above.parent
  except UserError as error:
    raise UserError(f'{named}: {error}; take another place') from error
  except OSError as error:
    raise UserError(
      f'{named}: {(error.strerror or str(error)).lower()}; take another place'
    ) from error
  if not above.is_dir():
    what = 'is' if above == path else f'{shown(above)} is'
    raise UserError(f'{named}: {what} a file, must be a folder')
  if folder and real == pathlib.Path(real.anchor):
    raise UserError(
      f'{named}: is the root of all folders; take a folder of its own'
    )
  kernel = [real.is_relative_to(place) for place in _KERNEL]
  if any(kernel) and not real.is_relative_to(_KERNEL_MEMORY):
    raise UserError(
      f'{named}: {_KERNEL[kernel.index(True)]} belongs to the kernel, '
      'nothing is kept there; take another place'
    )
  if not os.access(above, os.W_OK | os.X_OK):
    raise UserError(
      f'{named}: {shown(above)} must not be written to; take another place'
    )


def _check_name(named: str, path: str, folder: bool) -> None:
  """Refuses a path that cannot be written, or not be shown."""
  if not path.isprintable():
    raise UserError(
      f'{named}: holds characters that cannot be printed; take another name'
    )
  size = len(pathlib.Path(path).name.encode('utf-8', 'replace'))
  if not folder and size > _LONGEST_NAME:
    raise UserError(
      f'{named}: name of {size} bytes, must be at most {_LONGEST_NAME}'
    )


def override(
  sections: Mapping[str, Any],
  assignments: Sequence[str],
  validate: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Applies `field=value` assignments to frozen dataclasses.

  A field whose type is one of several dataclasses, each with a field `name`, is
  set to another one by that name, `router=balanced`; fields that both have keep
  their values.

  Args:
    sections: instances by section's name; dataclasses in them are searched
      too. A field is named as `matching` says.
    assignments: in order, the later one wins, but first those that choose a
      dataclass; those that their dataclass refuses are tried again after the
      others. Values are read by the field's
      annotation: int (`1e5` too), float, bool (true, false), str, `Literal`,
      `tuple` (`1,2,3`; nothing for an empty one), `T | None` (`none`).
    validate: called with the result; raises a `ValueError` for what must not
      be.

  Returns:
    The sections with new instances.

  Raises:
    UserError: unknown or ambiguous field, value of a wrong type, value that
      the dataclass or `validate` refuses.

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
    with user_errors():
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
  """The dataclass of a union that has a name, with what the old one shares."""
  kinds = {kind.name: kind for kind in typing.get_args(annotation)}
  if text not in kinds:
    raise UserError(f'{name} is {text!r}, must be one of {", ".join(kinds)}')
  if type(old) is kinds[text]:
    return old
  shared = {f.name for f in dataclasses.fields(kinds[text])} - {'name'}
  return kinds[text](**{n: getattr(old, n) for n in shared if hasattr(old, n)})


def _chooses(sections: Mapping[str, Any], assignment: str) -> bool:
  """Whether an assignment sets which of several dataclasses a field has."""
  known = [p for s, config in sections.items() for p in _paths(config, (s,))]
  asked = tuple(assignment.partition('=')[0].strip().split('.'))
  return [p[-1] for p in matching(known, asked)] == ['name']


def matching(
  known: Sequence[tuple[str, ...]], asked: tuple[str, ...]
) -> list[tuple[str, ...]]:
  """Paths of fields that a name may mean.

  Args:
    known: all paths, `('agent', 'network', 'moe', 'router', 'k')`.
    asked: the parts of the name: a whole path; else the end of it; else some of
      its parts in order, the last one included, `('network', 'moe', 'k')`. A
      last part `name` may be left out.

  Returns:
    The paths, none or several where the name is no good.
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


def _paths(config: Any, prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
  """Paths of all fields that can be set."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from _paths(value, (*prefix, field.name))
    elif field.init:
      yield (*prefix, field.name)


def _find(sections: Mapping[str, Any], name: str) -> tuple[str, ...]:
  """The path that a name on the command line means."""
  known = [p for s, config in sections.items() for p in _paths(config, (s,))]
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
  near = difflib.get_close_matches(asked[-1], sorted(set(fields)), n=3)
  hint = f'did you mean {" or ".join(near)}? ' if near else ''
  raise UserError(f'no field {name}: {hint}fields are {", ".join(names)}')


# What a file of settings can hold, and no number that is longer to read.
_MAX_INT = 2**63 - 1
_LONGEST_NUMBER = 400
_CLOSING = {'(': ')', '[': ']', '{': '}'}


class _Refused(ValueError):
  """A text that is no value; says what more than its type is wrong."""


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
  # Infinity is what says so, not what is too large for a float.
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
  """What stands between commas, but for those within brackets or quotes."""
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
    del parts[-1]  # an empty tuple, or a comma as Python writes behind one
  if not all(parts):
    raise _Refused('; an item is empty')
  return parts


def _type_name(annotation: Any) -> str:
  """A type in words: what a person has to write."""
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
  """All settings of a dataclass (nested ones with dots), in order.

  Args:
    config: an instance, whose values are given as the defaults, or a class
      that has a default for every field.

  The meaning is taken from the `Attributes:` of the class's docstring.
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
  """The `Attributes:` section of a docstring, name -> text on one line."""
  text = inspect.cleandoc(cls.__doc__ or '').partition('Attributes:\n')[2]
  # Names stand at the section's own indentation, continuations deeper.
  entries = re.findall(
    r'^  (\w+): (.*(?:\n {3,}.*)*)', text.partition('\n\n')[0], re.M
  )
  return {name: ' '.join(doc.split()) for name, doc in entries}


def made_with(device: str | None = None) -> dict[str, Any]:
  """What a run was made with: versions, commit, device.

  Args:
    device: its name; None asks JAX, which starts it (so call this after
      `jax.distributed.initialize`).
  """
  if device is None:
    import jax

    device = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  versions = {'python': platform.python_version()}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {'versions': versions, 'commit': _commit(), 'device': device}


def _commit() -> str | None:
  """The commit of this checkout, `-dirty` where it is changed, or None."""
  here = pathlib.Path(__file__).resolve().parents[2]
  if not (here / '.git').exists():
    return None
  try:
    described = subprocess.run(
      ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
      cwd=here,
      capture_output=True,
      text=True,
      timeout=10,
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return described.stdout.strip() or None


# Settings that may differ when a run is resumed.
FREE = ('run.devices', 'run.acting_devices', 'dataset')


def write_run_config(
  workdir: str | os.PathLike,
  config: Mapping[str, Any],
  device: str | None = None,
) -> None:
  """Makes a run's folder and its `config.json`, atomically.

  Args:
    workdir: the run's folder.
    config: all that decides the run's numbers: preset, agent, env, seed,
      steps and the sections of settings (dataclasses are written as
      dictionaries).
    device: see `made_with`, which is written beside it.

  Raises:
    UserError: something in it cannot be written as JSON.
  """
  path = pathlib.Path(workdir) / 'config.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  content = {**_plain(config), 'made_with': made_with(device)}
  writing.write_text(path, json.dumps(content, indent=2) + '\n')


def read_run_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """A run's `config.json`; dataclasses are dictionaries, tuples lists.

  Settings that an older version has written elsewhere are where they are now.

  Raises:
    UserError: `workdir` is no run's folder, or the file cannot be read.
  """
  return _upgraded(_read(workdir))


def _read(workdir: str | os.PathLike) -> dict[str, Any]:
  try:
    return reading.read_json(pathlib.Path(workdir) / 'config.json')
  except Missing as error:
    raise UserError(
      f"workdir={shown(workdir)}: is no run's folder, it has no config.json; "
      'name the --workdir of python -m experiments.train'
    ) from error


# What a mixture's router took of its fields, where routers had no configs.
_ROUTERS = {
  'noisy_top_k': (
    *('k', 'groups', 'group_k', 'noise', 'noise_epsilon'),
    *('prune_below', 'load_momentum'),
  ),
  'balanced': ('k', 'limit', 'threshold_weight'),
  'expert_choice': ('capacity_factor',),
  'soft': ('slots',),
  'biased_top_k': ('k', 'bias_rate', 'prune_below', 'load_momentum'),
}


def _upgraded(saved: Any) -> Any:
  """Settings of an older version as this one would have written them."""
  for path in (('agent', 'network', 'moe'), ('agent', 'critic_moe')):
    moe: Any = saved
    for name in path:
      moe = moe.get(name) if isinstance(moe, dict) else None
    router = moe.get('router') if isinstance(moe, dict) else None
    if not isinstance(router, str) or router not in _ROUTERS:
      continue
    own = {n: moe[n] for n in _ROUTERS[router] if n in moe}
    for name in {n for names in _ROUTERS.values() for n in names}:
      if name != 'capacity_factor':  # it is the mixture's, too
        moe.pop(name, None)
    moe['router'] = {'name': router, **own}
  return saved


def read_identity(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """What tells a run from others: its seed, a digest of its settings.

  Args:
    workdir: the run's folder.

  Returns:
    None where there is no config.json.

  Raises:
    UserError: it cannot be read.
  """
  if not os.path.lexists(pathlib.Path(workdir) / 'config.json'):
    return None
  # As it was written, as the checkpoints beside it were.
  config = _read(workdir)
  config.pop('made_with', None)
  return {'seed': config.get('seed'), 'settings': digest(config)}


def digest(config: Mapping[str, Any]) -> str:
  """SHA-256 of the settings that must not change during a run.

  Args:
    config: of `read_run_config`, or what is written there.

  Raises:
    UserError: something in it cannot be written as JSON.
  """
  leaves = [leaf for leaf in _leaves(_plain(config)) if leaf[0] not in FREE]
  text = json.dumps(sorted(leaves, key=lambda leaf: leaf[0]))
  return hashlib.sha256(text.encode()).hexdigest()


def check_run_config(
  workdir: str | os.PathLike,
  config: Mapping[str, Any],
  device: str | None = None,
  free: Sequence[str] = (),
) -> list[str] | None:
  """Whether a folder may go on with this config.

  Args:
    workdir: the run's folder.
    config: as for `write_run_config`.
    device: likewise.
    free: paths of settings that may change during a run (`run.devices`).

  Returns:
    None where there is no run yet; else what it was made with that is
    different now (versions, commit, device), which does no harm but may
    change numbers: `['versions.jax was 0.10.1, is 0.10.2']`.

  Raises:
    UserError: the folder holds a run of another config; names the fields.
  """
  if not os.path.lexists(pathlib.Path(workdir) / 'config.json'):
    return None
  saved = read_run_config(workdir)
  then = saved.pop('made_with', {})
  differences = [
    change
    for change in _changes(saved, _plain(config))
    if change.partition(' ')[0] not in free
  ]
  if differences:
    raise UserError(
      f'{workdir} holds another run: {"; ".join(differences)}. '
      'Take another --workdir, or delete it'
    )
  return _changes(then, made_with(device))


def _changes(then: Any, now: Any) -> list[str]:
  """`'a.b was 1, is 2'` for each leaf of two JSON dictionaries."""
  then, now = dict(_leaves(then)), dict(_leaves(now))
  # As JSON: there NaN equals itself, and True is not 1.
  text = {
    name: tuple(
      json.dumps(side[name]) if name in side else 'unset'
      for side in (then, now)
    )
    for name in (*then, *(n for n in now if n not in then))
  }
  return [
    f'{name} was {before}, is {after}'
    for name, (before, after) in text.items()
    if before != after
  ]


def _leaves(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict) and tree:
    for name, value in tree.items():
      yield from _leaves(value, f'{prefix}.{name}' if prefix else name)
  elif prefix:
    yield prefix, tree


def _plain(value: Any) -> Any:
  """Dataclasses, tuples and numpy scalars as what JSON gives back."""

  def default(x: Any) -> Any:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
      return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    as_python = getattr(x, 'tolist', None)  # numpy's
    if as_python is not None:
      return as_python()
    raise UserError(f'{x!r} cannot be written to config.json')

  return json.loads(json.dumps(value, default=default))
