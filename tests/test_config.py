"""Settings by flags, the run's own file, errors in one line."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import textwrap
from typing import Literal

import numpy as np
import pytest

from experiments.files.errors import UserError
from experiments.runtime import config as configs
from experiments.runtime import run_config as run_configs
from experiments.runtime.overrides import describe, override

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Search:
  """A search.

  Attributes:
    simulations: of each search.
    kind: which rule.
  """

  simulations: int = 8
  kind: Literal['puct', 'gumbel'] = 'puct'


@dataclasses.dataclass(frozen=True)
class Agent:
  """An agent.

  Attributes:
    rate: of learning,
      in its first phase: small.
    gamma: discount.
    search: when acting.

  More text: not a field.
  """

  rate: float = 0.1
  gamma: float = 0.99
  layers: tuple[int, ...] = (64, 64)
  clip: float | None = None
  prefix: bool = True
  name: str = 'mlp'
  search: Search = dataclasses.field(default_factory=Search)

  def __post_init__(self):
    if not 0 <= self.gamma <= 1:
      raise ValueError(f'gamma={self.gamma}: must be within [0, 1]')


@dataclasses.dataclass(frozen=True)
class Env:
  shape: tuple[int, float] = (1, 0.5)
  name: str = 'catch'
  capacity: int = 10


SECTIONS = {'agent': Agent(), 'env': Env()}


@pytest.mark.parametrize(
  ('assignment', 'section', 'field', 'value'),
  [
    ('rate=3e-4', 'agent', 'rate', 3e-4),
    ('rate=2', 'agent', 'rate', 2.0),
    ('rate=inf', 'agent', 'rate', float('inf')),
    ('agent.rate = 1', 'agent', 'rate', 1.0),
    ('capacity=1e5', 'env', 'capacity', 100_000),
    ('capacity=-1_000', 'env', 'capacity', -1000),
    ('prefix=False', 'agent', 'prefix', False),
    ('prefix=true', 'agent', 'prefix', True),
    ('layers=1,2,3', 'agent', 'layers', (1, 2, 3)),
    ('layers=(7,)', 'agent', 'layers', (7,)),
    ('layers=', 'agent', 'layers', ()),
    ('shape=3,1', 'env', 'shape', (3, 1.0)),
    ('clip=5', 'agent', 'clip', 5.0),
    ('clip=none', 'agent', 'clip', None),
    ('env.name=a=b', 'env', 'name', 'a=b'),
  ],
)
def test_override_reads_values_by_annotation(assignment, section, field, value):
  result = override(SECTIONS, [assignment])
  got = getattr(result[section], field)
  assert got == value
  assert type(got) is type(value)
  # Nothing else moved.
  other = 'env' if section == 'agent' else 'agent'
  assert result[other] is SECTIONS[other]
  expected = dataclasses.replace(SECTIONS[section], **{field: value})
  assert result[section] == expected


@pytest.mark.parametrize(
  'name', ['simulations', 'search.simulations', 'agent.search.simulations']
)
def test_override_reaches_nested_dataclasses(name):
  result = override(SECTIONS, [f'{name}=50', 'kind=gumbel'])
  assert result['agent'].search == Search(simulations=50, kind='gumbel')
  assert result['agent'].gamma == 0.99


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two fields of which neither may be above the other's double."""

  low: int = 4
  high: int = 5

  def __post_init__(self):
    if not self.low <= self.high <= 2 * self.low:
      raise ValueError(f'high={self.high}: must be within low and twice low')


@pytest.mark.parametrize(
  'order', [('low=50', 'high=60'), ('high=60', 'low=50')]
)
def test_fields_that_fit_together_come_in_any_order(order):
  # Through low=8 and low=16 there is no way: each step must be allowed.
  pair = override({'pair': Pair()}, ['high=8', 'low=8', 'high=16'])['pair']
  assert pair == Pair(8, 16)
  with pytest.raises(UserError, match=r'high=60: .*high=60|low=50: .*high=5'):
    override({'pair': Pair()}, order)
  assert override({'pair': Pair()}, ['low=7', 'high=8'])['pair'] == Pair(7, 8)
  # What was refused at first does not undo what came later.
  assert override({'pair': Pair()}, ['high=9', 'high=8'])['pair'] == Pair(4, 8)


def test_override_takes_the_last_of_several():
  assert override(SECTIONS, ['rate=1', 'rate=2'])['agent'].rate == 2.0


