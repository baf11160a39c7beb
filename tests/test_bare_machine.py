"""Machines that have Python and pip, and not the libraries of OpenGL.

envpool's newer wheels load them for MuJoCo and football, and all of envpool's
families at once. They are hidden in two ways: by a loader that does not find
them (any machine, the envpool that is installed), and by a mount of their
folder without them (root on Linux, the envpool that Python 3.12 gets).
`PYTHON_NEW` names a Python >= 3.12 that is not on the path.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
HIDDEN = ('libEGL.so', 'libOpenGL.so', 'libGL.so', 'libGLX.so')

# Makes environments by name; a line of output each.
MAKE = """
import sys
from experiments.envs.envpool import make_envpool
for name in sys.argv[1:]:
  try:
    simulator = make_envpool(name, 1).start(0)
    print(name, 'runs', simulator.reset().is_first)
    simulator.close()
  except ValueError as error:
    print(error)
"""

# What the dynamic loader says of a binary that needs what is not there.
PATCHED_LOADER = """
import importlib.machinery, pathlib
loader = importlib.machinery.ExtensionFileLoader
create = loader.create_module
def create_module(self, spec):
  if b'libEGL' in pathlib.Path(spec.origin).read_bytes():
    raise ImportError(
      'libEGL.so.1: cannot open shared object file: No such file or directory'
    )
  return create(self, spec)
loader.create_module = create_module
"""

# Mounts each folder of libraries on itself, without some of them. What is
# mounted is seen by this process and its children only.
MOUNT = """
set -e
for folder in /usr/lib/*-linux-gnu /usr/lib64 /usr/lib; do
  ls $folder/lib{EGL,OpenGL}.so* >/dev/null 2>&1 || continue
  upper=$(mktemp -d)
  mount -t tmpfs none $upper
  mkdir $upper/upper $upper/work
  mount -t overlay overlay $folder \
    -o lowerdir=$folder,upperdir=$upper/upper,workdir=$upper/work
  for name in NAMES; do rm -f $folder/$name*; done
done
exec "$@"
""".replace('NAMES', ' '.join(HIDDEN))
HIDING = ['unshare', '--mount', 'bash', '-c', MOUNT, 'hiding']

MISSING = (
  r"env='HopperHop-v1': needs libEGL\.so\.1.*not found on this machine; on "
  r'Debian: apt-get install libegl1'
)


def run(command, **kwargs):
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  return subprocess.run(
    command,
    capture_output=True,
    text=True,
    timeout=900,
    env=environment | kwargs.pop('env', {}),
    **kwargs,
  )


def can_hide():
  if sys.platform != 'linux' or not shutil.which('unshare'):
    return False
  look = 'import ctypes; ctypes.CDLL("libEGL.so.1")'
  hidden = run([*HIDING, sys.executable, '-c', look])
  return 'cannot open shared object file' in hidden.stderr


def pythons(lowest):
  """Interpreters by version that start, from `(3, lowest)` on."""
  found = {}
  names = [os.environ.get('PYTHON_NEW', ''), sys.executable]
  names += [f'python3.{minor}' for minor in (14, 13, 12, 11)]
  for name in filter(None, names):
    path = shutil.which(name)
    if path is None:
      continue
    version = run([path, '-c', 'import sys; print(sys.version_info[1])'])
    if version.returncode == 0 and int(version.stdout) >= lowest:
      found.setdefault(int(version.stdout), path)
  return found


def test_a_family_that_cannot_be_loaded_is_one_line_and_others_run():
  code = PATCHED_LOADER + MAKE
  names = ['Catch-v0', 'HopperHop-v1', 'CartPole-v1', 'NoSuch-v1']
  done = run([sys.executable, '-c', code, *names], cwd=ROOT)
  assert done.returncode == 0, done.stderr
  catch, hopper, cartpole, unknown = done.stdout.splitlines()
  assert catch == 'Catch-v0 runs [ True]'
  assert re.fullmatch(MISSING + '.*', hopper)
  assert cartpole == 'CartPole-v1 runs [ True]'
  assert unknown.startswith("env='NoSuch-v1': unknown to envpool; nearest: ")


def test_the_newer_envpool_without_opengl(tmp_path):
  if not can_hide():
    pytest.skip('libraries can be hidden by root on Linux only')
  found = pythons(12)
  if not found:
    pytest.skip('no Python >= 3.12 here; PYTHON_NEW=/path/to/python names one')
  where = tmp_path / 'venv'
  python = str(where / 'bin' / 'python')
  pins = ['-c', str(ROOT / 'constraints.txt')]
  for command in (
    [next(iter(found.values())), '-m', 'venv', str(where)],
    [python, '-m', 'pip', 'install', '-q', *pins, 'uv'],
    [str(where / 'bin' / 'uv'), 'pip', 'install', '-q', '-p', str(where)]
    + [*pins, 'envpool', 'chex', 'mctx'],
  ):
    done = run(command)
    if done.returncode:
      pytest.skip(f'cannot install: {done.stderr.splitlines()[-1]}')
  names = ['Catch-v0', 'HopperHop-v1', 'NoSuch-v1']
  done = run([*HIDING, python, '-c', MAKE, *names], cwd=ROOT)
  assert done.returncode == 0, done.stderr
  catch, hopper, unknown = done.stdout.splitlines()
  assert catch == 'Catch-v0 runs [ True]'
  assert re.fullmatch(f'{MISSING} libopengl0', hopper)
  # Its names are in the binary, so that nobody knows whether this is one.
  assert 'not loaded: mujoco.locomotion' in unknown


@pytest.mark.slow
@pytest.mark.parametrize('minor', [11, 12, 13, 14])
def test_the_first_command_on_a_bare_machine(minor, tmp_path):
  if not can_hide():
    pytest.skip('libraries can be hidden by root on Linux only')
  python = pythons(11).get(minor)
  if python is None:
    pytest.skip(f'no Python 3.{minor} here')
  [command, *_] = re.findall(
    r'```bash\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL
  )
  assert command.startswith('python3 -m venv'), command
  command = command.replace('python3 -m venv', f'{python} -m venv', 1)
  clone = tmp_path / 'clone'
  assert run(['git', 'clone', '-q', str(ROOT), str(clone)]).returncode == 0
  done = run([*HIDING, 'bash', '-ec', command], cwd=clone)
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'Traceback' not in done.stderr + done.stdout
  assert list(clone.glob('runs/*/metrics.csv'))
