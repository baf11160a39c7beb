"""Errors for users, and escaping of untrusted text."""

_LONGEST = 200


class UserError(ValueError):
  """A mistake by the user; its message is one line that the user can read."""


class Missing(UserError):
  """A file or folder does not exist."""


def shown(text: object, limit: int = _LONGEST) -> str:
  r"""Escapes and shortens text from a file or a flag for a terminal.

  Control characters, surrogates and invisible marks become escapes, because a
  terminal may obey them; text longer than `limit` (at least 20) loses its
  middle.

  >>> shown('name\x1b[2J')
  'name\\x1b[2J'
  >>> shown('a' * 50, 20)
  'aaaaaaaa ... aaaaaaa'
  """
  text = str(text)
  if len(text) > limit:
    # Cuts before escaping, because the text may be as large as its file.
    half = (limit - 5) // 2
    text = f'{text[: limit - 5 - half]} ... {text[len(text) - half :]}'
  # Printable characters include the letters of all scripts and the space.
  escaped = ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode('ascii')
    for c in text
  )
  return escaped if len(escaped) <= 2 * limit else escaped[: 2 * limit] + '...'
