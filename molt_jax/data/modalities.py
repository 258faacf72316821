"""The one table of modalities and of what can be missing.

Column 0 of everything that has a column per modality (`present`, `keep`) is the image, column 1 the
text.
"""

import numpy as np

MODALITIES = ('image', 'text')
COLUMN = {modality: column for column, modality in enumerate(MODALITIES)}

# bool[3, 2]: complete, image alone, text alone.
PATTERNS = np.array([[True, True], [True, False], [False, True]])

# What an evaluation takes away -> the modalities that it keeps.
KEPT = {'none': (True, True), 'text': (True, False), 'image': (False, True)}


def condition(missing: str) -> str:
  """Returns the name, in files and scores, of the condition without `missing`, a key of KEPT."""
  return f'{missing}_absent'


CONDITIONS = tuple(condition(missing) for missing in KEPT)
# As tables and figures name them.
LABELS = {
  condition(missing): 'complete' if missing == 'none' else f'without {missing}' for missing in KEPT
}


def in_words(name: str) -> str:
  """Returns a condition as people read it: 'without text' for 'text_absent', and '70 % without
  text or image' for 'missing_both_0.7', where each lacks one of them.
  """
  kind, _, rate = name.removeprefix('missing_').partition('_')
  if name in LABELS or not name.startswith('missing_'):
    return LABELS.get(name, name.replace('_', ' '))
  lost = {'both': 'text or image'}.get(kind, kind)
  return f'{100 * float(rate):g} % without {lost}'
