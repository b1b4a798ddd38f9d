# Sourced by the other scripts: finds a Python and makes .venv ready with scripts/_env.py.
# Sets `root` (the checkout) and `venv` ($root/.venv). $PYTHON names the Python to make it with.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

# PYTHONPATH and PYTHONHOME would put other modules before the installed ones.
unset PYTHONPATH PYTHONHOME

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v -- "$candidate"
            return
        fi
        if [[ -n ${PYTHON:-} ]]; then
            echo "error: PYTHON=$PYTHON is not a Python 3.11 or newer" >&2
            return 2
        fi
    done
    echo "error: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.11 $0" >&2
    return 2
}

python=$(find_python)
"$python" -I "$root/scripts/_env.py"
