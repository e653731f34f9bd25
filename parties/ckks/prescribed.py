"""The messages of a client of ciphertexts, as its Program prescribes them: what its receipt may hold.

The request for the description, the evaluation keys once, and for each query a start and fresh ciphertexts: the inputs,
and the answers to refreshes.
"""

from __future__ import annotations

from collections.abc import Mapping

from parties.net.frames import parts
from parties.proto import unseen_pb2 as pb
from parties.receipts.described import DescriptionMessages
from parties.receipts.receipt import Receipt, SentMessage
from parties.receipts.walk import Frames, Walk, frames
from secure.ckks.program import CkksProgram
from secure.deployments.ckks import SERVER

_DIGEST = "0" * 64


def prescribed(receipt: Receipt, programs: Mapping[str, CkksProgram]) -> int:
    """Compare a receipt with what its Programs prescribe; return the queries that were sent whole.

    Raises ReceiptError.
    """
    whole = 0
    for number, channel in enumerate(receipt.connections, 1):
        walk = Walk(channel, number)
        if channel.role != SERVER:
            raise walk.differs("no client of ciphertexts talks to this role")
        whole += _run(walk, receipt, programs)
    return whole


def _run(walk: Walk, receipt: Receipt, programs: Mapping[str, CkksProgram]) -> int:
    asked, running, whole = DescriptionMessages(walk, receipt, programs), False, 0
    keys, ciphertexts, again = Frames(), Frames(), list[int]()
    for message in walk:
        if asked.takes(message):
            continue
        if message.kind == "Keys":
            walk.built(message, pb.KeysRequest(digest=_DIGEST))
        elif message.kind == "Upload/header":
            digest = walk.one_of(message, "program_digest", programs)
            walk.built(message, pb.UploadPart(header=pb.KeysHeader(program_digest=digest, digest=_DIGEST)))
            keys = Frames(_keys(programs[digest]))
        elif message.kind == "Upload/data":
            keys.take(walk, message)
        elif message.kind == "Query/start":
            whole += running and not ciphertexts.left
            again = _start(walk, receipt, message, programs)
            running, ciphertexts = True, Frames(again)
            again = again if programs[str(message.said["program_digest"])].rows else []
        elif message.kind == "Query/frame":
            if again and not ciphertexts.left:  # the next query of a conversation
                whole, ciphertexts = whole + 1, Frames(again)
            ciphertexts.take(walk, message)
        else:
            raise walk.unknown(message)
    return whole + (running and not ciphertexts.left)


def _start(walk: Walk, receipt: Receipt, message: SentMessage, programs: Mapping[str, CkksProgram]) -> list[int]:
    """Check the start of a query; return the sizes of the messages behind it."""
    digest = walk.one_of(message, "program_digest", programs)
    start = pb.CkksStart(program_digest=digest, model=receipt.model, keys_digest=_DIGEST)
    walk.built(message, pb.CkksRequest(start=start))
    program = programs[digest]
    levels = [level for _, level, _ in program.views.values()] + [v for stage in program.refreshes for v in stage]
    return frames(pb.CkksRequest, map(program.parameters.fresh_bytes, levels))


def _keys(program: CkksProgram) -> list[int]:
    """Return the sizes of the messages that carry the evaluation keys of a Program."""
    one = program.parameters.key_bytes
    keys = [program.parameters.public_key_bytes, *[one] * (len(program.steps) + 1)]
    return [pb.UploadPart(data=part).ByteSize() for key in keys for part in parts(bytes(key))]
