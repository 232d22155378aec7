"""``python -m mvmodels.train`` and ``predict``: files, figures, and one line for whatever is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("PIL")

import mvkernels
from mvmodels import checkpoint, predict, registry, train, vit
from mvmodels.command import setting
from mvmodels.engine import Trainer
from mvmodels.vit import VisionTransformer
from tests.models import pictures


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    build = functools.partial(VisionTransformer, vit.Size(16, 1, 2, 2, ()), False, image_size=32)
    info = dataclasses.replace(registry.model_info("vit_p_1gf"), name="vit_tiny", build=build, input_size=32)
    monkeypatch.setitem(registry.MODELS, "vit_tiny", info)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures.folder(tmp_path_factory.mktemp("pictures"), 8)


def run(folder: Path, output: Path, *more: str) -> int:
    common = f"--model vit_tiny --data {folder} --output {output} --epochs 4 --batch-size 6 --lr 1e-2 --device cpu"
    return train.main([*common.split(), "--held-out", "0.25", "--workers", "0", "--no-tensorboard", *more])


@pytest.fixture
def trained(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "run", "--json") == 0
    capsys.readouterr()
    return tmp_path / "run"


def one_line_on_stderr(capsys, prog: str) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"python -m mvmodels.{prog}: ") and err.count("\n") == 1, (out, err)
    return err


class TestTrain:
    def test_figures_and_files(self, folder, tmp_path, capsys):
        output = tmp_path / "run"
        assert run(folder, output, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["model"] == "vit_tiny" and result["epochs"] == 4 and result["steps"] == 12
        assert [row["epoch"] for row in result["history"]] == [1, 2, 3, 4]
        assert result["loss"] == result["history"][-1]["loss"] and result["pictures"] == 18
        assert {"accuracy", "ema_accuracy", "best_accuracy", "parameters", "machine"} <= {*result}
        assert sorted(os.listdir(output)) == ["best.pt", "last.pt"]
        # The same seed gives the same figures, on the command line too; another does not.
        assert run(folder, tmp_path / "again", "--json") == 0
        again = json.loads(capsys.readouterr().out)
        assert [row["loss"] for row in again["history"]] == [row["loss"] for row in result["history"]]
        assert run(folder, tmp_path / "other", "--seed", "1") == 0
        assert "best accuracy" in capsys.readouterr().out
        assert checkpoint.read_training(tmp_path / "other" / "last.pt")["history"][-1]["loss"] != result["loss"]

    def test_a_finished_run(self, folder, trained, capsys):
        assert run(folder, trained) == 2
        assert "continue it with --resume" in one_line_on_stderr(capsys, "train")
        assert run(folder, trained, "--resume", "--json") == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["steps"] == 12 and "resumed at step 12 of 12" in err

    def test_settings_reach_model_and_loop(self, folder, tmp_path, capsys):
        more = "--multi-scale variable --scales 32 64 --size 32 --ema 0 --warmup 3 --clip 1 --amp --set drop_rate=0.5"
        assert run(folder, tmp_path, *more.split(), "--backend", "reference", "--json") == 0
        result = json.loads(capsys.readouterr().out)
        state = checkpoint.read_training(tmp_path / "last.pt")
        assert state["settings"] == {"in_chans": 3, "drop_rate": 0.5} and "ema_accuracy" not in result
        asked = {"multi_scale": "variable", "scales": [32, 64], "ema": 0.0, "warmup": 3, "clip": 1.0, "amp": True}
        assert {key: state["options"][key] for key in asked} == asked and result["backend"] == "reference"

    def test_every_set_counts(self, folder, tmp_path, capsys):
        more = "--epochs 1 --set drop_rate=0.5 --set drop_path_rate=0.1 backend=reference"
        assert run(folder, tmp_path, *more.split()) == 0
        wanted = {"in_chans": 3, "drop_rate": 0.5, "drop_path_rate": 0.1, "backend": "reference"}
        assert checkpoint.read_training(tmp_path / "best.pt")["settings"] == wanted

    @pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
    @pytest.mark.parametrize("room", [0, 20_000, 60_000])
    def test_a_full_disk(self, folder, tmp_path, capsys, room):
        """A limit on the size of files ends a write in the middle, as a full disk does."""
        resource = pytest.importorskip("resource")
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            assert run(folder, tmp_path / "run") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        told = one_line_on_stderr(capsys, "train")
        assert re.search(r"run/(\.lock|best\.pt|last\.pt) cannot be written: File too large", told)
        assert not [*(tmp_path / "run").glob(".*")]

    def test_a_folder_that_goes_meanwhile(self, folder, tmp_path, capsys, monkeypatch):
        def gone(self: Trainer) -> dict[str, float]:
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").touch()
            return {"accuracy": 0.5}

        monkeypatch.setattr(Trainer, "evaluate", gone)
        assert run(folder, tmp_path / "run") == 2
        assert "run/best.pt cannot be written: File exists" in one_line_on_stderr(capsys, "train")

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
    def test_a_second_training_in_one_folder_is_refused(self, folder, tmp_path, capsys):
        """The first one ends as if there had been no other, and one that was killed keeps nobody out."""
        output = tmp_path / "run"
        output.mkdir()
        (output / ".last.pt.0123abcd.part").touch()
        begun, end = multiprocessing.Event(), multiprocessing.Event()

        def hold() -> None:
            with checkpoint.claimed(output):
                begun.set()
                end.wait(60)

        first = multiprocessing.get_context("fork").Process(target=hold)
        first.start()
        assert begun.wait(60)
        for more in ((), ("--resume",)):
            assert run(folder, output, *more) == 2
            told = one_line_on_stderr(capsys, "train")
            assert f"{output} is the output of another training, process {first.pid} on " in told
        assert os.listdir(output) == [".lock"]
        first.kill()
        first.join(60)
        assert os.listdir(output) == [".lock"]  # as a killed process leaves it
        (output / ".best.pt.0123abcd.part").touch()
        assert run(folder, output) == 0
        assert sorted(os.listdir(output)) == ["best.pt", "last.pt"]

    def test_grey_pictures(self, folder, tmp_path, capsys):
        assert run(folder, tmp_path, "--set", "in_chans=1", "--json") == 0
        capsys.readouterr()
        state = checkpoint.read_training(tmp_path / "best.pt")
        assert state["channels"] == 1 and state["state_dict"]["stem.proj.weight"].shape[1] == 1
        assert predict.main([str(folder / "red" / "0.png"), "--checkpoint", str(tmp_path / "best.pt")]) == 0

    def test_tensorboard(self, folder, tmp_path, monkeypatch, capsys):
        def board(output: Path) -> str:
            common = f"--model vit_tiny --data {folder} --output {output} --epochs 1 --batch-size 6 --device cpu"
            assert train.main([*common.split(), "--workers", "0"]) == 0
            return capsys.readouterr().err

        with monkeypatch.context() as without:
            without.setitem(sys.modules, "torch.utils.tensorboard", None)
            assert board(tmp_path / "without").count("tensorboard is not installed") == 1
        pytest.importorskip("tensorboard")
        assert "tensorboard" not in board(tmp_path / "with")
        assert list((tmp_path / "with" / "tensorboard").glob("events.out.tfevents.*"))

    @pytest.mark.parametrize(
        "arguments, match",
        [
            ("--model vit_tinny", "unknown model 'vit_tinny', did you mean vit_tiny"),
            ("--model vit_tiny --data nowhere", "nowhere is not a folder"),
            ("--model vit_tiny --data empty", "empty has no classes"),
            ("--model vit_tiny --data digits --backend fastest", "backend is 'fastest', want one of"),
            ("--model vit_tiny --data digits --device abacus", "--device abacus cannot be used"),
            ("--model vit_tiny --data digits --set depth=3", "depth"),
            ("--model vit_tiny --data digits --set image_size=0", "image_size is 0"),
            ("--model vit_tiny --data digits --backend cuda --epochs 1 --no-tensorboard", "cuda"),
            ("--model vit_tiny --multi-scale variable --scales 64 32", "minimum is 64, above the maximum of 32"),
            ("--model vit_tiny --data digits --set in_chans=3", "in_chans is 3, the pictures of digits are grey"),
            ("--model vit_tiny --data one --set in_chans=4", "in_chans is 4, the pictures of one are grey (1) or"),
            ("--model vit_tiny --data one", "one has only one class, train"),
            ("--model vit_tiny --data digits --device meta", "--device meta cannot be used"),
            ("--model vit_tiny --data digits --output one/file", "one/file cannot be made: File exists"),
            ("--model vit_tiny --data digits --output one/file/below", "below cannot be made: Not a directory"),
        ],
    )
    def test_what_cannot_be_done(self, tmp_path, monkeypatch, capsys, arguments, match):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        for i in range(2):
            pictures.write(tmp_path / "one" / "train" / f"{i}.png", (9, 9, 9), i)
        (tmp_path / "one" / "file").touch()
        assert train.main(["--device", "cpu", *arguments.split()]) == 2
        assert match in one_line_on_stderr(capsys, "train")
        assert not list(tmp_path.rglob("*.pt"))

    def test_a_picture_that_cannot_be_read(self, tmp_path, capsys):
        root = pictures.folder(tmp_path / "pictures", 4)
        for file in (root / "red").iterdir():
            file.write_text("no picture")
        assert run(root, tmp_path / "run") == 2
        assert "cannot be read: no picture that pillow knows" in one_line_on_stderr(capsys, "train")

    def test_a_file_of_another_model(self, folder, trained, capsys):
        state = checkpoint.read_training(trained / "last.pt")
        state["state_dict"] = {name: value[:1] for name, value in state["state_dict"].items()}
        checkpoint.save(state, trained / "last.pt")
        assert run(folder, trained, "--resume") == 2
        assert "the weights do not fit" in one_line_on_stderr(capsys, "train")
        (trained / "best.pt").replace(trained / "last.pt")
        assert run(folder, trained, "--resume") == 2
        assert "has a model, but no training to resume: it has no options" in one_line_on_stderr(capsys, "train")
        (trained / "last.pt").write_bytes(b"no checkpoint")
        assert run(folder, trained, "--resume") == 2
        assert "is not a checkpoint" in one_line_on_stderr(capsys, "train")

    @pytest.mark.parametrize(
        "arguments", ["", "--model vit_tiny --epochs 0", "--model vit_tiny --smoothing 1", "--model vit_tiny --set x"]
    )
    def test_bad_usage(self, capsys, arguments):
        with pytest.raises(SystemExit) as caught:
            train.main(arguments.split())
        assert caught.value.code == 2
        one_line_on_stderr(capsys, "train")


@pytest.mark.parametrize("text, value", [("a=0.1", 0.1), ("a=(1, 2)", (1, 2)), ("a=mean", "mean"), ("a=True", True)])
def test_setting(text, value):
    assert setting(text) == ("a", value)


class TestPredict:
    def test_answers(self, folder, trained, capsys):
        files = [str(folder / name / "0.png") for name in pictures.COLOURS]
        assert predict.main([*files, "--checkpoint", str(trained / "best.pt"), "--crop", "1", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["model"] == "vit_tiny" and [found["image"] for found in result["images"]] == files
        for found, name in zip(result["images"], pictures.COLOURS):
            assert found["classes"][0]["name"] == name and len(found["classes"]) == 3
            shares = [c["probability"] for c in found["classes"]]
            assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-4)
        assert predict.main([files[0], "--checkpoint", str(trained / "last.pt"), "--top-k", "1"]) == 0
        assert capsys.readouterr().out.count("%") == 1

    def test_it_runs_on_packed_weights_or_not_with_the_same_answers(self, folder, trained, capsys):
        common = [str(folder / "red" / "0.png"), "--checkpoint", str(trained / "best.pt"), "--json"]
        answers = []
        for more, calls in ([], 1), (["--original"], 0):
            with mock.patch.object(mvkernels, "swap", wraps=mvkernels.swap) as swap:
                assert predict.main([*common, *more]) == 0
            assert swap.call_count == calls
            answers.append(json.loads(capsys.readouterr().out)["images"][0]["classes"])
        swapped, plain = answers
        assert [c["name"] for c in swapped] == [c["name"] for c in plain]
        shares = [[c["probability"] for c in answer] for answer in answers]
        assert shares[0] == pytest.approx(shares[1], abs=1e-5)

    def test_a_state_dict(self, folder, trained, tmp_path, capsys):
        state = checkpoint.read_training(trained / "best.pt")
        torch.save(state["state_dict"], tmp_path / "weights.pt")
        (tmp_path / "names.txt").write_text("\n".join(state["classes"]) + "\n")
        common = [str(folder / "red" / "0.png"), "--checkpoint", str(tmp_path / "weights.pt"), "--json"]
        named = ["--model", "vit_tiny", "--classes", str(tmp_path / "names.txt")]
        assert predict.main([*common, *named]) == 0
        found = json.loads(capsys.readouterr().out)["images"]
        assert predict.main([*common[:2], str(trained / "best.pt"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["images"] == found
        # Mean and deviation of another training.
        assert predict.main([*common, *named, "--mean", "0.4", "0.5", "0.6", "--std", "0.2", "0.2", "0.2"]) == 0
        assert json.loads(capsys.readouterr().out)["images"] != found
        assert predict.main(common) == 2
        assert "has no name of its model" in one_line_on_stderr(capsys, "predict")
        assert predict.main([*common, "--model", "vit_tiny"]) == 2
        assert "the weights do not fit: head.weight is (3, 16), want (1000, 16)" in one_line_on_stderr(
            capsys, "predict"
        )

    @pytest.mark.parametrize("what", ["text", "missing"])
    def test_no_picture_has_an_answer_if_one_is_bad(self, folder, trained, tmp_path, capsys, what):
        bad = tmp_path / "bad.png"
        if what == "text":
            bad.write_text("no picture")
        good = str(folder / "red" / "0.png")
        assert predict.main([good, str(bad), "--checkpoint", str(trained / "best.pt")]) == 2
        assert f"{bad} cannot be read" in one_line_on_stderr(capsys, "predict")

    @pytest.mark.parametrize(
        "arguments, match",
        [
            ("--model vit_tinny", "did you mean vit_tiny"),
            ("--model irregular_vit_tiny", "is a vit_tiny, but --model is irregular_vit_tiny"),
            ("--backend fastest", "backend is 'fastest'"),
            ("--checkpoint nowhere.pt", "nowhere.pt cannot be read: No such file"),
            ("--classes nowhere.txt", "nowhere.txt cannot be read"),
            ("--source timm", "already has these settings: --source is for a state_dict"),
            ("--set drop_rate=0.1", "--set is for a state_dict"),
            ("--mean 0 0 0", "--mean is for a state_dict"),
            ("--device meta", "--device meta cannot be used"),
        ],
    )
    def test_what_cannot_be_done(self, folder, trained, capsys, arguments, match):
        common = [str(folder / "red" / "0.png"), "--checkpoint", str(trained / "best.pt")]
        assert predict.main([*common, *arguments.split()]) == 2
        assert match in one_line_on_stderr(capsys, "predict")

    @pytest.mark.parametrize("name", ["model", "settings", "classes", "size", "channels", "state_dict"])
    def test_a_checkpoint_that_lacks_something(self, folder, trained, capsys, name):
        state = checkpoint.read_training(trained / "best.pt")
        common = [str(folder / "red" / "0.png"), "--checkpoint", str(trained / "best.pt")]
        for changed, match in (({}, f"it has no {name}"), ({name: None}, f"its {name} is a NoneType")):
            checkpoint.save({**{k: v for k, v in state.items() if k != name}, **changed}, trained / "best.pt")
            assert predict.main(common) == 2
            assert f"is not a valid checkpoint of mvmodels.train: {match}" in one_line_on_stderr(capsys, "predict")

    def test_weights_that_are_no_numbers(self, folder, trained, capsys):
        state = checkpoint.read_training(trained / "best.pt")
        state["state_dict"]["head.bias"].fill_(torch.nan)
        checkpoint.save(state, trained / "best.pt")
        assert predict.main([str(folder / "red" / "0.png"), "--checkpoint", str(trained / "best.pt")]) == 2
        assert "numbers that are not finite" in one_line_on_stderr(capsys, "predict")

    def test_names_of_any_text(self, folder, trained, tmp_path, capsys):
        (tmp_path / "names.txt").write_bytes("\ufeffrød\r\na\u2028b\r\nc\r\n".encode())
        common = [str(folder / "red" / "0.png"), "--checkpoint", str(trained / "best.pt"), "--json"]
        assert predict.main([*common, "--classes", str(tmp_path / "names.txt")]) == 0
        found = json.loads(capsys.readouterr().out)["images"][0]["classes"]
        assert {c["name"] for c in found} == {"rød", "a\u2028b", "c"}

    @pytest.mark.parametrize("arguments", ["--crop 1.005", "--mean nan 0 0", "--mean inf 0 0", "--std 1 1 0"])
    def test_bad_usage(self, capsys, arguments):
        with pytest.raises(SystemExit) as caught:
            predict.main(["a.png", "--checkpoint", "a.pt", *arguments.split()])
        assert caught.value.code == 2
        one_line_on_stderr(capsys, "predict")


def _rank(rank: int, port: int, arguments: list[str], folder: Path, output: Path, said: Path) -> None:
    """What torchrun starts, in a fork: it has this process's models and needs no import of torch."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with said.open("w") as file, contextlib.redirect_stdout(file):
        status = run(folder, output, "--json", *arguments)
    os._exit(status)


