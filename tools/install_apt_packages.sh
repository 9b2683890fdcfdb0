#!/usr/bin/env bash
# Install the Debian packages that the test-suite uses (tools/apt-packages.txt). Called by `make test` and
# .ci/run. Does nothing when all are there; says what to install where apt or root is missing.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mapfile -t wanted < <(sed 's/#.*//' "$here/apt-packages.txt" | tr -d ' \t' | grep -v '^$' || true)

missing=()
for package in "${wanted[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "install_apt_packages: no apt-get on this machine; the tests need: ${missing[*]} (install them with your package manager)" >&2
    exit 3
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "install_apt_packages: not root; run once: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 3
fi
echo "install_apt_packages: installing ${missing[*]}"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
