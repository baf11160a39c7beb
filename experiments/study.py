"""Runs a table of runs, one by one or several at once, and keeps the figures.

  python -m experiments.study --study=catch

Every run is `python -m experiments.train` in a folder of its own; a run that
has finished is not run again, one that was cut goes on. After each run the
study's CSVs are written anew under experiments/results/.
"""

import concurrent.futures
import csv
import functools
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments import terminal
from experiments.files import tables, writing
from experiments.runtime import children, signals
from experiments.runtime import config as configs


class Run(NamedTuple):
  """One run of a study.

  Attributes:
    variant: its name within the study.
    seed: of the run.
    arguments: of `experiments.train`.
  """

  variant: str
  seed: int
  arguments: tuple[str, ...]


class Study(NamedTuple):
  """A table of runs.

  Attributes:
    runs: in the order in which they are run.
    cold: whether each run compiles everything itself, so that its wall time
      is that of a first run.
    curves: columns of metrics.csv that are kept for every run.
    beside: whether each variant is a task, drawn beside what Sampled MuZero
      did on it (`TASK_curves.csv`).
  """

  runs: tuple[Run, ...]
  cold: bool
  curves: tuple[str, ...]
  beside: bool = False


def _catch(seeds: int) -> Study:
  runs = [Run('efficientzero', s, ()) for s in range(seeds)]
  return Study(tuple(runs), True, ('decisions', 'episode_return'))


def _ablation(seeds: int) -> Study:
  """EfficientZero on Catch, one ingredient less each, and MuZero."""
  shared = (
    '--steps=5776',
    '--set=acting=synchronous',
    '--set=evaluate_every=100',
    '--set=evaluate_episodes=64',
    '--set=early_update=0',
    '--set=final_simulations=8',
  )
  variants = {
    'efficientzero': (),
    'minus_consistency': ('--set=consistency=false',),
    'minus_value_prefix': ('--set=value_prefix=false',),
    'minus_off_policy_correction': ('--set=off_policy_correction=false',),
    'minus_reanalyze': ('--set=reanalyze_fraction=0',),
    'muzero': ('--preset=muzero_catch',),
  }
  runs = [
    Run(name, seed, shared + arguments)
    for seed in range(seeds)
    for name, arguments in variants.items()
  ]
  return Study(tuple(runs), False, ('decisions', 'eval_return'))


def _catch_search(seeds: int) -> Study:
  """The same network with and without search, all through training."""
  arguments = (
    '--steps=4688',
    '--set=acting=synchronous',
    '--set=evaluate_every=100',
    '--set=evaluate_episodes=64',
    '--set=early_update=0',
    '--set=final_episodes=0',
  )
  runs = [Run('efficientzero', seed, arguments) for seed in range(seeds)]
  columns = ('decisions', 'eval_return', 'network_return')
  return Study(tuple(runs), False, columns)


def _atari(seeds: int) -> Study:
  """The paper's network and protocol, a few hundred smaller updates."""
  shared = (
    '--preset=efficientzero_atari',
    '--set=env.num_envs=4',
    '--set=warmup_decisions=400',
    '--set=decisions_per_update=4',
    '--set=extra_updates=0',
    '--set=batch_size=32',
    '--set=num_simulations=8',
    '--set=reanalyze_chunk=0',
    '--set=warmup_updates=100',
    '--set=target_period=50',
    '--set=log_every=10',
    '--set=checkpoint_every=100',
    '--set=evaluate_every=0',
    '--set=hold_out=32',
    '--set=env.options=max_episode_steps=3000',
    '--set=final_episodes=0',
  )
  # Decisions in 200 updates, whose 1,200 time steps hold lost lives, too.
  games = {'PongNoFrameskip-v4': 1196, 'BreakoutNoFrameskip-v4': 1163}
  runs = [
    Run(game, seed, (*shared, f'--env={game}', f'--steps={steps}'))
    for seed in range(seeds)
    for game, steps in games.items()
  ]
  losses = ('policy', 'value', 'reward', 'consistency')
  columns = [f'{when}loss_{x}' for when in ('', 'held_') for x in losses]
  return Study(tuple(runs), False, ('decisions', 'episode_return', *columns))


def _heads(preset: str, seeds: int) -> Study:
  """Sampled MuZero with each policy head and few or many sampled actions."""
  shared = (
    f'--preset={preset}',
    '--set=final_episodes=100',
    '--set=final_simulations=32',
  )
  runs = [
    Run(
      f'{head}_k{samples}',
      seed,
      (*shared, f'--set=policy={head}', f'--set=num_samples={samples}'),
    )
    for seed in range(seeds)
    for head in ('gaussian', 'factored')
    for samples in (20, 5)
  ]
  columns = ('decisions', 'eval_return', 'network_return', 'entropy')
  return Study(tuple(runs), False, columns)


