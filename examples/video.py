"""The next frame of a video, by a convolutional minGRU:  python -m examples.video [--seed 0] [--steps 2000]

    [gate | x][t] = in_proj * frame[t]           a convolution over space, 3 x 3 pixels; so is out_proj
    h[t] = (1 - z[t]) h[t-1] + z[t] g(x[t])      the recurrence of each pixel, z = sigmoid(gate)
    output[t] = frame[t] + out_proj * h[t]

The recurrence itself does not look sideways, so its pixels are rows of a batch, and the scan over T is the one of a
text. That is what ConvS5 (arXiv 2310.19694) does with an S5 layer. Here three layers learn from clips of 12 frames:
two shapes that move diagonally, pass through each other and bounce off the walls. They are then judged on clips of 36,
where a frame counts as predicted if every pixel is right. The first four are warm-up and not judged: one alone does
not say which way a shape moves, and shapes that begin on top of each other take a few to tell apart.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_minrnn import minrnn_scan

SIZE, WARM_UP = 10, 4
SHAPES = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [1, 0]], [[0, 1], [1, 0]]]).bool()


def make_clips(number: int, frames: int, generator: torch.Generator, shapes: int = 2) -> Tensor:
    """Clips (number, frames, 1, SIZE, SIZE) of 0 and 1: shapes of 2 x 2 pixels that move by one pixel a frame."""
    span = SIZE - 2  # the positions of a corner are 0..span, and a reflected walk has the period 2 * span
    phase = torch.randint(2 * span, (number, shapes, 1, 2), generator=generator)
    position = span - ((phase + torch.arange(frames)[:, None]) % (2 * span) - span).abs()
    kinds = torch.randint(len(SHAPES), (number, shapes), generator=generator)
    clips = torch.zeros(number, frames, 1, SIZE, SIZE)
    clip, frame, channel = torch.arange(number)[:, None, None], torch.arange(frames), torch.tensor(0)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        drawn = SHAPES[kinds, row, column][:, :, None].expand(position.shape[:-1])
        where = (position + torch.tensor([row, column])).unbind(-1)
        clips[tuple(i.expand(drawn.shape)[drawn] for i in (clip, frame, channel, *where))] = 1
    return clips


class ConvMinGRU(nn.Module):
    def __init__(self, channels: int, kernel_size: int = 3):
        super().__init__()
        self.in_proj = nn.Conv2d(channels, 2 * channels, kernel_size, padding="same")
        self.out_proj = nn.Conv2d(channels, channels, kernel_size, padding="same")

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C, height, width) -> the same; state (B * height * width, C), None for zero."""
        B, T, _, height, width = x.shape
        projected = self.in_proj(x.flatten(0, 1)).unflatten(0, (B, T))
        rows = projected.permute(0, 3, 4, 1, 2).flatten(0, 2)  # (B * height * width, T, 2 C)
        states, state = minrnn_scan(rows, "mingru", state)
        states = states.unflatten(0, (B, height, width)).permute(0, 3, 4, 1, 2)
        return x + self.out_proj(states.flatten(0, 1)).unflatten(0, (B, T)), state


class VideoModel(nn.Module):
    def __init__(self, channels: int = 16, layers: int = 3):
        super().__init__()
        self.embed, self.head = nn.Conv2d(1, channels, 1), nn.Conv2d(channels, 1, 1)
        self.layers = nn.ModuleList(ConvMinGRU(channels) for _ in range(layers))

    def forward(self, frames: Tensor, states: list | None = None) -> tuple[Tensor, list[Tensor]]:
        """frames (B, T, 1, height, width) -> logits of the frame after each, and the states to continue with."""
        x, ends = self.embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]), []
        for layer, state in zip(self.layers, states or [None] * len(self.layers)):
            x, state = layer(x, state)
            x, ends = F.gelu(x), [*ends, state]
        return self.head(x.flatten(0, 1)).unflatten(0, frames.shape[:2]), ends


def train(model: VideoModel, steps: int, generator: torch.Generator, frames: int = 12) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, max(steps, 2))
    for _ in range(steps):
        clips = make_clips(8, frames, generator)
        F.binary_cross_entropy_with_logits(model(clips[:, :-1])[0], clips[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def exact(predicted: Tensor, clips: Tensor) -> float:
    """The share of frames, after the first WARM_UP of a clip, that are right in every pixel."""
    right = (predicted == clips[:, 1:].bool()).flatten(2).all(-1)
    return right[:, WARM_UP - 1 :].float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict the next frame of a video.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model, generator = VideoModel(), torch.Generator().manual_seed(options.seed)
    train(model, options.steps, generator)
    clips = make_clips(64, 36, generator)
    with torch.no_grad():
        logits, _ = model(clips[:, :-1])
        first, states = model(clips[:, :20])
        second, _ = model(clips[:, 20:-1], states)
    in_parts, copies = torch.cat([first, second], 1), clips[:, :-1] > 0
    print(f"frames predicted exactly: {exact(logits > 0, clips):.1%}; by copying the last: {exact(copies, clips):.1%}")
    pixels, difference = ((in_parts > 0) != (logits > 0)).sum(), (in_parts - logits).abs().max()
    print(f"read in two parts, {pixels} pixels differ, logits by at most {difference:.1e}")


if __name__ == "__main__":
    main()
