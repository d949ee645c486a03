"""The parts of a page and the demo's: self-contained, well formed, with the numbers they got."""

import itertools
import re
from html.parser import HTMLParser

import pytest

from reality_stone import report
from reality_stone.compress import LayerReport, Report
from reality_stone.evaluate import Evaluation
from reality_stone.report import bars, colour, curves, maps, structure
from reality_stone.training import TrainingReport

VOID = {"meta", "br", "wbr", "hr", "img", "input", "link"}
LAYERS = [f"model.layers.{name}_proj" for name in ("0.mlp.up", "0.mlp.down", "1.mlp.up")]


class Page(HTMLParser):
    """Fails on a tag that closes what is not open; keeps attributes and visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.said = [], [], "", []
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
        if self.open and self.open[-1] == "desc":
            self.said.append(data)

    def every(self, tag: str, kind: str) -> list[dict]:
        """Attributes of the tags of a class."""
        return [a for t, a in self.tags if t == tag and kind in (a.get("class") or "").split()]


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
    found = Page(page)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for drawing in [a for tag, a in found.tags if tag == "svg" and a.get("role") == "img"]:
        assert set(drawing["aria-labelledby"].split()) <= set(ids)
    rate, training, scale = found.said
    assert "logarithmic from 1.23 % to 3.70 %" in scale
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
    _, blocks, losses = page.said
    # A block that was put back is as it was.
    assert "before: 0.5 at 1, 0.75 at 2; after: 0.25 at 1, 0.75 at 2" in blocks
    assert "codes: 0.5 at 1, 0.25 at 2" in losses
    assert "tables: 0.125 at 3" in losses
    for words in ("Stages: 2 bits", "43.900", "0.04700", "42.900", "after stage"):
        assert words in page.text


def test_the_heat_map_colours_by_the_error(page):
    cells = Page(page).every("td", "cell")
    colours = [re.match(r"background:(#\w+);", a["style"]).group(1) for a in cells]
    assert len(colours) == 2 * len(LAYERS)
    assert colours[0] == "#440154"  # viridis from end to end
    assert colours[-1] == "#fde725"
    assert colours[::2] == colours[1::2]  # both columns have the same errors


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


def lab(rgb):
    """CIELAB of sRGB under D65."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
              for v in (c / 255 for c in rgb)]  # fmt: skip
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [sum(m * v for m, v in zip(row, linear, strict=True)) for row in rows]
    x, y, z = (
        v ** (1 / 3) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116
        for v in (value / white for value, white in zip(xyz, (0.9505, 1, 1.089), strict=True))
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_the_steps_of_the_colour_scale_look_equal_and_get_lighter_all_the_way():
    points = [lab(colour.colour(i / 20)) for i in range(21)]
    lightness = [point[0] for point in points]
    steps = [b - a for a, b in itertools.pairwise(lightness)]
    # Viridis is uniform in CAM02-UCS; in the lightness of CIELAB, 3.8 a step, that leaves a third.
    assert min(steps) > 2.5
    assert max(steps) < 5
    assert lightness[0] < 20
    assert lightness[-1] > 88


def test_the_colours_are_those_of_matplotlibs_viridis():
    matplotlib = pytest.importorskip("matplotlib")
    for i in range(101):
        wanted = [round(255 * c) for c in matplotlib.colormaps["viridis"](i / 100)[:3]]
        # Straight lines between eleven points, and matplotlib's own 256 steps.
        assert max(abs(a - b) for a, b in zip(colour.colour(i / 100), wanted, strict=True)) <= 8


def test_numbers_on_colours_can_be_read():
    for i in range(101):
        back = colour.colour(i / 100)
        light = 1.0 if colour.ink(back) == "#fff" else 0.0
        one, other = sorted((colour.luminance(back), light))
        assert (other + 0.05) / (one + 0.05) >= 4.5  # WCAG 2.2, level AA


@pytest.mark.parametrize("log", [False, True])
def test_a_scale_goes_from_end_to_end_and_back(log):
    scale = colour.Scale.of([3.0, 0.5, float("inf"), float("nan"), 0.02], log)
    assert (scale.low, scale.high) == (0.02, 3.0)
    assert [scale.share(v) for v in (0.0, 0.02, 3.0, 9.0)] == [0, 0, 1, 1]
    for share in (0, 0.25, 0.5, 1):
        assert scale.share(scale.value(share)) == pytest.approx(share)
    assert colour.Scale.of([float("nan")]) is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("transformer.h.3.attn.c_attn.weight", "attention"),
        ("encoder.layer.1.attention.output.dense.weight", "attention"),
        ("encoder.layer.1.output.dense.weight", "MLP"),
        ("transformer.h.3.mlp.c_fc.weight", "MLP"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", "experts"),
        ("model.layers.0.post_attention_layernorm.weight", "norms"),
        ("transformer.h.0.ln_1.bias", "norms"),
        ("transformer.wte.weight", "embeddings"),
        ("embeddings.word_embeddings.weight", "embeddings"),
        ("lm_head.weight", "output head"),
        ("conv1.weight", "other"),
    ],
)
def test_tensors_are_put_into_the_part_of_the_model_that_their_name_tells(name, part):
    assert structure.group(name) == part


