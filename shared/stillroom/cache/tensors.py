"""safetensors files in numpy alone: float32, float16, bfloat16 and integers. The package's own numpy interface refuses
bfloat16, in which most heads are stored.

A file is an 8-byte little-endian length, a JSON object of name -> {dtype, shape, data_offsets}, then the bytes
(https://github.com/huggingface/safetensors).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.errors import CorruptError, first_line
from stillroom.storage.paths import Location

Array = npt.NDArray[Any]
DTYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I64": np.int64, "U8": np.uint8, "BF16": np.uint16}
_NAME_OF = {np.dtype(kind): name for name, kind in DTYPES.items()}
NUM_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Size of one value of every dtype that a file may name."""
MAX_HEADER_BYTES = 100 << 20


def tensor_bytes(tensors: Mapping[str, Array]) -> bytes:
    """The whole file. A uint16 array holds the bits of bfloat16."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAME_OF[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    # Padded with spaces, so that the data begin at a multiple of 8.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join(
        [len(text).to_bytes(8, "little"), text, *(np.ascontiguousarray(one).data for one in tensors.values())]
    )


def read_tensors(path: Location) -> dict[str, Array]:
    """Every tensor of the file; bfloat16 becomes float32. Raises CorruptError if it cannot be read."""
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        # A damaged length must not be taken for a header of gigabytes.
        if not 0 < size <= min(MAX_HEADER_BYTES, len(data)):
            raise ValueError("it has no safetensors header")
        header = _checked(data[8 : 8 + size], len(data) - 8 - size)
        return {name: _tensor(data, 8 + size, entry) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is missing: restore it from a copy") from error
    except (ValueError, KeyError) as error:
        raise CorruptError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def read_header(path: Path) -> dict[str, Mapping[str, Any]]:
    """dtype, shape and offsets of every tensor by name. Raises CorruptError if the file is not safetensors."""
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            num_bytes = path.stat().st_size - 8 - size
            if not 0 < size <= MAX_HEADER_BYTES or num_bytes < 0:
                raise ValueError("it has no safetensors header")
            return _checked(stream.read(size), num_bytes)
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of float32 values that are bfloat16 already."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _checked(text: bytes, num_bytes: int) -> dict[str, Mapping[str, Any]]:
    """The entries of a header before `num_bytes` of data. Raises ValueError for one that does not describe a tensor in
    them: what reads a tensor trusts its shape and offsets.
    """
    try:
        header = json.loads(text)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        if not _is_tensor(entry, num_bytes):
            raise ValueError(f"the dtype, shape and offsets of {name!r} do not describe a tensor in the file")
    return entries


def _is_tensor(entry: Any, num_bytes: int) -> bool:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)]}:
            return (
                dtype in NUM_BITS
                and all(type(size) is int and size >= 0 for size in shape)
                and 0 <= first <= last <= num_bytes
                and 8 * (last - first) == NUM_BITS[dtype] * math.prod(shape)
            )
    return False


def _tensor(data: bytes, start: int, entry: Mapping[str, Any]) -> Array:
    first, last = entry["data_offsets"]
    kind = DTYPES[entry["dtype"]]
    values = np.frombuffer(data, kind, (last - first) // np.dtype(kind).itemsize, start + first).reshape(entry["shape"])
    if entry["dtype"] != "BF16":
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)
