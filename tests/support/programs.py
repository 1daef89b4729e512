"""Programs in processes of their own, which begin with torch imported and nothing of warpstep.

Importing torch, and what of it the first optimizer imports, takes 3 s of CPU. One process a worker
does so, and each program runs in a fork of it: the same as started anew, but for what only a new
process reads of its environment (the variables of Python, the C library and OpenMP).
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile

SERVER = """
import json, os, signal, sys
import torch, torch._dynamo
program = None
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        program = asked["program"]
        signal.alarm(120)  # the end of one that hangs
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
if program is not None:
    for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv[1:] = asked["arguments"]
    del child, line, number, path
    exec(program, {"__name__": "__main__"})
"""


@functools.cache
def server() -> subprocess.Popen:
    started = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(started.communicate)  # which closes its input: it ends
    return started


def run(program: str, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Runs a program with further arguments and variables, as ``subprocess.run`` would; without
    the variables that are None.
    """
    whole = {**os.environ, **environment}
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        asked = {
            "program": program,
            "arguments": arguments,
            "environment": {name: value for name, value in whole.items() if value is not None},
            "out": out.name,
            "err": err.name,
        }
        server().stdin.write(json.dumps(asked) + "\n")
        server().stdin.flush()
        code = int(server().stdout.readline())
        texts = (file.read().decode() for file in (out, err))
        return subprocess.CompletedProcess(program, code, *texts)
