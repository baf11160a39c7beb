"""Mixtures in the losses and searches of agents, and in sweeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from searching_cases import make_batch, without_ends
from small_agents import make_agent
from test_moe_block import (
  BOX,
  IMAGE,
  IMAGE_NETWORK,
  KEY,
  MOE,
  NETWORK,
  SEARCH,
  SHARED,
  VECTOR,
  B,
  K,
  make_block,
  normal,
  quick,
  steep,
)
from trees import assert_close, shake

from agents import atac, efficientzero, muzero, sampled_muzero
from agents.core import optim, planning, unroll
from agents.core.types import (
  ArraySpec,
  Spec,
  Transition,
)
from networks import actor_critic, mixture

# --- The MuZero family.


def batch_of(config, spec):
  return without_ends(make_batch(config, spec))


CASES = {
  'muzero torso, chunks': (
    muzero,
    muzero.Config(
      **SHARED,
      network=dataclasses.replace(NETWORK, mixture='torso', mixture_tokens=2),
    ),
    VECTOR,
    1 * B * 2,
  ),
  # Batch statistics, an LSTM, and the torso a second time for successors.
  'efficientzero torso, pixels': (
    efficientzero,
    efficientzero.Config(
      **SHARED, network=dataclasses.replace(IMAGE_NETWORK, mixture='torso')
    ),
    IMAGE,
    (1 + K) * B * 6,
  ),
  'sampled_muzero heads': (
    sampled_muzero,
    sampled_muzero.Config(
      **SHARED, network=dataclasses.replace(NETWORK, mixture='heads')
    ),
    VECTOR._replace(action=BOX),
    (1 + K) * B,
  ),
}


@pytest.mark.parametrize('case', CASES)
def test_the_loss_has_the_mixture_in_it(case, monkeypatch):
  module, config, spec, tokens = CASES[case]
  agent = make_agent(module, config, spec)
  metrics = mixture.metrics
  count = lambda aux: metrics(aux) | {'moe_count': aux.count.sum()}
  monkeypatch.setattr(mixture, 'metrics', count)
  state, batch = quick(agent.init)(KEY), batch_of(config, spec)
  found = quick(agent.evaluate)(state.params, batch, KEY)
  assert found['moe_count'] == tokens * MOE.router.k
  weights = {'policy': 1, 'value': 0.25, 'reward': 1}
  weights |= {'consistency': 2, 'entropy': 5e-3}
  terms = [w * found.get(f'loss_{k}', 0) for k, w in weights.items()]
  want = sum(terms) / K + found['moe_balance_loss']
  np.testing.assert_allclose(found['loss'], want, rtol=1e-5)
  # Gates say nothing yet and have no noise here: two of three have it all.
  share = 0.1 * (0.5 + 0.5) + 0.01 * np.log(3) ** 2
  np.testing.assert_allclose(found['moe_balance_loss'], share, rtol=1e-5)
  assert (found['moe_idle_experts'], found['moe_dropped']) == (1, 0)
  after, info = jax.eval_shape(agent.update, state, batch, KEY)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert set(info.metrics) == {*found, 'gradient_norm'}


def test_an_agent_of_traced_floats_is_traced_once():
  batch, traces = batch_of(muzero.Config(**SHARED), VECTOR), []

  def row(seed, load_weight):
    traces.append(0)
    config = muzero.Config(**SHARED, network=steep(load_weight))
    agent = make_agent(muzero, config, VECTOR)
    state = agent.init(jax.random.key(seed))
    return agent.update(state, batch, jax.random.key(seed))[1].metrics

  seeds, weights = jnp.arange(2), jnp.float32([0.1, 3.0])
  found = jax.eval_shape(jax.vmap(row), seeds, weights)
  assert found['moe_balance_loss'].shape == (2,)
  assert len(traces) == 1


def test_a_search_alone_is_its_row_of_a_batch():
  config = muzero.Config(**SHARED, network=NETWORK)
  networks = muzero.make_networks(config, VECTOR)
  model = unroll.learned_model(networks, gamma=0.9)
  network, stats = quick(networks.init)(KEY)
  params = unroll.Params(shake(network, scale=0.5), stats, jnp.int32(0))
  search = planning.make_planner(SEARCH, evaluate=True)

  @quick
  def plan(timestep):
    return search(model, params, KEY, timestep)

  batch = make_batch(config, VECTOR)
  first_two = jax.tree.map(lambda x: x[:, :2], batch.experience.timestep)
  roots = jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), first_two)
  together = plan(roots)
  for row in (0, 5):
    single = plan(jax.tree.map(lambda x, i=row: x[i : i + 1], roots))
    for name in ('action', 'action_weights', 'value'):
      assert_close(getattr(single, name)[0], getattr(together, name)[row])

  # States go to different experts, or this would say little.
  @quick
  def first(timestep):
    state = model.root(params, timestep, KEY).embedding
    action, listener = jnp.zeros(8, jnp.int32), networks.listen(stats, KEY)
    heard = networks.dynamics(params.network, listener, state, action, False)[1]
    return networks.told(heard)[1].count

  assert (first(roots) > 0).sum() > MOE.router.k


# --- ATAC's critics.


ATAC = atac.Config(hidden_sizes=(8,), critic_moe=MOE, radius=0.5)
STATES = Spec(ArraySpec((3,)), BOX)


def make_transitions():
  return Transition(
    o_tm1=normal(0, B, 3),
    a_tm1=jnp.asarray([[-1.5, 1.0], [-1.2, 2.0], [-1.9, 0.7], [-1.4, 2.9]]),
    r_t=normal(1, B),
    discount_t=jnp.ones(B),
    o_t=normal(2, B, 3),
    o_0=None,
  )


def test_experts_are_projected_one_by_one():
  experts = np.float32(np.random.default_rng(0).normal(size=(2, 3, 4, 5)))
  experts *= np.float32([0.1, 1, 2])[None, :, None, None]
  gate = np.float32(np.random.default_rng(1).normal(size=(2, 4, 3)))
  params = {
    'gate': {'kernel': gate},
    'experts': {'in': {'kernel': experts, 'bias': experts[..., 0]}},
  }
  got = optim.project_kernels(params, 2.0, stacked=True)
  kernel = got['experts']['in']['kernel']
  for place in np.ndindex(2, 3):
    norm = np.linalg.norm(experts[place])
    want = experts[place] * min(1, 2 / norm)
    np.testing.assert_allclose(kernel[place], want, rtol=1e-6)
    assert (norm < 2) == (place[1] == 0)
  for member in range(2):
    want = gate[member] * min(1, 2 / np.linalg.norm(gate[member]))
    np.testing.assert_allclose(got['gate']['kernel'][member], want, rtol=1e-6)
  np.testing.assert_array_equal(got['experts']['in']['bias'], experts[..., 0])
  # A single network's, without members.
  one = jax.tree.map(lambda x: x[0], params)
  assert_close(
    optim.project_kernels(one, 2.0), jax.tree.map(lambda x: x[0], got), 1e-6
  )


def test_critics_are_their_layers_with_noise_in_their_loss():
  critics = actor_critic.q_mixture(3, BOX.low, BOX.high, 8, MOE, tokens=2)
  batch = make_transitions()

  @quick
  def run(observation, action):
    params = critics.init(KEY)
    params |= {'layers': shake(params['layers'], scale=0.5)}
    told = [
      critics.learn(params, observation, action, key) for key in (None, KEY)
    ]
    return params['layers'], critics.apply(params, observation, action), told

  layers, q, ((quiet, aux), (noisy, _)) = run(batch.o_tm1, batch.a_tm1)
  np.testing.assert_array_equal(q, quiet)
  assert (np.abs(q - noisy).max(1) > 1e-3).all()  # both, by noise of their own
  middle, half = (BOX.high + BOX.low) / 2, (BOX.high - BOX.low) / 2
  unit = (np.asarray(batch.a_tm1) - middle) / half
  x = np.concatenate([batch.o_tm1, unit], 1)
  apply = make_block(chunks=2).apply
  block = quick(lambda variables, x: apply(variables, x, False))
  for member in range(2):
    own = jax.tree.map(lambda x, i=member: np.asarray(x[i]), layers)
    hidden = x @ own['Dense_0']['kernel'] + own['Norm_0']['bias']
    variables = {'params': own['Block_0']}
    hidden, told = block(variables, np.maximum(hidden, 0))
    last = own['Dense_1']
    want = np.asarray(hidden) @ last['kernel'] + last['bias']
    np.testing.assert_allclose(q[member], want[:, 0], rtol=1e-5, atol=1e-5)
    assert_close(aux.count[member], told.count)
    assert aux.count[member].sum() == 2 * B * MOE.router.k


def test_the_critics_loss_has_the_balance_once():
  networks = atac.make_networks(ATAC, STATES)
  phases = atac.make_phases(ATAC, networks, atac.make_losses(), STATES)
  warm_start, game = (phase.agent for phase in phases)
  batch = make_transitions()

  def row(key):
    state = game.init(key)
    critic = shake(state.params.critic, scale=0.2)
    state = state._replace(params=state.params._replace(critic=critic))
    after, info = game.update(state, batch, key)
    return after.params.critic, info.metrics

  # Two seeds: experts of two critics of two runs, all in one product.
  critic, metrics = quick(jax.vmap(row))(jax.random.split(KEY))
  for seed in range(2):
    found = {name: x[seed] for name, x in metrics.items()}
    # Two critics; beta is above 1, which divides the pessimism.
    want = found['bellman'] + found['pessimism'] / ATAC.beta
    want = 2 * (want + found['moe_balance_loss'])
    np.testing.assert_allclose(found['loss_critic'], want, rtol=1e-5)
    assert found['moe_balance_loss'] > 0
    assert found['kernel_norm'] > 0.5
  experts = critic['layers']['Block_0']['MoE_0']['experts']['in']['kernel']
  norms = np.linalg.norm(experts, axis=(-2, -1))
  assert norms.shape == (2, 2, 3) and norms.max() < 0.5 + 1e-5
  assert norms.min() > 0.49  # each on its own: together none is so long
  state, info = jax.eval_shape(
    lambda: warm_start.update(warm_start.init(KEY), batch, KEY)
  )
  assert jax.tree.structure(state.params.critic) == jax.tree.structure(critic)
  assert 'moe_balance_loss' in info.metrics


def test_plain_critics_stay_plain():
  networks = atac.make_networks(atac.Config(hidden_sizes=(8,)), STATES)
  assert networks.learn is None
  params = jax.eval_shape(networks.critic.init, KEY)
  assert set(params['layers']) == {'Dense_0', 'Dense_1', 'Norm_0'}
