"""Configurations: everything wrong is said at once, before any work."""

import pytest
import yaml

from stepdistill.bundled import bundled_configs
from stepdistill.config import Config
from stepdistill.errors import UserError
from stepdistill.methods import BOOT, SiD
from stepdistill.recipe import parse
from stepdistill.train_teacher import TeacherConfig
from stepdistill.train_text_teacher import TextTeacherConfig


@pytest.mark.parametrize("name", sorted(bundled_configs()))
def test_every_bundled_recipe_parses_and_its_dump_is_the_same_recipe(name, tmp_path):
    kind = {"teacher_digits": TeacherConfig, "teacher_digits_text": TextTeacherConfig}.get(name, Config)
    config = parse(kind, name, [])
    if isinstance(config, Config):
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.dump()))
        assert parse(Config, str(tmp_path / "again.yaml"), []) == config


def test_every_error_is_reported_at_once_with_suggestions():
    with pytest.raises(UserError) as caught:
        parse(Config, "digits_sid", ["method.alhpa=1", "training.optimizer.lr=-1", "stpes=3"])
    message = str(caught.value)
    assert "digits_sid.yaml: 3 invalid values" in message
    assert "method.sid.alhpa: unexpected key, got 1; did you mean alpha?" in message
    assert "training.optimizer.lr: must be greater than 0, got -1" in message
    assert "stpes: unexpected key, got 3; did you mean steps?" in message


def test_what_is_wrong_with_a_section_is_said_without_all_of_it():
    with pytest.raises(UserError, match=r"evaluate: best is chosen on the way; set every_images$"):
        parse(Config, "digits_sid", ["evaluate.best=fid", "evaluate.every_images=0"])


def test_adapters_on_no_layer_are_none():
    with pytest.raises(UserError, match=r"training\.lora\.fake\.targets: .*at least 1 item"):
        parse(Config, "digits_sid", ["training.lora.fake={rank: 2, targets: []}"])


def test_ranges_of_the_mathematics_are_checked():
    with pytest.raises(UserError, match=r"alpha must lie in \[0, 1.5\]"):
        parse(Config, "digits_sid", ["method.alpha=7"])
    with pytest.raises(UserError) as caught:
        parse(Config, "digits_sid", ["method.student_times={low: 2, high: 3}"])
    assert "1 invalid value\n" in str(caught.value), "the other time laws are not reported"
    assert "0 <= low < high <= 1" in str(caught.value)


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'sid', 'dmd'.*'boot'"):
        parse(Config, "digits_sid", ["method.name=sidd"])


def test_missing_file_lists_the_bundled_recipes():
    with pytest.raises(UserError, match=r"no config file 'nothing'.*digits_sid"):
        parse(Config, "nothing", [])


def test_override_without_equals_sign_shows_the_form():
    with pytest.raises(UserError, match="must have the form key=value"):
        parse(Config, "digits_sid", ["steps"])


def test_override_below_a_value_is_refused():
    with pytest.raises(UserError, match="steps is a value, not a section"):
        parse(Config, "digits_sid", ["steps.more=1"])


def test_overrides_are_typed_and_may_be_scientific():
    config = parse(
        Config, "digits_sid", ["training.optimizer.lr=3e-5", "training.ema_halflife_images=null", "resume=true"]
    )
    assert config.training.optimizer.lr == 3e-5
    assert config.training.ema_halflife_images is None
    assert config.resume


def test_method_is_chosen_by_name(tmp_path):
    file = tmp_path / "boot.yaml"
    file.write_text("teacher: t\noutput_dir: o\nsteps: 1\nmethod: {name: boot, teacher_steps: 8}\n")
    assert parse(Config, str(file), []).method == BOOT(teacher_steps=8)
    file.write_text("teacher: t\noutput_dir: o\nsteps: 1\nmethod: {name: sid}\n")
    assert parse(Config, str(file), []).method == SiD()


def test_broken_yaml_is_named(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("a: [1,\n")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        parse(Config, str(file), [])
    file.write_text("- 1\n")
    with pytest.raises(UserError, match="got list"):
        parse(Config, str(file), [])


def test_an_unquoted_no_is_the_word():
    assert parse(Config, "digits_sid", ["training.mixed_precision=no"]).training.mixed_precision == "no"
