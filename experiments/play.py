"""Plays a finished run's agent with any planner and budget, and writes CSV.

python -m experiments.play --workdir=runs/NAME --simulations=0,4,16,64
python -m experiments.play --workdir=runs/NAME --prompt='The '
python -m experiments.play --workdir=runs/NAME --opponents=random,network \
  --players=network,lookahead=2,gumbel=32,lookahead=1+rollout=8
python -m experiments.play --workdir=runs/NAME --human --players=gumbel=64
python -m experiments.play --workdir=runs/NAME --dynamics=runs/DYNAMICS \
  --players=actor,lookahead=1+rollout=8
python -m experiments.play --workdir=runs/NAME --record=agent.gif

`experiments.playing.planners` lists the names of players.
"""

from experiments.build import saved
from experiments.runtime import config as configs
from experiments.runtime import flags as flag_checks


def main() -> None:
  """Plays as the flags say.

  Raises:
    UserError: the run has no environment to play in.
  """
  from absl import flags

  from experiments.playing import ways
  from experiments.runtime.devices import use_compilation_cache

  values = flags.FLAGS
  with configs.user_errors():
    experiment = saved.load_experiment(values.workdir, values.env)
    for name in ('out', 'record'):
      if getattr(values, name):
        configs.check_place(name, getattr(values, name))
    if values.prompt and experiment.material.plays:
      raise configs.UserError(
        f'prompt={values.prompt}: {experiment.agent_name} is not a language '
        f'model; leave the prompt out, or give the run of a language model '
        f'instead of {values.workdir}'
      )
    if not experiment.material.plays:
      from experiments.playing import continuation

      flag_checks.refuse([*ways.ALL, 'out'], 'on a language model')
      use_compilation_cache()
      name = values.checkpoint[0] if values.checkpoint else 'final'
      continuation.continue_text(experiment, values.workdir, name, values)
      return
    flag_checks.refuse(ways.OF_TEXT, 'without a language model')
    if not experiment.env_name:
      raise configs.UserError(
        f'workdir={values.workdir}: its data set names no environment to play '
        'in; give --env=NAME'
      )
    launch = ways.choose(experiment, values)
    use_compilation_cache()
    launch(experiment, values)


def define_flags() -> None:
  """The flags of `python -m experiments.play`."""
  from absl import flags

  integer = flags.DEFINE_integer
  text = flags.DEFINE_string
  text('workdir', None, 'the folder of a run', required=True)
  text(
    'env',
    None,
    "the run's environment; needed if it imports code (gymnasium:MODULE:ID) "
    'or if the run names no environment',
  )
  flags.DEFINE_list(
    'checkpoint',
    ['final'],
    'the checkpoints whose parameters to play: final, best or early',
  )
  flags.DEFINE_list(
    'players',
    [],
    'players by name: network, gumbel=32, lookahead=1+rollout=8, ...; in a '
    'game each plays the opponents, and with --human the first plays you',
  )
  flags.DEFINE_enum(
    'planner',
    None,
    ['efficientzero', 'puct', 'gumbel'],
    "the search rule for --simulations; the agent's own rule if left out",
  )
  flags.DEFINE_list(
    'simulations',
    None,
    'numbers of simulations per decision; 0 is the network alone; 0 and 16 if '
    'left out',
  )
  integer('episodes', 100, 'episodes for each row', 1, 1_000_000)
  integer(
    'num_envs',
    0,
    "number of simulators that run at once; 0 for the run's own number",
    0,
    1_000_000,
  )
  integer('seed', 0, 'seed of the simulators and planners', 0, configs.MAX_SEED)
  text(
    'dynamics',
    'exact',
    'the dynamics that an actor and a critic plan in: exact, or the folder of '
    'a run of the agent dynamics or combo',
  )
  for rule, meaning in (
    ('reward', 'gives rewards'),
    ('termination', 'says which steps end the episode'),
  ):
    text(
      f'{rule}_rule',
      '',
      f'MODULE:FUNCTION of your own that {meaning}, of batches (observation, '
      'action, next_observation) in jax.numpy, in place of what --dynamics=RUN '
      'has learned',
    )
  integer(
    'candidates', 8, 'number of candidate actions at the first stage', 1, 10_000
  )
  integer(
    'later_candidates',
    4,
    'number of candidate actions at each later stage',
    1,
    10_000,
  )
  flags.DEFINE_enum(
    'value',
    'min',
    ['min', 'mean'],
    'whether a value is the minimum or the mean of the critics',
  )
  flags.DEFINE_list(
    'opponents',
    [],
    'opponents in a game: random (the default), solver, pubeval, gnubg=PLIES, '
    'or any player',
  )
  integer(
    'openings',
    64,
    'number of openings; each is played twice, with sides swapped',
    1,
    1_000_000,
  )
  integer('opening_plies', 4, 'number of random moves in an opening', 0, 10_000)
  flags.DEFINE_boolean(
    'human', False, 'play in the terminal against the first of --players'
  )
  flags.DEFINE_boolean('begin', True, 'with --human, whether you move first')
  text(
    'record',
    None,
    'the file to draw an episode into: .gif for an animation, .png for a '
    'strip; the first of --players plays, or the last of --simulations',
  )
  integer(
    'frames',
    0,
    'the most time steps in a .gif (300 if left out), or the number of time '
    'steps in a .png (8 if left out)',
    0,
    100_000,
  )
  text('prompt', None, 'the text that a language model continues')
  integer(
    'tokens', 100, 'number of tokens that a language model adds', 1, 1_000_000
  )
  flags.DEFINE_float(
    'temperature',
    1.0,
    'the temperature at which tokens are sampled; at 0 the likeliest token is '
    'always taken',
    0.0,
    1_000_000,
  )
  text('out', None, 'the CSV file; WORKDIR/play.csv or match.csv if left out')


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
