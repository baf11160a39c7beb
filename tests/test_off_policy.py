"""The two halves of the off-policy correction, each on its own."""

import json

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest

from agents import efficientzero, sampled_muzero
from agents.core import efficient
from agents.core.latent import State
from agents.core.types import Experience, Sample, Trajectory
from experiments.build import saved
from experiments.runtime import run_config
from experiments.studies import table
from search.model import Model, PolicyOutput, TimeStep

B, K, N, ACTIONS = 2, 2, 3, 3
STEPS = K + N + 1


def make_config(module, **changes):
  return module.Config(
    unroll_steps=K, td_steps=N, gamma=0.5, value_prefix=False,
    reanalyze_fraction=1.0, total_decisions=100, off_policy_fraction=0.1,
    **changes,
  )  # fmt: skip


def make_batch():
  """Rewards of 1, observations that are their step; rows of ages 0 and 25."""
  ones = jnp.ones((B, STEPS))
  no = jnp.zeros((B, STEPS), bool)
  steps = jnp.broadcast_to(jnp.arange(STEPS, dtype=jnp.float32), (B, STEPS))
  timestep = TimeStep(steps[..., None], ones, ones, no, no)
  extras = {
    'search_policy': jnp.full((B, STEPS, ACTIONS), 1 / ACTIONS),
    'search_value': 7 * ones,
  }
  index = jnp.arange(B, dtype=jnp.int32)
  sample = Sample(index, index, jnp.ones(B), jnp.array([0.0, 25.0]))
  action = jnp.zeros((B, STEPS), jnp.int32)
  return Trajectory(Experience(timestep, action, extras), ~no, sample)


def reanalyzed(config):
  """Fresh targets from a model that says 20 + step and a search 40 + step.

  Returns:
    The batch, and how many rows were searched.
  """
  searched = []

  def root(params, timestep, key):
    value = 20 + timestep.observation[:, 0]
    logits = jnp.zeros((*value.shape, ACTIONS))
    return mctx.RootFnOutput(prior_logits=logits, value=value, embedding=value)

  def search(params, key, root, step, invalid_actions=None):
    searched.append(root.value.shape[0])
    chosen = jnp.ones(root.value.shape, jnp.int32)
    weights = jax.nn.one_hot(chosen, ACTIONS)
    return PolicyOutput(
      action=chosen, action_weights=weights, value=root.value + 20
    )

  state = State(None, None, None)
  model = Model(root=root, step=lambda *args: None)
  args = (search, model, state, make_batch(), 0, jax.random.key(0))
  return efficient.reanalyze(config, *args), sum(searched)


# Discounts of 1/2, rewards of 1. The target of step 0 is 1.75 + V(3) / 8 with
# the horizon 3, and 1 + V(1) / 2 with that of an age of 25 decisions, 3 - 2.
BY_HAND = {
  (False, False): (B * (K + 1), [1.75 + 23 / 8, 1.75 + 23 / 8]),
  (True, False): (B * (K + 1), [1.75 + 23 / 8, 1 + 21 / 2]),
  (False, True): (B * STEPS, [1.75 + 43 / 8, 1.75 + 43 / 8]),
  (True, True): (B * STEPS, [1.75 + 43 / 8, 1 + 41 / 2]),
}


@pytest.mark.parametrize('module', [efficientzero, sampled_muzero])
@pytest.mark.parametrize('fields', BY_HAND)
def test_each_half_of_the_correction_by_hand(module, fields):
  dynamic, searches = fields
  rows, want = BY_HAND[fields]
  config = make_config(
    module, dynamic_horizon=dynamic, searched_values=searches
  )
  batch, searched = reanalyzed(config)
  assert searched == rows
  target, horizon = efficient.make_targets(config, batch)
  np.testing.assert_array_equal(horizon, [3, 1 if dynamic else 3])
  np.testing.assert_allclose(target.value[:, 0], want)
  # Steps that are trained on have the new policy, and others if searched.
  policy = batch.experience.extras['search_policy']
  new = np.asarray(policy[..., 1] == 1)
  assert new[:, : K + 1].all()
  assert (new[:, K + 1 :] == searches).all()


def test_atari_searches_six_positions_instead_of_eleven():
  config = efficientzero.Config()
  assert (config.unroll_steps + 1, config.window) == (6, 11)
  assert config.dynamic_horizon and config.searched_values


@pytest.mark.parametrize('both', [False, True])
def test_a_config_of_one_field_is_read_as_both(both, tmp_path):
  from experiments import build

  preset = 'efficientzero_catch' if both else 'sampled_muzero_pendulum'
  experiment = build.describe(preset)
  run_config.write_run_config(tmp_path, experiment.as_dict(), 'a CPU')
  path = tmp_path / 'config.json'
  content = json.loads(path.read_text())
  agent = content['agent']
  assert [agent.pop('dynamic_horizon'), agent.pop('searched_values')] == [
    both,
    both,
  ]
  agent['off_policy_correction'] = both
  path.write_text(json.dumps(content))
  assert saved.load_experiment(str(tmp_path)).config == experiment.config
  # Such a run goes on.
  free = run_config.FREE
  notes = run_config.check_run_config(
    tmp_path, experiment.as_dict(), 'a CPU', free
  )
  assert notes == []


def test_the_ablation_leaves_out_each_half():
  study = table.STUDIES['catch_ablation']
  runs = study[0](1).runs
  assert {'minus_dynamic_horizon', 'minus_searched_values'} <= {
    run.variant for run in runs
  }
