"""Exit codes, one-line errors and JSON of every command; the Makefile and the scripts behind it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mvkernels import report, third_party
from mvkernels.commands import cli
from mvkernels.dispatch import extension
from mvkernels.dispatch.backend import BACKENDS
from mvkernels.dispatch.registry import OPS

ROOT = Path(__file__).resolve().parents[2]

BAD = [
    ([], "required"),
    (["frobnicate"], "invalid choice"),
    (["info", "--nonsense"], "unrecognized"),
    (["verify", "--op", "no_such_op"], "unknown op 'no_such_op'"),
    (["verify", "--dtype", "int8"], "invalid choice"),
    (["verify", "--backend", "no_such_backend"], "invalid choice"),
    (["verify", "--backend", "cuda"], "backend cuda cannot run"),
    (["verify", "--device", "no_such_device"], "no_such_device"),
    (["bench", "no_such_op", "--allocator", "default"], "unknown op 'no_such_op'"),
    (["bench", "--dtype", "int8"], "invalid choice"),
    (["bench", "--backend", "cuda", "--allocator", "default"], "backend cuda cannot run"),
    (["bench", "--against", "nobody", "--allocator", "default"], "unknown peer 'nobody'"),
    (["bench", "--batch", "0"], "0 is not allowed, want at least 1"),
    (["tune", "--nonsense"], "unrecognized"),
    (["bench", "--batch", "many"], "--batch: 'many' is not a whole number"),
    (["bench", "--shape", "no_such_shape", "--allocator", "default"], "no shape of the suite matches"),
    (["verify", "--device", "meta"], "device 'meta' cannot be used"),
    (["bench", "--csv", "/proc/no/such.csv", "--allocator", "default"], "/proc/no/such.csv cannot be written"),
    (["bench", "--csv", "/", "--allocator", "default"], "/ cannot be written"),
    (["bench", "--plot", "/proc/no/such.png", "--allocator", "default"], "cannot be written"),
    (["swap", "transformers:mobilevit_xxs", "--device", "meta", "--allocator", "default"], "'meta' cannot be used"),
    (["bench", "--tolerance", "nan", "--allocator", "default"], "--tolerance: nan is not allowed"),
    (["bench", "--min-time", "inf", "--allocator", "default"], "--min-time: inf is not allowed"),
    (["bench", "--min-time", "soon"], "--min-time: 'soon' is not a number"),
    (["bench", "--ab", "HEAD", "--csv", "f.csv", "--allocator", "default"], "--csv cannot be combined with --ab"),
    (["bench", "--html", ".", "--ab", "HEAD", "--allocator", "default"], "--ab cannot be combined with --html"),
    (["bench", "--read", "f.csv", "--csv", "g.csv", "--allocator", "default"], "--csv cannot be combined with --read"),
    (["swap"], "required"),
    (["swap", "no_such_family:m", "--allocator", "default"], "unknown model 'no_such_family:m'"),
    (["swap", "transformers:", "--allocator", "default"], "unknown model 'transformers:'"),
    (["swap", "transformers:no_such_model", "--allocator", "default"], "no_such_model"),
    (["swap", "diffusers:dc-ae", "--allocator", "default"], "want dc-ae-f32c32-sana-1.0"),
    (["swap", "timm:no_such_model", "--allocator", "default"], "timm"),
]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        status = cli.main(arguments)
    except SystemExit as exit:
        assert isinstance(exit.code, int)
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("transformers", "timm", "diffusers"):
        if any(argument.startswith(f"{package}:") for argument in arguments):
            pytest.importorskip(package)
    status, out, err = run(arguments, capsys)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1 and err.startswith("mvkernels")
    assert out == ""


@pytest.mark.parametrize("family", ["transformers", "timm", "diffusers"])
def test_a_missing_package_says_which_extra(
    family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, family, None)
    status, _, err = run(["swap", f"{family}:mobilevit_s", "--allocator", "default"], capsys)
    assert status == 2
    assert "pip install 'mvkernels[models]'" in err


def test_a_package_that_does_not_import_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def broken(name: str) -> Any:
        if name.startswith("mvkernels"):
            return real(name)
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(third_party.importlib, "import_module", broken)
    status, _, err = run(["swap", "timm:mobilevit_s", "--allocator", "default"], capsys)
    assert status == 2
    assert err == "mvkernels swap: timm cannot be imported: operator torchvision::nms does not exist\n"


def test_a_plot_without_matplotlib_is_refused_before_any_time_is_spent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run(["bench", "--plot", "x.png", "--allocator", "default"], capsys)
    assert status == 2
    assert "mvkernels[bench]" in err


@pytest.mark.parametrize("command", ["info", "verify", "bench", "swap"])
def test_help_is_status_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run([command, "--help"], capsys)
    assert status == 0
    assert "--json" in out and err == ""


def test_info_says_what_runs_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(["info"], capsys)
    assert status == 0
    assert torch.__version__ in out and "has no cuda kernel" in out
    for backend in BACKENDS:
        assert backend in out


def test_info_lists_every_variable_of_the_documentation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = set(re.findall(r"^\| `([A-Z0-9_]+)` \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE))
    assert "MVKERNELS_BACKEND" in named
    for name in named:
        monkeypatch.setenv(name, "auto" if name == "MVKERNELS_BACKEND" else "1")
    status, out, _ = run(["info", "--json"], capsys)
    assert status == 0 and named <= json.loads(out)["environment"].keys()


def test_info_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVKERNELS_BACKEND", "reference")
    status, out, _ = run(["info", "--json"], capsys)
    found = json.loads(out)
    assert status == 0
    assert set(found["ops"]) == set(OPS)
    for by_device in found["ops"].values():
        assert set(by_device["cpu"]) == set(BACKENDS)
        assert by_device["cpu"]["reference"] == {"available": True, "reason": ""}
        for answer in by_device["cpu"].values():
            assert answer["available"] != bool(answer["reason"])
    assert found["environment"]["MVKERNELS_BACKEND"] == "reference"
    assert found["extension"]["available"] or found["extension"]["reason"]


@pytest.mark.core
def test_swap_json(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    arguments = ["swap", "transformers:mobilevit_xxs", "--json", "--size", "64", "--rounds", "1"]
    status, out, err = run([*arguments, "--allocator", "default"], capsys)
    assert status == 0, err
    found = json.loads(out)
    assert found["parameters"] == 1_272_024
    assert found["swapped"] == 3 and found["verified"]
    assert found["times"]["swapped"]["median_us"] > 0


def test_swap_for_inference(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    arguments = ["swap", "transformers:mobilevit_xxs", "--inference", "--size", "64", "--rounds", "1"]
    arguments += ["--allocator", "default"]
    status, out, _ = run([*arguments, "--json"], capsys)
    found = json.loads(out)
    assert status == 0 and found["swapped"] == 3 and found["verified"]
    assert list(found["times"]) == ["original", "swapped", "swapped, inference"]
    if extension.module is not None:
        assert found["packed_bytes"] > 0 and "inference: output" in found["verification"]
    status, out, _ = run(arguments, capsys)
    assert status == 0 and "\nswapped, inference  " in out


def test_swap_of_an_efficientvit(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    arguments = ["swap", "timm:efficientvit_b0", "--json", "--size", "64", "--rounds", "1"]
    status, out, err = run([*arguments, "--allocator", "default"], capsys)
    assert status == 0, err
    found = json.loads(out)
    assert found["parameters"] == 3_410_008
    assert found["swapped"] == 4 and found["verified"]


def test_swap_of_a_dc_ae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the structure of the real one, and a hundredth of its width."""
    pytest.importorskip("diffusers")
    real = third_party._dc_ae("dc-ae-f32c32-in-1.0")
    small = {f"{side}_block_out_channels": (4, 4, 8, 32, 32, 32) for side in ("encoder", "decoder")}
    monkeypatch.setattr(third_party, "_dc_ae", lambda name: {**real, **small, "latent_channels": 8})
    arguments = ["swap", "diffusers:dc-ae-f32c32-in-1.0", "--json", "--size", "64", "--rounds", "1"]
    status, out, err = run([*arguments, "--allocator", "default"], capsys)
    assert status == 0, err
    found = json.loads(out)
    assert found["swapped"] == 12 and found["verified"]
    assert {entry["module_class"] for entry in found["entries"]} == {"SanaMultiscaleLinearAttention"}


