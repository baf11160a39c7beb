"""Plays a finished run's agent with any planner and budget, and writes CSV.

python -m experiments.play --workdir=runs/NAME --simulations=0,4,16,64
python -m experiments.play --workdir=runs/NAME --prompt='The '
python -m experiments.play --workdir=runs/NAME --opponents=random,network \
  --players=network,lookahead=2,gumbel=32,lookahead=1+rollout=8
python -m experiments.play --workdir=runs/NAME --human --players=gumbel=64
python -m experiments.play --workdir=runs/NAME --record=agent.gif

What players can be called is told in `experiments.players`.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import build, capacity, terminal
from experiments.files import reading, writing
from experiments.files.errors import Missing, shown
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks
from experiments.runtime import metrics


class Row(NamedTuple):
  """One line of evaluation.csv.

  Attributes:
    checkpoint: `final`, `best` or `early`.
    planner: the search's rule, or `network` without one.
    simulations: a decision; 0 is the network alone.
    episodes: whole episodes played.
    return_mean: undiscounted, unclipped.
    return_se: standard error over episodes.
    length_mean: decisions.
    seconds_per_decision: wall time over the counted decisions of all copies,
      compilation excluded; what is played beyond the counted episodes is in.
  """

  checkpoint: str
  planner: str
  simulations: int
  episodes: int
  return_mean: float
  return_se: float
  length_mean: float
  seconds_per_decision: float


def write_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes evaluation.csv, atomically."""
  metrics.write_lines(path, [Row._fields, *rows])


def print_rows(rows: Sequence[Row]) -> None:
  """A table for people."""
  terminal.print_table(
    ('checkpoint', 'planner', 'simulations', 'return', 'episodes', 'ms'),
    [
      (
        row.checkpoint,
        row.planner,
        str(row.simulations),
        f'{row.return_mean:.3f} ± {row.return_se:.3f}',
        str(row.episodes),
        f'{1e3 * row.seconds_per_decision:.2f}',
      )
      for row in rows
    ],
    'return of an episode; ms: wall milliseconds a decision',
  )


def evaluate(
  experiment: build.Experiment,
  env: Any,
  agent: Any,
  checkpoints: Mapping[str, Any],
  *,
  simulations: Sequence[int],
  episodes: int,
  rule: str | None = None,
  seed: int = 0,
) -> list[Row]:
  """Plays every checkpoint with every budget.

  The simulators are seeded alike for all of them, so that differences are
  not of luck.

  Args:
    experiment: what was run.
    env: from `build.make_env(training=False)`.
    agent: from `build.make_agent`.
    checkpoints: name to the agent's `params`.
    simulations: budgets; 0 is the network alone.
    episodes: for each row.
    rule: another search rule than the agent's.
    seed: of simulators and planner.

  Returns:
    Rows in that order.

  Raises:
    UserError: the agent does not search as is asked.
  """
  import jax

  from experiments.runtime import evaluate as playing
  from experiments.runtime import metrics
  from search.model import Environment

  rows = []
  total = len(simulations) * len(checkpoints)
  bar = metrics.progress(total, columns=('return',))
  for label, budget, play in _planners(experiment, agent, simulations, rule):
    for name, params in checkpoints.items():
      key = jax.random.fold_in(jax.random.key(seed), 7)
      run = lambda play, count, params=params, key=key: (
        playing.on_device(env, play, params, key=key, num_episodes=count)
        if isinstance(env, Environment)
        else playing.on_host(
          env, play, params, key=key, num_episodes=count, seed=seed + 1_000_003
        )
      )
      # First a call that is not timed, so that timings hold no compilation.
      if isinstance(env, Environment):
        run(play, episodes)
      else:
        _decide_once(env, play, params, key)
      start = time.perf_counter()
      played = run(play, episodes)
      seconds = time.perf_counter() - start
      summary = played.summary()
      rows.append(
        Row(
          checkpoint=name,
          planner=label,
          simulations=budget,
          episodes=len(played.returns),
          return_mean=summary['eval_return'],
          return_se=summary['eval_return_se'],
          length_mean=summary['eval_length'],
          seconds_per_decision=seconds / max(float(played.lengths.sum()), 1.0),
        )
      )
      bar.write(len(rows), {'return': rows[-1].return_mean})
  bar.close()
  rows.sort(key=lambda row: list(checkpoints).index(row.checkpoint))
  return rows


