"""What the Triton kernels compile to for an NVIDIA GPU, on a machine that need not have one.

The kernels are compiled ahead of time and disassembled by the tools that the triton wheel brings. An element is one
state (b, t, d); the instructions are those of the loop over full tiles, where a program spends its time, divided by
the elements that a thread handles in one turn. tests/test_machine_code.py holds them to the limits, and
benchmarks/gpu.py prints them.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_minrnn import scan_triton
from modeling_minrnn.cells import cell_of

KERNELS = ("forward", "forward_reduce", "backward", "backward_reduce")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LIKE_PROJECTED = ("projected", "states", "d_states", "d_projected")
MASKS = ("reset_mask", "padding_mask")
INTEGERS = ("T", "length", "segments", "batch_stride", "d_batch_stride")


class Variant(NamedTuple):
    kernel: str  # of KERNELS
    cell_type: str
    dtype: str = "bf16"  # "bf16", "fp16" or "fp32"
    masks: tuple[str, ...] = ()  # of MASKS
    D: int = 1024
    target: int = 90  # compute capability


# At most so many instructions an element, in the plain variant. A Hopper multiprocessor starts 128 a clock: 132 of
# them, at 1.7 GHz and at 28 instructions, pass 6.1 TB/s of minGRU's 6 bytes, more than the memory delivers.
LIMITS = {
    ("forward", "mingru"): 28.0,
    ("forward", "minlstm"): 41.0,
    ("backward", "mingru"): 45.0,
    ("backward", "minlstm"): 66.0,
}


class MachineCode(NamedTuple):
    registers: int  # of a thread
    stack_bytes: int  # of a thread; above 0, registers are spilled to memory
    instructions_per_element: float
    special_per_element: float  # of them exponentials and reciprocals, which run at an eighth of the rate


def compile_variant(variant: Variant) -> MachineCode:
    """Compile for an NVIDIA GPU of compute capability `target` and read the machine code."""
    direction, _, is_reduce = variant.kernel.partition("_")
    kernel = scan_triton.reduce_kernel if is_reduce else getattr(scan_triton, f"{direction}_kernel")
    tiles = scan_triton.FORWARD_TILES if direction == "forward" else scan_triton.BACKWARD_TILES
    W, U, BD, warps = scan_triton.choose_tile(tiles, variant.D, plain=not variant.masks)
    width = sum(cell_of(variant.cell_type).blocks(variant.D))
    constants = dict(D=variant.D, stride=width, d_stride=variant.D, CELL=scan_triton.CELLS[variant.cell_type])
    constants |= dict(NVIDIA=True, W=W, U=U, BD=BD) | {mask: None for mask in MASKS if mask not in variant.masks}
    if direction == "forward":
        constants["d_states"] = None
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = {
                **dict.fromkeys(LIKE_PROJECTED, f"*{variant.dtype}"),
                **dict.fromkeys(MASKS, "*u8"),
            }.get(name, "*fp32")
        if signature[name].startswith("*") or name.endswith("batch_stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {k: v for k, v in constants.items() if k in kernel.arg_names}, attributes)
    options = scan_triton.compile_options(warps, nvidia=True)
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _run("cuobjdump", "-res-usage", file.name)
        assembly = _run("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", resources).groups())
    loop = max(_loops(assembly), key=lambda body: sum("MUFU" in instruction for instruction in body))
    elements = W * U * BD / (32 * warps)
    special = sum("MUFU" in instruction for instruction in loop)
    return MachineCode(registers, stack, len(loop) / elements, special / elements)


def _run(tool: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _loops(assembly: str) -> list[list[str]]:
    """The instructions of each loop: from a label to a branch back to it."""
    labels, instructions, loops = {}, [], []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            branch = re.search(r"\bBRA\b.*(\.L_x_\d+)", instruction[1])
            if branch and branch[1] in labels:
                loops.append(instructions[labels[branch[1]] :])
    return loops
