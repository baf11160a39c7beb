"""Checks Sampled MuZero's theorem: policy improvement from K sampled actions.

python -m experiments.study sampling_operators --out=experiments/results

`search.exact.improvement` says why the estimate from K actions drawn from beta
is off by a normal number of variance sigma^2 / K. Here it is drawn many times,
for one state with a fine grid of actions, and compared with that prediction and
with the estimate without beta_hat / beta. Writes operators_convergence.csv (a
line for each operator, beta, correction and K), operators_slopes.csv (of log
rmse against log K) and operators_convergence.png.
"""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.files import tables
from experiments.files.errors import UserError
from experiments.report import style, terminal
from experiments.runtime import config as configs

ETA, LAM = 0.2, 1.0
# The asymptote does not hold for fewer samples yet.
_FIT_FROM = 32
_COLOURS = {'mpo': style.BLUE, 'puct': style.ORANGE}
_NAMES = {'mpo': 'MPO-like', 'puct': 'PUCT-like'}
# The prior of the estimate on the sampled actions: stroke, marker and label.
_STYLES = {
  'beta_hat/beta': ('-', 'o', r'prior $\hat\beta/\beta\;\pi$'),
  'none': ('--', 's', r'prior $\pi$'),
  'uniform': (':', '^', 'equal priors'),
}
CORRECTIONS = tuple(_STYLES)
_SHOWN_BETA = 'tempered'


class Problem(NamedTuple):
  """One state: `A` actions on a grid of [-1, 1].

  Attributes:
    prior: float64 `[A]`, two bumps; sums to one.
    qvalues: float64 `[A]`, smooth, with three maxima, the best one where the
      prior is neither high nor negligible.
    betas: name -> float64 `[A]`. `prior` is the prior (tau = 1), `tempered` its
      square root (tau = 2), `other` a wide bump around another action.
  """

  prior: np.ndarray
  qvalues: np.ndarray
  betas: dict[str, np.ndarray]


def make_problem(actions: int = 1001) -> Problem:
  """The state in which everything is measured."""
  a = np.linspace(-1, 1, actions)
  bump = lambda mean, width: np.exp(-0.5 * ((a - mean) / width) ** 2)
  normalised = lambda p: p / np.sum(p)
  prior = 0.7 * normalised(bump(-0.3, 0.2)) + 0.3 * normalised(bump(0.5, 0.2))
  return Problem(
    prior=prior,
    qvalues=0.5 + 0.35 * np.sin(8 * a) - 0.25 * a**2,
    betas={
      'prior': prior,
      'tempered': normalised(np.sqrt(prior)),
      'other': normalised(bump(0.3, 0.5)),
    },
  )


class Estimate(NamedTuple):
  """Errors of `sum_a I_hat(a) Q(a)`: a line of operators_convergence.csv.

  Attributes:
    operator: `mpo` or `puct`.
    beta: the proposal, of `Problem.betas`.
    correction: the prior on the samples: `beta_hat/beta` (the theorem's),
      `none` (their plain pi, normalised), `uniform` (1 / K each).
    k: how many actions are drawn.
    truth: of the operator on all actions.
    bias_limit: exact, for K to infinity.
    rmse: root of the mean squared error.
    sigma_squared: its predicted limit; like the next two, only for the
      corrected estimate.
    variance_if_z_known: the prediction if Z were not estimated.
    kolmogorov: largest distance between the distribution functions of `sqrt(k /
      sigma_squared) error` and of the standard normal.
  """

  operator: str
  beta: str
  correction: str
  k: int
  trials: int
  truth: float
  bias: float
  bias_se: float
  bias_limit: float
  rmse: float
  variance_times_k: float
  sigma_squared: float
  variance_if_z_known: float
  kolmogorov: float


class Prediction(NamedTuple):
  """The predictions for an operator and a beta; see `Estimate`."""

  truth: float
  sigma_squared: float
  variance_if_z_known: float
  bias_limit: dict[str, float]


