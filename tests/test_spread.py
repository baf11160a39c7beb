"""How far latents are apart, by hand; and that they do not become one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agents.core import latent, losses, spread
from experiments import build
from experiments.build import collapse
from experiments.runtime import run_config
from networks import muzero


def test_the_mean_cosine_is_that_of_all_pairs():
  x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  pairs = [unit[i] @ unit[j] for i in range(7) for j in range(7) if i != j]
  mask = jnp.ones(7)
  assert spread.mean_cosine(x, mask) == pytest.approx(np.mean(pairs), abs=1e-6)
  same = jnp.ones((7, 1)) * x[:1]
  assert spread.mean_cosine(same, mask) == pytest.approx(1)
  # Dead latents point nowhere.
  assert spread.mean_cosine(0 * x, mask) == 0
  assert spread.mean_cosine(x[:1], mask[:1]) == 0


@pytest.mark.parametrize('scale', [1.0, 1e-12, 1e12])
def test_the_rank_is_the_participation_ratio(scale):
  # Variances 1, 4 and 0 of the three features, around some mean.
  x = np.float32([[1, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0]])
  x = scale * (x + np.float32([3, 0, 7]) * (scale == 1))
  rank = spread.effective_rank(x, jnp.ones(4))
  assert rank == pytest.approx((1 + 4) ** 2 / (1 + 16))


def test_a_rank_counts_directions_and_not_features():
  rng = np.random.default_rng(1)
  few = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 500))
  values = np.linalg.eigvalsh(np.cov(few.T))
  expected = values.sum() ** 2 / (values**2).sum()
  few = few.astype(np.float32)
  found = float(spread.effective_rank(few, jnp.ones(200)))
  assert found == pytest.approx(expected, rel=0.3) and found < 3
  assert spread.effective_rank(jnp.ones((5, 100)), jnp.ones(5)) == 0
  assert spread.effective_rank(jnp.ones((1, 4)), jnp.ones(1)) == 0


def test_the_variance_term_is_a_hinge_on_each_feature():
  x = jnp.float32([[0, 0.0], [0, 4], [0, 8]])
  # Deviations 0 (and the term's 1e-4 below the root) and 4.
  mask = jnp.ones(3)
  assert spread.variance_hinge(x, mask) == pytest.approx((1 - 0.01) / 2)
  gradient = jax.grad(spread.variance_hinge)(x + jnp.eye(3)[:, :2], mask)
  assert np.abs(gradient[:, 0]).max() > 0 and np.all(gradient[:, 1] == 0)
  assert spread.variance_hinge(x[:1], mask[:1]) == pytest.approx(1 - 0.01)


@pytest.mark.parametrize(
  'measure',
  [spread.mean_cosine, spread.effective_rank, spread.variance_hinge],
)
def test_masked_rows_do_not_count(measure):
  x = jax.random.normal(jax.random.key(0), (6, 4))
  mask = jnp.float32([1, 0, 1, 1, 0, 1])
  without = float(measure(x[mask > 0], jnp.ones(4)))
  assert float(measure(x, mask)) == pytest.approx(without, rel=1e-5)


SIDE, STEPS, BATCH = 8, 2, 32
SMALL = muzero.NetworkConfig(
  torso='vector',
  latent_size=16,
  blocks=1,
  norm='layer',
  reward='reward',
  value_bins=3,
  reward_bins=3,
  projector=(16, 16),
  predictor=(8,),
  head_hidden=(4,),
)


def frames(key):
  """A bright background on which one dark pixel moves: `[B, K + 1, ...]`."""
  start = jax.random.randint(key, (BATCH, 1, 2), 0, SIDE)
  where = (start + jnp.arange(STEPS + 1)[None, :, None]) % SIDE
  row, column = (jax.nn.one_hot(where[..., i], SIDE) for i in (0, 1))
  ball = row[..., :, None] * column[..., None, :]
  return (200 - 80 * ball[..., None]).astype(jnp.uint8)


def trained(**changes):
  """Metrics of a network that learned from the consistency loss alone."""
  config = dataclasses.replace(SMALL, **changes)
  image = jax.ShapeDtypeStruct((SIDE, SIDE, 1), jnp.uint8)
  networks, optimiser = muzero.make(config, image, 2), optax.adam(3e-3)

  def loss(params, statistics, key):
    action = jnp.zeros((BATCH, STEPS), jnp.int32)
    out = latent.forward(
      networks,
      params,
      statistics,
      frames(key),
      action,
      key,
      train=True,
      similarity=losses.negative_cosine,
    )
    assert out.compared is not None
    compared = jnp.mean(out.compared.loss)
    mask = jnp.ones(BATCH)
    metrics = spread.metrics('latent', out.state, mask)
    every = jnp.ones(BATCH * STEPS)
    metrics |= spread.metrics('projection', out.compared.true, every)
    metrics |= {'loss': compared}
    return compared, (out.model.statistics, metrics)

  def update(carry, key):
    params, statistics, state = carry
    found = jax.grad(loss, has_aux=True)(params, statistics, key)
    gradient, (statistics, metrics) = found
    updates, state = optimiser.update(gradient, state, params)
    return (optax.apply_updates(params, updates), statistics, state), metrics

  key = jax.random.key(0)
  params, statistics = networks.init(key)
  carry = (params, statistics, optimiser.init(params))
  keys = jax.random.split(key, 150)
  _, metrics = jax.jit(lambda carry: jax.lax.scan(update, carry, keys))(carry)
  return {name: float(x[-1]) for name, x in metrics.items()}


def test_a_consistency_loss_at_its_floor_may_be_one_latent_for_all():
  metrics = trained(projection_norm='layer')
  assert metrics['loss'] < -0.99
  assert metrics['latent_cosine'] > 0.999 < metrics['projection_cosine']
  experiment = build.describe(
    'efficientzero_catch', settings=['network.projection_norm=layer']
  )
  assert collapse.warning(experiment, metrics, 499) is None
  line = collapse.warning(experiment, metrics, 500)
  assert line is not None and line.startswith('note: latent_cosine=')
  assert '--set=network.projection_norm=batch' in line


def test_batch_norm_of_projections_and_observations_keeps_latents_apart():
  metrics = trained(observation_scale='batch')
  assert metrics['loss'] < -0.3  # something has been learned
  assert metrics['latent_cosine'] < 0.9
  assert metrics['projection_cosine'] < 0.2
  assert metrics['projection_rank'] > 2
  experiment = build.describe('efficientzero_catch')
  assert collapse.warning(experiment, metrics, 500) is None


@pytest.mark.parametrize(
  ('preset', 'remedy'),
  [
    ('efficientzero_atari', 'try --set=network.observation_scale=batch'),
    ('muzero_catch', 'observation_scale=batch or --set=network.norm=batch'),
  ],
)
def test_the_note_names_what_can_be_changed(preset, remedy):
  line = collapse.warning(
    build.describe(preset), {'latent_cosine': 0.9999}, 1000
  )
  assert line is not None and line.endswith(remedy)


def test_a_run_begun_before_has_the_settings_of_then(tmp_path):
  old = {
    'agent': {'consistency_weight': 2.0, 'network': {'norm': 'layer'}},
  }
  old['agent']['network']['projector'] = [4]
  old['agent']['search'] = {'num_simulations': 2}
  (tmp_path / 'config.json').write_text(json.dumps(old))
  agent = run_config.read_run_config(tmp_path)['agent']
  assert agent['network']['projection_norm'] == 'layer'
  assert agent['variance_weight'] == 0
  assert agent['search'] == {
    'num_simulations': 2,
    'embedding_dtype': 'float32',
    'engine': 'auto',
  }
