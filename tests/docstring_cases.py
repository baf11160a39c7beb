"""What docstrings cannot say of the functions that `test_docstrings` calls.

By function: its arguments that are no arrays (numbers that set shapes, other
functions, parameters of networks), and sizes of axes where those matter.
Texts such as `int32 [B]` stand for arrays.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mctx
import numpy as np
from docstring_calls import SIZES, key

from agents.core.rollout import ModelParams
from agents.core.targets import UnrollTargets
from networks import (
  actions,
  actor_critic,
  dispatch,
  ensemble,
  moe,
  muzero,
  policy_value,
  routers,
)
from networks.routing import ByToken
from search.exact import bellman, examples, improvement, offline_game, riccati
from search.model import TimeStep

A, B, D, E, F, K = (SIZES[x] for x in 'ABDEFK')
P = 2 * D
keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
low, high = -np.ones(D, np.float32), np.ones(D, np.float32)
box = actor_critic.squash(low, high)
gaussian = actions.tanh_gaussian(low, high)
flat = actions.flat(A)

several = examples.agents(0)
several = several._replace(process=jax.tree.map(np.float32, several.process))


def of(kind: Any, *texts: Any) -> Any:
  """A `NamedTuple` of texts, for the arrays that they stand for."""
  return kind(*texts)


# A learned latent model of vectors, of value and reward heads with 11 bins.
networks = muzero.make(
  muzero.NetworkConfig(
    torso='vector',
    latent='vector',
    latent_size=F,
    blocks=0,
    head_hidden=(),
    norm='none',
    reward='reward',
    value_bins=11,
    reward_bins=11,
    projector=(5,),
    predictor=(5,),
  ),
  jax.ShapeDtypeStruct((F,), np.float32),
  A,
)
weights, statistics = jax.eval_shape(networks.init, key())
model = ensemble.make(F, low, high, (5,), members=E)
members = ModelParams(jax.eval_shape(model.init, key()), 'int32 [G]')


def critic(params, observation, action):
  del params, observation
  return jnp.zeros((E, action.shape[0]))


def step(params, key, action, embedding):
  """A model whose embeddings say nothing."""
  del params, key
  zeros = jnp.zeros(action.shape[:1])
  output = mctx.RecurrentFnOutput(
    reward=zeros,
    discount=zeros,
    prior_logits=jnp.zeros((action.shape[0], A)),
    value=zeros,
  )
  return output, embedding


class Summary(NamedTuple):
  """What is read of mctx's."""

  visit_counts: Any
  qvalues: Any


def root(size='A'):
  return mctx.RootFnOutput(
    prior_logits=f'float32 [B, {size}]',
    value='float32 [B]',
    embedding='float32 [B, ...]',
  )


scalar = riccati.System(*4 * ['float []'])
mixture = moe.Config(num_experts=E, router=routers.NoisyTopK(k=2), hidden=5)
told = of(
  moe.Aux,
  '[]',
  {'z': '[]', 'load': '[]', 'importance': '[]'},
  '[E]',
  '[E]',
  '[E]',
  '[]',
  '[]',
)
by_token = of(ByToken, 'int32 [T, K]', '[T, K]')
expert = dispatch.Expert(lambda params, x: x @ params)
planned = bellman.model(
  bellman.MDP(
    np.full((9, A, 9), 1 / 9, np.float32),
    np.zeros((9, A), np.float32),
    np.float32(0.9),
    np.full(9, 1 / 9, np.float32),
  )
)
# Nodes of it.
nodes = {
  'model': planned,
  'params': 'float32 [S]',
  'embedding': 'int32 [N]',
  'C': 10,
}
transitions = SIZES['h'] * SIZES['M']
learned = {
  'networks': networks,
  'params': weights,
  'statistics': statistics,
  'train': False,
  'N': 11,
  'rest': (F,),
}
searched = {
  'params': (),
  'recurrent_fn': step,
  'root': root(),
  'num_simulations': 3,
}
of_sampled = {
  'distribution': gaussian,
  'num_samples': K,
  'invalid_actions': None,
  'P': P,
  'R': D,
  'rest': (D,),
}
of_enumerated = {
  'distribution': flat,
  'num_samples': A,
  'K': A,
  'P': A,
  'rest': (),
}

