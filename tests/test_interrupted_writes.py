"""Ctrl-C at every point of a write: the old or the new is there, nothing else is, and what is said is what is there.

No test waits for a moment: functions that the writers call are wrapped to send the signal.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import json
import opcode
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Outcome

import nirvana
from nirvana import cli as command_line
from nirvana import interruption
from nirvana.checkpoint import atomic, journal
from nirvana.checkpoint.atomic import atomic_directory, atomic_file, write_file
from nirvana.checkpoint.journal import NOTHING, goes_on_from, recorded
from nirvana.interruption import interruptions_held

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """As in a terminal, whoever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files included."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def make_old(path: Path, directory: bool) -> None:
    if not directory:
        path.write_text("old")
        return
    path.mkdir()
    for file in ("config.json", "model.safetensors"):
        (path / file).write_text("old")


# ---------------------------------------------------------------- at every bytecode


class InterruptAt:
    """A trace function that sends Ctrl-C before the n-th bytecode of the writers."""

    FILES = frozenset(module.__file__ for module in (atomic, journal, interruption, contextlib))
    #: Python looks for signals after calls and jumps, so never before these: its own books of exceptions, and "try".
    NEVER = frozenset(opcode.opmap.get(name) for name in ("PUSH_EXC_INFO", "POP_EXCEPT", "NOP", "SETUP_FINALLY"))

    def __init__(self, step: int):
        self.left = step

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in self.FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] not in self.NEVER:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self


def write_new(path: Path, directory: bool, overwrite: bool, failure: type[BaseException] | None) -> None:
    with (atomic_directory if directory else atomic_file)(path, overwrite) as partial:
        (partial / "config.json" if directory else partial).write_text("new")
        if failure is not None:
            raise failure


@pytest.mark.parametrize(
    ("directory", "overwrite", "failure"),
    [
        (True, False, None),
        (True, True, None),
        (False, False, None),
        (False, True, None),
        (True, False, ValueError),
        (True, True, KeyboardInterrupt),
        (False, False, KeyboardInterrupt),
    ],
)
def test_ctrl_c_at_every_bytecode(tmp_path, monkeypatch, directory, overwrite, failure):
    """While writing, or while cleaning up after an error or another Ctrl-C; with Python's own handler of Ctrl-C."""
    # Whether the disk has it is not asked here, and would be most of the time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    seen, step, done = set(), 0, False
    while not done:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        target = folder / ("out" if overwrite else "new/parent/out")
        if overwrite:
            make_old(target, directory)
        before = content(folder)
        at, raised = InterruptAt(step), None
        with recorded() as written:
            try:
                sys.settrace(at)
                try:
                    write_new(target, directory, overwrite, failure)
                finally:
                    sys.settrace(None)
            except (KeyboardInterrupt, ValueError) as error:
                raised = type(error)
            outcome = written.outcome()
        done = at.left > 0
        assert raised is (failure if done else KeyboardInterrupt), step
        file = target / "config.json" if directory else target
        if outcome == NOTHING:
            assert content(folder) == before, step
        else:
            assert outcome == f"{target} is complete", step
            assert file.read_text() == "new", step
            assert [path for path in target.parent.iterdir() if path != target] == [], step
            assert not directory or list(target.iterdir()) == [file], step
        seen.add(outcome == NOTHING)
        shutil.rmtree(folder)
    assert step > 300
    assert seen == ({True, False} if failure is None else {True})
    assert sys.exc_info() == (None, None, None)


