"""The server as an ASGI application: its routes, who may ask, and what is said where there is no result."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from mae_deploy import __version__
from mae_deploy.commands.predict import usual_outputs
from mae_deploy.commands.serve import answers
from mae_deploy.commands.serve.compute import Computed, chosen_patches
from mae_deploy.commands.serve.picture import input_png, reconstruction_png
from mae_deploy.commands.serve.served import Serving
from mae_deploy.commands.serve.server import Server
from mae_deploy.commands.serve.uploads import Item, Refused, RefusedResponse
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime.engines.base import check_outputs
from mae_deploy.runtime.predict import class_scores, top_k
from mae_deploy.text import printable, shortened

PAGE = Path(__file__).with_name("page.html")

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data: blob:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The page loads nothing from anywhere else."""

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One image as it is, several as a form's files, or a list.",
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "images": {"type": "array", "items": {"type": "string"}, "description": "files in base64"},
                        "paths": {"type": "array", "items": {"type": "string"}, "description": "files below --images"},
                    },
                }
            },
        },
    }
}

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": answers.Problem, "description": text}
    for status, text in {
        400: "a request that is none, or options that the bundle cannot take",
        401: "no key, or a wrong one",
        404: "no such bundle or file",
        408: "the request did not arrive in time",
        413: "too many bytes, pixels or images",
        415: "no image that can be read",
        500: "the engine failed",
        503: "too many wait already, or the answer took too long",
    }.items()
}

_PNG: dict[int | str, dict[str, Any]] = {
    **_PROBLEMS,
    200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
}

_bearer = HTTPBearer(auto_error=False, description="A line of --api-keys, where the server has them")


async def _has_key(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
) -> None:
    """Whether the request has a key, where one is needed."""
    if not _server(request).is_known(given.credentials if given is not None else ""):
        raise Refused(401, "this server wants a key: Authorization: Bearer KEY", unread=True)


routes = APIRouter(dependencies=[Depends(_has_key)])
open_routes = APIRouter()


@dataclass(frozen=True, slots=True)
class Patches:
    """Which patches of each image are seen; default: all, of bundles that reconstruct a quarter."""

    keep: str | None
    num_keep: int | None
    seed: int


async def _patches(
    keep: Annotated[str | None, Query(description="indices and ranges such as 0-48,60, row by row")] = None,
    num_keep: Annotated[int | None, Query(description="so many, drawn at random")] = None,
    seed: Annotated[int, Query(ge=0, description="of the draw")] = 0,
) -> Patches:
    """No class itself: FastAPI would call that in one of 40 threads."""
    return Patches(keep, num_keep, seed)


@dataclass(frozen=True, slots=True)
class _Work:
    """A request's images, and what was computed of each."""

    serving: Serving
    items: list[Item]
    found: list[Computed | Refused]


@routes.get("/v1/models", response_model=list[answers.Model], responses={401: _PROBLEMS[401]})
async def models(request: Request) -> Any:
    """The bundles that serve."""
    return [model.describe() for model in _server(request).models.values()]


@routes.get("/v1/models/{name}", response_model=answers.Model, responses={code: _PROBLEMS[code] for code in (401, 404)})
async def model(name: str, request: Request) -> Any:
    """A bundle that serves."""
    return _server(request).model(name).describe()


@routes.post("/v1/models/{name}/predict", response_model=answers.Predictions, responses=_PROBLEMS, openapi_extra=_BODY)
async def predict(
    name: str,
    request: Request,
    response: Response,
    patches: Annotated[Patches, Depends(_patches)],
    top: Annotated[int, Query(alias="top_k", ge=1, description="classes of each image")] = 5,
) -> Any:
    """The most likely classes of each image."""

    def outputs(serving: Serving) -> Sequence[str]:
        if serving.backbone.bundle.class_output is None:
            raise ConfigError(f"{name} has no classes: ask for embed")
        return (serving.backbone.bundle.class_output,)

    work = await _computed(name, request, patches, outputs)
    response.headers["Server-Timing"] = answers.timing(work.found)
    names = work.serving.backbone.bundle.class_names
    rows: list[answers.Prediction] = []
    for item, one in zip(work.items, work.found, strict=True):
        row = answers.Prediction(**_row(item, one))
        if isinstance(one, Computed):
            scores = class_scores({name: value[None] for name, value in one.answer.features.items()})
            assert scores is not None  # of the class output
            row.classes = [
                answers.Class(name=label, probability=share) for label, share in top_k(scores, names, top)[0]
            ]
        rows.append(row)
    return answers.Predictions(model=name, revision=work.serving.verified.revision, results=rows)


@routes.post(
    "/v1/models/{name}/embed",
    response_model=answers.Embeddings,
    responses={**_PROBLEMS, 200: {"content": {"application/x-npz": {}}}},
    openapi_extra=_BODY,
)
async def embed(
    name: str,
    request: Request,
    response: Response,
    patches: Annotated[Patches, Depends(_patches)],
    outputs: Annotated[str | None, Query(description="names with commas between; default: the vectors")] = None,
    form: Annotated[Literal["json", "npz"], Query(alias="format", description="npz: a NumPy archive")] = "json",
) -> Any:
    """The bundle's outputs of each image."""

    def names(serving: Serving) -> Sequence[str]:
        return outputs.split(",") if outputs else usual_outputs(serving.backbone.bundle, writing=True)

    work = await _computed(name, request, patches, names)
    revision = work.serving.verified.revision
    if form == "npz":
        content = answers.npz([item.name for item in work.items], work.found)
        headers = {"Server-Timing": answers.timing(work.found), "X-Revision": revision}
        return Response(content, media_type="application/x-npz", headers=headers)
    response.headers["Server-Timing"] = answers.timing(work.found)
    rows: list[answers.Embedding] = []
    for item, one in zip(work.items, work.found, strict=True):
        values = one.answer.features if isinstance(one, Computed) else {}
        plain = {output: value.tolist() for output, value in values.items()}
        rows.append(answers.Embedding(**_row(item, one), outputs=plain))
    return answers.Embeddings(model=name, revision=revision, results=rows)


