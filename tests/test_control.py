"""Planning on top of actors and critics, against plain loops and Riccati."""

import functools
import pathlib
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import launch

from agents.core.rollout import ModelParams
from agents.core.types import ArraySpec, Continuous, Spec
from experiments import build
from experiments.build import saved
from experiments.envs.pendulum import PendulumState, make_pendulum
from experiments.envs.swingup import SwingupState, make_swingup
from experiments.files import tables
from experiments.playing import (
  actor_critic_model,
  actor_critic_play,
  actor_critic_runs,
  planners,
)
from experiments.runtime import checkpoint, run_config
from experiments.runtime import config as configs
from experiments.studies import control as study_control
from networks.ensemble import Ensemble, Prediction
from networks.mlp import Network
from search.exact import riccati
from search.model import TimeStep

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A scalar linear system with quadratic costs, and its base gain and critic.
A, B, Q, R, BASE, K = 1.0, 2.0, 1.0, 0.5, -0.7, 2.0
GAMMA, FACTOR = 0.9, 0.1
BOUND = np.full((1,), 10, np.float32)
SPEC = Spec(ArraySpec((1,)), Continuous((1,), -BOUND, BOUND), name='line')


def time_step(observation):
  rows = observation.shape[0]
  no = jnp.zeros((rows,), bool)
  return TimeStep(observation, jnp.zeros(rows), jnp.ones(rows), no, no)


class Weights(NamedTuple):
  """An agent's parameters: the gain of its policy, the K of its critic."""

  policy: jax.Array
  critic: jax.Array


def act(params, key, timestep):
  noise = jax.random.normal(key, timestep.observation.shape)
  return params.policy * timestep.observation + 0.3 * noise, {}


def exploit(params, key, timestep):
  return params.policy * timestep.observation, {}


def dynamics(params, observation, action):
  x, u = observation[:, 0], action[:, 0]
  reward = -(Q * x**2 + R * u**2)
  return actor_critic_model.Change(
    A * observation + B * action, reward, jnp.full_like(x, params)
  )


def critic(params, observation, action):
  """Two critics `[2, N]`: the least at the base policy's action is -K x^2."""
  x, u = observation[:, 0], action[:, 0]
  value, off = -params * x**2, u - BASE * x
  return FACTOR * jnp.stack([value - off**2, value + 1 - off])


def trained(gamma=GAMMA):
  agent = types.SimpleNamespace(act=act, exploit=exploit)
  networks = types.SimpleNamespace(critic=Network(lambda key: None, critic))
  experiment = types.SimpleNamespace(
    config=types.SimpleNamespace(gamma=gamma),
    run=types.SimpleNamespace(reward_factor=FACTOR),
    material=types.SimpleNamespace(acts=False),
  )
  params = Weights(jnp.float32(BASE), jnp.float32(K))
  return actor_critic_runs.Trained(experiment, agent, networks, params, SPEC)


def play(name, observation, gamma=GAMMA, goes_on=1.0, budget=(5, 3)):
  run = trained(gamma)
  player = actor_critic_play.make_player(
    planners.parse(name),
    run,
    dynamics,
    budget=actor_critic_play.Budget(*budget),
  )
  params = actor_critic_model.Params(run.params, jnp.float32(goes_on))
  step = time_step(jnp.asarray(observation, jnp.float32)[:, None])
  return jax.jit(player)(params, jax.random.key(3), step)[:, 0]


@pytest.mark.parametrize('steps', [0, 1, 3])
def test_gradients_find_the_newton_step_from_the_rolled_out_critic(steps):
  """With gamma 1 the best action is that of Riccati's equation."""
  x = np.array([-1.5, 0.4, 2.0])
  value = K
  for _ in range(steps):
    value = Q + R * BASE**2 + (A + B * BASE) ** 2 * value
  system = riccati.System(*(jnp.array([[float(n)]]) for n in (A, B, Q, R)))
  gain = float(riccati.gain(system, jnp.array([[value]]))[0, 0])
  got = play(f'lookahead=1+rollout={steps}+refined=40', x, gamma=1.0)
  np.testing.assert_allclose(got, gain * x, rtol=2e-3)


