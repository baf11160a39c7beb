"""Values that a flag can be given and no launcher can mean, made by rules.

`by_type` gives what a flag of a type refuses before its launcher looks at it;
`places` and `settings` what launchers refuse, `ROWS` what goes wrong between
flags. A launcher must say each in one line, and begin nothing.
"""

import random
import unicodedata

DIGITS = [
  chr(c) for c in range(0x600, 0x1000) if unicodedata.decimal(chr(c), -1) > 0
]


def huge(rng):
  """A whole number beyond 64 bits, or just there."""
  return str(
    rng.choice([2**63, 2**64, 10 ** rng.randint(19, 60)]) + rng.randint(0, 9)
  )


def overflown(rng):
  """A number that is infinite once it is read."""
  return f'{rng.randint(1, 9)}e{rng.randint(309, 4000)}'


def foreign(rng):
  """A whole number in the digits of another script."""
  return ''.join(rng.choices(DIGITS, k=rng.randint(1, 3)))


def binary(rng):
  """Text with what no path may hold and no terminal shows."""
  bad = rng.choice(['\0', '\udc80', '\udcff'])
  return f'a{bad}{rng.randint(0, 9)}'


def unclosed(rng):
  """A value of an option that is no literal."""
  return rng.choice('([{"\'') + rng.choice(['', '1', "x, 'y", '(1, 2'])


def by_type(flag, seed=0):
  """Texts that a flag must refuse by its type, and what says so.

  Args:
    flag: of absl.
    seed: of the values.

  Returns:
    Dict of a text and what its message must hold.
  """
  rng = random.Random(f'{flag.name}{seed}')
  kind = flag.flag_type()
  if flag.boolean or kind == 'string enum':
    return {overflown(rng): 'must be '}
  if kind in ('int', 'float'):
    found = {foreign(rng): 'must be in the digits', '': 'must be '}
    found |= {overflown(rng): 'must be ', '-' + huge(rng): 'must be '}
    return found | ({huge(rng): 'must be '} if kind == 'int' else {})
  found = {binary(rng): 'must', ' ' * rng.randint(1, 3): 'is empty'}
  if kind == 'comma separated list of strings':
    found |= {'a,,b': 'has an empty item', 'a,': 'has an empty item'}
  return found if 'multi' not in kind else {binary(rng): 'must'}


# What a launcher cannot do without.
NEEDS = {
  'study equity': '--workdir=backgammon',
  'play': '--workdir=catch',
  'plots': '--workdirs=catch',
  'study specialisation': '--workdir=catch',
  'study offline': '--study=betas',
  'sweep': '--workdir=new',
}
# Flags that name where to write, whether that is a folder, and what else the
# command needs.
PLACES = {
  'train --workdir': True,
  'sweep --workdir': True,
  'collect --out': True,
  'study newton --out': True,
  'notebook compose --out': True,
  'study sampling_operators --out': True,
  'benchmark --out': False,
  'corpus --out': False,
  'play --workdir=pendulum --players=actor --out': False,
  'study control --folder': True,
  'study control --results': True,
  'study equity --workdir=backgammon --out': False,
  'play --workdir=catch --out': False,
  'study connect_four_positions --out': False,
  'study pruning --results': True,
  'study catch --folder': True,
  'study catch --results': True,
  'study connect_four_players --results': True,
  'study backgammon_players --results': True,
  'study offline --study=betas --folder': True,
  'study offline --study=betas --results': True,
}


def places(flag, seed=0):
  """Places where a command must not be asked to write.

  Args:
    flag: a key of `PLACES`.
    seed: of the values.

  Returns:
    Dict of a text and what its message must hold.
  """
  rng = random.Random(f'{flag}{seed}')
  name = rng.choice('xyz')
  kernel = rng.choice(['/proc', '/sys', '/dev', '/proc/self', '/sys/fs'])
  control = rng.choice('\n\t\x1b\x07\u202e')
  found = {
    f'{kernel}/{name}': 'belongs to the kernel',
    f'a{control}{name}': 'cannot be printed',
    rng.randint(256, 999) * name: 'name',
    '/dev/null': 'a file',
  }
  return found | {'/': 'root of all folders' if PLACES[flag] else 'a folder'}


