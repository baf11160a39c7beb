"""The devices that JAX has found, and its cache of compiled programs."""

import os
import pathlib

from experiments.runtime import config as configs

_OLDEST_JAX = (0, 10)


def check_jax() -> None:
  """Refuses a JAX that is too old or finds no devices.

  Raises:
    UserError: says which would do.
  """
  import jax

  if jax.__version_info__ < _OLDEST_JAX:
    raise configs.UserError(
      f'jax={jax.__version__}: must be {".".join(map(str, _OLDEST_JAX))} or '
      'newer: pip install -c constraints.txt -e .'
    )
  try:
    jax.devices()
  except RuntimeError as error:
    asked = os.environ.get('JAX_PLATFORMS', '')
    raise configs.UserError(
      f'JAX_PLATFORMS={asked}: {error}; take JAX_PLATFORMS=cpu, or install '
      'what these devices need'
    ) from error


def use_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache folder, if none is set.

  Raises:
    UserError: as `check_jax`.
  """
  import jax

  check_jax()
  # Compiling takes most of a short run; the next one finds it done.
  folder = pathlib.Path.home() / '.cache' / 'outplay' / 'jax'
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