def plain_value(x, steps, terminal, goes_on):
  """What `steps` of the base policy earn from `x`, by a plain loop."""
  total, discount = 0.0, 1.0
  for _ in range(steps):
    u = BASE * x
    total += discount * FACTOR * -(Q * x**2 + R * u**2)
    discount *= GAMMA * goes_on
    x = A * x + B * u
  return total + terminal * discount * FACTOR * min(-K * x**2, -K * x**2 + 1)


@pytest.mark.parametrize('steps, terminal', [(0, True), (3, True), (2, False)])
def test_an_action_is_worth_reward_rollout_and_critic(steps, terminal):
  from search import lookahead, rollout

  run, goes_on, x = trained(), 0.5, np.array([-1.0, 0.3])
  q = actor_critic_model.critic_value(run.networks)
  model = actor_critic_model.planning_model(
    run.agent, q, dynamics, SPEC, gamma=GAMMA, reward_factor=FACTOR, num=4
  )
  model = rollout.truncated(
    model,
    actor_critic_model.base_policy(run.agent),
    steps=steps,
    terminal=terminal,
  )
  planner = jax.jit(functools.partial(lookahead.lookahead(1), model))
  params = actor_critic_model.Params(run.params, jnp.float32(goes_on))
  step = time_step(jnp.asarray(x, jnp.float32)[:, None])
  got = planner(params, jax.random.key(0), step)
  for row, tried in enumerate(np.asarray(got.sampled_actions)[..., 0]):
    # The actor's mode comes first, and the others are not it.
    np.testing.assert_allclose(tried[0], BASE * x[row], rtol=1e-6)
    assert len(set(tried)) == 4
    want = [
      FACTOR * -(Q * x[row] ** 2 + R * u**2)
      + GAMMA
      * goes_on
      * plain_value(A * x[row] + B * u, steps, terminal, goes_on)
      for u in tried
    ]
    np.testing.assert_allclose(got.qvalues[row], want, rtol=1e-5)
    assert got.action[row, 0] == tried[np.argmax(want)]


def test_actor_and_critic_play_without_a_model():
  x = np.array([-1.0, 0.3, 0.0])
  np.testing.assert_allclose(play('actor', x), BASE * x, rtol=1e-6)
  # The least of the critics is highest at the mode, which is a candidate.
  np.testing.assert_allclose(play('critic+box', x), BASE * x, rtol=1e-6)


def test_the_box_is_filled():
  run = trained()
  q = actor_critic_model.critic_value(run.networks, 'mean')
  model = actor_critic_model.planning_model(
    run.agent, q, dynamics, SPEC, gamma=GAMMA, num=400, proposal='box'
  )
  params = actor_critic_model.Params(run.params, jnp.float32(1))
  assert model.actions is not None
  drawn = model.actions(params, jax.random.key(0), jnp.ones((1, 1)))[0, :, 0]
  assert drawn[0] == jnp.float32(BASE)
  assert -10 < drawn[1:].min() < -9.5 and 9.5 < drawn[1:].max() < 10
  np.testing.assert_allclose(drawn[1:].mean(), 0, atol=1)
  mean = q(run.params, jnp.ones((1, 1)), jnp.ones((1, 1)))
  each = critic(K, jnp.ones((1, 1)), jnp.ones((1, 1)))
  np.testing.assert_allclose(mean, each.mean(0))


