"""What planning adds to agents trained offline, as a table and a figure.

python -m experiments.study control --data=data/pendulum

For each quality of data and each seed it trains, by `experiments.train` in
folders of its own, the agents and an ensemble of dynamics on the same rows.
Then every planner plays the same episodes in the simulator, over the exact and
over the learned model. Nothing is trained or played twice.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.build import dataset, evaluation
from experiments.files import tables, writing
from experiments.files.errors import UserError, shown
from experiments.playing import (
  actor_critic_model,
  actor_critic_play,
  actor_critic_runs,
  planners,
)
from experiments.report import statistics, style, terminal
from experiments.runtime import config as configs
from experiments.runtime import signals
from experiments.runtime.devices import use_compilation_cache
from experiments.studies import runner

# These need no model.
BARE = ('actor', 'critic', 'critic+box')
DEPTHS, STEPS = (1, 2), (0, 4, 16)
PLANNERS = (
  'lookahead=1',
  'lookahead=1+box',
  'lookahead=1+rollout=4',
  'lookahead=1+rollout=4+no_critic',
  'lookahead=1+rollout=16',
  'lookahead=1+rollout=16+no_critic',
  'lookahead=1+refined=4',
  'lookahead=2',
  'lookahead=2+rollout=4',
  'lookahead=2+rollout=16',
)
_RUN = (
  '--set=evaluate_every=0',
  '--set=final_episodes=0',
  '--set=checkpoint_every=10000',
  '--set=log_every=1000',
)


class Played(NamedTuple):
  """A planner on one trained agent: a line of the CSV.

  Attributes:
    quality: of the data.
    planner: one of `BARE` or `PLANNERS`.
    dynamics: `none`, `exact` or `learned`.
    candidates: K of the first stage.
    return_se: standard error over episodes.
    gain: of the return over the actor's own, from the same starts.
    gain_se: standard error of the paired differences.
    model_steps: steps of the dynamics a decision.
    depth: stages; -1 for the actor.
    score: normalised return; None if the data set has no references.
  """

  quality: str
  agent: str
  seed: int
  planner: str
  dynamics: str
  candidates: int | None
  episodes: int
  return_mean: float
  return_se: float
  gain: float
  gain_se: float
  model_steps: int
  depth: int
  rollout: int
  score: float | None


# The fields that identify a cell of the table.
CELL = ('quality', 'agent', 'seed', 'dynamics', 'planner')


def train(
  name: str, quality: str, seed: int, data: pathlib.Path, folder: pathlib.Path
) -> pathlib.Path:
  """Trains one run unless it has been trained, and returns its folder.

  `name` is the agent's, or `dynamics` for only an ensemble.

  Raises:
    UserError: it did not finish.
    KeyboardInterrupt: a signal has stopped it; its state is saved.
  """
  workdir = folder / f'{name}_{quality}_s{seed}'
  mark = workdir.with_suffix('.done')
  if mark.exists():
    return workdir
  arguments = (
    f'--preset={name}_small',
    *_RUN,
    f'--dataset={data / quality}',
    f'--seed={seed}',
  )
  with signals.graceful_exit() as stopping:
    code = runner.run_command('train', arguments, workdir, stopping).code
    if stopping():
      raise KeyboardInterrupt
  if code:
    raise UserError(
      f'{shown(workdir)}: training failed: {signals.explain(code)}, see '
      f'{runner.log_of(workdir)}'
    )
  writing.write_text(mark, '')
  return workdir


class _Players:
  """Plays cells; those that differ only in parameters share a program."""

  def __init__(self, values: Any):
    self._values = values
    self._data = pathlib.Path(values.data)
    self._folder = pathlib.Path(values.folder)
    self._budget = actor_critic_play.Budget(
      values.candidates, values.later_candidates
    )
    self._runs, self._programs, self._actors, self._about = {}, {}, {}, {}
    self._env = self._exact = None

  def _run(self, name: str, quality: str, seed: int) -> Any:
    key = name, quality, seed
    if key not in self._runs:
      workdir = str(train(*key, self._data, self._folder))
      load = (
        actor_critic_runs.load_dynamics
        if name == 'dynamics'
        else actor_critic_runs.load
      )
      self._runs[key] = load(workdir)
    return self._runs[key]

  def _program(self, agent: str, kind: str, planner: str, dynamics: Any) -> Any:
    import jax

    key = agent, kind, planner
    if key not in self._programs:
      # Other seeds and data differ only in parameters.
      play = actor_critic_play.make_player(
        planners.parse(planner),
        self._first(agent),
        dynamics,
        budget=self._budget,
        value=self._values.value,
      )
      self._programs[key] = jax.jit(play)
    return self._programs[key]

  def _first(self, agent: str) -> Any:
    return next(run for key, run in self._runs.items() if key[0] == agent)

  def _played(
    self, quality: str, agent: str, seed: int, kind: str, planner: str
  ) -> Any:
    """Plays the episodes of a cell, as `evaluation.run` does."""
    run = self._run(agent, quality, seed)
    env = self._simulator(run)
    dynamics, own = self._exact, None
    if kind == 'learned':
      found = self._run('dynamics', quality, seed)
      dynamics, own = found.dynamics, found.params
    play = self._program(agent, kind, planner, dynamics)
    params = actor_critic_model.Params(run.params, own)
    # Each training seed has its own episodes, the same for all its planners.
    return evaluation.run(env, play, params, self._values.episodes, seed)

  def _simulator(self, run: Any) -> Any:
    if self._env is None:
      self._env = actor_critic_runs.simulator(run.experiment)
      self._exact = actor_critic_model.exact(self._env)
    return self._env

  def _score(self, quality: str, mean: float) -> float | None:
    if quality not in self._about:
      self._about[quality] = dataset.opened(str(self._data / quality)).about
    score = dataset.score(self._about[quality], mean)
    return None if score is None else float(score)

  def row(
    self, quality: str, agent: str, seed: int, kind: str, planner: str
  ) -> Played:
    """Plays a cell, given as `CELL`."""
    which = quality, agent, seed
    if which not in self._actors:
      self._actors[which] = self._played(*which, 'none', 'actor')
    actor = found = self._actors[which]
    if planner != 'actor':
      found = self._played(*which, kind, planner)
    strategy = planners.parse(planner)
    row = actor_critic_play.compare(
      evaluation.summarise('final', planner, None, found),
      strategy,
      kind,
      self._budget,
      found.returns,
      actor.returns,
    )
    own = {n: getattr(row, n) for n in Played._fields if hasattr(row, n)}
    return Played(
      *which,
      **own,
      depth=strategy.depth,
      rollout=strategy.steps or 0,
      score=self._score(quality, row.return_mean),
    )


def work(values: Any) -> Iterator[tuple[str, str, int, str, str]]:
  """The cells, given as `CELL`, the cheap ones first."""
  for seed in range(values.seeds):
    for quality in values.qualities:
      for agent in values.agents:
        for planner in BARE:
          yield quality, agent, seed, 'none', planner
  for planner in PLANNERS:
    for agent in values.agents:
      for kind in ('exact', 'learned'):
        for seed in range(values.seeds):
          for quality in values.qualities:
            yield quality, agent, seed, kind, planner


def check(values: Any) -> None:
  """Refuses missing data sets and agents without a critic.

  Raises:
    UserError: there is one.
  """
  for field in ('folder', 'results'):
    configs.check_place(field, getattr(values, field), folder=True)
  data = pathlib.Path(values.data)
  for quality in values.qualities:
    if not (data / quality).is_dir():
      raise UserError(
        f'data={data}: has no {quality}; collect it with python -m '
        f'experiments.collect --env=ENV --out={data}'
      )
  for agent in values.agents:
    if agent not in actor_critic_runs.AGENTS:
      raise UserError(
        f'agents={agent}: must be one of {", ".join(actor_critic_runs.AGENTS)}'
      )


def launch(values: Any) -> None:
  """Trains, plays and draws as the flags say.

  Raises:
    UserError: a run did not finish.
  """
  data, results = pathlib.Path(values.data), pathlib.Path(values.results)
  path = results / f'control_{data.name}.csv'
  rows = tables.read_records(path, Played)
  tasks = list(work(values))
  left = runner.missing(rows, CELL, tasks)
  terminal.begin(f'{len(left)} of {len(tasks)} planners on {data}')
  runner.fill(path, rows, left, _Players(values).row, digits=9)
  # Rounded as they are written, whichever run played them.
  summary = summarised(tables.read_records(path, Played))
  tables.write_rows(path.with_name(f'{path.stem}_summary.csv'), summary)
  draw(summary, path.with_suffix('.png'))
  terminal.end(f'{path}, {path.stem}_summary.csv and {path.stem}.png')


def summarised(rows: Sequence[Played]) -> list[dict[str, Any]]:
  """Means over training seeds with Student's 95% intervals.

  Of returns, and of their gain over the actor's; a row for each quality, agent,
  dynamics and planner. A single seed has no interval.
  """
  groups: dict[tuple, list[Played]] = {}
  names = ('quality', 'agent', 'dynamics', 'planner', 'model_steps')
  for row in rows:
    groups.setdefault(tuple(getattr(row, n) for n in names), []).append(row)
  found = []
  for key, own in groups.items():
    summary = dict(zip(names, key)) | {'seeds': len(own)}
    for name, column in (('return', 'return_mean'), ('gain', 'gain')):
      values = [getattr(row, column) for row in own]
      ends = statistics.mean_interval(values) if len(own) > 1 else ('', '')
      summary[f'{name}_mean'] = float(np.mean(values))
      summary[f'{name}_low'], summary[f'{name}_high'] = ends
    found.append(summary)
  return found


def draw(summary: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws return against the length of rollouts, a row of panels per agent.

  Columns are quality and dynamics; points are means over training seeds with
  their intervals.
  """
  agents = list(dict.fromkeys(row['agent'] for row in summary))
  columns = [
    (quality, kind)
    for quality in dict.fromkeys(row['quality'] for row in summary)
    for kind in ('exact', 'learned')
  ]
  if not summary:
    return
  figure, panels = style.panels(
    len(columns), 2.9, 2.5, len(agents), sharey='row'
  )
  for agent, line in zip(agents, panels):
    for (quality, kind), axes in zip(columns, line):
      _panel(
        axes,
        {
          row['planner']: row
          for row in summary
          if (row['agent'], row['quality']) == (agent, quality)
          and row['dynamics'] in ('none', kind)
        },
      )
      axes.set_title(f'{agent}, {quality} data, {kind} model', fontsize='small')
    line[0].set_ylabel('return')
  for axes in panels[-1]:
    axes.set_xlabel('m, steps of rollout')
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc='outside lower center',
    ncols=min(4, len(columns)),
    fontsize='small',
  )
  style.save(figure, path)


