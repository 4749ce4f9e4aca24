"""Pushing and pulling with the real client over HTTP, against the stand-in in fake_hub.py."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import tiny_unet
from diffusers import DDIMScheduler, DDPMScheduler
from fake_hub import FakeHub
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from animeface_pipeline import AnimeFacePipeline, hub
from animeface_pipeline.hub import TrainingSummary, push_or_explain, render_card
from animeface_pipeline.pipeline_animeface import is_our_card, sign_card, upload_folder_as_pipeline
from animeface_pipeline.schedulers import original_scheduler

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PUBLISHED = {
    ".gitattributes",
    "README.md",
    "model_index.json",
    "pipeline_animeface.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/unet_animeface.py",
    WEIGHTS,
}
PICTURES = {"assets/samples.png", "assets/loss_curve.png"}


def use_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fresh process reads from HF_ENDPOINT when it imports the client."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub for the client in this process; the tests of the round trips start fresh ones."""
    with FakeHub() as server:
        home = tmp_path / "hf_home"
        for name, value in server.env(home).items():
            monkeypatch.setenv(name, value)
        use_endpoint(server.url, monkeypatch)
        constants = {
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        huggingface_hub.close_session()  # the next one reads the environment anew
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def pipe() -> AnimeFacePipeline:
    scheduler = original_scheduler(variance_type="fixed_small")  # right for the few steps of these tests
    pipe = AnimeFacePipeline(tiny_unet(), scheduler, value_range=(-1, 1))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def card(pipe: AnimeFacePipeline) -> dict[str, str | bytes]:
    summary = TrainingSummary(recipe="original", steps=2, losses=[(1, 0.5), (2, 0.25)])
    return render_card(pipe, summary, samples=Image.new("RGB", (32, 32)))


@pytest.fixture
def folder(pipe: AnimeFacePipeline, card: dict[str, str | bytes], tmp_path: Path) -> Path:
    """What a training run leaves on disk."""
    folder = tmp_path / "anime-faces"
    pipe.save_pretrained(folder, card=card)
    for name in ("checkpoint-1/optimizer.bin", "logs/events", "log.jsonl", "unet/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for the Hub", encoding="utf-8")
    return folder


def draw(pipe: AnimeFacePipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(2, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="pt").images


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- three ways back, each in a fresh process with an empty cache ----

COMMON = """
import os, pathlib, sys, torch
def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(2, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="pt").images
def same_pictures(pipe, name="expected.pt"):
    assert torch.equal(draw(pipe), torch.load(name)), name
"""

WITH_THE_PACKAGE = """
from diffusers import DDIMScheduler, DDPMScheduler
from animeface_pipeline import AnimeFacePipeline
def python_files():
    return [str(file) for file in pathlib.Path(os.environ["HF_HOME"]).rglob("*.py")]
pull = AnimeFacePipeline.from_pretrained
pipe = pull("user/faces")
same_pictures(pipe)
assert type(pipe.scheduler) is DDPMScheduler and pipe.value_range == (-1.0, 1.0)
same_pictures(pull("user/faces", local_files_only=True))
half = pull("user/faces", variant="fp16", torch_dtype=torch.float16, cache_dir="elsewhere")
assert half.unet.dtype == torch.float16 and any(pathlib.Path("elsewhere").rglob("*.fp16.safetensors"))
same_pictures(pull("user/evil"))
assert not os.path.exists("trace") and not python_files(), python_files()
assert not any(name.startswith("diffusers_modules") for name in sys.modules)

pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
torch.save(draw(pipe), "ddim.pt")
pipe.push_to_hub("user/faces", commit_message="DDIM")
again = pull("user/faces")
assert type(again.scheduler) is DDIMScheduler
same_pictures(again, "ddim.pt")
same_pictures(pull("user/faces", revision=os.environ["FIRST"]))
"""

OFFLINE = """
from animeface_pipeline import AnimeFacePipeline
same_pictures(AnimeFacePipeline.from_pretrained("user/faces"), "ddim.pt")
"""

GENERIC = """
if os.environ.get("BLOCKED"):
    sys.modules["animeface_pipeline"] = None  # importing it fails, as if it were not installed
from diffusers import AutoModel, DiffusionPipeline, UniPCMultistepScheduler
def pull(name, **kwargs):
    return DiffusionPipeline.from_pretrained(name, trust_remote_code=True, **kwargs)
try:
    DiffusionPipeline.from_pretrained("user/faces")
    raise SystemExit("Diffusers ran the code of the repository without being asked to")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
pipe = pull("user/faces", revision=os.environ["FIRST"])
assert type(pipe).__module__.startswith("diffusers_modules") and pipe.value_range == (-1.0, 1.0)
same_pictures(pipe)
unet = AutoModel.from_pretrained("user/faces", subfolder="unet", trust_remote_code=True)
assert type(unet).__name__ == "AnimeFaceUNet2DModel"
snapshot = pathlib.Path(os.environ["HF_HOME"], "hub/models--user--faces/snapshots", os.environ["FIRST"])
same_pictures(pull(snapshot))

pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
torch.save(draw(pipe), "unipc.pt")
pipe.push_to_hub(os.environ["TARGET"])
again = pull(os.environ["TARGET"])
assert type(again.scheduler) is UniPCMultistepScheduler
same_pictures(again, "unipc.pt")
same_pictures(pull("user/evil"))
assert os.path.exists("trace")  # so code that is run does leave a trace
os.remove("trace")
"""


def run_fresh(code: str, cwd: Path, env: dict[str, str]) -> str:
    env = {**os.environ, **env, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are split by thread
    command = [sys.executable, "-c", COMMON + code]
    ran = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def test_every_user_gets_the_same_pictures_back(
    server: FakeHub, pipe: AnimeFacePipeline, card: dict[str, str | bytes], tmp_path: Path
) -> None:
    torch.save(draw(pipe), tmp_path / "expected.pt")
    pipe.push_to_hub("user/faces", card=card)
    AnimeFacePipeline.from_pretrained("user/faces", torch_dtype=torch.float16).push_to_hub(
        "user/faces", variant="fp16"
    )
    first = server.repo("user/faces").refs["main"]
    evil = dict(server.files("user/faces"))
    for name in ("pipeline_animeface.py", "unet/unet_animeface.py"):
        evil[name] += b"\nopen('trace', 'w').close()\n"
    server.put("user/evil", evil)

    env = {**server.env(tmp_path / "with"), "FIRST": first}
    run_fresh(WITH_THE_PACKAGE, tmp_path, env)
    run_fresh(OFFLINE, tmp_path, {**env, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"})
    for blocked, target in (("1", "user/without"), ("", "user/generic")):
        env = {**server.env(tmp_path / f"home{blocked}"), "FIRST": first, "BLOCKED": blocked, "TARGET": target}
        complaints = run_fresh(GENERIC, tmp_path, env)
        for complaint in ("Expected types", "will be ignored", "might require the following packages"):
            assert complaint not in complaints, complaints
        # the card and its pictures came along, under the new name, and nothing is missing
        files = server.files(target)
        assert set(files) == PUBLISHED | PICTURES
        assert is_our_card(files["README.md"].decode())
        assert files["README.md"].decode().count(f'from_pretrained("{target}"') == 2
        assert "How it was trained" in files["README.md"].decode()
        # and what remote code pushed is whole for the package too
        assert torch.equal(draw(AnimeFacePipeline.from_pretrained(target)), torch.load(tmp_path / "unipc.pt"))
    assert [commit.message for commit in server.repo("user/faces").commits.values()] == [
        "initial commit",
        "Upload AnimeFacePipeline",
        "Upload AnimeFacePipeline",
        "DDIM",
    ]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in server.files("user/faces")  # the variant stayed


# ---- what is pushed ----


def test_one_commit_holds_what_a_user_needs_and_nothing_else(server: FakeHub, folder: Path) -> None:
    before = contents(folder)
    assert push_or_explain(folder, "user/faces", private=True) == 0
    repo = server.repo("user/faces")
    assert repo.private and len(repo.commits) == 2
    assert set(server.files("user/faces")) == PUBLISHED | PICTURES
    assert contents(folder) == before
    readme = server.files("user/faces")["README.md"].decode()
    assert "USER/NAME" not in readme and 'DiffusionPipeline.from_pretrained("user/faces"' in readme
    assert str(folder).encode() not in b"".join(server.files("user/faces").values())


def test_more_is_pushed_when_asked(server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "--hub_model_id", "user/faces", "--commit_message", "All of it"]
    with pytest.raises(SystemExit) as done:
        hub.main([*arguments, "--include", "logs/**/*", "checkpoint-*/*"])
    assert done.value.code == 0
    assert {"logs/events", "checkpoint-1/optimizer.bin"} < set(server.files("user/faces"))
    assert server.repo("user/faces").at("main").message == "All of it"
    assert f"{server.url}/user/faces/commit/" in capsys.readouterr().out


def test_save_pretrained_pushes_under_the_name_of_the_folder(
    server: FakeHub, pipe: AnimeFacePipeline, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "my-faces", push_to_hub=True, private=True)
    assert server.repo("user/my-faces").private
    pipe.save_pretrained(tmp_path / "my-faces", push_to_hub=True, repo_id="user/other", create_pr=True)
    assert set(server.files("user/other")) == {".gitattributes"}
    assert set(server.files("user/other", "refs/pr/1")) == PUBLISHED
    assert torch.equal(draw(AnimeFacePipeline.from_pretrained("user/other", revision="refs/pr/1")), draw(pipe))


def test_a_pull_request_to_somebody_elses_repository(server: FakeHub, pipe: AnimeFacePipeline) -> None:
    pipe.push_to_hub("user/faces")
    server.put("other/faces", server.files("user/faces"))
    with pytest.raises(HfHubHTTPError):
        pipe.push_to_hub("other/faces")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe.push_to_hub("other/faces", create_pr=True).pr_url == f"{server.url}/other/faces/discussions/1"
    assert type(AnimeFacePipeline.from_pretrained("other/faces").scheduler) is DDPMScheduler
    assert type(AnimeFacePipeline.from_pretrained("other/faces", revision="refs/pr/1").scheduler) is DDIMScheduler


def test_shards_give_way_to_one_file_and_back(server: FakeHub, pipe: AnimeFacePipeline, tmp_path: Path) -> None:
    expected = draw(pipe)
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    for shard_size in (None, "50KB", None):
        torch.nn.init.normal_(pipe.unet.conv_out.bias)  # other weights each time: stale ones would show
        expected = draw(pipe)
        pipe.save_pretrained(tmp_path / "pipe", max_shard_size=shard_size)
        upload_folder_as_pipeline(tmp_path / "pipe", "user/faces")
        sharded = shard_size is not None
        for names in (contents(tmp_path / "pipe"), server.files("user/faces")):
            assert (index in names) is sharded and (WEIGHTS in names) is not sharded
        for source in (tmp_path / "pipe", "user/faces"):
            assert torch.equal(draw(AnimeFacePipeline.from_pretrained(source)), expected)


def test_a_folder_without_its_weights_is_not_pushed(server: FakeHub, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match=r"not a whole pipeline, it has no unet/\*.safetensors"):
        upload_folder_as_pipeline(folder, "user/faces")
    assert server.log == []


# ---- the card: written anew while it is ours, kept once it was edited ----


def test_an_edited_card_is_kept(server: FakeHub, pipe: AnimeFacePipeline, folder: Path) -> None:
    push_or_explain(folder, "user/faces")
    edited = server.files("user/faces")["README.md"].replace(b"Anime faces", b"My faces")
    server.put("user/faces", {"README.md": edited})
    pipe.push_to_hub("user/faces", card=render_card(pipe, TrainingSummary(steps=3)))
    assert server.files("user/faces")["README.md"] == edited
    # a card that somebody edits on disk is his to push, and is not written over on disk either
    by_hand = "---\nlicense: other\n---\n\nMine."
    (folder / "README.md").write_text(by_hand, encoding="utf-8")
    pipe.save_pretrained(folder, card=render_card(pipe))
    push_or_explain(folder, "user/faces")
    assert server.files("user/faces")["README.md"].decode() == by_hand


def test_the_pictures_of_an_edited_card_are_kept(server: FakeHub, pipe: AnimeFacePipeline, folder: Path) -> None:
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / "samples.png").write_bytes(b"ours")
    push_or_explain(folder, "user/faces")
    edited = server.files("user/faces")["README.md"].replace(b"Anime faces", b"My faces")
    server.put("user/faces", {"README.md": edited, "assets/samples.png": b"theirs"})
    push_or_explain(folder, "user/faces")
    assert server.files("user/faces")["assets/samples.png"] == b"theirs"
    (folder / "README.md").write_text("Mine.", encoding="utf-8")
    pipe.save_pretrained(folder, card={"README.md": "Ours.", "assets/samples.png": b"new"})
    assert (folder / "assets" / "samples.png").read_bytes() == b"ours"


def test_a_card_of_ours_is_written_anew(server: FakeHub, pipe: AnimeFacePipeline, folder: Path) -> None:
    push_or_explain(folder, "user/faces")
    pipe.save_pretrained(folder, card=render_card(pipe, TrainingSummary(steps=12_345)))
    push_or_explain(folder, "user/faces")
    assert b"12,345" in server.files("user/faces")["README.md"]


def test_a_card_that_cannot_be_had_is_not_replaced(
    server: FakeHub, pipe: AnimeFacePipeline, card: dict[str, str | bytes], tmp_path: Path
) -> None:
    pipe.push_to_hub("user/faces", card=card)
    there = server.files("user/faces")["README.md"]
    server.fail(".*/README.md", status=404)
    pulled = AnimeFacePipeline.from_pretrained("user/faces")
    pulled.save_pretrained(tmp_path / "pulled")
    assert not (tmp_path / "pulled/README.md").exists()
    server.failures.clear()
    upload_folder_as_pipeline(tmp_path / "pulled", "user/faces")
    assert server.files("user/faces")["README.md"] == there


def test_a_signature_holds_for_its_text_only() -> None:
    signed = sign_card("# A card\n")
    assert is_our_card(signed) and is_our_card(sign_card(signed)) and signed.count("sha256") == 1
    assert not is_our_card("# A card\n")
    assert not is_our_card(signed.replace("A card", "My card"))
    assert not is_our_card(signed + "More.\n")


# ---- what is pulled ----


def test_weights_and_scheduler_are_of_one_commit_while_the_repository_moves(
    server: FakeHub, pipe: AnimeFacePipeline
) -> None:
    expected = draw(pipe)
    pipe.push_to_hub("user/faces")
    old = server.files("user/faces")
    torch.nn.init.zeros_(pipe.unet.conv_out.weight)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.push_to_hub("user/newer")
    moves = iter([server.files("user/newer"), old] * 20)

    def move(line: str) -> None:
        if "/resolve/" in line:
            server.put("user/faces", next(moves))

    server.on_request = move
    pulled = AnimeFacePipeline.from_pretrained("user/faces")
    assert type(pulled.scheduler) is DDPMScheduler and torch.equal(draw(pulled), expected)


def test_a_revision_is_a_branch_a_tag_or_a_commit(server: FakeHub, pipe: AnimeFacePipeline) -> None:
    pipe.push_to_hub("user/faces")
    repo = server.repo("user/faces")
    first = repo.refs["v1"] = repo.refs["main"]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.push_to_hub("user/faces")
    kinds = {
        r: type(AnimeFacePipeline.from_pretrained("user/faces", revision=r).scheduler) for r in ("v1", first, "main")
    }
    assert kinds == {"v1": DDPMScheduler, first: DDPMScheduler, "main": DDIMScheduler}


BAD_PULLS = {
    "no such repository": ("user/nothing", {}, "no such repository, or a private one"),
    "a private one": ("user/private", {"token": False}, "no such repository, or a private one"),
    "wrong token": ("user/faces", {"token": "hf_wrong"}, "the Hub refuses the token"),
    "no such revision": ("user/faces", {"revision": "v9"}, "no such revision"),
    "not cached": ("user/faces", {"local_files_only": True}, "the cache does not have it"),
    "no such variant": ("user/faces", {"variant": "fp16"}, "weights file"),
    "no name at all": ("not/a/name", {}, "Repo id must"),
    "another pipeline": ("user/stock", {}, "describes a DDPMPipeline, not an AnimeFacePipeline"),
    "no pipeline": ("user/text", {}, "no model_index.json"),
    "unknown scheduler": ("user/odd", {}, "user/odd: model_index.json names the scheduler OddScheduler"),
}


@pytest.mark.parametrize(("name", "kwargs", "message"), BAD_PULLS.values(), ids=BAD_PULLS.keys())
def test_what_cannot_be_pulled_gives_one_clear_line(
    name: str, kwargs: dict[str, Any], message: str, server: FakeHub, pipe: AnimeFacePipeline
) -> None:
    pipe.push_to_hub("user/faces")
    files = server.files("user/faces")
    index = json.loads(files["model_index.json"])
    server.put("user/private", files, private=True)
    server.put("user/text", {"README.md": b"# Text"})
    server.put("user/stock", {"model_index.json": json.dumps({"_class_name": "DDPMPipeline"}).encode()})
    odd = json.dumps({**index, "scheduler": ["diffusers", "OddScheduler"]})
    server.put("user/odd", {**files, "model_index.json": odd.encode()})
    with pytest.raises((OSError, ValueError), match=re.escape(message)) as caught:
        AnimeFacePipeline.from_pretrained(name, **kwargs)
    assert "\n" not in str(caught.value).strip()
    print(f"{type(caught.value).__name__}: {caught.value}")


def test_a_private_repository_needs_the_token(server: FakeHub, pipe: AnimeFacePipeline, tmp_path: Path) -> None:
    summary = TrainingSummary(steps=2)
    pipe.push_to_hub("user/secret", private=True, card=render_card(pipe, summary))
    os.environ.pop("HF_TOKEN")  # the fixture puts it back
    pulled = AnimeFacePipeline.from_pretrained("user/secret", token=server.read_token)
    pulled.save_pretrained(tmp_path / "again")
    assert "How it was trained" in (tmp_path / "again/README.md").read_text(encoding="utf-8")


# ---- failures: nothing is lost, one line, the right exit code, and the command that makes up for it ----


def no_token(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def read_token(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", server.read_token)


def no_network(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint("http://127.0.0.1:9", monkeypatch)  # a port that nobody listens to


def offline_mode(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def refused_name(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.refused_names.add("user/faces")


def server_error(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail("POST .*/commit/.*", status=500)


def upload_error(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail("PUT .*", status=500)


def dropped_connection(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail("PUT .*", status=None)


def other_content(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put("user/faces", {"model.bin": b"", "README.md": b"# A language model"})


def pushed_meanwhile(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(line: str) -> None:
        if "/preupload/" in line:
            server.put("user/faces", {"README.md": b"# Edited on the website at this very moment"})

    server.on_request = move


# what goes wrong, the reason that is given, and the exit code of the command (of a run it is always 3)
FAILURES = {
    "no token": (no_token, "there is no token: run `hf auth login`", 3),
    "wrong token": (wrong_token, "the Hub refuses the token", 3),
    "a token that may only read": (read_token, "the token may not write there", 3),
    "no network": (no_network, "ConnectError", 3),
    "offline mode": (offline_mode, "HF_HUB_OFFLINE", 3),
    "refused name": (refused_name, "'user/faces' is reserved", 3),
    "500 for the commit": (server_error, "the Hub answered 500", 3),
    "500 for the weights": (upload_error, "the Hub answered 500", 3),
    "connection dropped in the upload": (dropped_connection, "Error", 3),
    "somebody pushes meanwhile": (pushed_meanwhile, "somebody else pushed at the same moment", 3),
    "other content": (other_content, "user/faces on the Hub holds something else (model.bin)", 2),
}


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have slept between its attempts."""
    naps: list[float] = []
    patient = SimpleNamespace(**{**vars(time), "sleep": naps.append})
    monkeypatch.setattr("huggingface_hub.utils._http.time", patient)
    return naps


@pytest.mark.parametrize(("break_it", "reason", "code"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failed_push_loses_nothing(
    break_it: Any,
    reason: str,
    code: int,
    server: FakeHub,
    folder: Path,
    naps: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(folder)
    break_it(server, monkeypatch)
    there = {key: dict(server.files(key[1])) for key in server.repos}

    began = time.monotonic()
    assert push_or_explain(folder, "user/faces", private=True) == 3
    of_the_run = capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        hub.main([str(folder), "--hub_model_id", "user/faces", "--private"])
    of_the_command = capsys.readouterr().err
    assert time.monotonic() - began < 20
    assert sum(naps) <= 2 * 3 * 23  # two pushes of three large files; side by side they wait 23 seconds a push

    assert stopped.value.code == code
    for lines in (of_the_run, of_the_command):
        last = [line for line in lines.splitlines() if line.startswith("error: ")]
        assert len(last) == 1 and reason in last[0] and "Traceback" not in lines, lines
        print(last[0])
    assert contents(folder) == before
    for key, files in there.items():  # nor was anything on the Hub touched
        assert files.items() <= server.files(key[1]).items()
    assert ("model", "user/faces") not in server.repos or WEIGHTS not in server.files("user/faces")
    later = f"python -m animeface_pipeline.hub {folder.as_posix()} --hub_model_id user/faces --private"
    assert of_the_run.endswith(f"All is saved; push it later with: {later}\n")


def test_the_command_that_the_message_names_works(
    server: FakeHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail("POST .*/commit/.*", status=500, times=1)
    assert push_or_explain(folder, "user/faces", private=True) == 3
    later = shlex.split(capsys.readouterr().err.rpartition("push it later with: ")[2])
    env = {**os.environ, **server.env(tmp_path / "later")}
    ran = subprocess.run([sys.executable, *later[1:]], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"pushed {folder} to {server.url}/user/faces/commit/")
    assert server.repo("user/faces").private and set(server.files("user/faces")) == PUBLISHED | PICTURES


def test_the_message_of_a_failed_command_repeats_its_flags(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail("POST .*/commit/.*", status=500)
    flags = [str(folder), "--hub_model_id", "user/faces", "--commit_message", "the third", "--include", "logs/**/*"]
    with pytest.raises(SystemExit) as stopped:
        hub.main(flags)
    assert stopped.value.code == 3
    assert shlex.split(capsys.readouterr().err.rpartition("push it later with: ")[2])[3:] == flags


def test_a_connection_that_drops_once_is_tried_again(server: FakeHub, folder: Path, naps: list[float]) -> None:
    server.fail("PUT .*", status=None, times=1)
    assert push_or_explain(folder, "user/faces") == 0
    assert naps == [1] and set(server.files("user/faces")) == PUBLISHED | PICTURES


def test_a_hub_that_does_not_answer_is_given_up(
    server: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "HUB_TIMEOUT", 0.5)
    server.fail("POST .*/commit/.*", status=None, delay=30)
    began = time.monotonic()
    assert push_or_explain(folder, "user/faces") == 3
    assert time.monotonic() - began < 20
    assert "ReadTimeout" in capsys.readouterr().err


BAD_INPUT = {
    "no such folder": (["nowhere", "--hub_model_id", "user/faces"], "nowhere: no such folder"),
    "no pipeline": ([".", "--hub_model_id", "user/faces"], "not a pipeline's folder"),
    "bad name": (["anime-faces", "--hub_model_id", "user/fa ces"], "--hub_model_id user/fa ces: Repo id must"),
    "too many slashes": (["anime-faces", "--hub_model_id", "a/b/c"], "--hub_model_id a/b/c: Repo id must"),
    "no name": (["anime-faces"], "the following arguments are required: --hub_model_id"),
    "a flag of old": (["anime-faces", "--hub_model_id", "user/faces", "--force"], "unrecognized arguments: --force"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    server: FakeHub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(SystemExit) as stopped:
        hub.main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1, said
    assert server.log == []
    print(said)
