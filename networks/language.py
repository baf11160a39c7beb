"""A language model with a mixture of experts between two LSTMs.

Embedding, LSTM, mixture, LSTM, softmax, all of one width `d` (Shazeer 2017,
Appendix C.1). Every layer but the last has dropout on its output, to which its
input is then added; the mixture's goes through a sigmoid before. A mixture
works on all steps of all texts at once ("convolutionality", section 3.1): on
each expert come L times more tokens than step by step.

In the mixture's place there may be what Table 7 compares it with, of as many
operations a token.

Axes: `B` texts, `L` steps, `V` tokens in the vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from networks import mlp
from networks import moe as mixtures

Layer = Literal['moe', 'dense', 'deep', 'lstm']


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and variants; the defaults are the paper's MoE-32.

  Attributes:
    size: d, of the embedding, the LSTMs and the mixture's input and output.
    dropout: share of a layer's outputs that is dropped; may be traced.
    layer: `moe`; or of as many operations, from Table 7: `dense`, one expert
      with a hidden layer as wide as all active experts' (MoE-1-Wide); `deep`,
      one expert with as many hidden layers as experts are active
      (MoE-1-Deep, of equal operations where `moe.hidden` is 2d); `lstm`, LSTMs
      (4xLSTM).
    num_layers_moe: 1, or 2 of them, one after the other.
    moe: the mixture; the other layers' sizes follow from it.
  """

  size: int = 512
  dropout: float = 0.1
  layer: Layer = 'moe'
  num_layers_moe: int = 1
  moe: mixtures.Config = dataclasses.field(default_factory=mixtures.Config)

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f'size={self.size}: must be 1 or more')
    if self.layer not in get_args(Layer):
      raise ValueError(
        f'layer={self.layer}: must be one of {", ".join(get_args(Layer))}'
      )
    if self.num_layers_moe not in (1, 2):
      raise ValueError(f'num_layers_moe={self.num_layers_moe}: must be 1 or 2')
    if self.moe.num_experts < 1:
      raise ValueError(
        f'num_experts={self.moe.num_experts}: must be 1 or more; for none take '
        'layer=dense'
      )
    if self.layer == 'moe' and self.moe.make_router().reads != 'token':
      raise ValueError(
        f'router={self.moe.router.name}: sees the tokens that are to be '
        'predicted; take noisy_top_k or biased_top_k'
      )
    # Under a sweep's vmap it may be a tracer, which has no value to check.
    if isinstance(self.dropout, (int, float)) and not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout}: must be from 0 to below 1')

  @property
  def lstms(self) -> int:
    """LSTMs with about the operations of a mixture, at least one."""
    operations = 2 * self.size * self.moe.hidden * self.moe.make_router().active
    return max(round(operations / (8 * self.size**2)), 1)


class LanguageModel(NamedTuple):
  """The network as pure functions.

  Attributes:
    init: `(key) -> (params, stats)`; `stats` is what is not trained by
      gradients.
    apply: `(params, stats, tokens int32 [B, L], train, key) -> (logits float32
      [B, L, V], aux, stats)`. Logits at a step are of the next token.
      `aux` is a tuple of `moe.Aux`, one a mixture. `key` (dropout and gates)
      may be None where `train` is False.
    plans: `(params, stats, tokens int32 [B, L]) -> ` a tuple of
      `networks.routing` plans of the B L tokens, one a mixture, without noise.
  """

  init: Callable[[jax.Array], tuple[Any, Any]]
  apply: Callable[..., tuple[jax.Array, tuple[mixtures.Aux, ...], Any]]
  plans: Callable[..., tuple[Any, ...]]


def make(config: Config, vocabulary: int) -> LanguageModel:
  """The model for a vocabulary.

  Args:
    config: sizes.
    vocabulary: V.

  Raises:
    ValueError: a vocabulary of less than 2.
  """
  if vocabulary < 2:
    raise ValueError(f'vocabulary={vocabulary}: must be 2 or more')
  module = _Model(config, vocabulary)

  def init(key):
    others, kernels = jax.random.split(key)
    variables = dict(module.init(others, jnp.zeros((1, 1), jnp.int32), False))
    params = mlp.randomise(variables.pop('params'), kernels)
    return params, variables

  def apply(params, stats, tokens, train=False, key=None):
    streams: dict[str, Any] = {}
    if train:
      assert key is not None
      streams = dict(zip(('dropout', 'gate'), jax.random.split(key)))
    (logits, aux), changed = module.apply(
      {'params': params, **stats},
      tokens,
      train,
      rngs=streams,
      mutable=list(stats) if train else [],
    )
    return logits, aux, {**stats, **changed}

  def plans(params, stats, tokens):
    _, kept = module.apply(
      {'params': params, **stats}, tokens, False, mutable=['plans']
    )
    plans: Any = kept.get('plans') or {}
    return tuple(plans[name]['plan'][0] for name in sorted(plans))

  return LanguageModel(init, apply, plans)


