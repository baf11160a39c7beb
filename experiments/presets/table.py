"""The table of presets: one row per experiment.

A row has an agent, an environment and the fields that differ from the agent's
`Config` (which holds its paper's numbers) and from `RunConfig`. `source` says
where the numbers come from. `--set` overrides single fields.

Nothing slow is imported here, because `--help` imports this table.
"""

import difflib

from experiments.presets import games, language, offline
from experiments.presets.settings import EnvConfig, Preset, RunConfig

# Modules of `agents/` that the launcher can train.
AGENTS = (
  'alphazero',
  'atac',
  'bc',
  'combo',
  'cql',
  'dynamics',
  'efficientzero',
  'efficientzero_v2',
  'iql',
  'language',
  'muzero',
  'sac',
  'sampled_muzero',
  'td3_bc',
  'td_gammon',
)

__all__ = ['AGENTS', 'DEFAULT', 'PRESETS', 'EnvConfig', 'Preset', 'RunConfig']


# Networks small enough for two cores and boards of a few dozen cells.
_SMALL = (
  'network.latent=vector',
  'network.latent_size=128',
  'network.channels=16',
  'network.head_channels=8',
  'network.head_hidden=64',
  'network.lstm_size=64',
  'network.value_bins=21',
  'network.reward_bins=21',
  'network.norm=layer',
)
_SMALL_PROJECTOR = ('network.projector=64,64,64', 'network.predictor=32')
_QUICK = (
  'optimiser=adam',
  'learning_rate=1e-3',
  'warmup_updates=50',
  'decay_every=0',
  'gamma=0.997',
  'target_period=50',
)
# Vector observations, a few real-valued actions, returns up to some hundreds.
_CONTROL = (
  *_SMALL,
  *_SMALL_PROJECTOR,
  'network.latent_size=64',
  'network.head_hidden=32',
  'network.observation_scale=symlog',
  'network.value_bins=101',
  'learning_rate=1e-3',
  'warmup_updates=50',
  'target_period=50',
  'augmentation=false',
  'td_steps=8',
  'reanalyze_fraction=0.25',
  'temperature=0.5',
  'entropy_weight=0.02',
  'num_samples=20',
  'num_simulations=32',
  'evaluate_episodes=10',
  'final_episodes=20',
  'final_simulations=10,20,50',
)
# EfficientZero V2's own settings of the replay.
_V2_REPLAY = ('replay_alpha=1', 'replay_beta=1')
_V2_CONTROL = (
  *_V2_REPLAY,
  *(x for x in _CONTROL if not x.startswith(('temperature', 'num_samples'))),
  'network.blocks=1',
  'network.action_embedding=16',
  'reanalyze_fraction=0.5',
  'final_simulations=16,32,64',
)
_ATARI_100K = (
  'batch_size=256',
  'replay_capacity=100000',
  'warmup_decisions=2000',
  'decisions_per_update=1',
  'log_every=100',
  'checkpoint_every=5000',
  'evaluate_every=10000',
  'evaluate_episodes=32',
  'final_episodes=32',
  'final_simulations=50',
  'extra_updates=20000',
)
# One game at a time; frames on the host, a fifth to a fortieth of their size.
_ON_THE_HOST = ('env.num_envs=1', 'compress_replay=true')
# What lets an accelerator work without waiting for the host. As Ye's official
# code has them (config/atari/__init__.py and train.sh): four games are played
# at once (p_mcts_num), by parameters that are copied every 100 updates
# (checkpoint_interval); arithmetic is of half precision (amp_type); an
# evaluation during training ends after 3,000 decisions (test_max_moves); and
# the bootstrap is the target network's value, so that 6 positions of a window
# are searched again and not 11 (use_root_value is off). Ours, by count: frames
# lie on the device, so that an update moves none (docs/results/atari.md), and
# all positions are searched at once, since four chunks one after the other take
# four times as many turns of the search's loops.
_ON_A_CARD = (
  'env.num_envs=4',
  'publish_every=100',
  'network.compute_dtype=bfloat16',
  'evaluate_decisions=3000',
  'searched_values=false',
  'frames_on=device',
  'reanalyze_chunk=0',
)
_OURS = 'ours, chosen on two CPU cores'
_V2_CODE = "Wang 2024, its official code's configs (config/exp)"
_EZ_TABLE = 'Ye 2021, Table 6 and its official code, config/atari'

