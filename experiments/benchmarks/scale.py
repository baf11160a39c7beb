"""How training scales: seeds in one program, devices, and the machine's roof.

Seeds: one program of N seeds against the program of one seed; updates a second
are of all seeds. On a CPU this takes one core: on more, the program of one seed
spends up to half of its CPU time waiting, and ratios say little. Devices: the
data-parallel update with the batch fixed (strong) and with the batch per device
fixed (weak). Virtual devices of a CPU measure only what dividing the work
costs. Roofline: every program's operations and bytes relative to the largest
rates measured in the same process (Williams 2009).
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import build, presets
from experiments.benchmarks import agents, timing
from experiments.benchmarks.cases import Case
from experiments.benchmarks.roofline import (
  Roof,
  Work,
  free_bytes,
  measure_roof,
  memory_in_use,
  roof_rows,
  work,
)
from experiments.benchmarks.timing import (
  Measurement,
  interleaved,
  once,
  scaled,
  speed_row,
)
from experiments.runtime import loop
from experiments.runtime import mesh as meshes

# So small that most of an update is overhead; larger networks gain less.
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


class Subject(NamedTuple):
  """What is trained: an experiment on a JAX environment.

  `seeds` are N of each program.
  """

  name: str
  experiment: build.Experiment
  seeds: tuple[int, ...]


def subjects(
  preset: str | None, settings: Sequence[str], case: Case
) -> list[Subject]:
  """What is trained, on Catch in JAX.

  With a `preset` only this one, on its own environment if that is in JAX; else
  a small MuZero and the presets of MuZero and EfficientZero.

  Raises:
    ValueError: see `build.describe`.
  """

  def subject(name, preset, seeds, own=()):
    env = presets.find(preset).env
    experiment = build.describe(
      preset,
      env=env if env.startswith('jax:') else 'jax:catch',
      # More than any program takes.
      steps=10**8,
      settings=(*own, *settings),
    )
    return Subject(name, experiment, seeds)

  if preset is not None:
    return [subject(preset, preset, case.seeds)]
  small = subject('muzero_small', 'muzero_catch', case.seeds, SMALL)
  if not case.more_seeds:
    return [small]
  names = ('muzero_catch', 'efficientzero_catch')
  return [small, *(subject(name, name, case.more_seeds) for name in names)]


def scale_rows(
  chosen: Sequence[Subject], case: Case
) -> Iterator[list[Measurement]]:
  """Yields rows as soon as they are measured: the roof, seeds, devices.

  The update of the second subject, or of the only one, is divided over devices.
  """
  roof, rows = measure_roof(case)
  yield rows
  # A process of one core has a roof of its own.
  own = None if jax.default_backend() == 'cpu' else roof
  for subject in chosen:
    yield from timing.on_one_core(seed_rows, subject, own, case)
  yield scaling_rows(chosen[min(1, len(chosen) - 1)], roof, case)


# --- seeds


class _Trainer(NamedTuple):
  """A compiled program of one or N seeds, and what it takes.

  Attributes:
    start: `() -> work`, where `work(updates)` trains all seeds on.
    seconds: of compiling.
    carry: bytes of the seeds' state.
    temporaries: additional bytes, according to the compiler.
    donated: bytes of the state that are written in place.
  """

  start: Callable[[], Callable[[int], None]]
  seconds: float
  carry: int
  temporaries: int
  donated: int


def _trainer(subject: Subject, number: int | None) -> _Trainer:
  """The program for N seeds under `vmap`, or, for None, for one without it."""
  agent, source = _made(subject)
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


def _made(subject: Subject) -> tuple[Any, Any]:
  experiment = subject.experiment
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  return agent, build.make_source(experiment, env, agent)


def update_work(subject: Subject) -> Work:
  """The work of an update of one seed: acting, drawing, searching, learning."""
  agent, source = _made(subject)
  key = jax.random.key(0)
  carry = jax.eval_shape(functools.partial(loop.init, agent, source), key)
  jaxpr = jax.make_jaxpr(functools.partial(loop.step, agent, source))(
    carry, key
  )
  pace = subject.experiment.pace
  return work(jaxpr, float(pace.decisions_per_update / pace.num_envs))


def seed_rows(
  subject: Subject, roof: Roof | None, case: Case
) -> Iterator[list[Measurement]]:
  """Updates a second of N seeds in one program, and its memory.

  Each program is measured in turns with that of one seed without `vmap`, over
  whole periods of acting and learning, after the warm-up. A `roof` of None is
  measured first.
  """
  if roof is None:
    roof, rows = measure_roof(case)
    yield rows
  experiment = subject.experiment
  setting = (
    f'{subject.name} {experiment.env_name} batch={experiment.run.batch_size}'
  )
  does = update_work(subject)
  pace = experiment.pace
  period = (pace.decisions_per_update / pace.num_envs).denominator
  alone = _trainer(subject, None)
  single = alone.start()
  yield [
    _compile_row('one seed', setting, alone.seconds),
    *_memory_rows('one seed', setting, 1, alone, math.nan),
  ]
  for number in subject.seeds:
    name = f'{number} seeds'
    trainer = _trainer(subject, number)
    bound = case.memory_share * free_bytes()
    needed = trainer.carry + trainer.temporaries
    memory = functools.partial(_memory_rows, name, setting, number, trainer)
    if needed > bound:
      yield memory(math.nan, f'not run: more than {bound / 1e9:.3g} GB')
      continue
    before, highest = memory_in_use(forget=True)
    train = trainer.start()
    tasks = {'one seed': single, name: train}
    updates = {
      n: _enough(task, period, case.least_seconds) for n, task in tasks.items()
    }
    timings = interleaved(
      {n: functools.partial(task, updates[n]) for n, task in tasks.items()},
      case.repeats,
    )
    peak = memory_in_use()[1]
    # Otherwise something before needed more, and this peak is not known.
    growth = peak - before if peak > highest else math.nan
    del train, tasks
    each = {n: scaled(t, 1 / updates[n]) for n, t in timings.items()}
    each[name] = scaled(each[name], 1 / number)
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
    about = 'seeds', f'one seed beside {name}', setting, 'updates/s'
    of_one = speed_row(*about, 1, each['one seed'])
    yield [of_one, speed, _compile_row(name, setting, trainer.seconds)]
    yield memory(growth)
    yield roof_rows(f'{subject.name}, {name}', 'one update', does, speed, roof)


def together_rows(subject: Subject, case: Case) -> list[Measurement]:
  """Updates a second of one seed and of many in one program, and no more.

  Args:
    subject: what is trained.
    case: its updates a measurement and repeats count.
  """
  pace = subject.experiment.pace
  period = (pace.decisions_per_update / pace.num_envs).denominator
  updates = period * math.ceil(case.updates / period)
  numbers = {'one seed': None, **{f'{n} seeds': n for n in subject.seeds}}

  def make(number):
    train = _trainer(subject, number).start()
    # The first updates come after a warm-up.
    train(updates)
    return functools.partial(train, updates)

  tasks, refused = timing.prepared(
    {name: functools.partial(make, n) for name, n in numbers.items()}
  )
  timings = interleaved(tasks, case.repeats, case.least_seconds)
  experiment = subject.experiment
  setting = (
    f'{subject.name} {experiment.env_name} batch={experiment.run.batch_size}'
  )
  about, one = (setting, 'updates/s'), timings.get('one seed')
  note = 'of all seeds; ratio to one seed without vmap'
  rows = []
  for name, number in numbers.items():
    if name in refused:
      rows.append(timing.failed('seeds', name, *about, refused[name]))
      continue
    each = scaled(timings[name], 1 / (number or 1))
    rows.append(speed_row('seeds', name, *about, updates, each, one, note))
  return rows


def _enough(task: Callable[[int], None], period: int, least: float) -> int:
  """How many updates take that long, in whole periods; starts the task."""
  task(period)
  start = time.perf_counter()
  task(period)
  taken = time.perf_counter() - start
  return period * max(math.ceil(least / taken), 1)


def _compile_row(name: str, setting: str, seconds: float) -> Measurement:
  unit = 'seconds to compile'
  note = 'not in the speeds; less from a warm cache'
  return once('seeds', name, setting, unit, seconds, note)


def _memory_rows(
  name, setting, number, trainer, peak, note=''
) -> list[Measurement]:
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
    row = f'{name}, {what}', setting, 'MB a seed'
    rows.append(once('memory', *row, each, about))
  return rows


# --- devices


def scaling_rows(subject: Subject, roof: Roof, case: Case) -> list[Measurement]:
  """`device_rows` of the accelerators here, else of virtual devices."""
  if jax.default_backend() != 'cpu':
    return device_rows(subject, roof, case)
  # The number of CPU devices is fixed by the first use of jax.
  with timing.process(_make_virtual, max(case.devices)) as pool:
    return pool.submit(device_rows, subject, roof, case).result()


def _make_virtual(number: int) -> None:
  jax.config.update('jax_num_cpu_devices', number)


def device_rows(subject: Subject, roof: Roof, case: Case) -> list[Measurement]:
  """The data-parallel update over the first devices of this process.

  All are measured in turns. Ratios are to one device: by wall second the
  speed-up, at best n on n devices; by CPU second, on virtual devices, at best
  1, and the rest is the cost of dividing the work.
  """
  rows = []
  devices = jax.devices()
  counts = [n for n in case.devices if n <= len(devices)]
  virtual = devices[0].platform == 'cpu'
  size = subject.experiment.run.batch_size
  for mode in ('strong', 'weak'):
    tasks = {
      n: _update_task(subject, devices[:n], size * (n if mode == 'weak' else 1))
      for n in counts
    }
    timings = interleaved(
      {str(n): task for n, task in tasks.items()},
      case.repeats,
      case.least_seconds,
    )
    shared = 'a device' if mode == 'weak' else 'in all'
    for n in counts:
      factor = n if mode == 'weak' else 1
      # Seconds for as much as one device does in its update.
      one = timings[str(counts[0])]
      many = scaled(timings[str(n)], 1 / factor)
      row = speed_row(
        'devices',
        f'{n} devices',
        f'{subject.name} update, {mode}: batch={size} {shared}',
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
        does = _update_count(subject)
        rows += roof_rows(f'{subject.name}, update', 'alone', does, row, roof)
  return rows


def _update_task(subject: Subject, devices: Sequence[Any], batch_size: int):
  """A function that updates once per call, the batch split over the devices."""
  agent, batch = _agent_and_batch(subject, batch_size)
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


def _agent_and_batch(subject: Subject, batch_size: int) -> tuple[Any, Any]:
  experiment = subject.experiment
  run = dataclasses.replace(experiment.run, batch_size=batch_size)
  experiment = experiment._replace(run=run)
  env = build.make_env(experiment, training=True)
  agent = build.make_agent(experiment, env.spec)
  return agent, agents.made_up_batch(experiment, env, agent)


def _update_count(subject: Subject) -> Work:
  agent, batch = _agent_and_batch(subject, subject.experiment.run.batch_size)
  key = jax.random.key(0)
  state = jax.eval_shape(agent.init, key)
  return work(jax.make_jaxpr(agent.update)(state, batch, key))
