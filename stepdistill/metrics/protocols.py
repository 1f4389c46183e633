"""What a number was measured by: every step from the generator's output to the printed value."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import UserError
from .resampling import check_steps
from .spelled import COLOUR, LAWS, NETWORKS

METRICS = ("fid", "kid", "kid-subsets", "fd-dinov2", "clip-fid", "cmmd", "prdc", "is", "clip", "diversity", "vendi")
PARTS = {"prdc": ("precision", "recall", "density", "coverage")}
"""Metrics of several values."""
FRECHET = {"fid": "fid", "fd-dinov2": "fd-dinov2", "clip-fid": "fid"}
"""Metrics that sums of features are enough for, and the kind of statistics that they compare with."""
SINGLE = ("is", "vendi", "diversity")
"""Metrics of the images alone, without a reference."""
DIRECTIONS = {
    **dict.fromkeys(("fid", "kid", "kid-subsets", "fd-dinov2", "clip-fid", "cmmd"), -1),
    **dict.fromkeys(("precision", "recall", "coverage", "is", "clip"), 1),
}
"""Sign of an improvement of each value; density, diversity and vendi, which noise has most of, have none."""
CLIPS = ("clip-vit-b-32", "clip-vit-l-14", "clip-vit-l-14-336", "clip-vit-g-14")
DINOV2 = ("dinov2-vit-l-14", "dinov2-vit-l-14-pillow")
CLASSIFIERS = ("inception", "inception-clean", "inception-pytorch")
EXTRACTORS = (*CLASSIFIERS, *DINOV2, *CLIPS, "digits")
QUANTISATIONS = {
    "round": "uint8 of clip(127.5 x + 128, 0, 255)",
    "truncate": "uint8 of clip(127.5 (x + 1), 0, 255)",
    "none": "float32 of clip(127.5 (x + 1), 0, 255)",
}
"""How a pixel ``x`` in [-1, 1] becomes one in [0, 255]."""
LABELS = {
    "none": "no class labels",
    "random": "class of a sample drawn uniformly, after its noise, by its own generator",
    "balanced": "sample k is of class (k + k div C) mod C: all in turn, and every tenth sample not of one class",
    "stratified": "of C samples in a row one is of each class, in an order drawn from the number of the row",
    "prompts": "sample k is of prompt k of the prompt file",
}
"""What sample ``k`` is asked to show, of ``C`` classes.

