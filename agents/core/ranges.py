"""Ranges of hyper-parameters, refused where a `Config` is made.

Under a sweep's vmap a field may be a tracer, which has no value to check: its
numbers were checked when they were concrete.
"""

import math
from typing import Any, get_args


def at_least(config: Any, low: float, *names: str) -> None:
  """Refuses fields that are not finite and `low` or more.

  Args:
    config: whose fields they are.
    low: the least value; for a field that is a tuple, of each of its numbers.
    names: of the fields.

  Raises:
    ValueError: names the field, its value and the range.
  """
  _check(config, names, lambda x: low <= x < math.inf, f'{low} or more')


def above(config: Any, low: float, *names: str, finite: bool = True) -> None:
  """Refuses fields that are not greater than `low`.

  Args:
    config: whose fields they are.
    low: what they must be greater than.
    names: of the fields.
    finite: whether infinity is refused too.

  Raises:
    ValueError: names the field, its value and the range.
  """
  high = math.inf if finite else math.nan
  is_right = lambda x: x > low and x != high
  _check(config, names, is_right, f'above {low}')


def within(
  config: Any, low: float, high: float, *names: str, ends: str = '[]'
) -> None:
  """Refuses fields outside an interval.

  Args:
    config: whose fields they are.
    low: its lower end.
    high: its upper end.
    names: of the fields.
    ends: `[` or `(`, whether the lower end is in it, and `]` or `)`.

  Raises:
    ValueError: names the field, its value and the range.
  """
  is_inside = lambda x: (
    (low < x < high)
    or (x == low and ends[0] == '[')
    or (x == high and ends[1] == ']')
  )
  _check(config, names, is_inside, f'within {ends[0]}{low}, {high}{ends[1]}')


def finite(config: Any, *names: str) -> None:
  """Refuses fields that are infinite or NaN; None passes.

  Args:
    config: whose fields they are.
    names: of the fields.

  Raises:
    ValueError: names the field and its value.
  """
  _check(config, names, math.isfinite, 'finite')


def one_of(config: Any, *names: str) -> None:
  """Refuses fields that are not among the choices of their `Literal`.

  Args:
    config: whose fields they are.
    names: of the fields.

  Raises:
    ValueError: names the field, its value and the choices.
  """
  for name in names:
    value = getattr(config, name)
    choices = get_args(type(config).__annotations__[name])
    if value not in choices:
      known = ' or '.join(map(str, choices))
      raise ValueError(f'{name}={value}: must be {known}')


def _check(config, names, is_right, range_):
  for name in names:
    value = getattr(config, name)
    is_many = isinstance(value, tuple)
    for x in value if is_many else (value,):
      if isinstance(x, int | float) and not is_right(x):
        finite = 'finite and ' if math.isinf(x) and x > 0 else ''
        each = ' each' if is_many else ''
        raise ValueError(f'{name}={value}: must be {finite}{range_}{each}')
