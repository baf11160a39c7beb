"""The studies that consist of runs of one command: what they run."""

import functools
from typing import NamedTuple


class Run(NamedTuple):
  """One run of a study.

  Attributes:
    variant: its name within the study.
    seed: of the run.
    arguments: of `experiments.train`.
  """

  variant: str
  seed: int
  arguments: tuple[str, ...]


class Study(NamedTuple):
  """A table of runs.

  Attributes:
    runs: in the order in which they are run.
    cold: whether each run compiles everything itself, so that its wall time
      is that of a first run.
    curves: columns of metrics.csv that are kept for every run.
    beside: whether each variant is a task, drawn beside what Sampled MuZero
      did on it (`TASK_curves.csv`).
  """

  runs: tuple[Run, ...]
  cold: bool
  curves: tuple[str, ...]
  beside: bool = False


def _catch(seeds: int) -> Study:
  runs = [Run('efficientzero', s, ()) for s in range(seeds)]
  return Study(tuple(runs), True, ('decisions', 'episode_return'))


def _ablation(seeds: int) -> Study:
  """EfficientZero on Catch, one ingredient less each, and MuZero."""
  shared = (
    '--steps=5776',
    '--set=acting=synchronous',
    '--set=evaluate_every=100',
    '--set=evaluate_episodes=64',
    '--set=early_update=0',
    '--set=final_simulations=8',
  )
  variants = {
    'efficientzero': (),
    'minus_consistency': ('--set=consistency=false',),
    'minus_value_prefix': ('--set=value_prefix=false',),
    'minus_off_policy_correction': ('--set=off_policy_correction=false',),
    'minus_reanalyze': ('--set=reanalyze_fraction=0',),
    'muzero': ('--preset=muzero_catch',),
  }
  runs = [
    Run(name, seed, shared + arguments)
    for seed in range(seeds)
    for name, arguments in variants.items()
  ]
  return Study(tuple(runs), False, ('decisions', 'eval_return'))


def _catch_search(seeds: int) -> Study:
  """The same network with and without search, all through training."""
  arguments = (
    '--steps=4688',
    '--set=acting=synchronous',
    '--set=evaluate_every=100',
    '--set=evaluate_episodes=64',
    '--set=early_update=0',
    '--set=final_episodes=0',
  )
  runs = [Run('efficientzero', seed, arguments) for seed in range(seeds)]
  columns = ('decisions', 'eval_return', 'network_return')
  return Study(tuple(runs), False, columns)


def _atari(seeds: int) -> Study:
  """The paper's network and protocol, a few hundred smaller updates."""
  shared = (
    '--preset=efficientzero_atari',
    '--set=env.num_envs=4',
    '--set=warmup_decisions=400',
    '--set=decisions_per_update=4',
    '--set=extra_updates=0',
    '--set=batch_size=32',
    '--set=num_simulations=8',
    '--set=reanalyze_chunk=0',
    '--set=warmup_updates=100',
    '--set=target_period=50',
    '--set=log_every=10',
    '--set=checkpoint_every=100',
    '--set=evaluate_every=0',
    '--set=hold_out=32',
    '--set=env.options=max_episode_steps=3000',
    '--set=final_episodes=0',
  )
  # Decisions in 200 updates, whose 1,200 time steps hold lost lives, too.
  games = {'PongNoFrameskip-v4': 1196, 'BreakoutNoFrameskip-v4': 1163}
  runs = [
    Run(game, seed, (*shared, f'--env={game}', f'--steps={steps}'))
    for seed in range(seeds)
    for game, steps in games.items()
  ]
  losses = ('policy', 'value', 'reward', 'consistency')
  columns = [f'{when}loss_{x}' for when in ('', 'held_') for x in losses]
  return Study(tuple(runs), False, ('decisions', 'episode_return', *columns))


def _heads(preset: str, seeds: int) -> Study:
  """Sampled MuZero with each policy head and few or many sampled actions."""
  shared = (
    f'--preset={preset}',
    '--set=final_episodes=100',
    '--set=final_simulations=32',
  )
  runs = [
    Run(
      f'{head}_k{samples}',
      seed,
      (*shared, f'--set=policy={head}', f'--set=num_samples={samples}'),
    )
    for seed in range(seeds)
    for head in ('gaussian', 'factored')
    for samples in (20, 5)
  ]
  columns = ('decisions', 'eval_return', 'network_return', 'entropy')
  return Study(tuple(runs), False, columns)


def _samples(seeds: int) -> Study:
  """How many of 51 torques need be sampled; all of them at the end."""
  shared = (
    '--preset=sampled_muzero_pendulum',
    '--steps=9792',
    '--set=env.action_bins=51',
    '--set=policy=flat',
    '--set=final_episodes=100',
    '--set=final_simulations=32',
  )
  variants: dict[str, tuple[str, ...]] = {
    f'k{samples}': (f'--set=num_samples={samples}',)
    for samples in (2, 5, 10, 20, 50)
  }
  variants['all'] = ('--set=num_samples=51', '--set=replacement=false')
  runs = [
    Run(name, seed, (*shared, *arguments))
    for seed in range(seeds)
    for name, arguments in variants.items()
  ]
  columns = ('decisions', 'eval_return', 'network_return', 'entropy')
  return Study(tuple(runs), False, columns)


