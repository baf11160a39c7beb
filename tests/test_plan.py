"""Memory that a run needs, before it runs: sizes, refusals, exit codes."""

import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import build, train
from experiments.build import capacity, programs
from experiments.files.errors import UserError
from experiments.runtime import compile_targets, compiled
from experiments.runtime import config as configs
from experiments.training import plan, plan_memory
from experiments.training.plan_memory import Need, Plan

PRESET = 'sac_pendulum'
SMALL = (
  'hidden_sizes=8',
  'num_envs=4',
  'batch_size=16',
  'replay_capacity=100',
  'warmup_decisions=20',
)
ONE = (*SMALL, 'devices=1')
# Floats of the networks: layers, and mean and deviation of what they see.
POLICY = (3 * 8 + 8) + (8 * 2 + 2) + 2 * 3
CRITICS = 2 * ((4 * 8 + 8) + (8 + 1) + 2 * 3)
# A row of replay: observation, reward, discount, two flags, action.
KEPT = 3 * 4 + 4 + 4 + 1 + 1 + 4


def described(*settings, env='jax:pendulum'):
  return build.describe(PRESET, env=env, settings=[*ONE, *settings])


def sizes(found: Plan, place='device'):
  return {row.what: getattr(row, place) for row in found.rows}


def test_a_compiled_run_needs_what_its_shapes_say():
  (found,) = plan.here(described())
  needs = sizes(found)
  assert needs['parameters'] == 4 * (POLICY + CRITICS + 1)
  # Target critics; two moments of each parameter, three counters.
  rest = CRITICS + 2 * (POLICY + CRITICS + 1) + 3
  assert needs['optimiser and other state'] == 4 * rest
  # Each row has a priority; the largest one and a counter come on top.
  assert needs['replay'] == 100 * (KEPT + 4) + 4 + 4
  # Observations, action, reward, discount, and how it was drawn.
  assert needs['batch, in the interval'] == 16 * (12 + 4 + 4 + 4 + 12 + 5 * 4)
  kept = sum(row.device for row in found.rows if row.stays)
  assert found.device == kept + needs['program interval'] > kept
  assert found.host == found.device and found.on_host == 1


def test_a_replay_on_the_host_is_the_hosts():
  (found,) = plan.here(described(env='Pendulum-v1'))
  needs = sizes(found)
  # A float32 of priority and a float64 of mass.
  assert sizes(found, 'host')['replay'] == 100 * (KEPT + 4 + 8)
  assert needs['replay'] == 0
  assert needs['batch'] == 16 * (12 + 4 + 4 + 4 + 12 + 5 * 4)
  # An actor's copy, and the one that follows it.
  assert needs['copies that act'] == 2 * needs['parameters']
  assert needs['program act'] > 0 and needs['program update'] > 0
  assert found.host == found.device + 3800


def on_a_device(experiment, memory):
  """The plan for one device of its own with so much memory."""
  target = compile_targets.Target('small', 'tpu', '', 1, memory)
  layout = build.make_layout(experiment)
  (phase,) = programs.phases(experiment, layout)
  return plan_memory.of_phase(experiment, layout, phase, target)


@pytest.mark.parametrize(
  'setting', ['replay_capacity=1000000', 'batch_size=99999']
)
def test_what_is_too_large_for_a_device_is_named(setting):
  found = on_a_device(described(setting), 1_000_000)
  with pytest.raises(UserError) as refused:
    plan.check([found])
  message = str(refused.value)
  assert message.startswith(setting)
  assert 'of a device, which has 1 MB' in message and '\n' not in message
  plan.check([found._replace(has=int(found.device) + 1)])


def test_a_replay_too_large_for_the_host_is_named(monkeypatch):
  monkeypatch.setattr(capacity, 'machine_memory', lambda: 50_000_000)
  found = plan.here(described('replay_capacity=10000000', env='Pendulum-v1'))
  message = 'replay_capacity=10000000: needs 380 MB of a host, which has 50 MB'
  with pytest.raises(UserError, match=message):
    plan.check(found)


