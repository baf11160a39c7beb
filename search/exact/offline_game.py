"""The game of offline learning in a finite MDP: ATAC's Algorithm 1, exactly.

Cheng et al. 2022, "Adversarially trained actor critic for offline
reinforcement learning". An actor plays against a critic that is pessimistic
about it relative to the behaviour policy mu:

  pi_hat = argmax_pi L(pi, f_pi),
  f_pi = argmin_f L(pi, f) + beta E(pi, f) over f in [0, Vmax]^{SA},
  L(pi, f) = E_{s ~ d, a ~ mu} [f(s, pi) - f(s, a)],
  E(pi, f) = E_{s ~ d, a ~ mu} [(f - r - g P f(., pi))(s, a)^2],

where d is mu's normalised occupancy. Why pi_hat is no worse than mu for any
beta >= 0:

1. Performance difference: `(1 - g) (J(pi) - J(mu)) = L(pi, Q_pi)`.
2. E is 0 at Q_pi, so `L(pi, f_pi) <= L(pi, f_pi) + beta E(pi, f_pi) <=
   L(pi, Q_pi)`: the critic never flatters.
3. Let an actor without regret play pi_1 .. pi_K against their critics f_k,
   and let `Reg = -sum_k L(pi_k, f_k)`, its regret towards mu. The mean of 2
   over k, by 1, is `J(mixture) >= J(mu) - Reg / (K (1 - g))`.

3 holds for every run of finite length, and `assess` measures its slack. With
beta = 0 the critic's value is `-Vmax E_d TV(pi, mu)`: imitation.

Axes: `S` states, `A` actions, `K` iterations. Functions take one game: `vmap`
them over games and betas. For float64, as `search.exact.bellman`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from search.exact import bellman, box
from search.roots import check_range

PESSIMISM = ('relative', 'initial')


class Game(NamedTuple):
  """What actor and critic see of a process, or of data from it.

  Attributes:
    mdp: its rewards are within `[0, (1 - g) value_max]`.
    weight: float `[S, A]`, `d(s) mu(a | s)`, or the share of the data.
    value_max: Vmax, float `[]`: critics are within `[0, value_max]`.
  """

  mdp: bellman.MDP
  weight: chex.Array
  value_max: chex.Numeric


class Oracle(NamedTuple):
  """A no-regret learner for all states at once, as pure functions.

  Attributes:
    init: `(num_states, num_actions, dtype) -> state`, of the uniform policy.
    policy: `(state) -> pi [S, A]`.
    update: `(state, f [S, A]) -> state`, towards actions of large f.
    bound: of its regret over K, in each state, towards any policy.
  """

  init: Callable[[int, int, Any], chex.Array]
  policy: Callable[[chex.Array], chex.Array]
  update: Callable[[chex.Array, chex.Array], chex.Array]
  bound: float


class Critic(NamedTuple):
  """The answer to a policy.

  Attributes:
    value: f, float `[S, A]`, in `[0, Vmax]`; never worse than Q_pi.
    gap: float `[]`, the critic's objective is this far from its minimum at
      most.
    is_q: bool `[]`, Q_pi was better than what the solver found, and was taken.
  """

  value: chex.Array
  gap: chex.Array
  is_q: chex.Array


class Play(NamedTuple):
  """All K rounds of a game.

  The result of the game is the uniform mixture: draw one of the policies and
  play it for a whole episode.

  Attributes:
    policy: float `[K, S, A]`.
    critic: each field `[K, ...]`.
  """

  policy: chex.Array
  critic: Critic


class Outcome(NamedTuple):
  """What a play was worth; returns are discounted.

  Attributes:
    mixture: float `[]`, J of the result.
    last: float `[]`, J of the last policy.
    behaviour: float `[]`, J of mu.
    regret: float `[]`, `Reg / K`, measured, towards mu.
    slack: float `[]`, `J(mixture) - J(mu) + Reg / (K (1 - g))`, not negative
      where the theorem holds.
    identity_error: float `[]`, the largest error of the performance
      difference.
    gap: float `[]`, the largest of the critics'.
    num_q: int32 `[]`, how often Q_pi replaced the solver's critic.
  """

  mixture: chex.Array
  last: chex.Array
  behaviour: chex.Array
  regret: chex.Array
  slack: chex.Array
  identity_error: chex.Array
  gap: chex.Array
  num_q: chex.Array


def population(
  mdp: bellman.MDP, behaviour: chex.Array, value_max: float
) -> Game:
  """The game with infinite data.

  Args:
    mdp: the truth.
    behaviour: mu, `[S, A]`; 0 at an action that it never takes.
    value_max: at least the largest reward / (1 - g), so that every Q_pi is a
      critic.

  Raises:
    ValueError: for concrete arguments that are out of range; those that are
      traced are not looked at.
  """
  leaves = jax.tree.leaves((mdp, behaviour, value_max))
  if not any(isinstance(leaf, Tracer) for leaf in leaves):
    _check(mdp, behaviour, value_max)
  visits = bellman.occupancy(mdp, behaviour)
  return Game(mdp, visits[:, None] * behaviour, value_max)


def empirical(
  counts: chex.Array,
  reward_sum: chex.Array,
  truth: bellman.MDP,
  value_max: chex.Numeric,
) -> Game:
  """The game of a data set.

  Its Bellman error with the double-sampling correction, `E_D[(f - y)^2] -
  min_f' E_D[(f' - y)^2]`, is that of the empirical MDP, so nothing else is
  new. An action without data is worth 0 there: its reward is 0 and it ends
  the episode.

  Args:
    counts: `[S, A, S]`, transitions seen; at least one.
    reward_sum: `[S, A]`, rewards seen, added up.
    truth: discount and initial distribution are known; the rest is not read.
    value_max: Vmax.
  """
  seen = jnp.sum(counts, axis=-1)
  at_least_one = jnp.maximum(seen, 1)
  mdp = bellman.MDP(
    counts / at_least_one[..., None],
    reward_sum / at_least_one,
    truth.discount,
    truth.initial,
  )
  return Game(mdp, seen / jnp.sum(seen), value_max)


def behaviour(game: Game) -> chex.Array:
  """mu, `[S, A]`; uniform in states without weight."""
  visits = jnp.sum(game.weight, axis=-1, keepdims=True)
  is_seen = visits > 0
  uniform = 1 / game.weight.shape[-1]
  return jnp.where(
    is_seen, game.weight / jnp.where(is_seen, visits, 1), uniform
  )


def exponentiated_weights(
  num_actions: int, value_max: float, num_iterations: int
) -> Oracle:
  """`pi_{k+1} ~ pi_k exp(eta f_k)`, `eta = sqrt(8 log A / K) / Vmax`.

  Regret / K is at most `Vmax sqrt(log A / (2 K))` (Cesa-Bianchi and Lugosi
  2006, theorem 2.2).

  Args:
    num_actions: `A`.
    value_max: Vmax, above 0.
    num_iterations: `K`, at least 1.

  Raises:
    ValueError: naming the argument that is out of range.
  """
  _check_oracle(num_actions, value_max, num_iterations)
  spread = math.log(num_actions) / num_iterations
  step = math.sqrt(8 * spread) / value_max
  return Oracle(
    init=lambda states, actions, dtype: jnp.zeros((states, actions), dtype),
    policy=lambda logits: jax.nn.softmax(logits, axis=-1),
    update=lambda logits, f: logits + step * f,
    bound=value_max * math.sqrt(spread / 2),
  )


def projected_gradient(
  num_actions: int, value_max: float, num_iterations: int
) -> Oracle:
  """`pi_{k+1} = project(pi_k + eta f_k)` onto the simplex.

  Zinkevich 2003, theorem 1, with a fixed step. No policy is farther from the
  uniform one than `sqrt(1 - 1 / A)`; a constant does not move the projection,
  so gradients are no longer than `sqrt(A) Vmax / 2`; regret / K is at most
  the product of both over `sqrt(K)`.

  Args:
    num_actions: see `exponentiated_weights`.
    value_max: as in `exponentiated_weights`.
    num_iterations: as in `exponentiated_weights`.

  Raises:
    ValueError: as `exponentiated_weights`.
  """
  _check_oracle(num_actions, value_max, num_iterations)
  distance = math.sqrt(1 - 1 / num_actions)
  length = math.sqrt(num_actions) * value_max / 2
  step = distance / (length * math.sqrt(num_iterations))
  return Oracle(
    init=lambda states, actions, dtype: jnp.full(
      (states, actions), 1 / actions, dtype
    ),
    policy=lambda policy: policy,
    update=lambda policy, f: _project(policy + step * f),
    bound=distance * length / math.sqrt(num_iterations),
  )


def pessimism_term(game: Game, policy: chex.Array, f: chex.Array) -> chex.Array:
  """`L(pi, f)` of a policy `[S, A]` and a critic `[S, A]`, `[]`."""
  return jnp.sum(_coefficients(game, policy, 'relative') * f)


def bellman_error(game: Game, policy: chex.Array, f: chex.Array) -> chex.Array:
  """`E(pi, f)` of a policy `[S, A]` and a critic `[S, A]`, `[]`."""
  return jnp.sum(game.weight * _residual(game, policy, f) ** 2)


def answer(
  game: Game, policy: chex.Array, beta: chex.Numeric, pessimism: str
) -> Critic:
  """The critic that is most pessimistic about a policy.

  It minimises `L + beta E`, divided by beta where that is above 1, as the
  deep version does. With beta = 0 it is Vmax where mu takes an action more
  often than the policy does, else 0.

  Args:
    game: see `Game`.
    policy: `[S, A]`.
    beta: weight of the Bellman error, at least 0; may be traced.
    pessimism: `relative`, or `initial` (ATAC_0): `E_{s_0} f(s_0, pi)` in the
      place of L, which has no guarantee.

  Raises:
    ValueError: naming the argument that is out of range.
  """
  check_range('beta', beta, low=0)
  c = _coefficients(game, policy, pessimism)
  high, size = game.value_max, c.size
  term, error = 1 / jnp.maximum(1, beta), jnp.minimum(1, beta)

  def objective(f):
    return term * jnp.sum(c * f) + error * bellman_error(game, policy, f)

  # In units of Vmax; the quadratic form is that of the residual.
  zero = jnp.zeros_like(c)
  residual = lambda x: _residual(game, policy, high * x.reshape(c.shape))
  offset = residual(zero)
  columns = jax.vmap(lambda x: residual(x) - offset)(
    jnp.eye(size, dtype=c.dtype)
  ).reshape(size, size)
  weighted = columns * game.weight.reshape(1, size)
  quadratic = 2 * error * (weighted @ columns.T)
  linear = term * high * c.reshape(-1)
  linear += 2 * error * (weighted @ offset.reshape(-1))
  found = high * box.solve(quadratic, linear).reshape(c.shape)
  found = jnp.where(beta == 0, jnp.where(c < 0, high, zero), found)
  q = jnp.clip(bellman.action_value(game.mdp, policy), 0, high)
  is_q = objective(q) < objective(found)
  value = jnp.where(is_q, q, found)
  gap = box.gap(jax.grad(objective)(value), value, high)
  return Critic(value, gap * jnp.maximum(1, beta), is_q)


def play(
  game: Game,
  oracle: Oracle,
  beta: chex.Numeric,
  num_iterations: int,
  pessimism: str = 'relative',
) -> Play:
  """Algorithm 1: policies by a no-regret oracle against their critics.

  Args:
    game: see `Game`.
    oracle: see `Oracle`; made for as many iterations.
    beta: see `answer`.
    num_iterations: `K`, at least 1.
    pessimism: see `answer`.

  Raises:
    ValueError: naming the argument that is out of range.
  """
  check_range('num_iterations', num_iterations, low=1)

  def one(state, _):
    policy = oracle.policy(state)
    critic = answer(game, policy, beta, pessimism)
    return oracle.update(state, critic.value), (policy, critic)

  states, actions = game.weight.shape
  start = oracle.init(states, actions, game.weight.dtype)
  _, (policy, critic) = jax.lax.scan(one, start, length=num_iterations)
  return Play(policy, critic)


def assess(game: Game, played: Play) -> Outcome:
  """Measures a play in a game of `population`."""
  mdp = game.mdp
  at_mu = bellman.expected_return(mdp, behaviour(game))
  q = jax.vmap(bellman.action_value, (None, 0))(mdp, played.policy)
  returns = jnp.sum(played.policy * q, axis=-1) @ mdp.initial
  term = jax.vmap(pessimism_term, (None, 0, 0))
  identity = (1 - mdp.discount) * (returns - at_mu)
  identity -= term(game, played.policy, q)
  regret = -jnp.mean(term(game, played.policy, played.critic.value))
  mixture = jnp.mean(returns)
  return Outcome(
    mixture=mixture,
    last=returns[-1],
    behaviour=at_mu,
    regret=regret,
    slack=mixture - at_mu + regret / (1 - mdp.discount),
    identity_error=jnp.max(jnp.abs(identity)),
    gap=jnp.max(played.critic.gap),
    num_q=jnp.sum(played.critic.is_q),
  )


def _coefficients(game: Game, policy: chex.Array, pessimism: str) -> chex.Array:
  """c of the critic's linear term `sum c f`, `[S, A]`."""
  if pessimism == 'relative':
    return jnp.sum(game.weight, axis=-1, keepdims=True) * policy - game.weight
  if pessimism == 'initial':
    return game.mdp.initial[:, None] * policy
  raise ValueError(f'pessimism={pessimism!r}: must be one of {PESSIMISM}')


