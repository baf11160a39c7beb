"""Leaves of conservative critics: the actions of the penalty, its soft maximum.

Axes: `B` batch, `D` components of an action, `n` samples of a kind, `S = 3n`
candidates, `E` critics. Densities are with respect to the unit box.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core import actor_critic, losses
from agents.core.types import Transition
from networks.actor_critic import Gaussian, Squash


class Losses(NamedTuple):
  """The terms, each of `[B]` rows; replace one with `losses._replace`.

  Attributes:
    critic: `(q_tm1, r_t, discount_t, target_v_t) -> [B]` of one critic.
    soft_maximum: `(q [B, S], log_densities [B, S]) -> [B]` of one critic, what
      the penalty pushes down.
    policy: `(log_prob, q, temperature) -> [B]`, `q` the least of the critics'.
    temperature: `(log_temperature, log_prob, target_entropy) -> [B]`.
  """

  critic: Callable[..., chex.Array]
  soft_maximum: Callable[..., chex.Array]
  policy: Callable[..., chex.Array]
  temperature: Callable[..., chex.Array]


def make_losses() -> Losses:
  """CQL's terms, policy and temperature as SAC's (Kumar et al. 2020)."""
  return Losses(
    critic=losses.squared_error,
    soft_maximum=soft_maximum,
    policy=actor_critic.soft_policy,
    temperature=actor_critic.temperature,
  )


class Noise(NamedTuple):
  """All random numbers of an update.

  Attributes:
    tm1: normal float32 `[B, D]`, of new actions at the batch's observations.
    t: normal float32 `[B, D]`, of actions at the next observations.
    uniform: float32 `[B, n, D]` in `[-1, 1)`, the penalty's uniform actions.
    samples_tm1: normal float32 `[B, n, D]`, the penalty's of the policy.
    samples_t: normal float32 `[B, n, D]`, the penalty's of the policy at the
      next observations.
  """

  tm1: chex.Array
  t: chex.Array
  uniform: chex.Array
  samples_tm1: chex.Array
  samples_t: chex.Array


def draw_noise(key: chex.PRNGKey, action: chex.Array, samples: int) -> Noise:
  """The noise of an update.

  `split(key)` gives SAC's two, so that without a penalty the update is SAC's;
  `split(fold_in(key, 1), 3)` gives the penalty's, in the order of `Noise`.

  Args:
    key: consumed.
    action: `[B, D]`, the batch's, of which only the shape counts.
    samples: n, of each kind.
  """
  shape = (action.shape[0], samples, action.shape[1])
  normal = jax.random.normal
  tm1, t = (normal(k, action.shape) for k in jax.random.split(key))
  keys = jax.random.split(jax.random.fold_in(key, 1), 3)
  uniform = jax.random.uniform(keys[0], shape, minval=-1.0)
  return Noise(tm1, t, uniform, *(normal(k, shape) for k in keys[1:]))


def candidates(
  box: Squash, gaussian_tm1: Gaussian, gaussian_t: Gaussian, noise: Noise
) -> tuple[chex.Array, chex.Array]:
  """Actions that importance sampling integrates over, and their densities.

  A third of them is uniform, a third the policy's, and a third the policy's at
  the *next* observation, each with the density that it was drawn with.

  Args:
    box: squashes Gaussians.
    gaussian_tm1: `[B, D]`, the policy at the batch's observations.
    gaussian_t: `[B, D]`, the policy at the next ones.
    noise: of the update.

  Returns:
    Actions `[B, S, D]` and log-densities float32 `[B, S]`.

  Source: CQL (Kumar et al. 2020), Appendix F; official code, `min_q_version=3`.
  """
  uniform = box.from_unit(noise.uniform)
  size = noise.uniform.shape[-1]
  parts = [(uniform, jnp.full(uniform.shape[:2], -size * math.log(2)))]
  for gaussian, normal in (
    (gaussian_tm1, noise.samples_tm1),
    (gaussian_t, noise.samples_t),
  ):
    each = Gaussian(gaussian.mean[:, None], gaussian.std[:, None])
    parts.append(box.sample(normal, each))
  actions, log_densities = zip(*parts)
  return jnp.concatenate(actions, 1), jnp.concatenate(log_densities, 1)


def q_values(
  apply: Callable[..., chex.Array],
  params: Any,
  observation: Any,
  actions: chex.Array,
) -> chex.Array:
  """Q of several actions per observation and critic, float32 `[E, B, S]`.

  Args:
    apply: `(params, observation, action [B, D]) -> [E, B]`.
    params: of the critics.
    observation: pytree `[B, ...]`.
    actions: `[B, S, D]`.
  """
  rows, samples, size = actions.shape
  observation = jax.tree.map(
    lambda x: jnp.repeat(x, samples, axis=0), observation
  )
  q = apply(params, observation, actions.reshape(rows * samples, size))
  return q.reshape(-1, rows, samples)


def soft_maximum(q: chex.Array, log_densities: chex.Array) -> chex.Array:
  """`log int exp q(a) da` over the unit box, by importance sampling.

  `log 1/S sum_s exp(q_s) / density_s`: the bound of all q from above that CQL
  pushes down.

  Args:
    q: float32 `[B, S]`.
    log_densities: float32 `[B, S]`, that the actions were drawn with; no
      gradient flows into them.

  Returns:
    float32 `[B]`.

  Source: CQL (Kumar et al. 2020), Appendix F. The official code leaves out
  the `1/S`, which no gradient sees but a Lagrangian's threshold does.
  """
  chex.assert_rank([q, log_densities], 2)
  chex.assert_equal_shape([q, log_densities])
  weighted = q - jax.lax.stop_gradient(log_densities)
  return jax.nn.logsumexp(weighted, axis=-1) - math.log(q.shape[-1])


class Errors(NamedTuple):
  """Errors of conservative critics, before any mean over rows.

  Attributes:
    squares: float32 `[E, B]`, Bellman errors.
    q: float32 `[E, B]`, of the recorded actions.
    high: float32 `[E, B]`, the soft maxima over all actions.
    target: float32 `[B]`, what `q` regresses onto.
  """

  squares: chex.Array
  q: chex.Array
  high: chex.Array
  target: chex.Array


def critic_errors(
  config: Any,
  networks: Any,
  terms: Losses,
  critic: Any,
  target_critic: Any,
  params: Any,
  batch: Transition,
  noise: Noise,
) -> Errors:
  """Errors of critics on a batch, and the soft maxima that a penalty takes.

  Args:
    config: with `gamma` and `deterministic_backup`.
    networks: with `policy`, `critic` and `box`.
    terms: of which `critic` and `soft_maximum` are taken.
    critic: parameters of the critics.
    target_critic: of their targets.
    params: an agent's, with `policy` and `log_temperature`.
    batch: `B` transitions.
    noise: of the update.

  Source: CQL (Kumar et al. 2020), equation 4 and Appendix F.
  """
  policy_net, critic_net, box = networks[:3]
  gaussian_tm1 = policy_net.apply(params.policy, batch.o_tm1)
  gaussian_t = policy_net.apply(params.policy, batch.o_t)
  action, log_prob = box.sample(noise.t, gaussian_t)
  target_v = jnp.min(critic_net.apply(target_critic, batch.o_t, action), 0)
  if not config.deterministic_backup:
    target_v += -jnp.exp(params.log_temperature) * log_prob
  q = critic_net.apply(critic, batch.o_tm1, batch.a_tm1)
  discount = config.gamma * batch.discount_t
  squares = jax.vmap(lambda q: terms.critic(q, batch.r_t, discount, target_v))(
    q
  )
  drawn, densities = candidates(box, gaussian_tm1, gaussian_t, noise)
  every = q_values(critic_net.apply, critic, batch.o_tm1, drawn)
  high = jax.vmap(lambda q: terms.soft_maximum(q, densities))(every)
  return Errors(squares, q, high, batch.r_t + discount * target_v)
