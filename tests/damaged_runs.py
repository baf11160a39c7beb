"""Whole run folders of every kind, ways to damage them, what comes of it.

A run is made once, stopped on its way; each case damages a copy of its folder
and gives the same command again. It must end with one line, or with the very
parameters and metrics of the run that nobody has touched.
"""

import contextlib
import csv
import ctypes
import functools
import io
import json
import os
import pathlib
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from experiments import build
from experiments.build import saved
from experiments.data import npz
from experiments.runtime import config as configs
from experiments.runtime import integrity, loop, mesh, signals
from experiments.sweeps import engines, program
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps.plan import Row
from experiments.training import collect, run, stages
from experiments.training.keeper import Keeper

STOP, END = 8, 10  # updates
_SECONDS = 60
# What differs from run to run.
_CLOCKS = ('updates_per_second', 'compiled', 'wait_seconds')

_LOOP = (
  'log_every=2',
  'checkpoint_every=4',
  'final_episodes=0',
  'devices=1',
  'hold_out=0',
  'early_update=0',
)
_MUZERO = (
  'env.num_envs=2',
  'warmup_decisions=32',
  'decisions_per_update=4',
  'replay_capacity=400',
  'batch_size=4',
  'num_simulations=2',
  'network.latent_size=4',
  'network.head_hidden=4',
  'network.value_bins=5',
  'network.reward_bins=5',
  'evaluate_every=0',
)


class Case(NamedTuple):
  """A damage.

  Attributes:
    name: of the file and of what happens to it.
    damage: `(run, outside) -> None`, changes the copy of a run; `outside` is a
      folder that nothing must be written to.
    must: what must be said; '' for anything or nothing.
  """

  name: str
  damage: Callable[[pathlib.Path, pathlib.Path], None]
  must: str = ''


class Run(NamedTuple):
  """A kind of run.

  Attributes:
    folder: of the one that was stopped.
    resume: `(folder) -> what is left`, to compare; it prints and raises as the
      command does.
    want: what is left of the uninterrupted one.
    other: folder of the same run with another seed, or None.
  """

  folder: pathlib.Path
  resume: Callable[[pathlib.Path], Any]
  want: Any
  other: pathlib.Path | None


class Ending(NamedTuple):
  """What came of a case.

  Attributes:
    kind: `refused`, `equal`, or what must not be: `other numbers`, `traceback`,
      `hang`, `written outside`.
    told: what was printed, or the line of the refusal.
  """

  kind: str
  told: str


# Kinds of runs.


def settings_of(kind: str, root: pathlib.Path) -> dict[str, Any]:
  """Arguments of `build.describe`; a data set is made where one is needed."""
  if kind == 'pure':
    flags = ('name', 'muzero_cartpole'), ('env', 'jax:cartpole')
    own = (*_MUZERO, 'optimiser=sgd', 'network.lstm_size=4')
    return dict(flags, steps=72, settings=(*_LOOP, *own))
  if kind == 'host':
    own = (*_MUZERO, 'acting=synchronous', 'parts=2', 'network.lstm_size=4')
    own = (*own, 'evaluate_every=4', 'evaluate_episodes=2')
    flags = ('name', 'muzero_cartpole'), ('env', 'CartPole-v1')
    return dict(flags, steps=72, settings=(*_LOOP, *own))
  if kind == 'td_gammon':
    own = ('env.num_envs=2', 'hidden=4', 'evaluate_every=0')
    return {'name': 'td_gammon', 'steps': 20, 'settings': (*_LOOP, *own)}
  if kind == 'offline':
    from test_offline_launch import make_dataset

    path = root / 'noise'
    if not path.exists():
      npz.save(make_dataset(), path)
    own = ('hidden_sizes=4', 'batch_size=8', 'evaluate_every=0')
    own = (*own, 'warm_start_updates=6', 'slow_rate=1e-3')
    return {
      'name': 'atac',
      'env': 'jax:pendulum',
      'dataset': str(path),
      'steps': END,
      'settings': (*_LOOP, *own),
    }
  from test_text import SETTINGS, make_text

  path = root / 'words.txt'
  path.write_text(make_text(), encoding='utf-8')
  return {
    'name': 'moe_language_small',
    'dataset': str(path),
    'steps': END,
    'settings': (*SETTINGS, *_LOOP, 'keep_checkpoints=2', 'evaluate_every=0'),
  }


