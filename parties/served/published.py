"""The public side of every service: the description of its model (Describe) and the model's files (Download)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import ClassVar

import grpc

from parties.limits.waiting import WaitingRoom
from parties.net.caller import CLIENT, Permissions, permit
from parties.net.calls import answering
from parties.net.frames import parts
from parties.net.watchdog import Watchdog
from parties.served.files import describe
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import ModelServicer
from secure.deployments.deployment import Deployment
from secure.errors import DownloadError
from secure.models.tokens import TextTokenizer
from secure.version import WIRE_VERSION

DOWNLOADS = 16  # at a time; if another begins, the one that has lasted longest ends


class Published(ModelServicer):
    """The service of one model's description and files; everything in them is public.

    role: the role of this service. program: the Program's canonical encoding. model: a name for the weights that tells
    nothing about them. files: payloads by name. deadline: seconds that a client may take to read a part.
    """

    permissions: ClassVar[Permissions] = permit("Model", Describe=[CLIENT], Download=[CLIENT])

    def __init__(
        self,
        deployment: Deployment,
        role: str,
        program: bytes,
        model: str,
        files: Mapping[str, bytes],
        tokenizer: TextTokenizer | None,
        tokenizer_json: bytes,
        *,
        deadline: float,
        log: logging.Logger,
    ) -> None:
        described = [describe(name, payload) for name, payload in files.items()]
        self._files = {file.sha256: files[file.name] for file in described}
        self.description = pb.Description(
            version=WIRE_VERSION,
            deployment=deployment.name,
            role=role,
            program=program,
            model=model,
            files=described,
            tokenizer=tokenizer_json,
            pad_id=tokenizer.pad_id if tokenizer else 0,
            lowercase=tokenizer.lowercase if tokenizer else False,
            compiled_as=deployment.compiled_as(),
        )
        self._deadline, self._log = deadline, log
        self._downloading = WaitingRoom(DOWNLOADS)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        return self.description

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
