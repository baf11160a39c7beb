"""Random games as tables with chance, and what they are worth by recursion."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Discrete, Spec
from search.model import Game, Move, TimeStep, exact


class TableGame(NamedTuple):
  """`S` states, `A` actions, `C` chance outcomes; all numpy.

  Attributes:
    child: int32 `[S, A, C]`, the next state.
    probability: float32 `[S, A, C]`.
    reward: float32 `[S, A, C]`.
    discount: float32 `[S, A, C]`, in {-1, 0, 1}.
    invalid: bool `[S, A]`.
    logits: float32 `[S, A]`, a network's opinion.
    value: float32 `[S]`, likewise.
  """

  child: np.ndarray
  probability: np.ndarray
  reward: np.ndarray
  discount: np.ndarray
  invalid: np.ndarray
  logits: np.ndarray
  value: np.ndarray

  @property
  def params(self):
    return jnp.asarray(self.logits), jnp.asarray(self.value)


def random_game(seed, *, num_states=12, num_actions=3, chances=1):
  """A game where either player may move next, and some edges end it."""
  rng = np.random.default_rng(seed)
  shape = (num_states, num_actions, chances)
  invalid = rng.random(shape[:2]) < 0.3
  valid = rng.integers(num_actions, size=num_states)
  invalid[np.arange(num_states), valid] = False
  return TableGame(
    child=rng.integers(num_states, size=shape).astype('i4'),
    probability=rng.dirichlet(np.ones(chances), shape[:2]).astype('f4'),
    reward=rng.normal(size=shape).astype('f4'),
    discount=rng.choice([-1, 0, 1], size=shape, p=[0.5, 0.2, 0.3]).astype('f4'),
    invalid=invalid,
    logits=rng.normal(size=shape[:2]).astype('f4'),
    value=rng.normal(size=num_states).astype('f4'),
  )


def rules(tables):
  """The `Game`; chance is listed where there are two outcomes or more."""
  _, num_actions, chances = tables.child.shape
  child, reward, discount, chance, invalid = map(
    jnp.asarray,
    (
      tables.child,
      tables.reward,
      tables.discount,
      tables.probability,
      tables.invalid,
    ),
  )

  def outcomes(state, action):
    at = (state, action)
    return chance[at], Move(child[at], reward[at], discount[at])

  def step(state, action, key):
    probability, move = outcomes(state, action)
    drawn = jax.random.categorical(key, jnp.log(probability))
    return jax.tree.map(lambda x: x[drawn], move)

  return Game(
    init=lambda key: jnp.int32(0),
    step=step,
    observe=lambda state: state,
    invalid_actions=lambda state: invalid[state],
    player=lambda state: jnp.int32(0),
    spec=Spec(ArraySpec((), np.int32), Discrete(num_actions)),
    outcomes=outcomes if chances > 1 else None,
  )


def table_model(tables, gamma=1.0):
  """The exact model; its parameters are `tables.params`."""
  opinion = lambda params, state: jax.tree.map(lambda x: x[state], params)
  return exact(rules(tables), opinion, gamma)


def arrive(states, tables=None):
  """Time steps at states `[B]`, with the masks of `tables`."""
  states = jnp.asarray(states, jnp.int32)
  return TimeStep(
    observation=states,
    reward=jnp.zeros(states.shape),
    discount=jnp.ones(states.shape),
    is_first=jnp.zeros(states.shape, bool),
    truncated=jnp.zeros(states.shape, bool),
    invalid_actions=None
    if tables is None
    else jnp.asarray(tables.invalid)[states],
  )


def tree_qvalues(tables, state, depth, keep=None, leaf=None, gamma=1.0):
  """Q of all actions by plain recursion, -inf where they are not looked at.

  Args:
    tables: the game.
    state: int.
    depth: stages.
    keep: `(state, stage) -> actions` that are looked at; None for the valid.
    leaf: `(state) -> value`; None for the tables'.
    gamma: discount a move.
  """
  keep = keep or (lambda state, stage: np.flatnonzero(~tables.invalid[state]))
  leaf = leaf or (lambda state: tables.value[state])

  def values(state, stage):
    q = np.full(tables.child.shape[1], -np.inf)
    for action in keep(state, stage):
      q[action] = 0
      for chance in range(tables.child.shape[2]):
        at = (state, action, chance)
        following = tables.child[at]
        behind = 0.0
        if tables.discount[at] != 0:
          if stage == depth - 1:
            behind = leaf(following)
          else:
            behind = max(values(following, stage + 1))
        total = tables.reward[at] + gamma * tables.discount[at] * behind
        q[action] += tables.probability[at] * total
    return q

  return values(state, 0)