@contextlib.contextmanager
def made_once(experiment: build.Experiment) -> Iterator[None]:
  """Agents and sources are made and compiled once, whatever resumes."""
  make = stages.make

  @functools.cache
  def trainer(parts, phase):
    saved = stages.Saved(parts, phase)
    made = make(experiment, saved, lambda: False)
    ready = []
    for stage in made.stages:
      if stage.source.is_pure and stage.interval is None:
        interval = loop.watched_interval(stage.agent, stage.source)
        stage = stage._replace(interval=jax.jit(interval, donate_argnums=0))
      elif stage.update is None:
        update = jax.jit(stage.agent.update, donate_argnums=0)
        stage = stage._replace(update=update)
      ready.append(stage)
    return made._replace(stages=tuple(ready))

  with pytest.MonkeyPatch.context() as patch:
    cached = lambda experiment, saved, asked: trainer(saved.parts, saved.phase)
    patch.setattr(stages, 'make', cached)
    yield


def stop_at(update: int, patch: pytest.MonkeyPatch) -> None:
  """A run is asked to stop by its checkpoint of an update."""
  asked, save = [], Keeper.save

  def kept(self, carry):
    save(self, carry)
    asked.extend([True] * (int(carry.step) >= update))

  patch.setattr(Keeper, 'save', kept)
  exits = lambda: contextlib.nullcontext(lambda: bool(asked))
  patch.setattr(signals, 'graceful_exit', exits)


@contextlib.contextmanager
def trained(kind: str, root: pathlib.Path) -> Iterator[Run]:
  """A run of `experiments.train`, stopped at `STOP` of `END` updates."""
  described = settings_of(kind, root)
  experiment = build.describe(described.pop('name'), **described)
  assert experiment.updates == END, experiment.updates
  other = build.describe(experiment.name, **described, seed=1)
  with made_once(experiment):
    agent = stages.make(experiment, stages.Saved(), bool).stages[-1].agent

    def left(folder):
      params = saved.load_params(str(folder), agent, ['final'])['final']
      with (folder / 'metrics.csv').open(newline='') as file:
        rows = [
          {n: x for n, x in row.items() if n not in _CLOCKS}
          for row in csv.DictReader(file)
        ]
      return jax.tree.leaves(jax.device_get(params)), rows

    def resume(folder):
      run.run(experiment, folder)
      return left(folder)

    folders = root / 'stopped', root / 'other'
    for folder, one in zip(folders, (experiment, other)):
      with pytest.MonkeyPatch.context() as patch:
        stop_at(STOP, patch)
        run.run(one, folder)
    want = resume(root / 'whole')
    yield Run(folders[0], resume, want, folders[1])


@contextlib.contextmanager
def swept(root: pathlib.Path) -> Iterator[Run]:
  """A program of `experiments.sweep`, stopped on its way."""
  from test_sweep import SHARED

  plan = sweep_plan.make_plan('muzero_catch', **SHARED)
  rows = [Row(0, 0), Row(0, 1)]
  # Before it is replaced, by what it gives for these rows.
  functions = program.row_functions(plan.describe(rows[0]), ())
  compiled, ready = program.compiled, {}

  def compiled_once(one, over):
    if one.end not in ready:
      ready[one.end] = compiled(one, over)
    return ready[one.end]

  def resume(folder, stopping=lambda: False):
    todo = engines.parts(plan, rows, folder, 8)
    engines.vmapped(
      plan,
      todo,
      checkpoint_minutes=0.0,
      stopping=stopping,
      report=lambda step, row: None,
    )
    found = engines.read_parts(todo, rows)
    return [
      [(n, float(x)) for n, x in point.items()]
      for row in rows
      if row in found
      for point in found[row].curve
    ]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(program, 'row_functions', lambda *_: functions)
    patch.setattr(program, 'compiled', compiled_once)
    patch.setattr(mesh, 'make_mesh', functools.cache(mesh.make_mesh))
    want = resume(root / 'whole')
    # It asks before the program, after 5 updates and after 10 of 12.
    halts = iter([False, False, True])
    resume(root / 'stopped', lambda: next(halts))
    steps = root / 'stopped' / 'programs' / '000' / 'checkpoints'
    assert sorted(p.name for p in steps.iterdir()) == ['10', '5']
    yield Run(root / 'stopped', resume, want, None)


