"""Where a layer's hook points are, read off a trace: each kind is a place, or a reason why there is none.

In: a `Trace`. Out: `Place`s by kind. Only the two halves of a layer are known by name (the tables below);
which norm comes first, what is multiplied, and whether one half follows the other is read off arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deeplens_lightning.model.tracing import Call, Form, Trace

LAYER_KINDS = (
    "mlp_in", "mlp_act", "mlp_post", "mlp_out", "attn_out", "attn_z", "resid_pre", "resid_mid", "resid_post",
)  # fmt: skip
"""The kinds of hook point that every layer may have."""

ATTENTION = {
    "attn", "attention", "self_attn", "self_attention", "SelfAttention", "self_att", "linear_attn",
    "multi_head_attention",
}  # fmt: skip
"""What transformers calls the attention of a layer."""

MLP = {
    "mlp", "ffn", "feed_forward", "ff", "DenseReluDense", "block_sparse_moe", "mlp_block",
    "fc1", "intermediate",
}  # fmt: skip
"""What it calls the MLP, or the first part of one that has no module of its own (OPT, BERT)."""

_NORM = re.compile(r"norm|(^|_)ln", re.IGNORECASE)
_ACTIVATION = re.compile(r"(^|_)act($|_|ivation)|gelu|silu|relu", re.IGNORECASE)
_EXPERTS = re.compile(r"expert|router|moe", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One side of one module, and what its value is multiplied by; see `HookPoint` for the fields."""

    module: str
    side: Literal["in", "out"]
    d_in: int
    scale: float = 1.0


def layer_anatomy(trace: Trace, index: int) -> dict[str, Place | str]:
    """Every kind of one layer: its place, or why there is none."""
    path = f"{trace.layers}.{index}"
    runs = trace.of(path)
    if len(runs) != 1:
        reason = f"layer {index} runs {len(runs)} times in one forward pass"
        return dict.fromkeys(LAYER_KINDS, reason)
    return _Layer(trace, runs[0]).places()


def final_norm(trace: Trace) -> Place | str:
    """The norm that follows the last layer."""
    last = trace.of(f"{trace.layers}.{trace.depth - 1}")
    after = (call for call in trace.calls if last and call.start > last[-1].end)
    norm = next((call for call in after if _is(_NORM, call) and call.given == last[-1].made), None)
    if norm is None or not norm.d_made:
        return "no norm follows its last layer"
    return Place(module=norm.path, side="out", d_in=norm.d_made)


