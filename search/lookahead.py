"""Exact lookahead of l steps over any model: minimax, expectimax, Newton.

Every action of every stage is tried (those kept by `widths`), chance is taken
in exact expectation where the model lists its outcomes, and a leaf is worth
what the model says of it; hand it `rollout.truncated(model, ...)` for the
value of a truncated rollout. The Q of an action is

  Q(s, a) = sum_c p_c (r_c + d_c V(s_c)),   V(s) = max_a Q(s, a),

each node's V as its own mover sees it, so that the sign of the discount d
makes a negamax of it. Only the first stage is the Newton step of Bellman's
equation (Bertsekas 2022, "Lessons from AlphaZero", 3.3 and 3.4): the stages
after it prepare the point where the step is taken, and may be pruned
(`widths`) or taken in another model (`later`) at little loss.

What may be done: of enumerated actions those that `timestep.invalid_actions`
allows at the root, and whose prior logit is above the lowest number
everywhere; of proposed candidates (`model.actions`) all but repetitions of the
first, which only fill their row. Where nothing may be done all is tried, and
the result is finite and means nothing.

Where a model is random and lists no outcomes, an action's Q is that of one
successor that is drawn.

Axes: `B` roots, `N` nodes of a stage, `A` actions or candidates, `C` chance
outcomes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx

from search.model import Model, PolicyOutput, TimeStep
from search.roots import as_bool, check_range

RANKS = ('prior', 'value')


class _Stage(NamedTuple):
  """How one stage is looked at: with which model, how many actions, ..."""

  model: Model
  width: int | None
  rank: str
  chunk: int


def lookahead(
  depth: int,
  *,
  widths: Sequence[int | None] | None = None,
  rank: str = 'prior',
  later: Model | None = None,
  temperature: chex.Numeric = 0.0,
  chunk: int = 0,
) -> Callable[[Model, Any, chex.PRNGKey, TimeStep], PolicyOutput]:
  """Makes the planner that looks l steps ahead.

  Args:
    depth: l, at least 1.
    widths: for each stage how many actions are kept, None for all of them;
      None for all everywhere.
    rank: those with the highest `'prior'` logits are kept, or those of the
      highest `'value'`: Q after one `model.step`, one evaluation an action.
    later: the model of the stages after the first, of the same embeddings
      (`certainty_equivalent(model)`, a cheaper simulator, the model without
      its chance outcomes); None for the same one.
    temperature: actions are drawn by the softmax of Q / temperature; 0 takes
      the best. May be traced.
    chunk: first actions (a root's action each) that are looked at together, to
      bound memory: a leaf stage has `chunk * (A C)^(l - 1)` rows times C; 0
      for all `B A` together.

  Returns:
    `planner(model, params, key, timestep) -> PolicyOutput`: `action_weights`
    are one at the best action, ties going to the higher prior logit and then
    to the lower index (over candidates: to the lower index), or the softmax;
    `value` is the largest Q; `qvalues` are -inf where an action was not
    looked at; `sampled_actions` are the candidates, None where actions are
    enumerated.

  Raises:
    ValueError: an argument is out of range, or actions can neither be
      enumerated nor proposed.
  """
  check_range('depth', depth, low=1)
  check_range('chunk', chunk, low=0)
  check_range('temperature', temperature, low=0)
  widths = _checked_widths(widths, depth)
  if rank not in RANKS:
    raise ValueError(f'rank={rank!r}: must be one of {", ".join(RANKS)}')

  def planner(model, params, key, timestep):
    models = [model] + (depth - 1) * [model if later is None else later]
    stages = [
      _Stage(of, width, rank, 0 if number else chunk)
      for number, (of, width) in enumerate(zip(models, widths))
    ]
    root_key, search_key, action_key = jax.random.split(key, 3)
    root = model.root(params, timestep, root_key)
    actions, qvalues = _expand_stages(
      stages,
      params,
      search_key,
      root.prior_logits,
      root.embedding,
      timestep.invalid_actions,
    )
    is_enumerated = model.actions is None
    best = _best(qvalues, root.prior_logits if is_enumerated else None)
    logits = qvalues - jnp.max(qvalues, axis=-1, keepdims=True)
    logits /= jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)
    drawn = jax.random.categorical(action_key, logits)
    slot = jnp.where(temperature == 0, best, drawn).astype(jnp.int32)
    one_hot = jax.nn.one_hot(best, qvalues.shape[1], dtype=qvalues.dtype)
    weights = jnp.where(temperature == 0, one_hot, jax.nn.softmax(logits))
    return PolicyOutput(
      action=take(actions, slot),
      action_weights=weights,
      value=jnp.max(qvalues, axis=-1),
      sampled_actions=None if is_enumerated else actions,
      qvalues=qvalues,
    )

  return planner


def qvalues(
  model: Model,
  params: Any,
  key: chex.PRNGKey,
  prior_logits: chex.Array,
  embedding: Any,
) -> tuple[Any, chex.Array]:
  """Qs after one step from nodes of a model.

  Args:
    model: any.
    params: its parameters.
    key: consumed.
    prior_logits: `[N, A]`, what the model said of the nodes.
    embedding: pytree `[N, ...]`.

  Returns:
    Actions int32 or float32 `[N, A, ...]` and their Qs float32 `[N, A]`, -inf
    where they are invalid.

  Raises:
    ValueError: actions can neither be enumerated nor proposed.
  """
  stage = _Stage(model, None, 'prior', 0)
  return _expand_stages([stage], params, key, prior_logits, embedding, None)


def expand(
  model: Model,
  params: Any,
  key: chex.PRNGKey,
  action: Any,
  embedding: Any,
) -> tuple[chex.Array, mctx.RecurrentFnOutput, Any]:
  """What an action leads to: the chance outcomes, or the one drawn successor.

  Args:
    model: any; its `outcomes` are taken where it has them, else its `step`.
    params: its parameters.
    key: consumed.
    action: `[N, ...]`.
    embedding: pytree `[N, ...]`.

  Returns:
    As `Model.outcomes`: probability `[N, C]`, outputs `[N, C]`, embeddings as
    pytree `[N, C, ...]`; C = 1 for one successor.
  """
  if model.outcomes is not None:
    return model.outcomes(params, action, embedding)
  after = model.step(params, key, action, embedding)
  output, embedding = jax.tree.map(lambda x: x[:, None], after)
  return jnp.ones_like(output.value), output, embedding


def backup(
  probability: chex.Array,
  output: mctx.RecurrentFnOutput,
  value: chex.Array,
) -> chex.Array:
  """Q of an action from the values of its outcomes, `[N]`.

  Args:
    probability: `[N, C]`.
    output: reward and discount `[N, C]`.
    value: `[N, C]`; not read after discount 0 and probability 0.
  """
  goes_on = output.discount != 0
  behind = jnp.where(goes_on, output.discount * value, 0)
  total = jnp.where(probability > 0, output.reward + behind, 0)
  return jnp.sum(probability * total, axis=-1)


def certainty_equivalent(model: Model) -> Model:
  """The model in which the likeliest outcome of an action is certain.

  For `later`: with the first stage exact, play is still a Newton step for the
  true equation (Bertsekas 2022, 3.2). Of equally likely outcomes the first one
  is taken. Where a nominal successor is known (the mean disturbance of a
  linear system), `model._replace(step=nominal, outcomes=None)` is certainty
  equivalence without listing the outcomes.

  Raises:
    ValueError: the model lists no outcomes.
  """
  outcomes = model.outcomes
  if outcomes is None:
    raise ValueError(
      'model.outcomes is None: certainty_equivalent takes the likeliest '
      'outcome, so the model must list them'
    )

  def step(params, key, action, embedding):
    del key
    probability, output, after = outcomes(params, action, embedding)
    return take((output, after), jnp.argmax(probability, axis=-1))

  return model._replace(step=step, outcomes=None)


def num_evaluations(
  depth: int,
  num_actions: int,
  *,
  chances: int = 1,
  widths: Sequence[int | None] | None = None,
  rank: str = 'prior',
  interior: bool = True,
  steps: int = 0,
  trials: int = 1,
  per_step: int = 1,
) -> int:
  """Network evaluations of one decision by lookahead, for reports.

  Args:
    depth: l.
    num_actions: A, all of them valid.
    chances: C.
    widths: as `lookahead`'s.
    rank: as `lookahead`'s.
    interior: whether the root and the nodes between it and the leaves count:
      their masks or priors are read. False where they are not, as of
      candidates that are not ranked by priors, for then XLA drops them.
    steps: m of a truncated rollout from every leaf.
    trials: rollouts from a leaf.
    per_step: evaluations of a rollout's step: 1 where the base policy reads
      the prior, A + 1 under `rollout.greedy`.

  Raises:
    ValueError: a number is out of range.

  >>> num_evaluations(2, 7), num_evaluations(2, 7, widths=(None, 3))
  (57, 29)
  """
  check_range('depth', depth, low=1)
  total, nodes = int(interior), 1
  for number, width in enumerate(_checked_widths(widths, depth)):
    if width is not None and rank == 'value':
      total += nodes * num_actions
    kept = num_actions if width is None else min(width, num_actions)
    nodes *= kept * chances
    if interior and number < depth - 1:
      total += nodes
  return total + nodes * (1 + steps * trials * per_step)


def take(tree: Any, slot: chex.Array) -> Any:
  """Each row's entry: leaves `[N, A, ...]`, int `[N]` to `[N, ...]`."""
  return jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), slot], tree)


