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
  """What a setting takes at least.

  Attributes:
    field: its name.
    value: its value.
    size: bytes.
    on_host: whether they lie in the host's memory, wherever the agent learns.
  """

  field: str
  value: Any
  size: float
  on_host: bool = False


def check(needs: Sequence[Need], devices: int = 1) -> None:
  """Refuses what memory cannot hold, and names what takes most of it.

  Args:
    needs: at least these; what is computed on the way comes on top.
    devices: that share what does not lie on the host.

  Raises:
    UserError: they are more than there is.
  """
  own = device_memory()
  for place, have, some in (
    ('this machine', machine_memory(), [n for n in needs if n.on_host]),
    ('its device', own, [n for n in needs if not n.on_host]),
  ):
    if own is None:  # It is the machine's.
      some, share = needs, 1
    else:
      share = 1 if place == 'this machine' else devices
    if have is None or not some:
      continue
    total, most = sum(n.size for n in some) / share, max(some, key=_size)
    if total > have:
      less = 'take less'
      if isinstance(most.value, int) and most.value > 1:
        fits = max(int(most.value * have / total), 1)
        digits = 10 ** max(len(str(fits)) - 2, 0)
        less = f'take at most {fits // digits * digits}'
      raise UserError(
        f'{most.field}={most.value}: takes {told(most.size / share)} of '
        f'memory at least, {place} has {told(have)}; {less}'
      )


def _size(need: Need) -> float:
  return need.size


def told(size: float) -> str:
  """Bytes in words, `2.5 GB`."""
  units = ['PB', 'TB', 'GB', 'MB', 'kB', 'B']
  while size >= 999.5 and len(units) > 1:
    size /= 1000
    units.pop()
  return f'{size:.3g} {units[-1]}'


def check_run(experiment: Experiment, trainer: Any, phase: int) -> None:
  """Refuses a run that memory cannot hold.

  Args:
    experiment: from `build.describe`.
    trainer: from `stages.make`.
    phase: where it begins.

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

  Args:
    experiment: of one row.
    rows: of a program.
    seeds: rows of all programs, for the message.

  Raises:
    UserError: see `check`; it names how many rows fit.
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
  """What a run holds while it learns.

  Args:
    experiment: from `build.describe`.
    agent: from `build.make_agent`.
    source: its source.
    spec: what the agent was made for.
    rows: runs that train beside each other.
  """
  import jax

  run, key = experiment.run, jax.random.key(0)
  state = jax.eval_shape(agent.init, key)
  kept = experiment.material.kept(experiment, agent, spec)
  return [
    network(experiment, state, rows),
    Need(kept.field, kept.value, rows * kept.size, not source.is_pure),
    Need('batch_size', run.batch_size, rows * run.batch_size * kept.drawn),
  ]


# Frames are hardly ever compressed to less.
COMPRESSED = 40


def row_bytes(agent: Any, spec: Any) -> tuple[float, float]:
  """A row of experience, as a replay keeps it and with its frames stacked."""
  from experiments.runtime import sources

  example = sources.experience_example(agent, timestep(spec))
  row, seen = bytes_of(example), bytes_of(example.timestep.observation)
  return row - seen + seen / spec.frame_stack, row


def host_replay(experiment: Experiment, agent: Any, spec: Any) -> float:
  """Bytes of a replay on the host, of all parts; at least, if compressed."""
  run, envs = experiment.run, experiment.env.num_envs
  frame, _ = row_bytes(agent, spec)
  if run.compress_replay:
    frame /= COMPRESSED
  # Each with its priority and its mass, see `runtime.replay`.
  return run.replay_capacity // envs * envs * (frame + 4 + 8)


def network(experiment: Experiment, state: Any, rows: int = 1) -> Need:
  """What an agent's state takes: parameters, their copies, the optimiser's.

  Args:
    experiment: whose agent it is.
    state: of `agent.init`, shapes of it suffice.
    rows: how many there are of it.
  """
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
  """What the trees of a search hold.

  Args:
    agent: from `build.make_agent`.
    spec: of its environment.
    num: searches beside each other.
    budget: simulations each.
    field: the setting that says so.
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
  import jax
  import jax.numpy as jnp

  from search.model import TimeStep

  shape = lambda s: jax.ShapeDtypeStruct((rows, *s.shape), s.dtype)
  row = lambda dtype: jax.ShapeDtypeStruct((rows,), dtype)
  observation = jax.tree.map(
    shape, spec.observation, is_leaf=lambda s: hasattr(s, 'dtype')
  )
  invalid = None
  if spec.masks_actions:
    invalid = jax.ShapeDtypeStruct((rows, spec.action.num_actions), jnp.bool_)
  return TimeStep(
    observation=observation,
    reward=row(jnp.float32),
    discount=row(jnp.float32),
    is_first=row(jnp.bool_),
    truncated=row(jnp.bool_),
    invalid_actions=invalid,
  )


def bytes_of(tree: Any) -> float:
  """Of arrays, or of their shapes."""
  import jax

  return float(
    sum(
      math.prod(x.shape) * getattr(x.dtype, 'itemsize', 4)
      for x in jax.tree.leaves(tree)
    )
  )


def machine_memory() -> int:
  """Bytes of the machine, or of the container that we run in."""
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
  """Bytes of a device; None of a CPU, which has the machine's."""
  import jax

  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('bytes_limit')