class Size(NamedTuple):
  """A model's cost without embedding and softmax, as Table 7 counts it.

  Attributes:
    operations: multiplications and additions (one of each counts once) of
      matrix products a token, forward.
    parameters: in matrices.
  """

  operations: int
  parameters: int


def size_of(config: Config) -> Size:
  """Operations and parameters: columns 4 and 5 of Table 7, without biases."""
  d, mixture = config.size, config.moe
  lstm, expert = 8 * d**2, 2 * d * mixture.hidden
  active = mixture.make_router().active
  if config.layer == 'moe':
    layer = _mixture_size(mixture, d, expert)
  elif config.layer == 'dense':
    layer = Size(active * expert, active * expert)
  elif config.layer == 'deep':
    inner = (active - 1) * mixture.hidden**2
    layer = Size(expert + inner, expert + inner)
  else:
    layer = Size(config.lstms * lstm, config.lstms * lstm)
  times = config.num_layers_moe
  return Size(*(2 * lstm + times * number for number in layer))


def _mixture_size(config, d, expert):
  router = config.make_router()
  needed, stored = router.columns
  return Size(
    router.active * expert + d * needed,
    config.num_experts * expert + d * stored,
  )


class LSTM(nn.Module):
  """A layer of LSTM cells, `[B, L, F] -> [B, L, d]`, from an empty memory.

  The inputs' products are formed for all steps at once.

  Source: Hochreiter and Schmidhuber 1997, with forget gates, which begin open
  (a bias of 1; Jozefowicz 2015).
  """

  size: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs = mlp.Linear(4 * self.size, name='inputs')(x)
    shape = (self.size, 4 * self.size)
    kernel = self.param('kernel', mlp.spread, shape, jnp.float32)

    def step(carry, gates):
      c, h = carry
      i, f, o, g = jnp.split(gates + h @ kernel, 4, -1)
      c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
      h = jax.nn.sigmoid(o) * jnp.tanh(c)
      return (c, h), h

    # Derived from the input, so that both vary alike where it is sharded.
    zeros = jnp.zeros_like(inputs[:, 0, : self.size])
    _, outputs = jax.lax.scan(step, (zeros, zeros), inputs.swapaxes(0, 1))
    return outputs.swapaxes(0, 1)


class Deep(nn.Module):
  """An expert of several hidden layers with ReLU, no bias (MoE-1-Deep)."""

  hidden: int
  layers: int
  outputs: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for _ in range(self.layers):
      x = jax.nn.relu(mlp.Linear(self.hidden, use_bias=False)(x))
    return mlp.Linear(self.outputs, use_bias=False)(x)


class _Model(nn.Module):
  config: Config
  vocabulary: int

  @nn.compact
  def __call__(self, tokens, train):
    config, aux = self.config, []
    embed = nn.Embed(self.vocabulary, config.size, name='embedding')
    x = self._drop(embed(tokens), train)
    x = x + self._drop(LSTM(config.size, name='lstm_0')(x), train)
    for i in range(config.num_layers_moe):
      if config.layer == 'lstm':
        for j in range(config.lstms):
          own = LSTM(config.size, name=f'lstm_{i}_{j}')
          x = x + self._drop(own(x), train)
        continue
      y, found = self._middle(i, x, train)
      x = x + self._drop(jax.nn.sigmoid(y), train)
      aux += found
    x = x + self._drop(LSTM(config.size, name='lstm_1')(x), train)
    return mlp.Linear(self.vocabulary, name='softmax')(x), tuple(aux)

  def _middle(self, i, x, train):
    """The mixture, or the layer in its place, with its `Aux` if any."""
    config, mixture, name = self.config, self.config.moe, f'layer_{i}'
    if config.layer == 'dense':
      width = mixture.make_router().active * mixture.hidden
      return mixtures.FeedForward(width, config.size, name=name)(x), []
    if config.layer == 'deep':
      layers = mixture.make_router().active
      return Deep(mixture.hidden, layers, config.size, name=name)(x), []
    expert = mixtures.FeedForward(mixture.hidden, config.size)
    y, aux = mixtures.MoE(mixture, expert, name=name)(x, train)
    return y, [aux]

  def _drop(self, x, train):
    # Not flax's, whose rate cannot be traced.
    if not train:
      return x
    rate = self.config.dropout
    if isinstance(rate, (int, float)) and rate == 0:
      return x
    keep = jax.random.bernoulli(self.make_rng('dropout'), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
