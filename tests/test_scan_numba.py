"""What only the "numba" backend can get wrong: threads, forks, its cache on disk, and that it may be absent."""

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import outcome, problem
from oracle import random_mask
from small_models import CELLS, GATES

from modeling_minrnn import scan_numba
from modeling_minrnn.causal_conv import causal_conv
from modeling_minrnn.cells import RGLRU, RWKV4, Aaren
from modeling_minrnn.scan import minrnn_scan

ROOT = Path(__file__).parent.parent

every_cell = pytest.mark.parametrize("cell_type", CELLS)


def forward_and_backward(cell_type, B, T=100, D=70, seed=0, dtype=torch.float32):
    """(states, final state, gradients of projected, initial_state and reset_state); dtype: that of projected."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(shape, generator=generator, requires_grad=True)
        for shape in ((B, T, GATES[cell_type] * D), (B, D), (D,))
    ]
    resets, padding = (torch.rand(B, T, generator=generator) < 0.1 for _ in range(2))
    projected, initial_state, reset_state = inputs
    projected = projected.to(dtype)
    outputs = minrnn_scan(
        projected, cell_type, initial_state,
        reset_mask=resets, padding_mask=padding, reset_state=reset_state, backend="numba",
    )  # fmt: skip
    return *outputs, *torch.autograd.grad(
        outputs, inputs, [torch.randn(y.shape, generator=generator) for y in outputs]
    )


def all_equal(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right))


# 7 rows are several groups of different sizes; less than a row at a time is still a row, or one each thread.
@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_at_once", [0.1, 1, 3, 6.9])
def test_half_precision_converted_in_groups_of_rows_is_the_same_to_the_bit(
    cell_type, dtype, rows_at_once, two_threads, monkeypatch
):
    monkeypatch.setattr(scan_numba, "CONVERTED_AT_ONCE", 2**60)
    all_at_once = forward_and_backward(cell_type, 7, dtype=dtype)
    monkeypatch.setattr(scan_numba, "CONVERTED_AT_ONCE", int(rows_at_once * 100 * 70 * GATES[cell_type]))
    assert all_equal(all_at_once, forward_and_backward(cell_type, 7, dtype=dtype))
    torch.set_num_threads(1)
    assert all_equal(all_at_once, forward_and_backward(cell_type, 7, dtype=dtype))


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


# Rows are shared out where there are at least as many as threads, columns otherwise; 3 rows are shared unevenly.
@every_cell
@pytest.mark.parametrize("B, D", [(1, 70), (1, 16), (2, 5), (3, 70)])
def test_the_number_of_threads_changes_no_bit(cell_type, B, D, two_threads):
    on_two = forward_and_backward(cell_type, B, D=D)
    torch.set_num_threads(1)
    assert all_equal(on_two, forward_and_backward(cell_type, B, D=D))


# Heads of 40 channels, which are shared out whole; of RG-LRU all channels read the same log-sum.
@pytest.mark.parametrize("cell", [Aaren(num_heads=3), RWKV4(), RGLRU()], ids=lambda cell: cell.name)
@pytest.mark.parametrize("B", [1, 3])
def test_the_number_of_threads_changes_no_bit_of_a_cell_with_log_sums(cell, B, two_threads):
    masks = {
        "reset_mask": random_mask(B, 50, seed=0, share=0.1),
        "padding_mask": random_mask(B, 50, seed=1, share=0.1),
    }

    def by_numba():
        return outcome(
            functools.partial(minrnn_scan, cell_type=cell, backend="numba"), **problem(cell, B, 50, 60), **masks
        )

    on_two = by_numba()
    torch.set_num_threads(1)
    on_one = by_numba()
    assert all(torch.equal(on_two[name], on_one[name]) for name in on_one)


@every_cell
def test_two_python_threads_can_call_at_once(cell_type, two_threads):
    seeds = range(40)
    expected = [forward_and_backward(cell_type, B=1 + seed % 3, seed=seed) for seed in seeds]
    with ThreadPoolExecutor(2) as callers:
        actual = list(callers.map(lambda seed: forward_and_backward(cell_type, B=1 + seed % 3, seed=seed), seeds))
    assert all(map(all_equal, actual, expected))


@pytest.fixture
def without_numba(monkeypatch, forgotten_backends):
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("scan_numba", "causal_conv_numba"):
        monkeypatch.delitem(sys.modules, f"modeling_minrnn.{name}", raising=False)


@pytest.mark.oldest
@pytest.mark.parametrize("T", [1, 5])
def test_asking_for_an_absent_numba_says_what_to_install(without_numba, T):
    with pytest.raises(ImportError, match='"numba" .* pip install numba'):
        minrnn_scan(torch.zeros(1, T, 4), "mingru", backend="numba")


@pytest.mark.oldest
def test_auto_is_torch_where_numba_is_absent(without_numba):
    projected = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    for auto, torch_ in zip(minrnn_scan(projected, "mingru"), minrnn_scan(projected, "mingru", backend="torch")):
        assert torch.equal(auto, torch_)


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("default_dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_changes_no_bit(cell_type, dtype, default_dtype):
    shapes = (2, 9, GATES[cell_type] * 5), (2, 5), (2, 9, 5), (5, 3), (2, 2, 5)
    generator = torch.Generator().manual_seed(0)
    projected, start, x, weight, window = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    inputs = [tensor.requires_grad_() for tensor in (projected, start.float(), x, weight, window)]

    def results():
        outputs = *minrnn_scan(*inputs[:1], cell_type, inputs[1], backend="numba"), causal_conv(*inputs[2:])
        return *outputs, *torch.autograd.grad([y.float().sum() for y in outputs], inputs)

    expected = results()
    torch.set_default_dtype(default_dtype)
    try:
        actual = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all_equal(actual, expected)


# In processes of their own


def run(script, **environment):
    """What a script prints that has this file as `t`."""
    result = subprocess.run(
        [sys.executable, "-c", f"import test_scan_numba as t, torch\n{script}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def checksum():
    """Of all results; different for a single bit in any of them."""
    results = [x.detach().numpy().tobytes() for x in forward_and_backward("minlstm", B=2)]
    return hashlib.sha256(b"".join(results)).hexdigest()


def test_kernels_are_compiled_once_and_kept_on_disk_and_outlive_a_fork():
    """What this process has compiled or read, another reads; one forked after use computes the same."""
    expected = checksum()
    for cell_type in CELLS:
        forward_and_backward(cell_type, 1)
    script = """
