"""AlphaZero: its targets, its loss, its search, and that it learns."""

import dataclasses

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_agents
from game_cases import CONFIG, ENV, GAME, SEARCH, A, B, P
from trees import assert_equal, shake

from agents import alphazero
from agents.core import planning
from agents.core.types import (
  ArraySpec,
  Continuous,
  Spec,
)
from experiments import build
from networks import policy_value
from search.model import TimeStep

DISTINCT = dataclasses.replace(
  SEARCH, num_samples=A, replacement=False, evaluate_root=False
)


def make_agent(config=CONFIG, spec=ENV.spec):
  return small_agents.make_agent(alphazero, config, spec)


# --- Targets ------------------------------------------------------------------

returns = jax.jit(alphazero.game_returns)


@pytest.mark.parametrize(
  ('td_lambda', 'want'),
  [
    # The game ends at step 3, won by player 1, who moved twice.
    (1.0, [-1, 1, 1]),
    # 0.5 v + 0.5 z, with a minus where the mover changes.
    (0.5, [-0.5 * (0.2 + 0.85), 0.5 * (0.7 + 1.0), 1]),
    (0.0, [-0.2, 0.7, 1]),
  ],
)
def test_returns_by_hand(td_lambda, want):
  reward = jnp.float32([9, 0, 0, 1, 5])
  discount = jnp.float32([1, 1, 1, 0, 1])
  player = jnp.int32([0, 1, 1, 0, 0])
  value = jnp.float32([0.1, 0.2, 0.7, 0.9, 0.3])
  got = returns(reward, discount, discount < 0, player, value, td_lambda)
  np.testing.assert_allclose(got[:3], want, rtol=1e-6)
  # The last one of a window knows nothing but its search.
  assert got[4] == value[4]


def test_returns_equal_a_plain_loop():
  rng = np.random.default_rng(0)
  length, td_lambda = 12, 0.7
  for _ in range(20):
    reward, value = rng.normal(size=(2, length)).astype(np.float32)
    discount = (rng.random(length) > 0.15).astype(np.float32)
    truncated = rng.random(length) < 0.15
    player = rng.integers(0, 2, length)
    want = np.zeros(length)
    for k in range(length):
      # Forwards: n-step returns' mixture, summed as the game goes on.
      weight, sign = 1.0, 1.0
      for i in range(k, length):
        if truncated[i] or i == length - 1:
          want[k] += weight * sign * value[i]
          break
        if i > k:
          want[k] += weight * (1 - td_lambda) * sign * value[i]
          weight *= td_lambda
        want[k] += weight * sign * reward[i + 1]
        if discount[i + 1] == 0:
          break
        sign *= 1 if player[i + 1] == player[i] else -1
    got = returns(reward, discount, truncated, player, value, td_lambda)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# --- The update ---------------------------------------------------------------


@pytest.fixture(params=['alphazero', 'alphazero sampled'])
def built(request):
  """Config, agent, shaken state, batch and compiled update."""
  built = conformance.built(request.param)
  state = built.state._replace(params=shake(built.state.params))
  return built.config, built.agent, state, built.batch, built.update


def test_the_loss_is_the_mean_over_decided_positions(built):
  config, agent, state, batch, _ = built
  timestep, extras = batch.experience.timestep, batch.experience.extras
  networks = alphazero.make_networks(config, ENV.spec)

  @jax.jit
  def opinion(params, board):
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), board)
    return networks.apply(params, jax.vmap(GAME.observe)(flat))

  logits, values = jax.tree.map(
    lambda x: np.asarray(x, np.float64).reshape(B, config.window, *x.shape[1:]),
    opinion(state.params, timestep.observation),
  )
  policy = value = count = 0.0
  for b in range(B):
    target = returns(
      timestep.reward[b],
      timestep.discount[b],
      timestep.truncated[b],
      timestep.observation.player[b],
      extras['search_value'][b],
      1.0,
    )
    for k in range(P):
      if (b, k) == (1, 1):
        continue  # the game is over
      legal = ~np.asarray(timestep.invalid_actions[b, k])
      e = np.exp(logits[b, k]) * legal
      p, pi = e / e.sum(), np.asarray(extras['search_policy'][b, k], np.float64)
      kl = sum(
        pi[a] * np.log(pi[a] / p[a]) for a in range(len(pi)) if pi[a] > 0
      )
      weight = float(batch.sample.weight[b])
      policy += weight * kl
      value += weight * (values[b, k] - float(target[k])) ** 2
      count += 1
  metrics = jax.jit(agent.evaluate)(state.params, batch, None)
  assert count == B * P - 1
  np.testing.assert_allclose(metrics['loss_policy'], policy / count, rtol=1e-4)
  np.testing.assert_allclose(metrics['loss_value'], value / count, rtol=1e-4)
  np.testing.assert_allclose(
    metrics['loss'], (policy + value) / count, rtol=1e-4
  )


