"""Layers, two-hot scalars, the LSTM and the plain MLP, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_close

from networks import heads, mlp, resnet, value_prefix


def _inverse(y):
  """The textbook inverse of h, in float64."""
  y = np.asarray(y, np.float64)
  root = np.sqrt(1 + 4e-3 * (np.abs(y) + 1 + 1e-3))
  return np.sign(y) * (((root - 1) / 2e-3) ** 2 - 1)


def test_signed_hyperbolic_and_its_inverse():
  x = np.array([-58705.58, -10.0, -1.0, -1e-4, 0.0, 1e-4, 3.0, 10.0, 5e4])
  h = np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 1e-3 * x
  np.testing.assert_allclose(
    heads.signed_hyperbolic(jnp.float32(x)), h, rtol=3e-7
  )
  np.testing.assert_allclose(
    heads.signed_parabolic(jnp.float32(h)), x, rtol=2e-6
  )
  # By hand: 300 = sqrt(x + 1) - 1 + 0.001 x.
  assert heads.signed_parabolic(jnp.float32(300)) == pytest.approx(
    58705.58, rel=1e-6
  )


def test_two_hot_by_hand():
  # h(10) = sqrt(11) - 1 + 0.01 = 2.32662, and bin 300 stands for zero.
  two_hot = np.asarray(heads.to_two_hot(jnp.float32([10.0, 0.0]), 601))
  assert set(np.flatnonzero(two_hot[0])) == {302, 303}
  np.testing.assert_allclose(two_hot[0, 302:304], [0.67337, 0.32663], atol=1e-5)
  np.testing.assert_array_equal(np.flatnonzero(two_hot[1]), [300])


def test_two_hot_clips_beyond_the_support():
  two_hot = heads.to_two_hot(jnp.float32([1e6, -1e6]), 5)
  np.testing.assert_array_equal(two_hot, [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]])


def test_two_hot_equals_rlax():
  import rlax

  pair = rlax.muzero_pair(-300.0, 300.0, 601, rlax.SIGNED_HYPERBOLIC_PAIR)
  x = jnp.linspace(-500, 500, 64)
  two_hot = heads.to_two_hot(x, 601)
  # rlax broadcasts scalars against bins implicitly.
  with jax.numpy_rank_promotion('allow'):
    # rlax counts bins from -300, where float32 numbers are 3e-5 apart.
    np.testing.assert_allclose(two_hot, pair.apply(x), atol=4e-5)
    logits = jax.random.normal(jax.random.key(0), (8, 601))
    # rlax's own inverse is off by up to 2e-4 near zero in float32.
    np.testing.assert_allclose(
      heads.from_logits(logits),
      pair.apply_inv(jax.nn.softmax(logits)),
      rtol=1e-4,
      atol=5e-4,
    )


def test_from_logits_inverts_two_hot():
  x = jnp.float32([[-20.0, -0.3], [0.0, 7.0]])
  logits = jnp.log(jnp.maximum(heads.to_two_hot(x, 21), 1e-30))
  np.testing.assert_allclose(heads.from_logits(logits), x, rtol=1e-5)
  assert heads.from_logits(jnp.zeros(601)) == 0
  np.testing.assert_allclose(
    heads.from_logits(jnp.float32([0, 0, 3])),
    _inverse((np.exp(3) - 1) / (np.exp(3) + 2)),
    rtol=1e-5,
  )


def test_convolution_and_its_gradient(key):
  """Our gradient equals XLA's, also where seeds are batched."""
  keys = jax.random.split(key, 3)
  x = jax.random.normal(keys[0], (2, 4, 5, 3, 2))
  kernel = jax.random.normal(keys[1], (2, 3, 3, 2, 4))
  weight = jax.random.normal(keys[2], (2, 4, 5, 3, 4))

  def plain(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  def value_and_gradients(convolve, x, kernel, weight):
    f = lambda x, kernel: (convolve(x, kernel) * weight).sum()
    return jax.value_and_grad(f, (0, 1))(x, kernel)

  want = [
    value_and_gradients(plain, x[i], kernel[i], weight[i]) for i in (0, 1)
  ]
  want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *want)
  got = jax.vmap(lambda *a: value_and_gradients(resnet.convolve, *a))(
    x, kernel, weight
  )
  assert_close(got, want, 0.0001, 1e-05)


def test_default_gradient_is_the_cpu_gradient(key):
  """What accelerators run, run here."""
  keys = jax.random.split(key, 3)
  x = jax.random.normal(keys[0], (2, 4, 3, 2))
  kernel = jax.random.normal(keys[1], (3, 3, 2, 4))
  dy = jax.random.normal(keys[2], (2, 4, 3, 4))
  for a, b in zip(
    resnet._backward_default(x, kernel, dy), resnet._backward_cpu(x, kernel, dy)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('size', [4, 5])
def test_halving_is_padded_average_pooling(size, key):
  x = np.asarray(jax.random.normal(key, (1, size, size, 1)))
  padded = np.pad(x[0, :, :, 0], 1)
  half = (size + 1) // 2
  want = [
    [padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].mean() for j in range(half)]
    for i in range(half)
  ]
  got = resnet._halve(jnp.asarray(x))
  assert got.shape == (1, half, half, 1)
  np.testing.assert_allclose(got[0, :, :, 0], want, rtol=1e-5, atol=1e-6)