def _panel(axes: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
  """One agent on one data set over one model, by planner."""
  for planner, stroke in (('actor', '-'), ('critic', ':')):
    if planner in rows:
      mean = rows[planner]['return_mean']
      axes.axhline(mean, color='black', lw=1, ls=stroke, label=planner)
  lines = [(f'lookahead {depth}', depth, '') for depth in DEPTHS]
  lines += [
    ('lookahead 1, no critic', 1, '+no_critic'),
    ('lookahead 1, candidates from the box', 1, '+box'),
    ('lookahead 1, candidates refined', 1, '+refined=4'),
  ]
  for number, (label, depth, end) in enumerate(lines):
    points = []
    for place, steps in enumerate(STEPS):
      rollout = f'+rollout={steps}' if steps else ''
      row = rows.get(f'lookahead={depth}{rollout}{end}')
      if row is not None:
        mean, low, high = (row[f'return_{n}'] for n in ('mean', 'low', 'high'))
        below, above = (0, 0) if low == '' else (mean - low, high - mean)
        points.append((place + 0.08 * (number - 2), mean, below, above))
    if points:
      x, mean, *bars = np.array(points).T
      axes.errorbar(x, mean, bars, marker='o', ms=3, lw=1, label=label)
  axes.set_xticks(range(len(STEPS)), map(str, STEPS))


def define_flags() -> None:
  """The flags of `python -m experiments.study control`."""
  from absl import flags

  flags.DEFINE_string('data', 'data/pendulum', 'the folder of its data sets')
  flags.DEFINE_string('folder', 'runs/control', 'the folder for the runs')
  runner.define_results()
  flags.DEFINE_list(
    'qualities', ['random', 'medium'], 'the data sets to learn from'
  )
  flags.DEFINE_list('agents', ['iql', 'atac', 'td3_bc'], 'the agents to train')
  flags.DEFINE_integer('seeds', 5, 'seeds of each agent', 1, 10_000)
  flags.DEFINE_integer(
    'candidates', 8, 'candidates of the first stage', 1, 10_000
  )
  flags.DEFINE_integer(
    'later_candidates', 4, 'candidates of each later stage', 1, 10_000
  )
  flags.DEFINE_enum(
    'value', 'min', ['min', 'mean'], 'how the critics are combined'
  )
  flags.DEFINE_integer(
    'episodes', 64, 'episodes for each planner', 1, 1_000_000
  )


def main() -> None:
  """Runs the study as the flags say."""
  from absl import flags

  values = flags.FLAGS
  with configs.user_errors():
    check(values)
    use_compilation_cache()
    launch(values)
