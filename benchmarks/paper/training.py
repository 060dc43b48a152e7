"""How the paper's experiments train: one loop for all their models."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from training.data import IGNORED
from training.precision import SLOW_BF16, emulates_bf16

GRADIENT_NORM = 1.0


def mixed_precision() -> torch.autocast:
    """Products in bfloat16, in float32 where the CPU would emulate them; a row has which, as `bf16`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=not emulates_bf16())


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Nats per target; inputs and targets (B, T), IGNORED where there is none."""
    scored = targets != IGNORED
    with mixed_precision():
        logits = model(inputs)
    return cross_entropy(logits[scored].float(), targets[scored])


def train(
    model: nn.Module,
    batches: Iterator[Iterable[Tensor]],
    steps: int,
    optimizer: torch.optim.Optimizer | float,
    *,
    groups: list[dict[str, Any]] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    warmup: float = 0.05,
    final_rate: float = 0.1,
    loss: Callable[..., Tensor] = mean_loss,
) -> Iterator[int]:
    """Trains in place and yields the number of each step after it, so that the caller may look or stop.

    The learning rate rises over the fraction `warmup` of the steps and then goes down to `final_rate` of itself along
    a cosine; gradient norm clipped to 1; products as in `mixed_precision`.

    optimizer: with the highest learning rates; or that of AdamW.
    groups: of AdamW's parameters, with their weight decay; None: all, without.
    loss: of the model and the tensors of a batch.
    """
    if emulates_bf16():
        print(SLOW_BF16)
    parameters = list(model.parameters())
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = torch.optim.AdamW(groups or parameters, optimizer, betas=betas, weight_decay=0.0, fused=True)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(warmup * steps), steps, min_lr_rate=final_rate
    )
    for step in range(1, steps + 1):
        model.train()
        loss(model, *next(batches)).backward()
        nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step
    model.eval()
