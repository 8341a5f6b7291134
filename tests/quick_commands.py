"""`vsod` and `python` for scripts, without their imports: a server that has them forks for each.

python tests/quick_commands.py FOLDER

FOLDER/socket is where it listens, each command is a line of FOLDER/log.  FOLDER/kills, where it is
there, is JSON: the line, from 0, of a command that is killed -> after how many seconds.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

CLIENT = """#!/bin/sh
exec {python} -S -E {file} {folder} {name} "$@"
"""


def install(folder):
    """`vsod` and `python` in `folder`/bin, which ask the server of that folder."""
    (folder / "bin").mkdir()
    for name in ("vsod", "python"):
        file = folder / "bin" / name
        file.write_text(
            CLIENT.format(python=sys.executable, file=__file__, folder=folder, name=name)
        )
        file.chmod(0o755)


def ask(folder, command):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{folder}/socket")
        message = "\0".join([os.getcwd(), os.environ.get("XDG_CACHE_HOME", ""), *command])
        socket.send_fds(client, [message.encode()], [1, 2])
        sys.exit(int(client.recv(16)))


def run(message, out, err):
    """In the forked process: the command, as it would run in one of its own."""
    folder, cache, name, *arguments = message.decode().split("\0")
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(folder)
    if cache:
        os.environ["XDG_CACHE_HOME"] = cache
    try:
        if name == "vsod":
            from vsod_models.cli import main

            main(arguments)
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def serve(folder):
    import matplotlib.figure  # noqa: F401
    import tensorboard.backend.event_processing.event_accumulator  # noqa: F401

    import vsod_models.evaluation.figures
    import vsod_models.labels.coarse
    import vsod_models.networks.msst
    import vsod_models.prediction
    import vsod_models.prior.fit
    import vsod_models.training.run  # noqa: F401

    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])  # one core: no worker processes
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{folder}/early")
    server.listen()
    os.rename(f"{folder}/early", f"{folder}/socket")  # who finds it is answered
    number = 0
    while True:
        client, _ = server.accept()
        message, (out, err), _, _ = socket.recv_fds(client, 1 << 16, 2)
        with open(folder / "log", "a") as file:
            file.write(" ".join(message.decode().split("\0")[2:]) + "\n")
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = run(message, out, err)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        kills = json.loads((folder / "kills").read_text()) if (folder / "kills").exists() else {}
        if str(number) in kills:
            time.sleep(kills[str(number)])
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        number += 1
        os.close(out)
        os.close(err)
        client.sendall(str(code if code >= 0 else 128 - code).encode())
        client.close()


if __name__ == "__main__":
    if sys.argv[2:]:
        ask(sys.argv[1], sys.argv[2:])
    serve(Path(sys.argv[1]))
