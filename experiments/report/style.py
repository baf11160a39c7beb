"""Colours, sizes and the saving of figures."""

import pathlib
from typing import Any

from experiments.files import writing
from experiments.files.errors import UserError
from experiments.report.runs import Path
from experiments.runtime import config as configs

BLUE, ORANGE = '#1b4f8f', '#e08a1e'
COLOURS = (BLUE, ORANGE, '#3a8f4d', '#b5353a', '#7a5aa6', '#5f6b73')
CHECKPOINT_COLOURS = {'final': BLUE, 'early': ORANGE, 'best': COLOURS[2]}


def figure(width: float, height: float) -> Any:
  """A matplotlib figure of a width and a height in inches."""
  # Not pyplot: its figures are global state.
  from matplotlib.figure import Figure

  return Figure((width, height), layout='constrained')


def save(figure: Any, path: Path) -> None:
  """Writes a figure in the house style: no box, a pale grid."""
  for axes in figure.axes:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='#dddddd', lw=0.7)
    axes.set_axisbelow(True)
  writing.write_figure(figure, path)


def check_picture(path: Path) -> None:
  """Refuses a name that no picture can be written to.

  Raises:
    UserError: see `configs.check_place`; a suffix that is no picture's.
  """
  from matplotlib.backend_bases import FigureCanvasBase

  configs.check_place('out', path)
  known = FigureCanvasBase.get_supported_filetypes()
  if pathlib.Path(path).suffix[1:].lower() not in known:
    raise UserError(
      f'out={path}: must end in one of .{", .".join(sorted(known))}'
    )
