"""Protocols: what each preset says, that any change shows, and that nothing outside the grammar passes."""

import hashlib
import re
from dataclasses import asdict, fields

import pytest

from stepdistill.errors import UserError
from stepdistill.metrics.presets import PRESETS, protocol, table
from stepdistill.metrics.protocols import EXTRACTORS, METRICS, Protocol
from stepdistill.metrics.spelled import LAWS, NETWORKS

OTHER = {
    "name": "other",
    "summary": "other",
    "metrics": ("fid", "clip"),
    "extractor": "inception",
    "prepare": ("center-crop", "bicubic-float 299"),
    "dinov2": "dinov2-vit-l-14-pillow",
    "quantisation": "truncate",
    "file_form": "jpeg 95",
    "samples": 2000,
    "labels": "random",
    "seeds": "other",
    "reference": "other",
    "reference_count": 7,
    "ddof": 0,
    "repeats": 3,
    "repeats_reported": "min",
    "clip_model": "clip-vit-b-32",
    "clip_prepare": ("lanczos 256",),
    "clip_template": "A photo depicts {}",
    "clip_scale": 100.0,
    "clip_clamp": True,
    "neighbours": 3,
    "is_splits": 1,
    "source": "other",
    "notes": ("other",),
}
"""A value of each field that ``clean`` does not have."""


def test_the_presets_are_those_of_the_published_tables():
    assert list(PRESETS) == [
        *("edm-cifar10", "edm-imagenet64", "edm-ffhq64", "edm-afhqv2", "edm2-img64", "edm2-img512"),
        *("sid-cifar10", "sid-imagenet64", "dmd2-imagenet64", "coco30k-gigagan", "coco10k-dmd2-sdxl", "sidlsg-train"),
        *("mjhq30k-sana", "cmmd", "adm-256", "clean", "digits"),
    ]


