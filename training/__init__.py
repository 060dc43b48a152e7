"""What train.py needs and a first reader may skip: settings, data, tokenizers, checkpoints, reports."""
