"""What is measured of an agent while it trains, besides its losses."""

import dataclasses
import pathlib
from collections.abc import Callable

from experiments import build
from experiments.runtime import config as configs


class HeldOut:
  """Windows that are never trained on, from the untrained network's play.

  While training their targets stay as they were recorded, so that figures of
  different times compare; what they say of policy and value is then that of
  the untrained search. At the end they are searched again by the trained
  agent, and both networks are measured by these targets.
  """

  def __init__(self, experiment: build.Experiment, agent, agent_state):
    import jax

    settings = dataclasses.replace(
      experiment.run, batch_size=experiment.run.hold_out, acting='synchronous'
    )
    apart = experiment._replace(run=settings)
    env = build.make_env(experiment, training=True)
    source = build.make_source(apart, env, agent._replace(refresh=None))
    self._key = jax.random.fold_in(jax.random.key(experiment.seed), 2**31 - 2)
    state = source.init(self._key)
    state, self._batch, _ = source.next(state, agent_state, 0, self._key)
    if source.close is not None:
      source.close(state)
    self._agent, self._untrained = agent, agent_state.params
    self._losses = jax.jit(agent.evaluate)

  def losses(self, params, batch=None) -> dict[str, float]:
    """Metrics `held_...` of parameters on the recorded or other targets."""
    from experiments.runtime import mesh

    batch = self._batch if batch is None else batch
    found = self._losses(mesh.local(params), batch, self._key)
    return {f'held_{name}': float(value) for name, value in found.items()}

  def compare(self, agent_state, path: pathlib.Path, write=True) -> None:
    """Writes the losses of both networks on the trained agent's targets."""
    import jax

    from experiments.runtime import mesh

    refresh = self._agent.refresh or (lambda state, batch, step, key: batch)
    agent_state = mesh.local(agent_state)
    batch = jax.jit(refresh)(agent_state, self._batch, 0, self._key)
    rows = {
      'untrained': self.losses(self._untrained, batch),
      'trained': self.losses(agent_state.params, batch),
    }
    names = list(rows['trained'])
    lines = [['network', *names]]
    lines += [
      [network, *(f'{row[name]:.6g}' for name in names)]
      for network, row in rows.items()
    ]
    if write:
      configs.write_text(path, '\n'.join(map(','.join, lines)) + '\n')


def evaluator(experiment: build.Experiment, agent) -> Callable:
  """`(params, step) -> metrics`: whole episodes with and without search."""
  import jax

  from agents.core import planning
  from experiments.runtime import evaluate as playing
  from experiments.runtime import mesh
  from search.model import Environment

  search = experiment.config.search
  players = {
    prefix: playing.player(
      planning.make_planner(config, evaluate=True), agent.model
    )
    for prefix, config in (
      ('eval', search),
      ('network', dataclasses.replace(search, num_simulations=0)),
    )
  }
  episodes = experiment.run.evaluate_episodes
  env = build.make_env(experiment, training=False, num_envs=min(episodes, 32))

  def evaluate(params, step):
    params = mesh.local(params)
    key = jax.random.fold_in(jax.random.key(experiment.seed), step)
    shared = {'key': key, 'num_episodes': episodes}
    found = {}
    for prefix, act in players.items():
      if isinstance(env, Environment):
        played = playing.on_device(env, act, params, **shared)
      else:
        played = playing.on_host(env, act, params, seed=step, **shared)
      summary = played.summary()
      found |= {
        name.replace('eval', prefix, 1): x for name, x in summary.items()
      }
    return found

  return evaluate
