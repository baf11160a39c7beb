"""TD-Gammon on a race of two stones: a plain loop, and how it is run."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_agents
from game_cases import RACE, RACER, STREAMS, Race, race
from trees import assert_close, assert_equal

from agents import td_gammon
from agents.core.types import ArraySpec, Discrete, Experience, Spec
from experiments import build
from experiments.playing import match, planners, players
from experiments.runtime import loop, sources
from search.model import Game, TimeStep, exact


class Made(NamedTuple):
  game: Game
  config: td_gammon.Config
  networks: object
  agent: object
  source: sources.Source


def build_agent(learning_rate=1.5):
  config = dataclasses.replace(RACER, learning_rate=learning_rate)
  networks = td_gammon.make_networks(config, RACE.spec)
  agent = small_agents.make_agent(td_gammon, config, RACE.spec, networks)
  source = sources.from_env(RACE, agent, STREAMS)
  return Made(race(), config, networks, agent, source)


@pytest.fixture(scope='module')
def made():
  return build_agent()


@pytest.fixture(scope='module')
def interval(made):
  return jax.jit(loop.compile_interval(made.agent, made.source))


@pytest.fixture(scope='module')
def carry(made):
  return loop.init(made.agent, made.source, jax.random.key(1))


def rows_of(made, key, number):
  """Rows of an untrained agent's play, and its state."""
  state = made.agent.init(key)

  def one(stream, k):
    stream, row, _ = made.source.next(stream, state, 0, k)
    return stream, row

  keys = jax.random.split(key, number)
  play = jax.jit(lambda stream: jax.lax.scan(one, stream, keys)[1])
  return state, jax.device_get(play(made.source.init(key)))


def test_updates_are_those_of_a_plain_loop(made):
  """All games from the first player's side, every gradient by hand."""
  state, rows = rows_of(made, jax.random.key(0), 40)
  step = jax.jit(made.agent.update)
  params = jax.tree.map(lambda x: np.asarray(x, float), state.params)
  traces, seen = [None] * STREAMS, [None] * STREAMS
  ended = 0
  for t in range(40):
    row = jax.tree.map(operator.itemgetter(t), rows)
    timestep = row.timestep
    change = zeros = [np.zeros_like(x) for x in flat(params)]
    for b in range(STREAMS):
      x = timestep.observation.board[b] / 4.0
      player = int(timestep.observation.player[b])
      if timestep.is_first[b]:
        traces[b] = None
        continue
      old = heads(params, *seen[b])[0]
      if timestep.discount[b] == 0:
        # Who is to move now has lost.
        points = int(timestep.reward[b]) * (1 if player == 1 else -1)
        new = [points > 0, points > 1, points > 2, points < -1, points < -2]
        ended += 1
      else:
        new = heads(params, x, player)[0]
      error = np.asarray(new, float) - old
      change = [
        c + sum(error[k] * traces[b][k][i] for k in range(5))
        for i, c in enumerate(change)
      ]
    rate = made.config.learning_rate / STREAMS
    params = like(params, [w + rate * c for w, c in zip(flat(params), change)])
    for b in range(STREAMS):
      seen[b] = (
        timestep.observation.board[b] / 4.0,
        int(timestep.observation.player[b]),
      )
      slope = heads(params, *seen[b])[1]
      before = traces[b] or [zeros] * 5
      traces[b] = [
        [g + 0.7 * e for g, e in zip(slope[k], before[k])] for k in range(5)
      ]
    state, info = step(state, row, jax.random.key(0))
    assert np.isfinite(float(info.metrics['loss']))
  assert ended > 10
  for own, plain in zip(flat(state.params), flat(params)):
    np.testing.assert_allclose(own, plain, rtol=2e-4, atol=2e-6)


def flat(params):
  """Kernel and bias of the hidden layer, and of the heads."""
  names = ('Dense_0', 'kernel'), ('Norm_0', 'bias')
  names += ('Dense_1', 'kernel'), ('Dense_1', 'bias')
  return [params[module][name] for module, name in names]


def like(params, leaves):
  kernel, bias, head, head_bias = leaves
  assert len(jax.tree.leaves(params)) == 4
  return {
    'Dense_0': {'kernel': kernel},
    'Norm_0': {'bias': bias},
    'Dense_1': {'kernel': head, 'bias': head_bias},
  }


