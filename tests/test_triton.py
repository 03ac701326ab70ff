"""The Triton kernels without a GPU: their numerics in Triton's interpreter, their machine code without running it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytest.importorskip("triton", reason="triton is not installed")


def test_numerics_in_the_interpreter():
    """The tests in interpreted/, in a process of their own: Triton reads TRITON_INTERPRET when kernels are imported."""
    folder = HERE / "interpreted"
    done = subprocess.run(
        # Warnings are NumPy's, of the interpreter: NaN and infinity that a mask or a `where` drops.
        [
            *(sys.executable, "-W", "ignore", "-m", "pytest", folder, f"--confcutdir={folder}"),
            *("-p", "no:cacheprovider", "-p", "no:warnings", "-q", "-rf", "--tb=short"),
        ],
        cwd=HERE.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "NIRVANA_BACKEND": "auto"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{done.stdout[-12000:]}\n{done.stderr[-3000:]}", pytrace=False)
    assert re.search(r"\d+ passed", done.stdout), done.stdout


@pytest.mark.slow
def test_compiled_kernels_spill_nothing_and_need_what_the_table_says():
    """Every case of every launcher, for sm_80, 90, 100 and 120."""
    # Imported here: the kernels of this process must not be compiled ones where it has chosen the interpreter.
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    import triton

    from nirvana.kernels import resources

    measured = resources.measure()
    assert resources.spilled(measured) == []
    for architecture, results in measured.items():
        for (kernel, case, *_), one in zip(resources.CASES, results, strict=True):
            # Of one matrix alone ptxas may use a load earlier (sm_80 to 120: 5 of 8 at least).
            if kernel == "saliency tiles" and "ntk" not in case and "magnitude" not in case:
                # The code has the loads of two blocks, or of four that are loaded ahead.
                assert 2 * one.early_loads >= one.wide_loads, (
                    f"sm_{architecture}, {case}: {one.early_loads} early loads"
                )
            if "not aligned" not in case and kernel in ("saliency tiles", "divergence"):
                assert one.wide_loads, f"sm_{architecture}, {kernel}, {case}: no load of 128 bits"
            if "aligned" in case and "not" not in case:
                assert one.wide_stores, f"sm_{architecture}, {kernel}, {case}: no store of 128 bits"
    table = resources.TABLE.read_text()
    version = re.search(r"Triton (\S+);", table)[1]
    if version != triton.__version__:
        pytest.skip(f"the table was written for Triton {version}, this is {triton.__version__}; nothing spills")
    assert resources.render(measured) == table, "run python -m nirvana.kernels.resources and look at what changed"