@functools.cache
def _improvement_operators() -> dict[str, Any]:
  from search.exact import improvement

  return {'mpo': improvement.mpo(ETA), 'puct': improvement.puct(LAM)}


def predict(problem: Problem) -> dict[tuple[str, str], Prediction]:
  """The predictions for each operator and beta, all actions enumerated."""
  return {
    (name, beta): prediction
    for name, operator in _improvement_operators().items()
    for beta, prediction in _predict(problem, operator).items()
  }


def _predict(problem: Problem, operator: Any) -> dict[str, Prediction]:
  import jax
  import jax.numpy as jnp

  from search.exact import improvement

  log = lambda p: jnp.asarray(np.log(p / np.sum(p)), jnp.float32)
  qvalues = jnp.asarray(problem.qvalues, jnp.float32)
  improve = jax.jit(functools.partial(improvement.improve, operator))
  improved = lambda p: np.asarray(improve(log(p), qvalues)[0], np.float64)
  policy = improved(problem.prior)
  truth = float(policy @ problem.qvalues)
  limit = lambda p: float(improved(p) @ problem.qvalues - truth)
  predictions = {}
  for beta, proposal in problem.betas.items():
    sigma_squared = improvement.asymptotic_variance(
      operator, log(problem.prior), log(proposal), qvalues, qvalues
    )
    second = np.sum((policy * problem.qvalues) ** 2 / proposal)
    predictions[beta] = Prediction(
      truth=truth,
      sigma_squared=float(sigma_squared),
      variance_if_z_known=float(second - truth**2),
      bias_limit={
        'beta_hat/beta': 0.0,
        'none': limit(proposal * problem.prior),
        'uniform': limit(proposal),
      },
    )
  return predictions


@functools.cache
def _compiled() -> Any:
  """`(k, trials, key, beta, log_prior, qvalues) -> [trials, operators, 3]`."""
  import jax
  import jax.numpy as jnp

  from search.exact import improvement

  def one(k, beta, log_prior, qvalues, key):
    action = jax.random.choice(key, beta.shape[0], (k,), p=beta)
    log_prior, log_beta = log_prior[action], jnp.log(beta)[action]
    qvalues = qvalues[action]
    # Every sample has a slot of its own.
    counts = jnp.ones(k)
    # In the order of `CORRECTIONS`.
    priors = jnp.stack(
      [
        improvement.corrected_log_prior(log_prior, log_beta, counts),
        improvement.uncorrected_log_prior(log_prior, counts),
        improvement.uncorrected_log_prior(jnp.zeros(k), counts),
      ]
    )
    values = []
    for operator in _improvement_operators().values():
      improve = functools.partial(improvement.improve, operator)
      policies, _ = jax.vmap(improve, (0, None))(priors, qvalues)
      values.append(policies @ qvalues)
    return jnp.stack(values)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def estimates(k, trials, key, *problem):
    keys = jax.random.split(key, trials)
    # In parts, so that memory does not grow with trials.
    sampled = functools.partial(one, k, *problem)
    return jax.lax.map(sampled, keys, batch_size=min(trials, 500))

  return estimates


def draw_estimates(
  problem: Problem,
  predictions: dict[tuple[str, str], Prediction],
  k: int,
  trials: int,
  seed: int,
) -> Iterator[tuple[Estimate, np.ndarray]]:
  """Draws K actions many times, for each beta, operator and correction.

  Args:
    k: actions drawn, at least 1.
    trials: how often, at least 2.

  Yields:
    The line of the CSV and the errors, float64 `[trials]`.
  """
  import jax
  import jax.numpy as jnp

  f32 = lambda x: jnp.asarray(x, jnp.float32)
  key = jax.random.fold_in(jax.random.key(seed), k)
  for i, (beta, proposal) in enumerate(problem.betas.items()):
    found = _compiled()(
      k,
      trials,
      jax.random.fold_in(key, i),
      f32(proposal),
      f32(np.log(problem.prior)),
      f32(problem.qvalues),
    )
    found = np.asarray(found, np.float64)
    for j, operator in enumerate(_improvement_operators()):
      prediction = predictions[operator, beta]
      for c, correction in enumerate(CORRECTIONS):
        error = found[:, j, c] - prediction.truth
        yield _estimate(prediction, error, operator, beta, correction, k), error


