"""How fast the searches are.

`search`: ours and mctx's, over a trivial network. `sampled`: over K = 20
sampled actions, and our plain search over 20 enumerated ones.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import mctx
import numpy as np

from agents import muzero, sampled_muzero
from agents.core import sampling, unroll
from agents.core.types import ArraySpec, Continuous, Discrete, Spec
from experiments.benchmarks import timing
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import Measurement, interleaved, speed_row
from networks.muzero import NetworkConfig
from search import _mctx, policies, sampled, value_prefix
from search.model import TimeStep


def table_model(
  seed: int, batch: int, actions: int, width: int, states: int = 1024
) -> tuple[Any, Any, Callable]:
  """A model that costs next to nothing: a random table of `states`.

  Priors, values and rewards are normal numbers, so that no scores tie. Each
  embedding has `width` float32 numbers in addition to its state; every step
  writes all of them. Returns `(params, root, recurrent_fn)` for a search.
  """
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    'child': jnp.asarray(rng.integers(states, size=(states, actions))),
    'reward': normal(states, actions),
    'logits': normal(states, actions),
    'value': normal(states),
    # Makes outputs depend on the wide embedding, which would be left out.
    'zero': jnp.zeros(()),
  }

  def recurrent_fn(params, key, action, embedding):
    del key
    state, wide = embedding
    child = params['child'][state, action]
    value = params['value'][child]
    if width:
      value += params['zero'] * wide[:, 0]
    output = mctx.RecurrentFnOutput(
      reward=params['reward'][state, action],
      discount=jnp.full(state.shape, 0.997),
      prior_logits=params['logits'][child],
      value=value,
    )
    return output, (child, wide + 1)

  state = jnp.asarray(rng.integers(states, size=batch))
  root = mctx.RootFnOutput(
    prior_logits=params['logits'][state],
    value=params['value'][state],
    embedding=(state, jnp.zeros((batch, width))),
  )
  return params, root, recurrent_fn


def with_prefix(
  root: mctx.RootFnOutput, recurrent_fn: Callable
) -> tuple[mctx.RootFnOutput, Callable]:
  """A root and a model's step, which predicts sums of rewards instead.

  Args:
    root: of the model.
    recurrent_fn: of the model; its rewards are added up since the last reset,
      every five steps.
  """

  def step(params, key, action, state, carry):
    output, state = recurrent_fn(params, key, action, state)
    total = carry + output.reward
    return value_prefix.PrefixStep(
      total, output.discount, output.prior_logits, output.value, state, total
    )

  embedding = value_prefix.root_embedding(root.embedding, root.value)
  root = root.replace(embedding=embedding)
  return root, value_prefix.recurrent_fn(step, horizon=5)


ALONE = 'embeddings alone'
BFLOAT16 = 'puct, embeddings in bfloat16'


def visits(policy: Callable, num_simulations: int, **own: Any) -> Callable:
  """A policy's search, `(params, key, root, recurrent_fn) -> visits [B, A]`."""

  def search(*args):
    output = policy(*args, num_simulations=num_simulations, **own)
    return output.search_tree.summary().visit_counts

  return search


def policies_in_turn(num_simulations: int) -> dict[str, Callable]:
  """Our searches and mctx's, as `visits` makes them."""
  return theirs(num_simulations) | {
    rule: ours(rule, num_simulations)
    for rule in ('puct', 'efficientzero', 'gumbel')
  }


def theirs(num_simulations: int) -> dict[str, Callable]:
  """mctx's policies, as `visits` makes them."""
  quiet = {'dirichlet_fraction': 0.0}
  return {
    'mctx.muzero_policy': visits(mctx.muzero_policy, num_simulations, **quiet),
    'mctx.gumbel_muzero_policy': visits(
      mctx.gumbel_muzero_policy, num_simulations
    ),
  }


def ours(rule: str, num_simulations: int, **own: Any) -> Callable:
  """A rule's search, as `visits` makes it; `own` are more arguments.

  Without noise at the root, for which ours takes other keys than mctx.
  """
  if rule != 'gumbel':
    own = {'noise': policies.NO_NOISE} | own
  return visits(getattr(policies, rule), num_simulations, **own)


