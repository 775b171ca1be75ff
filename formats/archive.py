"""PyTorch's archive, a pickle in a zip, read without running the pickle: its instructions are
parsed, and those that torch.save writes are followed by hand. They can build containers, numbers,
texts and tensors, and nothing else: a name that the file gives is looked up in a table, never
imported or called. What is built costs no more than the file has instructions and bytes.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..concept.tensors import MOST_TENSORS, read_into
from .zip_entries import STRUCTURE, Entry, read_entries, read_entry

_LARGEST_PICKLE = 16 << 20
"""Bytes of structure in an archive; that of a whole checkpoint has less than a million"""
_MOST_STEPS = 1 << 20
"""Instructions; a LyCORIS of all of SDXL's layers has a quarter of them"""
_LONGEST_TEXT = 1 << 16
_MOST_DIMENSIONS = 8
_MOST_NUMBERS = 1 << 40
_MOST_SHARING = 4
"""All tensors together may have so many times the file's bytes; views of one storage share them"""

_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16},
        **{"BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32},
        **{"Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool},
        **{"ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8, "torch.UntypedStorage": torch.uint8}
_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
    if hasattr(torch, name)
}
_PARAMETERS = "torch.nn.modules.container.ParameterDict"
"""What the original textual inversion keeps its words in"""


class _Name(str):
    """A name that the file gave, and that is known; no text of the file's."""


class _Storage(NamedTuple):
    content: Tensor
    """(n,) of uint8, filled at the end"""
    dtype: torch.dtype


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_archive(file: BinaryIO, file_bytes: int) -> Any:
    """What torch.save wrote: tensors, on the CPU and in memory of their own, and plain containers.

    Raises ValueError that says what else the file is or holds, OtherZipError for any other zip.
    """
    entries = read_entries(file, file_bytes)
    pickles = [name for name in entries if name.endswith(STRUCTURE)]
    if len(pickles) != 1:
        raise ValueError("it is a zip file, but not one that PyTorch wrote: those hold one pickle")
    folder = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{folder}byteorder")
    if order and read_entry(file, Entry(order.start, min(order.size, 10))) != b"little":
        raise ValueError("it was written on a machine of another byte order")
    if entries[pickles[0]].size > _LARGEST_PICKLE:
        raise ValueError("its structure is too large for a file of weights")
    data = {
        name.removeprefix(f"{folder}data/"): entry
        for name, entry in entries.items()
        if name.startswith(f"{folder}data/")
    }
    builder = _Builder(data, file_bytes)
    value = builder.build(read_entry(file, entries[pickles[0]]))
    for key, content in builder.contents.items():
        if not read_into(file, data[key].start, content):
            raise ValueError("its end is missing")
    return value


class _Builder:
    """Follows the instructions of a pickle: a stack, and a memo of what is used again.

    Containers may hold one another through the memo in any way, so nothing here walks, compares,
    hashes or copies one, but for what is paid for by `_spend`.
    """

    def __init__(self, data: Mapping[str, Entry], file_bytes: int) -> None:
        self.contents: dict[str, Tensor] = {}
        """Storages by key, to be filled"""
        self._data, self._file_bytes = data, file_bytes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps = self._tensors = self._tensor_bytes = 0
        self._makers: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_type,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
            "collections.OrderedDict": lambda: {},
            "torch.Size": lambda sizes: sizes,
            "torch.device": lambda kind, *_: kind,
            "__builtin__.set": lambda members: members,
            "builtins.set": lambda members: members,
            _PARAMETERS: lambda: {},
        }

    def build(self, text: bytes) -> Any:
        """The value. Raises ValueError."""
        try:
            for instruction, argument, _ in pickletools.genops(io.BytesIO(text)):
                self._spend(1)
                if instruction.name == "STOP":
                    return self._pop()
                self._follow(instruction.name, argument)
        except IndexError as error:
            raise ValueError("its structure is damaged: it takes what was not there") from error
        raise ValueError("its structure has no end")

    def _follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NUMBERS or name in _TEXTS:
            stack.append(_small(argument))
        elif name in _TUPLES:
            stack.append(tuple(self._pop() for _ in range(_TUPLES[name]))[::-1])
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS"):
            self._fill(name)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = self._top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise ValueError("its structure is damaged: it uses what it does not hold")
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(self._known(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            last, module = self._pop(), self._pop()
            stack.append(self._known(f"{_expect(str, module)}.{_expect(str, last)}"))
        elif name in ("REDUCE", "NEWOBJ"):
            self._make(name)
        elif name == "BUILD":
            self._set_state()
        elif name == "BINPERSID":
            stack.append(self._storage(self._pop()))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it uses {name}, which torch.save does not write")

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise ValueError("its structure is too large for a file of weights")

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise IndexError
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        self._stack.pop()
        return items[::-1]

    def _fill(self, name: str) -> None:
        pairs = name.startswith("SET")
        single = [self._pop() for _ in range(1 + pairs)][::-1] if name[-1] != "S" else None
        items = self._since_mark() if single is None else single
        target = self._top()
        if not pairs:
            _expect(list, target).extend(items)
            return
        if len(items) % 2:
            raise ValueError("its structure is damaged: a name has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if key is not None and type(key) not in (str, int, float, bool):
                raise ValueError(f"it names something by a {type(key).__name__}, a text is needed")
            _expect(dict, target)[key] = value

    def _known(self, name: str) -> _Name:
        if name not in self._makers and name not in _STORAGES and name not in _DTYPES:
            raise ValueError(f"it holds a {name[:200]}, which is no tensor and no plain container")
        return _Name(name)

    def _make(self, name: str) -> None:
        arguments, maker = _expect(tuple, self._pop()), _expect(_Name, self._pop())
        if (name == "NEWOBJ") != (maker == _PARAMETERS) or maker not in self._makers:
            raise ValueError(f"it makes a {maker} in a way that torch.save does not")
        try:
            self._stack.append(self._makers[maker](*arguments))
        except TypeError as error:  # another number of arguments
            raise ValueError(f"it makes a {maker} of something else") from error

    def _set_state(self) -> None:
        """Of an OrderedDict: attributes that PyTorch adds, left out. Of a ParameterDict: all."""
        state, target = self._pop(), _expect(dict, self._top())
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(parameters, dict):
            self._spend(len(parameters))
            target.update(parameters)

    def _storage(self, place: Any) -> _Storage:
        if not isinstance(place, tuple) or len(place) != 5 or place[0] != "storage":
            raise ValueError("it points at something that is no storage")
        _, kind, key, _device, numbers = place
        if type(kind) is not _Name or kind not in _STORAGES or type(key) is not str:
            raise ValueError("it points at a storage of no known type")
        entry = self._data.get(key)
        size = _STORAGES[kind].itemsize * _expect(int, numbers)
        if entry is None or not 0 <= size <= entry.size:
            raise ValueError(f"the storage {key[:20]} is missing or cut short")
        if key not in self.contents:
            # Its pages are not touched yet, and all storages together are no more than the file.
            self.contents[key] = torch.empty(entry.size, dtype=torch.uint8)
        return _Storage(self.contents[key][:size], _STORAGES[kind])

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: Any = None
    ) -> Tensor:
        content, own = _expect(_Storage, storage)
        dtype = dtype or own
        for sizes in (shape, strides):
            if len(_expect(tuple, sizes)) > _MOST_DIMENSIONS or len(sizes) != len(shape):
                raise ValueError("it holds a tensor with too many dimensions")
        if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
            raise ValueError("it holds a tensor whose shape is none")
        if len(rest) > 2 and rest[2]:
            raise ValueError("it holds a tensor that is conjugated or negated")
        numbers = math.prod(shape)
        if numbers * dtype.itemsize > self._file_bytes or (
            not numbers and math.prod(max(size, 1) for size in shape) > _MOST_NUMBERS
        ):
            raise ValueError(
                f"it claims a tensor of shape {shape}, more than the whole file of "
                f"{self._file_bytes} bytes can hold. It is damaged or forged"
            )
        self._tensors += 1
        self._tensor_bytes += numbers * dtype.itemsize
        if self._tensors > MOST_TENSORS or (self._tensor_bytes > _MOST_SHARING * self._file_bytes):
            raise ValueError("its tensors together are more than the file can hold")
        if not numbers:
            return torch.empty(shape, dtype=dtype)
        last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        if (last + 1) * dtype.itemsize > len(content):
            raise ValueError(f"it holds a tensor of shape {shape} that is larger than its storage")
        whole = content[: len(content) // dtype.itemsize * dtype.itemsize].view(dtype)
        view: Tensor = whole.as_strided(shape, strides, offset)
        return view

    def _tensor_of_type(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any,
        dtype: Any, *rest: Any,
    ) -> Tensor:  # fmt: skip
        known = _DTYPES.get(_expect(_Name, dtype))
        if known is None:
            raise ValueError("it holds a tensor of no known type")
        return self._tensor(storage, offset, shape, strides, grad, hooks, *rest, dtype=known)


def _small(value: Any) -> Any:
    """A number or a text of the file that is no burden: as a key, whole numbers of any size could
    be made to collide.
    """
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError("it holds a whole number of more than 64 bits")
    if isinstance(value, str):
        value.encode()  # halves of characters: a ValueError
        if len(value) > _LONGEST_TEXT:
            raise ValueError(f"it holds a text of {len(value)} characters")
    return value


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(
            f"its structure is damaged: {type(value).__name__} where {kind.__name__} is needed"
        )
    return value
