"""Few examples of each class, and classes that were not trained on: the protocols by which prompts
of a CLIP pair are compared.

  python experiments/few_shot.py --pair=CLIP [--data=openmoji] [--data=NAME=FOLDER]
  [--protocol=few_shot,base_to_novel] [--shots=1,2,4,8,16] [--seeds=1,2,3] [--methods=REGEX]
  [--set=FIELD=VALUE] [--runs=...] [--out=...]

few_shot: every class, 1, 2, 4, 8 and 16 examples of each from train and at most 4 from validation,
drawn by seed; scored on the whole test split. base_to_novel: the most shots of each class of the
first half of the sorted classes; scored on the test examples of that half, and on those of the
other half by the names of these classes, which nothing was trained on. The last checkpoint answers,
as in the papers. The linear probe of pooled states knows no names, and so no new classes. Images
alone, unless --set=dataset.modalities=image,text.
"""

import csv
import pathlib
import re
import time

import grid
import jax
import runs
from absl import flags

from molt_jax.config import resolved
from molt_jax.config.json_files import read_json
from molt_jax.data import datasets, shots, sources
from molt_jax.errors import UserError
from molt_jax.evaluation import other_classes, scoring
from molt_jax.features import opening
from molt_jax.methods import coop
from molt_jax.runtime import atomic, logbook, sharding
from molt_jax.training.assembly import assemble

PAIR = flags.DEFINE_string(
  'pair', '', 'Hugging Face directory or hub id of a CLIPModel, for both towers; or give --set.'
)
PROTOCOLS = flags.DEFINE_list('protocol', ['few_shot', 'base_to_novel'], 'Of these two.')
SHOTS = flags.DEFINE_list('shots', ['1', '2', '4', '8', '16'], 'Examples of each class.')
MOST_VALIDATION = 4  # Of each class.

COMMON = {
  'dataset.name': 'table',
  'dataset.modalities': 'image',
  'dataset.table.image': 'image',
  'dataset.table.text': 'text',
  'dataset.table.label': 'label',
  'text.max_tokens': 64,
  'cca.weight': 0.0,
  'loss.weight': 1.0,
  'ridge.landmarks': 0,
  'eval.select': 'latest',
  'optimizer.weight_decay': 5e-4,
  'optimizer.schedule': 'cosine',
  'train.batch_size': 32,
  'train.epochs': 50.0,
  'train.eval_every': 1_000_000,
}
ZERO_SHOT, PROBE = 'zero-shot', 'probe'
# Adam for all of them; MMRL's rate is its authors', the others' have SGD.
METHODS = {
  ZERO_SHOT: {'method': 'mmrl', 'mmrl.num_tokens': 0, 'mmrl.alpha': 1.0},
  'coop': {'method': 'coop', 'optimizer.learning_rate': 2e-3},
  'cocoop': {'method': 'cocoop', 'optimizer.learning_rate': 2e-3, 'train.epochs': 10.0},
  'maple': {'method': 'maple', 'optimizer.learning_rate': 1e-3},
  'mmrl': {'method': 'mmrl', 'optimizer.learning_rate': 1e-3},
  'mmrlpp': {'method': 'mmrlpp', 'optimizer.learning_rate': 1e-3},
  PROBE: {'method': 'probe'},
}
# As MMRL's and MaPLe's authors have it there.
BASE_TO_NOVEL = {
  'maple': {'train.batch_size': 4, 'train.epochs': 5.0},
  'mmrl': {'train.batch_size': 4, 'train.epochs': 10.0, 'mmrl.regularizer': 1.0},
  'mmrlpp': {'train.batch_size': 4, 'train.epochs': 10.0, 'mmrlpp.regularizer': 1.0},
}
CONDITION = 'none_absent'


# ---- Data ----------------------------------------------------------------------------------------


def write(folder, source, rows, class_names, split, images):
  """Writes SPLIT.csv of some rows, and their pictures once for all tables of a data set."""
  lines = [('image', 'text', 'label')]
  for n in rows:
    name = f'{split}_{n}'
    has_image = bool(source.present[n][0])
    example = source.read(n, image=has_image and not (images / name).exists())
    if example['image'] is not None:
      atomic.write(images / name, example['image'])
    label = class_names[example['label']]
    lines.append((name if has_image else '', example['text'] or '', label))
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / f'{split}.csv').open('w', encoding='utf-8', newline='') as stream:
    csv.writer(stream).writerows(lines)


