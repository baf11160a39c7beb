"""The theory of online play, exact: the book's worked examples, one by one.

python -m experiments.study newton --out=experiments/results

Bertsekas 2022, "Lessons from AlphaZero for optimal, model predictive, and
adaptive control": one-step lookahead is a step of Newton's method for Bellman's
equation (`search.exact.bellman`; linear systems are in `search.exact.riccati`,
the others in `search.exact.examples`). Prints the book's numbers next to those
computed here, writes them as newton_examples.csv, and draws newton_step.png and
newton_uses.png (`newton_figures`).
"""

import pathlib
from collections.abc import Sequence

from experiments.files import tables, writing
from experiments.report import terminal
from experiments.runtime import config as configs


def _text(values: Sequence[float], digits: int) -> str:
  return ' '.join(f'{x:.{digits}g}' for x in values)


def define_flags() -> None:
  """The flags of `python -m experiments.study newton`."""
  from absl import flags

  flags.DEFINE_string(
    'out', 'experiments/results', 'the folder for CSV and figures'
  )


def main() -> None:
  """Computes, prints, writes and draws."""
  import jax
  from absl import flags

  from experiments.studies import newton_examples, newton_figures

  out = pathlib.Path(flags.FLAGS.out)
  configs.check_place('out', out, folder=True)
  with writing.writing(out):
    out.mkdir(parents=True, exist_ok=True)
  terminal.begin("Bellman's operator and Newton's step: the book's examples")
  with jax.enable_x64(True):
    rows = newton_examples.examine()
    terminal.print_table(
      ('item', 'what', 'printed or claimed', 'ours', 'agree'),
      [(*row[:3], _text(row.ours, 6), row.agree) for row in rows],
      left=5,
    )
    lines = [row._replace(ours=_text(row.ours, 10)) for row in rows]
    tables.write_records(out / 'newton_examples.csv', lines)
    newton_figures.draw(out)
  terminal.end(
    f'{out}/newton_examples.csv, newton_step.png, newton_uses.png',
    'python -m experiments.train --preset=alphazero_connect_four',
  )