CASES = {
  'agents.core.augment.observations': {'rest': (33, 34, 3)},
  'agents.core.conservative.candidates': {'box': box},
  'agents.core.conservative.q_values': {'apply': critic, 'params': ()},
  'agents.core.losses.two_hot_cross_entropy': {'N': 11},
  'agents.core.optim.periodic': {'period': 2},
  'agents.core.rollout.predict': {
    'ensemble': model,
    'params': members,
    'rest': (F,),
  },
  'agents.core.rollout.expect': {
    'ensemble': model,
    'params': members,
    'rest': (F,),
  },
  'agents.core.rollout.imagine': {
    'ensemble': model,
    'params': members,
    'policy': lambda o, key: jnp.zeros((o.shape[0], D)),
    'B': transitions,
    'rest': (F,),
  },
  'agents.core.targets.value_prefixes': {'reset_every': 2},
  'agents.core.spread.metrics': {'name': 'latent'},
  'agents.core.unroll.consistency': learned
  | {'similarity': lambda x, y: jnp.sum(x * y, -1), 'P': 5},
  'agents.core.unroll.support_metrics': {
    'target': of(UnrollTargets, *['float32 [B, K + 1]'] * 6),
    'value_bins': 11,
    'reward_bins': 11,
  },
  'agents.core.unroll.unroll': learned,
  'agents.core.unroll.unflatten_steps': {'batch': B},
  'networks._numerics.split_logits': {'sizes': (5, 3), 'P': 8, 'F': 2, 'n': 5},
  'networks._numerics.dirichlet': {'keys': keys, 'alpha': 0.3},
  'networks._numerics.ravel': {'sizes': (5, 3), 'F': 2},
  'networks._numerics.unravel': {'sizes': (5, 3), 'F': 2},
  'networks._numerics.one_hots': {'sizes': (5, 3), 'P': 8},
  'networks.actor_critic.flatten': {'rest': (F,)},
  'networks.balance.chance': {'k': 2},
  'networks.balance.chosen': {'k': 2},
  'networks.balance.prune': {'load': np.ones(E)},
  'networks.balance.smooth_load': {'k': 2},
  'networks.dispatch.apply': {
    'plan': by_token,
    'params': 'float32 [E, D, O]',
    'expert': expert,
    'backend': 'dense',
  },
  'networks.expert_loop.grouped': {
    'function': expert.apply,
    'block': 8,
    'params': 'float32 [E, D, O]',
  },
  'networks.ensemble.row_uniforms': {'count': 3},
  'networks.ensemble.unflatten': {
    'observation': 'float32 [B, F]',
    'rest': (F,),
  },
  'networks.expert_parallel.apply': {
    'plan': by_token,
    'params': 'float32 [E, D, O]',
    'expert': expert,
    'axis': None,
  },
  'networks.heads.beyond': {'num_bins': 11},
  'networks.heads.from_logits': {'num_bins': 11},
  'networks.heads.to_two_hot': {'num_bins': 11},
  'networks.mixture.metrics': {'aux': told},
  'networks.mlp.spread': {'shape': (5, 3), 'dtype': jnp.float32},
  'networks.moe.metrics': {'aux': told},
  'networks.moe.weighted': {
    'config': mixture,
    'losses': {'z': '[]', 'load': '[]'},
  },
  'networks.routing.noisy_top_k': {'k': K},
  'networks.routing.hierarchical': {
    'primary': ('[T, G]', '[T, G]', '[T, G]'),
    'secondary': ('[T, G, E/G]', '[T, G, E/G]', '[T, G, E/G]'),
    'k_primary': 2,
    'k_secondary': 3,
    'K': 6,
  },
  'networks.routing.balanced': {'k': 3, 'T': 16, 'C': 2},
  'networks.routing.biased_top_k': {'k': K},
  'networks.routing.expert_choice': {'capacity_factor': 3.0, 'T': 16, 'C': 2},
  'networks.routing.thresholded': {'limit': K},
  'networks.value_prefix.initial_carry': {'batch_size': B, 'lstm_size': 5},
  'search.roots.most_visited': {'summary': Summary('int32 [B, A]', '[B, A]')},
  'search.roots.checked_qvalues': {
    'root_qvalues': '[B, A]',
    'root': root(),
  },
  'search.exact.bellman.newton': {'operator': lambda x: 0.5 * x + 1},
  'search.exact.bellman.modified_policy_iteration': {
    'num_steps': 3,
    'num_evaluations': 2,
  },
  'search.exact.bellman.policy_iteration': {'num_steps': 3},
  'search.exact.bellman.value_iteration': {'num_steps': 3},
  'search.exact.bellman.random_mdp': {},
  'search.exact.examples.agent_by_agent': {'problem': several, 'S': 40},
  'search.exact.examples.inventory': {'S': 31, 'A': 8},
  'search.exact.examples.matrix_game': {},
  'search.exact.examples.newton_iterates': {
    'operator': lambda x: 0.5 * x + 1,
    'number': 3,
  },
  'search.exact.examples.two_states': {'S': 2, 'A': 2},
  'search.exact.offline_game.answer': {'pessimism': 'relative'},
  'search.exact.offline_game.assess': {
    'played': offline_game.Play(
      '[K, S, A]', offline_game.Critic('[K, S, A]', '[K]', 'bool [K]')
    )
  },
  'search.exact.offline_game.play': {
    'oracle': offline_game.exponentiated_weights(A, 1.0, K)
  },
  'search.gumbel.gumbel': searched,
  'search.exact.improvement.asymptotic_variance': {
    'operator': improvement.mpo(0.5)
  },
  'search.exact.improvement.estimate': {'operator': improvement.puct(0.5)},
  'search.exact.improvement.improve': {'operator': improvement.mpo(0.5)},
  'search.lookahead.backup': {
    'output': mctx.RecurrentFnOutput(
      reward='[N, C]',
      discount='[N, C]',
      prior_logits='[N, C, A]',
      value='[N, C]',
    )
  },
  'search.lookahead.choices': nodes | {'rest': ()},
  'search.lookahead.expand': nodes | {'action': 'int32 [N]', 'rest': ()},
  'search.lookahead.qvalues': nodes | {'rest': ()},
  'search.policies.efficientzero': searched,
  'search.policies.puct': searched,
  'search.policies.raw': searched,
  'search.exact.riccati.fixed_points': {'system': scalar},
  'search.exact.riccati.gain': {},
  'search.exact.riccati.lookahead_cost': {'depth': 2},
  'search.exact.riccati.newton_error': {'system': scalar},
  'search.exact.riccati.stability_boundary': {'system': scalar},
  'search.rows.draw': {
    'function': jax.random.uniform,
    'shape': (B, D),
    'batch': B,
    'rest': (D,),
  },
  'search.sampled.evaluate_actions': {'params': (), 'recurrent_fn': step},
  'search.proposals.propose': of_sampled,
  'search.sampled.raw': searched | of_enumerated,
  'search.sampled.search': searched | of_enumerated,
}