def rounded_puct(num_simulations: int) -> Callable:
  """Our PUCT of `policies_in_turn`, half of the memory for embeddings."""
  return ours('puct', num_simulations, embedding_dtype='bfloat16')


def searches_in_turn(num_simulations: int) -> dict[str, Callable]:
  """`mctx.search` and ours with the same selection functions of mctx."""
  select = mctx.muzero_action_selection

  def alone(search_fn):
    def search(params, key, root, recurrent_fn):
      tree = search_fn(
        params,
        key,
        root=root,
        recurrent_fn=recurrent_fn,
        root_action_selection_fn=functools.partial(select, depth=0),
        interior_action_selection_fn=select,
        num_simulations=num_simulations,
      )
      return tree.summary().visit_counts

    return search

  return {
    'mctx.search': alone(mctx.search),
    'batched search': alone(_mctx.search),
  }


def embeddings_alone(num_simulations: int) -> Callable:
  """No search: one embedding read and written a simulation.

  No search can be faster with such embeddings.
  """

  def move(params, key, root, recurrent_fn):
    del recurrent_fn
    _, wide = root.embedding
    batch = jnp.arange(wide.shape[0])
    tree = jnp.zeros((wide.shape[0], num_simulations + 1, wide.shape[1]))

    def simulation(i, carry):
      tree, total = carry
      parent = jax.random.randint(
        jax.random.fold_in(key, i), batch.shape, 0, i + 1
      )
      row = tree[batch, parent]
      total += params['zero'] * row[:, 0]
      return tree.at[batch, i + 1].set(row + 1), total

    zeros = jnp.zeros(batch.shape)
    return jax.lax.fori_loop(0, num_simulations, simulation, (tree, zeros))[1]

  return move


# Searches with the same rule, which must visit the same nodes.
_SAME_RULE = {
  'puct': 'mctx.muzero_policy',
  'gumbel': 'mctx.gumbel_muzero_policy',
  'batched search': 'mctx.search',
  'puct, kernels': 'mctx.muzero_policy',
  'gumbel, kernels': 'mctx.gumbel_muzero_policy',
  'efficientzero, kernels': 'efficientzero',
}


def search_rows(case: Case) -> list[Measurement]:
  """Simulations a second, ours and mctx's."""
  rows = []
  for width in case.embeddings:
    contenders = policies_in_turn(case.simulations)
    if width:
      contenders[BFLOAT16] = rounded_puct(case.simulations)
      contenders[ALONE] = embeddings_alone(case.simulations)
    rows += measured(case, case.simulations, width, contenders)
  for number in case.deep:
    # mctx's takes minutes there.
    few = case._replace(repeats=min(case.repeats, 3), least_seconds=0.0)
    rows += measured(few, number, 0, policies_in_turn(number))
    rows += measured(few, number, 0, searches_in_turn(number))
  return rows


def measured(
  case: Case, number: int, width: int, contenders: dict[str, Callable]
) -> list[Measurement]:
  """Searches in turns; ratios are to the first of them.

  Args:
    case: its batch, actions and repeats count.
    number: simulations.
    width: float32 numbers in an embedding, in addition to the state.
    contenders: `(params, key, root, recurrent_fn) -> visits [B, A]`.
  """
  params, root, recurrent_fn = table_model(0, case.batch, case.actions, width)
  key = jax.random.key(0)
  found = {}

  def make(name, contender):
    compiled = jax.jit(
      lambda params, key, root: contender(params, key, root, recurrent_fn)
    )
    compiled = compiled.lower(params, key, root).compile()

    def task():
      found[name] = jax.block_until_ready(compiled(params, key, root))

    return task

  tasks, refused = timing.prepared(
    {name: functools.partial(make, name, f) for name, f in contenders.items()}
  )
  timings = interleaved(tasks, case.repeats, case.least_seconds)
  about = (
    f'B={case.batch} N={number} A={case.actions} '
    f'embedding={4 * width + 4} bytes',
    'simulations/s',
  )
  rows = [
    timing.failed('search', name, *about, reason)
    for name, reason in refused.items()
  ]
  first = next(iter(contenders))
  for name, seconds in timings.items():
    baseline = timings.get(first)
    note = '' if name == first or baseline is None else f'ratio to {first}'
    if name == ALONE:
      note += '; what any search must move in memory'
    theirs = found.get(_SAME_RULE.get(name, ''))
    if theirs is not None:
      same = np.sum(np.all(np.asarray(found[name]) == theirs, axis=-1))
      note += (
        f'; visits equal {_SAME_RULE[name]} at {same} of {case.batch} roots'
      )
    amount = case.batch * number
    rows.append(
      speed_row('search', name, *about, amount, seconds, baseline, note)
    )
  return rows


