"""Nothing that a file names is executed; what it is called is shown escaped.

Every loader is given a file that names a module, which lies where Python
finds it and leaves a mark as soon as it is imported.
"""

import itertools
import json
import pathlib
import re
import shutil
import sys

import launching
import numpy as np
import pytest
from test_control import make_run

from experiments import build
from experiments.build import dataset as datasets
from experiments.build import evaluation
from experiments.data import layout, minari_files, npz
from experiments.envs import names
from experiments.files.errors import UserError
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import run_config
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps import rows as sweep_rows

_NUMBER = itertools.count()
_MODULE = """
import pathlib
pathlib.Path({mark!r}).touch()
import gymnasium
gymnasium.register(
  'PendulumOf{name}-v0',
  entry_point='gymnasium.envs.classic_control:PendulumEnv',
  max_episode_steps=4,
)
"""


class Planted:
  """A module on the path, `env`, how it is asked for, and its mark."""

  def __init__(self, folder):
    name = f'planted_{next(_NUMBER)}'
    self.mark = folder / f'{name}.mark'
    text = _MODULE.format(mark=str(self.mark), name=name)
    (folder / f'{name}.py').write_text(text)
    self.id = f'{name}:PendulumOf{name}-v0'
    self.env = f'gymnasium:{self.id}'


@pytest.fixture
def planted(tmp_path, monkeypatch):
  """In the working folder, which `python -m` puts first on the path."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  return Planted(tmp_path)


@pytest.fixture
def launch(monkeypatch, capsys):
  """`(launcher, *flags) -> (code, stdout, stderr)`, in this process."""
  from absl import flags

  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'set')

  def launched(*words):
    name, module, arguments = launching.find(
      ' '.join(words[:1]).split() + list(words[1:])
    )
    monkeypatch.setattr(sys, 'argv', [name, *arguments])
    known, code = set(flags.FLAGS), 0
    module.define_flags()
    try:
      configs.run_main(module.main)
    except SystemExit as error:
      code = error.code or 0
    finally:
      for flag in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, flag)
      flags.FLAGS.unparse_flags()
    return code, *capsys.readouterr()

  return launched


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The folder of a run of IQL on Gymnasium's own pendulum."""
  folder = tmp_path_factory.mktemp('trained')
  return make_run(folder / 'iql', 'iql_small', 'gymnasium:Pendulum-v1')


def copy(trained, folder, **changes):
  """That run with other fields in its config.json; of `env` some."""
  folder.mkdir()
  config = json.loads((pathlib.Path(trained) / 'config.json').read_text())
  config['env'] |= changes.pop('inner', {})
  (folder / 'config.json').write_text(json.dumps(config | changes))
  shutil.copytree(pathlib.Path(trained) / 'final', folder / 'final')
  return folder


def make_data(env, extra=None):
  n, high = 40, np.full(1, 2, np.float32)
  last = np.arange(n) % 20 == 19
  rng = np.random.default_rng(0)
  states = rng.normal(size=(n + 1, 3))
  return layout.make(
    observation=states[:-1],
    action=rng.uniform(-1, 1, (n, 1)),
    reward=rng.normal(size=n),
    next_observation=states[1:],
    terminated=np.zeros(n, bool),
    truncated=last,
    about=layout.About('noise', env, -high, high, extra=extra or {}),
  )


def write_minari(folder, env, **metadata):
  """A Minari folder whose metadata.json says so."""
  pytest.importorskip('h5py')
  path = minari_files.save(make_data(env), 'me/noise-v0', folder)
  file = path / 'data' / 'metadata.json'
  content = json.loads(file.read_text())
  if metadata:
    del content['outplay']
  file.write_text(json.dumps(content | metadata))
  return path


TRAIN = ('train', '--preset=bc_small', '--dataset=data')
DOOM = 'vzd_path=./doom'


# What is written into the working folder, the command, and whether it is an
# option that names code and not the environment itself.
def run_of_a_module(trained, planted, folder):
  copy(trained, folder / 'run', env_name=planted.env)


def run_without_prefix(trained, planted, folder):
  copy(trained, folder / 'run', env_name=planted.id)


def run_with_a_program(trained, planted, folder):
  inner = {'options': [DOOM]}
  copy(trained, folder / 'run', env_name='D1Basic-v1', inner=inner)


def run_with_a_class(trained, planted, folder):
  inner = {'options': [f'config={{"type": "{planted.id.replace(":", ".")}"}}']}
  name = 'gymnasium:Pendulum-v1'
  copy(trained, folder / 'run', env_name=name, inner=inner)


