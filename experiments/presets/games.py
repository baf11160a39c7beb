"""Presets of board games, learned by self-play.

Evaluations during training are against a random player, because self-play
always scores a draw.
"""

from experiments.presets.settings import Preset

# Positions are sampled uniformly, whatever their error.
_SELF_PLAY = (
  'replay_alpha=0',
  'replay_beta=0',
  'final_episodes=200',
  'final_simulations=16',
)
# A network for small boards, and a learning rate that falls twice.
_SMALL = ('norm=layer', 'decay_rate=0.3')
_OURS = 'ours, chosen on two CPU cores'

PRESETS = {
  'alphazero_tic_tac_toe': Preset(
    summary='AlphaZero learns tic-tac-toe by self-play, in a minute',
    agent='alphazero',
    env='self_play:tic_tac_toe',
    steps=53_480,
    time_steps=60_000,
    settings=(
      *_SELF_PLAY,
      *_SMALL,
      'hidden_sizes=64,64',
      'positions=2',
      'td_steps=9',
      'env.num_envs=64',
      'batch_size=128',
      'replay_capacity=10000',
      'warmup_decisions=2000',
      'decisions_per_update=32',
      'log_every=100',
      'evaluate_every=500',
      'evaluate_episodes=200',
    ),
    source=_OURS,
  ),
  'alphazero_connect_four': Preset(
    summary='Gumbel AlphaZero learns Connect Four by self-play',
    agent='alphazero',
    env='self_play:connect_four',
    steps=1_432_500,
    time_steps=1_500_000,
    settings=(
      *_SELF_PLAY,
      # Without random openings the policy soon settles on a few games and
      # forgets all others.
      'env.options=opening_plies=8',
      *_SMALL,
      'hidden_sizes=192,192',
      'num_simulations=32',
      'decay_every=8000',
      'positions=4',
      'td_steps=42',
      'env.num_envs=128',
      'batch_size=256',
      'replay_capacity=200000',
      'warmup_decisions=20000',
      'decisions_per_update=128',
      'log_every=100',
      'checkpoint_every=1000',
      'early_update=1000',
      'evaluate_every=1000',
      'evaluate_episodes=200',
    ),
    source=_OURS,
  ),
  'alphazero_othello': Preset(
    summary='Sampled AlphaZero on Othello, K of 65 actions at each node',
    agent='alphazero',
    env='self_play:othello',
    steps=982_200,
    time_steps=1_000_000,
    settings=(
      *_SELF_PLAY,
      'env.options=opening_plies=8',
      *_SMALL,
      'hidden_sizes=256,256',
      'sampled=true',
      'replacement=false',
      'num_samples=16',
      'num_simulations=16',
      'dirichlet_fraction=0',
      'evaluate_root=false',
      'decay_every=4000',
      'positions=4',
      'td_steps=60',
      'env.num_envs=64',
      'batch_size=256',
      'replay_capacity=100000',
      'warmup_decisions=10000',
      'decisions_per_update=128',
      'log_every=50',
      'checkpoint_every=500',
      'evaluate_every=500',
      'evaluate_episodes=100',
    ),
    source=_OURS + '; Hubert 2021 varies K in its study of Go',
  ),
  'td_gammon': Preset(
    summary='TD-Gammon: backgammon by self-play, 15 minutes on one CPU core',
    agent='td_gammon',
    env='self_play:backgammon',
    steps=11_793_000,
    time_steps=12_000_000,
    settings=(
      # With one game at a time, the traces stay in the processor's cache, and
      # the network learns from each turn before the next.
      'env.num_envs=1',
      'devices=1',
      'log_every=100000',
      'checkpoint_every=1000000',
    ),
    source='Tesauro 1995: 40 hidden units, lambda 0.7; the length is ours',
  ),
}
