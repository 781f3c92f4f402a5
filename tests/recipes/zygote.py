"""Python processes that start with ESPnet already imported: a server that forks, and a ``python3`` for a recipe.

    python zygote.py SOCKET

The ``python3`` from :func:`write_client` sends its arguments to the server. The server forks a process that does the
same as ``python3 -m MODULE …``, with the caller's directory, environment, files and process group, so that SIGKILL to
the group ends it too. The tests run a recipe about eighty times, and each import of ESPnet would take 4 s of CPU.
Events are counted if the environment requests it (killing.py).
"""

from __future__ import annotations

import array
import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import killing

CLIENT = """#!{python} -IS
import array, json, os, socket, sys
argv = sys.argv[1:]
if argv[:1] != ["-m"]:
    os.execv({python!r}, [{python!r}, *argv])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
told = json.dumps([argv[1:], os.getcwd(), dict(os.environ), os.getpgrp()]).encode()
fds = array.array("i", [0, 1, 2])
server.sendmsg([len(told).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
server.sendall(told)
assert server.recv(1) == b"r", "the server is gone"  # the process is in this group; had a kill come, it would not start
server.sendall(b"g")
sys.exit(int(server.makefile().readline() or 1))
"""
#: Modules that the commands of a recipe import.
MODULES = ["espnet_kd.offline", "matplotlib.pyplot", "torch.utils.tensorboard", "kaldiio", "soundfile", "sentencepiece"]
MODULES += ["jiwer", "tqdm", "espnet2.bin.aggregate_stats_dirs", "espnet2.train.trainer"]


def write_client(path: Path, address: Path) -> None:
    """Write the ``python3`` that sends its arguments to the server at ``address``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    path.chmod(0o755)


def run(argv: list, cwd: str, env: dict) -> int:
    """Do the same as ``python3 -m argv…`` in ``cwd``, and return the exit code."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = cwd
    sys.argv[1:] = argv[1:]
    sys.modules.pop(argv[0], None)
    # Beginning and end are events too, so that a kill can also come between two processes, while the shell works.
    on_event = killing.watch_group()
    on_event()
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    on_event()
    return code


def serve_one(client: socket.socket) -> None:
    """Fork a process for one caller, and send it the exit code."""
    head, told_fds, *_ = client.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    fds = array.array("i", told_fds[0][2])
    size, told = int.from_bytes(head, "big"), b""
    while len(told) < size:
        part = client.recv(size - len(told))
        if not part:
            return
        told += part
    argv, cwd, env, group = json.loads(told)
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, group)
            client.sendall(b"r")
            if client.recv(1) != b"g":
                os._exit(1)
            client.close()
            for target, fd in enumerate(fds):
                os.dup2(fd, target)
                os.close(fd)
            os._exit(run(argv, cwd, env))
        finally:  # reached only if the group or the caller is gone
            os._exit(1)
    for fd in fds:
        os.close(fd)
    _, status = os.waitpid(pid, 0)
    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main(address: str) -> None:
    """Import the modules and fork for each caller, until standard input ends."""
    for name in MODULES:
        importlib.import_module(name)
    import espnet_kd.bin

    for path in Path(espnet_kd.bin.__file__).parent.glob("asr_kd_*.py"):
        importlib.import_module(f"espnet_kd.bin.{path.stem}")
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks that serve a caller
    print("ready", flush=True)
    while server in select.select([server, sys.stdin], [], [])[0]:
        client, _ = server.accept()
        if not os.fork():
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                serve_one(client)
            finally:
                os._exit(0)
        client.close()


if __name__ == "__main__":
    main(sys.argv[1])
