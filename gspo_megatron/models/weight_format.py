"""In which type each tensor of a model travels to the servers and lies in them.

Servers that quantise hold vLLM's own form of a checkpoint in fp8 (`quant_method: fp8`, `weight_block_size: [128, 128]`,
as Qwen3-30B-A3B-FP8): the matrices of attention, feed-forward layers and experts are bytes of e4m3 with a float32 scale
for each block. Embedding, head, norms, biases and the routers' gates keep the model's type: vllm 0.32's `Fp8Config`
quantises `LinearBase` and `RoutedExperts`, and its Qwen3-MoE gives the gate no configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.hf_table import Parameter, Piece, hf_shapes
from gspo_megatron.models.server_cuts import ServerParameter, ServerPiece
from gspo_megatron.types import ITEM_BYTES

BLOCK = 128
"""Rows and columns of a matrix that share a scale."""
BYTES, SCALES = "float8_e4m3fn", "float32"
"""Types of a quantised matrix and of its scales."""
SCALE = "_scale_inv"
"""Behind the name of a weight: its scales. The name is DeepSeek's; a value is byte times scale."""


def quantization_config() -> dict[str, Any]:
    """What `config.json` of a checkpoint in this form says, and vLLM reads."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def is_quantised(name: str) -> bool:
    """Whether servers in fp8 hold a Hugging Face tensor, or a parameter of vLLM, as bytes."""
    return name.endswith(("_proj.weight", ".w13_weight", ".w2_weight"))


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The types in which a model travels and is held."""

    dtype: str
    """Of what is not quantised, a key of `ITEM_BYTES`: `bfloat16`."""
    fp8: bool = False
    """Whether matrices are bytes with scales."""

    def dtype_of(self, name: str) -> str:
        """Type of the values of a Hugging Face tensor, or of a parameter of vLLM: `float8_e4m3fn`."""
        if name.endswith(SCALE):
            return SCALES
        return BYTES if self.fp8 and is_quantised(name) else self.dtype

    def item_bytes(self, name: str) -> int:
        """Bytes of one of its values."""
        return ITEM_BYTES[self.dtype_of(name)]

    @property
    def matrix_bytes(self) -> float:
        """Bytes of a value of a matrix that servers in fp8 hold as bytes, its share of a scale included."""
        return ITEM_BYTES[BYTES] + ITEM_BYTES[SCALES] / BLOCK**2 if self.fp8 else ITEM_BYTES[self.dtype]

    def shapes(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Name and full shape of everything that travels: the tensors of the checkpoint, and scales."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in hf_shapes(arch).items():
            found[name] = shape
            if self.fp8 and is_quantised(name):
                found[name + SCALE] = tuple(blocks(size) for size in shape)
        return found

    def held(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """What a trainer rank can send: its parameters, and scales of the blocks whose first value is in them."""
        return [*parameters, *(scales for one in parameters if self.fp8 and (scales := _scales_held(one)).pieces)]

    def wanted(self, parameters: Sequence[ServerParameter]) -> list[ServerParameter]:
        """What a server's rank takes: its parameters, each with its scales behind it.

        Raises:
            ValueError: a cut goes through a block.
        """
        return [one for parameter in parameters for one in (parameter, *self._scales(parameter))]

    def _scales(self, parameter: ServerParameter) -> Iterator[ServerParameter]:
        if self.fp8 and is_quantised(parameter.name):
            *experts, height, width = parameter.shape
            pieces = tuple(_scale_piece(parameter.name, piece) for piece in parameter.pieces)
            yield ServerParameter(parameter.name + SCALE, (*experts, blocks(height), blocks(width)), pieces)


def form_of(recipe: Recipe) -> WeightFormat:
    """The types of what the trainer of a run sends."""
    return WeightFormat(recipe.model.dtype, recipe.rollout.weight_dtype == "fp8")


def blocks(size: int) -> int:
    """Blocks of so many rows or columns; the last may be a part of one."""
    return -(-size // BLOCK)


def _scales_held(parameter: Parameter) -> Parameter:
    """Scales of a parameter's blocks. Whoever holds a block's first value sends its scale, so that one rank does."""
    pieces: list[Piece] = []
    row = width = 0
    for piece in parameter.pieces:
        if piece.columns is None or not is_quantised(piece.tensor):
            continue
        (top, bottom), (left, right) = (tuple(map(blocks, edges)) for edges in (piece.rows, piece.columns))
        if top < bottom and left < right:
            pieces.append(Piece(piece.tensor + SCALE, (top, bottom), (left, right), (row, row + bottom - top)))
            row, width = row + bottom - top, right - left
    return Parameter(parameter.name + SCALE, (row, width), tuple(pieces), parameter.expert)


def _scale_piece(name: str, piece: ServerPiece) -> ServerPiece:
    """Scales of the blocks of a piece. Raises ValueError where its borders are not those of blocks."""
    assert piece.columns is not None
    expert, row, column = piece.at
    starts = (piece.rows[0], piece.columns[0], row, column)
    if any(start % BLOCK for start in starts):
        raise ValueError(
            f"{piece.tensor} is cut at row {piece.rows[0]} and column {piece.columns[0]} for row {row} and column "
            f"{column} of {name} there, and a block of fp8 is {BLOCK} x {BLOCK}; choose a server layout whose cuts are "
            f"multiples of {BLOCK}"
        )
    edges = [(first // BLOCK, blocks(last)) for first, last in (piece.rows, piece.columns)]
    return ServerPiece(piece.tensor + SCALE, edges[0], edges[1], (expert, row // BLOCK, column // BLOCK))
