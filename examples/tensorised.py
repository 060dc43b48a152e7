"""The projection of each layer as one tensor train:  python -m examples.tensorised [--seeds 3] [--steps 600]

in_proj holds the matrices of gate and candidate. Here they are one chain of small cores, multiplied along their ranks:

    W[o1 o2 o3, i1 i2 i3] = sum over r1, r2 of  G1[1, o1, i1, r1] G2[r1, o2, i2, r2] G3[r2, o3, i3, 1]

where o1 o2 o3 are the digits of a row's number and i1 i2 i3 those of a column's. All matrices of a cell in one train:
that is "A Fully Tensorized Recurrent Neural Network" (arXiv 2010.04196). The script shows that the layer gives the
product with that matrix, which it never forms, and how well a model of such layers learns beside a narrower one with
dense matrices and as many parameters. The task needs memory: to repeat four symbols that stood among blanks.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM

RANK, SYMBOLS, COPIED, LENGTH = 8, 8, 4, 20  # tokens: 0 is a blank, 1 asks for the next symbol, the others are symbols


class TensorTrainLinear(nn.Module):
    """x (..., prod(inputs)) -> W x (..., prod(outputs)); outputs and inputs: as many digits each; rank: r1 = r2."""

    def __init__(self, outputs: tuple[int, ...], inputs: tuple[int, ...], rank: int):
        super().__init__()
        ranks = [1] + [rank] * (len(inputs) - 1) + [1]
        # An entry is a sum of rank ** (cores - 1) products of one number a core. Its variance is to be 1 / inputs.
        std = (math.prod(inputs) * rank ** (len(inputs) - 1)) ** (-0.5 / len(inputs))
        shapes = zip(ranks, outputs, inputs, ranks[1:])
        self.cores = nn.ParameterList(torch.randn(shape) * std for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        *batch, left = x.shape
        x = x.reshape(-1, left).T  # tokens last, so that each product is a wide one
        for core in reversed(self.cores):
            left //= core.shape[2]
            # (input digits to come, this one with the rank, output digits so far with the tokens)
            x = x.reshape(left, core.shape[2] * core.shape[3], -1)
            x = torch.bmm(core.flatten(2).flatten(0, 1).expand(left, -1, -1), x)
        return x.reshape(-1, math.prod(batch)).T.reshape(*batch, -1)

    def dense(self) -> Tensor:
        """W (outputs, inputs), from the cores alone."""
        matrix = self.cores[0].new_ones(1, 1, 1)
        for core in self.cores:
            matrix = torch.einsum("pqr,rois->poqis", matrix, core).flatten(0, 1).flatten(1, 2)
        return matrix[..., 0]


def tensor_train_model(rank: int) -> MinRNNForCausalLM:
    """A model of width 64 = 4 * 4 * 4, in_proj of each layer to 2 D = 8 * 4 * 4; the first digit chooses the gate."""
    model = dense_model(64)
    for layer in model.model.layers:
        layer.rnn.in_proj = TensorTrainLinear((8, 4, 4), (4, 4, 4), rank)
    return model


def dense_model(hidden_size: int) -> MinRNNForCausalLM:
    sizes = {"vocab_size": SYMBOLS + 2, "hidden_size": hidden_size, "num_hidden_layers": 2, "intermediate_size": 0}
    return MinRNNForCausalLM(MinRNNConfig(**sizes, tie_word_embeddings=False))


def make_batch(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts (number, LENGTH + COPIED) and the symbols (number, COPIED) to say at their last tokens."""
    symbols = torch.randint(2, SYMBOLS + 2, (number, COPIED), generator=generator)
    places = torch.rand(number, LENGTH, generator=generator).argsort(-1)[:, :COPIED].sort(-1).values
    texts = torch.zeros(number, LENGTH, dtype=torch.long).scatter(1, places, symbols)
    return torch.cat([texts, torch.ones_like(symbols)], 1), symbols


def train(model: MinRNNForCausalLM, steps: int, generator: torch.Generator) -> float:
    """The share of symbols that the model repeats rightly after so many steps, each on new texts."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, max(steps, 2))
    for _ in range(steps):
        texts, symbols = make_batch(32, generator)
        logits = model(texts, logits_to_keep=COPIED).logits
        F.cross_entropy(logits.flatten(0, 1), symbols.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    texts, symbols = make_batch(1000, generator)
    with torch.no_grad():
        return (model(texts, logits_to_keep=COPIED).logits.argmax(-1) == symbols).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train layers whose in_proj is a tensor train.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    model, x = tensor_train_model(RANK), torch.randn(100, 64)
    layer, size = model.model.layers[0].rnn.in_proj, model.num_parameters()
    print(f"output beside that of the dense product: {(layer(x) - x @ layer.dense().T).abs().max():.1e} at most apart")
    width = min(range(1, 129), key=lambda width: abs(dense_model(width).num_parameters() - size))
    for name, build, number in (("tensor train", tensor_train_model, RANK), ("dense", dense_model, width)):
        print(f"{name}, {build(number).num_parameters()} parameters, symbols repeated rightly:", end="")
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            accuracy = train(build(number), options.steps, torch.Generator().manual_seed(seed))
            print(f" {accuracy:.1%}", end="\n" if seed == options.seeds - 1 else ",", flush=True)


if __name__ == "__main__":
    main()
