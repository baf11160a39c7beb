"""The agent that data are collected with: a run of SAC in its own folder.

It resumes as any run: its checkpoints hold all its rows, and at each of them
the simulators start afresh, also in a run that was never stopped. It keeps the
policy of every evaluation. Unlike in `experiments.train`, actions are uniform
before the first update, and an evaluation samples, as the data do.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments import build
from experiments.build.material import Opened
from experiments.files import arrays, reading, tables, writing
from experiments.training.collector import Rows
from experiments.training.train import NOTHING, Trained, train

# Checkpoints of a training. Each cuts the episodes that are open.
CHECKPOINTS = 4


class Evaluation(NamedTuple):
  """A policy during training.

  Attributes:
    decisions: of the training so far.
    mean_return: of whole episodes of the policy, sampling.
    params: the agent's, on the host.
    rows: of the training so far, each a decision of all simulators.
  """

  decisions: int
  mean_return: float
  params: Any
  rows: int


@dataclasses.dataclass(frozen=True)
class _Kept:
  """A policy's JSON file; see `Evaluation`."""

  mean_return: float
  params: arrays.Stored


def describe(
  env_name: str, config: Any, collection: Any, *, steps: int, seed: int
) -> build.Experiment:
  """The run of an `agents.sac.Config`, which explores at random first.

  Raises:
    ValueError: its settings do not fit.
  """
  num, updates = collection.num_envs, collection.updates
  every = lambda decisions: max(round(decisions * updates), 1)
  evaluate_every = every(collection.evaluate_every)
  settings = {
    'env.num_envs': num,
    'batch_size': collection.batch_size,
    'warmup_decisions': collection.warmup,
    'decisions_per_update': 1 / updates,
    # An episode of one decision has two time steps: nothing is overwritten.
    'replay_capacity': 2 * (steps + 2 * num),
    'replay_alpha': 0.0,
    'acting': 'synchronous',
    'devices': 1,
    'log_every': evaluate_every,
    'evaluate_every': evaluate_every,
    'checkpoint_every': every(-(-steps // CHECKPOINTS)),
    'evaluate_episodes': collection.evaluate_episodes,
    'early_update': 0,
    'final_episodes': 0,
  }
  experiment = build.describe(
    'sac_pendulum',
    env=env_name,
    steps=steps,
    seed=seed,
    settings=[f'{name}={value}' for name, value in settings.items()],
  )
  env = dataclasses.replace(experiment.env, options=collection.options)
  usual = experiment.material
  material = usual._replace(
    open=lambda own, parts=1: _exploring(usual.open(own, parts))
  )
  return experiment._replace(config=config, env=env, material=material)


class _Nobody(NamedTuple):
  """What acting sees of a state before the first update."""

  params: None = None


def _exploring(opened: Opened) -> Opened:
  """Environments in which everything before the first update is random."""
  low, high = (
    x[None] for x in (opened.spec.action.low, opened.spec.action.high)
  )

  def source(experiment: Any, phase: Any, *args: Any):
    import jax
    import jax.numpy as jnp

    def act(params, key, timestep):
      # A replay forgets whether time was up or the simulators began afresh.
      extras = {'truncated': timestep.truncated}
      if params is None:
        shape = (timestep.reward.shape[0], *low.shape[1:])
        return jax.random.uniform(key, shape, jnp.float32, low, high), extras
      action, _ = phase.agent.act(params, key, timestep)
      # Rounding may leave the bounds; what is stored is what was done.
      return jnp.clip(action, low, high), extras

    own = phase._replace(agent=phase.agent._replace(act=act))
    inner = opened.make_source(experiment, own, *args)

    def next_(state, agent_state, step, key):
      acting = agent_state if step else _Nobody()
      return inner.next(state, acting, step, key)

    return inner._replace(next=next_)

  return opened._replace(make_source=source)


def learn(
  experiment: build.Experiment,
  folder: pathlib.Path,
  play: Callable[[Any, int], float],
  asked: Callable[[], bool],
) -> Trained:
  """Trains `describe`'s run, from the folder's last checkpoint if any.

  Args:
    play: `(params, number of the evaluation) -> mean return`.
    asked: whether the user wants to stop.
  """

  def evaluator(experiment, agent):
    del agent

    def evaluate(params, step):
      import jax

      params = jax.device_get(params)
      mean_return = play(params, -(-step // experiment.run.evaluate_every))
      path = _policy(folder, step)
      stored = arrays.write(path, leaves(params))
      kept = {'mean_return': mean_return, 'params': stored}
      writing.write_text(path.with_suffix('.json'), json.dumps(kept))
      return {'eval_return': mean_return}

    return evaluate

  material = experiment.material._replace(evaluate=evaluator)
  measured = NOTHING._replace(measure=True)
  return train(experiment._replace(material=material), folder, asked, measured)


def _policy(folder: pathlib.Path, step: int) -> pathlib.Path:
  return folder / 'policies' / f'{step:012d}.bin'


def evaluations(
  experiment: build.Experiment, folder: pathlib.Path, agent: Any
) -> list[Evaluation]:
  """The policies of a training that has ended, in order.

  Raises:
    UserError: a file is missing or not as it was written.
  """
  found = []
  for row in tables.read_numbers(folder / 'metrics.csv'):
    step = int(row['step'])
    path = _policy(folder, step)
    # The row at which acting ended has a policy only if it is the last.
    if step % experiment.run.evaluate_every and not path.exists():
      continue
    kept = reading.read_json(path.with_suffix('.json'), _Kept)
    params = read_params(path, agent, kept.params)
    rows = int(experiment.pace.rows_until(step - 1))
    decisions = int(row['decisions'])
    found.append(Evaluation(decisions, kept.mean_return, params, rows))
  return found


def history(trained: Trained) -> list[Rows]:
  """All experience of an ended training, in order.

  Nothing is valid where the simulators started afresh, at a checkpoint.
  """
  (part,) = trained.carry.source.parts
  experience, count = part.replay.rows, part.replay.count
  timestep = experience.timestep
  columns = Rows(
    observation=timestep.observation[: count - 1],
    action=experience.action[: count - 1],
    reward=timestep.reward[1:count],
    next_observation=timestep.observation[1:count],
    terminated=timestep.discount[1:count] == 0,
    truncated=experience.extras['truncated'][1:count],
    valid=~timestep.is_first[1:count],
  )
  return [Rows(*row) for row in zip(*columns)]


def leaves(params: Any) -> dict[str, np.ndarray]:
  """A pytree's leaves by their path, of shape `[...]` each."""
  import jax

  paths, _ = jax.tree_util.tree_flatten_with_path(params)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in paths}


def read_params(path: pathlib.Path, agent: Any, must_be: arrays.Stored) -> Any:
  """Parameters that were written as `leaves`.

  Raises:
    UserError: the file is missing or not as it was written.
  """
  import jax

  template = jax.eval_shape(agent.init, jax.random.key(0)).params
  paths, tree = jax.tree_util.tree_flatten_with_path(template)
  expected = {
    jax.tree_util.keystr(path): (x.dtype, x.shape) for path, x in paths
  }
  saved = arrays.read(path, expected, must_be)
  return jax.tree.unflatten(tree, list(saved.values()))
