"""What a run is, and what its agent learns from.

A `Material` is chosen once, by `build.describe`, and carried by the
experiment. Its functions take the experiment, so that one whose settings are
replaced needs no other material; they open files and make simulators when they
are called and not before.
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from experiments.presets.table import EnvConfig, RunConfig


class Opened(NamedTuple):
  """A material that agents can learn from.

  Attributes:
    spec: `agents.core.types.Spec`, what its agents are made for.
    on_host: whether simulators of the host make the experience: their source
      needs the devices to be there.
    make_source: `(experiment, phase, layout, stopping) -> Source` of a phase of
      `build.make_phases`; the experiment may be another one of the same
      material. `layout` is None for one device; `stopping` ends the wait for
      the rows before the first update.
  """

  spec: Any
  on_host: bool
  make_source: Callable[..., Any]


class Kept(NamedTuple):
  """What one run keeps to learn from.

  Attributes:
    field: the setting that says how much.
    value: its value.
    size: bytes that it takes.
    drawn: bytes of a row of a batch.
  """

  field: str
  value: int
  size: float
  drawn: float


class About(NamedTuple):
  """Lines for people on what is learned from.

  Attributes:
    before: that come first.
    what: the rest of the line `AGENT on ...`.
    after: that follow it.
  """

  before: tuple[str, ...]
  what: str
  after: tuple[str, ...]


class Measure(NamedTuple):
  """An evaluation that many rows of one program share.

  Attributes:
    evaluate: `(experiment, agent, params, seed, step) -> found`, which may be
      traced; None where simulators of the host are needed.
    act: `(experiment, agent, params, key, timestep) -> {prefix: action}`, which
      may be traced, for such simulators; None without. `{prefix: (returns [E],
      lengths [E])}` of E episodes is then what was found.
    summarise: `(found) -> {metric: float [R]}`, of numpy arrays `[R, ...]`.
  """

  evaluate: Callable[..., Any] | None
  act: Callable[..., Any] | None
  summarise: Callable[[Any], dict[str, Any]]


class Material(NamedTuple):
  """What an agent learns from: an environment, a data set or a text.

  Attributes:
    flag: which flag names it: `env`, `dataset` or `text`.
    acts: whether its experience is made by acting; the steps of a run are then
      decisions, and else updates.
    plays: whether what has been learned plays; else it continues a text.
    metric: of an evaluation, which decides what is best.
    memory: settings that change what a run on it needs.
    sizes: those of them that change what is kept to learn from.
    complete: `(experiment, env) -> experiment`, checked, with what the material
      decides of it; `env` is the user's.
    name: `(experiment) -> str`, how a run's folder names it.
    fingerprint: `(experiment) -> dict` that config.json holds, so that a run
      goes on with what it began with.
    open: `(experiment, parts) -> Opened`, of as many environments as one of so
      many parts has.
    rows: `(experiment) -> arrays` that all runs on it share; None for none.
    kept: `(experiment, agent, spec) -> Kept`.
    describe: `(experiment, spec) -> About`.
    evaluate: `(experiment, agent) -> ((params, step) -> {metric: float})`, or
      None where nothing is measured.
    measure: `(experiment, agent) -> Measure`, or None in the same case.
    columns: `(experiment, agent) -> names` of the metrics of an evaluation.
    keep: `(experiment, workdir)`: writes what playing needs of it.
    finish: `(experiment, agent) -> ((workdir, params by checkpoint) -> None)`,
      which measures what has been learned and says how to go on; None where
      there is nothing to measure.
  """

  flag: str
  acts: bool
  plays: bool
  metric: str
  memory: tuple[str, ...]
  sizes: tuple[str, ...]
  complete: Callable[..., Any]
  name: Callable[..., str]
  fingerprint: Callable[..., dict[str, Any]]
  open: Callable[..., Opened]
  rows: Callable[..., Any]
  kept: Callable[..., Kept]
  describe: Callable[..., About]
  evaluate: Callable[..., Callable | None]
  measure: Callable[..., Measure | None]
  columns: Callable[..., set[str]]
  keep: Callable[..., None]
  finish: Callable[..., Callable | None]


class Experiment(NamedTuple):
  """All that a run needs.

  Attributes:
    name: the preset's.
    agent_name: a module of `agents/`.
    env_name: for `experiments.envs.make`; '' where a data set has none.
    steps: decisions; updates where it learns from a data set.
    seed: the run's.
    config: the agent's `Config`.
    env: `EnvConfig`.
    run: `RunConfig`.
    material: what its agent learns from.
    dataset: what `experiments.data.open_dataset` opens, or the path of a text;
      '' for none. Whoever wants more than its name asks the material.
    time_steps: in which so many decisions are expected to be taken; see
      `runtime.sources.Pace`.
  """

  name: str
  agent_name: str
  env_name: str
  steps: int
  seed: int
  config: Any
  env: EnvConfig
  run: RunConfig
  material: Material
  dataset: str = ''
  time_steps: int = 0

  def as_dict(self) -> dict[str, Any]:
    """What config.json holds."""
    # The schedules that follow from the time steps are in the agent's part.
    apart = ('config', 'env', 'run', 'time_steps', 'material')
    fields = {n: v for n, v in self._asdict().items() if n not in apart}
    plain = {n: dataclasses.asdict(getattr(self, n)) for n in apart[:3]}
    if not self.env.recorded:  # Folders from before it was known go on.
      del plain['env']['recorded']
    return fields | {'agent': plain.pop('config')} | plain

  @property
  def where(self) -> str:
    """The name of what is learned from."""
    return self.dataset or self.env_name

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
    if not self.material.acts:
      return self.steps
    return self.pace.updates(self.time_steps) + self.run.extra_updates

  @property
  def budget(self):
    """A fresh `runtime.budget.Budget`; None where updates end the run."""
    from experiments.runtime.budget import Budget

    if not self.material.acts:
      return None
    return Budget(self.pace, self.run.extra_updates)


def is_fresh(config: Any) -> bool:
  """Whether an agent takes all steps of its streams, once and in order.

  Such agents keep memory of each stream in their state, and say so by a class
  attribute of their `Config`. They have no replay: a batch is one row of each
  environment.
  """
  return getattr(config, 'fresh', False)


def window_of(config: Any) -> int:
  """Steps of what an agent learns from; single transitions take two."""
  return getattr(config, 'window', 2)
