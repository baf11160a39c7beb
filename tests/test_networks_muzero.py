"""MuZero's networks: shapes, statistics, layers against plain loops."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_close, assert_equal

from networks import heads, muzero

B, A, BINS = 3, 4, 21
TINY = muzero.NetworkConfig(
  channels=4,
  latent_size=8,
  head_channels=2,
  head_hidden=(6,),
  lstm_size=5,
  value_bins=BINS,
  reward_bins=11,
  projector=(7, 9),
  predictor=(5,),
)
IMAGE = jax.ShapeDtypeStruct((5, 4, 2), np.float32)
VECTOR = jax.ShapeDtypeStruct((6,), np.float32)


def _spec(shape, dtype=np.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def _perturb(params):
  """Noise on every parameter, so that no head stays at zero."""
  rng = np.random.default_rng(0)
  noise = lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)
  return jax.tree.map(noise, params)


def _everything(net, params, stats, observation, action, train):
  """Calls every function once; outputs by name, and the last stats."""
  state, stats = net.represent(params, stats, observation, train)
  policy, value, stats = net.predict(params, stats, state, train)
  next_state, stats = net.dynamics(params, stats, state, action, train)
  reward, carry, stats = net.reward(
    params, stats, state, action, next_state, net.initial_carry(B), train
  )
  projection, stats = net.project(params, stats, next_state, train)
  prediction, stats = net.predict_projection(params, stats, projection, train)
  outputs = {
    'state': state,
    'next_state': next_state,
    'policy': policy,
    'value': value,
    'reward': reward,
    'carry': carry,
    'projection': projection,
    'prediction': prediction,
  }
  return outputs, stats


@pytest.fixture(scope='module')
def built():
  """Image latent, batch norm, value prefix: `(net, params, stats, inputs)`."""
  net = muzero.make(TINY, IMAGE, A)
  params, stats = jax.jit(net.init)(jax.random.key(0))
  rng = np.random.default_rng(1)
  observation = rng.random((B, *IMAGE.shape), np.float32)
  action = np.array([0, 3, 1], np.int32)
  return net, _perturb(params), stats, (observation, action)


@pytest.fixture(scope='module')
def compiled(built):
  """`_everything` of `built`, for train and for evaluation."""
  net = built[0]
  return {
    train: jax.jit(
      lambda params, stats, observation, action, train=train: _everything(
        net, params, stats, observation, action, train
      )
    )
    for train in (False, True)
  }


TORSOS = {
  'atari': ((96, 96, 2), np.uint8, (6, 6, 4)),
  'image': ((5, 4, 2), np.float32, (5, 4, 4)),
  'vector': ((6,), np.float32, (8,)),
}


COMBINED = (
  tuple(TORSOS),
  ('image', 'vector'),
  ('batch', 'layer', 'none'),
  ('reward', 'value_prefix'),
  ('float32', 'bfloat16'),
)


@pytest.mark.parametrize(
  ('torso', 'latent', 'norm', 'reward', 'dtype'),
  [
    # In every other diagonal each value meets each of all other columns.
    pytest.param(*row, marks=pytest.mark.slow if diagonal % 2 else ())
    for row, diagonal in zip(
      itertools.product(*COMBINED),
      map(sum, itertools.product(*(range(len(c)) for c in COMBINED))),
    )
  ],
)
def test_shapes_and_dtypes(torso, latent, norm, reward, dtype):
  shape, kind, latent_shape = TORSOS[torso]
  if latent == 'vector':
    latent_shape = (8,)
  config = dataclasses.replace(
    TINY, latent=latent, norm=norm, reward=reward, compute_dtype=dtype
  )
  net = muzero.make(config, _spec(shape, kind), A)
  params, stats = jax.eval_shape(net.init, jax.random.key(0))
  # The consistency loss needs batch norm, whatever the others have.
  others = set(stats) - {'projector', 'predictor'}
  assert stats and bool(others) == (norm == 'batch')
  without = dataclasses.replace(config, projection_norm=norm)
  _, none = jax.eval_shape(
    muzero.make(without, _spec(shape, kind), A).init, jax.random.key(0)
  )
  assert bool(none) == (norm == 'batch') and (none or none == {})
  for leaf in jax.tree.leaves((params, stats)):
    assert leaf.dtype == np.float32

  carry = ((B, 5), (B, 5)) if reward == 'value_prefix' else ()
  want = {
    'state': (B, *latent_shape),
    'next_state': (B, *latent_shape),
    'policy': (B, A),
    'value': (B, BINS),
    'reward': (B, 11),
    'carry': carry,
    'projection': (B, 9),
    'prediction': (B, 9),
  }
  for train in (False, True):
    outputs, new_stats = jax.eval_shape(
      lambda params, stats, observation, action, train=train: _everything(
        net, params, stats, observation, action, train
      ),
      params,
      stats,
      _spec((B, *shape), kind),
      _spec((B,), np.int32),
    )
    assert jax.tree.map(lambda x: x.shape, outputs) == want
    assert {x.dtype for x in jax.tree.leaves(outputs)} == {np.dtype('float32')}
    assert new_stats == stats


def test_torso_follows_the_observation():
  params = lambda shape: jax.eval_shape(
    muzero.make(TINY, _spec(shape), A).init, jax.random.key(0)
  )[0]
  assert 'torso' not in params((6,))
  assert 'ResidualBlock_0' in params((84, 84, 4))['torso']
  assert list(params((10, 5, 1))['torso']) == ['Conv_0', 'Norm_0']
  flat = dataclasses.replace(TINY, torso='vector')
  net = muzero.make(flat, _spec((10, 5)), A)
  params, _ = jax.eval_shape(net.init, jax.random.key(0))
  assert params['flatten']['kernel'].shape == (50, 8)


@pytest.mark.parametrize('side', [84, 96])
def test_atari_network_has_the_papers_size(side):
  net = muzero.make(
    muzero.NetworkConfig(), _spec((side, side, 12), np.uint8), 6
  )
  params, stats = jax.eval_shape(net.init, jax.random.key(0))
  state, _ = jax.eval_shape(
    lambda p, s, o: net.represent(p, s, o, False),
    params,
    stats,
    _spec((2, side, side, 12), np.uint8),
  )
  assert state.shape == (2, 6, 6, 64)

  conv = lambda a, b: 9 * a * b
  block = lambda c: 2 * (conv(c, c) + 2 * c)
  linear = lambda a, b: a * b + 2 * b  # with its norm
  out = lambda bins: 32 * bins + bins
  head = lambda bins: linear(64, 16) + linear(576, 32) + out(bins)
  torso = (
    conv(12, 32) + 2 * 32 + block(32)
    + conv(32, 64) + conv(64, 64) + 2 * 2 * 64 + conv(32, 64)
    + block(64) + block(64)
  )  # fmt: skip
  lstm = (576 + 512) * 4 * 512 + 4 * 512
  want = {
    'represent': torso + block(64),
    'dynamics': conv(65, 64) + 2 * 64 + block(64),
    'predict': block(64) + head(6) + head(601),
    'reward': linear(64, 16) + lstm + 2 * 512 + linear(512, 32) + out(601),
    'project': linear(2304, 1024) + 2 * linear(1024, 1024),
    'predict_projection': linear(1024, 512) + 512 * 1024 + 1024,
  }
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == sum(want.values())


def test_fresh_heads_are_uniform_and_zero(built, compiled):
  net, _, stats, inputs = built
  params, _ = jax.jit(net.init)(jax.random.key(0))
  outputs, _ = compiled[False](params, stats, *inputs)
  assert outputs['state'].any() and outputs['next_state'].any()
  np.testing.assert_array_equal(outputs['policy'], np.zeros((B, A)))
  for name in ('value', 'reward'):
    np.testing.assert_array_equal(heads.from_logits(outputs[name]), [0] * B)


def test_statistics_change_in_training_only(built, compiled):
  _, params, stats, inputs = built
  evaluated, same = compiled[False](params, stats, *inputs)
  assert_equal(same, stats)
  trained, new = compiled[True](params, stats, *inputs)
  assert jax.tree.structure(new) == jax.tree.structure(stats)
  # Every layer was called once, so every statistic moved by a tenth of the
  # way; rectified inputs that are zero may leave some channels' mean alone.
  for old, fresh in zip(jax.tree.leaves(stats), jax.tree.leaves(new)):
    assert (np.asarray(old) != np.asarray(fresh)).any()
  assert not np.allclose(evaluated['policy'], trained['policy'], atol=1e-3)
  # Evaluation looks at each row alone.
  observation, action = inputs
  other = observation.copy()
  other[1:] = 0
  alone, _ = compiled[False](params, stats, other, action)
  np.testing.assert_allclose(
    alone['policy'][0], evaluated['policy'][0], rtol=1e-4, atol=1e-5
  )
  # One function leaves the statistics of the others alone.
  net = built[0]
  _, after = net.project(params, stats, evaluated['state'], True)
  changed = [
    name
    for name in stats
    if any(
      (np.asarray(a) != np.asarray(b)).any()
      for a, b in zip(
        jax.tree.leaves(stats[name]), jax.tree.leaves(after[name])
      )
    )
  ]
  assert changed == ['projector']


def test_bfloat16_is_close_to_float32(built, compiled):
  _, params, stats, inputs = built
  config = dataclasses.replace(TINY, compute_dtype='bfloat16')
  net = muzero.make(config, IMAGE, A)
  half = jax.jit(lambda *args: _everything(net, *args, True))
  got, new = half(params, stats, *inputs)
  want, want_stats = compiled[True](params, stats, *inputs)
  distance = lambda name: np.abs(got[name] - want[name]).max()
  for name in ('state', 'next_state'):
    scale = np.abs(want[name]).max()
    assert 0 < distance(name) < 0.05 * scale
  assert_close(new['torso'], want_stats['torso'], 0.05)


def _loss(net, params, stats, observation, actions, scan):
  """A scalar of all outputs of an unroll, by `scan` or by a Python loop."""
  state, stats = net.represent(params, stats, observation, True)

  def step(carry, action):
    state, memory, stats = carry
    next_state, stats = net.dynamics(params, stats, state, action, True)
    reward, memory, stats = net.reward(
      params, stats, state, action, next_state, memory, True
    )
    policy, value, stats = net.predict(params, stats, next_state, True)
    projection, stats = net.project(params, stats, next_state, True)
    prediction, stats = net.predict_projection(params, stats, projection, True)
    outputs = (reward, policy, value, prediction)
    loss = sum(jnp.square(x).mean() for x in outputs)
    return (next_state, memory, stats), loss

  carry = (state, net.initial_carry(B), stats)
  if scan:
    carry, losses = jax.lax.scan(step, carry, actions)
  else:
    losses = []
    for action in actions:
      carry, loss = step(carry, action)
      losses.append(loss)
    losses = jnp.stack(losses)
  return losses.sum(), (losses, carry[2])


def test_scan_equals_loop_and_reaches_every_parameter(built):
  net, params, stats, (observation, action) = built
  actions = np.stack([action, action[::-1]])
  results = [
    jax.jit(
      jax.grad(
        lambda p, scan=scan: _loss(net, p, stats, observation, actions, scan),
        has_aux=True,
      )
    )(params)
    for scan in (True, False)
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5),
    *results,
  )
  gradients, (losses, _) = results[0]
  assert np.isfinite(losses).all() and losses[0] != losses[1]
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_vmap_over_seeds_equals_a_loop():
  config = dataclasses.replace(TINY, norm='batch', latent='vector')
  net = muzero.make(config, IMAGE, A)
  keys = jax.random.split(jax.random.key(0), 2)
  observation = np.random.default_rng(0).random((B, *IMAGE.shape), np.float32)

  def run(key):
    params, stats = net.init(key)
    state, stats = net.represent(params, stats, observation, True)
    return params, state, stats

  got = jax.jit(jax.vmap(run))(keys)
  alone = jax.jit(run)
  want = jax.tree.map(lambda *x: jnp.stack(x), *map(alone, keys))
  assert_close(got, want, 0.0001, 1e-05)
  assert not np.allclose(got[1][0], got[1][1], atol=1e-2)


def test_prefix_remembers(built):
  net, params, stats, (_, action) = built

  @jax.jit
  def prefix(carry, state):
    logits, carry, _ = net.reward(
      params, stats, None, action, state, carry, False
    )
    return logits, carry

  rng = np.random.default_rng(2)
  first, second = rng.random((2, B, 5, 4, 4), np.float32)
  fresh = net.initial_carry(B)
  for leaf in fresh:
    np.testing.assert_array_equal(leaf, np.zeros((B, 5)))
  _, carry = prefix(fresh, first)
  after_first, _ = prefix(carry, second)
  at_once, _ = prefix(fresh, second)
  assert (np.abs(after_first - at_once).max(-1) > 1e-3).all()
  # A row that is reset forgets; the others remember.
  reset = np.array([True, False, False])[:, None]
  carry = jax.tree.map(lambda x: jnp.where(reset, 0, x), carry)
  mixed, _ = prefix(carry, second)
  np.testing.assert_allclose(mixed[0], at_once[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(mixed[1:], after_first[1:], rtol=1e-5, atol=1e-6)


def test_plain_reward_passes_its_carry_through():
  net = muzero.make(dataclasses.replace(TINY, reward='reward'), VECTOR, A)
  assert net.initial_carry(B) == ()


@pytest.mark.parametrize('encoding', ['plane', 'one_hot'])
def test_action_encoding_by_hand(encoding):
  config = dataclasses.replace(TINY, torso='image', action_encoding=encoding)
  module = muzero._Module(config, A)
  planes = module.apply(
    {}, jnp.zeros((2, 5, 4, 4)), jnp.array([3, 1]), method='_encode'
  )
  want = [[0.75], [0.25]] if encoding == 'plane' else np.eye(A)[[3, 1]]
  for row in range(5):
    for column in range(4):
      np.testing.assert_array_equal(planes[:, row, column], want)


@pytest.mark.parametrize('spec', [IMAGE, VECTOR])
def test_encoded_actions_enter_as_one_hot_ones_do(spec):
  one_hot = dataclasses.replace(TINY, norm='none', action_encoding='one_hot')
  plane = dataclasses.replace(one_hot, action_encoding='plane')
  plain = muzero.make(one_hot, spec, A)
  encoded = muzero.make(plane, spec, A, policy_size=A)
  params, stats = jax.jit(encoded.init)(jax.random.key(0))
  want, _ = jax.jit(plain.init)(jax.random.key(0))
  assert_equal(params, want)

  state = jnp.ones((A, 5, 4, 4) if spec is IMAGE else (A, 8))
  indexed, _ = jax.jit(
    lambda p: plain.dynamics(p, stats, state, jnp.arange(A), False)
  )(params)
  dynamics = jax.jit(lambda a: encoded.dynamics(params, stats, state, a, False))
  after, _ = dynamics(jnp.eye(A))
  np.testing.assert_allclose(after, indexed, rtol=1e-5, atol=1e-6)
  # Not only indices: every number of an encoding counts, whatever its size.
  half, _ = dynamics(0.5 * jnp.eye(A))
  assert (np.abs(half - after).reshape(A, -1).max(1) > 1e-3).all()


@pytest.mark.parametrize('spec', [IMAGE, VECTOR])
def test_policy_size_is_the_heads_alone(spec):
  net = muzero.make(TINY, spec, 2, policy_size=7)
  params, stats = jax.eval_shape(net.init, jax.random.key(0))
  width = 4 if spec is IMAGE else 8
  assert params['action']['kernel'].shape[-2:] == (2, width)
  outputs, _ = jax.eval_shape(
    lambda *inputs: _everything(net, *inputs, True),
    params,
    stats,
    _spec((B, *spec.shape)),
    _spec((B, 2)),
  )
  assert outputs['policy'].shape == (B, 7)
  assert outputs['next_state'].shape == outputs['state'].shape


@pytest.mark.parametrize('spec', [IMAGE, VECTOR])
def test_actions_and_blocks_matter(spec):
  config = dataclasses.replace(TINY, norm='none', blocks=2)
  net = muzero.make(config, spec, A)
  params, stats = jax.jit(net.init)(jax.random.key(0))
  state = jnp.ones((A, 5, 4, 4) if spec is IMAGE else (A, 8))
  after, _ = jax.jit(
    lambda p, s: net.dynamics(p, stats, s, jnp.arange(A), False)
  )(params, state)
  for i, j in itertools.combinations(range(A), 2):
    assert np.abs(after[i] - after[j]).max() > 1e-3
  assert 'predict_blocks_1' in params and 'predict_blocks_2' not in params


def test_frames_are_scaled_and_latents_too():
  config = dataclasses.replace(TINY, norm='none', state_norm=True)
  frames = np.random.default_rng(0).integers(0, 256, (B, 5, 4, 2), np.uint8)
  net = muzero.make(config, _spec((5, 4, 2), np.uint8), A)
  params, stats = jax.jit(net.init)(jax.random.key(0))
  represent = jax.jit(lambda o: net.represent(params, stats, o, False)[0])
  state = represent(frames)
  np.testing.assert_allclose(
    state, represent(frames.astype(np.float32) / 255), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(state.min((1, 2, 3)), [0] * B, atol=1e-6)
  np.testing.assert_allclose(state.max((1, 2, 3)), [1] * B, atol=1e-6)


def test_symlog_of_observations():
  config = dataclasses.replace(TINY, norm='none')
  symlog = dataclasses.replace(config, observation_scale='symlog')
  nets = [muzero.make(c, VECTOR, A) for c in (config, symlog)]
  params, stats = jax.jit(nets[0].init)(jax.random.key(0))
  plain, scaled = (
    jax.jit(lambda o, net=net: net.represent(params, stats, o, False)[0])
    for net in nets
  )
  observation = np.float32([[-1e4, -1, -1e-3, 0, 0.5, 300]])
  by_hand = [[-9.21044, -0.693147, -9.99500e-4, 0, 0.405465, 5.70711]]
  np.testing.assert_allclose(
    scaled(observation), plain(np.float32(by_hand)), rtol=1e-4, atol=1e-5
  )
  # Frames have a scale of their own.
  frames = np.uint8([[0, 1, 50, 100, 200, 255]])
  np.testing.assert_allclose(scaled(frames), plain(frames), rtol=1e-6)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'torso': 'resnet'}, "torso='resnet': must be one of 'auto', 'atari'"),
    ({'norm': 'group'}, "norm='group': must be one of 'batch', 'layer'"),
    ({'compute_dtype': 'float16'}, "compute_dtype='float16': must be one of"),
    ({'observation_scale': 'log'}, "observation_scale='log': must be one of"),
    ({'channels': 0}, 'channels=0: must be at least 1'),
    ({'channels': 5}, 'channels=5: must be even'),
    ({'channels': 8.0}, 'channels=8.0: must be at least 1, integer'),
    ({'blocks': -1}, 'blocks=-1: must be at least 0'),
    ({'value_bins': 600}, 'value_bins=600: must be odd and at least 3'),
    ({'reward_bins': 1}, 'reward_bins=1: must be odd and at least 3'),
    ({'head_hidden': [32]}, r'head_hidden=\[32\]: must be a tuple of sizes'),
    ({'projector': ()}, r'projector=\(\): needs at least one width'),
    ({'predictor': (0,)}, r'predictor=\(0,\): must be at least 1'),
    ({'norm_momentum': 1.0}, r'norm_momentum=1.0: must be in \[0, 1\)'),
  ],
)
def test_bad_configs_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    muzero.NetworkConfig(**fields)


@pytest.mark.parametrize(
  ('torso', 'shape', 'message'),
  [
    ('auto', (10, 5), r'observation shape \(10, 5\): must be \[D\] or'),
    ('image', (6,), r"torso='image' with observation shape \(6,\)"),
    ('atari', (96, 96), r"torso='atari' with observation shape \(96, 96\)"),
  ],
)
def test_observations_that_do_not_fit_are_refused(torso, shape, message):
  config = dataclasses.replace(TINY, torso=torso)
  with pytest.raises(ValueError, match=message):
    muzero.make(config, _spec(shape), A)
  with pytest.raises(ValueError, match='num_actions=0: must be at least 1'):
    muzero.make(TINY, VECTOR, 0)
  with pytest.raises(ValueError, match='policy_size=0: must be at least 1'):
    muzero.make(TINY, VECTOR, A, policy_size=0)
