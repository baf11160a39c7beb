"""How fast agents learn from a data set, relative to the machine's limits.

Updates are scanned in one program: draw rows, update, again. The data set is
made up, of Hopper's sizes, and an argument of the program. On a CPU everything
runs on one core, as in `benchmarks.scale`; what is compared is measured in
turns.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import ArraySpec, Continuous, Spec, Transition
from experiments.benchmarks import counting, timing
from experiments.benchmarks.cases import Case
from experiments.benchmarks.roofline import memory_in_use
from experiments.benchmarks.timing import (
  Measurement,
  interleaved,
  once,
  scaled,
  speed_row,
)

# Hopper's.
_OBSERVATION, _ACTION = 11, 3
_PRODUCTS = 100


class _Program(NamedTuple):
  """A compiled program that trains, and what it takes.

  Attributes:
    start: `(data) -> work`, where `work()` trains on and waits.
    flops: of the matrix products of one update of one seed.
    state: bytes of the state of all seeds.
    temporaries: additional bytes, according to the compiler.
  """

  start: Callable[[Any], Callable[[], None]]
  flops: int
  state: int
  temporaries: int


def rows_here(case: Case) -> Iterator[list[Measurement]]:
  """All rows, measured in this process.

  The machine's limit is that of a chain of products `[3 B, W] x [W, W]`, the
  largest in an update of ATAC with batch B and width W.
  """
  data = _made_up(case.rows)
  large = {'atac': (case.width,) * 3, 'td3_bc': (case.width,) * 2}
  programs = {
    name: _program(name, hidden, case.batch, case, data)
    for name, hidden in large.items()
  }
  yield _memory_rows(programs['atac'], data, case)
  product, operations = _product(3 * case.batch, case.width)
  tasks = {'product': product} | {
    name: program.start(data) for name, program in programs.items()
  }
  timings = interleaved(tasks, case.repeats, case.least_seconds)
  shape = f'{3 * case.batch} x {case.width} x {case.width}'
  about = 'offline', f'matrix product {shape}', 'float32', 'GFLOP/s'
  rows = [speed_row(*about, operations / 1e9, timings['product'])]
  for name, program in programs.items():
    setting = f'{_layers(large[name])} batch={case.batch}'
    seconds = timings[name]
    about = 'offline', name, setting
    rows.append(speed_row(*about, 'updates/s', case.updates, seconds))
    if name == 'atac':
      done = program.flops * case.updates
      # The time that products alone would take for as many operations.
      least = scaled(timings['product'], done / operations)
      note = f'{program.flops / 1e9:.3g} GFLOP an update; ratio to {shape}'
      giga = done / 1e9
      rows.append(speed_row(*about, 'GFLOP/s', giga, seconds, least, note))
  yield rows
  yield seed_rows(case, data)


def seed_rows(case: Case, data: Any = None) -> list[Measurement]:
  """A small ATAC: one seed, and many in one program.

  Args:
    case: its small sizes, seeds and repeats count.
    data: transitions; None makes some up.
  """
  data = _made_up(case.rows) if data is None else data
  hidden = (case.small_width,) * 2
  names = {
    None: 'atac, one seed',
    **{n: f'atac, {n} seeds' for n in case.seeds},
  }

  def make(seeds):
    return _program('atac', hidden, case.small_batch, case, data, seeds).start(
      data
    )

  tasks, refused = timing.prepared(
    {name: functools.partial(make, n) for n, name in names.items()}
  )
  timings = interleaved(tasks, case.repeats, case.least_seconds)
  about = f'{_layers(hidden)} batch={case.small_batch}', 'updates/s'
  note = 'of all seeds; ratio to one seed without vmap'
  one, rows = timings.get(names[None]), []
  for n, name in names.items():
    if name in refused:
      rows.append(timing.failed('offline', name, *about, refused[name]))
      continue
    each = scaled(timings[name], 1 / (n or 1))
    updates = case.updates
    rows.append(speed_row('offline', name, *about, updates, each, one, note))
  return rows


def _layers(hidden: tuple[int, ...]) -> str:
  return f'{len(hidden)}x{hidden[0]}'


def _memory_rows(program: _Program, data: Any, case: Case) -> list[Measurement]:
  """The memory of training, in addition to the data set's."""
  before, highest = memory_in_use(forget=True)
  work = program.start(data)
  work()
  peak = memory_in_use()[1]
  setting = f'{case.rows} rows, {_layers((case.width,) * 3)}'
  rows = []
  for name, size, note in (
    ('data set', _bytes(data), 'an argument of the program'),
    ('state', program.state, ''),
    ('temporaries', program.temporaries, "the compiler's figure"),
    (
      'growth while training',
      peak - before if peak > highest else 0.0,
      'of memory in use, state and temporaries included, the data set not; on '
      'a CPU without what the process had freed and could use again',
    ),
  ):
    name = f'atac, {name}'
    rows.append(once('memory', name, setting, 'MB', size / 1e6, note))
  return rows


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _made_up(rows: int) -> Any:
  """Transitions of Hopper's sizes."""

  @jax.jit
  def draw(key):
    first, second, third = jax.random.split(key, 3)
    shape = (rows, _OBSERVATION)
    return Transition(
      o_tm1=jax.random.normal(first, shape),
      a_tm1=jax.random.uniform(second, (rows, _ACTION), minval=-1, maxval=1),
      r_t=jnp.ones(rows),
      discount_t=jnp.ones(rows),
      o_t=jax.random.normal(third, shape),
    )

  return jax.block_until_ready(draw(jax.random.key(0)))