def test_no_two_presets_have_the_same_digest():
    assert len({preset.digest() for preset in PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_preset_spells_out_every_field_once(preset):
    lines = preset.text().splitlines()
    for field in fields(preset):
        label, times = ("note", len(preset.notes)) if field.name == "notes" else (field.name, 1)
        assert sum(line.startswith(f"{label}: ") for line in lines) == times
    for metric in preset.metrics:
        name = preset.network(metric)[0]
        told = (f"{metric} sees: stored image", f"network {name}: {NETWORKS[name]}", f"{metric} is: {LAWS[metric]}")
        assert all(line in preset.text() for line in told)


def test_every_network_and_metric_has_its_words():
    assert (NETWORKS.keys(), LAWS.keys()) == ({*EXTRACTORS}, {*METRICS})


def test_every_field_has_another_value_in_the_table_of_this_test():
    clean = asdict(protocol("clean"))
    assert OTHER.keys() == clean.keys()
    assert not [field for field in OTHER if OTHER[field] == clean[field]]


@pytest.mark.parametrize("field", OTHER)
def test_the_digest_changes_with_every_field(field):
    clean = protocol("clean")
    other = Protocol(**{**asdict(clean), field: OTHER[field]})
    assert other.digest() != clean.digest()
    assert other.text() != clean.text()


def test_the_digest_is_the_start_of_the_sha256_of_the_text():
    clean = protocol("clean")
    assert clean.digest() == hashlib.sha256(clean.text().encode("utf-8")).hexdigest()[:12]


def test_a_change_shows_in_name_and_digest_and_nowhere_else():
    changed = protocol("clean").changed({"metrics": ("fid", "kid"), "samples": 2000})
    assert changed.name == "clean, metrics=fid + kid, samples=2000"
    assert {**asdict(protocol("clean")), "metrics": ("fid", "kid"), "samples": 2000, "name": changed.name} == asdict(
        changed
    )
    assert changed.digest() != protocol("clean").digest()


def test_the_order_of_changes_does_not_matter_and_a_change_to_the_same_value_is_none():
    clean = protocol("clean")
    assert clean.changed({"samples": 20, "repeats": 2}) == clean.changed({"repeats": 2, "samples": 20})
    assert clean.changed({"samples": clean.samples}) == clean


@pytest.mark.parametrize("field", ["name", "sample", ""])
def test_a_field_that_cannot_change_is_refused_with_those_that_can(field):
    with pytest.raises(UserError, match=r"no field .*samples"):
        protocol("clean").changed({field: "x"})


@pytest.mark.parametrize(("written", "meant"), [("edm-cifar", "edm-cifar10"), ("coco30k", "coco30k-gigagan")])
def test_an_unknown_name_is_answered_with_the_nearest_and_all(written, meant):
    with pytest.raises(UserError, match=f"did you mean {meant}\\?") as error:
        protocol(written)
    assert all(name in str(error.value) for name in PRESETS)


def test_a_name_like_no_other_is_answered_with_all_and_no_guess():
    with pytest.raises(UserError, match="there is no protocol 'xyzzy'; There are edm-cifar10"):
        protocol("xyzzy")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_its_name_and_stands_in_the_table(name):
    assert protocol(name).name == name
    rows = [row for row in table().splitlines() if row.split()[0] == name]
    assert len(rows) == 1
    assert protocol(name).digest() in rows[0]
    assert f"{protocol(name).samples:,}" in rows[0]


@pytest.mark.parametrize(
    "step",
    ["", "crop", "crop 0", "crop x", "lanczos", "lanczos256", "Lanczos 256", "nearest 8", "center-crop 3", "box 3 "]
    + ["bilinear -1", "short-lanczos-float 3", "bicubic-float"],
)
def test_a_step_outside_the_grammar_is_refused_with_the_grammar(step):
    with pytest.raises(UserError, match=re.escape("center-crop | crop N | KIND N | KIND-float N | short-KIND N")):
        protocol("clean").changed({"prepare": (step,)})


def test_a_float_resize_is_the_last_step():
    with pytest.raises(UserError, match="float only as the last"):
        protocol("clean").changed({"prepare": ("bicubic-float 299", "crop 8")})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", ()),
        ("metrics", ("fid", "swd")),
        ("extractor", "vgg"),
        ("dinov2", "inception"),
        ("clip_model", "dinov2-vit-l-14"),
        ("quantisation", "floor"),
        ("quantisation", "none"),  # Of PNG files, which clean reads.
        ("file_form", "jpeg"),
        ("file_form", "jpeg 0"),
        ("file_form", "jpeg 101"),
        ("labels", "sorted"),
        ("repeats_reported", "max"),
        ("clip_template", "a photo"),
        ("clip_template", "{} {}"),
        ("ddof", 2),
        ("samples", 0),
        ("repeats", 0),
        ("reference_count", -1),
        ("source", "two\nsamples: 1"),
    ],
)
def test_a_value_outside_its_grammar_is_refused(field, value):
    with pytest.raises(UserError):
        protocol("clean").changed({field: value})


def test_the_float_resize_belongs_to_the_main_network_alone():
    coco = protocol("coco30k-gigagan").changed({"metrics": METRICS})
    main = ("inception-clean", ("center-crop", "lanczos 256", "bicubic-float 299"))
    assert {metric: coco.network(metric) for metric in METRICS} == {
        **dict.fromkeys(("fid", "kid", "kid-subsets", "prdc", "is", "diversity", "vendi"), main),
        "fd-dinov2": ("dinov2-vit-l-14", ("center-crop", "lanczos 256")),
        "clip-fid": ("clip-vit-b-32", ("center-crop", "lanczos 256")),
        "cmmd": ("clip-vit-l-14-336", ("center-crop", "lanczos 256")),
        "clip": ("clip-vit-g-14", ("center-crop", "lanczos 256")),
    }
    assert {extractor for extractor, _ in map(coco.network, METRICS)} <= set(EXTRACTORS)


def test_the_clip_score_of_sdxl_is_taken_at_256_though_its_fid_is_at_512():
    sdxl = protocol("coco10k-dmd2-sdxl")
    assert sdxl.network("fid")[1] == ("center-crop", "lanczos 512", "bicubic-float 299")
    assert sdxl.network("clip")[1] == ("center-crop", "lanczos 256")
