"""Names the command that replaced `python -m experiments.control`."""

from experiments.runtime import config as configs

if __name__ == '__main__':
  configs.fail(
    'control: has become part of play; run python -m experiments.play '
    '--workdir=RUN --players=actor,lookahead=1+rollout=8 [--dynamics=RUN], or '
    'its study, python -m experiments.study control'
  )
