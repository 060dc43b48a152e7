"""What train.py needs and a first reader may skip: settings, data, tokenizers, checkpoints, reports.

What torch and transformers take from the process when they are imported is set here, before.
"""

import os

from minrnn import hush_torchao

# OpenMP's threads wait for each other by spinning, for a millisecond and more. Beside a busy process on the same cores
# they wait for one that does not run, and a step takes many times as long (benchmarks/busy.py). So they soon sleep, as
# libgomp has it where it knows of more threads than cores.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "1000"
hush_torchao()