_SAMPLES = 20
_PLAIN = f'puct, {_SAMPLES} enumerated actions'
_LATENT = 128
# Models a measurement, because the depth of a model's trees is random.
_TREES = 4
# Actions of a sampled set that the table model distinguishes.
_DISTINGUISHED = 256


class Family(NamedTuple):
  """A policy over a kind of actions.

  Attributes:
    policy: of `agents.sampled_muzero.Config`.
    action: an `agents.core.types` spec.
  """

  policy: Literal['gaussian', 'factored', 'flat']
  action: Any


def families() -> dict[str, Family]:
  """The families: 6 dimensions, and sets too large to enumerate."""
  high = np.ones(6, np.float32)
  box = Continuous((6,), -high, high)
  return {
    'tanh-Gaussian, 6 dimensions': Family('gaussian', box),
    'factored, 7 bins x 6 dimensions': Family('factored', box),
    'factored, 7^6 joint actions': Family(
      'factored', Discrete(7**6, factors=(7,) * 6)
    ),
    'flat, 7^4 joint actions': Family('flat', Discrete(7**4, factors=(7,) * 4)),
  }


def sampled_table(
  seed: int, batch: int, distribution: Any = None
) -> tuple[Any, Any, Callable]:
  """`table_model` over sampled actions, with trees of the same shape.

  Rewards and children are drawn independently for each state and action, as in
  the plain model. Without a `networks.actions.ActionDistribution` there are
  `_SAMPLES` enumerated actions with uniform priors, as those of K different
  draws from a policy are.
  """
  columns = _SAMPLES if distribution is None else _DISTINGUISHED
  params, root, inner = table_model(seed, batch, columns, 0)
  if distribution is None:
    logits = jnp.zeros_like(params['logits'])
  else:
    shape = (params['value'].shape[0], distribution.num_parameters)
    noise = np.random.default_rng(seed).normal(size=shape)
    logits = jnp.asarray(noise / 2, jnp.float32)
  params = params | {'logits': logits}
  root = root.replace(prior_logits=logits[root.embedding[0]])

  def recurrent_fn(params, key, action, embedding):
    if jnp.issubdtype(action.dtype, jnp.floating):
      action = jnp.abs(1e3 * action.sum(-1)).astype(jnp.int32)
    return inner(params, key, action % columns, embedding)

  return params, root, recurrent_fn


def sampled_network(
  seed: int, batch: int, family: Family | None
) -> tuple[Any, Any, Callable]:
  """A fresh learned model of an observation of 24 numbers, like `table_model`.

  Without a family there are `_SAMPLES` enumerated actions. The networks differ
  in the policy head and in the layer that reads the action.
  """
  network = NetworkConfig(
    torso='vector',
    latent='vector',
    latent_size=_LATENT,
    head_hidden=(64,),
    reward='reward',
    value_bins=101,
    reward_bins=101,
    projector=(8,),
    predictor=(8,),
    state_norm=True,
  )
  observation, distribution = ArraySpec((24,)), None
  if family is None:
    spec = Spec(observation, Discrete(_SAMPLES))
    networks = muzero.make_networks(muzero.Config(network=network), spec)
  else:
    spec = Spec(observation, family.action)
    config = sampled_muzero.Config(network=network, policy=family.policy)
    networks = sampled_muzero.make_networks(config, spec)
    distribution = sampling.make_distribution(config, spec)
  model = unroll.learned_model(networks, gamma=0.997, distribution=distribution)
  key = jax.random.key(seed)
  weights, statistics = jax.jit(networks.init)(key)
  params = unroll.Params(weights, statistics, jnp.zeros((), jnp.int32))
  seen = np.random.default_rng(seed).normal(size=(batch, 24))
  zeros, no = jnp.zeros(batch), jnp.zeros(batch, bool)
  timestep = TimeStep(jnp.asarray(seen, jnp.float32), zeros, zeros + 1, no, no)
  return params, model.root(params, timestep, key), model.step


