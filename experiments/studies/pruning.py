"""Which stage of a lookahead may be coarse: not the first one.

python -m experiments.study pruning --folder=runs/studies/connect_four

The first stage of l-step lookahead is Newton's step on Bellman's equation; the
later ones only prepare the point where it is taken (Bertsekas 2022, "Lessons
from AlphaZero", 3.3 and 3.4). So coarsening the first must hurt, and coarsening
a later one hardly. One stage of three is coarse, in two ways:

- a wrong model: random processes whose transitions are mixed, at that stage,
  with another process's; the loss of the resulting policy is exact;
- pruning: Connect Four by a trained network, where that stage keeps the w moves
  with the largest priors; how often the game's value is kept, judged by perfect
  play. For a given w the leaves take as many network evaluations, whichever
  stage is pruned.
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import build
from experiments.build import saved
from experiments.files import tables
from experiments.files.errors import UserError
from experiments.playing import connect_four_solver, match
from experiments.report import statistics, style, terminal
from experiments.runtime import config as configs
from experiments.studies import runner

STAGES = 3
MIXED = (0.0, 0.1, 0.2, 0.4, 0.8)
KEPT = (1, 2, 3, 5)
COLUMNS = 7


class Coarsened(NamedTuple):
  """A lookahead with one coarse stage: a line of the CSV.

  Attributes:
    case: `model` or `pruning`.
    seed: of the network's training; 0 for processes.
    stage: which is coarse, from 1.
    coarse: share of wrong transitions, or number of moves kept.
    score: `1 - loss / loss_0`, see `models`; or the share of judged positions
      whose value is kept.
    score_se: standard error over processes or positions.
    number: of them.
  """

  case: str
  seed: int
  stage: int
  coarse: float
  score: float
  score_se: float
  number: int


def models(
  number: int, seed: int = 0, num_states: int = 20, num_actions: int = 4
) -> list[Coarsened]:
  """A wrong model at one stage of three, on at least 2 random processes.

  The terminal values are J* plus normal noise of J*'s own deviation. A policy's
  loss is `mean_s (J* - J_mu)`; scores are `1 - loss / loss_0`, with sums over
  processes in both. loss_0 is of the policy that is greedy with respect to the
  terminal values under a model that is all wrong.
  """
  import jax
  import jax.numpy as jnp

  from search.exact import bellman

  def losses(key):
    true_key, wrong_key, noise_key = jax.random.split(key, 3)
    mdp = bellman.random_mdp(true_key, num_states, num_actions)
    wrong = bellman.random_mdp(wrong_key, num_states, num_actions)
    _, best = bellman.optimal(mdp)
    noise = jax.random.normal(noise_key, best.shape, best.dtype)
    terminal = best + jnp.std(best) * noise

    def loss(coarse, share):
      value = terminal
      for stage in range(STAGES, 0, -1):
        mix = jnp.where(stage == coarse, share, 0.0)
        transition = (1 - mix) * mdp.transition + mix * wrong.transition
        at = mdp._replace(transition=transition)
        policy = bellman.greedy(at, value)
        value = bellman.bellman(at, value)
      return jnp.mean(best - bellman.policy_value(mdp, policy))

    stages = jnp.arange(1, STAGES + 1)
    each = jax.vmap(lambda s: jax.vmap(lambda m: loss(s, m))(jnp.array(MIXED)))
    alone = bellman.greedy(mdp._replace(transition=wrong.transition), terminal)
    worst = jnp.mean(best - bellman.policy_value(mdp, alone))
    return each(stages), worst

  with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(seed), number)
    loss, worst = jax.tree.map(np.asarray, jax.jit(jax.vmap(losses))(keys))
  ratio = loss.mean(0) / worst.mean()
  # The delta method for a ratio of means.
  spread = (loss - ratio * worst[:, None, None]) / worst.mean()
  error = spread.std(0, ddof=1) / np.sqrt(number)
  return [
    Coarsened('model', 0, s + 1, share, 1 - ratio[s, m], error[s, m], number)
    for s in range(STAGES)
    for m, share in enumerate(MIXED)
  ]


def moves(workdirs: Sequence[str]) -> list[Coarsened]:
  """Pruned moves at one stage of three, in Connect Four.

  Raises:
    UserError: a run cannot be read, or is of another game.
  """
  import jax
  from rich.progress import track

  from search import lookahead

  judged = connect_four_solver.read()
  experiment = saved.load_experiment(workdirs[0])
  if experiment.env_name != 'self_play:connect_four':
    raise UserError(
      f'folder={workdirs[0]}: plays {experiment.env_name}, must be '
      'self_play:connect_four'
    )
  env = build.make_env(experiment, training=False, num_envs=1)
  agent = build.make_agent(experiment, env.spec)
  params = [saved.load_params(w, agent, ['final'])['final'] for w in workdirs]
  timestep = match.time_step(
    env.spec.game, connect_four_solver.positions(judged.moves)
  )
  rows = []
  # If all columns are kept, the stage makes no difference.
  pairs = [(1, COLUMNS), *itertools.product(range(1, STAGES + 1), KEPT)]
  for stage, kept in track(pairs, 'lookahead'):
    widths: list[int | None] = [None] * STAGES
    if kept < COLUMNS:
      widths[stage - 1] = kept
    planner = lookahead.lookahead(STAGES, widths=tuple(widths))

    @jax.jit
    def decide(params, timestep, planner=planner):
      return planner(agent.model, params, jax.random.key(0), timestep).action

    for seed, each in enumerate(params):
      verdict = connect_four_solver.judge(
        np.asarray(decide(each, timestep)), judged
      )
      for at in (stage,) if kept < COLUMNS else range(1, STAGES + 1):
        score = verdict.kept, verdict.kept_se, len(judged.moves)
        rows.append(Coarsened('pruning', seed, at, kept, *score))
  return rows


def draw(rows: Sequence[Coarsened]) -> Any:
  """Draws a panel per case, a line per stage; returns the matplotlib `Figure`.

  Points are means over seeds; bars are standard errors, over seeds if there are
  several, else over processes.
  """
  titles = {
    'model': ('random processes', 'share of wrong transitions', 'loss avoided'),
    'pruning': ('Connect Four', 'moves kept', "game's value kept"),
  }
  cases = [case for case in titles if any(r.case == case for r in rows)]
  figure, panels = style.panels(len(cases), 4.6, 3.6)
  for axes, case in zip(panels[0], cases):
    for stage, label in enumerate(('first', 'second', 'third'), start=1):
      groups: dict[float, list[Coarsened]] = {}
      for row in rows:
        if (row.case, row.stage) == (case, stage):
          groups.setdefault(row.coarse, []).append(row)
      x = sorted(groups)
      means = [
        statistics.mean_error(
          [r.score for r in groups[at]], groups[at][0].score_se
        )
        for at in x
      ]
      y, error = np.reshape(means, (-1, 2)).T
      bars = {'marker': 'o', 'ms': 4, 'lw': 1.3, 'capsize': 2}
      axes.errorbar(x, y, error, label=label, **bars)
    style.label(axes, *titles[case])
  style.legend(panels[0][0], title='coarse stage of three', fontsize=8)
  return figure


def define_flags() -> None:
  """The flags of `python -m experiments.study pruning`."""
  from absl import flags

  flags.DEFINE_integer('processes', 2000, 'random processes', 2, 1_000_000)
  flags.DEFINE_string(
    'folder', 'runs/studies/connect_four', 'the folder of the trained runs'
  )
  runner.define_results()


def main() -> None:
  """Measures and draws as the flags say.

  Raises:
    UserError: a run cannot be read.
  """
  from absl import flags

  values = flags.FLAGS
  out = pathlib.Path(values.results) / 'lookahead_stages.csv'
  with configs.user_errors():
    configs.check_place('results', values.results, folder=True)
    print(
      f'three-stage lookahead with one coarse stage: {values.processes} random '
      'processes, then Connect Four'
    )
    rows = models(values.processes)
    found = runner.finished(values.folder, r'connect_four_s(\d+)')
    if found:
      rows += moves(list(found.values()))
    else:
      terminal.say(
        f'no finished runs connect_four_s* in {values.folder}: Connect Four '
        'is left out; '
        'train them with python -m experiments.study connect_four'
      )
  tables.write_records(out, rows, digits=5)
  style.save(draw(rows), out.with_suffix('.png'), dpi=140)
  terminal.end(f'{out} and .png')
