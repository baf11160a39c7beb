"""Presets of agents that learn from data sets, and of SAC, which makes them.

Plain names have their papers' numbers; names that end in `_small` are for
observations of a few numbers on two CPU cores.
"""

from experiments.presets.settings import Preset

_RUN = (
  'batch_size=256',
  'log_every=1000',
  'checkpoint_every=25000',
  'evaluate_every=5000',
  'evaluate_episodes=10',
  'final_episodes=100',
)
_SMALL = (
  *_RUN,
  'hidden_sizes=64,64',
  'batch_size=128',
  'log_every=500',
  'checkpoint_every=5000',
  'evaluate_every=2000',
)
# Without a policy there are no evaluations by play.
_NO_POLICY = ('evaluate_every=0', 'final_episodes=0')
_OURS = 'ours, chosen on two CPU cores'


def _pair(agent, summary, source, small=(), steps=1_000_000, few=20_000):
  """A preset with the paper's numbers, and a small one."""
  return {
    agent: Preset(summary, agent, '', steps, _RUN, source),
    f'{agent}_small': Preset(
      f'{summary}, small networks', agent, '', few, (*_SMALL, *small), _OURS
    ),
  }


PRESETS = {
  **_pair(
    'atac',
    'ATAC: actor and critic play a Stackelberg game on a data set',
    'Cheng 2022, official code; as long as lightATAC trains',
    (
      'warm_start_updates=10000',
      # The paper has a thousand times as many updates.
      'slow_rate=5e-5',
      'beta=4',
      'reward_factor=0.1',
    ),
    steps=1_100_000,
    few=30_000,
  ),
  **_pair('bc', 'behaviour cloning on a data set', 'sizes and rates of SAC'),
  **_pair(
    'td3_bc',
    'TD3+BC on a data set',
    'Fujimoto and Gu 2021, Table 3',
    ('reward_factor=0.1',),
  ),
  **_pair(
    'cql',
    'CQL on a data set',
    'Kumar 2020, Appendix F',
    ('reward_factor=0.1', 'policy_rate=3e-4', 'temperature_rate=3e-4'),
  ),
  **_pair(
    'iql',
    'IQL on a data set',
    'Kostrikov 2021, Appendix B',
    ('reward_factor=0.1',),
  ),
  **_pair(
    'combo',
    'COMBO on a data set: a learned model imagines more of it',
    'Yu 2021, Appendix B',
    (
      'reward_factor=0.1',
      'policy_rate=3e-4',
      'temperature_rate=3e-4',
      'model.widths=64,64',
      'model.outcome_widths=64,64',
      'model_updates=5000',
      'rollout_batch=20',
      'model_capacity=50000',
    ),
    steps=1_100_000,
    few=25_000,
  ),
  'dynamics': Preset(
    summary='an ensemble of dynamics, learned from a data set, for planners',
    agent='dynamics',
    env='',
    steps=100_000,
    settings=(*_RUN, *_NO_POLICY),
    source="Yu 2020 and 2021: COMBO's model; the length is ours",
  ),
  'dynamics_small': Preset(
    summary='an ensemble of dynamics from a data set, small networks',
    agent='dynamics',
    env='',
    steps=10_000,
    settings=(
      *_RUN,
      *_NO_POLICY,
      'batch_size=128',
      'log_every=500',
      'checkpoint_every=5000',
      'reward_factor=0.1',
      'widths=64,64',
      'outcome_widths=64,64',
    ),
    source=_OURS,
  ),
  'sac_pendulum': Preset(
    summary="SAC swings up Gymnasium's pendulum",
    agent='sac',
    env='Pendulum-v1',
    steps=11_952,
    time_steps=12_000,
    settings=(
      *_SMALL,
      'env.num_envs=4',
      'replay_alpha=0',
      'replay_beta=0',
      'replay_capacity=12000',
      'warmup_decisions=500',
      'decisions_per_update=1',
    ),
    source=_OURS,
  ),
}
