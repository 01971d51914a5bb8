"""Models that do not fit on one device: weights, gradients and moments divided over the processes of a run (FSDP2,
docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html; the idea is ZeRO's, arXiv:1910.02054).

What leaves a sharded run is whole: its checkpoints are those of any other, and are read and resumed like them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from tinygpt.config import TrainConfig, UserError
from tinygpt.model import GPT

TARGET = "tinygpt.sharding.FSDP2"


def is_sharded(trainer: Mapping[str, Any]) -> bool:
    strategy = trainer.get("strategy")
    return isinstance(strategy, dict) and strategy.get("_target_") == TARGET


def check_sharding(config: TrainConfig) -> None:
    """UserError for what needs the whole of a weight where each process has a part, or is not known to work."""
    if str(config.trainer.get("strategy")).startswith("fsdp"):
        raise UserError(f"trainer.strategy={config.trainer['strategy']} is an older FSDP", "use trainer=fsdp")
    if not is_sharded(config.trainer):
        return
    if config.optimizer.name == "muon":
        raise UserError(
            "optimizer=muon cannot train a sharded model: it orthogonalises whole matrices",
            "use optimizer=adamw, or trainer=ddp",
        )
    if config.compile:
        raise UserError("compile=true is not known to work with trainer=fsdp", "use compile=false")
    if any(isinstance(node, dict) and node.get("_target_") == "tinygpt.callbacks.EMA" for node in config.callbacks.values()):
        raise UserError("callbacks=ema cannot average a sharded model", "leave it out, or use trainer=ddp")
    if config.trainer.get("precision") in ("16-mixed", 16, "16"):
        raise UserError("trainer.precision=16-mixed cannot scale the gradients of a sharded model", "use bf16-mixed")


def shard(model: GPT, mesh: Any) -> None:
    """Divide the weights of `model` over the devices of `mesh`. Each block's are gathered when it is their turn."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the head needs the embedding next
    register_fsdp_forward_method(model, "features")  # which is what we call, not forward


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy with all devices in one dimension, and with the checkpoints of an undivided model."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert isinstance(self.model, torch.nn.Module)
        parts = self.model.state_dict(keep_vars=True)
        whole = {id(part): self.whole(part) for part in parts.values()}  # once each: a tied one has two names
        return {name: whole[id(part)] for name, part in parts.items() if self.is_global_zero}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        moments = {i: {k: self.whole(v) for k, v in values.items()} for i, values in state["state"].items()}
        return {**state, "state": moments}

    def whole(self, value: Any) -> Any:
        """A tensor from its parts, on the CPU of the first process; None on the others. All must ask for it."""
        if not isinstance(value, Tensor):
            return value
        found = value.detach()
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        return found.cpu() if self.is_global_zero else None

    @torch.no_grad()
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        assert isinstance(self.model, torch.nn.Module)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(part_of(checkpoint["state_dict"][name], parameter))
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                i: {k: part_of(v, parameters[i]) if v.dim() else v for k, v in values.items()}
                for i, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": moments})
        return checkpoint


def part_of(whole: Tensor, parameter: Any) -> Tensor:
    """This process's part of a tensor that every process has, divided as `parameter` is."""
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
