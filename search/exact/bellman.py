"""Finite Markov decision processes as arrays, solved exactly.

Axes: `S` states, `A` actions. Functions take one process: `vmap` them. They
compute in the dtype of their arrays; identities hold to rounding in float64
(`with jax.enable_x64(True):` around everything that makes or takes arrays).

A row of `transition` may sum to less than 1: what is missing ends the episode.
Rewards are maximised. Where a source minimises costs, these are negative
rewards: its J* is minus ours, and its inequalities turn round.

How can online play be Newton's method without a Hessian? It is Newton's
method for roots, not for minima: it solves `H(J) = J - TJ = 0`, where T is
Bellman's operator `bellman`, and needs the Jacobian of H. A Hessian is what
that Jacobian happens to be where H is a gradient; this H is the gradient of
nothing (`I - g P` is not symmetric), so no Hessian is missing. By Danskin's
theorem the Jacobian of T at J is `g P_mu`, where mu is the policy that attains
the maximum in TJ: choosing the action by lookahead is taking the derivative.
With `TJ = r_mu + g P_mu J`, Newton's step from J is

  J - (I - g P_mu)^-1 (J - TJ) = (I - g P_mu)^-1 r_mu = J_mu,

the value of the one-step lookahead policy. Nobody solves the system online:
playing mu earns J_mu along the way. T is convex, each `T_mu` a tangent plane
below it, so J_mu is at most J* from whatever J. (Kleinman 1968; Puterman and
Brumelle 1979; Bertsekas 2022, "Lessons from AlphaZero", chapter 3.)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx
import numpy as np

from search.exact import linear
from search.model import Model
from search.roots import check_range

# Rows that sum to 1 only as far as float32 can.
_ROUNDING = 1e-5


class MDP(NamedTuple):
  """A Markov decision process.

  Attributes:
    transition: float `[S, A, S]`, probability of the next state; a row sums to
      at most 1.
    reward: float `[S, A]`, expected reward of an action.
    discount: float `[]`, at least 0 and below 1.
    initial: float `[S]`, distribution of the first state.
  """

  transition: chex.Array
  reward: chex.Array
  discount: chex.Numeric
  initial: chex.Array


def check(mdp: MDP) -> None:
  """Refuses an MDP that is none; for concrete arrays, before any compile.

  Raises:
    ValueError: a shape, probability, reward or discount is out of place; it
      names the field, the value and what would be right.
  """
  transition, reward, initial = map(
    np.asarray, (mdp.transition, mdp.reward, mdp.initial)
  )
  if reward.ndim != 2 or 0 in reward.shape:
    raise ValueError(f'reward has shape {reward.shape}: must be [S, A]')
  states, actions = reward.shape
  for field, value, shape in (
    ('transition', transition, (states, actions, states)),
    ('initial', initial, (states,)),
  ):
    if value.shape != shape:
      raise ValueError(
        f'{field} has shape {value.shape}: must be {shape} with a reward '
        f'of shape {reward.shape}'
      )
    if not np.all(value >= 0):
      raise ValueError(
        f'{field} has an entry {np.min(value):g}: probabilities are at least 0'
      )
  if not np.isfinite(reward).all():
    raise ValueError('reward has an entry that is not finite')
  mass = np.max(np.sum(transition, -1))
  if not mass <= 1 + _ROUNDING:
    raise ValueError(
      f'transition has a row that sums to {mass:g}: must be at most 1'
    )
  if not abs(np.sum(initial) - 1) <= _ROUNDING:
    raise ValueError(f'initial sums to {np.sum(initial):g}: must be 1')
  discount = np.asarray(mdp.discount)
  if discount.shape != () or not 0 <= discount < 1:
    raise ValueError(f'discount={discount}: must be in [0, 1)')


def check_policy(name: str, policy: chex.Array, mdp: MDP) -> None:
  """Refuses what is not a distribution over the actions of each state.

  Args:
    name: of the argument, for the message.
    policy: concrete, `[S, A]`.
    mdp: whose policy it is to be.

  Raises:
    ValueError: naming the argument, its shape, entry or sum.
  """
  policy, shape = np.asarray(policy), np.shape(mdp.reward)
  if policy.shape != shape:
    raise ValueError(f'{name} has shape {policy.shape}: must be {shape}')
  if not np.all(policy >= 0):
    raise ValueError(f'{name} has an entry {np.min(policy):g}: at least 0')
  mass = np.sum(policy, -1)
  worst = mass[np.argmax(np.abs(mass - 1))]
  if not abs(worst - 1) <= _ROUNDING:
    raise ValueError(f'{name} has a row that sums to {worst:g}: must be 1')


def policy_transition(mdp: MDP, policy: chex.Array) -> chex.Array:
  """Transitions between states under a policy `[S, A]`, `[S, S]`."""
  return jnp.einsum('sat,sa->st', mdp.transition, policy)


def backup(mdp: MDP, value: chex.Array) -> chex.Array:
  """One step of lookahead from state values `[S]`: Q, `[S, A]`."""
  return mdp.reward + mdp.discount * (mdp.transition @ value)


def policy_value(mdp: MDP, policy: chex.Array) -> chex.Array:
  """Value of a policy `[S, A]` in each state, `[S]`: a linear solve."""
  reward = jnp.sum(policy * mdp.reward, axis=-1)
  return linear.solve(_resolvent(mdp, policy), reward)


def action_value(mdp: MDP, policy: chex.Array) -> chex.Array:
  """Value of each action, then of following a policy `[S, A]`: `[S, A]`."""
  return backup(mdp, policy_value(mdp, policy))


def expected_return(mdp: MDP, policy: chex.Array) -> chex.Array:
  """Discounted return J of a policy `[S, A]` from `mdp.initial`, `[]`."""
  return mdp.initial @ policy_value(mdp, policy)


def occupancy(mdp: MDP, policy: chex.Array) -> chex.Array:
  """Discounted visits under a policy `[S, A]`: a share of states, `[S]`.

  `(1 - g) sum_t g^t P(s_t = s)`, by a linear solve. It sums to
  one where no transition ends the episode.
  """
  start = (1 - mdp.discount) * mdp.initial
  return linear.solve(_resolvent(mdp, policy).T, start)


def optimal(mdp: MDP) -> tuple[chex.Array, chex.Array]:
  """An optimal deterministic policy `[S, A]` and its value `[S]`.

  Policy iteration, exact: it ends when no action is better than the policy's
  by more than rounding (Howard 1960; it is Newton's method on Bellman's
  equation, Puterman and Brumelle 1979).
  """
  one_hot = functools.partial(_one_hot, mdp)
  rounding = 100 * jnp.finfo(mdp.reward.dtype).eps

  def improve(carry):
    action, _ = carry
    q = action_value(mdp, one_hot(action))
    current = jnp.take_along_axis(q, action[:, None], axis=-1)[:, 0]
    gain = jnp.max(q, axis=-1) - current
    is_better = gain > rounding * (1 + jnp.max(jnp.abs(q)))
    return jnp.where(is_better, jnp.argmax(q, -1), action), jnp.any(is_better)

  start = jnp.argmax(mdp.reward, axis=-1), jnp.asarray(True)
  action, _ = jax.lax.while_loop(lambda carry: carry[1], improve, start)
  policy = one_hot(action)
  return policy, policy_value(mdp, policy)


def bellman(mdp: MDP, value: chex.Array) -> chex.Array:
  """Bellman's operator T on state values `[S]`: TJ, `[S]`."""
  return jnp.max(backup(mdp, value), axis=-1)


