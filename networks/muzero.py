"""MuZero's and EfficientZero's networks as a NamedTuple of pure functions.

Representation, dynamics and prediction (Schrittwieser et al. 2020, App. F);
value prefix and consistency (Ye et al. 2021, App. A). `NetworkConfig()` is
EfficientZero's network for 96x96x12 Atari frames; latents may be small images
or vectors, observations frames, small images or vectors. One place may have a
mixture of experts (`networks.mixture`).

Axes: `B` batch, `A` actions, `P` projection; `[B, ...]` is a latent,
`[B, H, W, channels]` or `[B, latent_size]`. All outputs are float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args, get_origin

import flax.linen as nn
import jax
import jax.numpy as jnp

from networks import consistency, heads, mixture, mlp, resnet, value_prefix
from networks.moe import Aux
from networks.moe import Config as MixtureConfig
from networks.routers import NoisyTopK

# Images with both sides at least this long get the Atari torso under 'auto'.
_ATARI_SIDE = 64


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
  """Sizes and variants; the defaults are EfficientZero's for Atari.

  Attributes:
    torso: `'atari'` divides the resolution by 16, `'image'` by `stride`,
      `'vector'` flattens the observation; `'auto'` goes by its shape.
    latent: `'image'`, or `'vector'` to flatten what the torso makes of an
      image. A vector torso always makes a vector.
    channels: of an image latent.
    latent_size: width of a vector latent and of its residual layers.
    blocks: residual blocks in each of representation, dynamics, prediction.
    stride: of the image torso's convolution.
    head_channels: to which heads squeeze an image latent by a 1x1 convolution.
    head_hidden: widths of the heads' hidden layers.
    norm: `'batch'`, `'layer'` or `'none'`, everywhere.
    norm_momentum: weight of the old running average in batch norm.
    reward: `'reward'` of one step, or `'value_prefix'` by an LSTM.
    lstm_size: of the value prefix.
    value_bins, reward_bins: odd, see `heads.to_two_hot`.
    projector: widths of SimSiam's projector, the last is `P`.
    predictor: hidden widths of SimSiam's predictor.
    projection_norm: of both. Only `'batch'` keeps the latents of different
      states apart; without it SimSiam may map all of them to one point.
    action_encoding: how an action enters an image latent: one `'plane'` of
      a / A next to the channels (EfficientZero's code) or `'one_hot'` planes.
      A vector latent always takes a one-hot vector. One-hot actions enter by
      a layer of their own, initialised by their own fan-in: as columns beside
      a wide latent they hardly count at first.
    action_embedding: width of a normalised and rectified embedding of actions
      that the dynamics read instead of what they are encoded as (one-hot, if
      discrete); 0 for none (EfficientZero V2).
    observation_scale: `'symlog'` puts observations that are not uint8 through
      `sign(x) log(1 + |x|)` first: for vectors of unknown scale (positions
      beside velocities). `'batch'` normalises the last axis over the batch,
      and by running averages when acting: what all frames share, such as a
      bright background, would leave layer norm little to tell them by.
    state_norm: whether latents are scaled to [0, 1], each by its own minimum
      and maximum (MuZero, App. G).
    compute_dtype: of activations and matrix products; parameters,
      statistics, carries and outputs stay float32.
    mixture: which place has a residual block of experts after its residual
      blocks (`blocks=0`: in their place): the `'torso'`, of represented
      states; the `'dynamics'`; or the `'heads'`, before policy and value.
    mixture_tokens: chunks that a vector latent is cut into, a token each. An
      image latent has one token a pixel.
    mixture_control: one expert in the place of many, with the same tokens and
      operations: the control that arXiv 2410.01930 demands, which found that
      tokens explain the gain and experts do not.
    moe: the mixture. `expert_choice` is refused, and a backend that drops: a
      search's result would depend on the batch.
  """

  torso: Literal['auto', 'atari', 'image', 'vector'] = 'auto'
  latent: Literal['image', 'vector'] = 'image'
  channels: int = 64
  latent_size: int = 256
  blocks: int = 1
  stride: int = 1
  head_channels: int = 16
  head_hidden: tuple[int, ...] = (32,)
  norm: Literal['batch', 'layer', 'none'] = 'batch'
  norm_momentum: float = 0.9
  reward: Literal['reward', 'value_prefix'] = 'value_prefix'
  lstm_size: int = 512
  value_bins: int = 601
  reward_bins: int = 601
  projector: tuple[int, ...] = (1024, 1024, 1024)
  predictor: tuple[int, ...] = (512,)
  projection_norm: Literal['batch', 'layer', 'none'] = 'batch'
  action_encoding: Literal['plane', 'one_hot'] = 'plane'
  action_embedding: int = 0
  observation_scale: Literal['none', 'symlog', 'batch'] = 'none'
  state_norm: bool = False
  compute_dtype: Literal['float32', 'bfloat16'] = 'float32'
  mixture: Literal['none', 'torso', 'dynamics', 'heads'] = 'none'
  mixture_tokens: int = 1
  mixture_control: bool = False
  moe: MixtureConfig = dataclasses.field(
    default_factory=lambda: MixtureConfig(
      num_experts=8, router=NoisyTopK(k=2), hidden=128
    )
  )

  def __post_init__(self):
    for field in dataclasses.fields(self):
      _check_field(field.name, field.type, getattr(self, field.name))
    if not self.projector:
      raise ValueError('projector=(): needs at least one width')
    if self.channels % 2:
      raise ValueError(f'channels={self.channels}: must be even')
    for name in ('value_bins', 'reward_bins'):
      bins = getattr(self, name)
      if bins < 3 or bins % 2 == 0:
        raise ValueError(f'{name}={bins}: must be odd and at least 3')
    # Under a sweep's vmap this may be a tracer, which has no value to check.
    momentum = self.norm_momentum
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
      raise ValueError(f'norm_momentum={momentum}: must be in [0, 1)')
    if self.mixture != 'none':
      mixture.check(self.moe, 'moe')


def _check_field(name, kind, value):
  """Raises unless `value` is one that a field of type `kind` can take."""
  if get_origin(kind) is Literal and value not in get_args(kind):
    choices = ', '.join(map(repr, get_args(kind)))
    raise ValueError(f'{name}={value!r}: must be one of {choices}')
  sizes = (value,) if kind is int else ()
  if get_origin(kind) is tuple:
    if not isinstance(value, tuple):
      raise ValueError(f'{name}={value!r}: must be a tuple of sizes')
    sizes = value
  least = 0 if name in ('blocks', 'action_embedding') else 1
  for size in sizes:
    if not isinstance(size, int) or isinstance(size, bool) or size < least:
      raise ValueError(f'{name}={value!r}: must be at least {least}, integer')


class MuZeroNetworks(NamedTuple):
  """Pure functions of parameters and statistics.

  `stats` holds the running averages of batch norm, `{}` without it: never
  trained, always of the same tree structure. With `train` (a Python bool)
  true, batches are normalised by their own moments and the averages are
  updated; otherwise the averages are used and returned as they came.

  Attributes:
    init: `(key) -> (params, stats)`.
    represent: `(params, stats, observation [B, ...], train) -> (state
      [B, ...], stats)`. uint8 frames are divided by 255, others scaled as the
      config says.
    dynamics: `(params, stats, state, action int32 [B], train) -> (state,
      stats)`; with a `policy_size`, encoded actions float32 `[B, A]`.
    predict: `(params, stats, state, train) -> (policy_logits [B, A] or
      [B, policy_size], value_logits [B, value_bins], stats)`.
    reward: `(params, stats, state_tm1, action_tm1, state_t, carry, train) ->
      (reward_logits [B, reward_bins], carry, stats)`, of arriving at
      `state_t`. As in both papers' code only the new state is read.
    initial_carry: `(batch_size) -> carry`, zeros: `()` for a plain reward,
      else the LSTM's `(c, h)`, `[B, lstm_size]` each.
    project: `(params, stats, state, train) -> (projection [B, P], stats)`.
    predict_projection: `(params, stats, projection, train) -> (prediction
      [B, P], stats)`.
    listen: `(stats, key) -> stats`, to be called by a loss before it calls the
      others with what it returns: with `train`, gates are noisy from there on.
      Without it, and without `train`, gates are those of acting.
    told: `(stats) -> (stats, moe.Aux)`, back again, and what the mixture told
      in between, see `mixture.told`. Without a mixture both return statistics
      as they are, and the `Aux` is None.
  """

  init: Callable[[jax.Array], tuple[Any, Any]]
  represent: Callable[..., tuple[jax.Array, Any]]
  dynamics: Callable[..., tuple[jax.Array, Any]]
  predict: Callable[..., tuple[jax.Array, jax.Array, Any]]
  reward: Callable[..., tuple[jax.Array, Any, Any]]
  initial_carry: Callable[[int], Any]
  project: Callable[..., tuple[jax.Array, Any]]
  predict_projection: Callable[..., tuple[jax.Array, Any]]
  listen: Callable[[Any, jax.Array], Any] = lambda stats, key: stats
  told: Callable[[Any], tuple[Any, Aux | None]] = lambda stats: (stats, None)


def make(
  config: NetworkConfig,
  observation: Any,
  num_actions: int,
  reduce: Callable[[Any], Any] | None = None,
  *,
  policy_size: int | None = None,
) -> MuZeroNetworks:
  """Builds the networks for one kind of observation.

  Args:
    config: sizes and variants.
    observation: anything with `shape` (without batch) and `dtype`:
      `[H, W, C]` for the image torsos, any shape for the vector torso.
    num_actions: how many actions there are; with a `policy_size`, how many
      numbers encode one.
    reduce: mean of an array over devices, for batch statistics under `pmap`.
    policy_size: outputs of the policy head where they are not one logit an
      action (see `networks.actions`). `dynamics` then takes actions that are
      encoded already: a layer of their own reads them, as they are beside a
      vector latent, as constant planes beside an image latent, whatever
      `action_encoding` says.

  Returns:
    The pure functions; nothing is compiled yet.

  Raises:
    ValueError: the torso cannot take this observation, or no actions, or no
      outputs of the policy head, or a latent that does not make the tokens.
  """
  if num_actions < 1:
    raise ValueError(f'num_actions={num_actions}: must be at least 1')
  if policy_size is not None and policy_size < 1:
    raise ValueError(f'policy_size={policy_size}: must be at least 1')
  config = dataclasses.replace(config, torso=_choose_torso(config, observation))
  if config.mixture != 'none':
    config = _with_mixture(config)
  module = _Module(config, num_actions, reduce, policy_size)
  carry_of = functools.partial(_initial_carry, config)

  def init(key):
    batch = jnp.zeros((1, *observation.shape), observation.dtype)
    action = jnp.zeros((1,), jnp.int32)
    if policy_size is not None:
      action = jnp.zeros((1, num_actions))
    variables = module.init(key, batch, action, carry_of(1))
    params = mlp.randomise(variables['params'], key)
    return params, variables.get('stats', {})

  def call(method, params, stats, train, *inputs) -> tuple[Any, Any]:
    listener, rngs = None, None
    if isinstance(stats, mixture.Listener):
      listener, stats = stats, stats.statistics
      rngs = {'gate': mixture.next_key(listener)}
    collections = {'stats': stats} if stats else {}
    variables = {'params': params, **collections}
    own = {'method': method, 'rngs': rngs}
    if train and stats:
      (output, aux), new = module.apply(
        variables, *inputs, True, mutable=['stats'], **own
      )
      stats = new['stats']
    else:
      result: Any = module.apply(variables, *inputs, train, **own)
      output, aux = result
    if listener is not None:
      stats = mixture.hear(listener, stats, aux)
    return output, stats

  def represent(params, stats, observation, train):
    return call('represent', params, stats, train, observation)

  def dynamics(params, stats, state, action, train):
    return call('dynamics', params, stats, train, state, action)

  def predict(params, stats, state, train):
    (policy, value), stats = call('predict', params, stats, train, state)
    return policy, value, stats

  def reward(params, stats, state_tm1, action_tm1, state_t, carry, train):
    del state_tm1, action_tm1
    (logits, carry), stats = call(
      'reward', params, stats, train, state_t, carry
    )
    return logits, carry, stats

  def project(params, stats, state, train):
    return call('project', params, stats, train, state)

  def predict_projection(params, stats, projection, train):
    return call('predict_projection', params, stats, train, projection)

  telling = {}
  if config.mixture != 'none':
    telling['listen'] = functools.partial(mixture.listen, config.moe)
    telling['told'] = functools.partial(mixture.told, config.moe)
  return MuZeroNetworks(
    init=init,
    represent=represent,
    dynamics=dynamics,
    predict=predict,
    reward=reward,
    initial_carry=carry_of,
    project=project,
    predict_projection=predict_projection,
    **telling,
  )


def _with_mixture(config):
  """The config with the mixture that it means, if its latent can be cut."""
  tokens, size = config.mixture_tokens, config.latent_size
  if _has_image(config):
    if tokens != 1:
      raise ValueError(
        f'mixture_tokens={tokens}: an image latent has one token a pixel, must '
        'be 1'
      )
  elif size % tokens:
    raise ValueError(f'mixture_tokens={tokens}: must divide latent_size={size}')
  if not config.mixture_control:
    return config
  return dataclasses.replace(config, moe=mixture.control(config.moe))


def _has_image(config):
  """Whether latents are images; `config.torso` is resolved."""
  return config.torso != 'vector' and config.latent == 'image'


def _choose_torso(config, observation):
  """The torso that fits the observation's shape, or a ValueError."""
  shape = tuple(observation.shape)
  if config.torso == 'auto':
    if len(shape) == 1:
      return 'vector'
    if len(shape) == 3:
      return 'atari' if min(shape[:2]) >= _ATARI_SIDE else 'image'
    raise ValueError(
      f"torso='auto' with observation shape {shape}: must be [D] or [H, W, C];"
      " torso='vector' flattens any other"
    )
  if config.torso != 'vector' and len(shape) != 3:
    raise ValueError(
      f'torso={config.torso!r} with observation shape {shape}: must be'
      ' [H, W, C]'
    )
  return config.torso


def _initial_carry(config, batch_size):
  if config.reward == 'reward':
    return ()
  return value_prefix.initial_carry(batch_size, config.lstm_size)


class _Module(nn.Module):
  """All networks of one agent, a method each; `config.torso` is resolved.

  A method returns its output and what a mixture told in it, or None.
  """

  config: NetworkConfig
  num_actions: int
  reduce: Callable[[Any], Any] | None = None
  policy_size: int | None = None

  def setup(self):
    config = self.config
    dtype = jnp.dtype(config.compute_dtype)
    by_kind = lambda kind: functools.partial(
      mlp.Norm, kind, config.norm_momentum, self.reduce, dtype
    )
    norm = by_kind(config.norm)
    style = {'norm': norm, 'dtype': dtype}
    if config.observation_scale == 'batch':
      self.observation_norm = by_kind('batch')()
    self.is_image = _has_image(config)
    if config.torso == 'atari':
      self.torso = resnet.AtariTorso(config.channels, **style)
    elif config.torso == 'image':
      self.torso = resnet.ImageTorso(config.channels, config.stride, **style)
    # To a vector latent, and from a latent and an action to the next one.
    linear = functools.partial(
      mlp.Linear, config.latent_size, use_bias=False, dtype=dtype
    )
    if self.is_image:
      block = functools.partial(resnet.ResidualBlock, config.channels, **style)
      self.transition = resnet.Conv(config.channels, dtype=dtype)
    else:
      block = functools.partial(mlp.ResidualMLP, **style)
      self.flatten, self.flatten_norm = linear(), norm()
      self.transition = linear()
    self.is_encoded = self.policy_size is not None
    plane = config.action_encoding == 'plane' and not self.is_encoded
    self.joins_plane = self.is_image and plane
    if self.is_image and not plane:
      self.action = resnet.Conv(config.channels, dtype=dtype)
    elif not self.is_image:
      self.action = linear()
    if config.action_embedding:
      width = config.action_embedding
      self.embed = mlp.Linear(width, use_bias=False, dtype=dtype)
      self.embed_norm = by_kind('layer')()
    self.transition_norm = norm()
    for name in ('represent', 'dynamics', 'predict'):
      blocks = tuple(block() for _ in range(config.blocks))
      setattr(self, f'{name}_blocks', blocks)
    if config.mixture != 'none':
      self.mixture = mixture.Block(config.moe, config.mixture_tokens, **style)

    sizes = {'channels': config.head_channels, 'hidden': config.head_hidden}
    outputs = self.policy_size or self.num_actions
    self.policy_head = heads.Head(outputs, **sizes, **style)
    self.value_head = heads.Head(config.value_bins, **sizes, **style)
    if config.reward == 'reward':
      self.plain_reward = heads.Head(config.reward_bins, **sizes, **style)
    else:
      self.value_prefix = value_prefix.ValuePrefix(
        config.reward_bins, lstm_size=config.lstm_size, **sizes, **style
      )
    style['norm'] = by_kind(config.projection_norm)
    self.projector = consistency.Projector(config.projector, **style)
    self.predictor = consistency.Predictor(config.predictor, **style)

  def represent(self, observation, train):
    symlog = self.config.observation_scale == 'symlog'
    if symlog and observation.dtype != jnp.uint8:
      x = observation.astype(jnp.float32)
      observation = jnp.sign(x) * jnp.log1p(jnp.abs(x))
    x = observation.astype(self.config.compute_dtype)
    if observation.dtype == jnp.uint8:
      x = x / 255
    if self.config.observation_scale == 'batch':
      x = self.observation_norm(x, train)
    if self.config.torso != 'vector':
      x = self.torso(x, train)
    if not self.is_image:
      x = self.flatten(x.reshape(x.shape[0], -1))
      x = jax.nn.relu(self.flatten_norm(x, train))
    for block in self.represent_blocks:
      x = block(x, train)
    x, aux = self._mix('torso', x, train)
    return self._finish(x), aux

  def dynamics(self, state, action, train):
    encoded = self._encode(state, action)
    if self.joins_plane:
      x = self.transition(jnp.concatenate([state, encoded], -1))
    else:
      x = self.transition(state) + self.action(encoded)
    x = self.transition_norm(x, train)
    x = jax.nn.relu(x + state.astype(x.dtype))
    for block in self.dynamics_blocks:
      x = block(x, train)
    x, aux = self._mix('dynamics', x, train)
    return self._finish(x), aux

  def _mix(self, place, x, train):
    """Through the mixture, if it is here, with its `Aux`, or None."""
    if self.config.mixture != place:
      return x, None
    return self.mixture(x, train)

  def _encode(self, state, action):
    """The action as `[B, H, W, E]`, or `[B, E]` beside a vector.

    E is 1, A or the size of an embedding.
    """
    if self.is_encoded:
      encoded = action.astype(jnp.float32)
    elif self.joins_plane and not self.config.action_embedding:
      encoded = (action / self.num_actions).astype(jnp.float32)[:, None]
    else:
      encoded = jax.nn.one_hot(action, self.num_actions)
    if self.config.action_embedding:
      # The constant is a bias that is random, too, at first: without one the
      # norm takes away how large the only component of an action is.
      constant = jnp.ones((*encoded.shape[:-1], 1))
      encoded = self.embed(jnp.concatenate([encoded, constant], -1))
      encoded = jax.nn.relu(self.embed_norm(encoded, False))
    if not self.is_image:
      return encoded
    shape = (*state.shape[:3], encoded.shape[-1])
    return jnp.broadcast_to(encoded[:, None, None], shape)

  def _finish(self, state):
    """The latent as everything outside sees it: float32, scaled if asked."""
    state = state.astype(jnp.float32)
    if not self.config.state_norm:
      return state
    # By place and not by `min`, whose gradient looks for the entries that equal
    # it and divides by their number: a compiler that computes the state twice,
    # rounding differently, may find none of them.
    flat = state.reshape(state.shape[0], -1)
    ends = (jnp.argmin(flat, -1), jnp.argmax(flat, -1))
    low, high = (jnp.take_along_axis(flat, i[:, None], -1) for i in ends)
    flat = (flat - low) / jnp.maximum(high - low, 1e-5)
    return flat.reshape(state.shape)

  def predict(self, state, train):
    x = state
    for block in self.predict_blocks:
      x = block(x, train)
    x, aux = self._mix('heads', x, train)
    return (self.policy_head(x, train), self.value_head(x, train)), aux

  def reward(self, state, carry, train):
    if self.config.reward == 'reward':
      return (self.plain_reward(state, train), carry), None
    return self.value_prefix(state, carry, train), None

  def project(self, state, train):
    return self.projector(state, train), None

  def predict_projection(self, projection, train):
    return self.predictor(projection, train), None

  def __call__(self, observation, action, carry):
    """Touches every parameter, for `init`."""
    state, _ = self.represent(observation, False)
    self.predict(state, False)
    state, _ = self.dynamics(state, action, False)
    self.reward(state, carry, False)
    projection, _ = self.project(state, False)
    self.predict_projection(projection, False)
