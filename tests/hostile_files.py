"""Files that somebody has made to do harm, or that a copy has damaged.

`CASES` is the table: each entry makes files in a folder and gives what opens
them. Every one must be refused by a `UserError` of one line; nothing may be
executed, waited for, or read outside of the folder. `OUTSIDE` lies beside the
folder and holds good numbers, so whoever follows a link to it succeeds, which
is the failure.
"""

import io
import json
import os
import pathlib
import pickle
import socket
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.build import saved as saved_run
from experiments.data import layout, minari_files, npz, text
from experiments.data.open import open_dataset
from experiments.playing import continuation as text_runs

OUTSIDE, MARK = 'outside', 'executed.mark'
N = 6


class Case(NamedTuple):
  """One way to do harm.

  Attributes:
    loader: whose files they are.
    name: what is wrong with them.
    make: `(folder) -> None`, changes good files in place.
  """

  loader: str
  name: str
  make: Callable[[pathlib.Path], None]


class Payload:
  """Leaves a mark when it is unpickled."""

  def __init__(self, mark):
    self._mark = str(mark)

  def __reduce__(self):
    return os.mknod, (self._mark,)


def toy():
  """Rows of two episodes, chained, as Minari wants them."""
  frames = np.arange(2.0 * N + 2).reshape(N + 1, 2)
  one = np.ones(1, np.float32)
  return layout.make(
    frames[:-1],
    np.zeros((N, 1)),
    np.ones(N),
    frames[1:],
    np.arange(N) == 2,
    np.arange(N) == N - 1,
    layout.About('toy-v0', '', -one, one, extra={'k': 1}),
  )


def flat(**changes):
  """The arrays of a file of D4RL's."""
  data = toy()
  arrays = {
    'observations': data.observation,
    'actions': data.action,
    'rewards': data.reward,
    'terminals': data.terminated,
    'timeouts': data.truncated,
    'next_observations': data.next_observation,
  }
  return {k: v for k, v in {**arrays, **changes}.items() if v is not None}


def write_hdf5(path, arrays):
  import h5py

  with h5py.File(path, 'w') as file:
    for key, value in arrays.items():
      file[key] = value


def prepare(case: Case, place: pathlib.Path) -> Callable[[], object]:
  """Makes a case's files in an empty folder; returns what opens them."""
  folder = place / 'data'
  outside = place / OUTSIDE
  outside.mkdir()
  npz.save(toy(), outside / 'set')
  write_hdf5(outside / 'numbers.hdf5', flat())
  (outside / 'raw').write_bytes(np.ones(N, np.float32).tobytes())
  if case.loader == 'folder':
    npz.save(toy(), folder)
    opener = lambda: open_dataset(folder)
  elif case.loader == 'minari':
    minari_files.save(toy(), 'o/toy-v0', place)
    (place / 'o' / 'toy-v0' / 'data').rename(folder)
    opener = lambda: open_dataset(folder)
  elif case.loader == 'run':
    folder.mkdir()
    write_run(folder)
    opener = lambda: saved_run.load_experiment(str(folder))
  elif case.loader == 'statistics':
    folder.mkdir()
    numbers = {'mean': [0.0, 0.0], 'std': [1.0, 1.0]}
    (folder / 'statistics.json').write_text(json.dumps(numbers))
    opener = lambda: saved_run.load_spec(folder, layout.spec(toy()))
  elif case.loader == 'vocabulary':
    folder.mkdir()
    (folder / 'vocabulary.json').write_text('[" the"]')
    options = type('Options', (), {'prompt': 'The'})
    opener = lambda: text_runs.continue_text(
      None, str(folder), 'final', options
    )
  else:
    folder.mkdir()
    if case.loader == 'npz':
      npz.save(toy(), folder / 'set.npz')
    elif case.loader == 'd4rl':
      write_hdf5(folder / 'set.hdf5', flat())
    else:
      (folder / 'set.txt').write_text('the red hat, the red cat\n' * 9)
    opener = lambda: open_file(folder)
  case.make(folder)
  return opener