@contextlib.contextmanager
def collected(root: pathlib.Path) -> Iterator[Run]:
  """A collection that was stopped before its expert data."""
  from test_collect import QUICK, TINY

  def played(name, collection, act, params, episodes, seed):
    # Each policy is better than the one before; none plays.
    return -1000.0 if params is None else float(seed)

  def resume(folder):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(collect, '_play', played)
      collect.run(
        'Pendulum-v1',
        folder,
        steps=80,
        transitions=30,
        seed=3,
        sac=TINY,
        collection=QUICK,
      )
    sets = [npz.load(folder / quality) for quality in collect.QUALITIES]
    return [np.array(x) for one in sets for x in one[:-1]]

  whole = root / 'whole'
  want = resume(whole)
  stopped = root / 'stopped'
  shutil.copytree(whole, stopped)
  for quality in ('expert', 'medium-expert'):
    shutil.rmtree(stopped / quality)
  yield Run(stopped, resume, want, None)


def make(kind: str, root: pathlib.Path):
  """A context that gives the `Run` of a kind; see `KINDS`."""
  if kind == 'sweep':
    return swept(root)
  if kind == 'collect':
    return collected(root)
  return trained(kind, root)


KINDS = ('pure', 'host', 'td_gammon', 'offline', 'text', 'sweep', 'collect')


# Damages to a file.


def flip(path, outside):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def cut(path, outside):
  os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path, outside):
  os.truncate(path, 0)


def lengthen(path, outside):
  with path.open('ab') as file:
    file.write(b'\0' * 100)


def overwrite(path, outside):
  path.write_bytes(bytes(path.stat().st_size))


def noise(path, outside):
  path.write_bytes(np.random.default_rng(0).bytes(3000))


def remove(path, outside):
  path.unlink()


def link(path, outside):
  path.rename(outside / 'target')
  path.symlink_to(outside / 'target')


def dangle(path, outside):
  path.unlink()
  path.symlink_to(outside / 'nothing')


def endless(path, outside):
  path.unlink()
  path.symlink_to('/dev/zero')


def fifo(path, outside):
  path.unlink()
  os.mkfifo(path)


def folder(path, outside):
  path.unlink()
  path.mkdir()


def unreadable(path, outside):
  path.chmod(0)


def read_only(path, outside):
  path.chmod(0o500)


def nested(path, outside):
  path.write_text('[' * 100_000)


def many_keys(path, outside):
  path.write_text(json.dumps({f'k{i}': i for i in range(100_000)}))


def another_type(path, outside):
  path.write_text('[1, 2]')


def escapes(path, outside):
  path.write_text('{"seed": "\\u001b[2J", "name": "\\u001b]0;x\\u0007"}')


def wide(path, outside):
  path.write_text('step,loss\n1,"' + 'x' * 200_000 + '"\n')


def many_columns(path, outside):
  path.write_text(','.join(map(str, range(100_000))) + '\n')


def escaped_cells(path, outside):
  path.write_text('step,loss\n\x1b[2J,1\n')


def half_a_line(path, outside):
  with path.open('a') as file:
    file.write('9,0.')


def twice(path, outside):
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(lines + lines[1:]))


_ANY = (
  flip, cut, empty, lengthen, overwrite, noise, remove, link, dangle, endless,
  fifo, folder, unreadable,
)  # fmt: skip
_JSON = (nested, many_keys, another_type, escapes)
_CSV = (wide, many_columns, escaped_cells, half_a_line, twice)


# Damages to a folder of steps.


def newest(steps: pathlib.Path) -> pathlib.Path:
  return max(
    (p for p in steps.iterdir() if p.name.isdecimal()),
    key=lambda path: int(path.name),
  )


def renamed(name):
  def damage(steps, outside):
    newest(steps).rename(steps / name)

  return damage


def beside(name, kind='file'):
  def damage(steps, outside):
    path = steps / name
    if kind == 'file':
      path.write_text('x')
    elif kind == 'folder':
      path.mkdir()
    else:
      path.symlink_to(outside / 'nothing')

  return damage


def lose_all(steps, outside):
  shutil.rmtree(steps)


