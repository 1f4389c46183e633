"""The page about runs: its numbers are the files', its text is never code, it stands alone and fits any window."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from stepdistill.__main__ import main
from stepdistill.config import Config
from stepdistill.errors import UserError
from stepdistill.evaluation import Measurement
from stepdistill.html_report import write_report
from stepdistill.html_report.charts import MOST_POINTS, Line, Point, chart, short, thinned, ticks
from stepdistill.html_report.markup import Markup, element, join
from stepdistill.html_report.tables import duration
from stepdistill.metrics.base import Value
from stepdistill.metrics.presets import PRESETS
from stepdistill.metrics.sources import load_images
from stepdistill.recipe import parse
from stepdistill.report import grid

VOID = {"img", "meta"}
EVIL = "<script>alert(1)</script>\"' onload=x"


class Page(HTMLParser):
    """A page as lists of tags, of table rows (text by cell) and of its text; unbalanced tags fail."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == [], "tags are left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name):
        """Cells of the first row under ``name``."""
        return next(cells[1:] for cells in self.rows if cells and cells[0] == name)

    def values(self, tag, attribute):
        return [attributes[attribute] for name, attributes in self.tags if name == tag and attribute in attributes]


def measurement(label, calls, value, speed, accuracy=None):
    distance = Value(value, se=0.0625, debiased=value - 0.125, n=2000)
    return Measurement(label, calls, {"fid": distance}, speed, (0.055, *[0.105] * 9), 11.5, accuracy)


MEASURED = [measurement("teacher, 50 steps", 50, 0.46875, 40.0), measurement("student", 1, 1.53125, 2580.0)]


