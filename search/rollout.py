"""Truncated rollout with terminal value, as a model with other values.

`truncated` takes a model and gives one back in which a node is worth what m
steps of a base policy earn from there, and the model's own value at their end:
T_mu^m J~ in place of J~ (Bertsekas 2022, "Lessons from AlphaZero", 2.3 and
3.4). Every planner takes it: rollout is `lookahead(1)` over it, the book's
combination of l-step lookahead and m-step rollout is `lookahead(l)`, and a
tree search evaluates its leaves so.

Signs come from the model's discounts: both sides of a game play the base
policy. Chance is drawn, once a trial.

Axes: `B` roots, `N` nodes, `A` actions, `C` chance outcomes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from search import lookahead
from search.model import Model, PolicyOutput, TimeStep
from search.roots import as_bool, check_range, mask_logits

# `(params, key, prior_logits [N, A], embedding) -> action [N, ...]`.
Policy = Callable[[Any, chex.PRNGKey, chex.Array, Any], Any]


class RolloutEmbedding(NamedTuple):
  """A node's embedding.

  Attributes:
    state: pytree `[N, ...]`, the model's own embedding.
    luck: uint32 `[N, 2]`, the random numbers of the rollouts from here.
  """

  state: Any
  luck: chex.Array


class _Walk(NamedTuple):
  """A rollout under way, of one row, at a node with this opinion."""

  state: Any
  prior_logits: chex.Array
  value: chex.Array
  total: chex.Array
  discount: chex.Array


def truncated(
  model: Model,
  policy: str | Policy = 'sample',
  *,
  steps: int | None,
  trials: int = 1,
  common: bool = True,
  terminal: bool = True,
) -> Model:
  """The model whose values are those of rollouts.

  A rollout ends where the discount is 0; what comes after adds nothing.

  Args:
    model: any; gamma is in its discounts.
    policy: the base policy: `'sample'` or `'mode'` of the model's prior (of
      the valid actions, of the candidates or of its distribution), or
      `(params, key, prior_logits [N, A], embedding) -> action [N, ...]`, with
      the embeddings of `model`.
    steps: m, at least 0; None to go on until all rows have ended, which they
      must (nothing can be differentiated through that).
    trials: rollouts whose mean is taken.
    common: all actions of a root share their random numbers, step by step and
      chance outcome by chance outcome, so that the difference of two actions
      has little noise; else each node has its own (under a lookahead's `chunk`
      those at the same place of two chunks share them).
    terminal: add the model's value at the end; else 0.

  Returns:
    A `Model` of the same actions, with embeddings `RolloutEmbedding`.

  Raises:
    ValueError: an argument is out of range.
  """
  if steps is not None:
    check_range('steps', steps, low=0)
  check_range('trials', trials, low=1)
  one = _one_rollout(model, as_policy(model, policy), steps, terminal)

  def values(params, luck, prior_logits, value, state):
    """Means over the trials, `[N]`."""

    def trial(number):
      numbers = jnp.broadcast_to(number, value.shape)
      rows = jax.vmap(_other)(luck, numbers), prior_logits, value, state
      return jax.vmap(functools.partial(one, params))(*rows)

    return jnp.mean(jax.vmap(trial)(jnp.arange(trials)), axis=0)

  def root(params, timestep, key):
    root_key, luck_key = jax.random.split(key)
    inner = model.root(params, timestep, root_key)
    prior_logits = inner.prior_logits
    if model.distribution is None and model.actions is None:
      prior_logits = mask_logits(prior_logits, timestep.invalid_actions)
    luck = _luck(luck_key, inner.value.shape[0])
    value = values(params, luck, prior_logits, inner.value, inner.embedding)
    return inner.replace(
      value=value, embedding=RolloutEmbedding(inner.embedding, luck)
    )

  def step(params, key, action, embedding):
    step_key, luck_key = jax.random.split(key)
    output, state = model.step(params, step_key, action, embedding.state)
    luck = embedding.luck
    if not common:
      luck = _luck(luck_key, luck.shape[0])
    return revalued(params, output, state, luck)

  def revalued(params, output, state, luck):
    value = values(params, luck, output.prior_logits, output.value, state)
    value = jnp.where(output.discount == 0, 0, value)
    return output.replace(value=value), RolloutEmbedding(state, luck)

  def outcomes(params, action, embedding):
    assert model.outcomes is not None
    probability, output, state = model.outcomes(params, action, embedding.state)
    shape = probability.shape
    luck = jnp.repeat(embedding.luck, shape[1], axis=0)
    # With numbers of their own the mean over the outcomes has less noise.
    numbers = jnp.arange(luck.shape[0])
    luck = jax.vmap(_other)(luck, numbers % shape[1] if common else numbers)
    merge = lambda x: x.reshape(-1, *x.shape[2:])
    split = lambda x: x.reshape(*shape, *x.shape[1:])
    output, state = jax.tree.map(merge, (output, state))
    after = revalued(params, output, state, luck)
    return probability, *jax.tree.map(split, after)

  def actions(params, key, embedding):
    assert model.actions is not None
    return model.actions(params, key, embedding.state)

  return Model(
    root,
    step,
    actions=None if model.actions is None else actions,
    outcomes=None if model.outcomes is None else outcomes,
    distribution=model.distribution,
  )


def _one_rollout(model, act, steps, terminal):
  """`(params, luck, prior_logits, value, state) -> return`, of a single row."""

  def one(params, luck, prior_logits, value, state):
    def step(number, walk):
      key = jax.random.fold_in(_key(luck), number)
      policy_key, step_key = jax.random.split(key)
      lift = lambda x: x[None]
      node = jax.tree.map(lift, walk.state)
      action = act(params, policy_key, walk.prior_logits[None], node)
      after = model.step(params, step_key, action, node)
      output, state = jax.tree.map(lambda x: x[0], after)
      # A rollout that has ended may get any reward, not only zeros.
      reward = jnp.where(walk.discount == 0, 0, walk.discount * output.reward)
      following = _Walk(
        state,
        output.prior_logits,
        output.value,
        walk.total + reward,
        walk.discount * output.discount,
      )
      return jax.tree.map(lambda x, y: y.astype(x.dtype), walk, following)

    walk = _Walk(
      state, prior_logits, value, jnp.zeros_like(value), jnp.ones_like(value)
    )
    if steps is None:
      _, walk = jax.lax.while_loop(
        lambda carry: carry[1].discount != 0,
        lambda carry: (carry[0] + 1, step(*carry)),
        (jnp.int32(0), walk),
      )
    else:
      walk, _ = jax.lax.scan(
        lambda walk, number: (step(number, walk), None),
        walk,
        jnp.arange(steps),
      )
    if not terminal:
      return walk.total
    end = jnp.where(walk.discount == 0, 0, walk.discount * walk.value)
    return walk.total + end

  return one


def as_policy(model: Model, policy: str | Policy) -> Policy:
  """A base policy as a function.

  Args:
    model: whose prior is followed.
    policy: `'sample'`, `'mode'` or a function, which is returned.

  Returns:
    `(params, key, prior_logits [N, A], embedding) -> action [N, ...]`.

  Raises:
    ValueError: another name.
  """
  if callable(policy):
    return policy
  if policy not in ('sample', 'mode'):
    raise ValueError(
      f"policy={policy!r}: must be 'sample', 'mode' or a function"
    )
  is_sampled = policy == 'sample'
  family = model.distribution
  if family is not None:

    def draw(params, key, prior_logits, embedding):
      del params, embedding
      if not is_sampled:
        return family.mode(prior_logits)
      draws = family.draw(key, (prior_logits.shape[0], 1))
      return family.sample(draws, prior_logits)[:, 0]

    return draw

  def choose(params, key, prior_logits, embedding):
    choice_key, key = jax.random.split(key)
    actions, is_valid = lookahead.choices(
      model, params, choice_key, prior_logits, embedding
    )
    if is_valid.shape != prior_logits.shape:
      raise ValueError(
        f'policy={policy!r}: {is_valid.shape[1]} candidates have no prior of '
        f'their own next to {prior_logits.shape[1]} prior logits; take '
        'rollout.greedy(model) or rollout.acting'
      )
    logits = jnp.where(is_valid, prior_logits, -jnp.inf)
    slot = jnp.argmax(logits, axis=-1)
    if is_sampled:
      slot = jax.random.categorical(key, logits)
    return lookahead.take(actions, slot)

  return choose


def greedy(model: Model) -> Policy:
  """The base policy that looks one step ahead: the action of the highest Q.

  What backgammon programs roll out (Tesauro and Galperin 1996). A step of a
  rollout costs an evaluation of each action, and of each chance outcome where
  `model` lists them.
  """

  def policy(params, key, prior_logits, embedding):
    actions, q = lookahead.qvalues(model, params, key, prior_logits, embedding)
    return lookahead.take(actions, jnp.argmax(q, axis=-1))

  return policy


def acting(act: Callable[..., tuple[Any, Any]]) -> Policy:
  """An agent's `act` or `exploit` as a base policy.

  Args:
    act: `(params, key, timestep) -> (action [N, ...], extras)`, which looks at
      nothing but the observation; the model's embeddings are observations, as
      those of `search.model.exact` are.
  """

  def policy(params, key, prior_logits, embedding):
    del prior_logits
    rows = jax.tree.leaves(embedding)[0].shape[0]
    zeros, no = jnp.zeros((rows,)), jnp.zeros((rows,), bool)
    timestep = TimeStep(embedding, zeros, zeros + 1, no, no)
    return act(params, key, timestep)[0]

  return policy


def one_at_a_time(
  factors: Sequence[int], policy: str | Policy = 'mode'
) -> Callable[[Model, Any, chex.PRNGKey, TimeStep], PolicyOutput]:
  """Makes the planner that optimises an action component by component.

  The multiagent rollout of Bertsekas (2022, section 3.7): each component in
  turn takes its best value, those before it as chosen and those after it as
  the base policy says, with sum(n_i) Qs instead of prod(n_i). If the model's
  values are the base policy's own (`truncated(model, policy, steps=None)`, or
  its exact cost) the result is at least as good in every state.

  Args:
    factors: n_i, sizes of the components in C order, `Discrete.factors`.
    policy: of the base actions, as `truncated`'s.

  Returns:
    `planner(model, params, key, timestep) -> PolicyOutput`; its `value` is
    the Q of what it chose. It looks one step ahead: give it a `truncated`
    model for rollouts; a function `policy` then sees `RolloutEmbedding`s.

  Raises:
    ValueError: there are no factors, one is below 1, or their product is not
      the model's number of actions.
  """
  factors = tuple(factors)
  if not factors:
    raise ValueError('factors=(): must be the sizes of one component or more')
  for number, size in enumerate(factors):
    check_range(f'factors[{number}]', size, low=1)

  def planner(model, params, key, timestep):
    root_key, policy_key, key = jax.random.split(key, 3)
    root = model.root(params, timestep, root_key)
    num_actions = root.prior_logits.shape[1]
    if math.prod(factors) != num_actions or model.actions is not None:
      raise ValueError(
        f'factors={factors}: their product must be the number of enumerated '
        f'actions of the model, {num_actions}'
      )
    invalid = jnp.zeros(root.prior_logits.shape, bool)
    if timestep.invalid_actions is not None:
      invalid = as_bool(timestep.invalid_actions)
    prior_logits = mask_logits(root.prior_logits, invalid)
    action = as_policy(model, policy)(
      params, policy_key, prior_logits, root.embedding
    )
    value, stride = root.value, num_actions
    keys = jax.random.split(key, len(factors))
    for size, step_key in zip(factors, keys):
      stride //= size
      change = jnp.arange(size)[None] - (action // stride % size)[:, None]
      tried = action[:, None] + change * stride
      probability, output, _ = lookahead.expand(
        model, params, step_key, *lookahead.pairs(tried, root.embedding)
      )
      q = lookahead.backup(probability, output, output.value)
      q = q.reshape(tried.shape)
      is_invalid = jnp.take_along_axis(invalid, tried, axis=1)
      # The base action stays possible, whatever the mask says of it.
      q = jnp.where(is_invalid & (change != 0), -jnp.inf, q)
      value = jnp.max(q, axis=-1)
      action = lookahead.take(tried, jnp.argmax(q, axis=-1))
    weights = jax.nn.one_hot(action, num_actions, dtype=value.dtype)
    return PolicyOutput(action.astype(jnp.int32), weights, value)

  return planner


def _luck(key, size):
  """Random numbers of `size` nodes, uint32 `[size, 2]`."""
  return jax.random.bits(key, (size, 2), jnp.uint32)


def _key(luck):
  """A key of random numbers `[2]`; a tree cannot hold keys, but these."""
  return jax.random.wrap_key_data(luck, impl='threefry2x32')


def _other(luck, number):
  """Other random numbers, `[2]`, for each int `number`."""
  return jax.random.key_data(jax.random.fold_in(_key(luck), number))
