"""What commands refuse, and what they say then."""

# A command, and the pieces of its message in their order.
TABLE = {
  f'train --workdir={300 * "x"}': 'workdir=xxx ... name too long; take another',
  # Machines to compile for.
  'benchmark --target=h100': '--target=h100: has no effect without --suite=com',
  'benchmark --programs=act': '--programs=act: has no effect without --suite=c',
  'benchmark --compilers=x': '--compilers=x: has no effect without --suite=com',
  'train --target=h100': '--target=h100: has no effect without --plan; leave',
  'train --plan --target=h9': 'target=h9: must be h100, h100:8, v5e:4x4',
  # Names.
  'train --preset=muzero_catsh': "preset='muzero_catsh': did you mean muzero",
  'train --env=Cach-v0': "env='Cach-v0': unknown to envpool; nearest: Catch-v",
  'train --env=gymnasium:Cart': "env='gymnasium:Cart': ... must be in gym",
  'train --env=jax:cach': "env='jax:cach': unknown; must ... did you mean jax:",
  'train --env=self_play:go': 'env=self_play:go: unknown; ... go_9x9',
  'train --env=brax:ant': "env='brax:ant': the part before ... must be jax",
  'sweep --workdir=new --preset=zzz': "preset='zzz': known are ... muzero",
  'sweep --workdir=new --env=zzz': "env='zzz': unknown to envpool; nearest",
  'benchmark --preset=zzz': "preset='zzz': known are",
  'benchmark --suite=search,zzz': 'suite=zzz: must be one of search, ',
  'benchmark --what=zzz': 'suite=zzz: must be one of search, ',
  'collect --env=zzz': "env='zzz': unknown to envpool; nearest",
  # Settings.
  'train --set=zzz': '--set=zzz: should be field=value',
  'train --set=learning_rat=1': 'no field learning_rat: did you mean learning',
  'train --set=learning_rate=fast': "learning_rate is 'fast', must be float",
  'train --set=gamma=2': '--set=gamma=2: gamma=2.0: must be within [0, 1]',
  'train --set=momentum=-1': 'momentum=-1.0: must be within [0, 1]',
  'train --set=name=x': 'no field name: ',
  'train --set=network.mixture=torso --set=limit=2': (
    'no field limit: it needs router=balanced'
  ),
  'train --set=router=balanced': (
    'router=balanced: there is no mixture of experts; set network.mixture='
  ),
  'train --preset=atac_small --dataset=data.npz --set=router.k=1': (
    'router.k=1: there is no mixture of experts; set critic_moe.num_experts='
  ),
  'train --set=env.options=zzz': 'env.options=zzz: should be name=value',
  'train --set=env.options=zzz=1 --env=jax:catch': (
    'env.options=zzz=1: unknown; jax:catch has rows, columns'
  ),
  'train --set=frame_stack=3 --env=jax:catch': 'frame_stack=3: ... leave it ou',
  'train --steps=300': 'steps=300: must be above warmup_decisions=400',
  'train --set=warmup_decisions=9': 'warmup_decisions=9: must be at least 192',
  'train --set=replay_capacity=9': 'replay_capacity=9: must be at least 192',
  'sweep --workdir=new --share=2/2': 'share=2/2: must be I/N with I from 0 to ',
  'sweep --workdir=new --halving_first=5': 'halving_first=5: has no effect',
  'sweep --workdir=new --halving=1': 'halving=1: must be 0 or at least 2',
  'sweep --workdir=new --halving=2 --engine=vmap --env=jax:catch': (
    'halving=2: the rows of one program end together; take --engine=processes'
  ),
  'sweep --workdir=new --halving=2 --set=evaluate_every=0': (
    'halving=2: eval_return is not measured while a row trains; give --set='
  ),
  'sweep --workdir=new --halving=2 --halving_first=99999 --metric=loss': (
    'halving_first=99999: must be below the '
  ),
  'sweep --workdir=new --row_gb=2 --env=jax:catch': (
    'row_gb=2.0: the rows of one program run together; take --engine=process'
  ),
  'sweep --workdir=new --row_minutes=0': 'row_minutes=0: must be',
  'sweep --workdir=new --status': "workdir=new: is not a sweep's folder",
  'sweep --workdir=new --set=zzz': '--set=zzz: should be field=value',
  'benchmark --set=zzz': '--set=zzz: should be field=value',
  'collect --set=updates=inf': 'updates=inf: ... must be a whole number',
  'collect --set=zzz=1': 'no field zzz: fields are',
  'notebook zzz': 'notebook zzz: unknown; must be one of',
  'notebook compose --set=zzz': '--set=zzz: should be PARAMETER=value',
  'notebook compose --set=zzz=1': '--set=zzz=1: unknown parameter; must be',
  # What does not go together.
  'train --agent=alphazero --set=td_steps=9': (
    'alphazero needs exact rules, and Catch-v0 has none: take env=self_play:'
  ),
  'train --preset=td_gammon --env=jax:catch': 'td_gammon ... backgammon',
  'train --preset=td_gammon --env=Catch-v0': 'td_gammon ... backgammon',
  'train --agent=cql': 'dataset: cql learns from a data set: --dataset=PATH',
  'train --agent=language': 'text: language learns from a text: --text=PATH',
  'train --dataset=data.npz': 'dataset=data.npz: efficientzero learns from win',
  'train --preset=td_gammon --dataset=data.npz': (
    'dataset=data.npz: td_gammon learns from fresh steps'
  ),
  'train --text=text.txt': 'text=text.txt: efficientzero does not learn from a',
  'train --text=text.txt --dataset=data.npz': (
    'text=text.txt: --dataset is given, too; take one'
  ),
  'sweep --workdir=new --text=text.txt': 'text=text.txt: efficientzero does',
  'train --preset=bc --dataset=data.npz --env=Hopper-v4': (
    'env=Hopper-v4: its observation has shape ((11,),), but data has ((3,),)'
  ),
  'train --preset=bc --dataset=data.npz --set=hold_out=8': (
    'hold_out=8: needs a run that acts; set it to 0'
  ),
  'train --preset=sac_pendulum --set=critic_moe.num_experts=4': (
    'no field critic_moe.num_experts: did you mean'
  ),
  'train --agent=sampled_muzero --env=jax:catch': (
    'policy=gaussian: Catch has 3 discrete actions; use flat'
  ),
  'train --set=network.mixture=dynamics --set=moe.router=expert_choice': (
    'expert_choice'
  ),
  'collect --env=CartPole-v1': 'continuous actions; CartPole-v1 has ... take a',
  'collect --steps=9': 'steps=9: must be more than warmup=1000',
  'sweep --workdir=new --engine=vmap': (
    'engine=vmap: Catch-v0 is not a pure-JAX environment; use processes'
  ),
  'sweep --workdir=new --preset=bc --dataset=data.npz --metric=eval_return': (
    'metric=eval_return: data.npz has no simulator to play in; take loss'
  ),
  # Sweeps.
  'sweep --workdir=new --grid=zzz': '--grid=zzz: should be field=value,value',
  'sweep --workdir=new --grid=gamma=,': '--grid=gamma=,: should be field=value',
  'sweep --workdir=new --grid=gamma=0,2': 'gamma=2: ... must be within [0, 1]',
  'sweep --workdir=new --grid=gamma=0 --set=gamma=1': 'gamma: is set or swept',
  'sweep --workdir=new --grid=gamma=0,0': 'gamma=0 and gamma=0 are the same',
  'sweep --workdir=new --samples=1 --random=zzz': '--random=zzz: should be fie',
  'sweep --workdir=new --samples=1 --random=gamma=log:0:1': (
    '--random=gamma=log:0:1: 0 must be above 0'
  ),
  'sweep --workdir=new --random=gamma=uniform:0:1': 'samples=0: must be at lea',
  'sweep --workdir=new --samples=1': 'samples=1: must be 0 without --random',
  # Devices and processes: here are two.
  'train --set=devices=5': 'devices=5: this machine has 2; take 0 for all',
  'train --set=acting_devices=2': 'acting_devices=2: this machine has 2; take',
  'train --set=acting_devices=1 --set=acting=synchronous': (
    'acting_devices=1: needs acting=asynchronous'
  ),
  'train --set=acting_devices=1 --env=jax:catch': (
    'acting_devices=1: jax:catch acts in the same program ... take 0'
  ),
  'train --set=batch_size=3': 'batch_size=3: must be a multiple of the 2 dev',
  'train --set=parts=3': 'num_envs=16: must be a multiple of parts=3',
  'train --set=parallel=pmap --env=jax:catch': 'parallel=pmap: ... parallel=ji',
  'train --set=experts=divided': 'experts=divided: ... take replicated',
  'train --preset=td_gammon --set=devices=2': 'devices=2, ... take devices=1',
  'train --distributed=zzz': 'distributed=zzz: must be none, auto, or HOST:POR',
  'train --distributed=here:1': 'distributed=here:1 needs two numbers',
  'train --num_processes=2': 'num_processes=2 ... belong to distributed=HOST',
  'train --distributed=here:1 --num_processes=2 --process_id=2': (
    'process_id=2: must be below num_processes=2'
  ),
  'launch': 'no command: put it after --',
  'launch -- zzz': 'command zzz: no such program',
  'launch zzz': "unexpected argument 'zzz': flags are --name=value",
  # Where to write.
  'train --workdir=file': 'workdir=file: is a file, must be a folder',
  'train --workdir=file/run': 'workdir=file/run: file is a file, must be a fol',
  'sweep --workdir=file': 'workdir=file: is a file, must be a folder',
  'collect --out=file': 'out=file: is a file, must be a folder',
  'study newton --out=file': 'out=file: is a file, must be a folder',
  'notebook compose --out=file': 'out=file: is a file, must be a folder',
  'study sampling_operators --out=file': (
    'out=file: is a file, must be a folder'
  ),
  'benchmark --out=empty': 'out=empty: is a folder, must be the name of a file',
  'corpus --out=file/x': 'out=file/x: file is a file, must be a folder',
  'study equity --workdir=backgammon --out=empty': (
    'out=empty: is a folder, must be'
  ),
  'play --workdir=pendulum --players=actor --out=empty': (
    'out=empty: is a folder, must be'
  ),
  'play --workdir=catch --out=empty': 'out=empty: is a folder, must be the nam',
  'play --workdir=catch --record=file/x.gif': 'record=file/x.gif: file is a fi',
  'study connect_four_positions --out=empty': (
    'out=empty: is a folder, must be the name of a file'
  ),
  'study atac_game --out=empty/game.txt': (
    'out=empty/game.txt: must end in .csv'
  ),
  'study atac_game --out=file/game.csv': (
    'out=file/game.csv: file is a file, must be'
  ),
  'plots --workdirs=catch --out=x.zzz': 'out=x.zzz: must end in one of ... .pn',
  'study specialisation --workdir=catch --out=x.zzz': (
    'out=x.zzz: must end in ... .p'
  ),
  'study control --folder=file': 'folder=file: is a file, must be a folder',
  'study control --results=file': 'results=file: is a file, must be a folder',
  'study pruning --results=file': 'results=file: is a file, must be a folder',
  'study catch --folder=file': 'folder=file: is a file, must be a fold',
  'study catch --results=file': 'results=file: is a file, must be a fo',
  'study connect_four_players --results=file': (
    'results=file: is a file, must be a folder'
  ),
  'study backgammon_players --results=file': (
    'results=file: is a file, must be a'
  ),
  'study offline --study=betas --folder=file': 'folder=file: is a file, must',
  'study offline --study=betas --results=file': 'results=file: is a file, must',
  # Runs.
  'play --workdir=empty': "workdir=empty: is not a run's folder ... name the",
  'play --workdir=file': "workdir=file: is not a run's folder ... name the --",
  'play --workdir=torn': 'torn/config.json is not JSON: ... from a copy',
  'play --workdir=list': 'list/config.json: Expected `object`, got `array`; re',
  'play --workdir=lacks': "lacks/config.json lacks 'run': was it written by an",
  'play --workdir=typed': "typed/config.json: steps is 'x', must be of type in",
  'play --workdir=catch --env=zzz': (
    'env=zzz: differs from jax:catch, which catch/config.json names; must'
  ),
  'play --workdir=pendulum --players=actor --env=jax:catch': (
    'env=jax:catch: differs from Pendulum-v1, which'
  ),
  'play --workdir=newer': 'newer/config.json: no field agent.zzz: fields are',
  'train --preset=muzero_catch --env=jax:catch --workdir=catch --seed=1': (
    'catch holds another run: seed was 0, is 1. Take another --workdir'
  ),
  'train --workdir=list': 'list/config.json: Expected `object`, got `array`',
  'play --workdir=board --checkpoint=best': (
    'checkpoint=best: board has none; there are none yet'
  ),
  'play --workdir=catch': 'catch/final/0 does not fit this run: ... another',
  'play --workdir=catch --checkpoint=early': 'checkpoint=early: ... are final',
  'study specialisation --workdir=catch --checkpoint=zzz': (
    'workdir=catch: is not a run of a language model'
  ),
  'study specialisation --workdir=none': "workdir=none: is not a run's folder",
  'play --workdir=pendulum --dynamics=x': (
    'flag --dynamics=x: has no effect without'
  ),
  'study equity --workdir=catch': (
    'workdir=catch: plays jax:catch, must be backgammon'
  ),
  'plots --workdirs=none': 'workdirs=none: there is none; name folders',
  'plots --workdirs=empty': "workdirs=empty: holds no run's config.json; name",
  'plots --workdirs=typed': 'typed/metrics.csv: is missing; has the run',
  'plots --workdirs=catch --y=zzz': 'has no column zzz; there are step',
  'plots --workdirs=catch --y=loss': 'loss is not a number',
  'plots --workdirs=words': 'words/config.json: seed is not a number',
  'study connect_four_players --folder=none': (
    'folder=none: no finished runs ... train them'
  ),
  'study connect_four_players --name=zzz': (
    'no finished runs zzz_s* (with an eval'
  ),
  'study backgammon_players --folder=none': (
    'no finished runs hidden_*_s*; train them'
  ),
  'study backgammon_players --folder=dice --games=5': (
    'games=5: must be even, every'
  ),
  'study backgammon_players --folder=dice --players=zzz': (
    "player='zzz': must be"
  ),
  'study backgammon_players --folder=dice --opponents=zzz': (
    'opponents=zzz: must be judge, pubeval or gnubg'
  ),
  'study backgammon_players --folder=boards': 'no finished runs hidden_*_s*',
  'study backgammon_players --folder=dice --opponents=solver': (
    'player=solver: plays ConnectFour only; take a player of'
  ),
  # Play.
  'play --workdir=catch --simulations=-1': 'simulations=-1: must be whole numb',
  'play --workdir=catch --prompt=x': 'prompt=x: muzero is not a language model',
  'play --workdir=catch --opponents=random': 'opponents: jax:catch is not a ga',
  'play --workdir=catch --players=random': 'player=random: ... take network',
  'play --workdir=catch --human': 'human: jax:catch is not a game with rules; ',
  'play --workdir=board --players=zzz': "player='zzz': must be network, random",
  'play --workdir=board --players=solver': 'player=solver: plays ConnectFour',
  'play --workdir=board --players=random --opponents=pubeval': (
    'player=pubeval: plays Backgammon only; take a player of'
  ),
  'play --workdir=board --players=catch:network': (
    'player=catch:network: catch plays jax:catch; must be a run on self_play'
  ),
  'study equity --workdir=backgammon --players=zzz': (
    "player='zzz': must be network"
  ),
  'study connect_four_players --folder=boards --players=zzz': (
    "player='zzz': must be network, random"
  ),
  'study connect_four_players --folder=boards --opponents=zzz': (
    'opponents=zzz: must be one of '
  ),
  'play --workdir=pendulum --players=zzz': "player='zzz': must be network",
  'play --workdir=pendulum --players=gumbel=8': (
    'player=gumbel=8: sac has an actor ... take actor'
  ),
  'play --workdir=pendulum --players=actor --dynamics=catch': (
    'dynamics=catch: muzero learns no ensemble of dynamics; give a run'
  ),
  'play --workdir=pendulum --players=actor --termination_rule=a:b': (
    '--termination_rule=a:b: has no effect without --dynamics=RUN'
  ),
  'play --workdir=pendulum --players=actor --reward_rule=a:b': (
    '--reward_rule=a:b: has no effect without --dynamics=RUN'
  ),
  # Data.
  'train --preset=bc': 'dataset: bc learns from a data set: --dataset=PATH',
  'train --preset=bc --dataset=none': 'dataset=none: no such path ... a folder',
  'train --preset=bc --dataset=file': 'dataset=file: not a data set; must be',
  'train --preset=bc --dataset=torn.npz': 'torn.npz: ... collect or copy it ag',
  'train --preset=bc --dataset=key.npz': 'dataset=key.npz: reward is missing',
  'train --preset=bc --dataset=nan.npz': 'nan.npz: ... row 3 ... must be finit',
  'train --preset=bc --dataset=far.npz': 'far.npz: action ... outside the boun',
  'train --preset=bc --dataset=type.npz': 'type.npz: action is float64, must b',
  'train --preset=bc --dataset=short.npz': 'reward has 7: must be equal',
  'train --preset=bc --dataset=ids.npz': 'ids.npz: episode ... must start at 0',
  'train --preset=bc --dataset=torn.hdf5': 'torn.hdf5: truncated, or not an hd',
  'sweep --workdir=new --preset=bc --dataset=none': 'dataset=none: no such pat',
  'train --preset=moe_language_small --text=none': 'text=none: no such file',
  'train --preset=moe_language_small --text=empty': 'text=empty: is a folder',
  'train --preset=moe_language_small --text=file': 'text=file: ... longer text',
  'train --preset=moe_language_small --text=latin.txt': (
    'text=latin.txt: byte 3 (line 1) is not utf-8; ... encoding=latin-1'
  ),
  'study control --data=none': 'data=none: has no random; collect it with py',
  'study control --data=. --qualities=zzz': 'data=.: has no zzz; collect it',
  'study control --data=. --qualities=empty --agents=zzz': (
    'agents=zzz: must be one of '
  ),
  'study offline --study=betas --only=zzz': 'only=zzz: betas has atac',
  'study offline --study=betas --data=none': 'data=none: has no pendulum; coll',
  'study offline --study=betas --data=. --envs=zzz': 'data=.: has no zzz; coll',
  # Numbers in lists.
  'benchmark --suite=scale --seeds=zzz': 'seeds=zzz: must be integers separ',
  'benchmark --suite=scale --quick --seeds=0': 'seeds=0: must be at least 1',
  'study atac_game --sizes=1': (
    'sizes=1: must be whole numbers, each at least 2'
  ),
  'study sampling_operators --ks=4': (
    'ks=4: must be whole numbers, each at least 1, and at least two'
  ),
  # Flags.
  'train --prest=x': "Unknown command line flag 'prest'. Did you mean: preset",
  'train zzz': "unexpected argument 'zzz': flags are --name=value",
  'train --env=': 'flag --env=: is empty; give a value or leave the flag out',
  'play --workdir=catch --players=': 'flag --players=: is empty; give a value',
  'play': 'flag --workdir: is needed: the folder of a run',
  'launch --grace=nan': 'flag --grace=nan: must be a finite number',
}
# What is not installed, and what needs it.
MISSING = {
  'notebook compose --tiny': (
    'nbconvert',
    "notebook compose: needs nbconvert: pip install 'outplay[notebooks]'",
  ),
  'train --preset=bc --dataset=torn.hdf5': (
    'h5py',
    "hdf5 needs h5py; run pip install 'outplay[hdf5]'",
  ),
  'train --tensorboard': ('tensorboardX', 'tensorboard: needs ... pip install'),
  'train --wandb=mine': ('wandb', 'wandb: needs wandb: pip install'),
  'train --preset=alphazero_tic_tac_toe --env=self_play:othello': (
    'pgx',
    "'othello': needs pgx; run pip install 'outplay[games]'",
  ),
  'sweep --workdir=new --engine=ray': ('ray', 'engine=ray: ... pip install'),
  'study connect_four_positions --out=new.csv': (
    'bitbully',
    'solver: needs bitbully; run pip install',
  ),
  'study equity --workdir=backgammon --players=random': (
    'gnubg_nn',
    "gnubg-nn, which is not installed; run pip install 'outplay[opponents]'",
  ),
}
# A checkpoint is put on the device before the rest is looked at.
LOADS = {'play --workdir=pendulum --players=actor --dynamics=catch'}
# Any text will do, or it is only found wrong once there is a cluster.
FREE = {
  ('sweep', 'ray_address'),
  ('study pruning', 'folder'),
}
