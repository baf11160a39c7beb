"""TD-Gammon: a network that learns to value positions by playing itself.

Tesauro 1995 (Communications of the ACM 38, 3). A network of one hidden layer
gives five probabilities of a board, as the player about to roll sees it, in
gnubg's order and each including the next: that it wins, wins a gammon, wins a
backgammon, loses a gammon, loses a backgammon. With outputs `Y`, weights `w`
and eligibility traces `e`, one for each output (Sutton 1988),

  w += alpha sum_k (Y'_k - Y_k) e_k,      e_k <- lambda e_k + grad_w Y_k

after every turn; at the end of a game `Y'` is its outcome. A turn is chosen by
the value of the board that it leads to, with no exploration: dice explore.

Departures and choices:

* One network sees every board from the side of the player to roll. The
  prediction for the next board is therefore turned round before it serves as a
  target, and so is the trace: a head of one side is a head of the other, and
  the first one changes its sign.
* Several games are played at once, each with traces of its own, and the update
  is the mean over them; a learning rate per game would be `alpha / streams`.
* Five outputs instead of four; the value of a board is its expected points,
  not only the chance to win.

Depths of planners: `step` and `outcomes` lead to a board with its roll, and a
value never depends on the roll. One stage of lookahead is thus Tesauro's 1-ply
(gnubg's 0-ply); two stages with `outcomes` average the best replies over 21
rolls, his 2-ply. As the 21 values after one turn are equal, only one is
computed. Few positions have many candidates, and a lookahead values unused
places too: a 2-ply player of the five best turns, whose replies are chosen
among 128, costs a quarter of one that chooses among 512, and took the same
turn in 200 of 200 positions:

  lookahead(2, widths=(5, None), rank='value',
            later=exact_model(backgammon.game(128), networks, 128))

Axes: `B` streams, `K` candidates, `H` heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx

from agents.core import ranges
from agents.core.types import Agent, Candidates, Experience, Info, Spec
from networks import mlp
from search import model as models
from search.model import Game, Model

HEADS = 5


@dataclasses.dataclass(frozen=True)
class Config:
  """TD-Gammon's hyper-parameters.

  Attributes:
    hidden: units of the hidden layer.
    learning_rate: alpha, applied to the mean update over the streams.
    trace_decay: lambda, the decay of the eligibility traces.
    chunk: number of candidate moves evaluated at once when acting; see
      `greedy`.
    streams: number of games played at once; follows from env.num_envs.
  """

  # It takes every step of its streams once and in order, not a replay's.
  fresh: ClassVar[bool] = True

  hidden: int = 40
  learning_rate: float = 0.1
  trace_decay: float = 0.7
  chunk: int = 32
  streams: int = 1

  def __post_init__(self):
    ranges.at_least(self, 1, 'hidden', 'chunk', 'streams')
    ranges.above(self, 0, 'learning_rate')
    ranges.within(self, 0, 1, 'trace_decay')


class Streams(NamedTuple):
  """What belongs to the games that are going on.

  Attributes:
    observation: float32 `[B, F]`, of the board before the last turn.
    trace: as the parameters, leaves `[B, H, ...]`: the eligibility of each
      head, from the side of the player who was to roll on that board.
  """

  observation: chex.Array
  trace: Any


class State(NamedTuple):
  """What training changes.

  Attributes:
    params: of the network.
    streams: see `Streams`.
  """

  params: Any
  streams: Streams


class Losses(NamedTuple):
  """The term; replace it with `losses._replace`.

  Attributes:
    error: `(prediction [B, H], target [B, H]) -> [B, H]`, which multiplies the
      traces.
  """

  error: Callable[[chex.Array, chex.Array], chex.Array]


def make_losses() -> Losses:
  """The temporal difference."""
  return Losses(error=lambda prediction, target: target - prediction)


def make_networks(
  config: Config, spec: Spec, reduce: Callable | None = None
) -> mlp.Network:
  """The network: `apply(params, observation [..., F]) -> heads [..., H]`.

  Args:
    config: hyper-parameters.
    spec: of self-play.
    reduce: not used, there are no statistics.

  Raises:
    ValueError: the environment is not a game that lists its turns.
  """
  del reduce
  game = _game_of(spec)
  (size,) = game.spec.observation.shape
  network = mlp.make(size, (config.hidden,), HEADS, jax.nn.sigmoid)
  return mlp.Network(
    network.init, lambda params, x: jax.nn.sigmoid(network.apply(params, x))
  )


def _game_of(spec: Spec) -> Game:
  if spec.game is None or not isinstance(spec.action, Candidates):
    raise ValueError(
      f'td_gammon needs a game against itself that lists its turns, such as '
      f'self_play:backgammon; {spec.name} has {spec.action}'
    )
  return spec.game


def equity(heads: chex.Array) -> chex.Array:
  """Expected points of the player about to roll.

  Args:
    heads: float32 `[..., H]`, probabilities.

  Returns:
    float32 `[...]`, within [-3, 3].
  """
  win, win_2, win_3, lose_2, lose_3 = jnp.moveaxis(heads, -1, 0)
  return 2.0 * win - 1.0 + win_2 - lose_2 + win_3 - lose_3


def turned(heads: chex.Array) -> chex.Array:
  """Heads float32 `[..., H]` as the other player sees them, `[..., H]`."""
  win, win_2, win_3, lose_2, lose_3 = jnp.moveaxis(heads, -1, 0)
  return jnp.stack([1.0 - win, lose_2, lose_3, win_2, win_3], -1)


def outcome(points: chex.Array) -> chex.Array:
  """The heads `[..., H]` of a game that ended.

  Args:
    points: float32 `[...]`, 1, 2 or 3, negative for a loss.
  """
  reached = (points > 0, points > 1, points > 2, points < -1, points < -2)
  return jnp.stack(reached, -1).astype(jnp.float32)


def make(
  config: Config,
  networks: mlp.Network,
  losses: Losses,
  spec: Spec,
  reduce: Callable[[Any], Any] = lambda tree: tree,
) -> Agent:
  """The agent.

  Args:
    config: hyper-parameters.
    networks: from `make_networks`.
    losses: from `make_losses`.
    spec: of self-play.
    reduce: the mean over devices, where one update runs on several.

  Returns:
    An `Agent` whose batches are `Experience`s, one row a stream, each one the
    row that follows its last one. `act` explores only by the dice, and
    `exploit` is the same.

  Raises:
    ValueError: the environment is not a game that lists its candidates.
  """
  game = _game_of(spec)
  assert isinstance(spec.action, Candidates)
  observe = jax.vmap(game.observe)

  def init(key) -> State:
    params = networks.init(key)
    (size,) = game.spec.observation.shape
    trace = jax.tree.map(
      lambda x: jnp.zeros((config.streams, HEADS, *x.shape)), params
    )
    return State(params, Streams(jnp.zeros((config.streams, size)), trace))

  def value(params, observation):
    return equity(networks.apply(params, observation))

  def act(params, key, timestep):
    del key
    action = greedy(game, value, params, timestep.observation, config.chunk)
    return action, {}

  def update(state: State, batch: Experience, key) -> tuple[State, Info]:
    del key
    timestep, streams = batch.timestep, state.streams
    now = observe(timestep.observation)
    before = networks.apply(state.params, streams.observation)
    target = jnp.where(
      (timestep.discount == 0)[:, None],
      outcome(timestep.reward),
      turned(networks.apply(state.params, now)),
    )
    error = losses.error(before, target)
    # No turn leads to the first board of a game.
    error = jnp.where(timestep.is_first[:, None], 0.0, error)
    change = reduce(_weighted(error, streams.trace))
    params = jax.tree.map(
      lambda w, g: w + config.learning_rate * g, state.params, change
    )
    slope = jax.vmap(jax.jacrev(networks.apply), (None, 0))(params, now)
    trace = jax.tree.map(
      lambda e, g: g + config.trace_decay * _kept(e, timestep.is_first),
      streams.trace,
      slope,
    )
    metrics = {
      'loss': jnp.mean(jnp.sum(jnp.square(error), -1)) / 2.0,
      'win': jnp.mean(target[:, 0]),
    }
    return State(params, Streams(now, trace)), Info(reduce(metrics))

  return Agent(
    init=init,
    act=act,
    update=update,
    model=exact_model(game, networks, spec.action.number),
    exploit=act,
  )


def _weighted(error, trace):
  """The mean over streams of errors `[B, H]` times traces `[B, H, ...]`."""
  size = error.shape[0]
  return jax.tree.map(
    lambda e: jnp.tensordot(error, e, ((0, 1), (0, 1))) / size, trace
  )


def _kept(trace, is_first):
  """Traces `[B, H, ...]` as the other player sees them; 0 in a new game."""
  first = is_first.reshape((-1,) + (1,) * (trace.ndim - 2))
  turned_ = [-trace[:, 0], *(trace[:, k] for k in (3, 4, 1, 2))]
  return jnp.stack([jnp.where(first, 0.0, x) for x in turned_], 1)


def greedy(
  game: Game,
  value: Callable[[Any, chex.Array], chex.Array],
  params: Any,
  position: Any,
  chunk: int,
) -> chex.Array:
  """The candidate that leads to the board of the highest value.

  A position has a few dozen candidates in room for hundreds. The candidates of
  all positions are valued in one row, a chunk at a time, without the unused
  room; so are those of positions that `vmap` brings together.

  Args:
    game: whose rewards and discounts depend on nothing but the action.
    value: `(params, observation [N, ...]) -> [N]`.
    params: of the value.
    position: leaves `[B, ...]`.
    chunk: candidates valued at once, of one position; of many up to 16 times
      as many. Static.

  Returns:
    `[B, ...]`, the first of the best.
  """

  def plain(params, position):
    return _best_candidates(game, value, params, position, chunk)

  choose = jax.custom_batching.custom_vmap(plain)

  @choose.def_vmap
  def together(size, is_batched, params, position):
    if any(jax.tree.leaves(is_batched[0])):
      axes = jax.tree.map(lambda x: 0 if x else None, tuple(is_batched))
      return jax.vmap(plain, axes)(params, position), True

    def merge(x, is_mapped):
      x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    action = choose(params, jax.tree.map(merge, position, is_batched[1]))
    return action.reshape(size, -1, *action.shape[1:]), True

  return choose(params, position)


def _best_candidates(game, value, params, position, chunk):
  assert game.candidates is not None
  actions = jax.vmap(game.candidates)(position)
  batch, number = actions.shape[:2]
  chunk = min(chunk * min(batch, 16), batch * number)
  # After the last one the first is repeated.
  flat = actions.reshape(batch, number, -1)
  is_new = (flat != flat[:, :1]).any(-1)
  used = 1 + jnp.max(jnp.where(is_new, jnp.arange(number), 0), -1)
  ends = jnp.cumsum(used)

  def look(i, q):
    place = i * chunk + jnp.arange(chunk)
    row = jnp.searchsorted(ends, place, side='right', method='scan_unrolled')
    # The last chunk is filled up with the last candidate.
    row = jnp.minimum(row, batch - 1)
    slot = jnp.minimum(place - (ends - used)[row], used[row] - 1)
    before = jax.tree.map(lambda x: x[row], position)
    # Whatever is rolled, a value does not depend on it.
    follow = jax.vmap(game.step, (0, 0, None))
    move = follow(before, actions[row, slot], jax.random.key(0))
    after = value(params, jax.vmap(game.observe)(move.state))
    return q.at[row, slot].set(move.reward + move.discount * after)

  none = jnp.full((batch, number), -jnp.inf)
  q = jax.lax.fori_loop(0, (ends[-1] + chunk - 1) // chunk, look, none)
  return actions[jnp.arange(batch), jnp.argmax(q, -1)]


def exact_model(game: Game, networks: mlp.Network, number: int) -> Model:
  """The rules with the network's values: see this module's docstring.

  Args:
    game: with `candidates` and `outcomes`, which differ only in the roll.
    networks: from `make_networks`.
    number: K.

  Returns:
    A `Model` whose prior logits `[B, K]` are zeros.
  """

  def evaluate(params, observation):
    logits = jnp.zeros((observation.shape[0], number))
    return logits, equity(networks.apply(params, observation))

  def outcomes(params, action, embedding):
    assert game.outcomes is not None
    probability, move = jax.vmap(game.outcomes)(embedding, action)
    shape = probability.shape
    seen = jax.vmap(game.observe)(jax.tree.map(lambda x: x[:, 0], move.state))
    logits, value = evaluate(params, seen)
    value = jnp.broadcast_to(value[:, None], shape)
    output = mctx.RecurrentFnOutput(
      reward=move.reward,
      discount=move.discount,
      prior_logits=jnp.broadcast_to(logits[:, None], (*shape, number)),
      value=jnp.where(move.discount == 0, 0.0, value),
    )
    return probability, output, move.state

  return models.exact(game, evaluate)._replace(outcomes=outcomes)
