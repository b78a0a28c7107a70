"""One training step as a compiled region, behind MONAI's trainer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from .compiling import compiled_or_plain, whether_to_compile


class TrainStep:
    """A step of MONAI's ``SupervisedTrainer``, as its ``iteration_update``: network and loss are compiled as one.

    On a GPU the step is hundreds of small kernels, and the host cannot launch them as fast as they run. Compiled, they
    are fused and replayed as CUDA graphs. Crops, masks and noise are drawn before, in ``prepare_batch``; gradients are
    clipped by a handler and the optimiser's step is one fused kernel. The trainer's ``inferer`` and ``loss_function``
    are not used.

    Where compiling fails the step runs as it is, and the log says why.

    Args:
        network: of the trainer.
        loss_function: ``(pred, target) -> scalar``.
        amp: run the network under bfloat16 autocast; its output is float32 again.
        compile: True, False, or "auto": on a GPU, in a single process.
        backend: of ``torch.compile``.

    Raises:
        ValueError: if ``compile`` is none of these.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_function: nn.Module,
        amp: bool = True,
        compile: bool | str = "auto",
        backend: str = "inductor",
    ) -> None:
        self.compile = whether_to_compile(compile)
        self.network, self.loss_function, self.amp, self.backend = network, loss_function, amp, backend
        self._compiled: Any = None

    @property
    def is_compiled(self) -> bool:
        """Whether the first step has compiled."""
        return self._compiled not in (None, self.loss)

    def loss(self, inputs: Tensor, targets: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The loss of a batch, a scalar."""
        autocast = torch.autocast(inputs.device.type, dtype=torch.bfloat16) if self.amp else nullcontext()
        with autocast:
            pred = self.network(inputs, *args, **kwargs)
        return self.loss_function(pred.float(), targets).mean()

    def __call__(self, engine: Engine, batchdata: Mapping[str, Any]) -> dict[str, Tensor]:
        """One step; the engine's output is the loss alone."""
        batch = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        inputs, targets, args, kwargs = (*batch, (), {})[:4] if len(batch) == 2 else batch
        inputs, targets = _plain(inputs), _plain(targets)
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=engine.optim_set_to_none)
        loss = self.backward(inputs, targets, args, kwargs)
        engine.state.output = {"loss": loss}
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        engine.optimizer.step()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def backward(self, *batch) -> Tensor:
        """Gradients of the parameters, and the loss without them."""
        if self._compiled is None:
            several = isinstance(self.network, nn.parallel.DistributedDataParallel)  # one may fail, others not
            on_one_gpu = batch[0].device.type == "cuda" and not several
            wanted = on_one_gpu if self.compile == "auto" else self.compile
            self._compiled = self._first(batch) if wanted else self.loss
        if self.is_compiled:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self._compiled(*batch)
        loss.backward()
        return loss.detach().clone()  # the next replay writes over a graph's own output

    def _first(self, batch: tuple) -> Any:
        """The compiled loss, tried once; or the plain one where that fails."""
        # with several processes the gradients' exchange breaks the graph, so kernels are fused only
        several = isinstance(self.network, nn.parallel.DistributedDataParallel)
        graphs = {"mode": "reduce-overhead"} if self.backend == "inductor" and not several else {}
        compiled = compiled_or_plain(
            self.loss, lambda loss: loss(*batch).backward(), "the training step", {"backend": self.backend, **graphs}
        )
        for parameter in self.network.parameters():
            if parameter.requires_grad:
                parameter.grad = None
        return compiled


def _plain(value: Any) -> Any:
    """Tensors without MONAI's metadata, which a compiler cannot follow."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return value.as_tensor() if isinstance(value, MetaTensor) else value