def _sac(seeds: int) -> Study:
  """SAC on the three tasks of Sampled MuZero's study, as many decisions."""
  shared = (
    '--preset=sac_pendulum',
    '--set=evaluate_every=500',
    '--set=evaluate_episodes=20',
  )
  control = (
    '--steps=19852',
    '--set=env.options=action_repeat=8',
    '--set=gamma=0.98',
    '--set=replay_capacity=20000',
    '--set=warmup_decisions=1000',
  )
  tasks = {
    'pendulum': (
      '--env=jax:pendulum',
      '--steps=11764',
      '--set=env.options=action_repeat=4',
      '--set=gamma=0.97',
    ),
    'swingup': ('--env=CartpoleSwingup-v1', *control),
    'ball_in_cup': ('--env=BallInCupCatch-v1', *control),
  }
  runs = [
    Run(task, seed, (*shared, *arguments))
    for seed in range(seeds)
    for task, arguments in tasks.items()
  ]
  return Study(tuple(runs), False, ('decisions', 'eval_return'), beside=True)


_MIXTURE = ('perplexity', 'held_perplexity', 'cv_importance', 'cv_load')


def _experts(seeds: int) -> Study:
  """Perplexity at about equal active operations (Shazeer 2017, Table 7)."""
  shared = ('--preset=moe_language_small', '--text=data/gcide.txt')
  expert = 'network.moe.'
  variants = {
    'dense': ('network.layer=dense',),
    'moe_32': (),
    'deep': ('network.layer=deep',),
    'lstm': ('network.layer=lstm',),
    'moe_4': (f'{expert}num_experts=4',),
    'moe_128': (f'{expert}num_experts=128',),
    # Two of two levels are four experts, each half as wide.
    'moe_256_h': (
      f'{expert}num_experts=256',
      f'{expert}groups=16',
      f'{expert}hidden=128',
    ),
    'moe_32_twice': ('network.num_layers_moe=2',),
  }
  first = ('dense', 'moe_32')
  order = [(n, s) for s in range(seeds) for n in first]
  order += [(n, s) for s in range(seeds) for n in variants if n not in first]
  runs = [
    Run(name, seed, (*shared, *(f'--set={x}' for x in variants[name])))
    for name, seed in order
  ]
  return Study(tuple(runs), False, (*_MIXTURE, 'max_over_mean_load'))


def _connect_four(seeds: int) -> Study:
  """AlphaZero's networks, for `studies.connect_four_players` to play with."""
  arguments = ('--preset=alphazero_connect_four',)
  runs = [Run('connect_four', seed, arguments) for seed in range(seeds)]
  return Study(tuple(runs), False, ('decisions', 'eval_return'))


def _othello(seeds: int) -> Study:
  """Sampled AlphaZero by K at equal simulations (Hubert 2021, on Go)."""
  shared = ('--preset=alphazero_othello', '--steps=294650')
  runs = [
    Run(f'k{k}', seed, (*shared, f'--set=num_samples={k}'))
    for seed in range(seeds)
    for k in (65, 4, 16, 8, 32)
  ]
  return Study(tuple(runs), False, ('decisions', 'eval_return'))


def _backgammon(seeds: int) -> Study:
  """TD-Gammon's networks, for `studies.backgammon_players` to play with."""
  runs = [
    Run(
      f'hidden_{units}', seed, ('--preset=td_gammon', f'--set=hidden={units}')
    )
    for units in (40, 80)
    for seed in range(seeds)
  ]
  return Study(tuple(runs), False, ('decisions', 'loss', 'win'))


def _balance(seeds: int) -> Study:
  """Balance losses on and off (Shazeer 2017, Table 6), and experts' fight."""
  shared = (
    '--preset=moe_language_small',
    '--text=data/gcide.txt',
    '--steps=400',
    '--set=log_experts=true',
  )
  expert = 'network.moe.'
  pairs = ((0, 0), (0.2, 0), (0, 0.2), (0.1, 0.1), (0.01, 0.01), (1, 1))
  variants = {
    f'importance_{i}_load_{j}': (
      f'{expert}importance_weight={i}',
      f'{expert}load_weight={j}',
    )
    for i, j in pairs
  }
  variants |= {
    'balanced': (f'{expert}router=balanced',),
    'biased': (f'{expert}router=biased_top_k',),
    'pruned': (
      f'{expert}importance_weight=0',
      f'{expert}load_weight=0',
      f'{expert}prune_below=0.1',
    ),
  }
  runs = [
    Run(name, seed, (*shared, *(f'--set={x}' for x in settings)))
    for seed in range(seeds)
    for name, settings in variants.items()
  ]
  return Study(tuple(runs), False, (*_MIXTURE, 'max_over_mean_load'))


STUDIES = {
  'catch': (_catch, 10),
  'catch_search': (_catch_search, 10),
  'catch_ablation': (_ablation, 5),
  'atari': (_atari, 1),
  'pendulum': (functools.partial(_heads, 'sampled_muzero_pendulum'), 5),
  'swingup': (functools.partial(_heads, 'sampled_muzero_swingup'), 5),
  'ball_in_cup': (functools.partial(_heads, 'sampled_muzero_ball_in_cup'), 5),
  'samples': (_samples, 3),
  'sac': (_sac, 5),
  'connect_four': (_connect_four, 3),
  'othello': (_othello, 2),
  'backgammon': (_backgammon, 3),
  'moe_experts': (_experts, 3),
  'moe_balance': (_balance, 3),
}
