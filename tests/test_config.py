from pathlib import Path

import pytest

from animeface_pipeline.cli import BadInput, resource
from animeface_pipeline.config import load_recipe, parse_args, settings


def parse(*argv: str):
    return parse_args(argv, description="test")


def test_the_defaults_are_the_originals_recipe() -> None:
    config = parse()
    assert (config.train_batch_size, config.num_epochs, config.learning_rate) == (64, 50, 1e-5)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert config.value_range == (0.0, 1.0) and config.random_flip and not config.use_ema
    assert config.max_grad_norm is None and config.mixed_precision == "no" and config.unet == {}
    assert set(load_recipe("original")) == {field.name for field in settings() if field.metadata["recipe"]}


@pytest.mark.parametrize("name", sorted(entry.name for entry in resource("recipes").iterdir()))
def test_every_recipe_is_valid(name: str) -> None:
    config = parse("--config", name.removesuffix(".yaml"))
    for key, value in load_recipe(name.removesuffix(".yaml")).items():
        assert getattr(config, key) == value


def test_flags_go_over_the_recipe_over_the_original(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rate: 1e-3\nvalue_range: [-1, 1]\nuse_ema: true\nmax_grad_norm: 1\n", encoding="utf-8")
    config = parse("--config", str(recipe), "--train_batch_size", "8", "--no-use_ema", "--max_grad_norm", "none")
    assert config.learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert config.value_range == (-1.0, 1.0) and config.train_batch_size == 8
    assert config.use_ema is False and config.max_grad_norm is None and config.num_epochs == 50
    assert config.given == {"config", "train_batch_size", "use_ema", "max_grad_norm"}
    assert parse("--value_range", "-1", "1").value_range == (-1.0, 1.0)


BAD_FLAGS = [
    (["--train_batch_size", "0"], "--train_batch_size 0: must be at least 1"),
    (["--train_batch_size", "-4"], "--train_batch_size -4: must be at least 1"),
    (["--train_batch_size", "1.5"], "--train_batch_size '1.5': must be a whole number"),
    (["--learning_rate", "nan"], "--learning_rate nan: must be more than 0"),
    (["--learning_rate", "inf"], "--learning_rate inf: must be more than 0 and finite"),
    (["--learning_rate", "0"], "--learning_rate 0.0: must be more than 0"),
    (["--learning_rate", "fast"], "--learning_rate 'fast': must be a number"),
    (["--max_train_steps", "0"], "--max_train_steps 0: must be at least 1"),
    (["--adam_beta1", "1"], "--adam_beta1 1.0: must be at least 0 and less than 1"),
    (["--ddpm_num_inference_steps", "1001"], "must be at least 1 and less than 1001"),
    (["--mixed_precision", "fp8"], "must be one of no, fp16, bf16"),
    (["--eval_scheduler", "dpm"], "must be one of ddpm, ddim"),
    (["--prediction_type", "noise"], "must be one of epsilon, v_prediction, sample"),
    (["--value_range", "1", "0"], "must be two finite numbers, the smaller one first"),
    (["--value_range", "0", "nan"], "must be two finite numbers"),
    (["--seed", "-1"], "--seed -1: must be at least 0"),
    (["--config", "nope"], "no such recipe; there are cpu, modern, original"),
    (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_FLAGS, ids=[" ".join(argv) for argv, _ in BAD_FLAGS])
def test_flags_out_of_range_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(*argv)
    assert message in str(caught.value)


BAD_RECIPES = [
    ("learning_rat: 1", "unknown key learning_rat, did you mean learning_rate?"),
    ("wibble: 1", "unknown key wibble; there are resolution"),
    ("output_dir: x", "unknown key output_dir"),
    ("learning_rate: [1]", "learning_rate [1]: must be a number"),
    ("use_ema: 1", "use_ema 1: must be true or false"),
    ("train_batch_size: true", "train_batch_size True: must be a whole number"),
    ("value_range: 1", "value_range 1: must be two numbers"),
    ("unet: 3", "unet 3: must be a mapping"),
    ("- 1", "a recipe is a list of lines key: value"),
    ("a: [", "not YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD_RECIPES, ids=[text for text, _ in BAD_RECIPES])
def test_bad_recipes_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        parse("--config", str(tmp_path / "bad.yaml"))
    assert message in str(caught.value)


def test_an_unknown_flag_is_answered_with_one_line_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--learning_rat", "1")
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
