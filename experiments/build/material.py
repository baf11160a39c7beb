"""What a run is, and what its agent learns from.

A `Material` is chosen once, by `build.describe`. Its functions take the
experiment, so that one with other settings needs no other material; they open
files and make simulators only when they are called.
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
    on_host: whether host simulators make the experience: their source needs the
      devices to be there.
    make_source: `(experiment, phase, layout, stopping) -> Source` of a phase of
      `build.make_phases`; the experiment may be another one of the same
      material. `layout` is None for one device; `stopping` ends the wait for
      the rows before the first update.
  """

  spec: Any
  on_host: bool
  make_source: Callable[..., Any]


class Kept(NamedTuple):
  """What one run keeps to learn from, by the setting that says how much.

  `size` is its bytes, `drawn` the bytes of a row of a batch, and `frames` those
  on the device where the rest is on the host.
  """

  field: str
  value: int
  size: float
  drawn: float
  frames: float = 0.0


class About(NamedTuple):
  """Lines for people on what is learned from.

  `what` is the rest of the line `AGENT on ...`, between `before` and `after`.
  """

  before: tuple[str, ...]
  what: str
  after: tuple[str, ...]


class Measure(NamedTuple):
  """An evaluation that many rows of one program share.

  Attributes:
    evaluate: `(experiment, agent, params, seed, step) -> found`, which may be
      traced; None if host simulators are needed.
    act: `(experiment, agent, params, key, timestep) -> {prefix: action}`, which
      may be traced, for such simulators, or None. `found` is then `{prefix:
      (returns [E], lengths [E])}` of E episodes.
    summarise: `(found) -> {metric: float [R]}`, of numpy arrays `[R, ...]`.
  """

  evaluate: Callable[..., Any] | None
  act: Callable[..., Any] | None
  summarise: Callable[[Any], dict[str, Any]]


class Material(NamedTuple):
  """What an agent learns from: an environment, a data set or a text.

  Attributes:
    flag: which flag names it: `env`, `dataset` or `text`.
    acts: whether its experience is made by acting; a run's steps are then
      decisions, else updates.
    plays: whether what has been learned plays; else it continues a text.
    metric: of an evaluation, which decides what is best.
    memory: settings that change what a run on it needs.
    sizes: those of them that change what is kept to learn from.
    complete: `(experiment, env) -> experiment`, checked and completed; `env` is
      the user's.
    name: `(experiment) -> str`, how a run's folder names it.
    fingerprint: `(experiment) -> dict` for config.json, which a resumed run
      must find again.
    open: `(experiment, parts) -> Opened`, with the environments of one of so
      many parts.
    rows: `(experiment) -> arrays` that all runs on it share, or None.
    kept: `(experiment, agent, spec) -> Kept`.
    describe: `(experiment, spec) -> About`.
    evaluate: `(experiment, agent) -> ((params, step) -> {metric: float})`, or
      None if nothing is measured.
    measure: `(experiment, agent) -> Measure`, or None in the same case.
    columns: `(experiment, agent) -> names` of the metrics of an evaluation.
    keep: `(experiment, workdir)`: writes what playing needs of it.
    finish: `(experiment, agent) -> ((workdir, params by checkpoint) -> None)`,
      which measures what has been learned and prints the next commands, or
      None.
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
    agent_name: a module of `agents/`.
    env_name: for `experiments.envs.make`; '' if a data set has none.
    steps: decisions; updates if it learns from a data set.
    dataset: for `experiments.data.open_dataset`, or the path of a text; '' for
      none. Only the material reads it.
    time_steps: expected for so many decisions, see `runtime.sources.Pace`.
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
    if not self.env.recorded:  # Folders from before there was such a field.
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
    """Updates of the whole run; planned if it ends by its decisions."""
    if not self.material.acts:
      return self.steps
    return self.pace.updates(self.time_steps) + self.run.extra_updates

  @property
  def budget(self):
    """A fresh `runtime.budget.Budget`; None if updates end the run."""
    from experiments.runtime.budget import Budget

    if not self.material.acts:
      return None
    return Budget(self.pace, self.run.extra_updates)


def is_fresh(config: Any) -> bool:
  """Whether an agent takes all steps of its streams, once and in order.

  Such agents keep memory of each stream in their state, which a class attribute
  of their `Config` says, and have no replay: a batch is one row of each
  environment.
  """
  return getattr(config, 'fresh', False)


def window_of(config: Any) -> int:
  """Steps that an agent learns from at once; single transitions take two."""
  return getattr(config, 'window', 2)
