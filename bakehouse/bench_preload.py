"""The benchmark of images that are loaded at bake time: the same node with them and without, in one run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from bakehouse import bench_boot, kubernetes_cluster, machine, plan, registry, userdata, verify, waiting
from bakehouse.bench import MIB, Result, Row, bake_quietly, this_machine
from bakehouse.cache import BaseCache
from bakehouse.errors import BakehouseError
from bakehouse.kubernetes_cluster import KubernetesCluster
from bakehouse.record import Record
from bakehouse.registry import Registry
from bakehouse.run import Log, remove_tree
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.verify_kubernetes import KubernetesTrial

POLL_SECONDS = 0.5
RUNS = "kube-proxy"
"""The first pod of a node, which every node of a cluster has."""


@dataclass(frozen=True)
class First:
    """What was seen of one boot."""

    joined: float
    """Seconds from power-on until the agent says so."""
    runs: float
    """Seconds from power-on until the node's first pod is ready."""
    received: int
    """Bytes that came over the network by then."""


def preload(settings: Settings, rounds: int, console: Console, name: str = "kubernetes") -> Result:
    """Measure power-on to the node's first running pod: images loaded at bake time, or pulled.

    The image without them is baked for it of the same definition, and thrown away. It pulls from a registry on this
    host, in the same private network: there is none nearer. Both boots of a round follow one another.

    Args:
        settings: of the site.
        rounds: how many.
        console: shows what is being measured.
        name: the manifest of the image.

    Raises:
        BakehouseError: there is no image of it with loaded images in the store, or a boot failed.
    """
    store = LocalStore(settings.store)
    loaded = bench_boot.newest(store, name)
    if loaded.platform != "kubernetes":
        raise BakehouseError(f"{loaded.tag} is of the platform {loaded.platform}", hint="nothing is loaded into it")
    with _without_images(name, settings, console) as (bare_store, bare), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-preload-")))
        log = stack.enter_context(Log(folder / "bench.log"))
        file = store.image(loaded)
        trial = stack.enter_context(verify.trial(loaded, file, settings, log))
        assert isinstance(trial, KubernetesTrial)
        made = trial.made
        console.print("a control plane, and a registry with the images", highlight=False)
        made.controller.start()
        made.controller.kubeadm("addon", RUNS)
        place = Registry(made.network)
        place.prepare(made.network.mount_image(file), loaded.release, settings.mirrors())
        place.start()
        if not place.push_loaded():
            raise BakehouseError(f"no images are loaded in {loaded.tag}", hint="see kubernetes.images in its manifest")
        bench = _PreloadBench(made, BaseCache(settings.cache).kvm, machine.make_key(folder), console, place.address)
        images = {"loaded": file, "pulled": bare_store.image(bare)}
        for image in images.values():
            bench_boot.read_once(image)
        seen: dict[str, list[First]] = {how: [] for how in images}
        for number in range(1, rounds + 1):
            for how, image in images.items():
                seen[how].append(bench.boot(f"{number}/{rounds}", how, f"{how}-{number}", image))
        sizes = {how: image.stat().st_size for how, image in images.items()}
    return Result(rows(seen["loaded"], seen["pulled"], sizes["loaded"], sizes["pulled"]), this_machine())


@contextmanager
def _without_images(name: str, settings: Settings, console: Console) -> Iterator[tuple[LocalStore, Record]]:
    """Bake the same image without images in it, in a store that is gone afterwards."""
    settings.cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=settings.cache))
    try:
        text = {"extends": name, "kubernetes": {"images": []}}
        (scratch / "bench-bare.yaml").write_text(yaml.safe_dump(text))
        site = settings.model_copy(
            update={"manifests": [*settings.manifests, scratch], "kubernetes_images": None, "store": scratch / "store"}
        )
        console.print(f"baking {name} without images", end=" ... ", highlight=False)
        start = time.monotonic()
        record = bake_quietly(plan.make("bench-bare", site), site)
        console.print(f"{time.monotonic() - start:.0f} s", highlight=False)
        yield LocalStore(site.store), record
    finally:
        remove_tree(scratch)


@dataclass(frozen=True)
class _PreloadBench:
    made: KubernetesCluster
    probe: Path
    key: Path
    console: Console
    registry: str

    def boot(self, title: str, how: str, node: str, image: Path) -> First:
        """Boot a node, and wait until its first pod runs."""
        self.console.print(f"{title}: images {how}, to the first pod", end=" ... ", highlight=False)
        user_data = kubernetes_cluster.with_pod_network(
            userdata.render(self.made.join(node)), registry.mirror_of_all(self.registry)
        )
        with machine.boot(
            image, probe=self.probe, memory=verify.MEMORY["kubernetes"], cpus=bench_boot.CPUS["kubernetes"],
            disk_size=bench_boot.DISK, key=self.key, user_data=user_data, hostname=node, network=self.made.network,
        ) as booted:  # fmt: skip
            line = verify.wait_for_join(booted)
            joined = booted.console.lines[line].at - booted.started
            waiting.until(
                "first pod", lambda: self._runs(node), bench_boot.BOOT_SECONDS, poll=POLL_SECONDS, check=booted.check,
                last_words=booted.output,
            )  # fmt: skip
            runs = time.monotonic() - booted.started
            booted.wait_for_ssh(bench_boot.BOOT_SECONDS)
            counters = booted.ssh("cat /sys/class/net/e*/statistics/rx_bytes").stdout.split()
        self.made.controller.kubectl("delete", "node", node, check=True)
        self.console.print(f"{runs:.1f} s", highlight=False)
        return First(joined, runs, sum(map(int, counters)))

    def _runs(self, node: str) -> bool:
        chosen = [f"--field-selector=spec.nodeName={node}", f"--selector=k8s-app={RUNS}", "--namespace=kube-system"]
        pods = self.made.controller.get("pods", *chosen).get("items") or []
        states = [each for pod in pods for each in pod["status"].get("containerStatuses") or []]
        return any(each["ready"] for each in states)


def rows(loaded: list[First], pulled: list[First], size: int, bare: int) -> list[Row]:
    """Return what a number of boots comes to: medians and ratios.

    Args:
        loaded: boots with the images in the image.
        pulled: boots without them.
        size: bytes of the image file with them.
        bare: bytes of the image file without them.
    """

    def seconds(boots: list[First], what: str) -> float:
        return statistics.median(float(getattr(boot, what)) for boot in boots)

    found = []
    for what, title in (("joined", "power-on to joined"), ("runs", "power-on to the first pod (kube-proxy)")):
        first, second = seconds(loaded, what), seconds(pulled, what)
        found.append(Row(f"{title}, images loaded", f"{first:.1f} s", 1.0))
        found.append(Row(f"{title}, images pulled", f"{second:.1f} s", second / first))
    saved = seconds(pulled, "runs") - seconds(loaded, "runs")
    less = seconds(pulled, "received") - seconds(loaded, "received")
    return [
        *found,
        Row("saved at each boot", f"{saved:.1f} s and {less / MIB:.0f} MiB over the network"),
        Row("image file without them", f"{bare / MIB:.0f} MiB", 1.0),
        Row("image file with them", f"{size / MIB:.0f} MiB", size / bare),
    ]
