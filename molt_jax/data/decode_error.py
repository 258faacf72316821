"""Why an image cannot be used, in one line."""

MAX_REASON = 200


def one_line(text: str, most: int = MAX_REASON) -> str:
  """Returns text fit for a terminal: in one line, unprintable characters escaped, cut to `most`."""
  shown = ' '.join(text[: 4 * most].split())
  shown = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in shown)
  return shown if len(shown) <= most else shown[: most - 3] + '...'


class DecodeError(ValueError):
  """An image that cannot be used; the message says why, in one line (`one_line`)."""

  def __init__(self, reason: str):
    super().__init__(one_line(reason))
