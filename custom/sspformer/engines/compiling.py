"""``torch.compile`` where it works, the plain function where it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..options import flag

logger = logging.getLogger("sspformer")


def whether_to_compile(value: bool | str) -> bool | str:
    """The option ``compile``: True, False or "auto".

    Raises:
        ValueError: if it is none of these.
    """
    try:
        return "auto" if value == "auto" else flag(value)
    except ValueError:
        raise ValueError(f"compile must be true, false or auto, got {value!r}.") from None


def compiled_or_plain(
    function: Callable, try_out: Callable[[Callable], object], name: str, settings: Mapping[str, Any]
) -> Callable:
    """A compiled function, once it has been tried out; where that fails the function itself, and the log says why.

    Args:
        function: is compiled.
        try_out: calls the function that it is given.
        name: of the function, for the log.
        settings: of ``torch.compile``.

    Raises:
        torch.cuda.OutOfMemoryError: which the plain function would meet, too.
    """
    try:
        compiled = torch.compile(function, **settings)
        try_out(compiled)
        if settings.get("mode") == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
            try_out(compiled)  # records CUDA graphs
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler that is missing, of an operator that it does not know, ...
        reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
        logger.warning(f"{name} runs without torch.compile: {type(error).__name__}: {reason}")
        return function
    logger.info(f"{name} is compiled")
    return compiled
