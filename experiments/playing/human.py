"""A game in the terminal between a person and a player."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.files.errors import shown
from experiments.playing import boards, match, players

_SHOWN = 5
_HELP = (
  'a move as "moves" lists it; also moves, hint (what the agent would play), '
  'undo (take back your last move), board, quit'
)


class _Turn(NamedTuple):
  """A position and the number of moves before it."""

  state: Any
  number: int


class _Decision(NamedTuple):
  """The agent's action, its name, the mover's value and the best moves."""

  action: Any
  name: str
  value: float | None
  best: str


def against_person(
  game: Any,
  player: players.Player,
  *,
  begins: bool = True,
  seed: int = 0,
  ask: Callable[[str], str] = input,
  tell: Callable[[str], None] = print,
) -> float | None:
  """Plays one game against the person at the terminal.

  If the player has a network, its value of each position is printed, and the
  values of its best few moves. `ask` prints a prompt and returns the answer,
  EOFError quits; `tell` prints a text. Returns the person's points, None if
  they quit.
  """
  import jax

  key = jax.random.key(seed)
  step = jax.jit(game.step)
  turn = _Turn(game.init(key), 0)
  first = int(game.player(turn.state))
  person = first if begins else 1 - first
  decide = _decider(game, player, key)
  past: list[_Turn] = []
  called = shown(player.name)
  tell(f'you are {"XO"[person]}, and {called} is {"OX"[person]}; {_HELP}')
  while True:
    state, number = turn
    is_person = int(game.player(state)) == person
    legal = boards.legal_moves(game, state)
    tell(boards.show(game, state, person))
    if is_person and list(legal) == ['pass']:
      tell('you have no legal move and must pass')
      action = legal['pass']
    elif is_person:
      chosen = _chosen(turn, legal, decide, bool(past), ask, tell)
      if chosen is None:
        return None
      if chosen == 'undo':
        turn = past.pop()
        continue
      if chosen == 'board':
        continue
      past.append(turn)
      action = legal[chosen]
    else:
      decision = decide(turn, legal)
      expects = ''
      if decision.value is not None:
        expects = f'; it expects to score {decision.value:+.2f}'
      tell(f'{called} plays {decision.name}{expects}{decision.best}')
      action = decision.action
    # Chance depends only on the move's number, so `undo` keeps the dice.
    move = step(state, action, jax.random.fold_in(key, 2 * number))
    turn = _Turn(move.state, number + 1)
    if float(move.discount) == 0:
      tell(boards.show(game, move.state, person))
      points = float(move.reward) * (1 if is_person else -1)
      tell(
        'a draw'
        if not points
        else f'you {"win" if points > 0 else "lose"} {abs(points):g}'
      )
      return points


def _decider(game, player, key) -> Callable[[_Turn, Any], _Decision]:
  """The agent's decision in a position, for either side to move."""
  import jax

  def decide(turn, legal):
    batch = jax.tree.map(lambda x: np.asarray(x)[None], turn.state)
    own_key = jax.random.fold_in(key, 2 * turn.number + 1)
    timestep = match.time_step(game, batch)
    output = player.decide(player.params, own_key, timestep)
    action = np.asarray(output.action)[0]
    name = next(n for n, a in legal.items() if np.array_equal(a, action))
    # A player without a network has no values to show.
    if player.params is None:
      return _Decision(action, name, None, '')
    value = float(output.value[0])
    return _Decision(action, name, value, opinion(legal, output))

  return decide


def opinion(legal: dict[str, Any], output: Any) -> str:
  r"""Lists the best few moves of a `search.model.PolicyOutput`, one a line.

  A move's share is its weight in the improved policy (of visits with `puct`),
  and its value is the mover's: `'\n  NAME  share 40%  value +0.21'`. It is `''`
  if the output has neither weights nor values of moves.
  """
  values = output.qvalues
  weights = np.asarray(output.action_weights)[0]
  if output.sampled_actions is not None:
    listed = np.asarray(output.sampled_actions)[0]
    places = {}
    for place, action in enumerate(listed):
      for name, move in legal.items():
        if name not in places and np.array_equal(move, action):
          places[name] = place
  elif len(weights) > 1:
    places = {name: int(action) for name, action in legal.items()}
  else:
    return ''
  values = None if values is None else np.asarray(values)[0]
  worth = weights if values is None else values
  # Sorted by the policy if the output has one, else by value.
  by = worth if output.sampled_actions is not None else weights
  order = lambda name: (-by[places[name]], -worth[places[name]])
  best = sorted(places, key=order)[:_SHOWN]
  lines = []
  for name in best:
    line = f'\n  {name}'
    if output.sampled_actions is None:
      line += f'  share {weights[places[name]]:.0%}'
    if values is not None and np.isfinite(values[places[name]]):
      line += f'  value {values[places[name]]:+.2f}'
    lines.append(line)
  return ''.join(lines)


def _chosen(turn, legal, decide, can_undo, ask, tell) -> str | None:
  """The name of a legal move, `undo` or `board`; None to quit."""
  decision = decide(turn, legal)
  if decision.value is not None:
    tell(f'it expects you to score {decision.value:+.2f}')
  while True:
    try:
      answer = ' '.join(ask('your move: ').lower().split())
    except (EOFError, KeyboardInterrupt):
      return None
    if answer in ('q', 'quit', 'exit'):
      return None
    if answer == 'board':
      return answer
    if answer == 'undo' and can_undo:
      return answer
    if answer == 'undo':
      tell('undo: there is no move of yours to take back')
    elif answer in ('?', 'help', ''):
      tell(_HELP)
    elif answer == 'moves':
      tell(f'legal moves: {", ".join(legal)}')
    elif answer == 'hint':
      tell(f'it would play {decision.name}{decision.best}')
    else:
      try:
        return boards.read_move(answer, legal)
      except ValueError as error:
        tell(str(error))
