"""Presets of backgammon, learned by playing against oneself."""

from experiments.settings import Preset

PRESETS = {
  'td_gammon': Preset(
    summary='TD-Gammon: backgammon by self-play, 20 minutes on one CPU core',
    agent='td_gammon',
    env='self_play:backgammon',
    steps=11_793_000,
    time_steps=12_000_000,
    settings=(
      # One game at a time: its traces stay in the processor's cache, and each
      # turn is learned from before the next.
      'env.num_envs=1',
      'devices=1',
      'log_every=100000',
      'checkpoint_every=1000000',
    ),
    source='Tesauro 1995: 40 hidden units, lambda 0.7; the length is ours',
  ),
}
