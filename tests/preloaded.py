"""Imports of the process that the ranks of tests are forked from: what they need takes it seconds, once."""

import gc
import os

import torch.distributed.tensor  # noqa: F401
from transformers import Trainer  # noqa: F401

import modeling_minrnn  # noqa: F401
import train

try:
    from modeling_minrnn import decode_numba  # noqa: F401
except ImportError:
    pass

# As in conftest.py.
os.fsync = lambda descriptor: None
train.plot_loss_curve = lambda folder: None
gc.collect()
gc.freeze()
