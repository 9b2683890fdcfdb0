"""The image: its Dockerfile is clean, and its structure builds on a stand-in base without ROCm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest

from launch.containers import check_image, wrap
from launch.errors import LaunchError
from launch.site import ContainerSection
from tests.launch.conftest import BIN, REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile.rocm"
BASE = os.environ.get("ZAYA_TEST_BASE", "localhost/zaya-standin:latest")
OFF = ("WITH_TRANSFORMER_ENGINE", "WITH_APEX", "WITH_MPI4PY")


def test_hadolint_has_nothing_to_say():
    done = subprocess.run([str(BIN / "hadolint"), str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_torch_is_never_installed():
    text = DOCKERFILE.read_text()
    assert "install torch" not in text
    assert "-c /opt/zaya/base-constraints.txt" in text


def test_the_image_has_every_requirement_of_the_package():
    """Dependencies are installed apart from the package, for small layers: the two lists must not drift apart."""
    text = DOCKERFILE.read_text()
    needed = [r.split(";")[0].strip() for r in requires("megatron-zaya") if "extra ==" not in r]
    assert len(needed) > 8
    for requirement in needed:
        name = re.match(r"[\w-]+", requirement)[0]
        assert name == "torch" or re.search(rf"['=]{name}>=", text), f"{requirement} is not in Dockerfile.rocm"


def cannot_build() -> str:
    if not shutil.which("buildah"):
        return "buildah is not installed"
    found = subprocess.run(["buildah", "images", "--quiet", BASE], capture_output=True, text=True)
    return (
        ""
        if found.returncode == 0 and found.stdout.strip()
        else f"no image {BASE} (tools/make_standin_base.sh makes it)"
    )


def test_the_structure_builds_on_a_stand_in_base(tmp_path):
    reason = cannot_build()
    if reason:
        pytest.skip(reason)
    image = "localhost/zaya-structure-test"
    command = ["buildah", "build", "--isolation=chroot", "--pull-never", "--format=docker", "--layers=false"]
    command += [f"--build-arg={name}=0" for name in OFF] + [
        f"--build-arg=BASE_IMAGE={BASE}",
        "--build-arg=REVISION=abc",
    ]
    command += ["-f", str(DOCKERFILE), "-t", image, str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    try:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "launcher: ok" in done.stdout
        inspect = [
            "buildah",
            "inspect",
            "--type=image",
            "--format",
            "{{.OCIv1.Config.User}} {{.OCIv1.Config.Labels}}",
            image,
        ]
        shown = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
        assert shown.startswith("1000 "), "not root"
        assert "revision:abc" in shown
    finally:
        subprocess.run(["buildah", "rmi", "--force", image], capture_output=True)


@pytest.mark.parametrize(
    ("launcher", "image", "options", "prefix"),
    [
        ("none", None, [], []),
        (
            "apptainer",
            "z.sif",
            [],
            ["apptainer", "exec", "--rocm", "--bind", "/data:/data:ro", "--bind", "/w:/w", "--pwd"],
        ),
        ("pyxis", "z.sqsh", ["--container-image=z.sqsh", "--container-mounts=/data:/data:ro,/w:/w"], []),
        ("podman-hpc", "zaya:1", [], ["podman-hpc", "run", "--network=host"]),
        ("oci", "/bundle", ["--container=/bundle"], []),
    ],
)
def test_every_launcher_mounts_what_the_job_needs(launcher, image, options, prefix):
    section = ContainerSection(launcher=launcher, image=image, mounts=["/data:/data:ro"])
    found = wrap(section, Path("/w"), [Path("/w/runs"), Path("/data/sub")])
    assert found.srun_options[: len(options)] == options
    assert found.prefix[: len(prefix)] == prefix
    assert "/w/runs:/w/runs" not in " ".join(found.prefix + found.srun_options), "inside of /w already"


def test_an_image_that_is_not_there_is_refused(tmp_path):
    for launcher, image in (("apptainer", "/none/z.sif"), ("pyxis", "./none.sqsh"), ("oci", str(tmp_path))):
        with pytest.raises(LaunchError, match=r"container\.image"):
            check_image(ContainerSection(launcher=launcher, image=image))
    check_image(ContainerSection(launcher="podman-hpc", image="zaya:latest"))
