"""Crop an image of any size and mode to a square of 8-bit RGB."""

import numpy as np
from PIL import Image

from unite_fast.data_pipeline.resample import resize_and_crop


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop of ADM (Dhariwal and Nichol, "Diffusion models beat GANs on image synthesis", NeurIPS 2021).

    Halve with a box filter while the shorter side is at least twice `size`, resize the shorter side to `size` with
    bicubic, cut out the centre. Deterministic. The EXIF orientation is ignored: the published models were trained so.

    Args:
        image: any mode. Transparency is dropped; the colours under it stay.
        size: side of the result in pixels.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ValueError: the image is so long and narrow that, resized, it exceeds Pillow's limit on pixels.
    """
    image = to_rgb(image)
    while min(image.size) >= 2 * size:
        width, height = (x // 2 for x in image.size)
        # Rows and columns in two calls; resize_and_crop says why.
        image = image.resize((width, image.height), Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)

    scale = size / min(image.size)
    width, height = (round(x * scale) for x in image.size)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too long and narrow: {width} x {height} pixels once its shorter side is {size}")
    top, left = (height - size) // 2, (width - size) // 2
    return resize_and_crop(image, width, height, left, top, size)


def crop_region(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """The region that `adm_center_crop` keeps, in pixels of the original image: top, left, bottom, right."""
    w, h = width, height
    while min(w, h) >= 2 * size:
        w, h = w // 2, h // 2
    scale = size / min(w, h)
    w, h = round(w * scale), round(h * scale)
    left, top = (w - size) // 2, (h - size) // 2
    scale_x, scale_y = width / w, height / h
    return top * scale_y, left * scale_x, (top + size) * scale_y, (left + size) * scale_x


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB. Like `convert("RGB")`, but 16-bit grey is scaled instead of clipped to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        # A direct conversion gives the same colours and a warning.
        image = image.convert("RGBA")
    # Pillow would copy an image that is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")
