"""What the outside world calls the devices of each backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vendor:
    """Names of a kind of device.

    Attributes:
        resource: Ray's resource.
        plugin: resource of the vendor's device plugin for Kubernetes.
        known_to_kuberay: whether KubeRay turns the plugin's resource into Ray's.
        run_options: options of `docker run` that give a container its devices.
    """

    resource: str
    plugin: str
    known_to_kuberay: bool = True
    run_options: tuple[str, ...] = ()


_TPU = Vendor("TPU", "google.com/tpu", run_options=("--privileged",))

# By backend; processors need no vendor.
VENDORS = {
    "cuda": Vendor("GPU", "nvidia.com/gpu", run_options=("--gpus=all",)),
    "rocm": Vendor("GPU", "amd.com/gpu", run_options=("--device=/dev/kfd", "--device=/dev/dri", "--group-add=video")),
    "gaudi": Vendor(
        "HPU",
        "habana.ai/gaudi",
        known_to_kuberay=False,
        run_options=("--runtime=habana", "--env=HABANA_VISIBLE_DEVICES=all", "--cap-add=sys_nice"),
    ),
    "tpu": _TPU,
    "xla": _TPU,
}
