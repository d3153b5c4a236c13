"""learn-masks and finetune-pruned in several processes on the CPU (gloo), as torchrun would start them."""

import json
import os
import socket
import subprocess
import sys

# Runs several commands one after the other, so that the imports are paid for once. {rank} is filled in.
COMMANDS = """
import json, os, sys
from learner import cli
from learner.finetune import cli as finetune
from learner.run import training
training.SAVE_EVERY = 10
for command in json.loads(sys.argv[1]):
    main = finetune.main if command[0] == "finetune-pruned" else cli.main
    arguments = command[command[0] == "finetune-pruned":]
    code = main([argument.replace("{rank}", os.environ["RANK"]) for argument in arguments])
    print("exit code", code, flush=True)
"""


def in_processes(
    *commands: list, code: str = COMMANDS, timeout: float = 600, number: int = 2
) -> list[subprocess.CompletedProcess[str]]:
    """Runs commands, lists of arguments, in processes that know of each other; "finetune-pruned" may be the first.

    Args:
        code: Python that they run instead; it finds the commands as JSON in sys.argv[1].
        number: of processes, if there are to be others than two.
        timeout: seconds until they are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = json.dumps([[str(argument) for argument in command] for command in commands])
    processes = []
    for rank in range(number):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": number,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = os.environ | {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen([sys.executable, "-c", code, text], env=environment, text=True, **pipes))
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    ended = zip(processes, outputs, strict=True)
    return [subprocess.CompletedProcess([], process.returncode, *output) for process, output in ended]


def codes(process: subprocess.CompletedProcess[str]) -> list[int]:
    """Exit codes of the commands that a process has run."""
    return [int(line.split()[-1]) for line in process.stdout.splitlines() if line.startswith("exit code")]
