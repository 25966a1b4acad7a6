"""In a micro-batch the host waits for no result of the device: each wait would leave the device without work."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import random_rows, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accel_llm.data.batches import collate_packed, to_device
from accel_llm.model.attention import enable_packing
from accel_llm.model.loss import attach_loss, next_token_loss

aten = torch.ops.aten
# .item(), .tolist(), float(), bool(); then what has as many results as the data says.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def refuse(*_: Any) -> Any:
    raise AssertionError("tolist waits for the device")


class NoWaits(TorchDispatchMode):
    """Refuses what makes the host wait for the device, as if the CPU were one."""

    def __enter__(self) -> Any:
        self.tolist = torch.Tensor.tolist
        torch.Tensor.tolist = refuse  # type: ignore[method-assign] # on a CPU it is no operation of its own
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.Tensor.tolist = self.tolist  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masks = packet in INDEXING and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in tree_leaves(args[1])
        )
        if packet in WAITS or masks:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wait", ["item", "tolist", "nonzero", "mask", "assignment", "bool"])
def test_the_guard_sees_a_wait(wait: str) -> None:
    values = torch.arange(4)
    actions = {
        "item": values[0].item,
        "tolist": lambda: values.tolist(),
        "nonzero": values.nonzero,
        "mask": lambda: values[values > 1],
        "assignment": lambda: values.__setitem__(values > 1, 0),
        "bool": lambda: bool((values > 1).all()),
    }
    with pytest.raises(AssertionError, match="waits for the device"), NoWaits():
        actions[wait]()


# peft 0.21.2 asks for a property that transformers 5.23 deprecates
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_no_packed_micro_batch_waits(family: str, method: str, weighted: bool, recomputed: bool) -> None:
    model: Any = tiny_model(family).train()
    attach_loss(model, 1024, label_smoothing=0.1, z_loss_coef=0.01)
    model.loss_chunks = 3
    enable_packing(model)
    if recomputed:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if method == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    rows = random_rows(4, 12)
    weights = [torch.rand(len(ids)).numpy() for ids, _ in rows] if weighted else None
    batch = to_device(collate_packed(rows, weights), torch.device("cpu"))
    with NoWaits():
        loss = next_token_loss(model, batch)
        (loss / 7).backward()
    assert float(loss.detach()) > 0 and any(parameter.grad is not None for parameter in model.parameters())
