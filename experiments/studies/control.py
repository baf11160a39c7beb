"""What planning adds to agents that were trained off-line, as table and figure.

python -m experiments.study control --data=data/pendulum

For each quality of data and each seed it trains, by `experiments.train` in
folders of its own, the agents and an ensemble of dynamics, all on the same
rows. Then every planner plays the same
episodes in the simulator, over the exact and over the learned model. What has
been trained or played is not done again.
"""

import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.build import evaluation
from experiments.files import tables, writing
from experiments.files.errors import UserError, shown
from experiments.playing import (
  actor_critic_model,
  actor_critic_play,
  actor_critic_runs,
  planners,
)
from experiments.report import terminal
from experiments.runtime import children, signals
from experiments.runtime import config as configs

# Needed by no model.
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


class Cell(NamedTuple):
  """One agent of one seed on one data set.

  Attributes:
    quality: of the data.
    agent: its name.
    seed: of its training.
  """

  quality: str
  agent: str
  seed: int


def train(
  name: str, quality: str, seed: int, data: pathlib.Path, folder: pathlib.Path
) -> pathlib.Path:
  """Trains one run, unless it has been, and says where it lies.

  Args:
    name: of the agent; `dynamics` for an ensemble alone.
    quality: of the data set.
    seed: of the run.
    data: where the data sets are.
    folder: of all runs.

  Raises:
    UserError: it did not finish.
    KeyboardInterrupt: a signal has stopped it; it has saved.
  """
  workdir = folder / f'{name}_{quality}_s{seed}'
  mark = workdir.with_suffix('.done')
  if mark.exists():
    return workdir
  folder.mkdir(parents=True, exist_ok=True)
  command = [
    *(sys.executable, '-m', 'experiments.train', f'--preset={name}_small'),
    *_RUN,
    f'--dataset={data / quality}',
    f'--seed={seed}',
    f'--workdir={workdir}',
  ]
  log = workdir.with_suffix('.log')
  with writing.open_append(log) as output, signals.graceful_exit() as stopping:
    code, _ = children.run(
      command, stopping, stdout=output, stderr=subprocess.STDOUT
    )
    if stopping():
      raise KeyboardInterrupt
  if code:
    what = signals.explain(code)
    raise UserError(f'{shown(workdir)}: training failed: {what}, see {log}')
  writing.write_text(mark, '')
  return workdir


class _Players:
  """Plays cells; whoever can share a compiled program does."""

  def __init__(self, values: Any):
    self._values = values
    self._data = pathlib.Path(values.data)
    self._folder = pathlib.Path(values.folder)
    self._budget = actor_critic_play.Budget(
      values.candidates, values.later_candidates
    )
    self._runs, self._programs, self._actors = {}, {}, {}
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
      # Other seeds and data differ in parameters alone.
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

  def played(self, cell: Cell, kind: str, planner: str) -> Any:
    """What has been played, from `evaluation.run`."""
    run = self._run(cell.agent, cell.quality, cell.seed)
    env = self._simulator(run)
    dynamics, own = self._exact, None
    if kind == 'learned':
      found = self._run('dynamics', cell.quality, cell.seed)
      dynamics, own = found.dynamics, found.params
    play = self._program(cell.agent, kind, planner, dynamics)
    params = actor_critic_model.Params(run.params, own)
    # Every seed of training has other episodes, the same for all who play.
    return evaluation.run(env, play, params, self._values.episodes, cell.seed)

  def _simulator(self, run: Any) -> Any:
    if self._env is None:
      self._env = actor_critic_runs.simulator(run.experiment)
      self._exact = actor_critic_model.exact(self._env)
    return self._env

  def row(self, cell: Cell, kind: str, planner: str) -> dict[str, Any]:
    """A line of the table."""
    from experiments.build import dataset

    if cell not in self._actors:
      self._actors[cell] = self.played(cell, 'none', 'actor')
    actor = self._actors[cell]
    found = actor if planner == 'actor' else self.played(cell, kind, planner)
    strategy = planners.parse(planner)
    row = actor_critic_play.compare(
      evaluation.summarise('final', planner, None, found),
      strategy,
      kind,
      self._budget,
      found.returns,
      actor.returns,
    )
    about = dataset.opened(str(self._data / cell.quality)).about
    score = dataset.score(about, row.return_mean)
    return {
      **cell._asdict(),
      **{name: getattr(row, name) for name in _KEPT},
      'depth': strategy.depth,
      'rollout': strategy.steps or 0,
      'score': '' if score is None else float(score),
    }


