"""Imports point downwards from room to room, and never in a circle of files.

`BELOW` draws the house of CONTRIBUTING.md, a rule for each room. No agent knows
another, no module reaches for another's private names, and a command starts
without JAX.
"""

import ast
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = ('agents', 'networks', 'search', 'experiments', 'tests')

_AGENTS = {'agents', 'agents.core', 'networks', 'search'}
_FILES = {'agents.core', 'experiments.files', 'networks', 'search'}
_RUNTIME = {*_FILES, 'experiments.envs'}
_BUILD = {
  *_AGENTS,
  *(
    f'experiments.{name}'
    for name in ('data', 'envs', 'files', 'presets', 'report', 'runtime')
  ),
}
_RUN = {*_BUILD, 'experiments.build'}
_STUDIES = {
  *_RUN,
  'search.exact',
  *(
    f'experiments.{name}'
    for name in ('benchmarks', 'playing', 'sweeps', 'training')
  ),
}
# What each room may import of ours, besides itself.
BELOW = {
  'networks': set(),
  'search': set(),
  'search.exact': {'search'},
  'agents.core': {'networks', 'search'},
  'agents': {'agents.core', 'networks', 'search'},
  'experiments.files': set(),
  'experiments.presets': {'experiments.files'},
  'experiments.envs': _FILES,
  'experiments.data': _RUNTIME,
  'experiments.runtime': _RUNTIME,
  'experiments.report': {'experiments.files', 'experiments.runtime'},
  'experiments.build': _BUILD,
  'experiments.training': _RUN,
  'experiments.playing': _RUN,
  'experiments.benchmarks': _RUN,
  'experiments.sweeps': {*_RUN, 'experiments.training'},
  'experiments.studies': _STUDIES,
  'experiments.notebooks': {*_STUDIES, 'experiments.studies'},
}
EVERYTHING = {*BELOW, 'experiments'}

# What takes long to import, or starts a device: launchers and presets load it
# once the flags are parsed.
HEAVY = {
  'agents',
  'chex',
  'distrax',
  'envpool',
  'flax',
  'gymnasium',
  'jax',
  'jaxlib',
  'matplotlib',
  'mctx',
  'networks',
  'optax',
  'orbax',
  'pgx',
  'ray',
  'rich',
  'rlax',
  'scipy',
  'search',
}


class Import(NamedTuple):
  """A module that is named by an import, and whether importing runs it."""

  module: str
  eager: bool
  line: int


def imports(source: str, package: str, known: set[str]) -> Iterator[Import]:
  """All modules that a source text imports, anywhere in it.

  Args:
    source: Python.
    package: the package that relative imports start from.
    known: our modules, to tell `from package import module` from a name.
  """

  def visit(node, eager):
    if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.dump(node.test):
      eager = False
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      eager = False
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield Import(alias.name, eager, node.lineno)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        above = package.split('.')[: len(package.split('.')) - node.level + 1]
        base = '.'.join([*above, *([base] if base else [])])
      for alias in node.names:
        name = f'{base}.{alias.name}'
        # A name of mctx that is private may be a module: `_src`.
        module = name in known or alias.name.startswith('_')
        yield Import(name if module else base, eager, node.lineno)
    elif (
      isinstance(node, ast.Call)
      and ast.unparse(node.func).endswith(('import_module', '__import__'))
      and node.args
      and isinstance(node.args[0], ast.Constant)
    ):
      yield Import(str(node.args[0].value), eager, node.lineno)
    elif isinstance(node, ast.Attribute) and node.attr == '_src':
      yield Import(ast.unparse(node), eager, node.lineno)
    for child in ast.iter_child_nodes(node):
      yield from visit(child, eager)

  yield from visit(ast.parse(source), True)


def room(module: str) -> str:
  """The room of one of our modules."""
  parts = module.split('.')
  pair = '.'.join(parts[:2])
  return pair if pair in BELOW else parts[0]


def package_of(path: str) -> str:
  return path.rpartition('/')[0].replace('/', '.')


def module_of(path: str) -> str:
  return re.sub(r'/__init__$', '', path.removesuffix('.py')).replace('/', '.')


