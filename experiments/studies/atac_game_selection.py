"""Which beta, without a simulator? Compares rules that see only the data.

For many random MDPs a data set is drawn, ATAC's Algorithm 1 is played on it for
each beta, and a rule chooses one of the results by fitted Q evaluation (FQE),
in a finite MDP an exact least squares. The true returns give the regret of the
choice.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.report.statistics import mean_interval

BETAS = (0.0, 1 / 256, 1 / 16, 1.0, 16.0, 256.0, 4096.0)
COVERAGE = ('full', 'partial')
# Of the bootstrap, in rules that subtract one standard deviation.
_RESAMPLES = 20


class Evidence(NamedTuple):
  """Estimates on each data set; float64 `[M, F, ...]`: MDPs, coverages.

  Attributes:
    truth: `[..., betas]`, J of each result.
    behaviour: `[...]`, J of mu.
    optimum: `[...]`, J*.
    fqe: `[..., betas]`, from the data that was trained on.
    resampled: `[..., R, betas]`, FQE on R bootstrap resamples of it.
    fqe_behaviour: `[...]`, FQE of mu as estimated from the data.
    resampled_behaviour: `[..., R]`.
    held_out: `[..., betas]`, training on one half of the data, FQE on the
      other.
  """

  truth: Any
  behaviour: Any
  optimum: Any
  fqe: Any
  resampled: Any
  fqe_behaviour: Any
  resampled_behaviour: Any
  held_out: Any


class Choice(NamedTuple):
  """How good the choices of a rule are: a line of atac_game_selection.csv.

  Returns are in units of `J* - J(mu)`.

  Attributes:
    coverage: of the behaviour policy: `full`, or `partial`.
    transitions: in each data set.
    rule: of choice; see `choose`.
    regret: J of the best beta less the chosen one's; mean over MDPs.
    regret_low: of its 95% interval (Student's).
    regret_high: likewise.
    gain: J of the choice less mu's; mean.
    gain_worst_tenth: mean of the lowest tenth of the gains.
    below_behaviour: share of MDPs where the choice is worse than mu.
  """

  coverage: str
  transitions: int
  rule: str
  mdps: int
  regret: float
  regret_low: float
  regret_high: float
  gain: float
  gain_worst_tenth: float
  below_behaviour: float
  beta_median: float


def draw_mdps(key, mdps: int, states: int, actions: int, value_max: float):
  """`M` random MDPs with rewards in [0, 1], with two behaviour policies each.

  Args:
    key: in float64 mode, as the whole call must be.
    mdps: `M`.
    states: of each.
    actions: at least 3, so that mu has a choice without one.
    value_max: `1 / (1 - g)`.

  Returns:
    `bellman.MDP` with `[M, ...]` fields, and mu `[M, 2, S, A]`, in the order of
    `COVERAGE`: one from the uniform distribution over policies, and the same
    without one action of each state.
  """
  import jax
  import jax.numpy as jnp

  from search.exact import bellman

  def one(key):
    keys = jax.random.split(key, 3)
    mdp = bellman.random_mdp(
      keys[0], states, actions, discount=1 - 1 / value_max
    )
    full = jax.random.exponential(keys[1], (states, actions))
    never = jax.random.randint(keys[2], (states,), 0, actions)
    partial = jnp.where(jax.nn.one_hot(never, actions) > 0, 0, full)
    mu = jnp.stack([full, partial])
    return mdp, mu / jnp.sum(mu, axis=-1, keepdims=True)

  return jax.jit(jax.vmap(one))(jax.random.split(key, mdps))


def collect(
  key,
  sizes: Sequence[int],
  *,
  mdps: int,
  states: int,
  actions: int,
  iterations: int,
  value_max: float = 10.0,
) -> Iterator[Evidence]:
  """Draws data sets, plays the game on them for each beta and evaluates.

  A transition is a state from mu's occupancy, an action from mu, a reward of 0
  or 1 with the MDP's expectation, and a next state. A larger data set starts
  with the smaller one. Call it in float64 mode.

  Args:
    sizes: numbers of transitions, each at least 2.
    mdps: `M`.
    iterations: of the game, exponentiated weights.
    value_max: `1 / (1 - g)`.

  Yields:
    The evidence of each size.
  """
  import jax
  import jax.numpy as jnp

  from search.exact import bellman, offline_game

  oracle = offline_game.exponentiated_weights(actions, value_max, iterations)
  betas, most = jnp.asarray(BETAS), max(sizes)

  def draw(key, probability):
    return jax.random.choice(
      key, probability.size, (most,), p=probability.reshape(-1)
    )

  def count(cells, counted):
    """`[S, A, S, 2]`, of the transitions where `counted` is True."""
    shape = (states, actions, states, 2)
    weights = counted.astype(betas.dtype)
    return jnp.bincount(cells, weights, length=math.prod(shape)).reshape(shape)

  def data_of(counts, mdp):
    rewards = jnp.sum(counts[..., 1], axis=-1)
    return offline_game.empirical(jnp.sum(counts, -1), rewards, mdp, value_max)

  def results(data):
    """The policies of each beta, `[betas, K, S, A]`."""
    play = lambda beta: offline_game.play(data, oracle, beta, iterations).policy
    return jax.vmap(play)(betas)

  def evaluate(mdp, policies):
    """J of the mixtures, `[betas]`."""
    returns = jax.vmap(bellman.expected_return, (None, 0))
    return jnp.mean(jax.vmap(returns, (None, 0))(mdp, policies), axis=-1)

  def one(mdp, mu, key, size):
    keys = jax.random.split(key, 1 + _RESAMPLES)
    weight = offline_game.population(mdp, mu, value_max).weight
    rewards = jnp.stack([1 - mdp.reward, mdp.reward], axis=-1)
    probability = weight[..., None, None] * mdp.transition[..., None]
    cells = draw(keys[0], probability * rewards[:, :, None])
    position = jnp.arange(most)
    used, is_first = position < size, position % 2 == 0
    counts = count(cells, used)
    halves = count(cells, used & is_first), count(cells, used & ~is_first)
    data, half, other = (data_of(x, mdp) for x in (counts, *halves))
    stack = lambda *x: jnp.stack(x)
    policies, by_half = jax.vmap(results)(jax.tree.map(stack, data, half))
    cloned = offline_game.behaviour(data)

    def resample(key):
      again = count(draw(key, counts / size), used)
      again = data_of(again, mdp).mdp
      return evaluate(again, policies), bellman.expected_return(again, cloned)

    resampled, resampled_behaviour = jax.vmap(resample)(keys[1:])
    return Evidence(
      truth=evaluate(mdp, policies),
      behaviour=bellman.expected_return(mdp, mu),
      optimum=bellman.optimal(mdp)[1] @ mdp.initial,
      fqe=evaluate(data.mdp, policies),
      resampled=resampled,
      fqe_behaviour=bellman.expected_return(data.mdp, cloned),
      resampled_behaviour=resampled_behaviour,
      held_out=evaluate(other.mdp, by_half),
    )

  both = jax.vmap(one, (None, 0, None, None))
  everything = jax.jit(jax.vmap(both, (0, 0, 0, None)))
  key, drawing = jax.random.split(key)
  drawn, behaviours = draw_mdps(drawing, mdps, states, actions, value_max)
  keys = jax.random.split(key, mdps)
  for size in sizes:
    found = everything(drawn, behaviours, keys, size)
    yield jax.tree.map(np.asarray, found)


def choose(evidence: Evidence) -> dict[str, np.ndarray]:
  """The index of the beta that each rule takes, int `[M, F]`.

  - `best`: the truth; no rule can be better.
  - `beta=...`: always the same.
  - `fqe`: the largest FQE on the data trained on.
  - `fqe - sd`: less its standard deviation over the bootstrap.
  - `gain - sd`: FQE less mu's, less the deviation of this difference.
  - `held-out`: training on one half and FQE on the other; its beta is then used
    with all data.
  """
  spread = lambda x: np.std(x, axis=2, ddof=1)
  difference = evidence.resampled - evidence.resampled_behaviour[..., None]
  gain = evidence.fqe - evidence.fqe_behaviour[..., None]
  scores = {
    'best': evidence.truth,
    'fqe': evidence.fqe,
    'fqe - sd': evidence.fqe - spread(evidence.resampled),
    'gain - sd': gain - spread(difference),
    'held-out': evidence.held_out,
  }
  chosen = {rule: np.argmax(score, -1) for rule, score in scores.items()}
  shape = evidence.behaviour.shape
  fixed = {f'beta={b:.6g}': np.full(shape, i) for i, b in enumerate(BETAS)}
  return chosen | fixed


def table(evidence: Evidence, transitions: int) -> list[Choice]:
  """Evaluates the choices of each rule."""
  unit = evidence.optimum - evidence.behaviour
  gains = (evidence.truth - evidence.behaviour[..., None]) / unit[..., None]
  rows = []
  for rule, index in choose(evidence).items():
    chosen = np.take_along_axis(gains, index[..., None], -1)[..., 0]
    for column, coverage in enumerate(COVERAGE):
      gain = chosen[:, column]
      regret = np.max(gains[:, column], axis=-1) - gain
      low, high = mean_interval(regret)
      worst = np.sort(gain)[: max(1, len(gain) // 10)]
      rows.append(
        Choice(
          coverage=coverage,
          transitions=transitions,
          rule=rule,
          mdps=len(gain),
          regret=float(np.mean(regret)),
          regret_low=low,
          regret_high=high,
          gain=float(np.mean(gain)),
          gain_worst_tenth=float(np.mean(worst)),
          below_behaviour=float(np.mean(gain < 0)),
          beta_median=float(np.median(np.asarray(BETAS)[index[:, column]])),
        )
      )
  return rows


def study(seed: int, sizes: Sequence[int], **settings: Any) -> list[Choice]:
  """The table of all sizes of data sets, with `collect`'s settings."""
  import jax

  rows = []
  with jax.enable_x64(True):
    evidence = collect(jax.random.key(seed), sizes, **settings)
    for size, found in zip(sizes, evidence):
      rows += table(found, size)
      print(f'data sets of {size} transitions, up to {sizes[-1]}', flush=True)
  return rows
