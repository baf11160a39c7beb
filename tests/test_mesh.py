"""Two devices give the numbers of one."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_agents
from trees import assert_close

from agents import efficientzero, efficientzero_v2, muzero, sampled_muzero
from agents.core import planning
from agents.core.types import (
  Agent,
  ArraySpec,
  Continuous,
  Discrete,
  Experience,
  Info,
  Sample,
  Spec,
  Trajectory,
)
from experiments.runtime import loop, mesh, sources
from experiments.runtime.sources import Measures, Source
from networks.muzero import NetworkConfig
from search.model import TimeStep

SPEC = Spec(ArraySpec((4,), np.float32), Discrete(3))
NETWORK = NetworkConfig(
  torso='vector',
  latent_size=8,
  blocks=1,
  norm='batch',
  lstm_size=4,
  value_bins=11,
  reward_bins=11,
  projector=(6,),
  predictor=(4,),
  head_hidden=(6,),
)
BOUND = np.ones(2, np.float32)
CONTINUOUS = SPEC._replace(action=Continuous((2,), -BOUND, BOUND))
SLOW = pytest.mark.slow
SHARED = {
  'network': NETWORK,
  'search': planning.SearchConfig(num_simulations=2),
  'unroll_steps': 2,
  'td_steps': 2,
  'learning_rate': 0.1,
  'warmup_updates': 0,
  'target_period': 2,
}


class State(NamedTuple):
  """The state of an agent that only adds."""

  params: Any
  x: Any


def make_agent(module, **keywords):
  config = module.Config(**SHARED)
  networks = module.make_networks(config, SPEC, keywords.get('reduce'))
  return small_agents.make_agent(module, config, SPEC, networks, **keywords)


def make_batch(size, length=5, ends=True):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  valid = np.ones((size, length), bool)
  discount = np.ones((size, length), np.float32)
  if ends:  # windows are not alike
    valid[0, 2:] = False
    discount[0, 1] = 0
  timestep = TimeStep(
    observation=normal(size, length, 4),
    reward=normal(size, length),
    discount=discount,
    is_first=np.zeros((size, length), bool),
    truncated=np.zeros((size, length), bool),
  )
  extras = {
    'search_policy': rng.dirichlet(np.ones(3), (size, length)),
    'search_value': normal(size, length),
  }
  extras['search_policy'] = extras['search_policy'].astype(np.float32)
  action = rng.integers(0, 3, (size, length)).astype(np.int32)
  sample = Sample(
    index=np.arange(size, dtype=np.int32),
    generation=np.ones(size, np.int32),
    weight=np.linspace(0.2, 1, size).astype(np.float32),
    age=np.zeros(size, np.float32),
  )
  return Trajectory(Experience(timestep, action, extras), valid, sample)


def shaken(state):
  rng = np.random.default_rng(1)
  network = jax.tree.map(
    lambda x: x + np.float32(0.3) * rng.normal(size=x.shape).astype(np.float32),
    state.params.network,
  )
  return state._replace(params=state.params._replace(network=network))


@pytest.mark.parametrize(
  'module', [muzero, pytest.param(efficientzero, marks=pytest.mark.slow)]
)
def test_two_devices_equal_one(module, key):
  # SGD: Adam would hide a gradient that is twice too large.
  agent = make_agent(module)
  two = mesh.make_mesh()
  assert two.size == 2
  update = mesh.compile_update(agent, two)
  single = jax.jit(agent.update)
  make = lambda: shaken(jax.jit(agent.init)(key))
  got, got_info = update(make(), make_batch(16), key)
  want, want_info = single(make(), make_batch(16), key)
  assert want_info.metrics['gradient_norm'] > 0.1
  assert jax.tree.leaves(want.params.statistics)
  assert_close((got, got_info), (want, want_info), 0.0001, 1e-05)
  assert len(got.params.step.sharding.device_set) == 2


# With noise at the root and ties, half of the rows, and in chunks.
SEARCHED = {
  'muzero': (muzero, SPEC, {'rule': 'puct'}, {'reanalyze_chunk': 12}),
  'sampled_muzero': (sampled_muzero, CONTINUOUS, {'num_samples': 3}, {}),
  'efficientzero': (efficientzero, SPEC, {'rule': 'gumbel'}, {}),
  'efficientzero_v2': (
    efficientzero_v2,
    CONTINUOUS,
    {'rule': 'gumbel', 'num_samples': 3, 'wide_samples': 2, 'leaf_samples': 2},
    # The best action of a search may be the same again.
    {'policy_target': 'improved'},
  ),
}


@pytest.mark.parametrize(
  'name',
  [
    'sampled_muzero',
    *(
      pytest.param(name, marks=SLOW)
      for name in ('muzero', 'efficientzero', 'efficientzero_v2')
    ),
  ],
)
def test_searches_over_two_devices_equal_one(name, key):
  module, spec, search, own = SEARCHED[name]
  search = planning.SearchConfig(num_simulations=3, **search)
  changes = {'search': search, 'reanalyze_fraction': 0.5, **own}
  config = module.Config(**{**SHARED, **changes})
  networks = module.make_networks(config, spec)
  agent = module.make(config, networks, module.make_losses(), spec)
  assert agent.act is not None and agent.refresh is not None
  two = mesh.make_mesh()
  state = shaken(jax.jit(agent.init)(key))
  batch = make_batch(16)
  # What it chose when the batch was recorded.
  first = jax.tree.map(lambda x: x[:, 0], batch.experience.timestep)
  act = jax.jit(agent.act)
  action, extras = act(state.params, key, first)
  over = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 5, 1), tree)
  batch = batch._replace(
    experience=batch.experience._replace(
      action=over(action), extras=over(extras)
    )
  )
  acted = jax.jit(mesh.by_rows(agent.act, two, (2,)))
  refresh = mesh.compile_refresh(agent, two)
  for function, args, single in (
    (acted, (state.params, key, first), act),
    (refresh, (state, batch, 0, key), jax.jit(agent.refresh)),
  ):
    got, want = function(*args), single(*args)
    assert_close(got, want, 0.0001, 1e-05)
    text = function.lower(*args).compile().as_text()
    assert not re.search(r'all-(?:reduce|gather|to-all)|permute', text)
  policy = refresh(state, batch, 0, key).experience.extras['search_policy']
  changed = (policy != batch.experience.extras['search_policy']).any((1, 2))
  np.testing.assert_array_equal(changed, np.arange(16) % 8 < 4)


def test_pmap_equals_one_device(key):
  # Without ends an update draws nothing. SGD, and a network whose BatchNorm
  # takes the statistics of all devices.
  batch = make_batch(16, ends=False)
  single = jax.jit(make_agent(efficientzero).update)
  agent = make_agent(efficientzero, reduce=mesh.pmean)
  update = mesh.compile_update(agent, mesh.make_mesh(), 'pmap')
  make = lambda: shaken(jax.jit(make_agent(efficientzero).init)(key))
  state = make()
  got, got_info = update(state, batch, key)
  want, want_info = single(make(), batch, key)
  assert want_info.metrics['gradient_norm'] > 0.1
  for info in (got_info, want_info):
    # Under pmap the mean over devices of what is the largest on each, or of
    # how far the rows of each are apart.
    for name in list(info.metrics):
      if name.endswith(('_largest', '_cosine', '_rank', '_variance')):
        info.metrics.pop(name)
  assert_close((got, got_info), (want, want_info), 0.0001, 1e-05)
  assert state.params.step.is_deleted()
  got, _ = update(got, batch, jax.random.fold_in(key, 1))
  assert got.params.step == 2
  with pytest.raises(ValueError, match=r'batch_size=3: .* of the 2 devices'):
    update(got, make_batch(3), key)


def test_how_is_refused():
  agent = make_agent(muzero)
  with pytest.raises(ValueError, match=r"how='xmap': must be 'jit' or 'pmap'"):
    mesh.compile_update(agent, mesh.make_mesh(), 'xmap')
  with pytest.raises(ValueError, match=r'state_sharding: .* need how=jit'):
    mesh.compile_update(
      agent, mesh.make_mesh(), 'pmap', mesh.split(mesh.make_mesh())
    )


def test_the_state_may_be_sharded(key):
  # As experts are: a leaf split over devices stays so, and counts the same.
  def update(state, batch, key):
    return state._replace(x=state.x + jnp.mean(batch)), Info({}, None)

  agent = Agent(lambda key: State(jnp.zeros(()), jnp.arange(4.0)), None, update)
  two = mesh.make_mesh()
  sharding = State(mesh.replicated(two), mesh.split(two))
  state = jax.jit(agent.init, out_shardings=sharding)(key)
  step = mesh.compile_update(agent, two, state_sharding=sharding)
  state, _ = step(state, np.float32([1, 3]), key)
  np.testing.assert_array_equal(state.x, np.arange(4) + 2.0)
  assert state.x.sharding.spec == mesh.split(two).spec


def test_the_state_is_donated(key):
  agent = make_agent(muzero)
  update = mesh.compile_update(agent, mesh.make_mesh())
  state, _ = update(jax.jit(agent.init)(key), make_batch(4), key)
  update(state, make_batch(4), key)
  assert state.params.step.is_deleted()


def test_a_batch_that_does_not_divide_is_refused(key):
  agent = make_agent(muzero)
  update = mesh.compile_update(agent, mesh.make_mesh())
  with pytest.raises(ValueError, match=r'batch_size=3: .* of the 2 devices'):
    update(jax.jit(agent.init)(key), make_batch(3), key)


def test_one_device_may_be_chosen(key):
  one = mesh.make_mesh(jax.devices()[1:])
  assert one.size == 1
  agent = make_agent(muzero)
  state, _ = mesh.compile_update(agent, one)(
    jax.jit(agent.init)(key), make_batch(3), key
  )
  assert state.params.step.sharding.device_set == {jax.devices()[1]}


def test_the_loop_learns_over_a_mesh_from_refreshed_batches(key):
  # What `refresh` returns lies whole on every device, not split.
  def update(state, batch, key):
    return state._replace(x=state.x + jnp.mean(batch)), Info({}, batch)

  agent = Agent(
    init=lambda key: State(jnp.zeros(()), jnp.zeros(())),
    act=None,
    update=update,
    refresh=lambda state, batch, step, key: batch + 0 * state.x + step,
  )

  def feedback(state, batch, info):
    return state + [np.asarray(info.priorities).tolist()]

  next_ = lambda state, agent_state, step, key: (
    state,
    np.float32([0, 0, 2, 2]),
    Measures({}, {}),
  )
  source = Source(lambda key: [], next_, feedback, lambda: None, False)
  carry = loop.run(
    agent,
    sources.reanalyzed(source, agent),
    loop.init(agent, source, key),
    key=key,
    steps=3,
    intervals=loop.Intervals(log=3),
    update=mesh.compile_update(agent, mesh.make_mesh()),
  )
  assert carry.agent.x == 1 + 2 + 3
  assert carry.source == [[0, 0, 2, 2], [1, 1, 3, 3], [2, 2, 4, 4]]