def _samples(seeds: int) -> Study:
  """How many of 51 torques need be sampled; all of them at the end."""
  shared = (
    '--preset=sampled_muzero_pendulum',
    '--steps=9792',
    '--set=env.action_bins=51',
    '--set=policy=flat',
    '--set=final_episodes=100',
    '--set=final_simulations=32',
  )
  variants: dict[str, tuple[str, ...]] = {
    f'k{samples}': (f'--set=num_samples={samples}',)
    for samples in (2, 5, 10, 20, 50)
  }
  variants['all'] = ('--set=num_samples=51', '--set=replacement=false')
  runs = [
    Run(name, seed, (*shared, *arguments))
    for seed in range(seeds)
    for name, arguments in variants.items()
  ]
  columns = ('decisions', 'eval_return', 'network_return', 'entropy')
  return Study(tuple(runs), False, columns)


def _sac(seeds: int) -> Study:
  """SAC on the three tasks of Sampled MuZero's study, as many decisions."""
  shared = (
    '--preset=sac_pendulum',
    '--set=evaluate_every=500',
    '--set=evaluate_episodes=20',
  )
  control = (
    '--steps=19852',
    '--set=env.options=action_repeat=8',
    '--set=gamma=0.98',
    '--set=replay_capacity=20000',
    '--set=warmup_decisions=1000',
  )
  tasks = {
    'pendulum': (
      '--env=jax:pendulum',
      '--steps=11764',
      '--set=env.options=action_repeat=4',
      '--set=gamma=0.97',
    ),
    'swingup': ('--env=CartpoleSwingup-v1', *control),
    'ball_in_cup': ('--env=BallInCupCatch-v1', *control),
  }
  runs = [
    Run(task, seed, (*shared, *arguments))
    for seed in range(seeds)
    for task, arguments in tasks.items()
  ]
  return Study(tuple(runs), False, ('decisions', 'eval_return'), beside=True)


_MIXTURE = ('perplexity', 'held_perplexity', 'cv_importance', 'cv_load')


def _experts(seeds: int) -> Study:
  """Perplexity at about equal active operations (Shazeer 2017, Table 7)."""
  shared = ('--preset=moe_language_small', '--text=data/gcide.txt')
  expert = 'network.moe.'
  variants = {
    'dense': ('network.layer=dense',),
    'moe_32': (),
    'deep': ('network.layer=deep',),
    'lstm': ('network.layer=lstm',),
    'moe_4': (f'{expert}num_experts=4',),
    'moe_128': (f'{expert}num_experts=128',),
    # Two of two levels are four experts, each half as wide.
    'moe_256_h': (
      f'{expert}num_experts=256',
      f'{expert}groups=16',
      f'{expert}hidden=128',
    ),
    'moe_32_twice': ('network.num_layers_moe=2',),
  }
  first = ('dense', 'moe_32')
  order = [(n, s) for s in range(seeds) for n in first]
  order += [(n, s) for s in range(seeds) for n in variants if n not in first]
  runs = [
    Run(name, seed, (*shared, *(f'--set={x}' for x in variants[name])))
    for name, seed in order
  ]
  return Study(tuple(runs), False, (*_MIXTURE, 'max_over_mean_load'))


def _connect_four(seeds: int) -> Study:
  """AlphaZero's networks, for `experiments.study_games` to play with."""
  arguments = ('--preset=alphazero_connect_four',)
  runs = [Run('connect_four', seed, arguments) for seed in range(seeds)]
  return Study(tuple(runs), False, ('decisions', 'eval_return'))


def _othello(seeds: int) -> Study:
  """Sampled AlphaZero by K at equal simulations (Hubert 2021, on Go)."""
  shared = ('--preset=alphazero_othello', '--steps=294650')
  runs = [
    Run(f'k{k}', seed, (*shared, f'--set=num_samples={k}'))
    for seed in range(seeds)
    for k in (65, 4, 16, 8, 32)
  ]
  return Study(tuple(runs), False, ('decisions', 'eval_return'))


def _backgammon(seeds: int) -> Study:
  """TD-Gammon's networks, for `experiments.study_backgammon` to play with."""
  runs = [
    Run(
      f'hidden_{units}', seed, ('--preset=td_gammon', f'--set=hidden={units}')
    )
    for units in (40, 80)
    for seed in range(seeds)
  ]
  return Study(tuple(runs), False, ('decisions', 'loss', 'win'))


