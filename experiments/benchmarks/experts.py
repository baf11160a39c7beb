"""How fast a mixture's experts work, relative to a dense layer.

Forward and backward of a layer of ReLU experts by every exact dispatch,
measured in turns with a dense layer of the same operations a token: hidden
layers k times as wide. The routing is random and even; the gate is left out.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import Measurement, interleaved, speed_row
from networks import dispatch, expert_parallel, moe
from networks.routing import ByToken


def rows_here(case: Case) -> Iterator[list[Measurement]]:
  """All rows, measured in this process."""
  for number in case.experts:
    yield backend_rows(number, case)
  yield _seed_rows(case.experts[0], case)


def backend_rows(
  number: int, case: Case, dtype: str = 'float32'
) -> list[Measurement]:
  """Every exact backend in turns with a dense layer.

  Args:
    number: of experts.
    case: its sizes and repeats count.
    dtype: of parameters and tokens.
  """
  dense = 'dense layer, as many operations'
  makers = {dense: functools.partial(_dense, case, dtype)}
  one = inputs(number, case, dtype=dtype)
  for backend in ('loop', 'capacity', 'ragged'):
    if backend != 'ragged' or number <= case.ragged:
      makers[backend] = functools.partial(_ready, gradient(backend), one)
  tasks, refused = timing.prepared(makers)
  times = interleaved(tasks, case.repeats, case.least_seconds)
  setting = (
    f'{number} experts of {case.features}x{case.hidden}, k={case.k}, '
    f'{case.tokens} tokens'
  )
  if dtype != 'float32':
    setting += f', {dtype}'
  about = setting, 'tokens/s'
  return [
    speed_row('experts', name, *about, case.tokens, seconds, times.get(dense))
    for name, seconds in times.items()
  ] + [
    timing.failed('experts', name, *about, reason)
    for name, reason in refused.items()
  ]


def _seed_rows(number: int, case: Case) -> list[Measurement]:
  """Seeds vmapped, and one after the other in one program."""
  step = gradient('loop')
  (seeds,) = case.seeds
  smaller = case._replace(tokens=case.seed_tokens)
  each = [inputs(number, smaller, seed) for seed in range(seeds)]
  stacked = jax.tree.map(lambda *x: jax.numpy.stack(x), *each)
  together = _ready(jax.vmap(step), stacked)
  apart = _ready(
    lambda *all_: jax.lax.map(lambda one: step(*one), all_), stacked
  )
  tasks = {'one after the other': apart, 'vmapped': together}
  times = interleaved(tasks, case.repeats, case.least_seconds)
  setting = f'{seeds} seeds of {number} experts, loop'
  amount = seeds * case.seed_tokens
  first, *_ = times.values()
  return [
    speed_row('experts', name, setting, 'tokens/s', amount, seconds, first)
    for name, seconds in times.items()
  ]


def inputs(
  number: int, case: Case, seed: int = 0, dtype: str = 'float32'
) -> Any:
  """A mixture's `(params, tokens [T, D], gates [T, k], experts [T, k])`."""
  key = jax.random.key(seed)
  params = _weights(key, (number,), case.features, case.hidden)
  x = jax.random.normal(key, (case.tokens, case.features))
  scores = jax.random.normal(jax.random.fold_in(key, 1), (case.tokens, number))
  values, chosen = jax.lax.top_k(scores, case.k)
  made = params, x, jax.nn.softmax(values)
  return *jax.tree.map(lambda x: x.astype(dtype), made), chosen


def _weights(key, leading, features, hidden):
  keys = jax.random.split(key)
  shapes = {'in': (features, hidden), 'out': (hidden, features)}
  return {
    name: {'kernel': jax.random.normal(k, (*leading, *shape)) / shape[0] ** 0.5}
    for k, (name, shape) in zip(keys, shapes.items())
  }


def gradient(backend: Any, axis: str | None = None) -> Callable:
  """The gradient of a sum of outputs in parameters, tokens and gates.

  It is a function of `inputs`. Experts are divided over the `axis` of the mesh
  around, if there is one.
  """

  def loss(params, x, gate, chosen):
    hidden, features = params['out']['kernel'].shape[-2:]
    module = moe.FeedForward(hidden, features)
    apply: Any = lambda params, rows: module.apply({'params': params}, rows)
    expert = dispatch.Expert(apply, module.grouped)
    y, *_ = expert_parallel.apply(
      ByToken(chosen, gate), x, params, expert, axis=axis, backend=backend
    )
    return jnp.sum(jnp.sin(y.astype(jnp.float32)))

  return jax.grad(loss, (0, 1, 2))


def _dense(case: Case, dtype: str) -> Callable[[], None]:
  key = jax.random.key(0)
  params = _weights(key, (), case.features, case.k * case.hidden)
  x = jax.random.normal(key, (case.tokens, case.features))

  def loss(params, x):
    hidden = jax.nn.relu(x @ params['in']['kernel'])
    y = hidden @ params['out']['kernel']
    return jnp.sum(jnp.sin(y.astype(jnp.float32)))

  made = jax.tree.map(lambda x: x.astype(dtype), (params, x))
  return _ready(jax.grad(loss, (0, 1)), made)


def _ready(function: Callable, arguments: Any) -> Callable[[], None]:
  """A task that runs the compiled function and waits for it."""
  compiled = jax.jit(function).lower(*arguments).compile()
  return lambda: jax.block_until_ready(compiled(*arguments)) and None
