"""Every mistake that a person can make, in one table: one line tells it.

A launcher runs in this process by its own flags. What it says must be one line
on stderr with the field, the value and what would be right; it must end with
code 2, compile nothing and leave every file as it was.
"""

import dataclasses
import functools
import importlib
import json
import logging
import os
import pathlib
import shlex
import subprocess
import sys
import typing

import flag_values
import jax
import launching
import numpy as np
import pytest
from error_table import FREE, LOADS, MISSING, TABLE

from experiments import build, presets
from experiments.data import layout, npz
from experiments.files import writing
from experiments.files.errors import UserError, shown
from experiments.runtime import (
  checkpoint,
  distributed,
  mesh,
  overrides,
  run_config,
  watch,
)
from experiments.runtime import config as configs
from experiments.sweeps import engines, pool
from experiments.training.collect import Collection

ROOT = pathlib.Path(__file__).resolve().parent.parent
WRONG = 'zzz'


def table(rows):
  return pytest.mark.parametrize('command', rows)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Files of every kind that can be wrong; nothing may change them."""
  root = tmp_path_factory.mktemp('errors')
  (root / 'file').write_text('x')
  (root / 'empty').mkdir()
  (root / 'text.txt').write_text('the words ' * 200)
  (root / 'latin.txt').write_bytes(b'caf\xe9 ' * 200)
  (root / 'torn.hdf5').write_bytes(b'\x89HDF')
  _write_runs(root)
  _write_data(root)
  return root


def _write_runs(root):
  def run(name, preset, **changes):
    experiment = build.describe(preset, **changes)
    run_config.write_run_config(root / name, experiment.as_dict(), 'cpu')
    return json.loads((root / name / 'config.json').read_text())

  def saved(name, params):
    keeper = checkpoint.open(root / name, keep=1)
    keeper.save(0, params)
    keeper.close()

  config = run('catch', 'muzero_catch', env='jax:catch')
  saved('catch/final', {'of': np.zeros(3)})
  (root / 'catch' / 'metrics.csv').write_text('step,decisions,loss\n1,8,x\n')
  run('board', 'alphazero_tic_tac_toe')
  run('backgammon', 'td_gammon')
  run('dice/hidden_40_s0', 'td_gammon')
  (root / 'dice/hidden_40_s0/evaluation.csv').touch()
  run('pendulum', 'sac_pendulum')
  experiment = build.describe('sac_pendulum')
  env = build.make_env(experiment, training=False, num_envs=1)
  agent = build.make_agent(experiment, env.spec)
  params = jax.eval_shape(agent.init, jax.random.key(0)).params
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
  saved('pendulum/final', params)
  for seed in range(2):
    name = f'boards/connect_four_s{seed}'
    run(name, 'alphazero_connect_four', seed=seed)
    (root / name / 'evaluation.csv').touch()
  for name, content in {
    'list': [],
    'lacks': {n: x for n, x in config.items() if n != 'run'},
    'typed': config | {'steps': 'x'},
    'newer': config | {'agent': config['agent'] | {'zzz': 1}},
    'words': config | {'seed': 'x'},
  }.items():
    writing.write_text(root / name / 'config.json', json.dumps(content))
  writing.write_text(root / 'torn' / 'config.json', '{"name":')


def _write_data(root):
  bound = np.full(1, 2, np.float32)
  about = layout.About('data', '', -bound, bound)
  flat, ones = np.zeros(8), np.zeros((8, 1))
  states = np.arange(24.0).reshape(8, 3)
  dataset = layout.make(states, ones, flat, states, flat, flat, about)
  npz.save(dataset, root / 'data.npz')
  content = dict(np.load(root / 'data.npz'))
  spoilt = content['observation'].copy()
  spoilt[3, 0] = np.nan
  for name, changes in {
    'nan': {'observation': spoilt},
    'far': {'action': content['action'] + 3},
    'type': {'action': content['action'].astype(np.float64)},
    'short': {'reward': content['reward'][:-1]},
    'ids': {'episode': content['episode'] + 1},
  }.items():
    np.savez(root / f'{name}.npz', **(content | changes))
  del content['reward']
  np.savez(root / 'key.npz', **content)
  (root / 'torn.npz').write_bytes((root / 'data.npz').read_bytes()[:100])


@pytest.fixture(scope='module')
def compiled():
  jax.random.key(0)  # the only thing that may run before the checks
  return watch.compilations()


@pytest.fixture
def launch(folder, compiled, monkeypatch, capsys):
  """`(command) -> message`, of a launcher that must refuse it."""
  from absl import app, flags

  def begun(*args, **kwargs):
    raise AssertionError('the work begins')

  # What is not refused must not keep the tests waiting.
  monkeypatch.setattr(mesh, 'init', begun)
  monkeypatch.setattr(distributed, '_connect', begun)
  monkeypatch.setattr(engines, 'vmapped', begun)
  monkeypatch.setattr(pool, 'run', begun)
  monkeypatch.setattr(subprocess, 'Popen', _only_others(subprocess.Popen))
  # Or the launchers would set up a cache of their own.
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'set')
  monkeypatch.chdir(folder)
  app.define_help_flags()
  handlers, level = logging.root.handlers[:], logging.root.level

  def refused(command: str, *more: str) -> str:
    name, module, rest = launching.find([*shlex.split(command), *more])
    cut = rest.index('--') if '--' in rest else len(rest)
    rest, behind = rest[:cut], rest[cut + 1 :]
    if name == 'notebook':
      behind = [x for x in rest if not x.startswith('-')]
      rest = rest[len(behind) :]
    main = module.main
    if name in ('launch', 'notebook'):
      main = functools.partial(main, behind)
    monkeypatch.setattr(sys, 'argv', [name, *rest])
    before, known = _files(folder), set(flags.FLAGS)
    compiled()
    module.define_flags()
    try:
      with pytest.raises(SystemExit) as exited:
        configs.run_main(main)
    finally:
      for flag in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, flag)
      flags.FLAGS.unparse_flags()
    message = capsys.readouterr().err
    assert exited.value.code == 2, message
    assert message.startswith('error: ') and message.count('\n') == 1, message
    assert compiled() == 0 or command in LOADS, message
    assert _files(folder) == before
    return message

  yield refused
  logging.root.handlers[:] = handlers
  logging.root.setLevel(level)


def _only_others(popen):
  def start(command, *args, **kwargs):
    assert 'experiments' not in str(command), 'the work begins'
    return popen(command, *args, **kwargs)

  return start


def _files(root):
  return {
    path: (path.stat().st_mtime_ns, path.stat().st_size)
    for path in root.rglob('*')
  }


def _says(message, expected):
  begin = 0
  for piece in expected.split(' ... '):
    assert piece in message[begin:], message
    begin = message.index(piece, begin) + len(piece)


@table(TABLE)
def test_a_mistake_is_told_in_one_line(command, launch):
  _says(launch(command), TABLE[command])


@table(flag_values.ROWS)
def test_flags_that_cannot_be_meant_are_told_in_one_line(command, launch):
  _says(launch(command), flag_values.ROWS[command])


@table(flag_values.PLACES)
def test_places_that_keep_nothing_are_refused(command, launch):
  for value, expected in flag_values.places(command).items():
    message = launch(f'{command}={shlex.quote(value)}')
    _says(message, f'{command.split("--")[-1]}={shown(value)}: ... {expected}')


def test_settings_that_no_run_can_have_are_refused(launch):
  for setting, expected in flag_values.settings().items():
    message = launch('train', f'--set={setting}')
    field, _, value = setting.partition('=')
    assert field.split('.')[-1] in message and expected in message, message
    assert value in message or value.isdecimal(), message


@pytest.mark.parametrize('launcher', launching.LAUNCHERS)
def test_every_flag_refuses_what_its_type_cannot_be(launcher, launch):
  for name, flag in _flags(launcher).items():
    if name == 'what':  # an alias, whose messages name the flag
      continue
    for value, expected in flag_values.by_type(flag).items():
      needs = flag_values.NEEDS.get(launcher, '')
      message = launch(f'{launcher} {needs}', f'--{name}={value}')
      shows = shown(value) if value.strip() else ''
      _says(message, f'flag --{name}={shows} ... {expected}')


def test_there_are_enough_values():
  count = len(flag_values.ROWS) + len(flag_values.settings())
  count += sum(len(flag_values.places(flag)) for flag in flag_values.PLACES)
  for launcher in launching.LAUNCHERS:
    flags = _flags(launcher).values()
    count += sum(len(flag_values.by_type(flag)) for flag in flags)
  assert count >= 500


@pytest.mark.parametrize('launcher', launching.LAUNCHERS)
def test_help_is_no_error(launcher, launch, capsys, monkeypatch):
  from absl import app, flags

  _, module, _ = launching.find(launcher.split())
  monkeypatch.setattr(sys, 'argv', [launcher, '--help'])
  app.define_help_flags()  # once in a process, so they must stay
  known = set(flags.FLAGS)
  module.define_flags()
  try:
    configs.run_main(module.main)
  finally:
    for flag in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, flag)
    flags.FLAGS.unparse_flags()
  told = capsys.readouterr()
  assert '--helpfull' in told.out and not told.err


def test_help_of_a_study_lists_its_own_flags():
  done = launching.launch('study newton', '--help')
  assert done.stderr == ''
  assert '--out: ' in done.stdout


@pytest.mark.parametrize(
  'launcher',
  [
    name if name == 'train' else pytest.param(name, marks=pytest.mark.slow)
    for name in launching.LAUNCHERS
  ],
)
def test_help_ends_in_silence_where_nobody_reads_it(launcher):
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run(
    [sys.executable, '-m', *f'experiments.{launcher}'.split(), '--help'],
    cwd=ROOT,
    stdout=write,
    stderr=subprocess.PIPE,
    text=True,
  )
  os.close(write)
  assert (done.returncode, done.stderr) == (0, '')


@table(MISSING)
def test_what_is_not_installed_is_named(command, launch, monkeypatch):
  package, expected = MISSING[command]
  monkeypatch.setitem(sys.modules, package, None)
  _says(launch(command), expected)


def test_an_old_jax_is_refused(launch, monkeypatch):
  monkeypatch.setattr(jax, '__version_info__', (0, 4, 30))
  monkeypatch.setattr(jax, '__version__', '0.4.30')
  _says(launch('train'), 'jax=0.4.30: must be 0.10 or newer: pip install')


def test_a_folder_that_must_not_be_written_to_is_refused(launch, monkeypatch):
  # A superuser may write everywhere.
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  _says(launch('train --workdir=empty/run'), 'empty is not writable; tak')


def test_devices_that_are_not_there_end_a_process_in_one_line(tmp_path):
  flag = f'--workdir={tmp_path}/run'
  said = launching.refused('train', flag, JAX_PLATFORMS='nonsense')
  assert said.startswith('error: JAX_PLATFORMS=nonsense: ')
  assert 'take JAX_PLATFORMS=cpu' in said
  assert not list(tmp_path.iterdir())


def _flags(launcher):
  """The launcher's own flags by name."""
  from absl import flags

  known = set(flags.FLAGS)
  launching.find(launcher.split())[1].define_flags()
  try:
    return {name: flags.FLAGS[name] for name in set(flags.FLAGS) - known}
  finally:
    for flag in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, flag)


