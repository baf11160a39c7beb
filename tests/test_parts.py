"""Experience in parts: the same numbers wherever the parts are held."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_close

from agents.core import replay as core
from agents.core.types import Sample
from experiments import build
from experiments.files.errors import UserError
from experiments.runtime import loop, mesh, parts
from experiments.training.keeper import Keeper, peek

TINY = (
  'env.num_envs=4',
  'warmup_decisions=64',
  'decisions_per_update=4',
  'replay_capacity=800',
  'batch_size=8',
  'num_simulations=2',
  'network.latent_size=8',
  'network.lstm_size=4',
  'network.head_hidden=4',
  'network.value_bins=5',
  'network.reward_bins=5',
  'learning_rate=1e-2',
  'optimiser=sgd',
  'acting=synchronous',
  'parts=2',
  'checkpoint_every=4',
)
UPDATES = 10


def describe(env, *settings):
  return build.describe(
    'muzero_cartpole', env=env, steps=400, settings=(*TINY, *settings)
  )


@functools.cache
def trainer(env, first, count):
  """All that a run over some of the devices needs, compiled once."""
  experiment, devices = describe(env), jax.devices()[first : first + count]
  layout = build.Layout(mesh.make_mesh(devices), (), experiment.run.parts)
  env = build.make_env(
    experiment,
    training=True,
    num_envs=experiment.env.num_envs // layout.parts,
  )
  agent = build.make_agent(experiment, env.spec)
  source = build.make_source(experiment, env, agent, layout)
  compiled = {}
  if source.is_pure:
    make = mesh.compile_interval
    compiled['interval'] = make(agent, source, layout.mesh)
  else:
    compiled['update'] = mesh.compile_update(agent, layout.mesh)
  return layout, agent, source, compiled


def train(env, key, first=0, count=2, steps=UPDATES, workdir=None):
  layout, agent, source, compiled = trainer(env, first, count)
  rows = []
  log = lambda step, row: rows.append((step, row))
  carry = mesh.init(agent, source, key, layout.mesh)
  hooks = loop.Hooks(log=log)
  keeper = None
  if workdir is not None:
    keeper = Keeper(describe(env), source, layout.parts, workdir, key)
    carry = keeper.restore(carry) or carry
    hooks = hooks._replace(save=keeper.save)
  carry = loop.run(
    agent,
    source,
    carry,
    key=key,
    steps=steps,
    intervals=loop.Intervals(log=2, checkpoint=4),
    hooks=hooks,
    **compiled,
  )
  source.close(carry.source)
  if keeper is not None:
    keeper.close()
  names = ('loss', 'loss_policy', 'gradient_norm', 'replay_age', 'decisions')
  table = [[row[name] for name in names] for _, row in rows]
  return np.array(table), jax.device_get(carry.agent.params.network)


ENVS = ['jax:cartpole', pytest.param('CartPole-v1', marks=pytest.mark.slow)]


@pytest.mark.parametrize('env', ENVS)
def test_two_devices_give_what_one_gives(env, key):
  want, want_network = train(env, key, count=1)
  got, got_network = train(env, key)
  assert want[:, 0].std() > 0
  # Sums over the batch are taken in another order; float32.
  np.testing.assert_allclose(got, want, rtol=2e-4)
  assert_close(got_network, want_network, 0.001, 1e-05)


@pytest.mark.parametrize('env', ENVS)
def test_a_run_goes_on_with_another_number_of_devices(env, key, tmp_path):
  whole, _ = train(env, key, workdir=tmp_path / 'a')
  assert peek(tmp_path / 'b').parts == 0
  train(env, key, steps=4, workdir=tmp_path / 'b')
  assert peek(tmp_path / 'b').parts == 2
  rest, _ = train(env, key, count=1, workdir=tmp_path / 'b')
  np.testing.assert_allclose(rest, whole[-len(rest) :], rtol=2e-4)
  np.testing.assert_array_equal(rest[:, -1], whole[-len(rest) :, -1])


@pytest.mark.slow
def test_damaged_rows_fall_back_to_the_checkpoint_before(key, tmp_path, capsys):
  env = 'CartPole-v1'
  whole, _ = train(env, key, workdir=tmp_path)
  saved = sorted(
    int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.is_dir()
  )
  newest = max((tmp_path / 'replay' / 'part_0001').glob('rows_*'))
  content = bytearray(newest.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 200] = bytes(200)
  newest.write_bytes(content)
  rest, _ = train(env, key, workdir=tmp_path)
  told = capsys.readouterr().out
  assert f'/{saved[-1]} is damaged (replay: {newest}: is garbled)' in told
  assert f'step {saved[-2]} is taken' in told
  np.testing.assert_array_equal(rest, whole[-len(rest) :])
  assert (tmp_path / 'checkpoints' / f'{saved[-1]}.corrupt').is_dir()
  # What was set aside is saved again.
  assert (tmp_path / 'checkpoints' / str(saved[-1])).is_dir()
  for path in (tmp_path / 'replay' / 'part_0000').glob('rows_*'):
    path.unlink()
  with pytest.raises(UserError, match=r'no checkpoint in .* is whole'):
    train(env, key, workdir=tmp_path)


def size(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_a_compiled_run_holds_one_copy_of_its_state(key):
  layout, agent, source, compiled = trainer('jax:cartpole', 0, 1)
  carry = mesh.init(agent, source, key, layout.mesh)
  program = compiled['interval'].lower(carry, key, 5).compile()
  memory = program.memory_analysis()
  # All of it is written in place.
  assert memory.alias_size_in_bytes >= size(carry)


def test_parts_are_as_good_as_one_replay():
  # Whatever is drawn, weight x chance is in proportion to what it is in one
  # replay of everything: m^-beta times m / M.
  rng = np.random.default_rng(0)
  beta = 0.6
  masses = [rng.gamma(1.0, size=5), 20 * rng.gamma(1.0, size=8)]
  chance, raw = [], []
  for mass in masses:
    total = mass.sum()
    chance.append(mass / total / len(masses))
    for m in mass:
      one = np.array([m])
      scale = core.scale(one, total, beta)
      raw.append(core.weights(one, beta) * scale)
  got = np.concatenate(chance) * np.ravel(raw)
  mass = np.concatenate(masses)
  want = mass / mass.sum() * mass**-beta
  np.testing.assert_allclose(got / got.sum(), want / want.sum(), rtol=1e-12)


def test_weights_of_a_joined_batch_compare():
  beta, masses, totals = 0.5, ([1.0, 4.0], [9.0, 25.0]), (10.0, 200.0)
  some = []
  for mass, total in zip(masses, totals):
    mass = np.array(mass)
    some.append(
      Sample(
        index=np.arange(2),
        generation=np.ones(2, np.int32),
        weight=core.weights(mass, beta).astype(np.float32),
        age=np.array([3.0, 5.0], np.float32),
        scale=core.scale(mass, total, beta).astype(np.float32),
      )
    )
  batch = jax.tree.map(lambda *x: jnp.concatenate(x), *some)
  joined = core.joined_weights(batch)
  # M / sqrt(m): 10, 5, 66.7, 40; the largest becomes 1.
  want = np.array([10, 5, 200 / 3, 40]) * 3 / 200
  np.testing.assert_allclose(joined.weight, want, rtol=1e-5)
  assert joined.scale is None


def fake_mesh(processes, each):
  devices = [
    types.SimpleNamespace(process_index=p)
    for p in range(processes)
    for _ in range(each)
  ]
  return types.SimpleNamespace(devices=devices, size=len(devices))


SIZES = {'num_envs': 16, 'batch_size': 64}


@pytest.mark.parametrize(
  'wanted, saved, processes, each, number',
  [
    (0, 0, 1, 1, 1),
    (0, 0, 1, 4, 4),
    (0, 0, 2, 2, 4),
    (0, 0, 1, 6, 4),  # six do not divide sixteen environments
    (0, 4, 1, 1, 4),  # a run goes on with what it has
    (0, 4, 2, 1, 4),
    (8, 0, 2, 1, 8),  # several pools a process
  ],
)
def test_the_number_of_parts(wanted, saved, processes, each, number):
  got = parts.choose(wanted, saved, SIZES, fake_mesh(processes, each))
  assert got == number


@pytest.mark.parametrize(
  'wanted, saved, processes, sizes, words',
  [
    (3, 0, 1, SIZES, r'num_envs=16: must be a multiple of parts=3'),
    (2, 4, 1, SIZES, r'parts=2: this run was begun with parts=4; leave'),
    (0, 4, 3, {'batch_size': 24}, r'parts=4: 3 processes cannot share them'),
    (0, 0, 3, SIZES, r'num_envs=16: .* 3 parts that 3 processes share'),
  ],
)
def test_parts_that_do_not_fit_are_refused(
  wanted, saved, processes, sizes, words
):
  with pytest.raises(ValueError, match=words):
    parts.choose(wanted, saved, sizes, fake_mesh(processes, 1))


def test_more_devices_than_exist_are_refused():
  experiment = describe('CartPole-v1', 'devices=3')
  with pytest.raises(ValueError, match=r'devices=3: this machine has 2'):
    build.make_layout(experiment)
  experiment = describe(
    'CartPole-v1', 'acting=asynchronous', 'acting_devices=2'
  )
  with pytest.raises(ValueError, match=r'acting_devices=2: this machine has 2'):
    build.make_layout(experiment)


def test_acting_devices_that_cannot_act_are_refused(monkeypatch):
  shared = ('acting=asynchronous', 'acting_devices=1', 'parts=1')
  experiment = describe('jax:cartpole', *shared)
  layout = build.make_layout(experiment)
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  with pytest.raises(ValueError, match=r'acting_devices=1: .* take 0'):
    build.make_source(experiment, env, agent, layout)
  # Two would act for one part.
  three = [*jax.devices(), jax.devices()[1]]
  monkeypatch.setattr(jax, 'local_devices', lambda process=0: three)
  experiment = describe('CartPole-v1', *shared, 'acting_devices=2')
  with pytest.raises(ValueError, match=r'acting_devices=2: .* 1 parts only'):
    build.make_layout(experiment)


def test_acting_devices_act_and_the_others_learn(key):
  experiment = describe(
    'CartPole-v1', 'acting=asynchronous', 'acting_devices=1', 'parts=2'
  )
  layout = build.make_layout(experiment)
  assert list(layout.mesh.devices) == jax.devices()[:1]
  assert layout.acting == tuple(jax.devices()[1:])
  env = build.make_env(experiment, training=True, num_envs=2)
  agent = build.make_agent(experiment, env.spec)
  source = build.make_source(experiment, env, agent, layout)
  carry = mesh.init(agent, source, key, layout.mesh)
  try:
    update = mesh.compile_update(agent, layout.mesh)
    carry, _, counts = loop.step(
      agent, source, carry._replace(step=0), key, update
    )
    assert counts['decisions'] > 0
    published, _ = carry.source.parts[0].inner._published
    where = {d for x in jax.tree.leaves(published) for d in x.devices()}
    assert where == {jax.devices()[1]}
    learned = jax.tree.leaves(carry.agent)[0]
    assert learned.devices() == {jax.devices()[0]}
  finally:
    source.close(carry.source)