def mean_path(parents: np.ndarray) -> float:
  """Edges from the root to a node, mean over all but the root.

  Args:
    parents: int `[B, N]`, of an mctx tree; a node's number is above its
      parent's.
  """
  return float(_depths(parents)[:, 1:].mean())


def turns(parents: np.ndarray) -> int:
  """Turns of loops of unknown length in a search by `engine='loops'`.

  A descent turns as often as the deepest of the batch has edges, but for the
  first, which comes before the loop; a climb turns once for every edge.

  Args:
    parents: int `[B, N]`, of a search without a limit of the depth.
  """
  deepest = _depths(parents)[:, 1:].max(axis=0)
  return int((2 * deepest - 1).sum())


def _depths(parents):
  depth = np.zeros(parents.shape)
  for node in range(1, parents.shape[1]):
    up = parents[:, node : node + 1]
    depth[:, node] = np.take_along_axis(depth, up, axis=1)[:, 0] + 1
  return depth


def sampled_rows(case: Case) -> list[Measurement]:
  """Simulations a second over sampled and over enumerated actions.

  Evaluating the root's actions beforehand takes K more calls of the model a
  root in one batch; these do not count as simulations.
  """
  rows = []
  for kind in ('table', 'network'):
    rows += _sampled(case, kind, families())
  return rows


def _sampled(
  case: Case, kind: str, chosen: Mapping[str, Family]
) -> list[Measurement]:
  def models(family, distribution):
    if kind == 'network':
      make = functools.partial(sampled_network, family=family)
    else:
      make = functools.partial(sampled_table, distribution=distribution)
    return [make(seed, case.batch) for seed in range(_TREES)]

  paths, tasks = {}, {}

  def add(name, search, models):
    tasks[name] = _several(search, models, case.simulations, name, paths)

  add(_PLAIN, policies.puct, models(None, None))
  for name, family in chosen.items():
    distribution = _distribution(family)
    its = models(family, distribution)
    for suffix, evaluates in (('', False), (', root evaluated', True)):
      search = functools.partial(
        sampled.search,
        distribution=distribution,
        num_samples=_SAMPLES,
        evaluate_root=evaluates,
      )
      add(name + suffix, search, its)
  timings = interleaved(tasks, case.repeats, case.least_seconds)
  what = 'a table' if kind == 'table' else f'networks of latent {_LATENT}'
  setting = f'B={case.batch} N={case.simulations} K={_SAMPLES}, {what}'
  amount = _TREES * case.batch * case.simulations
  rows = []
  for name, seconds in timings.items():
    length = np.mean([mean_path(x) for x in paths[name]])
    note = f'paths of {length:.1f} edges'
    if name != _PLAIN:
      note = f'ratio to {_PLAIN}; {note}'
    unit, baseline = 'simulations/s', timings[_PLAIN]
    rows.append(
      speed_row('sampled', name, setting, unit, amount, seconds, baseline, note)
    )
  return rows


def _several(search, models, number, name, paths):
  """A task that searches each model once and leaves its trees' parents."""
  recurrent_fn = models[0][2]

  def whole(params, key, root):
    output = search(params, key, root, recurrent_fn, number)
    return output.search_tree.parents, output.action, output.action_weights

  compiled = jax.jit(whole)

  def task():
    found = [
      compiled(params, jax.random.key(seed), root)
      for seed, (params, root, _) in enumerate(models)
    ]
    paths[name] = [np.asarray(x[0]) for x in jax.block_until_ready(found)]

  return task


def _distribution(family: Family) -> Any:
  """The distribution that the sampled agent draws from."""
  config = sampled_muzero.Config(policy=family.policy)
  return sampling.make_distribution(
    config, Spec(ArraySpec((1,)), family.action)
  )