def heads(params, x, player):
  """The heads as player 0 sees them, and the slope of each, by hand."""
  kernel, bias, head, head_bias = flat(params)
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  h = sigmoid(x @ kernel + bias)
  y = sigmoid(h @ head + head_bias)
  slopes = []
  for k in range(5):
    d = y[k] * (1 - y[k])
    into = d * head[:, k] * h * (1 - h)
    to_head, to_bias = np.zeros_like(head), np.zeros_like(head_bias)
    to_head[:, k], to_bias[k] = d * h, d
    slopes.append([np.outer(x, into), into, to_head, to_bias])
  if player == 0:
    return y, slopes
  other = np.array([1 - y[0], y[3], y[4], y[1], y[2]])
  turned = [[-g for g in slopes[0]], *(slopes[k] for k in (3, 4, 1, 2))]
  return other, turned


def test_heads_are_probabilities_of_points():
  points = jnp.array([1.0, 2.0, 3.0, -1.0, -2.0, -3.0])
  outcome = td_gammon.outcome(points)
  np.testing.assert_array_equal(
    outcome[:4],
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]],
  )
  np.testing.assert_array_equal(td_gammon.equity(outcome), points)
  np.testing.assert_array_equal(
    td_gammon.turned(outcome), td_gammon.outcome(-points)
  )
  some = jnp.array([0.6, 0.2, 0.01, 0.1, 0.02])
  assert float(td_gammon.equity(some)) == pytest.approx(0.29)
  assert float(td_gammon.equity(td_gammon.turned(some))) == pytest.approx(-0.29)


def positions(number=64):
  generator = np.random.default_rng(0)
  return Race(
    jnp.asarray(generator.integers(1, 5, (number, 2)), jnp.int8),
    jnp.asarray(generator.integers(1, 3, number), jnp.int8),
    jnp.zeros((number,), jnp.int32),
  )


def _lifted(position):
  return jax.tree.map(lambda x: x[None], position)


@pytest.mark.parametrize('chunk', [1, 3, 9])
def test_turns_are_greedy(made, chunk):
  """Against looking at all candidates one by one."""
  weight = jnp.array([1.3, -0.7])
  value = lambda params, observation: observation @ params
  choose = jax.jit(
    lambda p: td_gammon.greedy(made.game, value, weight, p, chunk)
  )
  state = positions()
  chosen = np.asarray(choose(state))
  # Whether positions come in a batch or by vmap, or the weights do.
  split = lambda x: x.reshape(8, 8, *x.shape[1:])
  nested = jax.tree.map(split, state)
  again = jax.jit(jax.vmap(jax.vmap(lambda p: choose(_lifted(p))[0])))(nested)
  np.testing.assert_array_equal(again, split(chosen))
  weights = jnp.stack([-weight, weight])
  by_weight = jax.jit(
    jax.vmap(lambda w: td_gammon.greedy(made.game, value, w, state, chunk))
  )(weights)
  np.testing.assert_array_equal(by_weight[1], chosen)
  assert np.any(by_weight[0] != chosen)
  gains = 0
  for board, roll, action in zip(
    np.asarray(state.board, int), np.asarray(state.roll, int), chosen
  ):
    best, worth = None, -np.inf
    for step in (1, roll):
      mine, theirs = board[0] - step, board[1]
      q = 1.0 + (theirs > 2) + (theirs > 3)
      if mine > 0:
        q = -float(np.array([theirs, mine]) / 4.0 @ np.asarray(weight))
      if q > worth:
        gains += best is not None
        best, worth = (mine, theirs), q
    assert tuple(action) == best
  assert 0 < gains < len(chosen)


def test_model_values_boards_before_the_roll(made):
  """It is `exact`'s, but computes a board's value once for all rolls."""
  plain = exact(
    made.game,
    lambda params, x: (
      jnp.zeros((x.shape[0], 4)),
      td_gammon.equity(made.networks.apply(params, x)),
    ),
  )
  params = made.networks.init(jax.random.key(3))
  state = positions()
  action = jax.vmap(made.game.candidates)(state)[:, 1]
  look = jax.jit(
    lambda model_params: tuple(
      model.outcomes(model_params, action, state)
      for model in (made.agent.model, plain)
    )
  )
  own, other = look(params)
  assert_close(own, other, 1e-06, 0)
  assert (own[1].value[:, 0] == own[1].value[:, 1]).all()
  assert len(set(np.asarray(own[1].reward[:, 0]).tolist())) == 4


