"""What a request may be, and what is said when it is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.admission import admit, check_prompt_tokens, resolved_params
from engine.models import CONFIGS, list_models, load_model
from engine.params import ModelParams, SystemParams, UserParams
from ipc.errors import BadConfig, BadRequest

MODEL = load_model("wan-demo")
SYSTEM = SystemParams()


def ask(tmp_path: Path, **fields: object) -> UserParams:
    return UserParams(**{"prompt": "a red circle", "output": str(tmp_path / "v.mp4"), **fields})  # type: ignore[arg-type]


def refusal(user: UserParams, model: ModelParams = MODEL, system: SystemParams = SYSTEM) -> str:
    with pytest.raises(BadRequest) as caught:
        admit(user, model, system)
    return str(caught.value)


def test_defaults_fill_in_everything(tmp_path: Path) -> None:
    """A request that gives only a prompt and an output becomes a job with the model's defaults and a drawn seed."""
    user = ask(tmp_path)
    job = admit(user, MODEL, SYSTEM)
    d = MODEL.defaults
    assert (job.height, job.width, job.num_frames, job.fps) == (d.height, d.width, d.num_frames, d.fps)
    assert (job.steps, job.solver, job.flow_shift, job.start_step) == (d.steps, d.solver, d.flow_shift, 0)
    assert job.guidance_scale == job.guidance_scale_2 == d.guidance_scale
    params = resolved_params(user, job)
    assert params["seed"] == job.seed
    assert params["height"] == d.height
    assert admit(user, MODEL, SYSTEM).id != job.id


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": ""}, ["prompt", "empty"]),
        ({"prompt": " \n\t"}, ["prompt", "empty"]),
        ({"prompt": "x" * 70_000}, ["70,000 bytes"]),
        ({"num_frames": 16}, ["4n + 1", "13 or 17"]),
        ({"num_frames": 0}, ["4n + 1", "1"]),
        ({"num_frames": 1001}, ["goes up to 33"]),
        ({"height": 100}, ["height is 100", "multiple of 16", "nearest is 96"]),
        ({"width": 7}, ["width is 7", "nearest is 16"]),
        ({"width": -16}, ["width is -16"]),
        ({"height": 1600, "width": 1600}, ["2,560,000 pixels", "up to 36,864"]),
        ({"steps": 0}, ["steps is 0", "from 1 to 1000"]),
        ({"steps": 10_000}, ["steps is 10000", "from 1 to 1000"]),
        ({"guidance_scale": -1.0}, ["guidance_scale"]),
        ({"guidance_scale_2": 3.0}, ["two experts"]),
        ({"flow_shift": 0.0}, ["flow_shift"]),
        ({"seed": -1}, ["seed"]),
        ({"solver": "ddim"}, ["solver"]),
        ({"fps": 0}, ["fps"]),
        ({"priority": 11}, ["priority"]),
        ({"deadline": 0.0}, ["deadline"]),
        ({"strength": 0.5}, ["strength needs an image or a video"]),
        ({"image": "a.png", "video": "b.mp4"}, ["both image and video"]),
        ({"image": "/nowhere/a.png"}, ["/nowhere/a.png", "No such file"]),
        ({"output": "v.avi"}, [".mp4"]),
        ({"output": "/nowhere/v.mp4"}, ["/nowhere", "does not exist"]),
        ({"output": "x" * 250 + ".mp4"}, ["longer than 200 bytes"]),
        ({"output": "a\0b.mp4"}, ["NUL"]),
        ({"output": "/tmp/.mp4"}, ["must end in .mp4, after a name"]),
        ({"output": "./" * 3000 + "v.mp4"}, ["longer than 4,096 bytes"]),
        ({"output": "\udcff.mp4"}, ["not valid Unicode"]),
        ({"video": "./" * 3000 + "v.mp4"}, ["longer than 4,096 bytes"]),
        ({"video": "/proc/self/mem"}, ["is empty"]),
        ({"prompt": "a \ud800"}, ["not valid Unicode"]),
        ({"flow_shift": 5e-324}, ["flow_shift"]),
    ],
)
def test_refusals_say_what_to_change(tmp_path: Path, fields: dict[str, object], says: list[str]) -> None:
    """A value out of its range is refused with a sentence that names it and what would do."""
    text = refusal(ask(tmp_path, **fields))
    for part in says:
        assert part in text


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    """A directory in the place of the file, or a file in the place of the directory, is found out before computing."""
    (tmp_path / "d.mp4").mkdir()
    assert "not a file" in refusal(ask(tmp_path, output=str(tmp_path / "d.mp4")))
    (tmp_path / "f").touch()
    assert "does not exist" in refusal(ask(tmp_path, output=str(tmp_path / "f" / "v.mp4")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    """A directory without write permission is refused."""
    tmp_path.chmod(0o500)
    assert "cannot be written" in refusal(ask(tmp_path))


def test_paths_stay_below_the_root(tmp_path: Path) -> None:
    """With an output root, `..`, absolute paths and symbolic links out of it are refused; inside is accepted."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "out").mkdir()
    (root / "link").symlink_to(tmp_path / "out")
    system = SystemParams(output_root=str(root))
    assert admit(ask(tmp_path, output=str(root / "v.mp4")), MODEL, system).output == str(root / "v.mp4")
    for path in (tmp_path / "v.mp4", root / ".." / "v.mp4", root / "link" / "v.mp4", root / "link" / ".." / "v.mp4"):
        assert "outside the directory" in refusal(ask(tmp_path, output=str(path)), system=system)
    (root / "image").symlink_to("/etc/hostname")
    text = refusal(ask(tmp_path, output=str(root / "v.mp4"), image=str(root / "image")), system=system)
    assert "outside the directory" in text


def test_init_and_strength(tmp_path: Path) -> None:
    """Strength 0.5 of 20 steps starts in the middle; without a strength it is 0.8; a directory is no image."""
    image = tmp_path / "a.png"
    image.write_bytes(b"x")
    assert admit(ask(tmp_path, image=str(image), strength=0.5, steps=20), MODEL, SYSTEM).start_step == 10
    assert admit(ask(tmp_path, image=str(image), steps=20), MODEL, SYSTEM).start_step == 4
    assert admit(ask(tmp_path, image=str(image), strength=0.001, steps=20), MODEL, SYSTEM).start_step == 19
    assert "not a readable file" in refusal(ask(tmp_path, image=str(tmp_path)))


def test_prompt_tokens_are_counted(tmp_path: Path) -> None:
    """A prompt of far more than 512 tokens is refused with its number of tokens; a long one that fits is accepted."""
    tokenizer = CONFIGS / "demo" / "tokenizer" / "tokenizer.json"
    check_prompt_tokens(admit(ask(tmp_path, prompt="red circle " * 100), MODEL, SYSTEM), MODEL, tokenizer)
    job = admit(ask(tmp_path, prompt="red circle " * 500), MODEL, SYSTEM)
    with pytest.raises(BadRequest, match=r"the prompt has 1,?\d\d\d tokens; wan-demo reads at most 512"):
        check_prompt_tokens(job, MODEL, tokenizer)


def test_unknown_model_lists_the_known() -> None:
    """Asking for a model that does not exist names those that do."""
    with pytest.raises(BadConfig, match="wan-demo"):
        load_model("wan-9")
    assert "wan-demo" in list_models()
