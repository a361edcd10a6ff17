"""Expectation maximisation as optimizers: flows are read off the gradients.

Shapes: P parameter rows, X units, Y alternatives (children or categories), S numbers per input unit, T statistics of an
input unit, G circuits, H heads; R rows and E live edges of a sparse layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvd_lightning.circuits.checks import check_number, described
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.distributions import Distribution
from lvd_lightning.circuits.distributions.base import may_ask
from lvd_lightning.circuits.distributions.smooth_prior import SmoothPrior
from lvd_lightning.circuits.engine.bad_flows import refuse_bad_flows
from lvd_lightning.circuits.engine.kernels.cpu import updates as cpu_updates
from lvd_lightning.circuits.engine.kernels.triton import updates as triton_updates
from lvd_lightning.circuits.engine.layers import CACHE_SIZE
from lvd_lightning.circuits.engine.sparse import SparseEdges
from lvd_lightning.ranks import any_rank, rank_and_size, sum_in_place

__all__ = ["Anemone", "CircuitEM"]

#: Flows of examples long past; below this they only cost time, as denormal numbers.
FORGOTTEN = 1e-30
FORGET_EVERY = 16


class _CircuitOptimizer(torch.optim.Optimizer, ABC):
    """What both EM rules share: which circuits, sums over ranks, chunks that fit the cache.

    `module` is a module that contains circuits, or parameter groups {"params": module, "lr": ...} of such modules.
    """

    def __init__(
        self, module: nn.Module | Iterable[dict[str, Any]], defaults: dict[str, Any], shared: bool = True
    ) -> None:
        self.shared = shared
        if not isinstance(module, (nn.Module, Iterable)):
            raise ValueError(self._expected(module))
        wanted = [{"params": module}] if isinstance(module, nn.Module) else list(module)
        groups: list[dict[str, Any]] = []
        self.circuits: list[Circuit] = []
        for group in wanted:
            if not isinstance(group, Mapping) or not isinstance(group.get("params"), nn.Module):
                raise ValueError(f"{self._expected(group)}; tensors alone do not say which circuit they belong to")
            for circuit in group["params"].modules():
                if isinstance(circuit, Circuit) and not any(circuit is known for known in self.circuits):
                    if circuit.parameterization != "probabilities":
                        raise ValueError(
                            f"{type(self).__name__}: EM needs parameterization='probabilities', the circuit has "
                            f"{circuit.parameterization!r}: use a gradient optimizer or rebuild it from its graph"
                        )
                    self.circuits.append(circuit)
                    groups.append({**group, "params": list(circuit.tables)})
        if not groups:
            places = ", ".join(type(group["params"]).__name__ for group in wanted) or "an empty list"
            raise ValueError(
                f"{type(self).__name__}: found no Circuit in {places}; its tables are all that {type(self).__name__} "
                "trains, other parameters need a gradient optimizer"
            )
        super().__init__(groups, defaults)
        for group in self.param_groups:
            self._check(group, is_new=True)

    def _expected(self, got: Any) -> str:
        name = type(self).__name__
        return f"{name}: got {described(got)}, expected a module, or groups {{'params': module, 'lr': ...}}"

    def __getstate__(self) -> dict[str, Any]:
        """As in every optimizer, and its circuits: a copy has copies of them, those that are copied along with it."""
        return {**super().__getstate__(), "circuits": self.circuits, "shared": self.shared}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups.

        Raises:
            ValueError: at any later time.
        """
        if len(self.param_groups) >= len(self.circuits):
            name = type(self).__name__
            raise ValueError(f"{name}: groups cannot be added later; make a new optimizer over all modules")
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any], *, is_new: bool = False) -> None:
        """Raise a ValueError unless the settings are in their ranges; a schedule may take the step size to 0."""
        check_number("lr", group["lr"], 0, 1, above_low=is_new, meaning=", the EM step size")
        check_number("pseudocount", group["pseudocount"], 0, meaning=", a number of examples")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One EM step from the accumulated gradients of -(weighted) log-likelihood, summed over all ranks.

        Raises:
            ValueError: a setting was changed to a value out of its range, or gradients hold NaN or infinity; nothing
                has moved then, on any rank. On a GPU nobody waits for such numbers: the step then goes without any
                flow, and a later call raises; see `Circuit.check_inputs`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check(group)
        if any(circuit.engine.lacks_statistics for circuit in self.circuits):
            raise ValueError(
                f"{type(self).__name__}: a circuit has inputs that need more than gradients (Gaussian, Binomial, "
                "DiscretizedLogistic), and these came from inside `circuit.reference()`: call log_prob outside of it "
                "and zero_grad() first"
            )
        self._reduce()
        for circuit in self.circuits:
            refuse_bad_flows(circuit.engine, circuit.stored(), type(self).__name__)
        for circuit, group in zip(self.circuits, self.param_groups, strict=True):
            if any(table.grad is not None for table in group["params"]):
                self._step_circuit(circuit, group)
                circuit.trust_tables()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the flows.

        The next backward pass writes its gradients to the memory of these: clone those that you want to keep.
        """
        for circuit in self.circuits:
            circuit.engine.forget()
            for number, table in enumerate(circuit.stored()):
                if table.grad is None:
                    continue
                if set_to_none:
                    circuit.engine.gradient_pool[number] = table.grad
                    table.grad = None
                else:
                    table.grad.zero_()

    @abstractmethod
    def _step_circuit(self, circuit: Circuit, group: dict[str, Any]) -> None:
        """The M-step of one circuit, in place."""

    def _reduce(self) -> None:
        """Sum gradients and statistics over ranks; a rank without examples contributes zeros."""
        if rank_and_size()[1] == 1 or not self.shared:
            return
        taking_part = any_rank([any(table.grad is not None for table in circuit.tables) for circuit in self.circuits])
        sums: list[Tensor] = []
        for circuit, active in zip(self.circuits, taking_part, strict=True):
            for number, table in enumerate(circuit.stored()):
                if not (active and table.requires_grad):
                    continue
                if table.grad is None:
                    table.grad = torch.zeros_like(table)
                sums.append(table.grad)
                statistics = circuit.engine.statistics_of(number, table)
                if statistics is not None:
                    sums.append(statistics)
        sum_in_place(sums)


class CircuitEM(_CircuitOptimizer):
    r"""Mini-batch EM that averages parameters.

    .. math:: \theta \leftarrow (1 - s) \theta + s (F_{nc} + a / |ch(n)|) / (F_n + a)

    A node without flow keeps its parameters. With lr = 1, the flows of a whole data set and pseudocount 0 this is EM,
    which never lowers the likelihood.

    A smooth prior (`OrderedCategorical`) adds its pseudocounts, made of the flows of this batch, to F.

    The children ch(n) are those that the node's mask leaves in. An edge that it leaves out is a structural zero and
    stays 0; one that merely has weight 0 gets pseudocounts as all others do, and so does not stay 0.

    Args:
        module: every Circuit in it is trained.
        lr: step size s in (0, 1]; a schedule may take it to 0, where nothing moves.
        pseudocount: a, per sum node (or input unit) and step, in examples.
        shared: whether several processes train these circuits, whose flows are summed then; False: they are this
            process's alone, and nothing is sent.

    Raises:
        ValueError: a module without circuits, or with logits in place of probabilities, or a number out of its range.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Bernoulli()))
        >>> x = torch.tensor([[0, 0, 0], [1, 1, 1]])
        >>> optimizer = pc.CircuitEM(circuit, lr=1.0, pseudocount=0.0)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = -circuit.log_prob(x).sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> print(f"{loss / 2:.2f}")  # two worlds of one half each: log 2
        0.69
    """

    def __init__(
        self,
        module: nn.Module | Iterable[dict[str, Any]],
        lr: float = 0.1,
        *,
        pseudocount: float = 0.01,
        shared: bool = True,
    ) -> None:
        super().__init__(module, {"lr": lr, "pseudocount": pseudocount}, shared)

    def _step_circuit(self, circuit: Circuit, group: dict[str, Any]) -> None:
        step, pseudocount, engine = group["lr"], group["pseudocount"], circuit.engine
        for number, table in enumerate(circuit.stored()):
            if table.grad is None:
                continue
            sums_PXT = engine.statistics_of(number, table)
            if sums_PXT is not None:
                _move_inputs(_family(circuit, number), table, sums_PXT, pseudocount, step)
                continue
            prior = _prior(circuit, number)
            if prior is not None:
                self._step_with_prior(circuit, number, table, prior, group)
                continue
            floor, edges = _has_floor(circuit, number, pseudocount), engine.edges(number)
            mask = None if edges is not None else engine.mask(number)
            starts = None if edges is None else edges.start
            rest = {"pseudocount": pseudocount, "floor": floor, "starts": starts}
            if _update_in_kernels(table, table.grad, mask, step=step, **rest):
                continue
            if edges is not None:
                _average_rows(table, table.grad, edges, step, pseudocount)
                continue
            for at in _chunks(table):
                theta_PXY = table[at]
                flow_PXY = torch.mul(theta_PXY, table.grad[at])  # negative, as the loss is
                flow_PX1 = flow_PXY.sum(-1, keepdim=True).neg_()
                visited_PX1 = (flow_PX1 > 0).to(table.dtype)
                rate_PX1 = step * visited_PX1 / (flow_PX1 + pseudocount).clamp_min_(torch.finfo(table.dtype).tiny)
                theta_PXY.mul_(1 - step * visited_PX1)
                theta_PXY.add_(flow_PXY.mul_(-rate_PX1))
                _add_pseudocount(theta_PXY, rate_PX1, mask, at, pseudocount)
                _keep_floor(circuit, number, theta_PXY, pseudocount)

    def _step_with_prior(
        self, circuit: Circuit, number: int, table: Tensor, prior: SmoothPrior, group: dict[str, Any]
    ) -> None:
        """The same, with a prior that counts beside the flows of this batch."""
        assert table.grad is not None
        step, pseudocount = group["lr"], group["pseudocount"]
        rest = {"step": step, "pseudocount": pseudocount, "floor": _has_floor(circuit, number, pseudocount)}
        if cpu_updates.update_table_with_prior(table, prior, grad_PXY=table.grad, **rest):
            return
        for at in _chunks(table):
            flow_PXY = torch.mul(table[at], table.grad[at]).neg_()
            old_PX1 = flow_PXY.sum(-1, keepdim=True).add_(pseudocount)
            _blend_with_prior(prior, table[at], flow_PXY, old_PX1, step, step * pseudocount)
            _keep_floor(circuit, number, table[at], pseudocount)


class Anemone(_CircuitOptimizer):
    r"""EM that averages statistics (flows) rather than parameters, with momentum.

    With F the bias-corrected moving average of flows, N that of the root flow and TD(n) the top-down probability of n:

    .. math:: F' = (s / N) F + (1 - s) TD(n) \theta_{nc}, \quad
              \theta \leftarrow (N F'_{nc} + a / |ch(n)|) / (N F'_n + a)

    A node that is rarely visited moves as little as its flow says. Nodes without any flow keep their parameters.

    A smooth prior (`OrderedCategorical`) adds its pseudocounts A to F, and their sum A_n to the N TD(n) examples that
    theta stands for: s remains the step size. The averages are those of the data alone.

    The children ch(n) are those that the node's mask leaves in. An edge that it leaves out is a structural zero and
    stays 0; one that merely has weight 0 gets pseudocounts as all others do, and so does not stay 0.

    Args:
        module: every Circuit in it is trained; each Circuit object has its own N.
        lr: step size s in (0, 1]; a schedule may take it to 0, where pseudocounts alone count.
        momentum: of the moving averages, in [0, 1).
        pseudocount: a, per sum node (or input unit), in examples.
        shared: as of `CircuitEM`.

    Raises:
        ValueError: a module without circuits, or with logits in place of probabilities, or a number out of its range.

    References:
        Liu et al., Anemone, 2025 (arXiv 2505.19982).

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Bernoulli()))
        >>> x = torch.tensor([[0, 0, 0], [1, 1, 1]])
        >>> optimizer = pc.Anemone(circuit)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     loss = -circuit.log_prob(x).sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> print(f"{loss / 2:.2f}")  # two worlds of one half each: log 2
        0.69
    """

    def __init__(
        self,
        module: nn.Module | Iterable[dict[str, Any]],
        lr: float = 0.4,
        *,
        momentum: float = 0.9,
        pseudocount: float = 1e-6,
        shared: bool = True,
    ) -> None:
        super().__init__(module, {"lr": lr, "momentum": momentum, "pseudocount": pseudocount}, shared)

    def _check(self, group: dict[str, Any], *, is_new: bool = False) -> None:
        super()._check(group, is_new=is_new)
        check_number("momentum", group["momentum"], 0, meaning=", below 1")
        if group["momentum"] >= 1:
            raise ValueError(f"momentum: got {group['momentum']}, expected less than 1")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in every optimizer, but averaged statistics of inputs stay in double precision."""
        super().load_state_dict(state_dict)
        for circuit, group in zip(self.circuits, state_dict["param_groups"], strict=True):
            for number, (table, index) in enumerate(zip(circuit.tables, group["params"], strict=True)):
                saved = state_dict["state"].get(index)
                if saved and circuit.engine.statistics_of(number, table) is not None:
                    self.state[table]["flow"] = saved["flow"].to(table.device, torch.float64, copy=True)

    def _step_circuit(self, circuit: Circuit, group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        for number, table in enumerate(circuit.stored()):
            if table.grad is not None:
                self._average(circuit, number, table, momentum)
        root_GH = self._root_flow(circuit)
        total = root_GH.sum()
        if may_ask(total) and not bool(total > 0):
            return
        # Without any flow no row is visited and nothing changes: an accelerator need not be asked.
        share_GH = root_GH / total.clamp_min(torch.finfo(total.dtype).tiny)
        top_down = circuit.engine.top_down(circuit.probabilities(), share_GH.to(circuit.dtype))
        for number, table in enumerate(circuit.stored()):
            if table.grad is None:
                continue
            correction = 1 - momentum ** self.state[table]["step"]
            prior = _prior(circuit, number)
            if prior is not None:
                expected_PX1 = total.to(table.dtype) * top_down[number][..., None]
                self._update_with_prior(circuit, number, table, prior, expected_PX1, correction, group)
                continue
            scale_PX1 = ((1 - group["lr"]) * total).to(table.dtype) * top_down[number][..., None]
            if circuit.engine.statistics_of(number, table) is not None:
                sums_PXT = self.state[table]["flow"] * (group["lr"] / correction)
                _move_inputs(
                    _family(circuit, number), table, sums_PXT, scale_PX1.double() + group["pseudocount"], step=1.0
                )
                continue
            self._update(circuit, number, table, scale_PX1, correction, group)

    def _update(
        self,
        circuit: Circuit,
        number: int,
        table: Tensor,
        scale_PX1: Tensor,
        correction: float,
        group: dict[str, Any],
    ) -> None:
        """theta = (s F + (1 - s) N TD theta + a / |ch|) / (the sum of that): rows of theta sum to one."""
        step, pseudocount = group["lr"] / correction, group["pseudocount"]
        flows, engine = self.state[table]["flow"], circuit.engine
        edges = engine.edges(number)
        mask = None if edges is not None else engine.mask(number)
        floor = _has_floor(circuit, number, pseudocount)
        statistics = {"flow_PXY": flows, "scale_PX1": scale_PX1, "starts": None if edges is None else edges.start}
        if _update_in_kernels(table, None, mask, step=step, pseudocount=pseudocount, floor=floor, **statistics):
            return
        if edges is not None:
            _blend_rows(table, flows, scale_PX1, edges, step, pseudocount)
            return
        for at in _chunks(table):
            theta_PXY, flow_PXY = table[at], flows[at]
            rate_PX1 = _blend(theta_PXY, flow_PXY, scale_PX1[at], step, pseudocount)
            _add_pseudocount(theta_PXY, rate_PX1, mask, at, pseudocount)
            _keep_floor(circuit, number, theta_PXY, pseudocount)

    def _update_with_prior(
        self,
        circuit: Circuit,
        number: int,
        table: Tensor,
        prior: SmoothPrior,
        expected_PX1: Tensor,
        correction: float,
        group: dict[str, Any],
    ) -> None:
        """The same, with a prior that counts beside the averaged flows; what is averaged stays the data's alone."""
        step, pseudocount, flows = group["lr"], group["pseudocount"], self.state[table]["flow"]
        rest = {"step": step, "pseudocount": pseudocount, "floor": _has_floor(circuit, number, pseudocount)}
        averages = {"flow_PXY": flows, "expected_PX1": expected_PX1, "correction": correction}
        if cpu_updates.update_table_with_prior(table, prior, **averages, **rest):
            return
        for at in _chunks(table):
            _blend_with_prior(prior, table[at], flows[at] / correction, expected_PX1[at], step, pseudocount)
            _keep_floor(circuit, number, table[at], pseudocount)

    def _average(self, circuit: Circuit, number: int, table: Tensor, momentum: float) -> None:
        """Update the moving average of the flows of one parameter tensor."""
        assert table.grad is not None
        state = self.state[table]
        sums_PXT = circuit.engine.statistics_of(number, table)
        if not state:
            state["step"] = 0
            state["flow"] = torch.zeros_like(table if sums_PXT is None else sums_PXT)
        state["step"] += 1
        if sums_PXT is not None:
            state["flow"].lerp_(sums_PXT, 1 - momentum)
            return
        forgotten = FORGOTTEN if state["step"] % FORGET_EVERY == 0 else -1.0
        averages = {"flow_PXY": state["flow"], "momentum": momentum, "forgotten": forgotten}
        if _update_in_kernels(table, table.grad, None, step=0.0, pseudocount=0.0, floor=False, **averages):
            return
        for at in _chunks(table):
            flow_PXY = state["flow"][at]
            flow_PXY.mul_(momentum).addcmul_(table[at], table.grad[at], value=momentum - 1)
            if state["step"] % FORGET_EVERY == 0:
                functional.threshold(flow_PXY, FORGOTTEN, 0.0, inplace=True)

    def _root_flow(self, circuit: Circuit) -> Tensor:
        """The averaged flow of every head, (G, H), bias-corrected."""
        out_GH = torch.zeros(circuit.engine.roots.shape, dtype=torch.float64, device=circuit.device)
        momentum = self.param_groups[self._group(circuit)]["momentum"]
        tables = circuit.stored()
        for number, circuits, rows in circuit.engine.root_places():
            state = self.state.get(tables[number])
            if state:
                flow_FH = state["flow"][rows].sum(-1).double() / (1 - momentum ** state["step"])
                width = min(out_GH.shape[1], flow_FH.shape[1])  # either may be padded
                out_GH[circuits, :width] = flow_FH[:, :width]
        return out_GH

    def _group(self, circuit: Circuit) -> int:
        return next(index for index, found in enumerate(self.circuits) if found is circuit)


def _update_in_kernels(theta: Tensor, *tensors: Tensor | None, **settings: Any) -> bool:
    """An M-step in place by compiled kernels; False, with nothing done, where there are none."""
    return any(module.update_table(theta, *tensors, **settings) for module in (cpu_updates, triton_updates))


def _chunks(table: Tensor) -> Iterator[slice]:
    """Ranges of parameter rows, so that several operations on a range find it in the cache."""
    rows = len(table)
    step = rows if table.device.type != "cpu" else max(1, CACHE_SIZE // max(table[0].numel(), 1))
    for low in range(0, rows, step):
        yield slice(low, min(low + step, rows))


def _average_rows(theta_E: Tensor, grad_E: Tensor, edges: SparseEdges, step: float, pseudocount: float) -> None:
    """The M-step of `CircuitEM` on the weights of live edges."""
    flow_E = torch.mul(theta_E, grad_E).neg_()
    flow_R = edges.row_sums(flow_E)
    visited_R = (flow_R > 0).to(theta_E.dtype)
    rate_R = step * visited_R / (flow_R + pseudocount).clamp_min_(torch.finfo(theta_E.dtype).tiny)
    added_E = edges.spread(rate_R * pseudocount / edges.counts)
    theta_E.mul_(edges.spread(1 - step * visited_R)).addcmul_(flow_E, edges.spread(rate_R)).add_(added_E)


def _blend(theta_PXY: Tensor, flow_PXY: Tensor, scale_PX1: Tensor, step: float, pseudocount: float) -> Tensor:
    """The M-step of `Anemone` but for pseudocounts: returns what is left to do, times what each row gets of them."""
    total_PX1 = flow_PXY.sum(-1, keepdim=True)
    weight_PX1 = (step * total_PX1 + scale_PX1 + pseudocount).clamp_min_(torch.finfo(theta_PXY.dtype).tiny)
    visited_PX1 = total_PX1 > 0
    keep_PX1 = torch.where(visited_PX1, scale_PX1 / weight_PX1, 1.0)
    rate_PX1 = visited_PX1 / weight_PX1
    theta_PXY.mul_(keep_PX1).addcmul_(flow_PXY, step * rate_PX1)
    return rate_PX1


def _blend_with_prior(
    prior: SmoothPrior, theta_PXY: Tensor, flow_PXY: Tensor, old_PX1: Tensor, step: float, pseudocount: float
) -> None:
    """theta = (s (F + A) + (1 - s) (old + A_n) theta + a / |ch|) / (the sum of that), A the prior's pseudocounts.

    `flow_PXY` becomes F + A. `old_PX1`: flow that the old parameters stand for, to which A_n, the sum of A, belongs as
    it does to F. So s stays the step size, and the same flows again and again end at (F + A) / (F_n + A_n).
    """
    added_PXY = prior.pseudocounts(flow_PXY)
    scale_PX1 = (old_PX1 + added_PXY.sum(-1, keepdim=True)).mul_(1 - step)
    flow_PXY.add_(added_PXY)
    rest = {"step": step, "pseudocount": pseudocount, "floor": False}
    if not _update_in_kernels(theta_PXY, None, None, flow_PXY=flow_PXY, scale_PX1=scale_PX1, **rest):
        rate_PX1 = _blend(theta_PXY, flow_PXY, scale_PX1, step, pseudocount)
        _add_pseudocount(theta_PXY, rate_PX1, None, slice(None), pseudocount)


def _blend_rows(
    theta_E: Tensor, flow_E: Tensor, scale_PX1: Tensor, edges: SparseEdges, step: float, pseudocount: float
) -> None:
    """The M-step of `Anemone` on the weights of live edges."""
    flow_R, scale_R = edges.row_sums(flow_E), scale_PX1.flatten()
    weight_R = (step * flow_R + scale_R + pseudocount).clamp_min_(torch.finfo(theta_E.dtype).tiny)
    visited_R = flow_R > 0
    keep_R = torch.where(visited_R, scale_R / weight_R, 1.0)
    rate_R = visited_R / weight_R
    added_E = edges.spread(rate_R * pseudocount / edges.counts)
    theta_E.mul_(edges.spread(keep_R)).addcmul_(flow_E, edges.spread(step * rate_R)).add_(added_E)


def _add_pseudocount(theta_PXY: Tensor, rate_PX1: Tensor, mask: Tensor | None, at: slice, pseudocount: float) -> None:
    """Add rate * pseudocount / (live alternatives of the row) to the live alternatives."""
    if pseudocount == 0:
        return
    if mask is None:
        theta_PXY.add_(rate_PX1 * (pseudocount / theta_PXY.shape[-1]))
    else:
        live_PXY = mask[at].to(theta_PXY.dtype)
        theta_PXY.addcmul_(live_PXY, rate_PX1 * (pseudocount / live_PXY.sum(-1, keepdim=True).clamp_min_(1)))


def _keep_floor(circuit: Circuit, number: int, theta_PXY: Tensor, pseudocount: float) -> None:
    distribution = circuit.plan.groups[number].distribution
    if distribution is not None and _has_floor(circuit, number, pseudocount):
        theta_PXY.copy_(distribution.floored(theta_PXY))


def _has_floor(circuit: Circuit, number: int, pseudocount: float) -> bool:
    """Without pseudocounts probabilities of categories fall without end."""
    return pseudocount < 1e-12 and circuit.plan.groups[number].distribution is not None


def _prior(circuit: Circuit, number: int) -> SmoothPrior | None:
    distribution = circuit.plan.groups[number].distribution
    return None if distribution is None else distribution.prior


def _family(circuit: Circuit, number: int) -> Distribution:
    distribution = circuit.plan.groups[number].distribution
    assert distribution is not None
    return distribution


def _move_inputs(
    family: Distribution, table_PXS: Tensor, sums_PXT: Tensor, old_weight: Tensor | float, step: float
) -> None:
    """Blend expectation parameters, never variances: those of the data and `old_weight` examples of the old ones."""
    flow_PX1, old_PXT = sums_PXT[..., :1], family.expected(table_PXS)
    target_PXT = (sums_PXT[..., 1:] + old_weight * old_PXT) / (flow_PX1 + old_weight).clamp_min(1e-300)
    new_PXS = family.maximise(torch.lerp(old_PXT, target_PXT, step)).to(table_PXS.dtype)
    table_PXS.copy_(torch.where(flow_PX1 > 0, new_PXS, table_PXS))
