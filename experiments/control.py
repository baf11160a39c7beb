"""Plays an agent that was trained off-line with a planner on top of it.

python -m experiments.control --workdir=runs/iql_small_Pendulum-v1-random_s0 \
  --planners='actor;lookahead=1;lookahead=1+rollout=8'
python -m experiments.control --workdir=runs/... --dynamics=runs/dynamics_...
python -m experiments.control --study --data=data/pendulum

The agent's actor proposes what may be done and is who rolls out, its critic is
the cost at the end (`experiments.plan_models`), and each decision is made anew
from what the real simulator shows: model predictive control. The model between
them is the exact simulator, or the ensemble that a run of `dynamics` or COMBO
learned from a data set. Planners are named

  actor                 the policy's mode; no planning
  critic                l = 0: the candidate of the highest Q
  lookahead=2           two stages over candidates, then the critic
  ...+rollout=8         leaves are worth 8 steps of the actor and the critic
                        behind them
  ...+no_critic         nothing behind them
  ...+box               candidates from the box of all actions, but for the
                        actor's mode; else the actor draws them
  ...+refined=4         first-stage candidates climb the gradient of Q, 4 steps

Later stages have fewer candidates, `--later_candidates`.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import control_runs, plan_models, terminal
from experiments.files.errors import UserError
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks

# Each stage multiplies the sequences of actions.
_DEEPEST = 10
_FIRST = re.compile(r'actor|critic|lookahead=([1-9]\d*)')


@dataclasses.dataclass(frozen=True)
class Strategy:
  """How a planner decides.

  Attributes:
    depth: l; 0 for the critic alone, -1 for the actor alone.
    steps: m of the rollouts from the leaves.
    critic: whether the critic's value is added at the end.
    proposal: where candidates come from, `actor` or `box`.
    refined: steps of gradient ascent of first-stage candidates.
  """

  depth: int
  steps: int = 0
  critic: bool = True
  proposal: str = 'actor'
  refined: int = 0


def parse(name: str) -> Strategy:
  """The strategy that a planner's name stands for.

  Raises:
    UserError: it stands for none.
  """
  numbers = re.findall(r'\d+', name)
  if not name.isascii() or any(len(n) > 6 for n in numbers):
    raise UserError(f'planner={name!r}: numbers must be below 1000000')
  first, *rest = name.split('+')
  found = _FIRST.fullmatch(first)
  if found is None:
    raise _unknown(name)
  depth = {'actor': -1, 'critic': 0}.get(first) or int(found[1] or 0)
  if depth > _DEEPEST:
    raise UserError(f'planner={name!r}: lookahead must be at most {_DEEPEST}')
  fields: dict[str, Any] = {}
  for word in rest:
    option, _, number = word.partition('=')
    if word == 'no_critic':
      new = {'critic': False}
    elif word == 'box':
      new = {'proposal': 'box'}
    elif option in ('rollout', 'refined') and number.isdecimal():
      new = {'steps' if option == 'rollout' else option: int(number)}
    else:
      raise _unknown(name)
    if new.keys() & fields.keys():
      raise _unknown(name)
    fields |= new
  if fields and (depth < 0 or (not depth and fields != {'proposal': 'box'})):
    raise UserError(f'planner={name}: options need lookahead=L')
  return Strategy(depth, **fields)


def _unknown(name: str) -> UserError:
  return UserError(
    f'planner={name!r}: must be actor, critic[+box] or lookahead=L, the last '
    'also with +rollout=M, +no_critic, +box, +refined=N'
  )


class Budget(NamedTuple):
  """How many actions are looked at.

  Attributes:
    candidates: K of the first stage.
    later: of each later one.
  """

  candidates: int = 8
  later: int = 4


def make_player(
  strategy: Strategy,
  trained: control_runs.Trained,
  dynamics: Any,
  *,
  budget: Budget,
  value: str = 'min',
) -> Callable[..., Any]:
  """A planner over an agent's model, as who plays.

  Args:
    strategy: from `parse`.
    trained: from `control_runs.load`; its parameters are not looked at.
    dynamics: a `plan_models.Dynamics`.
    budget: numbers of candidates.
    value: of several critics, see `plan_models.critic_value`.

  Returns:
    `(plan_models.Params, key, timestep) -> action [B, D]`, to be compiled.

  Raises:
    ValueError: an argument is out of range.
  """
  import numpy as np

  from search import candidates, lookahead, rollout

  agent = trained.agent
  low, high = trained.spec.action.low, trained.spec.action.high
  q = plan_models.critic_value(trained.networks, value)

  def make_model(num):
    model = plan_models.planning_model(
      agent,
      q,
      dynamics,
      trained.spec,
      gamma=trained.experiment.config.gamma,
      reward_factor=trained.reward_factor,
      num=num,
      proposal=strategy.proposal,
    )
    if not strategy.steps and strategy.critic:
      return model
    return rollout.truncated(
      model,
      plan_models.base_policy(agent),
      steps=strategy.steps,
      terminal=strategy.critic,
    )

  model = make_model(budget.candidates)
  if strategy.depth < 0:
    planner = plan_models.actor_planner(agent)
  elif not strategy.depth:
    planner = plan_models.critic_planner(q)
  else:
    if strategy.refined:
      # With a slope of 1 the first step goes across half of the box.
      rate = float(np.mean(high - low)) / 2
      model = candidates.refined(model, strategy.refined, rate, low, high)
    later = make_model(budget.later)
    planner = lookahead.lookahead(strategy.depth, later=later)

  def play(params, key, timestep):
    return planner(model, params, key, timestep).action

  return play


def model_steps(strategy: Strategy, budget: Budget) -> int:
  """Steps of the dynamics that one decision takes."""
  if strategy.depth < 1:
    return 0
  total, nodes = 0, 1
  for stage in range(strategy.depth):
    nodes *= budget.later if stage else budget.candidates
    total += nodes
  climbs = budget.candidates * (strategy.refined + 1) if strategy.refined else 0
  return total + nodes * strategy.steps + climbs * (1 + strategy.steps)


def play_episodes(
  env: Any, play: Callable[..., Any], params: Any, episodes: int, seed: int
) -> Any:
  """Returns of whole episodes in a simulator, float64 `[episodes]`.

  The same seed has the same starts, whoever plays; planners share their keys.

  Args:
    env: an `Environment`, or of the host.
    play: compiled, from `make_player`.
    params: `plan_models.Params`.
    episodes: on the host rounded up to a multiple of its copies.
    seed: of the starts and of the planner.
  """
  import jax

  from experiments.runtime import evaluate
  from search.model import Environment

  key = jax.random.fold_in(jax.random.key(seed), 7)
  if isinstance(env, Environment):
    played = evaluate.on_device(
      env, play, params, key=key, num_episodes=episodes
    )
  else:
    played = evaluate.on_host(
      env, play, params, key=key, num_episodes=episodes, seed=seed + 1_000_003
    )
  return played.returns


class Row(NamedTuple):
  """One line of control.csv.

  Attributes:
    planner: its name.
    dynamics: `exact` or `learned`.
    candidates: K of the first stage.
    episodes: whole episodes played.
    return_mean: undiscounted.
    return_se: standard error over episodes.
    gain: of the return over the actor's own, the same starts.
    gain_se: standard error of the paired differences.
    model_steps: a decision.
  """

  planner: str
  dynamics: str
  candidates: int
  episodes: int
  return_mean: float
  return_se: float
  gain: float
  gain_se: float
  model_steps: int


def summarise(
  name: str, dynamics: str, budget: Budget, returns: Any, actor: Any
) -> Row:
  """The row of a planner's returns `[episodes]` beside the actor's."""
  import numpy as np

  def error(x):
    return float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else 0.0

  gain = returns - actor
  return Row(
    planner=name,
    dynamics=dynamics,
    candidates=budget.candidates,
    episodes=len(returns),
    return_mean=float(np.mean(returns)),
    return_se=error(returns),
    gain=float(np.mean(gain)),
    gain_se=error(gain),
    model_steps=model_steps(parse(name), budget),
  )


def write_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes control.csv, atomically."""
  from experiments.sweep_results import write_csv

  write_csv(path, [row._asdict() for row in rows])


