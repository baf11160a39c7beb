"""Finite MDPs, the critic's quadratic program and ATAC's game, exactly."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from launching import launch, read_csv, refused

from experiments.studies import atac_game_selection
from search.exact import bellman, box, linear, offline_game

STATES, ACTIONS, ITERATIONS, VALUE_MAX = 4, 3, 60, 10.0
BETAS = (0.0, 1 / 256, 1.0, 16.0, 4096.0)
ORACLES = {
  'exponentiated_weights': offline_game.exponentiated_weights,
  'projected_gradient': offline_game.projected_gradient,
}


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def numbers(seed, *shape):
  return np.random.default_rng(seed).random(shape)


def policies(seed, *shape):
  draws = np.random.default_rng(seed).exponential(size=shape)
  return draws / draws.sum(-1, keepdims=True)


def make_mdp(seed, states=STATES, actions=ACTIONS, discount=0.9):
  return bellman.MDP(
    policies(seed, states, actions, states),
    numbers(seed + 1, states, actions),
    np.float64(discount),
    policies(seed + 2, states),
  )


def make_games(num=4):
  """Games; in the latter half mu never takes the worst action of a state."""
  pairs = []
  for seed in range(num):
    mdp, mu = make_mdp(10 * seed), policies(10 * seed + 5, STATES, ACTIONS)
    if seed >= num // 2:
      q = bellman.action_value(mdp, bellman.optimal(mdp)[0])
      mu[np.arange(STATES), np.argmin(q, -1)] = 0
      mu /= mu.sum(-1, keepdims=True)
    pairs.append(offline_game.population(mdp, mu, VALUE_MAX))
  return jax.tree.map(lambda *x: jnp.stack(x), *pairs)


def tables(tree):
  return jax.tree.map(np.asarray, tree)


@functools.cache
def played(oracle, pessimism='relative'):
  """Plays of all games and betas, and what they were worth: `[M, betas]`."""
  learner = ORACLES[oracle](ACTIONS, VALUE_MAX, ITERATIONS)

  def one(of, beta):
    play = offline_game.play(of, learner, beta, ITERATIONS, pessimism)
    return play, offline_game.assess(of, play)

  run = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
  return tables(run(make_games(), jnp.asarray(BETAS)))


@functools.cache
def solver():
  return jax.jit(jax.vmap(box.solve))


# Finite MDPs.


def test_linear_systems():
  rng = np.random.default_rng(0)
  factor = rng.normal(size=(20, 7, 7))
  positive = factor @ factor.transpose(0, 2, 1) + 0.1 * np.eye(7)
  dominant = np.eye(7) - 0.999 * policies(1, 20, 7, 7)
  right = rng.normal(size=7)
  solve = jax.jit(jax.vmap(linear.solve, (0, None)))
  for kind in (positive, dominant, dominant.transpose(0, 2, 1)):
    found = np.asarray(solve(kind, right))
    np.testing.assert_allclose(
      found, np.linalg.solve(kind, right[:, None])[..., 0], rtol=1e-10
    )
    np.testing.assert_allclose(
      np.einsum('bij,bj->bi', kind, found), right * np.ones((20, 1)), rtol=1e-11
    )


def test_values_by_hand():
  # Action 0 stays and pays 1; action 1 goes to state 1, which pays nothing.
  transition = np.zeros((2, 2, 2))
  transition[0, 0, 0] = transition[0, 1, 1] = transition[1, :, 1] = 1
  mdp = bellman.MDP(
    transition, np.asarray([[1.0, 0], [0, 0]]), 0.5, np.asarray([1.0, 0])
  )
  half = np.full((2, 2), 0.5)
  # V = 1/2 (1 + V/2); d(0) = 1/2 + 1/2 * 1/2 d(0).
  np.testing.assert_allclose(
    bellman.policy_value(mdp, half), [2 / 3, 0], rtol=1e-15
  )
  np.testing.assert_allclose(
    bellman.action_value(mdp, half), [[4 / 3, 0], [0, 0]], rtol=1e-15
  )
  np.testing.assert_allclose(
    bellman.occupancy(mdp, half), [2 / 3, 1 / 3], rtol=1e-15
  )
  policy, value = bellman.optimal(mdp)
  np.testing.assert_allclose(value, [2, 0], rtol=1e-15)
  assert policy[0, 0] == 1


def test_values_and_visits_are_sums_over_time():
  mdp, policy = make_mdp(3), policies(7, STATES, ACTIONS)
  visits, value, state = np.zeros(STATES), 0.0, mdp.initial
  for t in range(400):
    visits += 0.1 * 0.9**t * state
    value += 0.9**t * np.einsum('s,sa,sa', state, policy, mdp.reward)
    state = np.einsum('s,sa,sat', state, policy, mdp.transition)
  np.testing.assert_allclose(bellman.occupancy(mdp, policy), visits, rtol=1e-13)
  np.testing.assert_allclose(
    bellman.expected_return(mdp, policy), value, rtol=1e-13
  )
  q = bellman.action_value(mdp, policy)
  np.testing.assert_allclose(
    bellman.backup(mdp, np.sum(policy * q, -1)), q, rtol=1e-13
  )


def test_what_a_row_lacks_ends_the_episode():
  ends = make_mdp(3, discount=0.99)
  ends = ends._replace(transition=ends.transition * 0.9 / 0.99)
  policy = policies(7, STATES, ACTIONS)
  for one, other in ((ends, make_mdp(3)), (make_mdp(3), ends)):
    np.testing.assert_allclose(
      bellman.policy_value(one, policy),
      bellman.policy_value(other, policy),
      rtol=1e-13,
    )


def test_optimal_is_the_best_of_all_deterministic_policies():
  mdps = [make_mdp(seed, 3, 3) for seed in (0, 20, 40)]
  choices = np.eye(3)[list(itertools.product(range(3), repeat=3))]
  values = jax.jit(jax.vmap(bellman.policy_value, (None, 0)))
  for mdp in mdps:
    policy, value = bellman.optimal(mdp)
    best = np.max(values(mdp, choices), axis=0)
    np.testing.assert_allclose(value, best, rtol=1e-13)
    assert set(np.unique(policy)) == {0, 1}
  # Ties do not make it run for ever.
  equal = mdps[0]._replace(reward=np.ones((3, 3)))
  np.testing.assert_allclose(bellman.optimal(equal)[1], 10, rtol=1e-13)


def test_random_mdps_are_mdps(key):
  mdp = tables(bellman.random_mdp(key, 4, 2, discount=0.7))
  bellman.check(mdp)
  assert mdp.discount == 0.7 and mdp.transition.shape == (4, 2, 4)


# The critic's program.


def programs():
  """Well and ill-conditioned ones, of full and of low rank, and a linear one.

  Returns:
    Q `[P, N, N]` and c `[P, N]`.
  """
  rng = np.random.default_rng(0)
  quadratics, linears = [], []
  for rank, low in ((9, 0), (9, -6), (4, 0), (4, -6), (0, 0)):
    factor = rng.normal(size=(9, rank)) * np.logspace(0, low, rank)
    quadratics.append(factor @ factor.T)
    linears.append(rng.normal(size=9))
  return np.stack(quadratics), np.stack(linears)


def test_box_solves_as_scipy_does():
  quadratics, linears = programs()
  found = np.asarray(solver()(quadratics, linears))
  assert np.all((found >= 0) & (found <= 1))
  for q, c, x in zip(quadratics, linears, found):
    objective = lambda x, q=q, c=c: 0.5 * x @ q @ x + c @ x
    other = scipy.optimize.minimize(
      objective,
      np.full(9, 0.5),
      jac=lambda x, q=q, c=c: q @ x + c,
      bounds=[(0, 1)] * 9,
      method='L-BFGS-B',
      options={'ftol': 1e-15, 'gtol': 1e-12, 'maxiter': 10_000},
    )
    gap = float(box.gap(q @ x + c, x, 1.0))
    # Not better than the minimum by more than the certificate allows.
    assert objective(x) <= other.fun + 1e-12
    assert objective(x) - gap <= other.fun and 0 <= gap < 1e-11


def test_box_finds_a_known_minimum():
  # x = clip(-c) where Q is the identity.
  c = np.asarray([[-0.3, 0.4, -2.0, -1.0, 0.0]])
  x = np.asarray(solver()(np.eye(5)[None], c))[0]
  np.testing.assert_allclose(x, [0.3, 0, 1, 1, 0], atol=1e-7)
  assert x[0] == pytest.approx(0.3, abs=1e-13)
  # At the corner x = 1 the loss is linear in each distance.
  assert box.gap(np.asarray([2.0, -3]), np.asarray([0.25, 1]), 1.0) == 0.5


@pytest.mark.parametrize('beta', [1 / 256, 1.0, 256.0])
@pytest.mark.parametrize('pessimism', offline_game.PESSIMISM)
def test_answer_is_the_most_pessimistic_critic(beta, pessimism):
  mdp, mu = make_mdp(3), policies(5, STATES, ACTIONS)
  mu[0] = [0, 0.5, 0.5]
  of, pi = (
    offline_game.population(mdp, mu, VALUE_MAX),
    policies(6, STATES, ACTIONS),
  )
  weight = np.asarray(of.weight)
  # Both terms written out in full, over (s, a) and (s', a').
  rows = np.sqrt(weight).reshape(-1, 1) * (
    np.eye(12)
    - 0.9 * np.einsum('sat,tb->satb', mdp.transition, pi).reshape(12, 12)
  )
  wanted = (np.sqrt(weight) * mdp.reward).reshape(-1)
  c = weight.sum(-1, keepdims=True) * pi - weight
  if pessimism == 'initial':
    c = mdp.initial[:, None] * pi
  c = c.reshape(-1)

  def both(f):
    error = rows @ f - wanted
    return c @ f + beta * error @ error, c + 2 * beta * rows.T @ error

  other = scipy.optimize.minimize(
    both,
    np.full(12, 5.0),
    jac=True,
    bounds=[(0, VALUE_MAX)] * 12,
    method='L-BFGS-B',
    options={'ftol': 1e-16, 'gtol': 1e-11, 'maxiter': 20_000},
  )
  critic = tables(compiled_answer(pessimism)(of, pi, beta))
  value, _ = both(critic.value.reshape(-1))
  assert abs(value - other.fun) < 1e-7 * max(1, beta) and critic.gap < 1e-8
  assert value - critic.gap <= other.fun
  assert value <= both(bellman.action_value(mdp, pi).reshape(-1))[0]


@functools.cache
def compiled_answer(pessimism):
  return jax.jit(functools.partial(offline_game.answer, pessimism=pessimism))


def test_beta_zero_is_imitation():
  plays, outcome = played('exponentiated_weights')
  games = tables(make_games())
  for i, weight in enumerate(games.weight):
    visits = weight.sum(-1, keepdims=True)
    policy, f = plays.policy[i, 0], plays.critic.value[i, 0]
    distance = 0.5 * np.abs(visits * policy - weight).sum((-2, -1))
    term = ((visits * policy - weight) * f).sum((-2, -1))
    np.testing.assert_allclose(term, -VALUE_MAX * distance, atol=1e-12)
    # No regret is then imitation: the mean distance is regret / Vmax.
    assert np.mean(distance) == pytest.approx(
      outcome.regret[i, 0] / VALUE_MAX, abs=1e-12
    )
    assert distance[-1] < 0.25 * distance[0]


# The game.


@pytest.mark.parametrize('oracle', ORACLES)
def test_the_guarantee_holds_for_every_beta(oracle):
  plays, outcome = played(oracle)
  assert outcome.slack.shape == (4, len(BETAS))
  assert np.all(outcome.slack > -1e-12)
  # Each round by itself, too: the critic does not flatter.
  games = tables(make_games())
  returns = jax.jit(jax.vmap(bellman.expected_return, (None, 0)))
  for i, beta in itertools.product(range(4), range(len(BETAS))):
    mdp, weight = jax.tree.map(lambda x, i=i: x[i], games.mdp), games.weight[i]
    policy, f = plays.policy[i, beta], plays.critic.value[i, beta]
    term = ((weight.sum(-1, keepdims=True) * policy - weight) * f).sum((-2, -1))
    better = np.asarray(returns(mdp, policy)) - outcome.behaviour[i, beta]
    assert np.all(term <= 0.1 * better + 1e-12)
    regret = -np.mean(term)
    assert outcome.regret[i, beta] == pytest.approx(regret, abs=1e-12)
    slack = np.mean(better) + regret / 0.1
    assert outcome.slack[i, beta] == pytest.approx(slack, abs=1e-10)


@pytest.mark.parametrize('oracle', ORACLES)
def test_performance_difference(oracle):
  _, outcome = played(oracle)
  assert np.max(outcome.identity_error) < 1e-12


@pytest.mark.parametrize('oracle', ORACLES)
def test_regret_is_within_the_bound(oracle):
  _, outcome = played(oracle)
  bound = ORACLES[oracle](ACTIONS, VALUE_MAX, ITERATIONS).bound
  if oracle == 'exponentiated_weights':
    assert bound == pytest.approx(10 * np.sqrt(np.log(3) / 120), rel=1e-12)
  assert np.max(outcome.regret) <= bound
  assert np.max(outcome.regret) > 0.2 * bound
  assert np.max(outcome.gap) < 1e-6


@pytest.mark.parametrize('oracle', ORACLES)
def test_an_oracle_has_no_regret_against_an_adversary(oracle):
  learner = ORACLES[oracle](ACTIONS, VALUE_MAX, 50)

  @jax.jit
  def loses(payoffs):
    def one(state, payoff):
      policy = learner.policy(state)
      # The adversary pays for what is played least.
      f = jnp.where(policy == jnp.min(policy, -1, keepdims=True), payoff, 0)
      return learner.update(state, f), (policy, f)

    start = learner.init(1, ACTIONS, payoffs.dtype)
    return jax.lax.scan(one, start, payoffs)[1]

  policy, f = tables(loses(VALUE_MAX * np.ones((50, 1, ACTIONS))))
  np.testing.assert_allclose(policy.sum(-1), 1, rtol=1e-13)
  assert np.all(policy >= 0)
  regret = np.max(np.sum(f, 0)) - np.sum(policy * f)
  assert regret / 50 <= learner.bound


def test_projection_is_onto_the_simplex():
  learner = offline_game.projected_gradient(2, 1.0, 2)
  # Step 1 / sqrt(2) / (sqrt(2) / 2 * sqrt(2)) = 1 / sqrt(2).
  f = np.asarray([[0.5, 0.0], [1.0, 1.0], [4.0, 0.0]])
  moved = learner.update(np.full((3, 2), 0.5), f)
  shift = 0.25 / np.sqrt(2)
  expected = [[0.5 + shift, 0.5 - shift], [0.5, 0.5], [1, 0]]
  np.testing.assert_allclose(moved, expected, rtol=1e-14)


def test_initial_state_pessimism_has_no_guarantee():
  _, outcome = played('exponentiated_weights', 'initial')
  # Its critic has nothing to say: the policy stays uniform, and in games 2
  # and 3 mu knows better.
  assert np.min(outcome.slack[2:, 0]) < -0.1
  assert np.max(outcome.identity_error) < 1e-12


# Data.


def test_the_empirical_game_is_that_of_the_counts():
  counts = np.zeros((2, 2, 2))
  counts[0, 0] = [3, 1]
  counts[1, 1] = [0, 4]
  rewards = np.asarray([[2.0, 0], [0, 4]])
  truth = make_mdp(0, 2, 2)
  of = offline_game.empirical(counts, rewards, truth, VALUE_MAX)
  np.testing.assert_allclose(of.mdp.transition[0], [[0.75, 0.25], [0, 0]])
  np.testing.assert_allclose(of.mdp.reward, [[0.5, 0], [0, 1]])
  np.testing.assert_allclose(of.weight, [[0.5, 0], [0, 0.5]])
  np.testing.assert_allclose(offline_game.behaviour(of), np.eye(2))
  # The corrected error of the samples themselves.
  pi, f = policies(1, 2, 2), 10 * numbers(2, 2, 2)
  v = np.sum(pi * f, -1)
  samples = [(0, 0, 1, 0), (0, 0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 1)]
  samples += [(1, 1, 1, 1)] * 4
  y = np.asarray([r + 0.9 * v[t] for _, _, r, t in samples])
  at = np.asarray([f[s, a] for s, a, _, _ in samples])
  mean = np.repeat([y[:4].mean(), y[4:].mean()], 4)
  corrected = np.mean((at - y) ** 2) - np.mean((mean - y) ** 2)
  assert offline_game.bellman_error(of, pi, f) == pytest.approx(
    corrected, rel=1e-12
  )


def test_rules_choose_what_they_say():
  put = lambda i: np.eye(7)[i].reshape(1, 1, 7)
  # Beta 2 has the best FQE and much spread, all of it shared with mu's.
  noise = np.asarray([-1.0, 1.0]).reshape(1, 1, 2)
  evidence = atac_game_selection.Evidence(
    truth=put(5),
    behaviour=np.zeros((1, 1)),
    optimum=np.full((1, 1), 2.0),
    fqe=put(2) + 0.5 * put(1),
    resampled=noise[..., None] * put(2)[:, :, None],
    fqe_behaviour=np.zeros((1, 1)),
    resampled_behaviour=noise,
    held_out=put(3),
  )
  chosen = {
    k: v.item() for k, v in atac_game_selection.choose(evidence).items()
  }
  expected = {'best': 5, 'fqe': 2, 'fqe - sd': 1, 'gain - sd': 2, 'held-out': 3}
  assert {rule: chosen[rule] for rule in expected} == expected
  assert chosen['beta=16'] == 4
  evidence = evidence._replace(truth=put(5) - put(2))
  double = atac_game_selection.Evidence(*(np.repeat(x, 2, 1) for x in evidence))
  rows = {
    (r.coverage, r.rule): r for r in atac_game_selection.table(double, 10)
  }
  row = rows['partial', 'fqe']
  assert (row.regret, row.gain, row.below_behaviour) == (1.0, -0.5, 1.0)
  assert rows['full', 'best'].regret == 0 and row.beta_median == 1 / 16


# What is refused.

MISTAKES = {
  'shape': ({'transition': np.ones((4, 3, 3)) / 3}, r'transition.*\(4, 3, 4\)'),
  'probability': ({'initial': np.asarray([1.5, -0.5, 0, 0])}, 'initial.*-0.5'),
  'mass': ({'transition': np.ones((4, 3, 4))}, 'sums to 4: must be at most 1'),
  'initial': ({'initial': np.ones(4)}, 'initial sums to 4: must be 1'),
  'discount': ({'discount': 1.0}, r'discount=1.0: must be in \[0, 1\)'),
  'reward': ({'reward': np.full((4, 3), np.nan)}, 'not finite'),
  'sign': ({'reward': np.full((4, 3), -1.0)}, 'reward has an entry -1'),
  'too large': ({'reward': np.full((4, 3), 2.0)}, 'must be at least 20'),
}


@pytest.mark.parametrize('what', MISTAKES)
def test_an_mdp_that_is_none_is_refused(what):
  change, message = MISTAKES[what]
  mdp, mu = make_mdp(0)._replace(**change), policies(5, STATES, ACTIONS)
  with pytest.raises(ValueError, match=message):
    offline_game.population(mdp, mu, VALUE_MAX)


def test_other_mistakes_are_refused(key):
  mdp, mu = make_mdp(0), policies(5, STATES, ACTIONS)
  of = offline_game.population(mdp, mu, VALUE_MAX)
  learner = offline_game.projected_gradient(ACTIONS, VALUE_MAX, 1)
  calls = {
    'behaviour has shape': lambda: offline_game.population(
      mdp, mu[:2], VALUE_MAX
    ),
    'behaviour.*sums to 2': lambda: offline_game.population(
      mdp, 2 * mu, VALUE_MAX
    ),
    'beta must be at least 0': lambda: offline_game.play(of, learner, -1.0, 1),
    'num_iterations must': lambda: offline_game.play(of, learner, 1.0, 0),
    "pessimism='none'": lambda: offline_game.play(of, learner, 1.0, 1, 'none'),
    'value_max must be above': lambda: offline_game.exponentiated_weights(
      3, 0.0, 1
    ),
    'num_states must be at least 1': lambda: bellman.random_mdp(key, 0, 2),
    'discount=1': lambda: bellman.random_mdp(key, 2, 2, discount=1),
    'spread must be': lambda: bellman.random_mdp(key, 2, 2, spread=-1.0),
  }
  for message, call in calls.items():
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.slow
def test_launcher(tmp_path):
  said = refused('study atac_game', '--sizes=1,a')
  assert said.startswith('error: sizes=1,a: must be')
  out = tmp_path / 'game.csv'
  launch(
    'study atac_game',
    '--mdps=2',
    '--states=3',
    '--actions=3',
    '--iterations=10',
    '--datasets=2',
    '--sizes=20,40',
    f'--out={out}',
  )
  rows = read_csv(out)
  # MDPs, coverages, pessimisms, oracles, betas.
  assert len(rows) == 2 * 2 * 2 * 2 * 7
  for row in rows:
    assert float(row['identity_error']) < 1e-12
    assert float(row['regret']) <= float(row['bound'])
    if row['pessimism'] == 'relative':
      assert float(row['slack']) > -1e-12
  rules = read_csv(tmp_path / 'game_selection.csv')
  assert len(rules) == 2 * 2 * 12
  for row in rules:
    assert float(row['regret']) >= 0
    if row['rule'] == 'best':
      assert float(row['regret']) == 0
  assert (tmp_path / 'game.png').stat().st_size > 10_000
