"""The model card: front matter that the Hub takes, sections for what is known only, and pictures."""

import io
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from conftest import tiny_unet
from huggingface_hub import ModelCard
from PIL import Image

from animeface_pipeline import AnimeFacePipeline
from animeface_pipeline.cli import resource
from animeface_pipeline.hub import (
    TrainingSummary,
    code_commit,
    hardware_name,
    library_versions,
    render_card,
)
from animeface_pipeline.pipeline_animeface import MINIMAL_CARD, is_our_card
from animeface_pipeline.schedulers import original_scheduler

# The Hub's values, as listed in https://huggingface.co/docs/hub/repositories-licenses
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
"""
# The Hub's tasks of computer vision, as listed on https://huggingface.co/tasks
PIPELINE_TAGS = """
    depth-estimation image-classification image-feature-extraction image-segmentation image-to-3d image-to-image
    image-to-text image-to-video keypoint-detection mask-generation object-detection text-to-3d text-to-image
    text-to-video unconditional-image-generation video-classification zero-shot-image-classification
    zero-shot-object-detection
"""

EVERYTHING = TrainingSummary(
    recipe="original",
    settings={"learning_rate": 1e-5, "value_range": (0.0, 1.0), "unet": {}, "snr_gamma": None},
    dataset="faces | of two kinds",
    hub_dataset="user/faces",
    dataset_size=20_626,
    steps=12_345,
    epochs=15.5,
    hours=3.28,
    samples_seen=790_080,
    batch_size=64,
    ema_decay=0.9999,
    hardware="NVIDIA H200",
    versions=library_versions(),
    commit="0123abc",
    losses=[(step, 0.2 / step) for step in range(1, 2_001)],
    base_model="user/base",
    license="cc-by-4.0",
)


@pytest.fixture
def pipe() -> AnimeFacePipeline:
    return AnimeFacePipeline(tiny_unet(), original_scheduler())


def text_of(card: dict[str, str | bytes]) -> str:
    text = card["README.md"]
    assert isinstance(text, str)
    return text


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def check_front_matter(card: str) -> dict[str, Any]:
    """What the Hub would refuse or could not index; its client parses it too."""
    data = front_matter(card)
    assert data["license"] in LICENSES.split(), f"license: {data['license']}"
    assert data["pipeline_tag"] in PIPELINE_TAGS.split(), f"pipeline_tag: {data['pipeline_tag']}"
    assert data["library_name"] == "diffusers"
    assert len(set(data["tags"])) == len(data["tags"]) > 0
    assert ModelCard(card).data.to_dict() == data
    return data


def headings(card: str) -> list[str]:
    return re.findall(r"^## (.+)$", card, re.MULTILINE)


def test_the_template_is_valid_before_it_is_rendered() -> None:
    template = resource("model_card.md").read_text(encoding="utf-8")
    assert check_front_matter(template)["pipeline_tag"] == "unconditional-image-generation"


@pytest.mark.parametrize("summary", [TrainingSummary(), EVERYTHING], ids=["nothing known", "everything known"])
def test_front_matter_is_one_that_the_hub_takes(summary: TrainingSummary, pipe: AnimeFacePipeline) -> None:
    card = text_of(render_card(pipe, summary))
    assert is_our_card(card) and "{{ " not in card and "{% " not in card
    assert check_front_matter(card)["license"] == summary.license
    check_front_matter(MINIMAL_CARD)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("license: other", "license: my-own"), ("pipeline_tag: unconditional-image-generation", "pipeline_tag: faces")],
)
def test_the_check_finds_what_is_wrong(right: str, wrong: str, pipe: AnimeFacePipeline) -> None:
    card = text_of(render_card(pipe))
    assert card.count(right) == 1
    with pytest.raises(AssertionError, match=wrong):
        check_front_matter(card.replace(right, wrong))


def test_a_card_tells_all_that_is_known(pipe: AnimeFacePipeline) -> None:
    card = render_card(pipe, EVERYTHING, Image.new("RGB", (64, 64)))
    text = text_of(card)
    data = front_matter(text)
    assert data["datasets"] == ["user/faces"] and data["base_model"] == "user/base"
    assert headings(text) == [
        "How to use it",
        "How it was trained",
        "Limits and biases",
        "Departures from the original",
        "Licence",
        "How to cite",
    ]
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    assert rows["steps"] == "12,345" and rows["pictures"] == "20,626" and rows["hardware"] == "NVIDIA H200"
    assert rows["averaged weights (EMA)"] == "yes, decay 0.9999"
    assert rows["data"] == r"faces \| of two kinds"  # a bar would end the cell
    assert f"torch {EVERYTHING.versions['torch']}" in rows["software"]
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == {**EVERYTHING.settings, "value_range": [0, 1]}
    assert "each picture was seen 38 times" in " ".join(text.split())
    for name in ("samples", "loss_curve"):
        assert f"](assets/{name}.png)" in text
        assert Image.open(io.BytesIO(card[f"assets/{name}.png"])).format == "PNG"


def test_a_card_is_silent_about_what_is_not_known(pipe: AnimeFacePipeline) -> None:
    card = render_card(pipe)
    text = text_of(card)
    assert set(card) == {"README.md"} and "assets/" not in text
    assert "How it was trained" not in headings(text) and "Results" not in headings(text)
    assert set(front_matter(text)) == {"library_name", "license", "pipeline_tag", "tags"}
    assert "None" not in text and "\n\n\n" not in text
    only_steps = text_of(render_card(pipe, TrainingSummary(steps=7)))
    section = only_steps.split("## How it was trained")[1].split("##")[0]
    assert section.split("| --- | --- |\n")[1].strip() == "| steps | 7 |\n| averaged weights (EMA) | no |"


def test_every_user_finds_his_lines(pipe: AnimeFacePipeline) -> None:
    text = text_of(render_card(pipe))
    assert f"{pipe.unet.num_parameters():,} parameters" in text and "16×16" in text
    assert 'DiffusionPipeline.from_pretrained("USER/NAME", trust_remote_code=True)' in text
    assert 'AnimeFacePipeline.from_pretrained("USER/NAME")' in text
    for block in re.findall(r"```py\n(.*?)```", text, re.DOTALL):
        compile(block, "README.md", "exec")
    for entry in ("ho2020denoising", "animeface_pipeline"):
        assert re.search(rf"@\w+{{{entry},", text)


def test_a_local_base_model_is_not_shown_as_one_on_the_hub(pipe: AnimeFacePipeline) -> None:
    text = text_of(render_card(pipe, TrainingSummary(steps=1, base_model="quickstart")))
    assert "| started from | quickstart |" in text and "base_model" not in front_matter(text)


def test_converted_weights_are_not_given_a_licence_or_a_training(pipe: AnimeFacePipeline) -> None:
    text = text_of(render_card(pipe, TrainingSummary(converted_from="my.ckpt")))
    assert front_matter(text)["license"] == "other"
    words = " ".join(text.split())
    assert "converted from `my.ckpt`" in words and "weights are published without a licence" in words
    assert "dropout is on" not in words  # the original's accident is in its weights
    assert "| steps |" not in words


def test_only_departures_that_hold_are_listed(pipe: AnimeFacePipeline) -> None:
    rows = text_of(render_card(pipe)).split("## Departures")[1].split("##")[0]
    for fact in ("σ = 0.01", "0.0226 to 0.0203", "13,056 of 168,899,011", "`trailing`", "grids keep their colours"):
        assert fact in rows
    other = AnimeFacePipeline(tiny_unet(dropout=0.0), original_scheduler(timestep_spacing="leading"))
    rows = text_of(render_card(other)).split("## Departures")[1].split("##")[0]
    assert "dropout" not in rows and "trailing" not in rows and "13,056" in rows


def test_a_long_log_and_one_with_gaps_are_drawn(pipe: AnimeFacePipeline) -> None:
    losses = [(step, float("nan") if step == 5 else 1 / step) for step in range(1, 20_001)]
    curve = render_card(pipe, replace(EVERYTHING, losses=losses))["assets/loss_curve.png"]
    assert Image.open(io.BytesIO(curve)).size == (840, 360)
    assert len(curve) < 200_000


def test_the_machine_and_the_software_are_named() -> None:
    assert hardware_name()
    assert set(library_versions()) == {"Python", "animeface-pipeline", "torch", "diffusers", "accelerate"}
    commit = code_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(, with changes)?", commit)
