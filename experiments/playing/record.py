"""Draws a trained agent at play: `experiments.play --record=FILE`.

A .gif file is an animation of every time step; a .png file shows some of them
side by side.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments.report import pictures


def episode(
  env: Any,
  decide: Callable[..., tuple[Any, Any]],
  params: Any,
  *,
  seed: int = 0,
  limit: int = pictures.LONGEST,
) -> list[pictures.Frame]:
  """Draws an episode of up to `limit` time steps.

  A caption has the number of decisions so far, the last reward, the
  undiscounted return so far and the planner's value. The environment is pure,
  or host simulators, of which the first is drawn; `decide` is `(params, key,
  timestep) -> (action [B, ...], value [B] or None)`.

  Raises:
    UserError: this environment cannot be drawn.
  """
  import jax

  draw = pictures.drawing(env.spec)
  key = jax.random.key(seed)
  play = _on_device if hasattr(env, 'reset') else _on_host
  total, frames = 0.0, []
  for step, (timestep, action, value) in enumerate(
    itertools.islice(play(env, decide, params, key, seed), limit)
  ):
    observation, reward = timestep.observation[0], float(timestep.reward[0])
    total += reward
    caption = f'step {step}   reward {reward:+.3g}\nreturn {total:+.3g}'
    if value is not None:
      caption += f'   value {float(value[0]):+.3g}'
    over = bool(timestep.is_last()[0])
    shown = None if over else np.asarray(action[0])
    frames.append(pictures.Frame(draw(np.asarray(observation), shown), caption))
    if over:
      break
  return frames


def _on_host(env, decide, params, key, seed) -> Iterator[tuple]:
  import jax

  simulator = env.start(seed)
  try:
    timestep = simulator.reset()
    for step in itertools.count():
      action, value = decide(params, jax.random.fold_in(key, step), timestep)
      yield timestep, action, None if timestep.is_last()[0] else value
      timestep, _ = simulator.step(np.asarray(action))
  finally:
    simulator.close()


def _on_device(env, decide, params, key, seed) -> Iterator[tuple]:
  import jax

  del seed
  advance = jax.jit(env.step)
  batched = lambda timestep: jax.tree.map(lambda x: x[None], timestep)
  state, timestep = jax.jit(env.reset)(key)
  for step in itertools.count():
    own, chance = jax.random.split(jax.random.fold_in(key, step))
    seen = batched(timestep)
    action, value = decide(params, own, seen)
    yield seen, action, None if bool(timestep.is_last()) else value
    state, timestep = advance(state, action[0], chance)


def match_frames(
  game: Any,
  sides: Sequence[Any],
  *,
  seed: int = 0,
  limit: int = pictures.LONGEST,
) -> list[pictures.Frame]:
  """Draws a game between two `players.Player`; the first begins.

  A caption has the players, the number of moves so far and the mover's value,
  or the winner in the last frame.

  Raises:
    UserError: this game's board cannot be drawn.
  """
  import jax

  from experiments.playing import match

  pictures.check_board(game)
  key, advance = jax.random.key(seed), jax.jit(game.step)
  see = jax.jit(game.observe)
  state, frames = game.init(key), []
  first = int(game.player(state))
  colours = ('red', 'yellow') if first == 0 else ('yellow', 'red')
  title = ' - '.join(f'{s.name} ({c})' for s, c in zip(sides, colours))
  for number in range(limit):
    mover = int(game.player(state))
    side = sides[mover if first == 0 else 1 - mover]
    colour = colours[mover if first == 0 else 1 - mover]
    image = pictures.draw_board(np.asarray(see(state)), mover)
    chance, own = jax.random.split(jax.random.fold_in(key, number))
    batch = jax.tree.map(lambda x: np.asarray(x)[None], state)
    output = side.decide(side.params, own, match.time_step(game, batch))
    said = f'move {number}   {colour} to move'
    if side.params is not None:
      said += f', value {float(output.value[0]):+.2f}'
    frames.append(pictures.Frame(image, f'{title}\n{said}'))
    move = advance(state, np.asarray(output.action)[0], chance)
    state = move.state
    if float(move.discount) == 0:
      # The reward is that of the side that has just moved, `colour`.
      image = pictures.draw_board(
        np.asarray(see(state)), int(game.player(state))
      )
      won = {1: f'{colour} wins', 0: 'a draw'}.get(
        int(np.sign(move.reward)), f'{colour} loses'
      )
      frames.append(
        pictures.Frame(image, f'{title}\nmove {number + 1}   {won}')
      )
      break
  return frames


def launch(experiment: Any, values: Any) -> None:
  """Records as the flags of `experiments.play` say.

  Raises:
    UserError: the file's name is wrong, or the environment cannot be drawn.
  """
  from experiments import build
  from experiments.report import terminal

  path = pathlib.Path(values.record)
  pictures.check_path(path)
  env = build.make_env(experiment, training=False, num_envs=1)
  limit = pictures.LONGEST
  if path.suffix == '.gif' and values.frames:
    limit = values.frames
  record = _record_episode if env.spec.game is None else _record_match
  frames = record(experiment, env, values, limit)
  pictures.write(path, frames, values.frames)
  last = frames[-1].caption.replace('\n', '   ')
  terminal.say(f'{len(frames)} time steps; the last one: {last}')
  terminal.end(str(path))


def _record_match(experiment, env, values, limit):
  from experiments.build import acting
  from experiments.playing import arena
  from experiments.report import terminal

  game = env.spec.game
  pictures.check_board(game)
  budget = acting.read_budgets(values.simulations, [16])[-1]
  usual = f'gumbel={budget}' if budget else 'network'
  names = [n[0] if n else usual for n in (values.players, values.opponents)]
  players = [
    arena.make_player(
      name,
      values.workdir,
      experiment,
      game,
      arena.other_players(game),
      (values.checkpoint or ['final'])[0],
    )
    for name in names
  ]
  terminal.begin(f'recording {game.spec.name}: {" against ".join(names)}')
  return match_frames(game, players, seed=values.seed, limit=limit)


def _record_episode(experiment, env, values, limit):
  from experiments import build
  from experiments.build import acting, saved
  from experiments.playing import actor_critic_play, actor_critic_runs, episodes
  from experiments.report import terminal

  pictures.drawing(env.spec)
  name = (values.checkpoint or ['final'])[0]
  player = values.players[0] if values.players else ''
  if player and experiment.agent_name in actor_critic_runs.AGENTS:
    decide, params = actor_critic_play.decider(player, experiment, values)
  else:
    spec = saved.load_spec(values.workdir, env.spec)
    agent = build.make_agent(experiment, spec)
    params = saved.load_params(values.workdir, agent, [name])[name]
    if player:
      _, decide = episodes.decider(player, experiment, agent)
    else:
      usual = [16] if agent.exploit is None else [0]
      budget = acting.read_budgets(values.simulations, usual)[-1]
      decide = acting.make_decider(experiment, agent, budget, values.planner)
      player = f'{budget} simulations' if budget else 'the network alone'
  terminal.begin(
    f'recording {experiment.agent_name} on {experiment.env_name}, {player}',
    terminal.parameters(params),
  )
  return episode(env, decide, params, seed=values.seed, limit=limit)