def _planners(experiment, agent, simulations, rule):
  """Name, budget and compiled function of everyone who plays."""
  found = []
  for budget in simulations:
    decide = make_decider(experiment, agent, budget, rule)
    label = 'policy' if agent.exploit is not None else 'network'
    if budget:
      label = rule or experiment.config.search.rule
    play = lambda *args, decide=decide: decide(*args)[0]
    found.append((label, budget, play))
  return found


def make_decider(
  experiment: build.Experiment, agent: Any, budget: int, rule: str | None = None
) -> Callable[..., tuple[Any, Any]]:
  """How an agent plays to win, compiled.

  Args:
    experiment: what was run.
    agent: from `build.make_agent`.
    budget: simulations a decision; 0 is the network alone.
    rule: another search rule than the agent's.

  Returns:
    `(params, key, timestep) -> (action [B, ...], value [B])`; the value is the
    planner's, None of an agent that only has a policy.

  Raises:
    UserError: a search is asked of an agent that has none.
    ValueError: one that does not suit the agent.
  """
  import jax

  from agents.core import planning

  if agent.exploit is not None:
    if rule is not None or budget:
      raise configs.UserError(
        f'simulations={budget}: {experiment.agent_name} has no tree search; '
        'take 0'
      )
    exploit = agent.exploit
    return jax.jit(lambda *args: (exploit(*args)[0], None))
  chosen = dataclasses.replace(experiment.config.search, num_simulations=budget)
  if rule is not None:
    chosen = dataclasses.replace(chosen, rule=rule)
  # It is the agent that knows which searches suit it.
  dataclasses.replace(experiment.config, search=chosen)
  planner = planning.make_planner(chosen, evaluate=True)

  def decide(params, key, timestep):
    output = planner(agent.model, params, key, timestep)
    return output.action, output.value

  return jax.jit(decide)


def read_budgets(
  texts: Sequence[str] | None, usual: Sequence[int]
) -> list[int]:
  """The numbers of `--simulations`.

  Args:
    texts: the flag's; None or none for `usual`.
    usual: what is taken then.

  Raises:
    UserError: one is no whole number, or below 0.
  """
  for text in texts or ():
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
      raise configs.UserError(
        f'simulations={text}: must be whole numbers, 0 or more and below '
        '1000000000, with commas between, such as 0,16,64'
      )
  return [int(text) for text in texts or ()] or list(usual)


def _decide_once(env, play, params, key):
  simulator = env.start(0)
  play(params, key, simulator.reset()).block_until_ready()
  simulator.close()


# What config.json holds of an experiment.
_KINDS = {
  **dict.fromkeys(('name', 'agent_name', 'env_name'), str),
  **dict.fromkeys(('steps', 'seed'), int),
  **dict.fromkeys(('agent', 'env', 'run'), dict),
}


def load_experiment(workdir: str, env: str | None = None) -> build.Experiment:
  """The experiment that a run's config.json describes.

  Args:
    workdir: the run's folder.
    env: the environment that the user has named, which must be the run's; it
      is needed where that brings code, see `envs.names`.

  Raises:
    UserError: no such run, one that this version cannot read, or one whose
      environment brings code that the user has not asked for.
  """
  from experiments.envs import names

  saved = configs.read_run_config(workdir)
  file = f'{workdir}/config.json'
  try:
    for name, kind in _KINDS.items():
      if not isinstance(saved[name], kind):
        raise configs.UserError(
          f'{file}: {name} is {shown(repr(saved[name]), 60)}, must be of type '
          f'{kind.__name__}'
        )
    settings = [
      f'{section}.{name}={text}'
      for section in ('agent', 'env', 'run')
      for name, text in _assignments(saved[section])
    ]
    if saved.get('dataset') and 'recorded' not in saved['env']:
      settings.append('env.recorded=none')
    experiment = build.describe(
      saved['name'],
      agent=saved['agent_name'],
      # A run that was played in none may be played in the user's.
      env=saved['env_name'] or env,
      steps=saved['steps'],
      seed=saved['seed'],
      settings=settings,
      # Whoever plays needs its rows no more.
      dataset=saved.get('dataset') or None,
    )
  except KeyError as error:
    raise configs.UserError(
      f'{file} lacks {shown(error)}: was it written by another version?'
    ) from error
  except ValueError as error:
    # What its settings name need not be told from what flags do.
    message = str(error).removeprefix(f'{file}: ')
    raise configs.UserError(f'{file}: {shown(message, 4000)}') from error
  names.check(experiment.env_name, experiment.env.options, file, env)
  return experiment


