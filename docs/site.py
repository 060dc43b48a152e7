"""The site of `make docs`: its files are those of the repository, at the same paths, so that a link holds in both."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
PATTERNS = (
    "*.md",
    "docs/*.md",
    "docs/plots/*.png",
    "configs/*/README.md",
    "model_cards/*/README.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
)


def paths() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))


def on_files(files, config):
    """An event of mkdocs: in place of the files of docs/, those at `paths` from the root, README.md the first page."""
    from mkdocs.structure.files import File, Files

    return Files([File.generated(config, path, abs_src_path=str(ROOT / path)) for path in paths()])


def on_page_markdown(markdown, **of_the_page):
    """Python-Markdown takes no second word after a fence; this one is for tests/test_readme.py."""
    return markdown.replace("```python no-run", "```python")
