"""States and attention of a teacher as bytes, and back.

A state is projected on the set's basis (if it has one), each coefficient is divided by its typical size, and the rest
is rounded to signed integers with one float16 scale per token. Typical sizes are fixed for the set because a few
channels of hidden states are a hundred times larger than the others: with a scale per token alone they would leave
the others two or three bits.

Shape legend: P stored positions of a chain, D channels, R coefficients (D without a basis), H heads, M keys per query.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stillroom.errors import CorruptError
from stillroom.schema.records import Float32, Int32

SCALE_BYTES = 2
MAX_STEP = float(np.finfo(np.float16).max)
WEIGHT_STEPS = 255
SHORT_CONTEXT = 1 << 16
"""Key positions of chains up to this length take two bytes, of longer ones four."""


@dataclass(frozen=True, slots=True)
class Basis:
    """x ~ c @ vectors_RD + mean_D, where c = (x - mean_D) @ encode_DR; all float32."""

    mean_D: Float32
    vectors_RD: Float32
    encode_DR: Float32


@dataclass(frozen=True, slots=True)
class VectorCodec:
    """Codes of one kind of state. `scale_R` float32: typical size of each coefficient, above 0; `bits` is 8 or 4."""

    bits: int
    scale_R: Float32
    basis: Basis | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of one state."""
        return SCALE_BYTES + -(-len(self.scale_R) * self.bits // 8)

    def encode(self, states_PD: Float32) -> bytes:
        """P states, each a float16 scale and R codes. States must be finite; what no scale reaches is cut off."""
        basis = self.basis
        coefficients_PR = states_PD if basis is None else (states_PD - basis.mean_D) @ basis.encode_DR
        relative_PR = coefficients_PR / self.scale_R
        steps = (1 << (self.bits - 1)) - 1
        # Above float16's largest number the step would be infinite, and every code 0.
        step_P = np.minimum(np.abs(relative_PR).max(axis=1) / steps, MAX_STEP).astype(np.float16)
        # A token whose coefficients are all 0 has no scale: any positive one will do.
        divisor_P1 = np.where(step_P > 0, step_P, np.float16(1)).astype(np.float32)[:, None]
        codes_PR = np.clip(np.rint(relative_PR / divisor_P1), -steps, steps).astype(np.int8)
        bytes_PB = codes_PR.view(np.uint8) if self.bits == 8 else _packed(codes_PR)
        data: bytes = np.concatenate([step_P[:, None].view(np.uint8), bytes_PB], axis=1).tobytes()
        return data

    def coefficients(self, data: bytes, num_positions: int, where: str = "") -> Float32:
        """Coefficients [P, R] float32. Raises CorruptError unless the data are those of `num_positions` states."""
        if len(data) != num_positions * self.token_bytes:
            expected = num_positions * self.token_bytes
            raise CorruptError(f"{where}: {len(data)} bytes, {expected} expected for {num_positions} positions")
        bytes_PB = np.frombuffer(data, np.uint8).reshape(num_positions, self.token_bytes)
        step_P1 = np.ascontiguousarray(bytes_PB[:, :SCALE_BYTES]).view(np.float16).astype(np.float32)
        stored_PB = np.ascontiguousarray(bytes_PB[:, SCALE_BYTES:])
        codes_PR = stored_PB.view(np.int8) if self.bits == 8 else _unpacked(stored_PB, len(self.scale_R))
        coefficients_PR: Float32 = codes_PR * (step_P1 * self.scale_R)
        return coefficients_PR

    def expand(self, coefficients_PR: Float32) -> Float32:
        """States [P, D] of coefficients."""
        if self.basis is None:
            return coefficients_PR
        states_PD: Float32 = coefficients_PR @ self.basis.vectors_RD + self.basis.mean_D
        return states_PD

    def decode(self, data: bytes, num_positions: int, where: str = "") -> Float32:
        """States [P, D] float32."""
        return self.expand(self.coefficients(data, num_positions, where))


@dataclass(frozen=True, slots=True)
class Attention:
    """The M most attended positions of each query of one head, by falling weight.

    keys_PM int32 (absolute, over prompt and completion), weights_PM float32, rest_P float32: the weight of all other
    positions, so that weights and rest sum to 1. Slots past a query's number of keys hold key 0 with weight 0.
    """

    keys_PM: Int32
    weights_PM: Float32
    rest_P: Float32


def attention_token_bytes(num_heads: int, num_keys: int, num_context: int) -> int:
    """Bytes of one position: keys, one byte per weight, one for the rest of each head."""
    return num_heads * (num_keys * (_key_bytes(num_context) + 1) + 1)


def encode_attention(keys_PHM: Int32, weights_PHM: Float32, num_context: int) -> bytes:
    """All keys, then all weights, then what is left of each query, as 8-bit square roots."""
    kind = np.uint16 if _key_bytes(num_context) == 2 else np.uint32
    rest_PH = np.clip(1.0 - weights_PHM.sum(axis=-1, dtype=np.float64), 0.0, 1.0)
    parts = (keys_PHM.astype(kind), _weight_codes(weights_PHM), _weight_codes(rest_PH))
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def decode_attention(
    data: bytes, num_positions: int, num_heads: int, num_keys: int, num_context: int, where: str = ""
) -> list[Attention]:
    """Attention of each head in stored order. Raises CorruptError if the data have another size."""
    expected = num_positions * attention_token_bytes(num_heads, num_keys, num_context)
    if len(data) != expected:
        raise CorruptError(f"{where}: {len(data)} bytes, {expected} expected for {num_positions} positions")
    kind = np.uint16 if _key_bytes(num_context) == 2 else np.uint32
    num_entries = num_positions * num_heads * num_keys
    keys_PHM = np.frombuffer(data, kind, num_entries).reshape(num_positions, num_heads, num_keys)
    if num_entries and int(keys_PHM.max()) >= num_context:
        raise CorruptError(f"{where}: a key lies outside the chain's {num_context} tokens")
    codes = np.frombuffer(data, np.uint8, offset=keys_PHM.nbytes)
    weights_PHM = _weights_of(codes[:num_entries]).reshape(keys_PHM.shape)
    rest_PH = _weights_of(codes[num_entries:]).reshape(num_positions, num_heads)
    # Rounded separately, so that they sum to 1 only after division.
    total_PH = weights_PHM.sum(axis=-1) + rest_PH
    weights_PHM, rest_PH = weights_PHM / total_PH[..., None], rest_PH / total_PH
    ids_PHM: Int32 = keys_PHM.astype(np.int32)
    return [Attention(ids_PHM[:, h], weights_PHM[:, h], rest_PH[:, h]) for h in range(num_heads)]


def _key_bytes(num_context: int) -> int:
    return 2 if num_context <= SHORT_CONTEXT else 4


def _weight_codes(weights: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    # Square roots: a weight of 0.01 is off by 4% instead of 20%.
    codes: npt.NDArray[np.uint8] = np.rint(WEIGHT_STEPS * np.sqrt(weights)).astype(np.uint8)
    return codes


def _weights_of(codes: npt.NDArray[np.uint8]) -> Float32:
    weights: Float32 = np.square(codes.astype(np.float32) / WEIGHT_STEPS)
    return weights


def _packed(codes_PR: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Two codes of 4 bits per byte, the first in the low half."""
    nibbles_PR = (codes_PR & 0xF).astype(np.uint8)
    if nibbles_PR.shape[1] % 2:
        nibbles_PR = np.pad(nibbles_PR, ((0, 0), (0, 1)))
    return (nibbles_PR[:, 0::2] | (nibbles_PR[:, 1::2] << 4)).astype(np.uint8)


def _unpacked(bytes_PB: npt.NDArray[np.uint8], num_codes: int) -> npt.NDArray[np.int8]:
    nibbles_PR = np.stack([bytes_PB & 0xF, bytes_PB >> 4], axis=-1).reshape(len(bytes_PB), -1)[:, :num_codes]
    # Shifting up and down again carries the sign bit of the nibble through the byte.
    return (nibbles_PR << 4).view(np.int8) >> 4
