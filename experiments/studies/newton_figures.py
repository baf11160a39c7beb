"""The figures of `studies.newton`: the step itself, and what it is for."""

import functools
import pathlib

import jax
import numpy as np

from experiments.report import style
from experiments.studies import newton_cases as cases
from search.exact import examples, riccati

_COLOURS, _GREY = style.COLOURS, style.GREY


def draw(out: pathlib.Path) -> None:
  """Draws newton_step.png and newton_uses.png, in float64."""
  pages = {
    'newton_step.png': (_tangent, _policies, _regions, _steps, _rollout, _rate),
    'newton_uses.png': (
      functools.partial(_replanned, field='b'),
      functools.partial(_replanned, field='r'),
      _approximate,
      _sensitivity,
      _certainty,
      _cycle,
    ),
  }
  for name, panels in pages.items():
    _page(out / name, panels)


def _page(path, panels):
  figure, grid = style.panels(3, 5, 4.2, rows=2)
  for axes, panel in zip(grid.flat, panels, strict=True):
    panel(axes)
    style.legend(axes)
  style.save(figure, path, dpi=110, grid='both')


def _tangent(axes):
  """F, its tangent at K~, and where that meets the diagonal."""
  of = cases.system(cases.STEEP)
  start = np.asarray(2.0)
  gain = riccati.gain(of, start)
  reached = float(riccati.policy_cost(of, gain))
  best = float(riccati.optimal(of))
  k = np.linspace(-0.4, 8.2, 300)
  axes.plot(k, k, color=_GREY, lw=1, label='K')
  axes.plot(k, riccati.riccati(of, k), color=_COLOURS[0], label='F(K)')
  tangent = riccati.policy_riccati(of, gain, k)
  axes.plot(k, tangent, color=_COLOURS[1], label=r'$F_{\tilde L}(K)$, tangent')
  at = float(riccati.riccati(of, start))
  axes.plot([start, start], [0, at], color=_GREY, ls=':', lw=1)
  axes.plot([reached, reached], [0, reached], color=_GREY, ls=':', lw=1)
  axes.plot([start, reached], [at, reached], 'o', color=_COLOURS[1], ms=5)
  axes.plot(best, best, 'o', color=_COLOURS[0], ms=5)
  ticks = {float(start): r'$\tilde K$', best: '$K^*$'}
  ticks[reached] = r'$K_{\tilde L}$'
  axes.set_xticks(list(ticks), list(ticks.values()))
  axes.set_ylim(0, 8.2)
  style.label(
    axes, 'One-step look-ahead is a step of Newton', 'terminal cost K', ''
  )


def _policies(axes):
  """The book's figure 3.6.1: policies and look-ahead on them."""
  policies = np.linspace(-0.97, -0.03, 300)
  before, after = cases.policy_curve(policies)
  text = 'base policy, $K_L - K^*$'
  axes.plot(policies, before, color=_GREY, label=text)
  text = r'look-ahead, $K_{\tilde L} - K^*$'
  axes.plot(policies, after, color=_COLOURS[0], label=text)
  axes.set_yscale('log')
  axes.set_ylim(1e-7, 20)
  style.label(axes, 'Rollout of every linear policy', 'L', 'cost above K*')


def _regions(axes):
  """K~ to K_L~ for l steps, and where each becomes stable."""
  of = cases.system(cases.STEEP)
  best = float(riccati.optimal(of))
  for depth, colour in zip((1, 2, 3), _COLOURS):
    edge = float(riccati.stability_boundary(of, depth))
    k = edge + np.geomspace(1e-3, 12, 400)
    error = np.asarray(riccati.lookahead_cost(of, k, depth)) - best
    text = f'l = {depth}, stable above {edge:.3f}'
    axes.plot(k, np.maximum(error, 1e-14), color=colour, label=text)
    axes.axvline(edge, color=colour, ls=':', lw=1)
  axes.set_yscale('log')
  axes.set_ylim(1e-9, 1e3)
  axes.set_xlim(-0.5, 10)
  title = 'Look-ahead of l steps: a larger region of stability'
  style.label(axes, title, r'terminal cost $\tilde K$', r'$K_{\tilde L} - K^*$')


def _steps(axes):
  """S_l against l."""
  of = cases.system(cases.STEEP)
  depths = np.arange(1, 8)
  edges = [float(riccati.stability_boundary(of, int(n))) for n in depths]
  lower = float(riccati.fixed_points(of)[1])
  axes.plot(depths, edges, 'o-', color=_COLOURS[0], label='$S_l$')
  axes.axhline(lower, color=_GREY, ls='--', label=r'$\bar K$, where it ends')
  axes.fill_between(depths, edges, 1.5, color=_COLOURS[0], alpha=0.1, lw=0)
  style.label(axes, 'The region of stability grows with l', 'l', r'$\tilde K$')


