"""How a command gets into a container, for each launcher: options for srun, and what stands before the command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.errors import LaunchError
from launch.site import ContainerSection


@dataclass(frozen=True)
class Wrapping:
    """Options that srun needs, and the words before the command."""

    srun_options: list[str]
    prefix: list[str]


def _mounts(container: ContainerSection, always: Iterable[Path]) -> list[str]:
    """All mounts as `source:target[:ro]`, the always needed ones unless a given one holds them."""
    given = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    targets = [Path(mount.split(":")[1]) for mount in given]
    needed = dict.fromkeys(path.resolve() for path in always)
    missing = [path for path in needed if not any(path.is_relative_to(target) for target in targets)]
    outer = [path for path in missing if not any(path != o and path.is_relative_to(o) for o in missing)]
    return given + [f"{path}:{path}" for path in outer]


def wrap(container: ContainerSection, workdir: Path, folders: Iterable[Path]) -> Wrapping:
    """Return how to start a command in the container; ``workdir`` and ``folders`` are seen under their own names."""
    mounts = _mounts(container, [workdir, *folders])
    image, extra = container.image or "", list(container.extra)
    if container.launcher == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        return Wrapping([], ["apptainer", "exec", "--rocm", *binds, "--pwd", str(workdir), *extra, image])
    if container.launcher == "pyxis":
        options = [f"--container-image={image}", f"--container-mounts={','.join(mounts)}"]
        return Wrapping([*options, f"--container-workdir={workdir}", *extra], [])
    if container.launcher == "podman-hpc":
        volumes = [f"--volume={mount}" for mount in mounts]
        devices = ["--device=/dev/kfd", "--device=/dev/dri", "--group-add=keep-groups"]
        shared = ["--network=host", "--ipc=host", "--pid=host", "--env-host", "--rm"]
        return Wrapping([], ["podman-hpc", "run", *shared, *devices, *volumes, f"--workdir={workdir}", *extra, image])
    if container.launcher == "oci":  # mounts and environment are those of the bundle's config.json
        return Wrapping([f"--container={image}", *extra], [])
    return Wrapping([], [])


def check_image(container: ContainerSection) -> None:
    """Refuse an image that is not there, before the job waits in a queue for it.

    Raises:
        LaunchError: the image is a path and does not exist, or a bundle lacks its config.json.
    """
    image = container.image
    if image is None:
        return
    path = Path(image)
    looks_like_a_path = image.startswith(("/", "./", "../")) or path.suffix in (".sif", ".sqsh")
    if looks_like_a_path and not path.exists():
        raise LaunchError(
            f"container.image {image}: no such file; build it (docs/containers.md), or correct the site file"
        )
    if container.launcher == "oci" and not (path / "config.json").is_file():
        raise LaunchError(f"container.image {image}: an OCI bundle is a folder with config.json and rootfs/")