def test_the_exact_dynamics_is_the_simulators():
  rng = np.random.default_rng(0)
  angle = rng.uniform(-9, 9, 64)
  fast = rng.uniform(-8, 8, 64)
  action = jnp.asarray(rng.uniform(-2, 2, (64, 1)), jnp.float32)
  zeros = jnp.zeros(64, jnp.int32)
  as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
  pendulum = PendulumState(as_float(angle), as_float(fast), zeros)
  look = np.stack([np.cos(angle), np.sin(angle), fast], 1)
  x, v = rng.uniform(-1.5, 1.5, (2, 64))
  physics = np.stack([x, angle, v, fast], 1)
  swingup = SwingupState(as_float(physics), zeros)
  seen = np.stack([x, np.cos(angle), np.sin(angle), v, fast], 1)
  for env, state, observation in (
    (make_pendulum(), pendulum, look),
    (make_swingup(action_repeat=2), swingup, seen),
  ):
    step = jax.jit(jax.vmap(env.step, (0, 0, None)))
    _, want = step(state, action, jax.random.key(0))
    got = jax.jit(actor_critic_model.exact(env))(
      None, as_float(observation), action
    )
    np.testing.assert_allclose(got.observation, want.observation, atol=1e-4)
    np.testing.assert_allclose(got.reward, want.reward, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.discount, want.discount)


def test_a_learned_dynamics_is_the_elites_mean_in_raw_units():
  def apply(network, observation, action):
    shape = (2, *observation.shape)
    change = network.reshape(2, 1, 1) * jnp.ones(shape)
    # Half of the steps end, and get 0.4 less.
    reward = jnp.concatenate([action + 0.2, action - 0.2], -1)
    reward = jnp.tile(reward[None], (2, 1, 1))
    return Prediction(change, change, reward, reward, jnp.zeros(shape[:2]))

  ensemble = Ensemble(lambda key: None, apply, lambda params: params)
  params = ModelParams(jnp.array([9.0, 1.0, 3.0]), jnp.array([1, 2]))
  got = actor_critic_model.learned(ensemble, reward_factor=0.1)(
    params, jnp.array([[5.0, 6.0]]), jnp.array([[0.7]])
  )
  np.testing.assert_allclose(got.observation, [[7, 8]], rtol=1e-6)
  np.testing.assert_allclose(got.reward, [7], rtol=1e-6)
  np.testing.assert_allclose(got.discount, [0.5], rtol=1e-6)


@pytest.mark.parametrize(
  'name, steps',
  [
    ('actor', 0),
    ('critic+box', 0),
    ('lookahead=1', 8),
    ('lookahead=1+rollout=3', 8 + 8 * 3),
    ('lookahead=2+rollout=3', 8 + 32 + 32 * 3),
    ('lookahead=1+refined=2+rollout=3', 4 * 8 * (1 + 3)),
  ],
)
def test_steps_of_the_model_are_counted(name, steps):
  assert (
    actor_critic_play.model_steps(
      planners.parse(name), actor_critic_play.Budget(8, 4)
    )
    == steps
  )


# Runs: their folders are made without training.

TINY = ('hidden_sizes=4', 'run.reward_factor=0.5')
MODEL = ('model.widths=4', 'model.members=2', 'model.elites=1')
ALONE = ('run.reward_factor=0.5', 'widths=4', 'members=2', 'elites=1')


def make_run(folder, preset, env, settings=TINY, dataset='none'):
  experiment = build.describe(
    preset, env=env, dataset=dataset, settings=settings
  )
  spec = build.make_env(experiment, training=False, num_envs=1).spec
  agent = build.make_agent(experiment, spec)
  run_config.write_run_config(folder, experiment.as_dict())
  keeper = checkpoint.open(folder / 'final')
  keeper.save(0, jax.jit(agent.init)(jax.random.key(0)).params)
  keeper.close()
  return str(folder)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  make = lambda name, *args: make_run(folder / name, *args)
  return {
    'iql': make('iql', 'iql_small', 'jax:pendulum'),
    'combo': make('combo', 'combo_small', 'jax:pendulum', (*TINY, *MODEL)),
    'dynamics': make('dynamics', 'dynamics_small', 'jax:pendulum', ALONE),
  }


def flags(**changes):
  values = {
    'checkpoint': ['final'],
    'env': None,
    'dynamics': 'exact',
    'reward_rule': '',
    'termination_rule': '',
    'players': ['actor', 'lookahead=1'],
    'candidates': 3,
    'later_candidates': 2,
    'value': 'min',
    'episodes': 2,
    'num_envs': 0,
    'seed': 0,
    'out': None,
  }
  return types.SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize('model', ['exact', 'combo', 'dynamics'])