def violations(files: dict[str, str]) -> list[str]:
  """What breaks the rules in `{path: source}`, one line each."""
  known = {module_of(path) for path in files}
  found = {
    module_of(path): list(imports(source, package_of(path), known))
    for path, source in files.items()
  }
  lines = []
  for path in files:
    module = module_of(path)
    here = room(module)
    if here == 'tests':
      continue
    lines += private(path, files[path], known)
    for name, _, line in found[module]:
      top, where = name.split('.')[0], f'{path}:{line}: {name}'
      if top in OURS:
        there = room(name)
        if there not in BELOW.get(here, EVERYTHING) | {here}:
          lines.append(f'{where}: {here} may not import {there}')
        elif here == there == 'agents' and name not in ('agents', module):
          lines.append(f'{where}: an agent may not import another')
      if top == 'flax' and here != 'networks':
        lines.append(f'{where}: only networks imports flax')
      if name.startswith('mctx._'):
        lines.append(f'{where}: no module knows private mctx')
    flags = re.search(r'^def define_flags', files[path], re.M)
    if flags or re.fullmatch(r'experiments/\w+\.py', path):
      lines += [
        f'{path}: {chain} is imported before the flags are parsed'
        for chain in heavy(module, found)
      ]
  return [*lines, *circles(found)]


def private(path: str, source: str, known: set[str]) -> Iterator[str]:
  """Names with an underscore that a module takes from another of ours."""
  modules = {}
  tree = ast.parse(source)
  for node in ast.walk(tree):
    if not isinstance(node, ast.ImportFrom):
      continue
    for alias in node.names:
      full = f'{node.module}.{alias.name}'
      if full in known:
        modules[alias.asname or alias.name] = full
      elif node.module in known and alias.name.startswith('_'):
        yield f'{path}:{node.lineno}: {full} is private'
  for node in ast.walk(tree):
    if (
      isinstance(node, ast.Attribute)
      and isinstance(node.value, ast.Name)
      and re.match('_[^_]', node.attr)
      and node.value.id in modules
    ):
      full = f'{modules[node.value.id]}.{node.attr}'
      yield f'{path}:{node.lineno}: {full} is private'


def circles(found: dict[str, list[Import]]) -> list[str]:
  """Modules that import each other in a loop, wherever they do it."""
  left = {
    module: {
      i.module for i in inside if i.module in found and i.module != module
    }
    for module, inside in found.items()
  }
  # What imports nothing that is left is in no loop, nor is what nobody imports.
  while True:
    named = set().union(*left.values()) if left else set()
    ends = {m for m, below in left.items() if not below or m not in named}
    if not ends:
      break
    left = {m: below - ends for m, below in left.items() if m not in ends}
  return [
    f'{module}: is in a circle with {", ".join(sorted(below))}'
    for module, below in left.items()
  ]


def heavy(module: str, found: dict[str, list[Import]]) -> list[str]:
  """Chains of eager imports from a module to what is heavy."""
  chains, queue, seen = [], [(module, module)], {module}
  while queue:
    here, chain = queue.pop(0)
    for name, eager, _ in found.get(here, []):
      if not eager or name in seen:
        continue
      seen.add(name)
      if name.split('.')[0] in HEAVY:
        chains.append(f'{chain} > {name}')
      else:
        queue.append((name, f'{chain} > {name}'))
  return chains


def questions(path: str, source: str) -> list[str]:
  """Where a file asks what an experiment learns from, one line each.

  It is chosen once, in `build.experiment`, and its `Material` answers for it.
  """
  lines = []
  for node in ast.walk(ast.parse(source)):
    asked = ''
    if isinstance(node, ast.Attribute):
      owner = ast.unparse(node.value)
      if node.attr in ('is_text', 'reads_text', 'Corpus'):
        asked = node.attr
      # A sweep's plan hands on what the user has named.
      elif node.attr == 'dataset' and owner != 'self':
        asked = f'{owner}.dataset'
    elif isinstance(node, ast.ImportFrom):
      names = {alias.name for alias in node.names}
      asked = ', '.join(sorted(names & {'Corpus', 'reads_text'}))
    if asked:
      lines.append(f'{path}:{node.lineno}: {asked}: ask experiment.material')
  return lines


