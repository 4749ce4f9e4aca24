"""One picture: how any file becomes 8-bit sRGB, and the rules that set a picture aside.

The thresholds were chosen by looking at the pictures on both sides of them, in 26,625 faces of two origins.
"""

import hashlib
import io
import os
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

MAX_PIXELS = 4096 * 4096  # also bounds the memory of a worker
MAX_ASPECT = 2.0  # beyond it the centred crop would lose more than half of the picture
MIN_CONTRAST = 10.0  # below: 2 pencil drawings that can hardly be seen; next above: 10.7, faint but clear
MIN_COLOUR_SPREAD = 0.8  # below: 25 pictures, all grey or of one tint; from 0.85 on coloured ones are among them
NEAR_DUPLICATE_BITS = 48  # of 50 pairs up to it none was of two drawings, of 50 at it one, of 50 at 56 to 60 nine
RELATED_BITS = 64  # alike, often another crop or expression: both are kept, on the same side of the split

# Raster formats that Pillow recognises by their first bytes; no PostScript, which it would hand to another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")

RULES = {
    "unreadable": "cannot be opened: no permission, a link that leads nowhere or in a circle, or no regular file",
    "not-an-image": f"none of the formats {', '.join(FORMATS)}",
    "corrupt": "a picture, but its data are cut off or damaged",
    "too-many-pixels": f"more than {MAX_PIXELS:,} pixels: a decompression bomb or a scan, not decoded at all",
    "animated": "more than one frame or page",
    "too-small": "the short side has fewer than min_size pixels",
    "extreme-aspect": f"the long side is more than {MAX_ASPECT:g} times the short side",
    "near-blank": f"in no colour channel does the standard deviation reach {MIN_CONTRAST:g} of 255",
    "near-monochrome": f"greys or shades of one hue: the colours stray by less than {MIN_COLOUR_SPREAD:g} of 255"
    " (root mean square) from one line through grey",
    "exact-duplicate": "has exactly the decoded pixels of the copy that is kept",
    "near-duplicate": f"at most {NEAR_DUPLICATE_BITS} of the 256 bits of its perceptual hash, which sees shapes and no"
    " colours, differ from the copy that is kept, as it is or mirrored",
}
OPTIONAL_RULES = ("extreme-aspect", "near-blank", "near-monochrome", "near-duplicate")  # --keep switches them off

THUMBNAIL_SIZE = 64  # the content rules and the perceptual hash look at the centred square at this size
HASH_SIZE = 16


class SetAside(Exception):
    """Why a file is not used: the name of a rule, and what was found."""

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(rule, detail)
        self.rule, self.detail = rule, detail


