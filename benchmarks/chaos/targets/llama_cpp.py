"""llama.cpp's own server, from the package xllamacpp."""

from benchmarks.chaos.environments import environment
from benchmarks.chaos.models import gguf_file
from benchmarks.chaos.targets.supervised import Supervised

VERSION = "2026.10.11549"
_SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
params.n_parallel, params.n_ctx = int(sys.argv[3]), int(sys.argv[3]) * 1024
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
while True:
    time.sleep(60)
"""
_SLOTS = 16


class LlamaCpp(Supervised):
    """SmolLM2-135M-Instruct in Q4_1, as its GGUF file has it; one process."""

    about = f"llama.cpp (xllamacpp {VERSION})"
    model = "SmolLM2-135M-Instruct, dense, Q4_1"
    setup = f"one process, {_SLOTS} slots; started again when it ends or fails three probes a second apart"

    def command(self, port: int) -> list[str]:
        """The package has the server as a class."""
        python = environment("xllamacpp", VERSION) / "bin" / "python"
        return [str(python), "-c", _SERVE, str(gguf_file()), str(port), str(_SLOTS)]
