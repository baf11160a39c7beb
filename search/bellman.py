"""Finite Markov decision processes as arrays, solved exactly.

Axes: `S` states, `A` actions. Functions take one process: `vmap` them. They
compute in the dtype of their arrays; identities hold to rounding in float64
(`with jax.enable_x64(True):` around everything that makes or takes arrays).

A row of `transition` may sum to less than 1: what is missing ends the episode.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from search import linear
from search._root import check_range

# Rows that sum to 1 only as far as float32 can.
_ROUNDING = 1e-5


class MDP(NamedTuple):
  """A Markov decision process.

  Attributes:
    transition: `[S, A, S]`, probability of the next state; a row sums to at
      most 1.
    reward: `[S, A]`, expected reward of an action.
    discount: `[]`, at least 0 and below 1.
    initial: `[S]`, distribution of the first state.
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
        f'{field} has shape {value.shape}: must be {shape} beside a reward '
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
  """One step of look-ahead from state values `[S]`: Q, `[S, A]`."""
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
  """Normalised discounted visits `(1 - g) sum_t g^t P(s_t = s)`, `[S]`.

  It sums to one where no transition ends the episode.
  """
  start = (1 - mdp.discount) * mdp.initial
  return linear.solve(_resolvent(mdp, policy).T, start)


def optimal(mdp: MDP) -> tuple[chex.Array, chex.Array]:
  """An optimal deterministic policy `[S, A]` and its value `[S]`.

  Policy iteration, exact: it ends when no action is better than the policy's
  by more than rounding (Howard 1960; it is Newton's method on Bellman's
  equation, Puterman and Brumelle 1979).
  """
  num_actions = mdp.reward.shape[1]
  one_hot = lambda action: jax.nn.one_hot(
    action, num_actions, dtype=mdp.reward.dtype
  )
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


def _resolvent(mdp: MDP, policy: chex.Array) -> chex.Array:
  """`I - g P`, `[S, S]`."""
  transition = policy_transition(mdp, policy)
  identity = jnp.eye(transition.shape[0], dtype=transition.dtype)
  return identity - mdp.discount * transition