@pytest.mark.parametrize(
  ('assignment', 'message'),
  [
    ('rate=fast', "rate is 'fast', must be float"),
    ('rate=nan', "rate is 'nan', must be float"),
    ('capacity=1.5', "capacity is '1.5', must be int"),
    ('capacity=inf', "capacity is 'inf', must be int"),
    ('prefix=1', "prefix is '1', must be true or false"),
    ('layers=1,x', "layers is '1,x', must be int,int,..."),
    ('shape=1', "shape is '1', must be int,float"),
    ('clip=no', "clip is 'no', must be float or none"),
    ('kind=uct', "kind is 'uct', must be one of puct, gumbel"),
    ('search=1', 'no field search: '),
    ('name=x', 'name is ambiguous: say agent.name or env.name'),
    ('env.rate=1', 'no field env.rate: did you mean rate? '),
    ('rat=1', 'no field rat: did you mean rate? fields are '),
    ('rate', '--set=rate: should be field=value'),
    ('=1', '--set==1: should be field=value'),
    ('gamma=1.5', '--set=gamma=1.5: gamma=1.5: must be within [0, 1]'),
  ],
)
def test_override_refuses_in_one_line(assignment, message):
  with pytest.raises(UserError) as caught:
    override(SECTIONS, [assignment])
  assert str(caught.value).startswith(message)
  assert '\n' not in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Low:
  name: str = 'low'
  k: int = 1
  low: int = 2


@dataclasses.dataclass(frozen=True)
class High:
  name: str = 'high'
  k: int = 3


@dataclasses.dataclass(frozen=True)
class Mixed:
  part: Low | High = Low()


MIXED = {'agent': Mixed()}


@pytest.mark.parametrize('name', ['part', 'part.name', 'agent.part.name'])
def test_one_of_several_dataclasses_is_chosen_by_its_name(name):
  for settings in ([f'{name}=high', 'k=5'], ['agent.k=5', f'{name}=high']):
    assert override(MIXED, settings) == {'agent': Mixed(High(k=5))}
  # What both have stays, and so does all where nothing changes.
  assert override(MIXED, [f'{name}=high']) == {'agent': Mixed(High(k=1))}
  assert override(MIXED, ['low=7', f'{name}=low'])['agent'].part.low == 7


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (['part=middle'], "part is 'middle', must be one of low, high"),
    (['low=3', 'part=high'], 'no field low: it needs part=low'),
    (['part.agent.k=3'], 'no field part.agent.k: '),
  ],
)
def test_what_another_dataclass_has_is_refused(settings, message):
  with pytest.raises(UserError) as caught:
    override(MIXED, settings)
  assert str(caught.value).startswith(message)


def test_a_mixture_of_an_older_version_is_read(tmp_path):
  """Its router's fields were the mixture's own."""
  old = {'num_experts': 8, 'router': 'balanced', 'k': 2, 'limit': 3}
  old |= {'groups': 0, 'slots': 1, 'capacity_factor': 2.0, 'noise': True}
  content = {'agent': {'network': {'moe': old}, 'critic_moe': dict(old)}}
  (tmp_path / 'config.json').write_text(json.dumps(content))
  new = {
    'num_experts': 8,
    'router': {'name': 'balanced', 'k': 2, 'limit': 3},
    'capacity_factor': 2.0,
    'room_factor': 2.0,
  }
  agent = run_configs.read_run_config(tmp_path)['agent']
  assert agent == {'network': {'moe': new}, 'critic_moe': new}
  # Checkpoints know the settings as they were written.
  identity = run_configs.read_identity(tmp_path)
  assert identity is not None
  assert identity['settings'] == run_configs.digest(content)


def test_unknown_field_lists_all_fields():
  with pytest.raises(UserError) as caught:
    override(SECTIONS, ['zzz=1'])
  listed = str(caught.value).partition('fields are ')[2].split(', ')
  assert listed == [
    'agent.name',
    'capacity',
    'clip',
    'env.name',
    'gamma',
    'kind',
    'layers',
    'prefix',
    'rate',
    'shape',
    'simulations',
  ]


def test_validate_sees_the_result_and_refuses():
  seen = []

  def validate(sections):
    seen.append(sections['env'].capacity)
    if sections['env'].capacity < 10:
      raise ValueError('capacity is too small')

  override(SECTIONS, ['capacity=20'], validate)
  with pytest.raises(UserError, match=r'^capacity is too small$'):
    override(SECTIONS, ['capacity=5'], validate)
  assert seen == [20, 5]


def test_describe_gives_types_values_and_docs():
  fields = {f.name: f for f in describe(Agent(rate=0.5))}
  assert list(fields) == [
    'rate',
    'gamma',
    'layers',
    'clip',
    'prefix',
    'name',
    'search.simulations',
    'search.kind',
  ]
  assert fields['rate'] == (
    'rate',
    'float',
    0.5,
    'of learning, in its first phase: small.',
  )
  assert fields['gamma'].doc == 'discount.'
  assert fields['clip'].type == 'float or none'
  assert fields['search.kind'] == (
    'search.kind',
    'one of puct, gumbel',
    'puct',
    'which rule.',
  )
  assert describe(Env)[2] == ('capacity', 'int', 10, '')


