"""The most bytes alive in a forward and backward pass, by a pass on fake tensors."""

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import models
from ..errors import UsageError
from ..modules import deterministic, logits_of


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that ops make, and the most alive at one time; ``present`` do not count."""

    def __init__(self, present: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
        self.now = self.most = 0
        self._known = {t.untyped_storage()._cdata for t in present}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Pass(nn.Module):
    """A forward and a backward pass in one call, so that layers which run again in the latter find the same tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, shape: tuple[int, ...], dtype: torch.dtype, tokens: bool) -> None:
        if tokens:
            ids = torch.zeros(shape, dtype=torch.int64)
            output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            answers, targets = logits_of(output)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        else:
            answers = logits_of(self.model(torch.empty(shape, dtype=dtype)))
            targets = torch.zeros(shape[0], dtype=torch.int64)
        F.cross_entropy(answers, targets).backward()


def peak_of_a_pass(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype,
    release_gradients: bool = False,
    tokens: bool = False,
) -> int:
    """Most bytes that inputs, activations and gradients hold at one time in a forward and backward pass.

    The model is in eval mode, as `prepare` and `forget` run it; the loss is the cross entropy of its output. The ops
    are the CPU's: autograd needs a real GPU for those of one, and they save the same (attention without its matrix).

    Args:
        tokens: the model is a causal language model, and the shape is (rows, length).

    Raises:
        UsageError: the model cannot take such a batch.
    """
    with deterministic(model), FakeTensorMode(allow_non_fake_inputs=True):

        def fake(t: Tensor) -> Tensor:
            kind = dtype if t.is_floating_point() else t.dtype
            like = torch.empty_strided(t.shape, t.stride(), dtype=kind, device="cpu")
            return like.requires_grad_(t.requires_grad)

        tensors = {n: fake(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
        if release_gradients:
            for t in tensors.values():
                if t.requires_grad:
                    t.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        try:
            with _Alive(tensors.values()) as alive, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                named = {f"model.{name}": t for name, t in tensors.items()}
                torch.func.functional_call(_Pass(model), named, (tuple(input_shape), dtype, tokens))
        except (RuntimeError, AssertionError, IndexError, ValueError) as error:
            raise UsageError(
                f"the model cannot take a batch of shape {tuple(input_shape)}: {str(error).splitlines()[0]}"
            ) from error
    return int(alive.most)


class _ValuesOnTheCpu(TorchFunctionMode):
    """Older versions of timm read a linspace, which has no values on the meta device, while they build a model."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def empty(name: str, *, num_classes: int, in_chans: int, img_size: int) -> nn.Module:
    """A model by name (see `distruction.models.create`) whose tensors have shapes and no memory."""
    with torch.device("meta"), _ValuesOnTheCpu():
        return models.create(name, num_classes=num_classes, in_chans=in_chans, img_size=img_size)
