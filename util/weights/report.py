"""The report of loading weights: which tensors were loaded, interpolated, missing or unused, and why."""

import re
from dataclasses import dataclass, field

from util.weights.names import is_decoder


@dataclass
class LoadReport:
    """The fate of every tensor. `taken`, `interpolated` and `missing` together are the model's tensors; `unexpected`
    and `skipped` are those of the file that were not loaded. When the file's head is not loaded, it is in `skipped`,
    and the model's head is in `missing`."""

    path: str
    origin: str
    taken: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    grids: str = ""  # "14x14 -> 16x16" when positions were interpolated
    head: str = ""  # why the head was skipped
    reasons: dict[str, list[str]] = field(default_factory=dict)  # {reason: names} of `unexpected`
    note: str = ""

    def shown(self, verbose: bool) -> str:
        """Return the report in full if `verbose`, else in one line. That line names each tensor that is missing, says
        whether positions were interpolated or a head skipped, and counts the other tensors."""
        if verbose:
            return str(self)
        loaded = f"{self.path}: {self.origin}, {len(self.taken) + len(self.interpolated)} tensors loaded"
        unused = [f"{len(names)} not used ({reason})" for reason, names in self.reasons.items()]
        resized = f"{' and '.join(self.interpolated)} interpolated {self.grids}"
        return "; ".join([loaded, *self._changes(resized, unused)]) + " (--verbose names them)" * bool(unused)

    def __str__(self):
        loaded = f"{self.path}: {self.origin}", f"taken: {summary(self.taken)}"
        unused = [f"not used: {summary(names)} ({reason})" for reason, names in self.reasons.items()]
        resized = f"interpolated: {summary(self.interpolated)}, {self.grids}"
        return "\n  ".join([*loaded, *self._changes(resized, unused)])

    def _changes(self, resized: str, unused: list[str]) -> list[str]:
        """Return what is not simply loaded, with the texts on positions that were `resized` and on `unused` tensors."""
        kept = "missing in the file, kept at their initial value: "
        missing = f"{kept}{summary(self.missing)}" if self.missing else ""
        skipped = f"skipped: {self.head}" if self.skipped else ""
        note = f"note: {self.note}" if self.note else ""
        return list(filter(None, [resized if self.interpolated else "", missing, *unused, skipped, note]))


def why_no_head(own: dict, state: dict, ignore_head: bool) -> str:
    """Return why the file's head is not loaded, "" when it fits or the file has none."""
    theirs, ours = ({name: t.shape for name, t in s.items() if name.startswith("head.")} for s in (state, own))
    if not theirs:
        return ""
    if ignore_head:
        return "head: left out, as requested"
    if not ours or (theirs == ours and _feature_norm(state) == _feature_norm(own)):
        return ""
    if theirs.keys() != ours.keys():
        return f"head: {some(list(theirs))} in the file, {some(list(ours))} in the model: new"
    if theirs != ours:
        classes = [shapes[max(shapes)][0] for shapes in (theirs, ours)]  # of the last layer's weight
        return f"head: {classes[0]} classes in the file, {classes[1]} in the model: new"
    # The shapes fit, but a head that was trained on one feature is useless for the other.
    return f"head: reads {_feature_norm(state)} in the file, {_feature_norm(own)} in the model: new"


def _feature_norm(state: dict) -> str:
    return "pooled patches (fc_norm)" if "fc_norm.weight" in state else "the [cls] token (norm)"


def why_unused(name: str, own: dict) -> str:
    """Return why a tensor of the file is not loaded into a model with the state `own`."""
    if is_decoder(name):
        return "for masked image modelling in the encoder" if "mask_token" in own else "decoder, not needed"
    if name.startswith(("norm.", "fc_norm.")):
        return f"this model reads {_feature_norm(own)}"
    if name.startswith("head."):
        return "this model has no head"
    return "not part of a ViT encoder, MAE decoder or head"


def summary(names: list[str], most: int | None = None) -> str:
    """Return names by group: `blocks.0-11 (144 tensors), norm (2 tensors), cls_token`, at most `most` groups."""
    groups: dict[str, list[str]] = {}
    for name in names:
        group = re.match(r"\w*blocks(?=\.\d+\.)|[^.]*", name)[0]
        groups.setdefault(group, []).append(name)
    texts = [_group_text(group, members) for group, members in groups.items()]
    return ", ".join(texts[:most]) + ", ..." * (most is not None and len(texts) > most)


def _group_text(group: str, members: list[str]) -> str:
    if len(members) == 1:
        return members[0]
    depths = sorted({int(name.split(".")[1]) for name in members}) if group.endswith("blocks") else []
    if depths:
        group += f".{depths[0]}-{depths[-1]}" if len(depths) > 1 else f".{depths[0]}"
    return f"{group} ({len(members)} tensors)"


def some(names: list[str], most: int = 2) -> str:
    """Return the first `most` names and the number of others: `a, b and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
