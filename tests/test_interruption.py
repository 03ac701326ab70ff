"""A Ctrl-C that arrives while Python runs a __del__ interrupts the command all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
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


@pytest.mark.parametrize("number", ["signal.SIGINT", "signal.SIGTERM"])
def test_an_interruption_inside_del_is_not_lost(number):
    command = [sys.executable, "-c", SCRIPT.format(number=number)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr == "nirvana info: interrupted; nothing was written\n"