def open_file(folder):
  """The one file of a folder, as its ending says."""
  (file,) = (f for f in folder.iterdir() if f.name.startswith('set.'))
  if file.suffix == '.txt':
    return text.read(file, vocabulary=300, held_out=0.1)
  return open_dataset(file)


def write_run(folder):
  from experiments import build

  config = build.describe('muzero_catch').as_dict()
  (folder / 'config.json').write_text(json.dumps(config))


# What a file can be replaced by; each is a function of the file's path.


def as_link(file):
  """A link to good numbers elsewhere."""
  target = file.parent.parent / OUTSIDE / 'set' / file.name
  if not target.exists():
    target = file.rename(file.parent.parent / OUTSIDE / file.name)
  file.unlink(missing_ok=True)
  file.symlink_to(target)


def as_fifo(file):
  file.unlink()
  os.mkfifo(file)


def as_socket(file):
  file.unlink()
  # A socket's whole path must be short.
  here = os.open(file.parent, os.O_RDONLY)
  try:
    with socket.socket(socket.AF_UNIX) as end:
      end.bind(f'/proc/self/fd/{here}/{file.name}')
  finally:
    os.close(here)


def as_device(file):
  file.unlink()
  file.symlink_to('/dev/zero')


def as_folder(file):
  file.unlink()
  file.mkdir()


def as_pointer(file):
  file.write_text(
    'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n'
  )


def as_nothing(file):
  file.write_bytes(b'')


def as_pickle(file):
  mark = file.parent.parent / MARK
  file.write_bytes(pickle.dumps(Payload(mark)))


def as_noise(file):
  file.write_bytes(np.random.default_rng(0).bytes(4096))


def as_deep(file):
  file.write_text('[' * 50_000 + ']' * 50_000)


KINDS = (as_link, as_fifo, as_socket, as_device, as_folder, as_pointer)
BYTES = (as_nothing, as_pickle, as_noise)


def replaced(loader, file, kinds):
  return [
    Case(
      loader,
      f'{file} {kind.__name__}',
      lambda folder, kind=kind: kind(folder / file),
    )
    for kind in kinds
  ]


# Single arrays of NumPy.


def header(file, text, content=b''):
  """A `.npy` with a header of one's own."""
  text = text.encode() + b'\n'
  size = len(text).to_bytes(2, 'little')
  file.write_bytes(b'\x93NUMPY\x01\x00' + size + text + content)


def npy(text, content=b''):
  return lambda folder: header(folder / 'reward.npy', text, content)


def saved(key, array, allow_pickle=False):
  def make(folder):
    value = array(folder.parent / MARK) if callable(array) else array
    np.save(folder / f'{key}.npy', value, allow_pickle=allow_pickle)

  return make


def sparse(folder):
  rows = 1 << 38
  header(
    folder / 'reward.npy',
    f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows},)}}",
  )
  file = folder / 'reward.npy'
  os.truncate(file, file.stat().st_size + 4 * rows)


def objects(mark):
  return np.array([Payload(mark)] * N, object)


# JSON.


def fields(file, **changes):
  def make(folder):
    content = json.loads((folder / file).read_text())
    content = {k: v for k, v in {**content, **changes}.items() if v != 'gone'}
    (folder / file).write_text(json.dumps(content))

  return make


def written(file, content):
  return lambda folder: (folder / file).write_text(content)


# Archives.


def archive(change):
  """The good members, changed: `(name -> bytes) -> [(name or info, bytes)]`."""

  def make(folder):
    file = folder / 'set.npz'
    with zipfile.ZipFile(file) as old:
      members = {name: old.read(name) for name in old.namelist()}
    found = change(members, folder)
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as new:
      for name, content in found:
        new.writestr(name, content)

  return make


