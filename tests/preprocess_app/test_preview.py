"""The page and the contact sheet of a preview."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import yaml
from distill_preprocess.cli import main
from distill_preprocess.sheet import write_sheet
from distill_preprocess.shown import Shown
from distill_runfile.cli import EXIT_FAILED, EXIT_OK
from media_files import moving_frames, write_video
from PIL import Image
from preprocess_requests import write_request

CAPTION = "<b>the digit</b> one moving up and on and on"


@pytest.fixture
def clips(tmp_path):
    black = np.zeros((12, 48, 48, 3), np.uint8)
    for name, frames in (("a.mp4", moving_frames(12, 48, 48)), ("black.mp4", black)):
        write_video(tmp_path / "clips" / name, frames)
        (tmp_path / "clips" / name).with_suffix(".txt").write_text(CAPTION)
    (tmp_path / "clips/bad <i>.mp4").write_bytes(b"")
    (tmp_path / "clips/bad <i>.txt").write_text("x")
    return tmp_path


def test_a_preview_shows_clips_what_the_vae_makes_of_them_and_what_is_odd(clips):
    windows = {"fps": 8, "take": "windows", "stride": 3}  # of two clips each the first is shown
    file = write_request(clips, clips=windows)
    assert main(["--config", str(file), "--preview", "9"]) == EXIT_OK
    assert sorted(path.name for path in (clips / "data").iterdir()) == [
        "preview.html", "preview.png",
    ]  # fmt: skip
    page = (clips / "data/preview.html").read_text()
    assert "2 of 3 items" in page
    assert "&lt;b&gt;the digit&lt;/b&gt; one" in page
    assert "<b>" not in page
    assert "bad &lt;i&gt;.mp4: it is empty" in page
    assert "<li class='note'>is black</li>" in page
    assert "the encoder reads 8" in page
    assert page.count("comes back from the VAE with") == 1  # not of the black one
    assert not re.search(r"src=['\"](?!data:)|https?://", page)  # one file, and no other
    pictures = re.findall(r"src='data:image/webp;base64,([^']+)'", page)
    assert len(pictures) == 4
    source = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    assert (source.n_frames, source.size) == (9, (256, 256))
    sheet = np.asarray(Image.open(clips / "data/preview.png"))
    assert sheet.shape[0] >= 2 * 240
    # What was looked at is no data set, and making one goes on in the same folder.
    assert main(["--config", str(file)]) == EXIT_OK
    assert (clips / "data/index.json").exists()


def test_what_cannot_be_shown_is_named(clips, capsys):
    (clips / "clips/a.mp4").write_bytes(b"")
    file = write_request(clips)
    assert main(["--config", str(file), "--preview", "1", "--limit", "1"]) == EXIT_FAILED
    assert "none of 1 items could be shown; the first: a.mp4: it is empty" in (
        capsys.readouterr().err
    )
    (clips / "p.txt").write_text("a prompt")
    values = yaml.safe_load(file.read_text())
    values["preprocess"]["sources"] = [{"prompts": "./p.txt"}]
    file.write_text(yaml.safe_dump(values))
    assert main(["--config", str(file), "--preview"]) == EXIT_FAILED
    assert "prompts alone" in capsys.readouterr().err


def test_a_sheet_shows_the_first_the_middle_and_the_last_frame(tmp_path):
    levels = np.arange(9, dtype=np.uint8) * 20
    frames = np.broadcast_to(levels[:, None, None, None], (9, 60, 60, 3))
    sample = Shown(
        id="a", caption="a", shape="9 x 60 x 60", source=frames, decoded=255 - frames, psnr=1.0,
        notes=(),
    )  # fmt: skip
    write_sheet(tmp_path / "sheet.png", [sample])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    strip = sheet[70, 10 : 10 + 3 * 120, 0]  # of frames that are made 120 high
    assert strip[60::120].tolist() == [0, 80, 160]
    assert sheet[195, 10 : 10 + 3 * 120, 0][60::120].tolist() == [255, 175, 95]
