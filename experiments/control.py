"""Names the command that `python -m experiments.control` has become."""

from experiments.runtime import config as configs

if __name__ == '__main__':
  configs.fail(
    'control: is part of play: python -m experiments.play --workdir=RUN '
    '--players=actor,lookahead=1+rollout=8 [--dynamics=RUN]; its study is '
    'python -m experiments.study control'
  )
