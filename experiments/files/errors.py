"""Errors for people, and text of strangers made safe to show."""

# A terminal takes these for commands, and bidirectional marks reorder a line.
_LONGEST = 200


class UserError(ValueError):
  """A mistake of the person who runs us; its message is one line for them."""


class Missing(UserError):
  """A file or folder that is not there."""


def shown(text: object, limit: int = _LONGEST) -> str:
  """Text from a file or a flag as it may reach a terminal.

  Control characters, surrogates and invisible marks are written as escapes;
  what is longer than `limit` loses its middle.

  Args:
    text: anything; `str` of it is shown.
    limit: characters at most, at least 20.

  >>> shown('name\\x1b[2J')
  'name\\\\x1b[2J'
  >>> shown('a' * 50, 20)
  'aaaaaaaa ... aaaaaaa'
  """
  text = str(text)
  if len(text) > limit:
    # Cut before escaping: the text may be as large as its file.
    half = (limit - 5) // 2
    text = f'{text[: limit - 5 - half]} ... {text[len(text) - half :]}'
  # What is printable includes letters of all scripts and the plain blank.
  escaped = ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode('ascii')
    for c in text
  )
  return escaped if len(escaped) <= 2 * limit else escaped[: 2 * limit] + '...'
