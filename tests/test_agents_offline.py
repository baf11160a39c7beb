"""What holds for every agent that learns from a data set of transitions."""

import dataclasses
import functools
import math

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import AGENTS, OFFLINE
from offline_cases import (
  HIGH,
  LOW,
  SPEC,
  STATISTICS,
  UNIT,
  B,
  D,
  F,
  make_agent,
  make_timestep,
  train,
)
from trees import assert_close, stack

from agents import atac, bc, combo, cql, dynamics, iql, sac, td3_bc
from agents.core.types import (
  ArraySpec,
  Continuous,
  Discrete,
  Mixed,
  Spec,
  Transition,
)
from networks import actor_critic

SMALL = {'hidden_sizes': (8,)}
ACTING = [name for name in OFFLINE if AGENTS[name].module is not dynamics]


@pytest.fixture
def built(request):
  return conformance.built(request.param)


def pick(*names):
  return pytest.mark.parametrize('built', names, indirect=True)


one_of_each = pick(
  *('sac dqra', 'bc floor', 'td3_bc dqra', 'cql lagrange', 'iql'),
  *('dynamics', 'combo'),
)


def due(state):
  """The state where the next update is one of TD3's policy, too."""
  return (
    state._replace(step=state.step + 1) if hasattr(state, 'step') else state
  )


def observations(built):
  batch = getattr(built.batch, 'real', built.batch)
  return make_timestep(batch.o_tm1)


@pick(*ACTING)
def test_actions_are_within_bounds_and_explore(built, key):
  timestep = observations(built)
  act, exploit = jax.jit(built.agent.act), jax.jit(built.agent.exploit)
  params, drawn = built.state.params, []
  for i in range(5):
    action, extras = act(params, jax.random.fold_in(key, i), timestep)
    assert extras == {}
    assert (action.shape, action.dtype) == ((B, D), jnp.float32)
    assert (action >= LOW[None]).all() and (action <= HIGH[None]).all()
    drawn.append(np.asarray(action))
  is_deterministic = getattr(built.config, 'loss', '') == 'squared'
  assert ((np.ptp(drawn, 0) > 0) != is_deterministic).all()
  best, extras = exploit(params, key, timestep)
  again, _ = exploit(params, jax.random.key(7), timestep)
  assert extras == {}
  np.testing.assert_array_equal(best, again)
  assert (best >= LOW[None]).all() and (best <= HIGH[None]).all()
  # A policy without noise would be as repeatable.
  gaussian = built.module.make_networks(built.config, SPEC).policy.apply(
    params.policy, timestep.observation
  )
  unit = np.tanh(gaussian.mean)
  want = (LOW + HIGH)[None] / 2 + (HIGH - LOW)[None] / 2 * unit
  np.testing.assert_allclose(best, want, rtol=1e-5)


ATAC_LOSSES = ('loss_critic', 'pessimism', 'td_error', 'residual', 'entropy')
# At first the targets are the parameters; what comes first is the update's.
EVALUATED = {
  'sac': ('loss_critic',),
  'sac dqra': ('loss_critic',),
  'bc': ('loss_policy',),
  'bc floor': (),  # whose temperature moves first
  'bc squared': ('loss_policy',),
  'td3_bc': ('loss_critic',),
  'td3': ('loss_critic',),
  'td3_bc dqra': ('loss_critic',),
  'cql': ('loss_critic',),
  'cql lagrange': ('loss_critic',),
  'iql': ('loss_value',),
  'iql constant rate': ('loss_value',),
  'atac': ATAC_LOSSES,
}


@pytest.mark.parametrize('name', EVALUATED)
def test_evaluation_reports_the_losses(name, key):
  built = conformance.built(name)
  metrics = built.evaluate(built.state.params, built.batch, key)
  _, info = built.update(built.state, built.batch, key)
  assert set(metrics) <= set(info.metrics)
  for loss in EVALUATED[name]:
    np.testing.assert_allclose(metrics[loss], info.metrics[loss], rtol=1e-5)


@one_of_each
def test_every_float_of_a_config_may_be_traced(built, key):
  config, has_policy = built.config, built.module is not dynamics
  names = [
    f.name
    for f in dataclasses.fields(config)
    if isinstance(getattr(config, f.name), float)
  ]
  if built.module is sac:
    names.append('target_entropy')
  values = {
    name: np.float32([0.9, 0.95]) * (getattr(config, name) or -1.0)
    for name in names
  }

  def run(floats):
    agent = make_agent(built.module, dataclasses.replace(config, **floats))
    state, info = agent.update(due(agent.init(key)), built.batch, key)
    return state, info.metrics

  got = jax.jit(jax.vmap(run))(values)
  second = {name: float(x[1]) for name, x in values.items()}
  want = jax.jit(functools.partial(run, second))()
  assert_close(jax.tree.map(lambda x: x[1], got), want)
  if has_policy:
    for leaf in jax.tree.leaves(got[0].params.policy['layers']):
      assert (np.asarray(leaf[0]) != np.asarray(leaf[1])).any()


