"""Runs the command line in new processes, forked so that none has to import torch.

Reads lines of JSON: {"args": [...], "folder": working directory, "output": file for stdout and stderr}. Answers each
with two lines: the process id at once, and the exit status, or minus the signal that ended it, at the end.
"""

import importlib
import json
import os
import signal
import sys

import torch

from unite_fast.cli import main

for name in (
    "matplotlib.figure",
    "sklearn.model_selection",
    "unite_fast.sampling.pipeline",
    "unite_fast.training.trainer",
):
    importlib.import_module(name)
torch.set_num_threads(1)  # a fork would wait forever for the threads of a pool, which it does not inherit
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent of the tests may ignore it
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(request["folder"])
        sys.argv = ["unite-fast", *request["args"]]
        main()
        sys.exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