def on_two(folder: Path, output: Path, said: Path, *arguments: str) -> list[str]:
    """Run on two processes; what each of them printed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    files = [said.with_suffix(f".{rank}") for rank in range(2)]
    context = torch.multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, port, [*arguments], folder, output, files[rank])) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [file.read_text() for file in files]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes_train_as_one(folder, tmp_path, capsys):
    """Half a batch on each of two ranks is a batch: the same losses; rank 0 alone writes and prints."""
    assert run(folder, tmp_path / "alone", "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    said = on_two(folder, tmp_path / "both", tmp_path / "said", "--batch-size", "3", "--save-every", "2")
    both = json.loads(said[0])
    assert said[1] == "" and both["ranks"] == 2 and both["steps"] == alone["steps"]
    assert [row["loss"] for row in both["history"]] == pytest.approx(
        [row["loss"] for row in alone["history"]], rel=1e-4
    )
    assert both["held_out"] == alone["held_out"] and both["accuracy"] == alone["accuracy"]
    # Ranks that resume together are where they were.
    again = on_two(folder, tmp_path / "both", tmp_path / "said", "--batch-size", "3", "--resume")
    assert json.loads(again[0])["history"] == both["history"]
    assert run(folder, tmp_path / "both", "--batch-size", "3", "--resume") == 2
    assert "is of a run with ranks 2, but here ranks is 1" in one_line_on_stderr(capsys, "train")
