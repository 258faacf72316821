"""The images and texts of a data set that could not be used, for the user."""

import collections
import threading

from molt_jax.data.decode_error import one_line


class DecodeReport:
  """Counts the images and texts that could not be used and keeps the first names.

  Thread-safe; an example counts once however often it is read. Names and reasons come from files,
  so they are made fit for a terminal (`one_line`).
  """

  def __init__(self, keep: int = 5):
    self._keep = keep
    self._lock = threading.Lock()
    self._reasons: dict[str, dict[str, str]] = collections.defaultdict(dict)

  def add(self, example_id: str, modality: str, reason: str) -> None:
    with self._lock:
      self._reasons[modality].setdefault(example_id, one_line(reason))

  def counts(self) -> dict[str, int]:
    """Returns the number of examples that lost each modality, e.g. {'image': 3}."""
    with self._lock:
      return {modality: len(reasons) for modality, reasons in self._reasons.items()}

  def reason(self, example_id: str) -> str:
    """Returns what of an example could not be used and why, empty when nothing was lost."""
    with self._lock:
      found = {modality: reasons.get(example_id) for modality, reasons in self._reasons.items()}
      return '; '.join(f'{modality}: {why}' for modality, why in found.items() if why)

  def line(self) -> str:
    """Returns one line for the user, empty when nothing was lost."""
    with self._lock:
      return '; '.join(
        self._describe(modality, reasons) for modality, reasons in sorted(self._reasons.items())
      )

  def _describe(self, modality: str, reasons: dict[str, str]) -> str:
    named = list(reasons.items())[: self._keep]
    first = ', '.join(f'{one_line(name)} ({reason})' for name, reason in named)
    more = f', and {len(reasons) - self._keep} more' if len(reasons) > self._keep else ''
    return (
      f'{len(reasons)} unusable {modality}{"s" if len(reasons) > 1 else ""} treated as '
      f'absent: {first}{more}'
    )
