"""The transform against torchvision's own output, its definition in Pillow calls, transformers, and bad files."""

import hashlib
import io
import json
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from clip_lab.images import (
    OPENAI_MEAN,
    OPENAI_STD,
    ImageError,
    Preprocess,
    centre_crop,
    eight_bit,
    open_image,
    preprocess,
    train_transform,
)


def picture(mode: str, width: int, height: int) -> Image.Image:
    "A picture of whole-number arithmetic alone: the same on every machine."
    y, x = np.mgrid[:height, :width]
    planes = [(x * 7 + y * 3 + x * y // 5) % 256, (x * x // 9 + y * 11) % 256, (x * 5 ^ y * 3) % 256, (x * 2 + y * y // 7) % 256]
    if mode == "1":
        return Image.fromarray(np.where(planes[2] > 127, 255, 0).astype(np.uint8)).convert("1", dither=Image.Dither.NONE)
    if mode in ("L", "P"):
        made = Image.fromarray(planes[0].astype(np.uint8))
        if mode == "P":
            made.putpalette([(i * k) % 256 for i in range(256) for k in (1, 3, 7)])  # turns mode L into P
        return made
    count = {"LA": 2, "RGB": 3, "YCbCr": 3, "RGBA": 4, "CMYK": 4}[mode]
    return Image.merge(mode, [Image.fromarray(plane.astype(np.uint8)) for plane in planes[:count]])


# Computed by torchvision 0.29.1's own Resize, CenterCrop, ToTensor and Normalize, put together as OpenAI's `_transform` does:
# mode, width, height, size -> SHA-256 (first 16 digits) of the float32 tensor's bytes.
TORCHVISION = [
    ("RGB", 640, 427, 224, "0c84cf04ee29f2dd"),
    ("RGB", 427, 640, 224, "a43fdd16147703da"),
    ("RGB", 64, 64, 64, "8c447b972d50133b"),
    ("RGB", 100, 37, 64, "39e8b3fb0dcab2cb"),
    ("RGB", 37, 101, 64, "fb70ccfd664846af"),
    ("RGB", 335, 224, 224, "30ed253b8857472b"),
    ("RGB", 3, 50, 16, "2f78ad90e3b4999b"),
    ("RGB", 500, 501, 288, "67587453b74a68ce"),
    ("L", 300, 200, 64, "ac893a332319ee81"),
    ("LA", 300, 200, 64, "c7bf4af973349392"),
    ("P", 300, 200, 64, "388ed45fde72cdcf"),
    ("1", 300, 200, 64, "49c5349da53627bb"),
    ("RGBA", 300, 200, 64, "b0f6182e6a894b29"),
    ("RGBA", 64, 64, 64, "8c447b972d50133b"),
    ("CMYK", 300, 200, 64, "7a3d98159c762d9d"),
    ("YCbCr", 300, 200, 64, "fb622256dc839350"),
]


@pytest.mark.parametrize("mode, width, height, size, digest", TORCHVISION)
def test_tensors_equal_torchvisions_to_the_bit(mode, width, height, size, digest):
    x = preprocess(size)(picture(mode, width, height))
    assert x.shape == (3, size, size) and x.dtype == torch.float32 and x.is_contiguous()
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] == digest


def definition(image: Image.Image, size: int) -> torch.Tensor:
    "OpenAI's transform, torchvision's documented operations written out in Pillow's."
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    image = image.resize((size, longer) if width <= height else (longer, size), Image.BICUBIC)
    left, top = int(round((image.width - size) / 2.0)), int(round((image.height - size) / 2.0))
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
    return (x - torch.tensor(OPENAI_MEAN)[:, None, None]) / torch.tensor(OPENAI_STD)[:, None, None]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"]),
    width=st.integers(1, 160),
    height=st.integers(1, 160),
    size=st.sampled_from([1, 7, 16, 64]),
)
def test_any_size_and_mode_equal_the_definition(mode, width, height, size):
    image = picture(mode, width, height)
    assert torch.equal(preprocess(size)(image), definition(image, size))