def test_the_dc_aes_are_those_that_were_published() -> None:
    diffusers = pytest.importorskip("diffusers")
    published = {"dc-ae-f32c32-sana-1.0": 312, "dc-ae-f32c32-in-1.0": 323, "dc-ae-f64c128-mix-1.0": 677}
    for name, millions in published.items():
        with torch.device("meta"):
            model = diffusers.AutoencoderDC(**third_party._dc_ae(name))
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_swap_of_a_wrong_model_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from mvkernels.commands import swap as swap_command

    class Wrong:
        ok = False

    monkeypatch.setattr(swap_command, "verify_swap", lambda model, image: Wrong())
    arguments = ["swap", "transformers:mobilevit_xxs", "--size", "32", "--rounds", "1", "--allocator", "default"]
    status, _, err = run(arguments, capsys)
    assert status == 1
    assert "differs from the original" in err


def test_swap_of_a_picture_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    arguments = ["swap", "transformers:mobilevit_xxs", "--image", "no/such.png", "--allocator", "default"]
    status, _, err = run(arguments, capsys)
    assert status == 2
    assert "no/such.png cannot be read" in err


def test_random_weights_leave_no_parameter_without_effect() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    third_party.randomise(model)
    norm = model[1]
    assert not torch.equal(norm.weight, torch.ones(4)) and (norm.bias != 0).all()
    assert (norm.running_mean != 0).all() and (norm.running_var >= 0.5).all() and (norm.running_var <= 1.5).all()


