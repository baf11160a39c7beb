"""Policy improvement from sampled actions: the theory of Sampled MuZero.

Hubert et al. 2021, "Learning and planning in complex action spaces", section
4. An improvement operator is *action-independent* if one number of the state
couples its actions: `I pi(a) = f(a, Z)`, where Z makes it sum to one. From K
actions drawn from a proposal beta, of empirical frequencies beta_hat, it is
estimated by `I_hat(a) = (beta_hat / beta)(a) f(a, Z_hat)`, where Z_hat makes
*that* sum to one. Why this converges, for any numbers X(a), with w = f / beta,
`mean` over the K samples, and f' = df/dZ:

1. Z_hat solves `mean[w(., Z_hat)] = 1`. For each z, `E_beta w(., z)` is
   `F(z) = sum_a f(a, z)`, so this equation tends to `F(Z) = 1`, and, F being
   strictly monotone, its root to Z, almost surely.
2. To first order `0 = mean[w] - 1 + (Z_hat - Z) sum_a f'`, w being taken at Z,
3. and the estimate is `sum_a I_hat X = mean[w X] + (Z_hat - Z) sum_a f' X`.
4. Put 2 into 3: `mean[w X] - c (mean[w] - 1) = c + mean[w (X - c)]`, where
   `c = sum_a f' X / sum_a f'` averages X over the actions by how they respond
   to Z.
5. That is a mean of K independent numbers. Its expectation is `E_{I pi} X`,
   since `E_beta w = 1`, so the central limit theorem gives
   `sqrt(K) (estimate - E_{I pi} X) -> Normal(0, sigma^2)`.
6. `sigma^2 = Var_beta[w (X - c)]`. It is not `Var_beta[w X]`, the variance if
   Z were known: by 4 the error of the sampled mass is taken off c times.

Both operators here are `f(a, Z) = pi(a) g(Q(a) - Z)` with an increasing g, so
Z is a soft maximum of Q in its own units, and beta_hat / beta may as well
multiply the prior: that is all that a search over sampled actions changes.

Axes: `A` actions; `K` slots, which hold the sampled actions (one each, or
merged, or spare). Functions take one state: `vmap` them. They are not meant
to be differentiated.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from search.roots import check_range

# Each halves the logarithm of a bracket that spans at most all of float32.
_HALVINGS = 34


class Operator(NamedTuple):
  """The improvement `prior(a) g(Q(a) - Z)`, where Z makes it sum to one.

  Attributes:
    log_g: `(u) -> log g(u)`, elementwise and increasing, for u = Q - Z.
    solve: `(log_prior [A], advantages [A]) -> Z []` for a prior of any mass,
      -inf where an action takes no part, and advantages whose maximum over
      the others is 0.
  """

  log_g: Callable[[chex.Array], chex.Array]
  solve: Callable[[chex.Array, chex.Array], chex.Array]


def mpo(eta: chex.Numeric) -> Operator:
  """The operator `prior(a) exp((Q(a) - Z) / eta)`.

  It maximises `E_y Q - eta KL(y, prior)` over policies y (Abdolmaleki et al.
  2018, "Maximum a posteriori policy optimisation"). Z is
  `eta log sum_a prior(a) exp(Q(a) / eta)`.

  Args:
    eta: temperature in units of Q, above 0; may be traced.

  Raises:
    ValueError: if `eta` is not above 0.
  """
  check_range('eta', eta, above=0)

  def solve(log_prior, advantages):
    return eta * jax.nn.logsumexp(log_prior + advantages / eta)

  return Operator(lambda u: u / eta, solve)


def puct(lam: chex.Numeric) -> Operator:
  """The operator `lam prior(a) / (Z - Q(a))` with Z > max Q.

  It maximises `E_y Q - lam KL(prior, y)` over policies y, and MCTS's visits
  tend to it (Grill et al. 2020, "MCTS as regularized policy optimization"):
  with the rule `Q + c sqrt(N) prior / (1 + n)` the `(1 + n) / (N + A)` of N
  visits are it for `lam = c sqrt(N) / (N + A)`.

  Let `m = lam prior`. At `Z = max_a(Q + m)` one term alone is 1 and none is
  negative; at `Z = max Q + sum_a m` no term exceeds `m / sum m`. So the root
  of the decreasing sum lies between them and is found by bisection.

  It gives weight to the best action however small its prior, so K must be
  large enough to draw such actions before the limit is near.

  Args:
    lam: weight of the prior in units of Q, above 0; may be traced.

  Raises:
    ValueError: if `lam` is not above 0.
  """
  check_range('lam', lam, above=0)

  def solve(log_prior, advantages):
    mass = lam * jnp.exp(log_prior)
    # Z - max Q may be tiny compared with its bracket: halve its logarithm.
    tiny = jnp.finfo(mass.dtype).tiny
    low = jnp.maximum(jnp.max(mass + advantages), tiny)
    high = jnp.maximum(jnp.sum(mass), low)
    middle_of = lambda low, high: jnp.sqrt(low) * jnp.sqrt(high)

    def halve(_, bracket):
      low, high = bracket
      middle = middle_of(low, high)
      is_low = jnp.sum(mass / (middle - advantages)) > 1
      return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

    return middle_of(*jax.lax.fori_loop(0, _HALVINGS, halve, (low, high)))

  return Operator(lambda u: jnp.log(lam) - jnp.log(-u), solve)


def improve(
  operator: Operator, log_prior: chex.Array, qvalues: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """Applies an operator to all actions of a state.

  Args:
    operator: such as `mpo(eta)`.
    log_prior: float32 `[A]`, -inf where an action takes no part; at least one
      must. It need not sum to one.
    qvalues: float32 `[A]`.

  Returns:
    The improved policy, float32 `[A]`, and its Z, float32 `[]`, in units of
    Q. The policy is not normalised again: how far its sum is from 1 says how
    exactly Z solves its equation.

  >>> policy, z = improve(mpo(1.0), jnp.log(jnp.full(2, 0.5)), jnp.arange(2.0))
  >>> [round(p, 3) for p in policy.tolist()], round(z.item(), 3)
  ([0.269, 0.731], 0.62)
  """
  advantages, top = _advantages(log_prior, qvalues)
  z = operator.solve(log_prior, advantages)
  return jnp.exp(log_prior + operator.log_g(advantages - z)), top + z


def _advantages(
  log_prior: chex.Array, qvalues: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """Q minus its maximum where there is prior, 0 elsewhere; the maximum."""
  # Z - Q would lose its digits where Q is large.
  takes_part = log_prior > -jnp.inf
  top = jnp.max(jnp.where(takes_part, qvalues, -jnp.inf))
  return jnp.where(takes_part, qvalues - top, 0.0), top


def estimate(
  operator: Operator,
  log_prior: chex.Array,
  log_beta: chex.Array,
  qvalues: chex.Array,
  counts: chex.Array,
) -> tuple[chex.Array, chex.Array]:
  """Estimates an improved policy from sampled actions.

  Args:
    operator: such as `mpo(eta)`.
    log_prior: float32 `[K]`, log pi of each slot's action.
    log_beta: float32 `[K]`, its log probability, or log density, under the
      proposal, in the prior's measure.
    qvalues: float32 `[K]`.
    counts: `[K]`, how often the action was drawn: all ones if each slot is a
      sample, 0 for a spare slot, whose other numbers are then ignored.

  Returns:
    I_hat of the slots, float32 `[K]`, 0 in spare ones, and Z_hat, float32
    `[]`, as `improve` gives them.
  """
  prior = corrected_log_prior(log_prior, log_beta, counts)
  return improve(operator, prior, qvalues)


def corrected_log_prior(
  log_prior: chex.Array, log_beta: chex.Array, counts: chex.Array
) -> chex.Array:
  """`log(beta_hat / beta pi)` of each slot, -inf in spare ones, `[K]`.

  Its mass is 1 in expectation only, and is not to be normalised where the
  operator is not `mpo`: the theorem's Z_hat is that of this prior.

  Args:
    log_prior: float32 `[K]`, see `estimate`.
    log_beta: float32 `[K]`, as in `estimate`.
    counts: `[K]`, as in `estimate`.
  """
  log_frequency = _log_frequency(counts)
  ratio = jnp.where(counts > 0, log_prior - log_beta, 0.0)
  return log_frequency + ratio


def uncorrected_log_prior(
  log_prior: chex.Array, counts: chex.Array
) -> chex.Array:
  """`log(beta_hat pi)`, normalised: the samples' plain priors, `[K]`.

  What becomes of the prior if beta_hat / beta is forgotten and the sampled
  actions' probabilities are normalised: improving it tends to the improvement
  of `beta pi`, a prior sharper than pi, whatever K. (Equal priors for all
  samples are `uncorrected_log_prior` of a constant; they tend to the
  improvement of beta, which is right for beta = pi alone.)

  Args:
    log_prior: float32 `[K]`, see `estimate`.
    counts: `[K]`, as in `estimate`.
  """
  log_frequency = _log_frequency(counts)
  known = jnp.where(counts > 0, log_prior, 0.0)
  return jax.nn.log_softmax(log_frequency + known)


def _log_frequency(counts: chex.Array) -> chex.Array:
  return jnp.log(counts / jnp.sum(counts))


def asymptotic_variance(
  operator: Operator,
  log_prior: chex.Array,
  log_beta: chex.Array,
  qvalues: chex.Array,
  x: chex.Array,
) -> chex.Array:
  """`sigma^2 = Var_beta[f / beta (X - c)]`, float32 `[]`.

  K times the variance of `sum_a I_hat(a) X(a)` tends to it (the argument is
  the module's). c is the mean of X with weights `df/dZ`: for `mpo` those are
  the improved policy itself and this is self-normalised importance sampling;
  for `puct` they are `(I pi)^2 / pi`, so the best actions weigh most.

  Args:
    operator: such as `mpo(eta)`.
    log_prior: float32 `[A]`, log pi of all actions.
    log_beta: float32 `[A]`, finite where the prior is.
    qvalues: float32 `[A]`.
    x: float32 `[A]`, what is averaged over the improved policy.
  """
  advantages, _ = _advantages(log_prior, qvalues)
  z = operator.solve(log_prior, advantages)
  f = lambda z: jnp.exp(log_prior + operator.log_g(advantages - z))
  improved, slope = jax.jvp(f, (z,), (jnp.ones_like(z),))
  centred = x - jnp.sum(slope * x) / jnp.sum(slope)
  # An action that cannot be drawn has no prior either.
  ratio = jnp.where(improved > 0, improved * jnp.exp(-log_beta), 0.0)
  mean = jnp.sum(improved * centred)
  beta = jnp.exp(log_beta)
  return jnp.sum(beta * jnp.square(ratio * centred - mean))