def policy_bellman(
  mdp: MDP, policy: chex.Array, value: chex.Array
) -> chex.Array:
  """A policy's operator T_mu on state values `[S]`: `[S]`.

  Args:
    mdp: any.
    policy: mu, `[S, A]`.
    value: J, `[S]`.

  >>> end = MDP(jnp.zeros((1, 2, 1)), jnp.array([[1.0, 3.0]]), 0.9, jnp.ones(1))
  >>> j, uniform = jnp.zeros(1), jnp.full((1, 2), 0.5)
  >>> policy_bellman(end, uniform, j).tolist(), bellman(end, j).tolist()
  ([2.0], [3.0])
  """
  return jnp.sum(policy * backup(mdp, value), axis=-1)


def greedy(mdp: MDP, value: chex.Array) -> chex.Array:
  """The mu with `T_mu J = TJ` for values `[S]`, one-hot `[S, A]`.

  Of ties it takes the first.
  """
  return _one_hot(mdp, jnp.argmax(backup(mdp, value), axis=-1))


def newton(
  operator: Callable[[chex.Array], chex.Array],
  value: chex.Array,
  solve: Callable[[chex.Array, chex.Array], chex.Array] = linear.solve,
) -> chex.Array:
  """One step of Newton's method for the root of `H(J) = J - T(J)`.

  The Jacobian is by automatic differentiation through T, so that this knows
  nothing of policies. Where T is a maximum with ties the derivative jumps, and
  its value here, the mean over the ties, belongs to no policy: the step differs
  from the value of any greedy policy. Start from generic values.

  Args:
    operator: T, of an array to an array of its shape.
    value: J, `[...]`, `N` numbers.
    solve: `(matrix [N, N], right [N]) -> [N]`.

  Returns:
    The next J, `[...]`.
  """
  flat = jnp.ravel(value)
  residual = lambda x: x - jnp.ravel(operator(jnp.reshape(x, value.shape)))
  step = solve(jax.jacrev(residual)(flat), residual(flat))
  return value - jnp.reshape(step, value.shape)