def _assignments(config: Mapping[str, Any], prefix: str = ''):
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from _assignments(value, f'{prefix}{name}.')
    elif isinstance(value, list):
      yield prefix + name, ','.join(map(str, value))
    elif value is None or isinstance(value, bool):
      yield prefix + name, str(value).lower()
    else:
      yield prefix + name, str(value)


_STATISTICS = 'statistics.json'


def save_spec(workdir: str | os.PathLike, spec: Any) -> None:
  """Keeps what the environment does not tell: statistics of observations."""
  if spec.statistics is not None:
    named = zip(('mean', 'std'), (x.tolist() for x in spec.statistics))
    path = pathlib.Path(workdir) / _STATISTICS
    writing.write_text(path, json.dumps(dict(named)) + '\n')


def load_spec(workdir: str | os.PathLike, env_spec: Any) -> Any:
  """What a run's agent was told; its data set need not be there any more.

  Args:
    workdir: the run's folder.
    env_spec: of the environment.

  Raises:
    UserError: the statistics that the run keeps are damaged.
  """
  import jax
  import numpy as np

  path = pathlib.Path(workdir) / _STATISTICS
  try:
    saved = reading.read_json(path, dict[str, list[float]])
  except Missing:
    return env_spec
  leaves = jax.tree.leaves(
    env_spec.observation, is_leaf=lambda x: hasattr(x, 'shape')
  )
  size = sum(int(np.prod(leaf.shape, dtype=int)) for leaf in leaves)
  found = []
  for name in ('mean', 'std'):
    numbers = np.asarray(saved.get(name, ()), np.float64)
    if numbers.shape != (size,) or not (np.abs(numbers) < 1e38).all():
      raise configs.UserError(
        f'{shown(path)}: {name} must be {size} finite numbers; copy it back'
      )
    found.append(numbers.astype(np.float32))
  if not (found[1] > 0).all():
    raise configs.UserError(
      f'{shown(path)}: std must be above 0 everywhere; copy it back'
    )
  return env_spec._replace(statistics=tuple(found))


def load_params(workdir: str, agent: Any, names: Sequence[str]) -> dict:
  """Parameters of a run's checkpoints, by `final`, `best`, `early`.

  Where `final` is damaged the newest whole checkpoint has them, too.

  Raises:
    UserError: one that is not there.
    Damaged: one that is not whole.
  """
  import jax

  from experiments.runtime import checkpoint, integrity, loop

  params = jax.eval_shape(agent.init, jax.random.key(0)).params
  folder, run = pathlib.Path(workdir), configs.read_identity(workdir)

  def restore(where: pathlib.Path, inside: str = '') -> Any:
    keeper = checkpoint.open(where, read_only=True, run=run, check_rows=False)
    try:
      # The final parameters are kept on their own: no replay need be read.
      found = keeper.restore(params, inside)
    finally:
      keeper.close()
    if found is None:
      raise integrity.Damaged(f'{shown(where)} is empty')
    bad = loop.not_finite(found[0])
    if bad:
      raise integrity.Damaged(f'{shown(where)}: {bad[0]} is not finite')
    return found[0]

  loaded = {}
  for name in names:
    where = folder / name
    if not where.is_dir():
      raise configs.UserError(
        f'checkpoint={shown(name)}: {shown(workdir)} has none; there are '
        f'{", ".join(available(workdir)) or "none yet"}'
      )
    try:
      loaded[name] = restore(where)
    except integrity.Damaged as error:
      whole = folder / 'checkpoints'
      if name != 'final' or not whole.is_dir():
        raise
      loaded[name] = restore(whole, '.agent.params')
      print(f'note: {error}; the newest checkpoint is taken')
  return loaded


