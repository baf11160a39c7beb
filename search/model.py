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
import mctx


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
    action: `[B]` (or `[B, ...]` for continuous actions), what to do.
    action_weights: float32 `[B, A]`, sums to one: the improved policy, which
      is the target for the policy network. Over `sampled_actions` where there
      are any, `[B, K]`, 0 at spare slots.
    value: float32 `[B]`, the planner's estimate of the root's value.
    search_tree: the mctx tree where there is one, else None. It keeps every
      embedding alive: drop it before it leaves a compiled function.
    sampled_actions: `[B, K, ...]`, the actions that the root chose among;
      None where all are enumerated.
  """

  action: chex.Array
  action_weights: chex.Array
  value: chex.Array
  search_tree: Any = None
  sampled_actions: chex.Array | None = None
