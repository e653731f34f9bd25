"""Translate a torch module into a `Graph`, by ``torch.export``."""

from __future__ import annotations

import contextlib
import operator
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_unflatten

from secure.capture.builder import Builder, Norm, Root, Value, shape_of
from secure.capture.clear_operations import CLEAR_OPERATIONS, CREATION_OPERATIONS, kind_of
from secure.capture.graph import Graph, Node
from secure.capture.operation import RULES
from secure.errors import InvalidInput, UnsupportedOperation

IDENTITIES = frozenset(
    f"aten.{name}"
    for name in (
        "alias.default", "clone.default", "contiguous.default", "detach.default", "detach_.default",
        "dropout.default", "feature_dropout.default", "lift_fresh.default", "lift_fresh_copy.default",
        "positive.default",
    )
)  # fmt: skip
"""Operations that do nothing in evaluation mode."""

CASTS = frozenset(
    f"aten.{name}"
    for name in (
        "_to_copy.default", "to.device", "to.dtype", "to.dtype_layout", "to.other", "to.prim_Device",
        "type_as.default",
    )
)  # fmt: skip
"""Operations that change the data type or the device only."""

IGNORED = frozenset({"aten._assert_tensor_metadata.default", "aten._assert_scalar.default"})
"""Checks that static shapes make superfluous."""

PUBLIC_BUFFERS = frozenset({"inv_freq", "original_inv_freq"})
"""Names of float buffers that follow from a model's architecture alone (rotary embeddings)."""


