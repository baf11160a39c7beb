"""What a sweep runs: settings from grids and distributions, times seeds."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import build
from experiments.files.errors import UserError
from experiments.runtime import overrides

# All settings are described before the first one runs; rows leave files.
_MAX_SETTINGS = 10_000
_MAX_ROWS = 100_000

_HINT = (
  'should be field=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:A:B'
)


class Row(NamedTuple):
  """One training of a sweep: `setting` is its number in `Plan.settings`."""

  setting: int
  seed: int


class Plan(NamedTuple):
  """A sweep of a preset; None stands for what is the preset's own.

  Attributes:
    fixed: `field=value` of every setting.
    fields: what is swept, in the words of the command line.
    settings: a value for each field, as text.
    logarithmic: fields that were drawn from a logarithmic range.
  """

  preset: str
  agent: str | None
  env: str | None
  steps: int | None
  fixed: tuple[str, ...]
  fields: tuple[str, ...]
  settings: tuple[tuple[str, ...], ...]
  logarithmic: tuple[str, ...] = ()
  dataset: str | None = None

  def assignments(self, setting: int) -> list[str]:
    """`field=value` for what is swept."""
    values = self.settings[setting]
    return [f'{n}={v}' for n, v in zip(self.fields, values)]

  def describe(self, row: Row) -> build.Experiment:
    """The experiment of a row.

    Raises:
      ValueError: see `build.describe`.
    """
    return build.describe(
      self.preset,
      agent=self.agent,
      env=self.env,
      steps=self.steps,
      seed=row.seed,
      settings=[*self.fixed, *self.assignments(row.setting)],
      dataset=self.dataset,
    )

  def arguments(self, row: Row) -> list[str]:
    """Flags of `experiments.train` that train the row alone."""
    names = ('agent', 'env', 'steps', 'dataset')
    named = {name: getattr(self, name) for name in names}
    settings = [*self.fixed, *self.assignments(row.setting)]
    return [
      f'--preset={self.preset}',
      *(f'--{n}={v}' for n, v in named.items() if v is not None),
      *(f'--set={s}' for s in settings),
      f'--seed={row.seed}',
    ]


def make_plan(
  preset: str,
  *,
  agent: str | None = None,
  env: str | None = None,
  steps: int | None = None,
  fixed: Sequence[str] = (),
  grid: Sequence[str] = (),
  random: Sequence[str] = (),
  samples: int = 0,
  seed: int = 0,
  dataset: str | None = None,
) -> Plan:
  """The product of grids and of sampled settings, all of them checked.

  Args:
    grid: `field=value,value`; with semicolons if a value has commas.
    random: `field=log:LOW:HIGH` (log-uniform), `uniform:LOW:HIGH`,
      `int:LOW:HIGH` (both ends in) or `choice:A:B:C`. They are drawn together,
      `samples` times; duplicates are dropped.

  Raises:
    ValueError: one line on what is wrong with which field or value.
  """
  grids = [_read_grid(text) for text in grid]
  ranges = [_read_range(text) for text in random]
  if bool(ranges) != bool(samples):
    raise UserError(
      f'samples={samples}: must be '
      + ('at least 1 for --random' if ranges else '0 without --random')
    )
  names = tuple(name for name, _ in (*grids, *ranges))
  number = math.prod(len(values) for _, values in grids) * max(samples, 1)
  if number > _MAX_SETTINGS:
    raise UserError(
      f'grid: makes {number} settings, must be at most {_MAX_SETTINGS}; take '
      'fewer values, or --random and --samples'
    )
  drawn: list[tuple[str, ...]] = _draw(ranges, samples, seed)
  product = itertools.product(*(values for _, values in grids))
  settings = tuple((*a, *b) for a in product for b in drawn)
  plan = Plan(
    preset=preset,
    agent=agent,
    env=env,
    steps=steps,
    fixed=tuple(fixed),
    fields=names,
    settings=settings,
    logarithmic=tuple(
      text.partition('=')[0].strip() for text in random if '=log:' in text
    ),
    dataset=dataset,
  )
  _check(plan)
  return plan


def _split(text: str, flag: str, hint: str) -> tuple[str, str]:
  name, equals, values = (part.strip() for part in text.partition('='))
  if not (name and equals and values):
    raise UserError(f'--{flag}={text}: {hint}')
  return name, values


def _read_grid(text: str) -> tuple[str, tuple[str, ...]]:
  name, values = _split(text, 'grid', 'should be field=value,value')
  parts = [p.strip() for p in values.split(';' if ';' in values else ',')]
  if not all(parts):
    raise UserError(
      f'--grid={text}: should be field=value,value; one of them is empty'
    )
  return name, tuple(parts)


def _read_range(text: str) -> tuple[str, Callable[[Any], str]]:
  """The field, and what draws a value of it from a numpy generator."""
  name, values = _split(text, 'random', _HINT)
  kind, *parts = values.split(':')
  if kind == 'choice' and parts:
    return name, lambda rng: parts[rng.integers(len(parts))]
  try:
    low, high = (float(p) for p in parts)
  except ValueError:
    raise UserError(f'--random={text}: {_HINT}') from None
  if not (low < high and math.isfinite(high - low)):
    raise UserError(f'--random={text}: {low:g} must be below {high:g}')
  if kind == 'uniform':
    return name, lambda rng: f'{rng.uniform(low, high):.6g}'
  if kind == 'log':
    if low <= 0:
      raise UserError(f'--random={text}: {low:g} must be above 0')
    ends = math.log(low), math.log(high)
    return name, lambda rng: f'{math.exp(rng.uniform(*ends)):.6g}'
  if kind == 'int':
    if not (low.is_integer() and high.is_integer()):
      raise UserError(f'--random={text}: both ends must be whole numbers')
    return name, lambda rng: str(rng.integers(int(low), int(high) + 1))
  raise UserError(f'--random={text}: {_HINT}')


def _draw(ranges, samples, seed) -> list[tuple[str, ...]]:
  import numpy as np

  if not ranges:
    return [()]
  drawn = []
  for i in range(samples):
    # More samples begin with the same samples.
    rng = np.random.default_rng([seed, i])
    drawn.append(tuple(draw(rng) for _, draw in ranges))
  return list(dict.fromkeys(drawn))


def _check(plan: Plan) -> None:
  found: dict[str, int] = {}
  for i in range(len(plan.settings)):
    experiment = plan.describe(Row(i, 0))
    if i == 0:
      paths = [find_path(experiment, name) for name in plan.fields]
      for name, path in zip(plan.fields, paths):
        fixed = [find_path(experiment, s.split('=')[0]) for s in plan.fixed]
        if paths.count(path) > 1 or path in fixed:
          raise UserError(f'{name}: is set or swept twice')
    before = found.setdefault(repr(experiment), i)
    if before != i:
      one, other = (' '.join(plan.assignments(n)) for n in (before, i))
      raise UserError(
        f'{one} and {other} are the same setting (a field that follows from '
        'another cannot be swept)'
      )


_SECTIONS = {'agent': 'config', 'env': 'env', 'run': 'run'}


def find_path(experiment: build.Experiment, name: str) -> str:
  """The whole path of a field that exists, `agent.search.num_simulations`."""
  known = [tuple(path.split('.')) for path in _paths(experiment)]
  return '.'.join(overrides.matching(known, tuple(name.split('.')))[0])


def _paths(experiment):
  def inside(config, prefix):
    for field in dataclasses.fields(config):
      value = getattr(config, field.name)
      if dataclasses.is_dataclass(value):
        yield from inside(value, f'{prefix}{field.name}.')
      else:
        yield prefix + field.name

  for section, attribute in _SECTIONS.items():
    yield from inside(getattr(experiment, attribute), f'{section}.')


def get(experiment: build.Experiment, path: str) -> Any:
  """The value of a field, by its whole path."""
  section, *names = path.split('.')
  value = getattr(experiment, _SECTIONS[section])
  for name in names:
    value = getattr(value, name)
  return value


def put(experiment: build.Experiment, path: str, value: Any):
  """The experiment with another value, which may be traced, of a field.

  Ranges are not checked: values were, when they were concrete.
  """
  section, *names = path.split('.')
  attribute = _SECTIONS[section]
  config = _replaced(getattr(experiment, attribute), names, value)
  return experiment._replace(**{attribute: config})


def _replaced(config, names, value):
  first, *rest = names
  if rest:
    value = _replaced(getattr(config, first), rest, value)
  fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  # Past `__post_init__`, which compares.
  copy = object.__new__(type(config))
  for name, old in (fields | {first: value}).items():
    object.__setattr__(copy, name, old)
  return copy


def rows(plan: Plan, seeds: int) -> list[Row]:
  """All rows of a plan with seeds 0, 1, ...

  Raises:
    UserError: too many.
  """
  if len(plan.settings) * seeds > _MAX_ROWS:
    raise UserError(
      f'seeds={seeds}: makes {len(plan.settings) * seeds} rows, must be at '
      f'most {_MAX_ROWS}'
    )
  numbers = range(len(plan.settings))
  return [Row(i, seed) for i in numbers for seed in range(seeds)]
