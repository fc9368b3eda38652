"""Follow tensors as sums of earlier tensors with constant factors.

In: tensor operations, one by one. Out: for each tensor its linear form, such as
`input + 0.22 * (output of layers.3.mlp)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

Form = Mapping[int, float]
"""A tensor as a sum of terms: coefficient by term number. A term is a tensor that is not itself a followed sum."""


class LinearForms:
    """The linear form of every tensor seen so far.

    Attributes:
        event: number of the present event; the user of this class counts it up.
        term_events: event number at which each term first appeared.
    """

    def __init__(self) -> None:
        self.event = 0
        self.term_events: dict[int, int] = {}
        self._forms: dict[int, Form] = {}  # by id of the tensor
        self._kept: list[Tensor] = []  # keeps the tensors alive, so that no id is used twice

    def of(self, x: Tensor) -> Form:
        """The linear form of a tensor; a tensor seen for the first time becomes a new term."""
        if id(x) not in self._forms:
            self.start_term(x)
        return self._forms[id(x)]

    def start_term(self, x: Tensor) -> None:
        """Make a tensor a term of its own, whatever its form was before."""
        term = len(self.term_events)
        self.term_events[term] = self.event
        self.set(x, {term: 1.0})

    def set(self, x: Tensor, form: Form) -> None:
        """Set the linear form of a tensor."""
        self._kept.append(x)
        self._forms[id(x)] = MappingProxyType(dict(form))

    def combine(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Form | None:
        """The linear form of an operation's result; None for operations that are not followed."""
        if not args or not isinstance(args[0], Tensor):
            return None
        x, other = args[0], args[1] if len(args) > 1 else kwargs.get("other")
        if func in _ADD and isinstance(other, Tensor):
            return _sum(self.of(x), self.of(other), kwargs.get("alpha", 1))
        if func in _MUL and isinstance(other, int | float):
            return {term: factor * other for term, factor in self.of(x).items()}
        if func in _SAME:
            return self.of(x)
        return None


def _sum(a: Form, b: Form, alpha: float) -> Form:
    """The linear form of `a + alpha * b`."""
    return {term: a.get(term, 0) + alpha * b.get(term, 0) for term in (*a, *(t for t in b if t not in a))}


_T = Tensor
_ADD = {torch.add, _T.add, _T.add_, _T.__add__, _T.__radd__, _T.__iadd__}
_MUL = {torch.mul, torch.multiply, _T.mul, _T.mul_, _T.__mul__, _T.__rmul__, _T.__imul__}
_SAME = {
    torch.dropout,
    nn.functional.dropout,
    torch.reshape,
    _T.view,
    _T.reshape,
    _T.contiguous,
    _T.clone,
    _T.to,
    _T.float,
    _T.type_as,
}
