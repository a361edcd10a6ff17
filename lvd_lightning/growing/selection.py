"""Which heads grow: those that explain their patches worst, until they hold enough of a circuit's examples."""

from __future__ import annotations

from torch import Tensor

from lvd_lightning.checks import check_share

__all__ = ["select_heads"]


def select_heads(
    mean: Tensor, count: Tensor, num_heads: list[int], *, target: int, share: float = 0.4, min_examples: int = 1
) -> list[list[int]]:
    """The heads that grow, of every circuit, the worst first.

    Of each circuit the heads with the lowest mean log-likelihood are taken until they hold more than `share` of its
    examples. Of these, heads with fewer than `min_examples` stay as they are, and only as many of the worst grow as
    there is room for.

    Args:
        mean: (G, H), mean log-likelihood of every head's own examples, in nats; what stands for heads without any, or
            heads that a circuit lacks, does not matter.
        count: int (G, H), examples of every head.
        num_heads: heads of every circuit.
        target: heads that a circuit may have; one that has as many no longer grows.
        share: of a circuit's examples, 0 <= share < 1.
        min_examples: examples a head needs at least to be split.

    References:
        Liu, Liu, Van den Broeck and Liang, ICML 2023, Algorithm 1.
    """
    check_share(share=share)
    out: list[list[int]] = []
    for g, heads in enumerate(num_heads):
        counts, means = count[g, :heads].tolist(), mean[g, :heads].tolist()
        used = [h for h in range(heads) if counts[h] > 0]
        worst, held = [], 0
        for h in sorted(used, key=lambda h: (means[h], h)):
            if held > share * sum(counts):
                break
            worst.append(h)
            held += counts[h]
        large = [h for h in worst if counts[h] >= min_examples]
        out.append(large[: max(0, target - heads)])
    return out
