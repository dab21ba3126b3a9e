"""What the tests share: running a script in this process, and small data sets and runs."""
import shutil
import sys
from types import SimpleNamespace

import pytest

import data.prepare
import train
from helpers import FOXES, SHORT


def call(module, argv):
    """Run a script's main() -> what it ended with: None, or one line of text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        try:
            module.main()
        except SystemExit as end:
            return end.code


@pytest.fixture
def run(capsys):
    """run(module, "--flag", value, ...) -> the line that it ended with (or None), its stdout."""

    def run(module, *argv):
        capsys.readouterr()
        error = call(module, argv)
        return SimpleNamespace(error=error, out=capsys.readouterr().out)

    return run


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An empty folder in place of data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(data.prepare, "DATA_DIR", folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a data set, foxes, and a run of all models on it, out/. Only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "foxes.txt").write_text(FOXES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.prepare, "DATA_DIR", folder)
        data.prepare.prepare([str(folder / "foxes.txt")])
    run = [*SHORT, "--data", folder / "foxes", "--out_dir", folder / "out"]
    muon = ["--optimizer", "muon", "--lr", 0.01, "--decay_frac", 0.5, "--eval_interval", 60]
    for flags in (["--model", "autoencoder", "--n_embd", 128, "--max_steps", 120, *muon],
                  ["--max_steps", 120, *muon], ["--model", "ar"]):
        assert call(train, [*run, *flags]) is None
    return folder


@pytest.fixture
def fit(run, trained):
    """fit(out_dir, "--flag", value, ...): a short run of train.py on foxes, with the autoencoder of
    `trained`, which must end well -> its stdout."""

    def fit(out_dir, *flags):
        out_dir.mkdir(exist_ok=True)
        if "--resume" not in flags and "autoencoder" not in flags:
            shutil.copy(trained / "out" / "autoencoder.pt", out_dir)
        settings = [] if "--resume" in flags else SHORT
        result = run(train, "--data", trained / "foxes", "--out_dir", out_dir, *settings, *flags)
        assert result.error is None, result.error
        return result.out

    return fit
