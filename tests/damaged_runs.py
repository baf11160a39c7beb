"""Whole run folders of every kind, all damages to them, what comes of it.

A run is made once, stopped on its way; each case damages a copy of its folder
and gives the same command again. It must end with one line, or with the very
parameters and metrics of the run that nobody has touched.
"""

import contextlib
import csv
import ctypes
import functools
import io
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
from damages import (
  ANY,
  CSV,
  JSON,
  STEPS,
  TWO_STEPS,
  at,
  newest,
  read_only,
  swap,
  trap,
)

from experiments import build
from experiments.build import saved
from experiments.data import npz
from experiments.runtime import config as configs
from experiments.runtime import integrity, loop, mesh, signals, updates
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
  from test_text import make_text
  from test_text_runs import SETTINGS

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
        update = updates.compiled(stage.agent)
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
    damages = [*ANY]
    damages += JSON if path.suffix == '.json' else ()
    damages += CSV if path.suffix == '.csv' else ()
    for damage in damages:
      found.append(Case(f'{place} {damage.__name__}', at(place, damage)))
  steps = {p.parents[1] for p in files if p.name == integrity.MANIFEST}
  for path in sorted(steps):
    place = path.relative_to(run.folder)
    damages = STEPS | (TWO_STEPS if len(list(path.iterdir())) > 1 else {})
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
      found.append(Case(f'replay {name}', at(place, STEPS[name])))
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
