#!/usr/bin/env bash
# Builds nirvana._cpu with sanitizers in a folder of its own and runs the operator tests on it.
#   csrc/sanitize.sh PYTHON address,undefined|thread [tests and options of pytest]
# The sanitizer's runtime must be loaded before Python; libstdc++ with it, so that it sees C++ exceptions. Leaks are not
# looked for: Python itself never frees what it keeps to its end.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1") kind=$2
shift 2
# Sanitizers end an option at a comma, and get this path in one.
folder=build/sanitize-${kind//,/-}
mkdir -p "$folder"
rm -rf "$folder/nirvana"
cp -rL nirvana "$folder/nirvana"
rm -f "$folder"/nirvana/_c*.so
NIRVANA_SANITIZE=$kind NIRVANA_CUDA=0 "$python" setup.py --quiet build_ext --build-lib "$folder" --build-temp "$folder/objects"
runtime=libtsan.so
if [ "${kind%%,*}" = address ]; then runtime=libasan.so; fi
cxx=${CXX:-g++}
export LD_PRELOAD="$($cxx -print-file-name=$runtime) $($cxx -print-file-name=libstdc++.so)"
# Reports go to files: pytest keeps what a test writes to stderr, and a process that is stopped never shows it.
report=$PWD/$folder/report
rm -f "$report".*
trap 'cat "$report".* 2>/dev/null || true' EXIT
export ASAN_OPTIONS="detect_leaks=0 log_path=$report" UBSAN_OPTIONS="print_stacktrace=1 log_path=$report"
export TSAN_OPTIONS="halt_on_error=1 log_path=$report suppressions=$PWD/csrc/tsan.supp"
root=$PWD
if [ $# = 0 ]; then
  # A sanitizer's own allocator takes memory, which some tests count.
  set -- -k "not takes_memory and not no_temporary and not nothing_of_the_size" "$root"/tests/test_ops_saliency.py "$root"/tests/test_ops_gather.py "$root"/tests/test_ops_divergence.py "$root"/tests/test_ops_mixture.py
fi
cd "$folder"
# From here, `import nirvana` finds the copy.
"$python" -c 'import nirvana._cpu as m, os; assert m.__file__.startswith(os.getcwd()), m.__file__; print("testing", m.__file__)'
"$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" "$@"
