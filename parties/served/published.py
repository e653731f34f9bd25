"""The public side of every service: the descriptions of what it offers (Describe), and files for clients (Download)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc

from parties.limits.waiting import WaitingRoom
from parties.net.caller import CLIENT, Permissions, permit
from parties.net.calls import answering
from parties.net.frames import parts
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import ModelServicer
from parties.served.files import describe
from secure.deployments.deployment import Deployment
from secure.errors import DownloadError
from secure.models.tokens import TextTokenizer
from secure.version import WIRE_VERSION

DOWNLOADS = 16  # at a time; if another begins, the one that has lasted longest ends


@dataclass(frozen=True, eq=False, repr=False)
class Publication:
    """A Program that a service offers, with all that a client needs of its model; everything in it is public.

    model: a name for the weights that tells nothing about them. files: payloads by name.
    """

    deployment: Deployment
    program: Any
    model: str
    files: Mapping[str, bytes]
    tokenizer: TextTokenizer | None
    tokenizer_json: bytes

    @property
    def name(self) -> str:
        """The model's name for people; "" if it has none."""
        return str(self.program.labels.get("model", ""))

    @property
    def offer(self) -> pb.Offer:
        """The publication in a list of offers."""
        labels = self.program.labels
        return pb.Offer(
            model=self.name,
            weights=self.model,
            length=int(labels.get("length", 0)),
            batch=int(labels.get("batch", 1)),
            program_digest=self.program.digest,
        )


class Published(ModelServicer):
    """The service of descriptions and files.

    role: the role of this service. offered: the first of a model's publications is described to clients who name none.
    deadline: seconds that a client may take to read a part. asked: called with the publication that is described.
    """

    permissions: ClassVar[Permissions] = permit("Model", Describe=[CLIENT], Download=[CLIENT])

    def __init__(
        self,
        role: str,
        offered: Sequence[Publication],
        *,
        deadline: float,
        log: logging.Logger,
        asked: Callable[[Publication], None] = lambda _: None,
    ) -> None:
        self._files: dict[str, bytes] = {}
        self._offered, self._asked = offered, asked
        offers, known = [each.offer for each in offered], dict[int, pb.File]()  # publications share payloads
        self._descriptions = dict[str, pb.Description]()
        for each in offered:
            for name, payload in each.files.items():
                if id(payload) not in known:
                    known[id(payload)] = describe(name, payload)
                    self._files[known[id(payload)].sha256] = payload
            tokenizer = each.tokenizer
            self._descriptions[each.program.digest] = pb.Description(
                version=WIRE_VERSION,
                deployment=each.deployment.name,
                role=role,
                program=each.program.encoded,
                model=each.model,
                files=[known[id(payload)] for payload in each.files.values()],
                tokenizer=each.tokenizer_json,
                pad_id=tokenizer.pad_id if tokenizer else 0,
                lowercase=tokenizer.lowercase if tokenizer else False,
                compiled_as=each.deployment.compiled_as(),
                offers=offers,
            )
        deployment = offered[0].deployment
        self._open = pb.Description(version=WIRE_VERSION, deployment=deployment.name, role=role, offers=offers)
        self._deadline, self._log = deadline, log
        self._downloading = WaitingRoom(DOWNLOADS)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        with answering(context, self._log):
            found = self.find(request)
            if found is None:
                return self._open
            self._asked(found)
            return self._descriptions[found.program.digest]

    def find(self, request: pb.DescribeRequest) -> Publication | None:
        """Return what a request means: the Program that it names, else the first of its model; None if that is open.

        A Program that is not offered is not missed here: clients see that another is described, and say so.
        """
        wanted = [each for each in self._offered if request.model in ("", each.name)]
        exact = [each for each in wanted if each.program.digest == request.program_digest]
        names = {each.name for each in wanted}
        return (exact or wanted)[0] if exact or len(names) == 1 else None

    def Download(self, request: pb.DownloadRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        watch = Watchdog(self._deadline, context.cancel)
        try:
            with answering(context, self._log), self._downloading.place(context):
                payload = self._files.get(request.sha256)
                if payload is None:
                    raise DownloadError("it has no such file", "connect again, the server may have changed")
                yield from watch.sending(pb.Chunk(data=part) for part in parts(payload))
        finally:
            watch.stop()
