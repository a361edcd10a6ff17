"""Emissions of a large vocabulary that EM moves word by word: a step touches the words that occurred, exactly.

Shapes: S positions with a table of their own (or 1), K states, V words; n pairs of a position and a word that occurred.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvd_lightning.checks import check_choice

__all__ = ["EmissionRows"]

#: When a factor that all words share has fallen to this, it is multiplied out: only then does a step touch all words.
#: What is stored grows as factors fall, and floating point numbers keep their relative precision at any size.
LEAST_FACTOR = 1e-18
#: The share of a position's states above which all are done at once.
MANY = 0.1
#: Moving averages up to this become 0, as they do in `Anemone`.
FORGOTTEN = 1e-30


class EmissionRows(nn.Module):
    r"""p(v | k) of every position, and its M-steps by the rules of `CircuitEM` and `Anemone`.

    Both rules move words that did not occur in a batch too, but all words of a state alike: they lose a factor and gain
    a pseudocount. So what is stored is

    .. math:: \theta_{kv} = a_k P_{kv} + b_k M_{kv} + c_k

    with a, b and c for every state, and, for Anemone, M times one number g the moving average of flows, which decays
    alike for all words. A step updates a, b, c and g, and P and M of the words that occurred, so that the result is
    that of the dense rule. Now and then a, b, c and g are multiplied out.

    Args:
        emission_SKV: probabilities.
        rule: "em" or "anemone", which keeps a second table, M.

    Example:
        >>> rows = EmissionRows(torch.full((1, 2, 4), 0.25, dtype=torch.float64), "em")
        >>> key = torch.tensor([3])  # the word 3 came, twice in state 0
        >>> rows.em_step(key, torch.tensor([[2.0, 0.0]], dtype=torch.float64), lr=0.5, pseudocount=0.0)
        >>> rows.table_SKV()[0].tolist()
        [[0.125, 0.125, 0.125, 0.625], [0.25, 0.25, 0.25, 0.25]]
    """

    stored_SVK: Tensor
    average_SVK: Tensor
    factor_SK: Tensor
    share_SK: Tensor
    added_SK: Tensor
    total_SK: Tensor
    decay: Tensor
    root: Tensor
    steps: Tensor

    def __init__(self, emission_SKV: Tensor, rule: str) -> None:
        super().__init__()
        check_choice(("em", "anemone"), rule=rule)
        S, K, self.num_tokens = emission_SKV.shape
        stored_SVK = emission_SKV.transpose(1, 2).contiguous()
        self.register_buffer("stored_SVK", stored_SVK)
        if rule == "anemone":
            self.register_buffer("average_SVK", torch.zeros_like(stored_SVK))
            self.register_buffer("share_SK", stored_SVK.new_zeros(S, K))
            self.register_buffer("total_SK", stored_SVK.new_zeros(S, K))  # of the averages, over words
            for name in ("decay", "root"):  # root: the moving average of the examples of a step
                self.register_buffer(name, torch.zeros((), dtype=torch.float64))
            self.decay.fill_(1.0)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("factor_SK", stored_SVK.new_ones(S, K))
        self.register_buffer("added_SK", stored_SVK.new_zeros(S, K))
        self.rule = rule

    def keys(self, place: Tensor, token: Tensor) -> Tensor:
        """One number for a position and a word."""
        return place * self.num_tokens + token

    def gather(self, keys_n: Tensor) -> Tensor:
        """p(v | k) at some positions and words, (n, K)."""
        place_n = keys_n // self.num_tokens
        found_nK = self.stored_SVK.flatten(0, 1)[keys_n] * self.factor_SK[place_n]
        if self.rule == "anemone":
            found_nK.addcmul_(self.average_SVK.flatten(0, 1)[keys_n], self.share_SK[place_n])
        return found_nK.add_(self.added_SK[place_n]).clamp_min_(0.0)

    def table_SKV(self) -> Tensor:
        """All probabilities, as a table of its own; rows sum to one."""
        self.multiply_out()
        found_SKV = self.stored_SVK.transpose(1, 2).contiguous()
        return found_SKV.div_(found_SKV.sum(-1, keepdim=True))

    def taken_SKV(self) -> Tensor:
        """All probabilities, in the memory of what they were stored in: nothing is left for further steps."""
        self.multiply_out()
        if self.rule == "anemone":
            self.average_SVK = self.average_SVK.new_zeros(0)
        found_SKV, self.stored_SVK = self.stored_SVK.transpose(1, 2).contiguous(), self.stored_SVK.new_zeros(0)
        return found_SKV.div_(found_SKV.sum(-1, keepdim=True))

    def em_step(self, keys_n: Tensor, flow_nK: Tensor, *, lr: float, pseudocount: float) -> None:
        """The M-step of `CircuitEM` on the flows of the words that occurred; keys differ from each other."""
        flow_SK = self._sums(keys_n, flow_nK)
        visited_SK = (flow_SK > 0).to(flow_SK.dtype)
        rate_SK = lr * visited_SK / (flow_SK + pseudocount).clamp_min_(torch.finfo(flow_SK.dtype).tiny)
        keep_SK = 1 - lr * visited_SK
        self._shrink(keep_SK, rate_SK * (pseudocount / self.num_tokens))
        self._restore_small()
        place_n = keys_n // self.num_tokens
        added_nK = flow_nK * (rate_SK / self.factor_SK)[place_n]
        self.stored_SVK.view(-1, added_nK.shape[1]).index_add_(0, keys_n, added_nK)

    def anemone_step(
        self,
        keys_n: Tensor,
        flow_nK: Tensor,
        top_down_SK: Tensor,
        num_examples: float,
        *,
        lr: float,
        momentum: float,
        pseudocount: float,
    ) -> None:
        """The M-step of `Anemone`.

        Args:
            keys_n: positions and words that occurred, which differ from each other.
            flow_nK: their flows.
            top_down_SK: p(z = k) of every position, before this step; summed over positions that share a table.
            num_examples: the flow of the root, of this batch.
            lr, momentum, pseudocount: of `Anemone`.
        """
        place_n = keys_n // self.num_tokens
        self.steps += 1
        self.root.mul_(momentum).add_((1 - momentum) * num_examples)
        self.total_SK.mul_(momentum).add_(self._sums(keys_n, flow_nK), alpha=1 - momentum)
        self.decay.mul_(momentum)
        if float(self.decay) < LEAST_FACTOR:
            self.multiply_out(forget=False)
        # A larger average of a word would raise its probability by b at once: P makes up for it.
        grown_nK = flow_nK * ((1 - momentum) / float(self.decay))
        flat = self.stored_SVK.view(-1, grown_nK.shape[1])
        flat.index_add_(0, keys_n, -grown_nK * (self.share_SK / self.factor_SK)[place_n])
        self.average_SVK.view(-1, grown_nK.shape[1]).index_add_(0, keys_n, grown_nK)
        correction = 1 - momentum ** int(self.steps)
        examples = float(self.root) / correction
        if not examples > 0:
            return
        scale_SK = (1 - lr) * examples * top_down_SK
        weight_SK = (lr / correction * self.total_SK + scale_SK + pseudocount).clamp_min_(
            torch.finfo(scale_SK.dtype).tiny
        )
        visited_SK = self.total_SK > 0
        keep_SK = torch.where(visited_SK, scale_SK / weight_SK, 1.0)
        rate_SK = visited_SK / weight_SK
        self._shrink(keep_SK, rate_SK * (pseudocount / self.num_tokens))
        self.share_SK.mul_(keep_SK).add_(rate_SK, alpha=lr / correction * float(self.decay))
        self._restore_small()

    def multiply_out(self, forget: bool = True) -> None:
        """Make the stored table that of probabilities (and of averages): the factors are 1 again."""
        for place in range(len(self.stored_SVK)):
            self._multiply_out_position(place)
        self.factor_SK.fill_(1.0)
        self.added_SK.zero_()
        if self.rule == "anemone":
            self.average_SVK.mul_(float(self.decay))
            if forget:
                functional.threshold(self.average_SVK, FORGOTTEN, 0.0, inplace=True)
            self.share_SK.zero_()
            self.decay.fill_(1.0)
            self.total_SK.masked_fill_(self.total_SK <= FORGOTTEN, 0.0)

    def _multiply_out_position(self, place: int) -> None:
        """The probabilities of one position as they are, in blocks of words that fit the cache."""
        step = max(1, (1 << 17) // self.stored_SVK.shape[2])
        for low in range(0, self.num_tokens, step):
            stored_VK = self.stored_SVK[place, low : low + step]
            stored_VK.mul_(self.factor_SK[place])
            if self.rule == "anemone":
                stored_VK.addcmul_(self.average_SVK[place, low : low + step], self.share_SK[place])
            stored_VK.add_(self.added_SK[place]).clamp_min_(0.0)

    def _restore_small(self) -> None:
        """Multiply out the factors of states for which they have become small; averages and their decay stay.

        States that are hardly ever visited lose nearly all of what they had in a single step: they are done alone, a
        stride for every word. Where a position's others are on their way, all are done, in the order of memory.
        """
        if float(self.factor_SK.amin()) >= LEAST_FACTOR:
            return
        is_small_SK = self.factor_SK < LEAST_FACTOR
        on_their_way_S1 = (self.factor_SK < LEAST_FACTOR**0.5).double().mean(1, keepdim=True) > MANY
        is_small_SK |= is_small_SK.any(1, keepdim=True) & on_their_way_S1
        for place in is_small_SK.any(1).nonzero()[:, 0].tolist():
            state_n = is_small_SK[place].nonzero()[:, 0]
            if len(state_n) == is_small_SK.shape[1]:
                self._multiply_out_position(place)
                continue
            for part_n in state_n.split(max(1, (1 << 22) // self.num_tokens)):  # in bounded memory
                found_Vn = self.stored_SVK[place][:, part_n].mul_(self.factor_SK[place, part_n])
                if self.rule == "anemone":
                    found_Vn.addcmul_(self.average_SVK[place][:, part_n], self.share_SK[place, part_n])
                found_Vn.add_(self.added_SK[place, part_n]).clamp_min_(0.0)
                self.stored_SVK[place][:, part_n] = found_Vn
        self.factor_SK.masked_fill_(is_small_SK, 1.0)
        self.added_SK.masked_fill_(is_small_SK, 0.0)
        if self.rule == "anemone":
            self.share_SK.masked_fill_(is_small_SK, 0.0)

    def _shrink(self, keep_SK: Tensor, added_SK: Tensor) -> None:
        """theta <- keep theta + added."""
        self.factor_SK.mul_(keep_SK)
        self.added_SK.mul_(keep_SK).add_(added_SK)

    def _sums(self, keys_n: Tensor, flow_nK: Tensor) -> Tensor:
        """Flows of states, (S, K)."""
        return torch.zeros_like(self.factor_SK).index_add_(0, keys_n // self.num_tokens, flow_nK)