def print_rows(rows: Sequence[Row]) -> None:
  """A table for people."""
  terminal.print_table(
    ('planner', 'dynamics', 'return', 'gain', 'model steps'),
    [
      (
        row.planner,
        row.dynamics,
        f'{row.return_mean:.1f} ± {row.return_se:.1f}',
        f'{row.gain:+.1f} ± {row.gain_se:.1f}',
        str(row.model_steps),
      )
      for row in rows
    ],
  )


def launch(values: Any) -> list[Row]:
  """Plays as the flags say.

  Raises:
    UserError: a run, a planner or a dynamics is wrong.
  """
  import jax

  from experiments import build, play

  names = [name.strip() for name in values.planners.split(';') if name.strip()]
  if not names:
    raise UserError(f'planners={values.planners}: names none; actor is one')
  strategies = {name: parse(name) for name in names}
  budget = Budget(values.candidates, values.later_candidates)
  trained = control_runs.load(values.workdir, values.checkpoint, values.env)
  dynamics, own = control_runs.find_dynamics(
    values.dynamics, trained, values.env
  )
  env = build.make_env(trained.experiment, training=False, num_envs=32)
  params = plan_models.Params(trained.params, own)
  kind = 'exact' if values.dynamics == 'exact' else 'learned'
  rows, returns = [], {}
  terminal.begin(
    f'{trained.experiment.agent_name} of {values.workdir} on '
    f'{trained.experiment.env_name}, {kind} dynamics: actor, '
    f'{", ".join(names)}; {values.episodes} episodes each',
    terminal.parameters(trained.params),
  )

  def played(strategy):
    player = make_player(
      strategy, trained, dynamics, budget=budget, value=values.value
    )
    compiled = jax.jit(player)
    return play_episodes(env, compiled, params, values.episodes, values.seed)

  returns = {'actor': played(parse('actor'))}
  for name, strategy in strategies.items():
    if name not in returns:
      returns[name] = played(strategy)
    row = summarise(name, kind, budget, returns[name], returns['actor'])
    rows.append(row)
    terminal.say(f'{name}: {row.return_mean:.1f} ± {row.return_se:.1f}')
  print_rows(rows)
  out = pathlib.Path(values.out or f'{values.workdir}/control.csv')
  write_rows(out, rows)
  again = play.command(values.workdir, trained.experiment, 'control')
  terminal.end(
    str(out), f"{again} --planners='lookahead=2;lookahead=1+rollout=16'"
  )
  return rows


