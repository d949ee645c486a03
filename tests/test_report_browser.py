"""The pages as a real browser draws them: at two widths, in light and in dark mode."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_report import compression, trial
from torch import nn

import reality_stone as rs
from reality_stone import report
from reality_stone.report import page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

HEIGHT = 5000
# A window is never narrower than 500 pixels, a frame in it can be. What its page knows of itself
# goes into the title of the whole, where --dump-dom shows it.
FRAME = """<!doctype html><meta charset=utf-8><style>:root {{ color-scheme: light dark }}
body {{ margin: 0 }} iframe {{ display: block; border: 0 }}</style>
<iframe width={width} height={height} srcdoc="{page}"></iframe>"""
PROBE = """<script>addEventListener("load", () => {
  const all = (what) => [...document.querySelectorAll(what)];
  const wide = all("body *").filter((e) => !e.closest(".scroll, svg")
    && e.getBoundingClientRect().right > innerWidth + 0.5);
  parent.document.title = JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth,
    wide: wide.map((e) => e.outerHTML.slice(0, 80)),
    cells: all("td.cell").filter((e) => e.offsetWidth >= 8 && e.offsetHeight >= 8).length,
    plots: all("svg.plot").filter((e) => e.getBoundingClientRect().height > 50).length,
    low: Math.max(...all("section").map((e) => e.getBoundingClientRect().bottom)),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
  });
})</script>"""


class Blocks(nn.Module):
    """As many blocks as make a map's cells small, and a layer outside them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}) for _ in range(40)
        )
        self.first = nn.Linear(64, 64)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, tuple[Path, int, int]]:
    """{name: (file, cells of its maps, plots)}."""
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    model, plain = Blocks(), folder / "dense"
    plain.mkdir()
    save_file(model.state_dict(), plain / "model.safetensors")
    (plain / "config.json").write_text("{}")
    rs.compress(model, codec="uniform(bits=3, group=16)", progress=False)
    rs.save(model, folder / "a-model-with-a-name-that-is-long-and-has-no-place-to-break-it")
    losses = [1 / (1 + i / 40) for i in range(300)]
    log = folder / "log.json"
    log.write_text(json.dumps({"losses": losses, "tokens": 9600, "seconds": 12.5}))
    request = report.Request(next(folder.glob("a-model*")), plain, training=[log])
    report.report_directory(request, folder / "directory.html", progress=False)
    trials = [
        trial("dense", 16, 42.157, text=" was quiet and still."),
        trial("3 bits", 3.069, 42.552, 0.00859, compression=compression(3)),
        trial("2 bits", 2.069, 43.931, 0.04664, " stood.", compression=compression(2)),
    ]
    report.model_report(folder / "trials.html", "A model in few bits", trials, "The house", {})
    return {
        "directory": (folder / "directory.html", 2 * 81, 2),
        "trials": (folder / "trials.html", 2 * 3, 1),
    }


def browse(source: Path, width: int, dark: bool, folder: Path) -> tuple[dict, str, Path]:
    """(what the page says of itself, what the browser logged, screenshot)."""
    copy, picture = folder / "probe.html", folder / "picture.png"
    text = source.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>")
    frame = FRAME.format(width=width, height=HEIGHT, page=escape(text))
    copy.write_text(frame, encoding="utf-8")
    options = (
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr", "--force-device-scale-factor=1",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={max(width, 500)},{HEIGHT}", f"--screenshot={picture}", "--dump-dom",
    )  # fmt: skip
    done = subprocess.run(
        [BROWSER, *options, copy.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    found = re.search(r"<title>(\{.*?)</title>", done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(unescape(found.group(1))), done.stderr, picture


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("directory", 390, True), ("directory", 1280, False), ("trials", 390, False)],
)
def test_a_browser_draws_the_page_without_errors_and_without_scrolling_sideways(
    pages, name, width, dark, tmp_path
):
    image = pytest.importorskip("matplotlib.image")
    source, cells, plots = pages[name]
    found, log, picture = browse(source, width, dark, tmp_path)
    assert found["inner"] == width
    assert found["dark"] == dark
    assert found["scroll"] <= width
    assert found["wide"] == []
    assert found["cells"] == cells
    assert found["plots"] == plots
    assert "CONSOLE" not in log
    assert found["low"] < HEIGHT  # all of it is in the picture
    pixels = image.imread(picture)[:, :width, :3]
    assert pixels.shape == (HEIGHT, width, 3)
    assert pixels[:4, :4].mean() < 0.15 if dark else pixels[:4, :4].mean() > 0.95
    drawn = pixels[: int(found["low"])]
    rows = drawn.std(axis=(1, 2)) > 0.002
    assert rows.mean() > 0.4  # text, tables and drawings from top to bottom
    # The ends of the colour scale: cells and legend are there.
    for end in ((68, 1, 84), (253, 231, 37)):
        near = abs(drawn * 255 - torch.tensor(end).numpy()).max(axis=2) < 2
        assert near.sum() > 100, end


def test_a_console_error_and_a_wide_element_would_be_seen(tmp_path):
    wide = '<p style="width:900px">wide</p><script>console.error("wrong")</script>'
    source = report.html_report(tmp_path / "p.html", "Page", page.Section("Wide", wide))
    found, log, _ = browse(source, 390, False, tmp_path)
    assert found["scroll"] > 390
    assert "width:900px" in found["wide"][0]
    assert "CONSOLE" in log
