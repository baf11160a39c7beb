"""Games of a finished run's agent: matches with a table, and against a person.

`experiments.play` comes here with the flags `players`, `opponents` and
`human`.
"""

import csv
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from experiments import boards, match, players
from experiments.runtime import config as configs
from experiments.runtime.config import UserError


def make_player(
  name: str,
  workdir: str,
  own: Any,
  game: Any,
  host: Any = None,
  usual: str = 'final',
) -> players.Player:
  """A player by its name, with the parameters of its run.

  Args:
    name: see `experiments.players`; `solver`, `pubeval` and `gnubg=PLIES` are
      opponents of other make.
    workdir: the run that a name without one means.
    own: that run's `build.Experiment`.
    game: the rules of the run's environment.
    host: `(name) -> Player` of further opponents; None for none.
    usual: the checkpoint of a name that has no run in front.

  Raises:
    UserError: an unknown name or run, or one of another game.
  """
  from experiments import build, play

  outside = host(name) if host is not None else None
  if outside is not None:
    return outside
  run, checkpoint, rest = players.split(name)
  strategy = players.parse(rest)
  if strategy.planner == 'random':
    return players.make(name, strategy, None, None, game)
  folder = run or workdir
  checkpoint = checkpoint if run else usual
  experiment = own if not run else play.load_experiment(folder)
  if experiment.env_name != own.env_name:
    raise UserError(
      f'player={name}: {folder} plays {experiment.env_name}, and this is '
      f'{own.env_name}'
    )
  env = build.make_env(experiment, training=False, num_envs=1)
  agent = build.make_agent(experiment, env.spec)
  if agent.model is None:
    raise UserError(f'player={name}: {experiment.agent_name} has no model')
  params = play.load_params(folder, agent, [checkpoint])[checkpoint]
  search = getattr(experiment.config, 'search', None)
  return players.make(name, strategy, agent.model, params, game, search)


def other_players(game: Any) -> Callable[[str], players.Player | None]:
  """Opponents that are not of this suite, by their names.

  Args:
    game: the rules.

  Returns:
    `(name) -> Player`, None for a name that is none of theirs; UserError for
    one that does not play this game, or is not installed.
  """

  def find(name):
    planner, _, _ = name.partition('=')
    plays = {'solver': 'ConnectFour', 'pubeval': 'Backgammon'}
    plays['gnubg'] = 'Backgammon'
    if planner not in plays:
      return None
    if game.spec.name.lower() != plays[planner].lower():
      raise UserError(
        f'player={name}: plays {plays[planner]}, and this is {game.spec.name}'
      )
    if planner == 'solver':
      from experiments import judge

      return judge.solver()
    from experiments import gnubg

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
  """Every player against every opponent, on the same openings.

  Args:
    game: the rules.
    ours: whose scores are told.
    others: whom they meet.
    openings: how many; each is played twice.
    opening_plies: random moves before a game.
    seed: of openings, chance and whoever draws.
    report: told every result as it comes.

  Raises:
    ValueError: see `match.openings`.
  """
  starts = match.openings(game, openings, opening_plies, seed)
  results = []
  for player in ours:
    # Who has no network is timed on what it has seen before, if at all.
    speed = None
    if player.params is not None:
      speed = match.measure(game, player, starts)
    for other in others:
      games = match.play(game, player, other, starts, seed=seed)
      results.append(match.summarise(player, other, games, speed))
      report(results[-1])
  return results


