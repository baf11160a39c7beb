"""Texts: from a file to tokens and back.

Words that save most in the training part are tokens of their own, with the
blank before them; so are runs of white space and punctuation. What is not in
the vocabulary is spelt in bytes, so that every text has tokens and gives them
back as it was. The end of the text is held out: nothing is counted there.
"""

import array
import collections
import contextlib
import functools
import hashlib
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data import npy
from experiments.files import memory, reading, writing
from experiments.files.errors import UserError, shown

# The first tokens are the 256 bytes.
BYTES = 256
_PIECE = re.compile(r' ?\w+|\s+|[^\w\s]')
# Cut where no piece can cross: white space begins behind something else.
_CUT = re.compile(r'(?<=\S)[^\S ]')
_CHUNK = 1 << 20
# Smaller files are read faster than a cache.
_CACHED_FROM = 1 << 20
# Part of the cache's name: change it with what tokens mean.
_VERSION = 1


class Vocabulary(NamedTuple):
  """What tokens mean.

  Attributes:
    words: of the tokens from 256 upwards; those below are bytes.
  """

  words: tuple[str, ...]

  @property
  def size(self) -> int:
    """V, tokens from 0 to V - 1."""
    return BYTES + len(self.words)


class Corpus(NamedTuple):
  """A text as tokens.

  Attributes:
    name: the file's, without its ending.
    train: uint16 or uint32 `[N]`, what is trained on.
    held_out: uint16 or uint32 `[M]`, the end of the text.
    vocabulary: what they mean.
  """

  name: str
  train: np.ndarray
  held_out: np.ndarray
  vocabulary: Vocabulary


def count_words(text: str, size: int) -> Vocabulary:
  """The pieces of a text that save the most tokens; of equals, in their order.

  Args:
    text: what is trained on.
    size: V at most; pieces that are found once only are not taken.

  Raises:
    ValueError: size is below 256.
  """
  if size < BYTES:
    raise UserError(
      f'vocabulary={size}: must be at least {BYTES}, which are the bytes'
    )
  counts: collections.Counter[str] = collections.Counter()
  for chunk in _chunks(text):
    counts.update(_PIECE.findall(chunk))
  # A byte is a token already.
  saved = {w: n * (len(w.encode()) - 1) for w, n in counts.items() if n > 1}
  words = sorted((w for w in saved if saved[w]), key=lambda w: (-saved[w], w))
  return Vocabulary(tuple(words[: size - BYTES]))


def encode(vocabulary: Vocabulary, text: str) -> np.ndarray:
  """Tokens of a text, uint16 (uint32 from V = 65,537) `[N]`.

  >>> words = count_words('the red hat, the red cat', 300)
  >>> words.words
  (' red',)
  >>> encode(words, 'a red cat').tolist()
  [97, 256, 32, 99, 97, 116]
  >>> decode(words, encode(words, 'a red cat'))
  'a red cat'
  """
  known = _Spelling(
    (word, (BYTES + i,)) for i, word in enumerate(vocabulary.words)
  )
  kind = 'H' if vocabulary.size <= 1 << 16 else 'I'
  tokens = array.array(kind)
  for chunk in _chunks(text):
    for piece in map(known.__getitem__, _PIECE.findall(chunk)):
      tokens.extend(piece)
  return np.frombuffer(tokens, kind) if tokens else np.zeros(0, kind)


def decode(vocabulary: Vocabulary, tokens: Sequence[int] | np.ndarray) -> str:
  """The text of tokens `[N]`; bytes that are no UTF-8 become U+FFFD."""
  words = vocabulary.words
  spelt = (
    bytes((t,)) if t < BYTES else words[t - BYTES].encode()
    for t in np.asarray(tokens).tolist()
  )
  return b''.join(spelt).decode('utf-8', errors='replace')


class _Spelling(dict):
  """Tokens by piece; bytes of those that are not known."""

  def __missing__(self, piece: str) -> bytes:
    return piece.encode()