def _estimate(prediction, error, operator, beta, correction, k) -> Estimate:
  from scipy import stats

  sigma_squared = known = kolmogorov = float('nan')
  variance = float(np.var(error, ddof=1))
  if correction == 'beta_hat/beta':
    sigma_squared = prediction.sigma_squared
    known = prediction.variance_if_z_known
    scaled = error * np.sqrt(k / sigma_squared)
    kolmogorov = stats.kstest(scaled, 'norm').statistic
  return Estimate(
    *(operator, beta, correction, k),
    trials=len(error),
    truth=prediction.truth,
    bias=float(np.mean(error)),
    bias_se=np.sqrt(variance / len(error)),
    bias_limit=prediction.bias_limit[correction],
    rmse=np.sqrt(np.mean(error**2)),
    variance_times_k=variance * k,
    sigma_squared=sigma_squared,
    variance_if_z_known=known,
    kolmogorov=kolmogorov,
  )


def slopes(rows: Sequence[Estimate]) -> list[tuple[str, str, str, float]]:
  """`(operator, beta, correction, slope)`s, of log rmse over log K from 32."""
  groups: dict[tuple[str, str, str], list[Estimate]] = {}
  for row in rows:
    if row.k >= _FIT_FROM:
      what = (row.operator, row.beta, row.correction)
      groups.setdefault(what, []).append(row)
  fit = lambda group: np.polyfit(
    np.log([row.k for row in group]), np.log([row.rmse for row in group]), 1
  )[0]
  return [(*what, float(fit(group))) for what, group in groups.items()]


def figure(
  rows: Sequence[Estimate], errors: dict[str, np.ndarray], path: pathlib.Path
) -> None:
  """Draws rmse against K, and the scaled errors' histogram at the largest K.

  Args:
    rows: of all K; those of one beta are drawn.
    errors: operator -> float64 `[trials]`, of that beta's corrected estimate at
      the largest K.
  """
  rows = [row for row in rows if row.beta == _SHOWN_BETA]
  picture, ((left, right),) = style.panels(2, 5.8, 4.9)
  _draw_rmse(left, rows)
  _draw_histograms(right, rows, errors)
  for axes in (left, right):
    style.legend(axes, below=True)
  style.save(picture, path)


def _draw_rmse(axes: Any, rows: Sequence[Estimate]) -> None:
  ks = np.asarray(sorted({row.k for row in rows}))
  found = {(row.operator, row.correction, row.k): row for row in rows}
  for operator, colour in _COLOURS.items():
    for correction, (stroke, marker, text) in _STYLES.items():
      rmse = [found[operator, correction, k].rmse for k in ks]
      line = {'color': colour, 'ls': stroke, 'marker': marker, 'ms': 5}
      label = f'{_NAMES[operator]}, {text}'
      axes.plot(ks, rmse, **line, lw=1.8, label=label)
    predicted = found[operator, 'beta_hat/beta', ks[0]].sigma_squared
    first = operator == next(iter(_COLOURS))
    label = r'predicted $\sigma K^{-1/2}$' if first else None
    height = np.sqrt(predicted / ks)
    axes.plot(ks, height, color='black', lw=0.9, zorder=3, label=label)
  axes.set_xscale('log', base=2)
  axes.set_yscale('log')
  axes.set_xticks(ks, map(str, ks))
  title = r'Error against K, $\beta \propto \pi^{1/2}$'
  y = "rmse of the improved policy's value"
  style.label(axes, title, 'sampled actions K', y)