def _program(
  name: str,
  hidden: tuple[int, ...],
  batch_size: int,
  case: Case,
  data: Any,
  seeds: int | None = None,
) -> _Program:
  """The compiled program of one or N seeds of an agent under `vmap`."""
  module = importlib.import_module(f'agents.{name}')
  bound = np.ones(_ACTION, np.float32)
  spec = Spec(
    ArraySpec((_OBSERVATION,)),
    Continuous((_ACTION,), -bound, bound),
    statistics=(np.zeros(_OBSERVATION), np.ones(_OBSERVATION)),
  )
  config = module.Config(hidden_sizes=hidden)
  networks = module.make_networks(config, spec)
  agent = module.make(config, networks, module.make_losses(), spec)

  def train(state, data, key):
    def step(state, key):
      row_key, update_key = jax.random.split(key)
      row = jax.random.randint(row_key, (batch_size,), 0, case.rows)
      batch = jax.tree.map(lambda x: x[row], data)
      return agent.update(state, batch, update_key)

    return jax.lax.scan(step, state, jax.random.split(key, case.updates))

  init, key = agent.init, jax.random.key(1)
  batch = jax.tree.map(lambda x: x[:batch_size], data)
  shapes = jax.eval_shape(init, key)
  flops = counting.matmul_flops(
    jax.make_jaxpr(agent.update)(shapes, batch, key)
  )
  if name == 'atac':
    # Traced twice, computed once: new actions, for critics and policy.
    flops -= counting.matmul_flops(
      jax.make_jaxpr(networks.policy.apply)(shapes.params.policy, batch.o_tm1)
    )
  if seeds is not None:
    init, key = jax.vmap(init), jax.random.split(key, seeds)
    train = jax.vmap(train, (0, None, 0))
  shapes = jax.eval_shape(init, key)
  init = jax.jit(init).lower(key).compile()
  program = jax.jit(train, donate_argnums=0).lower(shapes, data, key).compile()

  def start(data):
    state = init(key)

    def work():
      nonlocal state
      state, info = program(state, data, key)
      jax.block_until_ready((state, info))

    return work

  needs = program.memory_analysis()
  temporaries = getattr(needs, 'temp_size_in_bytes', 0)
  return _Program(start, flops, _bytes(shapes), temporaries)


def _product(rows: int, width: int) -> tuple[Callable[[], None], int]:
  """A chain of products of matrices, and its operations."""
  # So that all products are of ones.
  matrix = jnp.full((width, width), 1 / width)

  @jax.jit
  def chain(x, matrix):
    return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: x @ matrix, x)

  x = jnp.ones((rows, width))
  task = lambda: jax.block_until_ready(chain(x, matrix))
  return task, _PRODUCTS * 2 * rows * width * width
