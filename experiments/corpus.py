"""Fetches a text to learn from: `python -m experiments.corpus --name=gcide`.

The texts come in Debian packages, which `apt-get download` brings into a
temporary folder. Nothing is installed, and root is not needed.
"""

import gzip
import pathlib
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

from experiments.files import writing
from experiments.files.errors import UserError
from experiments.report import terminal
from experiments.runtime import config as configs


class Package(NamedTuple):
  """A text and the Debian packages that contain it.

  `read` is `(folder with the unpacked files) -> text`.
  """

  about: str
  names: tuple[str, ...]
  read: Callable[[pathlib.Path], str]
  licence: str


def read_gcide(folder: pathlib.Path) -> str:
  """The dictionary, which dictzip keeps in gzip's format."""
  with gzip.open(folder / 'usr/share/dictd/gcide.dict.dz') as file:
    content = file.read()
  # A few bytes are in a Windows encoding.
  parts, begin = [], 0
  while begin < len(content):
    try:
      parts.append(content[begin:].decode('utf-8'))
      break
    except UnicodeDecodeError as error:
      bad = begin + error.start
      parts.append(content[begin:bad].decode('utf-8'))
      parts.append(content[bad : bad + 1].decode('cp1252', errors='replace'))
      begin = bad + 1
  return ''.join(parts)


def read_kjv(folder: pathlib.Path) -> str:
  """The King James Bible, a verse a line after its book, chapter and number.

  Raises:
    UserError: the package's program that prints it is missing or fails.
  """
  command = [folder / 'usr/bin/bible', '-p', folder / 'usr/lib', '-f']
  found = _run([*map(str, command), 'gen1:1-rev22:21'])
  return found.decode('latin-1')


def read_web(folder: pathlib.Path) -> str:
  """The books of a SWORD module, without markup.

  `.bzs` holds offset, length and unpacked length of the compressed blocks in
  `.bzz`, little-endian.
  """
  parts = []
  module = folder / 'usr/share/sword/modules/texts/ztext/engWEB2015eb'
  for testament in ('ot', 'nt'):
    index = (module / f'{testament}.bzs').read_bytes()
    blocks = (module / f'{testament}.bzz').read_bytes()
    for offset, length, _ in struct.iter_unpack('<III', index):
      parts.append(zlib.decompress(blocks[offset : offset + length]))
  text = b'\n'.join(parts).decode('utf-8')
  return re.sub(r'<[^>]*>', '', text)


PACKAGES = {
  'gcide': Package(
    'GCIDE, a dictionary of English, 40 MB',
    ('dict-gcide',),
    read_gcide,
    'GPL, version 2 or later',
  ),
  'kjv': Package(
    'the King James Bible, 4.4 MB',
    ('bible-kjv', 'bible-kjv-text'),
    read_kjv,
    'public domain',
  ),
  'web': Package(
    'the World English Bible, 5 MB',
    ('sword-text-web',),
    read_web,
    'public domain',
  ),
}


def fetch(package: Package) -> str:
  """Downloads a text's packages and reads the text.

  Raises:
    UserError: the system is not Debian, or the download failed.
  """
  for program in ('apt-get', 'dpkg-deb'):
    if shutil.which(program) is None:
      raise UserError(
        f'{program}: not found, so this is not Debian or Ubuntu; any other '
        'text file will do: --text=PATH'
      )
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _run(['apt-get', 'download', *package.names], folder)
    for file in sorted(folder.glob('*.deb')):
      _run(['dpkg-deb', '-x', str(file), str(folder / 'files')])
    return package.read(folder / 'files')


def _run(command: list[str], folder: pathlib.Path | None = None) -> bytes:
  done = subprocess.run(command, cwd=folder, capture_output=True)
  if done.returncode:
    lines = done.stderr.decode(errors='replace').split('\n')
    words = next((x for x in reversed(lines) if x), 'no message')
    raise UserError(
      f'{" ".join(command[:2])}: failed ({words}); check the network and run '
      '"apt-get update" first'
    )
  return done.stdout


def define_flags() -> None:
  """The flags of `python -m experiments.corpus`."""
  from absl import flags

  known = '; '.join(f'{n}: {p.about}' for n, p in PACKAGES.items())
  flags.DEFINE_enum(
    'name', 'gcide', list(PACKAGES), f'the text to fetch: {known}'
  )
  flags.DEFINE_string(
    'out', None, 'the file to write; data/NAME.txt if left out'
  )


def main() -> None:
  """Fetches as the flags say."""
  from absl import flags

  name = flags.FLAGS.name
  out = pathlib.Path(flags.FLAGS.out or f'data/{name}.txt')
  configs.check_place('out', out)
  names = ' '.join(PACKAGES[name].names)
  terminal.begin(f'fetching {names} by apt-get into {out}', compiles=False)
  text = fetch(PACKAGES[name])
  out.parent.mkdir(parents=True, exist_ok=True)
  writing.write_text(out, text)
  terminal.end(
    f'{out}: {out.stat().st_size:,} bytes, {len(text.split()):,} words, '
    f'{PACKAGES[name].licence}',
    f'python -m experiments.train --preset=moe_language_small --text={out}',
  )


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