def _draw_histograms(
  axes: Any, rows: Sequence[Estimate], errors: dict[str, np.ndarray]
) -> None:
  from scipy import stats

  k = max(row.k for row in rows)
  lines = {
    row.operator: row for row in rows if row.k == k and row.sigma_squared > 0
  }
  edge = 4 * np.sqrt(max(row.sigma_squared for row in lines.values()))
  x = np.linspace(-edge, edge, 400)
  for operator, colour in _COLOURS.items():
    row = lines[operator]
    axes.hist(
      np.sqrt(k) * errors[operator],
      bins=np.linspace(-edge, edge, 81),
      density=True,
      histtype='stepfilled',
      color=colour,
      alpha=0.3,
      label=f'{_NAMES[operator]}: K × variance {row.variance_times_k:.3g}',
    )
    for variance, stroke, width, text in (
      (row.sigma_squared, '-', 2, r'predicted, $\sigma^2$ = '),
      (row.variance_if_z_known, ':', 1.2, 'if Z were known, '),
    ):
      density = stats.norm.pdf(x, scale=np.sqrt(variance))
      label = f'{text}{variance:.3g}'
      axes.plot(x, density, stroke, color=colour, lw=width, label=label)
  title = f'The limit is normal: K = {k}'
  style.label(axes, title, r'$\sqrt{K}$ (estimate − truth)', 'density')


def define_flags() -> None:
  """The flags of `python -m experiments.study sampling_operators`."""
  from absl import flags

  flags.DEFINE_string(
    'out', 'experiments/results', 'the folder for CSVs and figure'
  )
  flags.DEFINE_integer(
    'trials', 20_000, 'trials of each estimate', 2, 10_000_000
  )
  flags.DEFINE_integer('seed', 0, 'seed of the draws', 0, configs.MAX_SEED)
  flags.DEFINE_list(
    'ks',
    [str(2**i) for i in range(2, 11)],
    'numbers of sampled actions to measure; at least two of them must be '
    f'{_FIT_FROM} or more, to fit a slope',
  )


def _read_ks(texts: Sequence[str]) -> list[int]:
  try:
    ks = sorted({int(text) for text in texts})
  except ValueError:
    ks = []
  if len([k for k in ks if k >= _FIT_FROM]) < 2 or ks[0] < 1:
    raise UserError(
      f'ks={",".join(texts)}: must be whole numbers, each at least 1, and at '
      f'least two of them {_FIT_FROM} or more'
    )
  return ks


def main() -> None:
  """Measures as the flags say.

  Raises:
    UserError: wrong numbers of sampled actions.
  """
  from absl import flags

  values = flags.FLAGS
  ks, out = _read_ks(values.ks), pathlib.Path(values.out)
  configs.check_place('out', out, folder=True)
  out.mkdir(parents=True, exist_ok=True)
  terminal.begin(
    'policy improvement from K sampled actions, K = '
    f'{", ".join(map(str, ks))}; {values.trials:,} trials each'
  )
  problem, rows, errors = make_problem(), [], {}
  predictions = predict(problem)
  for k in ks:
    for row, error in draw_estimates(
      problem, predictions, k, values.trials, values.seed
    ):
      rows.append(row)
      if (row.beta, row.correction) == (_SHOWN_BETA, 'beta_hat/beta'):
        errors[row.operator] = error
    print(f'K = {k} of {ks[-1]}', flush=True)
  fitted = slopes(rows)
  for operator, beta, correction, slope in fitted:
    print(f'{operator:5} {beta:9} {correction:14} rmse ~ K^{slope:.3f}')
  stem = out / 'operators_convergence'
  tables.write_records(stem.with_suffix('.csv'), rows, digits=6)
  tables.write_lines(
    out / 'operators_slopes.csv',
    [('operator', 'beta', 'correction', 'slope'), *fitted],
    digits=6,
  )
  figure(rows, errors, stem.with_suffix('.png'))
  terminal.end(
    f'{stem}.csv, {stem}.png, {out / "operators_slopes.csv"}',
    'python -m experiments.train --preset=sampled_muzero_pendulum',
  )