def lose_the_steps(steps, outside):
  lose_all(steps, outside)
  steps.mkdir()


def lose_the_newest(steps, outside):
  shutil.rmtree(newest(steps))


def a_file_instead(steps, outside):
  lose_all(steps, outside)
  steps.write_text('x')


def a_link_instead(steps, outside):
  steps.rename(outside / 'steps')
  steps.symlink_to(outside / 'steps')


def aside_is_taken(steps, outside):
  flip(max(newest(steps).glob('leaves/*/.zarray')), outside)
  (steps / f'{newest(steps).name}.corrupt').mkdir()


def newest_unreadable(steps, outside):
  unreadable(newest(steps), outside)


def newest_arrays_unreadable(steps, outside):
  unreadable(newest(steps) / 'leaves', outside)


def newest_read_only(steps, outside):
  read_only(newest(steps), outside)


def all_damaged(steps, outside):
  for path in steps.glob('*/leaves/*/.zarray'):
    cut(path, outside)


def manifest_of_an_older_step(steps, outside):
  older = min(p for p in steps.iterdir() if p != newest(steps))
  shutil.copy(older / 'manifest.json', newest(steps))


def arrays_of_an_older_step(steps, outside):
  older = min(p for p in steps.iterdir() if p != newest(steps))
  shutil.copytree(
    older / 'leaves', newest(steps) / 'leaves', dirs_exist_ok=True
  )


def unfinished(steps, outside):
  shutil.copytree(newest(steps), steps / '.9.0123456789abcde.tmp')


_STEPS = {
  'renamed to 1000': renamed('1000'),
  'renamed to 9': renamed('9'),
  'set aside though whole': renamed('8.corrupt'),
  'beside a file of a step': beside('9'),
  'beside a link of a step': beside('9', 'link'),
  'beside 045': beside('045', 'folder'),
  'beside another script': beside('٤٥', 'folder'),
  'beside another script, a file': beside('٤٥'),
  'beside an empty step': beside('9', 'folder'),
  'beside an unfinished one': unfinished,
  'lost': lose_all,
  'without its steps': lose_the_steps,
  'without its newest step': lose_the_newest,
  'a file instead': a_file_instead,
  'a link instead': a_link_instead,
  'newest damaged, its place aside taken': aside_is_taken,
  'all damaged': all_damaged,
  'unreadable': unreadable,
  'read-only': read_only,
  'newest unreadable': newest_unreadable,
  'arrays of the newest unreadable': newest_arrays_unreadable,
  'newest read-only': newest_read_only,
}
_TWO_STEPS = {
  'manifest of an older step': manifest_of_an_older_step,
  'arrays of an older step': arrays_of_an_older_step,
}


def at(place: pathlib.PurePath, damage) -> Callable:
  """A damage to what is at a place in the run's folder."""
  return lambda run, outside: damage(run / place, outside)


def swap(place: pathlib.PurePath, other: pathlib.Path) -> Callable:
  """What another seed's run has there instead."""

  def damage(run, outside):
    shutil.rmtree(run / place, ignore_errors=True)
    shutil.copytree(other / place, run / place)

  return damage


def trap(name: str) -> Callable:
  """A link at a name that a writer might use for a moment."""

  def damage(run, outside):
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / 'sentinel')

  return damage


