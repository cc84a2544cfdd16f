"""What a request may be, and what is said when it is not."""

from __future__ import annotations

import os
from pathlib import Path

import av
import msgspec
import numpy as np
import pytest
from PIL import Image

from engine.admission import Room, admit, check_prompt_tokens, resolved_params
from engine.conditioning import Media, best_output_size, size_of_condition
from engine.footprint import Bounds, RequestSize, need
from engine.memory import slot_sizes
from engine.models import CONFIGS, list_models, load_model
from engine.params import ModelParams, SystemParams, UserParams
from ipc.errors import BadConfig, BadRequest
from ipc.messages.memory import MemoryPlan

MODEL = load_model("wan-demo")
I2V, I2V_A14B, TI2V = (load_model(f"wan2.{n}") for n in ("1-i2v-14b-480p", "2-i2v-a14b", "2-ti2v-5b"))
T2V_A14B = load_model("wan2.2-t2v-a14b")
SYSTEM = SystemParams()


def ask(tmp_path: Path, **fields: object) -> UserParams:
    return UserParams(**{"prompt": "a red circle", "output": str(tmp_path / "v.mp4"), **fields})  # type: ignore[arg-type]


def picture(path: Path, width: int = 64, height: int = 48) -> str:
    Image.new("RGB", (width, height), "red").save(path)
    return str(path)


def clip(path: Path, frames: int) -> str:
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8, width=64, height=48, pix_fmt="yuv420p")
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        container.mux(stream.encode())
    return str(path)


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
    params = resolved_params(user, job, MODEL)
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
        ({"num_frames": 1001}, ["num_frames is 1001; wan-demo makes up to 33 frames"]),
        ({"height": 100}, ["height is 100", "multiple of 16", "nearest is 96"]),
        ({"width": 7}, ["width is 7", "nearest is 16"]),
        ({"width": -16}, ["width is -16"]),
        ({"height": 1600, "width": 1600}, ["2,560,000 pixels", "up to 36,864"]),
        ({"steps": 0}, ["steps is 0", "from 1 to 1000"]),
        ({"steps": 10_000}, ["steps is 10000", "from 1 to 1000"]),
        ({"guidance_scale": -1.0}, ["guidance_scale"]),
        ({"guidance_scale_2": 2.0}, ["low-noise", "guidance_scale the high-noise", "has one expert only"]),
        ({"noise_device": "cuda"}, ["noise_device is cuda", "computes on the CPU"]),
        ({"noise_device": "tpu"}, ["noise_device", "cpu, cuda"]),
        ({"preset": "distiled"}, ["preset", "did you mean 'distilled'"]),
        ({"height": 16, "width": 16400}, ["width is 16400", "goes up to 16384"]),
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


def test_a_start_and_its_strength(tmp_path: Path) -> None:
    """Strength 0.5 of 20 steps starts in the middle; without a strength it is 0.8; a directory is no image."""
    image = picture(tmp_path / "a.png")

    def start(**fields: object) -> int:
        job = admit(ask(tmp_path, image=image, steps=20, **fields), MODEL, SYSTEM)
        assert (job.init, job.init_as, job.height, job.width) == (image, "start", 96, 96)
        return job.start_step

    assert [start(strength=0.5), start(), start(strength=0.001)] == [10, 4, 19]
    assert "not a readable file" in refusal(ask(tmp_path, image=str(tmp_path)))


def test_an_init_file_is_looked_at_before_it_is_accepted(tmp_path: Path) -> None:
    """Text in the place of a picture, and a video shorter than the request, are refused with the reason; a video
    that is long enough is a start."""
    (tmp_path / "a.png").write_text("no picture at all")
    assert "'a.png'" in refusal(ask(tmp_path, image=str(tmp_path / "a.png")))
    video = clip(tmp_path / "a.mp4", 9)
    text = refusal(ask(tmp_path, video=video))
    assert "'a.mp4' has 9 frames and the request 17" in text
    assert "/" not in text
    assert admit(ask(tmp_path, video=video, num_frames=9), MODEL, SYSTEM).start_step == 4


def test_image_to_video_needs_an_image_and_nothing_else(tmp_path: Path) -> None:
    """An I2V model refuses a request without an image, and takes neither a video nor a strength; the image is a
    condition, so all steps are run, and no strength is in the parameters."""
    image, video = picture(tmp_path / "a.png"), clip(tmp_path / "a.mp4", 2)
    assert "give it one with --image" in refusal(ask(tmp_path), I2V)
    assert "takes no video" in refusal(ask(tmp_path, video=video), I2V)
    assert "takes no strength" in refusal(ask(tmp_path, image=image, strength=0.5), I2V)
    user = ask(tmp_path, image=image)
    job = admit(user, I2V, SYSTEM)
    assert (job.init, job.init_as, job.start_step, job.steps) == (image, "channels", 0, 40)
    assert resolved_params(user, job, I2V)["strength"] is None


