"""What keys and values must look like to be appended to a cache."""

from ..codecs.kv_codec import CodecSpec

Shape = tuple[int, ...]


def check_shapes(keys: Shape, values: Shape, spec: CodecSpec, held: Shape | None) -> None:
    """Raise ValueError unless keys and values of these shapes fit.

    Args:
        held: (B, H) of what the cache holds, or None if it is empty.
    """
    tokens = (*(held or keys[:2]), *keys[2:3])
    if keys != (*tokens, spec.head_dim) or values != (*tokens, spec.value_dim):
        batch, heads = held or ("B", "H")
        raise ValueError(
            f"keys {keys} and values {values} do not fit this cache: it takes ({batch}, {heads}, "
            f"N, {spec.head_dim}) and ({batch}, {heads}, N, {spec.value_dim})"
        )


def check_rows(keys: Shape, values: Shape, rows: int) -> None:
    """Raise ValueError unless keys and values of these shapes have ``rows`` rows."""
    if keys[:1] != (rows,) or keys[:-1] != values[:-1]:
        raise ValueError(
            f"keys {keys} and values {values} do not fit this cache: it takes ({rows}, H, N, D)"
        )