def test_handlers_are_back_wherever_ctrl_c_came():
    """Or what stands in for one passes on what it hears."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    step, done = 0, False
    try:
        while not done:
            step += 1
            at, raised = InterruptAt(step), False
            try:
                sys.settrace(at)
                try:
                    with interruptions_held():
                        pass
                finally:
                    sys.settrace(None)
            except KeyboardInterrupt:
                raised = True
            done = at.left > 0
            assert raised != done, step
            signal.raise_signal(signal.SIGTERM)
            assert len(heard) == step
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert step > 50


# ---------------------------------------------------------------- in every command


Wrap = Callable[..., None]


@pytest.fixture
def send(monkeypatch) -> Wrap:
    """``send(number, module, name, when, after=False)``: the signal comes before or after the first call of a function
    of which ``when(*arguments)`` is true."""

    def wrap(number: signal.Signals, module: object, name: str, when: Callable[..., bool], after: bool = False) -> None:
        real, sent = getattr(module, name), []

        def wrapped(*arguments, **options):
            now = not sent and when(*arguments)
            if now:
                sent.append(True)
            if now and not after:
                signal.raise_signal(number)
            result = real(*arguments, **options)
            if now and after:
                signal.raise_signal(number)
            return result

        monkeypatch.setattr(module, name, wrapped)

    return wrap


def always(*arguments: object) -> bool:
    return True


def is_retired(path: object, *more: object) -> bool:
    return ".old-" in str(path)


#: Window -> function that is wrapped, which of its calls (given the target), after it, what is there.
WINDOWS = {
    "while writing": (os, "fsync", lambda target: always, False, "old"),
    "before the rename": (os, "replace", lambda target: lambda source, to: Path(to) == target, False, "new"),
    "after the rename": (os, "replace", lambda target: lambda source, to: Path(to) == target, True, "new"),
    "while printing": (builtins, "print", lambda target: lambda *words: os.path.lexists(target), False, "new"),
}
EVALUATING = {"while evaluating": (nirvana.commands.eval, "evaluate", lambda target: always, False, "new")}
#: Only folders move aside.
RETIRING = {
    "before the old moves": (os, "rename", lambda target: lambda source, to: is_retired(to), False, "new"),
    "after the old has moved": (os, "rename", lambda target: lambda source, to: is_retired(to), True, "new"),
    "while the old is removed": (shutil, "rmtree", lambda target: is_retired, False, "new"),
    "after the old is removed": (shutil, "rmtree", lambda target: is_retired, True, "new"),
}


@pytest.fixture
def commands(llama_folder, tokens_file, saliency_file, plan_file, tmp_path_factory) -> dict[str, tuple[object, ...]]:
    """Every command that writes one file or folder, without its --out."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the sea the sea " * 100)
    prune = ("prune", llama_folder, "--sparsity", 0.3, "--calibration", tokens_file)
    return {
        "prune": prune,
        "prune --evaluate": (*prune, "--evaluate", "--text", text, "--window", 32),
        "score": ("score", llama_folder, "--calibration", tokens_file),
        "plan": ("plan", llama_folder, "--saliency", saliency_file, "--sparsity", 0.3),
        "apply": ("apply", llama_folder, "--plan", plan_file),
        "gguf": ("export", llama_folder, "--format", "gguf"),
        "onnx": ("export", llama_folder, "--format", "onnx"),
    }


def in_one_line(outcome: Outcome, command: object, code: int = 130) -> str:
    assert outcome.code == code, outcome
    (line,) = outcome.stderr.splitlines()
    start = f"nirvana {command}: "
    assert line.startswith(start)
    return line.removeprefix(start)


CASES = [
    *((name, window, False, signal.SIGINT) for name in ("prune", "score", "plan", "apply") for window in WINDOWS),
    *(("apply", window, True, signal.SIGTERM) for window in {**WINDOWS, **RETIRING}),
    *(("apply", window, True, signal.SIGINT) for window in RETIRING),
    *(("plan", window, True, number) for window in WINDOWS for number in (signal.SIGINT, signal.SIGTERM)),
    *(("gguf", window, True, signal.SIGTERM) for window in WINDOWS),
    ("onnx", "after the rename", False, signal.SIGINT),
    ("prune --evaluate", "while evaluating", False, signal.SIGINT),
]


@pytest.mark.parametrize(
    ("name", "window", "overwrite", "number"),
    CASES,
    ids=[f"{n}, {w}, {'over the old' if o else 'new'}, {s.name}" for n, w, o, s in CASES],
)
def test_what_is_said_is_what_is_there(cli_here, commands, send, tmp_path, name, window, overwrite, number):
    if name == "onnx":
        pytest.importorskip("onnxscript")
    if name == "gguf":
        pytest.importorskip("gguf")
    target = tmp_path / "result"
    directory = name not in ("score", "plan", "gguf")
    if overwrite:
        make_old(target, directory)
    before = content(tmp_path)
    module, function, when, after, there = {**WINDOWS, **EVALUATING, **RETIRING}[window]
    send(number, module, function, when(target), after)
    command = commands[name]
    outcome = cli_here(*command, "--out", target, *(["--overwrite"] if overwrite else []))
    said = in_one_line(outcome, command[0])
    if there == "old":
        assert said == "interrupted; nothing was written"
        assert content(tmp_path) == before
    else:
        assert said == f"interrupted; {target} is complete"
        assert [path.name for path in tmp_path.iterdir()] == ["result"]
        assert_whole(name, target)


