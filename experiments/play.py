"""Plays a finished run's agent with any planner and budget, and writes CSV.

python -m experiments.play --workdir=runs/NAME --simulations=0,4,16,64
python -m experiments.play --workdir=runs/NAME --prompt='The '
python -m experiments.play --workdir=runs/NAME --opponents=random,network \
  --players=network,lookahead=2,gumbel=32,lookahead=1+rollout=8
python -m experiments.play --workdir=runs/NAME --human --players=gumbel=64
python -m experiments.play --workdir=runs/NAME --record=agent.gif

What players can be called is told in `experiments.playing.players`.
"""

import pathlib
from typing import Any

from experiments import build
from experiments.build import acting, capacity, evaluation, saved
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks


def main() -> None:
  """Evaluates as the flags say.

  Raises:
    UserError: there is nothing to play in.
  """
  from absl import flags

  from experiments.playing import record
  from experiments.report import pictures
  from experiments.runtime.devices import use_compilation_cache

  values = flags.FLAGS
  with configs.user_errors():
    experiment = saved.load_experiment(values.workdir, values.env)
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
      from experiments.playing import continuation

      name = values.checkpoint[0] if values.checkpoint else 'final'
      continuation.continue_text(experiment, values.workdir, name, values)
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
      from experiments.playing import arena

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
    agent = build.make_agent(
      experiment, saved.load_spec(values.workdir, env.spec)
    )
    usual = [0] if agent.exploit is not None else [0, 16]
    budgets = acting.read_budgets(values.simulations, usual)
    num = getattr(env, 'num_envs', values.episodes)
    most = max(budgets)
    capacity.check(
      capacity.of_search(agent, env.spec, num, most, 'simulations')
    )
    checkpoints = saved.load_params(values.workdir, agent, names)
    terminal.begin(
      f'{experiment.agent_name} on {experiment.env_name}: checkpoint '
      f'{", ".join(names)}, {", ".join(map(str, budgets))} simulations a '
      f'decision, {values.episodes} episodes each',
      terminal.parameters(checkpoints[names[0]]),
    )
    rows = evaluation.evaluate(
      experiment,
      env,
      agent,
      checkpoints,
      simulations=budgets,
      episodes=values.episodes,
      rule=values.planner,
      seed=values.seed,
    )
  evaluation.print_rows(rows)
  out = pathlib.Path(values.out or f'{values.workdir}/play.csv')
  evaluation.write_rows(out, rows)
  again = saved.command(values.workdir, experiment)
  following = f'python -m experiments.plots --workdirs={values.workdir}'
  if env.spec.game is not None:
    following = f'{again} --human'
  elif pictures.is_drawn(env.spec):
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