def _rollout(axes):
  """Truncated rollout from the four intervals."""
  for (name, start), colour in zip(cases.STARTS.items(), _COLOURS):
    errors = cases.rollout_errors(start)
    text = rf'{name}: $\tilde K$ = {start:g}'
    if not np.isfinite(errors[0]):
      text += ', unstable without'
    axes.plot(range(len(errors)), errors, 'o-', color=colour, label=text)
  axes.set_xticks(range(len(cases.STEPS)), map(str, cases.STEPS))
  axes.set_yscale('log')
  title = 'Truncated rollout: more steps may hurt'
  style.label(
    axes, title, 'steps m of the base policy', r'$K_{\tilde L} - K^*$'
  )


def _rate(axes):
  """Errors of repeated Newton steps."""
  runs = (cases.MILD, 0.5), (cases.STEEP, 3.0), (cases.STEEP, 1.3)
  for (which, start), colour in zip(runs, _COLOURS):
    errors = cases.newton_errors(which, start, 5)
    text = f'(a, b, q, r) = {tuple(float(f"{x:g}") for x in which)}'
    text = text.replace('.0', '') + f', $K_0$ = {start:g}'
    seen = errors > 1e-15
    axes.plot(
      np.flatnonzero(seen), errors[seen], 'o-', color=colour, label=text
    )
  axes.set_yscale('log')
  axes.set_ylim(top=1e5)
  title = 'Policy iteration is Newton repeated: quadratic'
  style.label(axes, title, 'k', '$|K_k - K^*|$')


def _replanned(axes, field):
  """The book's figure 5.2.2: the system changes, the base policy stays."""
  name, span, top = {
    'b': ('b', np.linspace(0.6, 2.4, 100), 2.4),
    'r': ('r', np.linspace(0.5, 30, 100), 8),
  }[field]
  changed = (span, cases.MILD[3]) if field == 'b' else (cases.MILD[1], span)
  texts = 'optimal, $K^*$', 'old policy, $K_L$', r'replanned, $K_{\tilde L}$'
  colours = 'black', _COLOURS[1], _COLOURS[0]
  for costs, text, colour in zip(cases.replanned(*changed), texts, colours):
    stroke = '--' if colour == 'black' else '-'
    axes.plot(span, costs, color=colour, label=text, ls=stroke)
  axes.set_ylim(1, top)
  style.label(axes, f'Adaptive control: {name} changes', name, 'cost')


def _approximate(axes):
  """The book's figure A.4: what an error in each evaluation leaves."""
  delta = np.linspace(0.002, 0.5, 100)
  lost, off = cases.approximate(delta)
  modulus = 25 / 36
  bound = 2 * modulus * delta / (1 - modulus) ** 2
  axes.plot(delta, bound, color=_GREY, ls='--', label='bound, 2αδ/(1-α)²')
  axes.plot(delta, off, color=_COLOURS[1], label='evaluation, $|K - K^*|$')
  text = r'policy, $K_\mu - K^*$, ~ 0.03 δ²'
  axes.plot(delta, lost, color=_COLOURS[0], label=text)
  axes.set_yscale('log')
  title = 'Approximate policy iteration: errors are squared'
  style.label(axes, title, 'error δ of each evaluation', 'error in the limit')


def _sensitivity(axes):
  """The book's figure 4.5.1: nearby terminal costs, nearby players."""
  start = np.linspace(-1, 0.8, 150)
  for width, colour in zip((0.15, 0.2, 0.3), _COLOURS):
    mean = cases.sensitivity(start, width)
    axes.plot(start, mean, color=colour, label=f'ε = {width:g}')
  axes.set_ylim(0, 0.25)
  title = 'Sensitivity to the terminal cost, $K_2 \\sim U[K_1 ± ε]$'
  style.label(axes, title, '$K_1 - K^*$', r'$E |K_{L_1} - K_{L_2}|$')


def _certainty(axes):
  """Certainty equivalence everywhere, after the first step, nowhere."""
  depth = 8
  found = cases.certainty_equivalence(depth)
  texts = 'exact', 'certain after the first step', 'certain throughout'
  for errors, text, colour in zip(found, texts, _COLOURS):
    axes.plot(range(1, depth + 1), errors, 'o-', color=colour, label=text)
  title = 'Inventory: the first step is the one to plan exactly'
  style.label(axes, title, 'look-ahead l', r'$\max_x\, J_\mu - J^*$')


def _cycle(axes):
  """Newton's method in a Markov game."""
  iterates, best = cases.cycle(20)
  operator = functools.partial(examples.markov_bellman, examples.cycling_game())
  value = np.linspace(-40, 35, 400)
  applied = np.asarray(jax.vmap(operator)(value))
  axes.plot(value, value, color=_GREY, lw=1, label='J')
  axes.plot(value, applied, color=_COLOURS[0], label='TJ')
  text = 'Newton: back and forth, without end'
  for here, there in ((1, 2), (2, 1)):
    x, y = iterates[here], iterates[there]
    at = np.interp(x, value, applied)
    label = text if here == 1 else None
    axes.plot([x, y], [at, y], 'o--', color=_COLOURS[1], ms=4, label=label)
  axes.plot(best, best, 'o', color=_COLOURS[0], ms=6, label='$J^*$')
  style.label(axes, 'A Markov game in which Newton cycles', 'J', '')