class _Layer:
    """One layer's calls, its halves, and what each half adds to the stream."""

    def __init__(self, trace: Trace, whole: Call) -> None:
        self.trace = trace
        self.whole = whole
        self.inside = [call for call in trace.calls if call.within(whole)]
        self.attn = _half(self.inside, ATTENTION)
        outside = [call for call in self.inside if self.attn is None or not call.within(self.attn)]
        self.mlp = _half(outside, MLP)
        self.mlp_calls = [call for call in outside if self.mlp and call.start > self.mlp.start]
        if self.mlp:
            self.mlp_calls.insert(0, self.mlp)
        end = self._through(whole.made or {})
        self.mlp_adds = self._born_in(self.mlp, end)
        self.middle = {term: factor for term, factor in end.items() if term not in self.mlp_adds}
        start = self._through(self.middle)
        self.attn_adds = self._born_in(self.attn, start)
        rest = {term: factor for term, factor in start.items() if term not in self.attn_adds}
        self.followed = rest == whole.given or (self.attn is None and bool(self.mlp_adds))

    def places(self) -> dict[str, Place | str]:
        whole, mlp, attn = self.whole, self.mlp, self.attn
        no_mlp, no_attn = "it has no MLP of a known name", "it has no attention of a known name"
        down = self._projection(self.mlp_calls, mlp, self.mlp_adds) if mlp else no_mlp
        z = self._projection(self.inside, attn, self.attn_adds) if attn else no_attn
        return {
            "mlp_in": _place(mlp, "in") if mlp else no_mlp,
            "mlp_act": down if isinstance(down, str) else self._activation(down),
            "mlp_post": down if isinstance(down, str) else _place(down, "in"),
            "mlp_out": self._added(self.mlp_adds) if mlp else no_mlp,
            "attn_out": self._added(self.attn_adds) if attn else no_attn,
            "attn_z": z if isinstance(z, str) else _place(z, "in"),
            "resid_pre": _place(whole, "in"),
            "resid_mid": self._between(),
            "resid_post": _place(whole, "out"),
        }

    def _through(self, form: Form) -> Form:
        """What went into the norm that made this, if one did (post-norm layers); else the form itself."""
        for call in self.inside:
            if call.made == form and call.given and _is(_NORM, call) and len(form) == 1:
                return call.given
        return form

    def _born_in(self, half: Call | None, form: Form) -> Form:
        """The terms of a form that appeared since this half began, and not in the other one."""
        halves = [call for call in (self.attn, self.mlp) if call]

        def owner(term: int) -> Call | None:
            begun = [call for call in halves if call.start <= self.trace.born[term]]
            return max(begun, key=lambda call: call.start, default=None)

        return {term: factor for term, factor in form.items() if half and owner(term) is half}

    def _added(self, adds: Form) -> Place | str:
        """The outermost module whose output, times a constant, is what the stream receives."""
        if not self.followed or not adds:
            return "what it adds to the residual stream is no sum that could be followed"
        for call in sorted(self.inside, key=lambda call: (call.path.count("."), call.start)):
            ratios = {adds[term] / call.made[term] for term in adds if call.made and call.made.get(term)}
            if call.made and call.made.keys() == adds.keys() and len(ratios) == 1 and call.d_made:
                return _place(call, "out", scale=ratios.pop())
        return "what it adds to the residual stream is no single module's output"

    def _between(self) -> Place | str:
        """The first module that reads the stream between the halves."""
        if not self.followed or not self.middle or self.mlp is None:
            return "its residual stream is no sum that could be followed"
        for call in self.inside:
            if call.given == self.middle and call.d_given and self.middle != self.whole.given:
                return _place(call, "in")
        return "its attention and MLP run in parallel, so there is no stream between them"

    def _projection(self, calls: Sequence[Call], half: Call, adds: Form) -> Call | str:
        """The linear map that ends a half."""
        linear = [call for call in calls if call.start > half.start and _is_linear(call)]
        linear = [call for call in linear if half is self.mlp or call.within(half)]
        linear = [half, *linear] if _is_linear(half) else linear
        last = max(linear, key=lambda call: call.end, default=None)
        if (
            last
            and last.made
            and last.d_given
            and last.made.keys() in ((half.made or {}).keys(), adds.keys())
        ):
            return last
        if any(_EXPERTS.search(call.name) or _EXPERTS.search(type(call.module).__name__) for call in calls):
            return "it is a mixture of experts, whose rows are per token and expert; take mlp_out or mlp_in"
        return f"its {half.name} does not end in one projection"

    def _activation(self, down: Call) -> Place | str:
        before = [
            call for call in self.mlp_calls if call.end < down.start and not any(call.module.children())
        ]
        found = [call for call in before if _is(_ACTIVATION, call)]
        if len(found) != 1 or not found[0].d_made:
            return "its activation function is no module of its own; take mlp_post"
        return _place(found[0], "out")


def _half(calls: Sequence[Call], names: set[str]) -> Call | None:
    """The outermost call with one of these names that is not the half together with its residual sum."""
    for call in sorted(calls, key=lambda call: (call.path.count("."), call.start)):
        own = call.made is None or call.given is None or not call.made.keys() & call.given.keys()
        if call.name in names and own:
            return call
    return None


def _place(call: Call, side: Literal["in", "out"], scale: float = 1.0) -> Place | str:
    width = call.d_given if side == "in" else call.d_made
    if not width:
        return f"the {side}put of {call.path} has no row per token"
    return Place(module=call.path, side=side, d_in=width, scale=scale)


def _is(pattern: re.Pattern[str], call: Call) -> bool:
    return bool(pattern.search(call.name) or pattern.search(type(call.module).__name__))


def _is_linear(call: Call) -> bool:
    return bool(re.search("Linear|Conv1D|NormHead", type(call.module).__name__)) and hasattr(
        call.module, "weight"
    )
