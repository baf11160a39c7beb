"""What is counted of compiled programs, faults planted, and the whole suite."""

import importlib.metadata
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import read_csv

from experiments.benchmarks import compilation, compile_programs
from experiments.build.programs import Program
from experiments.files.errors import UserError
from experiments.runtime import compile_targets, compiled
from experiments.runtime import mesh as meshes

COMPILERS = pathlib.Path(__file__).resolve().parent.parent / '.compilers'
CPU = compile_targets.parse('cpu')


def counted(function, *args, **keywords):
  return compiled.count(jax.jit(function, **keywords).lower(*args).compile())


def row_of(function, *args, target=CPU):
  program = Program(
    'agent', 'planted', 'act', '', lambda: jax.jit(function).trace(*args)
  )
  return compilation.compile_program(program, target)


def split(number=2):
  mesh = meshes.make_mesh(jax.devices()[:number])
  return meshes.split(mesh), meshes.replicated(mesh)


# What is counted.


def test_loops_and_those_of_known_length():
  def function(x):
    x = jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(x @ x), x)
    return jax.lax.while_loop(lambda x: jnp.max(x) > 0.1, lambda x: x / 2, x)

  counts = counted(function, jnp.ones((8, 8)))
  assert (counts.loops, counts.loops_known) == (2, 1)
  assert 0 < counts.kernels_in_loops < counts.kernels
  assert (counts.host, counts.float64, counts.collectives) == (0, 0, {})


def test_memory_is_what_the_shapes_take():
  counts = counted(lambda x, y: (x @ y).sum(), *2 * [jnp.ones((64, 64))])
  assert counts.arguments == 2 * 64 * 64 * 4
  assert counts.results == 4
  assert counts.flops >= 2 * 64**3


def test_a_mean_over_devices_is_one_all_reduce():
  rows, whole = split()
  counts = counted(
    lambda x: x.mean(0),
    jnp.ones((8, 4)),
    in_shardings=rows,
    out_shardings=whole,
  )
  assert counts.collectives == {'all-reduce': 1}
  assert counts.reduced == 4 * 4 and counts.collectives_in_loops == 0


def test_a_collective_within_a_loop_is_told_apart():
  rows, _ = split()

  def function(x):
    return jax.lax.while_loop(lambda x: x.max() > 0.1, lambda x: x / 2, x)

  counts = counted(
    function, jnp.ones((8, 4)), in_shardings=rows, out_shardings=rows
  )
  assert counts.collectives_in_loops == counts.collectives['all-reduce'] == 1


def test_text_of_other_compilers_is_read():
  # A loop whose length no annotation says, and a kernel with parts of its own.
  text = """HloModule jit_f
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %s = f32[8]{0} sine(%p)
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %r = f32[8]{0} all-reduce-start(%f), to_apply=%add
  %d = f32[8]{0} all-reduce-done(%r)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%i, %d)
}
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %c = pred[]{:T(512)} compare(%i, %n), direction=LT
}
ENTRY %main (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%x), condition=%cond, body=%body
}
"""
  code = compiled.read(text)
  (loop,) = [i for i in code if i.opcode == 'while']
  assert loop.is_bounded and not loop.in_loop
  (reduce,) = [i for i in code if i.opcode == 'all-reduce']
  assert reduce.in_loop and reduce.size == 32
  (sine,) = [i for i in code if i.opcode == 'sine']
  assert sine.is_fused and sine.in_loop


# Faults.


def test_a_callback_is_seen():
  def act(x):
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return x + jax.pure_callback(lambda: np.float32(1), shape)

  assert row_of(lambda x: x + 1, jnp.ones(3))['host'] == 0
  assert row_of(act, jnp.ones(3))['host'] == 1


def test_a_float64_is_seen():
  assert row_of(lambda x: x * np.float64(2), jnp.ones(3))['float64'] == 0
  with jax.enable_x64(True):
    row = row_of(lambda x: x * jnp.float64(2), jnp.ones(3, jnp.float32))
    assert row['float64'] > 0


def test_a_flattening_that_mixes_the_split_axis_gathers():
  rows, whole = split()
  frames, weights = jnp.ones((8, 6, 3)), jnp.ones((3, 4))

  def right(w, x):  # [B, T, ...]
    return jnp.sin(x.reshape(48, 3) @ w).mean()

  def wrong(w, x):
    return jnp.sin(x.swapaxes(0, 1).reshape(48, 3) @ w).mean()

  found = {
    function: counted(
      jax.grad(function), weights, frames, in_shardings=(whole, rows)
    ).collectives
    for function in (right, wrong)
  }
  assert found[right] == {'all-reduce': 1}
  assert set(found[wrong]) - {'all-reduce'}


def test_a_program_larger_than_the_device_is_told():
  small = CPU._replace(memory=1000)
  row = row_of(lambda x: x + 1, jnp.ones(1000), target=small)
  assert row['error'].startswith('needs ') and row['arguments'] == 4000


def test_what_cannot_be_compiled_has_its_message():
  row = row_of(lambda x: x @ jnp.ones(4), jnp.ones(3))
  assert 'dot_general' in row['error'] and '\n' not in row['error']


