"""A run behind HTTP: the same answers, in batches, within bounds; a page that a browser is led
through where one is there.
"""

import asyncio
import base64
import contextlib
import io
import json
import pathlib
import re
import shutil
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

import molt_jax
from molt_jax import serve
from molt_jax.errors import UserError

pytest.importorskip('fastapi')
testclient = pytest.importorskip('starlette.testclient')
uvicorn = pytest.importorskip('uvicorn')

from molt_jax.serving import app, limits  # noqa: E402
from molt_jax.serving.batching import Batcher, Busy  # noqa: E402
from molt_jax.serving.service import Service  # noqa: E402

HEADER_SECONDS = 0.5


@pytest.fixture(scope='module')
def run(finished_run) -> pathlib.Path:
  return finished_run


@pytest.fixture(scope='module')
def model(run):
  return molt_jax.load(run)


@pytest.fixture(scope='module')
def service(model):
  return Service(model, max_batch=2)


@pytest.fixture(scope='module')
def served(service):
  """The application, and a client that is kept for all tests."""
  made = app.create(service, max_bytes=1 << 18, seconds=20)
  with testclient.TestClient(made) as client:
    yield client


@pytest.fixture(scope='module')
def photo() -> bytes:
  file = io.BytesIO()
  Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert('RGB').save(file, 'PNG')
  return file.getvalue()


GIVEN = ((True, True), (True, False), (False, True))


def same(labels, wanted):
  assert [x['label'] for x in labels] == [x['label'] for x in wanted]
  found = [x['probability'] for x in labels]
  assert found == pytest.approx([x['probability'] for x in wanted], abs=3e-6)


# ---- Answers -------------------------------------------------------------------------------------


def post(client, image=None, text=None, **fields):
  files = {'image': ('a.png', image, 'image/png')} if image is not None else None
  fields |= {} if text is None else {'text': text}
  return client.post('/predict', files=files, data=fields)


@pytest.mark.parametrize(('with_image', 'with_text'), GIVEN)
def test_answers_are_those_of_the_model(served, model, photo, with_image, with_text):
  given = {'image': photo if with_image else None, 'text': 'a red square' if with_text else None}
  response = post(served, **given, views='true', coverage='0.8')
  assert response.status_code == 200
  found, wanted = response.json(), model.predict(**given, coverage=0.8, explain=True)
  assert found['shares'] == pytest.approx(wanted['explanation']['shares'], abs=2e-4)
  same(found['labels'], wanted['labels'])
  assert (found['image'], found['text'], found['set']) == (with_image, with_text, wanted['set'])
  for name, there in (('image', with_image), ('text', with_text)):
    if there:
      same(found['views'][name], model.predict(**{name: given[name]})['labels'])
    else:
      assert found['views'][name] is None


def test_several_examples_are_answered_in_their_order(served, model, photo):
  image = base64.b64encode(photo).decode()
  texts = ['a red square', 'blue', 'the green one']
  examples = [{'text': text} for text in texts] + [{'image': image}, {'image': image, 'text': 'x'}]
  response = served.post('/predict_batch', json={'examples': examples, 'top_k': 2})
  assert response.status_code == 200
  answers = response.json()['answers']
  for given, found in zip(examples, answers, strict=True):
    given = {**given, 'image': photo} if 'image' in given else given
    same(found['labels'], model.predict(**given, top_k=2)['labels'])


def test_nothing_is_compiled_for_a_request(served, service, photo):
  def compiled():
    return service._plain._cache_size(), service._views._cache_size()

  before = compiled()
  assert before == (2 * 3, 1)  # Two sizes, three kinds; one pair with views.
  for text in ('a', 'a much longer text than any other ' * 20):
    for views in ('true', 'false'):
      assert post(served, photo, text, views=views).status_code == 200
  assert compiled() == before


# ---- What is refused -----------------------------------------------------------------------------


def test_what_cannot_be_used_is_refused_in_one_line(served, photo):
  for response, says in (
    (post(served), 'neither an image nor a text'),
    (post(served, text=' '), 'neither an image nor a text'),
    (post(served, text='nan'), 'neither an image nor a text'),
    (post(served, text='a', top_k='-1'), 'top_k: '),
    (served.post('/predict_batch', content=b'{"examples":[{"text":"a"}]}'), 'application/json'),
    (served.post('/predict_batch', json={'examples': [{'text': 3}]}), 'examples.0.text: '),
    (post(served, image=b''), 'neither an image nor a text'),
    (post(served, image=b'<!DOCTYPE html>'), 'cannot be decoded'),
    (post(served, image=photo[:200]), 'cannot be decoded'),
    (served.post('/predict', data={'image': 'x', 'text': 'a'}), 'give a file'),
    (served.post('/predict_batch', json={'examples': [{'text': 'a'}, {}]}), 'example 1: neither'),
    (served.post('/predict_batch', json={'examples': [{'image': '%'}]}), 'no base64'),
  ):
    assert response.status_code == 422 and says in response.json()['detail']
    assert '\n' not in response.json()['detail']


