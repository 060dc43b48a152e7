"""llama.cpp's own server, a contender of serve.py:  python benchmarks/llama_server.py FILE.gguf PORT SLOTS TOKENS

SLOTS requests at a time, each of at most TOKENS tokens; threads as OMP_NUM_THREADS says. Needs xllamacpp, which builds
that server into a Python module (`pip install '.[engines]'`).
"""

import os
import signal
import sys

import xllamacpp


def main() -> None:
    path, port, slots, tokens = sys.argv[1], *map(int, sys.argv[2:])
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port = path, port
    settings.n_parallel, settings.n_ctx, settings.n_threads_http = slots, slots * tokens, 2
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(os.environ["OMP_NUM_THREADS"])
    settings.fit_params = False
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
