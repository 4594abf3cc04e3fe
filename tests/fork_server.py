"""Runs the command line in real processes of its own, without waiting for each to import torch.

A line of JSON comes in: {"args": [...], "folder": where to run, "output": file for what it prints}. The answer is two
lines: the new process's id at once, its exit status (negative: the signal that ended it) when it is over.
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
torch.set_num_threads(1)  # a process forked beside the threads of a pool would wait for them for ever
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may have ignored it
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(request["folder"])
        sys.argv = ["unite-fast", *request["args"]]
        main()
        sys.exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
