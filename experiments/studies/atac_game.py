"""Plays ATAC's game in random MDPs: its guarantee, and the choice of beta.

python -m experiments.study atac_game --out=experiments/results/atac_game.csv

`search.exact.offline_game` has the theory. Writes the CSV named by --out (a
line for each MDP, coverage, pessimism, oracle and beta), the same name with
_selection.csv (what rules that choose beta from data are worth; see
`experiments.studies.atac_game_selection`) and a figure, .png.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.files import tables, writing
from experiments.files.errors import UserError
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks
from experiments.studies import atac_game_selection
from experiments.studies.atac_game_selection import BETAS, COVERAGE

# `1 / (1 - g)`; rewards are within [0, 1].
VALUE_MAX = 10.0
ORACLES = ('exponentiated_weights', 'projected_gradient')
PESSIMISM = ('relative', 'initial')
_COLOURS = {'relative': '#1b4f8f', 'initial': '#e08a1e'}
_LINES = {'full': ('-', 'o'), 'partial': ('--', 's')}
_RULES = {
  'fqe': '#b5353a',
  'fqe - sd': '#e08a1e',
  'gain - sd': '#1b4f8f',
  'held-out': '#3a8f4d',
}


class Row(NamedTuple):
  """A line of the CSV: one play. J are discounted returns.

  Attributes:
    mdp: its number.
    coverage: of the behaviour policy mu: `full`, or `partial`, where it never
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
    bound: of that, the oracle's.
    slack: `mixture - behaviour + regret / (1 - g)`; the guarantee says that
      it is not negative where the pessimism is relative.
    identity_error: largest error of the performance difference.
    gap: no critic was farther from its minimum.
    num_q: how many critics were replaced by Q of the policy, being worse.
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