def test_what_is_malformed_is_a_client_error(served):
  multipart = {'content-type': 'multipart/form-data; boundary=x'}
  for response in (
    post(served, text='a', top_k='0'),
    post(served, text='a', coverage='1'),
    served.post('/predict', content=b'nothing of the kind', headers=multipart),
    served.post(
      '/predict', content=b'--x\r\nbroken', headers={'content-type': 'multipart/form-data'}
    ),
    served.post('/predict_batch', content=b'{', headers={'content-type': 'application/json'}),
    served.post('/predict_batch', json={'examples': []}),
    served.post('/predict_batch', json={'examples': [{'text': 'a'}] * 65}),
    served.get('/predict'),
    served.get('/nothing'),
  ):
    assert 400 <= response.status_code < 500


def test_what_is_too_large_is_refused(served, photo):
  assert post(served, image=photo + bytes(1 << 18)).status_code == 413

  def without_a_length(first):
    yield first
    for _ in range(40):
      yield b' ' * (1 << 14)

  form = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
  for path, kind, first in (
    ('/predict', 'multipart/form-data; boundary=x', form),
    ('/predict_batch', 'application/json', b'{'),
  ):
    content, headers = without_a_length(first), {'content-type': kind}
    assert served.post(path, content=content, headers=headers).status_code == 413


def test_a_body_that_does_not_come_is_refused():
  async def reads(scope, receive, send):
    while (await receive()).get('more_body'):
      pass

  async def never():
    await asyncio.sleep(60)

  bounded = limits.Limits(reads, max_bytes=10, seconds=0.05)
  scope = {'type': 'http', 'headers': []}
  with pytest.raises(limits.HTTPException) as refused:
    asyncio.run(bounded(scope, never, None))
  assert refused.value.status_code == 408


# ---- Batches -------------------------------------------------------------------------------------


def test_what_waits_is_answered_together():
  begun, go = threading.Event(), threading.Event()
  batches = []

  def compute(kind, items):
    batches.append((kind, list(items)))
    begun.set()
    go.wait(20)
    if kind == 'broken':
      raise ValueError(items)
    return [2 * item for item in items]

  async def ask():
    batcher = Batcher(compute, lambda kind: (1, 4), most_waiting=8)
    batcher.start()
    first = asyncio.create_task(batcher.answer('a', 0))
    await asyncio.to_thread(begun.wait, 20)
    kinds = ['a', 'b', 'a', 'a', 'broken', 'a', 'b']
    others = [asyncio.create_task(batcher.answer(kind, n)) for n, kind in enumerate(kinds, 1)]
    gone = asyncio.create_task(batcher.answer('a', 9))
    await asyncio.sleep(0)
    assert batcher.waiting == 8
    with pytest.raises(Busy):
      await batcher.answer('a', 10)
    gone.cancel()
    go.set()
    found = await asyncio.gather(first, *others, return_exceptions=True)
    await batcher.stop()
    return found

  found = asyncio.run(ask())
  assert [str(x) for x in found] == ['0', '2', '4', '6', '8', '[5]', '12', '14']
  assert batches == [
    ('a', [0]),
    ('a', [1, 3, 4, 6]),
    ('b', [2]),
    ('broken', [5]),
    ('b', [7]),
  ]


def test_many_at_once_are_answered_without_an_error(served, model):
  texts = [f'number {n}' for n in range(24)]
  found = [None] * len(texts)

  def ask(n):
    found[n] = post(served, text=texts[n])

  threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(texts))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for response, wanted in zip(found, model.predict(text=texts), strict=True):
    assert response.status_code == 200
    same(response.json()['labels'], wanted['labels'])


# ---- Pages ---------------------------------------------------------------------------------------


def test_what_a_server_tells_of_itself(served):
  assert served.get('/healthz').json() == {'status': 'ready', 'waiting': 0}
  about = served.get('/model').json()
  assert about['classes'] == ['blue', 'green', 'red'] and about['sets']
  paths = served.get('/openapi.json').json()['paths']
  assert {'/predict', '/predict_batch', '/healthz', '/metrics'} <= set(paths)
  post(served, text='a')
  metrics = served.get('/metrics').text
  assert re.search(r'molt_requests_total\{path="/predict",status="200"\} [1-9]', metrics)
  assert 'molt_batch_examples_bucket' in metrics and 'molt_waiting 0.0' in metrics


def test_the_page_asks_nobody_else(served):
  response = served.get('/')
  html, policy = response.text, response.headers['content-security-policy']
  assert "default-src 'none'" in policy and "connect-src 'self'" in policy
  assert not re.findall(r'https?://|//[a-z]|@import|<link(?! rel="icon" href="data:,")', html)
  assert 'innerHTML' not in html


