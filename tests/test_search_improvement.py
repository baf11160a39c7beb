"""Improvement operators and their estimates, beside float64 references."""

import functools

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from launching import launch, read_csv, refused

from search import policies
from search.exact import improvement

OPERATORS = {'mpo': improvement.mpo(0.3), 'puct': improvement.puct(0.4)}
PRIOR = np.asarray([0.5, 0.05, 0.25, 0.12, 0.08])
BETA = PRIOR**0.5 / np.sum(PRIOR**0.5)
QVALUES = np.asarray([0.1, 0.9, -0.4, 0.6, 1.0])
# Not the Q-values, and far from 0: its mean must not count as noise.
X = np.asarray([8.0, 4.0, 5.0, 4.0, 5.0])

each_operator = pytest.mark.parametrize('name', OPERATORS)


@functools.cache
def compiled(name):
  return jax.jit(functools.partial(improvement.improve, OPERATORS[name]))


@functools.cache
def estimates(name):
  """`(log_prior, log_beta, qvalues, counts [N, A]) -> ([N, A], [N])`."""
  one = functools.partial(improvement.estimate, OPERATORS[name])
  return jax.jit(jax.vmap(one, (None, None, None, 0)))


def f32(x):
  return jnp.asarray(x, jnp.float32)


def g(name, u):
  return np.exp(u / 0.3) if name == 'mpo' else 0.4 / -u


def reference(name, prior, qvalues):
  """I pi and Z in float64, Z by a root finder of its own."""
  excess = lambda z: np.sum(prior * g(name, qvalues - z)) - 1
  low = np.max(qvalues) + 1e-12 if name == 'puct' else -1e2
  z = scipy.optimize.brentq(excess, low, 1e2, xtol=1e-14, rtol=1e-14)
  return prior * g(name, qvalues - z), z


@each_operator
def test_improve_matches_float64(name):
  rng = np.random.default_rng(1)
  for scale in (1e-3, 1.0, 10.0):
    prior = rng.dirichlet(np.full(5, 0.3)) + 1e-9
    qvalues = scale * rng.normal(size=5)
    want, want_z = reference(name, prior, qvalues)
    got, z = compiled(name)(f32(np.log(prior)), f32(qvalues))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(z, want_z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(got), 1, atol=2e-6)


def test_mpo_by_hand():
  # Weights 1/4 x 1, 1/4 x 2, 1/2 x 4 of sum 11/4.
  prior, ratio = [0.25, 0.25, 0.5], [1.0, 2.0, 4.0]
  operator = improvement.mpo(2.0)
  qvalues = 2 * np.log(ratio) + 7
  got, z = improvement.improve(operator, f32(np.log(prior)), f32(qvalues))
  np.testing.assert_allclose(got, np.asarray([1, 2, 8]) / 11, rtol=1e-6)
  np.testing.assert_allclose(z, 7 + 2 * np.log(11 / 4), rtol=1e-6)


def test_puct_by_hand():
  # 1/2 / (Z - 1) + 1/2 / Z = 1 is Z^2 - 2 Z + 1/2 = 0.
  operator = improvement.puct(1.0)
  got, z = improvement.improve(operator, jnp.log(f32([0.5, 0.5])), f32([1, 0]))
  root = 1 + np.sqrt(0.5)
  np.testing.assert_allclose(z, root, rtol=1e-6)
  np.testing.assert_allclose(got, [0.5 / (root - 1), 0.5 / root], rtol=1e-6)


@pytest.mark.parametrize('offset', [-3e4, 0.0, 3e4])
@pytest.mark.parametrize('best_prior', [1e-30, 1e-6, 0.5])
def test_puct_is_solved_where_the_best_action_is_unlikely(best_prior, offset):
  prior = np.asarray([best_prior, 0.3, 0.7 - best_prior])
  log_prior = f32(np.log(prior))
  # Exact in float32 at any of these offsets.
  qvalues = f32(np.asarray([1.0, 0.5, 0.75]) + offset)
  got, _ = compiled('puct')(log_prior, qvalues)
  want, _ = compiled('puct')(log_prior, qvalues - offset)
  np.testing.assert_allclose(jnp.sum(got), 1, atol=2e-6)
  np.testing.assert_array_equal(got, want)


