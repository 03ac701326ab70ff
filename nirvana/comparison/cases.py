"""What is compared: one case for each row of the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from nirvana.errors import NirvanaError
from nirvana.published import published
from nirvana.references import REFERENCES
from nirvana.repair import METHODS, NONE
from nirvana.saliency.criteria import CRITERIA, RANDOM
from nirvana.saliency.kinds import GLOBAL
from nirvana.widths import SCOPES, WidthRule

#: `nirvana.allocate` with gamma for every criterion; the rule of the criterion's own paper; no plan at all.
COMMON, PUBLISHED, REFERENCE = "common", "published", "reference"
ALLOCATIONS = (COMMON, PUBLISHED)


class Case(NamedTuple):
    """What is pruned away, and how."""

    criterion: str
    sparsity: float
    scope: str
    allocation: str
    repair: str


def list_cases(
    criteria: Sequence[str],
    sparsity: Sequence[float],
    scope: Sequence[str],
    allocation: Sequence[str],
    repair: Sequence[str],
) -> list[Case]:
    """Every combination once, one criterion after the other.

    A criterion whose paper does what the common rule does has no second row for `PUBLISHED`; where a paper repairs,
    its repair takes the place of none in the rows of `PUBLISHED`.

    Raises:
        NirvanaError: unknown or doubled names, nothing to compare, or a sparsity out of range.
    """
    known = [*CRITERIA, RANDOM, *REFERENCES]
    parts = {name: [name] if name in REFERENCES else name.split("+") for name in criteria}
    for name in criteria:
        if not all(part in CRITERIA or part == RANDOM or name in REFERENCES for part in parts[name]):
            raise NirvanaError(f"--criteria {name!r} is unknown; known are {', '.join(known)}, and sums as a+b")
    _check("scope", scope, SCOPES)
    _check("allocation", allocation, ALLOCATIONS)
    _check("repair", repair, METHODS)
    for option, values in (("criteria", criteria), ("sparsity", sparsity)):
        _check(option, values, values)
    for value in sparsity:
        WidthRule(value)  # refuses what is out of range
    cases: dict[Case, None] = {}
    for name in criteria:
        own = published(name)
        rules = (REFERENCE,) if name in REFERENCES else allocation[:1] if own == GLOBAL else allocation
        for value in sparsity:
            for kind in scope:
                for rule in rules:
                    methods = (NONE,) if rule == REFERENCE else repair
                    for method in methods:
                        does = own.repair if rule == PUBLISHED and method == NONE else method
                        cases[Case(name, value, kind, rule, does)] = None
    return list(cases)


def default_criteria() -> tuple[str, ...]:
    """All that are registered, and random; references only where they are named."""
    return (*CRITERIA, RANDOM)


def _check(option: str, values: Sequence[object], allowed: Sequence[object]) -> None:
    if not values:
        raise NirvanaError(f"--{option} is empty; name at least one")
    for value, count in Counter(values).items():
        if value not in allowed:
            raise NirvanaError(f"--{option} {value!r} must be one of {', '.join(map(str, allowed))}")
        if count > 1:
            raise NirvanaError(f"--{option} names {value} {count} times; name it once")
