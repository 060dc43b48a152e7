"""transformers' OpenAI-compatible server serves these models: what its clients receive is what `generate` returns."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from printable_model import continuation, printable_model, save

TOKENS = 20
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model():
    return printable_model()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The model's folder and the URL of a process that serves it."""
    folder = save(model, tmp_path_factory.mktemp("serve") / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modeling_minrnn.serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    log = Path(folder).parent / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(url + "/health"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield folder, url
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(url):
    try:
        return urllib.request.urlopen(url).status == 200
    except urllib.error.URLError:
        return False


def test_completions_and_chats_are_those_of_generate_streamed_or_not(server, model):
    folder, url = server
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    settings = {"model": folder, "max_tokens": TOKENS, "temperature": 0}

    expected = continuation(model, "def main", TOKENS)
    assert client.completions.create(prompt="def main", **settings).choices[0].text == expected
    chunks = list(client.completions.create(prompt="def main", stream=True, **settings))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert len(chunks) >= TOKENS

    expected = continuation(model, "user: hi<eos>assistant: ", TOKENS)
    answer = client.chat.completions.create(messages=MESSAGES, **settings)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    assert answer.usage.completion_tokens == TOKENS
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **settings))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert len(chunks) >= TOKENS


def test_transformers_chat_talks_to_the_server(server, model):
    folder, url = server
    command = [Path(sys.executable).parent / "transformers", "chat", folder, url]
    flags = ["do_sample=False", f"max_new_tokens={TOKENS}"]
    lines = "hi\nn\n!exit\n"  # n: no more of this answer
    # Offline the command does not reach a server on loopback either; without this it looks for updates of itself.
    settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    process = subprocess.run(
        [*command, *flags], input=lines, capture_output=True, text=True, env=os.environ | settings
    )
    assert process.returncode == 0, process.stderr
    assert continuation(model, "user: hi<eos>assistant: ", TOKENS) in process.stdout