# Machines.


def test_machines_by_their_names():
  slice_ = compile_targets.parse('v5e:4x16')
  assert (slice_.platform, slice_.devices) == ('tpu', 64)
  assert compile_targets.parse('h100:8').topology == '1x1x8'
  assert compile_targets.parse('v5p:2x2x1').devices == 4
  for name in ('v5e', 'v5e:4', 'v5p:2x2', 'h100:9', 'a100', 'v5e:0x1', ''):
    with pytest.raises(UserError, match=f'target={name}: must be h100'):
      compile_targets.parse(name)


def test_a_compiler_that_cannot_be_installed_is_one_line(monkeypatch, tmp_path):
  def failed(*args, **kwargs):
    del args, kwargs
    return types.SimpleNamespace(returncode=1, stderr='a\nerror: no network\n')

  monkeypatch.setattr(compile_targets, 'requirements', lambda _: ['libx==1'])
  monkeypatch.setattr(compile_targets.subprocess, 'run', failed)
  message = 'tpu cannot be installed: error: no network; it needs libx==1'
  with pytest.raises(UserError, match=message):
    compile_targets.prepare('tpu', tmp_path)


# The suite.


def run(target, names, rows, parts, out):
  targets = compilation.read_targets([target])
  compilation.run(targets, names, rows, parts, COMPILERS, out)
  return read_csv(out)


def test_the_suite_goes_on_where_it_was(tmp_path, capsys):
  out = tmp_path / 'c.csv'
  rows = run('cpu', ['bc_small'], 0, ['act'], out)
  assert [row['part'] for row in rows] == ['act'] and not rows[0]['error']
  rows = run('cpu', ['bc_small'], 0, ['init', 'act'], out)
  assert [row['part'] for row in rows] == ['act', 'init']
  assert capsys.readouterr().out.count('bc_small') == 2
  out.write_text('a,b\n1,2\n')
  with pytest.raises(UserError, match=r'c\.csv'):
    run('cpu', ['bc_small'], 0, ['act'], out)


def tpu_or_skip():
  try:
    compile_targets.prepare('tpu', COMPILERS)
  except UserError as error:
    pytest.skip(str(error))


def check(row, memory=2**28):
  assert not row['error'], row
  assert (row['host'], row['float64']) == ('0', '0'), row
  needed = ('temporaries', 'arguments', 'results', 'code')
  assert sum(int(row[name]) for name in needed) < memory, row
  kinds = {name.replace('-', '_') for name in compiled.COLLECTIVES}
  found = {name for name in kinds if int(row[name])}
  part = row['part'].partition(' ')[0]
  assert found <= ({'all_reduce'} if part in ('update', 'interval') else set())
  if part == 'update':
    assert int(row['collectives_in_loops']) == 0, row


def on_slices(targets, names, rows, tmp_path, monkeypatch, parts):
  tpu_or_skip()
  # Tests compile without optimisation; here it is what is looked at.
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  return [
    run(target, names, rows, parts, tmp_path / f'{i}.csv')
    for i, target in enumerate(targets)
  ]


def test_programs_for_a_slice_ask_nobody(tmp_path, monkeypatch):
  names, parts = ['bc_small'], ['act', 'update']
  (rows,) = on_slices(['v5e:4x4'], names, 2, tmp_path, monkeypatch, parts)
  assert len(rows) == 2
  for row in rows:
    check(row)
    assert row['devices'] == '16'
    assert not math.isnan(float(row['flops'])), row


@pytest.mark.slow
def test_a_search_by_kernels_is_one_loop_of_known_length(tmp_path):
  version = importlib.metadata.version('jax')
  if not (COMPILERS / f'cuda-jax-{version}/installed.txt').exists():
    pytest.skip('the compiler for CUDA is not installed (4 GB)')
  found = {'loops': [], 'kernels': []}
  for row in run('h100', ['search'], 0, [], tmp_path / 'c.csv'):
    assert not row['error'], row
    if row['setting'].endswith('evaluate'):
      engine = row['setting'].partition('engine=')[2].split()[0]
      loops, known = int(row['loops']), int(row['loops_known'])
      found[engine].append((row['name'], loops, loops - known))
  rules = compile_programs.RULES
  assert found['loops'] == [(rule, 3, 2) for rule in rules]
  assert found['kernels'] == [(rule, 1, 0) for rule in rules]


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    'search',
    'atac_small',
    'cql_small',
    'iql_small',
    'td3_bc_small',
    'sac_pendulum',
    'efficientzero_catch',
    'muzero_catch',
    'sampled_muzero_pendulum',
    'alphazero_tic_tac_toe',
  ],
)
def test_the_work_of_a_chip_stays_the_same(name, tmp_path, monkeypatch):
  few, many = on_slices(
    ['v5e:2x2', 'v5e:8x8'], [name], 8, tmp_path, monkeypatch, []
  )
  assert len(few) == len(many) > 0
  for before, after in zip(few, many):
    check(before)
    check(after)
    for figure in ('flops', 'bytes'):
      grown = float(after[figure]) / float(before[figure])
      assert grown < 1.05, (after['part'], figure, grown)