def make_run(folder, changed=None, *, rows=40, measured=(), previews=(100, 200), finished=True):
    """A run folder of 400 steps as `stepdistill distill` leaves it, without the training."""
    folder.mkdir(parents=True)
    values = parse(Config, "digits_sid", [f"output_dir={folder}", "steps=400"]).dump() | (changed or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    lines = [
        {"step": k, "images": 32 * k, "seconds": 0.5 * k, "fake/loss": 9 + 1 / k, "student/loss": -5 / k}
        | ({"fid": 200 / k} if k in previews else {})
        for k in range(10, 10 * rows + 1, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures = grid(torch.rand(32, 1, 8, 8) * 2 - 1)
    if previews:
        (folder / "previews").mkdir()
        pictures.save(folder / "previews" / "teacher.png")
    for step in previews:
        pictures.save(folder / "previews" / f"step_{step:08d}.png")
    if finished:
        pictures.save(folder / "student.png")
    if measured:
        told = {"rows": [asdict(row) for row in measured], "versions": {"torch": "9.9.9"}}
        (folder / "evaluation.json").write_text(json.dumps(told))
    return folder


def page_of(*runs, out=None):
    return Page(write_report(list(runs), out).read_text())


def test_the_numbers_of_the_page_are_those_of_the_files(tmp_path):
    page = page_of(make_run(tmp_path / "run", measured=MEASURED))
    assert page.row("Status") == ["finished"]
    assert page.row("Training steps") == ["400 of 400"]
    assert page.row("Images generated") == ["12,800"]
    assert page.row("Training time") == ["3 min 20 s"]
    assert page.row("Method") == ["SiD (400 steps)"]
    assert page.row("Paper") == ["Zhou et al. 2024, arXiv:2404.04057"]
    assert page.row("Student, fd-digits-v1") == ["1.531 ± 0.062"]
    assert page.row("Speed-up") == ["64.5× against teacher, 50 steps"]
    assert page.row("teacher, 50 steps") == ["0.469 ± 0.062", "0.344", "2,000", "11.5", "50", "40", "1.0×"]
    assert page.row("student") == ["1.531 ± 0.062", "1.406", "2,000", "11.5", "1", "2,580", "64.5×"]
    assert ["student", "5.5%", *["10.5%"] * 9, "5.5%"] in page.rows
    assert page.row("100") == ["3,200", "50.0 s", "2"]
    assert page.row("training.batch_size") == ["32"]
    assert "1.53125 ± 0.0625" in page.values("span", "title"), "the whole number is a tooltip"


def test_teacher_and_student_stand_against_their_network_calls(tmp_path):
    page = page_of(make_run(tmp_path / "run", measured=[*MEASURED, measurement("teacher, 10 steps", 10, 2.5, 300.0)]))
    assert "fd-digits-v1 against network calls" in page.text
    drawn = [
        page.text.index(f"teacher of run: {told}") for told in ("2.5, teacher, 10 steps", "0.4688, teacher, 50 steps")
    ]
    assert drawn == sorted(drawn), "a line goes from left to right"
    assert "run: 1.531, student" in page.text


def test_prompt_accuracy_has_a_column_where_it_was_measured(tmp_path):
    page = page_of(make_run(tmp_path / "run", measured=[measurement("student", 1, 1.5, 100.0, 0.9425)]))
    assert page.row("student")[3] == "94.2%"
    assert page.row("student")[-1] == "–", "a student alone is faster than nothing"


def test_values_of_two_protocols_have_columns_and_curves_of_their_own(tmp_path):
    digits = make_run(tmp_path / "digits", measured=MEASURED)
    found = {"fid": Value(7.5, 0.25, 64), "clip": Value(0.31, 0.0021, 64)}
    evaluate = {"preset": "clean", "reference": "images"}
    clean = make_run(
        tmp_path / "clean", {"evaluate": evaluate}, measured=[replace(MEASURED[1], metrics=found, class_shares=())]
    )
    page = page_of(digits, clean, out=tmp_path / "both.html")
    assert page.row("Student, fd-digits-v1") == ["1.531 ± 0.062", "–"]
    assert page.row("Student, fid (clean)") == ["–", "7.50 ± 0.25"]
    assert page.row("Student, clip (clean)") == ["–", "0.3100 ± 0.0021"]
    assert page.row("torch") == ["9.9.9", "9.9.9"]
    assert "fd-digits-v1 against images" in page.text
    assert "fid (clean) against images" in page.text


def judged(run, *, samples=2000, reference="builtin:digits", digest="a", curve=500):
    """``run`` as it was measured by a protocol of its own."""
    file = run / "evaluation.json"
    protocol = PRESETS["digits"].changed({"samples": samples}).described()
    setting = {
        "protocol": protocol,
        "reference": reference,
        "reference_digest": digest,
        "inputs": {},
        "device": "cuda:0",
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluate"]["curve_samples"] = curve
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.mark.parametrize(
    ("other", "ends", "ways"),
    [
        ({}, [""], [""]),
        ({"samples": 500}, [" (digits, samples=2000)", " (digits, samples=500)"], [""]),
        ({"curve": 100}, [""], [" (500 samples)", " (100 samples)"]),
        ({"reference": "others", "digest": "b"}, *[[" (against builtin:digits)", " (against others)"]] * 2),
    ],
)
def test_values_of_other_samples_or_references_are_told_apart(tmp_path, other, ends, ways):
    runs = [make_run(tmp_path / name, measured=MEASURED) for name in "ab"]
    text = page_of(judged(runs[0]), judged(runs[1], **other), out=tmp_path / "both.html").text
    for end in ends:
        assert f"fd-digits-v1{end} ± se" in text
    for way in ways:
        assert f"fd-digits-v1{way} against images" in text
    assert text.count(" ± se") == len(ends)


def test_references_that_changed_under_one_name_are_told_apart_by_a_checksum(tmp_path):
    runs = [judged(make_run(tmp_path / name, measured=MEASURED), digest=name) for name in "ab"]
    heads = re.findall(
        r"fd-digits-v1 \(digits, samples=2000, against builtin:digits, \w{12}\) ± se",
        page_of(*runs, out=tmp_path / "x").text,
    )
    assert len(set(heads)) == 2


def test_the_page_tells_what_each_run_costs_and_where_it_was_measured(tmp_path):
    rows = [MEASURED[0], replace(MEASURED[1], latency_seconds=0.0123, peak_bytes=2_340_000_000)]
    page = page_of(judged(make_run(tmp_path / "run", measured=rows)))
    assert page.row("teacher, 50 steps")[-2:] == ["–", "–"]
    assert page.row("student")[-2:] == ["12.3 ms", "2.34 GB"]
    assert page.row("One image alone, peak memory") == ["12.3 ms, 2.34 GB"]
    assert page.row("device") == ["cuda:0"]


def test_every_log_line_is_a_point_that_reads_its_value(tmp_path):
    run = make_run(tmp_path / "run")
    page = page_of(run)
    points = page.text.count("run: ")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert points == sum(len(line) - 3 + ("fid" in line) for line in lines), "distances stand against images and time"
    assert "run: 9.025 at step 40, 1,280 images, 20.0 s" in page.text


def test_nothing_in_a_file_becomes_code(tmp_path):
    changed = {"teacher": EVIL, "method": {"name": EVIL}, EVIL: {EVIL: [EVIL]}}
    run = make_run(tmp_path / "<b>run", changed, measured=[measurement(EVIL, 1, 1.0, 1.0), *MEASURED])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 400, "images": 1, "seconds": 1, EVIL: 1.0, f"{EVIL}/loss": 2.0}) + "\n")
    text = write_report([run]).read_text()
    page = Page(text)
    assert not {"script", "b>run"} & {tag for tag, _ in page.tags}
    assert "<script" not in text
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.row("teacher") == [EVIL]
    assert "<b>run" in page.text


def test_markup_escapes_whatever_is_not_markup():
    assert element("a", {"title": 'x"<'}, "1 < 2", Markup("<b>")) == '<a title="x&quot;&lt;">1 &lt; 2<b></a>'
    assert join("&", Markup("&amp;")) == "&amp;&amp;"


def test_several_runs_share_charts_tables_and_differences(tmp_path):
    first = make_run(tmp_path / "a" / "run", measured=MEASURED)
    second = make_run(tmp_path / "b" / "run", {"seed": 7}, rows=20)
    text = write_report([first, second], tmp_path / "both.html").read_text()
    page = Page(text)
    assert page.row("Status") == ["finished", "not finished: at step 200 of 400"]
    assert page.row("seed") == ["0", "7"]
    assert page.row("Student, fd-digits-v1") == ["1.531 ± 0.062", "–"]
    assert "b/run: not measured yet" in page.text
    assert "batch_size" not in text[text.index("Differences") : text.index("<details>", text.index("Differences"))]
    loss = next(part for part in text.split("<figure>") if "<b>fake/loss</b>" in part)
    assert loss.count("<polyline") == 2
    assert "a/run: " in loss
    assert "b/run: " in loss


def test_an_unfinished_run_says_where_it_stands(tmp_path):
    run = make_run(tmp_path / "run", rows=12, previews=(), finished=False)
    (run / "checkpoints" / "step_00000150").mkdir(parents=True)
    (run / "checkpoints" / "step_00000300.tmp").mkdir()
    page = page_of(run)
    assert page.row("Status") == ["not finished: at step 150 of 400"]
    assert "Nothing has been measured yet." in page.text
    assert "No pictures yet." in page.text


def test_a_trained_run_without_its_picture_is_not_called_finished(tmp_path):
    assert page_of(make_run(tmp_path / "run", finished=False)).row("Status") == [
        "trained, not yet exported and evaluated"
    ]


def test_numbers_of_an_export_before_the_end_are_called_so(tmp_path):
    page = page_of(make_run(tmp_path / "run", rows=20, measured=MEASURED))
    assert page.row("Status") == ["not finished: at step 200 of 400; the numbers are of an earlier export"]


def test_stages_add_up(tmp_path):
    stages = [{"steps": 100, "method": {"name": "freeflow"}}, {"steps": 300, "method": {"name": "sid"}}]
    run = make_run(tmp_path / "run", {"stages": stages, "method": None, "steps": None}, rows=12)
    (run / "checkpoints" / "stage_2" / "step_00000050").mkdir(parents=True)
    page = page_of(run)
    assert page.row("Method") == ["FreeFlow (100 steps), then SiD (300 steps)"]
    assert page.row("Training steps") == ["150 of 400"]
    assert page.row("stages.2.method.name") == ["sid"]


def test_a_half_written_last_line_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", rows=20, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 210, "ima')
    assert page_of(run).row("Training steps") == ["200 of 400"]


def test_values_that_cannot_be_drawn_are_left_out_and_counted(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 400, "images": 1, "seconds": 1, "student/loss": NaN, "fake/loss": Infinity, "gone": NaN}\n'
        )
        file.write('{"step": 400, "images": 1, "seconds": 1, "student/loss": 1e308, "fake/loss": 5e-324, "same": 0}\n')
    text = write_report([run]).read_text()
    assert "5 values that are not finite, or beyond 1e±100, are left out" in text
    assert "No values to draw." in text
    assert not re.search("nan|inf", "".join(re.findall(r'points="[^"]*"', text)))


