"""Uses of a learned ensemble of dynamics: predict, imagine, plan.

Axes: `B` batch, `E` members, `M` rollouts, `h` their length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx

from agents.core.types import Transition
from networks.actor_critic import flatten
from networks.ensemble import Ensemble, Prediction, unflatten
from search.model import Model


class ModelParams(NamedTuple):
  """A learned ensemble.

  Attributes:
    network: parameters of all members, leaves `[E, ...]`.
    elites: int32 `[number of elites]`, the members that predict.
  """

  network: Any
  elites: chex.Array


class Predicted(NamedTuple):
  """One step of the model.

  Attributes:
    o_t: observation pytree `[B, ...]`.
    r_t: float32 `[B]`.
    discount_t: float32 `[B]`, 0 where the episode ends; the chance that it
      does not, where the step is an expected one.
    aleatoric: float32 `[B]`, the largest elite's norm of the standard
      deviations: the uncertainty that MOPO (Yu 2020, section 4.3) takes.
    disagreement: float32 `[B]`, the largest distance of an elite's mean from
      the mean of all.
  """

  o_t: Any
  r_t: chex.Array
  discount_t: chex.Array
  aleatoric: chex.Array
  disagreement: chex.Array


def predict(
  ensemble: Ensemble,
  params: ModelParams,
  key: chex.PRNGKey,
  observation: Any,
  action: chex.Array,
) -> Predicted:
  """Draws a step: each row from one elite, chosen at random.

  Args:
    ensemble: from `networks.ensemble`.
    params: its parameters.
    key: consumed; split into the elite's, the normal's, the ending's.
    observation: pytree `[B, ...]`.
    action: `[B, D]`, in its own units.

  Source: MBPO (Janner et al. 2019), Algorithm 2: a member at random, each step.
  """
  keys = jax.random.split(key, 3)
  out = _elites(ensemble, params, observation, action)
  rows = jnp.arange(action.shape[0])
  which = jax.random.randint(keys[0], rows.shape, 0, out.mean.shape[0])
  one = Prediction(*(x[which, rows] for x in out))
  mean = jnp.concatenate([one.mean, one.reward], -1)
  std = jnp.exp(jnp.concatenate([one.log_std, one.reward_log_std], -1))
  drawn = mean + std * jax.random.normal(keys[1], mean.shape)
  ends = jax.random.uniform(keys[2], rows.shape) < jax.nn.sigmoid(one.logit)
  size = one.mean.shape[-1]
  return _predicted(
    ensemble.known,
    out,
    (observation, action, drawn[:, :size]),
    drawn[:, size:],
    ends.astype(mean.dtype),
  )


def expect(
  ensemble: Ensemble, params: ModelParams, observation: Any, action: chex.Array
) -> Predicted:
  """The step that the elites expect on average.

  Args:
    ensemble: from `networks.ensemble`.
    params: its parameters.
    observation: pytree `[B, ...]`.
    action: `[B, D]`, in its own units.
  """
  out = _elites(ensemble, params, observation, action)
  # Each elite's own reward of a step that ends goes by its own chance of it.
  share = out.cases()
  ends = jnp.mean(share[..., 1], 0)
  return _predicted(
    ensemble.known,
    out,
    (observation, action, jnp.mean(out.mean, 0)),
    jnp.mean(out.reward * share, 0) / jnp.maximum(jnp.mean(share, 0), 1e-30),
    ends,
  )


def imagine(
  ensemble: Ensemble,
  params: ModelParams,
  policy: Callable[[Any, chex.PRNGKey], chex.Array],
  observation: Any,
  key: chex.PRNGKey,
  length: int,
) -> Transition:
  """Rollouts of a policy in the model, as transitions.

  All rows may be trained on: where an episode ends, its rollout starts again at
  the observation it was given.

  Args:
    ensemble: from `networks.ensemble`.
    params: its parameters.
    policy: `(observation, key) -> action [M, D]`.
    observation: pytree `[M, ...]`, where rollouts begin.
    key: consumed; step i has the i-th of `split(key, h)`, split once more into
      the policy's and `predict`'s.
    length: h.

  Returns:
    `[h M]` rows, the step varying slowest.
  """
  begin = jax.tree.map(lambda x: x.astype(jnp.float32), observation)

  def step(o_tm1, key):
    policy_key, model_key = jax.random.split(key)
    action = policy(o_tm1, policy_key)
    out = predict(ensemble, params, model_key, o_tm1, action)
    row = Transition(o_tm1, action, out.r_t, out.discount_t, out.o_t)

    def go_on(first, following):
      ends = out.discount_t.reshape((-1,) + (1,) * (first.ndim - 1)) == 0
      return jnp.where(ends, first, following)

    return jax.tree.map(go_on, begin, out.o_t), row

  _, rows = jax.lax.scan(step, begin, jax.random.split(key, length))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def planning_model(
  ensemble: Ensemble,
  select: Callable[[Any], ModelParams],
  distribution: Any,
  *,
  gamma: chex.Numeric,
  prior: Callable[[Any, Any], chex.Array] | None = None,
  value: Callable[[Any, Any], chex.Array] | None = None,
) -> Model:
  """The ensemble's expected steps as what a planner plans in.

  Args:
    ensemble: from `networks.ensemble`.
    select: `(params) -> ModelParams`, the model's among an agent's.
    distribution: of actions, from `networks.actions`.
    gamma: discount per decision.
    prior: `(params, observation) -> [B, P]`, parameters of the distribution;
      None for zeros.
    value: `(params, observation) -> [B]`; None for 0.

  Returns:
    `Model` whose embeddings are observations.
  """

  def evaluate(params, observation):
    rows = jax.tree.leaves(observation)[0].shape[0]
    logits = jnp.zeros((rows, distribution.num_parameters))
    if prior is not None:
      logits = prior(params, observation)
    values = jnp.zeros((rows,)) if value is None else value(params, observation)
    return {'prior_logits': logits, 'value': values}

  def root(params, timestep, key):
    del key
    observation = jax.tree.map(
      lambda x: x.astype(jnp.float32), timestep.observation
    )
    return mctx.RootFnOutput(
      embedding=observation, **evaluate(params, observation)
    )

  def step(params, key, action, embedding):
    del key
    out = expect(ensemble, select(params), embedding, action)
    output = mctx.RecurrentFnOutput(
      reward=out.r_t,
      discount=gamma * out.discount_t,
      **evaluate(params, out.o_t),
    )
    return output, out.o_t

  return Model(root=root, step=step, distribution=distribution)


def _elites(ensemble, params, observation, action) -> Prediction:
  network = jax.tree.map(lambda x: x[params.elites], params.network)
  return ensemble.apply(network, observation, action)


def _predicted(known, out: Prediction, step, reward, ends) -> Predicted:
  """A step `(observation, action, change)`, `reward [B, 2]` of either case."""
  observation, action, change = step
  o_t = unflatten(flatten(observation) + change, observation)
  seen = jax.tree.map(lambda x: x.astype(jnp.float32), observation)
  if known.termination is not None:
    ends = known.termination(seen, action, o_t)
  r_t = reward[:, 0] * (1.0 - ends) + reward[:, 1] * ends
  if known.reward is not None:
    r_t = known.reward(seen, action, o_t)
  norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), -1))
  expected, std = _moments(out)
  away = expected - jnp.mean(expected, 0, keepdims=True)
  return Predicted(
    o_t=o_t,
    r_t=r_t,
    discount_t=1.0 - ends,
    aleatoric=jnp.max(norm(std), 0),
    disagreement=jnp.max(norm(away), 0),
  )


def _moments(out: Prediction) -> tuple[chex.Array, chex.Array]:
  """Each member's mean and deviation of change and reward, `[E, B, F + 1]`."""
  share, mean = out.cases(), out.expected_reward()[..., None]
  variance = jnp.exp(2.0 * out.reward_log_std) + jnp.square(out.reward - mean)
  std = jnp.sqrt(jnp.sum(share * variance, -1, keepdims=True))
  return (
    jnp.concatenate([out.mean, mean], -1),
    jnp.concatenate([jnp.exp(out.log_std), std], -1),
  )
