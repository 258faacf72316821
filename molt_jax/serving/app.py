"""The HTTP interface of a `Service`."""

import asyncio
import base64
import binascii
import concurrent.futures
import contextlib
import hashlib
import importlib.resources
import os
import re
import time
from typing import Annotated, Any

import prometheus_client
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field

import molt_jax
from molt_jax.errors import UserError
from molt_jax.serving.batching import Batcher, Busy
from molt_jax.serving.limits import Limits
from molt_jax.serving.service import Service

MOST_IN_A_BATCH = 64
MOST_WAITING = 512
MOST_CHARACTERS = 1 << 20  # Of a text, of which the tower reads the beginning.
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
TopK = Annotated[int, Form(ge=1, le=1000, description='labels to return')]
Views = Annotated[bool, Form(description='also what the image and the text alone are answered')]
Coverage = Annotated[
  float | None,
  Form(gt=0, lt=1, description='also a set of labels that holds the true one so often'),
]


class Example(BaseModel):
  """One of several examples; what is not there is missing."""

  image: Annotated[str | None, Field(description='an image file in base64')] = None
  text: Annotated[str | None, Field(max_length=MOST_CHARACTERS)] = None


class Examples(BaseModel):
  """Several examples and how they are answered."""

  examples: Annotated[list[Example], Field(min_length=1, max_length=MOST_IN_A_BATCH)]
  top_k: Annotated[int, Field(ge=1, le=1000)] = 5
  views: bool = False
  coverage: Annotated[float | None, Field(gt=0, lt=1)] = None


class Answering:
  """What the handlers share: the batcher, threads that decode, and counts."""

  def __init__(self, service: Service, seconds: float):
    self.service, self._seconds = service, seconds
    self._threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), 'decode')
    self.registry = prometheus_client.CollectorRegistry()
    how = {'registry': self.registry}
    self.requests = prometheus_client.Counter(
      'molt_requests', 'Requests answered.', ['path', 'status'], **how
    )
    self.seconds = prometheus_client.Histogram(
      'molt_request_seconds', 'Seconds of a request.', ['path'], buckets=_SECONDS, **how
    )
    sizes = prometheus_client.Histogram(
      'molt_batch_examples', 'Examples answered together.', buckets=service.sizes, **how
    )
    self.batcher = Batcher(
      service.compute, service.sizes_of, most_waiting=MOST_WAITING, observe=sizes.observe
    )
    waiting = prometheus_client.Gauge('molt_waiting', 'Examples that wait.', **how)
    waiting.set_function(lambda: self.batcher.waiting)

  async def answer(
    self, image: bytes | None, text: str | None, *, views: bool, **how: Any
  ) -> dict[str, Any]:
    """Returns the answer to one example; see `Service.answer`.

    Raises:
      HTTPException: 422, it cannot be used; 503, too many wait, or it took too long.
    """
    loop = asyncio.get_running_loop()
    try:
      async with asyncio.timeout(self._seconds):
        kind, example = await loop.run_in_executor(
          self._threads, self.service.example, image, text, views
        )
        p_vk = await self.batcher.answer(kind, example)
      return self.service.answer(example['present'], p_vk, views=views, **how)
    except UserError as error:
      raise HTTPException(422, str(error)) from error
    except (Busy, TimeoutError) as error:
      raise HTTPException(503, 'too many requests wait', {'retry-after': '1'}) from error

  async def stop(self) -> None:
    """Ends the threads."""
    await self.batcher.stop()
    self._threads.shutdown(wait=False)


class Counted:
  """Counts requests and their seconds; an ASGI middleware."""

  def __init__(self, app: Any, *, answering: Answering):
    self._app, self._answering = app, answering

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    start = time.perf_counter()

    async def sending(message):
      if message['type'] == 'http.response.start':
        path = getattr(scope.get('route'), 'path', 'other')
        self._answering.requests.labels(path, message['status']).inc()
        self._answering.seconds.labels(path).observe(time.perf_counter() - start)
      await send(message)

    await self._app(scope, receive, sending)


