#!/bin/sh
# Makes .venv here, with what the programs need:    sh setup.sh
# and with what the tests need, too:                sh setup.sh dev
# What is there already is left alone. PYTHON=python3.12 sh setup.sh takes another Python (3.10 to 3.13).
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
needed="requirements.txt"
if [ "${1:-}" = dev ]; then needed="requirements.txt requirements-dev.txt"; fi

if ! command -v "$python" >/dev/null 2>&1; then
    echo "setup.sh: there is no $python: install Python 3.10 to 3.13, or name yours, PYTHON=... sh setup.sh" >&2
    exit 2
fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    if ! "$python" -c "import venv, ensurepip" >/dev/null 2>&1; then
        # Debian and Ubuntu ship this part of Python as a package of its own
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        if ! command -v apt-get >/dev/null 2>&1; then
            echo "setup.sh: $python cannot make virtual environments: install its venv and ensurepip modules" >&2
            exit 2
        fi
        root=""
        if [ "$(id -u)" -ne 0 ]; then root=sudo; fi
        echo "setup.sh: $python has no venv module, so this installs python$version-venv with ${root:+$root }apt-get"
        $root apt-get update -q
        $root apt-get install -y -q "python$version-venv"
    fi
    echo "setup.sh: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
for file in $needed; do
    if ! cmp -s "$file" ".venv/$file"; then         # a copy of what was installed last time
        echo "setup.sh: installing $file (PyTorch: a few minutes the first time)"
        .venv/bin/python -m pip install -q --disable-pip-version-check -r "$file"
        cp "$file" ".venv/$file"
    fi
done
echo "setup.sh: ready, .venv/bin/python"