def test_half_a_character_in_a_name_is_written_as_its_number(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 400, "images": 1, "seconds": 1, "half\ud800": 1}) + "\n")
    assert "half&#55296;" in write_report([run]).read_text()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", "", "no metrics yet"),
        ("metrics.jsonl", '{"step": 1\n{}\n', "metrics.jsonl is not what"),
        ("metrics.jsonl", '{"step": 1, "images": 1}\n', "'seconds'"),
        ("metrics.jsonl", '{"step": 1, "images": "1", "seconds": 1}\n', "expected a number, got '1'"),
        ("metrics.jsonl", '{"step": NaN, "images": 1, "seconds": 1}\n', "expected finite"),
        ("metrics.jsonl", "[]\n", "metrics.jsonl is not what"),
        ("evaluation.json", '[{"label": ', "evaluation.json cannot be read"),
        ("evaluation.json", "7", "evaluation.json is not what"),
        ("evaluation.json", '{"versions": {}, "rows": [{"label": "student"}]}', "'metrics'"),
        ("config.yaml", "teacher: [", "config.yaml cannot be read"),
        ("config.yaml", "- 1", "config.yaml is not what"),
        ("config.yaml", "teacher: x", "'method'"),
    ],
)
def test_a_damaged_file_is_named_and_no_page_is_written(tmp_path, file, content, said):
    run = make_run(tmp_path / "run", measured=MEASURED)
    (run / file).write_text(content)
    with pytest.raises(UserError) as refused:
        write_report([run])
    assert said in str(refused.value)
    assert not (run / "report.html").exists()