import os
from numba.core.ccallback import CFunc
CFunc._compile_uncached = None
print(t.checksum())
torch.set_num_threads(2)
expected = [t.forward_and_backward(c, B) for c in t.CELLS for B in (1, 3)]
child = os.fork()
if child == 0:
    import faulthandler
    faulthandler.dump_traceback_later(60, exit=True)  # a child that waits for threads it does not have
    actual = [t.forward_and_backward(c, B) for c in t.CELLS for B in (1, 3)]
    os._exit(0 if all(map(t.all_equal, actual, expected)) else 3)
assert os.waitpid(child, 0)[1] == 0
assert all(map(t.all_equal, [t.forward_and_backward(c, B) for c in t.CELLS for B in (1, 3)], expected))
"""
    assert run(script).strip() == expected


def number_of_rows(address, b_start, b_stop, d_start, d_stop):
    scan_numba.floats(address)[0] = b_stop - b_start


@pytest.fixture
def use_kernel(tmp_path, monkeypatch):
    """Compiles a kernel of a line, calls it, and lists what is then kept of it on disk."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))

    def use_kernel():
        result = torch.zeros(1)
        scan_numba.compile_kernel(scan_numba.voidptr)(number_of_rows)()(result.data_ptr(), 2, 5, 0, 1)
        assert result == 3
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}

    return use_kernel


def no_room(self, path):
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    "attribute, value", [("CacheImpl._locator_classes", []), ("IndexDataCacheFile._open_for_write", no_room)]
)
def test_without_a_place_or_room_for_kernels_they_are_compiled_in_memory(attribute, value, use_kernel, monkeypatch):
    monkeypatch.setattr(f"numba.core.caching.{attribute}", value)
    assert use_kernel() == {}


@pytest.mark.parametrize(
    "damage", [lambda file: b"", lambda file: file[: len(file) // 2], lambda file: bytes(len(file))]
)
@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
@pytest.mark.parametrize("has_room", [True, False])
def test_a_damaged_file_of_the_cache_is_replaced_once_without_a_word(kind, damage, has_room, use_kernel, monkeypatch):
    """What a crash leaves: an empty file, half of one, or zeros."""
    (damaged,) = (path for path in use_kernel() if path.suffix == kind)
    damaged.write_bytes(damage(damaged.read_bytes()))
    if not has_room:
        monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._open_for_write", no_room)
    mended = use_kernel()
    assert use_kernel() == mended and len(mended) == 2


def test_a_system_without_fork_needs_none(monkeypatch):
    monkeypatch.delattr(os, "register_at_fork")
    spec = importlib.util.find_spec("modeling_minrnn.scan_numba")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