def _residual(game: Game, policy: chex.Array, f: chex.Array) -> chex.Array:
  return f - bellman.backup(game.mdp, jnp.sum(policy * f, axis=-1))


def _project(x: chex.Array) -> chex.Array:
  """Each row's nearest point of the simplex (Duchi et al. 2008, figure 1)."""
  ordered = -jnp.sort(-x, axis=-1)
  rank = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype)[None]
  excess = (jnp.cumsum(ordered, axis=-1) - 1) / rank
  last = jnp.sum(ordered > excess, axis=-1, keepdims=True) - 1
  return jnp.maximum(x - jnp.take_along_axis(excess, last, axis=-1), 0)


def _check_oracle(num_actions, value_max, num_iterations):
  check_range('num_actions', num_actions, low=1)
  check_range('value_max', value_max, above=0)
  check_range('num_iterations', num_iterations, low=1)


def _check(mdp: bellman.MDP, behaviour: chex.Array, value_max: float) -> None:
  bellman.check(mdp)
  bellman.check_policy('behaviour', behaviour, mdp)
  low, high = np.min(mdp.reward), np.max(mdp.reward)
  if low < 0:
    raise ValueError(
      f'reward has an entry {low:g}: must be at least 0, so that critics in '
      '[0, value_max] can be right'
    )
  needed = float(high / (1 - np.asarray(mdp.discount)))
  if not value_max >= needed * (1 - 1e-9):
    raise ValueError(
      f'value_max={value_max:g}: must be at least {needed:g}, the largest '
      'reward / (1 - discount)'
    )