def renamed(name):
  return archive(
    lambda members, folder: [
      (name if k == 'reward.npy' else k, v) for k, v in members.items()
    ]
  )


def added(name, content=b'x'):
  return archive(lambda members, folder: [*members.items(), (name, content)])


def member(array, allow_pickle=False):
  def change(members, folder):
    value = array(folder.parent / MARK) if callable(array) else array
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=allow_pickle)
    return [*{**members, 'reward.npy': buffer.getvalue()}.items()]

  return archive(change)


def huge_member(folder):
  """A few bytes that declare 2 TB, in the header and in the directory."""

  def change(members, folder):
    file = folder.parent / 'huge.npy'
    header(
      file,
      "{'descr': '<f8', 'fortran_order': False, 'shape': (274877906944,)}",
    )
    return [*{**members, 'reward.npy': file.read_bytes()}.items()]

  archive(change)(folder)


def lying_directory(folder):
  """The directory at the end declares 3 GB more than a member has."""
  huge_member(folder)
  file = folder / 'set.npz'
  raw = bytearray(file.read_bytes())
  at = raw.rindex(b'reward.npy') - 46
  assert raw[at : at + 4] == b'PK\x01\x02'
  raw[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, 'little')
  file.write_bytes(raw)


def bomb(folder):
  """100 MB of zeros that take 100 kB, of a shape that is not theirs."""
  buffer = io.BytesIO()
  np.save(buffer, np.zeros(100 << 17))
  change = lambda members, folder: [
    *{**members, 'reward.npy': buffer.getvalue()}.items()
  ]
  archive(change)(folder)


# hdf5.


def hdf5(change, file='set.hdf5'):
  def make(folder):
    import h5py

    with h5py.File(folder / file, 'a') as opened:
      change(opened, folder.parent / OUTSIDE)

  return make


def arrays(**changes):
  return lambda folder: write_hdf5(folder / 'set.hdf5', flat(**changes))


def external_link(file, outside, key='rewards'):
  import h5py

  del file[key]
  name = key.rpartition('/')[2]
  target = name if name in flat() else 'rewards'
  file[key] = h5py.ExternalLink(outside / 'numbers.hdf5', target)


def soft_link(file, outside):
  import h5py

  del file['rewards']
  file['elsewhere'] = np.ones(N, np.float32)
  file['rewards'] = h5py.SoftLink('/elsewhere')


def external_storage(file, outside):
  del file['rewards']
  raw = [(str(outside / 'raw'), 0, 4 * N)]
  file.create_dataset('rewards', (N,), np.float32, external=raw)


def virtual(file, outside):
  import h5py

  del file['rewards']
  layout = h5py.VirtualLayout((N,), np.float32)
  layout[:] = h5py.VirtualSource(outside / 'numbers.hdf5', 'rewards', (N,))
  file.create_virtual_dataset('rewards', layout)


def declared(file, outside):
  """16 TB that nobody has written."""
  del file['rewards']
  file.create_dataset('rewards', (1 << 42,), np.float32, chunks=(1 << 20,))


def overfull_chunk(file, outside):
  """A chunk that says 24 bytes and becomes 16 GB."""
  import zlib

  del file['rewards']
  made = file.create_dataset(
    'rewards', (N,), np.float32, chunks=(N,), compression='gzip'
  )
  packer = zlib.compressobj(9)
  block, parts = bytes(1 << 24), []
  parts = [packer.compress(block) for _ in range(1 << 10)] + [packer.flush()]
  made.id.write_direct_chunk((0,), b''.join(parts))


def unusual_filter(file, outside):
  del file['rewards']
  file.create_dataset('rewards', (N,), np.float32, chunks=(N,), scaleoffset=2)


def as_group(file, outside):
  del file['rewards']
  file.create_group('rewards')


def replace_in(key, value):
  def change(file, outside):
    del file[key]
    file[key] = value

  return change