def test_an_image_of_ti2v_is_its_first_frame_or_its_start(tmp_path: Path) -> None:
    """Without a strength the image is the first frame; with one it is where denoising starts, as a video always is."""
    image, video = picture(tmp_path / "a.png"), clip(tmp_path / "a.mp4", 5)
    job = admit(ask(tmp_path, image=image), TI2V, SYSTEM)
    assert (job.init_as, job.start_step) == ("first_frame", 0)
    job = admit(ask(tmp_path, image=image, strength=0.5), TI2V, SYSTEM)
    assert (job.init_as, job.start_step, job.height, job.width) == ("start", 25, 704, 1280)
    job = admit(ask(tmp_path, video=video, num_frames=5), TI2V, SYSTEM)
    assert (job.init_as, job.start_step) == ("start", 10)
    assert admit(ask(tmp_path), TI2V, SYSTEM).init is None


def test_without_a_size_the_image_gives_the_aspect(tmp_path: Path) -> None:
    """A portrait picture gives a portrait video of about the model's usual area; if one side is given, the other has
    its default; a picture that is no more than a line is refused."""
    portrait = picture(tmp_path / "p.png", 48, 64)
    job = admit(ask(tmp_path, image=portrait), I2V, SYSTEM)
    assert (job.width, job.height) == (544, 720)
    assert resolved_params(ask(tmp_path), job, I2V)["height"] == 720
    job = admit(ask(tmp_path, image=portrait, width=832), I2V, SYSTEM)
    assert (job.width, job.height) == (832, 480)
    line = picture(tmp_path / "line.png", 4000, 1)
    assert "goes up to" in refusal(ask(tmp_path, image=line), I2V)


@pytest.mark.parametrize(
    ("model", "image", "size"),
    [
        (I2V, (832, 480), (832, 480)),
        (I2V, (1024, 1024), (624, 624)),
        (I2V, (480, 832), (480, 832)),
        (I2V_A14B, (1280, 720), (1280, 720)),
        (I2V_A14B, (1920, 800), (1472, 608)),
        (TI2V, (1280, 704), (1280, 704)),
        (TI2V, (704, 1280), (704, 1280)),
        (TI2V, (1920, 1080), (1248, 704)),
        (TI2V, (1000, 1000), (960, 928)),
    ],
)
def test_sizes_of_wan(model: ModelParams, image: tuple[int, int], size: tuple[int, int]) -> None:
    """The sizes that the Wan repositories derive from pictures of these sizes (but 480 rows, not 464, for the first);
    always at most the area."""
    height, width = size_of_condition(Media(*image, 1), model)
    assert (width, height) == size
    assert width * height <= model.limits.max_pixels


def test_best_output_size_keeps_within_the_area() -> None:
    """Whatever the aspect within reason: multiples of 32, at most the area, and close to the aspect."""
    for ratio in np.linspace(0.3, 3.0, 100):
        height, width = best_output_size(float(ratio), 704 * 1280, 32)
        assert height % 32 == width % 32 == 0
        assert 0.85 * 704 * 1280 < height * width <= 704 * 1280
        assert abs(width / height - ratio) / ratio < 0.06


def test_the_distilled_preset_replaces_defaults_and_explicit_fields_win(tmp_path: Path) -> None:
    """distilled: 4 Euler steps, no guidance, shift 5, whatever the model's defaults; what the request says wins."""
    user = ask(tmp_path, preset="distilled")
    job = admit(user, T2V_A14B, SYSTEM)
    assert (job.steps, job.guidance_scale, job.guidance_scale_2, job.solver, job.flow_shift) == (4, 1, 1, "euler", 5)
    params = resolved_params(user, job, T2V_A14B)
    assert (params["preset"], params["steps"], params["guidance_scale_2"], params["solver"]) == (
        "distilled",
        4,
        1,
        "euler",
    )
    job = admit(ask(tmp_path, preset="distilled", steps=8, flow_shift=3.0), T2V_A14B, SYSTEM)
    assert (job.steps, job.flow_shift, job.solver) == (8, 3.0, "euler")
    assert admit(ask(tmp_path, preset="distilled"), MODEL, SYSTEM).guidance_scale == 1


@pytest.mark.parametrize("name", list_models())
def test_the_parameters_of_a_video_are_a_request_for_it(tmp_path: Path, name: str) -> None:
    """What `accepted` and the metadata have for a request that leaves all to the model, with and without the preset:
    handed in again it is accepted, as the same job; so is a guidance_scale_2 that says the same of the only expert."""
    model = load_model(name)
    image = {"image": picture(tmp_path / "a.png")} if model.conditioning == "channels" else {}
    for preset in (None, "distilled"):
        user = ask(tmp_path, preset=preset, **image)
        job = admit(user, model, SYSTEM)
        params = resolved_params(user, job, model)
        assert (params["guidance_scale_2"] is None) == (model.boundary is None)
        both = UserParams(**params | {"guidance_scale_2": job.guidance_scale_2})
        for request in (UserParams(**params), both):
            again = admit(request, model, SYSTEM)
            assert msgspec.structs.replace(again, id=job.id) == job
            assert resolved_params(request, again, model) == params