def run_config(**changes):
  return {
    'preset': 'toy',
    'seed': 0,
    'agent': Agent(rate=np.float64(0.1)),
    'scale': float('nan'),
    **changes,
  }


def test_run_config_is_written_whole_and_found_equal(tmp_path):
  workdir = tmp_path / 'a' / 'run'
  assert run_configs.check_run_config(workdir, run_config(), 'cpu') is None
  assert not workdir.exists()
  run_configs.write_run_config(workdir, run_config(), 'cpu')
  assert [p.name for p in workdir.iterdir()] == ['config.json']
  content = json.loads((workdir / 'config.json').read_text())
  assert content['agent'] == {
    'rate': 0.1,
    'gamma': 0.99,
    'layers': [64, 64],
    'clip': None,
    'prefix': True,
    'name': 'mlp',
    'search': {'simulations': 8, 'kind': 'puct'},
  }
  made = content['made_with']
  assert made['device'] == 'cpu'
  assert made['versions']['python'] == '.'.join(map(str, sys.version_info[:3]))
  assert made['versions']['jax'] == sys.modules['jax'].__version__
  assert run_configs.check_run_config(workdir, run_config(), 'cpu') == []


def test_other_device_is_noted_not_refused(tmp_path):
  run_configs.write_run_config(tmp_path, run_config(), 'cpu')
  notes = run_configs.check_run_config(tmp_path, run_config(), 'gpu')
  assert notes == ['device was "cpu", is "gpu"']


def test_another_config_is_refused_and_its_fields_named(tmp_path):
  run_configs.write_run_config(tmp_path, run_config(), 'cpu')
  other = run_config(
    seed=1, agent=Agent(search=Search(simulations=9)), extra=True
  )
  with pytest.raises(UserError) as caught:
    run_configs.check_run_config(tmp_path, other, 'cpu')
  assert str(caught.value) == (
    f'{tmp_path} holds another run: seed was 0, is 1; '
    'agent.search.simulations was 8, is 9; extra was unset, is true. '
    'Take another --workdir, or delete it'
  )


def test_bool_is_not_an_integer(tmp_path):
  run_configs.write_run_config(tmp_path, {'a': 1}, 'cpu')
  with pytest.raises(UserError, match='a was 1, is true'):
    run_configs.check_run_config(tmp_path, {'a': True}, 'cpu')


def test_read_run_config_refuses_other_folders(tmp_path):
  with pytest.raises(UserError, match="is not a run's folder"):
    run_configs.read_run_config(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(UserError, match='is not JSON'):
    run_configs.read_run_config(tmp_path)


def test_user_errors_turns_value_errors_only():
  with pytest.raises(UserError, match=r'^bad$'), configs.user_errors():
    raise ValueError('bad')
  with pytest.raises(KeyError), configs.user_errors():
    raise KeyError('bug')


LAUNCHER = textwrap.dedent("""
  from absl import flags
  from experiments.runtime import config
  SEED = flags.DEFINE_integer('seed', 0, 'of everything')
  def main():
    if SEED.value == 1:
      raise config.UserError('seed is 1\\n  which is bad')
    if SEED.value == 2:
      raise RuntimeError('a bug')
    print('seed', SEED.value)
  if __name__ == '__main__':
    config.run_main(main)
""")


@pytest.mark.parametrize(
  ('flag', 'code', 'out', 'error'),
  [
    ('--seed=3', 0, 'seed 3\n', ''),
    ('--seed=1', 2, '', 'error: seed is 1 which is bad\n'),
    ('--seed=x', 2, '', 'error: flag --seed=x: '),
    ('--sed=1', 2, '', "error: Unknown command line flag 'sed'. Did you"),
    ('seed=1', 2, '', "error: unexpected argument 'seed=1': flags are"),
    ('--seed=2', 1, '', 'Traceback (most recent call last)'),
  ],
)
def test_launcher_fails_in_one_line(tmp_path, flag, code, out, error):
  script = tmp_path / 'launcher.py'
  script.write_text(LAUNCHER)
  done = subprocess.run(
    [sys.executable, script, flag],
    capture_output=True,
    text=True,
    env={'PYTHONPATH': str(ROOT)},
  )
  assert (done.returncode, done.stdout) == (code, out)
  assert done.stderr.startswith(error)
  if code == 2:
    assert done.stderr.count('\n') == 1