def test_a_run_goes_on_as_if_it_had_not_stopped(interval, carry):
  key = jax.random.key(2)
  whole = interval(carry, key, 12)[0]
  part = interval(carry, key, 5)[0]
  rest = interval(part, key, 7)[0]
  assert int(whole.step) == 12
  trace = jax.tree.leaves(whole.agent.streams.trace)
  assert all(np.abs(leaf).max() > 0 for leaf in trace)
  assert_equal(whole, rest)


def test_rows_of_a_sweep_are_those_of_runs_alone(carry, interval):
  """With the learning rate traced, as a sweep has it."""

  def run(rate, key):
    made = build_agent(learning_rate=rate)
    start = loop.init(made.agent, made.source, jax.random.key(1))
    return loop.compile_interval(made.agent, made.source)(start, key, 6)[0]

  keys = jax.random.split(jax.random.key(5), 2)
  together = jax.jit(jax.vmap(run))(jnp.array([1.5, 0.1]), keys)
  alone = interval(carry, keys[0], 6)[0]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-6),
    together.agent,
    alone.agent,
  )
  assert not np.allclose(
    together.agent.params['Dense_1']['bias'][1],
    alone.agent.params['Dense_1']['bias'],
  )


def best_points(mine, theirs):
  """Expected points of who is about to roll, both playing best."""
  total = 0.0
  for roll in (1, 2):
    choices = []
    for left in (mine - 1, mine - roll):
      won = 1 + (theirs > 2) + (theirs > 3)
      choices.append(won if left <= 0 else -best_points(theirs, left))
    total += max(choices) / 2
  return total


def test_learns_the_points_of_best_play(made, interval, carry):
  boards = [(4, 4), (4, 3), (4, 2)]
  value = lambda params: td_gammon.equity(
    made.networks.apply(params, jnp.array(boards) / 4.0)
  )
  best = np.array([best_points(*board) for board in boards])
  assert np.abs(value(carry.agent.params) - best).max() > 1
  trained = interval(carry, jax.random.key(4), 6000)[0].agent.params
  assert np.abs(value(trained) - best).max() < 0.25


def test_backgammon_is_traced_whole():
  experiment = build.describe('td_gammon', settings=['env.num_envs=2'])
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  source = build.make_source(experiment, env, agent)
  assert experiment.config.streams == 2
  carry = jax.eval_shape(
    lambda key: loop.init(agent, source, key), jax.random.key(0)
  )
  after, means, _ = jax.eval_shape(
    loop.compile_interval(agent, source), carry, jax.random.key(0), 1
  )
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(after) == shapes(carry)
  assert set(means) == {'loss', 'win'}
  batch = source.example()
  assert isinstance(batch, Experience)
  assert (batch.action.shape, batch.action.dtype) == ((2, 2, 26), jnp.int8)


def test_pace_is_a_row_an_update():
  experiment = build.describe(
    'td_gammon', steps=786, settings=['env.num_envs=8']
  )
  assert experiment.run.batch_size == 8
  # 786 turns are 800 time steps at the rate of the preset's games.
  assert experiment.updates == 99
  assert build.describe('td_gammon', steps=800).config.streams == 1


def refusal(message, **options):
  with pytest.raises(ValueError, match=message):
    experiment = build.describe('td_gammon', **options)
    env = build.make_env(experiment, training=True)
    agent = build.make_agent(experiment, env.spec)
    build.make_source(experiment, env, agent, build.make_layout(experiment))


def test_what_it_cannot_learn_from_is_refused():
  refusal('dataset=rows.npz: td_gammon learns from fresh', dataset='rows.npz')
  refusal('batch_size=7: .* set env.num_envs', settings=['batch_size=7'])
  refusal('steps=1: must be above env.num_envs=1', steps=1)
  refusal('hold_out=8: .* set it to 0', settings=['hold_out=8'])
  refusal('devices=2, .* take devices=1', settings=['devices=2'])
  refusal('parts=2: .* parts=0', settings=['parts=2', 'env.num_envs=2'])
  refusal('needs a game against itself .* CartPole', env='jax:cartpole')
  refusal('needs a game against itself', env='self_play:connect_four')


