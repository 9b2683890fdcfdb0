#!/usr/bin/env bash
# Print the path of a working Python of the asked-for version (3.12), from PATH or from pyenv; fail with advice if none.
set -euo pipefail
version=$1
for candidate in "python$version" "$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")"/versions/"$version"*/bin/python; do
    if "$candidate" --version >/dev/null 2>&1; then
        command -v "$candidate"
        exit 0
    fi
done
echo "find_python: no Python $version found; install it, or say where it is: make test-mcore-latest PYTHON_LATEST=/path/to/python" >&2
exit 3
