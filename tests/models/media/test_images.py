"""Pictures to tiles and tokens: Hugging Face's own numbers, the formulas, and broken files."""

import io
import math
import pathlib
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from puna.configs.architecture import VisionConfig
from puna.configs.errors import UserError
from puna.models.media import images

pytest.importorskip("PIL")
from PIL import Image, ImageOps  # noqa: E402

STORED = pathlib.Path(__file__).parents[2] / "reference" / "media" / "pictures.npz"
CONFIG = VisionConfig(num_layers=1, image_size=16, patch_size=4, max_tiles=5, token_id=9)
IDS = images.ImageIds(image_start=1, image_end=2, tile_x_separator=3, tile_y_separator=4, image=5)


@pytest.fixture(scope="module")
def stored():
    with np.load(STORED, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def levels(tiles):
    """Pixel values from 0 to 255."""
    return (tiles.astype(np.float64) + 1) * 127.5


def picture(height, width):
    """The picture of `reference/make_vision_fixture.py`."""
    y, x = np.mgrid[:height, :width]
    waves = [127.5 + 100 * np.sin(x / (5 + 3 * c) + y / (9 - 2 * c)) for c in range(3)]
    edges = 27.0 * (((x // 11) + (y // 7)) % 2)[..., None]
    return Image.fromarray(np.clip(np.stack(waves, axis=-1) + edges, 0, 255).astype(np.uint8))


def saved(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# --- tiling -------------------------------------------------------------------------------------


def test_grids_and_sizes_are_those_of_hugging_face(stored):
    for height, width, rows, columns, fitted_height, fitted_width in stored["fits"].tolist():
        grid = images.best_grid((height, width), 336, 16)
        assert grid == (rows, columns), (height, width)
        assert images.fitted_size((height, width), grid, 336) == (fitted_height, fitted_width)


def test_tiles_read_together_are_those_of_hugging_face():
    with np.load(STORED.with_name("pictures_together.npz"), allow_pickle=False) as arrays:
        stored = {key: arrays[key] for key in arrays.files}
    for height, width, *wanted in stored["fits"].tolist():
        grid = images.best_grid((height, width), 560, 4)
        assert [*grid, *images.fitted_size((height, width), grid, 560)] == wanted, (height, width)
    config = VisionConfig(num_layers=1, image_size=16, patch_size=4, max_tiles=4)
    names = [key.removeprefix("tiles/") for key in stored if key.startswith("tiles/")]
    assert len(names) == 7
    for name in names:
        tiles, number = images.tile_together(config, picture(*map(int, name.split("x"))))
        assert number == stored[f"number/{name}"]
        # Stored in float16, after rescaling by another product.
        np.testing.assert_allclose(tiles, stored[f"tiles/{name}"], rtol=2e-3, atol=2e-3)
        rows, columns = images.grids(4)[number - 1]
        assert not tiles[rows * columns :].any() and tiles[: rows * columns].any((1, 2, 3)).all()


def test_tiles_are_those_of_hugging_face(stored):
    names = [key.removeprefix("grid/") for key in stored if key.startswith("grid/")]
    assert len(names) == 7
    for name in names:
        tiles, grid = images.tile_image(CONFIG, picture(*map(int, name.split("x"))))
        assert grid == tuple(stored[f"grid/{name}"])
        wanted = stored[f"tiles/{name}"].astype(np.float64)
        assert tiles.shape == wanted.shape and tiles.dtype == np.float32
        # Stored after rounding to bfloat16, and resized by another program.
        assert np.abs(levels(tiles) - wanted).max() < 2.5, name
        assert np.abs(levels(tiles) - wanted).mean() < 0.5, name


def slow_grid(height, width, side, max_tiles):
    """The rule in its own words."""
    scales = {
        (r, c): min(Fraction(r * side, height), Fraction(c * side, width))
        for r in range(1, max_tiles + 1)
        for c in range(1, max_tiles + 1)
        if r * c <= max_tiles
    }
    larger = [scale for scale in scales.values() if scale >= 1]
    chosen = min(larger) if larger else max(scales.values())
    areas = {grid: grid[0] * grid[1] for grid, scale in scales.items() if scale == chosen}
    fewest = [grid for grid, area in areas.items() if area == min(areas.values())]
    assert len(fewest) == 1
    return fewest[0]


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 20))
@example(1, 100_000, 16)
@example(100_000, 1, 16)
@example(672, 672, 4)
def test_best_grid_follows_the_rule(height, width, max_tiles):
    grid = images.best_grid((height, width), 336, max_tiles)
    assert grid == slow_grid(height, width, 336, max_tiles)
    high, wide = images.fitted_size((height, width), grid, 336)
    # As large as the room it may take, with its own shape but for rounding down.
    room = min(max(height, 336), grid[0] * 336), min(max(width, 336), grid[1] * 336)
    assert high == room[0] or wide == room[1]
    scale = min(Fraction(room[0], height), Fraction(room[1], width))
    for found, side in ((high, height), (wide, width)):
        assert max(1, math.floor(side * scale) - 1) <= found <= max(1, math.floor(side * scale))


@given(st.integers(1, 60), st.integers(1, 60))
def test_tiles_put_together_are_the_picture_on_black(height, width):
    source = picture(height, width)
    tiles, (rows, columns) = images.tile_image(CONFIG, source)
    several = rows * columns > 1
    assert tiles.shape == (rows * columns + several, 16, 16, 3)
    canvas = np.zeros((rows * 16, columns * 16, 3))
    for i, tile in enumerate(levels(tiles)[: rows * columns]):
        r, c = divmod(i, columns)
        canvas[r * 16 : (r + 1) * 16, c * 16 : (c + 1) * 16] = tile
    high, wide = images.fitted_size((height, width), (rows, columns), 16)
    resized = np.asarray(source.resize((wide, high), Image.Resampling.BILINEAR))
    assert np.allclose(canvas[:high, :wide], resized, atol=1e-4)
    assert not canvas[high:].any() and not canvas[:, wide:].any()
    if several:
        whole = np.asarray(source.resize((16, 16), Image.Resampling.BILINEAR))
        assert np.allclose(levels(tiles[-1]), whole, atol=1e-4)
    assert tiles.min() >= -1 and tiles.max() <= 1


# --- tokens -------------------------------------------------------------------------------------


def test_tokens_of_one_and_of_several_tiles():
    p = [9] * 4
    assert images.image_tokens(CONFIG, (1, 1), IDS) == [1, 5, *p, 2]
    assert images.image_tokens(CONFIG, (2, 2), IDS) == [
        1, *p, 3, *p, 4, *p, 3, *p, 4, 5, *p, 2,
    ]  # fmt: skip
    llama4 = VisionConfig(num_layers=34)
    assert len(images.image_tokens(llama4, (1, 1), images.ImageIds())) == 147
    assert len(images.image_tokens(llama4, (1, 2), images.ImageIds())) == 437


@given(st.integers(1, 50), st.integers(1, 50))
def test_tokens_have_a_patch_for_every_feature(height, width):
    tiles, grid = images.tile_image(CONFIG, Image.new("RGB", (width, height)))
    assert images.image_tokens(CONFIG, grid, IDS).count(CONFIG.token_id) == 4 * len(tiles)


def test_ids_come_from_the_tokenizer():
    class Tokenizer:
        special = {f"<|{name}|>": i for i, name in enumerate(images.ImageIds._fields)}

    assert images.image_ids(Tokenizer) == (0, 1, 2, 3, 4)
    del Tokenizer.special["<|tile_x_separator|>"]
    with pytest.raises(UserError, match=r"the tokenizer has no <\|tile_x_separator\|>"):
        images.image_ids(Tokenizer)


# --- files --------------------------------------------------------------------------------------

GREY = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)


def as_levels(image):
    tiles, grid = images.tile_image(CONFIG, image)
    assert grid == (1, 1)
    return np.round(levels(tiles[0])).astype(int)


def test_path_bytes_and_image_give_the_same(tmp_path):
    data = saved(picture(40, 33))
    (tmp_path / "a.png").write_bytes(data)
    wanted, _ = images.tile_image(CONFIG, picture(40, 33))
    for image in (data, tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(images.tile_image(CONFIG, image)[0], wanted)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "YCbCr", "HSV", "LA", "RGBA", "RGBX"])
def test_modes_keep_their_colours(mode):
    source = picture(16, 16)
    source = source.quantize(256) if mode == "P" else source.convert(mode)
    wanted = np.asarray(source.convert("RGB")).astype(int)
    np.testing.assert_array_equal(as_levels(source), wanted)


def test_black_and_white():
    bits = GREY > 100
    np.testing.assert_array_equal(as_levels(Image.fromarray(bits))[..., 0], 255 * bits)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette", "colour key"])
def test_transparency_lies_on_white(mode):
    alpha = np.zeros((16, 16), np.uint8)
    alpha[8:] = 255
    if mode == "palette":
        image = Image.fromarray(alpha // 255).convert("P")
        image.putpalette([200, 0, 0, 10, 20, 30])
        image = Image.open(io.BytesIO(saved(image, transparency=0)))
        wanted = [10, 20, 30]
    elif mode == "colour key":
        rgb = np.where(alpha[..., None] > 0, np.uint8([10, 20, 30]), np.uint8([200, 0, 0]))
        image = Image.open(io.BytesIO(saved(Image.fromarray(rgb), transparency=(200, 0, 0))))
        wanted = [10, 20, 30]
    else:
        image = Image.new(mode, (16, 16), (10, 20, 30, 0) if mode == "RGBA" else (10, 0))
        image.putalpha(Image.fromarray(alpha))
        wanted = [10, 20, 30] if mode == "RGBA" else [10, 10, 10]
    found = as_levels(image)
    assert (found[:8] == 255).all() and (found[8:] == wanted).all()


def test_half_transparent():
    found = as_levels(Image.new("RGBA", (16, 16), (0, 0, 100, 128)))
    assert np.abs(found - [127, 127, 177]).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled(format):
    deep = (GREY.astype(np.uint16) * 257) + np.clip(GREY, 3, 250).astype(np.uint16) % 3 - 1
    deep = np.clip(deep, 0, 65535).astype(np.uint16)
    wanted = np.round(deep / 257).astype(int)
    found = as_levels(saved(Image.fromarray(deep), format))
    np.testing.assert_array_equal(found, np.repeat(wanted[..., None], 3, axis=-1))
    found = as_levels(Image.fromarray(deep.astype(np.int32)))
    np.testing.assert_array_equal(found[..., 1], wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(orientation):
    source = picture(16, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(source, "PNG", exif=exif)
    found, grid = images.tile_image(CONFIG, data)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    wanted, wanted_grid = images.tile_image(CONFIG, Image.fromarray(np.asarray(turned)))
    assert grid == wanted_grid == ((1, 2) if orientation < 5 else (2, 1))
    np.testing.assert_array_equal(found, wanted)


def test_broken_exif_does_not_matter():
    data = saved(picture(16, 16), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    assert as_levels(data).shape == (16, 16, 3)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (as_levels(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 900)])
def test_extreme_shapes(size):
    tiles, grid = images.tile_image(CONFIG, Image.new("RGB", size, "white"))
    assert grid[0] * grid[1] <= CONFIG.max_tiles
    assert np.isfinite(tiles).all() and tiles.max() == 1


def chunk(kind, data):
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def test_bombs_are_refused(tmp_path):
    for width, height in ((10_000, 10_000), (60_000, 60_000)):  # over the limit, and twice over
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        path = tmp_path / "bomb.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        with pytest.raises(UserError, match=r"bomb.png has more than \d+ pixels") as caught:
            images.tile_image(CONFIG, path)
        assert "\n" not in str(caught.value)


def test_a_large_image_object_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="the image has more than 100 pixels"):
        images.tile_image(CONFIG, Image.new("L", (11, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    images.tile_image(CONFIG, Image.new("L", (11, 10)))


def test_every_broken_file_is_named_in_one_line(tmp_path):
    rng = np.random.default_rng(0)
    refused = 0
    for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"):
        data = saved(picture(40, 40), format)
        variants = [data[: len(data) * k // 5] for k in range(5)]
        for _ in range(12):
            changed = bytearray(data)
            for at in rng.integers(len(data), size=8):
                changed[at] = rng.integers(256)
            variants.append(bytes(changed))
        for i, variant in enumerate(variants):
            path = tmp_path / f"{i}.{format.lower()}"
            path.write_bytes(variant)
            try:
                images.tile_image(CONFIG, path)
            except UserError as error:
                refused += 1
                assert path.name in str(error) and "\n" not in str(error)
    assert refused > 8 * 4


def test_what_is_no_picture(tmp_path):
    (tmp_path / "a.txt").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    cases = {
        tmp_path / "missing.png": "missing.png: there is no such file",
        tmp_path / "a.txt": "a.txt is not an image",
        tmp_path / "empty.png": "empty.png is not an image",
        tmp_path: "cannot be read as an image: .*[Dd]irectory",
        b"": "the image given as bytes is not an image",
        7: "must be a path, bytes or a PIL image, not int",
    }
    for image, message in cases.items():
        with pytest.raises(UserError, match=message):
            images.tile_image(CONFIG, image)
    with pytest.raises(UserError, match="the image has no pixels: it is 0 x 5"):
        images.tile_image(CONFIG, Image.new("RGB", (0, 5)))
    with pytest.raises(UserError, match="floating-point pixels"):
        images.tile_image(CONFIG, Image.new("F", (3, 3)))


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UserError, match="pip install 'puna"):
        images.tile_image(CONFIG, "a.png")
