"""Hidden Markov models from their tables, and the tables of one that is a circuit.

Shapes: T positions, K states, V tokens; S is T - 1 transitions or T emissions, or 1 where positions share a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.checks import expect

__all__ = ["HMMTables", "hmm_from_tables", "random_tables", "tables_of"]


@dataclass(frozen=True)
class HMMTables:
    """The parameters of a hidden Markov model, in the order of positions.

    initial_K: p(z_0 = k).
    transition_SKK: p(z_t+1 = j | z_t = k) at [t, k, j]; S is T - 1, or 1.
    emission_SKV: p(x_t = v | z_t = k) at [t, k, v]; S is T, or 1.
    """

    initial_K: Tensor
    transition_SKK: Tensor
    emission_SKV: Tensor

    @property
    def homogeneous(self) -> bool:
        """Whether all positions share one table of emissions."""
        return len(self.emission_SKV) == 1

    def check(self, length: int) -> None:
        """Raise a ValueError unless the tables are those of windows of `length` tokens, with rows that sum to one."""
        expect(length >= 2, "length", length, "2 tokens or more: a window of one has no transition")
        sizes = [1] if self.homogeneous else [length]
        K, V = len(self.initial_K), self.emission_SKV.shape[-1]
        wanted = {
            "initial_K": ((K,), self.initial_K),
            "transition_SKK": ((1 if self.homogeneous else length - 1, K, K), self.transition_SKK),
            "emission_SKV": ((*sizes, K, V), self.emission_SKV),
        }
        for name, (shape, table) in wanted.items():
            if tuple(table.shape) != shape:
                raise ValueError(f"{name}: got shape {tuple(table.shape)}, expected {shape} for {length} tokens")
            sums = table.sum(-1)
            if bool((table < 0).any()) or not bool(((sums - 1).abs() < 1e-3).all()):
                raise ValueError(f"{name}: rows must be probabilities that sum to one")


def hmm_from_tables(tables: HMMTables, length: int) -> pc.CircuitGraph:
    """The graph of `pc.hmm` with given parameters.

    Args:
        tables: of one position each, or shared by all (homogeneous).
        length: tokens of a window, T.

    Raises:
        ValueError: tables of other shapes, or rows that are no probabilities.

    Example:
        >>> initial, stay = torch.tensor([1.0, 0.0]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> tables = HMMTables(initial, stay, torch.eye(2)[None])  # 0, 1, 0, 1, ...
        >>> circuit = pc.Circuit(hmm_from_tables(tables, length=3))
        >>> circuit.log_prob(torch.tensor([[0, 1, 0], [0, 0, 1]])).exp()[:, 0].tolist()
        [1.0, 0.0]
    """
    tables.check(length)
    graph = pc.CircuitGraph()
    leaf = pc.Categorical(tables.emission_SKV.shape[-1])
    K, homogeneous = len(tables.initial_K), tables.homogeneous
    emission = transition = None
    for t in reversed(range(length)):
        params = tables.emission_SKV[0 if homogeneous else t]
        factors = [graph.add_input(t, leaf, K, params=params, tied_to=emission)]
        if t + 1 < length:
            weight = tables.transition_SKK[0 if homogeneous else t]
            later = [graph.latents[t + 1]]
            factors.append(graph.add_sum(later, K, weight=weight, tied_to=transition))
        graph.latents[t] = graph.add_product(factors)
        if homogeneous:
            emission = factors[0] if emission is None else emission
            transition = factors[1] if transition is None and len(factors) > 1 else transition
    graph.add_sum([graph.latents[0]], 1, weight=tables.initial_K[None])
    return graph


def tables_of(circuit: pc.Circuit) -> HMMTables:
    """The parameters of a circuit that is a hidden Markov model; those of shared positions are views, others copies.

    Raises:
        ValueError: a circuit of another structure.

    Example:
        >>> circuit = pc.Circuit(pc.hmm(length=4, num_states=2, num_tokens=5))
        >>> found = tables_of(circuit)
        >>> tuple(found.transition_SKK.shape), tuple(found.emission_SKV.shape)
        ((3, 2, 2), (4, 2, 5))
    """
    structure = circuit.structures[0]
    length = circuit.num_variables
    if circuit.batched or structure.num_heads != 1 or not _is_chain(structure, length):
        raise ValueError(f"circuit: got {circuit}, expected a hidden Markov model of 2 tokens or more, with one head")
    owner = {
        pair: (number, row) for number, group in enumerate(circuit.plan.groups) for row, pair in enumerate(group.owners)
    }
    tables = circuit.probabilities()

    def rows(nodes: list[int]) -> Tensor:
        owners = [structure.nodes[node].tied_to for node in nodes]
        places = [owner[0, node if tied is None else tied] for node, tied in zip(nodes, owners, strict=True)]
        places = places[:1] if len(set(places)) == 1 else places
        numbers = {number for number, _ in places}
        assert len(numbers) == 1  # nodes of one kind and shape share a tensor
        table, index = tables[numbers.pop()].detach(), [row for _, row in places]
        return table[index[0] : index[0] + 1] if len(index) == 1 else table[torch.tensor(index, device=table.device)]

    emissions, transitions = [], []
    for t in range(length):
        token, *after = structure.nodes[structure.latents[t]].children
        emissions.append(token)
        transitions += after
    initial = rows([structure.root])[0, 0]
    emission = rows(emissions)
    return HMMTables(initial, rows(transitions), emission)


def _is_chain(graph: pc.CircuitGraph, length: int) -> bool:
    """Whether every latent is of one token and of the latent after it, as `pc.hmm` makes them."""
    nodes, latents = graph.nodes, graph.latents
    if length < 2 or sorted(latents) != list(range(length)) or nodes[graph.root].children != (latents[0],):
        return False
    for t in range(length):
        token, *after = (nodes[child] for child in nodes[latents[t]].children)
        later = [(latents[t + 1],)] if t + 1 < length else []
        is_word = token.kind == "input" and token.variable == t and isinstance(token.distribution, pc.Categorical)
        if not is_word or [node.children for node in after] != later or any(node.kind != "sum" for node in after):
            return False
    return True


def random_tables(
    length: int,
    num_states: int,
    num_tokens: int,
    homogeneous: bool,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> HMMTables:
    """Tables of positive random rows, as `pc.hmm` draws them.

    Example:
        >>> random_tables(4, 2, 5, homogeneous=True).emission_SKV.shape
        torch.Size([1, 2, 5])
    """

    def drawn(*shape: int) -> Tensor:
        found = torch.rand(shape, generator=generator, dtype=dtype).add_(0.05)
        return found.div_(found.sum(-1, keepdim=True))

    transitions, emissions = (1, 1) if homogeneous else (length - 1, length)
    return HMMTables(
        drawn(num_states),
        drawn(transitions, num_states, num_states),
        drawn(emissions, num_states, num_tokens),
    )