def run_of_data_of_a_module(trained, planted, folder):
  npz.save(make_data(planted.env), folder / 'data')
  copy(trained, folder / 'run', env_name='', dataset='data')


def dynamics_of_a_module(trained, planted, folder):
  run_of_a_module(trained, planted, folder)
  (folder / 'good').symlink_to(trained)


def game_and_run_of_a_module(trained, planted, folder):
  run_of_a_module(trained, planted, folder)
  game = build.describe('alphazero_tic_tac_toe')
  run_config.write_run_config(folder / 'game', game.as_dict())


def data_of_a_module(trained, planted, folder):
  npz.save(make_data(planted.env), folder / 'data')


def data_without_prefix(trained, planted, folder):
  npz.save(make_data(planted.id), folder / 'data')


def data_with_a_program(trained, planted, folder):
  npz.save(make_data('D1Basic-v1', {'options': [DOOM]}), folder / 'data')


def data_in_one_file(trained, planted, folder):
  npz.save(make_data(planted.env), folder / 'data.npz')
  (folder / 'data.npz').rename(folder / 'data.npz')


def minari_of_ours(trained, planted, folder):
  write_minari(folder / 'minari', planted.env)


def minari_of_others(trained, planted, folder):
  spec = {
    'id': planted.id,
    'entry_point': planted.id,
    'kwargs': {},
    'additional_wrappers': [{'name': 'x', 'entry_point': planted.id}],
  }
  write_minari(folder / 'minari', '', env_spec=json.dumps(spec))


MINARI = ('train', '--preset=bc_small', '--dataset=minari/me/noise-v0')
RUN = '--workdir=run'
REFUSED = {
  'play': (run_of_a_module, ('play', RUN)),
  'record': (run_of_a_module, ('play', RUN, '--record=agent.gif')),
  'human': (run_of_a_module, ('play', RUN, '--human')),
  'matches': (run_of_a_module, ('play', RUN, '--opponents=random')),
  'study equity': (run_of_a_module, ('study equity', RUN)),
  'study specialisation': (run_of_a_module, ('study specialisation', RUN)),
  'control': (run_of_a_module, ('play', RUN, '--players=actor')),
  'dynamics': (
    dynamics_of_a_module,
    ('play', '--workdir=good', '--players=actor', '--dynamics=run'),
  ),
  'player': (
    game_and_run_of_a_module,
    ('play', '--workdir=game', '--players=run:network'),
  ),
  'prefix': (run_without_prefix, ('play', RUN)),
  'program': (run_with_a_program, ('play', RUN)),
  'class': (run_with_a_class, ('play', RUN)),
  'data of a run': (run_of_data_of_a_module, ('play', RUN)),
  'data': (data_of_a_module, TRAIN),
  'data, sweep': (
    data_of_a_module,
    ('sweep', '--preset=bc_small', '--dataset=data', '--workdir=new'),
  ),
  'data, show': (data_of_a_module, (*TRAIN, '--show')),
  'data, prefix': (data_without_prefix, TRAIN),
  'data, program': (data_with_a_program, TRAIN),
  'npz': (
    data_in_one_file,
    ('train', '--preset=bc_small', '--dataset=data.npz'),
  ),
  'minari': (minari_of_ours, MINARI),
  'minari, spec': (minari_of_others, MINARI),
}


@pytest.mark.parametrize('case', REFUSED)
def test_code_that_a_file_names_is_refused(
  case, trained, planted, launch, tmp_path
):
  write, command = REFUSED[case]
  write(trained, planted, tmp_path)
  code, _, message = launch(*command)
  assert not planted.mark.exists()
  assert code == 2
  assert message.startswith('error: ') and message.count('\n') == 1, message
  named = any(word in case for word in ('program', 'class'))
  flag = '--env=' if named else f'--env={planted.env}'
  assert flag in message and 'names code' in message
  assert planted.id.partition(':')[0] not in sys.modules


def test_an_hdf5_file_of_d4rl_names_no_code(planted, tmp_path):
  h5py = pytest.importorskip('h5py')
  dataset = make_data('')
  with h5py.File(tmp_path / 'data.hdf5', 'w') as file:
    for key, value in {
      'observations': dataset.observation,
      'actions': dataset.action,
      'rewards': dataset.reward,
      'terminals': dataset.terminated,
      'timeouts': dataset.truncated,
      'next_observations': dataset.next_observation,
    }.items():
      file[key] = value
    for key in ('env', 'env_name', 'env_spec', 'entry_point', 'algorithm'):
      file.attrs[key] = planted.env
      file[f'metadata/{key}'] = planted.env
  about = datasets.opened('data.hdf5').about
  assert about.env == '' and not planted.mark.exists()


