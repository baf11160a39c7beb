"""What a run is told besides its agent's own settings.

Nothing heavy is imported here: `--help` reads it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class EnvConfig:
  """How the environment is made.

  Attributes:
    num_envs: copies stepped together.
    num_threads: of envpool; 0 for as many as help.
    frame_stack: frames in an observation; none for the environment's usual.
    options: the environment's own, `name=value` each, with commas between.
    action_bins: bins a dimension that continuous actions are divided into; 0
      leaves them.
    recorded: what its data set was recorded in, as JSON, which the data set
      gives; `none` takes the environment as it is registered.
  """

  num_envs: int = 16
  num_threads: int = 0
  frame_stack: int | None = None
  options: tuple[str, ...] = ()
  action_bins: int = 0
  recorded: str = ''

  def __post_init__(self):
    _at_least(self, 1, 'num_envs')
    _at_least(self, 0, 'num_threads')
    _at_most(self, 1_000_000, 'num_envs', 'action_bins')
    _at_most(self, 10_000, 'num_threads', 'frame_stack')
    if self.frame_stack is not None:
      _at_least(self, 1, 'frame_stack')
    if self.action_bins < 0 or self.action_bins == 1:
      raise ValueError(f'action_bins={self.action_bins}: must be 0 or >= 2')


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """How an agent is run: pace, memory, intervals. Intervals are in updates.

  Attributes:
    batch_size: windows (or transitions) an update.
    reward_factor: rewards of a data set are multiplied by it.
    data_on: where a data set lies, on the `device` or on the `host`; files may
      be larger than memory on the host.
    replay_capacity: decisions kept.
    replay_alpha: exponent of the priorities; 0 samples uniformly.
    replay_beta: exponent of the importance weights at first; it rises to 1.
    compress_replay: keep frames compressed (lossless) in host memory.
    warmup_decisions: time steps before the first update; a time step is a
      decision, or the end of an episode.
    decisions_per_update: time steps taken for each update.
    extra_updates: updates after the last decision.
    acting: `asynchronous` acts beside learning, `synchronous` in step with it
      and is bitwise reproducible; environments in JAX are always so.
    queue_size: rows that an asynchronous actor may be ahead.
    publish_every: updates between copies of the parameters for the actor.
    devices: that an update is split over, of each process; 0 for all but the
      acting ones.
    acting_devices: of each process that act only, apart from those that learn
      (asynchronous acting); 0 acts on the learning ones.
    parts: shares of environments and replay that devices and processes hold,
      fixed when a run begins; 0 for as many as devices where that divides
      num_envs, batch_size and replay_capacity.
    parallel: how an update is split over devices, `jit` or `pmap`.
    experts: of a mixture: `replicated`, all on every device, or `divided` over
      them (parallel=jit).
    log_every: between rows of metrics.csv; a row is also written wherever the
      run halts to save or to evaluate.
    checkpoint_every: between checkpoints.
    keep_checkpoints: how many stay.
    evaluate_every: between evaluations while training, with search
      (`eval_return`) and without (`network_return`); 0 for none.
    evaluate_episodes: episodes of each.
    hold_out: windows that are never trained on, from other simulators and the
      untrained network; 0 for none.
    hold_out_every: between evaluations of the losses on them.
    early_update: where a copy is kept to compare with at the end; 0 for none.
    final_episodes: episodes for each row of the table at the end; 0 for none.
    final_simulations: simulations a decision of those rows.
  """

  batch_size: int = 64
  reward_factor: float = 1.0
  data_on: Literal['device', 'host'] = 'device'
  replay_capacity: int = 100_000
  replay_alpha: float = 0.6
  replay_beta: float = 0.4
  compress_replay: bool = False
  warmup_decisions: int = 2000
  decisions_per_update: float = 1.0
  extra_updates: int = 0
  acting: Literal['asynchronous', 'synchronous'] = 'asynchronous'
  queue_size: int = 4
  publish_every: int = 1
  devices: int = 0
  acting_devices: int = 0
  parts: int = 0
  parallel: Literal['jit', 'pmap'] = 'jit'
  experts: Literal['replicated', 'divided'] = 'replicated'
  log_every: int = 50
  checkpoint_every: int = 1000
  keep_checkpoints: int = 2
  evaluate_every: int = 0
  evaluate_episodes: int = 32
  hold_out: int = 0
  hold_out_every: int = 50
  early_update: int = 0
  final_episodes: int = 200
  final_simulations: tuple[int, ...] = (4, 16, 64)

  def __post_init__(self):
    _at_least(
      self,
      1,
      'batch_size',
      'replay_capacity',
      'warmup_decisions',
      'queue_size',
      'publish_every',
      'log_every',
      'checkpoint_every',
      'keep_checkpoints',
      'hold_out_every',
      'evaluate_episodes',
    )
    _at_least(
      self,
      0,
      'replay_alpha',
      'replay_beta',
      'extra_updates',
      'devices',
      'acting_devices',
      'parts',
      'evaluate_every',
      'hold_out',
      'early_update',
      'final_episodes',
    )
    _at_least(self, 1e-3, 'decisions_per_update')
    _at_most(self, 1e6, 'decisions_per_update')
    _at_most(self, 1_000_000, 'evaluate_episodes', 'final_episodes', 'hold_out')
    _at_most(self, 10_000, 'queue_size', 'keep_checkpoints')
    if not math.isfinite(self.reward_factor) or not self.reward_factor:
      raise ValueError(
        f'reward_factor={self.reward_factor}: must be finite and not 0'
      )
    if any(n < 0 for n in self.final_simulations):
      raise ValueError(
        f'final_simulations={self.final_simulations}: must be 0 or more each'
      )


def _at_least(config, least, *names):
  for name in names:
    value = getattr(config, name)
    if value == math.inf:
      raise ValueError(f'{name}={value}: must be finite')
    if value < least:
      raise ValueError(f'{name}={value}: must be >= {least}')


def _at_most(config, most, *names):
  for name in names:
    value = getattr(config, name)
    if value is not None and value > most:
      raise ValueError(f'{name}={value}: must be <= {most:g}')


class Preset(NamedTuple):
  """One row.

  Attributes:
    summary: what it is, for `--help`.
    agent: a module of `agents/`.
    env: a name for `experiments.envs.make`; '' where it is the data set's.
    steps: decisions; updates on a data set.
    time_steps: in which its run took so many decisions, one more an episode;
      schedules are planned by their ratio. 0 where it was not measured: as if
      no episode ended.
    settings: `field=value`, in the words of `--set`.
    source: where the numbers come from.
  """

  summary: str
  agent: str
  env: str
  steps: int
  settings: tuple[str, ...]
  source: str
  time_steps: int = 0


# Fields of `RunConfig` that one kind of run alone looks at.
_OF_ACTING = (
  'replay_capacity',
  'replay_alpha',
  'replay_beta',
  'compress_replay',
  'warmup_decisions',
  'decisions_per_update',
  'extra_updates',
  'acting',
  'queue_size',
  'publish_every',
  'acting_devices',
)
_OF_DATA = ('reward_factor', 'data_on')
_OF_REPLAY = (
  'replay_capacity',
  'replay_alpha',
  'replay_beta',
  'compress_replay',
)


def refuse_unused(
  assignments: Sequence[str], *, on_data: bool, is_fresh: bool = False
) -> None:
  """Refuses a user's settings that this kind of run does not look at.

  Args:
    assignments: `field=value`, as `--set` takes them.
    on_data: whether the run learns from a data set or a text.
    is_fresh: whether its agent learns from each step once, without a replay.

  Raises:
    ValueError: one of them would change nothing.
  """
  unused, reason = _OF_DATA, 'needs a data set (--dataset)'
  if on_data:
    unused, reason = _OF_ACTING, 'a run on data does not act and has no replay'
  elif is_fresh:
    unused += _OF_REPLAY
    reason = 'this agent learns from fresh steps, without data or a replay'
  for assignment in assignments:
    section, _, field = assignment.partition('=')[0].strip().rpartition('.')
    if section in ('', 'run') and field in unused:
      raise ValueError(f'{assignment}: {reason}; leave it out')