def assert_whole(name: str, target: Path) -> None:
    if name == "score":
        nirvana.Saliency.load(target)
    elif name == "plan":
        nirvana.PruningPlan.load(target)
    elif name == "gguf":
        from gguf import GGUFReader

        assert GGUFReader(target).tensors
    elif name == "onnx":
        assert {"model.onnx", "config.json", "tokenizer.json", "generate.py"} <= {f.name for f in target.iterdir()}
    else:
        assert nirvana.check(target, hashes=True).hashed


@pytest.mark.parametrize("name", ["atomic_directory", "_appearing"])
def test_before_the_writer_hears_that_the_body_has_ended(cli_here, commands, send, tmp_path, name):
    send(
        signal.SIGINT,
        contextlib._GeneratorContextManager,
        "__exit__",
        lambda manager, *error: manager.gen.__name__ == name,
    )
    outcome = cli_here(*commands["apply"], "--out", tmp_path / "new" / "result")
    assert in_one_line(outcome, "apply") == "interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_three_signals(cli_here, commands, send, tmp_path):
    """One while writing, one while that is cleaned up, one while it is said."""
    send(signal.SIGINT, os, "fsync", always)
    send(signal.SIGINT, shutil, "rmtree", lambda path, *more, **options: ".partial-" in str(path))
    send(signal.SIGTERM, command_line, "_refuse", always)
    target = tmp_path / "new" / "result"
    outcome = cli_here(*commands["apply"], "--out", target)
    assert in_one_line(outcome, "apply") == "interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


SELECT = ("--sparsity", 0.3, "--align", 1, "--num-examples", 4, "--seq-len", 16, "--device", "cpu", "--candidates", 3)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["first candidate", "second candidate", "picture", "result", "state"])
def test_select(cli_here, send, monkeypatch, llama_folder, tmp_path, tmp_path_factory, step, after):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(f"the number {number}" for number in range(900)))
    out, state = tmp_path / "out", tmp_path / "out.state"
    names = []

    def is_step(source: object, to: object = None) -> bool:
        names.append(Path(to).name)
        nth = {"first candidate": 1, "second candidate": 2}.get(step, 0)
        return names.count(state.name if nth else out.name) == (nth or 1)

    if step == "state":
        send(signal.SIGINT, Path, "unlink", lambda path, **options: path == state, after)
    elif step == "picture":
        from nirvana.commands import select

        send(signal.SIGINT, select, "draw", always, after)
    else:
        send(signal.SIGINT, os, "replace", is_step, after)
    command = ("select", llama_folder, *SELECT, "--calibration", text, "--out", out)
    said = in_one_line(cli_here(*command), "select")
    if step in ("result", "state"):
        assert said == f"interrupted; {out} is complete"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        nirvana.PruningPlan.load(out / "plan.json")
        return
    assert said == f"interrupted; finished candidates are kept in {state}; the same command goes on from there"
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]
    # A command that goes on, interrupted before it has written anything, still says what is there.
    monkeypatch.undo()
    if "candidate" in step:
        send(signal.SIGTERM, sys.modules["nirvana.selection.select"], "score", always)
        assert in_one_line(cli_here(*command), "select") == said
        monkeypatch.undo()
    assert cli_here(*command).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


COMPARE = ("--num-examples", 4, "--seq-len", 16, "--window", 24, "--windows", 5, "--align", 4, "--device", "cpu")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["compare.json", "saliency-random.safetensors", "compare.md"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "over the old"])
def test_compare(cli_here, send, monkeypatch, llama_folder, tmp_path, tmp_path_factory, name, after, overwrite):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(f"the number {number}" for number in range(200)))
    command = ["compare", llama_folder, *COMPARE, "--calibration", text, "--text", f"count={text}"]
    command += ["--sparsity", ".3", "--scope", "mlp", "--out", tmp_path / "out"]
    if overwrite:
        assert cli_here(*command, "--criteria", "magnitude").code == 0
    command += ["--criteria", "random", "--align", 8, *(["--overwrite"] if overwrite else [])]
    send(signal.SIGINT, os, "replace", lambda source, to: Path(to).name == name, after)
    said = in_one_line(cli_here(*command), "compare")
    file = tmp_path / "out" / "compare.json"
    document = json.loads(file.read_text())
    assert document["settings"]["align"] == 8
    again = "the same command without --overwrite" if overwrite else "the same command"
    assert said == f"interrupted; {len(document['rows'])} finished rows are in {file}; {again} goes on from there"
    assert len(document["rows"]) == (1 if name == "compare.md" else 0)
    assert hidden(tmp_path) == []
    assert not (file.parent / "saliency-magnitude.safetensors").exists()
    monkeypatch.undo()
    outcome = cli_here(*[part for part in command if part != "--overwrite"], "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.stdout)["resumed"] == len(document["rows"])


def test_compare_keeps_the_old_until_there_is_something_new(cli_here, send, llama_folder, tmp_path, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(f"the number {number}" for number in range(200)))
    command = ["compare", llama_folder, *COMPARE, "--calibration", text, "--text", f"count={text}"]
    command += ["--criteria", "magnitude", "--sparsity", ".3", "--scope", "mlp", "--out", tmp_path / "out"]
    assert cli_here(*command).code == 0
    before = content(tmp_path)
    send(signal.SIGTERM, os, "fsync", always)
    said = in_one_line(cli_here(*command, "--overwrite"), "compare")
    # The write of a few kilobytes and the removal of what it replaces are one step.
    assert said.startswith("interrupted; 0 finished rows are in")
    assert content(tmp_path) != before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["kl.json", "kl.png"])