def command(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, argv)])
    return stopped.value.code, capsys.readouterr()


def test_bad_input_is_one_message_and_exit_code_2(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for argv, said in [
        ([tmp_path / "nothing"], "is no run"),
        ([run, tmp_path / "run" / ".." / "run"], "named twice"),
        ([run, "--out", tmp_path], "cannot write"),
        ([run, "--out", tmp_path / "none" / "x.html"], "cannot write"),
    ]:
        code, printed = command(capsys, *argv)
        assert code == 2
        assert said in printed.err
        assert printed.err.count("\n") == 1


def test_the_page_goes_into_the_run_or_beside_several_and_replaces_an_older_one(tmp_path, capsys, monkeypatch):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    (first / "report.html").write_text("old")
    assert command(capsys, first) == (0, (f"{first / 'report.html'}\n", ""))
    assert (first / "report.html").read_text().startswith("<!doctype html>")
    assert command(capsys, first, second)[1].out == "report.html\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "report.html"]
    assert not list(first.glob(".*"))


def test_help_shows_an_example_and_imports_nothing_heavy(capsys):
    code, printed = command(capsys, "--help")
    assert code == 0
    assert "example: stepdistill report runs/" in printed.out
    script = (
        "import sys; import stepdistill.__main__ as m\ntry:\n    m.main(['report', '--help'])\nexcept SystemExit:\n    "
    )
    script += "assert not {'torch', 'diffusers', 'PIL', 'yaml'} & sys.modules.keys()"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert time.monotonic() - started < 5, "a second is the aim; five on a busy machine is certainly a heavy import"


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(tmp_path):
    text = write_report(
        [make_run(tmp_path / "a"), make_run(tmp_path / "b", measured=MEASURED)], tmp_path / "x"
    ).read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert all(source.startswith("data:image/png;base64,") for source in page.values("img", "src"))
    links = page.values("a", "href")
    assert {link for link in links if not link.startswith("#")} == {"https://arxiv.org/abs/2404.04057"}
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert sorted(link[1:] for link in links if link.startswith("#")) == sorted(names)
    assert len(names) == len(set(names))
    assert not re.search(r"url\(|@import|http-equiv=.refresh", text)
    assert any(said.startswith("default-src 'none'") for said in page.values("meta", "content"))


def test_previews_are_thinned_from_the_first_to_the_last(tmp_path):
    steps = range(10, 401, 10)
    page = page_of(make_run(tmp_path / "run", previews=tuple(steps)))
    shown = [int(alt.split()[1]) for alt in page.values("img", "alt") if alt.startswith("step")]
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == (10, 400)
    assert "12 of 40 previews" in page.text


def test_small_pictures_are_shown_in_whole_multiples_and_large_ones_shrunk(tmp_path):
    run = make_run(tmp_path / "run")
    grid(torch.rand(3, 3, 600, 600)).save(run / "previews" / "step_00000200.png")
    images = [attributes for tag, attributes in page_of(run).tags if tag == "img"]
    sizes = {image["alt"].split(" ")[1]: (int(image["width"]), int(image["height"])) for image in images[1:3]}
    assert sizes == {"100": (4 * 72, 4 * 36), "200": (1000, 333)}
    assert images[2]["src"].startswith("data:image/jpeg;base64,")


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    whole = (run / "previews" / "step_00000100.png").read_bytes()
    (run / "previews" / "step_00000100.png").write_bytes(whole[: len(whole) // 2])
    (run / "previews" / "step_00000200.png").write_text("<svg onload=alert(1)>")
    page = page_of(run)
    assert "step_00000100.png cannot be read" in page.text
    assert "step_00000200.png cannot be read" in page.text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 25600), (-12, 0.3), (0.2, 0.21), (1e-9, 3e-9), (7, 7.001)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high, log=False)
    assert 3 <= len(found) <= 10
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in found)
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-6), 3) in (1, 2, 5)


