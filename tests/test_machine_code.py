"""The Triton kernels compiled for NVIDIA GPUs, which takes none: every variant compiles without spilling a register,
and the plain ones within the limits of benchmarks/machine_code.py, on the installed triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is made for Linux")

ROOT = Path(__file__).parent.parent
CELLS = ["mingru", "minlstm"]
KERNELS = ["forward", "forward_reduce", "backward", "backward_reduce"]


def compile_variants(variants):
    """The machine code of each, from a process in which triton compiles, where this one interprets."""
    script = """if True:
        import json, sys
        from machine_code import Variant, compile_variant
        for variant in json.loads(sys.argv[1]):
            print(json.dumps(compile_variant(Variant(**variant))._asdict()))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:triton", "-c", script, json.dumps(variants)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.oldest
def test_the_kernels_stay_within_their_instructions_and_registers():
    from machine_code import LIMITS

    variants = [dict(kernel=kernel, cell_type=cell, target=90) for kernel in KERNELS for cell in CELLS]
    variants += [dict(kernel=kernel, cell_type="minlstm", target=80) for kernel in KERNELS]  # it takes most registers
    for variant, code in zip(variants, compile_variants(variants)):
        assert code["stack_bytes"] == 0, variant
        assert code["registers"] <= 128, variant
        limit = LIMITS.get((variant["kernel"], variant["cell_type"]), float("inf"))
        assert code["instructions_per_element"] <= limit, variant


def test_every_other_variant_compiles_without_a_spill():
    """Each dtype, each mask, and widths that no tile divides: in combinations, since each changes the loads alone."""
    choices = [
        dict(dtype="fp32"),
        dict(dtype="fp16", D=100),
        dict(dtype="bf16", masks=["reset_mask"]),
        dict(dtype="fp32", masks=["reset_mask", "padding_mask"], D=33),
    ]
    # minGRU makes the same loads with fewer registers: one choice is enough of it.
    cells = [("minlstm", choices), ("mingru", choices[-1:])]
    variants = [
        dict(kernel=kernel, cell_type=cell) | choice for kernel in KERNELS for cell, some in cells for choice in some
    ]
    for variant, code in zip(variants, compile_variants(variants)):
        assert code["stack_bytes"] == 0, variant
        assert code["registers"] <= 128, variant
