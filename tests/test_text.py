"""Texts: tokens and back, windows in order."""

import functools

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import text as texts
from experiments.runtime import config as configs
from experiments.runtime import token_windows as runtime

WORDS = ('the', 'cat', 'sat', 'on', 'a', 'mat', 'and', 'a', 'dog', 'saw', 'it')
SMALL = texts.count_words(' '.join(WORDS * 3), 300)


def make_text(seed=0, number=1500):
  """Every word is followed by the next one, or by a new line."""
  rng = np.random.default_rng(seed)
  parts = []
  for i in range(number):
    parts.append(WORDS[i % len(WORDS)])
    parts.append('\n' if rng.random() < 0.1 else ' ')
  return ''.join(parts)


# Tokens.


@given(st.text())
def test_tokens_give_their_text_back(given_text):
  tokens = texts.encode(SMALL, given_text)
  assert texts.decode(SMALL, tokens) == given_text
  assert tokens.dtype == np.uint16


def test_words_that_save_most_are_tokens():
  found = texts.count_words('aa bb bb cc cc cc rare', 258)
  # ' cc' saves 2 bytes 3 times, ' bb' 2 times; what is met once saves nothing.
  assert found == texts.Vocabulary((' cc', ' bb')) and found.size == 258
  got = texts.encode(found, ' cc bb aa')
  np.testing.assert_array_equal(got, [256, 257, *b' aa'])
  wide = texts.Vocabulary(tuple(map(str, range(1 << 16))))
  assert texts.encode(wide, '65535').tolist() == [(1 << 16) - 1 + 256]
  with pytest.raises(ValueError, match=r'^vocabulary=255: must be at least'):
    texts.count_words('', 255)


def test_parts_of_a_long_text_cut_no_piece(monkeypatch):
  whole = make_text() + '\n\n   indented \n'
  words, tokens = texts.count_words(whole, 300), texts.encode(SMALL, whole)
  monkeypatch.setattr(texts, '_CHUNK', 10)
  assert len(list(texts._chunks(whole))) > 50
  assert texts.count_words(whole, 300) == words
  np.testing.assert_array_equal(texts.encode(SMALL, whole), tokens)


def test_what_is_held_out_is_not_counted(tmp_path):
  path = tmp_path / 'play.txt'
  path.write_text('seen ' * 100 + 'hidden ' * 25, encoding='utf-8')
  read = functools.partial(texts.read, path, vocabulary=300)
  corpus = read(held_out=175 / 675)
  assert corpus.name == 'play'
  assert corpus.vocabulary.words == (' seen',)
  back = functools.partial(texts.decode, corpus.vocabulary)
  assert back(corpus.train) == 'seen ' * 100
  assert back(corpus.held_out) == 'hidden ' * 25
  assert ' hidden' in read(held_out=0.1).vocabulary.words


def test_larger_texts_are_kept_as_tokens(tmp_path, monkeypatch):
  path = tmp_path / 'long.txt'
  path.write_text(make_text(), encoding='utf-8')
  read = functools.partial(
    texts.read, path, vocabulary=300, cache=tmp_path / 'cache'
  )
  first = read(held_out=0.1)
  assert not (tmp_path / 'cache').exists()
  monkeypatch.setattr(texts, '_CACHED_FROM', 0)
  assert_equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  for _ in range(2):
    again = read(held_out=0.1)
    assert_equal(again[1:3], first[1:3])
    assert again.vocabulary == first.vocabulary
  assert len(list((tmp_path / 'cache').iterdir())) == 1
  # Once kept, nothing is counted again.
  monkeypatch.delattr(texts, 'count_words')
  assert_equal(read(held_out=0.1)[1:3], first[1:3])
  with pytest.raises(NameError):
    read(held_out=0.2)


def test_a_cache_that_fails_is_done_without(tmp_path, monkeypatch):
  path, cache = tmp_path / 'long.txt', tmp_path / 'cache'
  path.write_text(make_text(), encoding='utf-8')
  monkeypatch.setattr(texts, '_CACHED_FROM', 0)
  read = functools.partial(texts.read, path, held_out=0.1)
  # Bytes alone: there are no words to keep.
  for _ in range(2):
    assert read(vocabulary=256, cache=cache).vocabulary.size == 256
  (kept,) = cache.iterdir()
  kept.write_bytes(kept.read_bytes()[:100])
  assert len(read(vocabulary=256, cache=cache).held_out)
  # A file stands where the folder would be.
  assert read(vocabulary=256, cache=path).vocabulary.size == 256


def test_files_that_are_no_texts(tmp_path):
  path = tmp_path / 'x.txt'
  read = functools.partial(texts.read, path, vocabulary=300, held_out=0.5)
  with pytest.raises(ValueError, match=r'x.txt: no such file'):
    read()
  path.write_bytes(b'')
  with pytest.raises(ValueError, match=r'x.txt: is empty; take'):
    read()
  path.write_bytes(b'one\ntwo \xe9\n')
  with pytest.raises(ValueError, match=r'x.txt: byte 8 \(line 2\) is not utf'):
    read()
  corpus = read(encoding='latin-1')
  assert texts.decode(corpus.vocabulary, corpus.held_out) == 'wo é\n'
  path.write_bytes(b'x')
  with pytest.raises(ValueError, match=r'held_out=0.5 of 1 characters leaves'):
    read()


