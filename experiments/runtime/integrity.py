"""Whether checkpoints are whole, and what happens if they are not.

A step's folder holds a manifest that names everything that belongs to it: its
own number, the run, and every file, also the rows of a replay, with size and
digest. A step that does not match its manifest is set aside as `N.corrupt` and
an older one taken; a whole step under another name than its manifest's is put
back.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.files import arrays, reading, writing
from experiments.files.arrays import Stored
from experiments.files.errors import UserError, shown

SCHEMA = 3
# Steps that other processes are sent.
_MOST = 8
MANIFEST, LEAVES = 'manifest.json', 'leaves'
_STEP = re.compile(r'(0|[1-9][0-9]{0,17})(\.corrupt(?:-[0-9]+)?)?', re.ASCII)
# Schema 1 had a description and CRC-32 sums instead of a manifest, schema 2 no
# packs.
_OLD, _OLD_SUMS = 'meta/data.json', 'meta/sums.json'


class Damaged(UserError):
  """A checkpoint, or every one of a folder, is not whole."""


class Foreign(UserError):
  """A checkpoint that another release or program has written."""


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf of a saved tree: key path, dtype and shape, or value.

  The dtype is an array's, `bytes`, or `python int` and the like with a value.
  """

  path: str
  dtype: str
  shape: tuple[int, ...]
  value: Any = None


class Place(NamedTuple):
  """Where a small array is: its pack of bytes and the first byte in it."""

  pack: str
  offset: int


@dataclasses.dataclass(frozen=True)
class Local:
  """What one process alone had: its arrays' file and leaves, and JSON facts."""

  file: str
  leaves: tuple[Leaf, ...]
  facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """All that belongs to a step.

  Attributes:
    schema: the version of this layout.
    run: the run's identity, or None.
    leaves: of the carry.
    local: by name.
    files: of the step's folder, with size and digest.
    rows: other files, relative to the folder above the checkpoints.
    packs: where small arrays are, by the number of their leaf.
  """

  schema: int
  step: int
  run: dict[str, Any] | None
  extra: dict[str, Any]
  leaves: tuple[Leaf, ...]
  local: dict[str, Local]
  files: dict[str, Stored]
  rows: dict[str, Stored]
  packs: dict[str, Place] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def saving(
  update: int | None, folder: str | os.PathLike, newest: int | None = None
) -> Iterator[None]:
  """Turns the disk's refusal of a checkpoint into one line for the user.

  `newest` is the update of the newest whole checkpoint, None without one.

  Raises:
    UserError: a full disk, or another refusal of the operating system.
  """
  try:
    yield
  except (OSError, UserError) as error:
    cause = error.__cause__ if isinstance(error, UserError) else error
    if not isinstance(cause, OSError) or cause.errno is None:
      raise
    words, end = 'there is none before it', 'begins'
    if newest is not None:
      words, end = f'that of update {newest} is whole', 'resumes from there'
    raise UserError(
      f'cannot save the checkpoint at update {update} into {shown(folder)}: '
      f'{os.strerror(cause.errno)}; {words}: {writing.remedy(cause.errno)}, '
      f'then the same command {end}'
    ) from error


def seal(
  folder: pathlib.Path, manifest: Manifest, name: str = MANIFEST
) -> None:
  """Writes a step's manifest, the last of its files, with its own digest.

  Raises:
    UserError: the disk refuses.
  """
  # Plain JSON: what is read back has the same text.
  content = json.loads(json.dumps(dataclasses.asdict(manifest)))
  sealed = {'digest': _digest(content), 'manifest': content}
  writing.write_text(folder / name, json.dumps(sealed) + '\n')


