"""Converts texts from files to tokens and back.

The vocabulary has the words (with the blank before them), runs of white space
and punctuation that save the most tokens in the training part. Everything else
is spelt in bytes, so every text can be encoded without loss. The end of the
text is held out and not counted.
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
# Cuts where no piece can cross: at white space after another character.
_CUT = re.compile(r'(?<=\S)[^\S ]')
_CHUNK = 1 << 20
# Smaller files are encoded faster than a cache is read.
_CACHED_FROM = 1 << 20
# Part of the cache's name; increase it when the meaning of tokens changes.
_VERSION = 1


class Vocabulary(NamedTuple):
  """The meaning of tokens: bytes below 256, `words` from there."""

  words: tuple[str, ...]

  @property
  def size(self) -> int:
    """V, the number of tokens."""
    return BYTES + len(self.words)


class Corpus(NamedTuple):
  """A text as tokens.

  Attributes:
    name: the file's name without its ending.
    train: uint16 or uint32 `[N]`, the part to train on.
    held_out: uint16 or uint32 `[M]`, the end of the text.
    vocabulary: the meaning of the tokens.
  """

  name: str
  train: np.ndarray
  held_out: np.ndarray
  vocabulary: Vocabulary


def count_words(text: str, size: int) -> Vocabulary:
  """The pieces of a text that save the most tokens; ties in sorted order.

  There are at most `size` tokens; pieces that occur only once are left out.

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
  """Encodes a text as tokens, uint16 (uint32 from V = 65,537) `[N]`.

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
  """Decodes tokens `[N]` to a text; bytes that are not UTF-8 become U+FFFD."""
  words = vocabulary.words
  spelt = (
    bytes((t,)) if t < BYTES else words[t - BYTES].encode()
    for t in np.asarray(tokens).tolist()
  )
  return b''.join(spelt).decode('utf-8', errors='replace')


class _Spelling(dict):
  """Tokens by piece; unknown pieces are spelt in bytes."""

  def __missing__(self, piece: str) -> bytes:
    return piece.encode()


def _chunks(text: str) -> Iterator[str]:
  """Splits the text where no piece crosses, to limit the memory of pieces."""
  begin = 0
  while begin < len(text):
    found = _CUT.search(text, begin + _CHUNK)
    end = found.start() if found else len(text)
    yield text[begin:end]
    begin = end


def checksum(path: str | os.PathLike) -> str:
  """The CRC-32 of a file's bytes, hexadecimal.

  Raises:
    ValueError: the file cannot be read or is empty.
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
  """Reads a text file as tokens.

  Args:
    vocabulary: the largest V.
    held_out: share of the characters, at the end, that is held out.
    cache: the folder in which tokens of larger files are cached, or None.

  Raises:
    ValueError: the file is missing, empty or not in this encoding, the
      vocabulary is below 256, or `held_out` leaves nothing to train on.
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
      f'text={error}; must be a text file, such as python -m '
      'experiments.corpus fetches'
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
  # The cache is optional: if it cannot be read, the tokens are made again.
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
      raise UserError(f'{shown(file)}: {key} has values that are not tokens')
  return Corpus(name, saved['train'], saved['held_out'], vocabulary)


def _keep(file: pathlib.Path, corpus: Corpus) -> None:
  words = '\0'.join(corpus.vocabulary.words).encode()
  arrays: dict[str, Any] = {
    'train': corpus.train,
    'held_out': corpus.held_out,
    'words': np.frombuffer(words, np.uint8),
  }
  # Atomic, because another run may read the cache at the same time.
  with writing.replacing(file) as target:
    np.savez(target, **arrays)