def test_streams_refuse_simulators_of_the_host(made):
  experiment = build.describe('td_gammon')._replace(env_name='Catch-v0')
  with pytest.raises(ValueError, match=r'env=Catch-v0: .* environment in JAX'):
    build.make_source(experiment, object(), made.agent)


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('hidden', 0, 'hidden=0: must be 1 or more'),
    ('learning_rate', 0.0, 'learning_rate=0.0: must be above 0'),
    ('trace_decay', 1.5, r'trace_decay=1.5: must be within \[0, 1\]'),
  ],
)
def test_config_is_checked(field, value, message):
  with pytest.raises(ValueError, match=message):
    td_gammon.Config(**{field: value})


def test_time_steps_of_other_actions_are_refused():
  spec = Spec(ArraySpec((2,)), Discrete(3), name='Elsewhere')
  with pytest.raises(ValueError, match='Elsewhere has Discrete'):
    td_gammon.make_networks(td_gammon.Config(), spec)


def test_rollouts_tell_what_the_greedy_player_earns(made, monkeypatch):
  """Against the exact value of playing on as the network would."""
  params = made.networks.init(jax.random.key(3))
  value = jax.jit(
    lambda board: td_gammon.equity(made.networks.apply(params, board / 4.0))
  )

  def after(mine, theirs, of):
    if mine <= 0:
      return 1 + (theirs > 2) + (theirs > 3)
    return -of(theirs, mine)

  network = functools.cache(lambda *board: float(value(np.array(board, 'f4'))))

  @functools.cache
  def earned(mine, theirs):
    total = 0.0
    for roll in (1, 2):
      boards = mine - 1, mine - roll
      chosen = max(boards, key=lambda left: after(left, theirs, network))
      total += after(chosen, theirs, earned) / 2
    return total

  state = jax.tree.map(lambda x: x[:8], positions())
  timestep = match.time_step(made.game, state)
  for kept in (5, 1):
    monkeypatch.setattr(players, '_KEPT', kept)
    player = players.make(
      'rollout=endx2000',
      planners.parse('rollout=endx2000'),
      made.agent.model,
      params,
      made.game,
      base=made.agent.exploit,
    )
    output = player.decide(params, jax.random.key(0), timestep)
    looked = np.asarray(output.qvalues)
    for b, (mine, theirs) in enumerate(np.asarray(state.board, int)):
      lefts = np.asarray(output.sampled_actions[b, :, 0])
      seen = np.isfinite(looked[b])
      assert seen.sum() == min(kept, int(state.roll[b]))
      exact_q = [after(int(left), theirs, earned) for left in lefts[seen]]
      # A game's points deviate by less than 2, over 4,000 games.
      np.testing.assert_allclose(looked[b][seen], exact_q, atol=0.15)
      if kept == 1:
        best = max(
          mine - 1,
          mine - int(state.roll[b]),
          key=lambda left: after(left, theirs, network),
        )
        assert lefts[0] == best
  assert player.evaluations is None


def test_truncated_rollouts_count_what_they_value(made, monkeypatch):
  monkeypatch.setattr(players, '_KEPT', 2)
  params = made.networks.init(jax.random.key(3))
  name = 'rollout=2x3'
  make = functools.partial(
    players.make,
    name,
    planners.parse(name),
    made.agent.model,
    params,
    made.game,
  )
  timestep = match.time_step(made.game, positions(4))
  decide = lambda player: player.decide(params, jax.random.key(0), timestep)
  by_agent, by_model = make(base=made.agent.exploit), make()
  # Four are ranked and two kept, whose values come with them; then two rolls,
  # thrice two turns of four boards and the one that they lead to.
  assert by_agent.evaluations == 4 + 2 + 2 * 2 * 3 * 2 * 5
  # Who is greedy in the same values plays the same.
  np.testing.assert_allclose(
    decide(by_agent).qvalues, decide(by_model).qvalues, rtol=1e-5
  )


def test_acting_needs_positions_alone(made):
  state = positions(4)
  no = jnp.zeros((4,), bool)
  timestep = TimeStep(state, jnp.zeros(4), jnp.ones(4), no, no)
  params = made.networks.init(jax.random.key(3))
  first, extras = made.agent.act(params, jax.random.key(0), timestep)
  again, _ = made.agent.exploit(params, jax.random.key(1), timestep)
  assert extras == {} and first.shape == (4, 2)
  np.testing.assert_array_equal(first, again)
