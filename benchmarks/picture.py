"""``python benchmarks/picture.py``: the README's picture of CLIP, a screenshot of what ``explain --html`` writes.

CLIP's text encoder is pre-norm and folds wholly; its vision encoder starts from a norm's output and stays. Widths are
those of ViT-B/32, with three layers a tower, weights are random. Needs Chromium, and Pillow, which matplotlib brings.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import transformers
from PIL import Image
from recording import RESULTS
from typer.testing import CliRunner

from lncompile.cli.commands import app

SIZE = (1280, 1100)


def configuration(layers: int) -> transformers.CLIPConfig:
    """Return CLIP ViT-B/32's configuration with another number of layers."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": layers}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": layers}
    config = transformers.CLIPConfig(text_config=text, vision_config={**vision, "image_size": 224, "patch_size": 32})
    config.architectures = ["CLIPModel"]
    return config


def screenshot(page: Path, size: tuple[int, int]) -> Image.Image:
    """Return what headless Chromium shows of a page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"]
    file = page.with_suffix(".png")
    window = f"--window-size={size[0]},{size[1]}"
    subprocess.run([browser, *flags, window, f"--screenshot={file}", page.as_uri()], check=True, capture_output=True)
    return Image.open(io.BytesIO(file.read_bytes()))


def main() -> None:
    """Draw CLIP and write ``results/picture.png``."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        configuration(layers=3).save_pretrained("clip")
        done = CliRunner().invoke(app, ["explain", "clip/config.json", "--html", "out.html"])
        if done.exit_code:
            raise SystemExit(done.output)
        picture = screenshot(Path("out.html").resolve(), SIZE)
        os.chdir(RESULTS)
    # A palette is enough for a page of few colours; this method keeps those that stand in few places.
    palette = picture.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    palette.save("picture.png", optimize=True)
    print(f"{RESULTS / 'picture.png'}: {(RESULTS / 'picture.png').stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