def _balance(seeds: int) -> Study:
  """Balance losses on and off (Shazeer 2017, Table 6), and experts' fight."""
  shared = (
    '--preset=moe_language_small',
    '--text=data/gcide.txt',
    '--steps=400',
    '--set=log_experts=true',
  )
  expert = 'network.moe.'
  pairs = ((0, 0), (0.2, 0), (0, 0.2), (0.1, 0.1), (0.01, 0.01), (1, 1))
  variants = {
    f'importance_{i}_load_{j}': (
      f'{expert}importance_weight={i}',
      f'{expert}load_weight={j}',
    )
    for i, j in pairs
  }
  variants |= {
    'balanced': (f'{expert}router=balanced',),
    'biased': (f'{expert}router=biased_top_k',),
    'pruned': (
      f'{expert}importance_weight=0',
      f'{expert}load_weight=0',
      f'{expert}prune_below=0.1',
    ),
  }
  runs = [
    Run(name, seed, (*shared, *(f'--set={x}' for x in settings)))
    for seed in range(seeds)
    for name, settings in variants.items()
  ]
  return Study(tuple(runs), False, (*_MIXTURE, 'max_over_mean_load'))


STUDIES = {
  'catch': (_catch, 10),
  'catch_search': (_catch_search, 10),
  'catch_ablation': (_ablation, 5),
  'atari': (_atari, 1),
  'pendulum': (functools.partial(_heads, 'sampled_muzero_pendulum'), 5),
  'swingup': (functools.partial(_heads, 'sampled_muzero_swingup'), 5),
  'ball_in_cup': (functools.partial(_heads, 'sampled_muzero_ball_in_cup'), 5),
  'samples': (_samples, 3),
  'sac': (_sac, 5),
  'connect_four': (_connect_four, 3),
  'othello': (_othello, 2),
  'backgammon': (_backgammon, 3),
  'moe_experts': (_experts, 3),
  'moe_balance': (_balance, 3),
}


def run_one(
  study: Study,
  run: Run,
  folder: pathlib.Path,
  stopping: Callable[[], bool] = lambda: False,
) -> bool:
  """Runs or resumes one run; whether it finished.

  Args:
    study: whose run it is.
    run: which.
    folder: of all runs.
    stopping: polled; True stops it with a checkpoint, or lets none begin.
  """
  workdir = folder / f'{run.variant}_s{run.seed}'
  timing = workdir / 'timing.csv'
  if timing.exists():
    return True
  if stopping():
    return False
  environment = dict(os.environ)
  command = [sys.executable, '-m', 'experiments.train']
  command += [*run.arguments, f'--seed={run.seed}', f'--workdir={workdir}']
  workdir.parent.mkdir(parents=True, exist_ok=True)
  log = workdir.parent / f'{workdir.name}.log'
  with (
    tempfile.TemporaryDirectory() as empty,
    writing.open_append(log) as output,
  ):
    if study.cold:
      environment['JAX_COMPILATION_CACHE_DIR'] = empty
    start = time.perf_counter()
    code, usage = children.run(
      command,
      stopping,
      env=environment,
      stdout=output,
      stderr=subprocess.STDOUT,
    )
  if code:
    if not stopping():
      what = signals.explain(code)
      terminal.say(f'{workdir} failed: {what}, see {log}', file=sys.stderr)
    return False
  seconds = time.perf_counter() - start
  cpu = usage.ru_utime + usage.ru_stime
  writing.write_text(
    timing, f'wall_seconds,cpu_seconds\n{seconds:.1f},{cpu:.1f}\n'
  )
  return True


def _read(path: pathlib.Path) -> list[dict[str, str]]:
  return tables.read_rows(path)


def _write(path: pathlib.Path, rows: Sequence[dict]) -> None:
  if not rows:
    return
  columns = list(dict.fromkeys(name for row in rows for name in row))
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  path.parent.mkdir(parents=True, exist_ok=True)
  writing.write_text(path, text.getvalue())


def collect(
  name: str, study: Study, folder: pathlib.Path, results: pathlib.Path
) -> None:
  """Writes `NAME_{evaluation,curves,timing,held_out}.csv`."""
  evaluations, curves, timings, held = [], [], [], []
  for run in study.runs:
    workdir = folder / f'{run.variant}_s{run.seed}'
    if not (workdir / 'timing.csv').exists():
      continue
    tag = {'variant': run.variant, 'seed': run.seed}
    evaluations += [tag | row for row in _read(workdir / 'evaluation.csv')]
    timings += [tag | row for row in _read(workdir / 'timing.csv')]
    held += [tag | row for row in _read(workdir / 'held_out.csv')]
    for row in _read(workdir / 'metrics.csv'):
      kept = {n: row[n] for n in study.curves if row.get(n)}
      if len(kept) > 1:
        curves.append(tag | {'step': row['step']} | kept)
  _write(results / f'{name}_evaluation.csv', evaluations)
  _write(results / f'{name}_curves.csv', curves)
  _write(results / f'{name}_timing.csv', timings)
  _write(results / f'{name}_held_out.csv', held)