def main(change):
  """The same in Minari's file."""
  return hdf5(change, 'main_data.hdf5')


def episode_link(file, outside):
  import h5py

  del file['episode_0']
  file['episode_0'] = h5py.ExternalLink(outside / 'numbers.hdf5', '/')


def box(**changes):
  space = {'type': 'Box', 'dtype': 'float32', 'shape': [2], 'low': 0, 'high': 1}
  return json.dumps({**space, **changes})


def nested(depth):
  space = {'type': 'Box', 'shape': [1]}
  for _ in range(depth):
    space = {'type': 'Dict', 'subspaces': {'a': space}}
  return json.dumps(space)


ABOUT, META = 'about.json', 'metadata.json'
ESCAPE = 'x\x1b]0;owned\x07\x1b[2J'
CASES = (
  *replaced('folder', 'reward.npy', (*KINDS, *BYTES)),
  *replaced('folder', ABOUT, (*KINDS, *BYTES, as_deep)),
  *replaced('npz', 'set.npz', (as_fifo, as_socket, as_device)),
  *replaced('npz', 'set.npz', (as_folder, as_pointer, *BYTES)),
  *replaced('d4rl', 'set.hdf5', (as_fifo, as_socket, as_device)),
  *replaced('d4rl', 'set.hdf5', (as_folder, as_pointer, *BYTES)),
  *replaced('minari', META, (*KINDS, *BYTES, as_deep)),
  *replaced('minari', 'main_data.hdf5', (*KINDS, *BYTES)),
  *replaced('text', 'set.txt', (as_fifo, as_socket, as_device, as_folder)),
  *replaced('text', 'set.txt', (as_pointer, as_nothing, as_noise)),
  *replaced('run', 'config.json', (*KINDS, *BYTES, as_deep)),
  *replaced('statistics', 'statistics.json', (*KINDS, *BYTES, as_deep)),
  *replaced('vocabulary', 'vocabulary.json', (*KINDS, *BYTES, as_deep)),
  *(
    Case('folder', name, make)
    for name, make in (
      ('a FIFO that is not read', lambda f: os.mkfifo(f / 'notes')),
      ('a link that is not read', lambda f: (f / 'n').symlink_to('/etc')),
      ('pickled objects', saved('reward', objects, True)),
      ('text', saved('reward', np.array(['1'] * N))),
      ('records', saved('reward', np.zeros(N, 'f4,f4'))),
      ('complex', saved('reward', np.zeros(N, complex))),
      ('a number', saved('reward', np.float32(1))),
      ('no rows', saved('reward', np.zeros(0, np.float32))),
      ('empty actions', saved('action', np.zeros((N, 0), np.float32))),
      ('empty rows', saved('observation', np.zeros((N, 0), np.float32))),
      ('NaN', saved('reward', np.full(N, np.nan, np.float32))),
      ('a sparse file', sparse),
      (
        'a negative shape',
        npy("{'descr':'<f4','fortran_order':0,'shape':(-1,)}"),
      ),
      ('a shape of text', npy("{'descr':'<f4','fortran_order':0,'shape':'a'}")),
      (
        'a huge dtype',
        npy("{'descr':'V999999999999','fortran_order':0,'shape':(1,)}"),
      ),
      (
        '2 TB',
        npy("{'descr':'<f8','fortran_order':False,'shape':(274877906944,)}"),
      ),
      ('deep header', npy('(' * 5000)),
      ('signs', npy('-' * 5000 + '1')),
      ('code in a header', npy("__import__('os').abort()")),
      ('a long header', npy(' ' * 60_000)),
      ('list', written(ABOUT, '[]')),
      ('no action_low', fields(ABOUT, action_low='gone')),
      ('null action_low', fields(ABOUT, action_low=None)),
      ('text as number', fields(ABOUT, action_low=['-1'])),
      ('ragged', fields(ABOUT, action_low=[[1], [1, 2]])),
      ('NaN bound', fields(ABOUT, action_low=[float('nan')])),
      ('a bound of 400 digits', fields(ABOUT, action_high=[10**400])),
      ('bounds in disorder', fields(ABOUT, action_low=[5.0])),
      ('NaN reference', fields(ABOUT, ref_min=float('nan'))),
      ('text reference', fields(ABOUT, ref_max='much')),
      ('a name of numbers', fields(ABOUT, name=3)),
      ('an env of null', fields(ABOUT, env=None)),
      ('extra of a list', fields(ABOUT, extra=[1])),
      ('options of numbers', fields(ABOUT, extra={'options': [1]})),
      ('options of text', fields(ABOUT, extra={'options': 'a=1'})),
      ('episodes cut of text', fields(ABOUT, extra={'cut_episodes': ['a']})),
      ('episodes cut beyond', fields(ABOUT, extra={'cut_episodes': [99]})),
      ('true as version', fields(ABOUT, version=True)),
      ('escapes', fields(ABOUT, **{ESCAPE: 1})),
    )
  ),
  *(
    Case('npz', name, make)
    for name, make in (
      ('an absolute name', renamed('/etc/reward.npy')),
      ('a name above', renamed('../reward.npy')),
      ('escapes in a name', renamed(f'{ESCAPE}.npy')),
      ('one more', added('more.npy')),
      ('not an array', added('reward.txt')),
      ('pickled objects', member(objects, True)),
      ('text', member(np.array(['1'] * N))),
      ('2 TB', huge_member),
      ('a directory that lies', lying_directory),
      ('a bomb', bomb),
      ('a member of another name', renamed('action2.npy')),
    )
  ),
  *(
    Case('d4rl', name, make)
    for name, make in (
      ('external link', hdf5(external_link)),
      ('soft link', hdf5(soft_link)),
      ('external storage', hdf5(external_storage)),
      ('virtual', hdf5(virtual)),
      ('16 TB', hdf5(declared)),
      ('an unusual filter', hdf5(unusual_filter)),
      ('a group', hdf5(as_group)),
      ('text', arrays(rewards=np.array([b'1'] * N))),
      ('a number', arrays(rewards=np.float32(1))),
      ('no rows', arrays(**{k: v[:0] for k, v in flat().items()})),
      ('empty actions', arrays(actions=np.zeros((N, 0)))),
      ('NaN flags', arrays(terminals=np.full(N, np.nan))),
      ('other next rows', arrays(next_observations=np.zeros((N, 3)))),
      ('escapes', arrays(rewards=None, **{ESCAPE: np.zeros(N)})),
    )
  ),
  *(
    Case('minari', name, make)
    for name, make in (
      ('a FIFO that is not read', lambda f: os.mkfifo(f / 'notes')),
      ('a list', written(META, '[]')),
      ('no spaces', fields(META, observation_space='gone')),
      ('a space as object', fields(META, action_space={'type': 'Box'})),
      ('a space of a list', fields(META, action_space='[]')),
      ('a space of deep lists', fields(META, action_space='[' * 9999)),
      ('deep spaces', fields(META, observation_space=nested(70))),
      ('a shape of text', fields(META, observation_space=box(shape='2'))),
      ('a shape of halves', fields(META, observation_space=box(shape=[1.5]))),
      ('a negative shape', fields(META, observation_space=box(shape=[-2]))),
      ('a huge shape', fields(META, observation_space=box(shape=[1 << 30]))),
      ('dtype of objects', fields(META, observation_space=box(dtype='O'))),
      ('dtype of a list', fields(META, observation_space=box(dtype=[1]))),
      ('an unknown space', fields(META, observation_space='{"type": "Graph"}')),
      ('an empty dict', fields(META, observation_space='{"type": "Dict"}')),
      (
        'a part above',
        fields(
          META,
          observation_space=json.dumps(
            {'type': 'Dict', 'subspaces': {'../x': {'type': 'Box'}}}
          ),
        ),
      ),
      (
        'a huge Discrete',
        fields(META, observation_space='{"type": "Discrete", "n": 2000000000}'),
      ),
      ('no low', fields(META, action_space='{"type": "Box", "shape": [1]}')),
      ('lows of text', fields(META, action_space=box(shape=[1], low='a'))),
      ('too many lows', fields(META, action_space=box(shape=[1], low=[0, 0]))),
      (
        'empty actions',
        fields(META, action_space=box(shape=[0], low=[], high=[])),
      ),
      ('episodes as text', fields(META, total_episodes='2')),
      ('episodes as true', fields(META, total_episodes=True)),
      ('no episodes', fields(META, total_episodes=0)),
      ('episodes beyond', fields(META, total_episodes=10**12)),
      ('negative episodes', fields(META, total_episodes=-1)),
      ('a name of numbers', fields(META, dataset_id=3)),
      ('a reference of text', fields(META, ref_min_score='a')),
      ('our part as text', fields(META, outplay='x')),
      ('env of a list', fields(META, outplay={'env': [1]})),
      ('a spec of a list', fields(META, outplay='gone', env_spec='[]')),
      ('a spec without id', fields(META, outplay='gone', env_spec='{}')),
      ('a spec as object', fields(META, outplay='gone', env_spec={'id': 'A'})),
      (
        'wrappers of text',
        fields(
          META,
          outplay='gone',
          env_spec='{"id": "A-v0", "additional_wrappers": "x"}',
        ),
      ),
      (
        'external link',
        main(lambda f, o: external_link(f, o, 'episode_0/rewards')),
      ),
      ('external episode', main(episode_link)),
      ('a number', main(replace_in('episode_0/rewards', 1.0))),
      ('a table', main(replace_in('episode_0/rewards', np.zeros((3, 2))))),
      (
        'flags of rows',
        main(replace_in('episode_0/truncations', np.zeros((3, 1)))),
      ),
      ('an array as episode', main(replace_in('episode_0', np.zeros(3)))),
      ('text', main(replace_in('episode_0/actions', np.array([b'a'] * 3)))),
    )
  ),
  *(
    Case('run', name, make)
    for name, make in (
      ('a list', written('config.json', '[]')),
      ('no agent', fields('config.json', agent_name='gone')),
      ('steps of text', fields('config.json', steps='many')),
      ('sections of lists', fields('config.json', env=[1])),
      ('a field of lists', fields('config.json', env={'num_envs': [[1]]})),
      ('an unknown field', fields('config.json', env={ESCAPE: 1})),
      ('an unknown name', fields('config.json', name='../../x')),
      (
        'a wrapper of its own',
        fields(
          'config.json',
          env={'recorded': '{"wrappers": [["os:system", {"command": "x"}]]}'},
        ),
      ),
      (
        'a path',
        fields('config.json', env={'recorded': '{"kwargs": {"a": "/etc/x"}}'}),
      ),
    )
  ),
  *(
    Case('statistics', name, make)
    for name, make in (
      ('text', fields('statistics.json', mean='a')),
      ('text in a list', fields('statistics.json', mean=['a', 'b'])),
      ('too many', fields('statistics.json', mean=[0.0] * 3)),
      ('NaN', fields('statistics.json', mean=[float('nan'), 0.0])),
      ('no std', fields('statistics.json', std='gone')),
      ('std of 0', fields('statistics.json', std=[0.0, 1.0])),
    )
  ),
  Case('vocabulary', 'numbers', written('vocabulary.json', '[1]')),
  Case('vocabulary', 'a dictionary', written('vocabulary.json', '{}')),
)
# Takes seconds and 16 MB to make.
SLOW_CASES = (Case('d4rl', 'a chunk of 16 GB', hdf5(overfull_chunk)),)
