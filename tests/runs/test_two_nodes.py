"""Two machines: network namespaces with an address each, joined by a cable, on which torchrun starts one job."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.177.0.1", "10.177.0.2")
CONFIG = """
name: nodes
data:
  class_path: datamodules.Photos
  init_args: {image_size: 8, num_train: 40, num_val: 10, num_test: 10, batch_size: 20, patch_size: 4}
trainer: {accelerator: cpu, devices: 1, num_nodes: 2, max_epochs: 1}
stages:
  latents: {model: {class_path: lvd_lightning.stages.Latents, init_args: {num_clusters: 4}}}
  conditional:
    model: {class_path: lvd_lightning.stages.ConditionalStudent, init_args: {num_units: 2, val_images: 10}}
"""


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """The names of two namespaces that see each other, and nothing else."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("needs ip of iproute2, which makes network namespaces on Linux")
    names = [f"lvd{os.getpid()}n{number}" for number in range(2)]
    made = ip("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    try:
        commands = [("netns", "add", names[1])]
        commands.append(
            ("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        )
        for name, address in zip(names, ADDRESSES, strict=True):
            commands.append(("-n", name, "address", "add", f"{address}/24", "dev", "cable"))
            commands += [("-n", name, "link", "set", device, "up") for device in ("lo", "cable")]
        for command in commands:
            done = ip(*command)
            if done.returncode:
                pytest.skip(f"ip {' '.join(command)} is not permitted here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def received(name: str) -> int:
    """Bytes that came through a node's end of the cable."""
    path = "/sys/class/net/cable/statistics/rx_bytes"
    found = ip("netns", "exec", name, "cat", path)
    return int(found.stdout)


def test_two_machines_train_a_stage(nodes: list[str], tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(CONFIG)
    job = ["--config", str(tmp_path / "all.yaml"), "--run_dir", str(tmp_path)]
    job += ["--stages.conditional.model.sharding", "circuits"]
    before = [received(name) for name in nodes]
    running = []
    for number, (name, address) in enumerate(zip(nodes, ADDRESSES, strict=True)):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--rdzv-id", "lvd"]
        # Both have the name of this machine, which says nothing about who they are.
        torchrun += ["--rdzv-conf", f"is_host={'true' if number == 0 else 'false'}", "--local-addr", address]
        words = ["ip", "netns", "exec", name, *torchrun, str(ROOT / "train.py"), "fit", *job]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
        printing = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(words, cwd=tmp_path, env=environment, **printing))
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    assert "conditional: done" in said[0] + said[1]
    figures = json.loads((tmp_path / "nodes" / "conditional" / "done.json").read_text())
    assert 0 < figures["val_bpd"] < 10
    for name, earlier in zip(nodes, before, strict=True):
        assert received(name) - earlier > 10_000  # evidence and circuits went through the cable
