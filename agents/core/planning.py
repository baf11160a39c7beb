"""How an agent searches: one config for every rule, and searching old data."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agents.core import ranges, unroll
from search import policies, proposals, rows, sampled
from search.model import Model, PolicyOutput, TimeStep


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """What a search at decision time does.

  Attributes:
    rule: which rule selects, expands and decides.
    num_simulations: simulations a decision; 0 acts with the network alone.
    dirichlet_fraction: share of noise in the root's prior when exploring;
      where actions are sampled it is part of what they are sampled from, under
      every rule, else rule `gumbel` has none.
    dirichlet_alpha: concentration of that noise.
    pb_c_init: c_1 of PUCT.
    pb_c_base: c_2 of PUCT.
    minmax_delta: the least range that values are scaled by (rule
      `efficientzero`).
    max_considered: actions that Gumbel's sequential halving starts with.
    max_depth: greatest depth of a leaf; 0 for no bound.
    embedding_dtype: what the tree keeps the model's float32 states as;
      bfloat16 halves its memory, and the model is given rounded states.
    engine: loops over the batch, or a kernel a tree for CUDA; auto takes loops.
    num_samples: K, actions drawn at every node where they are sampled; it and
      the fields below are for such agents only.
    sample_temperature: tau; they are drawn from the policy to the power 1/tau.
    replacement: draw independently; else distinct actions of an enumerated
      set.
    evaluate_root: evaluate the root's actions before the search.
    wide_samples: how many of the root's K are drawn from a flattened policy
      when exploring. If any are, all K weigh alike, and rule `gumbel` has no
      noise of its own.
    wide_temperature: of that policy, to the power 1/temperature; 9 triples a
      Gaussian's standard deviation.
    leaf_samples: actions drawn at nodes below the root; 0 for K.
  """

  rule: Literal['efficientzero', 'puct', 'gumbel'] = 'efficientzero'
  num_simulations: int = 50
  dirichlet_fraction: float = 0.25
  dirichlet_alpha: float = 0.3
  pb_c_init: float = 1.25
  pb_c_base: float = 19652.0
  minmax_delta: float = 0.01
  max_considered: int = 16
  max_depth: int = 0
  embedding_dtype: Literal['float32', 'bfloat16'] = 'float32'
  engine: Literal['auto', 'loops', 'kernels'] = 'auto'
  num_samples: int = 20
  sample_temperature: float = 1.0
  replacement: bool = True
  evaluate_root: bool = True
  wide_samples: int = 0
  wide_temperature: float = 9.0
  leaf_samples: int = 0

  def __post_init__(self):
    ranges.at_least(self, 0, 'num_simulations', 'pb_c_init')
    ranges.at_least(self, 1, 'max_considered', 'num_samples')
    if self.max_depth < 0:
      raise ValueError(
        f'max_depth={self.max_depth}: must be above 0, or 0 for no bound'
      )
    ranges.above(self, 0, 'dirichlet_alpha', 'minmax_delta', 'pb_c_base')
    ranges.above(self, 0, 'sample_temperature', 'wide_temperature')
    ranges.within(self, 0, 1, 'dirichlet_fraction')
    ranges.within(self, 0, self.num_samples, 'wide_samples', 'leaf_samples')
    considered = min(self.num_samples, self.num_simulations)
    is_wide = self.wide_samples and self.rule == 'gumbel'
    if is_wide and self.max_considered < considered:
      raise ValueError(
        f'max_considered={self.max_considered}: with wide_samples nothing '
        "chooses among the root's actions before they are searched; take "
        f'num_samples={self.num_samples}, or wide_samples=0'
      )


Searcher = Callable[..., PolicyOutput]


def make_search(config: SearchConfig, distribution: Any = None) -> Searcher:
  """The search that a config names.

  Args:
    config: see `SearchConfig`.
    distribution: the model's, whose actions are sampled; None where they are
      enumerated.

  Returns:
    `(params, key, root, recurrent_fn, *, invalid_actions=None, evaluate=False,
    temperature=1.0) -> PolicyOutput`. With `evaluate` there is no noise and
    the most visited action is taken; where actions are sampled the policy's
    mode is one of them.
  """
  sampling: dict[str, Any] = {}
  if distribution is not None:
    sampling = {
      'distribution': distribution,
      'num_samples': config.num_samples,
      'sample_temperature': config.sample_temperature,
      'replacement': config.replacement,
    }
  if config.num_simulations == 0:
    if distribution is None:
      return policies.raw
    return functools.partial(sampled.raw, **sampling)
  noise = policies.Noise(config.dirichlet_fraction, config.dirichlet_alpha)
  own: dict[str, Any] = {
    'num_simulations': config.num_simulations,
    'max_depth': config.max_depth or None,
    'embedding_dtype': config.embedding_dtype,
    'engine': config.engine,
  }
  if config.rule == 'gumbel':
    rule = policies.gumbel
    own['max_num_considered_actions'] = config.max_considered
  else:
    rule = policies.puct
    own['constants'] = policies.Puct(config.pb_c_init, config.pb_c_base)
    if config.rule == 'efficientzero':
      rule = policies.efficientzero
      own['minmax_delta'] = config.minmax_delta
    if distribution is None:
      own['noise'] = noise
  search = rule
  if distribution is not None:
    sampling['evaluate_root'] = config.evaluate_root
    sampling['leaf_samples'] = config.leaf_samples or None
    sampling['wide'] = proposals.Wide(
      config.wide_samples, config.wide_temperature
    )
    if config.rule == 'gumbel' and config.wide_samples:
      own['gumbel_scale'] = 0.0
    search = functools.partial(_sampled, rule=rule, noise=noise, **sampling)
  if config.rule == 'gumbel':
    search = functools.partial(_without_temperature, search)
  return functools.partial(search, **own)


def _sampled(*args, evaluate=False, **kwargs):
  # Without exploration the policy's mode is among the actions.
  return sampled.search(*args, evaluate=evaluate, with_mode=evaluate, **kwargs)


def _without_temperature(search, *args, temperature=1.0, **kwargs):
  # Gumbel's own noise decides how far it explores.
  del temperature
  return search(*args, **kwargs)


def best_only(search: Searcher) -> Searcher:
  """A search whose weights are all on the action that it takes.

  Gumbel MuZero's simple policy loss is the loss on these weights.

  Args:
    search: from `make_search`.

  Source: Gumbel MuZero (Danihelka 2022), section 4; EfficientZero V2 (Wang
  2024).
  """

  def searched(*args, **kwargs):
    output = search(*args, **kwargs)
    weights, action = output.action_weights, output.action
    if output.sampled_actions is None:
      return output._replace(
        action_weights=jax.nn.one_hot(action, weights.shape[-1])
      )
    same = output.sampled_actions == action[:, None]
    same = jnp.all(same.reshape(*weights.shape, -1), axis=-1)
    # Spare slots may hold the action again.
    chosen = jax.nn.one_hot(jnp.argmax(same, axis=-1), weights.shape[-1])
    return output._replace(action_weights=chosen)

  return searched


def make_planner(config: SearchConfig, *, evaluate: bool) -> Callable:
  """A planner `(model, params, key, timestep) -> PolicyOutput`.

  Args:
    config: see `SearchConfig`.
    evaluate: without noise, the best action.

  Returns:
    The planner; its output holds no tree.
  """

  def planner(model: Model, params: Any, key, timestep: TimeStep):
    search = make_search(config, model.distribution)
    output = _at_roots(search, model, params, key, timestep, evaluate=evaluate)
    return output._replace(search_tree=None)

  return planner


def _at_roots(search, model, params, key, timestep, **own) -> PolicyOutput:
  root_key, search_key = jax.random.split(key)
  root = model.root(params, timestep, root_key)
  invalid = timestep.invalid_actions
  return search(
    params, search_key, root, model.step, invalid_actions=invalid, **own
  )


def decide(
  search: Searcher,
  model: Model,
  params: Any,
  key: chex.PRNGKey,
  timestep: TimeStep,
  temperature: chex.Numeric,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """What an agent that explores does, and what a replay keeps of the search.

  Args:
    search: from `make_search`.
    model: to search in.
    params: the model's.
    key: consumed.
    timestep: `B` rows.
    temperature: of the visit counts that the action is drawn from.

  Returns:
    Actions `[B, ...]` and extras: `search_policy` `[B, A]`, `search_value`
    `[B]`, and `sampled_actions` `[B, K, ...]` where actions are sampled, which
    `search_policy` is then over.

  Source: MuZero (Schrittwieser 2020), Appendix D.
  """
  output = _at_roots(
    search, model, params, key, timestep, temperature=temperature
  )
  extras = {
    'search_policy': output.action_weights,
    'search_value': output.value,
  }
  if output.sampled_actions is not None:
    extras['sampled_actions'] = output.sampled_actions
  return output.action, extras


def re_search(
  search: Searcher,
  model: Model,
  params: Any,
  key: chex.PRNGKey,
  timestep: TimeStep,
  chunk: int = 0,
) -> PolicyOutput:
  """Searches again, with fresh parameters, where old data was recorded.

  Exploration noise is on, as when the data was made; where actions are
  sampled, they are sampled again.

  Args:
    search: from `make_search`.
    model: the model whose parameters are given.
    params: usually the target parameters.
    key: consumed.
    timestep: leaves `[B, S, ...]`.
    chunk: the most roots searched at once, on all devices together, to bound
      memory; 0 for all of them. Chunks have equal sizes and take every n-th
      root, so that roots on several devices need not move. A device searches
      at least one root at a time.

  Returns:
    `PolicyOutput` without a tree, leaves `[B, S, ...]`.

  Source: MuZero Reanalyze (Schrittwieser 2020), Appendix H.
  """
  batch = timestep.reward.shape[0]
  roots = unroll.flatten_steps(timestep)
  num_roots = roots.reward.shape[0]

  def one(args):
    key, roots = args
    root = model.root(params, roots, key)
    output = search(
      params,
      key,
      root,
      model.step,
      invalid_actions=roots.invalid_actions,
    )
    return output._replace(search_tree=None)

  if not chunk or num_roots * rows.devices() <= chunk:
    result = one((key, roots))
  else:
    count = _num_chunks(batch, num_roots // batch, chunk)
    swap = lambda tree: jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
    parts = swap(unroll.unflatten_steps(roots, num_roots // count))
    keys = jax.random.split(key, count)
    result = unroll.flatten_steps(swap(jax.lax.map(one, (keys, parts))))
  return unroll.unflatten_steps(result, batch)


def _num_chunks(batch, steps, chunk):
  """The fewest equal chunks; if possible the same on one device and on many."""
  least = -(-batch * steps * rows.devices() // chunk)
  for whole in (_group(batch) * steps, batch * steps):
    for count in range(least, whole + 1):
      if whole % count == 0:
        return count
  return batch * steps


def _group(batch):
  """Rows of a group.

  Devices that hold whole groups choose the rows that a single one would.
  """
  return 8 if batch % 8 == 0 else batch


class Share(NamedTuple):
  """Some rows of a batch, in order.

  Attributes:
    take: `(pytree [B, ...]) -> pytree [C, ...]`, the chosen rows.
    put: `(array [B, ...], array [C, ...]) -> array [B, ...]`, with the chosen
      rows replaced.
    count: C.
  """

  take: Callable[[Any], Any]
  put: Callable[[chex.Array, chex.Array], chex.Array]
  count: int

  def mask(self, batch: int) -> chex.Array:
    """Which rows of the batch are chosen, bool `[B]`."""
    return self.put(jnp.zeros(batch, bool), jnp.ones(self.count, bool))


def share(fraction: float, batch: int) -> Share:
  """A share of the rows, the same on one device or on many.

  The first of every 8 rows are chosen where 8 divides the batch, else the
  first of all.

  Args:
    fraction: of rows to choose, in [0, 1]; rounded to whole rows of 8, a
      positive one to one row at least.
    batch: B.
  """
  group = _group(batch)
  chosen = max(round(fraction * group), 1 if fraction else 0)
  apart = lambda x: x.reshape(batch // group, group, *x.shape[1:])

  def take(tree):
    return unroll.flatten_steps(
      jax.tree.map(lambda x: apart(x)[:, :chosen], tree)
    )

  def put(x, new):
    new = new.reshape(batch // group, chosen, *x.shape[1:])
    return apart(x).at[:, :chosen].set(new).reshape(x.shape)

  return Share(take, put, batch // group * chosen)