def newton_step(mdp: MDP, value: chex.Array) -> chex.Array:
  """Newton's step for `J = TJ` from values `[S]`: `[S]`; see `newton`.

  It is `policy_value(mdp, greedy(mdp, value))`, found another way.

  >>> from search.exact import examples
  >>> mdp = jax.tree.map(jnp.asarray, examples.two_states())
  >>> j = jnp.array([0.0, 9.0])
  >>> [round(x, 2) for x in newton_step(mdp, j).tolist()]
  [-54.15, -50.2]
  >>> [round(x, 2) for x in policy_value(mdp, greedy(mdp, j)).tolist()]
  [-54.15, -50.2]
  """
  return newton(functools.partial(bellman, mdp), value)


def value_iteration(mdp: MDP, value: chex.Array, num_steps: int) -> chex.Array:
  """From values `[S]`: `J, TJ, T^2 J, ...`, `[num_steps + 1, S]`."""
  return _iterates(functools.partial(bellman, mdp), value, num_steps)


def policy_iteration(mdp: MDP, value: chex.Array, num_steps: int) -> chex.Array:
  """Values of greedy policies, each greedy towards the value before it.

  Newton's method repeated. `optimal` is the same until nothing improves.

  Args:
    mdp: any.
    value: the first, `[S]`.
    num_steps: how many policies.

  Returns:
    `[num_steps + 1, S]`, the first value first.
  """
  step = lambda value: policy_value(mdp, greedy(mdp, value))
  return _iterates(step, value, num_steps)


def modified_policy_iteration(
  mdp: MDP, value: chex.Array, num_steps: int, num_evaluations: int
) -> chex.Array:
  """Policy iteration whose evaluations end after a few steps of T_mu.

  With one it is value iteration, with many policy iteration (Puterman and
  Shin 1978; "optimistic" in Bertsekas).

  Args:
    mdp: any.
    value: the first, `[S]`.
    num_steps: how many policies.
    num_evaluations: m, at least 1: `J <- T_mu^m J`, mu greedy towards J.

  Returns:
    `[num_steps + 1, S]`, the first value first.

  Raises:
    ValueError: `num_evaluations` is below 1.
  """
  check_range('num_evaluations', num_evaluations, low=1)

  def step(value):
    operator = functools.partial(policy_bellman, mdp, greedy(mdp, value))
    return jax.lax.fori_loop(
      0, num_evaluations, lambda _, value: operator(value), value
    )

  return _iterates(step, value, num_steps)