@each_operator
def test_improved_policy_is_the_regularised_optimum(name):
  y, _ = reference(name, PRIOR, QVALUES)
  got, _ = compiled(name)(f32(np.log(PRIOR)), f32(QVALUES))
  if name == 'mpo':
    objective = lambda y: y @ QVALUES - 0.3 * y @ np.log(y / PRIOR)
  else:
    objective = lambda y: y @ QVALUES - 0.4 * PRIOR @ np.log(PRIOR / y)
  got = np.asarray(got, np.float64)
  best = objective(got / np.sum(got))
  rng = np.random.default_rng(0)
  for mix in (1.0, 0.1, 1e-2):
    others = (1 - mix) * y + mix * rng.dirichlet(np.ones(5), size=100)
    assert all(objective(other) < best for other in others)


def test_visits_of_a_bandit_tend_to_the_puct_operator():
  # Q spans [0, 1], so the search's rescaling leaves it as it is once each
  # action is tried; the best is tried first.
  prior, qvalues = f32([0.1, 0.5, 0.25, 0.15]), f32([0.0, 1.0, 0.7, 0.9])
  num_simulations = 600

  def recurrent_fn(params, key, action, embedding):
    del params, key
    zero = jnp.zeros_like(qvalues[action])
    logits = jnp.zeros((*action.shape, 4))
    output = mctx.RecurrentFnOutput(
      reward=qvalues[action],
      discount=zero,
      prior_logits=logits,
      value=zero,
    )
    return output, embedding

  root = mctx.RootFnOutput(
    prior_logits=jnp.log(prior)[None],
    value=f32([0.5]),
    embedding=jnp.zeros((1,)),
  )
  output = policies.puct(
    (),
    jax.random.key(0),
    root,
    recurrent_fn,
    num_simulations,
    max_depth=1,
    evaluate=True,
  )
  visits = num_simulations * np.asarray(output.action_weights[0])
  total = num_simulations + 4
  c = 1.25 + np.log((num_simulations + 19652 + 1) / 19652)
  operator = improvement.puct(float(c * np.sqrt(num_simulations) / total))
  want, _ = improvement.improve(operator, jnp.log(prior), qvalues)
  # Visits are whole numbers, and one is never taken back.
  np.testing.assert_allclose(visits + 1, total * want, atol=2.0)


@each_operator
def test_estimate_is_exact_where_frequencies_are(name):
  counts = np.asarray([4, 1, 2, 8, 1])
  beta = counts / np.sum(counts)
  want, want_z = compiled(name)(f32(np.log(PRIOR)), f32(QVALUES))
  got, z = estimates(name)(
    f32(np.log(PRIOR)), f32(np.log(beta)), f32(QVALUES), counts[None]
  )
  np.testing.assert_allclose(got[0], want, rtol=2e-6)
  np.testing.assert_allclose(z[0], want_z, rtol=2e-6)


@each_operator
def test_slots_may_be_split_merged_or_spare(name):
  log_prior, log_beta = np.log(PRIOR), np.log(BETA)
  merged, z = estimates(name)(
    f32(log_prior), f32(log_beta), f32(QVALUES), np.asarray([[3, 0, 2, 1, 0]])
  )
  assert merged[0, 1] == 0 and merged[0, 4] == 0
  # Action 0 twice, a spare slot full of rubbish, no slot for 1 and 4.
  actions, counts = np.asarray([0, 2, 0, 3, 1]), np.asarray([[2, 2, 1, 1, 0]])
  rubbish = lambda x, bad: f32(np.where(counts[0] > 0, x[actions], bad))
  split, split_z = estimates(name)(
    rubbish(log_prior, np.nan),
    rubbish(log_beta, -np.inf),
    rubbish(QVALUES, np.inf),
    counts,
  )
  assert split[0, 4] == 0
  np.testing.assert_allclose(split[0, 0] + split[0, 2], merged[0, 0], rtol=1e-5)
  np.testing.assert_allclose(split[0, 1], merged[0, 2], rtol=1e-5)
  np.testing.assert_allclose(split[0, 3], merged[0, 3], rtol=1e-5)
  np.testing.assert_allclose(split_z, z, rtol=1e-5)


def sigma_squared(name, beta):
  """The formula in float64, df/dZ by hand."""
  f, _ = reference(name, PRIOR, QVALUES)
  slope = f if name == 'mpo' else f**2 / PRIOR
  c = slope @ X / np.sum(slope)
  w = f / beta * (X - c)
  return beta @ w**2 - (beta @ w) ** 2


@each_operator
def test_asymptotic_variance_by_its_formula(name):
  args = map(f32, (np.log(PRIOR), np.log(BETA), QVALUES, X))
  got = improvement.asymptotic_variance(OPERATORS[name], *args)
  np.testing.assert_allclose(got, sigma_squared(name, BETA), rtol=2e-4)