def prepare(data, protocol, count, seed, root):
  """Writes the tables of a fold; returns (its folder, the names of the new classes)."""
  images, folder = root / 'images', root / f'{protocol}_{count}_{seed}'
  images.mkdir(parents=True, exist_ok=True)
  classes, novel = range(len(data.class_names)), ()
  if protocol == 'base_to_novel':
    classes, novel = shots.base_and_novel(len(data.class_names))
    if len(novel) < 2:
      raise UserError(f'--protocol: base_to_novel needs four classes, {data.name} has fewer')
  for split, most in (('train', count), ('validation', min(count, MOST_VALIDATION))):
    source = data.splits[split]
    drawn = shots.draw(source.ids, source.labels, most, seed)
    rows = [n for n in drawn if source.labels[n] in classes]
    write(folder, source, rows, data.class_names, split, images)
  test = data.splits['test']
  write(folder, test, shots.of_classes(test.labels, classes), data.class_names, 'test', images)
  if novel:
    rows = shots.of_classes(test.labels, novel)
    write(folder / 'novel', test, rows, data.class_names, 'test', images)
  return folder, [data.class_names[k] for k in novel]


def load(data, seed):
  """The data set, whose labels are one class each."""
  found = datasets.load_dataset(grid.make_config(data, _towers(), seed, today=True))
  if found.multi_label:
    raise UserError(f'--data: {found.name} has several labels a row, which this does not know')
  return found


# ---- Scores --------------------------------------------------------------------------------------


def _towers():
  if not PAIR.value:
    return {}
  return {f'backbones.{m}.path': PAIR.value for m in ('image', 'text')}


def score(assembly, variables, path):
  """Accuracy on a table's test rows, by the assembly's classes."""
  data = datasets.load_other(assembly.config, str(path), assembly.class_names)
  source = sources.relabel(data, assembly.class_names, where=str(path)).splits['test']
  conditions = scoring.conditions_of(['none'], len(source))
  wanted = {'test': (source, conditions[CONDITION])}
  used = resolved.modalities(assembly.config)
  frozen, stored = opening.open_features(assembly.extraction, wanted, used)
  scorer = scoring.Scorer(assembly)
  found = scorer(variables, frozen, source, conditions, stored=stored['test'])
  return found[CONDITION]['accuracy']


def untrained(config, class_names, path):
  """Accuracy of what a method is before it is trained."""
  assembly = assemble(config, class_names=tuple(class_names))
  init = jax.jit(assembly.method.init, out_shardings=sharding.replicated(assembly.mesh))
  params = init(jax.random.key(config.seed))['params']
  variables = {'params': params, 'statistics': assembly.method.read_names(params)}
  return score(assembly, variables, path)


def measure(config, folder, names, novel, tables):
  """Returns {'test', 'novel' where there are new classes, 'parameters'} of one run."""
  path, kind = folder / 'few_shot.json', resolved.config_hash(config)
  if path.exists():
    found = read_json(path, 'delete it, and the run is scored anew')
    if found['config_hash'] == kind:
      return found
  found = {'config_hash': kind, 'parameters': 0}
  if names is not None:
    folder.mkdir(parents=True, exist_ok=True)
    found['test'] = untrained(config, names, tables)
    if novel:
      found['novel'] = untrained(config, novel, tables / 'novel' / 'test.csv')
  else:
    found['test'] = runs.run(config, folder)['test'][CONDITION]['accuracy']
    found['parameters'] = read_json(folder / 'run.json', 'train it anew')['parameters']
    if novel and config.method != PROBE:
      run = other_classes.open(folder, novel)
      found['novel'] = score(run.assembly, run.variables(), tables / 'novel' / 'test.csv')
  atomic.write(path, logbook.to_json(found) + '\n')
  return found


def make_config(item, changes, own, seed):
  """The config of a method, where --set says no other."""
  named = {assignment.partition('=')[0] for assignment in grid.SET.value}
  fields = {**COMMON, **_towers(), **changes}
  left = {name: value for name, value in fields.items() if name not in named}
  return grid.make_config(item, {**left, **own}, seed, today=True)