def _lines(curves: pathlib.Path, column: str) -> dict:
  """`{variant: Curve}` of a column of a curves' CSV."""
  import numpy as np

  from experiments import plots

  runs: dict[str, dict[str, list]] = {}
  for row in _read(curves):
    if row.get(column):
      seeds = runs.setdefault(row['variant'], {})
      x = row.get('decisions') or row['step']
      point = float(x), float(row[column])
      seeds.setdefault(row['seed'], []).append(point)
  lines = {
    variant: plots.mean_curve(
      [tuple(np.transpose(points)) for points in seeds.values()]
    )
    for variant, seeds in runs.items()
  }
  return {name: line for name, line in lines.items() if line is not None}


def draw(
  curves: pathlib.Path, out: pathlib.Path, columns: Sequence[str]
) -> None:
  """A panel for each of `columns` of a curves' CSV, a line for each variant."""
  from experiments import plots

  panels = {column: _lines(curves, column) for column in columns}
  acts = any(row.get('decisions') for row in _read(curves))
  plots.curves_figure(panels, out, x='decisions' if acts else 'step')


def draw_beside(curves: pathlib.Path, out: pathlib.Path) -> None:
  """A panel for each task: SAC, and Sampled MuZero with search and without."""
  from experiments import plots

  panels = {}
  for task, line in _lines(curves, 'eval_return').items():
    path = curves.with_name(f'{task}_curves.csv')
    others = {
      f'Sampled MuZero, {words}, {variant}': curve
      for column, words in (
        ('eval_return', 'with search'),
        ('network_return', 'network alone'),
      )
      for variant, curve in _lines(path, column).items()
      if variant == 'gaussian_k20'
    }
    panels[f'return, {task}'] = {'SAC': line, **others}
  plots.curves_figure(panels, out, x='decisions')


def main() -> None:
  """Runs the study that the flags name.

  Raises:
    SystemExit: with 1, where runs failed.
  """
  from absl import flags

  values = flags.FLAGS
  make, seeds = STUDIES[values.study]
  study = make(values.seeds or seeds)
  folder = pathlib.Path(values.folder) / values.study
  results = pathlib.Path(values.results)
  for field in ('folder', 'results'):
    configs.check_place(field, getattr(values, field), folder=True)
  terminal.begin(
    f'{len(study.runs)} runs, {values.at_once} at a time, each by '
    'python -m experiments.train',
    f'folders and logs: {folder}',
    compiles=False,
  )
  failed = 0
  with (
    signals.graceful_exit() as stopping,
    concurrent.futures.ThreadPoolExecutor(values.at_once) as pool,
  ):
    futures = [
      pool.submit(run_one, study, run, folder, stopping) for run in study.runs
    ]
    for done, future in enumerate(
      concurrent.futures.as_completed(futures), start=1
    ):
      failed += not future.result()
      collect(values.study, study, folder, results)
      if not stopping():
        print(f'{done} of {len(study.runs)} runs', flush=True)
    if stopping():
      print(f'{failed} runs are left; the same command goes on from here')
      return
  shown = ('held_perplexity', 'cv_load')
  returns = [n for n in study.curves if n.endswith('_return') or n in shown]
  curves = results / f'{values.study}_curves.csv'
  if curves.exists() and returns:
    out = results / f'{values.study}_curves.png'
    draw_beside(curves, out) if study.beside else draw(curves, out, returns)
    terminal.say(f'figure: {out}')
  terminal.end(
    f'{results}/{values.study}_*.csv',
    f"python -m experiments.plots --workdirs='{folder}/*' --out=curves.png",
  )
  if failed:
    raise SystemExit(1)


def define_flags() -> None:
  """The flags of `python -m experiments.study`."""
  from absl import flags

  flags.DEFINE_enum('study', None, list(STUDIES), 'which', required=True)
  flags.DEFINE_integer('seeds', 0, "how many; 0 for the study's own", 0, 10_000)
  flags.DEFINE_integer('at_once', 1, 'runs at the same time', 1, 1_024)
  flags.DEFINE_string('folder', 'runs/studies', 'where the runs are kept')
  flags.DEFINE_string('results', 'experiments/results', 'where the CSVs go')


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
