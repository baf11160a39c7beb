"""Plays ATAC's game in random MDPs: its guarantee, and the choice of beta.

python -m experiments.study atac_game --out=experiments/results/atac_game.csv

`search.exact.offline_game` has the theory. Writes the CSV of --out (a line for
each MDP, coverage, pessimism, oracle and beta), a figure, .png, and
_selection.csv (how good rules are that choose beta from data; see
`atac_game_selection`).
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.files import tables
from experiments.files.errors import UserError
from experiments.report import style, terminal
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks
from experiments.runtime.devices import use_compilation_cache
from experiments.studies import atac_game_selection
from experiments.studies.atac_game_selection import BETAS, COVERAGE

# `1 / (1 - g)`; rewards are within [0, 1].
VALUE_MAX = 10.0
ORACLES = ('exponentiated_weights', 'projected_gradient')
PESSIMISM = ('relative', 'initial')
_COLOURS = {'relative': style.BLUE, 'initial': style.ORANGE}
_LINES = {'full': ('-', 'o'), 'partial': ('--', 's')}
_RULES = {
  'fqe': style.RED,
  'fqe - sd': style.ORANGE,
  'gain - sd': style.BLUE,
  'held-out': style.GREEN,
}


class Play(NamedTuple):
  """One play of the game: a line of the CSV. J are discounted returns.

  Attributes:
    coverage: of the behaviour policy mu: `full`, or `partial`, if it never
      takes one action of each state.
    pessimism: `relative`, or `initial` (ATAC_0).
    oracle: the actor's, see `search.exact.offline_game`.
    beta: weight of the Bellman error.
    mixture: J of the result.
    last: J of the last policy.
    behaviour: J of mu.
    optimum: J*.
    gain: `(mixture - behaviour) / (optimum - behaviour)`.
    regret: towards mu, over K, measured.
    bound: of the regret, the oracle's.
    slack: `mixture - behaviour + regret / (1 - g)`; guaranteed not to be
      negative if the pessimism is relative.
    identity_error: largest error of the performance difference.
    gap: largest distance of a critic from its minimum.
    num_q: critics that were worse than Q of the policy, which replaced them.
  """

  mdp: int
  coverage: str
  pessimism: str
  oracle: str
  beta: float
  mixture: float
  last: float
  behaviour: float
  optimum: float
  gain: float
  regret: float
  bound: float
  slack: float
  identity_error: float
  gap: float
  num_q: int


def play_all(
  *, mdps: int, states: int, actions: int, iterations: int, seed: int
) -> list[Play]:
  """Plays all games in float64, each oracle and pessimism as one program.

  There are at least 3 actions; `iterations` are K of each play.
  """
  import jax
  import jax.numpy as jnp

  from search.exact import offline_game

  rows = []
  with jax.enable_x64(True):
    drawn, behaviours = atac_game_selection.draw_mdps(
      jax.random.key(seed), mdps, states, actions, VALUE_MAX
    )
    for name in ORACLES:
      oracle = getattr(offline_game, name)(actions, VALUE_MAX, iterations)
      for pessimism in PESSIMISM:
        play = _compiled(oracle, pessimism, iterations)
        found = play(drawn, behaviours, jnp.asarray(BETAS))
        outcome, optimum = jax.tree.map(np.asarray, found)
        rows += _rows(outcome, optimum, pessimism, name, oracle.bound)
        print(f'{mdps} MDPs, {name}, {pessimism} pessimism', flush=True)
  return rows


def _compiled(oracle: Any, pessimism: str, iterations: int) -> Any:
  """`(MDPs, mu, betas) -> (Outcome, J*)`, fields `[M, coverages, betas]`."""
  import jax

  from search.exact import bellman, offline_game

  def one(mdp, mu, beta):
    of_mu = offline_game.population(mdp, mu, VALUE_MAX)
    played = offline_game.play(of_mu, oracle, beta, iterations, pessimism)
    optimum = bellman.optimal(mdp)[1] @ mdp.initial
    return offline_game.assess(of_mu, played), optimum

  over_betas = jax.vmap(one, (None, None, 0))
  both = jax.vmap(over_betas, (None, 0, None))
  return jax.jit(jax.vmap(both, (0, 0, None)))


def _rows(
  outcome: Any, optimum: np.ndarray, pessimism: str, oracle: str, bound: float
) -> Iterable[Play]:
  for where in np.ndindex(optimum.shape):
    found = {n: field[where].item() for n, field in outcome._asdict().items()}
    best = optimum[where].item()
    mdp, coverage, beta = where
    over_mu = best - found['behaviour']
    yield Play(
      mdp=mdp,
      coverage=COVERAGE[coverage],
      pessimism=pessimism,
      oracle=oracle,
      beta=BETAS[beta],
      optimum=best,
      gain=(found['mixture'] - found['behaviour']) / over_mu,
      bound=bound,
      **found,
    )


def summary(rows: Sequence[Play]) -> str:
  """Compares the rows with the theory, in a few lines."""
  relative = [row for row in rows if row.pessimism == 'relative']
  initial = [row for row in rows if row.pessimism == 'initial']
  least = lambda rows: min(row.slack for row in rows)
  broken = sum(row.slack < 0 for row in initial)
  return '\n'.join(
    [
      f'relative pessimism: least slack {least(relative):.3g} of '
      f'{len(relative)} plays',
      f'initial-state pessimism: least slack {least(initial):.3g}, negative '
      f'in {broken} of {len(initial)} plays',
      f'largest regret / bound {max(r.regret / r.bound for r in rows):.3g}',
      f'largest identity error {max(r.identity_error for r in rows):.2g}, '
      f'gap of a critic {max(r.gap for r in rows):.2g}; '
      f'{sum(r.num_q for r in rows)} critics replaced',
    ]
  )


def figure(
  rows: Sequence[Play],
  chosen: Sequence[atac_game_selection.Choice],
  path: pathlib.Path,
) -> None:
  """Draws gain and slack against beta, and what choosing beta costs.

  The plays are those of exponentiated weights; `chosen` is from
  `atac_game_selection.study`.
  """
  picture, axes = style.panels(3 if chosen else 2, 5, 4.6)
  rows = [row for row in rows if row.oracle == ORACLES[0]]
  gain, slack, *others = axes[0]
  _draw(gain, rows, 'gain', np.mean)
  title, y = 'Gain over the behaviour policy', '(J − J(μ)) / (J* − J(μ)), '
  style.label(gain, title, 'β', f"{y}the MDPs' mean")
  _draw(slack, rows, 'slack', np.min)
  slack.set_yscale('symlog', linthresh=0.01)
  title = 'J(mixture) ≥ J(μ) − Reg / (K (1 − γ))'
  style.label(slack, title, 'β', "slack of the guarantee, the MDPs' least")
  if chosen:
    _draw_selection(others[0], chosen)
  for panel in axes[0]:
    style.legend(panel, below=True)
  style.save(picture, path)


_MARKED = {'ms': 5, 'lw': 1.8}


def _draw(axes: Any, rows: Sequence[Play], field: str, statistic: Any) -> None:
  betas = sorted({row.beta for row in rows})
  axes.axhline(0, color='black', lw=0.9)
  for pessimism, colour in _COLOURS.items():
    for coverage, (stroke, marker) in _LINES.items():
      groups: dict[float, list[float]] = {beta: [] for beta in betas}
      for row in rows:
        if (row.pessimism, row.coverage) == (pessimism, coverage):
          groups[row.beta].append(getattr(row, field))
      values = [statistic(group) for group in groups.values()]
      text = f'{pessimism}, {coverage} coverage'
      line = {'color': colour, 'ls': stroke, 'marker': marker, 'label': text}
      axes.plot(range(len(betas)), values, **line, **_MARKED)
  texts = [f'1/{1 / b:.0f}' if 0 < b < 1 else f'{b:.0f}' for b in betas]
  axes.set_xticks(range(len(betas)), texts)


def _draw_selection(
  axes: Any, chosen: Sequence[atac_game_selection.Choice]
) -> None:
  sizes = sorted({row.transitions for row in chosen})
  rows = {(r.coverage, r.transitions, r.rule): r for r in chosen}
  fixed = {row.rule for row in chosen if row.rule.startswith('beta=')}
  for coverage, (stroke, marker) in _LINES.items():
    regrets = {
      rule: [rows[coverage, n, rule].regret for n in sizes]
      for rule in (*_RULES, *fixed)
    }
    regrets['best fixed beta'] = [
      min(at) for at in zip(*(regrets[rule] for rule in fixed))
    ]
    for rule, colour in (_RULES | {'best fixed beta': style.GREY}).items():
      text = rule.replace('beta', 'β') if coverage == 'full' else None
      line = {'color': colour, 'ls': stroke, 'marker': marker, 'label': text}
      axes.plot(sizes, regrets[rule], **line, **_MARKED)
  axes.set_xscale('log')
  axes.set_xticks(sizes, map(str, sizes))
  axes.minorticks_off()
  axes.set_ylim(bottom=0)
  title = 'Choosing β from data (dashed: partial)'
  y = 'regret / (J* − J(μ)), mean'
  style.label(axes, title, 'transitions in the data set', y)


def define_flags() -> None:
  """The flags of `python -m experiments.study atac_game`."""
  from absl import flags

  flags.DEFINE_string(
    'out',
    'experiments/results/atac_game.csv',
    'the CSV; the other files are named after it',
  )
  flags.DEFINE_integer('mdps', 6, 'random MDPs', 1, 100_000)
  flags.DEFINE_integer('states', 5, 'states of each MDP', 1, 1_000)
  flags.DEFINE_integer(
    'actions', 3, 'actions of each MDP; mu may lack one', 3, 1_000
  )
  flags.DEFINE_integer(
    'iterations', 300, 'iterations of each play', 1, 10_000_000
  )
  flags.DEFINE_integer('seed', 0, 'seed of MDPs and data', 0, configs.MAX_SEED)
  flags.DEFINE_integer(
    'datasets',
    60,
    'MDPs for which beta is chosen from data; 0 for none',
    0,
    100_000,
  )
  flags.DEFINE_list(
    'sizes',
    ['30', '100', '300', '1000'],
    'transitions in each of their data sets',
  )


def _read_sizes(texts: Sequence[str]) -> list[int]:
  try:
    sizes = sorted({int(text) for text in texts})
  except ValueError:
    sizes = []
  if not sizes or sizes[0] < 2:
    raise UserError(
      f'sizes={",".join(texts)}: must be whole numbers, each at least 2'
    )
  return sizes


def main() -> None:
  """Plays as the flags say.

  Raises:
    UserError: the name of the CSV or a size is wrong.
  """
  from absl import flags

  values = flags.FLAGS
  out, sizes = pathlib.Path(values.out), _read_sizes(values.sizes)
  if not values.datasets:
    flag_checks.refuse(['sizes'], 'with --datasets=0')
  if out.suffix != '.csv':
    raise UserError(f'out={out}: must end in .csv')
  configs.check_place('out', out)

  use_compilation_cache()
  out.parent.mkdir(parents=True, exist_ok=True)
  settings: dict[str, Any] = {
    name: getattr(values, name) for name in ('states', 'actions', 'iterations')
  }
  terminal.begin(
    f"ATAC's game in tables: {values.mdps} MDPs of {values.states} states and "
    f'{values.actions} actions, {values.iterations} iterations, '
    f'{len(BETAS)} betas'
  )
  rows = play_all(mdps=values.mdps, seed=values.seed, **settings)
  tables.write_records(out, rows, digits=6)
  print(summary(rows))
  chosen = []
  if values.datasets:
    chosen = atac_game_selection.study(
      values.seed, sizes, mdps=values.datasets, **settings
    )
    selection = out.with_name(f'{out.stem}_selection.csv')
    tables.write_records(selection, chosen, digits=6)
    print(f'results: {selection}')
  figure(rows, chosen, out.with_suffix('.png'))
  terminal.end(
    f'{out}, {out.with_suffix(".png")}',
    'python -m experiments.collect --env=Pendulum-v1 --out=data/pendulum',
    'python -m experiments.train --preset=atac_small '
    '--dataset=data/pendulum/medium',
  )
