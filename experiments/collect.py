"""Trains SAC and keeps data sets of five qualities, as D4RL names them.

python -m experiments.collect --env=Pendulum-v1 --out=data/pendulum

  random         actions uniform within their bounds
  medium         of the policies before expert, the one whose evaluation came
                 nearest to a third of the way from `ref_min` to `ref_max`
  medium-replay  all that had been experienced by then, the random beginning
                 included; episodes that were open are cut
  expert         the policy of the best evaluation (the last one may be in one
                 of SAC's dips)
  medium-expert  all rows of medium, then all of expert

Policies sample, in evaluations as in data. `ref_min` is the mean return of
random actions, `ref_max` that of the expert without noise, both over fresh
episodes. D4RL's medium is the first policy to pass a third of the way; here
learning may leap from far below to far above between two evaluations.

The folder holds `config.json`, a data set in each folder of these names, and
`agent/`: parameters, the evaluations on the way, the references. What is there
is not made again by the same command, which compares it with `stored.json`.
"""

import pathlib

from experiments.runtime import config as configs
from experiments.training import collect


def define_flags() -> None:
  """The flags of `python -m experiments.collect`."""
  from absl import flags

  flags.DEFINE_string(
    'env', 'Pendulum-v1', "envpool's name; its actions must be continuous"
  )
  flags.DEFINE_string('out', None, 'the folder; data/ENV_sSEED if left out')
  flags.DEFINE_integer(
    'steps', None, 'decisions of the training', 1, configs.MAX_INT
  )
  flags.DEFINE_integer(
    'transitions', 50_000, 'of random, medium and expert each', 1, 100_000_000
  )
  flags.DEFINE_multi_string(
    'set', [], "field=value, repeatable: SAC's and this module's Collection's"
  )
  flags.DEFINE_integer('seed', 0, 'of everything', 0, configs.MAX_SEED)
  flags.DEFINE_bool(
    'minari', False, "write Minari's folders into OUT/minari, too"
  )


def main() -> None:
  """Trains and collects as the flags say."""
  from absl import flags

  from agents import sac
  from experiments.runtime import devices

  values = flags.FLAGS
  devices.use_compilation_cache()
  steps, fields, collection = collect.TASKS.get(values.env, collect.OTHERS)
  sections = {'sac': sac.Config(**fields), 'collection': collection}
  out = values.out or f'data/{values.env}_s{values.seed}'
  configs.check_place('out', out, folder=True)
  with configs.user_errors():
    collect.run(
      values.env,
      pathlib.Path(out),
      steps=values.steps or steps,
      transitions=values.transitions,
      seed=values.seed,
      minari=values.minari,
      **configs.override(sections, values.set),
    )


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
