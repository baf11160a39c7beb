"""Plays games with a finished run's agent: matches, or against a person.

`experiments.play` calls this for the flags `players`, `opponents` and `human`.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from experiments.files import tables
from experiments.files.errors import UserError
from experiments.playing import human, match, planners, players
from experiments.report import terminal


def make_player(
  name: str,
  workdir: str,
  own: Any,
  game: Any,
  host: Any = None,
  usual: str = 'final',
) -> players.Player:
  """Makes a player from its name, with the parameters of its run.

  A name without a run (see `playing.planners`) has that of `workdir`, whose
  experiment is `own`, and the checkpoint `usual`; `host` is from
  `other_players`.

  Raises:
    UserError: an unknown name or run, or a run of another game.
  """
  from experiments import build
  from experiments.build import saved

  outside = host(name) if host is not None else None
  if outside is not None:
    return outside
  run, checkpoint, rest = planners.split(name)
  strategy = planners.parse(rest)
  planners.refuse(name, strategy, own.agent_name, 'game')
  if strategy.planner == 'random':
    return players.make(name, strategy, None, None, game)
  folder = run or workdir
  checkpoint = checkpoint if run else usual
  experiment = own if not run else saved.load_experiment(folder)
  if experiment.env_name != own.env_name:
    raise UserError(
      f'player={name}: {folder} plays {experiment.env_name}; must be a run '
      f'on {own.env_name}'
    )
  env = build.make_env(experiment, training=False, num_envs=1)
  agent = build.make_agent(experiment, env.spec)
  if agent.model is None:
    raise UserError(
      f'player={name}: {experiment.agent_name} has no model to plan in; take '
      'the run of an agent with a model'
    )
  params = saved.load_params(folder, agent, [checkpoint])[checkpoint]
  search = getattr(experiment.config, 'search', None)
  return players.make(
    name, strategy, agent.model, params, game, search, agent.exploit
  )


def other_players(game: Any) -> Callable[[str], players.Player | None]:
  """Finds opponents from outside this suite: `solver`, `pubeval`, `gnubg=N`.

  By `(name) -> Player`, None for any other name.

  Raises:
    UserError: by that function, for an opponent that does not play this game or
      is not installed.
  """

  def find(name):
    planner, _, _ = name.partition('=')
    plays = {'solver': 'ConnectFour', 'pubeval': 'Backgammon'}
    plays['gnubg'] = 'Backgammon'
    if planner not in plays:
      return None
    if game.spec.name.lower() != plays[planner].lower():
      raise UserError(
        f'player={name}: plays {plays[planner]} only; take a player of '
        f'{game.spec.name}'
      )
    if planner == 'solver':
      from experiments.playing import connect_four_solver

      return connect_four_solver.solver()
    from experiments.playing import gnubg

    return gnubg.player(name)

  return find


def matches(
  game: Any,
  ours: Sequence[players.Player],
  others: Sequence[players.Player],
  *,
  openings: int,
  opening_plies: int,
  seed: int = 0,
  report: Callable[[match.Result], None] = lambda result: None,
) -> list[match.Result]:
  """Plays each of `ours` against each of `others`, on the same openings.

  Each opening has `opening_plies` random moves and is played twice; `report` is
  called with each result as soon as it is known.

  Raises:
    ValueError: `openings` or `opening_plies` is out of range for this game.
  """
  starts = match.openings(game, openings, opening_plies, seed)
  results = []
  for player in ours:
    # Players without a network cache positions, so their times say nothing.
    speed = None
    if player.params is not None:
      speed = match.measure(game, player, starts)
    for other in others:
      tick = terminal.ticker(f'{player.name} against {other.name}: move')
      games = match.play(game, player, other, starts, seed=seed, progress=tick)
      results.append(match.summarise(player, other, games, speed))
      report(results[-1])
  return results


def write(path: pathlib.Path, results: Sequence[match.Result]) -> None:
  """Writes match.csv, atomically."""
  tables.write_lines(path, [match.Result._fields, *results], digits=5)


def print_results(results: Sequence[match.Result]) -> None:
  """Prints results as a table."""
  # If every win counts one point, points add nothing to scores.
  counts = any(abs(row.points - 2 * row.score + 1) > 1e-9 for row in results)
  columns = ('player', 'opponent', 'points' if counts else 'score', 'Elo')
  lines = []
  for row in results:
    score = f'{row.score:.3f} ± {row.score_se:.3f}'
    points = f'{row.points:+.3f} ± {row.points_se:.3f}'
    speed = row.ms_per_decision
    lines.append(
      (
        row.player,
        row.opponent,
        points if counts else score,
        f'{row.elo:+.0f} [{row.elo_low:+.0f}, {row.elo_high:+.0f}]',
        '' if row.evaluations is None else str(row.evaluations),
        '' if speed is None else f'{speed:.2f}',
      )
    )
  terminal.print_table((*columns, 'evaluations', 'ms'), lines)


def launch(experiment: Any, values: Any) -> None:
  """Plays as the flags of `experiments.play` say.

  Raises:
    UserError: the run's environment is not a game, or a player is wrong.
  """
  from experiments import build
  from experiments.build import evaluation

  game = build.make_env(experiment, training=False, num_envs=1).spec.game
  if game is None:
    kinds = ('human', 'opponents', 'players')
    asked = next((n for n in kinds if getattr(values, n)), 'opponents')
    raise UserError(
      f'{asked}: {experiment.env_name} is not a game with rules; give a run on '
      'self_play:NAME'
    )
  host = other_players(game)
  usual = values.checkpoint[0] if values.checkpoint else 'final'
  find = lambda name: make_player(
    name, values.workdir, experiment, game, host, usual
  )
  names = list(values.players) or ['network', 'lookahead=1', 'gumbel=16']
  if game.candidates is not None:
    names = list(values.players) or ['lookahead=1']
  if values.human:
    usual_one = 'lookahead=1' if game.candidates is not None else 'gumbel=16'
    player = find(values.players[0] if values.players else usual_one)
    about = () if player.params is None else (player.params,)
    terminal.begin(
      f'{game.spec.name} against {player.name} of {values.workdir}',
      *map(terminal.parameters, about),
    )
    human.against_person(game, player, begins=values.begin, seed=values.seed)
    return
  results: list[match.Result] = []
  out = pathlib.Path(values.out or f'{values.workdir}/match.csv')

  def report(result):
    results.append(result)
    write(out, results)
    terminal.say(
      f'{result.player} against {result.opponent}: '
      f'score {result.score:.3f} ± {result.score_se:.3f}, '
      f'points {result.points:+.3f} ± {result.points_se:.3f}'
    )

  others = list(values.opponents) or ['random']
  ours = [find(name) for name in names]
  terminal.begin(
    f'{game.spec.name}, {2 * values.openings} games per match: '
    f'{", ".join(names)} against {", ".join(others)}',
    *[terminal.parameters(p.params) for p in ours[:1] if p.params is not None],
  )
  matches(
    game,
    ours,
    [find(name) for name in others],
    openings=values.openings,
    opening_plies=values.opening_plies,
    seed=values.seed,
    report=report,
  )
  print_results(results)
  again = evaluation.command(values.workdir, experiment)
  terminal.end(str(out), f'{again} --human --players={names[-1]}')
