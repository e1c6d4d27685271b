"""Plots, page and README table from made-up rows; nothing is shown that is not in them."""

import re
from html.parser import HTMLParser

import pytest
from rows import peaks, row, timed

from bench import plots, record, report, table
from bench.__main__ import main

RATIO = {"ours_over_this": 0.5, "ours_over_this_p20": 0.48, "ours_over_this_p80": 0.53}


def _rows():
    rows = [peaks(), peaks(dtype="bf16")]
    for L in (128, 256, 512):
        case = {"case": f"length-L{L}", "length": L, "label": f"B1 H8 L{L} D64",
                "problem": f"Problem(Lq={L})"}  # fmt: skip
        rows.append(timed(L / 64, **case))
        rows.append(timed(L / 32, contender="compile", **case, **RATIO))
        rows.append(row(contender="flex", median_ms=None, error="Refused: <b>no</b> | k", **case))
        memory = case | {"case": f"peak-L{L}", "section": "memory lengths", "measure": "memory",
                         "median_ms": None, "tflops": None, "kept_mib": 0.0}  # fmt: skip
        rows.append(row(peak_mib=L / 10, **memory))
        rows.append(row(peak_mib=L / 2, contender="compile", **memory))
    rows.append(
        row(case="W3", section="workloads", median_ms=None, tflops=None, missing="not in this one")
    )
    target = {"target": 0.4, "target_met": False}
    rows.append(timed(2.0, case="W1", section="workloads", label="<script>alert(1)</script>"))
    rows.append(timed(4.0, case="W1", section="workloads", contender="sdpa_nomask", label="x",
                      differs="no mask", note="SDPA chose MATH", **RATIO, **target))  # fmt: skip
    return rows


