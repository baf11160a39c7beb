"""Candidate actions where actions cannot be enumerated.

All functions give back the model with other `actions`, for
`lookahead.lookahead`. Without one of them a model with a `distribution` (its
actions are drawn) is refused by it; tree searches have `search.sampled`.

Axes: `N` nodes, `K` candidates, `P` parameters of a distribution.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from search import lookahead, rollout
from search.model import Model
from search.roots import check_range


class SampledNode(NamedTuple):
  """A node's embedding.

  Attributes:
    state: pytree `[N, ...]`, the model's own embedding.
    prior_logits: float32 `[N, P]`, what the policy draws from.
  """

  state: Any
  prior_logits: chex.Array


def sampled(
  model: Model, num: int, policy: str | rollout.Policy = 'sample'
) -> Model:
  """The model whose candidates are drawn from a policy at every node.

  Args:
    model: any, with a `distribution` or not.
    num: K, at least 1. Where the model has a distribution, the first candidate
      is its mode.
    policy: of the proposals, as in `rollout.truncated`.

  Returns:
    A `Model` with `actions`, whose embeddings are `SampledNode`.

  Raises:
    ValueError: an argument is out of range.
  """
  check_range('num', num, low=1)
  propose = rollout.as_policy(model, policy)
  family = model.distribution

  def root(params, timestep, key):
    inner = model.root(params, timestep, key)
    node = SampledNode(inner.embedding, inner.prior_logits)
    return inner.replace(embedding=node)

  def step(params, key, action, embedding):
    output, state = model.step(params, key, action, embedding.state)
    return output, SampledNode(state, output.prior_logits)

  def outcomes(params, action, embedding):
    assert model.outcomes is not None
    probability, output, state = model.outcomes(params, action, embedding.state)
    return probability, output, SampledNode(state, output.prior_logits)

  def actions(params, key, embedding):
    draw = lambda key: propose(
      params, key, embedding.prior_logits, embedding.state
    )
    drawn = jax.vmap(draw, out_axes=1)(jax.random.split(key, num))
    if family is not None:
      drawn = drawn.at[:, 0].set(family.mode(embedding.prior_logits))
    return drawn

  return Model(
    root,
    step,
    actions=actions,
    outcomes=None if model.outcomes is None else outcomes,
    distribution=family,
  )


def best(model: Model, num: int) -> Model:
  """The model whose candidates are the best few, one step ahead.

  Which they are is said by Q = r + d V after one `model.step`, an evaluation a
  candidate. Taken before `rollout.truncated`, it leaves rollouts to moves that
  are worth one; their policy must not read prior logits, which are not sorted
  with the candidates: `rollout.greedy(model)`, `rollout.acting`.

  Args:
    model: with `actions` `[N, K, ...]`. Repetitions of the first are spare;
      others count as candidates of their own.
    num: of candidates that are left, at least 1, best first; where K is not
      larger, all as they are proposed.

  Returns:
    A `Model` of the same embeddings.

  Raises:
    ValueError: `num` is out of range, or the model proposes nothing.
  """
  check_range('num', num, low=1)
  propose = model.actions
  if propose is None:
    raise ValueError(
      'model.actions is None: best chooses among candidates, and this model '
      'proposes none'
    )
  ranked = model._replace(outcomes=None)

  def actions(params, key, embedding):
    propose_key, key = jax.random.split(key)
    proposed = propose(params, propose_key, embedding)
    size = jax.tree.leaves(proposed)[0].shape[1]
    if size <= num:
      return proposed
    _, output, _ = lookahead.expand(
      ranked, params, key, *lookahead.pairs(proposed, embedding)
    )
    q = lookahead.backup(jnp.ones_like(output.value), output, output.value)
    q = q.reshape(-1, size)
    q = jnp.where(lookahead.is_spare(proposed), -jnp.inf, q)
    q, slots = jax.lax.top_k(q, num)
    slots = jnp.where(jnp.isneginf(q), slots[:, :1], slots)
    rows = jnp.arange(slots.shape[0])[:, None]
    return jax.tree.map(lambda x: x[rows, slots], proposed)

  return model._replace(actions=actions)


def refined(
  model: Model,
  steps: int,
  learning_rate: chex.Numeric,
  low: chex.Numeric,
  high: chex.Numeric,
) -> Model:
  """The model whose candidates have climbed the gradient of Q.

  Each candidate takes `steps` steps of gradient ascent on Q(s, a) = E[r + d V]
  through the model, within bounds; where one makes Q worse it is taken back and
  that candidate's rate is halved.

  Args:
    model: with real `actions` `[N, K, D]`, and differentiable in them.
    steps: gradients a candidate, at least 1; each costs an evaluation forth
      and back, and there is one more before the first.
    learning_rate: above 0, of the first step; may be traced.
    low: least action, a number or `[D]`.
    high: largest action.

  Raises:
    ValueError: an argument is out of range, or the model proposes nothing.
  """
  check_range('steps', steps, low=1)
  check_range('learning_rate', learning_rate, above=0)
  propose = model.actions
  if propose is None:
    raise ValueError(
      'model.actions is None: refined improves candidates; take '
      'candidates.sampled(model, num) first'
    )

  def actions(params, key, embedding):
    propose_key, key = jax.random.split(key)
    start = propose(params, propose_key, embedding)
    shape = start.shape
    start, node = lookahead.pairs(start, embedding)

    def total(action):
      # One key for all steps: they climb one hill, whatever chance does.
      probability, output, _ = lookahead.expand(
        model, params, key, action, node
      )
      q = lookahead.backup(probability, output, output.value)
      return jnp.sum(q), q

    def q_and_slope(action):
      (_, q), slope = jax.value_and_grad(total, has_aux=True)(action)
      return q, slope

    def clip(action):
      bounds = (jnp.broadcast_to(x, action.shape) for x in (low, high))
      return jnp.clip(action, *bounds)

    def climb(carry, _):
      action, q, slope, rate = carry
      new = clip(action + rate[:, None] * slope)
      new_q, new_slope = q_and_slope(new)
      # Near the top Q is flat to rounding, while the slope still shows the way.
      rounding = 4 * jnp.finfo(q.dtype).eps * jnp.abs(q)
      is_better = new_q >= q - rounding
      choose = lambda new, old: jnp.where(
        is_better.reshape(-1, *(new.ndim - 1) * (1,)), new, old
      )
      return (
        choose(new, action),
        choose(new_q, q),
        choose(new_slope, slope),
        jnp.where(is_better, rate, rate / 2),
      ), None

    action = clip(start)
    q, slope = q_and_slope(action)
    rate = jnp.full_like(q, learning_rate)
    carry = action, q, slope, rate
    (action, *_), _ = jax.lax.scan(climb, carry, length=steps)
    return action.reshape(shape)

  return model._replace(actions=actions)
