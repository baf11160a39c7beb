"""Targets for agents that unroll a model over windows of experience.

Axes: `L` steps of a window, `K` unrolled steps, `n` the longest bootstrap
horizon (`L >= K + n + 1`). All functions take one window; callers `vmap`.

Time: `r[k]` and `discount[k]` are received on arriving at step `k`.
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp


def n_step_values(
  r_t: chex.Array,
  discount_t: chex.Array,
  truncated_t: chex.Array,
  v_t: chex.Array,
  horizon: chex.Numeric,
  *,
  gamma: chex.Numeric,
  max_horizon: int,
) -> chex.Array:
  """n-step returns with one bootstrap, for a horizon that may be traced.

  `z_k = sum_{i=1..l} gamma^{i-1} r_{k+i} + gamma^l v_{k+l}`, where the sum and
  the bootstrap stop at a termination, and a truncation is bootstrapped from
  the last observation, however short of `l` it falls.

  Args:
    r_t: float32 `[L]`.
    discount_t: float32 `[L]`, 0 at termination, else 1.
    truncated_t: bool `[L]`.
    v_t: float32 `[L]`, values of the observations.
    horizon: int32 scalar `l`, in `[1, max_horizon]`.
    gamma: the discount per step.
    max_horizon: `n`, the static bound.

  Returns:
    float32 `[L - max_horizon]`, meaningless from an episode's end on.

  Source: MuZero (Schrittwieser 2020), Appendix G; the dynamic horizon is
  EfficientZero (Ye 2021), equation 4.

  >>> r, discount = jnp.array([0.0, 1, 2, 4, 8]), jnp.array([1.0, 1, 1, 0, 1])
  >>> cut, v = jnp.zeros(5, bool), jnp.array([0.0, 0, 16, 0, 0])
  >>> n_step_values(r, discount, cut, v, 2, gamma=0.5, max_horizon=2).tolist()
  [6.0, 4.0, 4.0]
  """
  chex.assert_rank([r_t, discount_t, truncated_t, v_t], 1)
  chex.assert_equal_shape([r_t, discount_t, truncated_t, v_t])
  count = r_t.shape[0] - max_horizon
  returns = jnp.zeros((count,), v_t.dtype)
  # The weight of what is received next: 0 once the episode has ended.
  weight = jnp.ones((count,), v_t.dtype)
  for i in range(1, max_horizon + 1):
    r, discount, cut, v = (
      x[i : i + count] for x in (r_t, discount_t, truncated_t, v_t)
    )
    returns += weight * r
    weight = weight * gamma * discount
    bootstrap = cut | (i >= horizon)
    returns += jnp.where(bootstrap, weight * v, 0.0)
    weight = jnp.where(bootstrap, 0.0, weight)
    # After the bootstrap nothing is added: the weight is zero from here on.
  return returns


class UnrollTargets(NamedTuple):
  """What the unrolled model is trained towards, `K + 1` steps of one window.

  After a *termination* the state is absorbing, as in MuZero's Appendix G: value
  and reward are trained to 0 there, since a search goes beyond the ends of
  episodes. After a *truncation* nothing is known and every mask is 0.

  Attributes:
    value: float32 `[K + 1]`.
    reward: float32 `[K + 1]`; entry 0 is not used.
    value_mask: float32 `[K + 1]`.
    reward_mask: float32 `[K + 1]`; entry 0 is 0.
    policy_mask: float32 `[K + 1]`; 0 where no decision was taken.
    observation_mask: float32 `[K + 1]`, the observation is the true successor.
  """

  value: chex.Array
  reward: chex.Array
  value_mask: chex.Array
  reward_mask: chex.Array
  policy_mask: chex.Array
  observation_mask: chex.Array


def unroll_targets(
  r_t: chex.Array,
  discount_t: chex.Array,
  truncated_t: chex.Array,
  valid_t: chex.Array,
  v_t: chex.Array,
  horizon: chex.Numeric,
  *,
  gamma: chex.Numeric,
  unroll_steps: int,
  max_horizon: int,
) -> UnrollTargets:
  """Targets and masks of one window, see `UnrollTargets`.

  Args:
    r_t: float32 `[L]`.
    discount_t: float32 `[L]`.
    truncated_t: bool `[L]`.
    valid_t: bool `[L]`, the row belongs to the episode of row 0.
    v_t: float32 `[L]`, values to bootstrap from.
    horizon: int32 scalar, at most `max_horizon`.
    gamma: the discount per step.
    unroll_steps: `K`.
    max_horizon: `n`, with `L >= K + n + 1`.

  Returns:
    `UnrollTargets`.

  Raises:
    ValueError: the window is too short for them.

  Source: MuZero (Schrittwieser 2020), Appendix G.
  """
  chex.assert_equal_shape([r_t, discount_t, truncated_t, valid_t, v_t])
  if r_t.shape[0] < unroll_steps + max_horizon + 1:
    raise ValueError(
      f'a window has {r_t.shape[0]} steps, needed are unroll_steps + '
      f'max_horizon + 1 = {unroll_steps + max_horizon + 1}'
    )
  values = n_step_values(
    r_t,
    discount_t,
    truncated_t,
    v_t,
    horizon,
    gamma=gamma,
    max_horizon=max_horizon,
  )
  k = slice(0, unroll_steps + 1)
  valid, cut = valid_t[k], truncated_t[k]
  last = valid & ((discount_t[k] == 0) | cut)
  terminated = valid_t & (discount_t == 0)
  absorbed = (jnp.cumsum(terminated) > 0)[k]  # from the terminal row on
  decides = valid & ~last
  known = (valid | absorbed).at[0].set(False)
  as_float = lambda x: x.astype(jnp.float32)
  return UnrollTargets(
    value=jnp.where(decides, values[k], 0.0),
    reward=jnp.where(valid, r_t[k], 0.0),
    value_mask=as_float(decides | absorbed),
    reward_mask=as_float(known),
    policy_mask=as_float(decides),
    observation_mask=as_float(valid),
  )


def value_prefixes(reward: chex.Array, reset_every: int) -> chex.Array:
  """Sums of rewards since the last reset, undiscounted.

  `x_k = sum_{j=1..k} r_j`, started anew after every `reset_every`-th step,
  where the recurrent state of the prefix network is reset too.

  Args:
    reward: float32 `[K + 1]`, entry 0 is ignored.
    reset_every: steps between resets.

  Returns:
    float32 `[K + 1]`, entry 0 is 0.

  Source: EfficientZero (Ye 2021), section 4.2.

  >>> value_prefixes(jnp.array([0.0, 1, 2, 3, 4]), reset_every=2).tolist()
  [0.0, 1.0, 3.0, 3.0, 7.0]
  """
  chex.assert_rank(reward, 1)
  reward = reward.at[0].set(0.0)
  steps = jnp.arange(reward.shape[0])
  total = jnp.cumsum(reward)
  # Step k counts from the last multiple of the horizon strictly below it.
  start = jnp.where(steps > 0, (steps - 1) // reset_every * reset_every, 0)
  return total - total[start]


def off_policy_horizon(
  age: chex.Array,
  *,
  max_horizon: int,
  total_decisions: chex.Numeric,
  fraction: chex.Numeric = 0.3,
) -> chex.Array:
  """The bootstrap horizon for data of a certain age.

  `l = clip(n - floor(age / (fraction * total)), 1, n)`: the older the data,
  the less its rewards say about the present policy.

  Args:
    age: float32 `[B]`, decisions taken since the row was written.
    max_horizon: `n`.
    total_decisions: decisions in the whole run.
    fraction: the paper's tau.

  Returns:
    int32 `[B]`.

  Source: EfficientZero (Ye 2021), equation 5.

  >>> age = jnp.array([0.0, 299, 300, 1e6])
  >>> off_policy_horizon(age, max_horizon=5, total_decisions=1000).tolist()
  [5, 5, 4, 1]
  """
  drop = jnp.floor(age / (fraction * total_decisions)).astype(jnp.int32)
  return jnp.clip(max_horizon - drop, 1, max_horizon)


def is_searched(
  step: chex.Array,
  age: chex.Array,
  *,
  after: chex.Numeric,
  fresh: chex.Numeric,
) -> chex.Array:
  """For which rows a search's value is the target, and not an n-step return.

  For old data, once its search is worth something: `step >= after` and `age >=
  fresh`. Early in training, and for data of nearly the present policy, rewards
  say more than the model does.

  Args:
    step: int32 scalar, updates so far.
    age: float32 `[B]`, decisions taken since the row was written.
    after: T_1, in updates.
    fresh: T_2, in decisions.

  Returns:
    bool `[B]`.

  Source: EfficientZero V2 (Wang 2024), section 4.3.

  >>> age = jnp.array([0.0, 19, 20])
  >>> [is_searched(i, age, after=40, fresh=20).tolist() for i in (39, 40)]
  [[False, False, False], [False, False, True]]
  """
  return (step >= after) & (age >= fresh)
