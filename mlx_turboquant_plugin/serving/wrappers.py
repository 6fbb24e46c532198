"""What mlx_lm.server's functions become; all of them its own again while patches are off."""

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_lm.models.cache import LRUPromptCache

from .. import patching
from ..log import logger
from ..rules import folder_and_size
from ..settings import in_force
from . import metrics, served
from .admission import Admission, TooLarge
from .counts import Counts
from .disk_cache import SIZE, DiskCache
from .generator import BudgetedGenerator
from .memory import budget_of
from .model_name import names_of
from .prompt_store import PromptStore
from .served import Served

TOO_LARGE = 413
IGNORED = "the settings memory_budget and disk_cache are ignored"


def apply(module: ModuleType) -> None:
    """Wrap those of the server in ``module`` that the settings ask for."""
    patching.wrap(module.ResponseGenerator, "__init__", _init)
    patching.wrap(module.ResponseGenerator, "_generate", _generate)
    patching.wrap(module.ResponseGenerator, "_next_request", _next_request)
    patching.wrap(module, "BatchGenerator", _batch_generator)
    patching.wrap(module.APIHandler, "do_GET", _do_get)
    if in_force().general.memory_budget is not None:
        patching.wrap(module.ResponseGenerator, "_tokenize", _tokenize)
        patching.wrap(module.APIHandler, "_set_completion_headers", _set_completion_headers)


def _init(wrapped, instance, args, kwargs):
    provider, prompt_cache = _arguments(*args, **kwargs)
    counts, chosen = Counts(), in_force().general
    limit, disk = chosen.memory_budget, chosen.disk_cache
    if type(prompt_cache) is not LRUPromptCache:
        # Another program's, which does as it likes.
        if limit or disk:
            kind = type(prompt_cache).__name__
            logger.warning("with a prompt cache that is a %s, %s", kind, IGNORED)
        return wrapped(*args, **kwargs)
    if getattr(provider, "is_distributed", False) and (limit or disk):
        # All processes must decide alike, and each sees only its own memory and disk.
        logger.warning("with several processes, %s", IGNORED)
        limit = disk = None
    cache = None
    if disk is not None:
        folder, size = folder_and_size(disk, SIZE)
        cache = DiskCache(Path(folder).expanduser(), size, names_of(provider), counts)
    store = PromptStore.of(prompt_cache, counts, cache)
    let_in = limit and Admission(instance, store, budget_of(limit), limit, counts)
    instance.turboquant = Served(store, let_in or None, counts)
    return wrapped(*args, **kwargs)


def _arguments(model_provider: Any, prompt_cache: Any) -> tuple[Any, Any]:
    return model_provider, prompt_cache


def _admission(server: Any) -> Admission | None:
    """That of a server; None without a budget, or if it was there before compression was on."""
    return server.turboquant.admission if hasattr(server, "turboquant") else None


def _generate(wrapped, instance, args, kwargs):
    try:
        return wrapped(*args, **kwargs)
    finally:
        # As mlx-lm drops the model and its caches in the thread that has used them.
        served.leave()
        vars(instance).pop("turboquant", None)


def _next_request(wrapped, instance, args, kwargs):
    if hasattr(instance, "turboquant"):
        served.enter(instance.turboquant)
        instance.turboquant.answer()
    let_in = _admission(instance)
    if let_in is None:
        return wrapped(*args, **kwargs)
    timeout = args[0] if args else kwargs.get("timeout")
    return let_in.next_request(lambda seconds: wrapped(timeout=seconds), timeout)


def _tokenize(wrapped, instance, args, kwargs):
    let_in = _admission(instance)
    return wrapped(*args, **kwargs) if let_in is None else let_in.tokenize(wrapped, *args, **kwargs)


def _batch_generator(wrapped, instance, args, kwargs):
    here = served.current()
    if here is None:
        return wrapped(*args, **kwargs)
    made = functools.partial(BudgetedGenerator, here.admission) if here.admission else wrapped
    return here.generates_with(made(*args, **kwargs))


def _set_completion_headers(wrapped, instance, args, kwargs):
    # The server answers 404 to whatever a request raised.
    return wrapped(TOO_LARGE) if isinstance(sys.exception(), TooLarge) else wrapped(*args, **kwargs)


def _do_get(wrapped, instance, args, kwargs):
    here = getattr(instance.response_generator, "turboquant", None)
    if here is None or instance.path.partition("?")[0] != "/metrics":
        return wrapped(*args, **kwargs)
    return metrics.answer(instance, here)
