"""The HTML report: self-contained, well formed, and holding the numbers it was given."""

import re
from html.parser import HTMLParser

import pytest

from reality_stone import report
from reality_stone.compress import LayerReport, Report
from reality_stone.evaluate import Evaluation
from reality_stone.training import TrainingReport

VOID = {"meta", "br", "wbr", "hr", "img", "input", "link"}
LAYERS = [f"model.layers.{name}_proj" for name in ("0.mlp.up", "0.mlp.down", "1.mlp.up")]


class Page(HTMLParser):
    """Fails on a tag that closes what is not open; keeps attributes and visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        self.text += data


def compression(bits: float) -> Report:
    return Report(
        [
            LayerReport(name, (64, 48), "trellis", bits + 0.069, 0.07, 0.01234 * (i + 1), 0.5)
            for i, name in enumerate(LAYERS)
        ]
    )


def trial(name, bits, perplexity, kl=None, text="", **done) -> report.Trial:
    judged = Evaluation(perplexity, kl, 65_280, 256, 8.0)
    return report.Trial(name, bits, int(bits * 1e6), 5_432_100, judged, 123.4, text, **done)


@pytest.fixture
def page(tmp_path) -> str:
    training = TrainingReport([0.5, 0.25, 0.125], 999)
    trials = [
        trial("dense", 16, 42.157, text=" was <quiet> & still."),
        trial("3 bits", 3.069, 42.552, 0.00859, compression=compression(3)),
        trial("2 bits", 2.069, 43.931, 0.04664, " stood.", compression=compression(2)),
        trial("2 bits, trained", 2.07, 43.1, 0.031, training=training),
    ]
    details = {"Command": "demo --quick"}
    path = tmp_path / "new" / "page.html"
    report.model_report(path, "A <title>", trials, "The house", details)
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_has_one_heading_of_the_first_level(page):
    tags = [tag for tag, _ in Page(page).tags]
    assert tags.count("h1") == 1
    assert page.startswith("<!doctype html>")


def test_the_page_loads_nothing(page):
    for tag, attributes in Page(page).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & set(attributes)
    assert not re.search(r"url\(|@import|https?:", page)


def test_the_page_holds_the_numbers_it_was_given(page):
    text = Page(page).text
    for number in ("42.157", "42.552", "0.00859", "43.931", "2.069", "1.0421", "123", "65,280"):
        assert number in text, number
    assert "3 steps, 999 tokens" in text
    for percent in ("1.23 %", "2.47 %", "3.70 %"):
        assert percent in text
    for words in ("demo --quick", "The house", "mlp.down_proj", "5.4 MB"):
        assert words in text


def test_given_text_is_never_read_as_html(page):
    text = Page(page).text
    assert "A <title>" in text
    assert " was <quiet> & still." in text


def test_every_plot_says_its_numbers_in_words(page):
    plots = [a for tag, a in Page(page).tags if tag == "svg" and a.get("role") == "img"]
    assert len(plots) == 2
    rate, training = (a["aria-label"] for a in plots)
    assert "42.552 at 3.069" in rate
    assert "dense: 42.157" in rate
    assert "0.125 at 3" in training


def test_the_stages_of_a_recipe_are_drawn_and_tabled(tmp_path):
    rows = [
        {"name": "b.0", "before": 0.5, "after": 0.25, "accepted": True},
        {"name": "b.1", "before": 0.75, "after": 0.875, "accepted": False},
    ]
    stages = [
        report.Stage("one shot", Evaluation(43.9, 0.047, 65_280, 256, 8.0)),
        report.Stage(
            "codes", Evaluation(43.1, 0.03, 65_280, 256, 8.0),
            TrainingReport([0.5, 0.25], 99, seconds=7.0, blocks=rows),
        ),
        report.Stage("tables", Evaluation(42.9, None, 65_280, 256, 8.0), TrainingReport([0.125])),
    ]  # fmt: skip
    trials = [trial("dense", 16, 42.2), trial("2 bits", 2.07, 42.9, stages=stages)]
    report.model_report(tmp_path / "p.html", "Page", trials, "The house", {})
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    _, blocks, losses = labels
    # A block that was put back is as it was.
    assert "before: 0.5 at 1, 0.75 at 2; after: 0.25 at 1, 0.75 at 2" in blocks
    assert "codes: 0.5 at 1, 0.25 at 2" in losses
    assert "tables: 0.125 at 3" in losses
    for words in ("Stages: 2 bits", "43.900", "0.04700", "42.900", "after stage"):
        assert words in page.text


def test_the_heat_map_colours_by_the_error(page):
    heats = [float(h) for h in re.findall(r"--heat:([\d.]+)", page)]
    assert len(heats) == 2 * len(LAYERS)
    assert min(heats) == 0
    assert max(heats) == 1


@pytest.mark.parametrize(
    "points",
    [[], [(2.0, float("nan"))], [(2.0, 5.0)], [(1e-9, 1e9), (1e-9, 1e9)], [(0, 0), (1, 1e-12)]],
    ids=str,
)
def test_a_plot_of_few_odd_or_no_points_is_still_well_formed(points, tmp_path):
    section = report.line_plot("Plot", [report.Series("s", points, labels=True)], "x", "y")
    text = report.html_report(tmp_path / "p.html", "Page", section).read_text()
    Page(text)
    assert "nan" not in text.lower().replace("finite", "")


def test_a_map_of_no_layers_says_so():
    assert "No layer" in report.layer_map("Map", {"2 bits": Report()}).body


def test_a_layer_without_calibration_shows_its_weight_error():
    layer = LayerReport("fc", (64, 64), "uniform", 4.5, 0.0042, None, 0.1)
    assert "0.42 %" in report.layer_map("Map", {"4 bits": Report([layer])}).body