def read_picture(path: Path, first_frame: bool = False) -> Image.Image:
    """
    Decode the whole file: upright, on white, 8-bit sRGB, without metadata.

    Args:
        path (`Path`): The file.
        first_frame (`bool`, *optional*, defaults to `False`): Whether to return the first frame of an animated one.

    Returns:
        `PIL.Image.Image`: the picture, of mode RGB and the size of the file's.

    Raises:
        [`SetAside`]: there is no whole, single picture in the file; nothing else is raised, whatever the file holds.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a named pipe would wait for ever
            raise SetAside("unreadable", "a folder that cannot be listed" if stat.S_ISDIR(mode) else "no regular file")
        file = open(path, "rb")  # noqa: SIM115  (it is closed below; this line alone may find it unreadable)
    except OSError as error:
        raise SetAside("unreadable", error.strerror or str(error)) from None
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF data, odd palettes and large pictures
        try:
            return to_rgb(_decode(file, first_frame))
        except SetAside:
            raise
        except Exception as error:  # the decoders raise almost anything when they meet damaged data
            raise SetAside("corrupt", str(error) or type(error).__name__) from None


def _decode(file: BinaryIO, first_frame: bool) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise SetAside("too-many-pixels") from None
    except UnidentifiedImageError:
        raise _unidentified(file) from None
    if image.width * image.height > MAX_PIXELS:
        raise SetAside("too-many-pixels", f"{image.width}×{image.height}")
    several = getattr(image, "is_animated", False) and image.format != "MPO"  # a phone's MPO: a picture, its preview
    if several and not first_frame:
        raise SetAside("animated")
    if image.format in ("JPEG", "MPO"):
        _check_end_of_scan(file)
    elif image.format == "PNG":
        image.verify()  # the checksums, which decoding alone does not look at
        image = Image.open(file, formats=FORMATS)
    image.load()
    return image


def _unidentified(file: BinaryIO) -> SetAside:
    """Tell a damaged header of a known format from a file that is no picture."""
    file.seek(0)
    prefix = file.read(16)
    if any(accept and accept(prefix) for name, (_, accept) in Image.OPEN.items() if name in FORMATS):
        return SetAside("corrupt", "damaged header")
    return SetAside("not-an-image", f"begins with {prefix[:8]!r}" if prefix else "empty file")


def _check_end_of_scan(file: BinaryIO) -> None:
    """Raise if the last scan of a JPEG never ends: the decoder would fill what is missing with grey."""
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):  # end of image, start of scan
        raise SetAside("corrupt", "the JPEG's last scan has no end")


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture of any mode → 8-bit sRGB: EXIF orientation and ICC profile applied, transparency on white."""
    image = _upright(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    rgb = _to_srgb(_eight_bits(image), image.info.get("icc_profile"))
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    rgb.info = {}  # what was applied must not be written again
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF block is damaged, not the picture
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Wider than 8 bits (I, I;16, F) → L; every other mode as it is, but without its alpha."""
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise SetAside("corrupt", "pixels that are no finite numbers")
        return Image.fromarray(np.round(values.clip(0) * (255 / _full_scale(image.mode, values))).astype(np.uint8))
    if image.mode in ("LA", "La", "1"):
        return image.convert("L")
    if image.mode in ("P", "PA", "RGBA", "RGBa", "RGBX"):
        return image.convert("RGBA").convert("RGB")
    return image


def _full_scale(mode: str, values: np.ndarray) -> float:
    """The value of white: 65535 in 16-bit files; in wider ones the smallest usual one that holds all pixels."""
    if mode.startswith("I;16"):
        return 65535.0
    usual = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    return next((scale for scale in usual if values.max() <= scale), float(values.max()))


def _to_srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    """Apply the picture's own ICC profile; a damaged one, or one of another colour space, is passed over."""
    if icc_profile:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
            if profile.profile.xcolor_space.strip() == "RGB":
                image = image.convert("RGB")  # a grey picture may carry the profile of the colour one it was made from
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
            assert converted is not None  # None would mean `inPlace=True`
            return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image.convert("RGB")


def pixel_hash(picture: Image.Image) -> str:
    """128 bits of the SHA-256 of the size and the decoded pixels, in hexadecimal: the picture's name."""
    return hashlib.sha256(f"{picture.width}×{picture.height}:".encode() + picture.tobytes()).hexdigest()[:32]


def perceptual_hash(thumbnail: Image.Image) -> np.ndarray:
    """
    The signs of the 16×16 lowest frequencies of the grey thumbnail, packed into (32,) uint8.

    The usual 8×8 is too coarse for faces, which all have one layout: of 50 pairs with 6 of its 64 bits different 26
    were of two drawings, while the 256 bits leave a gap between copies and strangers.
    """
    import imagehash  # the extra [data]

    return np.packbits(imagehash.phash(thumbnail, hash_size=HASH_SIZE).hash)


def square(picture: Image.Image, size: int) -> Image.Image:
    """The centred square of a picture, antialiased to size × size."""
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def check_picture(picture: Image.Image, thumbnail: Image.Image, min_size: int, keep: frozenset[str]) -> None:
    """Raise `SetAside` for the first rule on shape or content that the picture breaks, `keep` aside."""
    short, long = sorted(picture.size)
    contrast = max(float(np.asarray(channel).std()) for channel in thumbnail.split())
    spread = colour_spread(thumbnail)
    broken = {
        "too-small": (short < min_size, f"{picture.width}×{picture.height}"),
        "extreme-aspect": (long > MAX_ASPECT * short, f"{picture.width}×{picture.height}"),
        "near-blank": (contrast < MIN_CONTRAST, f"standard deviation {contrast:.1f}"),
        "near-monochrome": (spread < MIN_COLOUR_SPREAD, f"colours stray by {spread:.2f}"),
    }
    for rule, (is_broken, detail) in broken.items():
        if is_broken and rule not in keep:
            raise SetAside(rule, detail)


def colour_spread(thumbnail: Image.Image) -> float:
    """How far the colours stray from one line through grey in the CbCr plane: root mean square, of 255.

    It is 0 for greys and for the shades of one hue (sepia, a blue pencil), and small where a JPEG blurs its colours.
    """
    chroma = np.asarray(thumbnail.convert("YCbCr"), dtype=np.float64)[..., 1:].reshape(-1, 2) - 128
    smallest_moment = np.linalg.eigvalsh(chroma.T @ chroma / len(chroma))[0]
    return float(np.sqrt(max(smallest_moment, 0.0)))
