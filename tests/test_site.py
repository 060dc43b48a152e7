"""The site of `make docs` has every page of the documentation and what the pages point to. Needs no mkdocs."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PATHS = runpy.run_path(str(ROOT / "docs" / "site.py"))["paths"]()
PAGES = [path for path in PATHS if path.endswith(".md")]


def entries(nav):
    for entry in nav:
        for value in entry.values():
            yield from entries(value) if isinstance(value, list) else [value]


def test_every_page_stands_in_the_navigation_once():
    assert sorted(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == PAGES
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} | {"README.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_points_to_is_part_of_the_site(page):
    for link in re.findall(r"\]\((?!https?:|#)(.*?)\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent / link.partition("#")[0]
        assert str(target.resolve().relative_to(ROOT)) in PATHS, link


def test_the_api_pages_name_what_there_is():
    modules = {path.stem for path in (ROOT / "modeling_minrnn").glob("*.py")}
    documented = re.findall(r"^::: modeling_minrnn\.(\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    import modeling_minrnn

    public = {name for name in modeling_minrnn.__all__ if callable(getattr(modeling_minrnn, name))}
    assert public - {"MinRNNPreTrainedModel"} <= set(documented)
    assert {name.partition(".")[0] for name in documented} <= public | modules