@pytest.mark.parametrize("width, height, size, same", [(638, 427, 224, True), (300, 200, 64, True), (640, 427, 224, False)])
def test_transformers_agrees_except_where_it_rounds_an_odd_margin_down(width, height, size, same):
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = pil.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    gap = (preprocess(size)(picture("RGB", width, height)) - theirs(picture("RGB", width, height), return_tensors="pt")["pixel_values"][0]).abs().max()
    assert gap < 1e-5 if same else gap > 0.1


def test_other_mean_and_std():
    x = preprocess(8, mean=(0, 0.5, 1), std=(1, 0.5, 2))(Image.new("RGB", (9, 9), (255, 255, 0)))
    assert x[:, 0, 0].tolist() == [1.0, 1.0, -0.5]


def test_the_default_dtype_of_others_changes_nothing():
    expected = preprocess(16)(picture("RGB", 40, 30))
    torch.set_default_dtype(torch.float64)
    try:
        x = preprocess(16)(picture("RGB", 40, 30))
    finally:
        torch.set_default_dtype(torch.float32)
    assert x.dtype == torch.float32 and torch.equal(x, expected)


# ---- modes beyond eight bits


@pytest.mark.parametrize("dtype, mode", [("<u2", "I;16"), (">u2", "I;16B"), ("i4", "I")])
def test_sixteen_bits_are_scaled_to_eight(dtype, mode):
    values = np.array([[0, 128, 129, 257, 32_768, 65_406, 65_407, 65_535]])
    if mode == "I;16B":
        image = Image.frombytes("I;16B", (8, 1), values.astype(dtype).tobytes())
    else:
        image = Image.fromarray(values.astype(dtype))
    assert image.mode == mode
    assert np.asarray(eight_bit(image)).tolist() == [[0, 0, 1, 1, 128, 254, 255, 255]]


def test_a_sixteen_bit_png_equals_its_eight_bit_twin():
    grey = picture("L", 90, 60)
    file = io.BytesIO()
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(file, "png")
    assert torch.equal(preprocess(32)(file.getvalue()), preprocess(32)(grey))


def test_values_without_a_known_white_are_refused():
    with pytest.raises(ImageError, match=r"float pixels \(mode F\).*0\.\.255"):
        preprocess(8)(picture("L", 9, 9).convert("F"))
    with pytest.raises(ImageError, match=r"values from -3 to 70000 \(mode I\): expected 0 to 65535"):
        preprocess(8)(Image.fromarray(np.array([[-3, 70_000]], dtype=np.int32)))


# ---- orientation and background


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orient_turns_a_photograph_upright(orientation):
    upright = picture("RGB", 60, 40)
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])  # how a camera stores it
    stored = upright.transpose(undo[0]) if undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "png", exif=exif)
    assert torch.equal(preprocess(32, orient=True)(file.getvalue()), preprocess(32)(upright))
    assert torch.equal(preprocess(32)(file.getvalue()), preprocess(32)(stored))  # off by default, as OpenAI


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_background_fills_what_is_transparent(mode):
    image = Image.new("RGBA", (40, 40), (200, 10, 10, 0))
    image.paste((0, 0, 0, 255), (0, 0, 20, 40))
    if mode == "P":
        image = Image.new("P", (40, 40), 1)
        image.putpalette([0, 0, 0, 200, 10, 10])
        image.paste(0, (0, 0, 20, 40))
        image.info["transparency"] = 1
    elif mode != "RGBA":
        image = image.convert(mode)
    square = np.asarray(preprocess(40, background="#00ff00").square(image))
    assert square[20, 5].tolist() == [0, 0, 0] and square[20, 35].tolist() == [0, 255, 0]


def test_background_leaves_opaque_pictures_alone():
    for mode in ("RGB", "L", "P", "CMYK"):
        image = picture(mode, 50, 40)
        assert torch.equal(preprocess(32, background="white")(image), preprocess(32)(image))