def test_updates_descend(built, key):
  _, _, state, batch, update = built
  losses = []
  for _ in range(30):
    state, info = update(state, batch, key)
    losses.append(float(info.metrics['loss']))
  assert losses[-1] < losses[0]


def test_what_is_behind_an_end_does_not_matter(built, key):
  _, _, state, batch, update = built
  extras = dict(batch.experience.extras)
  extras['search_value'] = extras['search_value'].at[1, 1:].set(7.0)
  timestep = batch.experience.timestep
  timestep = timestep._replace(reward=timestep.reward.at[1, 2:].set(7.0))
  other = batch._replace(
    experience=batch.experience._replace(timestep=timestep, extras=extras)
  )
  assert_equal(update(state, batch, key), update(state, other, key))


# --- The search ---------------------------------------------------------------


def to_timestep(board):
  batch = board.player.shape[0]
  return TimeStep(
    observation=board,
    reward=jnp.zeros(batch),
    discount=jnp.ones(batch),
    is_first=jnp.zeros(batch, bool),
    truncated=jnp.zeros(batch, bool),
    invalid_actions=jax.vmap(GAME.invalid_actions)(board),
  )


def some_boards():
  """Who moves wins at 2; must not leave 2; has one cell left; is to begin."""
  rows = [
    ('110000000', '000110000', 0, 2),
    ('110000000', '000010000', 1, 2),
    ('110001101', '001110010', 0, None),
    ('000000000', '000000000', 0, None),
  ]
  bits = lambda i: [[c == '1' for c in row[i]] for row in rows]
  stones = np.stack([np.array(bits(0)), np.array(bits(1))], 1)
  board = type(GAME.init(jax.random.key(0)))(
    jnp.asarray(stones), jnp.int32([row[2] for row in rows])
  )
  return board, [row[3] for row in rows]


def test_acts_legally_and_says_what_it_searched(built, key):
  config, agent, state, _, _ = built
  board, _ = some_boards()
  timestep = to_timestep(board)
  action, extras = jax.jit(agent.act)(state.params, key, timestep)
  slots = config.search.num_samples if config.sampled else A
  assert extras['search_policy'].shape == (4, slots)
  np.testing.assert_allclose(extras['search_policy'].sum(-1), 1, rtol=1e-5)
  assert (np.abs(extras['search_value']) <= 1).all()
  invalid = np.asarray(timestep.invalid_actions)
  assert not invalid[np.arange(4), action].any()
  if config.sampled:
    among = np.asarray(extras['sampled_actions'])
    weighs = np.asarray(extras['search_policy']) > 0
    assert not np.take_along_axis(invalid, among, 1)[weighs].any()


def test_the_temperature_is_that_of_the_moves_drawn(key):
  timestep = to_timestep(some_boards()[0])

  def most_searched(temperature):
    """How often the move that was searched most is taken."""
    search = dataclasses.replace(SEARCH, rule='puct')
    agent = make_agent(
      dataclasses.replace(CONFIG, search=search, temperature=temperature)
    )
    params = agent.init(jax.random.key(0)).params
    act = jax.jit(jax.vmap(lambda key: agent.act(params, key, timestep)))
    action, extras = act(jax.random.split(key, 64))
    weight = extras['search_policy']
    taken = jnp.take_along_axis(weight, action[..., None], -1)[..., 0]
    return jnp.mean(taken == weight.max(-1))

  assert most_searched(0.0) == 1.0
  assert most_searched(1.0) < 0.9


