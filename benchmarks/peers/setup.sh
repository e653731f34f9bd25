#!/bin/sh
# Makes a virtual environment for a peer, beside the project's own:
#
#   benchmarks/peers/setup.sh spu|crypten [DIRECTORY]        (default: .venv-spu, .venv-crypten in the project's root)
#
# PYTHON: the Python to use (default python3). PIP_FLAGS: as for `make setup`, such as an index of torch CPU builds.
# Running it again brings the environment up to date, or does nothing.
set -eu

fail() {
    printf 'setup.sh: %s\n' "$1" >&2
    printf 'hint: %s\n' "$2" >&2
    exit 1
}

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
peer=${1:-}
case $peer in
spu) probe='benchmarks.peers.spu_bench --protocol SEMI2K' ;;
crypten) probe='benchmarks.peers.crypten_bench' ;;
*) fail "which peer? got '$peer'" "setup.sh spu|crypten [DIRECTORY]" ;;
esac
directory=${2:-$root/.venv-$peer}
python=${PYTHON:-python3}
requirements=$here/requirements-$peer.txt
stamp=$directory/.installed-$peer

if cmp -s "$requirements" "$stamp"; then
    echo "$directory is up to date"
    exit 0
fi

if [ ! -x "$directory/bin/python" ]; then
    command -v "$python" >/dev/null || fail "there is no '$python'" "PYTHON=/path/to/python3.11 $0 $peer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old for these benchmarks" "PYTHON=/path/to/python3.11 $0 $peer"
    "$python" -m venv "$directory" || fail "no environment in $directory" "install Python's venv module"
fi

# shellcheck disable=SC2086  # PIP_FLAGS holds several words
"$directory/bin/python" -m pip install ${PIP_FLAGS:-} -r "$requirements" ||
    fail "pip could not install $requirements" \
        "these versions were tried with Python 3.11 on Linux x86-64; PYTHON and PIP_FLAGS choose another Python or index"
if [ "$peer" = crypten ]; then
    # shellcheck disable=SC2086
    "$directory/bin/python" -m pip install ${PIP_FLAGS:-} --no-deps crypten==0.4.1 ||
        fail "pip could not install crypten" "PIP_FLAGS passes an index to pip"
fi

echo "trying it: one product" >&2
# shellcheck disable=SC2086
(cd "$root" && "$directory/bin/python" -m $probe --runs 1 --work "multiply 393216" >/dev/null) ||
    fail "$peer is installed in $directory, but does not run" "see the error above; it needs loopback TCP"
cp "$requirements" "$stamp"
echo "$directory is ready"
