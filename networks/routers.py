"""Routers as values: a gate's parameters, and which expert gets which token.

A router is a frozen config and the pure functions that its `make` returns; they
call the functions of arrays in `networks.routing`. To add a router, add its
config here and to `Name` and `Config`.

Departures: deviations of the noise have `noise_epsilon` added, as in the
authors' code (not in the paper): the smooth load stays differentiable. Pruning
(`prune_below`) is not in the paper: an expert whose average load falls below
that share of an even one is never chosen again.

Axes: see `networks.routing`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from networks import balance, mlp, routing

Name = Literal[
  'noisy_top_k', 'balanced', 'expert_choice', 'soft', 'biased_top_k'
]
Params = dict[str, Any]


class Router(NamedTuple):
  """A router of E experts as pure functions, and what its users must know.

  Attributes:
    init: `(features) -> (params, stats)`, dictionaries; kernels as
      `networks.mlp.spread` has them, or zeros. `stats` is not trained.
    route: `(params, stats, tokens float32 [T, D], keys, train) -> (Routing,
      stats)`. `keys` is a tuple of `num_keys` keys for its noise, or None for
      none; with `train` the statistics learn.
    control: the config of the same router for one expert, which is as wide as
      all active ones, or has all slots.
    columns: of the gate's matrices: those that a token needs, and all.
    active: experts that work on a token; 1 where the work is that of slots.
    reads: what a token's experts depend on when acting: this token, all tokens
      of its state (which `route` then gets alone), or the whole batch.
    balances: whether its losses `importance` and `load` are not 0 for good.
    losses: names of its own losses, next to `importance`, `load` and `z`.
    keeps: names of its statistics.
    num_keys: see `route`; 0 where it has no noise.
    bundle: how many places of a token, side by side, have experts of one group.
    group_size: experts of a group; 1 where there are no groups.
  """

  init: Callable[[int], tuple[Params, Params]]
  route: Callable[..., tuple[routing.Routing, Params]]
  control: 'Config'
  columns: tuple[int, int]
  active: int = 1
  reads: Literal['token', 'state', 'batch'] = 'token'
  balances: bool = False
  losses: tuple[str, ...] = ()
  keeps: tuple[str, ...] = ()
  num_keys: int = 0
  bundle: int = 1
  group_size: int = 1


@dataclasses.dataclass(frozen=True)
class NoisyTopK:
  """Noisy top-k gating, flat or in two levels (Shazeer 2017, equations 3 to 5).

  Attributes:
    name: `noisy_top_k`.
    k: experts of a token; with `groups` in each chosen group.
    groups: of experts, the first level of a hierarchy (equation 12); 0 for a
      flat mixture.
    group_k: chosen groups of a token.
    noise: whether the gate is noisy in training.
    noise_epsilon: least deviation of the noise.
    prune_below: least share of an even load; 0 prunes nothing. Flat only.
    load_momentum: weight of the old running average of the load.
  """

  name: Name = 'noisy_top_k'
  k: int = 4
  groups: int = 0
  group_k: int = 2
  noise: bool = True
  noise_epsilon: float = 1e-2
  prune_below: float = 0.0
  load_momentum: float = 0.99

  def __post_init__(self):
    _check_name(self)
    _check_counts(self, 1, 'k', 'group_k')
    _check_counts(self, 0, 'groups')
    check_above('noise_epsilon', self.noise_epsilon, 0, strictly=True)
    _check_pruning(self)
    if self.groups and _prunes(self):
      raise ValueError(
        f'prune_below={self.prune_below}: needs groups=0, not {self.groups}'
      )

  def make(self, num_experts: int) -> Router:
    """The router of E experts.

    Raises:
      ValueError: k, groups or group_k do not fit E.
    """
    levels, needed, groups = {'': num_experts}, num_experts, self.groups
    if groups:
      self._check_groups(num_experts)
      needed = groups + self.group_k * num_experts // groups
      levels = {'inner_': num_experts, '': groups}
    else:
      _check_most('k', self.k, 'num_experts', num_experts)

    def init(features):
      params = {}
      for prefix, size in levels.items():
        # "No signal and some noise" at first (Appendix A). Without noise equal
        # logits would give all tokens to the same experts for good.
        params[f'{prefix}gate'] = _kernel(features, size, is_zero=self.noise)
        if self.noise:
          params[f'{prefix}noise'] = _kernel(features, size, is_zero=True)
      return params, _first_loads(self, num_experts)

    def scores(params, prefix, tokens, key):
      clean = _linear(params[f'{prefix}gate'], tokens)
      if key is None:
        return clean, None, None
      raw = _linear(params[f'{prefix}noise'], tokens)
      std = jax.nn.softplus(raw) + self.noise_epsilon
      return clean, std, jax.random.normal(key, clean.shape)

    def route(params, stats, tokens, keys, train):
      keys = keys or (None,) * len(levels)
      each = {
        prefix: scores(params, prefix, tokens, key)
        for prefix, key in zip(levels, keys)
      }
      if not groups:
        found = routing.noisy_top_k(*each[''], self.k, _kept(self, stats))
        return found, _learned_loads(self, stats, found, train)
      shape = (-1, groups, num_experts // groups)
      inner = jax.tree.map(lambda x: x.reshape(shape), each['inner_'])
      found = routing.hierarchical(each[''], inner, self.group_k, self.k)
      return found, stats

    # The noise has matrices of its own.
    each = 2 if self.noise else 1
    return Router(
      init,
      route,
      control=dataclasses.replace(
        self, k=1, groups=0, group_k=1, noise=False, prune_below=0.0
      ),
      columns=(each * needed, each * sum(levels.values())),
      active=self.k * (self.group_k if groups else 1),
      balances=True,
      keeps=('load',) if _prunes(self) else (),
      num_keys=len(levels) if self.noise else 0,
      bundle=self.k if groups else 1,
      group_size=num_experts // groups if groups else 1,
    )

  def _check_groups(self, num_experts):
    groups = self.groups
    if num_experts % groups:
      raise ValueError(
        f'groups={groups}: must divide num_experts={num_experts}, or be 0'
      )
    _check_most('group_k', self.group_k, 'groups', groups)
    if self.k > num_experts // groups:
      raise ValueError(
        f'k={self.k}: must be at most the {num_experts // groups} experts of a '
        'group'
      )


@dataclasses.dataclass(frozen=True)
class Balanced:
  """Experts choose tokens in training, thresholds decide when acting.

  Source: Shazeer 2017, Appendix F.

  Attributes:
    name: `balanced`.
    k: experts of a token on average.
    limit: experts of a token at most where thresholds decide; 0 for 4 k.
    threshold_weight: of the thresholds' loss (equation 20), whose gradient
      reaches nothing else.
  """

  name: Name = 'balanced'
  k: int = 4
  limit: int = 0
  threshold_weight: float = 1.0

  def __post_init__(self):
    _check_name(self)
    _check_counts(self, 1, 'k')
    _check_counts(self, 0, 'limit')
    check_above('threshold_weight', self.threshold_weight, 0)

  def make(self, num_experts: int) -> Router:
    """The router of E experts.

    Raises:
      ValueError: k is above E.
    """
    _check_most('k', self.k, 'num_experts', num_experts)

    def init(features):
      # At first every expert is over its threshold, and all of them are mixed.
      thresholds = jnp.zeros((num_experts,))
      gate = _kernel(features, num_experts)
      return {'gate': gate, 'thresholds': thresholds}, {}

    def route(params, stats, tokens, keys, train):
      del keys
      logits = _linear(params['gate'], tokens)
      if train:
        return routing.balanced(logits, params['thresholds'], self.k), stats
      limit = min(self.limit or 4 * self.k, num_experts)
      return routing.thresholded(logits, params['thresholds'], limit), stats

    return Router(
      init,
      route,
      control=dataclasses.replace(self, k=1),
      columns=(num_experts, num_experts),
      active=self.k,
      losses=('threshold',),
    )


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
  """Experts choose tokens, always (Zhou 2022).

  Attributes:
    name: `expert_choice`.
    capacity_factor: experts of a token on average.
  """

  name: Name = 'expert_choice'
  capacity_factor: float = 2.0

  def __post_init__(self):
    _check_name(self)
    check_above('capacity_factor', self.capacity_factor, 0, strictly=True)

  def make(self, num_experts: int) -> Router:
    """The router of E experts.

    Raises:
      ValueError: capacity_factor is above E.
    """
    factor = self.capacity_factor
    _check_most('capacity_factor', factor, 'num_experts', num_experts)

    def init(features):
      return {'gate': _kernel(features, num_experts)}, {}

    def route(params, stats, tokens, keys, train):
      del keys, train
      logits = _linear(params['gate'], tokens)
      return routing.expert_choice(logits, factor), stats

    return Router(
      init,
      route,
      control=dataclasses.replace(self, capacity_factor=1.0),
      columns=(num_experts, num_experts),
      active=math.ceil(factor),
      reads='batch',
    )


@dataclasses.dataclass(frozen=True)
class Soft:
  """Slots are means of a state's tokens, tokens sums of slots.

  Source: Puigcerver 2024.

  Attributes:
    name: `soft`.
    slots: of an expert.
  """

  name: Name = 'soft'
  slots: int = 1

  def __post_init__(self):
    _check_name(self)
    _check_counts(self, 1, 'slots')

  def make(self, num_experts: int) -> Router:
    """The router of E experts."""
    slots = num_experts * self.slots

    def init(features):
      kernel = _kernel(features, slots)
      return {'slots': kernel, 'scale': jnp.ones((1,))}, {}

    def route(params, stats, tokens, keys, train):
      del keys, train
      # Cosines times a learned scale, [T, E, S].
      cosines = _unit(tokens, -1) @ _unit(params['slots']['kernel'], 0)
      cosines = cosines * params['scale'][None]
      shape = (tokens.shape[0], num_experts, self.slots)
      return routing.soft(cosines.reshape(shape)), stats

    return Router(
      init,
      route,
      control=dataclasses.replace(self, slots=slots),
      columns=(slots, slots),
      reads='state',
    )


@dataclasses.dataclass(frozen=True)
class BiasedTopK:
  """Top k by score plus a bias that balances the experts (Wang 2024).

  Attributes:
    name: `biased_top_k`.
    k: experts of a token.
    bias_rate: how far a bias moves in an update.
    prune_below: least share of an even load; 0 prunes nothing.
    load_momentum: weight of the old running average of the load.
  """

  name: Name = 'biased_top_k'
  k: int = 4
  bias_rate: float = 1e-3
  prune_below: float = 0.0
  load_momentum: float = 0.99

  def __post_init__(self):
    _check_name(self)
    _check_counts(self, 1, 'k')
    check_above('bias_rate', self.bias_rate, 0)
    _check_pruning(self)

  def make(self, num_experts: int) -> Router:
    """The router of E experts.

    Raises:
      ValueError: k is above E.
    """
    _check_most('k', self.k, 'num_experts', num_experts)

    def init(features):
      stats = {'bias': jnp.zeros((num_experts,))}
      gate = _kernel(features, num_experts)
      return {'gate': gate}, stats | _first_loads(self, num_experts)

    def route(params, stats, tokens, keys, train):
      del keys
      logits, keep = _linear(params['gate'], tokens), _kept(self, stats)
      bias = stats['bias']
      found = routing.biased_top_k(logits, bias, self.k, keep)
      if train:
        bias = balance.update_bias(bias, found.count, self.bias_rate, keep)
      stats = _learned_loads(self, stats, found, train)
      return found, stats | {'bias': bias}

    return Router(
      init,
      route,
      control=dataclasses.replace(self, k=1, prune_below=0.0),
      columns=(num_experts, num_experts),
      active=self.k,
      keeps=('bias', 'load') if _prunes(self) else ('bias',),
    )


Config = NoisyTopK | Balanced | ExpertChoice | Soft | BiasedTopK


def _prunes(config):
  """Whether a router may prune; a sweep's tracer counts as if it did."""
  pruning = getattr(config, 'prune_below', 0)
  return not (isinstance(pruning, (int, float)) and pruning == 0)


