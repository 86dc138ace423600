"""Runs ``python -m engine`` in processes of its own, without the seconds that importing takes.

Each line of standard input is a JSON request, each line of standard output its answer:
{"start": arguments, "environment": ..., "log": path} gives the process id of a fork that runs the
job and writes what it prints into the file; {"poll": process id} gives its exit code, negative for
the signal that killed it, or null while it runs.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[3]))

import accelerate  # noqa: E402, F401
import torch  # noqa: E402
from diffusers import AutoencoderTiny, FluxTransformer2DModel  # noqa: E402, F401
from tqdm import tqdm  # noqa: E402
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel  # noqa: E402, F401

from engine.__main__ import main  # noqa: E402
from engine.jobs import cache, generate, train  # noqa: E402, F401


def serve() -> None:
    torch.set_num_threads(1)
    exit_codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if not answer:
                run(request)
        else:
            pid = request["poll"]
            if pid not in exit_codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                exit_codes[pid] = os.waitstatus_to_exitcode(ended[1])
            answer = exit_codes.get(pid)
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


def run(request: dict[str, Any]) -> NoReturn:
    """The job, to the end of the process."""
    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    # All forks would share one, which a killed fork may hold for ever.
    tqdm.set_lock(threading.RLock())
    code = 1
    try:
        code = main(request["start"])
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # An orderly end would take two seconds, to free everything that was imported.
    os._exit(code)


if __name__ == "__main__":
    serve()
