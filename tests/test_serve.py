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
import torch
from small_models import small_model

from training.tokenizers import byte_tokenizer

TOKENS = 20
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model():
    """A model that writes printable ASCII alone, so that each token is a character."""
    model = small_model("minlstm", vocab_size=258, tie_word_embeddings=False, eos_token_id=256, seed=43)
    with torch.no_grad():
        model.lm_head.weight[:32] = 0
        model.lm_head.weight[127:256] = 0
    return model


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The model's folder and the URL of a process that serves it."""
    folder = tmp_path_factory.mktemp("serve") / "model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modeling_minrnn.serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    log = folder.parent / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(url + "/health"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield str(folder), url
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(url):
    try:
        return urllib.request.urlopen(url).status == 200
    except urllib.error.URLError:
        return False


def continuation(model, text):
    """Greedy text, by `generate` in this process."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=257)[0, ids.shape[1] :]
    text = tokenizer.decode(new)
    assert len(set(text)) > 5 and text.isprintable()
    return text


def test_completions_and_chats_are_those_of_generate_streamed_or_not(server, model):
    folder, url = server
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    settings = {"model": folder, "max_tokens": TOKENS, "temperature": 0}

    expected = continuation(model, "def main")
    assert client.completions.create(prompt="def main", **settings).choices[0].text == expected
    chunks = list(client.completions.create(prompt="def main", stream=True, **settings))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert len(chunks) >= TOKENS

    expected = continuation(model, "user: hi<eos>assistant: ")
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
    assert continuation(model, "user: hi<eos>assistant: ") in process.stdout
