"""Colours, sizes and the saving of figures: the one place that decides them."""

import pathlib
from typing import Any

from experiments.files import writing
from experiments.runtime import config as configs

BLUE, ORANGE, GREEN, RED = '#1b4f8f', '#e08a1e', '#3a8f4d', '#b5353a'
COLOURS = (BLUE, ORANGE, GREEN, RED, '#7a5aa6', '#5f6b73')
GREY, PALE, _GRID = '#888888', '#9aa5ad', '#dddddd'
CHECKPOINT_COLOURS = {'final': BLUE, 'early': ORANGE, 'best': GREEN}


def colour(number: int) -> str:
  """The colour of the line with this number; they repeat."""
  return COLOURS[number % len(COLOURS)]


def figure(width: float, height: float) -> Any:
  """A matplotlib figure of a width and a height in inches."""
  # Not pyplot: its figures are global state.
  from matplotlib.figure import Figure

  return Figure((width, height), layout='constrained')


def panels(
  columns: int, width: float, height: float, rows: int = 1, **options: Any
) -> tuple[Any, Any]:
  """A figure of panels whose lines take `COLOURS` in turn.

  Width and height are one panel's, in inches; `options` are `Figure.subplots`'.
  The axes are an array `[rows, columns]`.
  """
  import matplotlib
  from matplotlib.rcsetup import cycler

  drawn = figure(columns * width, rows * height)
  cycle = cycler(color=COLOURS)
  with matplotlib.rc_context({'axes.prop_cycle': cycle}):
    return drawn, drawn.subplots(rows, columns, squeeze=False, **options)


def label(axes: Any, title: str = '', x: str = '', y: str = '') -> None:
  """Writes a title above a panel and names its axes."""
  axes.set_title(title, fontsize=11)
  axes.set(xlabel=x, ylabel=y)


def legend(axes: Any, below: bool = False, **options: Any) -> None:
  """Adds a legend without a frame, perhaps below, where it hides no line."""
  place = {'ncols': 2, 'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.14)}
  axes.legend(
    **{'frameon': False, 'fontsize': 8.5} | (place if below else {}) | options
  )


def save(figure: Any, path: Any, dpi: int = 160, grid: str = 'y') -> None:
  """Writes a figure in the house style: no box, a pale grid.

  The suffix is the format; `grid` is `x`, `y`, `both`, or '' for none.

  Raises:
    UserError: see `writing.write_figure`.
  """
  for axes in figure.axes:
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
      axes.grid(axis=grid, color=_GRID, lw=0.7)
  writing.write_figure(figure, path, dpi)


def check_picture(path: Any) -> None:
  """Refuses a name that no picture can be written to.

  Raises:
    UserError: see `configs.check_place`; a suffix of no picture format.
  """
  from matplotlib.backend_bases import FigureCanvasBase

  configs.check_place('out', path)
  known = FigureCanvasBase.get_supported_filetypes()
  if pathlib.Path(path).suffix[1:].lower() not in known:
    raise configs.UserError(
      f'out={path}: must end in one of .{", .".join(sorted(known))}'
    )