def test_a_finished_run_is_played(runs, model):
  dynamics = runs.get(model, 'exact')
  kind = 'exact' if model == 'exact' else 'learned'
  values = flags(workdir=runs['iql'], dynamics=dynamics)
  experiment = saved.load_experiment(runs['iql'])
  rows = actor_critic_play.launch(experiment, values)
  assert [row.planner for row in rows] == ['actor', 'lookahead=1']
  assert rows[0].gain == rows[0].gain_se == 0
  for row in rows:
    assert row.dynamics == kind
    assert row.episodes == 2
    # 200 steps of at most 16.3 each; none is ever free.
    assert -3260 < row.return_mean < 0
    np.testing.assert_allclose(
      row.gain, row.return_mean - rows[0].return_mean, atol=1e-9
    )
  written = tables.read_rows(pathlib.Path(runs['iql'], 'play.csv'))
  assert [row['planner'] for row in written] == ['actor', 'lookahead=1']
  np.testing.assert_allclose(
    [float(row['return_mean']) for row in written],
    [row.return_mean for row in rows],
    rtol=1e-6,
  )


def test_what_cannot_be_planned_with_is_refused(runs, tmp_path):
  def write(name, preset, env, **keywords):
    experiment = build.describe(preset, env=env, **keywords)
    run_config.write_run_config(tmp_path / name, experiment.as_dict())
    return str(tmp_path / name)

  catch = write('catch', 'efficientzero_catch', 'jax:catch')
  cloned = write('bc', 'bc_small', 'jax:pendulum', dataset='none')
  for workdir, message in (
    (str(tmp_path / 'nowhere'), "is not a run's folder"),
    (catch, 'jax:catch has discrete actions; use python -m'),
    (cloned, 'bc has no actor with a critic; give a run of atac, combo, cql'),
  ):
    with pytest.raises(configs.UserError, match=message):
      actor_critic_runs.load(workdir)
  run = actor_critic_runs.load(runs['iql'])
  far = run._replace(experiment=run.experiment._replace(env_name='Hopper-v4'))
  for name, own, message in (
    ('exact', far, 'env=Hopper-v4: has no exact model, .*jax:swingup'),
    (runs['iql'], run, 'iql learns no ensemble'),
    (runs['combo'], far, 'learned from jax:pendulum; must be from Hopper-v4'),
  ):
    with pytest.raises(configs.UserError, match=message):
      actor_critic_runs.find_dynamics(name, own)


def test_the_command_that_it_was_names_the_one_it_is():
  done = launch('control', '--workdir=runs/iql', check=False)
  assert done.returncode == 2
  assert 'python -m experiments.play --workdir=RUN --players=' in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_seeds_are_summarised_and_drawn(tmp_path):
  returns = {0: -210, 1: -190}
  rows = [
    study_control.Played(
      quality='random',
      agent='iql',
      seed=seed,
      planner=planner,
      dynamics=kind,
      candidates=8,
      episodes=64,
      return_mean=mean + better,
      return_se=1.0,
      gain=better,
      gain_se=1.0,
      model_steps=8,
      depth=1,
      rollout=0,
      score=None,
    )
    for seed, mean in returns.items()
    for planner, kind, better in (
      ('actor', 'none', 0),
      ('lookahead=1', 'exact', 30),
      ('lookahead=1+rollout=4', 'exact', 40 + seed),
    )
  ]
  summary = study_control.summarised(rows[:-1])
  assert [row['seeds'] for row in summary] == [2, 2, 1]
  one, two, alone = summary
  # Student's t for two values: 12.706 standard errors, which are 10.
  assert (one['return_mean'], one['gain_mean']) == (-200, 0)
  np.testing.assert_allclose(one['return_low'], -200 - 127.06, rtol=1e-4)
  assert (two['gain_mean'], two['gain_low'], two['gain_high']) == (30, 30, 30)
  assert (alone['return_mean'], alone['return_low']) == (-170, '')
  study_control.draw(summary, tmp_path / 'control.png')
  assert (tmp_path / 'control.png').stat().st_size > 10_000
