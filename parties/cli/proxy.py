"""The command ``unseen proxy``."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from parties.bulk.connection import Connection
from parties.cli import console
from parties.cli.asking import Connecting, connection_of
from parties.cli.console import progress, say, say_as, write
from parties.cli.options import TEXT_LINES, AnnounceOption, ListenOption, LogFormatOption, VerboseOption
from parties.limits.tokens import Token
from parties.net.endpoints import Endpoint
from parties.net.secret_files import check_directory, read_secret
from parties.proxy.hosted import HttpService, check_stays
from parties.proxy.workers import SessionWorkers
from parties.served.files import store
from parties.services.hosting import check_free
from parties.services.ready import tell_ready
from parties.telemetry import logs
from secure.deployments.deployment import Deployment
from secure.errors import InvalidInput, MissingPackage, about

VERB = "proxy"
PACKAGES = ("starlette", "uvicorn", "prometheus_client")
LISTEN = "127.0.0.1:8080"
MOST_SESSIONS, MOST_AHEAD = 16, 8


def proxy(
    deployment: Deployment,
    connecting: Connecting,
    listen: ListenOption = LISTEN,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The proxy's own token, which its callers show as their API key. It is made if it is not there. "
            "Without this, a new one is made at each start and printed once.",
        ),
    ] = None,
    sessions: Annotated[
        int, typer.Option(min=1, max=MOST_SESSIONS, help="Sessions with the servers: requests that run side by side.")
    ] = 1,
    ahead: Annotated[
        int, typer.Option(min=0, max=MOST_AHEAD, help="Queries that a session prepares while nobody asks.")
    ] = 1,
    token_ids: Annotated[
        bool,
        typer.Option(
            "--token-ids",
            help="Take arrays of tokens, as those of the served model's own tokenizer. OpenAI's clients may send those "
            "of another one, which would give wrong answers.",
        ),
    ] = False,
    matryoshka: Annotated[
        bool,
        typer.Option(
            "--matryoshka",
            help="Cut embeddings to the dimensions that a request asks for: only for models that were trained for it.",
        ),
    ] = False,
    unencrypted_beyond_loopback: Annotated[
        bool,
        typer.Option(
            "--unencrypted-beyond-loopback",
            help="Let --listen be an address that other machines reach. Texts and answers cross unencrypted.",
        ),
    ] = False,
    log_format: LogFormatOption = TEXT_LINES,
    announce: AnnounceOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer on this machine as OpenAI's endpoints do, by a served model that sees nothing of it."""
    at = Endpoint.parse(listen, what="--listen")
    check_stays(at, beyond_loopback=unencrypted_beyond_loopback)  # a mistake in it shows before anything is sent
    check_free(at, what="the proxy")
    say_as(log_format)
    logs.log_to_stderr(verbose, log_format)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    key, fresh = own_token(api_key_file)
    answer_at(
        at,
        connection_of(VERB, deployment, connecting),
        key,
        shown=f"a new API key is in {api_key_file}" if fresh and api_key_file is not None else None,
        printed=api_key_file is None,
        sessions=sessions,
        ahead=ahead,
        token_ids=token_ids,
        matryoshka=matryoshka,
        beyond_loopback=unencrypted_beyond_loopback,
        announced=announce,
    )


def answer_at(
    at: Endpoint,
    connection: Connection,
    key: Token,
    *,
    shown: str | None,
    printed: bool,
    sessions: int,
    ahead: int,
    token_ids: bool,
    matryoshka: bool,
    beyond_loopback: bool,
    announced: bool,
) -> None:
    """Connect, and answer at an address until a signal ends it.

    shown: a line about the key. printed: the key is printed, once. Raises MissingPackage.
    """
    if missing := next((name for name in PACKAGES if find_spec(name) is None), None):
        raise MissingPackage(f"{missing} is not installed", "pip install 'unseen[proxy]'")
    from parties.proxy.app import Proxy
    from parties.proxy.metrics import Metrics

    metrics = Metrics()
    with progress(VERB) as told:
        told(0, 0, "connecting")
        workers = SessionWorkers(connection.open, sessions=sessions, ahead=ahead, heard=metrics.query)
    try:
        made = Proxy(
            workers,
            metrics,
            key,
            token_ids=token_ids,
            matryoshka=matryoshka,
            deployment=connection.deployment,
            host=at.host,
        )
        with HttpService(made.app(), at, beyond_loopback=beyond_loopback) as service:

            def tell() -> None:
                say(f"unseen {VERB}: {made.model} for {made.endpoint}: base URL http://{service.address}/v1")
                say(f"unseen {VERB}: a page to look at, which asks for the API key: http://{service.address}/")
                if shown is not None:
                    say(f"unseen {VERB}: {shown}")
                if printed:
                    say(f"unseen {VERB}: the API key of this run, which is shown once:")
                    write(f"{key.text}\n")
                if announced:
                    console.announce(service.address)
                tell_ready()

            service.wait_announced(tell)
    finally:
        workers.close()


def own_token(file: Path | None) -> tuple[Token, bool]:
    """Return the proxy's token, and whether it was made now. A file that is not there is made, for this user alone.

    Raises InvalidInput.
    """
    if file is None:
        return Token.fresh(), True
    try:
        return Token(read_secret(file, most=1000).decode().strip()), False
    except FileNotFoundError:
        pass
    except InvalidInput as error:
        raise about("--api-key-file", error) from None
    except (OSError, UnicodeDecodeError):
        raise InvalidInput(f"--api-key-file: {file} cannot be read", "a file with one token") from None
    fresh = Token.fresh()
    try:
        check_directory(file.parent)
        store(file, f"{fresh.text}\n".encode(), replace=False)
    except InvalidInput as error:
        raise about("--api-key-file", error) from None
    except OSError as error:
        raise InvalidInput(f"--api-key-file: {file} cannot be made: {error.strerror}", "a file of your own") from None
    return fresh, True