def test_layers_are_laid_out_by_kind_and_block():
    names = [f"model.layers.{i}.{k}" for i in (0, 1, 10) for k in ("attn.q", "mlp.up")]
    found = structure.grid([*names, "model.layers.1.moe.0.up", "model.layers.1.moe.1.up", "head"])
    assert found.columns == ["0", "1", "10", "outside"]
    assert list(found.rows) == ["attn.q", "mlp.up", "moe.*.up", "head"]
    assert found.shared == "model.layers.*"
    assert found.rows["attn.q"] == [[n] for n in names[::2]] + [[]]
    assert found.rows["moe.*.up"][1] == ["model.layers.1.moe.0.up", "model.layers.1.moe.1.up"]
    assert found.rows["head"] == [[], [], [], ["head"]]


@pytest.mark.parametrize("names", [["fc1", "fc2"], ["net.0"], ["a.0.up", "b.1.up"], [""]])
def test_layers_without_blocks_stand_in_one_row(names):
    found = structure.grid(names)
    assert not found.blocks
    assert list(found.rows.values()) == [[[n] for n in names]]
    assert len(found.columns) == len(names)


def test_a_map_of_blocks_has_a_cell_a_layer_and_a_gap_where_there_is_none(tmp_path):
    values = {"h.0.up": 0.01, "h.1.up": 0.02, "h.1.down": float("inf"), "h.0.<b>.0": 0.0}
    key = maps.Key("error", lambda v: f"{v:.3f}", log=True)
    path = report.html_report(tmp_path / "p.html", "Page", maps.block_map("Map", values, key))
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.every("td", "cell")) == len(values)
    assert len(page.every("td", "none")) == 2 + 1  # two gaps, and infinity has no colour
    assert "<b>.*" in page.text
    titles = [a["title"] for a in page.every("td", "cell")]
    assert titles[:2] == ["h.0.up: 0.010", "h.1.up: 0.020"]


def test_a_cell_of_several_layers_is_their_mean():
    values = {f"h.{i}.experts.{e}.up": 1.0 + e for i in range(2) for e in range(3)}
    body = maps.block_map("Map", values, maps.Key("x", "{:.1f}".format)).body
    assert body.count(">2.0<") == 2
    assert "3 layers as h.0.experts.0.up: 2.0, 1.0 to 3.0" in body


def test_a_scale_between_whole_numbers_makes_a_narrow_range_narrow():
    key = maps.Key("bits", str, whole=True)
    assert key.scale([2.06, 2.19]) == colour.Scale(2, 3)
    assert key.scale([2.0, 2.0]) == colour.Scale(2, 3)


def test_bars_say_their_parts_and_are_as_long_as_they_say(tmp_path):
    made = [bars.Bar("a <b>", {"x": 1.0, "y": 3.0}), bars.Bar("c", {"x": 2.0, "y": 0.0})]
    section = bars.bar_chart("Bars", made, "unit", "{:g} u".format, level=("limit", 2.0))
    page = Page(report.html_report(tmp_path / "p.html", "P", section).read_text(encoding="utf-8"))
    assert page.said == ["unit. a <b>: 4 u (x 1 u, y 3 u); c: 2 u (x 2 u, y 0 u); limit: 2 u"]
    widths = [float(a["width"]) for t, a in page.tags if t == "rect" and a.get("height") == "16"]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.2)  # coordinates have one digit
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[3] == 0


def test_long_curves_are_thinned_to_means_and_short_ones_left_alone():
    points = [(float(i), float(i % 7)) for i in range(1, 1001)]
    thinned, width = curves.thin(points)
    assert (len(thinned), width) == (curves.DRAWN, 5)
    assert thinned[0] == (3.0, sum(y for _, y in points[:5]) / 5)
    assert curves.thin(points[:50]) == (points[:50], 1)
    assert curves.thin([]) == ([], 1)


def test_a_page_that_cannot_be_written_is_said_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="this is a directory"):
        report.html_report(tmp_path, "Page")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="nothing can be written in"):
        report.html_report(tmp_path / "file" / "page.html", "Page")


def test_a_long_table_is_folded():
    rows = [("a.b", "<1>")] * 50
    body = report.table("Rows", ("name", "value"), rows).body
    assert body.startswith("<details><summary>50 rows")
    assert "&lt;1&gt;" in body