Groups of the jackknife are every tenth sample: were ``k mod C`` the class, leaving a group out would leave classes out.
"""
SUMMARIES = ("mean", "min")
SEEDS = "sample k of repeat r has its own CPU generator, seeded with samples * r + k"

_FILE_FORM = re.compile(r"memory|png|jpeg ([1-9]\d?|100)")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to measure.

    Raises:
        UserError: a field that is not of its grammar.
    """

    name: str
    summary: str
    metrics: tuple[str, ...]
    """Of ``METRICS``."""
    extractor: str
    """Network of fid, kid, prdc, is, diversity and vendi; of ``EXTRACTORS``."""
    prepare: tuple[str, ...] = ()
    """Steps from the stored image to that network, generated and real alike; see ``resampling.prepare``."""
    dinov2: str = "dinov2-vit-l-14"
    """Network of fd-dinov2: resized on the device (``dinov2-vit-l-14``) or by Pillow (``dinov2-vit-l-14-pillow``)."""
    quantisation: str = "round"
    file_form: str = "memory"
    """Form in which generated images reach the network: ``memory``, ``png`` or ``jpeg QUALITY``."""
    samples: int = 50_000
    labels: str = "random"
    seeds: str = SEEDS
    reference: str
    reference_count: int | None = None
    """Images behind the reference; ``None`` where it is not known."""
    ddof: int = 1
    """Divisor ``n - ddof`` of the generated images' covariance."""
    repeats: int = 1
    """Sets of ``samples`` images, of other seeds each."""
    repeats_reported: str = "mean"
    clip_model: str = "clip-vit-g-14"
    """Network of the CLIP score."""
    clip_prepare: tuple[str, ...] = ()
    """Steps before that network's own preprocessing."""
    clip_template: str = "{}"
    clip_scale: float = 1.0
    """Factor of the mean cosine."""
    clip_clamp: bool = False
    """Whether negative cosines count as zero."""
    neighbours: int = 5
    """``k`` of precision, recall, density and coverage."""
    is_splits: int = 10
    """Parts of the samples over which the inception score is averaged."""
    source: str
    """Paper and code."""
    notes: tuple[str, ...] = ()
    """What the source does and this does not, and what is not known of it."""

    def __post_init__(self) -> None:
        _one_of("metric", METRICS, self.metrics)
        _one_of("extractor", EXTRACTORS, [self.extractor])
        if "is" in self.metrics and self.extractor not in CLASSIFIERS:
            raise UserError(f"the inception score needs a classifier, and {self.extractor} is none")
        _one_of("dinov2", DINOV2, [self.dinov2])
        _one_of("clip_model", CLIPS, [self.clip_model])
        _one_of("quantisation", tuple(QUANTISATIONS), [self.quantisation])
        _one_of("labels", tuple(LABELS), [self.labels])
        _one_of("repeats_reported", SUMMARIES, [self.repeats_reported])
        _steps(self.prepare)
        _steps(self.clip_prepare)
        if not _FILE_FORM.fullmatch(self.file_form):
            raise UserError(f"file_form is memory, png or jpeg QUALITY (1 to 100), got {self.file_form!r}")
        if self.quantisation == "none" and self.file_form != "memory":
            raise UserError(f"a {self.file_form} file holds whole levels; quantisation none needs file_form memory")
        if self.clip_template.count("{}") != 1:
            raise UserError(f"clip_template holds {{}} once, where the prompt goes, got {self.clip_template!r}")
        if self.ddof not in (0, 1):
            raise UserError(f"ddof is 0 or 1, got {self.ddof}")
        if not self.metrics:
            raise UserError(f"a protocol measures something: metrics of {', '.join(METRICS)}")
        if min(self.samples, self.repeats, self.neighbours, self.is_splits, self.reference_count or 1) < 1:
            raise UserError("samples, repeats, neighbours, is_splits and reference_count are at least 1")
        if any(
            "\n" in text for text in (self.name, self.summary, self.seeds, self.reference, self.source, *self.notes)
        ):
            raise UserError("a field of a protocol is one line")

    @property
    def values(self) -> tuple[str, ...]:
        """Names of what is measured, in order."""
        return tuple(value for metric in self.metrics for value in PARTS.get(metric, (metric,)))

    def title(self, value: str) -> str:
        """What tables call a measured value."""
        return "fd-digits-v1" if (value, self.extractor) == ("fid", "digits") else value

    def network(self, metric: str) -> tuple[str, tuple[str, ...]]:
        """Extractor of ``metric`` and the steps before it.

        A float resize is the last step to the main network alone; others take the image as it was before and
        resize it themselves.
        """
        whole = tuple(step for step in self.prepare if "-float " not in step)
        others = {
            "fd-dinov2": (self.dinov2, whole),
            "clip-fid": ("clip-vit-b-32", whole),
            "cmmd": ("clip-vit-l-14-336", whole),
            "clip": (self.clip_model, self.clip_prepare),
        }
        return others.get(metric, (self.extractor, self.prepare))

    def sees(self, metric: str) -> str:
        """The way of an image to the network of ``metric``."""
        extractor, steps = self.network(metric)
        return " > ".join(("stored image", *steps, extractor))

    def text(self) -> str:
        """The protocol spelled out, one ``field: value`` a line."""
        lines = []
        for key, value in asdict(self).items():
            if key == "notes":
                lines += [f"note: {note}" for note in value]
            else:
                lines.append(f"{key}: {_spelled(value)}")
        lines.append(f"colour: {COLOUR}")
        lines += [f"{metric} sees: {self.sees(metric)}" for metric in self.metrics]
        used = dict.fromkeys(self.network(metric)[0] for metric in self.metrics)
        lines += [f"network {name}: {NETWORKS[name]}" for name in used]
        lines += [f"{metric} is: {LAWS[metric]}" for metric in self.metrics]
        lines.append(f"pixels: {QUANTISATIONS[self.quantisation]}")
        lines.append(f"conditions: {LABELS[self.labels]}")
        return "\n".join(lines)

    def digest(self) -> str:
        """First 12 hexadecimal digits of the sha256 of ``text()``; values compare between equal digests only."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:12]

    def described(self) -> dict[str, Any]:
        """Name, digest, text and fields, ready for JSON."""
        return {"name": self.name, "digest": self.digest(), "text": self.text(), "fields": asdict(self)}

    def changed(self, overrides: Mapping[str, object]) -> Protocol:
        """This protocol with other values, which its name then tells: ``clean, samples=2000``.

        Raises:
            UserError: a field that does not exist or may not change, or a value against its grammar.
        """
        fields = asdict(self)
        known = sorted(fields.keys() - {"name"})
        for field in overrides:
            if field not in known:
                raise UserError(f"a protocol has no field {field!r} to change; it has {', '.join(known)}")
        new = {field: value for field, value in overrides.items() if value != fields[field]}
        marks = [f"{field}={_spelled(new[field])}" for field in fields if field in new]
        return replace(self, **{**new, "name": ", ".join([self.name, *marks])})


def _one_of(field: str, allowed: tuple[str, ...], values: tuple[str, ...] | list[str]) -> None:
    for value in values:
        if value not in allowed:
            raise UserError(f"{field} is one of {', '.join(allowed)}, got {value!r}")


def _steps(steps: tuple[str, ...]) -> None:
    try:
        check_steps(steps)
    except ValueError as error:
        raise UserError(str(error)) from None
    if any("-float " in step for step in steps[:-1]):
        raise UserError(f"steps of a protocol are float only as the last, got {list(steps)}")


def _spelled(value: object) -> str:
    if isinstance(value, tuple):
        return " + ".join(map(str, value)) or "nothing"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.12g}"
    return "not known" if value is None else str(value)