def command(
  workdir: str | os.PathLike, experiment: build.Experiment, name: str = 'play'
) -> str:
  """The shell's command that plays a run, to be shown.

  Args:
    workdir: the run's folder.
    experiment: what was run.
    name: of the launcher.
  """
  from experiments.envs import names

  flag = names.flag(experiment.env_name, experiment.env.options)
  place = shlex.quote(str(workdir))
  return f'python -m experiments.{name} --workdir={place}{flag}'


def available(workdir: str) -> list[str]:
  """Names of the checkpoints that a run holds."""
  folder = pathlib.Path(workdir)
  return [n for n in ('final', 'best', 'early') if (folder / n).is_dir()]


def main() -> None:
  """Evaluates as the flags say.

  Raises:
    UserError: there is nothing to play in.
  """
  from absl import flags

  from experiments import record
  from experiments.train import use_compilation_cache

  values = flags.FLAGS
  with configs.user_errors():
    experiment = load_experiment(values.workdir, values.env)
    for name in ('out', 'record'):
      if getattr(values, name):
        configs.check_place(name, getattr(values, name))
    _refuse_others(experiment, values)
    if values.prompt and not experiment.is_text:
      raise configs.UserError(
        f'prompt={values.prompt}: {experiment.agent_name} is no language '
        f'model; leave it out, or name the run of one instead of '
        f'{values.workdir}'
      )
    use_compilation_cache()
    if experiment.is_text:
      from experiments import text

      name = values.checkpoint[0] if values.checkpoint else 'final'
      text.play(experiment, values.workdir, name, values)
      return
    if not experiment.env_name:
      raise configs.UserError(
        f'workdir={values.workdir}: its data set names no environment, and '
        'none was given: there is nothing to play in'
      )
    if values.record:
      record.launch(experiment, values)
      return
    if values.opponents or values.human or values.players:
      from experiments import arena

      arena.launch(experiment, values)
      return
    if values.num_envs > values.episodes:
      raise configs.UserError(
        f'num_envs={values.num_envs}: is more than there are episodes; take '
        f'at most {values.episodes}'
      )
    names = values.checkpoint or ['final']
    env = build.make_env(
      experiment, training=False, num_envs=values.num_envs or None
    )
    agent = build.make_agent(experiment, load_spec(values.workdir, env.spec))
    usual = [0] if agent.exploit is not None else [0, 16]
    budgets = read_budgets(values.simulations, usual)
    num = getattr(env, 'num_envs', values.episodes)
    most = max(budgets)
    capacity.check(
      capacity.of_search(agent, env.spec, num, most, 'simulations')
    )
    checkpoints = load_params(values.workdir, agent, names)
    terminal.begin(
      f'{experiment.agent_name} on {experiment.env_name}: checkpoint '
      f'{", ".join(names)}, {", ".join(map(str, budgets))} simulations a '
      f'decision, {values.episodes} episodes each',
      terminal.parameters(checkpoints[names[0]]),
    )
    rows = evaluate(
      experiment,
      env,
      agent,
      checkpoints,
      simulations=budgets,
      episodes=values.episodes,
      rule=values.planner,
      seed=values.seed,
    )
  print_rows(rows)
  out = pathlib.Path(values.out or f'{values.workdir}/play.csv')
  write_rows(out, rows)
  again = command(values.workdir, experiment)
  following = f'python -m experiments.plots --workdirs={values.workdir}'
  if env.spec.game is not None:
    following = f'{again} --human'
  elif record.is_drawn(env.spec):
    following = f'{again} --record=agent.gif'
  terminal.end(str(out), following)


# Flags that only some of what can be played looks at.
_OF_TEXT = ('tokens', 'temperature')
_OF_MATCH = ('openings', 'opening_plies')
_OF_GAME = ('players', 'opponents', 'human')
_OF_EPISODES = ('planner', 'simulations', 'episodes', 'num_envs')


