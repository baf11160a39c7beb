"""Plays an agent that was trained off-line with a planner on top of it.

python -m experiments.control --workdir=runs/iql_small_Pendulum-v1-random_s0 \
  --planners='actor;lookahead=1;lookahead=1+rollout=8'
python -m experiments.control --workdir=runs/... --dynamics=runs/dynamics_...
python -m experiments.study control --data=data/pendulum

The agent's actor proposes actions and rolls out, its critic is the cost at the
end (`playing.actor_critic_model`), and each decision is made anew from what the
real simulator shows: model predictive control. The model between
them is the exact simulator, or the ensemble that a run of `dynamics` or COMBO
learned from a data set. Planners are named

  actor                 the policy's mode; no planning
  critic                l = 0: the candidate of the highest Q
  lookahead=2           two stages over candidates, then the critic
  ...+rollout=8         leaves are worth 8 steps of the actor and the critic
                        behind them
  ...+no_critic         nothing behind them
  ...+box               candidates from the box of all actions, but for the
                        actor's mode; else the actor draws them
  ...+refined=4         first-stage candidates climb the gradient of Q, 4 steps

Later stages have fewer candidates, `--later_candidates`.
"""

from experiments.files.errors import UserError
from experiments.playing import control
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks

_OF_STUDY = ('data', 'folder', 'results', 'qualities', 'agents', 'seeds')
_OF_PLAY = ('workdir', 'checkpoint', 'dynamics', 'planners', 'seed', 'out')


def main() -> None:
  """Plays, or runs the study, as the flags say.

  Raises:
    UserError: neither a folder nor a study.
  """
  from absl import flags

  from experiments.runtime.devices import use_compilation_cache
  from experiments.studies import control as study_control

  values = flags.FLAGS
  with configs.user_errors():
    flag_checks.refuse(
      _OF_PLAY if values.study else _OF_STUDY,
      f'with{"" if values.study else "out"} --study',
    )
    if values.study:
      study_control.check(values)
    elif not values.workdir:
      raise UserError('workdir: the folder of a run is needed, or --study')
    elif values.out:
      configs.check_place('out', values.out)
    use_compilation_cache()
    if values.study:
      study_control.launch(values)
    else:
      control.launch(values)


def define_flags() -> None:
  """The flags of `python -m experiments.control`."""
  from absl import flags

  flags.DEFINE_string('workdir', None, 'the folder of a run')
  flags.DEFINE_string(
    'env', None, "the run's environment, where it brings code (train's --env)"
  )
  flags.DEFINE_enum(
    'checkpoint', 'final', ['final', 'best', 'early'], 'which parameters'
  )
  flags.DEFINE_string(
    'dynamics', 'exact', 'exact, or the folder of a dynamics (or combo) run'
  )
  flags.DEFINE_string(
    'planners',
    'actor;critic;lookahead=1;lookahead=1+rollout=8',
    'names with semicolons between them',
  )
  flags.DEFINE_integer('candidates', 8, 'of the first stage', 1, 10_000)
  flags.DEFINE_integer('later_candidates', 4, 'of each later one', 1, 10_000)
  flags.DEFINE_enum('value', 'min', ['min', 'mean'], 'of the critics')
  flags.DEFINE_integer(
    'episodes', 64, 'episodes for each planner', 1, 1_000_000
  )
  flags.DEFINE_integer(
    'seed', 0, 'of the starts and of the planner', 0, configs.MAX_SEED
  )
  flags.DEFINE_string('out', None, 'the CSV; WORKDIR/control.csv if left out')
  flags.DEFINE_boolean('study', False, 'the table of experiments/results')
  flags.DEFINE_string('data', 'data/pendulum', 'of the study: its data sets')
  flags.DEFINE_string('folder', 'runs/control', 'where it keeps its runs')
  flags.DEFINE_string('results', 'experiments/results', 'where its CSVs go')
  flags.DEFINE_list('qualities', ['random', 'medium'], 'of its data sets')
  flags.DEFINE_list('agents', ['iql', 'atac', 'td3_bc'], 'that it trains')
  flags.DEFINE_integer('seeds', 5, 'of each agent', 1, 10_000)


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
