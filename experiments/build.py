"""From names and settings to an agent, its source and its environments.

Launchers, studies and notebooks build alike: `experiment = build(...)`.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from experiments import offline, presets
from experiments.presets import EnvConfig, Preset, RunConfig


class Experiment(NamedTuple):
  """All that a run needs.

  Attributes:
    name: the preset's.
    agent_name: a module of `agents/`.
    env_name: for `experiments.envs.make`; '' where a data set has none.
    steps: decisions; updates where it learns from a data set.
    time_steps: in which so many decisions are expected to be taken; see
      `runtime.sources.Pace`.
    seed: the run's.
    config: the agent's `Config`.
    env: `EnvConfig`.
    run: `RunConfig`.
    dataset: what `experiments.data.open_dataset` opens, or the path of a text;
      '' for none.
  """

  name: str
  agent_name: str
  env_name: str
  steps: int
  seed: int
  config: Any
  env: EnvConfig
  run: RunConfig
  dataset: str = ''
  time_steps: int = 0

  def as_dict(self) -> dict[str, Any]:
    """What config.json holds."""
    # The schedules that follow from the time steps are in the agent's part.
    sections = ('config', 'env', 'run', 'time_steps')
    fields = {n: v for n, v in self._asdict().items() if n not in sections}
    plain = {n: dataclasses.asdict(getattr(self, n)) for n in sections[:3]}
    if not self.env.recorded:  # Folders from before it was known go on.
      del plain['env']['recorded']
    return fields | {'agent': plain.pop('config')} | plain

  @property
  def is_text(self) -> bool:
    """Whether its agent learns from a text."""
    return hasattr(self.config, 'text')

  @property
  def pace(self):
    """When rows are taken, see `runtime.sources.Pace`."""
    from experiments.runtime.sources import Pace

    ratio = Fraction(self.run.decisions_per_update).limit_denominator(1000)
    return Pace(
      num_envs=self.env.num_envs,
      warmup_decisions=self.run.warmup_decisions,
      decisions_per_update=ratio,
      max_decisions=self.steps,
    )

  @property
  def updates(self) -> int:
    """Updates of the whole run; a plan where it ends by its decisions."""
    if self.dataset:
      return self.steps
    return self.pace.updates(self.time_steps) + self.run.extra_updates

  @property
  def ends_by_decisions(self) -> bool:
    """Whether it acts, so that `budget` ends it and not its updates."""
    return not self.dataset

  @property
  def budget(self):
    """A fresh `runtime.budget.Budget`, for a run that acts."""
    from experiments.runtime.budget import Budget

    return Budget(self.pace, self.run.extra_updates)


def describe(
  preset_name: str,
  *,
  agent: str | None = None,
  env: str | None = None,
  steps: int | None = None,
  seed: int = 0,
  settings: Sequence[str] = (),
  dataset: str | None = None,
) -> Experiment:
  """A preset with changes.

  Args:
    preset_name: a row of `experiments.presets`.
    agent: another agent; the preset's settings for fields that it does not
      have are then left out.
    env: another environment.
    steps: other decisions (or updates on a data set).
    seed: of the run.
    settings: `field=value`.
    dataset: to learn from, instead of from play; a data set or a text.

  Returns:
    `Experiment`; nothing is made or compiled yet.

  Raises:
    ValueError: with one line that names what is wrong and what would be right.
  """
  from experiments.runtime import config as configs

  preset: Preset = presets.find(preset_name)
  agent_name = presets.find_agent(agent or preset.agent)
  module = importlib.import_module(f'agents.{agent_name}')
  sections = {'agent': module.Config(), 'env': EnvConfig(), 'run': RunConfig()}
  own = preset.settings
  if agent_name != preset.agent:
    own = [s for s in own if _has(sections, s)]
  sections = configs.override(sections, own)
  sections = configs.override(sections, settings)
  experiment = Experiment(
    name=preset_name,
    agent_name=agent_name,
    env_name=env or preset.env,
    dataset=dataset or '',
    steps=preset.steps if steps is None else steps,
    seed=seed,
    config=sections['agent'],
    env=sections['env'],
    run=sections['run'],
  )
  _check_integers(experiment)
  if is_fresh(experiment.config):
    experiment = _complete_fresh(experiment)
  # A preset without an environment is not for play, whatever env is given.
  elif dataset or not preset.env or presets.is_offline(agent_name):
    experiment = offline.complete(experiment, env)
  else:
    _check(experiment)
  # Whole rows, at the preset's rate.
  planned = math.ceil(
    experiment.steps * Fraction(preset.time_steps or preset.steps, preset.steps)
  )
  planned += -planned % experiment.env.num_envs
  experiment = experiment._replace(time_steps=planned)
  if experiment.updates > configs.MAX_INT:
    raise ValueError(
      f'steps={experiment.steps}: makes {experiment.updates} updates, must be '
      f'at most {configs.MAX_INT}; take fewer steps'
    )
  # What of the agent depends on the size of the run.
  fields = {f.name for f in dataclasses.fields(experiment.config)}
  lengths = {'total_updates': experiment.updates}
  if not dataset:
    lengths = {
      # The schedule of acting ends where acting does.
      'total_updates': experiment.pace.updates(planned),
      'total_decisions': planned,
    }
  lengths |= {'streams': experiment.env.num_envs}
  known = {n: v for n, v in lengths.items() if n in fields}
  config = dataclasses.replace(experiment.config, **known)
  return experiment._replace(config=config)


def _check_integers(experiment: Experiment) -> None:
  """Refuses integers that no array of JAX can hold."""
  from experiments.runtime import config as configs

  def check(name, value):
    if dataclasses.is_dataclass(value):
      for field in dataclasses.fields(value):
        check(field.name, getattr(value, field.name))
    elif isinstance(value, tuple):
      for item in value:
        check(name, item)
    elif name in ('replay_capacity', 'model_capacity'):
      return  # `experiments.capacity` tells what it would take
    elif type(value) is int and abs(value) > configs.MAX_INT:
      raise ValueError(f'{name}={value}: must be at most {configs.MAX_INT}')

  check('steps', experiment.steps)
  for section in (experiment.config, experiment.env, experiment.run):
    check('', section)


def _has(sections, setting: str) -> bool:
  from experiments.runtime import config as configs

  try:
    configs.override(sections, [setting])
  except configs.UserError:
    return False
  return True


def _check(experiment: Experiment) -> None:
  run, envs = experiment.run, experiment.env.num_envs
  if experiment.steps <= run.warmup_decisions:
    raise ValueError(
      f'steps={experiment.steps}: must be above warmup_decisions='
      f'{run.warmup_decisions}'
    )
  window = window_of(experiment.config)
  need = (window + 1) * envs
  if run.warmup_decisions < need:
    raise ValueError(
      f'warmup_decisions={run.warmup_decisions}: must be at least {need}, so '
      f'that {envs} environments have a window of {window} '
      'steps each'
    )
  if run.replay_capacity < need:
    raise ValueError(
      f'replay_capacity={run.replay_capacity}: must be at least {need}'
    )
  if run.acting_devices and run.acting == 'synchronous':
    raise ValueError(
      f'acting_devices={run.acting_devices}: needs acting=asynchronous'
    )


def is_fresh(config: Any) -> bool:
  """Whether an agent takes all steps of its streams, once and in order.

  Such agents keep memory of each stream in their state, and say so by a class
  attribute of their `Config`. They have no replay: a batch is one row of each
  environment.
  """
  return getattr(config, 'fresh', False)


def _complete_fresh(experiment: Experiment) -> Experiment:
  """The experiment, its pace that of fresh rows."""
  if experiment.dataset:
    raise ValueError(
      f'dataset={experiment.dataset}: {experiment.agent_name} learns from '
      'fresh steps of its own play, not from a data set'
    )
  if experiment.run.hold_out:
    raise ValueError(
      f'hold_out={experiment.run.hold_out}: {experiment.agent_name} learns '
      'from fresh steps and not from windows; set it to 0'
    )
  if experiment.run.extra_updates:
    raise ValueError(
      f'extra_updates={experiment.run.extra_updates}: '
      f'{experiment.agent_name} makes an update of each fresh step and has no '
      'replay for more; set it to 0'
    )
  num, usual = experiment.env.num_envs, RunConfig()
  pace = {
    'batch_size': num,
    'warmup_decisions': num,
    'decisions_per_update': float(num),
  }
  for name, value in pace.items():
    asked = getattr(experiment.run, name)
    if asked not in (value, getattr(usual, name)):
      raise ValueError(
        f'{name}={asked:g}: {experiment.agent_name} takes one step of each of '
        f'its {num} games an update; set env.num_envs instead'
      )
  if experiment.steps <= num:
    raise ValueError(
      f'steps={experiment.steps}: must be above env.num_envs={num}'
    )
  run = dataclasses.replace(experiment.run, **pace)
  return experiment._replace(run=run)


def reads_text(agent_name: str) -> bool:
  """Whether an agent learns from a text.

  Raises:
    ValueError: there is no such agent.
  """
  module = importlib.import_module(f'agents.{presets.find_agent(agent_name)}')
  return 'text' in {field.name for field in dataclasses.fields(module.Config)}


def window_of(config: Any) -> int:
  """Steps of what an agent learns from; single transitions take two."""
  return getattr(config, 'window', 2)


def make_env(experiment: Experiment, *, training: bool, num_envs=None):
  """The environment of an experiment; see `experiments.envs.make.make`.

  Raises:
    ValueError: an option of the environment that it does not take.
  """
  from experiments.envs import make

  return make.make(
    experiment.env_name,
    num_envs or experiment.env.num_envs,
    training=training,
    frame_stack=experiment.env.frame_stack,
    num_threads=experiment.env.num_threads,
    options=make.parse_options(experiment.env.options),
    action_bins=experiment.env.action_bins,
    recorded=experiment.env.recorded,
  )


def make_networks(experiment: Experiment, spec, reduce: Callable | None = None):
  """The networks of an experiment's agent.

  Raises:
    ValueError: if the agent cannot take the spec.
  """
  module = importlib.import_module(f'agents.{experiment.agent_name}')
  return module.make_networks(experiment.config, spec, reduce)


def make_agent(experiment: Experiment, spec, reduce: Callable | None = None):
  """The agent of an experiment for an environment's spec.

  Raises:
    ValueError: if the agent cannot take the spec.
  """
  module = importlib.import_module(f'agents.{experiment.agent_name}')
  networks = make_networks(experiment, spec, reduce)
  keywords = {} if reduce is None else {'reduce': reduce}
  return module.make(
    experiment.config, networks, module.make_losses(), spec, **keywords
  )


def make_phases(experiment: Experiment, spec, reduce: Callable | None = None):
  """The phases of an experiment: of most agents there is one.

  Returns:
    Tuple of `Phase`; all but the last one say how many updates they take.

  Raises:
    ValueError: if the agent cannot take the spec, or nothing is left for the
      last phase.
  """
  from agents.core.types import Phase

  module = importlib.import_module(f'agents.{experiment.agent_name}')
  if not hasattr(module, 'make_phases'):
    return (Phase('train', make_agent(experiment, spec, reduce)),)
  networks = module.make_networks(experiment.config, spec, reduce)
  keywords = {} if reduce is None else {'reduce': reduce}
  phases = module.make_phases(
    experiment.config, networks, module.make_losses(), spec, **keywords
  )
  before = sum(phase.updates or 0 for phase in phases[:-1])
  if before >= experiment.updates:
    names = ' and '.join(phase.name for phase in phases[:-1])
    raise ValueError(
      f'steps={experiment.updates}: must be above the {before} updates of '
      f'{names}'
    )
  return phases


def row(experiment: Experiment) -> tuple[Any, Any, Any]:
  """The last phase's agent and source on one device, and their spec.

  Raises:
    ValueError: agent, environment or data set do not fit.
  """
  if not experiment.dataset:
    env = make_env(experiment, training=True)
    agent = make_agent(experiment, env.spec)
    return agent, make_source(experiment, env, agent), env.spec
  data, stage = offline.material(experiment), None
  if experiment.env_name:
    stage = make_env(experiment, training=False, num_envs=1)
  spec = offline.spec_of(data, stage and stage.spec)
  phase = make_phases(experiment, spec)[-1]
  return phase.agent, offline.make_source(experiment, data, phase), spec


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

  Args:
    experiment: from `describe`.
    saved_parts: of the checkpoint that the run goes on from; 0 for none.

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
      'have as many'
    )
  layout = lay_out(experiment, meshes.make_mesh(learning), saved_parts)
  number = layout.parts
  if len(acting) > len(parts.held(number)):
    raise ValueError(
      f'acting_devices={run.acting_devices}: a process holds '
      f'{len(parts.held(number))} parts only; take more, parts='
      f'{len(acting) * jax.process_count()} say'
    )
  return layout._replace(acting=acting)


def lay_out(experiment: Experiment, mesh: Any, saved_parts: int = 0) -> Layout:
  """The parts of an experiment on devices that learn.

  Args:
    experiment: from `describe`.
    mesh: of the devices, which need not be there.
    saved_parts: see `make_layout`.

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
  number = parts.choose(run.parts, saved_parts, sizes, mesh)
  if run.batch_size % mesh.size:
    raise ValueError(
      f'batch_size={run.batch_size}: must be a multiple of the {mesh.size} '
      'devices'
    )
  return Layout(mesh, (), number)