def model(mdp: MDP, policy: chex.Array | None = None) -> Model:
  """An MDP as what planners plan in, `B` copies at once.

  The observation of the time steps that its `root` takes is the state, int32
  `[B]`, and so is its embedding. Its `params` are the values `[S]` at which a
  plan ends, J~. Where an episode ends, the state stays and the discount is 0.

  Args:
    mdp: any.
    policy: base policy `[S, A]`, whose logarithms are the prior logits; equal
      logits if None.

  Returns:
    A `Model` whose `outcomes` has `C = S + 1` chances: every next state, and
    the end of the episode.
  """
  mdp = jax.tree.map(jnp.asarray, mdp)
  num_states = mdp.reward.shape[0]
  prior = jnp.zeros_like(mdp.reward) if policy is None else jnp.log(policy)

  def root(params, timestep, key):
    del key
    state = timestep.observation
    return mctx.RootFnOutput(
      prior_logits=prior[state], value=params[state], embedding=state
    )

  def outcomes(params, action, embedding):
    into = mdp.transition[embedding, action]
    end = jnp.maximum(0, 1 - jnp.sum(into, axis=-1, keepdims=True))
    probability = jnp.concatenate([into, end], axis=-1)
    number = jnp.arange(num_states + 1, dtype=embedding.dtype)[None]
    goes_on = number < num_states
    state = jnp.where(goes_on, number, embedding[:, None])
    reward = mdp.reward[embedding, action][:, None]
    output = mctx.RecurrentFnOutput(
      reward=jnp.broadcast_to(reward, state.shape),
      discount=jnp.broadcast_to(mdp.discount * goes_on, state.shape),
      prior_logits=prior[state],
      value=jnp.where(goes_on, params[state], 0),
    )
    return probability, output, state

  def step(params, key, action, embedding):
    probability, output, state = outcomes(params, action, embedding)
    drawn = jax.random.categorical(key, jnp.log(probability), axis=-1)
    pick = lambda x: x[jnp.arange(x.shape[0]), drawn]
    return jax.tree.map(pick, (output, state))

  return Model(root, step, outcomes=outcomes)


def random_mdp(
  key: chex.PRNGKey,
  num_states: int,
  num_actions: int,
  *,
  discount: float = 0.9,
  spread: float = 2.0,
) -> MDP:
  """Draws an MDP with rewards that are uniform in [0, 1).

  Args:
    key: consumed.
    num_states: `S`, at least 1.
    num_actions: `A`, at least 1.
    discount: in `[0, 1)`.
    spread: standard deviation of the logits of the next state and of the
      first, which are normal; at least 0. The larger, the fewer states take
      most of the probability.

  Raises:
    ValueError: naming the argument that is out of range.
  """
  check_range('num_states', num_states, low=1)
  check_range('num_actions', num_actions, low=1)
  check_range('spread', spread, low=0)
  if not 0 <= discount < 1:
    raise ValueError(f'discount={discount}: must be in [0, 1)')
  keys = jax.random.split(key, 3)
  softmax = lambda key, *shape: jax.nn.softmax(
    spread * jax.random.normal(key, shape), axis=-1
  )
  transition = softmax(keys[0], num_states, num_actions, num_states)
  return MDP(
    transition,
    jax.random.uniform(keys[1], (num_states, num_actions)),
    jnp.asarray(discount, transition.dtype),
    softmax(keys[2], num_states),
  )


def _one_hot(mdp: MDP, action: chex.Array) -> chex.Array:
  """A deterministic policy `[S, A]` of its actions `[S]`."""
  num_actions = mdp.reward.shape[1]
  return jax.nn.one_hot(action, num_actions, dtype=mdp.reward.dtype)


def _iterates(
  step: Callable[[chex.Array], chex.Array], start: chex.Array, num_steps: int
) -> chex.Array:
  """`start, step(start), ...`, `[num_steps + 1, ...]`."""
  check_range('num_steps', num_steps, low=0)

  def body(value, _):
    value = step(value)
    return value, value

  start = jnp.asarray(start)
  _, later = jax.lax.scan(body, start, length=num_steps)
  return jnp.concatenate([start[None], later])


def _resolvent(mdp: MDP, policy: chex.Array) -> chex.Array:
  """`I - g P`, `[S, S]`."""
  transition = policy_transition(mdp, policy)
  identity = jnp.eye(transition.shape[0], dtype=transition.dtype)
  return identity - mdp.discount * transition