def _refuse_others(experiment: build.Experiment, values: Any) -> None:
  """Refuses flags that what is asked for would ignore.

  Raises:
    UserError: names the first of them.
  """
  own = [*_OF_EPISODES, *_OF_GAME, *_OF_MATCH, 'begin', 'record', 'frames']
  if experiment.is_text:
    flag_checks.refuse([*own, 'out'], 'on a language model')
    return
  flag_checks.refuse(_OF_TEXT, 'without a language model')
  one = [name for name in ('checkpoint',) if len(values.checkpoint) > 1]
  if values.record:
    others = ('human', 'begin', 'episodes', 'num_envs', 'out', *_OF_MATCH)
    flag_checks.refuse([*others, *one], 'with --record')
    if values.players and values.opponents:
      flag_checks.refuse(['simulations'], 'with --players and --opponents')
    return
  flag_checks.refuse(['frames'], 'without --record')
  if values.human:
    others = ('opponents', 'out', *_OF_EPISODES, *_OF_MATCH)
    flag_checks.refuse([*others, *one], 'with --human')
    if len(values.players) > 1:
      flag_checks.refuse(
        ['players'], 'beyond the first with --human', 'take one'
      )
    return
  flag_checks.refuse(['begin'], 'without --human')
  if values.players or values.opponents:
    flag_checks.refuse([*_OF_EPISODES, *one], 'with --players and --opponents')
  else:
    flag_checks.refuse(_OF_MATCH, 'without --players or --opponents')


def define_flags() -> None:
  """The flags of `python -m experiments.play`."""
  from absl import flags

  flags.DEFINE_string('workdir', None, 'the folder of a run', required=True)
  flags.DEFINE_string(
    'env', None, "the run's environment, where it brings code (train's --env)"
  )
  flags.DEFINE_list(
    'checkpoint', ['final'], 'which parameters: final, best, early'
  )
  flags.DEFINE_enum(
    'planner',
    None,
    ['efficientzero', 'puct', 'gumbel'],
    "the search's rule; the agent's own if left out",
  )
  flags.DEFINE_list(
    'simulations',
    None,
    'budgets a decision, 0 and 16 if left out; 0 is the network alone',
  )
  flags.DEFINE_integer('episodes', 100, 'episodes for each row', 1, 1_000_000)
  flags.DEFINE_integer(
    'num_envs', 0, "copies at once; 0 for the run's own", 0, 1_000_000
  )
  flags.DEFINE_integer(
    'seed', 0, 'of simulators and planner', 0, configs.MAX_SEED
  )
  flags.DEFINE_list(
    'opponents',
    [],
    'of a game: random (if left out), solver, pubeval, gnubg=PLIES, or what '
    'players are',
  )
  flags.DEFINE_list(
    'players',
    [],
    'who meets them (the first of them, the person); if left out network, '
    'lookahead=1 and gumbel=16 (gumbel=16, the person), or lookahead=1 where '
    'moves are not numbered; '
    'e.g. network, lookahead=2, gumbel=32, puct=32, '
    'lookahead=1+rollout=8, runs/OTHER@early:gumbel=32',
  )
  flags.DEFINE_integer(
    'openings', 64, 'each played from both sides', 1, 1_000_000
  )
  flags.DEFINE_integer(
    'opening_plies', 4, 'random moves before a game', 0, 10_000
  )
  flags.DEFINE_boolean('human', False, 'play the first player in the terminal')
  flags.DEFINE_boolean('begin', True, 'who plays in the terminal begins')
  flags.DEFINE_string(
    'record',
    None,
    'a file to draw an episode into, with the last of --simulations: .gif an '
    'animation, .png a strip; of a game the first player and opponent',
  )
  flags.DEFINE_integer(
    'frames',
    0,
    'time steps of a .gif at most (300), shown in a .png (8)',
    0,
    100_000,
  )
  flags.DEFINE_string('prompt', None, 'what a language model is to continue')
  flags.DEFINE_integer(
    'tokens', 100, 'how many a language model adds', 1, 1_000_000
  )
  flags.DEFINE_float(
    'temperature',
    1.0,
    'that it draws them at; 0 takes the likeliest',
    0.0,
    1_000_000,
  )
  flags.DEFINE_string(
    'out', None, 'the CSV; WORKDIR/play.csv or match.csv if left out'
  )


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
