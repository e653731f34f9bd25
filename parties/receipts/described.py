"""The messages with which every client asks a service what it serves, as a receipt has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from parties.proto import unseen_pb2 as pb
from parties.receipts.receipt import Receipt, SentMessage
from parties.receipts.walk import Walk

MOST_FILES = 2
"""Files that a client downloads once for each description that it asks for: masked weights and a token table."""


class DescriptionMessages:
    """The descriptions that were asked for on a connection, and the files that may still be downloaded for them.

    most: the files that a client downloads for a description.
    """

    def __init__(self, walk: Walk, receipt: Receipt, programs: Mapping[str, Any], most: int = MOST_FILES) -> None:
        self._walk, self._files, self._most = walk, 0, most
        self._digests = receipt.described
        self._models = {"", *(str(program.labels.get("model", "")) for program in programs.values())}

    def takes(self, message: SentMessage) -> bool:
        """Tell whether a message is one of these, and check it. Raises ReceiptError."""
        if message.kind == "Describe":
            digest = self._walk.one_of(message, "program_digest", self._digests)
            name = self._walk.one_of(message, "model", self._models)
            self._walk.built(message, pb.DescribeRequest(program_digest=digest, model=name))
            self._files = self._most
            return True
        if message.kind == "Download":
            if not self._files or not re.fullmatch("[0-9a-f]{64}", str(message.said.get("sha256"))):
                raise self._walk.unknown(message)
            self._walk.built(message, pb.DownloadRequest(sha256="0" * 64))
            self._files -= 1
            return True
        return False