def create(service: Service, *, max_bytes: int = 1 << 24, seconds: float = 30.0) -> Any:
  """Returns the application, with every program compiled.

  Args:
    service: what answers.
    max_bytes: of a request.
    seconds: in which a request must have come, and in which it is answered.
  """
  service.warm_up()
  answering = Answering(service, seconds)

  @contextlib.asynccontextmanager
  async def lifespan(_: FastAPI):
    answering.batcher.start()
    yield
    await answering.stop()

  app = FastAPI(
    title='molt',
    version=molt_jax.__version__,
    description='Classifies an image, a text, or both; a missing field is a missing modality.',
    lifespan=lifespan,
    docs_url=None,  # Their pages load scripts from elsewhere.
    redoc_url=None,
  )
  _add_predictions(app, answering)
  _add_pages(app, answering)
  app.add_exception_handler(RequestValidationError, _refused)

  app.add_middleware(Counted, answering=answering)
  app.add_middleware(Limits, max_bytes=max_bytes, seconds=seconds)
  return app


def _add_predictions(app: FastAPI, answering: Answering) -> None:
  @app.post('/predict', summary='Classify one example')
  async def predict(
    image: Annotated[UploadFile | str | None, File(description='an image file')] = None,
    text: Annotated[str | None, Form(max_length=MOST_CHARACTERS)] = None,
    top_k: TopK = 5,
    views: Views = False,
    coverage: Coverage = None,
  ) -> dict[str, Any]:
    if isinstance(image, str) and image:
      raise HTTPException(422, 'image: give a file, not a text')
    content = await image.read() if image else None
    return await answering.answer(content, text, top_k=top_k, views=views, coverage=coverage)

  @app.post('/predict_batch', summary='Classify several examples')
  async def predict_batch(asked: Examples) -> dict[str, Any]:
    how = {'top_k': asked.top_k, 'views': asked.views, 'coverage': asked.coverage}
    images = [_decoded(number, one.image) for number, one in enumerate(asked.examples)]
    pairs = zip(images, asked.examples, strict=True)
    calls = [answering.answer(image, one.text, **how) for image, one in pairs]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for number, found in enumerate(answers):
      if isinstance(found, HTTPException):
        raise HTTPException(found.status_code, f'example {number}: {found.detail}')
      if isinstance(found, BaseException):
        raise found
    return {'answers': answers}


async def _refused(request: Request, error: RequestValidationError) -> JSONResponse:
  """Says in one line what of a request is not legal."""
  first = error.errors()[0]
  field = '.'.join(map(str, first['loc'][1:]))  # After 'body'.
  says = first['msg']
  if first['type'] == 'model_attributes_type' and not field:
    says = 'give JSON, and content-type: application/json'
  return JSONResponse({'detail': f'{field}: {says}' if field else says}, 422)


def _decoded(number: int, image: str | None) -> bytes | None:
  try:
    return None if image is None else base64.b64decode(image, validate=True)
  except (binascii.Error, ValueError) as error:
    raise HTTPException(422, f'example {number}: its image is no base64') from error


def _add_pages(app: FastAPI, answering: Answering) -> None:
  service = answering.service
  html = importlib.resources.files('molt_jax.serving').joinpath('page.html').read_text('utf-8')
  policy = {'content-security-policy': _policy(html), 'referrer-policy': 'no-referrer'}

  @app.get('/', response_class=HTMLResponse, summary='A page to try the model')
  async def page() -> HTMLResponse:
    return HTMLResponse(html, headers=policy)

  @app.get('/model', summary='What the model is')
  async def model() -> dict[str, Any]:
    return {
      'modalities': service.modalities,
      'classes': service.class_names,
      'multi_label': service.multi_label,
      'sets': service.calibration is not None,
    }

  @app.get('/healthz', summary='Whether requests are answered')
  async def healthz() -> JSONResponse:
    return JSONResponse({'status': 'ready', 'waiting': answering.batcher.waiting})

  @app.get('/metrics', summary='Counts for Prometheus')
  async def metrics() -> Response:
    content = prometheus_client.generate_latest(answering.registry)
    return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)


def _policy(html: str) -> str:
  """What the page may do: run its own script, show what it was given, ask this server."""
  hashes = {}
  for tag in ('script', 'style'):
    (content,) = re.findall(f'<{tag}>(.*?)</{tag}>', html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    hashes[tag] = f"'sha256-{digest}'"
  return (
    f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
    "img-src blob: data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
  )
