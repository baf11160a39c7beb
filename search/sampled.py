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

- An evaluation at the root is not a visit; the policy target counts visits.
- `with_mode` lets the policy's mode take the place of the root's first draw,
  for play without exploration: few samples may all lie far from it.
- `replacement=False` draws K *distinct* actions of an enumerated set (Gumbel
  top-k) and divides by their inclusion probabilities (Kool et al. 2019)
  instead of by beta. With K = A that is every action, each with prior pi: the
  tree is MuZero's.
- A real-valued distribution is tempered, and its noise drawn, as
  `networks.actions` says.

EfficientZero V2's variant (Wang et al. 2024): some of the root's actions are
drawn from a flattened policy (`wide`), all draws weigh alike, and nodes below
the root have fewer actions (`leaf_samples`; their other slots are spare).

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

from search import policies, proposals, rows
from search.model import PolicyOutput
from search.roots import sample

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


def slot_recurrent_fn(
  inner: mctx.RecurrentFn,
  distribution: Any,
  num_samples: int,
  *,
  temperature: chex.Numeric = 1.0,
  replacement: bool = True,
  pool: chex.Array | None = None,
  num_spare: int = 0,
) -> Callable[..., tuple[mctx.RecurrentFnOutput, SampledEmbedding]]:
  """A recurrent function over slots from one over real actions.

  Args:
    inner: `(params, key, action [B, ...], state) -> (mctx.RecurrentFnOutput,
      state)`, a `Model.step`, value prefixes included, whose `prior_logits`
      are the distribution's parameters `[B, P]`.
    distribution: a `networks.actions.ActionDistribution`.
    num_samples: K.
    temperature: of the proposal.
    replacement: as in `proposals.propose`.
    pool: float32 `[M, R]`, random numbers of `distribution.draw`, from which
      each node takes K in a row from an independent random place. A node's
      own set is distributed as it should be; sets of different nodes, of other
      rows too, may share numbers, in exchange for a search that does not draw
      a variate a slot. None draws afresh at each node.
    num_spare: slots in addition to these K that stay spare, where the root has
      more.

  Returns:
    `(params, key, slot int32 [B], SampledEmbedding) ->
    (mctx.RecurrentFnOutput of [B, K] logits, SampledEmbedding)`; K with the
    spare slots.
  """

  def step(params, key, slot, embedding):
    step_key, sample_key = jax.random.split(key)
    action = take(embedding.actions, slot)
    output, state = inner(params, step_key, action, embedding.state)
    draws = None
    if pool is not None:
      draws = _from_pool(sample_key, pool, slot.shape[0], num_samples)
    proposal = proposals.propose(
      sample_key,
      distribution,
      output.prior_logits,
      num_samples,
      temperature=temperature,
      replacement=replacement,
      draws=draws,
    )
    if num_spare:
      proposal = proposals.pad(proposal, num_spare)
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
  wide: proposals.Wide = proposals.NOT_WIDE,
  leaf_samples: int | None = None,
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
    num_samples: K, at the root; static.
    rule: `policies.puct`, `policies.efficientzero` or `policies.gumbel`.
    sample_temperature: tau of the proposal `pi ** (1 / tau)`.
    replacement: draw independently; False for K distinct actions.
    evaluate_root: evaluate the root's actions before the search.
    with_mode: the root's first draw is the policy's mode.
    noise: in the root's pi and beta.
    wide: which of the root's draws are from a flattened policy.
    leaf_samples: actions of nodes below the root, at most K; None for K.
    invalid_actions: bool `[B, A]`, for enumerated sets only.
    evaluate: no noise, no wide draws, the rule's best action. What is drawn
      still depends on the key.
    **kwargs: the rule's own.

  Returns:
    `PolicyOutput` with the real action, weights `[B, K]` over
    `sampled_actions`, and a tree over slots.

  Raises:
    ValueError: if an argument is out of range or does not fit the
      distribution.
  """
  policies.check_noise(noise)
  num_inner = num_samples if leaf_samples is None else leaf_samples
  if leaf_samples is not None and not 1 <= num_inner <= num_samples:
    raise ValueError(
      f'leaf_samples={num_inner}: must be from 1 to num_samples={num_samples}'
    )
  propose_key, value_key, pool_key, search_key = jax.random.split(key, 4)
  shared = {'temperature': sample_temperature, 'replacement': replacement}
  proposal = proposals.propose(
    propose_key,
    distribution,
    root.prior_logits,
    num_samples,
    noise=policies.NO_NOISE if evaluate else noise,
    invalid_actions=invalid_actions,
    with_mode=with_mode,
    wide=proposals.NOT_WIDE if evaluate else wide,
    **shared,
  )
  qvalues = None
  if evaluate_root:
    qvalues = evaluate_actions(
      params, value_key, recurrent_fn, proposal.actions, root.embedding
    )
  pool = None
  if replacement:
    pool = distribution.draw(pool_key, (num_inner * _POOL,))
  step = slot_recurrent_fn(
    recurrent_fn,
    distribution,
    num_inner,
    pool=pool,
    num_spare=num_samples - num_inner,
    **shared,
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
    replacement: as in `proposals.propose`.
    temperature: of the choice among the sampled actions; may be traced.
    invalid_actions: bool `[B, A]`, for enumerated sets only.
    evaluate: take the distribution's mode.

  Returns:
    `action_weights` are the priors of the sampled actions, `[B, K]`.

  Raises:
    ValueError: as `proposals.propose`.
  """
  del params, recurrent_fn, num_simulations
  propose_key, action_key = jax.random.split(key)
  proposal = proposals.propose(
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
