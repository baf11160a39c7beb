"""Mixture of experts: one layer that takes any module as its expert.

  y = sum_i G(x)_i E_i(x)                       (Shazeer 2017, equation 1)

`MoE` keeps the gate's parameters and all experts' parameters, stacked;
`networks.routers` decides which expert gets which token, and
`networks.dispatch` does the work. What a learner needs next to the output is
returned as `Aux`: there are no hidden collections, so layers stack, and a step
may be scanned or vmapped. The gate's noise comes from the random stream `gate`
and is drawn only with `train`.

Acting and planning (`train` false) are deterministic, and what a state gets
does not depend on the batch that it comes in, as long as nothing is dropped
(`backend=capacity` drops) and the router does not read the batch:
`expert_choice` does, and agents refuse it, since the same state would have
another value in another batch, and a search another result in a tree.
`balanced` lets experts choose in training and decides by learned thresholds
afterwards; `soft` mixes the tokens of a state, the axis before the features,
and no others.

Axes: see `networks.routing`.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from networks import balance, dispatch, expert_parallel, mlp, ragged, routers


@dataclasses.dataclass(frozen=True)
class Config:
  """A mixture's sizes and variants; the defaults are the paper's for text.

  Attributes:
    num_experts: E; 0 for no mixture where a network has one by choice.
    router: which expert gets which token, see `networks.routers`.
    hidden: width of the hidden layer of a plain expert.
    importance_weight: of the loss on importance (equation 7).
    load_weight: of the loss on the load (equation 11).
    z_weight: of the loss on the gate's logits; 0 in the paper.
    backend: see `networks.dispatch`.
    capacity_factor: places of an expert over its even share, where the backend
      has a capacity.
    room_factor: where experts are divided over devices, room between two of
      them over the even share; what finds none waits for a further round, see
      `networks.expert_parallel`.
  """

  num_experts: int = 32
  router: routers.Config = dataclasses.field(default_factory=routers.NoisyTopK)
  hidden: int = 1024
  importance_weight: float = 0.1
  load_weight: float = 0.1
  z_weight: float = 0.0
  backend: dispatch.Backend = 'auto'
  capacity_factor: float = 2.0
  room_factor: float = 2.0

  def __post_init__(self):
    if not isinstance(self.router, routers.Config):
      raise ValueError(
        f'router={self.router!r}: must be a config of networks.routers'
      )
    if self.backend not in dispatch.BACKENDS:
      raise ValueError(
        f'backend={self.backend!r}: must be one of '
        f'{", ".join(dispatch.BACKENDS)}'
      )
    if self.num_experts < 0:
      raise ValueError(f'num_experts={self.num_experts}: must be 0 or more')
    if self.hidden < 1:
      raise ValueError(f'hidden={self.hidden}: must be 1 or more')
    for name in ('importance_weight', 'load_weight', 'z_weight'):
      routers.check_above(name, getattr(self, name), 0)
    for name in ('capacity_factor', 'room_factor'):
      routers.check_above(name, getattr(self, name), 0, strictly=True)
    if self.num_experts:
      self.make_router()

  def make_router(self) -> routers.Router:
    """The router as functions.

    Raises:
      ValueError: it does not fit the number of experts.
    """
    return self.router.make(self.num_experts)


class Aux(NamedTuple):
  """What a mixture returns next to its output.

  Attributes:
    loss: float32 scalar, the weighted sum of `losses`: add it to the learner's.
    losses: float32 scalars by name, unweighted.
    importance: float32 `[E]`, sums of gates.
    load: float32 `[E]`, tokens an expert, smooth where there is noise.
    count: float32 `[E]`, tokens that each expert really got.
    dropped: float32 scalar, share of pairs of token and expert that found no
      place.
    rounds: float32 scalar, how often tokens were exchanged with other devices;
      1 where all found room at once, 0 where experts are not divided.
  """

  loss: jax.Array
  losses: dict[str, jax.Array]
  importance: jax.Array
  load: jax.Array
  count: jax.Array
  dropped: jax.Array
  rounds: jax.Array


def weighted(config: Config, losses: dict[str, jax.Array]) -> jax.Array:
  """The sum of a mixture's losses, each with its weight.

  Args:
    config: has the weights.
    losses: float32 scalars by name.

  Returns:
    float32 scalar.
  """
  total = 0.0
  for name, loss in losses.items():
    # A router has the weights of its own losses.
    owner = config if hasattr(config, f'{name}_weight') else config.router
    total = total + getattr(owner, f'{name}_weight') * loss
  return jnp.asarray(total)


def metrics(aux: Aux) -> dict[str, jax.Array]:
  """Diagnostics: coefficients of variation, the fullest expert over the mean.

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
    'rounds': aux.rounds,
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

  With `mutable=['plans']`, `plans['plan'][0]` is the router's `routing.Plan` of
  the tokens. Where the router keeps statistics, the collection `stats` changes
  if it is mutable and `train` is true.

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
    router = self.config.make_router()
    by_state = router.reads == 'state'
    if by_state and x.ndim < 2:
      raise ValueError(f'x: shape {x.shape}, must be [..., tokens, features]')
    tokens = x.reshape(-1, x.shape[-1])
    params, expert = self._experts(tokens)
    if by_state:
      # The tokens of one state mix, those of two never do.
      states = x.reshape(-1, *x.shape[-2:])
      each = self._route(router, states, train)
      work = lambda plan, x: dispatch.apply(plan, x, params, expert)[0]
      y = jax.vmap(work)(each.plan, states)
      dropped = rounds = jnp.zeros(())
      found = jax.tree.map(lambda x: x.sum(0), each)
      losses = jax.tree.map(lambda x: x.mean(0), each.losses)
      found = found._replace(losses=losses)
    else:
      found = self._route(router, tokens, train)
      # Kept only for callers that ask with `mutable=['plans']`.
      if not self.is_initializing():
        self.sow('plans', 'plan', found.plan)
      y, dropped, rounds = expert_parallel.apply(
        found.plan,
        tokens,
        params,
        expert,
        axis=self.axis,
        bundle=self._bundle(router),
        backend=self.config.backend,
        capacity_factor=self.config.capacity_factor,
        room_factor=self.config.room_factor,
      )
    aux = Aux(
      weighted(self.config, found.losses),
      found.losses,
      found.importance,
      found.load,
      found.count,
      dropped,
      rounds,
    )
    return y.reshape(*x.shape[:-1], -1), aux

  def _bundle(self, router):
    """Places of a token that travel together: those of a group."""
    groups = self.config.num_experts // router.group_size
    # A group lies on one device where its devices share the groups evenly.
    whole = groups % expert_parallel.devices(self.axis) == 0
    return router.bundle if whole else 1

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

  def _route(self, router, tokens, train):
    """`Routing` of tokens `[T, D]`, or of states `[B, T, D]`."""
    first, first_stats = router.init(tokens.shape[-1])
    params = {k: self.param(k, lambda _, v=v: v) for k, v in first.items()}
    stats = {
      k: self.variable('stats', k, lambda v=v: v)
      for k, v in first_stats.items()
    }
    keys = None
    if train and router.num_keys:
      keys = tuple(self.make_rng('gate') for _ in range(router.num_keys))
    now = {k: v.value for k, v in stats.items()}
    route = lambda x: router.route(params, now, x, keys, train)
    tokens = tokens.astype(jnp.float32)
    found, new = (jax.vmap(route) if tokens.ndim == 3 else route)(tokens)
    if (
      train
      and self.is_mutable_collection('stats')
      and not self.is_initializing()
    ):
      for k, v in stats.items():
        v.value = new[k]
    return found
