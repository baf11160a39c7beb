"""Searches over a model: PUCT, EfficientZero's rule, Gumbel, and none.

All have one signature, `(params, key, root, recurrent_fn, num_simulations, *,
invalid_actions, evaluate, ...) -> PolicyOutput`, and run on mctx's tree
through `search.engine`. `make_planner` makes a planner of any of them.

`evaluate=True` takes the noise away (Dirichlet, Gumbel, temperature): the
action is the most visited one, ties going to the higher Q, then to the higher
prior, then to the lower index. It is static.

Invalid actions: at the root a mask, which gets neither noise nor visits nor
weight; inside the tree `recurrent_fn` says so by prior logits of -inf, or so
low that the probability underflows to 0. Where all actions are invalid (an
episode's end in a batch that goes on) the result is finite and means nothing.

Values: a node's value is mctx's, the mean of its own network value and of all
returns backed up through it, at the root too; it is the output's `value`.

Axes: `B` batch, `N` nodes (simulations + 1), `A` actions.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx
import numpy as np

from search import rows, rules
from search import trees as tree_lib
from search.engine import batched_search
from search.gumbel import gumbel as gumbel
from search.model import Model, PolicyOutput, TimeStep
from search.roots import (
  check_range,
  checked_qvalues,
  dirichlet,
  log_probs,
  mask_logits,
  most_visited,
  sample,
)

Puct = rules.Puct


class Noise(NamedTuple):
  """Dirichlet noise in a root's prior, mixed as `(1 - f) * prior + f * noise`.

  Attributes:
    fraction: f, in [0, 1]; may be traced. The number 0 draws no noise.
    alpha: its concentration, above 0; may be traced. MuZero's is 0.3 on Atari.
  """

  fraction: chex.Numeric = 0.25
  alpha: chex.Numeric = 0.3

  @property
  def is_none(self) -> bool:
    """Whether it is known, before tracing, to have no share."""
    return isinstance(self.fraction, int | float) and self.fraction == 0


NOISE, PUCT, NO_NOISE = Noise(), Puct(), Noise(fraction=0)


def puct(
  params: Any,
  key: chex.PRNGKey,
  root: mctx.RootFnOutput,
  recurrent_fn: mctx.RecurrentFn,
  num_simulations: int,
  *,
  invalid_actions: chex.Array | None = None,
  root_qvalues: chex.Array | None = None,
  max_depth: int | None = None,
  embedding_dtype: str = 'float32',
  engine: str = 'auto',
  noise: Noise = NOISE,
  constants: Puct = PUCT,
  temperature: chex.Numeric = 1.0,
  evaluate: bool = False,
) -> PolicyOutput:
  """MuZero's search (Schrittwieser et al. 2020, Appendix B).

  The rule, the noise and the keys are `mctx.muzero_policy`'s: Q-values are
  rescaled node by node between the smallest and largest of the node's value
  and its children's Qs, and an unvisited action has the smallest. Two things
  differ: equal scores go to the lower index, where mctx adds noise of 1e-7 to
  every score; and Dirichlet noise is spread over the valid actions only, where
  mctx loses the share of the invalid ones.

  Args:
    params: passed to `recurrent_fn`.
    key: consumed.
    root: prior logits `[B, A]`, value `[B]`, embedding pytree `[B, ...]`.
    recurrent_fn: a `Model.step`.
    num_simulations: simulations for each root, at least 1; static.
    invalid_actions: bool `[B, A]`, True where an action may not be taken.
    root_qvalues: float `[B, A]`, Qs of the root's actions before their first
      visit, if they were evaluated beforehand (see `search.sampled`); None
      for the rule's own idea of an unvisited action.
    max_depth: the most edges from the root to a leaf; static.
    embedding_dtype: what the tree keeps float32 embeddings as: 'float32', or
      'bfloat16', which halves its memory and rounds what the model is given
      to 8 significant bits; static.
    engine: of `search.engine.batched_search`: 'auto', 'loops' or 'kernels';
      static.
    noise: in the root's prior.
    constants: of the PUCT formula.
    temperature: the action is drawn with probabilities proportional to
      `visits ** (1 / temperature)`; 0 chooses as `evaluate` does. May be
      traced.
    evaluate: no noise, the most visited action.

  Returns:
    `action_weights` are the root's visit counts over their sum.

  Raises:
    ValueError: if an argument is out of range.
  """
  known = _known(root_qvalues, root, invalid_actions)
  return _search_by_visits(
    lambda order: rules.puct(known, constants),
    params,
    key,
    root,
    recurrent_fn,
    num_simulations,
    invalid_actions,
    max_depth,
    embedding_dtype,
    engine,
    noise,
    temperature,
    evaluate,
  )


def efficientzero(
  params: Any,
  key: chex.PRNGKey,
  root: mctx.RootFnOutput,
  recurrent_fn: mctx.RecurrentFn,
  num_simulations: int,
  *,
  invalid_actions: chex.Array | None = None,
  root_qvalues: chex.Array | None = None,
  max_depth: int | None = None,
  embedding_dtype: str = 'float32',
  engine: str = 'auto',
  noise: Noise = NOISE,
  constants: Puct = PUCT,
  minmax_delta: chex.Numeric = 0.01,
  temperature: chex.Numeric = 1.0,
  evaluate: bool = False,
) -> PolicyOutput:
  """EfficientZero's search (Ye et al. 2021; the rule is in its code alone).

  It differs from `puct` in four places:

  - Q-values are rescaled by the smallest and largest Q in the whole tree (of
    all expanded nodes but the root, as they stand when the descent begins),
    at least `minmax_delta` apart, and clipped to [0, 1].
  - An unvisited action has its node's mean Q: at the root the mean over the
    visited actions (0 without any), inside the tree
    `(mean Q of the parent + sum of visited Qs) / (number visited + 1)`.
  - The PUCT formula counts a node's visits without its own first, so that at
    a fresh node all actions tie, whatever their priors.
  - Scores within 1e-6 of the best tie, and ties are broken at random. The
    random order of a node's actions is drawn once a search, not at every
    step: `[B, N, A]` numbers, kept as the tree's `extra_data`. `evaluate` has
    a fixed order for each node number, the same for all rows and keys.

  Departures: EfficientZero leaves the network's value out of the root's value
  (yet counts it); ours is mctx's, which includes it. It takes the tie that
  comes first for a new best where scores rise by less than 1e-6; ours compares
  with the best of all. For one player only: discounts must not be negative.

  Args:
    params: as in `puct`.
    key: as in `puct`.
    root: as in `puct`.
    recurrent_fn: with value prefixes, one of `search.value_prefix`.
    num_simulations: as in `puct`.
    invalid_actions: bool `[B, A]`, as in `puct`.
    root_qvalues: float `[B, A]`, as in `puct`.
    max_depth: as in `puct`.
    embedding_dtype: as in `puct`.
    engine: as in `puct`.
    noise: as in `puct`.
    constants: as in `puct`.
    minmax_delta: the least range of Qs that is stretched to [0, 1], above 0.
    temperature: as in `puct`.
    evaluate: as in `puct`.

  Returns:
    `action_weights` are the root's visit counts over their sum.

  Raises:
    ValueError: if an argument is out of range.
  """
  check_range('minmax_delta', minmax_delta, above=0)
  known = _known(root_qvalues, root, invalid_actions)
  return _search_by_visits(
    lambda order: rules.efficientzero(known, constants, minmax_delta, order),
    params,
    key,
    root,
    recurrent_fn,
    num_simulations,
    invalid_actions,
    max_depth,
    embedding_dtype,
    engine,
    noise,
    temperature,
    evaluate,
    tie_table=True,
  )


def raw(
  params: Any,
  key: chex.PRNGKey,
  root: mctx.RootFnOutput,
  recurrent_fn: mctx.RecurrentFn | None = None,
  num_simulations: int = 0,
  *,
  invalid_actions: chex.Array | None = None,
  temperature: chex.Numeric = 1.0,
  evaluate: bool = False,
) -> PolicyOutput:
  """No search: the network's own policy and value.

  Args:
    params: ignored, as are `recurrent_fn` and `num_simulations`: they are
      here so that a search can be exchanged for none.
    key: consumed.
    root: prior logits `[B, A]`, value `[B]`.
    recurrent_fn: ignored.
    num_simulations: ignored.
    invalid_actions: bool `[B, A]`, True where an action may not be taken.
    temperature: of the action; 0 takes the likeliest. May be traced.
    evaluate: take the likeliest action.

  Returns:
    `action_weights` are the softmax of the valid actions' logits, `value` the
    network's.

  Raises:
    ValueError: if `temperature` is negative.
  """
  del params, recurrent_fn, num_simulations
  weights = jax.nn.softmax(mask_logits(root.prior_logits, invalid_actions))
  best = jnp.argmax(weights, axis=-1).astype(jnp.int32)
  action = best if evaluate else sample(key, weights, best, temperature)
  return PolicyOutput(action, weights, root.value)


def make_planner(
  search_fn: Callable[..., PolicyOutput], **kwargs: Any
) -> Callable[[Model, Any, chex.PRNGKey, TimeStep], PolicyOutput]:
  """Makes a planner of a search.

  Args:
    search_fn: one of this module's, or of the same signature.
    **kwargs: its arguments from `num_simulations` on. Those that change from
      call to call (a temperature) may be traced: making a planner inside a
      compiled function costs nothing.

  Returns:
    `planner(model, params, key, timestep) -> PolicyOutput`.

  Raises:
    ValueError: if `search_fn` does not take `kwargs`, or lacks one.
  """
  try:
    inspect.signature(search_fn).bind(
      None, None, None, None, invalid_actions=None, **kwargs
    )
  except TypeError as error:
    name = getattr(search_fn, '__name__', search_fn)
    raise ValueError(f'make_planner({name}): {error}.') from None

  def planner(model, params, key, timestep):
    if model.distribution is not None and 'distribution' not in kwargs:
      raise ValueError(
        'model.distribution: the actions of this model are sampled, not '
        'enumerated; plan with search.sampled.search and '
        'distribution=model.distribution'
      )
    root_key, search_key = jax.random.split(key)
    root = model.root(params, timestep, root_key)
    return search_fn(
      params,
      search_key,
      root,
      model.step,
      invalid_actions=timestep.invalid_actions,
      **kwargs,
    )

  return planner


def check_noise(noise: Noise) -> None:
  """Checks numbers that are known before tracing.

  Raises:
    ValueError: a fraction outside [0, 1], an alpha of 0 or less.
  """
  check_range('noise.fraction', noise.fraction, low=0, high=1)
  check_range('noise.alpha', noise.alpha, above=0)


def _known(root_qvalues, root, invalid_actions):
  qvalues = checked_qvalues(root_qvalues, root)
  if invalid_actions is None:
    invalid_actions = jnp.zeros_like(root.prior_logits, bool)
  return rules.Known(invalid_actions, qvalues)


def _search_by_visits(
  make_rule,
  params,
  key,
  root,
  recurrent_fn,
  num_simulations,
  invalid_actions,
  max_depth,
  embedding_dtype,
  engine,
  noise,
  temperature,
  evaluate,
  tie_table=False,
):
  """Root noise, search, and an action drawn by visit counts."""
  check_noise(noise)
  check_range('temperature', temperature, low=0)
  check_range('num_simulations', num_simulations, low=1)
  action_key, noise_key, search_key = jax.random.split(key, 3)
  prior = jax.nn.softmax(mask_logits(root.prior_logits, invalid_actions))
  # Gamma variates are expensive to draw.
  if not evaluate and not noise.is_none:
    drawn = dirichlet(noise_key, prior, noise.alpha, invalid_actions)
    prior = (1 - noise.fraction) * prior + noise.fraction * drawn
  order = None
  if tie_table:
    shape = (*prior.shape[:1], num_simulations + 1, *prior.shape[1:])
    order = _tie_order(None if evaluate else noise_key, shape)
  trees, tree = batched_search(
    params,
    search_key,
    root=root.replace(
      prior_logits=mask_logits(log_probs(prior), invalid_actions)
    ),
    recurrent_fn=recurrent_fn,
    rule=make_rule(order),
    num_simulations=num_simulations,
    max_depth=max_depth,
    embedding_dtype=embedding_dtype,
    engine=engine,
    invalid_actions=invalid_actions,
    extra_data=order,
  )
  summary = tree_lib.summary(trees)
  best = most_visited(summary, prior)
  action = best
  if not evaluate:
    action = sample(action_key, summary.visit_probs, best, temperature)
  return PolicyOutput(action, summary.visit_probs, summary.value, tree)


def _tie_order(key, shape):
  """Random numbers `[B, N, A]`; without a key the same for all rows."""
  if key is None:
    order = np.random.default_rng(0).random(shape[1:], np.float32)
    return jnp.broadcast_to(jnp.asarray(order)[None], shape)
  return rows.draw(jax.random.uniform, jax.random.fold_in(key, 1), shape)