def write(path: pathlib.Path, results: Sequence[match.Result]) -> None:
  """Writes match.csv, atomically."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(match.Result._fields)
  writer.writerows(
    [f'{x:.5g}' if isinstance(x, float) else x for x in row] for row in results
  )
  configs.write_text(path, text.getvalue())


def print_results(results: Sequence[match.Result]) -> None:
  """A table for people."""
  from rich.console import Console
  from rich.table import Table

  # Where all wins count one, points say nothing that scores do not.
  counts = any(abs(row.points - 2 * row.score + 1) > 1e-9 for row in results)
  table = Table()
  for column in ('player', 'opponent', 'points' if counts else 'score', 'Elo'):
    table.add_column(column, justify='right', overflow='fold')
  table.add_column('evaluations', justify='right')
  table.add_column('ms', justify='right')
  for row in results:
    score = f'{row.score:.3f} ± {row.score_se:.3f}'
    points = f'{row.points:+.3f} ± {row.points_se:.3f}'
    table.add_row(
      row.player,
      row.opponent,
      points if counts else score,
      f'{row.elo:+.0f} [{row.elo_low:+.0f}, {row.elo_high:+.0f}]',
      '' if row.evaluations is None else str(row.evaluations),
      '' if row.ms_per_decision is None else f'{row.ms_per_decision:.2f}',
    )
  Console().print(table)


def against_person(
  game: Any,
  player: players.Player,
  *,
  begins: bool = True,
  seed: int = 0,
  ask: Callable[[str], str] = input,
  tell: Callable[[str], None] = print,
) -> float | None:
  """One game against whoever sits at the terminal.

  Args:
    game: the rules.
    player: the opponent; its opinion is told before it moves.
    begins: whether the person moves first.
    seed: of chance.
    ask: shows a prompt and gives the answer.
    tell: shows a text.

  Returns:
    The person's points; None if they left.
  """
  import jax
  import numpy as np

  key = jax.random.key(seed)
  state = game.init(key)
  first = int(game.player(state))
  person = first if begins else 1 - first
  moves = 0
  tell(f'you are {"XO"[person]}, and {player.name} is {"OX"[person]}')
  while True:
    moves += 1
    move_key, decide_key = jax.random.split(jax.random.fold_in(key, moves))
    legal = boards.legal_moves(game, state)
    tell(boards.show(game, state, person))
    is_person = int(game.player(state)) == person
    if is_person:
      action = _ask(legal, ask, tell)
      if action is None:
        return None
    else:
      batch = jax.tree.map(lambda x: np.asarray(x)[None], state)
      timestep = match.time_step(game, batch)
      output = player.decide(player.params, decide_key, timestep)
      action = np.asarray(output.action)[0]
      tell(_opinion(legal, action, output))
    move = jax.jit(game.step)(state, action, move_key)
    state = move.state
    if float(move.discount) == 0:
      tell(boards.show(game, state, person))
      points = float(move.reward) * (1 if is_person else -1)
      tell(
        'a draw'
        if not points
        else f'you {"win" if points > 0 else "lose"} {abs(points):g}'
      )
      return points


def _ask(legal, ask, tell):
  """The person's action; None to leave."""
  names = ', '.join(legal)
  while True:
    try:
      answer = ' '.join(ask('your move (? for all, q to leave): ').split())
    except EOFError:
      return None
    if answer in ('q', 'quit', 'exit'):
      return None
    if answer in legal:
      return legal[answer]
    tell(f'legal moves: {names}' if answer == '?' else f'not legal: {answer}')


def _opinion(legal, action, output) -> str:
  """What the player does, and what it thinks of its chances and moves."""
  import numpy as np

  said = next(n for n, a in legal.items() if np.array_equal(a, action))
  text = f'plays {said}; expects {float(output.value[0]):+.2f}'
  weights = np.asarray(output.action_weights)[0]
  if output.qvalues is not None:
    weights = np.asarray(output.qvalues)[0]
  # Whoever comes from outside has none, and candidates have no numbers.
  if output.sampled_actions is None and len(weights) > 1:
    shown = [f'{n} {weights[int(n)]:.2f}' for n in legal]
    kind = 'weights' if output.qvalues is None else 'values'
    text += f'; {kind}: {", ".join(shown)}'
  return text


def launch(experiment: Any, values: Any) -> None:
  """Plays as the flags of `experiments.play` say.

  Raises:
    UserError: the run's environment is no game, or a player is none.
  """
  from experiments import build

  game = build.make_env(experiment, training=False, num_envs=1).spec.game
  if game is None:
    raise UserError(
      f'opponents: {experiment.env_name} is no game with rules; runs on '
      'self_play:NAME are'
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
    player = find(names[0])
    against_person(game, player, begins=values.begin, seed=values.seed)
    return
  results: list[match.Result] = []
  out = pathlib.Path(values.out or f'{values.workdir}/match.csv')

  def report(result):
    results.append(result)
    write(out, results)
    print(
      f'{result.player} against {result.opponent}: '
      f'score {result.score:.3f} ± {result.score_se:.3f}, '
      f'points {result.points:+.3f} ± {result.points_se:.3f}',
      flush=True,
    )

  matches(
    game,
    [find(name) for name in names],
    [find(name) for name in values.opponents or ['random']],
    openings=values.openings,
    opening_plies=values.opening_plies,
    seed=values.seed,
    report=report,
  )
  print_results(results)
  print(f'results: {out}')