def pairs(actions: Any, embedding: Any) -> tuple[Any, Any]:
  """Each action with its node, as rows.

  Args:
    actions: array or pytree of `[N, A, ...]`.
    embedding: pytree `[N, ...]`.

  Returns:
    Actions `[N A, ...]` and embeddings `[N A, ...]`.
  """
  size = jax.tree.leaves(actions)[0].shape[1]
  return (
    jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), actions),
    jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), embedding),
  )


def is_spare(actions: Any) -> chex.Array:
  """Which candidates only repeat the first one, bool `[N, A]`.

  Args:
    actions: array or pytree of `[N, A, ...]`.
  """

  def repeats(x):
    same = x == x[:, :1]
    return jnp.all(same, axis=tuple(range(2, same.ndim)))

  leaves = [repeats(x) for x in jax.tree.leaves(actions)]
  same = jnp.stack(leaves).all(0)
  return same.at[:, 0].set(False)


def choices(
  model: Model,
  params: Any,
  key: chex.PRNGKey,
  prior_logits: chex.Array,
  embedding: Any,
  invalid_actions: chex.Array | None = None,
) -> tuple[Any, chex.Array]:
  """What can be done at nodes, as this module's docstring says.

  Args:
    model: any.
    params: its parameters.
    key: for the candidates; consumed.
    prior_logits: `[N, A]`, what the model said of the nodes.
    embedding: pytree `[N, ...]`.
    invalid_actions: bool `[N, A]`, of enumerated actions; None for none.

  Returns:
    Actions int32 or float32 `[N, A, ...]`, and bool `[N, A]` where they may be
    taken.

  Raises:
    ValueError: actions can neither be enumerated nor proposed.
  """
  if model.actions is not None:
    actions = model.actions(params, key, embedding)
    is_valid = ~is_spare(actions)
  else:
    if model.distribution is not None:
      raise ValueError(
        'model.distribution: its actions are drawn, not enumerated; plan with '
        'candidates.sampled(model, num)'
      )
    numbers = jnp.arange(prior_logits.shape[1], dtype=jnp.int32)
    actions = jnp.broadcast_to(numbers[None], prior_logits.shape)
    is_valid = prior_logits > jnp.finfo(prior_logits.dtype).min
    if invalid_actions is not None:
      is_valid &= ~as_bool(invalid_actions)
  return actions, is_valid | ~jnp.any(is_valid, axis=-1, keepdims=True)


