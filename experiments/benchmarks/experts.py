"""How fast a mixture's experts work, beside one dense expert as active.

Forward and backward of a layer of ReLU experts by every dispatch that is exact,
measured in turns with a dense layer of the same operations a token: hidden
layers k times as wide. The routing is random and even; the gate is not in. On
a CPU all of it runs on one core in a process of its own.
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments.benchmarks import timing
from experiments.benchmarks.timing import Row, interleaved, speed_row


class ExpertSizes(NamedTuple):
  """How much is measured.

  Attributes:
    tokens: T.
    features: D.
    hidden: of an expert.
    k: experts of a token.
    experts: E, one comparison each.
    ragged: E up to which `ragged_dot` is measured, which is dense on a CPU.
    seeds: vmapped in one program, beside one after the other.
    seed_tokens: T of each seed.
    repeats: of everything.
    least_seconds: that one measurement takes, about.
  """

  tokens: int = 4096
  features: int = 256
  hidden: int = 1024
  k: int = 2
  experts: tuple[int, ...] = (8, 32, 128)
  ragged: int = 8
  seeds: int = 4
  seed_tokens: int = 1024
  repeats: int = 5
  least_seconds: float = 0.3


_QUICK = ExpertSizes(16, 4, 8, 2, (4,), 4, 2, 8, 2, 0.0)


def sizes_here(quick: bool = False, repeats: int = 5) -> ExpertSizes:
  """The sizes for this machine's devices; two minutes on a CPU core.

  Args:
    quick: tiny, to see that it runs.
    repeats: at most 5 are made.
  """
  import jax

  sizes = _QUICK if quick else ExpertSizes()
  if jax.default_backend() != 'cpu' and not quick:
    sizes = sizes._replace(tokens=16384, ragged=128)
  return sizes._replace(repeats=min(repeats, sizes.repeats))


def expert_rows(sizes: ExpertSizes) -> Iterator[list[Row]]:
  """All rows; on a CPU in a process of one core, on an accelerator here."""
  import jax

  if jax.default_backend() != 'cpu' or not hasattr(os, 'sched_setaffinity'):
    yield from rows_here(sizes)
    return
  # How many threads there are is settled before the first use of jax.
  with timing.process(timing.one_core) as pool:
    yield pool.submit(_rows_of_one_core, sizes).result()


def _rows_of_one_core(sizes: ExpertSizes) -> list[Row]:
  rows = [row for some in rows_here(sizes) for row in some]
  return [row._replace(setting=f'{row.setting}, one core') for row in rows]


def rows_here(sizes: ExpertSizes) -> Iterator[list[Row]]:
  """All rows, measured in this process."""
  for number in sizes.experts:
    yield _backend_rows(number, sizes)
  yield _seed_rows(sizes.experts[0], sizes)


def _backend_rows(number: int, sizes: ExpertSizes) -> list[Row]:
  one = case(number, sizes)
  tasks = {'dense layer, as many operations': _dense(sizes)}
  backends = ['loop', 'capacity']
  backends += ['ragged'] if number <= sizes.ragged else []
  for backend in backends:
    tasks[backend] = _ready(gradient(backend), one)
  times = interleaved(tasks, sizes.repeats, sizes.least_seconds)
  first, *_ = times.values()
  setting = (
    f'{number} experts of {sizes.features}x{sizes.hidden}, k={sizes.k}, '
    f'{sizes.tokens} tokens'
  )
  return [
    speed_row('experts', name, setting, 'tokens/s', sizes.tokens, timing, first)
    for name, timing in times.items()
  ]


def _seed_rows(number: int, sizes: ExpertSizes) -> list[Row]:
  """Seeds vmapped, beside the same one after the other in one program."""
  import jax

  step = gradient('loop')
  cases = [
    case(number, sizes._replace(tokens=sizes.seed_tokens), seed)
    for seed in range(sizes.seeds)
  ]
  stacked = jax.tree.map(lambda *x: jax.numpy.stack(x), *cases)
  together = _ready(jax.vmap(step), stacked)
  apart = _ready(lambda *case: jax.lax.map(lambda c: step(*c), case), stacked)
  tasks = {'one after the other': apart, 'vmapped': together}
  times = interleaved(tasks, sizes.repeats, sizes.least_seconds)
  setting = f'{sizes.seeds} seeds of {number} experts, loop'
  amount = sizes.seeds * sizes.seed_tokens
  first, *_ = times.values()
  return [
    speed_row('experts', name, setting, 'tokens/s', amount, timing, first)
    for name, timing in times.items()
  ]


def case(number: int, sizes: ExpertSizes, seed: int = 0) -> Any:
  """A mixture's inputs.

  Args:
    number: E.
    sizes: T, D, the hidden width and k.
    seed: of all numbers.

  Returns:
    `(params, tokens [T, D], gates [T, k], experts [T, k])`.
  """
  import jax

  key = jax.random.key(seed)
  params = _weights(key, (number,), sizes.features, sizes.hidden)
  x = jax.random.normal(key, (sizes.tokens, sizes.features))
  scores = jax.random.normal(jax.random.fold_in(key, 1), (sizes.tokens, number))
  values, chosen = jax.lax.top_k(scores, sizes.k)
  return params, x, jax.nn.softmax(values), chosen


def _weights(key, leading, features, hidden):
  import jax

  keys = jax.random.split(key)
  shapes = {'in': (features, hidden), 'out': (hidden, features)}
  return {
    name: {'kernel': jax.random.normal(k, (*leading, *shape)) / shape[0] ** 0.5}
    for k, (name, shape) in zip(keys, shapes.items())
  }


def gradient(backend: Any) -> Callable:
  """The gradient of a sum of outputs in parameters, tokens and gates.

  Args:
    backend: of `networks.dispatch.BACKENDS`.

  Returns:
    A function of what `case` returns.
  """
  import jax
  import jax.numpy as jnp

  from networks import dispatch, moe
  from networks.routing import ByToken

  def loss(params, x, gate, chosen):
    hidden, features = params['out']['kernel'].shape[-2:]
    module = moe.FeedForward(hidden, features)
    apply: Any = lambda params, rows: module.apply({'params': params}, rows)
    expert = dispatch.Expert(apply, module.grouped)
    y, _ = dispatch.apply(
      ByToken(chosen, gate), x, params, expert, backend=backend
    )
    return jnp.sum(jnp.sin(y))

  return jax.grad(loss, (0, 1, 2))


def _dense(sizes: ExpertSizes) -> Callable[[], None]:
  import jax
  import jax.numpy as jnp

  key = jax.random.key(0)
  params = _weights(key, (), sizes.features, sizes.k * sizes.hidden)
  x = jax.random.normal(key, (sizes.tokens, sizes.features))

  def loss(params, x):
    hidden = jax.nn.relu(x @ params['in']['kernel'])
    return jnp.sum(jnp.sin(hidden @ params['out']['kernel']))

  return _ready(jax.grad(loss, (0, 1)), (params, x))


def _ready(function: Callable, arguments: Any) -> Callable[[], None]:
  """A task that runs the compiled function and waits for it."""
  import jax

  compiled = functools.partial(jax.jit(function), *arguments)
  return lambda: jax.block_until_ready(compiled()) and None