def _wrong_values(flag):
  """Texts that absl refuses, and what each message must hold."""
  if flag.boolean:
    return {WRONG: 'must be true or false'}
  if flag.flag_type() == 'string enum':
    return {WRONG: f'must be one of {flag.parser.enum_values[0]}'}
  if flag.flag_type() not in ('int', 'float'):
    return {}
  found = {WRONG: f'must be {flag.parser.syntactic_help}'}
  for bound, step in (('lower_bound', -1), ('upper_bound', 1)):
    value = getattr(flag.parser, bound)
    if value is not None:
      found[str(value + step)] = f'must be {flag.parser.syntactic_help}'
  return found


@pytest.mark.parametrize('launcher', launching.LAUNCHERS)
def test_every_flag_can_be_refused(launcher, launch):
  commands = {
    piece.partition('=')[0]
    for command in (*TABLE, *MISSING)
    if launching.find(shlex.split(command))[0] == launcher
    for piece in shlex.split(command)[1:]
  }
  for name, flag in _flags(launcher).items():
    wrong = _wrong_values(flag)
    for value, expected in wrong.items():
      message = launch(f'{launcher} --{name}={value}')
      _says(message, f'flag --{name}={value}: ... {expected}')
    tried = f'--{name}' in commands or (launcher, name) in FREE
    assert wrong or tried, f'no row provokes --{name} of {launcher}'


