"""examples/quickstart.ipynb runs from its first cell to its last, without the network, and shows what it says."""

import json
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_the_notebook_runs_and_is_kept_without_outputs(monkeypatch, capsys):
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    monkeypatch.chdir(ROOT / "examples")  # where a notebook is run
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    for learned in (names["losses"], names["errors"]):
        assert learned[-1] < 0.6 * learned[0]
    # In float32, of logits up to 10 and of states up to 3.
    torch.testing.assert_close(names["in_parts"], names["whole"], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack(names["steps"], 1), names["output"], rtol=0, atol=1e-5)
    torch.testing.assert_close(names["alone"], names["reset"][:, 60:], rtol=0, atol=1e-5)
    assert "\n    def " in capsys.readouterr().out