def test_what_is_learned_from_is_asked_in_one_room_alone():
  found = [
    line
    for path in sorted((ROOT / 'experiments').rglob('*.py'))
    for line in questions(
      path.relative_to(ROOT).as_posix(), path.read_text(encoding='utf-8')
    )
  ]
  rooms = ('experiments/build/', 'experiments/data/')
  assert [line for line in found if not line.startswith(rooms)] == []


@pytest.mark.parametrize(
  'source',
  [
    'if experiment.is_text:\n  pass',
    'where = experiment.dataset or experiment.env_name',
    'on_data = bool(first.dataset)',
    'from experiments.data.text import Corpus',
    'def f():\n  return isinstance(data, text.Corpus)',
    'build.reads_text(agent)',
  ],
)
def test_what_asks_for_the_material_is_found(source):
  (line,) = questions('experiments/train.py', source)
  assert 'ask experiment.material' in line


def test_our_imports_point_downwards():
  files = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
    for package in OURS
    for path in sorted((ROOT / package).rglob('*.py'))
  }
  assert {room(module_of(path)) for path in files} == {
    *EVERYTHING,
    'tests',
  }
  assert violations(files) == []


FINE = {
  'search/_mctx.py': 'import mctx',
  'search/exact/bellman.py': 'from search import model',
  'search/policies.py': 'import mctx\nfrom search import _mctx',
  'networks/mlp.py': 'from flax import linen',
  'agents/core/losses.py': 'import rlax\nfrom . import types',
  'agents/core/types.py': 'import search.policies',
  'agents/sac.py': 'from agents.core import losses\nfrom networks import mlp',
  'agents/cql.py': '',
  'experiments/envs/host.py': 'from agents.core.types import Spec',
  'experiments/runtime/loop.py': (
    'import jax\nfrom agents.core import types\n'
    'from experiments.envs import host'
  ),
  'experiments/runtime/config.py': 'import json',
  'experiments/presets/table.py': 'import dataclasses',
  'experiments/presets/settings.py': 'from experiments.files import errors',
  'experiments/files/errors.py': '',
  'experiments/build/__init__.py': (
    'from experiments.build.agent import make_agent'
  ),
  'experiments/build/agent.py': (
    'from experiments.presets import table\nfrom experiments.report import runs'
  ),
  'experiments/report/runs.py': 'from experiments.runtime import config',
  'experiments/playing/match.py': 'from experiments import build',
  'experiments/training/run.py': 'from experiments import build',
  'experiments/benchmarks/scale.py': 'from experiments import build',
  'experiments/sweeps/plan.py': 'from experiments.training import run',
  'experiments/studies/newton.py': (
    'from experiments.playing import match\n'
    'from experiments.training import run\n'
    'from experiments.sweeps import plan\n'
    'def define_flags(): ...'
  ),
  'experiments/notebooks/execute.py': 'from experiments.studies import newton',
  'experiments/train.py': (
    'from experiments import presets\n'
    'from experiments.runtime import config\n'
    'from typing import TYPE_CHECKING\n'
    'if TYPE_CHECKING:\n  import jax\n'
    'def main():\n  import jax\n  from experiments.runtime import loop\n'
    '  from agents import sac, cql'
  ),
  'experiments/notebooks/tour.py': 'import jax\nfrom agents import sac',
  'tests/test_sac.py': 'import flax\nfrom mctx._src import tree',
}


def test_what_is_fine_passes():
  assert violations(FINE) == []