def measure(
  *, mdps: int, states: int, actions: int, iterations: int, seed: int
) -> list[Row]:
  """Plays all games in float64, each oracle and pessimism as one program.

  Args:
    mdps: how many random ones.
    states: of each, at least 1.
    actions: of each, at least 3.
    iterations: K of each play.
    seed: of the MDPs.
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
) -> Iterable[Row]:
  for where in np.ndindex(optimum.shape):
    o = type(outcome)(*(field[where].item() for field in outcome))
    best = optimum[where].item()
    mdp, coverage, beta = where
    yield Row(
      mdp=mdp,
      coverage=COVERAGE[coverage],
      pessimism=pessimism,
      oracle=oracle,
      beta=BETAS[beta],
      mixture=o.mixture,
      last=o.last,
      behaviour=o.behaviour,
      optimum=best,
      gain=(o.mixture - o.behaviour) / (best - o.behaviour),
      regret=o.regret,
      bound=bound,
      slack=o.slack,
      identity_error=o.identity_error,
      gap=o.gap,
      num_q=o.num_q,
    )


def summary(rows: Sequence[Row]) -> str:
  """What the rows say of the theory, some lines."""
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
  rows: Sequence[Row],
  chosen: Sequence[atac_game_selection.Row],
  path: pathlib.Path,
) -> None:
  """Draws gain and slack against beta, and what choosing beta costs.

  Args:
    rows: of all plays; those of exponentiated weights are drawn.
    chosen: see `atac_game_selection.study`; none leaves its panel out.
    path: the picture's.
  """
  # Not pyplot: its figures are global state.
  from matplotlib.figure import Figure

  panels = 3 if chosen else 2
  picture = Figure((5 * panels, 4.6), layout='constrained')
  axes = picture.subplots(1, panels)
  rows = [row for row in rows if row.oracle == ORACLES[0]]
  _draw(axes[0], rows, 'gain', np.mean)
  axes[0].set_ylabel("(J − J(μ)) / (J* − J(μ)), the MDPs' mean")
  axes[0].set_title('Gain over the behaviour policy', fontsize=11)
  _draw(axes[1], rows, 'slack', np.min)
  axes[1].set_yscale('symlog', linthresh=0.01)
  axes[1].set_ylabel("slack of the guarantee, the MDPs' least")
  axes[1].set_title('J(mixture) ≥ J(μ) − Reg / (K (1 − γ))', fontsize=11)
  if chosen:
    _draw_selection(axes[2], chosen)
  for panel in axes:
    panel.spines[['top', 'right']].set_visible(False)
    panel.grid(axis='y', color='#dddddd', lw=0.7)
    panel.set_axisbelow(True)
    panel.legend(
      frameon=False,
      fontsize=8.5,
      ncols=2,
      loc='upper center',
      bbox_to_anchor=(0.5, -0.14),
    )
  writing.write_figure(picture, path)


def _draw(axes: Any, rows: Sequence[Row], field: str, statistic: Any) -> None:
  betas = sorted({row.beta for row in rows})
  axes.axhline(0, color='black', lw=0.9)
  for pessimism, colour in _COLOURS.items():
    for coverage, (style, marker) in _LINES.items():
      values = [
        statistic(
          [
            getattr(row, field)
            for row in rows
            if (row.pessimism, row.coverage, row.beta)
            == (pessimism, coverage, beta)
          ]
        )
        for beta in betas
      ]
      axes.plot(
        range(len(betas)),
        values,
        color=colour,
        ls=style,
        marker=marker,
        ms=5,
        lw=1.8,
        label=f'{pessimism}, {coverage} coverage',
      )
  texts = [f'1/{1 / b:.0f}' if 0 < b < 1 else f'{b:.0f}' for b in betas]
  axes.set_xticks(range(len(betas)), texts)
  axes.set_xlabel('β')


def _draw_selection(
  axes: Any, chosen: Sequence[atac_game_selection.Row]
) -> None:
  sizes = sorted({row.transitions for row in chosen})
  rows = {(r.coverage, r.transitions, r.rule): r for r in chosen}
  for coverage, (style, marker) in _LINES.items():
    lines = {
      rule: ([rows[coverage, n, rule].regret for n in sizes], colour)
      for rule, colour in _RULES.items()
    }
    fixed = {rule for _, _, rule in rows if rule.startswith('beta=')}
    best = [
      min(rows[coverage, n, rule].regret for rule in fixed) for n in sizes
    ]
    lines['best fixed beta'] = (best, '#5f6b73')
    for rule, (values, colour) in lines.items():
      axes.plot(
        sizes,
        values,
        color=colour,
        ls=style,
        marker=marker,
        ms=5,
        lw=1.8,
        label=rule.replace('beta', 'β') if coverage == 'full' else None,
      )
  axes.set_xscale('log')
  axes.set_xticks(sizes, map(str, sizes))
  axes.minorticks_off()
  axes.set_ylim(bottom=0)
  axes.set_xlabel('transitions in the data set')
  axes.set_ylabel('regret / (J* − J(μ)), mean')
  axes.set_title('Choosing β from data (dashed: partial)', fontsize=11)


def define_flags() -> None:
  """The flags of `python -m experiments.study atac_game`."""
  from absl import flags

  flags.DEFINE_string(
    'out', 'experiments/results/atac_game.csv', 'the CSV; others lie beside it'
  )
  flags.DEFINE_integer('mdps', 6, 'random MDPs', 1, 100_000)
  flags.DEFINE_integer('states', 5, 'of each MDP', 1, 1_000)
  flags.DEFINE_integer('actions', 3, 'of each MDP; mu may lack one', 3, 1_000)
  flags.DEFINE_integer('iterations', 300, 'K of each play', 1, 10_000_000)
  flags.DEFINE_integer('seed', 0, 'of MDPs and data', 0, configs.MAX_SEED)
  flags.DEFINE_integer(
    'datasets',
    60,
    'MDPs that beta is chosen for from data; 0: none',
    0,
    100_000,
  )
  flags.DEFINE_list(
    'sizes', ['30', '100', '300', '1000'], 'transitions in their data sets'
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
    UserError: the name of the file, or sizes.
  """
  from absl import flags

  values = flags.FLAGS
  out, sizes = pathlib.Path(values.out), _read_sizes(values.sizes)
  if not values.datasets:
    flag_checks.refuse(['sizes'], 'with --datasets=0')
  if out.suffix != '.csv':
    raise UserError(f'out={out}: must end in .csv')
  configs.check_place('out', out)

  from experiments.runtime.devices import use_compilation_cache

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
  rows = measure(mdps=values.mdps, seed=values.seed, **settings)
  tables.write_lines(out, [Row._fields, *rows], digits=6)
  print(summary(rows))
  chosen = []
  if values.datasets:
    chosen = atac_game_selection.study(
      values.seed, sizes, mdps=values.datasets, **settings
    )
    selection = out.with_name(f'{out.stem}_selection.csv')
    tables.write_lines(
      selection, [atac_game_selection.Row._fields, *chosen], digits=6
    )
    print(f'results: {selection}')
  figure(rows, chosen, out.with_suffix('.png'))
  terminal.end(
    f'{out}, {out.with_suffix(".png")}',
    'python -m experiments.collect --env=Pendulum-v1 --out=data/pendulum',
    'python -m experiments.train --preset=atac_small '
    '--dataset=data/pendulum/medium',
  )
