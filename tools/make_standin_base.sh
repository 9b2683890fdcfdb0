#!/usr/bin/env bash
# Make the image on which tests/launch/test_container.py builds the structure of Dockerfile.rocm: a small Debian with
# Python, from Debian's own packages. Needs root, mmdebstrap and buildah; takes one to four minutes, once.
set -euo pipefail
name=${1:-localhost/zaya-standin:latest}
for program in mmdebstrap buildah; do
    command -v "$program" >/dev/null || {
        echo "make_standin_base: install $program first" >&2
        exit 3
    }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mmdebstrap --variant=minbase --include=python3,python3-pip,python3-setuptools,python3-wheel bookworm "$folder/root.tar"
container=$(buildah from scratch)
buildah add "$container" "$folder/root.tar" /
buildah commit --rm "$container" "$name"
echo "make_standin_base: $name"