def test_bench(cli_here, send, tmp_path, name, after):
    """Two files, one after the other."""
    pytest.importorskip("matplotlib")
    (tmp_path / "kl.json").write_text("old")
    (tmp_path / "kl.png").write_text("old")
    if after:
        send(signal.SIGINT, os, "replace", lambda source, to: Path(to).name == name, after)
    else:
        send(signal.SIGINT, Path, "write_bytes", lambda path, content: f".{name}.partial-" in path.name)
    said = in_one_line(cli_here("bench", "kl", "--quick", "--device", "cpu", "--out", tmp_path, "--plots"), "bench")
    complete = {"kl.json": ["kl.json"][: int(after)], "kl.png": ["kl.json", "kl.png"][: 1 + after]}[name]
    words = "; ".join(f"{tmp_path / file} is complete" for file in complete) or "nothing was written"
    assert said == f"interrupted; {words}"
    assert [file for file in ("kl.json", "kl.png") if (tmp_path / file).read_bytes() != b"old"] == complete
    assert hidden(tmp_path) == []


# ---------------------------------------------------------------- errors in the same windows


def failing(monkeypatch, module: object, name: str, when: Callable[..., bool], times: int = 1) -> None:
    """No disk fails on demand, so the call that asks it does."""
    real, left = getattr(module, name), [times]

    def fails(*arguments, **options):
        if left[0] and when(*arguments):
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, fails)


def test_an_old_checkpoint_that_cannot_be_removed(cli_here, commands, monkeypatch, tmp_path):
    target = tmp_path / "result"
    make_old(target, directory=True)
    failing(monkeypatch, os, "unlink", lambda name: name == "model.safetensors", times=9)
    said = in_one_line(cli_here(*commands["apply"], "--out", target, "--overwrite"), "apply", code=2)
    (left,) = hidden(tmp_path)
    assert said == f"cannot remove {left}, the old result: Input/output error; {target} is complete"
    assert_whole("apply", target)


def test_a_failing_rename_brings_the_old_one_back(cli_here, commands, monkeypatch, tmp_path):
    target = tmp_path / "result"
    make_old(target, directory=True)
    before = content(tmp_path)
    failing(monkeypatch, os, "replace", lambda source, to: Path(to) == target)
    said = in_one_line(cli_here(*commands["apply"], "--out", target, "--overwrite"), "apply", code=2)
    assert said == f"cannot write {target}: Input/output error; nothing was written"
    assert content(tmp_path) == before


def test_an_old_checkpoint_that_cannot_come_back(cli_here, commands, monkeypatch, tmp_path):
    """It is not removed, and the message says where it is."""
    target = tmp_path / "result"
    make_old(target, directory=True)
    failing(monkeypatch, os, "replace", lambda source, to: Path(to) == target)
    failing(monkeypatch, os, "rename", lambda source, to: Path(to) == target, times=9)
    said = in_one_line(cli_here(*commands["apply"], "--out", target, "--overwrite"), "apply", code=2)
    (left,) = tmp_path.iterdir()
    assert said == f"cannot write {target}, and the old one is now {left}: Input/output error; nothing was written"
    assert (left / "model.safetensors").read_text() == "old"