def _digest(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_manifest(folder: pathlib.Path, name: str = MANIFEST) -> Manifest:
  """What a step's folder says of itself.

  Raises:
    Foreign: it was written by another release or program.
    Damaged: it is missing or not as it was written.
  """
  import msgspec

  path = folder / name
  try:
    sealed = reading.read_json(path)
    content = sealed.get('manifest')
    if not isinstance(content, dict):
      raise Damaged(f'{MANIFEST} is garbled')
    schema = content.get('schema')
    if isinstance(schema, int) and schema > SCHEMA:
      raise Foreign(
        f'the checkpoint {shown(folder)} has schema {schema}, this release '
        f'reads up to {SCHEMA}: use the release that wrote it, or a newer one'
      )
    if _digest(content) != sealed.get('digest'):
      raise Damaged(f'{MANIFEST} is garbled')
    return msgspec.convert(content, Manifest)
  except reading.Missing as error:
    if (folder / 'meta').is_dir() and name == MANIFEST:
      return _read_old(folder)
    if (folder / '_CHECKPOINT_METADATA').exists():
      raise Foreign(
        f'the checkpoint {shown(folder)} was not written by Outplay'
      ) from error
    raise Damaged(f'{MANIFEST} is missing') from error
  except (Foreign, Damaged):
    raise
  except (UserError, msgspec.ValidationError) as error:
    text = str(error).removeprefix(f'{shown(path)}: ')
    raise Damaged(text.removeprefix(f'{shown(path)} ')) from error


def _read_old(folder: pathlib.Path) -> Manifest:
  """The manifest that a step of schema 1 would have."""
  import msgspec

  try:
    content = reading.read_json(folder / _OLD)
    sums = {}
    if (folder / _OLD_SUMS).exists():
      sums = reading.read_json(folder / _OLD_SUMS, dict[str, tuple[int, int]])
    return Manifest(
      1,
      int(folder.name.partition('.')[0]),
      None,
      msgspec.convert(content.get('extra'), dict[str, Any]),
      msgspec.convert(content.get('leaves'), tuple[Leaf, ...]),
      local={},
      files={n: Stored(size, f'{crc:08x}') for n, (size, crc) in sums.items()},
      rows={},
    )
  except (UserError, ValueError) as error:
    raise Damaged(f'{_OLD} or {_OLD_SUMS}: {shown(error)}') from error


def check(
  folder: pathlib.Path,
  manifest: Manifest,
  run: Mapping[str, Any] | None = None,
  rows: bool = True,
  thorough: bool = False,
) -> None:
  """Compares a step with its manifest, and its run if one is given.

  Args:
    rows: whether the files outside the checkpoints must be there, too.
    thorough: whether to read these as well, which loading does anyway.

  Raises:
    Damaged: they differ.
  """
  _check_run(manifest, run)
  for name, must_be in manifest.files.items():
    _check_file(folder, name, must_be, True)
  if manifest.schema == 1:
    with _as_damage():
      reading.check_folder(folder)
  for name, must_be in manifest.rows.items() if rows else ():
    _check_file(folder.parent.parent, name, must_be, thorough)


@contextlib.contextmanager
def _as_damage() -> Iterator[None]:
  try:
    yield
  except UserError as error:
    raise Damaged(str(error)) from error


def _check_run(manifest: Manifest, run: Mapping[str, Any] | None) -> None:
  if run is None or manifest.run is None or manifest.run == run:
    return
  changed = [n for n in run if manifest.run.get(n) != run[n]]
  was = {n: manifest.run.get(n) for n in changed}
  if 'seed' in was:
    raise Damaged(f'is of another run: seed {shown(was["seed"])}')
  raise Damaged('is of another run: other settings, or of another release')


def _check_file(
  folder: pathlib.Path, name: str, must_be: Stored, content: bool
) -> None:
  path = folder / name
  if (
    pathlib.PurePath(name).is_absolute() or '..' in pathlib.PurePath(name).parts
  ):
    raise Damaged(f'{shown(name)} does not name a file of the run')
  try:
    found = path.lstat()
    reading.check_regular(name, found)
  except OSError as error:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
      raise Damaged(f'{shown(name)} is missing') from error
    raise Damaged(f'{shown(name)}: {error.strerror}') from error
  except UserError as error:
    raise Damaged(str(error)) from error
  if must_be.size < 0:  # from an older release, which kept no sums of it
    return
  if found.st_size != must_be.size:
    raise Damaged(
      f'{shown(name)} has {found.st_size} bytes instead of {must_be.size}'
    )
  if content:
    try:
      is_old = len(must_be.digest) == 8
      digest = arrays.crc32(path) if is_old else arrays.stored(path).digest
    except UserError as error:
      raise Damaged(str(error)) from error
    if digest != must_be.digest:
      raise Damaged(f'{shown(name)} is garbled')


class _Entry(NamedTuple):
  """A folder that holds a step, or did."""

  path: pathlib.Path
  step: int
  manifest: Manifest | None
  why: str

  @property
  def is_in_place(self) -> bool:
    return self.path.name == str(self.step)


def _scan(root: pathlib.Path) -> tuple[list[_Entry], list[pathlib.Path]]:
  """Steps, the newest first, and what else has a step's name."""
  entries, strays, foreign = [], [], []
  if not os.path.lexists(root):
    return [], []
  try:
    names = sorted(os.listdir(root))
    for name in names:
      found, path = _STEP.fullmatch(name), root / name
      if found is None:
        continue
      mode = path.lstat().st_mode
      if stat.S_ISLNK(mode):
        reading.check_regular(path, path.lstat())
      if not stat.S_ISDIR(mode):
        if found[2] is None:
          strays.append(path)
        continue
      number = int(found[1])
      try:
        manifest = read_manifest(path)
        entries.append(_Entry(path, manifest.step, manifest, ''))
      except Foreign as error:
        foreign.append((number, error))
      except Damaged as error:
        entries.append(_Entry(path, number, None, str(error)))
  except NotADirectoryError as error:
    raise UserError(f'{shown(root)}: is a file, must be a folder') from error
  except OSError as error:
    raise UserError(
      f'{shown(root)}: cannot be read: {error.strerror}'
    ) from error
  for number, error in foreign:
    if number >= max((e.step for e in entries if e.manifest), default=-1):
      raise error
  entries.sort(key=lambda e: (e.step, e.is_in_place), reverse=True)
  return entries, strays


class Settled(NamedTuple):
  """What was found in a folder of checkpoints.

  Attributes:
    step: the newest whole one, or None, in `folder`.
    steps: all that are in place, as far as was looked, descending.
    hopeless: the message for the user if there are only damaged ones.
  """

  step: int | None
  folder: pathlib.Path | None
  steps: list[int]
  hopeless: str | None


def settle(
  root: pathlib.Path,
  read_only: bool = False,
  run: Mapping[str, Any] | None = None,
  rows: bool = True,
  below: int | None = None,
) -> Settled:
  """Finds the newest whole step and sets newer ones aside, with a line each.

  All processes call it, unless `read_only`. If all are damaged they stay in
  place: the next run must not start over unasked. Only steps `below` are
  considered.

  Raises:
    UserError: the folder cannot be used as it is; all processes raise.
    Foreign: it is another release's.
  """
  if read_only:
    return _settle(root, True, run, rows, below)
  settled = Settled(None, None, [], None)
  nothing = [-1] * _MOST
  if is_first():
    try:
      settled = _settle(root, False, run, rows, below)
    except UserError:
      agreed([-1, 2, *nothing])
      raise
  newest = -1 if settled.step is None else settled.step
  state = int(settled.hopeless is not None)
  newest, state, *steps = agreed(
    [newest, state, *[*settled.steps, *nothing][:_MOST]]
  )
  if is_first():
    return settled
  if state == 2:
    raise UserError(f'{shown(root)} cannot be used: see process 0')
  if newest < 0:
    hopeless = f'no checkpoint in {shown(root)} is whole: see process 0'
    return Settled(None, None, [], hopeless if state else None)
  return Settled(newest, root / str(newest), [n for n in steps if n >= 0], None)


def _settle(root, read_only, run, rows, below) -> Settled:
  entries, strays = _scan(root)
  for path in strays if not read_only else ():
    aside = set_aside(path).name
    print(f'note: {shown(path)} is not a folder: it is set aside as {aside}')
  damaged, newest = [], None
  if below is not None:
    entries = [entry for entry in entries if entry.step < below]
  for entry in entries:
    why = entry.why
    if entry.manifest is not None:
      try:
        # What was set aside comes back only if all of it is whole.
        check(entry.path, entry.manifest, run, rows, not entry.is_in_place)
      except Damaged as error:
        why = str(error)
    if not why:
      newest = entry
      break
    damaged.append(entry._replace(why=why))
  if newest is None:
    reasons = ', '.join(f'step {e.step}: {e.why}' for e in damaged[:3])
    return Settled(
      None,
      None,
      [],
      f'no checkpoint in {shown(root)} is whole ({reasons}): restore one '
      'from a copy, or delete the run to start over'
      if damaged
      else None,
    )
  in_place = [e for e in damaged if '.' not in e.path.name]
  for entry in in_place:
    aside = None if read_only else set_aside(entry.path)
    _tell(entry.path, entry.why, aside, newest.step)
  where = newest.path
  if not newest.is_in_place:
    where = root / str(newest.step)
    done = '' if read_only else f': it is put back as {where.name}'
    print(
      f'note: {shown(newest.path)} is the checkpoint of step {newest.step} and '
      f'whole{done}',
      flush=True,
    )
    if read_only:
      where = newest.path
    else:
      if os.path.lexists(where):
        set_aside(where)
      os.rename(newest.path, where)
  steps = [newest.step]
  for entry in entries[entries.index(newest) + 1 :]:
    if entry.is_in_place and entry.manifest is not None:
      steps.append(entry.step)
  return Settled(newest.step, where, steps, None)


def _tell(path, why, aside, taken) -> None:
  done = '' if aside is None else f'it is set aside as {aside.name}, '
  print(
    f'note: the checkpoint {shown(path)} is damaged ({why}): {done}step '
    f'{taken} is taken',
    flush=True,
  )


def tell(folder: pathlib.Path, why: str, aside: pathlib.Path, taken: int):
  """Prints that a step was set aside and which one is taken."""
  _tell(folder, why, aside, taken)


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a step to the first free `N.corrupt`, `N.corrupt-2`, ...

  Raises:
    UserError: the folder cannot be renamed.
  """
  number = 1
  while True:
    more = f'-{number}' if number > 1 else ''
    aside = path.with_name(f'{path.name.partition(".")[0]}.corrupt{more}')
    if not os.path.lexists(aside):
      break
    number += 1
  with writing.writing(aside):
    os.rename(path, aside)
  return aside


def place(directory: str | os.PathLike) -> pathlib.Path:
  """A folder's absolute path; what is above it may be links.

  Raises:
    UserError: it is a link itself, or a file.
  """
  path = pathlib.Path(os.path.abspath(directory))
  if path.is_symlink():
    raise UserError(
      f'{shown(path)}: is a link; put the folder itself there, or make the '
      "run's whole folder a link"
    )
  if os.path.lexists(path) and not path.is_dir():
    raise UserError(f'{shown(path)}: is a file, must be a folder')
  return path


def set_all_aside(root: pathlib.Path) -> None:
  """Sets aside every step that is in place; see `set_aside`."""
  for name in os.listdir(root):
    found = _STEP.fullmatch(name)
    if found is not None and found[2] is None:
      set_aside(root / name)


def begin(root: pathlib.Path, folder: pathlib.Path) -> None:
  """Makes the folder that a step is written to, with one for its arrays."""
  root.mkdir(parents=True, exist_ok=True)
  folder.mkdir()
  (folder / LEAVES).mkdir()


def unfinished(root: pathlib.Path, step: int, token: int) -> pathlib.Path:
  """The folder that a step is written to; its name cannot be guessed."""
  return root / f'.{step}.{token:015x}.tmp'


def finish(root: pathlib.Path, folder: pathlib.Path, step: int) -> None:
  """Gives a written step its name, for good."""
  writing.flush_folder(folder)
  if os.path.lexists(root / str(step)):
    set_aside(root / str(step))
  os.rename(folder, root / str(step))
  writing.flush_folder(root)


def forget(root: pathlib.Path, step: int) -> None:
  """Deletes a step, renamed first: half a step must not look like one."""
  gone = root / f'.{step}.{secrets.token_hex(8)}.old'
  with contextlib.suppress(OSError):
    os.rename(root / str(step), gone)
    shutil.rmtree(gone, ignore_errors=True)


def tidy(root: pathlib.Path) -> None:
  """Deletes what a killed run had begun to write or to delete."""
  with contextlib.suppress(OSError):
    for name in os.listdir(root):
      if re.fullmatch(r'\.\d+\.[0-9a-f]+\.(tmp|old)', name, re.ASCII):
        shutil.rmtree(root / name, ignore_errors=True)


def agreed(values: list[int]) -> list[int]:
  """The first process's numbers, in every process."""
  import jax

  if jax.process_count() == 1:
    return values
  from jax.experimental import multihost_utils

  # jax would round to 32 bits.
  halves = np.array([[v >> 30, v & (1 << 30) - 1] for v in values], np.int32)
  halves = multihost_utils.broadcast_one_to_all(halves)
  return [(int(a) << 30) + int(b) for a, b in halves]


def is_first() -> bool:
  """Whether this process is the one that renames and prints."""
  import jax

  return jax.process_index() == 0
