"""What train.py needs and a first reader may skip: settings, data, tokenizers, checkpoints, reports."""

import logging

# transformers imports torchao where it is installed, which warns of kernels for other devices and of how it is made.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
