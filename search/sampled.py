"""Search over sampled actions, for sets that cannot be enumerated.

Sampled MuZero (Hubert et al. 2021, "Learning and planning in complex action
spaces"). At every node K actions are drawn from a proposal beta and ride in
the node's embedding; the tree sees the slots 0 ... K - 1, so that every rule
of `search.policies` works on them unchanged. A slot's prior is

  prior(a) ~ beta_hat(a) / beta(a) * pi(a),    beta ~ pi ** (1 / tau),

with beta_hat the empirical frequencies: an action drawn twice has one slot of
twice the weight, and the other slot is spare (logit at the lowest number, at
the root invalid besides). With tau = 1 the prior is beta_hat: pi decides which
actions are there, not what they weigh.

At the root Dirichlet noise is mixed into both pi and beta, the same draw, so
that it brings in actions which pi would not and leaves their weights right;
and all K actions are evaluated before the search, which gives each its Q until
its first visit (the paper's Appendix A; reported as very important).

Choices of ours:

- An evaluation at the root is no visit: the policy target counts visits only.
- `with_mode` lets the policy's mode take the place of the root's first draw,
  for play without exploration: few samples may all lie far from it.
- `replacement=False` draws K *distinct* actions of an enumerated set (Gumbel
  top-k) and divides by their inclusion probabilities (Kool et al. 2019)
  instead of by beta. With K = A that is every action, each with prior pi: the
  tree is MuZero's.
- A real-valued distribution is tempered, and its noise drawn, as
  `networks.actions` says.

Axes: `B` batch, `K` slots for sampled actions, `A` actions, `P` parameters of
a distribution; an action is `[...]`.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx
import numpy as np

from search import policies, rows
from search.model import PolicyOutput
from search.roots import as_bool, check_range, sample

_LOWEST = float(jnp.finfo(jnp.float32).min)
# What distributions give for the logarithm of zero.
_LOG_TINY = float(np.log(np.finfo(np.float32).tiny))
# The numbers that nodes below the root draw from, in multiples of K: so many
# that rows share little of their luck, and as many whatever the batch.
_POOL = 256


class SampledEmbedding(NamedTuple):
  """A node's embedding.

  Attributes:
    state: pytree `[B, ...]`, the model's own embedding.
    actions: int32 or float32 `[B, K, ...]`, what the node's slots stand for.
  """

  state: Any
  actions: chex.Array


class Proposal(NamedTuple):
  """Actions to choose among.

  Attributes:
    actions: int32 or float32 `[B, K, ...]`.
    logits: float32 `[B, K]`, of the priors; the lowest number at spare slots.
    is_spare: bool `[B, K]`.
  """

  actions: chex.Array
  logits: chex.Array
  is_spare: chex.Array


def check(distribution: Any, num_samples: int, replacement: bool) -> None:
  """Checks that K actions can be drawn.

  Args:
    distribution: a `networks.actions.ActionDistribution`.
    num_samples: K.
    replacement: as in `propose`.

  Raises:
    ValueError: naming what the distribution cannot do.
  """
  if num_samples < 1:
    raise ValueError(f'num_samples={num_samples}: must be at least 1')
  if replacement:
    return
  if distribution.distinct is None:
    raise ValueError(
      'replacement=False: needs a flat categorical over enumerated actions; '
      'other distributions draw with replacement'
    )
  if num_samples > distribution.num_actions:
    raise ValueError(
      f'num_samples={num_samples}: without replacement at most the '
      f'{distribution.num_actions} actions that there are'
    )


def merge(identity: chex.Array) -> chex.Array:
  """Counts equal actions in the first slot that holds one.

  Args:
    identity: int32 `[B, K]`, equal where actions are.

  Returns:
    float32 `[B, K]`, how often each action was drawn, 0 at spare slots; a row
    sums to K.

  >>> merge(jnp.array([[7, 5, 7, 7]])).tolist()
  [[3.0, 1.0, 0.0, 0.0]]
  """
  chex.assert_rank(identity, 2)
  size = identity.shape[1]
  same = identity[:, :, None] == identity[:, None, :]
  # One sum for both questions, how often and whether before: an earlier equal
  # weighs more than all counts. Over the middle axis, which vectorises.
  before = np.tri(size, size, -1, dtype=np.int32).T
  total = jnp.sum(jnp.where(same, 1 + (size + 1) * before[None], 0), axis=1)
  return jnp.where(total > size, 0, total).astype(jnp.float32)


def prior_logits(
  counts: chex.Array, log_pi: chex.Array, log_beta: chex.Array
) -> chex.Array:
  """Logits of `beta_hat / beta * pi` over the slots, float32 `[B, K]`.

  Args:
    counts: float32 `[B, K]`, draws of each slot's action; 0 if spare.
    log_pi: float32 `[B, K]`, the policy's log-probability of it.
    log_beta: float32 `[B, K]`, the proposal's.
  """
  chex.assert_equal_shape([counts, log_pi, log_beta])
  logits = jnp.log(jnp.maximum(counts, 1)) + log_pi - log_beta
  return jnp.where(counts > 0, logits, _LOWEST)


def propose(
  key: chex.PRNGKey,
  distribution: Any,
  parameters: chex.Array,
  num_samples: int,
  *,
  temperature: chex.Numeric = 1.0,
  replacement: bool = True,
  noise: policies.Noise = policies.NO_NOISE,
  invalid_actions: chex.Array | None = None,
  draws: chex.Array | None = None,
  with_mode: bool = False,
) -> Proposal:
  """Draws the action set of a node.

  Args:
    key: consumed.
    distribution: a `networks.actions.ActionDistribution`.
    parameters: float32 `[B, P]`, of pi.
    num_samples: K; static.
    temperature: tau of the proposal `pi ** (1 / tau)`, above 0.
    replacement: draw independently; else K distinct actions.
    noise: in both pi and beta.
    invalid_actions: bool `[B, A]`; None for none.
    draws: float32 `[B, K, R]`, random numbers of `distribution.draw`; None to
      draw them here.
    with_mode: the first draw is the mode of pi (with replacement only).

  Returns:
    `Proposal`.

  Raises:
    ValueError: if `num_samples` or `temperature` is out of range, or the
      distribution cannot do what is asked.
  """
  check(distribution, num_samples, replacement)
  check_range('sample_temperature', temperature, above=0)
  if invalid_actions is not None:
    if distribution.mask is None:
      raise ValueError(
        'invalid_actions: only a flat categorical over enumerated actions can '
        'be masked'
      )
    parameters = distribution.mask(parameters, invalid_actions)
  is_plain = _is(temperature, 1)
  beta = parameters
  if not is_plain:
    beta = distribution.temper(parameters, temperature)
  noise_key, *keys = jax.random.split(key, 4)
  mixed, batch = None, parameters.shape[0]
  if not noise.is_none:
    drawn = distribution.noise(
      rows.split(noise_key, batch), parameters, noise.alpha
    )
    mixed = _Mixed(drawn, noise.fraction)
  if replacement:
    actions = _independent(
      keys, distribution, parameters, beta, num_samples, mixed, draws, with_mode
    )
    counts = merge(distribution.identity(actions))
    # Where pi is beta, nothing is left of their ratio.
    log_pi = log_beta = jnp.zeros_like(counts)
    if not is_plain:
      log_pi, log_beta = (
        _log_mixture(distribution, x, mixed, actions)
        for x in (parameters, beta)
      )
  else:
    if mixed is not None:
      parameters, beta = (
        distribution.mixture(x, *mixed) for x in (parameters, beta)
      )
    actions, log_beta = distribution.distinct(
      rows.split(keys[0], batch), beta, num_samples
    )
    log_pi = distribution.log_prob(parameters, actions)
    # An action without probability only fills a slot that was left over.
    counts = (log_pi > _LOG_TINY).astype(log_pi.dtype)

  if invalid_actions is not None:
    # An invalid one too.
    is_invalid = jnp.take_along_axis(as_bool(invalid_actions), actions, axis=1)
    counts = jnp.where(is_invalid, 0, counts)
  return Proposal(actions, prior_logits(counts, log_pi, log_beta), counts == 0)


class _Mixed(NamedTuple):
  """What is mixed into a policy: noise drawn for each row, and its share."""

  noise: Any
  fraction: chex.Numeric


def _independent(
  keys, distribution, parameters, beta, num_samples, mixed, draws, with_mode
):
  """K independent draws `[B, K, ...]` of beta, some of them of the noise."""
  shape = (parameters.shape[0], num_samples)
  if draws is None:
    draws = rows.draw(distribution.draw, keys[0], shape)
  actions = distribution.sample(draws, beta)
  if with_mode:
    actions = actions.at[:, 0].set(distribution.mode(parameters))
  if mixed is None:
    return actions
  others = distribution.noise_sample(
    rows.split(keys[1], shape[0]), mixed.noise, num_samples
  )
  pick = rows.draw(
    lambda key, shape: jax.random.bernoulli(key, mixed.fraction, shape),
    keys[2],
    shape,
  )
  pick = pick.reshape(pick.shape + (1,) * (actions.ndim - 2))
  return jnp.where(pick, others, actions)


def _log_mixture(distribution, parameters, mixed, actions):
  """Log-probabilities `[B, K]` of a policy with the noise mixed in."""
  log_prob = distribution.log_prob(parameters, actions)
  if mixed is None:
    return log_prob
  return jnp.logaddexp(
    jnp.log1p(-mixed.fraction) + log_prob,
    jnp.log(mixed.fraction) + distribution.noise_log_prob(mixed.noise, actions),
  )


def slot_recurrent_fn(
  inner: mctx.RecurrentFn,
  distribution: Any,
  num_samples: int,
  *,
  temperature: chex.Numeric = 1.0,
  replacement: bool = True,
  pool: chex.Array | None = None,
) -> Callable[..., tuple[mctx.RecurrentFnOutput, SampledEmbedding]]:
  """A recurrent function over slots from one over real actions.

  Args:
    inner: `(params, key, action [B, ...], state) -> (mctx.RecurrentFnOutput,
      state)`, a `Model.step`, value prefixes included, whose `prior_logits`
      are the distribution's parameters `[B, P]`.
    distribution: a `networks.actions.ActionDistribution`.
    num_samples: K.
    temperature: of the proposal.
    replacement: as in `propose`.
    pool: float32 `[M, R]`, random numbers of `distribution.draw`, from which
      each node takes K in a row from an independent random place. A node's
      own set is distributed as it should be; sets of different nodes, of other
      rows too, may share numbers, in exchange for a search that does not draw
      a variate a slot. None draws afresh at each node.

  Returns:
    `(params, key, slot int32 [B], SampledEmbedding) ->
    (mctx.RecurrentFnOutput of [B, K] logits, SampledEmbedding)`.
  """

  def step(params, key, slot, embedding):
    step_key, sample_key = jax.random.split(key)
    action = take(embedding.actions, slot)
    output, state = inner(params, step_key, action, embedding.state)
    draws = None
    if pool is not None:
      draws = _from_pool(sample_key, pool, slot.shape[0], num_samples)
    proposal = propose(
      sample_key,
      distribution,
      output.prior_logits,
      num_samples,
      temperature=temperature,
      replacement=replacement,
      draws=draws,
    )
    output = output.replace(prior_logits=proposal.logits)
    return output, SampledEmbedding(state, proposal.actions)

  return step


def search(
  params: Any,
  key: chex.PRNGKey,
  root: mctx.RootFnOutput,
  recurrent_fn: mctx.RecurrentFn,
  num_simulations: int,
  *,
  distribution: Any,
  num_samples: int = 20,
  rule: Callable[..., PolicyOutput] = policies.puct,
  sample_temperature: chex.Numeric = 1.0,
  replacement: bool = True,
  evaluate_root: bool = True,
  with_mode: bool = False,
  noise: policies.Noise = policies.NOISE,
  invalid_actions: chex.Array | None = None,
  evaluate: bool = False,
  **kwargs: Any,
) -> PolicyOutput:
  """Any rule's search, over sampled actions.

  Args:
    params: passed to `recurrent_fn`.
    key: consumed.
    root: `prior_logits` are the parameters of pi, `[B, P]`; value `[B]`,
      embedding pytree `[B, ...]`.
    recurrent_fn: over real actions, see `slot_recurrent_fn`'s `inner`.
    num_simulations: simulations for each root, at least 1; the evaluation of
      the root's actions is not counted.
    distribution: a `networks.actions.ActionDistribution`.
    num_samples: K, at every node; static.
    rule: `policies.puct`, `policies.efficientzero` or `policies.gumbel`.
    sample_temperature: tau of the proposal `pi ** (1 / tau)`.
    replacement: draw independently; False for K distinct actions.
    evaluate_root: evaluate the root's actions before the search.
    with_mode: the root's first draw is the policy's mode.
    noise: in the root's pi and beta.
    invalid_actions: bool `[B, A]`, for enumerated sets only.
    evaluate: no noise, the rule's best action. What is drawn still depends on
      the key.
    **kwargs: the rule's own.

  Returns:
    `PolicyOutput` with the real action, weights `[B, K]` over
    `sampled_actions`, and a tree over slots.

  Raises:
    ValueError: if an argument is out of range or does not fit the
      distribution.
  """
  policies.check_noise(noise)
  propose_key, value_key, pool_key, search_key = jax.random.split(key, 4)
  shared = {'temperature': sample_temperature, 'replacement': replacement}
  proposal = propose(
    propose_key,
    distribution,
    root.prior_logits,
    num_samples,
    noise=policies.NO_NOISE if evaluate else noise,
    invalid_actions=invalid_actions,
    with_mode=with_mode,
    **shared,
  )
  qvalues = None
  if evaluate_root:
    qvalues = evaluate_actions(
      params, value_key, recurrent_fn, proposal.actions, root.embedding
    )
  pool = None
  if replacement:
    pool = distribution.draw(pool_key, (num_samples * _POOL,))
  step = slot_recurrent_fn(
    recurrent_fn, distribution, num_samples, pool=pool, **shared
  )
  # Its noise is in the proposal already.
  if 'noise' in inspect.signature(rule).parameters:
    kwargs['noise'] = policies.NO_NOISE
  output = rule(
    params,
    search_key,
    mctx.RootFnOutput(
      prior_logits=proposal.logits,
      value=root.value,
      embedding=SampledEmbedding(root.embedding, proposal.actions),
    ),
    step,
    num_simulations,
    invalid_actions=proposal.is_spare,
    root_qvalues=qvalues,
    evaluate=evaluate,
    **kwargs,
  )
  return output._replace(
    action=take(proposal.actions, output.action),
    sampled_actions=proposal.actions,
  )


def raw(
  params: Any,
  key: chex.PRNGKey,
  root: mctx.RootFnOutput,
  recurrent_fn: mctx.RecurrentFn | None = None,
  num_simulations: int = 0,
  *,
  distribution: Any,
  num_samples: int = 20,
  sample_temperature: chex.Numeric = 1.0,
  replacement: bool = True,
  temperature: chex.Numeric = 1.0,
  invalid_actions: chex.Array | None = None,
  evaluate: bool = False,
) -> PolicyOutput:
  """No search: an action of the network's own policy, and its value.

  Args:
    params: ignored, as are `recurrent_fn` and `num_simulations`.
    key: consumed.
    root: parameters of pi `[B, P]`, value `[B]`.
    recurrent_fn: ignored.
    num_simulations: ignored.
    distribution: a `networks.actions.ActionDistribution`.
    num_samples: K.
    sample_temperature: tau of the proposal.
    replacement: as in `propose`.
    temperature: of the choice among the sampled actions; may be traced.
    invalid_actions: bool `[B, A]`, for enumerated sets only.
    evaluate: take the distribution's mode.

  Returns:
    `action_weights` are the priors of the sampled actions, `[B, K]`.

  Raises:
    ValueError: as `propose`.
  """
  del params, recurrent_fn, num_simulations
  propose_key, action_key = jax.random.split(key)
  proposal = propose(
    propose_key,
    distribution,
    root.prior_logits,
    num_samples,
    temperature=sample_temperature,
    replacement=replacement,
    invalid_actions=invalid_actions,
  )
  weights = jax.nn.softmax(proposal.logits)
  if evaluate:
    parameters = root.prior_logits
    if invalid_actions is not None:
      parameters = distribution.mask(parameters, invalid_actions)
    action = distribution.mode(parameters)
  else:
    best = jnp.argmax(weights, axis=-1).astype(jnp.int32)
    slot = sample(action_key, weights, best, temperature)
    action = take(proposal.actions, slot)
  return PolicyOutput(
    action, weights, root.value, sampled_actions=proposal.actions
  )


def evaluate_actions(
  params: Any,
  key: chex.PRNGKey,
  recurrent_fn: mctx.RecurrentFn,
  actions: chex.Array,
  embedding: Any,
) -> chex.Array:
  """One-step Qs `r + discount * v` of several actions a node, `[B, K]`.

  Args:
    params: passed to `recurrent_fn`.
    key: consumed.
    recurrent_fn: over real actions; called once, with `B * K` rows.
    actions: `[B, K, ...]`.
    embedding: pytree `[B, ...]`.
  """
  batch_size, num_samples = actions.shape[:2]
  repeat = lambda x: jnp.repeat(x, num_samples, axis=0)
  output, _ = recurrent_fn(
    params,
    key,
    actions.reshape((-1,) + actions.shape[2:]),
    jax.tree.map(repeat, embedding),
  )
  qvalues = output.reward + output.discount * output.value
  return qvalues.reshape(batch_size, num_samples)


def take(actions: chex.Array, slot: chex.Array) -> chex.Array:
  """The action of each row's slot: `[B, K, ...]`, int32 `[B]` to `[B, ...]`."""
  return actions[jnp.arange(actions.shape[0]), slot]


def _from_pool(key, pool, batch_size, num_samples):
  """K numbers in a row for each of `B` nodes, from places of their own."""
  last = pool.shape[0] - num_samples
  start = rows.draw(
    lambda key, shape: jax.random.randint(key, shape, 0, last + 1),
    key,
    (batch_size,),
  )
  return jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(pool, i, num_samples))(
    start
  )


def _is(value, number) -> bool:
  """Whether a value is known, before tracing, to be that number."""
  return isinstance(value, int | float) and value == number