@pytest.mark.parametrize('field', ['name', 'agent_name'])
def test_a_config_names_only_what_the_tables_have(
  field, trained, planted, launch, tmp_path
):
  module = planted.id.partition(':')[0]
  copy(trained, tmp_path / 'run', **{field: module})
  code, _, message = launch('play', RUN)
  assert code == 2 and message.count('\n') == 1
  assert module in message and 'known are' in message
  assert not planted.mark.exists()


def test_a_checkpoint_names_no_code(trained, planted, tmp_path, launch):
  """Types and handlers in its metadata stand for nothing to import."""
  run = copy(trained, tmp_path / 'run')
  step = run / 'final' / '0'
  file, name = step / 'leaves' / '_METADATA', planted.id.replace(':', '.')
  text, changed = re.subn(
    r'("value_type"): "[^"]*"', rf'\1: "{name}"', file.read_text()
  )
  file.write_text(text)
  assert changed
  launch('play', RUN, '--episodes=1', '--num_envs=1')
  assert not planted.mark.exists()


def test_plots_read_the_run_of_a_module(trained, planted, tmp_path, launch):
  run = copy(trained, tmp_path / 'run', env_name=planted.env)
  (run / 'metrics.csv').write_text(
    'step,decisions,episode_return\n1,10,1\n2,20,2\n'
  )
  code, out, message = launch('plots', '--workdirs=run', '--out=curve.png')
  assert code == 0, message
  assert 'curve.png' in out and not planted.mark.exists()


ASKED = {
  'play': ('play', RUN, '--episodes=2', '--num_envs=2'),
  'record': ('play', RUN, '--record=agent.gif'),
  'control': ('play', RUN, '--episodes=2', '--players=actor'),
}


def test_the_users_own_flag_brings_code(trained, planted, tmp_path, launch):
  copy(trained, tmp_path / 'run', env_name=planted.env)
  # It names the run's environment or none.
  for name, (launcher, *flags) in ASKED.items():
    wrong = launch(launcher, *flags, '--env=gymnasium:Pendulum-v1')
    assert wrong[0] == 2, name
    assert f'differs from {planted.env}, which' in wrong[2]
  assert not planted.mark.exists()
  for name in ('play', 'record', 'control'):
    launcher, *flags = ASKED[name]
    if name == 'control':
      # There is no exact model of it, and it says so after it was asked.
      code, _, message = launch(launcher, *flags, f'--env={planted.env}')
      assert code == 2 and 'has no exact model' in message
      continue
    code, out, message = launch(launcher, *flags, f'--env={planted.env}')
    assert code == 0, message
    if name == 'play':
      again = 'next: python -m experiments.play --workdir=run --env='
      assert again + planted.env in out
  assert planted.mark.exists() and (tmp_path / 'agent.gif').exists()


def test_a_run_goes_on_only_with_the_flag_that_began_it(
  trained, planted, tmp_path, launch
):
  data_of_a_module(trained, planted, tmp_path)
  npz.save(make_data('Pendulum-v1'), tmp_path / 'plain')
  flags = ('--preset=bc_small', '--workdir=run')
  experiment = build.describe('bc_small', env=planted.env, dataset='plain')
  about = experiment.as_dict()
  about |= experiment.material.fingerprint(experiment)
  run_config.write_run_config(tmp_path / 'run', about)
  code, _, message = launch('train', *flags, '--dataset=plain')
  assert code == 2 and message.count('\n') == 1
  assert f'env_name was "{planted.env}", is "Pendulum-v1"' in message
  assert not planted.mark.exists()
  notes = run_config.check_run_config(tmp_path / 'run', about)
  assert notes == []


def test_rows_of_a_sweep_get_the_environment_by_flag(planted, tmp_path):
  npz.save(make_data('Pendulum-v1'), tmp_path / 'plain')
  plan = sweep_plan.make_plan('bc_small', env=planted.env, dataset='plain')
  rows = sweep_plan.rows(plan, 2)
  for job in sweep_rows.jobs(plan, rows, tmp_path / 'sweep'):
    assert f'--env={planted.env}' in job.arguments
  assert not planted.mark.exists()


