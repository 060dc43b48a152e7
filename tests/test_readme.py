"""The code in README.md and docs/ runs: every block that is fenced as `python` and nothing else.

The blocks of a file run in order, as one script, in a folder with model_cards/ where runs/demo is a small model.
`python no-run` is for what needs the network, and for docs/new-cell.md, which tests/test_new_cell.py runs.
"""

import re
from pathlib import Path

import pytest
from printable_model import printable_model, save

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDED = {
    "docs/fine-tuning.md": ("peft", "trl", "lm_eval", "torchao"),
    "docs/layer.md": ("minGRU_pytorch",),
    "docs/migration.md": ("minGRU_pytorch",),
}


def blocks(guide):
    return re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    save(printable_model(), folder / "runs" / "demo")
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    return folder


# Trainers ask for pinned memory, which a machine without a GPU has not.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
# PEFT and TRL know gradient checkpointing by its older name.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning")
# torch.export says so of its own tree specifications when it copies them.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("guide", [guide for guide in GUIDES if blocks(guide)], ids=lambda guide: guide.stem)
def test_the_code_of_a_guide_runs_from_top_to_bottom(guide, demo, monkeypatch):
    for package in NEEDED.get(str(guide.relative_to(ROOT)), ()):
        pytest.importorskip(package)
    monkeypatch.chdir(demo)
    exec(compile("\n".join(blocks(guide)), guide.name, "exec"), {"__name__": guide.stem})


def test_the_readme_has_four_snippets():
    assert len(blocks(ROOT / "README.md")) == 4


@pytest.mark.parametrize("guide", [*GUIDES, ROOT / "CONTRIBUTING.md"], ids=lambda guide: guide.stem)
def test_what_a_guide_points_to_is_there(guide):
    text = guide.read_text()
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", text):
        path, _, heading = link.partition("#")
        target = guide.parent / path if path else guide
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
        assert not heading or heading in anchors, link
    for path in re.findall(
        r"`((?:benchmarks|configs|docs|examples|model_cards|modeling_minrnn|tests|training)/\S*?)`", text
    ):
        assert path.endswith("NAME.yaml") or (ROOT / path).exists(), path
    for module in re.findall(r"python -m ((?:examples|modeling_minrnn|model_cards)\.\w+)", text):
        assert module == "examples.NAME" or (ROOT / f"{module.replace('.', '/')}.py").exists(), module
