"""The book's worked examples and claims, one by one, next to our numbers.

In float64: inside `jax.enable_x64(True)`.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.report import terminal
from experiments.studies import newton_cases as cases
from search.exact import bellman, examples, riccati


class Example(NamedTuple):
  """An example or claim of the book: a line of newton_examples.csv.

  Attributes:
    item: of the book, or what kind of check.
    printed: as in the book, or its claim; `figure only` if it only draws them.
    agree: `yes`, `no`, or `-` if there is nothing to agree with.
  """

  item: str
  what: str
  printed: str
  ours: tuple[float, ...]
  agree: str


def _printed(item, what, printed, ours) -> Example:
  """Numbers that agree if each of ours rounds to what is printed."""
  ours = tuple(float(x) for x in ours)
  texts = printed.split()
  near = lambda x, text: (
    abs(x - float(text)) <= 0.5000001 * 10.0 ** -len(text.partition('.')[2])
  )
  agree = len(texts) == len(ours) and all(map(near, ours, texts))
  return Example(item, what, printed, ours, 'yes' if agree else 'no')


def _claimed(item, what, claim, ours, holds) -> Example:
  """Numbers that a claim is about."""
  ours = tuple(float(x) for x in ours)
  return Example(item, what, claim, ours, 'yes' if holds else 'no')


def _drawn(item, what, ours) -> Example:
  """Numbers that the book only draws."""
  return Example(item, what, 'figure only', tuple(float(x) for x in ours), '-')


def examine() -> list[Example]:
  """All of the book's examples and claims, in the book's order."""
  parts = (
    _small_processes,
    _scalar,
    _rollout,
    _sensitive,
    _modified,
    _exceptional,
    _certain_and_joint,
    _newton,
  )
  rows, tick = [], terminal.ticker('part', len(parts))
  for number, part in enumerate(parts, start=1):
    rows += part()
    tick(number)
  return rows


def _small_processes() -> Iterator[Example]:
  policy, value = bellman.optimal(examples.two_states())
  yield _printed('Ex 3.1.1', 'J*(1), J*(2)', '50.59 47.41', -value)
  chosen = np.asarray(policy).argmax(-1)
  yield _printed('Ex 3.1.1', 'mu*: u is 0, v is 1', '1 0', chosen)
  start = jnp.array([10.0, 20.0])
  value = examples.newton_iterates(examples.continuous_bellman, start, 10)[-1]
  control = examples.continuous_control(value)
  yield _printed('Ex 3.1.2', 'J*(1), J*(2)', '49.7 40.0', value)
  yield _printed('Ex 3.1.2', 'mu*(1), mu*(2)', '.59 0', control)
  paid = examples.newton_iterates(examples.blackmailer, jnp.array(-1.0), 10)
  halves = np.array_equal(paid, -(2.0 ** np.arange(11)))
  claim = 'mu halves for ever; no fixed point'
  yield _claimed('Sec 3.9', 'J of PI, -1 / mu', claim, paid, halves)


def _scalar() -> Iterator[Example]:
  of = cases.system(cases.MILD)
  upper, lower = map(float, riccati.fixed_points(of))
  root = np.sqrt(6)
  gain = riccati.gain(of, upper)
  slope = jax.jit(jax.grad(functools.partial(riccati.riccati, of)))(upper)
  item = 'Fig 3.6.1, 4.5.1'
  yield _printed(item, 'K*', '1.11', [upper])
  claim = '(2+√6)/4'
  yield _claimed(
    item, 'K*', claim, [upper], abs(upper - (2 + root) / 4) < 1e-14
  )
  yield _printed(item, 'L*', '-0.4', [gain])
  ratio = -(2 + root) / (5 + 2 * root)
  claim = '-(2+√6)/(5+2√6)'
  yield _claimed(item, 'L*', claim, [gain], abs(gain - ratio) < 1e-14)
  claim = "F(K) = K; F' = (a+bL*)²"
  holds = abs(slope - riccati.closed_loop(of, gain) ** 2) < 1e-14
  yield _claimed(item, "lower root, F'(K*)", claim, [lower, slope], holds)
  policies = np.array([-0.9, -0.8, -0.6, -0.4, -0.2, -0.1])
  before, after = cases.policy_curve(policies)
  text = ' '.join(f'{x:g}' for x in policies)
  yield _drawn('Fig 3.6.1', f'K_L-K*, L: {text}', before)
  yield _drawn('Fig 3.6.1', f'K_L~-K*, L: {text}', after)

  of = cases.system(cases.STEEP)
  best = float(riccati.optimal(of))
  boundary = riccati.stability_boundary(of)
  yield _printed('Ex A.3.1', 'K*, S', '5 1.25', [best, boundary])
  modulus = riccati.closed_loop(of, riccati.gain(of, boundary + 0.5)) ** 2
  bound = 2 * modulus / (1 - modulus)
  what = 'α at S+.5, 2α/(1-α)'
  yield _drawn('Ex A.3.1', what, [modulus, bound])
  starts = np.array([2.0, 3.0, 4.0, 6.0, 9.0])
  errors = np.asarray(riccati.lookahead_cost(of, starts, 1)) - best
  what = 'K_L~-K*, K~: 2 3 4 6 9'
  holds = bool(np.all(errors <= bound * np.abs(starts - best)))
  yield _claimed('Ex A.3.1', what, '≤ 2α/(1-α) |K~-K*|', errors, holds)
  depths = range(1, 8)
  edges = [float(riccati.stability_boundary(of, depth)) for depth in depths]
  falls = bool(np.all(np.diff(edges) < 0)) and edges[-1] > -0.25
  what = 'S_1 … S_7'
  yield _claimed(
    'Region of stability', what, 'falls to K̄ = -0.25', edges, falls
  )


def _rollout() -> Iterator[Example]:
  of = cases.system(cases.STEEP)
  base = float(riccati.policy_cost(of, np.asarray(cases.BASE))) - 5
  steps = ' '.join(map(str, cases.STEPS))
  for name, start in cases.STARTS.items():
    errors = cases.rollout_errors(start)
    best = int(np.argmin(errors))
    inside = 0 < best < len(errors) - 1
    claim, holds = {
      'I': ('enlarges stability; many steps hurt', inside),
      'II': ('helps; many steps hurt', inside),
      'III': ('hurts, still ≤ K_mu', best == 0 and errors.max() <= base),
      'IV': ('helps', best == len(errors) - 1),
    }[name]
    what = f'{name}, K~={start:g}: K_L~-K*, m: {steps}'
    yield _claimed('Sec 4.7.1', what, claim, errors, holds)


def _sensitive() -> Iterator[Example]:
  at = np.array([-0.8, -0.4, 0.0, 0.8])
  for width in (0.15, 0.2, 0.3):
    what = f'ε={width}: E|K_L1-K_L2|, K1-K*: -.8 -.4 0 .8'
    yield _drawn('Fig 4.5.1', what, cases.sensitivity(at, width))


def _modified() -> Iterator[Example]:
  for field, values in (('b', (0.6, 1.0, 2.4)), ('r', (5.0, 10.0, 30.0))):
    for x in values:
      b, r = (x, cases.MILD[3]) if field == 'b' else (cases.MILD[1], x)
      best, old, new = cases.replanned(b, r)
      what = f'{field}={x:g}: K*, K_L, K_L~'
      claim = '(K_L~-K*)/(K_L-K*) small'
      costs = [best, old, new]
      holds = 0 <= new - best < 0.15 * (old - best)
      yield _claimed('Fig 5.2.2', what, claim, costs, bool(holds))
  delta = np.array([0.1, 0.3, 0.5])
  lost, off = cases.approximate(delta)
  claim, item = 'roughly δ', 'Ex A.4.1'
  near = lambda x: bool(np.all((x > 0.5 * delta) & (x < 2 * delta)))
  what = 'K_mu-K* in the limit, δ: .1 .3 .5'
  yield _claimed(item, what, claim, lost, near(lost))
  what = '|K-K*| in the limit, δ: .1 .3 .5'
  yield _claimed(item, what, claim, off, near(off))
  modulus = 25 / 36
  bound = 2 * modulus * delta / (1 - modulus) ** 2
  what = '2αδ/(1-α)², δ: .1 .3 .5'
  yield _claimed(item, what, 'bounds them', bound, bool(np.all(lost < bound)))


def _exceptional() -> Iterator[Example]:
  of = cases.system((2.0, 2.0, 0.0, 5.0))
  hat, best = map(float, riccati.fixed_points(of))
  item = 'Sec 4.8'
  claim = '0 and r(a²-1)/b²'
  yield _claimed(item, 'K*, K^', claim, [best, hat], [best, hat] == [0, 3.75])
  cost = np.asarray(1e-3)
  for _ in range(60):
    cost = riccati.riccati(of, cost)
  played = np.asarray(6.0)
  for _ in range(8):
    played = np.asarray(riccati.lookahead_cost(of, played, 1))
  found = [cost, played]
  holds = np.allclose(found, hat, rtol=1e-12)
  what = 'VI from 0.001, PI from 6'
  yield _claimed(item, what, 'converge to K^', found, bool(holds))


def _certain_and_joint() -> Iterator[Example]:
  depth, item = 8, 'Certainty equivalence, own'
  found = cases.certainty_equivalence(depth)
  exact, first, full = found
  what = f'inventory, max_x error, l: 1 … {depth}'
  holds = exact[-1] < 1e-9
  yield _claimed(item, f'{what}, exact', 'to 0', exact, bool(holds))
  holds = np.all(first[1:] < full[1:]) and first[0] == exact[0]
  claim = 'better than throughout, not to 0'
  yield _claimed(item, f'{what}, CE after 1st', claim, first, bool(holds))
  yield Example(item, f'{what}, CE all', '', tuple(map(float, full)), '-')

  found = cases.in_turn(0)
  what = '4 agents, max_x error: base, joint, in turn'
  claim = 'improves in every state: 81 and 12 evaluations'
  holds = found.least_gain >= 0
  yield _claimed('Agents in turn, own', what, claim, found[:3], holds)

  iterates, best = cases.cycle(20)
  what = 'J_19, J_20, J*'
  holds = abs(iterates[20] - iterates[18]) < 1e-9
  holds &= abs(iterates[20] - iterates[19]) > 1
  values = [*iterates[19:], best]
  yield _claimed(
    'Markov game, own', what, 'Newton may cycle', values, bool(holds)
  )
  iterates = cases.games(0, 20_000, 100)
  astray = np.abs(iterates[:, -1] - iterates[:, -2]) > 1e-6
  what = 'of 20,000 random games, without convergence'
  some = astray.any()
  yield _claimed('Markov game, own', what, 'some', [astray.sum()], bool(some))


def _newton() -> Iterator[Example]:
  tabular, quadratic = cases.identities(0, 100)
  item, claim = 'Eq 4.13', 'the same'
  what = 'Newton - J_mu~: 100 MDPs, 100 LQ 4x2'
  holds = max(tabular, quadratic) < 1e-10
  yield _claimed(item, what, claim, [tabular, quadratic], holds)
  for which, start, steps in ((cases.MILD, 0.5, 3), (cases.STEEP, 3.0, 4)):
    of = cases.system(which)
    best = riccati.optimal(of)
    first = jax.grad(functools.partial(riccati.riccati, of))
    slope, curvature = jax.jit(jax.value_and_grad(first))(best)
    rate = abs(curvature) / (2 * (1 - slope))
    errors = cases.newton_errors(which, start, steps)
    name = f'{which[0]:g}, {which[1]:g}, {which[2]:g}, {which[3]:g}'
    what = f'({name}) |K_k-K*| from {start:g}'
    claim = 'quadratic'
    yield _claimed('Newton', what, claim, errors, bool(errors[-1] < 1e-5))
    ratios = errors[1:-1] / errors[:-2] ** 2
    what = f'({name}) e_k+1/e_k², and predicted'
    holds = abs(ratios[-1] - rate) < 0.03 * rate
    yield _claimed('Newton', what, 'to it', [*ratios, rate], bool(holds))
  found = cases.stability(0, 20_000)
  what = 'K~≥K*, 2x2: TJ~≤J~, unstable; others, unstable'
  holds = found.fulfil_unstable == 0 and found.others_unstable > 0
  yield _claimed('Stability', what, 'TJ~≤J~ suffices', found, holds)
