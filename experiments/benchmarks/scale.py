"""How training scales: seeds in one program, devices, and the machine's roof.

Seeds: one program that trains N seeds, beside the program of one seed. Agent
updates a second count those of all seeds. On a CPU this is done on one core:
with more, the program of one seed spends a varying share of its CPU time in
waiting for work (from none to half of it), and a ratio says little. Devices:
the data-parallel update with the batch fixed (strong) and with the batch a
device fixed (weak). Where there are only CPUs the devices are virtual ones of
one machine, and measure what dividing the work costs, not what it gains.
Roofline: every program's operations and bytes beside the largest rates that
were measured in the same process (Williams 2009).
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import build, presets
from experiments.benchmarks import agents, timing
from experiments.benchmarks.roofline import (
  Roof,
  Work,
  free_bytes,
  measure_roof,
  memory_in_use,
  roof_rows,
  work,
)
from experiments.benchmarks.timing import Row, Timing, interleaved, speed_row

# So small that a large part of an update is overhead; larger ones gain less.
SMALL = (
  'batch_size=4',
  'env.num_envs=4',
  'replay_capacity=2000',
  'network.torso=vector',
  'network.latent_size=16',
  'network.head_hidden=16',
  'network.projector=16,16,16',
  'network.predictor=8',
)


class ScaleSizes(NamedTuple):
  """How much is measured.

  Attributes:
    seeds: N of each program of a small network.
    more_seeds: N of each program of the presets' networks; () leaves those
      presets out.
    devices: how many share an update.
    repeats: of everything.
    least_seconds: that one measurement takes, about.
    matrix: rows of the square matrices of the peak.
    triad: float32 numbers of each of the triad's three arrays.
    memory_share: of the free memory that a program may need; one that needs
      more is not run.
  """

  seeds: tuple[int, ...] = (1, 4, 16, 64, 256)
  more_seeds: tuple[int, ...] = (64,)
  devices: tuple[int, ...] = (1, 2, 4, 8)
  repeats: int = 5
  least_seconds: float = 0.5
  matrix: int = 2048
  triad: int = 2**24
  memory_share: float = 0.6


_LARGE = ScaleSizes(matrix=8192, triad=2**26)
_SIZES = {
  ('cpu', 'full'): ScaleSizes(),
  ('cpu', 'quick'): ScaleSizes((2,), (), (1, 2), 2, 0.0, 64, 2**12),
  ('accelerator', 'full'): _LARGE._replace(
    seeds=(1, 4, 16, 64, 256, 1024), more_seeds=(1, 16, 64, 256)
  ),
  ('accelerator', 'quick'): _LARGE._replace(seeds=(1, 64, 1024), more_seeds=()),
}


def sizes_here(
  quick: bool = False, seeds: Sequence[int] = (), repeats: int = 5
) -> ScaleSizes:
  """The sizes for this machine's devices.

  On two CPU cores they take ten minutes, or with `quick` just show that it
  runs; on a GPU `quick` takes about three minutes.

  Args:
    quick: fewer or smaller.
    seeds: the numbers of seeds; () for the usual.
    repeats: at most 5 are made.

  Raises:
    ValueError: a number of seeds below 1.
  """
  import jax

  for number in seeds:
    if number < 1:
      raise ValueError(f'seeds={number}: must be at least 1')
  kind = 'cpu' if jax.default_backend() == 'cpu' else 'accelerator'
  sizes = _SIZES[kind, 'quick' if quick else 'full']
  sizes = sizes._replace(repeats=min(repeats, sizes.repeats))
  if seeds:
    more = tuple(seeds) if sizes.more_seeds else ()
    sizes = sizes._replace(seeds=tuple(seeds), more_seeds=more)
  return sizes


class Case(NamedTuple):
  """What is trained.

  Attributes:
    name: of it in the results.
    experiment: on an environment in JAX.
    seeds: N of each program.
  """

  name: str
  experiment: build.Experiment
  seeds: tuple[int, ...]


def cases(
  preset: str | None, settings: Sequence[str], sizes: ScaleSizes
) -> list[Case]:
  """What is trained, on Catch in JAX.

  Args:
    preset: this one alone, on its own environment where that is in JAX; None
      for a small MuZero and the presets of MuZero and EfficientZero.
    settings: `field=value`, for all.
    sizes: how many seeds of which.

  Raises:
    ValueError: see `build.describe`.
  """

  def case(name, preset, seeds, own=()):
    env = presets.find(preset).env
    experiment = build.describe(
      preset,
      env=env if env.startswith('jax:') else 'jax:catch',
      # So many that no program comes to its end.
      steps=10**8,
      settings=(*own, *settings),
    )
    return Case(name, experiment, seeds)

  if preset is not None:
    return [case(preset, preset, sizes.seeds)]
  small = case('muzero_small', 'muzero_catch', sizes.seeds, SMALL)
  if not sizes.more_seeds:
    return [small]
  names = ('muzero_catch', 'efficientzero_catch')
  return [small, *(case(name, name, sizes.more_seeds) for name in names)]


def scale_rows(
  chosen: Sequence[Case], sizes: ScaleSizes
) -> Iterator[list[Row]]:
  """All of it, as soon as it is measured: the roof, seeds, devices.

  Args:
    chosen: from `cases`; the update of the second, or else of the first, is
      the one that is divided over devices.
    sizes: how much.
  """
  roof, rows = measure_roof(
    sizes.matrix, sizes.triad, sizes.repeats, sizes.least_seconds
  )
  yield rows
  for case in chosen:
    yield from seed_rows_here(case, roof, sizes)
  yield scaling_rows(chosen[min(1, len(chosen) - 1)], roof, sizes)


# --- seeds


class _Trainer(NamedTuple):
  """A compiled program of one or N seeds, and what is known of it.

  Attributes:
    start: `() -> work`, where `work(updates)` trains all seeds on.
    seconds: of compiling.
    carry: bytes of the seeds' state.
    temporaries: bytes that the program needs besides, as its compiler says.
    donated: bytes of the state that are written in place.
  """

  start: Callable[[], Callable[[int], None]]
  seconds: float
  carry: int
  temporaries: int
  donated: int


def _trainer(case: Case, number: int | None) -> _Trainer:
  """The program of so many seeds under `vmap`; None for one without."""
  import jax

  from experiments.runtime import loop

  agent, source = _made(case)
  init = functools.partial(loop.init, agent, source)
  interval = loop.compile_interval(agent, source)
  key = jax.random.key(0)
  if number is not None:
    rows = loop.Carry(0, 0, None)
    key = jax.random.split(key, number)
    init = jax.jit(jax.vmap(init, out_axes=rows))
    interval = jax.vmap(interval, (rows, 0, None), (rows, 0, 0))
  shapes = jax.eval_shape(init, key)
  begun = time.perf_counter()
  program = jax.jit(interval, donate_argnums=0)
  program = program.lower(shapes, key, np.int32(1)).compile()
  seconds = time.perf_counter() - begun
  needs = program.memory_analysis()

  def start():
    carry = init(key)

    def train(updates):
      nonlocal carry
      carry, means, counts = program(carry, key, np.int32(updates))
      jax.block_until_ready((carry, means, counts))

    return train

  return _Trainer(
    start,
    seconds,
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)),
    getattr(needs, 'temp_size_in_bytes', 0),
    getattr(needs, 'alias_size_in_bytes', 0),
  )


def _made(case: Case) -> tuple[Any, Any]:
  experiment = case.experiment
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  return agent, build.make_source(experiment, env, agent)


def update_work(case: Case) -> Work:
  """Of one whole update of one seed: acting, drawing, searching, learning."""
  import jax

  from experiments.runtime import loop

  agent, source = _made(case)
  key = jax.random.key(0)
  carry = jax.eval_shape(functools.partial(loop.init, agent, source), key)
  jaxpr = jax.make_jaxpr(functools.partial(loop.step, agent, source))(
    carry, key
  )
  pace = case.experiment.pace
  return work(jaxpr, float(pace.decisions_per_update / pace.num_envs))


def seed_rows_here(
  case: Case, roof: Roof, sizes: ScaleSizes
) -> Iterator[list[Row]]:
  """`seed_rows` on an accelerator, or else on one core of the CPU."""
  import jax

  if jax.default_backend() != 'cpu' or not hasattr(os, 'sched_setaffinity'):
    yield from seed_rows(case, roof, sizes)
    return
  # How many threads there are is settled before the first use of jax.
  with timing.process(timing.one_core) as pool:
    yield pool.submit(_seed_rows_of_one_core, case, sizes).result()


def _seed_rows_of_one_core(case: Case, sizes: ScaleSizes) -> list[Row]:
  roof, rows = measure_roof(
    sizes.matrix, sizes.triad, sizes.repeats, sizes.least_seconds
  )
  for some in seed_rows(case, roof, sizes):
    rows += some
  return [row._replace(setting=f'{row.setting}, one core') for row in rows]


def seed_rows(case: Case, roof: Roof, sizes: ScaleSizes) -> Iterator[list[Row]]:
  """Updates a second of N seeds in one program, and its memory.

  Each program is measured in turns with that of one seed without `vmap`. A
  measurement is of whole periods of acting and learning, after the replay has
  been filled to where learning begins.
  """
  experiment = case.experiment
  setting = (
    f'{case.name} {experiment.env_name} batch={experiment.run.batch_size}'
  )
  does = update_work(case)
  pace = experiment.pace
  period = (pace.decisions_per_update / pace.num_envs).denominator
  alone = _trainer(case, None)
  single = alone.start()
  yield [
    _compile_row('one seed', setting, alone.seconds),
    *_memory_rows('one seed', setting, 1, alone, math.nan),
  ]
  for number in case.seeds:
    name = f'{number} seeds'
    trainer = _trainer(case, number)
    bound = sizes.memory_share * free_bytes()
    needed = trainer.carry + trainer.temporaries
    memory = functools.partial(_memory_rows, name, setting, number, trainer)
    if needed > bound:
      yield memory(math.nan, f'not run: more than {bound / 1e9:.3g} GB')
      continue
    before, highest = memory_in_use(forget=True)
    train = trainer.start()
    tasks = {'one seed': single, name: train}
    updates = {
      n: _enough(task, period, sizes.least_seconds) for n, task in tasks.items()
    }
    timings = interleaved(
      {n: functools.partial(task, updates[n]) for n, task in tasks.items()},
      sizes.repeats,
    )
    peak = memory_in_use()[1]
    # Else something before needed more, and this one's peak is not known.
    growth = peak - before if peak > highest else math.nan
    del train, tasks
    each = {
      n: Timing(*(np.asarray(t) / updates[n] for t in timing))
      for n, timing in timings.items()
    }
    each[name] = Timing(*(t / number for t in each[name]))
    speed = speed_row(
      'seeds',
      name,
      setting,
      'updates/s',
      1,
      each[name],
      each['one seed'],
      f'of all seeds; ratio to one seed without vmap; {updates[name]} updates '
      'a measurement',
    )
    of_one = speed_row(
      'seeds',
      f'one seed beside {name}',
      setting,
      'updates/s',
      1,
      each['one seed'],
    )
    yield [of_one, speed, _compile_row(name, setting, trainer.seconds)]
    yield memory(growth)
    yield roof_rows(f'{case.name}, {name}', 'one update', does, speed, roof)


def _enough(task: Callable[[int], None], period: int, least: float) -> int:
  """Updates that take as long, in whole periods; the task has then begun."""
  task(period)
  start = time.perf_counter()
  task(period)
  taken = time.perf_counter() - start
  return period * max(math.ceil(least / taken), 1)


def _compile_row(name: str, setting: str, seconds: float) -> Row:
  unit = 'seconds to compile'
  row = Row('seeds', name, setting, unit, seconds, seconds, seconds, math.nan)
  return row._replace(note='not in the speeds; less from a warm cache')


def _memory_rows(name, setting, number, trainer, peak, note='') -> list[Row]:
  donated = f'{trainer.donated / trainer.carry:.0%} written in place'
  rows = []
  for what, size, about in (
    ('state', trainer.carry, donated),
    ('temporaries', trainer.temporaries, "the compiler's figure"),
    (
      'peak',
      peak,
      'growth of memory in use while it ran, state included; on a CPU without '
      'what the process had freed and could use again',
    ),
  ):
    if math.isnan(size):
      continue
    each = size / number / 1e6
    about = '; '.join(text for text in (about, note) if text)
    told = f'{name}, {what}'
    row = Row('memory', told, setting, 'MB a seed', each, each, each, math.nan)
    rows.append(row._replace(note=about))
  return rows


# --- devices


def scaling_rows(case: Case, roof: Roof, sizes: ScaleSizes) -> list[Row]:
  """`device_rows` of the accelerators here, or else of virtual devices."""
  import jax

  if jax.default_backend() != 'cpu':
    return device_rows(case, roof, sizes)
  # How many CPU devices there are is settled before the first use of jax.
  with timing.process(_make_virtual, max(sizes.devices)) as pool:
    return pool.submit(device_rows, case, roof, sizes).result()


def _make_virtual(number: int) -> None:
  import jax

  jax.config.update('jax_num_cpu_devices', number)


def device_rows(case: Case, roof: Roof, sizes: ScaleSizes) -> list[Row]:
  """The data-parallel update over the first devices of this process.

  All are measured in turns. Ratios are to one device: by wall second the
  speed-up, n on n devices at best; by CPU second, on virtual devices, 1 at
  best, and what is missing is what dividing the work costs.
  """
  import jax

  rows = []
  devices = jax.devices()
  counts = [n for n in sizes.devices if n <= len(devices)]
  virtual = devices[0].platform == 'cpu'
  size = case.experiment.run.batch_size
  for mode in ('strong', 'weak'):
    tasks = {
      n: _update_task(case, devices[:n], size * (n if mode == 'weak' else 1))
      for n in counts
    }
    timings = interleaved(
      {str(n): task for n, task in tasks.items()},
      sizes.repeats,
      sizes.least_seconds,
    )
    shared = 'a device' if mode == 'weak' else 'in all'
    for n in counts:
      factor = n if mode == 'weak' else 1
      # Seconds for as much as one device does in its update.
      one, many = (
        Timing(*(np.asarray(t) / k for t in timings[str(i)]))
        for i, k in ((counts[0], 1), (n, factor))
      )
      row = speed_row(
        'devices',
        f'{n} devices',
        f'{case.name} update, {mode}: batch={size} {shared}',
        'batches/s',
        1,
        many,
        one,
        f'batches of {size}; '
        + (
          f'virtual devices of {os.cpu_count()} cores: overhead only'
          if virtual
          else f'{devices[0].device_kind}'
        ),
      )
      rows.append(row)
      if mode == 'strong' and n == 1:
        does = _update_count(case)
        rows += roof_rows(f'{case.name}, update', 'alone', does, row, roof)
  return rows


def _update_task(case: Case, devices: Sequence[Any], batch_size: int):
  """An update of the batch over these devices, again at each call."""
  import jax

  from experiments.runtime import mesh as meshes

  agent, batch = _agent_and_batch(case, batch_size)
  mesh = meshes.make_mesh(devices)
  update = meshes.compile_update(agent, mesh)
  key = jax.random.key(0)
  batch = jax.device_put(batch, meshes.split(mesh))
  state = jax.jit(agent.init, out_shardings=meshes.replicated(mesh))(key)

  def task():
    nonlocal state
    state, info = update(state, batch, key)
    jax.block_until_ready((state, info))

  return task


def _agent_and_batch(case: Case, batch_size: int) -> tuple[Any, Any]:
  experiment = case.experiment
  run = dataclasses.replace(experiment.run, batch_size=batch_size)
  experiment = experiment._replace(run=run)
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  return agent, agents.made_up_batch(experiment, env, agent)


def _update_count(case: Case) -> Work:
  import jax

  agent, batch = _agent_and_batch(case, case.experiment.run.batch_size)
  key = jax.random.key(0)
  state = jax.eval_shape(agent.init, key)
  return work(jax.make_jaxpr(agent.update)(state, batch, key))
