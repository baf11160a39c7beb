"""Ctrl-C and SIGTERM, from a launcher's first moment to its exit code.

An interrupted launcher exits with 130 and a terminated one with 143, so that
`train && play` stops there. Where work can be saved, `graceful_exit` turns the
signal into a flag that a loop polls; everywhere else it is a
`KeyboardInterrupt`, which libraries may swallow and long calls into C delay. So
a thread hears every signal at once and ends the process if nothing else does.
"""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds that a process has to clean up where nothing is saved.
_PATIENCE = 5.0

_Handler = Callable[[int, FrameType | None], Any]


class _State:
  """What this process has heard; a launcher's whole life has one."""

  def __init__(self):
    self.received = 0
    self.takes = 0.0  # signals that the present handler is content with
    self.interrupted = False
    self.is_launcher = False
    self.code = 0


_state = _State()


def received() -> int:
  """The first signal that this launcher has received, or 0."""
  return _state.received


def note(signum: int) -> None:
  """Lets this process end as if it had received a signal that its peers did."""
  if not _state.received and signum in SIGNALS:
    _state.received = signum
    _state.code = 128 + signum


def set_exit_code(code: int) -> None:
  """Notes the exit code, for code that ends the process by other means."""
  _state.code = code


def exit_code() -> int:
  """The noted code, of a refusal or a signal; 0 if there is none."""
  return _state.code


def name_of(signum: int) -> str:
  """`SIGTERM`, or `signal 99` for a number that has no name."""
  try:
    return signal.Signals(signum).name
  except ValueError:
    return f'signal {signum}'


def is_stop(code: int) -> bool:
  """Whether an exit code or `Popen.returncode` means: asked to stop."""
  return code in (*(128 + s for s in SIGNALS), *(-s for s in SIGNALS))


def explain(code: int) -> str:
  """An exit code or `Popen.returncode` in words.

  >>> explain(3)
  'exit code 3'
  >>> explain(-9)
  'SIGKILL: killed by the user or for lack of memory'
  """
  signum = -code if code < 0 else code - 128
  if code == 2:
    return 'exit code 2: refused'
  if is_stop(code):
    return f'stopped by {name_of(signum)}'
  if signum == signal.SIGKILL:
    return 'SIGKILL: killed by the user or for lack of memory'
  return name_of(signum) if code < 0 else f'exit code {code}'


@contextlib.contextmanager
def launcher() -> Iterator[None]:
  """The life of a launcher: signals end it with 130 or 143.

  Outside `handling` and `graceful_exit` a signal raises `KeyboardInterrupt`; a
  process that is still there after 5 s is ended from another thread. Outside
  the main thread nothing changes.

  Raises:
    SystemExit: with 128 and the signal's number.
  """
  global _state
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before, _state = _state, _State()
  _state.is_launcher = True
  try:
    with _heard_at_once(), _raised_again(), handling(_interrupt, takes=0):
      try:
        yield
      except KeyboardInterrupt:
        note(signal.SIGINT)  # if it was raised by other means
        print(f'stopped by {name_of(received())}', file=sys.stderr, flush=True)
      except BaseException:
        # Libraries turn an interrupt into errors of their own.
        if not _state.interrupted:
          raise
    if received():
      raise SystemExit(128 + received())
  finally:
    # `distributed` ends the process after its launcher, with the same code.
    before.code = _state.code
    _state = before


def _interrupt(signum: int, frame: FrameType | None) -> None:
  note(signum)
  _state.interrupted = True
  raise KeyboardInterrupt


@contextlib.contextmanager
def handling(handler: _Handler, *, takes: float = math.inf) -> Iterator[None]:
  """Passes SIGTERM and SIGINT to a handler, in the main thread.

  It takes care of `takes` signals; one more ends the process even if its main
  thread is stuck in a call.
  """
  before, outer = handlers(), _state.takes
  take_back([handler] * len(SIGNALS))
  _state.takes = takes
  try:
    yield
  finally:
    _state.takes = outer
    take_back(before)


@contextlib.contextmanager
def graceful_exit() -> Iterator[Callable[[], bool]]:
  """Turns SIGTERM and SIGINT into a flag that a loop polls between steps.

  `with graceful_exit() as should_stop: while not should_stop(): ...`. A second
  signal ends the process at once, with 130 or 143. Outside the main thread the
  flag stays False. In a launcher that was interrupted before it is True at
  once.
  """
  flag = threading.Event()
  if not _state.is_launcher:
    # In a notebook a run that was stopped must not stop the next one.
    _state.received = _state.code = 0
  elif received():
    flag.set()

  def handle(signum: int, frame: Any) -> None:
    del frame
    if flag.is_set():
      _leave(128 + signum)
    note(signum)
    flag.set()

  if threading.current_thread() is not threading.main_thread():
    yield flag.is_set
    return
  with handling(handle, takes=1):
    yield flag.is_set


def take_back(handlers: list[Any]) -> None:
  """Sets the handlers of `SIGNALS` that a library has displaced."""
  for signum, handler in zip(SIGNALS, handlers):
    signal.signal(signum, handler)


def handlers() -> list[Any]:
  """The present handlers of `SIGNALS`, for `take_back`."""
  return [signal.getsignal(signum) for signum in SIGNALS]


def _leave(code: int) -> None:
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os._exit(code)


@contextlib.contextmanager
def _raised_again() -> Iterator[None]:
  """Interrupts again if a callback, such as jax's for the GC, lost it."""
  before = sys.unraisablehook

  def again() -> None:
    if _state.interrupted:
      os.kill(os.getpid(), received())

  def hook(unraisable: Any) -> None:
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
      before(unraisable)
      return
    # Not from in here: it would be lost again.
    timer = threading.Timer(0.05, again)
    timer.daemon = True
    timer.start()

  sys.unraisablehook = hook
  try:
    yield
  finally:
    sys.unraisablehook = before


@contextlib.contextmanager
def _heard_at_once() -> Iterator[None]:
  """A thread that hears signals while the main one is in a call into C.

  Python runs handlers between two bytecodes of the main thread, which may
  compile for a minute or wait for its peers, and a `KeyboardInterrupt` in a
  library's callback is printed and forgotten.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  state = _state

  def listen() -> None:
    deadline, code, seen = None, 0, 0
    while True:
      left = None if deadline is None else max(deadline - time.monotonic(), 0)
      if not select.select([reader], [], [], left)[0]:
        _leave(code)
      for byte in os.read(reader, 64):
        if byte == 0:
          return
        if byte not in SIGNALS:
          continue
        seen += 1
        if seen <= state.takes:
          continue  # a loop saves, or passes it on
        code = 128 + byte
        deadline = deadline or time.monotonic() + _PATIENCE

  thread = threading.Thread(target=listen, name='signals', daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    with contextlib.suppress(OSError):
      os.write(writer, b'\0')
    thread.join()
    os.close(reader)
    os.close(writer)


def _hold_signals() -> None:
  """Before a fork: a signal to the child must not reach the parent's pipe."""
  if _state.is_launcher:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release_signals() -> None:
  if _state.is_launcher:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _forget() -> None:
  """In a forked child, which writes into no pipe and ends normally."""
  if _state.is_launcher:
    signal.set_wakeup_fd(-1)
    take_back([signal.default_int_handler, signal.SIG_DFL])
    _release_signals()
    _state.is_launcher = False


os.register_at_fork(
  before=_hold_signals,
  after_in_parent=_release_signals,
  after_in_child=_forget,
)
