"""The page that `molt audit` writes: rows that may not be what is meant, with their pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from molt_jax.data.duplicates import Duplicate
from molt_jax.evaluation.data_faults import OUTLYING, TIMES, Suspect
from molt_jax.reporting import examples
from molt_jax.reporting.document import Page, percent, safe, whole

CARDS = 24  # Of each kind.
KINDS = {
  'pair': (
    'Image and text that may not belong together',
    'The image alone and the text alone answer differently, and neither says of the other what is '
    'there. Suspected is a row that is no more in accord than the median of pairs torn apart at '
    'random, so about half of such pairs are found.',
  ),
  'label': (
    'Labels that may be wrong',
    'Another label is likelier, by models that have not seen the row. Suspected is a row for which '
    f'it is {TIMES:g} times as likely.',
  ),
  'outlier': (
    'Unlike all others',
    'The distance of the image, or the text, to near ones is far above that of others. Suspected '
    f'is a row that is more than {OUTLYING:g} median absolute deviations above the median.',
  ),
  'unlabelled': ('Guesses for rows without a label', 'The surest first.'),
}


class Content(NamedTuple):
  """What the page is made of.

  Attributes:
    name: of the run.
    split: that was audited.
    ids: of its examples.
    class_names: K names.
    given: of each example, the names of its labels.
    suspects: of all kinds, each with the most suspect first.
    p_vnk: answers under each missing pattern by models that have not seen the row.
    duplicates: of all splits.
    shown: (split, row) -> the example, `recorder.exhibit`.
  """

  name: str
  split: str
  ids: Sequence[str]
  class_names: Sequence[str]
  given: Sequence[str]
  suspects: Sequence[Suspect]
  p_vnk: np.ndarray
  duplicates: Sequence[Duplicate]
  shown: Mapping[tuple[str, int], Mapping[str, Any]]


def of_kind(suspects: Sequence[Suspect], kind: str) -> list[Suspect]:
  """Returns the suspects of a kind that the page shows."""
  return [suspect for suspect in suspects if suspect.kind == kind][:CARDS]


def shown_duplicates(duplicates: Sequence[Duplicate]) -> list[Duplicate]:
  """Returns the duplicates that the page shows, those across splits first."""
  return sorted(duplicates, key=lambda x: x.split == x.other_split)[:CARDS]


def render(content: Content) -> str:
  """Returns the whole page."""
  page = Page([])
  abstract = (
    f'<p class="abstract">{len(content.ids):,} rows of the {safe(content.split)} split, looked at '
    "by models of the frozen towers' states that have not seen the row they judge. A suspicion is "
    'no proof: look at each.</p>'
  )
  sections = {'all': ('What was found', _table(page, content))}
  for kind, (title, note) in KINDS.items():
    rows = of_kind(content.suspects, kind)
    if rows:
      body = examples.cards([_card(content, suspect) for suspect in rows])
      sections[kind] = title, f'<p class="caption">{note}</p>{body}'
  if content.duplicates:
    body = examples.cards([_pair(content, x) for x in shown_duplicates(content.duplicates)])
    note = (
      'The same example twice; across splits also the same image, the same text, or nearly the '
      'same picture. Those across splits come first.'
    )
    sections['duplicates'] = 'The same thing twice', f'<p class="caption">{note}</p>{body}'
  return whole(f'{content.name}: audit', 'molt_jax data audit', abstract, sections, 'audit')


def _table(page: Page, content: Content) -> str:
  rows = []
  for kind, (title, _) in KINDS.items():
    own = [suspect for suspect in content.suspects if suspect.kind == kind]
    if own:
      count = sum(suspect.suspected for suspect in own)
      rows.append([title, f'{len(own):,}', f'{count:,}', percent(count / len(own))])
  for kind in dict.fromkeys(x.kind for x in content.duplicates):
    own = [x for x in content.duplicates if x.kind == kind]
    across = sum(x.split != x.other_split for x in own)
    rows.append([f'The same {kind} twice', '–', f'{len(own):,}, {across:,} across splits', '–'])
  caption = 'All suspected rows are in the CSV file beside this page.'
  return page.table(['', 'rows looked at', 'suspected', '%'], rows, caption)


def _card(content: Content, suspect: Suspect) -> str:
  row = suspect.row
  lines = [f'<b>{safe(content.given[row] or "no label")}</b>']
  if suspect.guess >= 0:
    name = content.class_names[suspect.guess]
    note = f'{100 * suspect.probability:.0f} %'
    lines.append(examples.bar(f'may be {name}', suspect.probability, note, kind='wrong'))
  if suspect.kind == 'pair':
    for v, modality in ((1, 'image'), (2, 'text')):
      p_k = content.p_vnk[v, row]
      if np.isfinite(p_k).all():
        k = int(p_k.argmax())
        note = f'{100 * float(p_k[k]):.0f} %'
        lines.append(examples.bar(f'{modality} says {content.class_names[k]}', float(p_k[k]), note))
  if suspect.kind != 'unlabelled':
    what = f'{suspect.modality}, ' if suspect.modality else ''
    mark = 'suspected' if suspect.suspected else 'below the bound'
    lines.append(f'<small>{what}score {suspect.score:.1f}, {mark}</small>')
  return examples.card(content.shown[content.split, row], lines)


def _pair(content: Content, duplicate: Duplicate) -> str:
  one = content.shown[duplicate.split, duplicate.row]
  other = content.shown[duplicate.other_split, duplicate.other_row]
  where = f'{duplicate.split} and {duplicate.other_split}'
  lines = [
    f'<b>same {duplicate.kind}: {safe(where)}</b>',
    f'<small>also {safe(other["id"])}: {safe(other["text"] or "no text")}</small>',
    examples.picture(other),
  ]
  return examples.card(one, lines)
