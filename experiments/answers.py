"""Do prediction sets hold, where do shares go, does the audit find planted faults?

  python experiments/answers.py sets   NAME=DIR[,DIR ...] [NAME=DIR ...]
  python experiments/answers.py shares NAME=DIR [NAME=DIR ...]
  python experiments/answers.py audit  NAME=DIR [--seeds=0,1,2]

DIR is a finished run of `molt train`; several of a name are its seeds. Each part of the work and
each name add to results/answers/answers.json, from which answers.md is written anew.

sets    coverage and mean size on the test split at 90 %, with a threshold a pattern, with that of
        complete examples for all, and adaptive; the mean coverage over 100 halvings of validation
        and test examples put together, where both are alike by construction; with gaps that
        depend on the class, in validation and test; and of rows as they are, where some lack a
        modality by nature
shares  the part of all shares, by absolute value, that goes to the text
audit   5 % of the texts of train swapped, 5 % of the labels changed, in one draw a seed; 50 rows of
        train put into validation
"""

import json
import pathlib
import sys

import numpy as np
import scipy.stats

from molt_jax.data import duplicates, missing
from molt_jax.data.modalities import CONDITIONS, PATTERNS
from molt_jax.data.sources import classes_of
from molt_jax.evaluation import (
  calibration,
  contributions,
  data_faults,
  out_of_fold,
  pooled_states,
  prediction_sets,
  records,
  trained,
)
from molt_jax.runtime import atomic

AS_THEY_ARE = 'as they are'
OUT = pathlib.Path(__file__).parent / 'results/answers'
COVERAGE, HALVINGS, FAULTS, TWINS = 0.9, 100, 0.05, 50


# ---- Sets ---------------------------------------------------------------------------------------


def sets(folders):
  """Returns condition -> measures, means over seeds, of each seed beside."""
  found = [_sets(pathlib.Path(folder)) for folder in folders]
  return {
    name: {key: [run[name][key] for run in found] for key in found[0][name]} for name in found[0]
  }


def _sets(folder):
  known = calibration.of_run(trained.open(folder))
  p = records.Predictions.load(folder / records.PREDICTIONS)
  rules = {kind: known.rule(COVERAGE, kind) for kind in prediction_sets.KINDS}
  one = prediction_sets.SetRule(
    COVERAGE,
    'threshold',
    False,
    np.repeat(rules['threshold'].threshold_vk[:1], len(PATTERNS), axis=0),
  )
  result = {}
  for v, name in enumerate(CONDITIONS):
    present_nm = p.present_nm & PATTERNS[v]
    own = (p.label >= 0) & present_nm.any(axis=1)
    label, p_nk, present_nm = p.label[own], p.probability_cnk[v][own], present_nm[own]
    rows = np.arange(len(label))
    row = {'accuracy': float((p_nk.argmax(axis=1) == label).mean())}
    for kind, rule in {**rules, 'one for all': one}.items():
      members_nk = rule.members(p_nk, present_nm)
      row[kind] = float(members_nk[rows, label].mean())
      row[f'{kind}, labels'] = float(members_nk.sum(axis=1).mean())
    row['halvings'] = _halvings(known, v, p)
    row['gaps by class'] = _with_gaps(known, v, p)
    result[name] = row
  if not p.present_nm.all():
    result[AS_THEY_ARE] = _as_they_are(known, p)
  return result


def _of_test(p, v):
  """Test examples that a condition leaves a missing pattern: (rows, labels, scores)."""
  left_nm = p.present_nm & PATTERNS[v]
  rows = np.flatnonzero((left_nm == PATTERNS[v]).all(axis=1) & (p.label >= 0))
  label, p_nk = p.label[rows], p.probability_cnk[v][rows]
  return rows, label, _scores(p_nk[np.arange(len(label)), label], _before(p_nk, label))


def _halvings(known, v, p):
  """Mean coverage over halvings of validation and test together, threshold a pattern."""
  own = known.pattern_m == v
  scores = np.concatenate(
    [_scores(known.probability_m[own], known.before_m[own]), _of_test(p, v)[2]]
  )
  rng, shares = np.random.default_rng(0), []
  for _ in range(HALVINGS):
    order, middle = rng.permutation(len(scores)), len(scores) // 2
    threshold = prediction_sets.quantile(scores[order[:middle]], COVERAGE)
    shares.append(np.mean(scores[order[middle:]] <= threshold + prediction_sets.TOLERANCE))
  return float(np.mean(shares))


