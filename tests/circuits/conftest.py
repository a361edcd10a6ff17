"""Fixtures: small circuits of every structure, and their mathematics by enumeration."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.cases import LEAVES, Case, list_cases, make_batch, make_case
from helpers.enumeration import AnemoneReference, Reference
from helpers.structures import KRONECKER


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Correctness is judged in float64; a test of float32 asks for it."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=list_cases(tuple(LEAVES)))
def case(request: pytest.FixtureRequest, double_precision: None) -> Case:
    """Every structure with tables and Gaussians, or those that are listed with it; some with every other leaf."""
    return make_batch() if request.param == "batch" else make_case(*request.param)


@pytest.fixture(params=list_cases(tuple(LEAVES), skip=KRONECKER))
def growing(request: pytest.FixtureRequest, double_precision: None) -> Case:
    """As `case`, without Kronecker products."""
    return make_case(*request.param)


@pytest.fixture(params=sorted(KRONECKER))
def kronecker(request: pytest.FixtureRequest, double_precision: None) -> Case:
    """Structures with Kronecker products, two heads."""
    return make_case(request.param, "bernoulli", 2)


@pytest.fixture(params=list_cases(("categorical", "bernoulli", "binomial", "logistic", "rounded", "ordered")))
def discrete(request: pytest.FixtureRequest, double_precision: None) -> Case:
    """The same with leaves whose worlds can be listed."""
    return make_case(*request.param)


@pytest.fixture
def build_case(double_precision: None) -> Callable[..., Case]:
    """`make_case(structure, leaf, num_heads, seed)` for tests that choose."""
    return make_case


@pytest.fixture
def enumerate_trees() -> type[Reference]:
    """The reference, for circuits that a test builds itself."""
    return Reference


@pytest.fixture
def anemone_reference() -> type[AnemoneReference]:
    """Anemone in NumPy."""
    return AnemoneReference