@pytest.mark.parametrize(("low", "high"), [(0.8, 9), (0.004, 0.1), (1, 1000), (1e-9, 1e9)])
def test_ticks_of_a_logarithmic_axis_are_few_and_inside(low, high):
    found = ticks(low, high, log=True)
    assert 2 <= len(found) <= 9
    assert all(low <= value <= high for value in found)


def test_an_axis_is_logarithmic_where_all_is_positive_and_far_apart():
    def drawn(*values):
        points = [Point(float(k), value, "") for k, value in enumerate(values)]
        return chart([Line("a", 0, points)], title="t", across="images")

    assert "logarithmic" in drawn(100.0, 10.0, 1.0)
    assert "linear" in drawn(100.0, 10.0, -1.0)
    assert "linear" in drawn(3.0, 2.0)
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn(100.0, 10.0, 1.0))]
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.02), "a decade is a decade"


def test_one_point_makes_a_chart():
    assert chart([Line("a", 0, [Point(0.0, 0.0, "")])], title="t", across="images").count("<circle") == 1


def test_long_lines_become_means_that_keep_the_mean():
    points = [Point(float(k), float(k**2), "") for k in range(5 * MOST_POINTS)]
    found = thinned(points)
    assert len(found) == MOST_POINTS
    assert sum(p.y for p in found) / len(found) == pytest.approx(sum(p.y for p in points) / len(points))
    assert found[0].told.startswith("mean of 5")


def test_numbers_are_written_for_people():
    assert [short(v) for v in (0.0, 25000, -1500.0, 2e6, 0.05)] == ["0", "25k", "−1.5k", "2M", "0.05"]
    assert [duration(s) for s in (12.34, 235.4, 10920)] == ["12.3 s", "3 min 55 s", "3 h 02 min"]


PLAYWRIGHT = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
BROWSERS = [
    *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")),
    *sorted(map(str, PLAYWRIGHT.glob("chromium*/chrome-*/*shell"))),
    *sorted(map(str, PLAYWRIGHT.glob("chromium*/chrome-*/chrome"))),
]
BROWSER = next(filter(None, BROWSERS), None)
MEASURE = """addEventListener('load', () => document.body.dataset.widths =
[...document.querySelectorAll('iframe')].map(f => f.contentDocument.documentElement.scrollWidth).join(' '))"""


@pytest.mark.skipif(
    BROWSER is None and "REQUIRE_BROWSER" not in os.environ,
    reason="needs chromium or google-chrome in PATH, or Playwright's (on Debian or Ubuntu: apt-get install chromium)",
)
def test_a_browser_shows_it_without_complaint_and_within_its_window(tmp_path):
    """At 400 and 1200 pixels, in frames, whose widths a browser does not round up as it does those of windows."""
    long = tmp_path / ("a_rather_long_name_of_a_run_" * 4)
    text = write_report([make_run(long, measured=MEASURED), make_run(tmp_path / "b")], tmp_path / "x").read_text()
    frames = [
        f'<iframe width="{w}" height="900" style="border:0" srcdoc="{html.escape(text)}"></iframe>' for w in (400, 1200)
    ]
    shown = tmp_path / "shown.html"
    shown.write_text(f"<!doctype html><script>{MEASURE}</script><body>{''.join(frames)}</body>")
    picture, profile = tmp_path / "shots" / "shown.png", tmp_path / "profile"
    picture.parent.mkdir()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}"]
    flags.append("--hide-scrollbars")
    flags += [f"--screenshot={picture}", "--window-size=1700,950", "--dump-dom"]
    done = subprocess.run(
        [str(BROWSER), *flags, shown.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    assert "CONSOLE" not in done.stderr
    widths = re.search(r'data-widths="([\d ]+)"', done.stdout)
    assert widths
    assert widths[1] == "400 1200"
    assert len(torch.unique(load_images(str(tmp_path / "shots")))) > 50