# Windows.

LENGTH, BATCH, WINDOWS = 4, 3, 14
TOKENS = np.arange(1000, 1000 + WINDOWS * LENGTH + 2, dtype=np.uint16)


@pytest.mark.parametrize('number', [1, 5, 64, 100])
def test_an_order_is_a_permutation(number):
  index = np.arange(number, dtype=np.int32)
  order = jax.jit(lambda key: runtime.shuffled(index, number, key))
  found = [np.asarray(order(np.uint32([1, i]))) for i in range(4)]
  for one in found:
    np.testing.assert_array_equal(np.sort(one), index)
  if number > 4:
    assert len({tuple(one) for one in found}) == 4


def test_orders_are_uniform():
  keys = np.random.default_rng(0).integers(2**32, size=(3000, 2))
  index = np.arange(10, dtype=np.int32)
  order = jax.vmap(lambda key: runtime.shuffled(index, 10, key))
  found = np.asarray(jax.jit(order)(keys.astype(np.uint32)))
  for place in (0, 9):
    counts = np.bincount(found[:, place], minlength=10)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
  # Of neighbours, too.
  table = np.zeros((10, 10))
  np.add.at(table, (found[:, 3], found[:, 4]), 1)
  apart = table[~np.eye(10, dtype=bool)]
  assert scipy.stats.chisquare(apart).pvalue > 1e-3


@pytest.fixture(scope='module')
def source():
  made = runtime.from_tokens(TOKENS, BATCH, LENGTH)
  return made._replace(next=jax.jit(made.next))


def draw(source, steps, state=None, seed=0):
  """Numbers of windows a step, and the state behind them."""
  state = state or source.init(jax.random.key(seed))
  found = []
  for step in steps:
    key = jax.random.fold_in(jax.random.key(seed), step)
    state, batch, _ = source.next(state, None, np.int32(step), key)
    tokens = np.asarray(batch.tokens)
    assert tokens.dtype == np.int32
    first = tokens[:, :1]
    np.testing.assert_array_equal(tokens, first + np.arange(LENGTH + 1))
    found.append((first[:, 0] - 1000) // LENGTH)
  return np.asarray(found), state


def test_every_window_comes_at_most_once_an_epoch(source):
  assert runtime.num_windows(TOKENS, LENGTH) == WINDOWS
  epoch = WINDOWS // BATCH
  found, _ = draw(source, range(3 * epoch))
  epochs = found.reshape(3, -1)
  for one in epochs:
    assert len(set(one)) == epoch * BATCH
  assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
  assert set(range(WINDOWS)) == set(epochs.ravel())
  other, _ = draw(source, range(epoch), seed=1)
  assert (other.ravel() != epochs[0]).any()


def test_a_checkpoint_holds_the_order_only(source, tmp_path):
  _, state = draw(source, range(2))
  arrays, facts = source.kept.save(state, tmp_path, 2)
  assert jax.tree.map(np.shape, arrays) == {'order': (2,)}
  loaded = source.kept.load(arrays, facts, tmp_path, jax.random.key(0))
  want, _ = draw(source, range(2, 9), state)
  got, _ = draw(source, range(2, 9), loaded)
  np.testing.assert_array_equal(got, want)
  other = runtime.from_tokens(TOKENS[::-1], BATCH, LENGTH)
  with pytest.raises(configs.UserError, match=f'with {facts["text"]}$'):
    other.kept.load(arrays, facts, tmp_path, jax.random.key(0))


def test_a_batch_is_at_most_the_text():
  with pytest.raises(ValueError, match=r'^batch_size=15: must be at most 14'):
    runtime.from_tokens(TOKENS, 15, LENGTH)


def test_a_prompt_is_continued():
  seen = []

  def predict(tokens):
    """Certain of what follows the last one: one more, modulo 10."""
    seen.append(tokens[0].tolist())
    return 50.0 * (np.arange(10) == (tokens[..., None] + 1) % 10)

  go_on = functools.partial(
    runtime.continuation, predict, np.array([7, 8]), 4, length=3
  )
  for temperature in (0.0, 1.0):
    found = go_on(temperature=temperature, key=jax.random.key(0))
    assert found.tolist() == [9, 0, 1, 2]
  # Up to three tokens back.
  assert seen[:4] == [[7, 8, 0], [7, 8, 9], [8, 9, 0], [9, 0, 1]]
  hot = [go_on(temperature=1e3, key=jax.random.key(i)) for i in (0, 0, 1)]
  np.testing.assert_array_equal(hot[0], hot[1])
  assert (hot[0] != hot[2]).any()
