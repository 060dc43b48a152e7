"""Whatever a process first does with the kernels, it computes what it would compute later."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

ROOT = Path(__file__).parent.parent


def forward(model, ids):
    return model(ids, use_cache=False).logits


def exported(model, ids):
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False})
    return program.module()(input_ids=ids, use_cache=False).logits


def decomposed(model, ids):
    """As for ONNX."""
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}).run_decompositions()
    return program.module()(input_ids=ids, use_cache=False).logits


def compiled(model, ids):
    return torch.compile(model, backend="aot_eager", fullgraph=True)(ids, use_cache=False).logits


def by_vmap(model, ids):
    with torch.no_grad():
        return torch.func.vmap(lambda ids: forward(model, ids[None])[0])(ids)


def by_fake_tensors(model, ids):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert forward(model, mode.from_tensor(ids)).shape == (2, 9, 37)
    return forward(model, ids)


def by_functions(model, ids):
    """A traced graph, of the operators alone."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(lambda ids: forward(model, ids), tracing_mode="fake", _allow_non_fake_inputs=True)(ids)(ids)


def by_forward_mode(model, ids):
    weights = {name: x.detach() for name, x in model.named_parameters()}
    return torch.func.jvp(
        lambda weights: torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits,
        (weights,), (weights,),
    )[0]  # fmt: skip


def differentiated(model, ids):
    logits = forward(model, ids)
    logits.sum().backward()
    return logits


FIRST_USES = {
    use.__name__: (use, "auto")
    for use in (decomposed, compiled, by_vmap, by_fake_tensors, by_functions, by_forward_mode, differentiated)
} | {f"exported from {backend}": (exported, backend) for backend in ("auto", "numba")}
FIRST_USES["differentiated by torch"] = differentiated, "torch"


def use_first(name):
    """Whether it went as it should, without loading the kernels of a GPU; or what was raised."""
    from small_models import random_ids, small_model

    use, backend = FIRST_USES[name]
    model, ids = small_model(["mingru", "aaren"], hidden_size=8, num_heads=2, scan_backend=backend), random_ids(2, 9)
    assert "numba" not in sys.modules
    try:
        actual = use(model, ids)
        torch.testing.assert_close(actual, forward(model, ids), rtol=1e-5, atol=1e-5)
    except Exception as error:
        return repr(error)
    if "modeling_minrnn.scan_triton" in sys.modules:
        return "with the kernels of a GPU"
    has_kernels = "modeling_minrnn.scan_numba" in sys.modules
    return "right" if has_kernels == (backend != "torch") else "without the kernels of its backend"


def main():
    """Each use in a child of one process that has imported the package, and has not used it."""
    import modeling_minrnn  # noqa: F401

    for name in FIRST_USES:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(json.dumps([name, use_first(name)]), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


def test_a_first_use_is_right():
    code = "import test_first_use; test_first_use.main()"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr
    results = dict(json.loads(line) for line in output.stdout.splitlines() if line.startswith("["))
    assert results == dict.fromkeys(FIRST_USES, "right")
