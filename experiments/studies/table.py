"""The studies that consist of runs of one command: what they run."""

import functools
from collections.abc import Mapping
from typing import NamedTuple


class Run(NamedTuple):
  """One run of a study, with `arguments` of `experiments.train`."""

  variant: str
  seed: int
  arguments: tuple[str, ...]


class Study(NamedTuple):
  """A table of runs.

  Attributes:
    runs: in the order in which they are run.
    curves: columns of metrics.csv that are kept for every run.
    cold: whether each run compiles everything itself, so that its wall time is
      that of a first run.
    with_muzero: whether each variant is a task, drawn together with Sampled
      MuZero's curves on it (`TASK_curves.csv`).
  """

  runs: tuple[Run, ...]
  curves: tuple[str, ...]
  cold: bool = False
  with_muzero: bool = False


def _runs(
  seeds: int,
  variants: Mapping[str, tuple[str, ...]],
  shared: tuple[str, ...] = (),
) -> tuple[Run, ...]:
  """All variants of the first seed, then of the second, and so on."""
  return tuple(
    Run(name, seed, (*shared, *arguments))
    for seed in range(seeds)
    for name, arguments in variants.items()
  )


def _set(*settings: str) -> tuple[str, ...]:
  """Settings as flags."""
  return tuple(f'--set={setting}' for setting in settings)


_RETURN = ('decisions', 'eval_return')
_BOTH = (*_RETURN, 'network_return')
_POLICY = (*_BOTH, 'entropy')
_MIXTURE = (
  *('perplexity', 'held_perplexity', 'cv_importance', 'cv_load'),
  'max_over_mean_load',
)
_WATCHED = (
  'acting=synchronous',
  'evaluate_every=100',
  'evaluate_episodes=64',
  'early_update=0',
)
_FINAL = ('final_episodes=100', 'final_simulations=32')


def _catch(seeds: int) -> Study:
  """EfficientZero on Catch, timed from a cold start."""
  runs = _runs(seeds, {'efficientzero': ()})
  return Study(runs, ('decisions', 'episode_return'), cold=True)


def _ablation(seeds: int) -> Study:
  """EfficientZero on Catch, each time without one ingredient, and MuZero."""
  shared = ('--steps=5776', *_set(*_WATCHED, 'final_simulations=8'))
  variants = {
    'efficientzero': (),
    'minus_consistency': _set('consistency=false'),
    'minus_value_prefix': _set('value_prefix=false'),
    'minus_dynamic_horizon': _set('dynamic_horizon=false'),
    'minus_searched_values': _set('searched_values=false'),
    'minus_off_policy_correction': _set(
      'dynamic_horizon=false', 'searched_values=false'
    ),
    'minus_reanalyze': _set('reanalyze_fraction=0'),
    'muzero': ('--preset=muzero_catch',),
  }
  return Study(_runs(seeds, variants, shared), _RETURN)


def _catch_search(seeds: int) -> Study:
  """The same network with and without search, all through training."""
  arguments = ('--steps=4688', *_set(*_WATCHED, 'final_episodes=0'))
  return Study(_runs(seeds, {'efficientzero': arguments}), _BOTH)


def _atari(seeds: int) -> Study:
  """The paper's network and protocol, a few hundred smaller updates."""
  shared = (
    '--preset=efficientzero_atari',
    *_set(
      'env.num_envs=4',
      'warmup_decisions=400',
      'decisions_per_update=4',
      'extra_updates=0',
      'batch_size=32',
      'num_simulations=8',
      'reanalyze_chunk=0',
      'warmup_updates=100',
      'target_period=50',
      'log_every=10',
      'checkpoint_every=100',
      'evaluate_every=0',
      'hold_out=32',
      'env.options=max_episode_steps=3000',
      'final_episodes=0',
    ),
  )
  # Decisions in 200 updates, whose 1,200 time steps hold lost lives, too.
  games = {'PongNoFrameskip-v4': 1196, 'BreakoutNoFrameskip-v4': 1163}
  variants = {n: (f'--env={n}', f'--steps={s}') for n, s in games.items()}
  losses = ('policy', 'value', 'reward', 'consistency')
  columns = [f'{when}loss_{x}' for when in ('', 'held_') for x in losses]
  curves = ('decisions', 'episode_return', *columns)
  return Study(_runs(seeds, variants, shared), curves)


def _heads(preset: str, seeds: int) -> Study:
  """Sampled MuZero with each policy head and few or many sampled actions."""
  variants = {
    f'{head}_k{samples}': _set(f'policy={head}', f'num_samples={samples}')
    for head in ('gaussian', 'factored')
    for samples in (20, 5)
  }
  shared = (f'--preset={preset}', *_set(*_FINAL))
  return Study(_runs(seeds, variants, shared), _POLICY)


def _samples(seeds: int) -> Study:
  """How many of 51 torques need to be sampled; the last variant takes all."""
  shared = (
    '--preset=sampled_muzero_pendulum',
    '--steps=9792',
    *_set('env.action_bins=51', 'policy=flat', *_FINAL),
  )
  variants = {f'k{k}': _set(f'num_samples={k}') for k in (2, 5, 10, 20, 50)}
  variants['all'] = _set('num_samples=51', 'replacement=false')
  return Study(_runs(seeds, variants, shared), _POLICY)


