"""Action distributions against integrals, enumeration, numpy and distrax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from networks import actions

LOW, HIGH = np.float32([-2, 0]), np.float32([2, 10])
UNIT = (np.float32([-1]), np.float32([1]))
# Of the head; the second row saturates.
GAUSS = np.float32([[0.3, -1.0, 0.2, -0.8], [40.0, -40.0, -30.0, 5.0]])
FACTORS = (3, 2, 4)
JOINT = math.prod(FACTORS)


def _logits(rows, columns, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(0, 1.5, (rows, columns)).astype(np.float32)


def _grid(low, high, cells):
  """Midpoints `[cells^D, D]` of a grid over a box."""
  middles = (np.arange(cells) + 0.5) / cells
  axes = [a + (b - a) * middles for a, b in zip(low, high)]
  points = np.stack(np.meshgrid(*axes, indexing='ij'), -1)
  return points.reshape(-1, len(low)).astype(np.float32)


def _assert_frequencies(counts, probs):
  """No cell is further from its expectation than 5 standard errors."""
  total, probs = counts.sum(), np.asarray(probs, np.float64)
  error = np.sqrt(total * probs * (1 - probs))
  assert (np.abs(counts - total * probs) <= 5 * error + 1e-3).all()


def _keys(key, rows):
  """A key for each row."""
  return jax.random.split(key, len(rows))


def _compiled(family):
  """The family, its functions compiled: one by one they are slow to trace."""
  static = {'draw': 1, 'noise_sample': 2, 'distinct': 2}
  functions = {
    name: jax.jit(value, static_argnums=static.get(name))
    for name, value in family._asdict().items()
    if callable(value)
  }
  return family._replace(**functions)


@pytest.fixture(scope='module')
def gaussian():
  return _compiled(actions.tanh_gaussian(LOW, HIGH))


@pytest.fixture(scope='module')
def bins():
  return _compiled(actions.factored_bins(LOW, HIGH, 5))


@pytest.fixture(scope='module')
def product():
  return _compiled(actions.factored_index(FACTORS))


@pytest.fixture(scope='module')
def joint():
  return _compiled(actions.flat(JOINT, FACTORS))


# Real vectors


@pytest.mark.parametrize(('size', 'cells'), [(1, 4000), (2, 400)])
def test_gaussian_density_integrates_to_one(size, cells):
  low, high = LOW[:size], HIGH[:size]
  family = _compiled(actions.tanh_gaussian(low, high))
  parameters = np.float32([[0.3, -0.6, -0.5, 0.1][: 2 * size]])
  points = _grid(low, high, cells)[None]
  density = np.exp(family.log_prob(parameters, points), dtype=np.float64)
  # The unit box has volume 2^D.
  assert density.mean() * 2**size == pytest.approx(1, abs=2e-3)


def test_gaussian_log_prob_equals_distrax(gaussian):
  import distrax

  parameters = GAUSS[:1]
  mean = 5 * np.tanh(parameters[0, :2] / 5)
  raw = parameters[0, 2:] + np.log(np.expm1(0.9))
  std = 0.1 + np.log1p(np.exp(raw))
  oracle = distrax.Transformed(
    distrax.Normal(jnp.asarray(mean), jnp.asarray(std)), distrax.Tanh()
  )
  points = np.random.default_rng(0).uniform(-0.99, 0.99, (6, 2))
  want = [oracle.log_prob(jnp.float32(point)).sum() for point in points]
  got = gaussian.log_prob(
    parameters, np.float32([0, 5] + [2, 5] * points)[None]
  )
  np.testing.assert_allclose(got[0], want, rtol=2e-4, atol=2e-5)


def test_a_head_at_zero_is_the_initial_distribution():
  family = _compiled(
    actions.tanh_gaussian(LOW, HIGH, min_std=0.2, init_std=0.7)
  )
  zeros = np.zeros((1, 4), np.float32)
  draws = np.float32([[[1, -1], [0, 2]]])
  got = family.sample(draws, zeros)
  want = [0, 5] + [2, 5] * np.tanh(0.7 * draws.astype(np.float64))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(family.mode(zeros), [[0, 5]], atol=1e-6)


def test_gaussian_samples_follow_the_density(gaussian):
  parameters = GAUSS[:1]
  draws = gaussian.draw(jax.random.key(1), (1, 20_000))
  samples = np.asarray(gaussian.sample(draws, parameters))[0]
  cells, fine = 6, 60
  points = _grid(LOW, HIGH, cells * fine)[None]
  density = np.exp(gaussian.log_prob(parameters, points))[0]
  density = density.reshape(cells, fine, cells, fine).mean((1, 3))
  counts, *_ = np.histogram2d(
    *samples.T, cells, [[LOW[0], HIGH[0]], [LOW[1], HIGH[1]]]
  )
  _assert_frequencies(counts, density / density.sum())


def test_gaussian_temper_scales_the_normal(gaussian):
  tempered = gaussian.temper(GAUSS, 4.0)
  # Standard deviations, seen through samples close to the mean.
  draws = np.full((2, 1, 2), 1e-1, np.float32)
  inner = lambda x: np.arctanh((np.asarray(x) - [0, 5]) / [2, 5])
  for row in range(1):
    mean = inner(gaussian.mode(GAUSS))[row]
    plain = inner(gaussian.sample(draws, GAUSS))[row, 0] - mean
    wide = inner(gaussian.sample(draws, tempered))[row, 0] - mean
    np.testing.assert_allclose(wide, 2 * plain, rtol=1e-4)
  np.testing.assert_allclose(
    gaussian.temper(GAUSS, 1.0)[0], GAUSS[0], rtol=1e-5, atol=1e-6
  )
  # A standard deviation stops at min_std, with finite parameters.
  narrow = gaussian.temper(GAUSS, 1e-4)
  assert np.isfinite(narrow).all()
  offset = inner(gaussian.sample(draws, narrow))[0, 0] - mean
  np.testing.assert_allclose(offset, [0.01, 0.01], rtol=1e-3)


def test_gaussian_entropy_against_an_integral():
  family = _compiled(actions.tanh_gaussian(*UNIT))
  parameters = np.float32([[0.4, -0.3], [-1.0, 1.5]])
  mean, raw = parameters.astype(np.float64).T
  mean = 5 * np.tanh(mean / 5)
  std = 0.1 + np.log1p(np.exp(raw) * np.expm1(0.9))
  x = np.linspace(-20, 20, 100_001)[:, None]
  log_density = stats.norm.logpdf(x, mean, std) + 2 * np.log(np.cosh(x))
  want = -(stats.norm.pdf(x, mean, std) * log_density).sum(0) * 4e-4
  # Quantiles in place of random numbers: the estimate's own error is small.
  draws = stats.norm.ppf((np.arange(4000) + 0.5) / 4000).astype(np.float32)
  draws = np.tile(draws[:, None], (2, 1, 1))
  got = family.entropy(draws, parameters)
  np.testing.assert_allclose(got, want, atol=2e-3)
  gradient = jax.grad(lambda p: family.entropy(draws, p).sum())(
    jnp.asarray(parameters)
  )
  # A wide normal piles up at the bounds: entropy falls with its width there.
  assert gradient[0, 1] > 0 > gradient[1, 1]


def test_gaussian_is_finite_at_saturation(gaussian):
  edges = np.tile(np.stack([LOW, HIGH, LOW - 1, HIGH + 1]), (2, 1, 1))
  draws = np.tile(np.float32([[[0, 0], [9, -9]]]), (2, 1, 1))

  def score(parameters, at):
    samples = gaussian.sample(draws, parameters)
    return (
      gaussian.log_prob(parameters, at).sum()
      + gaussian.log_prob(parameters, samples).sum()
      + gaussian.entropy(draws, parameters).sum()
    )

  value, gradients = jax.value_and_grad(score, (0, 1))(
    jnp.asarray(GAUSS), edges
  )
  assert np.isfinite(value)
  assert all(np.isfinite(x).all() for x in gradients)
  assert np.abs(gradients[0]).max() > 0
  samples = np.asarray(gaussian.sample(draws, GAUSS))
  assert (samples > LOW).all() and (samples < HIGH).all()
  np.testing.assert_allclose(samples[1, 1], [2, 0], atol=1e-4)


def test_gaussian_samples_are_differentiable(gaussian):
  draws = np.float32([[[0.5, -1]]])
  first = lambda p: gaussian.sample(draws, p)[0, 0, 0]
  gradient = jax.grad(first)(jnp.asarray(GAUSS[:1]))[0]
  step = np.float32([0, 0, 1e-2, 0])
  slope = (first(GAUSS[:1] + step) - first(GAUSS[:1] - step)) / 2e-2
  assert gradient[2] == pytest.approx(float(slope), rel=1e-3)
  np.testing.assert_array_equal(gradient[jnp.array([1, 3])], [0, 0])


def test_gaussian_noise_is_an_exact_density(gaussian):
  noise = gaussian.noise(_keys(jax.random.key(3), GAUSS), GAUSS, 0.5)
  assert noise.shape == (2, 2, 7)
  points = np.tile(_grid(LOW, HIGH, 70), (2, 1, 1))
  log_density = gaussian.noise_log_prob(noise, points)
  np.testing.assert_allclose(np.exp(log_density).mean(1) * 4, [1, 1], rtol=1e-5)
  # A point in cell (0, 6) of a 7 x 7 grid whose cells have area (2 / 7)^2.
  corner = np.tile(np.float32([-2, 10]), (2, 1, 1))
  np.testing.assert_allclose(
    np.exp(gaussian.noise_log_prob(noise, corner))[:, 0],
    noise[:, 0, 0] * noise[:, 1, 6] * 3.5**2,
    rtol=1e-5,
  )
  samples = np.asarray(
    gaussian.noise_sample(_keys(jax.random.key(4), noise), noise, 20_000)
  )
  assert (samples >= LOW).all() and (samples <= HIGH).all()
  for row in range(2):
    counts, *_ = np.histogram2d(
      *samples[row].T, 14, [[LOW[0], HIGH[0]], [LOW[1], HIGH[1]]]
    )
    cells = np.repeat(np.asarray(noise[row]), 2, -1) / 2
    _assert_frequencies(counts, np.outer(*cells))


def test_dirichlet_noise_has_its_moments(product):
  # Of 3 components: mean 1 / 3, variance 2 / 9 / (3 alpha + 1).
  parameters = np.zeros((20_000, sum(FACTORS)), np.float32)
  for alpha in (0.3, 2.0):
    noise = np.asarray(
      product.noise(_keys(jax.random.key(0), parameters), parameters, alpha)
    )
    first = noise[:, 0, :3]
    np.testing.assert_allclose(noise.sum(-1), np.ones((20_000, 3)), rtol=1e-5)
    np.testing.assert_allclose(first.mean(0), np.full(3, 1 / 3), atol=0.01)
    variance = 2 / 9 / (3 * alpha + 1)
    np.testing.assert_allclose(first.var(0), np.full(3, variance), rtol=0.05)
    # Factors are padded to the longest; the padding gets nothing.
    assert not noise[:, 0, 3:].any() and not noise[:, 1, 2:].any()


# Finite sets


def _joint_log_probs(parameters, sizes):
  """Log-probabilities `[B, prod(sizes)]` of all joint actions, C order."""
  rows = []
  for row in np.asarray(parameters, np.float64):
    total = np.zeros(())
    for part in np.split(row, np.cumsum(sizes)[:-1]):
      log_p = part - np.log(np.exp(part).sum())
      total = np.add.outer(total, log_p)
    rows.append(total.ravel())
  return np.stack(rows)


def test_product_equals_flat_over_the_joint(product, joint):
  parameters = _logits(2, sum(FACTORS))
  log_probs = _joint_log_probs(parameters, FACTORS)
  everything = np.tile(np.arange(JOINT, dtype=np.int32), (2, 1))
  np.testing.assert_allclose(
    product.log_prob(parameters, everything), log_probs, rtol=1e-5
  )
  logits = (log_probs + 3).astype(np.float32)
  np.testing.assert_allclose(
    joint.log_prob(logits, everything), log_probs, rtol=1e-5
  )
  entropy = -(np.exp(log_probs) * log_probs).sum(1)
  draws = product.draw(jax.random.key(0), (2, 3))
  assert draws.shape == (2, 3, 3)
  np.testing.assert_allclose(
    product.entropy(draws, parameters), entropy, rtol=1e-5
  )
  np.testing.assert_allclose(
    joint.entropy(draws[..., :1], logits), entropy, rtol=1e-5
  )
  best = log_probs.argmax(1)
  np.testing.assert_array_equal(product.mode(parameters), best)
  np.testing.assert_array_equal(joint.mode(logits), best)
  np.testing.assert_array_equal(product.identity(everything), everything)
  np.testing.assert_array_equal(joint.identity(everything), everything)
  # Both see an action as the same three one-hot vectors.
  digits = np.unravel_index(np.arange(JOINT), FACTORS)
  hot = np.concatenate([np.eye(n)[d] for n, d in zip(FACTORS, digits)], 1)
  np.testing.assert_array_equal(product.encode(everything[0]), hot)
  np.testing.assert_array_equal(joint.encode(everything)[1], hot)
  assert product.encoded_size == joint.encoded_size == 9
  assert product.num_actions == joint.num_actions == JOINT
  assert (product.num_parameters, joint.num_parameters) == (9, JOINT)
  np.testing.assert_array_equal(actions.flat(4).encode(np.arange(4)), np.eye(4))


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_categorical_temper_is_the_power(product, temperature):
  parameters = _logits(2, sum(FACTORS), 1)
  everything = np.tile(np.arange(JOINT, dtype=np.int32), (2, 1))
  power = np.exp(_joint_log_probs(parameters, FACTORS) / temperature)
  got = product.log_prob(product.temper(parameters, temperature), everything)
  np.testing.assert_allclose(
    np.exp(got), power / power.sum(1, keepdims=True), rtol=2e-5
  )


@pytest.mark.parametrize('name', ['product', 'joint'])
def test_samples_have_their_probabilities(name, request):
  family = request.getfixturevalue(name)
  parameters = _logits(2, family.num_parameters, 2)
  everything = np.tile(np.arange(JOINT, dtype=np.int32), (2, 1))
  draws = family.draw(jax.random.key(0), (2, 20_000))
  noise = family.noise(_keys(jax.random.key(1), parameters), parameters, 0.5)
  cases = [
    (family.sample(draws, parameters), family.log_prob(parameters, everything)),
    (
      family.noise_sample(_keys(jax.random.key(2), noise), noise, 20_000),
      family.noise_log_prob(noise, everything),
    ),
  ]
  for samples, log_probs in cases:
    assert samples.dtype == np.int32
    probs = np.exp(np.asarray(log_probs, np.float64))
    np.testing.assert_allclose(probs.sum(1), [1, 1], rtol=1e-5)
    for row in range(2):
      counts = np.bincount(samples[row], minlength=JOINT)
      _assert_frequencies(counts, probs[row])


def test_a_large_set_is_sampled_by_its_cumulative_sum():
  # Larger than the sets that are compared at once.
  family = _compiled(actions.flat(2401))
  logits = _logits(2, 2401)
  logits[:, ::3] = np.finfo(np.float32).min
  assert family.draw(jax.random.key(0), (4, 3)).shape == (4, 3, 1)
  probs = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
  edges = np.cumsum(probs / probs.sum(1, keepdims=True), 1)
  uniforms = np.linspace(0, 1 - 2**-23, 500, dtype=np.float32)
  got = np.asarray(family.sample(np.tile(uniforms[:, None], (2, 1, 1)), logits))
  for row in range(2):
    want = np.searchsorted(edges[row], uniforms, side='right')
    assert (got[row] % 3 > 0).all()
    clear = np.abs(edges[row][:, None] - uniforms).min(0) > 1e-5
    assert clear.sum() > 400
    np.testing.assert_array_equal(got[row][clear], want[clear])


def test_nothing_impossible_is_ever_drawn():
  family = _compiled(actions.flat(100))
  logits = np.full((1, 100), -500, np.float32)
  logits[0, [7, 60]] = 0
  uniforms = np.float32([0, 0.25, 0.5, 0.75, 1 - 2**-23])
  got = family.sample(uniforms[None, :, None], logits)
  np.testing.assert_array_equal(got, [[7, 7, 60, 60, 60]])


# Bins


def test_bins_by_hand(bins):
  assert (bins.num_parameters, bins.num_actions) == (10, 25)
  parameters = _logits(1, 10)
  corners = np.float32([[[-2, 0], [2, 10], [0, 2.5]]])
  log_p = parameters.reshape(2, 5)
  log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
  want = [log_p[0, i] + log_p[1, j] for i, j in [(0, 0), (4, 4), (2, 1)]]
  np.testing.assert_allclose(
    bins.log_prob(parameters, corners)[0], want, rtol=1e-5
  )
  # A real action goes to the nearest bin, from outside to the last.
  other = np.float32([[[-1.6, -3], [3, 8.8], [-0.4, 3.7]]])
  np.testing.assert_allclose(
    bins.log_prob(parameters, other)[0], want, rtol=1e-5
  )
  np.testing.assert_array_equal(bins.identity(other), [[0, 24, 11]])
  np.testing.assert_allclose(
    bins.encode(corners), [[[-1, -1], [1, 1], [0, -0.5]]], atol=1e-6
  )
  assert bins.encoded_size == 2
  mode = np.asarray(bins.mode(parameters))
  want = [np.linspace(-2, 2, 5)[log_p[0].argmax()], 2.5 * log_p[1].argmax()]
  np.testing.assert_array_equal(mode, np.float32([want]))
  noise = bins.noise(_keys(jax.random.key(0), parameters), parameters, 1.0)
  np.testing.assert_allclose(
    bins.noise_log_prob(noise, corners)[0, 1],
    np.log(noise[0, 0, 4] * noise[0, 1, 4]),
    rtol=1e-5,
  )


def test_bins_samples_are_the_bins(bins):
  parameters = _logits(2, 10, 3)
  draws = bins.draw(jax.random.key(0), (2, 20_000))
  samples = np.asarray(bins.sample(draws, parameters))
  assert samples.dtype == np.float32 and samples.shape == (2, 20_000, 2)
  everything = np.asarray(
    [[x, y] for x in np.linspace(-2, 2, 5) for y in np.linspace(0, 10, 5)],
    np.float32,
  )
  probs = np.exp(bins.log_prob(parameters, np.tile(everything, (2, 1, 1))))
  for row in range(2):
    found = (samples[row][:, None] == everything).all(-1)
    assert found.any(1).all()
    _assert_frequencies(found.sum(0), probs[row])


@pytest.mark.parametrize('make', ['gaussian', 'bins'])
def test_action_shapes_are_kept(make):
  build = {
    'gaussian': lambda *box: _compiled(actions.tanh_gaussian(*box)),
    'bins': lambda *box: _compiled(actions.factored_bins(*box, 3)),
  }[make]
  draws = np.random.default_rng(0).random((2, 5, 4), np.float32)
  low = -np.ones(4, np.float32)
  vector = build(low, -low)
  matrix = build(low.reshape(2, 2), -low.reshape(2, 2))
  parameters = _logits(2, vector.num_parameters)
  samples = matrix.sample(draws, parameters)
  assert samples.shape == (2, 5, 2, 2)
  plain = vector.sample(draws, parameters)
  np.testing.assert_allclose(samples.reshape(2, 5, 4), plain, rtol=1e-6)
  plain = samples.reshape(2, 5, 4)
  np.testing.assert_allclose(
    matrix.log_prob(parameters, samples),
    vector.log_prob(parameters, plain),
    rtol=1e-5,
  )
  np.testing.assert_array_equal(matrix.encode(samples), vector.encode(plain))
  assert matrix.mode(parameters).shape == (2, 2, 2)
  noise = matrix.noise(_keys(jax.random.key(0), parameters), parameters, 1.0)
  noisy = matrix.noise_sample(_keys(jax.random.key(1), noise), noise, 3)
  assert noisy.shape == (2, 3, 2, 2)
  scalar = build(np.float32(-1), np.float32(1))
  parameters = parameters[:, : scalar.num_parameters]
  samples = scalar.sample(draws[..., :1], parameters)
  assert samples.shape == (2, 5)
  assert scalar.identity(samples).shape == (2, 5)
  assert scalar.encode(samples).shape == (2, 5, 1)
  assert scalar.log_prob(parameters, samples).shape == (2, 5)


# Identity


def test_identity_of_real_vectors(gaussian):
  points = np.random.default_rng(0).uniform(-1, 1, (1, 3000, 2))
  points = points.astype(np.float32)
  identity = np.asarray(gaussian.identity(points))
  assert identity.dtype == np.int32 and identity.shape == (1, 3000)
  # 3000 random hashes have a collision with probability 1e-3.
  assert len(np.unique(identity)) == 3000
  np.testing.assert_array_equal(gaussian.identity(points.copy()), identity)
  pairs = np.float32([[[0.0, 1], [-0.0, 1], [1, 0], [1, 1], [0, 0]]])
  first, same, *others = np.asarray(gaussian.identity(pairs))[0]
  assert first == same and len({first, *others}) == 4
  # Neighbours to the last bit differ in about half of the hash's bits.
  near = np.nextafter(points, np.float32(2))
  flipped = identity ^ np.asarray(gaussian.identity(near))
  ones = np.unpackbits(flipped.view(np.uint8)).mean()
  assert ones == pytest.approx(0.5, abs=0.01)


def test_identity_of_a_joint_that_does_not_fit():
  low = np.zeros(12, np.float32)
  family = _compiled(actions.factored_bins(low, low + 1, 7))
  assert family.num_actions == 7**12
  draws = family.draw(jax.random.key(0), (1, 1000))
  samples = family.sample(draws, np.zeros((1, 84), np.float32))
  identity = np.asarray(family.identity(samples))
  assert len(np.unique(identity)) == len(np.unique(samples[0], axis=0)) == 1000
  # Equal bins, and not equal bits, make equal actions.
  np.testing.assert_array_equal(family.identity(samples + 0.01), identity)