def test_an_error_after_the_rename(monkeypatch, tmp_path):
    """As a file server may answer when it is asked again what it has done already."""
    real = os.replace

    def replace(source, to):
        real(source, to)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "replace", replace)
    says = f"^after writing {tmp_path}/plan.json: No such file or directory; {tmp_path}/plan.json is complete$"
    with pytest.raises(nirvana.NirvanaError, match=says):
        write_file(tmp_path / "plan.json", b"{}")


def test_a_refusal_after_something_was_written_says_so(cli_here, commands, tmp_path):
    """The text is too short for a window of the model, which is found out when the checkpoint is there."""
    (tmp_path / "text.txt").write_text("the sea")
    options = ("--evaluate", "--text", tmp_path / "text.txt", "--window", 500, "--out", tmp_path / "result")
    said = in_one_line(cli_here(*commands["prune"], *options), "prune", code=2)
    assert "lower --window" in said
    assert said.endswith(f"; {tmp_path / 'result'} is complete")


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "plan.json"

    def write() -> None:
        with atomic_file(path) as partial:
            partial.write_text("mine")
            path.write_text("theirs")

    with pytest.raises(nirvana.NirvanaError, match="exists"):
        write()
    assert content(tmp_path) == {"plan.json": b"theirs"}


# ---------------------------------------------------------------- the journal


def test_the_journal_asks_the_disk(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    with recorded() as written:
        assert written.outcome() == NOTHING
        write_file(first, b"1")
        for number in range(5):  # inodes are used again
            write_file(second, b"2", overwrite=True, words=f"{number} rows")
        write_file(tmp_path / "cache", b"3", words="")
        assert written.outcome() == f"{first} is complete; 4 rows"
        first.unlink()
        assert written.outcome() == "4 rows"
        second.write_bytes(b"somebody else's, in the same file")
        assert written.outcome() == "4 rows"
        second.unlink()
        assert written.outcome() == NOTHING
        goes_on_from(tmp_path / "cache", "5 rows")
        goes_on_from(tmp_path / "missing", "6 rows")
        assert written.outcome() == "5 rows"
    with recorded() as another:
        assert another.outcome() == NOTHING


# ---------------------------------------------------------------- held signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_held_signals_come_afterwards(number):
    heard = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    mine = signal.getsignal(number)
    try:
        with interruptions_held():
            signal.raise_signal(number)
            with interruptions_held():
                signal.raise_signal(number)
            assert heard == []
        assert heard == [number, number]
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


def test_a_held_ctrl_c_comes_after_an_error_too():
    def fail() -> None:
        with interruptions_held():
            signal.raise_signal(signal.SIGINT)
            raise OSError

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptions_held():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_writing_in_another_thread(tmp_path):
    """Python lets only the main thread set handlers."""
    thread = threading.Thread(target=write_file, args=(tmp_path / "file", b"content"))
    thread.start()
    thread.join()
    assert content(tmp_path) == {"file": b"content"}


# ---------------------------------------------------------------- processes of their own


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from nirvana.checkpoint.atomic import atomic_directory

rename = os.rename

def kill(source, to):
    rename(source, to)
    signal.raise_signal(signal.SIGTERM)

os.rename = kill
with atomic_directory(sys.argv[1], overwrite=True) as folder:
    (folder / "config.json").write_text("new")
print("not killed")
"""


def test_a_kill_between_two_renames_without_a_handler(tmp_path):
    """A Python program of a user, which SIGTERM ends on the spot: not before the new checkpoint is in place."""
    make_old(tmp_path / "out", directory=True)
    process = run_script(KILLED, tmp_path / "out")
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGTERM, "", "")
    assert content(tmp_path) == {"out": None, "out/config.json": b"new"}


AFTERWARDS = """
import atexit, os, signal, sys
from nirvana import cli

sys.argv[0] = "nirvana"
code = cli.main()
print("our last word", flush=True)
signal.raise_signal(signal.SIGINT)
print("not interrupted")
"""


@pytest.mark.parametrize("written", [False, True], ids=["interrupted before", "done"])
def test_ctrl_c_after_the_last_word_leaves_no_traceback(commands, tmp_path, written):
    script = AFTERWARDS
    if not written:
        script = script.replace("code =", "os.fsync = lambda descriptor: signal.raise_signal(signal.SIGINT)\ncode =")
    process = run_script(script, *commands["plan"], "--out", tmp_path / "result")
    assert process.returncode == -signal.SIGINT
    assert process.stdout.endswith("our last word\n")
    assert process.stderr == ("" if written else "nirvana plan: interrupted; nothing was written\n")
    assert (tmp_path / "result").exists() == written
