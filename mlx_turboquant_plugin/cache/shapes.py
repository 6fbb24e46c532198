"""What keys and values must look like to be appended to a cache."""

from typing import Optional, Tuple

from ..codecs.kv_codec import CodecSpec

Shape = Tuple[int, ...]


def check_shapes(keys: Shape, values: Shape, spec: CodecSpec, held: Optional[Shape]) -> None:
    """Raise ValueError unless keys and values of these shapes fit.

    Args:
        held: (B, H) of what the cache holds, or None if it is empty.
    """
    dims = spec.head_dim, spec.value_dim
    fits = len(keys) == 4 and keys[:-1] == values[:-1] and (keys[-1], values[-1]) == dims
    if not fits or (held is not None and keys[:2] != held):
        batch, heads = held or ("B", "H")
        raise ValueError(
            f"keys {keys} and values {values} do not fit this cache: it takes "
            f"({batch}, {heads}, N, {dims[0]}) and ({batch}, {heads}, N, {dims[1]})"
        )


def check_rows(keys: Shape, values: Shape, rows: int) -> None:
    """Raise ValueError unless keys and values of these shapes have ``rows`` rows."""
    if keys[:1] != (rows,) or keys[:-1] != values[:-1]:
        raise ValueError(
            f"keys {keys} and values {values} do not fit this cache: it takes ({rows}, H, N, D)"
        )
