"""What planners plan in: time steps, environments and models.

Axes: `B` batch, `A` actions. An `Environment` is unbatched (callers `vmap`);
a `TimeStep` that reaches an agent or a model has a leading `B` on every leaf.

Time: `TimeStep` number `t` holds the observation `o_t` and what was received
*on arriving* there. An episode of `T` decisions therefore has `T + 1` time
steps; the last one has `discount == 0` (terminated) or `truncated` (cut), and
the action chosen on it is ignored: the next time step is the first of the
next episode. Nothing is ever trained on that ignored action.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx

from search import rows


class TimeStep(NamedTuple):
  """What an agent sees after one step of an environment.

  Attributes:
    observation: pytree of arrays, `[B, ...]`, in the simulator's own dtype
      (uint8 for frames).
    reward: float32 `[B]`, received on arriving here; 0 on a first step.
    discount: float32 `[B]`, 0 if the episode terminated here, else 1. It does
      not include the agent's gamma.
    is_first: bool `[B]`, the first step of an episode.
    truncated: bool `[B]`, the episode was cut here though it could have gone
      on: bootstrap from this observation.
    invalid_actions: bool `[B, A]`, True where an action may not be taken;
      None where all actions are always legal.
  """

  observation: Any
  reward: chex.Array
  discount: chex.Array
  is_first: chex.Array
  truncated: chex.Array
  invalid_actions: chex.Array | None = None

  def is_last(self) -> chex.Array:
    """Whether the episode ends here, bool `[B]`."""
    return (self.discount == 0) | self.truncated


class Environment(NamedTuple):
  """A simulator as pure functions of one (unbatched) state.

  Attributes:
    reset: `(key) -> (env_state, TimeStep)`.
    step: `(env_state, action, key) -> (env_state, TimeStep)`. It does not
      restart by itself: a source does, on the step after the last one.
    spec: the `agents.core.types.Spec` of its observations and actions.
  """

  reset: Callable[[chex.PRNGKey], tuple[Any, TimeStep]]
  step: Callable[[Any, chex.Array, chex.PRNGKey], tuple[Any, TimeStep]]
  spec: Any


class Move(NamedTuple):
  """What a move of a game leads to.

  Attributes:
    state: the position after it.
    reward: float32 `[]`, of the player who moved.
    discount: float32 `[]`, what the value of `state`, seen by its own mover,
      is worth to the player who moved: 0 where the game is over, -1 where the
      other one moves next, 1 where the same one goes on.
  """

  state: Any
  reward: chex.Array
  discount: chex.Array


class Game(NamedTuple):
  """Exact rules, pure functions of one (unbatched) position.

  A position is a pytree of arrays that holds all that the future depends on,
  so that search may start from it and go through it. A game that is over stays
  as it is: its moves get reward 0 and discount 0.

  Attributes:
    init: `(key) -> state`.
    step: `(state, action, key) -> Move`. An illegal action must not be given.
    observe: `(state) -> observation`, a pytree that a network can take, as
      the player to move sees it.
    invalid_actions: `(state) -> bool [A]`, all False where the game is over;
      None where `candidates` lists what can be done.
    player: `(state) -> int32`, 0 or 1: who moves.
    spec: the `agents.core.types.Spec` of what `observe` returns, and of the
      actions.
    candidates: `(state) -> actions [K, ...]`, all that can be done, where
      actions are not small numbers; the first one is repeated in the places
      that are left. None where `invalid_actions` says it.
    outcomes: `(state, action) -> (probability [C], Move of [C, ...])`, the
      chance outcomes of an action; None where there is no chance.
  """

  init: Callable[[chex.PRNGKey], Any]
  step: Callable[[Any, chex.Array, chex.PRNGKey], Move]
  observe: Callable[[Any], Any]
  invalid_actions: Callable[[Any], chex.Array] | None
  player: Callable[[Any], chex.Array]
  spec: Any
  candidates: Callable[[Any], chex.Array] | None = None
  outcomes: Callable[[Any, chex.Array], tuple[chex.Array, Move]] | None = None


class Model(NamedTuple):
  """What a planner plans in: learned by an agent, or an exact simulator.

  Attributes:
    root: `(params, timestep, key) -> mctx.RootFnOutput`, the prior logits
      `[B, A]`, value `[B]` and embedding of the current observation.
    step: `(params, key, action, embedding) -> (mctx.RecurrentFnOutput,
      embedding)`, mctx's `recurrent_fn`. Its `discount` is the model's own:
      gamma inside, 0 at termination, negative where the mover changes.
    actions: `(params, key, embedding) -> actions [B, K, ...]`, candidates
      where the actions cannot be enumerated; None where they can.
    outcomes: `(params, action, embedding) -> (probability [B, C],
      RecurrentFnOutput of [B, C], embedding of [B, C, ...])`, the chance
      outcomes of an action, for exact expectation; None if deterministic or
      unknown.
    distribution: None where `prior_logits` are those of `A` enumerated
      actions. Otherwise they are the parameters `[B, P]` of this family of
      distributions (`networks.actions`), and the actions that `step` takes
      are drawn from it, `[B, ...]`: see `search.sampled`.
  """

  root: Callable[..., mctx.RootFnOutput]
  step: Callable[..., tuple[mctx.RecurrentFnOutput, Any]]
  actions: Callable[..., chex.Array] | None = None
  outcomes: Callable[..., tuple[chex.Array, Any, Any]] | None = None
  distribution: Any = None


class PolicyOutput(NamedTuple):
  """What a planner decided.

  Attributes:
    action: int32 `[B]` (or float32 `[B, ...]` for continuous actions), what
      to do.
    action_weights: float32 `[B, A]`, sums to one: the improved policy, which
      is the target for the policy network. Over `sampled_actions` where there
      are any, `[B, K]`, 0 at spare slots.
    value: float32 `[B]`, the planner's estimate of the root's value.
    search_tree: the mctx tree where there is one, else None. It keeps every
      embedding alive: drop it before it leaves a compiled function.
    sampled_actions: int32 or float32 `[B, K, ...]`, the actions that the root
      chose among; None where all are enumerated.
    qvalues: float32 `[B, A]`, or `[B, K]` of sampled actions: what each is
      worth, -inf where it was not looked at. None where a tree says it.
  """

  action: chex.Array
  action_weights: chex.Array
  value: chex.Array
  search_tree: Any = None
  sampled_actions: chex.Array | None = None
  qvalues: chex.Array | None = None


def exact(
  game: Game, evaluate: Callable[..., Any], gamma: float = 1.0
) -> Model:
  """The rules of a game and a network's opinion of positions, as a model.

  Its embedding is the position, and so is the observation of the time steps
  that its `root` takes (`experiments.envs.self_play` makes such).

  Args:
    game: the rules.
    evaluate: `(params, observation [B, ...]) -> (prior_logits [B, A], value
      [B])`, the value as the player to move sees it. What it says of illegal
      actions, and of games that are over, is not used. Where the game lists
      candidates, prior logits are `[B, K]`, of any finite numbers.
    gamma: discount a move, in (0, 1].

  Returns:
    A `Model` of batched functions.
  """

  def opinion(params, state):
    logits, value = evaluate(params, jax.vmap(game.observe)(state))
    if game.invalid_actions is not None:
      invalid = jax.vmap(game.invalid_actions)(state)
      logits = jnp.where(invalid, -jnp.inf, logits)
    return logits, value

  def root(params, timestep, key):
    del key
    logits, value = opinion(params, timestep.observation)
    return mctx.RootFnOutput(
      prior_logits=logits, value=value, embedding=timestep.observation
    )

  def step(params, key, action, embedding):
    keys = rows.split(key, action.shape[0])
    move = jax.vmap(game.step)(embedding, action, keys)
    logits, value = opinion(params, move.state)
    return recurrent(move, logits, value), move.state

  def recurrent(move, logits, value):
    return mctx.RecurrentFnOutput(
      reward=move.reward,
      discount=gamma * move.discount,
      prior_logits=logits,
      value=jnp.where(move.discount == 0, 0.0, value),
    )

  def actions(params, key, embedding):
    del params, key
    assert game.candidates is not None
    return jax.vmap(game.candidates)(embedding)

  def outcomes(params, action, embedding):
    assert game.outcomes is not None
    probability, move = jax.vmap(game.outcomes)(embedding, action)
    batch, chances = probability.shape
    flat = jax.tree.map(
      lambda x: x.reshape(batch * chances, *x.shape[2:]), move
    )
    logits, value = opinion(params, flat.state)
    output = recurrent(flat, logits, value)
    back = lambda x: x.reshape(batch, chances, *x.shape[1:])
    return (
      probability,
      jax.tree.map(back, output),
      jax.tree.map(back, flat.state),
    )

  return Model(
    root,
    step,
    actions=None if game.candidates is None else actions,
    outcomes=None if game.outcomes is None else outcomes,
  )