# Of a row, in the order of the CSV.
_KEPT = (
  'planner',
  'dynamics',
  'candidates',
  'episodes',
  'return_mean',
  'return_se',
  'gain',
  'gain_se',
  'model_steps',
)
_KEY = ('quality', 'agent', 'seed', 'dynamics', 'planner')


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
  return tuple(str(row[name]) for name in _KEY)


def work(values: Any) -> Iterator[tuple[Cell, str, str]]:
  """What is to be played: cell, dynamics and planner, the cheap ones first."""
  for seed in range(values.seeds):
    for quality in values.qualities:
      for agent in values.agents:
        for planner in BARE:
          yield Cell(quality, agent, seed), 'none', planner
  for planner in PLANNERS:
    for agent in values.agents:
      for kind in ('exact', 'learned'):
        for seed in range(values.seeds):
          for quality in values.qualities:
            yield Cell(quality, agent, seed), kind, planner


def check(values: Any) -> None:
  """Refuses flags under which nothing could be trained.

  Raises:
    UserError: a data set is not there, or an agent has no critic.
  """
  for field in ('folder', 'results'):
    configs.check_place(field, getattr(values, field), folder=True)
  data = pathlib.Path(values.data)
  for quality in values.qualities:
    if not (data / quality).is_dir():
      raise UserError(
        f'data={data}: has no {quality}; make it with python -m '
        f'experiments.collect --out={data}'
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
  rows = read(path)
  done = {_key(row) for row in rows}
  players = _Players(values)
  tasks = list(work(values))
  terminal.begin(f'{len(tasks)} planners of trained runs on {data}')
  for number, (cell, kind, planner) in enumerate(tasks, start=1):
    task = cell._asdict() | {'dynamics': kind, 'planner': planner}
    if _key(task) in done:
      continue
    row = players.row(cell, kind, planner)
    rows.append(row)
    tables.write_rows(path, rows)
    where = f'{cell.quality} {cell.agent} s{cell.seed} {kind}'
    terminal.say(
      f'{number} of {len(tasks)}: {where} {planner}: '
      f'{row["return_mean"]:.1f} ± {row["return_se"]:.1f}'
    )
  # All as text, those of earlier runs and of this one.
  summary = summarised(read(path))
  tables.write_rows(path.with_name(f'{path.stem}_summary.csv'), summary)
  draw(summary, path.with_suffix('.png'))
  terminal.end(f'{path}, {path.stem}_summary.csv and {path.stem}.png')


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of a CSV that `launch` wrote; none where there is no file."""
  return tables.read_rows(path)


def summarised(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Means over training seeds with Student's 95% intervals.

  Of returns, and of what they gain over the actor's own; a row for each
  quality, agent, dynamics and planner. One seed alone has no interval.
  """
  import numpy as np

  from experiments.report import statistics

  groups: dict[tuple, list] = {}
  names = ('quality', 'agent', 'dynamics', 'planner', 'model_steps')
  for row in rows:
    groups.setdefault(tuple(row[n] for n in names), []).append(row)
  found = []
  for key, own in groups.items():
    summary = dict(zip(names, key)) | {'seeds': len(own)}
    for name, column in (('return', 'return_mean'), ('gain', 'gain')):
      values = [float(row[column]) for row in own]
      low, high = ('', '')
      if len(own) > 1:
        low, high = map(float, statistics.mean_interval(values))
      mean = float(np.mean(values))
      ends = {f'{name}_mean': mean, f'{name}_low': low, f'{name}_high': high}
      summary |= ends
    found.append(summary)
  return found


def draw(summary: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Return against the length of rollouts, a row of panels an agent.

  Columns are quality and dynamics; points are means over training seeds with
  their intervals.

  Args:
    summary: from `summarised`.
    path: of the figure.
  """
  from experiments.report import style

  agents = list(dict.fromkeys(row['agent'] for row in summary))
  columns = [
    (quality, kind)
    for quality in dict.fromkeys(row['quality'] for row in summary)
    for kind in ('exact', 'learned')
  ]
  if not summary:
    return
  figure = style.figure(2.9 * len(columns), 2.5 * len(agents))
  panels = figure.subplots(
    len(agents), len(columns), squeeze=False, sharey='row'
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
  import numpy as np

  for planner, style in (('actor', '-'), ('critic', ':')):
    if planner in rows:
      mean = rows[planner]['return_mean']
      axes.axhline(mean, color='black', lw=1, ls=style, label=planner)
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
  flags.DEFINE_string('folder', 'runs/control', 'where the runs are kept')
  flags.DEFINE_string('results', 'experiments/results', 'where the CSVs go')
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

  from experiments.runtime.devices import use_compilation_cache

  values = flags.FLAGS
  with configs.user_errors():
    check(values)
    use_compilation_cache()
    launch(values)
