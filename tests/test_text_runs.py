"""Runs that learn from a text: launchers, resume, devices, sweeps."""

import gzip
import json
import struct
import zlib

import jax
import numpy as np
import pytest
from absl import flags
from launching import read_csv
from test_text import make_text

from experiments import build, corpus, play, presets, train
from experiments.build import corpus as corpus_lib
from experiments.build import saved
from experiments.data import text as texts
from experiments.runtime import config as configs
from experiments.runtime import loop, mesh, run_config
from experiments.runtime import token_windows as runtime
from experiments.studies import specialisation
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps import program as sweep_program
from experiments.sweeps import train as sweep_train
from experiments.training import run, stages, watcher
from experiments.training.keeper import Saved

# Runs.

STEPS = 12
SETTINGS = (
  'vocabulary=280',
  'text.length=8',
  'held_out=0.1',
  'network.size=8',
  'network.moe.hidden=8',
  'network.moe.num_experts=4',
  # Compiled sooner than a loop.
  'network.moe.backend=dense',
  'warmup_updates=2',
  'learning_rate=0.03',
  'log_experts=true',
  'batch_size=8',
  'devices=1',
  'log_every=2',
  'checkpoint_every=4',
  'keep_checkpoints=10',
  'evaluate_every=4',
)
PRESET = 'moe_language_small'


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'words.txt'
  path.write_text(make_text(), encoding='utf-8')
  return path


def describe(path, **changes):
  changes = {'steps': STEPS, 'settings': SETTINGS} | changes
  return build.describe(PRESET, dataset=str(path), **changes)


def rows(path):
  clocks = ('updates_per_second', 'compiled')
  return [
    {k: v for k, v in r.items() if k not in clocks} for r in read_csv(path)
  ]


def by_flags(module, *arguments):
  """A launcher as its command line runs it, but in this process."""
  before = set(flags.FLAGS)
  module.define_flags()
  try:
    flags.FLAGS(['program', *arguments])
    module.main()
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


