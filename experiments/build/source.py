"""Where the experience of an experiment comes from, and on which devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.build.material import Experiment, is_fresh, window_of


class Layout(NamedTuple):
  """Which devices do what.

  Attributes:
    mesh: the devices that learn, of all processes.
    acting: devices of this process that act only; () for none.
    parts: shares of environments and replay, see `runtime.parts`.
  """

  mesh: Any
  acting: tuple[Any, ...]
  parts: int


def make_layout(experiment: Experiment, saved_parts: int = 0) -> Layout:
  """The devices of an experiment.

  `saved_parts` are those of the checkpoint to resume from; 0 for none.

  Raises:
    ValueError: there are not so many devices, or they cannot share the work.
  """
  import jax

  from experiments.runtime import mesh as meshes
  from experiments.runtime import parts

  run, learning, acting = experiment.run, [], ()
  for process in range(jax.process_count()):
    own = jax.local_devices(process)
    spare = len(own) - run.acting_devices
    wanted = run.devices or spare
    if spare < 1 or wanted > spare:
      and_ = f', acting_devices={run.acting_devices}'
      raise ValueError(
        f'devices={run.devices}{and_ if run.acting_devices else ""}: '
        f'this machine has {len(own)}; take 0 for all that do not act, one at '
        'least'
      )
    learning += own[:wanted]
    if run.acting_devices and process == jax.process_index():
      acting = tuple(own[-run.acting_devices :])
  each = {len(jax.local_devices(p)) for p in range(jax.process_count())}
  if len(each) > 1:
    raise ValueError(
      f'devices={run.devices}: processes have {sorted(each)} devices; all must '
      'have the same number'
    )
  layout = lay_out(experiment, meshes.make_mesh(learning), saved_parts)
  number = layout.parts
  if len(acting) > len(parts.held(number)):
    raise ValueError(
      f'acting_devices={run.acting_devices}: a process holds '
      f'{len(parts.held(number))} parts only; take more, such as parts='
      f'{len(acting) * jax.process_count()}'
    )
  return layout._replace(acting=acting)


def lay_out(experiment: Experiment, mesh: Any, saved_parts: int = 0) -> Layout:
  """The parts of an experiment on devices that learn, and need not be there.

  Raises:
    ValueError: the devices cannot share the work.
  """
  from experiments.runtime import parts

  run = experiment.run
  size = max(mesh.size, run.parts)
  if is_fresh(experiment.config) and size > 1:
    raise ValueError(
      f'devices={mesh.size}, parts={run.parts}: {experiment.agent_name} keeps '
      'memory of each stream on one device; take devices=1, parts=0'
    )
  sizes = {
    'num_envs': experiment.env.num_envs,
    'batch_size': run.batch_size,
    'replay_capacity': run.replay_capacity,
  }
  if not experiment.material.acts:
    saved_parts = 1  # Rows that are given are not shared out.
  number = parts.choose(run.parts, saved_parts, sizes, mesh)
  if run.batch_size % mesh.size:
    raise ValueError(
      f'batch_size={run.batch_size}: must be a multiple of the {mesh.size} '
      'devices'
    )
  return Layout(mesh, (), number)


def place_over(mesh: Any) -> Callable[[Any], Any]:
  """Divides a batch of a pure source over a mesh, if there is one."""
  import jax

  from experiments.runtime import mesh as meshes

  if mesh is None or mesh.size == 1:
    return lambda batch: batch
  rows = meshes.split(mesh)
  return lambda batch: jax.lax.with_sharding_constraint(batch, rows)


def make_source(
  experiment: Experiment,
  env,
  agent,
  layout: Layout | None = None,
  stopping: Callable[[], bool] = lambda: False,
):
  """The source of an experiment: environment, replay, reanalysis.

  The environment has the copies of a part; without a layout there is one device
  and one part; `stopping` is as for `sources.replayed`.

  Raises:
    ValueError: devices for acting, but the environment is pure JAX.
  """
  import jax

  from experiments.runtime import mesh as meshes
  from experiments.runtime import parts, sources
  from search.model import Environment

  if is_fresh(experiment.config):
    return _make_fresh(experiment, env, agent)
  if layout is None:
    home = None if isinstance(env, Environment) else jax.local_devices()[0]
    part = _make_part(experiment, env, agent, home=home)
    return sources.reanalyzed(part, agent)
  mesh, number = layout.mesh, layout.parts
  if isinstance(env, Environment):
    if layout.acting:
      raise ValueError(
        f'acting_devices={len(layout.acting)}: {experiment.env_name} acts in '
        'the same program as it learns; take 0'
      )
    source = _make_part(experiment, env, agent, number)
    if number > 1 or mesh.size > 1:
      source = parts.stacked(source, number, mesh)
    refresh, sharding = agent.refresh, state_sharding(experiment, agent, mesh)
    if refresh is not None and mesh.size > 1 and sharding is None:
      refresh = meshes.by_rows(refresh, mesh, (1,))
    return sources.reanalyzed(source, agent, refresh)
  acting = layout.acting or (None,)
  if mesh.size > 1 and experiment.run.acting == 'asynchronous':
    acting = layout.acting or tuple(meshes.local_devices(mesh))
  some = [
    _make_part(
      experiment, env, agent, number, acting[i % len(acting)], home, stopping
    )
    for i, home in enumerate(parts.homes(number, mesh))
  ]
  source = parts.hosted(some, number, mesh, experiment.run.batch_size)
  compiled = None
  if agent.refresh is not None and mesh.size > 1:
    sharding = state_sharding(experiment, agent, mesh)
    compiled = meshes.compile_refresh(agent, mesh, sharding)
  return sources.reanalyzed(source, agent, compiled)


def _make_fresh(experiment: Experiment, env, agent):
  """The environments alone, for an agent with memory of each stream."""
  from experiments.runtime import sources
  from search.model import Environment

  if not isinstance(env, Environment):
    raise ValueError(
      f'env={experiment.env_name}: {experiment.agent_name} takes fresh '
      'consecutive steps of an environment in JAX'
    )
  return sources.from_env(env, agent, experiment.env.num_envs)


def state_sharding(experiment: Experiment, agent: Any, mesh: Any):
  """The sharding of an agent's state over devices; None if it is replicated.

  Raises:
    ValueError: experts=divided with parallel=pmap, or without experts that the
      devices can divide.
  """
  import jax

  from experiments.runtime import mesh as meshes

  if experiment.run.experts == 'replicated':
    return None
  if experiment.run.parallel == 'pmap':
    raise ValueError('experts=divided: needs parallel=jit')
  shapes = jax.eval_shape(agent.init, jax.random.key(0))
  sharding = meshes.state_sharding(shapes, mesh)
  if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(sharding)):
    raise ValueError(
      f'experts=divided: {experiment.agent_name} has no mixture whose number '
      f'of experts is a multiple of the {mesh.size} devices; take replicated'
    )
  return sharding


def keeps_frames(experiment: Experiment, spec: Any) -> bool:
  """Whether simulators on the host have their frames kept on the device.

  Raises:
    ValueError: they are to, but there are none.
  """
  import jax

  from experiments.runtime import columns

  if experiment.run.frames_on == 'host':
    return False
  seen = jax.tree.leaves(
    spec.observation, is_leaf=lambda x: hasattr(x, 'dtype')
  )
  if not any(columns.is_image(x.shape, x.dtype) for x in seen):
    raise ValueError(
      f'frames_on=device: {experiment.env_name} has no images of uint8; take '
      'frames_on=host'
    )
  return True


def _make_part(
  experiment: Experiment,
  env,
  agent,
  number=1,
  device=None,
  home=None,
  stopping: Callable[[], bool] = lambda: False,
):
  """The environments and the replay of one of so many equal parts.

  Simulators on the host act on `device`, and windows go to `home`.
  """
  from agents.core import replay as core
  from experiments.runtime import host, replay, sources
  from search.model import Environment

  run = experiment.run
  shared = {
    'capacity': run.replay_capacity // number,
    'batch_size': run.batch_size // number,
    'window': window_of(experiment.config),
    'alpha': run.replay_alpha,
  }
  if isinstance(env, Environment):
    inner = sources.from_env(env, agent, experiment.env.num_envs // number)
    memory = core.device_replay(**shared)
  else:
    inner = host.from_host(
      env,
      agent,
      mode=run.acting,
      publish_every=run.publish_every,
      queue_size=run.queue_size,
      device=device,
    )
    memory = replay.host_replay(
      **shared,
      frame_stack=env.spec.frame_stack,
      compress=run.compress_replay,
      device=home if keeps_frames(experiment, env.spec) else None,
    )
  source = sources.replayed(
    inner,
    memory,
    experiment.pace,
    total_updates=experiment.updates,
    beta=(run.replay_beta, 1.0),
    stopping=stopping,
    rests=run.extra_updates > 0,
  )
  if hasattr(experiment.config, 'window'):
    return source
  from experiments.runtime import transitions

  return transitions.transitions(source)