def capture(
    model: nn.Module, example_inputs: Mapping[str, Tensor], *, public: Collection[str] = PUBLIC_BUFFERS
) -> tuple[Graph, dict[str, Tensor]]:
    """Translate a module, called with these keyword arguments, in evaluation mode and for exactly these shapes.

    Returns the graph, and the parameters and buffers that it names. All inputs are the client's, all parameters and
    buffers the server's. The only exceptions are tensors that are no part of the model's state and follow from its
    architecture, which are public: constants written in ``forward``, integer and boolean buffers, and float buffers
    whose last name is in ``public``.
    Raises InvalidInput for an example that is no tensor, and UnsupportedOperation for a model that cannot be traced or
    that contains an operation without a private protocol.
    """
    for name, value in example_inputs.items():
        if not isinstance(value, Tensor):
            raise InvalidInput(f"the example input {name!r} is a {type(value).__name__}, not a tensor")
    apart = {
        name: value.clone() for name, value in example_inputs.items()
    }  # torch.export takes one tensor for one input
    with _float32(model) as halves:
        program = _export(model, apart)
    translator = _Translator(program, frozenset(public))
    graph = translator.graph()
    return graph, {name: halves.get(value.data_ptr(), value) for name, value in translator.parameters.items()}


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _float32(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Let parameters of half precision be in float32 while a model is traced, so that its graph is that of float32.

    What stands for them takes no memory. Yields the parameters, by the addresses of what stands for them.
    """
    halves, places = dict[int, Tensor](), list[tuple[dict[str, Any], str, nn.Parameter]]()
    stands = dict[int, nn.Parameter]()  # by identity: tied parameters stay tied
    for module in model.modules():
        table: dict[str, Any] = module._parameters
        for name, value in table.items():
            if value is not None and value.dtype in (torch.float16, torch.bfloat16):
                if id(value) not in stands:
                    zeros = torch.zeros(1).expand(value.shape)
                    stands[id(value)] = nn.Parameter(zeros, requires_grad=False)
                    halves[zeros.data_ptr()] = value.detach()
                places.append((table, name, value))
    try:
        for table, name, value in places:
            table[name] = stands[id(value)]
        yield halves
    finally:
        for table, name, value in places:
            table[name] = value


@contextlib.contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Let decoders return no keys and values of theirs, which are for a next step, not an answer."""
    settings: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    found = {id(c): c for c in settings if getattr(c, "use_cache", False) is True}
    for configuration in found.values():
        configuration.use_cache = False
    try:
        yield
    finally:
        for configuration in found.values():
            configuration.use_cache = True


def _export(model: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    with _evaluation_mode(model), _without_caches(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export uses deprecated parts of torch
        try:
            program = torch.export.export(model, (), inputs, strict=False)
            known = _known()
            targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
            if not all(target is operator.getitem or str(target) in known for target in targets):
                table = torch.export.default_decompositions()  # also removes operations in place
                for operation in [operation for operation in table if str(operation) in known]:
                    del table[operation]
                program = program.run_decompositions(table)
        except Exception as error:  # torch.export raises errors of many kinds
            raise untraceable(model, error) from error
    return program


def _known() -> frozenset[str]:
    tables: tuple[Collection[str], ...] = (CLEAR_OPERATIONS, CREATION_OPERATIONS, CASTS, IDENTITIES, IGNORED)
    return frozenset().union(*tables, RULES)


def untraceable(model: nn.Module, error: Exception) -> UnsupportedOperation:
    """Return an error that names the module that could not be traced: the innermost one in the traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    place, function = "", "forward"
    frame: TracebackType | None = error.__traceback__
    while frame is not None:
        module = frame.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            place, function = names[id(module)], frame.tb_frame.f_code.co_name
        frame = frame.tb_next
    where = f"module {place!r}" if place else "the top-level module"
    dependent = "data-dependent" in str(error).lower() or "DataDependent" in type(error).__name__
    reason = "its control flow or shapes depend on data" if dependent else f"{type(error).__name__}"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return UnsupportedOperation(
        f"{where} ({type(model).__name__}, in {function}) cannot be traced: {reason}: {first[:300]}\n"
        "hint: a private model does the same operations whatever its input is: no Python `if`, `.item()`, boolean "
        "indexing or `nonzero` of tensors; check that the model accepts the example inputs by these names"
    )


def _output_names(program: torch.export.ExportedProgram, count: int) -> list[str]:
    """Return the names of a module's results.

    A single tensor is "output"; other results have their keys, fields or positions, joined by points where they nest.
    """
    names = [""] * count

    def visit(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, int):
            names[value] = ".".join(path) or "output"
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                visit(inner, (*path, str(key)))
        elif isinstance(value, tuple | list):
            keys = getattr(value, "_fields", range(len(value)))
            for key, inner in zip(keys, value, strict=True):
                visit(inner, (*path, str(key)))
        elif is_dataclass(value):
            for entry in fields(value):
                visit(getattr(value, entry.name), (*path, entry.name))

    visit(tree_unflatten(list(range(count)), program.call_spec.out_spec), ())
    if "" in names or len(set(names)) != count:
        raise UnsupportedOperation(
            "the model's outputs have no names, or the same one twice", "return a tensor, a tuple or a dict of tensors"
        )
    return names


class _Translator:
    """A walk over an exported program that builds the graph."""

    def __init__(self, program: torch.export.ExportedProgram, public: frozenset[str]) -> None:
        self.program = program
        self.public = public
        self.builder = Builder()
        self.values: dict[torch.fx.Node, Value] = {}
        self.tensors: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self._tied: dict[tuple[Any, ...], str] = {}

    def graph(self) -> Graph:
        """Translate the whole program."""
        b = self.builder
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for spec in self.program.graph_signature.output_specs:
            if spec.kind != OutputKind.USER_OUTPUT:
                raise UnsupportedOperation(
                    f"the model changes its own state ({spec.target or spec.arg.name!r}) when it is called\n"
                    "hint: a private model is a function; remove the assignment to a buffer or parameter"
                )
        outputs: dict[str, Value] = {}
        signature = self.program.graph_signature
        _, keywords = tree_unflatten(list(signature.user_inputs), self.program.call_spec.in_spec)
        names = {placeholder: name for name, placeholder in keywords.items()}
        for node in self.program.graph.nodes:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            b.path = re.sub(r"@\d+", "", str(stack[-1][0])) if stack else ""
            if node.op == "placeholder":
                self.values[node] = self._leaf(node, specs[node.name], names.get(node.name, node.name))
            elif node.op == "call_function":
                self._operation(node)
            elif node.op == "output":
                found: Any = node.args[0]
                named = zip(_output_names(self.program, len(found)), found, strict=True)
                outputs = {name: self._argument(value) for name, value in named if isinstance(value, torch.fx.Node)}
        if not outputs:
            raise UnsupportedOperation("the model returns no tensor\nhint: return a tensor or a tuple of tensors")
        b.path, b.target, b.arguments = "", "output", list(outputs.values())
        graph = replace(b.finish(list(outputs.values())), names=tuple(outputs))
        self.parameters = {name: self.tensors[name] for name in graph.parameters}
        return graph

    def _leaf(self, node: torch.fx.Node, spec: Any, input_name: str) -> Value:
        b = self.builder
        example = node.meta.get("val")
        if spec.kind == InputKind.USER_INPUT:
            if not isinstance(example, Tensor):
                raise UnsupportedOperation(f"the input {input_name!r} is not a tensor\nhint: make it a constant")
            return b.add("input", [], {"name": input_name}, example.shape, kind_of(example.dtype), "client")
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise UnsupportedOperation(f"the model holds {spec.target!r}, which is no tensor\nhint: remove it")
        name = str(spec.target)
        state = self.program.state_dict
        value = state[name] if name in state else self.program.constants[name]
        assert isinstance(value, Tensor)
        if name not in state and self._follows_from_architecture(name, value, spec.kind):
            return value.detach()
        name = self._tied.setdefault(_memory(name, value), name)  # tied parameters are one
        self.tensors.setdefault(name, value.detach())
        b.path = name.rpartition(".")[0]
        return b.add("parameter", [], {"name": name}, value.shape, kind_of(value.dtype), "server")

    def _follows_from_architecture(self, name: str, value: Tensor, kind: InputKind) -> bool:
        """True if a tensor that is no part of the model's state is public."""
        written_in_forward = kind == InputKind.CONSTANT_TENSOR and name.rpartition(".")[2].startswith("lifted_tensor")
        index = value.dtype in (torch.bool, torch.int32, torch.int64)
        return written_in_forward or index or name.rpartition(".")[2] in self.public

    def _argument(self, value: Any) -> Value:
        if isinstance(value, torch.fx.Node):
            return self.values[value]
        if isinstance(value, list | tuple):
            return [self._argument(item) for item in value]
        return value

    def _operation(self, node: torch.fx.Node) -> None:
        b = self.builder
        name = str(node.target)
        if name in IGNORED:
            return
        args: list[Value] = [self._argument(value) for value in node.args]
        kwargs = {key: self._argument(value) for key, value in node.kwargs.items()}
        example = node.meta.get("val")
        b.target, b.arguments = name, [*args, *kwargs.values()]
        b.takes_masks = _takes_masks(node)
        if node.target is operator.getitem:
            result = args[0][args[1]]
        elif name in IDENTITIES:
            if "dropout" in name and args[2] and args[1]:
                b.unsupported("call dropout with training=self.training: a private model is in evaluation mode")
            result = args[0]
        elif name in CASTS and isinstance(example, Tensor):
            result = b.cast(args[0], example.dtype)
        elif name in CREATION_OPERATIONS:
            examples = [  # only their shape and type matter
                torch.zeros(value.shape, dtype=source.meta["val"].dtype)
                if isinstance(value, Node) and isinstance(source, torch.fx.Node)
                else value
                for value, source in zip(args, node.args, strict=True)
            ]
            result = CREATION_OPERATIONS[name](*examples, **{k: v for k, v in kwargs.items() if k != "device"})
        else:
            try:
                result = b.call(name, *args, **kwargs)
            except UnsupportedOperation:
                raise
            except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                b.unsupported(f"this form of it is not supported: {reason}")
        if isinstance(example, Tensor) and not isinstance(result, Norm | Root | None):
            shape = tuple(example.shape)
            if shape_of(result) != shape:
                raise AssertionError(f"translation error in {b.path!r}: {name} gives {shape_of(result)}, not {shape}")
        self.values[node] = result


def _memory(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tensors that view the same memory in the same way."""
    address = tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else 0
    return (address or name, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())


_PASSING = IDENTITIES | CASTS | frozenset(
    f"aten.{name}"
    for name in (
        "add.Tensor", "expand.default", "masked_fill.Scalar", "masked_fill.Tensor", "permute.default",
        "reshape.default", "slice.Tensor", "squeeze.dim", "transpose.int", "unsqueeze.default", "view.default",
        "where.ScalarOther", "where.self", "_unsafe_view.default",
    )
)  # fmt: skip
"""Operations after which a large negative number is still one, whatever is added to it."""


def _takes_masks(node: torch.fx.Node) -> bool:
    """True if all readers of a value, after sums and changes of its shape, take large negative numbers as masks."""
    readers = [user for user in node.users if str(user.target) not in IGNORED]
    return bool(readers) and all(
        _is_of_masks(str(user.target))
        or _is_mask_of(user, node)
        or (str(user.target) in _PASSING and _takes_masks(user))
        for user in readers
    )


def _is_mask_of(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    """True if a node is the mask of an attention, which adds it to its scores."""
    if str(user.target) != "aten.scaled_dot_product_attention.default":
        return False
    return node not in user.args[:3] and node in (*user.args[3:4], user.kwargs.get("attn_mask"))


def _is_of_masks(target: str) -> bool:
    if target == "aten.argmax.default":
        return True
    operation = RULES[target].operation if target in RULES else None
    return operation is not None and operation.takes_masks
