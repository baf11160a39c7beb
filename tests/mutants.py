"""Faults that no test saw until one was written for it.

Each is a change of one line that leaves shapes, types and names as they are;
`test_mutants` applies it to a copy of the tree.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
  """A fault, and the tests that must notice it.

  Attributes:
    path: of the file, from the root.
    old: text that is in it exactly once.
    new: what takes its place.
    tests: the file of tests.
    select: pytest's `-k`, of which every test must fail.
  """

  path: str
  old: str
  new: str
  tests: str
  select: str


MUTANTS = (
  Mutant(
    'agents/core/optim.py',
    '    optax.clip_by_global_norm(max_norm),\n    optax.scale_by_adam(),',
    '    optax.scale_by_adam(),',
    'tests/test_core_terms.py',
    'adamw_clips',
  ),
  Mutant(
    'agents/language.py',
    'inputs, target = tokens[:, :-1], tokens[:, 1:]',
    'inputs, target = tokens[:, :-1], tokens[:, :-1]',
    'tests/test_language.py',
    'every_token',
  ),
  Mutant(
    'agents/core/latent.py',
    '(out.model.reward_logits, target.reward[1:])',
    '(out.model.reward_logits, target.reward[:-1])',
    'tests/test_agents_wiring.py',
    'predictions and muzero',
  ),
  Mutant(
    'agents/core/latent.py',
    'batch.experience.action[:, : decided.shape[1]]',
    'batch.experience.action[:, 1 : decided.shape[1] + 1]',
    'tests/test_agents_wiring.py',
    'predictions and muzero',
  ),
  Mutant(
    'agents/efficientzero.py',
    "batch.experience.extras['search_policy'][:, : logits.shape[0]]",
    "batch.experience.extras['search_policy'][:, 1 : logits.shape[0] + 1]",
    'tests/test_agents_wiring.py',
    'predictions and efficientzero and not sampled',
  ),
  Mutant(
    'agents/core/latent.py',
    'observation[:, 1:],',
    'observation[:, :-1],',
    'tests/test_agents_wiring.py',
    'predictions and (efficientzero or sampled)',
  ),
  Mutant(
    'agents/sampled_muzero.py',
    'config.reward_scale * batch.experience.timestep.reward',
    'batch.experience.timestep.reward',
    'tests/test_agents_wiring.py',
    'predictions and sampled',
  ),
  Mutant(
    'agents/core/efficient.py',
    'reset_every=config.prefix_horizon if config.value_prefix else None,',
    'reset_every=None,',
    'tests/test_agents_losses.py',
    'learner_resets and (2 or 3)',
  ),
  Mutant(
    'experiments/training/train.py',
    'jax.random.key(experiment.seed)',
    'jax.random.key(0)',
    'tests/test_offline_launch.py',
    'the_seed_of_a_run',
  ),
  Mutant(
    'experiments/runtime/loop.py',
    'agent_key, _ = jax.random.split(jax.random.fold_in(key, 2**31 - 1))',
    'agent_key, _ = jax.random.split(jax.random.key(0))',
    'tests/test_loop_resume.py',
    'agent_and_source_begin',
  ),
  Mutant(
    'experiments/runtime/loop.py',
    'keys.split(keys.fold_in(key, carry.step))',
    'keys.split(keys.fold_in(jax.random.key(0), carry.step))',
    'tests/test_loop_resume.py',
    'every_step_draws',
  ),
  Mutant(
    'agents/combo.py',
    'soft = (rows.o_tm1, noise.tm1, weights.rows)',
    'soft = (rows.o_tm1, noise.tm1, weights.real)',
    'tests/test_agents_combo.py',
    'combos_critics_and_policy',
  ),
  Mutant(
    'agents/td3_bc.py',
    'config.exploration_noise * noise',
    'config.target_noise * noise',
    'tests/test_agents_actor_critic.py',
    'td3_explores',
  ),
  Mutant(
    'agents/iql.py',
    'jnp.tanh(gaussian.mean) + gaussian.std * noise',
    'jnp.tanh(gaussian.mean) + noise',
    'tests/test_agents_conservative.py',
    'iql_acts',
  ),
  Mutant(
    'agents/alphazero.py',
    'temperature = config.temperature\n',
    'temperature = 1.0\n',
    'tests/test_alphazero.py',
    'the_temperature',
  ),
  Mutant(
    'agents/core/rollout.py',
    'discount=gamma * out.discount_t,',
    'discount=out.discount_t,',
    'tests/test_agents_model.py',
    'a_planned_step',
  ),
)