PLAIN = (
  'max_steps=20',
  'rules=pgx',
  'x=None',
  'gray_scale=False',
  'cost=-1.5',
  'instr_kinds=action,and,seq',
  "tasks_to_complete=['bottom burner', 'kettle']",
  'reward_config={"AMMO0": (0.1, -0.2)}',
)
CODE = (
  DOOM,
  'vzd_path=doom',
  'game_args=exec x',
  'xml_file=ant.xml',
  'lmp_save_dir=x',
  'entry_point=os',
  'a=module:function',
  'a=module.Class',
  'a=../x',
  'a=[("x", {"y": "m:f"})]',
  'a={"env_id": "x"}',
  'a={"m:f": 1}',
  "a=b'x'",
)


@pytest.mark.parametrize('option', PLAIN + CODE)
def test_options_that_name_code(option):
  assert bool(names.code_in('Name-v0', [option])) == (option in CODE)


@pytest.mark.parametrize(
  ('name', 'brings'),
  {
    '': False,
    'Catch-v0': False,
    'ALE/Pong-v5': False,
    'jax:catch': False,
    'self_play:go_9x9': False,
    'gymnasium:CartPole-v1': False,
    'gymnasium:ALE/Pong-v5': False,
    'gymnasium:module:Id-v0': True,
    'gymnasium:a.b:ns/Id-v0': True,
    'module:Id-v0': True,
    'brax:module:Id': True,
    'jax:module:function': True,
  }.items(),
)
def test_environments_that_bring_code(name, brings):
  assert bool(names.code_in(name)) == brings
  assert names.flag(name) == (f' --env={name}' if brings else '')
  with pytest.raises(UserError, match='must be the same'):
    names.check(name, (), 'config.json', asked='another')
  if name:
    names.check(name, (), 'config.json', asked=name)


def test_a_command_is_quoted_for_the_shell(planted, tmp_path):
  npz.save(make_data('Pendulum-v1'), tmp_path / 'plain')
  env = 'gymnasium:m:Id $(touch x)'
  experiment = build.describe('bc_small', env=env, dataset='plain')
  found = evaluation.command('a b;c', experiment)
  assert found == (
    "python -m experiments.play --workdir='a b;c' "
    "--env='gymnasium:m:Id $(touch x)'"
  )


# Clears a screen, sets a title, turns text around, begins a line of its own.
EVIL = 'x\x1b[2J\x1b]0;t\x07\u202ey\r\nerror: z[bold]'


def is_clean(text):
  return all(c.isprintable() or c == '\n' for c in text)


def test_tables_and_lines_show_names_escaped(capsys):
  terminal.print_table((EVIL, 'b'), [(EVIL, EVIL)], EVIL)
  terminal.say(EVIL, EVIL)
  terminal.begin(EVIL, EVIL, compiles=False)
  terminal.end(EVIL, EVIL)
  terminal.ticker(EVIL, every_seconds=-1)(3)
  out, err = capsys.readouterr()
  assert is_clean(out) and is_clean(err)
  # It is no markup, and begins no line.
  assert out.replace('\n', '').count('[bold]') >= 6
  assert not any(line.startswith('error') for line in out.splitlines())


def test_a_data_set_may_be_called_anything(tmp_path, launch, monkeypatch):
  monkeypatch.chdir(tmp_path)
  dataset = make_data('Pendulum-v1')
  about = dataset.about._replace(name=EVIL, source=EVIL)
  npz.save(dataset._replace(about=about), tmp_path / 'data')
  settings = (
    'hidden_sizes=4',
    'log_every=1',
    'evaluate_every=0',
    'final_episodes=0',
    'run.devices=1',
    'batch_size=4',
  )
  code, out, err = launch(
    *TRAIN, '--steps=2', *(f'--set={setting}' for setting in settings)
  )
  assert code == 0, err
  assert 'x\\x1b[2J' in out and is_clean(out) and is_clean(err)
  (folder,) = (tmp_path / 'runs').iterdir()
  assert is_clean(folder.name) and '\n' not in folder.name


def test_a_run_may_be_called_anything(trained, tmp_path, launch, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = 'r\x1b[2J\u202e'
  copy(trained, tmp_path / folder, env_name=f'gymnasium:{EVIL}')
  code, out, err = launch('play', f'--workdir={folder}')
  assert code == 2 and err.count('\n') == 1 and is_clean(out + err)
  code, out, err = launch('plots', f'--workdirs={folder}')
  assert code == 2 and err.count('\n') == 1 and is_clean(out + err)
  run = copy(trained, tmp_path / f'{folder}2')
  code, out, err = launch(
    'play', f'--workdir={run}', '--episodes=1', '--num_envs=1'
  )
  assert code == 0 and is_clean(out + err), err
