"""Experts divided over two devices give the numbers of one."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from agents.core.types import Agent, Info
from experiments.runtime import checkpoint, loop, mesh
from experiments.runtime.sources import Measures, Source, no_feedback
from networks import balance, dispatch, expert_parallel, routing

EXPERTS, TOKENS, FEATURES = 6, 10, 4
TWO = mesh.make_mesh()
ROWS, WHOLE = mesh.split(TWO), mesh.replicated(TWO)


def work(params, x):
  return jnp.tanh(x @ params['kernel']) + params['bias'][None]


EXPERT = dispatch.Expert(work)
apart = functools.partial(expert_parallel.apply, axis=mesh.AXIS)


def over(function, shardings=WHOLE, around=TWO):
  """`function` compiled with the mesh set, as `mesh.compile_update` does."""

  def traced(*args):
    with jax.sharding.use_abstract_mesh(around.abstract_mesh):
      return function(*args)

  return jax.jit(traced, in_shardings=shardings)


def exchanges(compiled):
  return (compiled.as_text() or '').count(' all-to-all(')


def all_close(got, want, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance
    ),
    got,
    want,
  )


class Problem(NamedTuple):
  """What is differentiated, what is not, and the answer of one device."""

  args: Any
  fixed: Any
  want: Any


def loss(layer, gate, x, params, expert, target):
  y, *told = layer(routing.ByToken(expert, gate), x, params, EXPERT)
  return jnp.sum((y - target) ** 2), (y, *told)


def gradients(layer):
  return jax.value_and_grad(
    functools.partial(loss, layer), (0, 1, 2), has_aux=True
  )


@pytest.fixture(scope='module')
def problem():
  # Every token takes two experts in each of two groups, the groups in any
  # order. Places are empty: half a bundle, a whole one, a whole token.
  rng = np.random.default_rng(0)
  some = lambda group: 3 * group + rng.permutation(3)[:2]
  expert = np.array(
    [np.concatenate([*map(some, rng.permutation(2))]) for _ in range(TOKENS)]
  )
  gate = rng.uniform(size=expert.shape)
  expert[0, 1] = expert[1, 2] = expert[2, :2] = expert[3] = EXPERTS
  gate = np.where(expert == EXPERTS, 0, gate)
  float32 = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {'kernel': float32(6, FEATURES, 3), 'bias': float32(6, 3)}
  args = (np.float32(gate), float32(TOKENS, FEATURES), params)
  fixed = (expert.astype(np.int32), float32(TOKENS, 3))
  reference = functools.partial(dispatch.apply, backend='dense')
  return Problem(args, fixed, jax.jit(gradients(reference))(*args, *fixed))


@pytest.mark.parametrize(
  ('options', 'rounds', 'sent'),
  [
    # Out and back, and the same for the gradient.
    ({}, 1, 4),
    ({'bundle': 2}, 1, 4),
    # Room for 3 of 5 rows. Further rounds have the same, in loops, and go out
    # again for the gradient.
    ({'bundle': 2, 'room_factor': 0.5}, 2, 4 + 5),
  ],
)
def test_output_and_gradients_equal_one_device(problem, options, rounds, sent):
  step = over(gradients(functools.partial(apart, **options)), ROWS)
  compiled = step.lower(*problem.args, *problem.fixed).compile()
  got = compiled(*jax.device_put((*problem.args, *problem.fixed), ROWS))
  (value, (y, dropped, taken)), bars = got
  all_close(((value, (y, dropped)), bars), problem.want)
  assert (dropped, taken) == (0, rounds)
  gate_bar, _, params_bar = bars
  assert np.abs(gate_bar).max() > 0.1
  assert params_bar['kernel'].sharding.shard_shape((6, 4, 3)) == (3, 4, 3)
  assert exchanges(compiled) == sent


def test_seeds_by_vmap_and_two_all_to_all_forward(problem):
  expert, _ = problem.fixed

  def one(gate, x, params):
    plan = routing.ByToken(expert, gate)
    return apart(plan, x, params, EXPERT, bundle=2)[0]

  seeds = lambda tree: jax.tree.map(lambda a: np.stack([a, 2 * a]), tree)
  args = seeds(problem.args)
  compiled = over(jax.vmap(one)).lower(*args).compile()
  got = compiled(*args)
  gate, x, params = args
  want = np.zeros(got.shape)
  for i, t in np.ndindex(2, TOKENS):
    for e, g in zip(expert[t], gate[i, t]):
      if e < EXPERTS:
        hidden = np.tanh(x[i, t] @ params['kernel'][i, e])
        want[i, t] += g * (hidden + params['bias'][i, e])
  all_close(got, want)
  assert exchanges(compiled) == 2


def test_an_expert_works_on_the_tokens_of_all_devices_at_once():
  # The expert's output is how many rows it was given together. Seven tokens
  # do not divide.
  def grouped(params, rows, sizes):
    owner = jnp.searchsorted(
      jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side='right'
    )
    number = sizes[jnp.minimum(owner, sizes.shape[0] - 1)]
    return number[:, None].astype(jnp.float32) + 0 * params[0, 0]

  expert = dispatch.Expert(lambda params, x: x, grouped)
  chosen = np.array([[0], [1], [1], [3], [1], [1], [3]], np.int32)

  def count(x):
    plan = routing.ByToken(jnp.asarray(chosen), jnp.ones((7, 1)))
    return apart(plan, x, jnp.zeros((4, 1)), expert, backend='ragged')

  y, dropped, rounds = over(count)(np.ones((7, 2), np.float32))
  np.testing.assert_array_equal(y[:, 0], [1, 4, 4, 2, 4, 4, 2])
  assert (dropped, rounds) == (0, 1)


@pytest.mark.parametrize('size', [TOKENS, TOKENS - 1])
def test_whole_experts_work_where_the_tokens_lie(problem, size):
  # An odd number of tokens is filled up.
  cut = lambda tree: jax.tree.map(lambda a: a[:size], tree)
  (gate, x, params), fixed = problem.args, cut(problem.fixed)
  args = (*cut((gate, x)), params, *fixed)
  want = problem.want
  if size < TOKENS:
    dense = functools.partial(dispatch.apply, backend='dense')
    want = jax.jit(gradients(dense))(*args)
  kinds = (AxisType.Auto,)
  around = Mesh(TWO.devices, (expert_parallel.ROWS,), axis_types=kinds)
  where = (ROWS, ROWS, WHOLE, ROWS, ROWS) if size == TOKENS else WHOLE
  for layer in (apart, functools.partial(apart, backend='loop')):
    compiled = over(gradients(layer), where, around).lower(*args).compile()
    (value, (y, dropped, rounds)), bars = compiled(*jax.device_put(args, where))
    all_close(((value, (y, dropped)), bars), want)
    assert rounds == 0
    text = compiled.as_text() or ''
    assert size < TOKENS or not re.search('all-gather|all-to-all|permute', text)


def test_capacity_of_whole_experts_is_of_all_tokens():
  plan = routing.ByToken(jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1)))
  expert = dispatch.Expert(lambda params, x: x * params[None])
  kinds = (AxisType.Auto,)
  around = Mesh(TWO.devices, (expert_parallel.ROWS,), axis_types=kinds)
  x = np.arange(1, 5, dtype=np.float32)[:, None]
  options = {'backend': 'capacity', 'capacity_factor': 1.0}
  run = lambda x: apart(plan, x, jnp.ones((2, 1)), expert, **options)
  y, dropped, _ = over(run, WHOLE, around)(x)
  np.testing.assert_array_equal(y[:, 0], [1, 2, 0, 0])
  assert dropped == 0.5


def test_capacity_drops_what_finds_no_room():
  # All want expert 0. Each of two devices has two rows for its device and room
  # for 1 * 2 / 2: the first tokens find it.
  def run(factor, x):
    plan = routing.ByToken(jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1)))
    expert = dispatch.Expert(lambda params, x: x * params[None])
    options = {'backend': 'capacity', 'capacity_factor': factor}
    return apart(plan, x, jnp.ones((2, 1)), expert, **options)

  x = np.arange(1, 5, dtype=np.float32)[:, None]
  tight, wide = over(lambda x: (run(1.0, x), run(2.0, x)))(x)
  np.testing.assert_array_equal(tight[0][:, 0], [1, 0, 3, 0])
  assert tight[1] == 0.5
  np.testing.assert_array_equal(wide[0], x)
  assert wide[1] == 0


@pytest.mark.parametrize('backend', ['loop', 'dense'])
def test_rounds_equal_one_device(problem, backend):
  # Room for 3 rows; every token wants all experts of device 0. Some places are
  # empty.
  is_empty, target = problem.fixed[0] == EXPERTS, problem.fixed[1]
  rng = np.random.default_rng(1)
  first = rng.permuted(np.tile(np.arange(3), (TOKENS, 1)), axis=1)
  expert = np.c_[first, rng.integers(3, 6, TOKENS)].astype(np.int32)
  expert[is_empty] = EXPERTS
  layer = functools.partial(apart, room_factor=0.3, backend=backend)
  reference = functools.partial(dispatch.apply, backend='dense')
  want = jax.jit(gradients(reference))(*problem.args, expert, target)
  step = over(gradients(layer), ROWS)
  args = jax.device_put((*problem.args, expert, target), ROWS)
  (value, (y, dropped, rounds)), bars = step(*args)
  all_close(((value, (y, dropped)), bars), want)
  most = max(np.sum(half < 3) for half in np.split(expert, 2))
  assert rounds == -(-most // 3) > 3


def test_rounds_are_of_all_devices():
  # Only device 1 has too many rows, for device 0; seeds by vmap differ.
  chosen = np.array([[[0], [1], [1], [0]], [[1], [0], [0], [0]]], np.int32)
  expert = dispatch.Expert(lambda params, x: x * params[None])
  params, x = np.float32([[2], [3]]), np.arange(8, dtype=np.float32)
  x = x.reshape(2, 4, 1)

  def run(chosen, x):
    plan = routing.ByToken(chosen, jnp.ones((4, 1)))
    return apart(plan, x, params, expert, room_factor=1.0)

  def total(x):
    y, *told = jax.vmap(run)(chosen, x)
    return jnp.sum(y**2), (y, *told)

  x_bar, (y, dropped, rounds) = over(jax.grad(total, has_aux=True))(x)
  scale = params[chosen[..., 0]]
  np.testing.assert_array_equal(y, x * scale)
  np.testing.assert_array_equal(x_bar, 2 * x * scale**2)
  np.testing.assert_array_equal(dropped, [0, 0])
  np.testing.assert_array_equal(rounds, [1, 2])


@pytest.fixture(scope='module')
def eight():
  """What `moe_divided` finds in a process with 8 devices."""
  tests = pathlib.Path(__file__).resolve().parent
  done = subprocess.run(
    [sys.executable, tests / 'moe_divided.py'],
    env={**os.environ, 'PYTHONPATH': str(tests.parent)},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


@pytest.mark.parametrize(
  ('name', 'rounds'),
  [
    ('odd', 1),
    ('few', 1),
    # 6 tokens a device: 12 rows, and room for 3 to each device. To one device
    # go both rows of a token, or one.
    ('one', 4),
    ('one_expert', 2),
    # Tokens of 6 experts on 3 devices: 7 to 9 rows from one device to another.
    ('idle', 3),
  ],
)
def test_eight_devices_equal_one(eight, name, rounds):
  found = eight[name]
  assert found['apart'] < 1e-4
  assert (found['dropped'], found['rounds']) == (0, rounds)


def test_what_is_dropped_on_eight_devices_is_counted(eight):
  # Room for 6 of 12 rows from each device.
  found = eight['dropping']
  assert (found['dropped'], found['rounds']) == (0.5, 1)
  assert found['apart'] > 0.1


def test_what_a_device_sends_does_not_grow_with_the_devices(eight):
  two, four, eight_ = eight['sent']
  assert two == four == eight_
  # Room for the even share of 128 rows: 8 features, a gate and an expert.
  assert set(two['exchanged']) == {128 * 4 * 8, 128 * 4 * 10}
  # On a CPU the k best of a token's experts are chosen on every device.
  assert two['kinds'] == ['all-gather', 'all-reduce', 'all-to-all']


def test_a_program_of_each_device_counts_one():
  # Where environments of `parts.stacked` act, experts are whole.
  def one(x):
    return x + expert_parallel.devices(mesh.AXIS)

  inner = jax.shard_map(one, mesh=TWO, in_specs=ROWS.spec, out_specs=ROWS.spec)
  run = over(lambda x: (inner(x), one(x)))
  np.testing.assert_array_equal(run(np.zeros(2)), [[1, 1], [2, 2]])


def test_without_a_mesh_it_is_one_device(problem):
  gate, x, params = problem.args
  plan = routing.ByToken(problem.fixed[0], gate)
  assert expert_parallel.devices(mesh.AXIS) == 1
  y, *_ = jax.jit(functools.partial(apart, expert=EXPERT, backend='dense'))(
    plan, x, params
  )
  all_close(y, problem.want[0][1][0])


@pytest.mark.parametrize(
  ('options', 'experts', 'message'),
  [
    ({}, 5, r'experts=5: must be a multiple of the 2 devices'),
    ({'bundle': 3}, 6, r'bundle=3: must divide the 4 places'),
    ({'bundle': 4}, 6, r'bundle=4: must be at most the 3 experts'),
    ({'backend': 'fast'}, 6, r"backend='fast': must be one of"),
    ({'backend': 'ragged'}, 6, r'has no grouped form'),
  ],
)
def test_refused(problem, options, experts, message):
  gate, x, params = problem.args
  plan = routing.ByToken(problem.fixed[0], gate)
  params = jax.tree.map(lambda p: p[:experts], params)
  with pytest.raises(ValueError, match=message):
    over(lambda x: apart(plan, x, params, EXPERT, **options)).lower(x)


class State(NamedTuple):
  """The state of a mixture that learns by itself."""

  params: Any
  moments: Any


# SGD with momentum: Adam would hide a gradient that is twice too large.
OPTIMISER = optax.sgd(0.1, momentum=0.9)


def make_agent():
  """A regression by a noisy gate and experts, applied twice over."""

  def init(key):
    gates, experts = jax.random.split(key)
    draw = lambda key: {
      'kernel': jax.random.normal(key, (EXPERTS, FEATURES, FEATURES)),
      'bias': jnp.zeros((EXPERTS, FEATURES)),
    }
    params = {
      'gate': 0.1 * jax.random.normal(gates, (FEATURES, EXPERTS)),
      'mixture': {'experts': draw(experts)},
    }
    return State(params, OPTIMISER.init(params))

  def objective(params, batch, key):
    # What a MuZero unroll does: a scan of a layer that is computed again.
    @jax.checkpoint
    def layer(x, key):
      clean = x @ params['gate']
      noise = jax.random.normal(key, clean.shape)
      found = routing.noisy_top_k(clean, jnp.full_like(clean, 0.3), noise, 2)
      # Tokens do not all find room in the first round.
      experts = params['mixture']['experts']
      y, *_ = apart(found.plan, x, experts, EXPERT, room_factor=0.5)
      return x + y, (found.losses, found.count)

    y, (losses, count) = jax.lax.scan(layer, batch['x'], jax.random.split(key))
    balance_loss = jnp.sum(losses['importance'] + losses['load'])
    error = jnp.mean((y - batch['y']) ** 2)
    metrics = {'error': error, 'balance': balance_loss}
    metrics['busiest'] = jnp.max(jnp.sum(count, 0))
    return error + 0.1 * balance_loss, metrics

  def update(state, batch, key):
    gradient, metrics = jax.grad(objective, has_aux=True)(
      state.params, batch, key
    )
    updates, moments = OPTIMISER.update(gradient, state.moments)
    params = optax.apply_updates(state.params, updates)
    return State(params, moments), Info(metrics, None)

  return Agent(init, None, update)


def make_source(batch):
  """The same batch for ever, in the program: a data set of one page."""
  init = lambda key: jax.tree.map(jnp.asarray, batch)
  next_ = lambda state, *_: (state, state, Measures({}, {}))
  return Source(init, next_, no_feedback, lambda: None, True, axes=None)


@pytest.fixture(scope='module')
def trained():
  """Two updates on one device, and the pieces of it."""
  agent = make_agent()
  normal = np.random.default_rng(0).normal
  batch = {name: np.float32(normal(size=(8, FEATURES))) for name in 'xy'}
  source, key = make_source(batch), jax.random.key(5)
  start = loop.init(agent, source, key)
  shardings = mesh.state_sharding(start.agent, TWO)
  update = jax.jit(agent.update)
  state, infos = start.agent, []
  for i in range(2):
    state, info = update(state, batch, jax.random.fold_in(key, i))
    infos.append(info.metrics)
  assert infos[0]['balance'] > 0.01
  return agent, source, batch, shardings, state, infos


def is_divided(state):
  def shape(x):
    return x.sharding.shard_shape(x.shape)

  own = (EXPERTS // 2, FEATURES, FEATURES)
  trace = state.moments[0].trace
  assert shape(state.params['mixture']['experts']['kernel']) == own
  assert shape(trace['mixture']['experts']['kernel']) == own
  assert trace['mixture']['experts']['bias'].addressable_shards[1].index == (
    slice(3, 6),
    slice(None),
  )
  assert state.params['gate'].sharding.is_fully_replicated
  return True


def test_updates_over_a_mesh_equal_one_device(trained):
  agent, source, batch, shardings, want, want_infos = trained
  key = jax.random.key(5)
  state = mesh.init(agent, source, key, TWO, shardings).agent
  assert is_divided(state)
  update = mesh.compile_update(agent, TWO, state_sharding=shardings)
  for i in range(2):
    state, info = update(state, batch, jax.random.fold_in(key, i))
    all_close(info.metrics, want_infos[i])
  assert is_divided(state)
  all_close(state, want)


def test_an_interval_over_a_mesh(key):
  def update(state, batch, key):
    assert expert_parallel.devices(mesh.AXIS) == 2
    state = jax.tree.map(lambda x: x + jnp.mean(batch['x']), state)
    return state, Info({}, None)

  init = lambda key: State({'experts': jnp.arange(4.0)}, jnp.zeros(2))
  agent = Agent(init, None, update)
  source = make_source({'x': np.array([1, 3], np.float32)})
  shardings = mesh.state_sharding(jax.eval_shape(init, key), TWO)
  carry = mesh.init(agent, source, key, TWO, shardings)
  assert carry.agent.params['experts'].sharding == ROWS
  interval = mesh.compile_interval(agent, source, TWO, shardings)
  carry, *_ = interval(carry, key, 3)
  assert carry.agent.params['experts'].sharding == ROWS
  np.testing.assert_array_equal(carry.agent.params['experts'], [6, 7, 8, 9])
  np.testing.assert_array_equal(carry.agent.moments, [6, 6])


def test_refresh_reads_divided_experts(trained):
  agent, _, batch, shardings, state, _ = trained

  def refresh(state, batch, step, key):
    experts = state.params['mixture']['experts']
    assert expert_parallel.devices(mesh.AXIS) == 2
    return batch['x'] + jnp.sum(experts['kernel']) + step

  agent = agent._replace(refresh=refresh)
  args = (batch, 1, jax.random.key(0))
  got = mesh.compile_refresh(agent, TWO, shardings)(
    jax.device_put(state, shardings), *args
  )
  total = np.sum(state.params['mixture']['experts']['kernel'])
  all_close(got, batch['x'] + total + 1)


def test_local_puts_experts_together(trained):
  *_, shardings, want, _ = trained
  state = mesh.local(jax.device_put(want, shardings))
  for leaf in jax.tree.leaves(state):
    assert len(leaf.sharding.device_set) == 1
  jax.tree.map(np.testing.assert_array_equal, state, want)


@pytest.mark.parametrize('divided', [True, False])
def test_a_checkpoint_of_two_devices(trained, tmp_path, divided):
  # Back on two devices, or on one.
  *_, shardings, want, _ = trained
  keeper = checkpoint.open(tmp_path)
  keeper.save(1, jax.device_put(want, shardings))
  template = jax.tree.map(jnp.zeros_like, want)
  if divided:
    template = jax.device_put(template, shardings)
  restored = keeper.restore(template)
  keeper.close()
  assert restored is not None
  jax.tree.map(np.testing.assert_array_equal, restored[0], want)
  if divided:
    assert is_divided(restored[0])
  else:
    kernel = restored[0].params['mixture']['experts']['kernel']
    assert len(kernel.sharding.device_set) == 1


def test_which_leaves_are_divided():
  shapes = {
    'gate': np.zeros((6, 2)),
    'experts': {'in': np.zeros((6, 2)), 'odd': np.zeros(3), 'n': np.zeros(())},
  }
  got = mesh.state_sharding(shapes, TWO)
  assert got['experts']['in'] == mesh.split(TWO)
  whole = [got['gate'], got['experts']['odd'], got['experts']['n']]
  assert whole == [mesh.replicated(TWO)] * 3


def test_balance_losses_are_of_the_whole_batch():
  # Each half is unbalanced on its own, both together are even.
  def both(logits):
    found = routing.noisy_top_k(logits, None, None, 1)
    assert isinstance(found.plan, routing.ByToken)
    return found.losses['load'], balance.count(found.plan.expert, 2)

  logits = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
  loss, count = over(both, ROWS)(logits)
  assert loss == 0
  np.testing.assert_array_equal(count, [2, 2])