def test_guidance_of_two_experts(tmp_path: Path) -> None:
    """guidance_scale is the high-noise expert's, guidance_scale_2 the low-noise one's. Defaults of T2V-A14B: 4 and 3.
    Only the first given: both; only the second: the first has its default; so it is with a preset's."""

    def scales(**fields: object) -> tuple[float, float]:
        job = admit(ask(tmp_path, **fields), T2V_A14B, SYSTEM)
        return job.guidance_scale, job.guidance_scale_2

    assert scales() == (4, 3)
    assert scales(guidance_scale=6.0) == (6, 6)
    assert scales(guidance_scale_2=2.0) == (4, 2)
    assert scales(preset="distilled", guidance_scale=6.0) == (6, 6)
    assert scales(preset="distilled", guidance_scale_2=2.0) == (1, 2)


def test_noise_may_be_drawn_on_a_gpu_engine(tmp_path: Path) -> None:
    """noise_device cuda is accepted where the engine computes on a GPU, and is in job and parameters."""
    user = ask(tmp_path, noise_device="cuda")
    job = admit(user, MODEL, SYSTEM, on_gpu=True)
    assert job.noise_device == resolved_params(user, job, MODEL)["noise_device"] == "cuda"


@pytest.mark.parametrize("name", list_models())
def test_the_shared_memory_of_every_model_is_sane(name: str) -> None:
    """From a few MB for the demo model to 1.2 GB at 720p and 161 frames."""
    sizes = slot_sizes(load_model(name))
    print(f"{name}: {sizes.total / 1e6:,.0f} MB")
    assert sizes.total < (20e6 if name == "wan-demo" else 1.25e9)
    image = load_model(name).image_encoder
    assert sizes.queues["init_latents"][0] == (2 if image is None else 4)
    if image is not None:
        assert sizes.queues["init_latents"][1] >= 257 * 1280 * 4


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


def test_what_can_never_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    """One byte too little for the least that the request takes: refused, with what is missing and what would fit,
    which then is accepted; with that byte it is accepted, too."""
    usual = RequestSize(1280, 720, 81)
    least = need(T2V_A14B, usual, MemoryPlan(level=3, blocks=0)).gpu
    assert admit(ask(tmp_path), T2V_A14B, SYSTEM, room=Room(bytes=least)).num_frames == 81
    with pytest.raises(BadRequest) as caught:
        admit(ask(tmp_path), T2V_A14B, SYSTEM, room=Room(bytes=least - 1))
    said = str(caught.value)
    assert "1280x720 with 81 frames does not fit" in said and "0.1 GB more than there is" in said
    assert "77 frames, or 1248x704, or" in said
    assert admit(ask(tmp_path, num_frames=77), T2V_A14B, SYSTEM, room=Room(bytes=least - 1)).num_frames == 77
    small = ask(tmp_path, width=1248, height=704)
    assert admit(small, T2V_A14B, SYSTEM, room=Room(bytes=least - 1)).width == 1248


def test_a_fixed_level_is_all_there_can_be(tmp_path: Path) -> None:
    """An operator who keeps everything resident: what needs a higher level is refused, and the level is named."""
    room = Room(bytes=24 * 10**9, bounds=Bounds(highest=0))
    with pytest.raises(BadRequest, match=r"memory_level 3"):
        admit(ask(tmp_path), T2V_A14B, SYSTEM, room=room)


def test_what_host_memory_can_never_hold_is_refused(tmp_path: Path) -> None:
    """At a fixed level 2 the weights and the clip between the VAE's tiles take more than the machine has: refused, with
    what would fit, which is accepted."""
    plenty, host = 200 * 10**9, need(T2V_A14B, RequestSize(1280, 720, 81), MemoryPlan(level=2)).host_all
    fits = Bounds(lowest=2, highest=2, host=host)
    assert admit(ask(tmp_path), T2V_A14B, SYSTEM, room=Room(bytes=plenty, bounds=fits)).num_frames == 81
    short = Room(bytes=plenty, bounds=msgspec.structs.replace(fits, host=host - 1))
    with pytest.raises(BadRequest, match=r"of host memory that this engine may take: .* 0\.1 GB more .* 77 frames, or"):
        admit(ask(tmp_path), T2V_A14B, SYSTEM, room=short)
    assert admit(ask(tmp_path, num_frames=77), T2V_A14B, SYSTEM, room=short).num_frames == 77


def test_guidance_takes_memory_of_its_own(tmp_path: Path) -> None:
    """Room for one branch's keys and values is not enough for two."""
    one = need(T2V_A14B, RequestSize(1280, 720, 81, guided=False), MemoryPlan(level=3, blocks=0)).gpu
    room = Room(bytes=one)
    assert admit(ask(tmp_path, guidance_scale=1.0), T2V_A14B, SYSTEM, room=room).guidance_scale_2 == 1.0
    with pytest.raises(BadRequest, match="does not fit"):
        admit(ask(tmp_path), T2V_A14B, SYSTEM, room=room)
