"""Find the hook points of a layer in a trace.

In: a `Trace`. Out: for each kind of hook point a `ModulePlace`, or the reason why the layer has none.

Only the attention and the MLP of a layer are found by name, with the tables below. Which norm comes first, which
multipliers there are, and whether attention and MLP run one after the other or in parallel is read from the sums in
the trace.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deeplens_lightning.model.linear_forms import Form
from deeplens_lightning.model.tracing import Call, Trace

LAYER_KINDS = (
    "mlp_in", "mlp_act", "mlp_post", "mlp_out", "attn_out", "attn_z", "resid_pre", "resid_mid", "resid_post",
)  # fmt: skip
"""The kinds of hook point that a layer may have."""

ATTENTION = {
    "attn", "attention", "self_attn", "self_attention", "SelfAttention", "self_att", "linear_attn",
    "multi_head_attention",
}  # fmt: skip
"""Names that transformers gives the attention module of a layer."""

MLP = {
    "mlp", "ffn", "feed_forward", "ff", "DenseReluDense", "block_sparse_moe", "mlp_block",
    "fc1", "intermediate",
}  # fmt: skip
"""Names that transformers gives the MLP, or the first part of an MLP that has no module of its own (OPT, BERT)."""

_NORM = re.compile(r"norm|(^|_)ln", re.IGNORECASE)
_ACTIVATION = re.compile(r"(^|_)act($|_|ivation)|gelu|silu|relu", re.IGNORECASE)
_EXPERTS = re.compile(r"expert|router|moe", re.IGNORECASE)
_LINEAR = re.compile("Linear|Conv1D|NormHead")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlace:
    """The input or output of one module, times a constant.

    Attributes:
        module: path inside the base model.
        side: "in" for the module's first input, "out" for its output.
        d_in: width of a row.
        scale: factor by which the value is multiplied before it is added to the residual stream.
    """

    module: str
    side: Literal["in", "out"]
    d_in: int
    scale: float = 1.0


def layer_places(trace: Trace, index: int) -> dict[str, ModulePlace | str]:
    """For every kind of `LAYER_KINDS`: its place in one layer, or the reason why this layer has none."""
    path = f"{trace.layers}.{index}"
    calls = trace.calls_of(path)
    if len(calls) != 1:
        reason = f"layer {index} runs {len(calls)} times in one forward pass"
        return dict.fromkeys(LAYER_KINDS, reason)
    return _Layer(trace, calls[0]).places()


def final_norm(trace: Trace) -> ModulePlace | str:
    """The output of the norm that follows the last layer, or the reason why there is none."""
    last = trace.calls_of(f"{trace.layers}.{trace.depth - 1}")
    after = (call for call in trace.calls if last and call.start > last[-1].end)
    norm = next(
        (call for call in after if _matches(_NORM, call) and call.input_form == last[-1].output_form), None
    )
    if norm is None or not norm.d_out:
        return "no norm follows its last layer"
    return ModulePlace(module=norm.path, side="out", d_in=norm.d_out)


class _Layer:
    """The calls inside one layer, its attention and MLP, and what each of them adds to the residual stream."""

    def __init__(self, trace: Trace, whole: Call) -> None:
        self.trace = trace
        self.whole = whole
        self.inside = [call for call in trace.calls if call.within(whole)]
        self.attn = _outermost(self.inside, ATTENTION)
        outside = [call for call in self.inside if self.attn is None or not call.within(self.attn)]
        self.mlp = _outermost(outside, MLP)
        self.mlp_calls = [call for call in outside if self.mlp and call.start > self.mlp.start]
        if self.mlp:
            self.mlp_calls.insert(0, self.mlp)
        end = self._before_norm(whole.output_form or {})
        self.mlp_adds = self._terms_from(self.mlp, end)
        self.middle = {term: factor for term, factor in end.items() if term not in self.mlp_adds}
        start = self._before_norm(self.middle)
        self.attn_adds = self._terms_from(self.attn, start)
        rest = {term: factor for term, factor in start.items() if term not in self.attn_adds}
        self.is_sum = rest == whole.input_form or (self.attn is None and bool(self.mlp_adds))

    def places(self) -> dict[str, ModulePlace | str]:
        whole, mlp, attn = self.whole, self.mlp, self.attn
        no_mlp, no_attn = "it has no MLP with a known name", "it has no attention with a known name"
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

    def _before_norm(self, form: Form) -> Form:
        """The input of the norm that made this form (post-norm layers); the form itself if no norm made it."""
        for call in self.inside:
            if call.output_form == form and call.input_form and _matches(_NORM, call) and len(form) == 1:
                return call.input_form
        return form

    def _terms_from(self, sublayer: Call | None, form: Form) -> Form:
        """The terms of a form that first appeared after this sublayer started and before the other one did."""
        sublayers = [call for call in (self.attn, self.mlp) if call]

        def origin(term: int) -> Call | None:
            started = [call for call in sublayers if call.start <= self.trace.term_events[term]]
            return max(started, key=lambda call: call.start, default=None)

        return {term: factor for term, factor in form.items() if sublayer and origin(term) is sublayer}

    def _added(self, adds: Form) -> ModulePlace | str:
        """The outermost module whose output, times a constant, is added to the residual stream."""
        if not self.is_sum or not adds:
            return "what it adds to the residual stream is not a sum that the trace can follow"
        for call in sorted(self.inside, key=lambda call: (call.path.count("."), call.start)):
            made = call.output_form
            ratios = {adds[term] / made[term] for term in adds if made and made.get(term)}
            if made and made.keys() == adds.keys() and len(ratios) == 1 and call.d_out:
                return _place(call, "out", scale=ratios.pop())
        return "what it adds to the residual stream is not the output of a single module"

    def _between(self) -> ModulePlace | str:
        """The first module that reads the residual stream between attention and MLP."""
        if not self.is_sum or not self.middle or self.mlp is None:
            return "its residual stream is not a sum that the trace can follow"
        for call in self.inside:
            if call.input_form == self.middle and call.d_in and self.middle != self.whole.input_form:
                return _place(call, "in")
        return "its attention and MLP run in parallel, so there is no residual stream between them"

    def _projection(self, calls: Sequence[Call], sublayer: Call, adds: Form) -> Call | str:
        """The linear map at the end of a sublayer."""
        linear = [call for call in calls if call.start > sublayer.start and _is_linear(call)]
        linear = [call for call in linear if sublayer is self.mlp or call.within(sublayer)]
        linear = [sublayer, *linear] if _is_linear(sublayer) else linear
        last = max(linear, key=lambda call: call.end, default=None)
        if (
            last
            and last.output_form
            and last.d_in
            and last.output_form.keys() in ((sublayer.output_form or {}).keys(), adds.keys())
        ):
            return last
        if any(_matches(_EXPERTS, call) for call in calls):
            return "it is a mixture of experts, whose rows are per token and expert; take mlp_out or mlp_in"
        return f"its {sublayer.name} does not end in a single linear projection"

    def _activation(self, down: Call) -> ModulePlace | str:
        """The activation function before the down-projection."""
        before = [
            call for call in self.mlp_calls if call.end < down.start and not any(call.module.children())
        ]
        found = [call for call in before if _matches(_ACTIVATION, call)]
        if len(found) != 1 or not found[0].d_out:
            return "its activation function is no module of its own; take mlp_post"
        return _place(found[0], "out")


def _outermost(calls: Sequence[Call], names: set[str]) -> Call | None:
    """The outermost call with one of these names whose output does not already contain its residual input."""
    for call in sorted(calls, key=lambda call: (call.path.count("."), call.start)):
        given, made = call.input_form, call.output_form
        if call.name in names and (made is None or given is None or not made.keys() & given.keys()):
            return call
    return None


def _place(call: Call, side: Literal["in", "out"], scale: float = 1.0) -> ModulePlace | str:
    width = call.d_in if side == "in" else call.d_out
    if not width:
        return f"the {side}put of {call.path} does not have one row per token"
    return ModulePlace(module=call.path, side=side, d_in=width, scale=scale)


def _matches(pattern: re.Pattern[str], call: Call) -> bool:
    return bool(pattern.search(call.name) or pattern.search(type(call.module).__name__))


def _is_linear(call: Call) -> bool:
    named_linear = _LINEAR.search(type(call.module).__name__)
    return bool(named_linear) and any(
        name == "weight" for name, _ in call.module.named_parameters(recurse=False)
    )
