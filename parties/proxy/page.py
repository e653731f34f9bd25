"""The page of a proxy: one file without anything from elsewhere, and the numbers that it shows.

The page itself needs no key, since nothing is in it. Its numbers do, as every endpoint does. Both are given to names of
this machine alone: a page of somebody else, whose name leads to this machine by now, is refused.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections import deque
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from parties.net.endpoints import names_this_machine
from parties.proxy import answers
from parties.proxy.bodies import RequestRefused, refused
from parties.reports.who_learns import columns
from secure.cost.traffic import OFFLINE, ONLINE, traffic_json
from secure.deployments.deployment import ROWS, Deployment
from secure.errors import InvalidInput
from secure.session.link import Report

KEPT = 120
"""Queries of which the page has the numbers, the newest."""

NUMBERS = ("length", "rounds", "online_seconds", "offline_seconds")


@cache
def page() -> tuple[str, str]:
    """Return the page, and the policy under which a browser shows it: its own script and style, and this proxy."""
    text = files("parties.proxy").joinpath("page.html").read_text(encoding="utf-8")
    own = {name: re.findall(rf"<{name}>(.*?)</{name}>", text, flags=re.S) for name in ("script", "style")}
    hashes = {name: f"'sha256-{b64encode(sha256(each.encode()).digest()).decode()}'" for name, (each,) in own.items()}
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    return text, policy


class History:
    """The numbers of queries since the start, and of the last KEPT one by one. Nothing of what was asked is in it."""

    def __init__(self) -> None:
        self._kept: deque[Report] = deque(maxlen=KEPT)
        self._totals = {"queries": 0, "rounds": 0, ONLINE: 0, OFFLINE: 0}

    def add(self, report: Report) -> None:
        """Take the report of a query."""
        self._kept.append(report)
        more = {"queries": 1, "rounds": report.rounds, **{each: report.bytes(phase=each) for each in (ONLINE, OFFLINE)}}
        self._totals = {name: value + more[name] for name, value in self._totals.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        queries = [
            {**{name: getattr(each, name) for name in NUMBERS}, "traffic": traffic_json(each.traffic)}
            for each in list(self._kept)
        ]
        return {"totals": self._totals, "queries": queries, "kept": KEPT}


def learns(deployment: Deployment, *, token_table: bool) -> dict[str, Any]:
    """Return who learns what in a query, and under which assumption, as JSON values."""
    found = columns(deployment.roles(token_table=token_table))
    rows = [[row, *(role.learns[row] for role in found.values())] for row in ROWS]
    return {"trust": deployment.trust, "learns": {"columns": list(found), "rows": rows}}


def check_name(request: Request, host: str) -> None:
    """Raise RequestRefused unless a request comes to a name of this machine. host: that at which the proxy listens."""
    if not names_this_machine(request.headers.get("host", ""), host):
        wrong = InvalidInput("this page is at an address or a name of this machine", "http://127.0.0.1 and the port")
        raise refused(wrong, status=421, code="misdirected_request")


def check_local(request: Request, host: str) -> None:
    """Raise RequestRefused unless a request comes to a name of this machine, and from no page of another origin."""
    check_name(request, host)
    own = {"origin": f"http://{request.headers.get('host', '')}", "sec-fetch-site": "same-origin"}
    if any(request.headers.get(name, value) not in (value, "none") for name, value in own.items()):
        raise refused(InvalidInput("a page of another origin asks", "open the proxy's own page"), status=403)


def show(request: Request, host: str) -> Response:
    """Return the page. Whoever may see it sees nothing but the form for the key."""
    try:
        check_name(request, host)
    except RequestRefused as error:
        status, document, headers = answers.failure(error)
        return JSONResponse(document, status, headers)
    text, policy = page()
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)
