"""What the tests share: running a script's main() in this process, and a small data set."""
import io
import signal
import sys
from types import SimpleNamespace

import pytest

import data.prepare

HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; runs with -m slow only")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="runs with -m slow"))


@pytest.fixture
def run(monkeypatch, capsys):
    """run(module, "--flag", value, ..., stdin=b"") -> exit code, stdout, stderr of that script."""
    def run(module, *argv, stdin=b""):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        capsys.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)
    yield run
    for number, handler in HANDLERS.items():   # which train.py takes for itself
        signal.signal(number, handler)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An empty folder in place of data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(data.prepare, "DATA_DIR", folder)
    return folder


@pytest.fixture
def foxes(data_dir, tmp_path):
    """A prepared data set named `foxes`: one sentence over and over."""
    text = tmp_path / "foxes.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 800)
    data.prepare.prepare([text], out_root=data_dir)
    return "foxes"
