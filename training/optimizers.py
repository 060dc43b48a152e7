"""What steps the parameters: AdamW, or Muon for the hidden matrices with AdamW for the rest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from .config import TrainConfig


def make_optimizer(model: nn.Module, train: TrainConfig) -> Optimizer:
    """The optimizer that train.optimizer names. Each of its groups has its highest learning rate as "initial_lr"."""
    return optimizer_of(parameter_groups(model, train.weight_decay), hidden_matrices(model), train)


def optimizer_of(groups: list[dict[str, Any]], matrices: set[nn.Parameter], train: TrainConfig) -> Optimizer:
    """The same for groups of parameters, of which `matrices` are Muon's."""
    others = [group | {"lr": train.learning_rate, "initial_lr": train.learning_rate} for group in groups]
    if train.optimizer == "adamw":
        return AdamW(others, betas=train.betas, fused=True)
    rate = train.muon_learning_rate
    hidden = [group | {"lr": rate, "initial_lr": rate} for group in groups]
    for groups, wanted in ((hidden, True), (others, False)):
        for group in groups:
            group["params"] = [p for p in group["params"] if (p in matrices) == wanted]
    return MuonAndAdamW(
        Muon([group for group in hidden if group["params"]]),
        AdamW([group for group in others if group["params"]], betas=train.betas, fused=True),
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for the matrices of linear layers, save the gate and candidate projection `in_proj`.

    None for norms, biases, convolutions, initial states and embeddings, thus none for an output tied to these.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("in_proj")
    }
    decayed = linear - embeddings
    return [
        {"params": [p for p in model.parameters() if p in decayed], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p not in decayed], "weight_decay": 0.0},
    ]


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The matrices of the linear layers, save the output layer: what maps one hidden vector to another."""
    return {
        module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


class MuonAndAdamW(Optimizer):
    """Two optimizers with one list of groups and one state, as a checkpoint, a schedule and accelerate expect it."""

    def __init__(self, muon: Muon, adamw: AdamW):
        self.muon, self.adamw = muon, adamw
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self.share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # by load_state_dict: with other groups and another state
        self.share()

    def share(self) -> None:
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss
