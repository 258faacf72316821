"""The documentation names what is there: links, paths and anchors resolve, lines are short."""

import pathlib
import re

import pytest

from molt_jax.config import PRETRAIN_SCHEMA, SCHEMA, default_config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
  ROOT / 'README.md',
  *sorted((ROOT / 'docs').rglob('*.md')),
  ROOT / 'experiments' / 'README.md',
  ROOT / 'molt_jax' / 'pretrained' / 'openmoji' / 'README.md',
]
MOST_COLUMNS = 100
README_BYTES = (6_000, 11_000)

_LINK = re.compile(r'\[(?:[^\]]*)\]\(([^)\s]+)\)')
# What begins like this, in backticks, is a path of the repository.
_PATH = re.compile(r'`((?:molt_jax|configs|tools|docs|tests|experiments)/[^`\s:]*)')
# In fenced blocks paths follow a command or `--config=`.
_COMMAND_PATH = re.compile(
  r'(?:bash |python |--config=)((?:configs|tools|tests|experiments)/[\w./]+)'
)
_SEVERAL = re.compile(r'[*{}]')  # Stands for several names.


_FLAG = re.compile(r'--config\.([a-z][\w.]*)')
_CODE = re.compile(r'`([a-z_]+\.[a-z][\w.]*)(?:=[^`]*)?`')
_PYTHON = re.compile(r'^```python\n(.*?)^```$', flags=re.M | re.S)


def _name(page: pathlib.Path) -> str:
  return page.relative_to(ROOT).as_posix()


def _without_code(text: str) -> str:
  return re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)


def _anchors(page: pathlib.Path) -> set[str]:
  """Returns the anchors that GitHub gives to the headings of a page."""
  headings = re.findall(r'^#+ (.*)$', _without_code(page.read_text()), flags=re.M)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_links_resolve(page):
  broken = []
  for target in _LINK.findall(_without_code(page.read_text())):
    if '://' in target:
      continue
    path, _, anchor = target.partition('#')
    file = page.parent / path if path else page
    if not file.exists() or (anchor and anchor not in _anchors(file)):
      broken.append(target)
  assert broken == []


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_paths_that_are_named_exist(page):
  text = page.read_text()
  named = _PATH.findall(text) + _COMMAND_PATH.findall(text)
  gone = {path for path in named if not _SEVERAL.search(path) and not _is_there(page, path)}
  assert sorted(gone) == []


def _is_there(page: pathlib.Path, path: str) -> bool:
  """Whether a path of the repository exists; a page may also name what is in its own folder."""
  return (ROOT / path).exists() or (page.parent / path).exists()


@pytest.fixture(scope='module')
def fields():
  """The dotted names of all fields, and of their groups."""
  found = set()

  def walk(tree, prefix):
    for key, value in tree.items():
      found.add(prefix + key)
      if isinstance(value, dict):
        walk(value, f'{prefix}{key}.')

  for schema in (SCHEMA, PRETRAIN_SCHEMA):
    walk(default_config(schema).to_dict(), '')
  return found


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_fields_that_are_named_exist(page, fields):
  text = page.read_text()
  groups = {name for name in fields if any(other.startswith(f'{name}.') for other in fields)}
  named = set(_FLAG.findall(text))
  named |= {name for name in _CODE.findall(_without_code(text)) if name.split('.')[0] in groups}
  files = {name for name in named if name.endswith(('.py', '.json', '.md', '.csv'))}
  assert sorted(named - files - fields) == []


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_examples_in_python_can_be_read(page):
  for code in _PYTHON.findall(page.read_text()):
    compile(code, _name(page), 'exec')


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_lines_are_short(page):
  long = []
  for line in _without_code(page.read_text()).splitlines():
    is_table, is_link = line.startswith('|'), bool(_LINK.search(line))
    # A code span cannot be cut without changing what a reader copies.
    is_code = re.fullmatch(r'\s*(?:- )?`[^`]*`\S*', line)
    if len(line) > MOST_COLUMNS and not (is_table or is_link or is_code):
      long.append(line)
  assert long == []


def test_the_readme_can_be_read_in_ten_minutes():
  low, high = README_BYTES
  assert low < len((ROOT / 'README.md').read_bytes()) < high


def test_every_page_is_in_the_index_and_has_a_title():
  index = (ROOT / 'docs' / 'README.md').read_text()
  for page in (ROOT / 'docs').glob('*.md'):
    text = page.read_text()
    assert text.startswith('# '), page.name
    assert page.name == 'README.md' or f']({page.name})' in index, page.name
  methods = ROOT / 'docs' / 'methods'
  for page in methods.glob('*.md'):
    assert page.read_text().startswith('# '), page.name
    assert page.name == 'README.md' or f']({page.name})' in (methods / 'README.md').read_text()