def test_a_program_that_its_compiler_refuses_is_named(monkeypatch):
  def refused(_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 20G of 15G hbm')

  monkeypatch.setattr(compiled, 'memory', refused)
  found = on_a_device(described(), 10**9)
  message = 'batch_size=16, num_envs=4: program interval is too large for a de'
  with pytest.raises(UserError, match=message):
    plan.check([found])


def test_of_programs_the_largest_counts():
  rows = (
    Need('parameters', (), 10, 0),
    Need('program update', ('batch_size=8',), 60, 0, stays=False),
    Need('program refresh', ('reanalyze_chunk=0',), 80, 0, stays=False),
    Need('replay', ('replay_capacity=9',), 0, 50),
  )
  found = Plan('train', rows, '1 x small', 100, 50)
  assert (found.device, found.host) == (90, 50)
  plan.check([found])
  with pytest.raises(
    UserError, match=r'^reanalyze_chunk=0: needs 90 B of a dev'
  ):
    plan.check([found._replace(has=89)])
  with pytest.raises(
    UserError, match=r'^replay_capacity=9: needs 50 B of a hos'
  ):
    plan.check([found._replace(host_has=49)])
  # The devices' memory is the host's.
  assert found._replace(on_host=2).host == 2 * 90 + 50


def test_running_out_of_memory_is_one_line():
  message = (
    'batch_size=16, num_envs=4, replay_capacity=100: a device has run out of '
    'memory .RESOURCE_EXHAUSTED'
  )
  experiment = described()
  with (
    pytest.raises(UserError, match=message),
    plan.out_of_memory(experiment),
  ):
    jnp.zeros(2**46).block_until_ready()
  with (
    pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'),
    plan.out_of_memory(experiment),
  ):
    raise jax.errors.JaxRuntimeError('INTERNAL: no reason')


def launched(monkeypatch, *given):
  from absl import flags

  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'that of the tests')
  monkeypatch.setattr(
    sys,
    'argv',
    ['train', f'--preset={PRESET}', '--plan', '--env=jax:pendulum', *given],
  )
  known = set(flags.FLAGS)
  train.define_flags()
  try:
    configs.run_main(train.main)
  finally:
    for flag in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, flag)
    flags.FLAGS.unparse_flags()


def test_a_plan_is_a_table_and_writes_nothing(monkeypatch, tmp_path, capsys):
  monkeypatch.chdir(tmp_path)
  given = [f'--set={setting}' for setting in ONE]
  launched(monkeypatch, *given, '--workdir=a/run')
  table = capsys.readouterr().out
  assert 'replay_capacity=100' in table and table.endswith('it fits\n')
  assert max(map(len, table.splitlines())) <= 80
  monkeypatch.setattr(capacity, 'machine_memory', lambda: 1000)
  with pytest.raises(SystemExit) as left:
    launched(monkeypatch, *given)
  assert left.value.code == 2
  told = capsys.readouterr()
  assert told.err.count('\n') == 1 and 'which has 1 kB' in told.err
  assert 'replay_capacity=100' in told.out and 'it fits' not in told.out
  assert not list(tmp_path.iterdir())


def test_another_machine_is_planned_for_alike():
  (here,) = plan.here(described())
  about = {'preset_name': PRESET, 'env': 'jax:pendulum', 'settings': SMALL}
  experiment = build.describe(**about)
  (there,) = plan.elsewhere(experiment, 'cpu', about)
  assert there.rows == here.rows
  assert (there.has, there.host_has, there.on_host) == (0, 0, 0)
  message = 'devices=1: all devices of target=v5e:4x4 learn; take 0'
  with pytest.raises(UserError, match=message):
    plan.elsewhere(described(), 'v5e:4x4', about)