# ---- opening


def encoded(format: str = "png", **size) -> bytes:
    file = io.BytesIO()
    picture("RGB", size.get("width", 60), size.get("height", 40)).save(file, format)
    return file.getvalue()


def test_every_kind_of_source_gives_the_same_tensor(tmp_path):
    (path := tmp_path / "a.png").write_bytes(encoded())
    expected = preprocess(16)(picture("RGB", 60, 40))
    with open(path, "rb") as file:
        for source in (path, str(path), encoded(), file, io.BytesIO(encoded()), Image.open(path)):
            assert torch.equal(preprocess(16)(source), expected)


def test_the_first_frame_of_an_animation():
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    assert preprocess(8).square(file.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.png does not exist: expected a picture file"):
        open_image(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"bad.png is empty \(0 bytes\): fetch or export it again"),
        (b"plain words", "bad.png is not a picture that Pillow can read: expected PNG, JPEG"),
        (encoded("png")[:400], "bad.png is broken or truncated .*: fetch or export it again"),
        (encoded("jpeg")[:900], "bad.png is broken or truncated .*: fetch or export it again"),
        (encoded("webp")[:200], "bad.png is (broken or truncated|not a picture)"),
        (encoded("png")[:60] + b"\x00" * 40 + encoded("png")[100:], "bad.png is broken or truncated"),
    ],
    ids=["empty", "text", "truncated png", "truncated jpeg", "truncated webp", "corrupt png"],
)
def test_unusable_files_are_named(tmp_path, content, message):
    (path := tmp_path / "bad.png").write_bytes(content)
    for source in (path, str(path)):
        with pytest.raises(ImageError, match=message):
            open_image(source)
    with pytest.raises(ImageError, match=message.replace("bad.png", f"<{len(content)} bytes>")):
        open_image(content)


def test_a_lazy_pil_picture_of_a_truncated_file_is_named(tmp_path):
    (path := tmp_path / "lazy.png").write_bytes(encoded()[:400])
    with pytest.raises(ImageError, match="lazy.png is broken or truncated"):
        open_image(Image.open(path))


def test_directory(tmp_path):
    with pytest.raises(ImageError, match="is a directory: expected one picture file"):
        open_image(tmp_path)


@pytest.mark.parametrize("source", [np.zeros((4, 4, 3), np.uint8), None, 3])
def test_what_is_no_source_at_all(source):
    with pytest.raises(TypeError, match="expected a path, bytes, an open file or a PIL picture"):
        open_image(source)


def test_no_pixels():
    with pytest.raises(ImageError, match=r"0 x 5.* has no pixels"):
        preprocess(8)(Image.new("RGB", (0, 5)))


def bomb(width: int, height: int) -> bytes:
    "A PNG header that promises many pixels."
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + encoded()[33:]