_OF_STUDY = ('data', 'folder', 'results', 'qualities', 'agents', 'seeds')
_OF_PLAY = ('workdir', 'checkpoint', 'dynamics', 'planners', 'seed', 'out')


def main() -> None:
  """Plays, or runs the study, as the flags say.

  Raises:
    UserError: neither a folder nor a study.
  """
  from absl import flags

  from experiments import control_study
  from experiments.train import use_compilation_cache

  values = flags.FLAGS
  with configs.user_errors():
    flag_checks.refuse(
      _OF_PLAY if values.study else _OF_STUDY,
      f'with{"" if values.study else "out"} --study',
    )
    if values.study:
      control_study.check(values)
    elif not values.workdir:
      raise UserError('workdir: the folder of a run is needed, or --study')
    elif values.out:
      configs.check_place('out', values.out)
    use_compilation_cache()
    if values.study:
      control_study.launch(values)
    else:
      launch(values)


def define_flags() -> None:
  """The flags of `python -m experiments.control`."""
  from absl import flags

  flags.DEFINE_string('workdir', None, 'the folder of a run')
  flags.DEFINE_string(
    'env', None, "the run's environment, where it brings code (train's --env)"
  )
  flags.DEFINE_enum(
    'checkpoint', 'final', ['final', 'best', 'early'], 'which parameters'
  )
  flags.DEFINE_string(
    'dynamics', 'exact', 'exact, or the folder of a dynamics (or combo) run'
  )
  flags.DEFINE_string(
    'planners',
    'actor;critic;lookahead=1;lookahead=1+rollout=8',
    'names with semicolons between them',
  )
  flags.DEFINE_integer('candidates', 8, 'of the first stage', 1, 10_000)
  flags.DEFINE_integer('later_candidates', 4, 'of each later one', 1, 10_000)
  flags.DEFINE_enum('value', 'min', ['min', 'mean'], 'of the critics')
  flags.DEFINE_integer(
    'episodes', 64, 'episodes for each planner', 1, 1_000_000
  )
  flags.DEFINE_integer(
    'seed', 0, 'of the starts and of the planner', 0, configs.MAX_SEED
  )
  flags.DEFINE_string('out', None, 'the CSV; WORKDIR/control.csv if left out')
  flags.DEFINE_boolean('study', False, 'the table of experiments/results')
  flags.DEFINE_string('data', 'data/pendulum', 'of the study: its data sets')
  flags.DEFINE_string('folder', 'runs/control', 'where it keeps its runs')
  flags.DEFINE_string('results', 'experiments/results', 'where its CSVs go')
  flags.DEFINE_list('qualities', ['random', 'medium'], 'of its data sets')
  flags.DEFINE_list('agents', ['iql', 'atac', 'td3_bc'], 'that it trains')
  flags.DEFINE_integer('seeds', 5, 'of each agent', 1, 10_000)


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
