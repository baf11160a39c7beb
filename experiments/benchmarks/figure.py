"""Draws what `experiments.benchmarks.scale` measured."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import Measurement
from experiments.report import style


def scale_figure(rows: Sequence[Measurement], path: Any) -> None:
  """Speed-up, memory, devices and the roofline, a panel each."""
  on_cpu = jax.default_backend() == 'cpu'
  canvas, panels = style.panels(2, 5.2, 3.8, rows=2)
  (speed, memory), (devices, roof) = panels
  a_second = 'CPU second' if on_cpu else 'second'
  ratio = lambda row: row.ratio_cpu if on_cpu else row.ratio
  many = [r for r in rows if r.name[0].isdigit()]
  seeds = [r for r in many if r.unit == 'updates/s']
  _lines(speed, seeds, ratio, lambda row: row.setting)
  speed.axhline(1, color='black', lw=0.8, ls='--')
  _label(
    speed, 'seeds in one program', f'updates a {a_second} / those of one seed'
  )
  used = [r for r in many if r.what == 'memory']
  kind = lambda row: f'{row.setting.split()[0]}, {row.name.split(", ")[1]}'
  _lines(memory, used, lambda row: row.median, kind)
  memory.set_yscale('log')
  _label(memory, 'seeds in one program', 'MB a seed')
  shared = [r for r in rows if r.what == 'devices']
  _lines(devices, shared, ratio, lambda row: row.setting)
  _label(
    devices,
    'virtual devices of one CPU: overhead only' if on_cpu else 'devices',
    f'batches a {a_second} / those of one device',
  )
  _roofline(roof, [r for r in rows if r.what == 'roofline'])
  style.save(canvas, path)


def _label(axes, x: str, y: str) -> None:
  axes.set(xlabel=x, ylabel=y)
  if axes.lines:
    style.legend(axes, fontsize='x-small')


def _lines(axes, rows, y: Callable, label: Callable) -> None:
  """One line for each label, over the number that a row's name begins with."""
  groups: dict[str, list[tuple[int, float]]] = {}
  for row in rows:
    point = (int(row.name.split()[0]), y(row))
    groups.setdefault(label(row), []).append(point)
  for name, points in groups.items():
    axes.plot(*zip(*points), marker='o', ms=4, label=name)
  if groups:
    axes.set_xscale('log', base=2)
    ticks = sorted({x for points in groups.values() for x, _ in points})
    axes.set_xticks(ticks, map(str, ticks))


def _roofline(axes, rows: Sequence[Measurement]) -> None:
  """FLOP/s over FLOP a byte, by wall second."""
  roofs: dict[str, list[float]] = {}
  for row in rows:
    if row.name.startswith(('matrix', 'triad')):
      # The first of several measurements in one setting stands for all.
      roofs.setdefault(row.setting, []).append(row.median)
  moved = {(r.name, r.setting): r.median for r in rows if r.unit == 'GB/s'}
  points: dict[str, list[tuple[float, float]]] = {}
  for row in rows:
    if row.unit == 'GFLOP/s' and (row.name, row.setting) in moved:
      intensity = row.median / moved[row.name, row.setting]
      case = row.name.partition(',')[0]
      points.setdefault(case, []).append((intensity, row.median))
  xs = [x for group in points.values() for x, _ in group]
  roofs = {name: of for name, of in roofs.items() if len(of) > 1}
  last = 4 * max([*xs, *(of[0] / of[1] for of in roofs.values())])
  ends = np.geomspace(min(xs) / 4, last, 500)
  for (setting, (peak, bandwidth, *_)), line in zip(roofs.items(), ('-', ':')):
    height = np.minimum(peak, ends * bandwidth)
    axes.plot(ends, height, line, color='black', lw=1, label=setting)
  for name, group in points.items():
    axes.plot(*zip(*group), 'o', ms=4, label=name)
  axes.set(xscale='log', yscale='log')
  _label(axes, 'FLOP a byte', 'GFLOP a second')