def settings(seed=0):
  """Fields of `--set` with values that no run can have, and what says so."""
  rng = random.Random(seed)
  found = {}
  for field in ('batch_size', 'env.num_envs', 'num_simulations', 'log_every'):
    for make in (huge, overflown, foreign):
      found[f'{field}={make(rng)}'] = 'must be '
  for field in ('learning_rate', 'gamma', 'replay_alpha'):
    for make in (overflown, foreign):
      found[f'{field}={make(rng)}'] = 'must be float'
  for _ in range(8):
    found[f'env.options={rng.choice("abc")}={unclosed(rng)}'] = 'must be '
  for tuple_ in (',1', '1,,2', '(1,2', '1,2]', '[1,(2]', '1e400,2'):
    found[f'final_simulations={tuple_}'] = 'must be int,int'
  return found


ROWS = {
  # What memory cannot hold, from shapes.
  'train --set=replay_capacity=1e12': (
    'replay_capacity=1000000000000: takes ... TB of memory at least, this '
    'machine has ... take at most'
  ),
  'train --set=replay_capacity=1e12 --env=jax:catch --preset=muzero_catch': (
    'replay_capacity=1000000000000: takes ... of memory at least'
  ),
  'train --set=batch_size=2e9 --env=jax:catch --preset=muzero_catch': (
    'batch_size=2000000000: takes ... of memory at least'
  ),
  'train --preset=combo --dataset=data.npz --set=model_capacity=1e13': (
    'model_capacity=10000000000000: takes ... of memory at least'
  ),
  'train --preset=bc --dataset=data.npz --set=hidden_sizes=1000000,1000000': (
    'network=bc, whose largest array is 1000000 x 1000000: takes'
  ),
  'train --set=num_simulations=1e9 --env=jax:catch --preset=muzero_catch': (
    'num_simulations=1000000000: takes ... of memory at least'
  ),
  'train --set=final_simulations=4,2e9 --env=jax:catch --preset=muzero_catch': (
    'final_simulations=2000000000: takes'
  ),
  'sweep --workdir=new --preset=bc --dataset=data.npz --metric=loss_policy '
  '--max_rows=100000 --seeds=100000 --set=hidden_sizes=512,512': (
    'seeds=100000: takes ... of memory at least ... take at most'
  ),
  # Counts that nothing can hold.
  'train --steps=9223372036854775808': 'flag --steps=9223372036854775808: must',
  'train --steps=2000000000 --set=decisions_per_update=0.01': (
    'steps=2000000000: makes ... updates, must be at most 2147483647'
  ),
  'train --set=num_simulations=3e9': 'num_simulations=3000000000: must be at m',
  'train --set=env.num_threads=9999': 'num_threads=9999 must be from 0 to',
  'sweep --workdir=new --seeds=100001': 'flag --seeds=100001: must be an integ',
  'sweep --workdir=new --grid=gamma=0.1,0.2 --seeds=100000': (
    'seeds=100000: makes 200000 rows, must be at most 100000'
  ),
  'play --workdir=catch --simulations=99999999999': 'simulations=99999999999:',
  'play --workdir=board --players=lookahead=99': 'lookahead must be at most 10',
  'play --workdir=board --players=puct=99999999999': 'puct must be at most',
  'play --workdir=board --players=lookahead=1+rollout=999999999': (
    'rollout must be at most'
  ),
  'play --workdir=pendulum --players=lookahead=11': 'lookahead must be at ',
  'play --workdir=pendulum --players=lookahead=1+rollout=9999999': (
    'rollout must be at most 100000'
  ),
  'train --preset=bc --dataset=/': 'dataset=/: is a folder of more than',
  'launch --grace=inf': 'flag --grace=inf: must be a number in the range',
  'launch --grace=1e400': 'flag --grace=1e400: must be a number in the range',
  'launch --processes=99999999': 'flag --processes=99999999: must be an',
  # Options of environments.
  'train --set=env.options=num_envs=4': 'env.options=num_envs=4: is not an opt',
  'train --set=env.options=max_episode_steps=3,max_episode_steps=4': (
    'env.options=max_episode_steps=4: max_episode_steps is given twice'
  ),
  'train --set=env.options==4': 'env.options==4: should be name=value',
  'train --set=env.options=max_episode_steps=1e400': 'must be a finite number',
  'train --set=env.options=max_episode_steps=foo()': 'must be a Python literal',
  'train --set=env.options=max_episode_steps=99999999999': 'a 32-bit integer',
  'train --set=env.options=rows=x --env=jax:catch --preset=muzero_catch': (
    'env.options=rows=x: must be of type int, such as 10'
  ),
  # A metric that no row has.
  'sweep --workdir=new --preset=bc --dataset=data.npz --metric=squared_eror': (
    'metric=squared_eror: no row will have it; there are ... did you mean '
    'squared_error?'
  ),
  'sweep --workdir=new --preset=td_gammon --metric=zzz': 'metric=zzz: no row w',
  # Flags of another kind of run.
  'sweep --workdir=new --at_once=3 --preset=muzero_catch --env=jax:catch': (
    'flag --at_once=3: has no effect with engine vmap; leave it out'
  ),
  'sweep --workdir=new --row_cpus=3': 'flag --row_cpus=3.0: has no effect with',
  'sweep --workdir=new --max_rows=3': 'flag --max_rows=3: has no effect with e',
  'sweep --workdir=new --sweep_seed=3': 'flag --sweep_seed=3: has no effect wi',
  'play --workdir=catch --tokens=3': 'flag --tokens=3: has no effect without a',
  'play --workdir=catch --temperature=0.5': 'flag --temperature=0.5: has no ef',
  'play --workdir=catch --openings=3': 'flag --openings=3: has no effect witho',
  'play --workdir=catch --nobegin': 'flag --begin=false: has no effect without',
  'play --workdir=catch --frames=3': 'flag --frames=3: has no effect without -',
  'play --workdir=catch --record=x.gif --episodes=3': (
    'flag --episodes=3: has no effect with --record; leave it out'
  ),
  'play --workdir=board --human --episodes=3': (
    'flag --episodes=3: has no effect with --human; leave it out'
  ),
  'play --workdir=board --human --players=network,random': (
    'flag --players=network,random: has no effect beyond the first with --human'
  ),
  'play --workdir=board --players=network --simulations=3': (
    'flag --simulations=3: has no effect with --players and --opponents'
  ),
  'play --workdir=pendulum --candidates=3': (
    'flag --candidates=3: has no effect wi'
  ),
  # Settings of another kind of run.
  'train --preset=bc --dataset=data.npz --set=replay_alpha=0.5': (
    'replay_alpha=0.5: a run on data does not act and has no replay; leave it '
  ),
  'train --set=run.reward_factor=2 --env=jax:catch --preset=muzero_catch': (
    'run.reward_factor=2: needs a data set (--dataset); leave it out'
  ),
  'train --preset=td_gammon --set=replay_capacity=5000': (
    'replay_capacity=5000: this agent learns from fresh steps'
  ),
  'sweep --workdir=new --preset=bc --dataset=data.npz --metric=loss_policy '
  '--grid=queue_size=1,2': (
    'queue_size=1: a run on data does not act and has no replay; leave it out'
  ),
  'play --workdir=catch --num_envs=1000000': (
    'num_envs=1000000: exceeds the number of episodes; must be at most 100'
  ),
  'collect --env=Humanoid-v4 --out=new --transitions=99999999': (
    'transitions=99999999: takes ... of memory at least'
  ),
  'benchmark --seeds=3': 'flag --seeds=3: has no effect without --suite=scale',
  'benchmark --suite=compile': 'target=: name at least one, such as h100 or v',
  'benchmark --suite=compile --target=h200': 'target=h200: must be h100, h100:',
  'benchmark --suite=compile,search --target=cpu': (
    'suite=compile: writes a CSV with other columns; run it without '
    'other suites'
  ),
  'benchmark --suite=compile --target=cpu --programs=acts': (
    'programs=acts: must be one of init, act, frames, update, refresh, interval'
  ),
  'benchmark --suite=compile --target=cpu --preset=bd': (
    "preset='bd': did you mean bc?"
  ),
  'benchmark --suite=compile --target=cpu --quick': (
    'flag --quick=true: has no effect on this suite; leave it out'
  ),
  'benchmark --suite=experts --preset=bc': 'flag --preset=bc: has no effect on',
  'study atac_game --datasets=0 --sizes=30': (
    'flag --sizes=30: has no effect with --datas'
  ),
  'notebook compose --check --tiny': 'flag --tiny=true: has no effect with --c',
  'train --show --workdir=x': 'flag --workdir=x: has no effect with --show',
  'train --show --plan': 'flag --plan=true: has no effect with --show',
  'train --plan --profile=3': 'flag --profile=3: has no effect with --plan',
  'train --plan --target=cpu --workdir=x': (
    'flag --workdir=x: has no effect with --target'
  ),
  # absl's own flags.
  'train --flagfile=none': 'flag --flagfile=none: no such file or directory',
  'train --flagfile=/dev/zero': '/dev/zero: is a device, must be a file',
  'train --noshow=3': '--noshow=3 does not take an argument',
  'train --seed': 'Missing value for flag --seed',
}  # fmt: skip