PRESETS = {
  'efficientzero_catch': Preset(
    summary='the main job: EfficientZero on bsuite Catch in minutes on a CPU',
    agent='efficientzero',
    env='Catch-v0',
    steps=7584,
    time_steps=8400,
    settings=(
      *_SMALL,
      *_SMALL_PROJECTOR,
      *_QUICK,
      'augmentation=false',
      'num_simulations=8',
      'replay_capacity=20000',
      'warmup_decisions=400',
      'decisions_per_update=4',
      'checkpoint_every=500',
      'early_update=500',
    ),
    source=_OURS,
  ),
  'muzero_catch': Preset(
    summary='MuZero with Reanalyze on bsuite Catch',
    agent='muzero',
    env='Catch-v0',
    steps=7584,
    time_steps=8400,
    settings=(
      *_SMALL,
      *_SMALL_PROJECTOR,
      *_QUICK,
      'num_simulations=8',
      'replay_capacity=20000',
      'warmup_decisions=400',
      'decisions_per_update=4',
      'checkpoint_every=500',
      'early_update=500',
    ),
    source=_OURS,
  ),
  'muzero_cartpole': Preset(
    summary='MuZero on CartPole, from vectors',
    agent='muzero',
    env='CartPole-v1',
    steps=40_000,
    settings=(
      *_SMALL,
      *_SMALL_PROJECTOR,
      *_QUICK,
      'network.value_bins=61',
      'num_simulations=16',
      'replay_capacity=40000',
      'warmup_decisions=1000',
      'decisions_per_update=8',
      'evaluate_every=1000',
    ),
    source=_OURS,
  ),
  'efficientzero_cartpole': Preset(
    summary='EfficientZero on CartPole, from vectors',
    agent='efficientzero',
    env='CartPole-v1',
    steps=40_000,
    settings=(
      *_SMALL,
      *_SMALL_PROJECTOR,
      *_QUICK,
      'network.value_bins=61',
      'augmentation=false',
      'num_simulations=16',
      'replay_capacity=40000',
      'warmup_decisions=1000',
      'decisions_per_update=8',
      'evaluate_every=1000',
    ),
    source=_OURS,
  ),
  'sampled_muzero_pendulum': Preset(
    summary='Sampled MuZero swings up a pendulum, in one compiled program',
    agent='sampled_muzero',
    env='jax:pendulum',
    steps=11_760,
    time_steps=12_000,
    settings=(
      *_CONTROL,
      'env.options=action_repeat=4',
      'gamma=0.97',
      'replay_capacity=40000',
      'warmup_decisions=800',
      'decisions_per_update=4',
      'entropy_weight=0.005',
      'evaluate_every=200',
    ),
    source=_OURS,
  ),
  'sampled_muzero_swingup': Preset(
    summary='Sampled MuZero on the DeepMind Control cart-pole, from vectors',
    agent='sampled_muzero',
    env='CartpoleSwingup-v1',
    steps=19_904,
    time_steps=20_000,
    settings=(
      *_CONTROL,
      'env.options=action_repeat=8',
      'gamma=0.98',
      'consistency=true',
      'replay_capacity=40000',
      'warmup_decisions=1000',
      'decisions_per_update=4',
      'evaluate_every=500',
    ),
    source=_OURS,
  ),
  'sampled_muzero_ball_in_cup': Preset(
    summary='Sampled MuZero on the DeepMind Control ball in a cup',
    agent='sampled_muzero',
    env='BallInCupCatch-v1',
    steps=19_904,
    time_steps=20_000,
    settings=(
      *_CONTROL,
      'env.options=action_repeat=8',
      'gamma=0.98',
      'consistency=true',
      'replay_capacity=40000',
      'warmup_decisions=1000',
      'decisions_per_update=4',
      'evaluate_every=500',
    ),
    source=_OURS,
  ),
  'sampled_muzero_point_mass': Preset(
    summary='Sampled MuZero over joint bins that no search enumerates',
    agent='sampled_muzero',
    env='jax:point_mass',
    steps=78_416,
    time_steps=80_000,
    settings=(
      *_CONTROL,
      'env.options=dimensions=4',
      'env.action_bins=7',
      'policy=flat',
      'reward_scale=10',
      'gamma=0.95',
      'replay_capacity=40000',
      'warmup_decisions=800',
      'decisions_per_update=8',
      'entropy_weight=0.005',
      'evaluate_every=200',
    ),
    source=_OURS,
  ),
  'efficientzero_v2_catch': Preset(
    summary='EfficientZero V2 on bsuite Catch',
    agent='efficientzero_v2',
    env='Catch-v0',
    steps=7584,
    time_steps=8400,
    settings=(
      *_SMALL,
      *_SMALL_PROJECTOR,
      *_QUICK,
      *_V2_REPLAY,
      'network.blocks=1',
      'network.action_embedding=16',
      'augmentation=false',
      'value_prefix=true',
      'entropy_weight=0',
      'num_simulations=8',
      'wide_samples=0',
      'replay_capacity=20000',
      'warmup_decisions=400',
      'decisions_per_update=4',
      'checkpoint_every=500',
      'early_update=500',
    ),
    source=_OURS,
  ),
  'efficientzero_v2_pendulum': Preset(
    summary='EfficientZero V2 swings up a pendulum, in one compiled program',
    agent='efficientzero_v2',
    env='jax:pendulum',
    steps=11_760,
    time_steps=12_000,
    settings=(
      *_V2_CONTROL,
      'env.options=action_repeat=4',
      'gamma=0.97',
      'replay_capacity=40000',
      'warmup_decisions=800',
      'decisions_per_update=4',
      'entropy_weight=0.005',
      'evaluate_every=200',
    ),
    source=_OURS,
  ),
  'efficientzero_v2_swingup': Preset(
    summary='EfficientZero V2 on the DeepMind Control cart-pole, from vectors',
    agent='efficientzero_v2',
    env='CartpoleSwingup-v1',
    steps=19_904,
    time_steps=20_000,
    settings=(
      *_V2_CONTROL,
      'env.options=action_repeat=8',
      'gamma=0.98',
      'replay_capacity=40000',
      'warmup_decisions=1000',
      'decisions_per_update=4',
      'evaluate_every=500',
    ),
    source=_OURS,
  ),
  'efficientzero_v2_atari': Preset(
    summary='EfficientZero V2 on Atari-100k, as in its official code',
    agent='efficientzero_v2',
    env='Pong-v5',
    steps=100_000,
    settings=(
      *_ATARI_100K,
      *_ON_THE_HOST,
      *_V2_REPLAY,
      'network.latent=image',
      'network.blocks=1',
      'network.norm=batch',
      'network.head_hidden=32',
      'network.projector=1024,1024,1024',
      'network.predictor=256',
      'network.action_embedding=16',
      'gamma=0.988053892081',
      'value_prefix=true',
      'consistency_weight=5',
      'entropy_weight=0',
      'num_simulations=16',
      'max_considered=4',
      'wide_samples=0',
      'mixed_after=0.3',
      'fresh_fraction=0.05',
      'optimiser=sgd',
      'learning_rate=0.2',
      'decay_every=100000',
      'weight_decay=1e-4',
      'reanalyze_chunk=768',
      'final_simulations=16',
    ),
    source=_V2_CODE,
  ),
  'efficientzero_atari': Preset(
    summary='EfficientZero on Atari-100k, as in the paper',
    agent='efficientzero',
    env='Pong-v5',
    steps=100_000,
    settings=(*_ATARI_100K, *_ON_THE_HOST, 'reanalyze_chunk=704'),
    source=_EZ_TABLE,
  ),
  'efficientzero_atari_fast': Preset(
    summary='EfficientZero on Atari-100k as an accelerator wants it',
    agent='efficientzero',
    env='Pong-v5',
    steps=100_000,
    settings=(*_ATARI_100K, *_ON_A_CARD),
    source=_EZ_TABLE + ' and train.sh; frames and chunks are ours, by count',
  ),
  'muzero_atari': Preset(
    summary="MuZero Reanalyze on Atari-100k with EfficientZero's network",
    agent='muzero',
    env='Pong-v5',
    steps=100_000,
    settings=(
      *_ATARI_100K,
      *_ON_THE_HOST,
      'gamma=0.988',
      'learning_rate=0.2',
      'reanalyze_fraction=0.99',
      'reanalyze_chunk=759',
      'decay_every=100000',
    ),
    source=_EZ_TABLE + ', which compares with this MuZero',
  ),
  **offline.PRESETS,
  **language.PRESETS,
  **games.PRESETS,
}
DEFAULT = 'efficientzero_catch'


def find(name: str) -> Preset:
  """Finds a preset by its name.

  Raises:
    ValueError: the name is unknown; the message has similar names.
  """
  return PRESETS[_known('preset', name, tuple(PRESETS))]


def find_agent(name: str) -> str:
  """Checks that a name is an agent's, and returns it.

  Raises:
    ValueError: the name is unknown; the message has similar names.
  """
  return _known('agent', name, AGENTS)


def is_offline(agent: str) -> bool:
  """Whether an agent learns only from data sets or texts, never from play."""
  own = [preset for preset in PRESETS.values() if preset.agent == agent]
  return bool(own) and not any(preset.env for preset in own)


def _known(what: str, name: str, names: tuple[str, ...]) -> str:
  if name in names:
    return name
  near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
  hint = f'did you mean {" or ".join(near)}? ' if near else ''
  raise ValueError(f'{what}={name!r}: {hint}known are {", ".join(names)}')


def help_text() -> str:
  """The table as text, for `--help`."""
  width = max(map(len, PRESETS))
  rows = (f'  {n:{width}}  {p.summary}' for n, p in PRESETS.items())
  return '\n'.join(rows)