def _expand_stages(
  stages, params, key, prior_logits, embedding, invalid_actions
):
  """Actions and Qs of nodes, `[N, A, ...]` and `[N, A]`, by all `stages`."""
  stage = stages[0]
  choice_key, rank_key, key = jax.random.split(key, 3)
  actions, is_valid = choices(
    stage.model, params, choice_key, prior_logits, embedding, invalid_actions
  )

  def evaluate(key, rows):
    return _qvalues(stages, params, key, *rows)

  size = is_valid.shape[1]
  slots = None
  tried = actions
  if stage.width is not None and stage.width < size:
    scores = _scores(stage, params, rank_key, prior_logits, actions, embedding)
    scores = jnp.where(is_valid, scores, -jnp.inf)
    slots = jax.lax.top_k(scores, stage.width)[1]
    rows = jnp.arange(slots.shape[0])[:, None]
    tried = jax.tree.map(lambda x: x[rows, slots], actions)
  q = _chunked(evaluate, key, pairs(tried, embedding), stage.chunk)
  q = q.reshape(is_valid.shape[0], -1)
  if slots is not None:
    rows = jnp.arange(slots.shape[0])[:, None]
    q = jnp.full(is_valid.shape, -jnp.inf, q.dtype).at[rows, slots].set(q)
  return actions, jnp.where(is_valid, q, -jnp.inf)