class Object(NamedTuple):
  """Functions whose signatures a docstring tells.

  Attributes:
    where: whose docstring.
    functions: by attribute, or by the result's name for a plain one.
    given: arguments without a documented shape, and sizes.
    rest: what `...` stands for.
  """

  where: str
  functions: Any
  given: dict
  rest: tuple[int, ...] = (F,)


def family(distribution, rest, **sizes):
  given = {
    'parameters': '[B, P]',
    'temperature': 0.5,
    'alpha': 0.3,
    'fraction': 0.25,
    'K': K,
    'shape': (3, 5),
    'keys': keys,
    'noise': jax.eval_shape(
      distribution.noise,
      keys,
      jax.ShapeDtypeStruct((B, distribution.num_parameters), np.float32),
      0.3,
    ),
    'P': distribution.num_parameters,
    'E': distribution.encoded_size,
    'action_shape': rest,
  }
  where = 'networks.actions.ActionDistribution'
  return Object(where, distribution, given | sizes, rest)


def network(made, where, name='apply', **given):
  params = jax.eval_shape(made.init, key())
  observation = {'observation': 'float32 [B, F]'}
  return Object(
    where, {name: made.apply}, {'params': params} | observation | given
  )


OBJECTS = {
  'tanh_gaussian': family(gaussian, (D,), R=D),
  'factored_bins': family(actions.factored_bins(low, high, 5), (D,), R=D),
  'factored_index': family(
    actions.factored_index((3, 5)), (), R=2, any='int32'
  ),
  'flat': family(flat, (), R=1, any='int32'),
  'squash': Object(
    'networks.actor_critic.Squash',
    box,
    {
      'any': 'float32',
      'Gaussian': of(actor_critic.Gaussian, '[..., D]', '[..., D]'),
    },
  ),
  'muzero': Object(
    'networks.muzero.MuZeroNetworks',
    networks,
    learned
    | {
      'stats': statistics,
      'state': '[B, ...]',
      'state_tm1': '[B, ...]',
      'state_t': '[B, ...]',
      'action_tm1': 'int32 [B]',
      'projection': '[B, P]',
      'carry': (),
      'batch_size': B,
      'P': 5,
      'value_bins': 11,
      'reward_bins': 11,
    },
  ),
  'ensemble': Object(
    'networks.ensemble.Ensemble',
    model,
    {'params': members.network, 'observation': '[B, F]'},
  ),
  'q_ensemble': network(
    actor_critic.q_ensemble(F, low, high, (5,), members=E),
    'networks.actor_critic.q_ensemble',
  ),
  'v_network': network(
    actor_critic.v_network(F, (5,)), 'networks.actor_critic.v_network'
  ),
  'gaussian_policy': network(
    actor_critic.gaussian_policy(F, D, (5,)),
    'networks.actor_critic.gaussian_policy',
  ),
  'q_mixture': Object(
    'networks.actor_critic.MixtureCritics',
    (
      critics := actor_critic.q_mixture(
        F,
        low,
        high,
        5,
        moe.Config(3, routers.NoisyTopK(k=2), hidden=5),
        members=2,
      )
    ),
    {
      'params': jax.eval_shape(critics.init, key()),
      'observation': '[B, F]',
      'action': '[B, D]',
      # Its leaves have the members in front.
      'moe.Aux': None,
      'E': 2,
    },
  ),
  'policy_value': network(
    policy_value.make(
      policy_value.NetworkConfig(hidden_sizes=(5,)),
      jax.ShapeDtypeStruct((F,), np.float32),
      A,
    ),
    'networks.policy_value.make',
  ),
  'oracle': Object(
    'search.exact.offline_game.Oracle',
    offline_game.exponentiated_weights(A, 1.0, K),
    {
      'state': '[S, A]',
      'num_states': 9,
      'num_actions': A,
      'dtype': jnp.float32,
    },
  ),
  'operator': Object(
    'search.exact.improvement.Operator', improvement.puct(0.5), {'u': '[A]'}
  ),
  'planned': Object(
    'search.model.Model',
    planned,
    {
      'params': '[S]',
      'action': 'int32 [B]',
      'embedding': 'int32 [B]',
      'timestep': of(
        TimeStep, 'int32 [B]', '[B]', '[B]', 'bool [B]', 'bool [B]'
      ),
      'C': 10,
    },
    (),
  ),
}

# Those whose signature has no shape of a result.
WITHOUT_SHAPES = (
  'muzero.initial_carry',
  'operator.log_g',
  'planned.root',
)
