"""The web form of the users: it asks the commander like everyone else, and publishes nothing itself."""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from html import escape
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from cauce import Bus, Gone, Refused, Rejected, Unavailable
from cauce.demo.shop.users import RegisterUser, User
from cauce.demo.story import Story

__all__ = ["app", "serving"]

_MOST_BYTES = 16_384
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
 body {{ font: 17px/1.5 system-ui, sans-serif; max-width: 30rem; margin: 12vh auto; padding: 0 1rem; color: #1c2b33 }}
 h1 {{ font-size: 1.6rem }} label {{ display: block; margin: 1rem 0 .2rem; font-weight: 600 }}
 input {{ width: 100%; box-sizing: border-box; font: inherit; padding: .5rem .6rem; border: 1px solid #9fb3bd; border-radius: .4rem }}
 button {{ margin-top: 1.4rem; font: inherit; padding: .55rem 1.3rem; border: 0; border-radius: .4rem; background: #0b6e8f; color: #fff }}
 .no {{ color: #a3242b }} dt {{ color: #5b6f79; margin-top: .6rem }} dd {{ margin: 0 }}
</style></head><body><h1>{title}</h1>{body}</body></html>"""
_FORM = """{said}<form method="post" action="/users"><input type="hidden" name="token" value="{token}">
<label for="id">Account number</label><input id="id" name="user_id" value="{user_id}" required>
<label for="name">Name</label><input id="name" name="name" value="{name}" required>
<label for="email">E-mail</label><input id="email" name="email" type="email" value="{email}" required>
<button>Register</button></form>"""


def app(bus: Bus, story: Story, token: str) -> Starlette:
    """The form at `/`, what it posts to, and a page for each user. The token keeps other sites from posting."""

    async def form(request: Request) -> Response:
        return _page("Register", _form(token, {}))

    async def register(request: Request) -> Response:
        if not _own(request):
            return _page("Not from here", "<p>Open the form on this site.</p>", 403)
        body = await request.body()
        if len(body) > _MOST_BYTES:
            return _page("Too large", "<p>That is more than this form takes.</p>", 413)
        fields = {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}
        if not hmac.compare_digest(fields.get("token", "").encode(), token.encode()):
            return _page("Not from here", "<p>Open the form on this site.</p>", 403)
        command = RegisterUser(*(fields.get(name, "") for name in ("user_id", "name", "email")))
        story.tell("web", f"asks the commander: RegisterUser({command.user_id})", "POST /users")
        try:
            receipt = await bus.call(command, by="web")
        except (Rejected, Refused) as no:
            story.tell("users", f"says no: {no}", f"RegisterUser({command.user_id})")
            return _page("Register", _form(token, fields, str(no)), 409 if isinstance(no, Rejected) else 400)
        except Unavailable as absent:
            return _page("Register", _form(token, fields, str(absent)), 503)
        story.tell(
            "users",
            f"recorded UserRegistered, users/{receipt.key} version {receipt.version}",
            f"RegisterUser …{receipt.id[-12:]} by web",
        )
        return RedirectResponse(f"/users/{receipt.key}", status_code=303)

    async def show(request: Request) -> Response:
        try:
            # Asked of the owner: the written record may lag a moment behind the registration that redirects here.
            user = await bus.fetch(User, request.path_params["key"])
        except (Gone, Refused):
            return _page("Nobody", "<p>There is no such user.</p>", 404)
        except Unavailable as absent:
            return _page("Not now", f"<p>{escape(str(absent))}</p>", 503)
        rows = "".join(
            f"<dt>{name}</dt><dd>{escape(value)}</dd>"
            for name, value in zip(("Account", "Name", "E-mail"), (user.user_id, user.name, user.email), strict=True)
        )
        return _page("Registered", f"<dl>{rows}</dl><p><a href='/'>Register another</a></p>")

    routes = [Route("/", form), Route("/users", register, methods=["POST"]), Route("/users/{key:path}", show)]
    return Starlette(
        routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])]
    )


@asynccontextmanager
async def serving(application: Starlette, port: int) -> AsyncIterator[str]:
    """Serve on loopback until the block is left; gives the address. Port 0 takes a free one.

    Raises `Refused` for a port that cannot be had.
    """
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise Refused(
            f"port {port} of 127.0.0.1 cannot be had: {os.strerror(error.errno or 0)}: name another, or 0 for a free one"
        ) from None
    server = _Server(uvicorn.Config(application, log_level="warning", lifespan="off"))
    task = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


class _Server(uvicorn.Server):
    """Leaves the signals to who runs the demo."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _own(request: Request) -> bool:
    origin = request.headers.get("origin")
    return origin is None or origin == f"http://{request.headers.get('host')}"


def _form(token: str, fields: dict[str, str], said: str = "") -> str:
    values = {name: escape(fields.get(name, "")) for name in ("user_id", "name", "email")}
    return _FORM.format(said=f'<p class="no" role="alert">{escape(said)}</p>' if said else "", token=token, **values)


def _page(title: str, body: str, status: int = 200) -> Response:
    headers = {
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'",
        "cache-control": "no-store",
    }
    return HTMLResponse(_PAGE.format(title=escape(title), body=body), status, headers)