@pytest.fixture(scope='module')
def whole(path, tmp_path_factory):
  """An uninterrupted run."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    # Set, it is left as it is.
    patch.setenv('JAX_COMPILATION_CACHE_DIR', 'unused')
    by_flags(
      train,
      f'--preset={PRESET}',
      f'--text={path}',
      f'--steps={STEPS}',
      f'--workdir={workdir}',
      *(f'--set={s}' for s in SETTINGS),
    )
  return workdir


def test_a_run_leaves_what_it_promises(whole, path):
  metrics = rows(whole / 'metrics.csv')
  assert [int(r['step']) for r in metrics] == list(range(2, STEPS + 1, 2))
  for row in metrics:
    loads = [float(row[f'load_{e}']) for e in range(4)]
    assert sum(loads) == pytest.approx(2)
    assert 'decisions' not in row
    assert bool(row['held_perplexity']) is (int(row['step']) % 4 == 0)
  assert float(metrics[-1]['loss']) < float(metrics[0]['loss'])
  last = metrics[-1]
  assert float(last['held_perplexity']) == pytest.approx(
    np.exp(-float(last['held_log_likelihood'])), rel=1e-5
  )
  (final,) = rows(whole / 'evaluation.csv')
  assert final['checkpoint'] == 'final'
  assert float(final['held_perplexity']) == pytest.approx(
    float(last['held_perplexity']), rel=1e-4
  )
  # The best parameters are those of the highest likelihood.
  assert (whole / 'best').is_dir()
  saved = run_config.read_run_config(whole)
  assert saved['dataset_checksum'] == texts.checksum(path)


def test_held_out_windows_are_the_end_of_the_text(path):
  experiment = describe(path)
  corpus = corpus_lib.opened(experiment)
  windows = corpus_lib.held_out(experiment, corpus)
  # Fewer than a batch of them: one, whatever batch is trained on.
  assert windows.shape[::2] == (1, 9) and windows.dtype == np.int32
  flat = windows[..., :-1].reshape(-1)
  np.testing.assert_array_equal(flat, corpus.held_out[: len(flat)])
  np.testing.assert_array_equal(windows[..., -1].reshape(-1)[:-1], flat[8::8])
  assert len(corpus.held_out) - len(flat) <= 8


class Crash(Exception):
  """What ends a run without its doing."""


def test_a_run_goes_on_as_if_uninterrupted(
  whole, path, tmp_path, monkeypatch, capsys
):
  write = watcher.Watcher.log

  def log(self, step, row):
    write(self, step, row)
    if step == 6:
      raise Crash

  experiment = describe(path)
  with monkeypatch.context() as patch, pytest.raises(Crash):
    patch.setattr(watcher.Watcher, 'log', log)
    run.run(experiment, tmp_path)
  capsys.readouterr()
  run.run(experiment, tmp_path)
  printed = capsys.readouterr().out
  assert f'resumed at update 4 of {STEPS}' in printed
  assert 'final: held-out perplexity' in printed
  for name in ('metrics.csv', 'evaluation.csv', 'vocabulary.json'):
    same = [(folder / name).read_text() for folder in (tmp_path, whole)]
    if name == 'metrics.csv':
      same = [rows(folder / name) for folder in (tmp_path, whole)]
    assert same[0] == same[1]
  agent = stages.make(experiment, Saved(), lambda: False).stages[0].agent
  ends = [
    saved.load_params(str(folder), agent, ['final'])
    for folder in (tmp_path, whole)
  ]
  jax.tree.map(np.testing.assert_array_equal, *ends)


def test_experts_divided_over_devices_learn_the_same(whole, path, tmp_path):
  settings = (*SETTINGS, 'devices=2', 'experts=divided')
  experiment = describe(path, settings=settings)
  (stage,) = stages.make(experiment, Saved(), lambda: False).stages
  experts = stage.sharding.params.network['layer_0']['experts']
  assert not any(x.is_fully_replicated for x in jax.tree.leaves(experts))
  run.run(experiment, tmp_path)
  both = [rows(folder / 'metrics.csv') for folder in (tmp_path, whole)]
  for ours, theirs in zip(*both):
    for name in ('loss', 'cv_importance', 'load_0'):
      assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3)


def test_another_text_in_the_same_folder_is_refused(whole, tmp_path):
  other = tmp_path / 'words.txt'
  other.write_text(make_text(seed=1), encoding='utf-8')
  with pytest.raises(configs.UserError, match='dataset_checksum was'):
    run.run(describe(other), whole)


def test_a_trained_network_goes_on_with_a_prompt(whole, path, capsys):
  saved = json.loads((whole / 'vocabulary.json').read_text())
  assert ' the' in saved
  # The text itself may be gone.
  moved = path.rename(path.with_name('elsewhere'))
  try:
    for number in (5, 5, 9):
      by_flags(
        play,
        f'--workdir={whole}',
        '--prompt=the cat',
        f'--tokens={number}',
      )
  finally:
    moved.rename(path)
  first, again, longer = capsys.readouterr().out.split('the cat')[1:]
  assert first == again and len(first) > 1
  assert longer.startswith(first.removesuffix('\n').rstrip('�'))
  with pytest.raises(configs.UserError, match=r'^prompt: .* --prompt='):
    by_flags(play, f'--workdir={whole}')


def test_what_experts_specialise_in(whole, path, tmp_path, capsys):
  out = tmp_path / 'experts.png'
  by_flags(specialisation, f'--workdir={whole}', f'--out={out}', '--tokens=6')
  printed = capsys.readouterr().out
  assert printed.count('expert ') == 4 and 'tokens explain' in printed
  assert out.stat().st_size > 10_000
  table = rows(out.with_suffix('.csv'))
  assert len(table) == 6
  for row in table:
    shares = [float(row[f'expert_{e}']) for e in range(4)]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
  shares = specialisation.route(str(whole), 'final', 0)
  windows = corpus_lib.held_out(
    describe(path), corpus_lib.opened(describe(path))
  )
  # Two experts a token.
  assert shares.counts.sum() == 2 * windows[..., :-1].size
  history = specialisation.through_training(str(whole), 0)
  np.testing.assert_allclose(history[:, 1:].sum(1), 1, rtol=1e-5)


def test_how_much_a_token_tells():
  assert specialisation.information(np.eye(3)) == pytest.approx(1)
  assert specialisation.information(np.ones((3, 5))) == pytest.approx(0)
  # One bit of expert; half of the tokens tell it.
  counts = np.array([[2.0, 0, 1], [0, 2, 1]])
  assert specialisation.information(counts) == pytest.approx(4 / 6)
  shares = specialisation.Shares(
    np.array([[9.0, 1, 5], [1, 9, 5]]), ('a', 'b', 'c')
  )
  assert specialisation.characteristic(shares, 2) == [['a', 'c'], ['b', 'c']]


MISTAKES = {
  'no text': ({'path': ''}, 'learns from a text: --text=PATH'),
  'missing': ({'path': 'nowhere.txt'}, 'nowhere.txt: no such file'),
  'env': ({'env': 'Catch-v0'}, 'env=Catch-v0: a text'),
  'hold out': (
    {'settings': (*SETTINGS, 'hold_out=3')},
    'hold_out=3: needs a',
  ),
  'host': (
    {'settings': (*SETTINGS, 'data_on=host')},
    'data_on=host: must be device for a text',
  ),
  'long': (
    {'settings': (*SETTINGS, 'text.length=2000')},
    'held_out=0.1',
  ),
  'batch': (
    {'settings': (*SETTINGS, 'batch_size=4000')},
    'batch_size=4000',
  ),
  'pmap': ({'settings': (*SETTINGS, 'parallel=pmap')}, 'parallel=pmap'),
  'nothing to divide': (
    {
      'settings': (
        *SETTINGS,
        'devices=2',
        'experts=divided',
        'network.layer=dense',
      )
    },
    'experts=divided: language has no mixture',
  ),
}


@pytest.mark.parametrize('what', MISTAKES)
def test_mistakes_are_one_line(path, what):
  changes, message = MISTAKES[what]
  changes = {'path': path} | changes
  with pytest.raises(ValueError) as caught:
    stages.make(describe(**changes), Saved(), lambda: False)
  assert message in str(caught.value) and '\n' not in str(caught.value)


LANGUAGE = [n for n, p in presets.PRESETS.items() if p.agent == 'language']


@pytest.mark.parametrize('name', LANGUAGE)
def test_every_preset_builds(path, name):
  assert presets.PRESETS[name].source
  more = ['text.held_out=0.2', 'text.length=8']
  experiment = build.describe(name, dataset=str(path), settings=more)
  assert experiment.material is corpus_lib.MATERIAL
  assert experiment.updates == presets.PRESETS[name].steps
  spec = experiment.material.open(experiment).spec
  agent = build.make_agent(experiment, spec)
  jax.eval_shape(agent.init, jax.random.key(0))


def make_program(path):
  """Two seeds with their own weights of the balance and of dropout."""
  plan = sweep_plan.make_plan(
    PRESET,
    dataset=str(path),
    steps=4,
    fixed=SETTINGS,
    grid=['importance_weight=0.1,1', 'dropout=0.1,0.5'],
  )
  experiment = plan.describe(sweep_plan.Row(0, 0))
  paths = tuple(sweep_plan.find_path(experiment, f) for f in plan.fields)
  values = [[0.1, 0.1], [1.0, 0.5]]
  return sweep_program.Program(experiment, paths, values, [0, 1])


def test_a_sweep_takes_floats_as_tracers(path):
  program = make_program(path)
  paths = program.paths
  assert sweep_program.traceable(program.experiment, paths) == paths
  # Rows of one program share a text: how it is cut is no tracer's business.
  held_out = sweep_plan.find_path(program.experiment, 'held_out')
  assert sweep_program.traceable(program.experiment, (held_out,)) == ()


@pytest.mark.slow
def test_a_row_of_a_sweep_is_the_run_alone(whole, path, tmp_path):
  program = make_program(path)
  points = sweep_train.run(program, tmp_path, mesh=mesh.make_mesh())
  assert [p.step for p in points] == [2, 4]
  for point, want in zip(points, rows(whole / 'metrics.csv')):
    for name in ('loss', 'cv_load', 'held_perplexity'):
      if want[name]:
        got = float(point.metrics[name][0])
        assert got == pytest.approx(float(want[name]), rel=1e-3), name
  assert points[-1].metrics['held_perplexity'].shape == (2,)


def test_no_program_holds_the_text(path):
  """Only the digits of its length grow."""
  experiment = describe(path)
  stage = stages.make(experiment, Saved(), lambda: False).stages[0]
  tokens = corpus_lib.opened(experiment).train

  def size(tokens):
    source = runtime.from_tokens(tokens, 8, 8)
    place = source.init(jax.random.key(0))
    state = jax.eval_shape(stage.agent.init, jax.random.key(0))
    carry = loop.Carry(state, place, np.int32(0))
    interval = jax.jit(loop.compile_interval(stage.agent, source))
    return len(interval.lower(carry, jax.random.key(0), 5).as_text())

  assert abs(size(np.tile(tokens, 9)) - size(tokens)) < 500


# Corpora.


def test_texts_are_read_out_of_packages(tmp_path):
  place = tmp_path / 'usr/share/dictd'
  place.mkdir(parents=True)
  with gzip.open(place / 'gcide.dict.dz', 'wb') as file:
    file.write('a café\n'.encode() + b'it\x92s\nend')
  assert corpus.read_gcide(tmp_path) == 'a café\nit’s\nend'

  place = tmp_path / 'usr/share/sword/modules/texts/ztext/engWEB2015eb'
  place.mkdir(parents=True)
  for name, books in (('ot', ['<p>In the', '<b>second</b>']), ('nt', ['é'])):
    blocks = [zlib.compress(book.encode()) for book in books]
    begin = np.cumsum([0, *map(len, blocks)])
    index = [
      struct.pack('<III', start, len(block), len(book))
      for start, block, book in zip(begin, blocks, books)
    ]
    (place / f'{name}.bzz').write_bytes(b''.join(blocks))
    (place / f'{name}.bzs').write_bytes(b''.join(index))
  assert corpus.read_web(tmp_path) == 'In the\nsecond\né'


def test_who_cannot_fetch_is_told(tmp_path, monkeypatch):
  package = corpus.PACKAGES['kjv']
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(configs.UserError, match=r'^apt-get: not found'):
    corpus.fetch(package)
  for name in ('apt-get', 'dpkg-deb'):
    (tmp_path / name).write_text('#!/bin/sh\necho "E: no network" >&2\nexit 1')
    (tmp_path / name).chmod(0o755)
  with pytest.raises(configs.UserError, match=r'download: failed .E: no net'):
    corpus.fetch(package)