def make(protocol, count):
  """Data set -> method -> seed -> what `measure` returns."""
  made = {}
  for item in grid.DATA.value:
    name, table = grid.name_of(item), {}
    for seed in grid.seeds():
      data = load(item, seed)
      root = (pathlib.Path(grid.RUNS.value) / 'few_shot' / name).absolute()
      tables, novel = prepare(data, protocol, count, seed, root)
      classes = data.class_names[: len(data.class_names) - len(novel)]
      for method, changes in METHODS.items():
        if not re.search(grid.ONLY.value, method):
          continue
        if method == coop.CONDITIONAL and len(classes) > coop.MOST_CLASSES:
          print(f'{name}, {method}: left out, it reads at most {coop.MOST_CLASSES} classes')
          continue
        own = {'dataset.path': str(tables), 'dataset.table.image_folder': str(root / 'images')}
        more = BASE_TO_NOVEL.get(method, {}) if protocol == 'base_to_novel' else {}
        config = make_config(item, changes | more, own, seed)
        folder = root / 'runs' / resolved.config_hash(config)
        names = classes if method == ZERO_SHOT else None
        found = measure(config, folder, names, novel, tables)
        table.setdefault(method, {})[seed] = found
        scores = ', '.join(f'{k} {100 * found[k]:.1f}' for k in ('test', 'novel') if k in found)
        print(f'{name}, {protocol}, {count} shots, seed {seed}, {method}: {scores}', flush=True)
    made[name] = table
  return made


# ---- Report --------------------------------------------------------------------------------------


def few_shot_lines(by_count):
  """Markdown: a table a data set, a row a method, a column a number of shots."""
  yield '## Few-shot\n'
  for data in next(iter(by_count.values())):
    yield f'### {data}\n'
    yield '| method | trained numbers | ' + ' | '.join(f'{n} shots' for n in by_count) + ' |'
    yield '|---|--:|' + '--:|' * len(by_count)
    for method in METHODS:
      cells = [_cell(made[data].get(method, {}), 'test') for made in by_count.values()]
      if any(cell != '-' for cell in cells):
        last = list(by_count.values())[-1][data][method]
        yield f'| {method} | {_size(last)} | ' + ' | '.join(cells) + ' |'
    yield ''


def base_to_novel_lines(made, count):
  """Markdown: a table a data set, a row a method."""
  yield f'## Base to novel, {count} shots\n'
  for data, table in made.items():
    yield f'### {data}\n'
    yield '| method | trained numbers | base | novel | harmonic mean |'
    yield '|---|--:|--:|--:|--:|'
    for method, by_seed in table.items():
      means = [shots.harmonic_mean(x['test'], x['novel']) for x in by_seed.values() if 'novel' in x]
      cells = [_cell(by_seed, 'test'), _cell(by_seed, 'novel'), runs.spread(means)]
      yield f'| {method} | {_size(by_seed)} | ' + ' | '.join(cells) + ' |'
    yield ''


def _cell(by_seed, key):
  return runs.spread([found.get(key) for found in by_seed.values()])


def _size(by_seed):
  return f'{next(iter(by_seed.values()))["parameters"]:,}'


def main():
  start = time.monotonic()
  counts = [int(count) for count in SHOTS.value if count.isdigit() and int(count) > 0]
  if not counts or len(counts) < len(SHOTS.value):
    raise UserError(f'--shots: {",".join(SHOTS.value)!r} is not legal; give numbers, e.g. 1,4,16')
  if not any(re.search(grid.ONLY.value, method) for method in METHODS):
    raise UserError(f'--methods: {grid.ONLY.value!r} is none of {", ".join(METHODS)}')
  if not set(PROTOCOLS.value) <= {'few_shot', 'base_to_novel'} or not PROTOCOLS.value:
    raise UserError('--protocol: give few_shot, base_to_novel, or both')
  lines = ['# Few shots, and classes that are new\n']
  content = {'common': COMMON, 'methods': METHODS, 'methods_base_to_novel': BASE_TO_NOVEL}
  lines.append('Test accuracy in percent, mean ± standard deviation over seeds.\n')
  if 'few_shot' in PROTOCOLS.value:
    by_count = {count: make('few_shot', count) for count in counts}
    lines += few_shot_lines(by_count)
    content['few_shot'] = by_count
  if 'base_to_novel' in PROTOCOLS.value:
    made = make('base_to_novel', max(counts))
    lines += base_to_novel_lines(made, max(counts))
    content['base_to_novel'] = made
  grid.publish('few_shot', lines, content, start)


if __name__ == '__main__':
  grid.start(main)
