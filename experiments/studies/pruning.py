"""Which stage of a lookahead may be coarse: not the first one.

python -m experiments.study pruning --folder=runs/studies/connect_four

The first stage of l-step lookahead is Newton's step on Bellman's equation; the
later ones only prepare the point where it is taken (Bertsekas 2022, "Lessons
from AlphaZero", 3.3 and 3.4). So coarsening the first must hurt, and
coarsening a later one hardly. Two ways to be coarse, each at one stage of
three while the other two are exact:

- a wrong model: random processes whose transitions are mixed, at that stage,
  with those of another process; what the resulting policy loses, exactly;
- pruning: Connect Four by a trained network, where that stage keeps the w moves
  that the prior likes best; how often the game's value is kept, judged by
  perfect play. Equal w are equal network evaluations at the leaves, whichever
  stage is pruned.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.files import tables, writing

STAGES = 3
MIXED = (0.0, 0.1, 0.2, 0.4, 0.8)
KEPT = (1, 2, 3, 5)
COLUMNS = 7


class Row(NamedTuple):
  """One line of the CSV.

  Attributes:
    case: `model` or `pruning`.
    seed: of the network's training; 0 for processes.
    stage: which is coarse, from 1.
    coarse: the share of the wrong transitions, or how many moves are kept.
    score: what is not lost of the loss of a policy that is greedy by the same
      terminal values under an all wrong model, as a share; or the share of
      judged positions whose value is kept.
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
) -> list[Row]:
  """A wrong model at one stage of three, on random processes.

  The terminal values are J* plus normal noise of J*'s own deviation. A
  policy's loss is `mean_s (J* - J_mu)`; scores are `1 - loss / loss_0` with the
  sum over processes in both, loss_0 being that of the policy which is greedy
  with respect to the terminal values under a model that is all wrong.

  Args:
    number: of processes, at least 2.
    seed: of them.
    num_states: S.
    num_actions: A.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

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
    Row('model', 0, s + 1, share, 1 - ratio[s, m], error[s, m], number)
    for s in range(STAGES)
    for m, share in enumerate(MIXED)
  ]


def moves(workdirs: Sequence[str]) -> list[Row]:
  """Pruned moves at one stage of three, in Connect Four.

  Args:
    workdirs: finished runs, one a seed.

  Raises:
    UserError: a run cannot be read, or is of another game.
  """
  import jax
  import numpy as np
  from rich.progress import track

  from experiments import build
  from experiments.build import saved
  from experiments.files.errors import UserError
  from experiments.playing import connect_four_solver, match
  from search import lookahead

  judged = connect_four_solver.read()
  experiment = saved.load_experiment(workdirs[0])
  if experiment.env_name != 'self_play:connect_four':
    raise UserError(
      f'folder={workdirs[0]}: plays {experiment.env_name}, and the judge knows '
      'self_play:connect_four'
    )
  env = build.make_env(experiment, training=False, num_envs=1)
  agent = build.make_agent(experiment, env.spec)
  params = [saved.load_params(w, agent, ['final'])['final'] for w in workdirs]
  timestep = match.time_step(
    env.spec.game, connect_four_solver.positions(judged.moves)
  )
  rows = []
  full = {(1, COLUMNS): (None,) * STAGES}
  pruned = {
    (stage, kept): tuple(
      kept if at == stage else None for at in range(1, STAGES + 1)
    )
    for kept in KEPT
    for stage in range(1, STAGES + 1)
  }
  for (stage, kept), widths in track((full | pruned).items(), 'lookahead'):
    planner = lookahead.lookahead(STAGES, widths=widths)

    @jax.jit
    def decide(params, timestep, planner=planner):
      return planner(agent.model, params, jax.random.key(0), timestep).action

    for seed, each in enumerate(params):
      verdict = connect_four_solver.judge(
        np.asarray(decide(each, timestep)), judged
      )
      # Nothing is pruned: the same of every stage.
      for at in (stage,) if kept < COLUMNS else range(1, STAGES + 1):
        rows.append(
          Row(
            'pruning',
            seed,
            at,
            kept,
            verdict.kept,
            verdict.kept_se,
            len(judged.moves),
          )
        )
  return rows


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes rows, atomically."""

  tables.write_lines(path, [Row._fields, *rows], digits=5)


def draw(rows: Sequence[Row]) -> Any:
  """A panel a case, a line a stage; returns a matplotlib `Figure`.

  Points are means over seeds; bars are standard errors, over seeds where there
  are several and over processes otherwise.
  """
  import numpy as np

  # Not pyplot: its figures are global state.
  from matplotlib.figure import Figure

  titles = {
    'model': ('random processes', 'share of wrong transitions', 'loss avoided'),
    'pruning': ('Connect Four', 'moves kept', "game's value kept"),
  }
  cases = [case for case in titles if any(r.case == case for r in rows)]
  figure = Figure((4.6 * len(cases), 3.6), layout='constrained')
  panels = figure.subplots(1, len(cases), squeeze=False)[0]
  for axes, case in zip(panels, cases):
    for stage in range(1, STAGES + 1):
      some = [r for r in rows if r.case == case and r.stage == stage]
      x = sorted({r.coarse for r in some})
      groups = [[r for r in some if r.coarse == at] for at in x]
      y = [np.mean([r.score for r in group]) for group in groups]
      error = [
        np.std([r.score for r in g], ddof=1) / np.sqrt(len(g))
        if len(g) > 1
        else g[0].score_se
        for g in groups
      ]
      label = ('first', 'second', 'third')[stage - 1]
      axes.errorbar(
        x, y, error, marker='o', ms=4, lw=1.3, capsize=2, label=label
      )
    title, xlabel, ylabel = titles[case]
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='#dddddd', lw=0.7)
  panels[0].legend(title='coarse stage of three', fontsize=8)
  return figure


def define_flags() -> None:
  """The flags of `python -m experiments.study pruning`."""
  from absl import flags

  flags.DEFINE_integer('processes', 2000, 'random ones', 2, 1_000_000)
  flags.DEFINE_string(
    'folder', 'runs/studies/connect_four', 'where the trained runs lie'
  )
  flags.DEFINE_string(
    'results', 'experiments/results', 'where CSV and figure go'
  )


def main() -> None:
  """Measures and draws as the flags say.

  Raises:
    UserError: a run cannot be read.
  """
  import re

  from absl import flags

  from experiments.report import terminal
  from experiments.runtime import config as configs

  values = flags.FLAGS
  out = pathlib.Path(values.results) / 'lookahead_stages.csv'
  with configs.user_errors():
    configs.check_place('results', values.results, folder=True)
    print(
      f'three-stage lookahead with one coarse stage: {values.processes} random '
      'processes, then Connect Four'
    )
    rows = models(values.processes)
    folder = pathlib.Path(values.folder)
    found = [
      str(path)
      for path in sorted(folder.glob('*/'))
      if re.fullmatch(r'connect_four_s\d+', path.name)
      and (path / 'final').is_dir()
    ]
    if found:
      rows += moves(found)
    else:
      terminal.say(
        f'no finished runs connect_four_s* in {folder}: without Connect Four; '
        'train them with python -m experiments.study connect_four'
      )
  write(out, rows)
  writing.write_figure(draw(rows), out.with_suffix('.png'), dpi=140)
  terminal.end(f'{out} and .png')