def test_batch_norm_by_hand():
  norm = mlp.Norm('batch', momentum=0.9)
  x = jnp.float32([[1, 10], [3, 10]])
  variables = norm.init(jax.random.key(0), x, False)
  # Fresh statistics are mean 0 and variance 1.
  y = norm.apply(variables, x, False)
  np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
  y, new = norm.apply(variables, x, True, mutable=['stats'])
  np.testing.assert_allclose(y, [[-1, 0], [1, 0]], atol=1e-5)
  np.testing.assert_allclose(new['stats']['mean'], [0.2, 1.0], rtol=1e-6)
  np.testing.assert_allclose(new['stats']['variance'], [1.0, 0.9], rtol=1e-6)


def test_batch_norm_does_not_cancel():
  x = 1e4 + jnp.float32([[-1], [0], [1]])
  norm = mlp.Norm('batch')
  variables = norm.init(jax.random.key(0), x, False)
  y, _ = norm.apply(variables, x, True, mutable=['stats'])
  np.testing.assert_allclose(y[:, 0], np.sqrt(1.5) * np.array([-1, 0, 1]), 1e-3)


def test_batch_norm_over_devices_equals_one_device(key):
  x = jax.random.normal(key, (4, 3))
  norm = mlp.Norm('batch', reduce=lambda x: jax.lax.pmean(x, 'devices'))
  alone = mlp.Norm('batch')
  variables = alone.init(key, x, False)
  want, want_stats = alone.apply(variables, x, True, mutable=['stats'])
  got, stats = jax.vmap(
    lambda x: norm.apply(variables, x, True, mutable=['stats']),
    axis_name='devices',
  )(x.reshape(2, 2, 3))
  np.testing.assert_allclose(got.reshape(4, 3), want, rtol=1e-5, atol=1e-6)
  for name in ('mean', 'variance'):
    for device in (0, 1):
      np.testing.assert_allclose(
        stats['stats'][name][device], want_stats['stats'][name], rtol=1e-5
      )


def test_lstm_cell_by_numpy(key):
  cell = value_prefix.LSTMCell(3)
  x = jax.random.normal(key, (2, 4))
  carry = (0.5 * jnp.ones((2, 3)), -0.5 * jnp.ones((2, 3)))
  params = cell.init(key, carry, x)['params']
  params = mlp.randomise(params, key)
  (c, h), y = cell.apply({'params': params}, carry, x)

  dense = jax.tree.map(np.asarray, params['Dense_0'])
  gates = (
    np.concatenate([np.asarray(x), np.asarray(carry[1])], -1) @ dense['kernel']
    + dense['bias']
  )
  i, f, o, g = np.split(gates, 4, -1)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  want_c = sigmoid(f) * 0.5 + sigmoid(i) * np.tanh(g)
  np.testing.assert_allclose(c, want_c, rtol=1e-5, atol=1e-6)
  want_h = sigmoid(o) * np.tanh(want_c)
  np.testing.assert_allclose(h, want_h, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(y, h)


def test_mlp_by_numpy(key):
  network = mlp.make(3, (5,), 2)
  params = jax.tree.map(np.asarray, network.init(key))
  first, second = params['Dense_0'], params['Dense_1']
  x = np.asarray(jax.random.normal(key, (7, 3)))
  hidden = np.maximum(x @ first['kernel'] + params['Norm_0']['bias'], 0)
  want = hidden @ second['kernel'] + second['bias']
  np.testing.assert_allclose(
    network.apply(params, x), want, rtol=1e-4, atol=1e-5
  )


def test_kernels_have_unit_gain_and_differ(key):
  params = mlp.make(400, (300,), 300, norm='layer').init(key)
  first, second = params['Dense_0']['kernel'], params['Dense_1']['kernel']
  assert float(first.std()) * 20 == pytest.approx(1, abs=0.02)
  assert float(second.std()) * 300**0.5 == pytest.approx(1, abs=0.02)
  assert abs(np.corrcoef(first[:300].ravel(), second.ravel())[0, 1]) < 0.02
  other = mlp.make(400, (300,), 300, norm='layer').init(jax.random.key(1))
  assert not np.array_equal(first, other['Dense_0']['kernel'])


def test_mlp_can_start_at_zero(key):
  network = mlp.make(3, (), 2, zero_init=True)
  assert not network.apply(network.init(key), jnp.ones((1, 3))).any()


def test_mlp_refuses_bad_sizes():
  with pytest.raises(ValueError, match=r'sizes=\(3, 0, 2\).*at least 1'):
    mlp.make(3, (0,), 2)
  with pytest.raises(ValueError, match=r"norm='batch'.*'none' or 'layer'"):
    mlp.make(3, (4,), 2, norm='batch')
