"""What experts of a language model specialise in, and how evenly they worked.

  python -m experiments.study specialisation --workdir=runs/language

Routes the held-out text through a trained mixture and counts which expert gets
which token. Prints the tokens that prefer each expert; draws the experts'
shares of the most frequent tokens, and of training if the run kept them
(`--set=log_experts=true`); writes the shares as CSV next to the figure.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments import build
from experiments.build import corpus as corpus_lib
from experiments.build import saved
from experiments.files import tables
from experiments.files.errors import UserError
from experiments.report import style, terminal
from experiments.runtime import config as configs

_FEW = 5  # occurrences below which a token characterises no expert


class Shares(NamedTuple):
  """Which expert gets which token.

  Attributes:
    counts: float64 `[E, V]`, pairs of expert and token.
    words: of the V tokens.
  """

  counts: np.ndarray
  words: tuple[str, ...]


def information(counts: np.ndarray) -> float:
  """Mutual information of expert and token over the entropy of experts.

  From 0, if tokens say nothing about their experts, to 1. Counts are `[E, V]`.
  """
  from scipy import stats

  joint = counts / counts.sum()
  expert, token = joint.sum(1), joint.sum(0)
  mutual = stats.entropy(joint.ravel(), np.outer(expert, token).ravel())
  entropy = stats.entropy(expert)
  return float(mutual / entropy) if entropy else 0.0


def characteristic(shares: Shares, number: int) -> list[list[str]]:
  """For each expert, the tokens with the largest shares at it."""
  total = shares.counts.sum(0)
  known = np.where(total >= _FEW, shares.counts / np.maximum(total, 1), -1)
  best = np.argsort(-known, axis=1, kind='stable')[:, :number]
  return [
    [shares.words[v] for v in row if known[e, v] > 0]
    for e, row in enumerate(best)
  ]


def route(workdir: str, checkpoint: str, layer: int) -> Shares:
  """Routes a run's held-out text.

  Raises:
    UserError: the run has no mixture, no such checkpoint or no such layer.
  """
  import jax

  from networks.routing import ByToken

  experiment = saved.load_experiment(workdir)
  if experiment.material.plays:
    raise UserError(f'workdir={workdir}: is not a run of a language model')
  corpus = corpus_lib.opened(experiment)
  spec = corpus_lib.spec_of(corpus.name, corpus.vocabulary)
  agent = build.make_agent(experiment, spec)
  networks = build.make_networks(experiment, spec)
  params = saved.load_params(workdir, agent, [checkpoint])[checkpoint]
  plans = jax.jit(networks.plans)
  windows = corpus_lib.held_out(experiment, corpus)[..., :-1]
  experts = experiment.config.network.moe.num_experts
  counts = np.zeros((experts + 1, corpus.vocabulary.size))
  for tokens in windows:
    found = plans(*params, tokens)
    if layer >= len(found) or not isinstance(found[layer], ByToken):
      raise UserError(
        f'layer={layer}: {workdir} has {len(found)} mixtures whose tokens '
        'have experts'
      )
    # Pairs without an expert have number E.
    chosen = np.asarray(found[layer].expert)
    np.add.at(counts, (chosen, tokens.reshape(-1, 1)), 1)
  words = [f'<{i}>' for i in range(256)] + list(corpus.vocabulary.words)
  printable = [chr(i) if 32 < i < 127 else words[i] for i in range(256)]
  return Shares(counts[:experts], (*printable, *words[256:]))


def through_training(workdir: str, layer: int) -> np.ndarray | None:
  """Steps and experts' shares `[n, 1 + E]` of metrics.csv; None if not kept."""
  columns, rows = tables.read_csv(pathlib.Path(workdir) / 'metrics.csv')
  names = [n for n in columns if n.startswith(('load_', f'layer{layer}_load_'))]
  if not names:
    return None
  values = np.array([[float(r[n]) for n in ('step', *names)] for r in rows])
  values[:, 1:] /= values[:, 1:].sum(1, keepdims=True)
  return values


def write(path: pathlib.Path, shares: Shares, number: int) -> None:
  """Writes the most frequent tokens and their experts as CSV."""
  lines: list[list[Any]] = [
    ['token', 'count', *(f'expert_{e}' for e in range(len(shares.counts)))]
  ]
  for v in _frequent(shares, number):
    column = shares.counts[:, v]
    row = [float(x) for x in column / column.sum()]
    lines.append([repr(shares.words[v]), int(column.sum()), *row])
  tables.write_lines(path, lines, digits=4)


def _frequent(shares, number):
  return np.argsort(-shares.counts.sum(0), kind='stable')[:number]


def draw(path: pathlib.Path, shares: Shares, history: Any, number: int) -> None:
  """Two panels: where frequent tokens go; experts' shares through training."""
  most = _frequent(shares, number)
  table = shares.counts[:, most] / shares.counts[:, most].sum(0)
  figure, ((axes, *others),) = style.panels(1 + (history is not None), 8, 6)
  # Experts in the order of the tokens that they take most of.
  order = np.argsort(table.argmax(1), kind='stable')
  image = axes.imshow(table[order], aspect='auto', cmap='viridis')
  figure.colorbar(image, ax=axes, label="share of a token's places")
  labels = [shares.words[v].replace('\n', '\\n') or ' ' for v in most]
  axes.set_xticks(range(len(most)), labels, rotation=90, fontsize=7)
  style.label(axes, 'specialisation by token, held-out text', y='expert')
  if history is not None:
    even = 1 / (history.shape[1] - 1)
    others[0].plot(history[:, 0], history[:, 1:], lw=0.8)
    others[0].axhline(even, color='black', ls='--', lw=1)
    title = 'utilisation over time (dashed: even)'
    style.label(others[0], title, 'updates', "experts' shares of the work")
  style.save(figure, path, dpi=110, grid='')


def define_flags() -> None:
  """The flags of `python -m experiments.study specialisation`."""
  from absl import flags

  flags.DEFINE_string('workdir', None, "a run's folder", required=True)
  flags.DEFINE_string('checkpoint', 'final', 'the checkpoint: final or best')
  flags.DEFINE_integer('layer', 0, 'number of the mixture, from 0', 0, 10_000)
  flags.DEFINE_integer(
    'tokens',
    48,
    'number of tokens that are drawn, the most frequent ones',
    1,
    1_000_000,
  )
  flags.DEFINE_string(
    'out', 'specialisation.png', 'the figure; the CSV has the same name'
  )


def main() -> None:
  """Measures, prints and draws."""
  from absl import flags

  values = flags.FLAGS
  style.check_picture(values.out)
  terminal.begin(f'which tokens the experts of {values.workdir} take')
  with configs.user_errors():
    shares = route(values.workdir, values.checkpoint, values.layer)
    history = through_training(values.workdir, values.layer)
  for e, words in enumerate(characteristic(shares, 8)):
    share = shares.counts[e].sum() / shares.counts.sum()
    terminal.say(f'expert {e:3d} ({share:6.1%}): {" ".join(map(repr, words))}')
  known = information(shares.counts)
  print(f'tokens explain {known:.0%} of the choice of experts')
  out = pathlib.Path(values.out)
  draw(out, shares, history, values.tokens)
  write(out.with_suffix('.csv'), shares, values.tokens)
  terminal.end(
    f'{out}, {out.with_suffix(".csv")}',
    f"python -m experiments.play --workdir={values.workdir} --prompt='The '",
  )
