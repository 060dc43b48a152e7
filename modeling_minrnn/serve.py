"""transformers' own OpenAI-compatible server for MinRNN models:  python -m modeling_minrnn.serve MODEL [OPTIONS]

MODEL is a folder or a repository id; the options are those of `transformers serve` (--port 8000 ...). Chat needs a
tokenizer with a chat template, completions do not. Install: `pip install 'modeling-minrnn[serving]'`. To talk to it:

    transformers chat MODEL http://localhost:8000
"""

import transformers
import typer
from transformers.cli.serve import Serve

from . import modeling_minrnn


def main() -> None:
    # The server looks an architecture up on the transformers module itself, whatever is registered with Auto classes.
    for name in modeling_minrnn.__all__:
        setattr(transformers, name, getattr(modeling_minrnn, name))
    app = typer.Typer()
    app.command()(Serve)
    app()


if __name__ == "__main__":
    main()
