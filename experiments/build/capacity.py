"""Whether a run fits into memory, from shapes, before anything is allocated."""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.build.agent import row
from experiments.build.material import Experiment
from experiments.files.errors import UserError


class Need(NamedTuple):
  """Bytes, `size`, that a setting takes at least, on the host or the device.

  `instead` is another setting that takes nothing there, or ''.
  """

  field: str
  value: Any
  size: float
  on_host: bool = False
  instead: str = ''


def check(needs: Sequence[Need], devices: int = 1) -> None:
  """Refuses needs that memory cannot hold, and names the largest.

  `devices` share what is not on the host. Intermediate results are not counted.

  Raises:
    UserError: they are more than there is.
  """
  own = device_memory()
  for place, have, some in (
    ('this machine', machine_memory(), [n for n in needs if n.on_host]),
    ('its device', own, [n for n in needs if not n.on_host]),
  ):
    if own is None:  # The device's memory is the machine's.
      some, share = needs, 1
    else:
      share = 1 if place == 'this machine' else devices
    if have is None or not some:
      continue
    total = sum(n.size for n in some) / share
    most = max(some, key=lambda need: need.size)
    if total > have:
      less = 'take less'
      if isinstance(most.value, int) and most.value > 1:
        fits = max(int(most.value * have / total), 1)
        digits = 10 ** max(len(str(fits)) - 2, 0)
        less = f'take at most {fits // digits * digits}'
      if most.instead and own is not None:
        less += f', or {most.instead}'
      raise UserError(
        f'{most.field}={most.value}: takes {in_units(most.size / share)} of '
        f'memory at least, {place} has {in_units(have)}; {less}'
      )


def in_units(size: float) -> str:
  """Bytes as text, `2.5 GB`."""
  units = ['PB', 'TB', 'GB', 'MB', 'kB', 'B']
  while size >= 999.5 and len(units) > 1:
    size /= 1000
    units.pop()
  return f'{size:.3g} {units[-1]}'


def check_run(experiment: Experiment, trainer: Any, phase: int) -> None:
  """Refuses a run that memory cannot hold, from a phase of its trainer on.

  Raises:
    UserError: see `check`.
  """
  stage, spec = trainer.stages[phase], trainer.spec
  needs = of_run(experiment, stage.agent, stage.source, spec)
  check(needs, trainer.layout.mesh.size)
  if experiment.material.acts and hasattr(experiment.config, 'search'):
    run, search = experiment.run, experiment.config.search
    check(
      of_search(
        stage.agent, spec, experiment.env.num_envs, search.num_simulations
      )
    )
    final = max(run.final_simulations, default=0) if run.final_episodes else 0
    check(of_search(stage.agent, spec, 1, final, 'final_simulations'))


def check_rows(experiment: Experiment, rows: int, seeds: int) -> None:
  """Refuses rows in one program that memory cannot hold.

  `seeds` are the rows of all programs, for the message.

  Raises:
    UserError: see `check`; it says how many rows fit.
  """
  import jax

  agent, source, spec = row(experiment)
  needs = of_run(experiment, agent, source, spec, rows)
  size = sum(need.size for need in needs)
  name, value = ('max_rows', rows) if rows < seeds else ('seeds', seeds)
  check([Need(name, value, size)], len(jax.devices()))


def of_run(
  experiment: Experiment, agent: Any, source: Any, spec: Any, rows=1
) -> list[Need]:
  """What `rows` runs that train together hold while they learn."""
  import jax

  run, key = experiment.run, jax.random.key(0)
  state = jax.eval_shape(agent.init, key)
  kept = experiment.material.kept(experiment, agent, spec)
  needs = [
    network(experiment, state, rows),
    Need(kept.field, kept.value, rows * kept.size, not source.is_pure),
    Need('batch_size', run.batch_size, rows * run.batch_size * kept.drawn),
  ]
  if kept.frames:
    own = kept.field, kept.value, rows * kept.frames
    needs.append(Need(*own, instead='' if source.is_pure else 'frames_on=host'))
  return needs


# Frames are hardly ever compressed to less.
COMPRESSED = 40


def row_bytes(agent: Any, spec: Any) -> tuple[float, float]:
  """A row of experience in a replay, and with its frames stacked."""
  from experiments.runtime import sources

  example = sources.experience_example(agent, timestep(spec))
  row, seen = bytes_of(example), bytes_of(example.timestep.observation)
  return row - seen + seen / spec.frame_stack, row


def frame_bytes(spec: Any) -> float:
  """The images of a row of experience, without their stacks."""
  seen = timestep(spec).observation
  return bytes_of(seen) / spec.frame_stack


def host_replay(
  experiment: Experiment, agent: Any, spec: Any
) -> tuple[float, float]:
  """Bytes of a host's replay, of all parts, there and on devices.

  If compressed, it takes that at least.
  """
  run, envs = experiment.run, experiment.env.num_envs
  row, _ = row_bytes(agent, spec)
  if run.compress_replay:
    row /= COMPRESSED
  frame = frame_bytes(spec) if run.frames_on == 'device' else 0.0
  number = run.replay_capacity // envs * envs
  # Each with its priority and its mass, see `runtime.replay`.
  return number * (row - frame + 4 + 8), number * frame


def network(experiment: Experiment, state: Any, rows: int = 1) -> Need:
  """What `rows` agents' states (or shapes) take, the optimiser's included."""
  import jax

  largest = max(jax.tree.leaves(state), key=lambda x: math.prod(x.shape))
  shape = ' x '.join(map(str, largest.shape)) or '1'
  what = f'{experiment.agent_name}, whose largest array is {shape}'
  return Need('network', what, rows * bytes_of(state))


def of_search(
  agent: Any,
  spec: Any,
  num: int,
  budget: int,
  field: str = 'num_simulations',
) -> list[Need]:
  """What the trees of `num` searches of `budget` simulations hold.

  `field` is the setting of the budget.
  """
  import jax

  if agent.model is None or not budget:
    return []
  key = jax.random.key(0)
  params = jax.eval_shape(agent.init, key).params
  root = jax.eval_shape(agent.model.root, params, timestep(spec), key)
  # One row: visits, values and priors of each action, and the embedding.
  each = 4 * bytes_of(root.prior_logits) + bytes_of(root.embedding)
  return [Need(field, budget, float(num) * (budget + 1) * each)]


def timestep(spec: Any, rows: int = 1) -> Any:
  """Shapes of a time step of an environment, leaves `[rows, ...]`."""
  from experiments.runtime import sources

  return sources.timestep_shapes(spec, rows)


def bytes_of(tree: Any) -> float:
  """Bytes of arrays, or of their shapes."""
  import jax

  return float(
    sum(
      math.prod(x.shape) * getattr(x.dtype, 'itemsize', 4)
      for x in jax.tree.leaves(tree)
    )
  )


def machine_memory() -> int:
  """Bytes of the machine, or of the container that this runs in."""
  have = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  for name in ('memory.max', 'memory/memory.limit_in_bytes'):
    path = pathlib.Path('/sys/fs/cgroup') / name
    try:
      limit = path.read_text().strip()
    except OSError:
      continue
    if limit.isdecimal():
      have = min(have, int(limit))
  return have


def device_memory() -> int | None:
  """Bytes of a device; None for a CPU, which has the machine's."""
  import jax

  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('bytes_limit')
