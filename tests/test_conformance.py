"""What holds for every agent of the table in `conformance`."""

import pathlib

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import AGENTS, SEARCHING
from searching_cases import shaken
from trees import assert_close, assert_equal, shapes, stack

from agents import td3_bc

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(params=AGENTS)
def built(request):
  return conformance.built(request.param)


def is_searching(built):
  return built.spec in [AGENTS[name].spec for name in SEARCHING]


def pick(*params):
  return pytest.mark.parametrize('built', params, indirect=True)


# Slow or compiled anew, and the same code in all variants of an agent.
ONE_OF_EACH = (
  *('muzero', 'efficientzero', 'efficientzero_v2', 'sampled_muzero'),
  'alphazero',
  *('sac dqra', 'bc floor', 'td3_bc dqra', 'cql lagrange', 'iql'),
  *('dynamics', 'combo'),
)


def start(built, seed=0):
  """A state in which heads that begin at zero say something."""
  return shaken(built.state, seed) if is_searching(built) else built.state


def has_changed(one, two):
  return [
    (np.asarray(a) != np.asarray(b)).any()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
  ]


def layers(state):
  """Parameters of the policy and the critics that every update trains."""
  parts = [getattr(state.params, name, {}) for name in ('policy', 'critic')]
  return [part['layers'] for part in parts if 'layers' in part]


def test_every_agent_has_a_row():
  files = {path.stem for path in (ROOT / 'agents').glob('[a-z]*.py')}
  rows = {row.module.__name__.split('.')[-1] for row in AGENTS.values()}
  assert rows == files


def test_update_is_stable_and_traced_once(built, key):
  state, before = built.state, shapes(built.state)
  for i in range(3):
    old = state
    state, info = built.update(state, built.batch, jax.random.fold_in(key, i))
    assert shapes(state) == before
    for name, x in info.metrics.items():
      assert (x.shape, x.dtype) == ((), jnp.float32), name
      assert np.isfinite(x), name
    assert any(has_changed(old, state))
    if built.module is not td3_bc:  # whose policy waits for its turn
      assert all(has_changed(layers(old), layers(state)))
    rows = built.batch.valid.shape[:1] if is_searching(built) else None
    assert (info.priorities is None) == (rows is None)
    assert rows is None or info.priorities.shape == rows
  assert built.traces[0] == 1


def test_state_can_be_donated(built, key):
  # Two leaves in one buffer would be refused.
  state = built.init(key)
  for _ in range(2):
    state, _ = built.donating(state, built.batch, key)
  assert all(
    np.isfinite(x).all()
    for x in jax.tree.leaves(state)
    if jnp.issubdtype(x.dtype, jnp.floating)
  )


@pick(
  *(pytest.param(name, marks=pytest.mark.slow) for name in ONE_OF_EACH),
  'atac initial',
)
def test_jit_equals_eager(built, key):
  state = start(built)
  assert_close(
    built.update(state, built.batch, key),
    built.agent.update(state, built.batch, key),
    rtol=1e-4 if is_searching(built) else 2e-5,
  )


@pick(*ONE_OF_EACH)
def test_seeds_in_one_scan_equal_a_loop(built, key):
  updates, tolerance = (1, 1e-4) if is_searching(built) else (3, 1e-5)
  states = [start(built, seed) for seed in (0, 7)]
  if not is_searching(built):
    states = [built.init(jax.random.fold_in(key, i)) for i in range(2)]
  keys = jax.random.split(key, (2, updates))

  @jax.jit
  @jax.vmap
  def together(state, keys):
    one = lambda s, k: built.agent.update(s, built.batch, k)
    return jax.lax.scan(one, state, keys)

  got, got_info = together(stack(*states), keys)
  infos = []
  for i, state in enumerate(states):
    for k in keys[i]:
      state, info = built.update(state, built.batch, k)
      infos.append(info)
    states[i] = state
  assert_close(got, stack(*states), tolerance)
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), got_info)
  assert_close(flat, stack(*infos), tolerance)


def test_the_key_of_init_draws_the_network(built):
  def drawn(seed):
    params = built.init(jax.random.key(seed)).params
    return [
      x
      for path, x in jax.tree_util.tree_leaves_with_path(params)
      if jnp.issubdtype(x.dtype, jnp.floating)
      and jnp.ptp(x) > 0
      and jax.tree_util.DictKey('statistics') not in path  # of the data
    ]

  first, other = drawn(0), drawn(1)
  assert_equal(first, drawn(0))
  assert first
  for a, b in zip(first, other, strict=True):
    assert not np.array_equal(a, b)
