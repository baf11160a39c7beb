"""Trains SAC and saves data sets of D4RL's five qualities.

python -m experiments.collect --env=Pendulum-v1 --out=data/pendulum

  random         actions drawn uniformly within their bounds
  medium         the policy before expert whose evaluation came nearest to a
                 third of the way from `ref_min` to `ref_max`
  medium-replay  all experience up to medium, including the random actions at
                 the start; unfinished episodes are truncated
  expert         of the policies with the three best evaluations, the one that
                 plays best without noise (SAC's return may have dipped at the
                 last one, and a few episodes flatter)
  medium-expert  all rows of medium, then all of expert

Policies sample their actions, in evaluations as in the data. `ref_min` is the
mean return of random actions, `ref_max` that of the expert without noise, both
over fresh episodes. D4RL's medium is the first policy to pass a third of the
way; here the return may leap from far below to far above between two
evaluations.

The folder holds `config.json`, one folder per data set with its name, and
`agent/`, with the parameters, the evaluations during training and the two
references. The same command compares existing data sets with `stored.json`
and makes only those that are missing.
"""

import pathlib

from experiments.runtime import config as configs
from experiments.runtime import overrides
from experiments.training import collect


def define_flags() -> None:
  """The flags of `python -m experiments.collect`."""
  from absl import flags

  flags.DEFINE_string(
    'env',
    'Pendulum-v1',
    'the environment by its envpool name, or gymnasium:ID, or '
    'gymnasium:MODULE:ID of your own; its actions must be continuous',
  )
  flags.DEFINE_string(
    'out', None, 'the folder to write; data/ENV_sSEED if left out'
  )
  flags.DEFINE_integer(
    'steps',
    None,
    "number of decisions to train for; the environment's own if left out",
    1,
    configs.MAX_INT,
  )
  flags.DEFINE_integer(
    'transitions',
    50_000,
    'number of transitions in each of random, medium and expert',
    1,
    100_000_000,
  )
  flags.DEFINE_multi_string(
    'set', [], 'FIELD=VALUE of SAC or of the collection, repeatable'
  )
  flags.DEFINE_integer(
    'seed', 0, 'seed of all random numbers', 0, configs.MAX_SEED
  )
  flags.DEFINE_bool(
    'minari', False, "also write the data sets in Minari's format, OUT/minari"
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
      **overrides.override(sections, values.set),
    )


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