TRIALS = 20_000


@functools.cache
def counts_of(k):
  rng = np.random.default_rng(k)
  return rng.multinomial(k, BETA, size=TRIALS)


@functools.cache
def errors(name, k):
  """`sum I_hat X - E_{I pi} X` of the trials, float64 `[TRIALS]`."""
  got, _ = estimates(name)(
    f32(np.log(PRIOR)), f32(np.log(BETA)), f32(QVALUES), counts_of(k)
  )
  truth, _ = reference(name, PRIOR, QVALUES)
  return np.asarray(got, np.float64) @ X - truth @ X


@each_operator
def test_the_limit_is_normal_with_sigma_squared(name):
  k, want = 2048, sigma_squared(name, BETA)
  measured = k * np.var(errors(name, k))
  # The variance of a normal sample's variance; 4 standard errors.
  assert abs(measured / want - 1) < 4 * np.sqrt(2 / TRIALS)
  scaled = errors(name, k) * np.sqrt(k / want)
  # Of 20,000 exactly normal numbers 1% would exceed 0.0115; K is finite.
  assert scipy.stats.kstest(scaled, 'norm').statistic < 0.02
  # The variance of the estimate with Z known is another number altogether.
  f, _ = reference(name, PRIOR, QVALUES)
  known_z = BETA @ (f / BETA * X) ** 2 - (f @ X) ** 2
  assert known_z > 3 * measured


@each_operator
def test_the_error_falls_as_the_root_of_k(name):
  ks = [32, 128, 512, 2048]
  rmse = [np.sqrt(np.mean(errors(name, k) ** 2)) for k in ks]
  slope = np.polyfit(np.log(ks), np.log(rmse), 1)[0]
  assert -0.6 < slope < -0.4


@each_operator
def test_without_the_correction_the_bias_stays(name):
  def bias(log_prior, k):
    one = functools.partial(improvement.improve, OPERATORS[name])
    policy, _ = jax.vmap(one, (0, None))(log_prior, f32(QVALUES))
    truth, _ = reference(name, PRIOR, QVALUES)
    return np.mean(np.asarray(policy, np.float64) @ X) - truth @ X

  k = 2048
  counts = counts_of(k)[:2000]
  forgotten = jax.vmap(improvement.uncorrected_log_prior, (None, 0))
  noise = 4 * np.sqrt(sigma_squared(name, BETA) / k / TRIALS)
  assert abs(np.mean(errors(name, k))) < noise + 1 / k
  for log_prior, tends_to in (
    (f32(np.log(PRIOR)), BETA * PRIOR),
    (jnp.zeros(5), BETA),
  ):
    limit, _ = reference(name, tends_to / np.sum(tends_to), QVALUES)
    truth, _ = reference(name, PRIOR, QVALUES)
    want = (limit - truth) @ X
    assert abs(want) > 0.25
    np.testing.assert_allclose(
      bias(forgotten(log_prior, counts), k), want, atol=0.01
    )


@pytest.mark.parametrize('make', [improvement.mpo, improvement.puct])
@pytest.mark.parametrize('bad', [0, -1.0, float('nan')])
def test_bad_parameters_are_refused(make, bad):
  with pytest.raises(ValueError, match=f'must be above 0, but is {bad}'):
    make(bad)


@pytest.mark.slow
def test_launcher(tmp_path):
  said = refused('study sampling_operators', '--ks=4,32')
  assert said.startswith('error: ks=4,32: must be')
  flags = ('--ks=32,256', '--trials=400', f'--out={tmp_path}')
  done = launch('study sampling_operators', *flags)
  assert f'results: {tmp_path}' in done.stdout
  rows = read_csv(tmp_path / 'operators_convergence.csv')
  # Two operators, three proposals, three priors, two K.
  assert len(rows) == 36
  large = [row for row in rows if row['k'] == '256']
  for row in large:
    # 5 standard errors, and a bias of order 1 / K.
    distance = abs(float(row['bias']) - float(row['bias_limit']))
    assert distance < 5 * float(row['bias_se']) + 1 / 256
  slopes = read_csv(tmp_path / 'operators_slopes.csv')
  assert len(slopes) == 18
  for row in slopes:
    if row['correction'] == 'beta_hat/beta':
      assert -0.65 < float(row['slope']) < -0.35
  assert (tmp_path / 'operators_convergence.png').stat().st_size > 10_000