@pytest.mark.parametrize(
  ('path', 'source', 'complaint'),
  [
    ('networks/mlp.py', 'import search.policies', 'may not import search'),
    ('networks/mlp.py', 'from agents.core import types', 'agents.core'),
    ('search/policies.py', 'from networks import mlp', 'may not import netw'),
    ('search/policies.py', 'from agents.core.types import Spec', 'agents.core'),
    ('search/policies.py', 'from search.exact import linear', 'search.exact'),
    ('agents/sac.py', 'from search.exact import bellman', 'search.exact'),
    ('search/policies.py', 'import flax.linen as nn', 'only networks imports'),
    ('search/policies.py', 'from mctx._src import base', 'private mctx'),
    ('search/policies.py', 'from mctx import _src', 'private mctx'),
    ('search/policies.py', 'import mctx\nmctx._src.base', 'private mctx'),
    ('agents/core/types.py', 'import agents.sac', 'may not import agents'),
    ('agents/core/types.py', 'from .. import sac', 'may not import agents'),
    ('agents/core/types.py', 'from ..sac import Config', 'import agents'),
    ('agents/core/types.py', 'def f():\n  from agents import sac', 'agents'),
    ('agents/cql.py', 'from agents.sac import Config', 'import another'),
    ('agents/cql.py', 'from . import sac', 'import another'),
    ('agents/cql.py', 'from agents import core, sac', 'import another'),
    ('agents/cql.py', 'import experiments.runtime.loop', 'experiments.runtime'),
    ('experiments/envs/host.py', 'from agents import sac', 'import agents'),
    ('experiments/envs/host.py', 'import experiments.runtime.loop', 'runtime'),
    ('experiments/data/npz.py', 'import agents.sac', 'import agents'),
    ('experiments/data/npz.py', 'import experiments.runtime.loop', 'runtime'),
    ('experiments/files/reading.py', 'import agents.core.types', 'agents'),
    ('experiments/runtime/loop.py', 'import experiments.data.npz', 'data'),
    ('experiments/runtime/loop.py', 'import agents.sac', 'import agents'),
    ('experiments/runtime/loop.py', 'from experiments import train', 'import'),
    (
      'experiments/runtime/loop.py',
      "import importlib\nimportlib.import_module('agents.sac')",
      'may not import agents',
    ),
    ('experiments/train.py', 'import tests.test_sac', 'may not import tests'),
    ('experiments/train.py', 'import jax.numpy as jnp', 'train > jax.numpy'),
    ('experiments/train.py', 'try:\n  import jax\nfinally: pass', '> jax is'),
    (
      'experiments/train.py',
      'from experiments.runtime import loop',
      'experiments.train > experiments.runtime.loop > jax is imported before',
    ),
    ('search/exact/bellman.py', 'from networks import mlp', 'import networks'),
    ('experiments/presets/table.py', 'from agents import sac', 'import agents'),
    (
      'experiments/presets/table.py',
      'def f():\n  from experiments.runtime import config',
      'may not import experiments.runtime',
    ),
    ('experiments/report/runs.py', 'from experiments import build', '.build'),
    (
      'experiments/build/agent.py',
      'from experiments.training import run',
      'may not import experiments.training',
    ),
    (
      'experiments/training/run.py',
      'from experiments.playing import match',
      'may not import experiments.playing',
    ),
    (
      'experiments/playing/match.py',
      'from experiments.training import run',
      'may not import experiments.training',
    ),
    (
      'experiments/benchmarks/scale.py',
      'from experiments.sweeps import plan',
      'may not import experiments.sweeps',
    ),
    (
      'experiments/sweeps/plan.py',
      'from experiments.playing import match',
      'may not import experiments.playing',
    ),
    (
      'experiments/studies/newton.py',
      'from experiments.notebooks import execute',
      'may not import experiments.notebooks',
    ),
    (
      'experiments/studies/newton.py',
      'import jax\ndef define_flags(): ...',
      'studies.newton > jax is imported before the flags',
    ),
    (
      'experiments/notebooks/execute.py',
      'from experiments import train',
      'may not import experiments',
    ),
    (
      'experiments/runtime/loop.py',
      'def f():\n  from experiments.runtime import config\n  config._read()',
      'experiments.runtime.config._read is private',
    ),
    (
      'agents/core/losses.py',
      'from agents.core.types import _Box',
      'agents.core.types._Box is private',
    ),
  ],
)
def test_what_is_wrong_is_found(path, source, complaint):
  found = violations({**FINE, path: source})
  assert any(line.startswith(path) and complaint in line for line in found)


@pytest.mark.parametrize(
  ('one', 'other'),
  [
    ('search/exact/bellman.py', 'search/exact/riccati.py'),
    ('agents/core/losses.py', 'agents/core/types.py'),
    ('experiments/envs/host.py', 'experiments/envs/make.py'),
    ('experiments/playing/match.py', 'experiments/playing/players.py'),
  ],
)
def test_a_circle_is_found_wherever_it_is_imported(one, other):
  first, second = module_of(one), module_of(other)
  files = {
    **FINE,
    one: f'import {second}',
    other: f'def f():\n  import {first}',
  }
  assert sorted(violations(files)) == sorted(
    f'{a}: is in a circle with {b}'
    for a, b in ((first, second), (second, first))
  )