def _qvalues(stages, params, key, action, embedding):
  """Q `[N]` of an action each by all `stages`."""
  step_key, key = jax.random.split(key)
  probability, output, after = expand(
    stages[0].model, params, step_key, action, embedding
  )
  value = output.value
  if len(stages) > 1:
    merge = lambda x: x.reshape(-1, *x.shape[2:])
    _, q = _expand_stages(
      stages[1:],
      params,
      key,
      merge(output.prior_logits),
      jax.tree.map(merge, after),
      None,
    )
    value = jnp.max(q, axis=-1).reshape(value.shape)
  return backup(probability, output, value)


def _scores(stage, params, key, prior_logits, actions, embedding):
  """What actions `[N, A, ...]` are ranked by, `[N, A]`."""
  size = jax.tree.leaves(actions)[0].shape[1]
  if stage.rank == 'prior':
    if prior_logits.shape[1] != size:
      raise ValueError(
        f"rank='prior': {size} candidates have no prior of their own next to "
        f"{prior_logits.shape[1]} prior logits; rank='value' asks the model"
      )
    return prior_logits
  # One drawn step, not all outcomes: this only says which are worth a look.
  stage = _Stage(stage.model._replace(outcomes=None), None, '', 0)
  q = _qvalues([stage], params, key, *pairs(actions, embedding))
  return q.reshape(-1, size)


def _chunked(fn, key, rows, chunk):
  """`fn(key, rows)`, `[N]`, over at most `chunk` rows at a time; 0 for all."""
  total = jax.tree.leaves(rows)[0].shape[0]
  if not chunk or total <= chunk:
    return fn(key, rows)
  parts = -(-total // chunk)
  # The last chunk is filled up with rows that are thrown away.
  index = (jnp.arange(parts * chunk) % total).reshape(parts, chunk)
  keys = jax.random.split(key, parts)

  def part(args):
    key, index = args
    return fn(key, jax.tree.map(lambda x: x[index], rows))

  return jax.lax.map(part, (keys, index)).reshape(-1)[:total]


def _best(q, prior_logits):
  """The best action, ties by prior logit, then index, int32 `[B]`."""
  if prior_logits is not None:
    is_best = q == jnp.max(q, axis=-1, keepdims=True)
    lowest = jnp.finfo(prior_logits.dtype).min
    q = jnp.where(is_best, jnp.maximum(prior_logits, lowest), -jnp.inf)
  return jnp.argmax(q, axis=-1).astype(jnp.int32)


def _checked_widths(widths, depth) -> tuple[int | None, ...]:
  """One width a stage."""
  if widths is None:
    return depth * (None,)
  if len(widths) != depth:
    raise ValueError(
      f'widths={tuple(widths)}: must have one entry, a number or None, for '
      f'each of the {depth} stages'
    )
  for number, width in enumerate(widths):
    check_range(f'widths[{number}]', width, low=1)
  return tuple(widths)
