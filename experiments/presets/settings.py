"""Settings of a run other than its agent's own.

Nothing slow is imported here, because `--help` imports this module.
"""

import dataclasses
import math
from typing import Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class EnvConfig:
  """Settings of the environment.

  Attributes:
    num_envs: number of copies that are stepped together.
    num_threads: number of envpool's threads; 0 for its default.
    frame_stack: number of frames in an observation; none for the environment's
      default.
    options: the environment's own options, `name=value` separated by commas.
    action_bins: number of bins per dimension of continuous actions; 0 leaves
      actions continuous.
    recorded: JSON of the environment that the data set was recorded in, filled
      in from the data set; `none` uses the environment as it is registered.
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
  """Settings of a run: pace, memory and intervals, which are in updates.

  Attributes:
    batch_size: number of windows (or transitions) per update.
    reward_factor: factor by which a data set's rewards are multiplied.
    data_on: where a data set is held, on the `device` or on the `host`; on the
      host, files may be larger than memory.
    replay_capacity: number of decisions that the replay keeps.
    replay_alpha: exponent of the priorities; 0 samples uniformly.
    replay_beta: initial exponent of the importance weights; it rises to 1.
    frames_on: where the frames of simulators on the host are kept, on the
      `host` or on the `device`, so that an update moves no images there; the
      replay of an environment in JAX is always on the device.
    compress_replay: whether frames in host memory are compressed (lossless).
    warmup_decisions: number of time steps before the first update; a time step
      is a decision or the end of an episode.
    decisions_per_update: number of time steps per update.
    extra_updates: number of updates after the last decision.
    acting: `asynchronous` acts in parallel with learning, `synchronous` in
      turns with it, bitwise reproducible, as JAX environments always are.
    queue_size: number of rows that an asynchronous actor may be ahead.
    publish_every: updates between copies of the parameters for the actor.
    devices: number of devices of each process that an update is split over; 0
      for all except the acting ones.
    acting_devices: number of devices of each process that only act
      (asynchronous acting); 0 acts on the devices that learn.
    parts: number of parts into which environments and replay are divided for
      devices and processes, fixed when a run begins; 0 for the number of
      devices, if it divides num_envs, batch_size and replay_capacity.
    parallel: how an update is split over devices, `jit` or `pmap`.
    experts: whether a mixture's experts are `replicated`, all on every device,
      or `divided` over the devices (parallel=jit).
    log_every: updates between rows of metrics.csv; a row is also written
      whenever the run halts to save or to evaluate.
    checkpoint_every: updates between checkpoints.
    keep_checkpoints: number of checkpoints that are kept.
    evaluate_every: updates between evaluations during training, with search
      (`eval_return`) and without (`network_return`); 0 for no evaluations.
    evaluate_episodes: number of episodes in each of these evaluations.
    evaluate_decisions: number of decisions after which an episode of these
      evaluations is cut; 0 for the environment's own limit.
    hold_out: number of windows that are never trained on, from other simulators
      and the untrained network; 0 for none.
    hold_out_every: updates between evaluations of the losses on these windows.
    early_update: the update whose parameters are kept to compare with at the
      end; 0 for none.
    final_episodes: number of episodes per row of the final table; 0 for no
      table.
    final_simulations: numbers of simulations per decision in the final table.
  """

  batch_size: int = 64
  reward_factor: float = 1.0
  data_on: Literal['device', 'host'] = 'device'
  replay_capacity: int = 100_000
  replay_alpha: float = 0.6
  replay_beta: float = 0.4
  frames_on: Literal['host', 'device'] = 'host'
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
  evaluate_decisions: int = 0
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
      'evaluate_decisions',
      'hold_out',
      'early_update',
      'final_episodes',
    )
    _at_least(self, 1e-3, 'decisions_per_update')
    _at_most(self, 1e6, 'decisions_per_update')
    _at_most(self, 1_000_000, 'evaluate_episodes', 'final_episodes', 'hold_out')
    _at_most(self, 10_000, 'queue_size', 'keep_checkpoints')
    if self.frames_on == 'device' and self.compress_replay:
      raise ValueError(
        'frames_on=device: frames are not compressed there; set '
        'compress_replay=false'
      )
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
  """A row of the table.

  Attributes:
    summary: a description, for `--help`.
    agent: a module of `agents/`.
    env: a name for `experiments.envs.make`; '' for the data set's environment.
    steps: number of decisions, or of updates on a data set.
    time_steps: number of time steps that this many decisions took in a measured
      run (one more per episode); schedules are planned by the ratio. 0 if not
      measured, as if no episode ended.
    settings: `field=value`, as in `--set`.
    source: where the numbers come from.
  """

  summary: str
  agent: str
  env: str
  steps: int
  settings: tuple[str, ...]
  source: str
  time_steps: int = 0
