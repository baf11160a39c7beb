"""How fast the searches are, ours beside mctx's, over a trivial network."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.measure import Row, Sizes, interleaved, speed_row


def table_model(
  seed: int, batch: int, actions: int, width: int, states: int = 1024
) -> tuple[Any, Any, Callable]:
  """A model that costs next to nothing: a random table of states.

  Priors, values and rewards are normal numbers, so that no scores tie.

  Args:
    seed: of the table.
    batch: roots.
    actions: `A`.
    width: float32 numbers that each embedding carries besides its state;
      every step writes all of them anew.
    states: rows of the table.

  Returns:
    `(params, root, recurrent_fn)` for a search.
  """
  import jax.numpy as jnp
  import mctx

  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    'child': jnp.asarray(rng.integers(states, size=(states, actions))),
    'reward': normal(states, actions),
    'logits': normal(states, actions),
    'value': normal(states),
    # Makes outputs depend on the wide embedding, which else were left out.
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


ALONE = 'embeddings alone'


def policies_in_turn(num_simulations: int) -> dict[str, Callable]:
  """Our searches and mctx's, `(params, key, root, recurrent_fn) -> visits`."""
  import mctx

  from search import policies

  def visits(policy):
    def search(*args):
      output = policy(*args, num_simulations=num_simulations)
      return output.search_tree.summary().visit_counts

    return search

  return {
    'mctx.muzero_policy': visits(mctx.muzero_policy),
    'mctx.gumbel_muzero_policy': visits(mctx.gumbel_muzero_policy),
    'puct': visits(policies.puct),
    'efficientzero': visits(policies.efficientzero),
    'gumbel': visits(policies.gumbel),
  }


def searches_in_turn(num_simulations: int) -> dict[str, Callable]:
  """`mctx.search` and ours with the same selection functions of mctx."""
  import mctx

  from search import _mctx

  select = mctx.muzero_action_selection

  def visits(search_fn):
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
    'mctx.search': visits(mctx.search),
    'batched search': visits(_mctx.search),
  }


def embeddings_alone(num_simulations: int) -> Callable:
  """No search: only what any must move, one embedding read and written.

  The bound of what a faster search can reach with such embeddings.
  """
  import jax
  import jax.numpy as jnp

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


# Whose rule is whose: these must visit alike.
_SAME_RULE = {
  'puct': 'mctx.muzero_policy',
  'gumbel': 'mctx.gumbel_muzero_policy',
  'batched search': 'mctx.search',
}


def search_rows(sizes: Sizes) -> list[Row]:
  """Simulations a second, ours beside mctx's."""
  rows = []
  for width in sizes.embeddings:
    contenders = policies_in_turn(sizes.simulations)
    if width:
      contenders[ALONE] = embeddings_alone(sizes.simulations)
    rows += _searches(sizes, sizes.simulations, width, contenders)
  for number in sizes.deep:
    # mctx's takes minutes there.
    few = sizes._replace(repeats=min(sizes.repeats, 3), least_seconds=0.0)
    rows += _searches(few, number, 0, searches_in_turn(number))
  return rows


def _searches(
  sizes: Sizes, number: int, width: int, contenders: dict[str, Callable]
) -> list[Row]:
  import jax

  params, root, recurrent_fn = table_model(0, sizes.batch, sizes.actions, width)
  key = jax.random.key(0)
  found, tasks = {}, {}
  for name, contender in contenders.items():
    compiled = jax.jit(
      lambda params, key, root, f=contender: f(params, key, root, recurrent_fn)
    )

    def task(name=name, compiled=compiled):
      found[name] = jax.block_until_ready(compiled(params, key, root))

    tasks[name] = task
  timings = interleaved(tasks, sizes.repeats, sizes.least_seconds)
  setting = (
    f'B={sizes.batch} N={number} A={sizes.actions} '
    f'embedding={4 * width + 4} bytes'
  )
  first = next(iter(contenders))
  rows = []
  for name, timing in timings.items():
    note = '' if name == first else f'ratio to {first}'
    if name == ALONE:
      note += '; what any search must move in memory'
    if name in _SAME_RULE:
      theirs = np.asarray(found[_SAME_RULE[name]])
      same = np.sum(np.all(np.asarray(found[name]) == theirs, axis=-1))
      note += (
        f'; visits equal {_SAME_RULE[name]} at {same} of {sizes.batch} roots'
      )
    amount = sizes.batch * number
    baseline = timings[first]
    rows.append(
      speed_row(
        'search', name, setting, 'simulations/s', amount, timing, baseline, note
      )
    )
  return rows