@pytest.mark.parametrize("side", [10_000, 40_000], ids=["Pillow warns", "Pillow raises"])
@pytest.mark.parametrize("warnings_are_errors", [False, True])
def test_decompression_bombs_are_refused(tmp_path, side, warnings_are_errors):
    (path := tmp_path / "bomb.png").write_bytes(bomb(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if warnings_are_errors else "ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match="bomb.png is too large.*(s|S)cale it down"):
            open_image(path)


def test_the_extremes_of_shape():
    for shape in ((1, 2_000), (2_000, 1)):
        assert torch.equal(preprocess(16)(picture("RGB", *shape)), definition(picture("RGB", *shape), 16))
    with pytest.raises(ImageError, match="shorter side resized to 224 makes 224 x 2240000 pixels, the limit is"):
        preprocess(224)(Image.new("RGB", (1, 10_000)))


def test_pillows_settings_stay_as_they_were(tmp_path):
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters[:]
    for content in (encoded(), encoded()[:400], b"x"):
        try:
            preprocess(16, orient=True, background="white")(content)
        except ImageError:
            pass
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters[:]) == before


def test_the_callers_picture_is_not_changed():
    for mode in ("RGBA", "P", "L"):
        image = picture(mode, 40, 30)
        before = image.copy()
        preprocess(16, orient=True, background="white")(image)
        assert image == before and image.mode == mode


# ---- the transform as a value


def test_round_trip_through_json_keeps_everything():
    transform = preprocess(64, mean=(0.1, 0.2, 0.3), orient=True, background="white")
    again = Preprocess.from_dict(json.loads(json.dumps(transform.to_dict())))
    assert again == transform and again.fingerprint() == transform.fingerprint() and hash(again) == hash(transform)
    assert pickle.loads(pickle.dumps(transform)) == transform


def test_fingerprints_tell_transforms_apart_and_stay():
    others = [preprocess(64), preprocess(65), preprocess(64, orient=True), preprocess(64, background="white"), preprocess(64, std=(1, 1, 1))]
    assert len({transform.fingerprint() for transform in others}) == len(others)
    assert preprocess(64, mean=list(OPENAI_MEAN)).fingerprint() == preprocess(64).fingerprint()
    assert preprocess(224).fingerprint() == "e3c1b35cdb14"  # stored beside weights and embeddings: a change here breaks them


@pytest.mark.parametrize(
    "values, message",
    [
        ({"size": 0}, "size is 0: expected a whole number of pixels"),
        ({"size": 22.4}, "size is 22.4: expected a whole number"),
        ({"size": 8, "std": (1, 0, 1)}, "std above 0"),
        ({"size": 8, "mean": (1, 2)}, "three finite values each"),
        ({"size": 8, "background": "no colour"}, "unknown color specifier: 'no colour'"),
    ],
)
def test_impossible_transforms(values, message):
    with pytest.raises(ValueError, match=message):
        preprocess(**values)


def test_from_dict_names_what_is_missing_and_unknown():
    values = preprocess(8).to_dict()
    del values["std"]
    with pytest.raises(ValueError, match=r"missing \['std'\], unknown \['crop'\]"):
        Preprocess.from_dict(values | {"crop": "centre"})


# ---- training


def test_training_squares_reach_every_position_evenly():
    size, width = 8, 12  # 5 positions
    image = Image.fromarray(np.tile(np.arange(width, dtype=np.uint8) * 20, (size, 1)))
    train = train_transform(size, mean=(0, 0, 0), std=(1, 1, 1), generator=torch.Generator().manual_seed(0))
    first_columns = [round(train(image)[0, 0, 0].item() * 255) // 20 for _ in range(2_000)]
    counts = np.bincount(first_columns, minlength=5)
    assert len(counts) == 5
    assert abs(counts - 400).max() < 4 * np.sqrt(2_000 * 0.2 * 0.8)  # four standard deviations


def test_training_repeats_with_its_generator_and_leaves_the_global_one():
    image, state = picture("RGB", 90, 60), torch.get_rng_state()
    first, second = (train_transform(32, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    squares = [first(image) for _ in range(4)]
    assert all(torch.equal(square, second(image)) for square in squares)
    assert any(not torch.equal(square, squares[0]) for square in squares[1:])
    assert torch.equal(torch.get_rng_state(), state)


def test_training_is_a_crop_of_the_resized_picture():
    train = train_transform(32, mean=(0, 0, 0), std=(1, 1, 1), generator=torch.Generator().manual_seed(3))
    image = picture("RGB", 60, 40)
    square = (train(image) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    whole = np.asarray(train.preprocess.resized(image))  # 32 x 48
    assert any(np.array_equal(square, whole[:, left : left + 32]) for left in range(17))
    assert torch.equal(train(image.crop((0, 0, 40, 40))), train.preprocess(image.crop((0, 0, 40, 40))))


def test_centre_crop_rounds_to_even():
    columns = Image.fromarray(np.arange(9, dtype=np.uint8)[None].repeat(9, 0))
    assert [centre_crop(columns, size).getpixel((0, 0)) for size in (9, 8, 7, 6, 5)] == [0, 0, 1, 2, 2]