SECTIONS = {
  'env': presets.EnvConfig,
  'run': presets.RunConfig,
  'collection': Collection,
  **{
    name: importlib.import_module(f'agents.{name}').Config
    for name in presets.AGENTS
  },
}
# Fields that may have any sign, and those that may be infinite.
SIGNED = {'target_entropy', 'min_entropy', 'gap_target', 'value_clip'}
SIGNED |= {'reward_factor'}
UNBOUNDED = {'max_gradient_norm', 'radius', 'min_std', 'max_std'}
# Checked when the environment is made.
TEXTS = {'options', 'recorded'}


def _leaves(config, prefix=()):
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from _leaves(value, (*prefix, field.name))
    else:
      yield (*prefix, field.name), overrides._type_name(hints[field.name])


def _bad_values(name, kind):
  """Texts that a field of a type (in words) must refuse."""
  bad = [WRONG]
  if kind.startswith('int') and name not in SIGNED:
    bad += ['-7', '1.5']
  elif kind.startswith('float'):
    bad += ['nan']
    bad += [] if name in SIGNED else ['-1e9']
    bad += [] if name in UNBOUNDED else ['inf']
  elif kind == 'true or false':
    bad += ['7']
  return bad


@pytest.mark.parametrize('section', SECTIONS)
def test_every_field_refuses_what_it_cannot_be(section):
  sections = {section: SECTIONS[section]()}
  for path, kind in _leaves(sections[section]):
    name = path[-1]
    for text in () if name in TEXTS else _bad_values(name, kind):
      with pytest.raises(UserError) as caught:
        overrides.override(sections, [f'{section}.{".".join(path)}={text}'])
      message = str(caught.value)
      assert name in message and text in message and 'must be' in message
      assert '\n' not in message