def test_a_picture_is_a_batch_in_range() -> None:
    image, source = third_party.picture(None, 48, batch=2)
    assert image.shape == (2, 3, 48, 48) and source
    assert image.min() >= 0 and image.max() <= 1 and not torch.equal(image[0], image[1])


def test_progress_writes_to_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    progress = report.Progress(3)
    progress.step("something")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_tables_align_and_cut_nothing() -> None:
    text = report.table([("a", 1.5), ("long name", 10)], ("name", "number"))
    assert text.splitlines() == ["name       number", "---------  ------", "a             1.5", "long name      10"]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=300,
    )  # fmt: skip


def test_importing_the_command_line_is_light() -> None:
    code = """
        import sys, torch
        before = set(sys.modules)
        import mvkernels.commands.cli
        heavy = {"matplotlib", "transformers", "timm", "triton", "sklearn", "PIL", "pytest"}
        print(sorted(heavy & (set(sys.modules) - before)))
    """
    assert python("-c", re.sub(r"^ +", "", code, flags=re.MULTILINE)).stdout.strip() == "[]"


def test_the_benchmark_restarts_itself_with_pages_kept() -> None:
    found = python(
        "-m", "mvkernels", "bench", "--json", "--shape", "8x8", "--backend", "reference", "--against", "eager",
        "--rounds", "1", "--no-memory", MALLOC_MMAP_MAX_="",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["machine"]["allocator"] == ("kept" if sys.platform == "linux" else "default")


def test_tuning_without_a_gpu_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("there is a GPU")
    status, _, err = run(["tune"], capsys)
    assert status == 2
    assert err.startswith("mvkernels tune: ") and err.count("\n") == 1


def test_the_makefile_has_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", text, re.MULTILINE))
    assert {"setup", "demo", "test", "bench", "docs", "lint", "audit", "gpu", "clean", "wheel"} <= targets
    for needs_setup in ("lint", "bench", "docs", "audit", "gpu"):
        assert re.search(rf"^{needs_setup}: setup$", text, re.MULTILINE)
    assert re.search(r"^test: lint$", text, re.MULTILINE)
    assert re.search(r"^demo: .*\$\(STAMP\),\$\(DEMO\)", text, re.MULTILINE)  # what it needs, if not all is there
    for script in re.findall(r"(?:benchmarks|examples)/\w+\.py", text):
        assert (ROOT / script).exists(), script


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text() and "set -e" in script.read_text()


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(["bench", "--plot", str(tmp_path / "a.xyz"), "--allocator", "default"], capsys)
    assert status == 2 and "want a name that ends in one of" in err and err.count("\n") == 1


def test_a_bad_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MVKERNELS_BACKEND", "bogus")
    status, _, err = run(["swap", "transformers:mobilevit_xxs", "--allocator", "default"], capsys)
    assert status == 2 and "MVKERNELS_BACKEND is 'bogus'" in err and err.count("\n") == 1


@pytest.mark.parametrize("started", [["/venv/bin/mvkernels"], ["-m", "mvkernels"], ["-X", "dev", "-m", "mvkernels"]])
def test_the_restart_is_the_start(monkeypatch: pytest.MonkeyPatch, started: list[str]) -> None:
    """ "-m" in place of the script would import a checkout in the working directory, not the installed package."""
    arguments = ["bench", "--rounds", "2"]
    monkeypatch.setattr(sys, "orig_argv", ["python", *started, *arguments])
    assert report.launched(arguments) == [*started, *arguments]
    assert report.launched(["info"]) == ["-m", "mvkernels", "info"]
