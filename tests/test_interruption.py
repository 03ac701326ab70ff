"""A Ctrl-C that arrives where Python drops it, or C code mistakes it, interrupts the command all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

DROPPED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from nirvana import cli

class Bar:
    def __del__(self):
        signal.raise_signal({number})
        for _ in range(1000):
            pass

def run(args):
    bar = Bar()
    del bar
    time.sleep(60)
    print("not interrupted")

cli.COMMANDS["info"].run = run
sys.exit(cli.main(["info", "demo"]))
"""

MISTAKEN = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)
from nirvana import cli

class Numbers:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        signal.raise_signal({number})
        return index

def run(args):
    torch.tensor(Numbers())  # ValueError: could not determine the shape of object type 'Numbers'

cli.COMMANDS["info"].run = run
sys.exit(cli.main(["info", "demo"]))
"""


@pytest.mark.parametrize("number", ["signal.SIGINT", "signal.SIGTERM"])
@pytest.mark.parametrize("script", [DROPPED, MISTAKEN], ids=["inside __del__", "inside C code"])
def test_no_interruption_is_lost(script, number):
    command = [sys.executable, "-c", script.format(number=number)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr == "nirvana info: interrupted; nothing was written\n"
