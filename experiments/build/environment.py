"""From an environment to a run: its checks, simulators, evaluation and play.

Runs on data sets are evaluated by these functions, too.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from experiments.build import acting, capacity, evaluation
from experiments.build.agent import make_env
from experiments.build.material import (
  About,
  Experiment,
  Kept,
  Material,
  Measure,
  Opened,
  is_fresh,
  window_of,
)
from experiments.build.source import make_source
from experiments.presets.settings import RunConfig
from experiments.report import terminal

# Simulators that an evaluation plays in at once.
AT_ONCE = 32


def complete(experiment: Experiment, env: str | None) -> Experiment:
  """Checks and completes an experiment that acts; `env` is already in it.

  Raises:
    ValueError: its settings do not fit each other.
  """
  del env
  if is_fresh(experiment.config):
    return _complete_fresh(experiment)
  return _check(experiment)


def _check(experiment: Experiment) -> Experiment:
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
  return experiment


def _complete_fresh(experiment: Experiment) -> Experiment:
  """The experiment with the pace of fresh rows."""
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


def prepared(experiment: Experiment, parts: int = 1) -> Opened:
  """The environments that an experiment acts in, for one of `parts`.

  Raises:
    ValueError: there is no such environment.
  """
  from search.model import Environment

  number = experiment.env.num_envs // parts
  env = make_env(experiment, training=True, num_envs=number)

  def source(
    experiment: Experiment,
    phase: Any,
    layout: Any = None,
    stopping: Callable[[], bool] = lambda: False,
  ):
    return make_source(experiment, env, phase.agent, layout, stopping)

  return Opened(env.spec, not isinstance(env, Environment), source)


def kept(experiment: Experiment, agent: Any, spec: Any) -> Kept:
  """The replay, or the environments if there is none."""
  run = experiment.run
  row, drawn = capacity.row_bytes(agent, spec)
  field, value = 'replay_capacity', run.replay_capacity
  if is_fresh(experiment.config):
    field, value = 'num_envs', experiment.env.num_envs
  if run.compress_replay:
    row /= capacity.COMPRESSED
  frame = capacity.frame_bytes(spec) if run.frames_on == 'device' else 0.0
  drawn *= window_of(experiment.config)
  return Kept(field, value, value * (row - frame), drawn, value * frame)


def about(experiment: Experiment, spec: Any) -> About:
  """Shapes of observations and actions; of an image, which axis is which."""
  where = experiment.env_name or 'no environment: nothing is played'
  shape = getattr(spec.observation, 'shape', spec.observation)
  seen = f'observations {shape}'
  if len(shape) == 3:
    height, width, channels = shape
    seen = f'images of {height} x {width} with {channels} channels'
  return About((), f'{where}: {seen}, {spec.action}', ())


def evaluator(
  experiment: Experiment, agent: Any
) -> Callable[[Any, int], dict[str, float]] | None:
  """`(params, step) -> metrics`: whole episodes of each of `players`.

  None without players, or without an environment.
  """
  import jax

  from experiments.runtime import evaluate as playing
  from experiments.runtime import mesh
  from search.model import Environment

  players = {
    n: jax.jit(f) for n, f in acting.players(experiment, agent).items()
  }
  if not (players and experiment.env_name):
    return None
  episodes = experiment.run.evaluate_episodes
  env = make_env(experiment, training=False, num_envs=min(episodes, AT_ONCE))

  def evaluate(params, step):
    params = mesh.local(params)
    key = jax.random.fold_in(jax.random.key(experiment.seed), step)
    shared = {'key': key, 'num_episodes': episodes} | limit(experiment)
    found = {}
    for prefix, act in players.items():
      if isinstance(env, Environment):
        own = jax.local_devices()[: experiment.run.devices or None]
        played = playing.on_device(env, act, params, devices=own, **shared)
      else:
        played = playing.on_host(env, act, params, seed=step, **shared)
      summary = played.summary()
      found |= {
        name.replace('eval', prefix, 1): x for name, x in summary.items()
      }
    return found

  return evaluate


def limit(experiment: Experiment) -> dict[str, int]:
  """The decisions of an episode of an evaluation, unless they are the usual."""
  most = experiment.run.evaluate_decisions
  return {'max_steps': most} if most else {}


def measure(experiment: Experiment, agent: Any) -> Measure | None:
  """The evaluation of rows in one program; None without players."""
  import jax

  from experiments.runtime import evaluate as playing
  from search.model import Environment

  if not (experiment.env_name and acting.players(experiment, agent)):
    return None
  stage = make_env(experiment, training=False, num_envs=1)

  def evaluate(own, agent, params, seed, step):
    assert isinstance(stage, Environment)
    key = jax.random.fold_in(jax.random.key(seed), step)
    return {
      prefix: playing.device_episodes(
        stage.reset,
        stage.step,
        play,
        experiment.run.evaluate_episodes,
        experiment.run.evaluate_decisions or 10_000,
        params,
        key,
      )
      for prefix, play in acting.players(own, agent).items()
    }

  def act(own, agent, params, key, timestep):
    found = acting.players(own, agent)
    return {n: play(params, key, timestep) for n, play in found.items()}

  if isinstance(stage, Environment):
    return Measure(evaluate, None, summarise)
  return Measure(None, act, summarise)


def summarise(played: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
  """Metrics of every row's episodes.

  Args:
    played: returns and lengths `[R, E]` by the player's prefix.
  """
  import numpy as np

  from experiments.runtime.evaluate import Episodes

  found = {}
  for prefix, (returns, lengths) in played.items():
    summaries = [
      Episodes(np.asarray(r, np.float64), np.asarray(n, np.int64)).summary()
      for r, n in zip(returns, lengths, strict=True)
    ]
    for name in summaries[0]:
      column = np.array([summary[name] for summary in summaries])
      found[name.replace('eval', prefix, 1)] = column
  return found


def columns(experiment: Experiment, agent: Any) -> set[str]:
  """Names of the metrics that `evaluator` finds."""
  if not experiment.env_name:
    return set()
  return {
    f'{prefix}_{what}'
    for prefix in acting.players(experiment, agent)
    for what in ('return', 'return_se', 'length')
  }


def finisher(
  experiment: Experiment,
  agent: Any,
  remark: Callable[[float], str | None] = lambda mean: None,
) -> Callable[[pathlib.Path, dict[str, Any]], None] | None:
  """Plays what was learned, without search and with more and more of it.

  It is `(workdir, params by the checkpoint's name) -> None`, which writes a
  table and, for a search, a figure; None if nothing is to be played. `remark`
  makes a line of the last mean return.
  """
  if not (experiment.run.final_episodes and experiment.env_name):
    return None
  return functools.partial(_finish, experiment, agent, remark)


def _finish(experiment, agent, remark, workdir, found) -> None:
  from experiments.report import curves

  settings = experiment.run
  searches = agent.exploit is None
  about = 'without and with search' if searches else ''
  print(f'playing the trained network {about}'.rstrip(), flush=True)
  env = make_env(
    experiment, training=False, num_envs=min(settings.final_episodes, 50)
  )
  rows = evaluation.evaluate(
    experiment,
    env,
    agent,
    found,
    simulations=(0, *settings.final_simulations) if searches else (0,),
    episodes=settings.final_episodes,
    seed=experiment.seed,
  )
  evaluation.print_rows(rows)
  evaluation.write_rows(workdir / 'evaluation.csv', rows)
  files, budgets = 'evaluation.csv', ''
  if searches:
    curves.budget_figure(workdir / 'evaluation.csv', workdir / 'evaluation.png')
    files, budgets = 'evaluation.csv, evaluation.png', ' --simulations=0,32'
  line = remark(rows[-1].return_mean)
  if line is not None:
    terminal.say(line)
  terminal.end(
    f'{workdir}/{files}, metrics.csv',
    evaluation.command(workdir, experiment) + budgets,
    f'python -m experiments.plots --workdirs={workdir} --out=curve.png',
  )


MATERIAL = Material(
  flag='env',
  acts=True,
  plays=True,
  metric='eval_return',
  memory=('batch_size', 'reanalyze_chunk', 'num_envs', 'replay_capacity'),
  sizes=('replay_capacity',),
  complete=complete,
  name=lambda experiment: experiment.env_name,
  fingerprint=lambda experiment: {},
  open=prepared,
  rows=lambda experiment: None,
  kept=kept,
  describe=about,
  evaluate=evaluator,
  measure=measure,
  columns=columns,
  keep=lambda experiment, workdir: None,
  finish=finisher,
)