@one_of_each
def test_two_devices_equal_one(built, key):
  # No noise, each half of the batch on its own, gradients and means of both.
  module, config = built.module, built.config
  if module is td3_bc:
    config = dataclasses.replace(config, target_noise=0.0)
  networks = module.make_networks(config, SPEC)
  if module is not dynamics:
    sample, from_unit = networks.box.sample, networks.box.from_unit
    box = networks.box._replace(
      sample=lambda e, g: sample(jnp.zeros_like(e), g)
    )
    if module in (cql, combo):  # which draw uniform actions, too
      box = box._replace(from_unit=lambda u: from_unit(jnp.zeros_like(u)))
    networks = networks._replace(box=box)
  mean = functools.partial(jax.lax.pmean, axis_name='devices')
  alone, shared = (
    make_agent(module, config, networks=networks, **reduce)
    for reduce in ({}, {'reduce': mean})
  )
  halves = jax.tree.map(
    lambda x: x.reshape(2, x.shape[0] // 2, *x.shape[1:]), built.batch
  )

  @jax.jit
  def both(state):
    together = jax.vmap(shared.update, (None, 0, None), axis_name='devices')
    return together(state, halves, key), alone.update(state, built.batch, key)

  got, (want, info) = both(due(built.state))
  if module is dynamics:
    # Sums over rows that are means over devices: their ratio is what counts.
    sums = ('loss_sum', 'rows', 'end_sums')
    halved = jax.tree.map(lambda x: x / 2, [getattr(want, n) for n in sums])
    want = want._replace(**dict(zip(sums, halved)))
  # Adam divides gradients by their size: rounding errors of small ones show.
  assert_close(got, stack(*[(want, info)] * 2), rtol=2e-5)


@pick('sac', 'sac dqra', 'td3_bc', 'td3_bc dqra', 'cql', 'iql')
def test_termination_cuts_the_bootstrap(built, key):
  far = jax.tree.map(lambda x: x + 1.0, built.batch.o_t)
  update = built.update
  if built.module is cql:
    # The penalty looks at next states, too; that is not the bootstrap.
    update = jax.jit(conformance.make('cql', penalty=0.0).update)
  for discount, is_cut in ((jnp.zeros(B), True), (jnp.ones(B), False)):
    here = built.batch._replace(discount_t=discount)
    one, two = (
      update(built.state, batch, key)[0].params.critic
      for batch in (here, here._replace(o_t=far))
    )
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, two)
    assert (max(jax.tree.leaves(gap)) == 0) == is_cut


@pick(
  *('sac dqra', 'bc floor', 'td3_bc dqra', 'cql', 'iql constant rate'),
  'atac initial',
)
def test_statistics_normalise_and_are_not_trained(built, key):
  flat = actor_critic.flatten(built.batch.o_tm1)
  flat = (flat - STATISTICS[0][None]) / STATISTICS[1][None]
  scaled = {'angle': flat[:, :2, None], 'speed': flat[:, 2:]}
  raw = make_agent(
    built.module, dataclasses.replace(built.config, normalise=False)
  )
  identity = {'mean': jnp.zeros(F), 'std': jnp.ones(F)}
  params = built.state.params
  other = params._replace(policy=params.policy | {'statistics': identity})
  got, _ = built.agent.exploit(params, key, make_timestep(built.batch.o_tm1))
  want, _ = raw.exploit(other, key, make_timestep(scaled))
  assert_close(got, want)
  state = built.state
  for _ in range(3):
    state, _ = built.update(state, built.batch, key)
  for part in ('policy', 'critic')[: 1 if built.module is bc else 2]:
    for name, x in zip(('mean', 'std'), STATISTICS):
      kept = getattr(state.params, part)['statistics'][name]
      np.testing.assert_array_equal(kept, np.broadcast_to(x, kept.shape))


# Reward 1 for ever, cut by a time limit only: 1 / (1 - gamma). Else 1.
TIMED = {
  'sac': {'init_temperature': 1e-6, 'temperature_rate': 0.0},
  'td3_bc': {'normalise': False},
  'cql': {
    'penalty': 0.0,
    'num_samples': 1,
    'layer_norm': False,
    'normalise': False,
  },
  'iql': {},
  'combo': {'penalty': 0.0},
}


