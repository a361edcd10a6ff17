"""How much memory training a hidden Markov model takes, told before any of it is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lvd_lightning.checks import check_above, check_counts

__all__ = ["HMMMemory", "machine_memory"]

GB = 1e9
#: Where Linux says what a container may use.
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
#: Tables of a pass that have a number for every state, position and window: values, scales, gradients and the like.
_TABLES_OF_A_PASS = 5


@dataclass(frozen=True)
class HMMMemory:
    """The bytes that training takes.

    Args:
        length: tokens of a window, T.
        num_states: K.
        num_tokens: V, words of the vocabulary.
        homogeneous: whether positions share their tables.
        batch_size: windows of a step on one device.
        rule: "em", or "anemone", which keeps averages of all flows.
        bytes_per_number: 4 in single precision.
        models: how many are trained at once.

    Example:
        >>> memory = HMMMemory(32, 1250, 33_278, homogeneous=False, batch_size=256, rule="anemone")
        >>> memory.num_parameters, f"{memory.tables / GB:.1f} GB", f"{memory.step / GB:.1f} GB"
        (1379479999, '5.5 GB', '0.6 GB')
    """

    length: int
    num_states: int
    num_tokens: int
    homogeneous: bool
    batch_size: int
    rule: str
    bytes_per_number: int = 4
    models: int = 1

    def __post_init__(self) -> None:
        check_counts(length=self.length, num_states=self.num_states, num_tokens=self.num_tokens)
        check_counts(batch_size=self.batch_size, models=self.models)

    @property
    def num_parameters(self) -> int:
        """Free parameters."""
        K, V = self.num_states, self.num_tokens
        transitions, emissions = self._places
        return K - 1 + transitions * K * (K - 1) + emissions * K * (V - 1)

    @property
    def tables(self) -> int:
        """Bytes of first states, transitions and emissions."""
        return self._transitions + self._emissions

    @property
    def averages(self) -> int:
        """Bytes of the moving averages of all flows, which Anemone keeps."""
        return self.tables if self.rule == "anemone" else 0

    @property
    def step(self) -> int:
        """Bytes of a step: gradients of transitions, the words of a batch, and what its passes compute."""
        columns = min(self.num_tokens, self.batch_size * (self.length if self.homogeneous else 1))
        words = self._places[1] * self.num_states * columns
        passes = self.length * self.num_states * self.batch_size
        return self._transitions + (4 * words + _TABLES_OF_A_PASS * passes) * self.bytes_per_number

    @property
    def beginning(self) -> int:
        """Bytes when it begins: first parameters, and what is trained."""
        return self.tables + self.models * (self.tables + self.averages)

    @property
    def training(self) -> int:
        """Bytes of an epoch."""
        return self.models * (self.tables + self.averages + self.step)

    @property
    def writing(self) -> int:
        """Bytes when it ends: the circuit, its graph and what is written are copies of the parameters.

        One model alone is taken apart for that; several go on training.
        """
        return 3 * self.tables + (self.models * (self.tables + self.averages) if self.models > 1 else 0)

    @property
    def resuming(self) -> int:
        """Bytes when training goes on after an interruption: a checkpoint is read beside what it is for."""
        return 2 * self.models * (self.tables + self.averages)

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.beginning, self.training, self.writing, self.resuming)

    def check(self, limit_gb: float | None = None, device: torch.device | str = "cpu") -> None:
        """Raise a ValueError that names the figures unless they are within a limit.

        limit_gb: in GB; None for what the device has.
        """
        check_above(0, max_memory_gb=limit_gb)
        limit = machine_memory(device) if limit_gb is None else limit_gb * GB
        if self.peak <= limit:
            return
        raise ValueError(
            f"training {self.num_parameters:,} parameters needs {self.peak / GB:.3g} GB (parameters "
            f"{self.tables / GB:.3g}, averages of flows {self.averages / GB:.3g}, a step {self.step / GB:.3g}"
            f"{f', times {self.models} models' if self.models > 1 else ''}; copies in beginning, resuming, writing), "
            f"but {limit / GB:.3g} GB are there: take fewer states or words, share tables over positions (homogeneous: "
            "true), or raise max_memory_gb"
        )

    @property
    def _places(self) -> tuple[int, int]:
        return (1, 1) if self.homogeneous else (self.length - 1, self.length)

    @property
    def _transitions(self) -> int:
        return (self.num_states + self._places[0] * self.num_states**2) * self.bytes_per_number

    @property
    def _emissions(self) -> int:
        return self._places[1] * self.num_states * self.num_tokens * self.bytes_per_number


def machine_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that a device has: of the machine, or of the container that this process is in, if it may use less."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        if path.is_file():
            text = path.read_text().strip()
            found += [int(text)] if text.isdecimal() else []
    return min(found)
