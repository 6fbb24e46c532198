"""The memory that there is."""

import os

import mlx.core as mx

from ..rules import share_of, size_of


def memory_nbytes() -> int:
    """The bytes of the device's memory; where it has none of its own, of the machine's."""
    info = mx.device_info(mx.default_device())
    # As Metal and CUDA call it.
    known = info.get("memory_size") or info.get("total_memory")
    return int(known or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def budget_of(setting: str) -> int:
    """The bytes that the setting ``memory_budget`` means here."""
    share = share_of(setting)
    return size_of(setting) if share is None else int(share * memory_nbytes())