class _Page(HTMLParser):
    """Tags, what they refer to, and whether they are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "results.jsonl"
    record.append(path, _rows())
    folder = tmp_path / "page"
    assert main(["report", "--results", str(path), "--output", str(folder)]) == 0
    return folder


def test_the_page_is_one_file_for_a_phone(written):
    text = (written / "index.html").read_text()
    page = _Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert page.references
    assert all(one.startswith("data:image/png;base64,") for one in page.references)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "overflow-x: auto" in text
    assert "prefers-color-scheme: dark" in text
    assert len(text) < 3_000_000


def test_the_page_says_what_the_rows_say_and_escapes_it(written):
    text = (written / "index.html").read_text()
    for piece in (
        "A CPU, 2 CPUs, kernels at avx2", "commit abc1234", "run r1", "results.jsonl",
        "Ours is faster in 4 of 4 comparisons", "targets reached: 0 of 1",
        "3 contenders failed or were wrong", "1 measurements are of what this version",
        "Refused: &lt;b&gt;no&lt;/b&gt; | k", "not in this one", "SDPA chose MATH", "no mask",
        '<span class="good">0.50</span> (0.48 .. 0.53)', '<span class="bad">0.4</span>',
        "&lt;script&gt;",
    ):  # fmt: skip
        assert piece in text, piece
    assert "<b>no</b>" not in text


def test_every_plot_is_a_picture_beside_the_page(written):
    names = {path.name for path in written.iterdir()}
    assert names == {"index.html"} | {
        f"overview-{kind}.png" for kind in ("ratios-1", "time", "memory", "roofline")
    }
    for path in written.glob("*.png"):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        width = int.from_bytes(data[16:20])
        assert 700 < width < 1000  # twice a phone's width


def test_plots_hold_the_numbers_of_the_rows():
    rows = _rows()
    lines = plots.over_length(rows, "median_ms").axes[0].lines
    assert [line.get_label() for line in lines] == ["ours", "compile"]
    assert list(lines[0].get_ydata()) == [2.0, 4.0, 8.0]
    assert list(lines[1].get_xdata()) == [128, 256, 512]
    peak = plots.over_length(rows, "peak_mib").axes[0].lines
    assert list(peak[1].get_ydata()) == [64.0, 128.0, 256.0]
    (figure,) = plots.ratio_bars(rows)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.5] * 4
    roof = plots.roofline(rows).axes[0].lines[0]
    assert max(roof.get_ydata()) == 0.25
    knee = 0.25e12 / 20e9
    assert knee in roof.get_xdata()


def test_what_was_not_measured_has_no_plot():
    one = [timed(2.0)]
    assert plots.over_length(one, "median_ms") is None
    assert plots.roofline(one) is None
    assert plots.ratio_bars(one) == []
    assert set(report.figures_of(one)) == set()


def test_many_bars_become_several_pictures():
    rows = [timed(2.0, case=f"c{i}", contender="eager", **RATIO) for i in range(60)]
    assert [len(f.axes[0].patches) for f in plots.ratio_bars(rows)] == [28, 28, 4]


def test_the_short_table():
    text = table.render_short(_rows())
    assert "Measured 2026-01-02 on A CPU" in text
    assert "| case | dtype | ours, ms | of torch.mm | / compile | / flex |" in text
    assert (
        "| length-L128: B1 H8 L128 D64, forward + backward | fp32 | 2 | 50% | 0.50 (0.48 .. 0.53) "
        "| fails |" in text
    )
    assert "| peak-L512: B1 H8 L512 D64, forward + backward | fp32 | 51 | 256 |" in text
    assert "not in this one" in text
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1


def test_shares_are_of_the_best_peaks_of_a_run():
    """A case that had one sample of torch.mm, with other load in it, is no 108 % of it."""
    rows = [timed(2.0, case=f"c{at}", tflops=0.2, gbps=3.0, peak_tflops=peak, peak_gbps=copy)
            for at, (peak, copy) in enumerate(((0.25, 20.0), (0.16, 30.0)))]  # fmt: skip
    other = timed(2.0, allocator="kept", tflops=0.2, peak_tflops=0.4)
    found = table.with_run_peaks([*rows, other])
    assert [r["share_of_matmul"] for r in found] == [0.8, 0.8, 0.5]
    assert [r["share_of_copy"] for r in found[:2]] == [0.1, 0.1]
    assert rows[1]["peak_tflops"] == 0.16
    text = table.render_short([*rows, other])
    assert "in the row's dtype or in fp32: 0.25 TFLOP/s for fp32 (default), 0.40" in text
    assert text.count("| 80%") == 2


def test_a_time_of_few_samples_is_marked_everywhere():
    few = timed(2.0, samples=2)
    assert "| ~2 |" in table.render_short([few])
    assert "~2 (1.98 .. 2.02)" in table.render([few])
    assert "<td>~2</td>" in report._table([few])
    assert "| 2 |" in table.render_short([timed(2.0, samples=3)])


def test_what_was_measured_again_in_a_run_is_there_once():
    rows = [timed(1.0), timed(4.0, contender="eager"), timed(2.0)]
    assert [r["median_ms"] for r in table.choose_run(rows)] == [2.0, 4.0]
    assert [r["median_ms"] for r in table.last_runs(rows)[0]] == [2.0, 4.0]


def test_the_short_table_has_both_allocators_in_a_cell():
    rows = [
        timed(ms, allocator=allocator, **extra)
        for allocator, ms in (("default", 2.0), ("kept", 3.0))
        for extra in ({}, {"contender": "eager", "ours_over_this": ms / 4})
    ]
    (line,) = (one for one in table.render_short(rows).splitlines() if "| fp32 |" in one)
    assert line.split(" | ")[2] == "2<br>3"
    assert line.endswith("| 0.50<br>0.75 |")


def test_the_readme_is_refreshed_between_its_markers(tmp_path):
    path, readme = tmp_path / "rows.jsonl", tmp_path / "README.md"
    record.append(path, _rows())
    readme.write_text("a\n<!-- bench:begin -->\nstale words\n<!-- bench:end -->\nz\n")
    picture = tmp_path / "time.png"
    arguments = ["report", "--results", str(path), "--output", str(tmp_path / "page")]
    assert main([*arguments, "--into", str(readme), "--picture", str(picture)]) == 0
    text = readme.read_text()
    assert text.startswith("a\n<!-- bench:begin -->\nMeasured 2026-01-02")
    assert text.endswith("<!-- bench:end -->\nz\n")
    assert "stale words" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_last_run_of_each_whole_set_is_shown():
    rows = [timed(1.0, run="old"), timed(1.0, run="new"), timed(1.0, run="held", set="foundation"),
            timed(1.0, run="tuning", set="part")]  # fmt: skip
    assert [run[0]["run"] for run in table.last_runs(rows)] == ["new", "held"]
    assert [run[0]["run"] for run in table.last_runs(rows[3:])] == ["tuning"]
    with pytest.raises(ValueError, match="no measurement"):
        table.last_runs([])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("[1]", "no object"),
        ('{"run": 3}', "run is not text"),
        ("NaN", "no object"),
        ('{"median_ms": "fast"}', "median_ms is not a number"),
        ('{"median_ms": NaN}', "median_ms is not a number"),
        ('{"median_ms": -1}', "not above 0"),
        ('{"label": null}', "label is not text"),
        ('{"p80_ms": true}', "p80_ms is not a number"),
        ('{"kernel_level": null}', "kernel_level is not text"),
        ('{"set": "../../evil"}', "set is no name"),
        ('{"error": 3}', "error is not text"),
        ('{"direction": "up"}', "direction is none of fwd"),
        ('{"measure": "guess"}', "measure is none of"),
        ('{"measure": "memory"}', "peak_mib is missing"),
        ('{"measure": "peaks"}', "matmul_tflops is missing"),
        ('{"disturbed": "no"}', "disturbed is neither true nor false"),
        ('{"target_met": true}', "target is missing"),
        ('{"length": 0}', "length is not above 0"),
        ('{"tflops": 1e300}', "tflops is too large"),
        ("[" * 100_000, "not a row of JSON"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_results_file_is_refused_by_line(tmp_path, capsys, line, sentence):
    import json

    path = tmp_path / "rows.jsonl"
    if line.startswith("{"):
        line = json.dumps(row() | json.loads(line))
    path.write_text(json.dumps(row()) + "\n" + line + "\n")
    assert main(["report", "--results", str(path), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "line 2" in error
    assert sentence in error
    assert re.search(r"rows\.jsonl", error)


def test_whatever_field_of_a_row_is_missing_or_odd_there_is_a_page_or_a_sentence(tmp_path, capsys):
    import json

    good = _rows()
    path = tmp_path / "rows.jsonl"
    number = 0
    for at, one in enumerate(good):
        for name in one:
            for value in (None, [], {}, "x", -1, 0, True):
                changed = one | {name: value}
                if value is None:
                    del changed[name]
                rows = [*good[:at], changed, *good[at + 1 :]]
                if record._no_row(changed):
                    continue
                number += 1
                table.render(rows)
                table.render_short(rows)
                for run in table.last_runs(rows):
                    report._section(run, {})
                if number % 97 == 0:  # drawing takes longer
                    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                    code = main(["report", "--results", str(path), "--output", str(tmp_path / "p")])
                    assert code in (0, 2), capsys.readouterr().err
    assert number > 200