# ---- A real server -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def address(service):
  """Where a real server listens, (host, port)."""
  listening = serve._bound('127.0.0.1', 0)
  made = app.create(service, max_bytes=1 << 20, seconds=20)
  config = uvicorn.Config(
    made, http=limits.protocol(HEADER_SECONDS), log_level='warning', ws='none', lifespan='on'
  )
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run, kwargs={'sockets': [listening]})
  thread.start()
  while not server.started:
    time.sleep(0.02)
  yield listening.getsockname()
  server.should_exit = True
  thread.join()


@pytest.mark.parametrize('begun', [b'', b'GET / HTTP/1.1\r\nHost: x\r\n'])
@pytest.mark.parametrize('before', [b'', b'GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n'])
def test_headers_that_do_not_come_end_the_connection(address, begun, before):
  with socket.create_connection(address, timeout=20) as client:
    if before:
      client.sendall(before)
      assert client.recv(1 << 16).startswith(b'HTTP/1.1 200')
      if not begun:
        return  # That is kept alive, for uvicorn's own time.
    client.sendall(begun)
    found = b''
    while part := client.recv(1 << 16):
      found += part
  assert found.startswith(b'HTTP/1.1 408')


def test_headers_that_do_not_end_are_refused(address):
  with socket.create_connection(address, timeout=20) as client:
    client.sendall(b'GET / HTTP/1.1\r\n')
    found = b''
    with contextlib.suppress(ConnectionError):
      for _ in range(64):
        client.sendall(b'x: ' + b'y' * 8000 + b'\r\n')
    with contextlib.suppress(ConnectionError):
      while part := client.recv(1 << 16):
        found += part
  assert not found or found.startswith(b'HTTP/1.1 4')


@pytest.fixture(scope='module')
def browser():
  """Chromium without a window; its tests are skipped where there is none."""
  playwright = pytest.importorskip('playwright.sync_api')
  path = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), ''
  )
  with playwright.sync_playwright() as tool:
    try:
      made = tool.chromium.launch(executable_path=path or None, args=['--no-sandbox'])
    except playwright.Error as error:
      pytest.skip(f'Chromium, which is not here: {str(error).splitlines()[0]}')
    yield made
    made.close()


@pytest.mark.parametrize(('width', 'scheme'), [(412, 'dark'), (1280, 'light')])
def test_the_page_is_used_by_keyboard(browser, address, photo, width, scheme):
  asked = []
  page = browser.new_page(viewport={'width': width, 'height': 900}, color_scheme=scheme)
  page.set_default_timeout(30_000)
  page.on('request', lambda request: asked.append(request.url))
  page.goto(f'http://{address[0]}:{address[1]}/')
  page.locator('#about', has_text='3 labels').wait_for()  # Its policy forbids scripts of ours.
  page.set_input_files('#image', {'name': 'a.png', 'mimeType': 'image/png', 'buffer': photo})
  page.wait_for_selector('[data-view=image] li')
  assert page.locator('[data-view=text] li').count() == 0
  reached = []
  page.evaluate('document.activeElement.blur()')
  for _ in range(5):
    page.keyboard.press('Tab')
    reached.append(page.evaluate('document.activeElement.id'))
  assert reached == ['use-image', 'image', 'clear-image', 'use-text', 'text']
  page.keyboard.type('a red square')
  page.wait_for_selector('[data-view=text] li')
  for view in ('complete', 'image', 'text'):
    assert page.locator(f'[data-view={view}] li').count() == 3
  assert page.locator('#set span').count() >= 1
  assert page.locator('#shares').text_content().startswith('picture ')
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  page.focus('#use-image')
  page.keyboard.press('Space')
  page.wait_for_selector('[data-view=image] li', state='detached')
  page.focus('#use-text')
  page.keyboard.press('Space')
  page.wait_for_selector('#result', state='hidden')
  dark = page.evaluate('getComputedStyle(document.body).backgroundColor')
  assert dark == ('rgb(20, 23, 26)' if scheme == 'dark' else 'rgb(246, 247, 248)')
  own = f'http://{address[0]}:{address[1]}/'
  assert not [url for url in asked if not url.startswith((own, 'blob:', 'data:'))]
  page.close()


# ---- The command ---------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_line(run, capsys):
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    assert serve.main([f'--workdir={run}', f'--port={taken.getsockname()[1]}']) == 2
  (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
  assert 'cannot be served at' in line


def test_without_the_extra_it_is_said(run, capsys, monkeypatch):
  monkeypatch.setattr(serve, 'NEEDED', ('no_such_package',))
  assert serve.main([f'--workdir={run}']) == 2
  assert "pip install 'molt_jax[serve]'" in capsys.readouterr().err


def test_answers_are_json(service):
  p_vk = np.full((3, 3), 1 / 3, np.float32)
  found = service.answer(np.array([True, False]), p_vk, views=True)
  assert json.loads(json.dumps(found))['views']['text'] is None
  with pytest.raises(UserError, match='not finite'):
    service.answer(np.array([True, False]), p_vk * np.nan)