def _v2(seeds: int) -> Study:
  """EfficientZero V2 and what the suite had before, on three tasks."""
  catch = ('--steps=5776', *_set(*_WATCHED, 'final_simulations=8'))
  pendulum = ('--preset=efficientzero_v2_pendulum', *_set(*_FINAL))
  variants = {
    'catch_v2': ('--preset=efficientzero_v2_catch', *catch),
    'catch_efficientzero': ('--preset=efficientzero_catch', *catch),
    'pendulum_v2': pendulum,
    'pendulum_v2_returns': (*pendulum, *_set('mixed_after=1')),
    'pendulum_v2_narrow': (*pendulum, *_set('wide_temperature=1')),
    'pendulum_sampled': ('--preset=sampled_muzero_pendulum', *_set(*_FINAL)),
    'swingup_v2': ('--preset=efficientzero_v2_swingup', *_set(*_FINAL)),
    'swingup_sampled': ('--preset=sampled_muzero_swingup', *_set(*_FINAL)),
  }
  return Study(_runs(seeds, variants), (*_BOTH, 'latent_cosine', 'latent_rank'))


def _sac(seeds: int) -> Study:
  """SAC on the three tasks of Sampled MuZero's study, as many decisions."""
  shared = (
    '--preset=sac_pendulum',
    *_set('evaluate_every=500', 'evaluate_episodes=20'),
  )
  control = (
    '--steps=19852',
    *_set(
      'env.options=action_repeat=8',
      'gamma=0.98',
      'replay_capacity=20000',
      'warmup_decisions=1000',
    ),
  )
  tasks = {
    'pendulum': (
      '--env=jax:pendulum',
      '--steps=11764',
      *_set('env.options=action_repeat=4', 'gamma=0.97'),
    ),
    'swingup': ('--env=CartpoleSwingup-v1', *control),
    'ball_in_cup': ('--env=BallInCupCatch-v1', *control),
  }
  return Study(_runs(seeds, tasks, shared), _RETURN, with_muzero=True)


_EXPERT = 'network.moe.'


def _experts(seeds: int) -> Study:
  """Perplexity at about equal active operations (Shazeer 2017, Table 7)."""
  shared = ('--preset=moe_language_small', '--text=data/gcide.txt')
  first = {'dense': _set('network.layer=dense'), 'moe_32': ()}
  others = {
    'deep': _set('network.layer=deep'),
    'lstm': _set('network.layer=lstm'),
    'moe_4': _set(f'{_EXPERT}num_experts=4'),
    'moe_128': _set(f'{_EXPERT}num_experts=128'),
    # Two of two levels are four experts, each half as wide.
    'moe_256_h': _set(
      f'{_EXPERT}num_experts=256', f'{_EXPERT}groups=16', f'{_EXPERT}hidden=128'
    ),
    'moe_32_twice': _set('network.num_layers_moe=2'),
  }
  runs = _runs(seeds, first, shared) + _runs(seeds, others, shared)
  return Study(runs, _MIXTURE)


def _connect_four(seeds: int) -> Study:
  """AlphaZero's networks, for `studies.connect_four_players` to play with."""
  variants = {'connect_four': ('--preset=alphazero_connect_four',)}
  return Study(_runs(seeds, variants), _RETURN)


def _othello(seeds: int) -> Study:
  """Sampled AlphaZero by K at equal simulations (Hubert 2021, on Go)."""
  shared = ('--preset=alphazero_othello', '--steps=294650')
  variants = {f'k{k}': _set(f'num_samples={k}') for k in (65, 4, 16, 8, 32)}
  return Study(_runs(seeds, variants, shared), _RETURN)


def _backgammon(seeds: int) -> Study:
  """TD-Gammon's networks, for `studies.backgammon_players` to play with."""
  runs = [
    Run(f'hidden_{n}', seed, ('--preset=td_gammon', *_set(f'hidden={n}')))
    for n in (40, 80)
    for seed in range(seeds)
  ]
  return Study(tuple(runs), ('decisions', 'loss', 'win'))


def _balance(seeds: int) -> Study:
  """Balance losses on and off (Shazeer 2017, Table 6), and other remedies."""
  shared = (
    '--preset=moe_language_small',
    '--text=data/gcide.txt',
    '--steps=400',
    *_set('log_experts=true'),
  )
  weights = lambda importance, load: _set(
    f'{_EXPERT}importance_weight={importance}', f'{_EXPERT}load_weight={load}'
  )
  pairs = ((0, 0), (0.2, 0), (0, 0.2), (0.1, 0.1), (0.01, 0.01), (1, 1))
  variants = {f'importance_{i}_load_{j}': weights(i, j) for i, j in pairs}
  variants |= {
    'balanced': _set(f'{_EXPERT}router=balanced'),
    'biased': _set(f'{_EXPERT}router=biased_top_k'),
    'pruned': (*weights(0, 0), *_set(f'{_EXPERT}prune_below=0.1')),
  }
  return Study(_runs(seeds, variants, shared), _MIXTURE)


STUDIES = {
  'catch': (_catch, 10),
  'catch_search': (_catch_search, 10),
  'catch_ablation': (_ablation, 5),
  'atari': (_atari, 1),
  'pendulum': (functools.partial(_heads, 'sampled_muzero_pendulum'), 5),
  'swingup': (functools.partial(_heads, 'sampled_muzero_swingup'), 5),
  'ball_in_cup': (functools.partial(_heads, 'sampled_muzero_ball_in_cup'), 5),
  'samples': (_samples, 3),
  'efficientzero_v2': (_v2, 5),
  'sac': (_sac, 5),
  'connect_four': (_connect_four, 3),
  'othello': (_othello, 2),
  'backgammon': (_backgammon, 3),
  'moe_experts': (_experts, 3),
  'moe_balance': (_balance, 3),
}