def _chunks(text: str) -> Iterator[str]:
  """The text in parts that no piece crosses, to hold few pieces at once."""
  begin = 0
  while begin < len(text):
    found = _CUT.search(text, begin + _CHUNK)
    end = found.start() if found else len(text)
    yield text[begin:end]
    begin = end


def checksum(path: str | os.PathLike) -> str:
  """Of a file's bytes.

  Raises:
    ValueError: see `read`.
  """
  return f'{zlib.crc32(_bytes(pathlib.Path(path))):08x}'


def read(
  path: str | os.PathLike,
  *,
  vocabulary: int,
  held_out: float,
  encoding: str = 'utf-8',
  cache: str | os.PathLike | None = None,
) -> Corpus:
  """A text file as tokens.

  Args:
    path: the file.
    vocabulary: V at most.
    held_out: share of the characters, at the end, that is held out.
    encoding: of the file.
    cache: a folder where tokens of larger files are kept; None for nowhere.

  Raises:
    ValueError: one line that names the file, and where in it: no such file,
      nothing in it, not in this encoding; a vocabulary below 256; a share that
      leaves nothing.
  """
  path = pathlib.Path(path)
  content = _bytes(path)
  make = lambda: _tokens(path, content, vocabulary, held_out, encoding)
  if cache is None or len(content) < _CACHED_FROM:
    return make()
  about = (_VERSION, vocabulary, held_out, encoding)
  digest = hashlib.sha256(repr(about).encode() + content).hexdigest()[:16]
  return _cached(pathlib.Path(cache) / f'{digest}.npz', path.stem, make)


def _bytes(path: pathlib.Path) -> bytes:
  try:
    content = reading.read_bytes(
      path, limit=memory.room_for_data(), follow=True
    )
  except UserError as error:
    raise UserError(
      f'text={error}; must be a text file, python -m experiments.corpus '
      'fetches some'
    ) from error
  if not content:
    raise UserError(f'text={shown(path)}: is empty; take a longer text')
  return content


def _tokens(path, content, vocabulary, held_out, encoding) -> Corpus:
  try:
    text = content.decode(encoding)
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise UserError(
      f'text={shown(path)}: byte {error.start} (line {line}) is not '
      f'{encoding}; convert the file, or set encoding=latin-1'
    ) from error
  split = len(text) - max(round(held_out * len(text)), 1)
  if split < 1:
    raise UserError(
      f'text={shown(path)}: held_out={held_out} of {len(text)} characters '
      'leaves none to train on; take a longer text'
    )
  found = count_words(text[:split], vocabulary)
  whole = functools.partial(encode, found)
  return Corpus(path.stem, whole(text[:split]), whole(text[split:]), found)


def _cached(
  file: pathlib.Path, name: str, make: Callable[[], Corpus]
) -> Corpus:
  # What cannot be read or kept is made again.
  with contextlib.suppress(OSError, ValueError):
    return _load(file, name)
  corpus = make()
  with contextlib.suppress(OSError, UserError):
    _keep(file, corpus)
  return corpus


def _load(file: pathlib.Path, name: str) -> Corpus:
  kinds = {'train': 'u', 'held_out': 'u', 'words': 'u'}
  saved = npy.read_archive(file, kinds)
  words = saved['words'].astype(np.uint8).tobytes().decode()
  vocabulary = Vocabulary(tuple(words.split('\0') if words else ()))
  for key in ('train', 'held_out'):
    tokens = saved[key]
    if tokens.ndim != 1 or (tokens >= vocabulary.size).any():
      raise UserError(f'{shown(file)}: {key} is not of tokens')
  return Corpus(name, saved['train'], saved['held_out'], vocabulary)


def _keep(file: pathlib.Path, corpus: Corpus) -> None:
  words = '\0'.join(corpus.vocabulary.words).encode()
  arrays: dict[str, Any] = {
    'train': corpus.train,
    'held_out': corpus.held_out,
    'words': np.frombuffer(words, np.uint8),
  }
  # At once or not at all: another run may look for it now.
  with writing.replacing(file) as target:
    np.savez(target, **arrays)