def cases(run: Run) -> list[Case]:
  """All damages to a kind of run."""
  found = []
  files = sorted(p for p in run.folder.rglob('*') if p.is_file())
  seen = set()
  for path in files:
    place = path.relative_to(run.folder)
    if place.parts[0] not in _OURS or place.name == '.lock':
      continue
    # One segment of rows and one step of each folder stand for all.
    alike = tuple(p.split('_0000')[0] for p in place.parts if not p.isdecimal())
    if alike in seen:
      continue
    seen.add(alike)
    steps = next((i for i, p in enumerate(place.parts) if p.isdecimal()), 0)
    if steps:
      above = newest(run.folder / pathlib.Path(*place.parts[:steps]))
      place = above.joinpath(*place.parts[steps + 1 :]).relative_to(run.folder)
      if not (run.folder / place).exists():
        continue
    damages = [*_ANY]
    damages += _JSON if path.suffix == '.json' else ()
    damages += _CSV if path.suffix == '.csv' else ()
    for damage in damages:
      found.append(Case(f'{place} {damage.__name__}', at(place, damage)))
  steps = {p.parents[1] for p in files if p.name == integrity.MANIFEST}
  for path in sorted(steps):
    place = path.relative_to(run.folder)
    damages = _STEPS | (_TWO_STEPS if len(list(path.iterdir())) > 1 else {})
    for name, damage in damages.items():
      found.append(Case(f'{place} {name}', at(place, damage)))
    if run.other is not None:
      one = swap(place, run.other)
      found.append(Case(f'{place} of another seed', one, 'another run'))
  found.append(Case('. read-only', at(pathlib.PurePath(), read_only)))
  for name in ('metrics.csv.tmp', 'config.json.tmp', '.lock', 'play.csv.tmp'):
    found.append(Case(f'{name} is a link', trap(name)))
  if (run.folder / 'replay').exists():
    for name in (
      'lost', 'a file instead', 'a link instead', 'unreadable', 'read-only',
    ):  # fmt: skip
      place = pathlib.PurePath('replay')
      found.append(Case(f'replay {name}', at(place, _STEPS[name])))
  return found


_OURS = (
  'config.json', 'metrics.csv', 'statistics.json', 'checkpoints', 'final',
  'best', 'replay', 'programs', 'agent', 'vocabulary.json', 'random',
  'stored.json',
)  # fmt: skip


# What comes of them.


class _Hang(BaseException):
  pass


def _alarm(*_):
  raise _Hang


def same(got: Any, want: Any) -> bool:
  """Whether two results are equal to the last bit."""
  if isinstance(want, list | tuple):
    return len(got) == len(want) and all(map(same, got, want))
  if isinstance(want, np.ndarray):
    return np.array_equal(got, want, equal_nan=want.dtype.kind == 'f')
  return got == want or (got != got and want != want)


def tried(run: Run, case: Case, root: pathlib.Path) -> Ending:
  """Damages a copy of a run and gives its command again."""
  copy, outside = root / 'copy', root / 'outside'
  shutil.copytree(run.folder, copy)
  outside.mkdir()
  (outside / 'sentinel').write_text('as it was')
  case.damage(copy, outside)
  before = _listing(outside)
  out = io.StringIO()
  signal.signal(signal.SIGALRM, _alarm)
  signal.alarm(_SECONDS)
  try:
    with (
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(out),
      without_privileges(),
    ):
      got = run.resume(copy)
    ending = Ending('equal', out.getvalue())
    # A table has no sums of its own: what is said of it is not silent.
    told_of_rows = 'metrics.csv is not what it was' in out.getvalue()
    if not same(*((got[0], run.want[0]) if told_of_rows else (got, run.want))):
      ending = Ending('other numbers', out.getvalue())
  except configs.UserError as error:
    try:
      with contextlib.redirect_stderr(out):
        configs.fail(str(error))
    except SystemExit:
      ending = Ending('refused', out.getvalue().splitlines()[-1])
  except _Hang:
    ending = Ending('hang', traceback.format_exc())
  except Exception:
    ending = Ending('traceback', traceback.format_exc())
  finally:
    signal.alarm(0)
  if _listing(outside) != before:
    ending = Ending('written outside', ending.told)
  if '\x1b' in ending.told:
    ending = Ending('escape sequence', ascii(ending.told))
  for path in [copy, *copy.rglob('*')]:
    if path.is_dir() and not path.is_symlink():
      path.chmod(0o700)
  shutil.rmtree(copy)
  shutil.rmtree(outside)
  return ending


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
  """Permissions count for root, too, in this thread and those it starts."""
  libc = ctypes.CDLL(None)
  # Version 3 of Linux's capabilities, of this thread; two words of three sets.
  header = (ctypes.c_uint32 * 2)(0x20080522, 0)
  sets = (ctypes.c_uint32 * 6)()
  if os.geteuid() or libc.capget(header, sets):
    yield
    return
  fewer = (ctypes.c_uint32 * 6)(*sets)
  fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
  assert not libc.capset(header, fewer)
  try:
    yield
  finally:
    libc.capset(header, sets)


def _listing(folder: pathlib.Path) -> list[Any]:
  return sorted(
    (str(p), p.read_bytes() if p.is_file() else b'') for p in folder.rglob('*')
  )