@pytest.fixture(scope='module')
def plans():
  """What searches without noise find on `some_boards`, by their kind."""
  timestep = to_timestep(some_boards()[0])
  found = {}
  for name, config in {
    'all': dataclasses.replace(
      CONFIG, search=dataclasses.replace(SEARCH, num_simulations=32)
    ),
    'sampled': dataclasses.replace(
      CONFIG,
      sampled=True,
      search=dataclasses.replace(DISTINCT, num_simulations=32),
    ),
  }.items():
    agent = make_agent(config)
    planner = planning.make_planner(config.search, evaluate=True)
    params = shake(agent.init(jax.random.key(0)).params)
    plan = jax.jit(
      lambda params, key, planner=planner, agent=agent: planner(
        agent.model, params, key, timestep
      )
    )
    found[name] = plan(params, jax.random.key(1))
  return found


def test_finds_a_win_and_a_defence(plans):
  for output in plans.values():
    for row, want in enumerate(some_boards()[1]):
      if want is not None:
        assert output.action[row] == want
    assert output.action_weights[0, 2] > 0.9


def test_all_sampled_actions_are_all_actions(plans):
  whole, drawn = plans['all'], plans['sampled']
  np.testing.assert_array_equal(
    drawn.sampled_actions, np.tile(np.arange(A), (4, 1))
  )
  np.testing.assert_array_equal(whole.action, drawn.action)
  np.testing.assert_allclose(
    whole.action_weights, drawn.action_weights, atol=1e-5
  )
  np.testing.assert_allclose(whole.value, drawn.value, atol=1e-5)


# --- What is refused, and whether it learns -----------------------------------


@pytest.mark.parametrize(
  ('spec', 'config', 'message'),
  [
    (
      Spec(ArraySpec((4,), np.float32), ENV.spec.action, name='Catch'),
      CONFIG,
      'Catch has none: take env=self_play:.*muzero needs no rules',
    ),
    (
      ENV.spec._replace(action=Continuous((1,), np.zeros(1), np.ones(1))),
      CONFIG,
      'can be enumerated',
    ),
    (
      ENV.spec,
      dataclasses.replace(
        CONFIG,
        sampled=True,
        search=dataclasses.replace(DISTINCT, num_samples=10),
      ),
      'num_samples=10',
    ),
    (
      ENV.spec._replace(
        game=GAME._replace(
          spec=GAME.spec._replace(observation=ArraySpec((9,), np.float32))
        )
      ),
      dataclasses.replace(
        CONFIG, network=policy_value.NetworkConfig(kind='resnet')
      ),
      'kind=resnet',
    ),
  ],
)
def test_what_it_cannot_take_is_refused(spec, config, message):
  with pytest.raises(ValueError, match=message) as error:
    alphazero.make_networks(config, spec)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'field', [{'positions': 0}, {'td_lambda': 1.5}, {'temperature': -1.0}]
)
def test_values_out_of_range_are_refused(field):
  with pytest.raises(ValueError, match=f'{next(iter(field))}='):
    alphazero.Config(**field)


@pytest.mark.slow
def test_tic_tac_toe_is_not_lost_against_random():
  from experiments.build import acting
  from experiments.runtime import evaluate, loop

  experiment = build.describe('alphazero_tic_tac_toe')
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  source = build.make_source(experiment, env, agent)
  key = jax.random.key(0)
  carry = loop.init(agent, source, key)
  carry = loop.run(agent, source, carry, key=key, steps=experiment.updates)
  versus = build.make_env(experiment, training=False)
  play = jax.jit(acting.players(experiment, agent)['eval'])
  played = evaluate.on_device(
    versus, play, carry.agent.params, key=key, num_episodes=500
  )
  assert (played.returns >= 0).all()
  assert played.returns.mean() > 0.8
