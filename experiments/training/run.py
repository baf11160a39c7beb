"""Trains everything: `python -m experiments.train [--preset=NAME] [...]`.

The same command resumes the run in its folder.
"""

import pathlib
import re
import time

from experiments import build
from experiments.build import saved as saved_run
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import devices, run_config
from experiments.training import stages, words
from experiments.training.keeper import peek
from experiments.training.train import NOTHING, Also, train


def default_workdir(experiment: build.Experiment) -> str:
  """`runs/PRESET_ENV_sSEED`; a data set's or text's name in place of ENV."""
  name = experiment.material.name(experiment)
  where = re.sub(r'[^\w.,+=@()-]', '-', name)[:80]
  return f'runs/{experiment.name}_{where}_s{experiment.seed}'


def run(
  experiment: build.Experiment, workdir: pathlib.Path, also: Also = NOTHING
) -> None:
  """Trains in a folder, from its last checkpoint if it has one.

  If several processes run it, all compute and save; the first one writes and
  prints. A signal stops it with a checkpoint; `signals.received` says which.

  Raises:
    UserError: the run in the folder cannot be resumed.
  """
  from experiments.runtime import distributed, signals
  from experiments.training import plan

  started = time.perf_counter()
  with (
    plan.out_of_memory(experiment),
    signals.graceful_exit() as asked,
  ):
    trained = train(experiment, workdir, asked, also)
  players = None
  agent = trained.trainer.stages[-1].agent
  finish = experiment.material.finish(experiment, agent)
  if trained.ended and finish is not None:
    # Reading is done together, too; playing is not.
    names = [n for n in ('early', 'final') if (workdir / n).is_dir()]
    players = saved_run.load_params(str(workdir), agent, names)
  distributed.shutdown()
  if not distributed.is_main():
    return
  if not trained.ended:
    print(
      f'stopped at update {trained.end:,} of {words.planned(experiment)}; the '
      'same command resumes from here'
    )
    return
  seconds = time.perf_counter() - started
  print(f'trained {trained.end - trained.begin:,} updates in {seconds:.0f} s')
  if players is not None and signals.received():
    print('stopped before playing; the same command resumes from here')
    return
  if players is not None and finish is not None:
    finish(workdir, players)


def check(experiment: build.Experiment, workdir: str | None) -> None:
  """Refuses what a run would refuse, except for devices and processes.

  `workdir` is the run's folder, or else `default_workdir`.

  Raises:
    UserError: the run cannot begin, or resume in its folder.
  """
  devices.use_compilation_cache()
  if not experiment.material.acts:
    folder = workdir or default_workdir(experiment)
    stages.make(experiment, peek(pathlib.Path(folder)), lambda: False)
  else:
    env = build.make_env(experiment, training=True)
    build.make_agent(experiment, env.spec)
  folder = pathlib.Path(workdir or default_workdir(experiment))
  configs.check_place('workdir', folder, folder=True)
  about = experiment.as_dict() | experiment.material.fingerprint(experiment)
  run_config.check_run_config(folder, about, terminal.device(), run_config.FREE)
  print('no problem found')