def make_source(
  experiment: Experiment,
  env,
  agent,
  layout: Layout | None = None,
  stopping: Callable[[], bool] = lambda: False,
):
  """The source of an experiment: environment, replay, reanalysis.

  Args:
    experiment: from `describe`.
    env: from `make_env`, with as many copies as a part has.
    agent: from `make_agent`.
    layout: from `make_layout`; None for one device and one part.
    stopping: ends the wait for the rows before the first update; see
      `sources.replayed`.

  Raises:
    ValueError: devices for acting, but the environment is pure JAX.
  """
  from experiments.runtime import mesh as meshes
  from experiments.runtime import parts, sources
  from search.model import Environment

  if is_fresh(experiment.config):
    return _make_fresh(experiment, env, agent)
  if layout is None:
    return sources.reanalyzed(_make_part(experiment, env, agent), agent)
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
      experiment, env, agent, number, acting[i % len(acting)], stopping
    )
    for i in range(len(parts.held(number)))
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
  """How an agent's state lies on several devices; None: whole on each.

  Raises:
    ValueError: experts are to be divided, and there are none to divide.
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


def _make_part(
  experiment: Experiment,
  env,
  agent,
  number=1,
  device=None,
  stopping: Callable[[], bool] = lambda: False,
):
  """The environments and the replay of one of so many equal parts."""
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
  from experiments.runtime import offline as transitions

  return transitions.transitions(source)