@pytest.mark.parametrize('name', TIMED)
def test_time_limits_bootstrap_and_terminations_do_not(name):
  module, config, *_ = AGENTS[name]
  shared = {'gamma': 0.8, 'target_rate': 0.1, 'critic_rate': 0.01}
  config = dataclasses.replace(config, **shared, **TIMED[name])
  spec = Spec(ArraySpec((2,)), UNIT)
  state_of = jnp.repeat(jnp.eye(2), 16, 0)
  batch = rows = Transition(
    o_tm1=state_of,
    a_tm1=jnp.tile(jnp.linspace(-1, 1, 16)[:, None], (2, 1)),
    r_t=jnp.ones(32),
    discount_t=jnp.repeat(jnp.array([1.0, 0.0]), 16),
    o_t=state_of,
  )
  if module is combo:
    half = lambda start: jax.tree.map(lambda x: x[start::2], rows)
    batch = Mixed(half(0), half(1))

  def run(**changes):
    own = dataclasses.replace(config, **changes)
    networks = module.make_networks(own, spec)
    agent = make_agent(module, own, spec, networks)
    start = agent.init(jax.random.key(0))
    state, _ = train(agent, start, lambda key: batch, 1500)
    return networks.critic.apply(state.params.critic, rows.o_tm1, rows.a_tm1)

  if hasattr(config, 'residual_weight'):
    run_both = jax.jit(jax.vmap(lambda weight: run(residual_weight=weight)))
    q = run_both(jnp.array([1.0, 0.5]))
  else:
    q = run()[None]
  want = np.tile(np.repeat([5.0, 1.0], 16), (*q.shape[:2], 1))
  np.testing.assert_allclose(q, want, atol=0.2)


# Errors.


@pytest.mark.parametrize(
  'module, field, value',
  [
    (sac, 'gamma', 1.5),
    (sac, 'target_rate', -0.1),
    (sac, 'residual_weight', math.nan),
    (sac, 'critic_rate', -1.0),
    (sac, 'init_temperature', 0.0),
    (sac, 'target_entropy', math.inf),
    (bc, 'loss', 'hinge'),
    (bc, 'policy_rate', math.inf),
    (bc, 'init_temperature', -1.0),
    (bc, 'min_entropy', math.nan),
    (td3_bc, 'policy_delay', 0),
    (td3_bc, 'alpha', -2.5),
    (td3_bc, 'target_noise', -0.2),
    (td3_bc, 'gamma', -0.1),
    (cql, 'gamma', 1.5),
    (cql, 'target_rate', -0.1),
    (cql, 'penalty', -1.0),
    (cql, 'num_samples', 0),
    (cql, 'critic_rate', math.inf),
    (cql, 'init_temperature', 0.0),
    (cql, 'gap_target', math.nan),
    (iql, 'gamma', math.nan),
    (iql, 'expectile', 1.0),
    (iql, 'temperature', -1.0),
    (iql, 'max_weight', 0.0),
    (iql, 'total_updates', 0),
    (dynamics, 'elites', 8),
    (dynamics, 'learning_rate', -1.0),
    (dynamics, 'held_out', 1.0),
    (dynamics, 'held_out_decay', math.nan),
    (dynamics, 'planning_gamma', 1.1),
    (combo, 'gamma', -0.1),
    (combo, 'real_fraction', 1.5),
    (combo, 'penalty', math.inf),
    (combo, 'rollout_length', 0),
    (combo, 'model_updates', 0),
    (combo, 'init_temperature', 0.0),
    (combo, 'rollouts', 'random'),
    (combo, 'penalty_states', 'real'),
  ],
)
def test_a_bad_setting_is_refused(module, field, value):
  with pytest.raises(ValueError, match=f'^{field}={value}: must be'):
    module.Config(**{field: value})


def test_a_floor_under_a_deterministic_policy_is_refused():
  with pytest.raises(ValueError, match=r'min_entropy=-1.0: must be None'):
    bc.Config(loss='squared', min_entropy=-1.0)


def test_a_multiplier_cannot_grow_from_nothing():
  with pytest.raises(ValueError, match='penalty=0: must be above 0'):
    cql.Config(penalty=0.0, gap_target=1.0)


SQUARE = np.ones((2, 2), np.float32)
BAD_SPECS = [
  (
    {'action': Discrete(3)},
    'vectors of continuous actions; environment has D',
  ),
  (
    {'action': Continuous((2, 2), -SQUARE, SQUARE)},
    'needs vectors of continuous actions',
  ),
  (
    {'action': Continuous((2,), LOW, np.float32([1, np.inf]))},
    'high=inf must be finite',
  ),
  (
    {'action': Continuous((1,), np.float32([-np.inf]), np.float32([1]))},
    'low=-inf must be finite',
  ),
  (
    {'statistics': tuple(x[:2] for x in STATISTICS)},
    '2 means and 2 deviations, must be 3 each',
  ),
  ({'statistics': None}, 'normalise=True: environment has no statistics'),
]


@pytest.mark.parametrize(
  'module, changes, message',
  [
    (module, *case)
    for module in (sac, bc, td3_bc, cql, iql, combo, atac)
    for case in BAD_SPECS
  ]
  # It normalises what has statistics.
  + [(dynamics, *case) for case in BAD_SPECS[:-1]],
)
def test_a_spec_that_does_not_fit_is_refused(module, changes, message):
  normalises = {} if module is dynamics else {'normalise': True}
  with pytest.raises(ValueError, match=message):
    agent = make_agent(
      module, module.Config(**normalises), SPEC._replace(**changes)
    )
    agent.init(jax.random.key(0))
