"""Every Python block of the README and of docs/ runs, and every command in them is one that parses."""

from __future__ import annotations

import csv
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from mvkernels.commands import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def blocks(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            line = page.read_text()[: match.start()].count("\n") + 1
            found.append(pytest.param(match.group(1), id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs(code: str) -> None:
    for package in re.findall(r"^(?:import|from) (transformers|timm|diffusers)\b", code, re.MULTILINE):
        pytest.importorskip(package)
    torch.manual_seed(0)
    exec(compile(code, "<documentation>", "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("text", blocks("console"))
def test_commands_parse(text: str) -> None:
    for line in text.splitlines():
        command = shlex.split(line.removeprefix("$"), comments=True)
        if command[:1] == ["mvkernels"]:
            cli.parser().parse_args(command[1:])
        elif {"mvmodels.train", "mvmodels.predict"} & {*command}:
            at = command.index("-m")
            importlib.import_module(command[at + 1]).parser().parse_args(command[at + 2 :])
        elif command[:1] == ["make"]:
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.core
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


FOLDERS = "mvkernels|csrc|tests|benchmarks|docs|examples|python|release"


@pytest.mark.parametrize("folder", [".", *FOLDERS.split("|")])
def test_files_that_are_named_in_text_are_there(folder: str) -> None:
    below = ROOT.glob("*.md") if folder == "." else (ROOT / folder).rglob("*.*")
    for file in (path for path in below if path.suffix in (".md", ".py", ".h", ".cpp")):
        for name in re.findall(rf"`((?:{FOLDERS})/[^`\s<]*)`", file.read_text()):
            assert list(ROOT.glob(name.rstrip("/"))), f"{file.relative_to(ROOT)} names {name}"


def test_the_readme_shows_the_figures_of_the_csv_files() -> None:
    script = ROOT / "benchmarks" / "readme.py"
    found = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_the_pages_show_the_figures_of_the_csv_files() -> None:
    script = ROOT / "benchmarks" / "pages.py"
    found = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_a_page_that_is_stale_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pages

    where = {"device": "cpu", "capability": "avx2", "threads": "1", "torch": "2", "date": "2026-01-01", "commit": "a"}
    errors = {"op": "an_op", "dtype": "float32", "backend": "cpp", "shapes": "3"}
    for what in ("out", "grad"):
        errors |= {f"{what}_error": "2e-7", f"{what}_error_pytorch": "3e-7", f"{what}_error_expected": "4e-7"}
        errors |= {f"{what}_share_of_allowed": "0.125"}
    row = where | errors
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "numerics.csv").write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    assert "| an_op | float32 | cpp | 2.0e-07 | 3.0e-07 | 4.0e-07 | 12 % | 2.0e-07 |" in pages.block("errors", tmp_path)
    planted = [("float32", "term", 7, 7), ("float32", "row", 9, 8), ("float16", "term", 7, 6)]
    rows = [
        where | {"op": "an_op", "dtype": d, "fault": f, "planted": str(n), "found": str(m), "found_by_pytorch": str(m)}
        for d, f, n, m in planted
    ]
    lines = [",".join(row.values()) for row in rows]
    (tmp_path / "somewhere" / "faults.csv").write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    text = pages.block("faults", tmp_path)
    assert "| an_op | float32 | 7 of 7 | 8 of 9 |" in text and "| an_op | float16 | 6 of 7 | – |" in text
    assert "In float32 16 planted, 15 found; 15 by" in text
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    assert pages.main() == 1


def test_the_tables_of_wheels_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _figures
    import _release_page

    from release import check, matrix

    assert "make release-check" in _release_page.wheels(tmp_path)
    assert "release.matrix" in _release_page.matrix(tmp_path)
    (tmp_path / "release").mkdir()
    lines = [",".join(check.COLUMNS), "a.whl,1250000,12000000,cp310-abi3-x,2026-01-01,abc,g++ 12,2.10.0"]
    (tmp_path / "release/wheels.csv").write_text(
        "\n".join([*lines, "a.tar.gz,2000000,12000000,,2026-01-01,abc,,"]) + "\n"
    )
    text = _release_page.wheels(tmp_path)
    assert "2026-01-01, commit `abc`, built by g++ 12 beside torch 2.10.0. Each may have 12 MB." in text
    assert "| `a.whl` | cp310-abi3-x | 1.25 |" in text and "| `a.tar.gz` | source | 2.00 |" in text
    lines = [",".join(matrix.COLUMNS), "3.10.1,2.10.0,avx2,9,1,2,5,0,yes,tests fail,2026-01-01,abc,a.whl"]
    lines.append("3.13,2.9.1,,,,,,,,not to be had: no Python 3.13,2026-01-01,abc,a.whl")
    (tmp_path / "release/matrix.csv").write_text("\n".join(lines) + "\n")
    text = _release_page.matrix(tmp_path)
    assert "| 3.10.1 | 2.10.0 | avx2 | 9 | 1 | 2 | 5 passed, 0 failed | tests fail, not all ran in the time |" in text
    assert "| 3.13 | 2.9.1 | – | – | – | – | – | not to be had: no Python 3.13 |" in text
    assert _figures.machines(tmp_path) == []  # no processor was measured there


def test_the_call_overhead_is_a_table_of_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvkernels.bench.timing._repeats", lambda *_: 1)  # what the times are is all the same
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import overhead
    import pages

    from mvkernels.dispatch.registry import OPS

    rows = []
    for name, arguments in overhead.tiny().items():
        assert all(t.shape[-1] == 4 for t in overhead.tokens(name, arguments))  # head_dim, of which SDPA's tokens are
        for state in overhead.states(OPS[name]):
            found = overhead.measure(OPS[name], "tiny", arguments, state, False, min_time=0)
            assert {"sdpa", "mvkernels"} <= {row["provider"] for row in found}
            rows += found
    assert len({row["what"] for row in rows}) == len(rows)
    rows.append({**rows[0], "what": "import torch", "median_us": 2e6, "provider": ""})
    text = "\n".join(pages.overhead([{key: str(value) for key, value in row.items()} for row in rows]))
    assert "| op | shape | no gradient | gradient recorded | forward and backward |" in text

    def states(count: int) -> str:
        """Cells of so many states that were timed, and of the others."""
        return r"(\| [\d.]+ µs, [\d.]+× )" + f"{{{count}}}" + r"(\| – )" + f"{{{3 - count}}}"

    assert all(
        re.search(rf"^\| {name} \| tiny {states(len(overhead.states(OPS[name])))}\|$", text, re.MULTILINE)
        for name in overhead.tiny()
    )
    assert "| import torch | 2e+06 µs |" in text
    old = [{"device": "cpu", "what": "the operator", "median_us": "4.42"}]  # files from before there were other ops
    assert "| the operator | 4.42 µs |" in pages.overhead(old)[0]


def test_every_page_is_on_the_site_and_every_name_in_the_api() -> None:
    import mvkernels

    nav = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in nav, page.name
    api = (ROOT / "docs" / "api.md").read_text()
    for name in mvkernels.__all__:
        if not name.endswith("Function") and not name.startswith("__"):
            assert re.search(rf"^::: mvkernels\.(\w+\.)?{name}$", api, re.MULTILINE), name


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.usefixtures("benchmarks")
def test_figures_come_from_the_rows(tmp_path: Path) -> None:
    import _figures
    import readme

    assert "No figures are committed yet" in readme.render(tmp_path)

    names = "device,capability,threads,torch,date,commit,op,model,label,size_class,batch,dtype,layout,mode,provider,"
    names += "speedup_median,peak_bytes"
    where = "cpu,avx2,1,2.13,2026-01-01,abc,patch_attention,m,s,N<=16,1,float32,channels_last"
    lines = [names, f"{where},full,eager,,400", f"{where},full,cpp,2.5,100", f"{where},fwd,cpp,3.5,50"]
    path = tmp_path / "somewhere" / "patch_attention.csv"

    def table() -> str:
        return "\n".join(_figures.op_table(_figures.read(path), *_figures.OPS[0]))

    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n")
    assert "| cpp | float32, without torch.compile | N ≤ 16 | 1 | 3.50× | 3.50× | 2.50× | 2.50× | 0.25 of" in table()
    lines.append(f"{where},fwd,compile(sdpa),,")
    path.write_text("\n".join(lines) + "\n")
    assert "| cpp | float32 | N ≤ 16 | 1 | 3.50× | 3.50× | 2.50× | 2.50× | 0.25 of" in table()
    row = "| `patch_attention` | the best of eager, torch.compile | 1 shapes | 3.50× (worst 3.50×) | 2.50× (worst"
    assert row in readme.render(tmp_path)


@pytest.mark.usefixtures("benchmarks")
def test_the_picture_has_a_bar_for_each_op_and_way_to_run_a_model(tmp_path: Path) -> None:
    import readme

    names = "device,capability,threads,torch,date,commit,model,size,batch,dtype,layout,mode,provider,median_us"
    where = "cpu,avx2,1,2.13,2026-01-01,abc,timm:m,256,1,float32,contiguous"
    times = (("fwd,original", 3000), ("fwd,swapped", 2000), ("full,original", 9000), ("full,swapped", 10000))
    lines = [names, *(f"{where},{who},{time}" for who, time in times), f'{where},fwd,"original, onnx",1500']
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "swapped.csv").write_text("\n".join(lines) + "\n")
    text = readme.render(tmp_path)
    assert "| whole models, swapped | the original | 1 model | 1.50× (worst 1.50×) | 0.90× (worst 0.90×) |" in text
    assert "| whole models, swapped | the original in ONNX Runtime | 1 model | 0.75× (worst 0.75×) | – |" in text
    for colours in readme.COLOURS.values():
        drawn = ElementTree.fromstring(readme.picture(tmp_path / "somewhere", colours))
        shown = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
        assert shown[1:] == ["timm:m", "swapped", "1.50×", "original, ONNX Runtime", "2.00×"]
        widths = [float(bar.attrib["width"]) for bar in drawn.iter("{http://www.w3.org/2000/svg}rect")][1:]
        assert widths[1] / widths[0] == pytest.approx(2 / 1.5, rel=1e-3)


def test_committed_figures_are_of_clean_commits() -> None:
    for path in (ROOT / "benchmarks" / "results").rglob("*.csv"):
        with path.open(newline="") as file:
            assert not [row for row in csv.DictReader(file) if row.get("commit", "").endswith("-dirty")], path


def test_a_part_that_is_measured_leaves_the_rest_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvkernels.bench.timing._repeats", lambda *_: 1)  # what the times are is all the same
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _results
    import overhead

    monkeypatch.setattr(_results, "ROOT", tmp_path)
    path = _results.folder() / "overhead.csv"
    everything = ["--min-time", "0", "--no-import", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--op", "former_to_mobile", *everything])
    assert overhead.main() == 0
    first = path.read_text()
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--op", "mobile_to_former", *everything])
    assert overhead.main() == 0
    assert path.read_text().startswith(first) and "mobile_to_former" in path.read_text()
    monkeypatch.setattr(sys, "argv", ["overhead.py"])  # all of it: nothing of before stays
    monkeypatch.setattr(overhead, "measure", lambda *_: [{"what": "new", "median_us": 1, "min_us": 1}])
    monkeypatch.setattr(overhead, "import_microseconds", lambda modules: {})
    monkeypatch.setattr(overhead, "autograd", lambda _: [])
    assert overhead.main() == 0
    assert set(path.read_text().split()) == {"what,median_us,min_us", "new,1,1"}
    _results.replace([{"what": "b", "median_us": 1}, {"what": "a", "median_us": 2}], tmp_path / "f.csv", "what")
    _results.replace([{"what": "c", "median_us": 3}, {"what": "b", "median_us": 4}], tmp_path / "f.csv", "what")
    assert (tmp_path / "f.csv").read_text().split() == ["what,median_us", "b,4", "a,2", "c,3"]
    assert [_results.stem("swapped", n) for n in (1, 2, "4")] == ["swapped", "swapped_2_threads", "swapped_4_threads"]


@pytest.mark.parametrize("script", ["swapped", "models"])
def test_benchmarks_of_models_refuse_in_a_line(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "keep_pages", lambda: None)
    for bad, message in (
        (["--batch", "0"], "--batch is less than 1"),
        (["--threads", "0"], "--threads is less than 1"),
        (["--device", "no_such_device"], "'no_such_device' cannot be used"),
        (["--backend", "no_such_backend"], "invalid choice"),
        (["--model", "no_such_model", "--no-file"], "no_such_model"),
        (["--model", "transformers:mobilevit_xxs" if script == "swapped" else "mobilevit_xxs", "--backend", "cuda",
          "--mode", "fwd", "--batch", "1", "--size", "64", "--no-compile", "--no-file"], "backend cuda cannot run"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *bad])
        with pytest.raises(SystemExit) as left:
            module.main()
        assert left.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_whole_models_are_a_line_each_and_new_rows_take_the_place_of_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _results
    import pages

    def row(batch: int, provider: str, microseconds: float, speedup: float) -> dict[str, object]:
        same = {
            "model": "timm:m",
            "size": 256,
            "batch": batch,
            "dtype": "float32",
            "layout": "contiguous",
            "mode": "fwd",
        }
        where = {"device": "cpu", "capability": "avx2", "threads": 1, "torch": "2", "date": "today", "commit": "a"}
        return {**where, **same, "provider": provider, "median_us": microseconds, "speedup_median": speedup}

    same = ("model", "size", "batch", "dtype", "layout", "mode")
    path = tmp_path / "somewhere" / "swapped.csv"
    path.parent.mkdir()
    _results.merge([row(8, "original", 9000, 1), row(8, "swapped", 6000, 1.5), row(8, "gone", 1, 1)], path, same)
    _results.merge([row(8, "original", 1, 1) | {"size": 512, "a_newer_column": 1}], path, same)
    _results.merge(
        [row(1, "original", 2000, 1), row(1, "swapped", 1000, 2), row(1, "compiled", 1600, 1.25)], path, same
    )
    _results.merge([row(8, "original", 8000, 1), row(8, "swapped", 5000, 1.6)], path, same)
    text = pages.models_page(tmp_path)
    assert "| `timm:m` | 256² | 1 | inference | 2.0 ms | 2.00× | 1.25× |" in text
    assert "| `timm:m` | 256² | 8 | inference | 8.0 ms | 1.60× | – |" in text
    assert "gone" not in text and "a_newer_column" in path.read_text()


def test_dtypes_are_lines_apart_and_so_are_their_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pages

    names = "model,size,batch,dtype,layout,mode,device,capability,threads,torch,date,commit,provider,median_us,"
    lines = [names + "speedup_median"]
    for dtype, speedup in (("float32", 2.0), ("bfloat16", 3.0)):
        for model in "abc":
            same = f"{model},256,128,{dtype},channels_last,full,Some GPU,sm_90,1,2,today,abc"
            lines += [f"{same},original,6000,1", f"{same},swapped,{6000 / speedup},{speedup}"]
    (tmp_path / "some-gpu").mkdir()
    (tmp_path / "some-gpu" / "swapped.csv").write_text("\n".join(lines) + "\n")
    text = pages.models_page(tmp_path)
    for shown, speedup in (("", "2.00×"), (", bfloat16", "3.00×")):
        assert f"| `a` | 256², channels last{shown} | 128 | training step | 6.0 ms | {speedup} |" in text
        assert f"| **geometric mean of 3 rows** | channels last{shown} | 128 | training step |  | {speedup} |" in text


def test_the_peak_is_a_column_where_rows_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pages

    old = dict.fromkeys(("model", "label", "layout", "provider", "best_peer", "commit", "device", "allocator"), "a")
    old |= {"capability": "avx2", "threads": "1", "torch": "2", "date": "today", "batch": "1", "dtype": "float32"}
    old |= {"mode": "fwd", "median_us": "10", "speedup_median": "2", "fraction_of_floor": "1.25"}
    (text,) = pages.shapes("an_op", [old])
    assert "| times as fast | of the floor |\n" in text and "| 2.00× | 125 % |\n" in text
    (text,) = pages.shapes("an_op", [old, old | {"fma_gflop_s": "100", "fraction_of_fma": "0.625"}])
    assert "| times as fast | of the floor | of the FMA peak |\n" in text
    assert "| 125 % | – |\n" in text and "| 125 % | 62 % |\n" in text


def test_all_who_were_timed_are_named_as_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _figures

    names = "device,capability,threads,torch,date,commit,op,model,label,size_class,batch,dtype,layout,mode,provider,"
    names += "median_us,speedup_median,peak_bytes"
    where = "Some GPU,sm_90,1,2.13,2026-01-01,abc,patch_attention,m,s,N<=16,1,float32,channels_last,fwd"
    usual = [names, *(f"{where},{provider},2,," for provider in ("eager", "sdpa", "compile(eager)"))]
    lines = [*usual, f"{where},flex_attention,3,,", f"{where},none,,,"]
    (tmp_path / "some-gpu").mkdir()
    path = tmp_path / "some-gpu" / "patch_attention.csv"
    path.write_text("\n".join([*lines, f"{where},triton,1,2,"]) + "\n")
    assert _figures.peers(_figures.read(path)) == ["eager", "SDPA", "torch.compile", "flex_attention"]
    path.write_text("\n".join([*usual, f"{where},triton,1,2,"]) + "\n")
    assert _figures.peers(_figures.read(path)) == ["eager", "SDPA", "torch.compile"]
    path.write_text("\n".join([*usual[:2], f"{where},triton,1,2,"]) + "\n")  # linear attention has no softmax
    assert _figures.peers(_figures.read(path)) == ["eager"]
