"""Python processes that begin with ESPnet imported: a server that forks, and a ``python3`` for a recipe's PATH.

    python zygote.py SOCKET

What the ``python3`` written by :func:`write_client` is given goes to the server, which forks a process that runs it as
``python3 -m MODULE …`` would, with the caller's directory, environment, files and process group: SIGKILL to the group
ends it with the rest. A recipe is then run some eighty times without as many imports of ESPnet, 4 s of CPU each.
Events are counted where the environment asks for it (killing.py).
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
#: What the commands of a recipe import sooner or later.
MODULES = ["espnet_kd.offline", "matplotlib.pyplot", "torch.utils.tensorboard", "kaldiio", "soundfile", "sentencepiece"]
MODULES += ["jiwer", "tqdm", "espnet2.bin.aggregate_stats_dirs", "espnet2.train.trainer"]


def write_client(path: Path, address: Path) -> None:
    """Write the ``python3`` that asks the server at ``address``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    path.chmod(0o755)


def run(argv: list, cwd: str, env: dict) -> int:
    """As ``python3 -m argv…`` in ``cwd``; the exit code."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = cwd
    sys.argv[1:] = argv[1:]
    sys.modules.pop(argv[0], None)
    # Beginning and end are events too: between them and those of the process before lies what the shell does.
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
    """Fork for one caller, and tell it the exit code."""
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
        finally:  # the group is gone, or so is the caller
            os._exit(1)
    for fd in fds:
        os.close(fd)
    _, status = os.waitpid(pid, 0)
    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main(address: str) -> None:
    """Import, listen, fork; ends when its standard input does."""
    for name in MODULES:
        importlib.import_module(name)
    import espnet_kd.bin

    for path in Path(espnet_kd.bin.__file__).parent.glob("asr_kd_*.py"):
        importlib.import_module(f"espnet_kd.bin.{path.stem}")
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that serve
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
