"""Mixture of experts: one layer that takes any module as its expert.

  y = sum_i G(x)_i E_i(x)                       (Shazeer 2017, equation 1)

`MoE` owns the gate's parameters and all experts' parameters, stacked; who
works on what is `networks.routing`'s, the work `networks.dispatch`'s. It
returns what a learner needs beside its output as `Aux`; nothing is collected
behind the caller's back, so layers stack, and a step may be scanned or
vmapped. The gate's noise comes from the random stream `gate` and is drawn only
with `train`.

Acting and planning (`train` false) are deterministic, and with the routers of
`PER_STATE` what a state gets does not depend on the batch that it comes in, as
long as nothing is dropped (`backend=capacity` drops). Agents refuse the other
one, `expert_choice`: with it the same state has another value in another
batch, and a search in a tree another result. `balanced` lets experts choose in
training and decides by learned thresholds afterwards; `soft` mixes the tokens
of a state, the axis before the features, and no others.

Departures and choices:

* Deviations of the noise have `noise_epsilon` added, as in the authors' code
  (not in the paper): the smooth load stays differentiable.
* Pruning (`prune_below`) is not in the paper: an expert whose average load
  falls below that share of an even one is never chosen again.

Axes: see `networks.routing`.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from networks import balance, dispatch, expert_parallel, mlp, ragged, routing

Router = Literal[
  'noisy_top_k', 'balanced', 'expert_choice', 'soft', 'biased_top_k'
]
# What a state gets does not depend on the other states of a batch.
PER_STATE = ('noisy_top_k', 'balanced', 'biased_top_k', 'soft')


@dataclasses.dataclass(frozen=True)
class Config:
  """A mixture's sizes and variants; the defaults are the paper's for text.

  Attributes:
    num_experts: E; 0 for no mixture where a network has one by choice.
    router: `noisy_top_k` (equations 3 to 5), `balanced` (Appendix F),
      `expert_choice` (Zhou 2022), `soft` (Puigcerver 2023) or `biased_top_k`
      (Wang 2024).
    k: experts of a token; with `groups` in each chosen group.
    limit: of `balanced`, experts of a token at most where thresholds decide;
      0 for 4 k.
    groups: of experts, the first level of a hierarchy (equation 12); 0 for a
      flat mixture. `noisy_top_k` only.
    group_k: chosen groups of a token.
    hidden: width of the hidden layer of a plain expert.
    noise: whether the gate is noisy in training. `noisy_top_k` only.
    noise_epsilon: least deviation of it.
    slots: of `soft`, a expert.
    capacity_factor: of `expert_choice`, tokens of an expert over an even
      share; and of `backend=capacity`.
    importance_weight: of its loss (equation 7).
    load_weight: of its loss (equation 11).
    z_weight: of the loss on the gate's logits; 0 in the paper.
    threshold_weight: of the thresholds' loss (equation 20), which reaches
      nothing else.
    bias_rate: of `biased_top_k`, how far a bias moves in an update.
    prune_below: see the module's docstring; 0 for never.
    load_momentum: weight of the old running average of the load.
    backend: see `networks.dispatch`.
  """

  num_experts: int = 32
  router: Router = 'noisy_top_k'
  k: int = 4
  limit: int = 0
  groups: int = 0
  group_k: int = 2
  hidden: int = 1024
  noise: bool = True
  noise_epsilon: float = 1e-2
  slots: int = 1
  capacity_factor: float = 2.0
  importance_weight: float = 0.1
  load_weight: float = 0.1
  z_weight: float = 0.0
  threshold_weight: float = 1.0
  bias_rate: float = 1e-3
  prune_below: float = 0.0
  load_momentum: float = 0.99
  backend: dispatch.Backend = 'auto'

  def __post_init__(self):
    routers = Router.__args__
    if self.router not in routers:
      raise ValueError(
        f'router={self.router!r}: must be one of {", ".join(routers)}'
      )
    if self.backend not in dispatch.BACKENDS:
      raise ValueError(
        f'backend={self.backend!r}: must be one of '
        f'{", ".join(dispatch.BACKENDS)}'
      )
    for name in ('num_experts', 'limit', 'groups'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)}: must be 0 or more')
    for name in ('hidden', 'slots', 'k', 'group_k'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: must be 1 or more')
    if self.num_experts:
      self._check_groups()
    pruning = self.prune_below
    flat = not self.groups and self.router in ('noisy_top_k', 'biased_top_k')
    if not flat and not (isinstance(pruning, (int, float)) and pruning == 0):
      raise ValueError(
        f'prune_below={pruning}: needs a flat noisy_top_k or biased_top_k'
      )
    for name in ('noise_epsilon', 'capacity_factor'):
      _check_above(name, getattr(self, name), 0, strictly=True)
    for name in (
      'importance_weight',
      'load_weight',
      'z_weight',
      'threshold_weight',
      'bias_rate',
      'prune_below',
    ):
      _check_above(name, getattr(self, name), 0)
    momentum = self.load_momentum
    if isinstance(momentum, (int, float)) and not 0 <= momentum <= 1:
      raise ValueError(f'load_momentum={momentum}: must be within [0, 1]')

  def _check_groups(self):
    experts, groups = self.num_experts, self.groups
    if not groups:
      if self.k > experts:
        raise ValueError(f'k={self.k}: must be at most num_experts={experts}')
      return
    if self.router != 'noisy_top_k':
      raise ValueError(
        f'groups={groups}: needs router=noisy_top_k, not {self.router}'
      )
    if experts % groups:
      raise ValueError(
        f'groups={groups}: must divide num_experts={experts}, or be 0'
      )
    if self.group_k > groups:
      raise ValueError(
        f'group_k={self.group_k}: must be at most groups={groups}'
      )
    if self.k > experts // groups:
      raise ValueError(
        f'k={self.k}: must be at most the {experts // groups} experts of a '
        'group'
      )

  @property
  def active(self) -> int:
    """Experts that work on a token."""
    return self.k * (self.group_k if self.groups else 1)


def _check_above(name, value, least, strictly=False):
  # Under a sweep's vmap this may be a tracer, which has no value to check.
  if not isinstance(value, (int, float)):
    return
  bad = value <= least if strictly else value < least
  if bad or not math.isfinite(value):
    word = 'above' if strictly else 'at least'
    raise ValueError(f'{name}={value}: must be {word} {least}')


class Aux(NamedTuple):
  """What a mixture tells beside its output.

  Attributes:
    loss: float32 scalar, the weighted sum of `losses`: add it to the learner's.
    losses: float32 scalars by name, unweighted.
    importance: float32 `[E]`, sums of gates.
    load: float32 `[E]`, tokens an expert, smooth where there is noise.
    count: float32 `[E]`, tokens that each expert really got.
    dropped: float32 scalar, share of pairs of token and expert that found no
      place.
  """

  loss: jax.Array
  losses: dict[str, jax.Array]
  importance: jax.Array
  load: jax.Array
  count: jax.Array
  dropped: jax.Array


def weighted(config: Config, losses: dict[str, jax.Array]) -> jax.Array:
  """The sum of a mixture's losses, each with its weight.

  Args:
    config: has the weights.
    losses: float32 scalars by name.

  Returns:
    float32 scalar.
  """
  each = (getattr(config, f'{name}_weight') * x for name, x in losses.items())
  return jnp.asarray(sum(each))


def metrics(aux: Aux) -> dict[str, jax.Array]:
  """What one looks at: coefficients of variation, fullest expert over mean.

  `cv_load` is of the smooth load where there is noise; `cv_count` of the tokens
  that experts really got, which even a perfect router leaves uneven by chance.

  Returns:
    float32 scalars by name.

  Source: the columns of Shazeer 2017, Table 6.
  """
  mean = jnp.maximum(jnp.mean(aux.count), 1e-9)
  return {
    'cv_importance': jnp.sqrt(balance.cv_squared(aux.importance)),
    'cv_load': jnp.sqrt(balance.cv_squared(aux.load)),
    'cv_count': jnp.sqrt(balance.cv_squared(aux.count)),
    'max_over_mean_load': jnp.max(aux.count) / mean,
    'idle_experts': jnp.sum(aux.count == 0).astype(jnp.float32),
    'dropped': aux.dropped,
    'balance_loss': aux.loss,
  }


class FeedForward(nn.Module):
  """The paper's expert: one hidden layer with ReLU, no bias.

  Attributes:
    hidden: its width.
    outputs: O.
    dtype: of the computation.
  """

  hidden: int
  outputs: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    linear = lambda size, name: mlp.Linear(
      size, use_bias=False, dtype=self.dtype, name=name
    )
    return linear(self.outputs, 'out')(
      jax.nn.relu(linear(self.hidden, 'in')(x))
    )

  def grouped(self, params: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
    """All experts on rows sorted by expert, see `dispatch.Expert`.

    Args:
      params: of all experts, leaves `[E, ...]`.
      x: float `[N, D]`.
      sizes: int32 `[E]`, rows of each expert.

    Returns:
      `[N, O]`.
    """
    kernels = (
      params[name]['kernel'].astype(self.dtype) for name in ('in', 'out')
    )
    first, second = kernels
    x = jax.nn.relu(ragged.ragged_dot(x.astype(self.dtype), first, sizes))
    return ragged.ragged_dot(x, second, sizes)


class MoE(nn.Module):
  """A layer of experts, `(x [..., D], train) -> (y [..., O], Aux)`.

  Who works on what is told with `mutable=['plans']`: `plans['plan'][0]` is the
  router's `routing.Plan` of the tokens. With `prune_below` or `biased_top_k`
  the collection `stats` changes where it is mutable and `train` is true.

  Attributes:
    config: see `Config`.
    expert: any module `(rows [B, D]) -> [B, O]` that treats each row on its
      own and has parameters only, no statistics and no dropout.
    axis: of a mesh over which experts are divided, where the program is traced
      under one; see `networks.expert_parallel`.
  """

  config: Config
  expert: nn.Module
  axis: str = 'data'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False):
    if self.config.router == 'soft' and x.ndim < 2:
      raise ValueError(f'x: shape {x.shape}, must be [..., tokens, features]')
    features = x.shape[-1]
    tokens = x.reshape(-1, features)
    params, expert = self._experts(tokens)
    if self.config.router == 'soft':
      # The tokens of one state mix, those of two never do.
      states = x.reshape(-1, *x.shape[-2:])
      each = jax.vmap(routing.soft)(self._soft_logits(states))
      work = lambda plan, x: dispatch.apply(plan, x, params, expert)[0]
      y, dropped = jax.vmap(work)(each.plan, states), jnp.zeros(())
      found = jax.tree.map(lambda x: x.sum(0), each)
      losses = jax.tree.map(lambda x: x.mean(0), each.losses)
      found = found._replace(losses=losses)
    else:
      found = self._route(tokens.astype(jnp.float32), train)
      # Kept for those alone who ask with `mutable=['plans']`.
      if not self.is_initializing():
        self.sow('plans', 'plan', found.plan)
      y, dropped = expert_parallel.apply(
        found.plan,
        tokens,
        params,
        expert,
        axis=self.axis,
        bundle=self._bundle(),
        backend=self.config.backend,
        capacity_factor=self.config.capacity_factor,
      )
    return y.reshape(*x.shape[:-1], -1), self._aux(found, dropped)

  def _bundle(self):
    """Places of a token that travel together: those of a group."""
    groups = self.config.groups
    # A group lies on one device where its devices share the groups evenly.
    whole = groups and groups % expert_parallel.devices(self.axis) == 0
    return self.config.k if whole else 1

  def _aux(self, found, dropped):
    return Aux(
      weighted(self.config, found.losses),
      found.losses,
      found.importance,
      found.load,
      found.count,
      dropped,
    )

  def _experts(self, tokens):
    """Parameters of all experts, and the expert as a function of one's."""
    module = self.expert.clone(parent=None, name=None)

    def init(key):
      keys = jax.random.split(key, self.config.num_experts)
      variables = jax.vmap(lambda key: module.init(key, tokens[:1]))(keys)
      if set(variables) != {'params'}:
        raise ValueError(
          f'expert={type(module).__name__}: must have parameters only, has '
          f'{", ".join(sorted(variables))}'
        )
      return variables['params']

    params = self.param('experts', init)
    apply: Any = lambda params, rows: module.apply({'params': params}, rows)
    return params, dispatch.Expert(apply, getattr(module, 'grouped', None))

  def _route(self, tokens, train):
    """`Routing` of tokens `[T, D]`."""
    config, number = self.config, self.config.num_experts
    if config.groups:
      size = number // config.groups
      inner = self._scores('inner_', tokens, number, train)
      inner = jax.tree.map(lambda x: x.reshape(-1, config.groups, size), inner)
      outer = self._scores('', tokens, config.groups, train)
      return routing.hierarchical(outer, inner, config.group_k, config.k)
    loads = self._loads()
    keep = None if loads is None else self._kept(loads.value)
    if config.router == 'noisy_top_k':
      scores = self._scores('', tokens, number, train)
      found = routing.noisy_top_k(*scores, config.k, keep)
    elif config.router == 'biased_top_k':
      logits = self._linear('gate', tokens, number)
      bias = self.variable('stats', 'bias', jnp.zeros, (number,))
      found = routing.biased_top_k(logits, bias.value, config.k, keep)
      if self._learns(train):
        bias.value = routing.update_bias(
          bias.value, found.count, config.bias_rate, keep
        )
    else:
      logits = self._linear('gate', tokens, number)
      found = self._contested(logits, train)
    if loads is not None and self._learns(train):
      even = found.count / jnp.maximum(jnp.mean(found.count), 1e-9)
      momentum = config.load_momentum
      loads.value = momentum * loads.value + (1 - momentum) * even
    return found

  def _contested(self, logits, train):
    """Routers in which experts choose among the tokens of a batch."""
    config, number = self.config, self.config.num_experts
    if config.router == 'expert_choice':
      return routing.expert_choice(logits, config.capacity_factor)
    # At first every expert is over its threshold, and all of them are mixed.
    zeros = nn.initializers.zeros
    thresholds = self.param('thresholds', zeros, (number,))
    if train:
      return routing.balanced(logits, thresholds, config.k)
    return routing.thresholded(
      logits, thresholds, min(config.limit or 4 * config.k, number)
    )

  def _scores(self, prefix, tokens, size, train):
    """Logits, deviations and noise `[T, size]`; None where there is none."""
    clean = self._linear(f'{prefix}gate', tokens, size)
    if not self.config.noise:
      return clean, None, None
    raw = self._linear(f'{prefix}noise', tokens, size)
    if not train:
      return clean, None, None
    std = jax.nn.softplus(raw) + self.config.noise_epsilon
    return clean, std, jax.random.normal(self.make_rng('gate'), clean.shape)

  def _linear(self, name, tokens, size):
    # "No signal and some noise" at first (Shazeer 2017, Appendix A). Without
    # noise equal logits would give all tokens to the same experts for good.
    noisy = self.config.router == 'noisy_top_k' and self.config.noise
    start = nn.initializers.zeros if noisy else mlp.spread
    return nn.Dense(size, use_bias=False, kernel_init=start, name=name)(tokens)

  def _soft_logits(self, states):
    """`[B, T, E, S]` of states `[B, T, D]`: cosines times a learned scale."""
    config, features = self.config, states.shape[-1]
    shape = (features, config.num_experts * config.slots)
    slots = self.param(
      'slots', lambda _: {'kernel': mlp.spread(_, shape, jnp.float32)}
    )
    scale = self.param('scale', nn.initializers.ones, (1,))
    unit = lambda x, axis: (
      x / jnp.maximum(jnp.linalg.norm(x, axis=axis, keepdims=True), 1e-6)
    )
    cosines = unit(states.astype(jnp.float32), -1) @ unit(slots['kernel'], 0)
    cosines = cosines * scale[None, None]
    return cosines.reshape(*states.shape[:2], config.num_experts, config.slots)

  def _learns(self, train):
    return (
      train
      and self.is_mutable_collection('stats')
      and not self.is_initializing()
    )

  def _loads(self):
    """Average loads in shares of an even one; None where nobody is pruned."""
    pruning = self.config.prune_below
    # Of a tracer, which a sweep may have here, nothing is known.
    if isinstance(pruning, (int, float)) and not pruning:
      return None
    return self.variable('stats', 'load', jnp.ones, (self.config.num_experts,))

  def _kept(self, loads):
    """bool `[E]`; the k fullest stay in any case."""
    fullest = balance.chosen(loads[None], self.config.k)[0]
    return (loads >= self.config.prune_below) | fullest