# Where each agent's own preset can be taken besides, of these environments.
ENVS = (
  *('jax:catch', 'jax:cartpole', 'jax:pendulum'),
  *('self_play:tic_tac_toe', 'self_play:backgammon'),
)
FITS = {
  'alphazero': {'self_play:tic_tac_toe'},
  'efficientzero': {'jax:catch', 'jax:cartpole'},
  'efficientzero_v2': {'jax:catch', 'jax:cartpole', 'jax:pendulum'},
  'muzero': {'jax:catch', 'jax:cartpole'},
  'sac': {'jax:pendulum'},
  'sampled_muzero': {'jax:pendulum'},
  'td_gammon': {'self_play:backgammon'},
}


@pytest.mark.parametrize('agent', presets.AGENTS)
def test_agents_refuse_environments_that_do_not_suit_them(agent):
  preset = next(n for n, p in presets.PRESETS.items() if p.agent == agent)
  settings = ('env.options=', 'env.action_bins=0')
  for env in ENVS:
    try:
      experiment = build.describe(preset, env=env, settings=settings)
      made = build.make_env(experiment, training=True)
      build.make_source(
        experiment, made, build.make_agent(experiment, made.spec)
      )
    except ValueError as error:
      message = str(error)
      assert env not in FITS.get(agent, ()), message
      assert agent in message or 'policy=' in message
      assert '\n' not in message
    else:
      assert env in FITS.get(agent, ()), f'{agent} takes {env}'