@routes.post("/v1/models/{name}/reconstruct", responses=_PNG, response_class=Response, openapi_extra=_BODY)
async def reconstruct(
    name: str,
    request: Request,
    patches: Annotated[Patches, Depends(_patches)],
    form: Annotated[Literal["png", "json"], Query(alias="format", description="json: with the kept patches")] = "png",
) -> Response:
    """One image as the network completes it: the kept patches as they are, the others as they are predicted."""

    def outputs(serving: Serving) -> Sequence[str]:
        if serving.backbone.bundle.token_mode != "reconstruct":
            raise ConfigError(f"{name} has no decoder: export with --tokens reconstruct")
        return ("pixels",)

    work = await _computed(name, request, patches, outputs, most=1)
    (one,) = work.found
    assert isinstance(one, Computed)
    assert one.keep is not None
    bundle, revision = work.serving.backbone.bundle, work.serving.verified.revision
    png = await asyncio.to_thread(reconstruction_png, bundle, one.pixels, one.keep, one.answer.features["pixels"])
    headers = {"Server-Timing": answers.timing(work.found), "X-Revision": revision}
    if form == "png":
        return Response(png, media_type="image/png", headers=headers)
    picture = answers.Picture(model=name, revision=revision, keep=one.keep.tolist(), picture=_data_url(png))
    return JSONResponse(picture.model_dump(), headers=headers)


@routes.post("/v1/models/{name}/view", responses=_PNG, response_class=Response, openapi_extra=_BODY)
async def view(name: str, request: Request) -> Response:
    """One image as the network sees it: resized and cropped."""
    server = _server(request)
    with server.model(name).now as serving:
        async with server.uploads.body(request) as body:
            (item,) = await server.uploads.items(request, body, most=1)
            pixels = await server.computer.crop(serving, item)
        return Response(input_png(pixels, serving.backbone.preprocess), media_type="image/png")


@routes.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    return Response(generate_latest(_server(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)


@open_routes.api_route("/health/live", methods=["GET", "HEAD"], include_in_schema=False)
async def live() -> dict[str, str]:
    return {"status": "live"}


@open_routes.api_route("/health/ready", methods=["GET", "HEAD"], include_in_schema=False)
async def ready(request: Request) -> Response:
    server = _server(request)
    revisions = {name: model.now.verified.revision for name, model in server.models.items()}
    status = {"status": "stopping" if server.stopping() else "ready", "models": revisions}
    return JSONResponse(status, 503 if server.stopping() else 200)


@open_routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)


def application(server: Server) -> FastAPI:
    """The application of a server; it starts and ends with it."""
    app = FastAPI(
        title="mae-deploy serve",
        version=__version__,
        description="Vision backbones over HTTP.",
        docs_url=None,  # its pages would load scripts from elsewhere
        redoc_url=None,
        lifespan=lambda _: server.running(),
    )
    app.state.server = server
    app.include_router(routes)
    app.include_router(open_routes)
    app.add_exception_handler(Exception, _problem)
    for kind in (Refused, MaeDeployError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _problem)
    return app


async def _problem(_: Request, error: Exception) -> Response:
    """Whatever goes wrong, in one line of JSON."""
    status, message, headers = 500, str(error), {}
    if isinstance(error, Refused):
        status = error.status
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
    elif isinstance(error, RequestValidationError):
        status, message = 400, "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())
    elif isinstance(error, ConfigError):
        status, message = 400, f"{error}{f' ({error.hint})' if error.hint else ''}"
    elif not isinstance(error, MaeDeployError):
        message = f"{type(error).__name__}: {error}"
    if status == 503:
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    kind = RefusedResponse if isinstance(error, Refused) and error.unread else JSONResponse
    return kind({"error": printable(shortened(" ".join(message.split())))}, status, headers=headers)


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


async def _computed(
    name: str,
    request: Request,
    patches: Patches,
    outputs: Callable[[Serving], Sequence[str]],
    *,
    most: int | None = None,
) -> _Work:
    """What was computed of a request's images.

    Raises:
        Refused: there is nothing of any of them, or it takes too long.
        ConfigError: outputs or patches that the bundle cannot take.
    """
    server = _server(request)
    chosen = server.model(name)
    request.state.model = name
    with chosen.now as serving:
        if serving.batcher.full:
            raise Refused(503, f"{serving.batcher.queued} images wait already", unread=True)
        async with server.uploads.body(request) as body:
            items = await server.uploads.items(request, body, most=most)
            names = check_outputs(outputs(serving), serving.backbone.output_names)
            keeps = chosen_patches(serving, patches.keep, patches.num_keep, patches.seed, len(items))
            work = asyncio.gather(
                *(
                    server.computer.compute(name, serving, item, keep, names)
                    for item, keep in zip(items, keeps, strict=True)
                )
            )
            try:
                found = await asyncio.wait_for(work, server.timeout)
            except asyncio.TimeoutError:
                raise Refused(503, f"there was no answer within {server.config.requests.timeout}") from None
    if all(isinstance(one, Refused) for one in found):
        raise next(one for one in found if isinstance(one, Refused))
    return _Work(serving, items, found)


def _row(item: Item, one: Computed | Refused) -> dict[str, Any]:
    """What is said of every image."""
    if isinstance(one, Refused):
        return {"name": item.name, "error": str(one)}
    return {"name": item.name, "keep": None if one.keep is None else one.keep.tolist()}


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