def _first_loads(config, num_experts):
  """Average loads in shares of an even one; nothing without pruning."""
  return {'load': jnp.ones((num_experts,))} if _prunes(config) else {}


def _kept(config, stats):
  """bool `[E]`, the k fullest in any case; None without pruning."""
  if 'load' not in stats:
    return None
  loads = stats['load']
  fullest = balance.chosen(loads[None], config.k)[0]
  return (loads >= config.prune_below) | fullest


def _learned_loads(config, stats, found, train):
  if not train or 'load' not in stats:
    return stats
  even = found.count / jnp.maximum(jnp.mean(found.count), 1e-9)
  momentum = config.load_momentum
  load = momentum * stats['load'] + (1 - momentum) * even
  return stats | {'load': load}


def _kernel(features, size, is_zero=False):
  shape = (features, size)
  if is_zero:
    return {'kernel': jnp.zeros(shape, jnp.float32)}
  return {'kernel': mlp.spread(None, shape, jnp.float32)}


def _linear(layer, tokens):
  return tokens @ layer['kernel']


def _unit(x, axis):
  norm = jnp.linalg.norm(x, axis=axis, keepdims=True)
  return x / jnp.maximum(norm, 1e-6)


def check_above(
  name: str, value: Any, least: float, *, strictly: bool = False
) -> None:
  """Checks a number that is known: under a sweep's vmap it may be a tracer.

  Args:
    name: of the field, for the message.
    value: of it.
    least: its lower bound.
    strictly: whether the bound itself is refused.

  Raises:
    ValueError: it is below the bound, or not finite.
  """
  if not isinstance(value, (int, float)):
    return
  bad = value <= least if strictly else value < least
  if bad or not math.isfinite(value):
    word = 'above' if strictly else 'at least'
    raise ValueError(f'{name}={value}: must be {word} {least}')


def _check_name(config):
  if config.name != type(config).name:
    raise ValueError(
      f'name={config.name!r}: must be {type(config).name!r}; for another '
      'router take its config'
    )


def _check_counts(config, least, *names):
  for name in names:
    value = getattr(config, name)
    if value < least:
      raise ValueError(f'{name}={value}: must be {least} or more')


def _check_most(name, value, bound, most):
  if value > most:
    raise ValueError(f'{name}={value}: must be at most {bound}={most}')


def _check_pruning(config):
  check_above('prune_below', config.prune_below, 0)
  momentum = config.load_momentum
  if isinstance(momentum, (int, float)) and not 0 <= momentum <= 1:
    raise ValueError(f'load_momentum={momentum}: must be within [0, 1]')
