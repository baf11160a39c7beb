"""A language model with a mixture of experts (Shazeer 2017, section 5.1).

  L = mean_t -log p(x_{t+1} | x_1 ... x_t)
      + sum over mixtures of w_importance CV(Importance)^2 + w_load CV(Load)^2

on windows of a text, by Adam with a linear warm-up and then a rate that falls
as one over the root of the step. It only learns and does not act. Held-out text
is evaluated without noise at the gates and without dropout.

Departures:

* Every window starts from an empty memory; the paper's texts are sentences.
* `router=balanced` (Appendix F) chooses among all tokens of a batch in
  training, later ones included, so that its training perplexity means little;
  on held-out text it decides by thresholds, for each token alone.
* The softmax is whole, where the paper samples words.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from agents.core import optim, ranges
from agents.core.types import Agent, Discrete, Info, Spec, Text
from networks import language, moe


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """What a text is cut into.

  Attributes:
    vocabulary: tokens at most; 256 of them are bytes, the others words.
    length: L, tokens of a window.
    held_out: share of the text, at its end, that is never trained on.
    encoding: of the file.
  """

  vocabulary: int = 2048
  length: int = 64
  held_out: float = 0.005
  encoding: Literal['utf-8', 'latin-1'] = 'utf-8'

  def __post_init__(self):
    if self.vocabulary < 256:
      raise ValueError(
        f'vocabulary={self.vocabulary}: must be at least 256, which are the '
        'bytes'
      )
    ranges.at_least(self, 1, 'length')
    ranges.within(self, 0, 1, 'held_out', ends='()')
    ranges.one_of(self, 'encoding')


@dataclasses.dataclass(frozen=True)
class Config:
  """The language model's hyper-parameters; the network is the paper's MoE-32.

  Attributes:
    network: sizes and kinds of the layers.
    text: what the text is cut into.
    optimiser: `adam`; `factored` keeps of the experts' matrices a factored
      second moment only (Appendix D), which is for many of them.
    learning_rate: its peak.
    warmup_updates: linear warm-up.
    log_experts: whether metrics have each expert's share of the tokens,
      `load_0` and so on; 1 is all tokens, k / E an even share.
  """

  network: language.Config = dataclasses.field(default_factory=language.Config)
  text: TextConfig = dataclasses.field(default_factory=TextConfig)
  optimiser: Literal['adam', 'factored'] = 'adam'
  learning_rate: float = 1e-3
  warmup_updates: int = 1000
  log_experts: bool = False

  def __post_init__(self):
    ranges.one_of(self, 'optimiser')
    ranges.at_least(self, 0, 'learning_rate', 'warmup_updates')


class Params(NamedTuple):
  """What predicting needs.

  Attributes:
    network: trained parameters.
    stats: what changes otherwise (a selection bias), not seen by the
      optimiser.
  """

  network: Any
  stats: Any


class State(NamedTuple):
  """What training changes.

  Attributes:
    params: newest parameters.
    opt_state: the optimiser's state, of `params.network`.
  """

  params: Params
  opt_state: Any


class Losses(NamedTuple):
  """The terms; replace one with `losses._replace`.

  Attributes:
    cross_entropy: `(logits [B, L, V], target int32 [B, L]) -> [B, L]`, nats.
  """

  cross_entropy: Callable[..., chex.Array]


def make_networks(
  config: Config,
  spec: Spec,
  reduce: Callable[[Any], Any] | None = None,
) -> language.LanguageModel:
  """The network for a text's spec, whose actions are the tokens.

  Raises:
    ValueError: if the actions are not discrete.
  """
  del reduce
  if not isinstance(spec.action, Discrete):
    raise ValueError(f'language needs tokens; {spec.name} has {spec.action}')
  return language.make(config.network, spec.action.num_actions)


def make_losses() -> Losses:
  """The terms of the module's docstring."""
  return Losses(optax.softmax_cross_entropy_with_integer_labels)


def make_optimiser(config: Config) -> optax.GradientTransformation:
  """Adam, or another rule for the experts' matrices."""
  scale = optax.scale_by_adam()
  if config.optimiser == 'factored':
    rules: dict[Any, Any] = {
      'experts': optim.scale_by_factored_adam(),
      'others': scale,
    }
    scale = optax.partition(rules, _is_of_experts)
  schedule = optim.warmup_inverse_sqrt(
    config.learning_rate, warmup_steps=config.warmup_updates
  )
  return optax.chain(scale, optax.scale_by_learning_rate(schedule))


def _is_of_experts(params):
  def label(path, _):
    inside = any(getattr(key, 'key', None) == 'experts' for key in path)
    return 'experts' if inside else 'others'

  return jax.tree_util.tree_map_with_path(label, params)


def make(
  config: Config,
  networks: language.LanguageModel,
  losses: Losses,
  spec: Spec,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> Agent:
  """The agent.

  Args:
    config: hyper-parameters.
    networks: from `make_networks`.
    losses: from `make_losses`.
    spec: of the text; not needed beyond the networks.
    reduce: the mean over devices, where one update runs on several.

  Returns:
    An `Agent` that does not act, whose batches are `Text`s. The key of an
    update is for dropout and the gates' noise. `evaluate` uses none.
  """
  del spec
  optimiser = make_optimiser(config)

  def init(key) -> State:
    params = Params(*networks.init(key))
    return State(params, optimiser.init(params.network))

  def predict(params: Params, tokens, train, key):
    inputs, target = tokens[:, :-1], tokens[:, 1:]
    logits, aux, stats = networks.apply(*params, inputs, train, key)
    return jnp.mean(losses.cross_entropy(logits, target)), aux, stats

  def total_loss(network, stats, batch, key):
    params = Params(network, stats)
    loss, aux, stats = predict(params, batch.tokens, True, key)
    metrics = {'loss': loss, 'perplexity': jnp.exp(loss)}
    metrics |= _metrics(aux, config.log_experts, batch.tokens[:, 1:].size)
    return loss + sum(one.loss for one in aux), (metrics, stats)

  step = optim.minimise(total_loss, optimiser, reduce)

  def update(state: State, batch: Text, key) -> tuple[State, Info]:
    network, opt_state, (metrics, stats), norm = step(
      state.params.network, state.opt_state, state.params.stats, batch, key
    )
    metrics, stats = reduce((metrics | {'gradient_norm': norm}, stats))
    return State(Params(network, stats), opt_state), Info(metrics)

  def evaluate(params: Params, batch: Text, key=None):
    del key
    loss, _, _ = predict(params, batch.tokens, False, None)
    return {'loss': loss, 'perplexity': jnp.exp(loss)}

  return Agent(init=init, act=None, update=update, evaluate=evaluate)


def _metrics(aux, log_experts, tokens) -> dict[str, chex.Array]:
  """Metrics of all mixtures, with prefixes `layer0_...` if several."""
  found = {}
  for i, one in enumerate(aux):
    own = moe.metrics(one)
    if log_experts:
      share = one.count / tokens
      own |= {f'load_{e}': share[e] for e in range(share.shape[0])}
    prefix = f'layer{i}_' if len(aux) > 1 else ''
    found |= {prefix + name: value for name, value in own.items()}
  return found
