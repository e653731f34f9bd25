from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("program_digest", "model")
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    program_digest: str
    model: str
    def __init__(self, program_digest: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("model", "weights", "length", "batch", "program_digest")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    weights: str
    length: int
    batch: int
    program_digest: str
    def __init__(self, model: _Optional[str] = ..., weights: _Optional[str] = ..., length: _Optional[int] = ..., batch: _Optional[int] = ..., program_digest: _Optional[str] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("name", "sha256", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    size: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("version", "deployment", "role", "program", "model", "files", "tokenizer", "pad_id", "lowercase", "compiled_as", "offers")
    class CompiledAsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    PAD_ID_FIELD_NUMBER: _ClassVar[int]
    LOWERCASE_FIELD_NUMBER: _ClassVar[int]
    COMPILED_AS_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    deployment: str
    role: str
    program: bytes
    model: str
    files: _containers.RepeatedCompositeFieldContainer[File]
    tokenizer: bytes
    pad_id: int
    lowercase: bool
    compiled_as: _containers.ScalarMap[str, str]
    offers: _containers.RepeatedCompositeFieldContainer[Offer]
    def __init__(self, version: _Optional[int] = ..., deployment: _Optional[str] = ..., role: _Optional[str] = ..., program: _Optional[bytes] = ..., model: _Optional[str] = ..., files: _Optional[_Iterable[_Union[File, _Mapping]]] = ..., tokenizer: _Optional[bytes] = ..., pad_id: _Optional[int] = ..., lowercase: _Optional[bool] = ..., compiled_as: _Optional[_Mapping[str, str]] = ..., offers: _Optional[_Iterable[_Union[Offer, _Mapping]]] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("nonce", "program_digest")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    program_digest: str
    def __init__(self, nonce: _Optional[bytes] = ..., program_digest: _Optional[str] = ...) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("version", "deployment", "role", "program_digest", "known", "clock", "owner", "draining")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    version: int
    deployment: str
    role: str
    program_digest: str
    known: bool
    clock: float
    owner: bytes
    draining: bool
    def __init__(self, version: _Optional[int] = ..., deployment: _Optional[str] = ..., role: _Optional[str] = ..., program_digest: _Optional[str] = ..., known: _Optional[bool] = ..., clock: _Optional[float] = ..., owner: _Optional[bytes] = ..., draining: _Optional[bool] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class DealerKeyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DealerKeyReply(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    def __init__(self, key: _Optional[bytes] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("program", "sealed")
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    program: bytes
    sealed: bytes
    def __init__(self, program: _Optional[bytes] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("program_digest", "weights_digest", "proof", "store")
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    program_digest: str
    weights_digest: str
    proof: bytes
    store: bytes
    def __init__(self, program_digest: _Optional[str] = ..., weights_digest: _Optional[str] = ..., proof: _Optional[bytes] = ..., store: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("program_digest", "weights_digest", "nonce", "proof", "process")
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    program_digest: str
    weights_digest: str
    nonce: bytes
    proof: bytes
    process: bytes
    def __init__(self, program_digest: _Optional[str] = ..., weights_digest: _Optional[str] = ..., nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., process: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("proof",)
    PROOF_FIELD_NUMBER: _ClassVar[int]
    proof: bytes
    def __init__(self, proof: _Optional[bytes] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("version", "program_digest", "weights_digest", "sealed")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    version: int
    program_digest: str
    weights_digest: str
    sealed: bytes
    def __init__(self, version: _Optional[int] = ..., program_digest: _Optional[str] = ..., weights_digest: _Optional[str] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("session", "proof")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    proof: bytes
    def __init__(self, session: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("session", "program_digest", "weights_digest", "sealed", "proof", "process")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    program_digest: str
    weights_digest: str
    sealed: bytes
    proof: bytes
    process: bytes
    def __init__(self, session: _Optional[bytes] = ..., program_digest: _Optional[str] = ..., weights_digest: _Optional[str] = ..., sealed: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., process: _Optional[bytes] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("proof",)
    PROOF_FIELD_NUMBER: _ClassVar[int]
    proof: bytes
    def __init__(self, proof: _Optional[bytes] = ...) -> None: ...

class DealRequest(_message.Message):
    __slots__ = ("session", "query", "proof", "place", "steps")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    query: int
    proof: bytes
    place: Place
    steps: int
    def __init__(self, session: _Optional[bytes] = ..., query: _Optional[int] = ..., proof: _Optional[bytes] = ..., place: _Optional[_Union[Place, _Mapping]] = ..., steps: _Optional[int] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("program_digest", "first", "rows")
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    program_digest: str
    first: int
    rows: int
    def __init__(self, program_digest: _Optional[str] = ..., first: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class StockRequest(_message.Message):
    __slots__ = ("program_digest", "weights_digest", "sealed", "proof")
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    program_digest: str
    weights_digest: str
    sealed: bytes
    proof: bytes
    def __init__(self, program_digest: _Optional[str] = ..., weights_digest: _Optional[str] = ..., sealed: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class StockStart(_message.Message):
    __slots__ = ("entry", "proof")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    entry: bytes
    proof: bytes
    def __init__(self, entry: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class StockDone(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StockPart(_message.Message):
    __slots__ = ("start", "data", "done")
    START_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    start: StockStart
    data: bytes
    done: StockDone
    def __init__(self, start: _Optional[_Union[StockStart, _Mapping]] = ..., data: _Optional[bytes] = ..., done: _Optional[_Union[StockDone, _Mapping]] = ...) -> None: ...

class AssignRequest(_message.Message):
    __slots__ = ("session", "query", "entry", "proof", "entry_proof")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    ENTRY_PROOF_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    query: int
    entry: bytes
    proof: bytes
    entry_proof: bytes
    def __init__(self, session: _Optional[bytes] = ..., query: _Optional[int] = ..., entry: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., entry_proof: _Optional[bytes] = ...) -> None: ...

class AssignReply(_message.Message):
    __slots__ = ("sealed",)
    SEALED_FIELD_NUMBER: _ClassVar[int]
    sealed: bytes
    def __init__(self, sealed: _Optional[bytes] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("session", "proof")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    proof: bytes
    def __init__(self, session: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class CloseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "deployment", "program_digest", "fixed_point", "weights_digest", "session")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FIXED_POINT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    deployment: str
    program_digest: str
    fixed_point: str
    weights_digest: str
    session: bytes
    def __init__(self, version: _Optional[int] = ..., deployment: _Optional[str] = ..., program_digest: _Optional[str] = ..., fixed_point: _Optional[str] = ..., weights_digest: _Optional[str] = ..., session: _Optional[bytes] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("query", "place", "steps")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    query: int
    place: Place
    steps: int
    def __init__(self, query: _Optional[int] = ..., place: _Optional[_Union[Place, _Mapping]] = ..., steps: _Optional[int] = ...) -> None: ...

class Query(_message.Message):
    __slots__ = ("query",)
    QUERY_FIELD_NUMBER: _ClassVar[int]
    query: int
    def __init__(self, query: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("data", "last")
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    last: bool
    def __init__(self, data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("hello", "prepare", "query", "frame")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    prepare: Prepare
    query: Query
    frame: Frame
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., query: _Optional[_Union[Query, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("stored",)
    STORED_FIELD_NUMBER: _ClassVar[int]
    stored: bool
    def __init__(self, stored: _Optional[bool] = ...) -> None: ...

class Assigned(_message.Message):
    __slots__ = ("query", "entry", "sealed")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    query: int
    entry: bytes
    sealed: bytes
    def __init__(self, query: _Optional[int] = ..., entry: _Optional[bytes] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("query", "bytes", "seconds")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    query: int
    bytes: int
    seconds: float
    def __init__(self, query: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("query",)
    QUERY_FIELD_NUMBER: _ClassVar[int]
    query: int
    def __init__(self, query: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "after", "goes_on")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    GOES_ON_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    after: float
    goes_on: bool
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., after: _Optional[float] = ..., goes_on: _Optional[bool] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("welcome", "prepared", "frame", "finished", "failure", "assigned")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    prepared: Prepared
    frame: Frame
    finished: Finished
    failure: Failure
    assigned: Assigned
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., assigned: _Optional[_Union[Assigned, _Mapping]] = ...) -> None: ...

class KeysRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class KeysReply(_message.Message):
    __slots__ = ("held", "expires_seconds")
    HELD_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_SECONDS_FIELD_NUMBER: _ClassVar[int]
    held: bool
    expires_seconds: float
    def __init__(self, held: _Optional[bool] = ..., expires_seconds: _Optional[float] = ...) -> None: ...

class KeysHeader(_message.Message):
    __slots__ = ("program_digest", "digest")
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    program_digest: str
    digest: str
    def __init__(self, program_digest: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class UploadPart(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: KeysHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[KeysHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class CkksStart(_message.Message):
    __slots__ = ("program_digest", "model", "keys_digest")
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KEYS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    program_digest: str
    model: str
    keys_digest: str
    def __init__(self, program_digest: _Optional[str] = ..., model: _Optional[str] = ..., keys_digest: _Optional[str] = ...) -> None: ...

class CkksRequest(_message.Message):
    __slots__ = ("start", "frame")
    START_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    start: CkksStart
    frame: Frame
    def __init__(self, start: _Optional[_Union[CkksStart, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("done", "total", "path")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    path: str
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., path: _Optional[str] = ...) -> None: ...

class CkksReply(_message.Message):
    __slots__ = ("progress", "refresh", "result", "frame", "failure")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    refresh: int
    result: int
    frame: Frame
    failure: Failure
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., refresh: _Optional[int] = ..., result: _Optional[int] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class AskStart(_message.Message):
    __slots__ = ("version", "model", "session", "seed", "deadline", "wanted", "owner", "following")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    FOLLOWING_FIELD_NUMBER: _ClassVar[int]
    version: int
    model: str
    session: bytes
    seed: bytes
    deadline: float
    wanted: Wanted
    owner: bytes
    following: str
    def __init__(self, version: _Optional[int] = ..., model: _Optional[str] = ..., session: _Optional[bytes] = ..., seed: _Optional[bytes] = ..., deadline: _Optional[float] = ..., wanted: _Optional[_Union[Wanted, _Mapping]] = ..., owner: _Optional[bytes] = ..., following: _Optional[str] = ...) -> None: ...

class Wanted(_message.Message):
    __slots__ = ("program_digest", "conversation", "rows")
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    program_digest: str
    conversation: bytes
    rows: int
    def __init__(self, program_digest: _Optional[str] = ..., conversation: _Optional[bytes] = ..., rows: _Optional[int] = ...) -> None: ...

class AskPart(_message.Message):
    __slots__ = ("start", "frame")
    START_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    start: AskStart
    frame: Frame
    def __init__(self, start: _Optional[_Union[AskStart, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ...) -> None: ...

class Working(_message.Message):
    __slots__ = ("steps", "waits_for")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    steps: int
    waits_for: str
    def __init__(self, steps: _Optional[int] = ..., waits_for: _Optional[str] = ...) -> None: ...

class AskReply(_message.Message):
    __slots__ = ("working", "answer", "failure")
    WORKING_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    working: Working
    answer: Answer
    failure: Failure
    def __init__(self, working: _Optional[_Union[Working, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("share", "seconds", "waited", "rounds", "sent", "corrections", "dealing", "rows")
    SHARE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    CORRECTIONS_FIELD_NUMBER: _ClassVar[int]
    DEALING_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    share: bytes
    seconds: float
    waited: float
    rounds: int
    sent: int
    corrections: int
    dealing: float
    rows: int
    def __init__(self, share: _Optional[bytes] = ..., seconds: _Optional[float] = ..., waited: _Optional[float] = ..., rounds: _Optional[int] = ..., sent: _Optional[int] = ..., corrections: _Optional[int] = ..., dealing: _Optional[float] = ..., rows: _Optional[int] = ...) -> None: ...

class AgreeHello(_message.Message):
    __slots__ = ("version", "model", "party", "public", "proof")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PARTY_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    version: int
    model: str
    party: int
    public: bytes
    proof: bytes
    def __init__(self, version: _Optional[int] = ..., model: _Optional[str] = ..., party: _Optional[int] = ..., public: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class AgreeAnswer(_message.Message):
    __slots__ = ("public", "proof")
    PUBLIC_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    public: bytes
    proof: bytes
    def __init__(self, public: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class AgreeDone(_message.Message):
    __slots__ = ("store", "proof")
    STORE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    store: bytes
    proof: bytes
    def __init__(self, store: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class AgreeMessage(_message.Message):
    __slots__ = ("hello", "answer", "confirm", "done")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    hello: AgreeHello
    answer: AgreeAnswer
    confirm: bytes
    done: AgreeDone
    def __init__(self, hello: _Optional[_Union[AgreeHello, _Mapping]] = ..., answer: _Optional[_Union[AgreeAnswer, _Mapping]] = ..., confirm: _Optional[bytes] = ..., done: _Optional[_Union[AgreeDone, _Mapping]] = ...) -> None: ...

class PeerHello(_message.Message):
    __slots__ = ("version", "model", "session", "proof", "wanted", "history")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    version: int
    model: str
    session: bytes
    proof: bytes
    wanted: Wanted
    history: bytes
    def __init__(self, version: _Optional[int] = ..., model: _Optional[str] = ..., session: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., wanted: _Optional[_Union[Wanted, _Mapping]] = ..., history: _Optional[bytes] = ...) -> None: ...

class PeerWelcome(_message.Message):
    __slots__ = ("supply",)
    SUPPLY_FIELD_NUMBER: _ClassVar[int]
    supply: bytes
    def __init__(self, supply: _Optional[bytes] = ...) -> None: ...

class PeerMessage(_message.Message):
    __slots__ = ("hello", "welcome", "frame", "tag", "failure")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    hello: PeerHello
    welcome: PeerWelcome
    frame: Frame
    tag: bytes
    failure: Failure
    def __init__(self, hello: _Optional[_Union[PeerHello, _Mapping]] = ..., welcome: _Optional[_Union[PeerWelcome, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., tag: _Optional[bytes] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class SupplyRequest(_message.Message):
    __slots__ = ("model", "supply", "proof", "wanted", "history")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SUPPLY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    model: str
    supply: bytes
    proof: bytes
    wanted: Wanted
    history: bytes
    def __init__(self, model: _Optional[str] = ..., supply: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., wanted: _Optional[_Union[Wanted, _Mapping]] = ..., history: _Optional[bytes] = ...) -> None: ...

class SupplyPart(_message.Message):
    __slots__ = ("seed", "data", "tag")
    SEED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    seed: bytes
    data: bytes
    tag: bytes
    def __init__(self, seed: _Optional[bytes] = ..., data: _Optional[bytes] = ..., tag: _Optional[bytes] = ...) -> None: ...

class ContributeRequest(_message.Message):
    __slots__ = ("model", "supply", "session", "proof")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SUPPLY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    model: str
    supply: bytes
    session: bytes
    proof: bytes
    def __init__(self, model: _Optional[str] = ..., supply: _Optional[bytes] = ..., session: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("rows", "tag")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    tag: bytes
    def __init__(self, rows: _Optional[bytes] = ..., tag: _Optional[bytes] = ...) -> None: ...

class SeedReply(_message.Message):
    __slots__ = ("seed", "tag")
    SEED_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    seed: bytes
    tag: bytes
    def __init__(self, seed: _Optional[bytes] = ..., tag: _Optional[bytes] = ...) -> None: ...