def _as_they_are(known, p):
  """Coverage of rows under the missing pattern that they have by nature, of which validation
  examples say as much: on the split, by pattern, and over halvings of validation and test.
  """
  start = int(known.example_m.max()) + 1  # Numbers of test examples come after.
  of_test = [_of_test(p, v) for v in range(len(PATTERNS))]
  pattern_e = np.concatenate(
    [known.pattern_m, *(np.full(len(x[0]), v) for v, x in enumerate(of_test))]
  )
  example_e = np.concatenate([known.example_m, *(start + rows for rows, *_ in of_test)])
  score_e = np.concatenate([_scores(known.probability_m, known.before_m), *(x[2] for x in of_test)])
  # Complete examples are known under all three patterns; what they are is the first.
  natural = {}
  for n, v in zip(example_e.tolist(), pattern_e.tolist(), strict=True):
    natural[n] = min(v, natural.get(n, v))
  is_natural_e = pattern_e == [natural[n] for n in example_e.tolist()]

  def held(calibrating_e):
    found = {}
    for v, name in enumerate(CONDITIONS):
      own_e = pattern_e == v
      threshold = prediction_sets.quantile(score_e[own_e & calibrating_e], COVERAGE)
      new_e = own_e & is_natural_e & ~calibrating_e
      found[name] = score_e[new_e] <= threshold + prediction_sets.TOLERANCE
    return found

  split = held(example_e < start)
  ids, rng, shares = np.array(sorted(natural)), np.random.default_rng(0), []
  for _ in range(HALVINGS):
    half = rng.permutation(ids)[: len(ids) // 2]
    shares.append(np.concatenate(list(held(np.isin(example_e, half)).values())).mean())
  every = np.concatenate(list(split.values()))
  rows = {f'{name}, rows': len(x) for name, x in split.items()}
  means = {name: float(x.mean()) if len(x) else None for name, x in split.items()}
  return {**rows, **means, 'all': float(every.mean()), 'halvings': float(np.mean(shares))}


def _with_gaps(known, v, p):
  """Coverage of test examples that lack a modality by nature, as often as their class says; mean
  over 20 draws. Of the complete pattern, of those that lack nothing.
  """
  _, label, of_test = _of_test(p, v)
  shares = []
  for seed in range(20):
    rng = np.random.default_rng(seed)
    rate_kv = rng.dirichlet((2.0, 1.0, 1.0), len(p.class_names))
    ids, first = np.unique(known.example_m, return_index=True)
    natural = dict(zip(ids.tolist(), _drawn(rng, rate_kv, known.label_m[first]), strict=True))
    natural_m = np.array([natural[n] for n in known.example_m.tolist()])
    # An example that lacks a modality is known under what it has alone.
    own = (known.pattern_m == v) & ((natural_m == v) | (natural_m == 0))
    scores = _scores(known.probability_m[own], known.before_m[own])
    threshold = prediction_sets.quantile(scores, COVERAGE)
    new = of_test[_drawn(rng, rate_kv, label) == v]
    shares.append(np.mean(new <= threshold + prediction_sets.TOLERANCE))
  return float(np.mean(shares))


def _drawn(rng, rate_kv, labels):
  return np.array([rng.choice(len(PATTERNS), p=rate_kv[k]) for k in labels])


def _scores(probability, before):
  return np.where(before == 0, 0.0, 1.0 - probability.astype(np.float64))


def _before(p_nk, label):
  return prediction_sets.likelier(p_nk)[np.arange(len(label)), label]


# ---- Shares -------------------------------------------------------------------------------------


def shares(folders):
  """Returns the text's part of all shares, and what holds over the split."""
  folder = pathlib.Path(folders[0])
  known = calibration.of_run(trained.open(folder))
  p = records.Predictions.load(folder / records.PREDICTIONS)
  found = contributions.explain(p, known.prior_k)
  total_m = np.abs(found.share_nm[found.complete_n]).sum(axis=0)
  net_m = found.share_nm[found.complete_n].sum(axis=0)
  whole_n = found.value_vn[0] - found.nothing_n
  return {
    'text, of absolute shares': float(total_m[1] / total_m.sum()),
    'text, of their sum': float(net_m[1] / net_m.sum()),
    'largest error of the sum': float(np.abs(found.share_nm.sum(axis=1) - whole_n).max()),
    'summary': contributions.summary(found),
  }


# ---- Audit --------------------------------------------------------------------------------------


def audit(folders, seeds):
  """Returns measures of each seed."""
  run = trained.open(folders[0])
  source, _ = trained.open_split(run, 'train')
  pooled, present_nm = pooled_states.read(run, {'train': source})['train']
  label_n = np.array([next(iter(classes_of(label)), -1) for label in source.labels])
  results = [_audit(pooled, present_nm, label_n, len(run.class_names), seed) for seed in seeds]
  twins = np.random.default_rng(0).choice(len(source), TWINS, replace=False)
  planted = missing.Part(source, tuple(twins.tolist()))
  twice = duplicates.find({'train': source, 'validation': planted}, similar=False)
  named = {x.row for x in twice if x.kind == 'example' and x.split == 'validation'}
  return {'seeds': results, 'planted twins found': len(named), 'of': TWINS}


def _audit(pooled, present_nm, label_n, num_classes, seed):
  rng, count = np.random.default_rng(seed), len(label_n)
  faults = round(FAULTS * count)
  complete = np.flatnonzero(present_nm.all(axis=1))
  torn = rng.choice(complete, faults, replace=False)
  rest = np.setdiff1d(np.flatnonzero(label_n >= 0), torn)
  wrong = rng.choice(rest, faults, replace=False)
  texts = tuple(x.copy() for x in pooled['text'])
  for x in texts:
    x[torn] = x[np.roll(torn, 1)]
  given_n = label_n.copy()
  given_n[wrong] = (given_n[wrong] + rng.integers(1, num_classes, faults)) % num_classes
  target_nk = (given_n[:, None] == np.arange(num_classes)).astype(np.float32)
  fold_n = out_of_fold.folds(np.arange(count), 5, seed)
  arrays = {**pooled, 'text': texts}
  examples = out_of_fold.Examples(arrays, present_nm, target_nk, given_n >= 0, fold_n, False)
  suspects, _ = data_faults.find(examples, seed=seed)
  planted = {'label': wrong, 'pair': torn}
  clean_n = ~np.isin(np.arange(count), np.concatenate([torn, wrong]))
  return {kind: _found(suspects, kind, rows, clean_n) for kind, rows in planted.items()}


def _found(suspects, kind, rows, clean_n):
  score_n, suspected_n = np.full(len(clean_n), -np.inf), np.zeros(len(clean_n), bool)
  for x in suspects:
    if x.kind == kind:
      score_n[x.row], suspected_n[x.row] = x.score, x.suspected
  planted_n = np.isin(np.arange(len(clean_n)), rows)
  rank_n, count = scipy.stats.rankdata(score_n), len(rows)
  above = rank_n[planted_n].sum() - count * (count + 1) / 2
  return {
    'auroc': float(above / (count * (len(score_n) - count))),
    'found': float(suspected_n[planted_n].mean()),
    'false alarms': float(suspected_n[clean_n].mean()),
  }


# ---- Files --------------------------------------------------------------------------------------


def main(argv):
  """Measures and writes."""
  work, *rest = argv
  seeds = [int(x) for flag in rest if flag.startswith('--seeds=') for x in flag[8:].split(',')]
  path = OUT / 'answers.json'
  found = json.loads(path.read_text()) if path.exists() else {}
  for word in rest:
    if not word.startswith('--'):
      name, _, folders = word.partition('=')
      how = {'seeds': seeds or [0, 1, 2]} if work == 'audit' else {}
      found.setdefault(work, {})[name] = WORK[work](folders.split(','), **how)
  OUT.mkdir(parents=True, exist_ok=True)
  atomic.write(path, json.dumps(found, indent=2) + '\n')
  atomic.write(OUT / 'answers.md', table(found))


WORK = {'sets': sets, 'shares': shares, 'audit': audit}


def table(found):
  """Returns answers.md."""
  lines = ['# Answers', '', 'Written by `experiments/answers.py`; percent.', '']
  head = ['data', 'condition', 'accuracy', *SETS]
  lines += _head(['', *head[1:]])
  for name, of_data in found.get('sets', {}).items():
    for condition in CONDITIONS:
      row = of_data[condition]
      cells = [_mean(row[key], 1 if 'labels' in key else 100) for key in ('accuracy', *SETS)]
      lines.append('| ' + ' | '.join([name, condition.replace('_', ' '), *cells]) + ' |')
  for name, of_data in found.get('sets', {}).items():
    lines += _shown_gaps(name, of_data.get(AS_THEY_ARE))
  lines += ['', *_head(['', 'seed', 'fault', 'AUROC', 'found', 'false alarms'])]
  for name, of_data in found.get('audit', {}).items():
    for seed, row in enumerate(of_data['seeds']):
      for kind, x in row.items():
        cells = [f'{x["auroc"]:.3f}', *(f'{100 * x[k]:.1f}' for k in ('found', 'false alarms'))]
        lines.append('| ' + ' | '.join([name, str(seed), kind, *cells]) + ' |')
  for name, of_data in found.get('audit', {}).items():
    lines += ['', f'{name}: {of_data["planted twins found"]} of {of_data["of"]} planted twins.']
  for name, x in found.get('shares', {}).items():
    share = 100 * x['text, of absolute shares']
    whole = 100 * x['text, of their sum']
    lines += [
      '',
      f'{name}: {share:.1f} % of all absolute shares, {whole:.1f} % of their sum, text.',
    ]
  return '\n'.join(lines) + '\n'


def _shown_gaps(name, row):
  """Lines of rows as they are, where some lack a modality."""
  if row is None:
    return []
  parts = [
    f'{condition.replace("_", " ")} {_mean(row[condition], 100)} of {row[f"{condition}, rows"][0]}'
    for condition in CONDITIONS
    if row[f'{condition}, rows'][0]
  ]
  shown = f'{_mean(row["all"], 100)} of all; by what they have: {"; ".join(parts)} rows'
  return ['', f'{name}, rows as they are: {shown}. Over halvings {_mean(row["halvings"], 100)}.']


SETS = (
  'threshold',
  'threshold, labels',
  'adaptive',
  'adaptive, labels',
  'one for all',
  'halvings',
  'gaps by class',
)


def _head(cells):
  return ['| ' + ' | '.join(cells) + ' |', '|' + ' --- |' * len(cells)]


def _mean(values, scale):
  shown = [scale * value for value in values]
  if len(shown) == 1:
    return f'{shown[0]:.1f}'
  return f'{np.mean(shown):.1f} ({", ".join(f"{x:.1f}" for x in shown)})'


if __name__ == '__main__':
  main(sys.argv[1:])
