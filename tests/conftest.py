"""What the tests share: running a script in this process, and small data sets and runs."""
import io
import signal
import sys
from types import SimpleNamespace

import pytest

import data.prepare
import eval_brier
import train
from helpers import FOXES, SHORT

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def pytest_configure(config):
    # What Inductor imports, of torch's own, warns of itself.
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def own_signals():
    """What a script does with signals ends with the test."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(module, "--flag", value, ..., stdin=b"") -> its exit code, stdout, stderr."""

    def run(module, *argv, stdin=b""):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        capsys.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An empty folder in place of data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(data.prepare, "DATA_DIR", folder)
    return folder


@pytest.fixture
def foxes(data_dir, tmp_path):
    """A prepared data set: one sentence over and over -> its name."""
    text = tmp_path / "foxes.txt"
    text.write_text(FOXES)
    data.prepare.prepare([text], out_root=data_dir)
    return "foxes"


@pytest.fixture
def fit(run, foxes, monkeypatch):
    """fit(out_dir, "--flag", value, ..., code=0): a short run of train.py on foxes, which ends with
    that exit code. Its last evaluation is short, too."""
    evaluate = eval_brier.evaluate

    def evaluate_little(model, data, device, dtype, windows=16, *args, **kwargs):
        return evaluate(model, data, device, dtype, min(windows, 16), *args, **kwargs)

    def fit(out_dir, *flags, code=0):
        resumed = [] if "--resume" in flags else SHORT
        result = run(train, "--data", foxes, "--out_dir", out_dir, *resumed, *flags)
        assert result.code == code, result.err
        return result

    monkeypatch.setattr(eval_brier, "evaluate", evaluate_little)
    return fit


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a data set, foxes4, and a run of both models on it, out/. Only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "foxes.txt"
    text.write_text(FOXES)
    data.prepare.prepare([text], "foxes4", out_root=folder)
    for model, steps in (("calm", 40), ("ar", 15)):
        flags = [*SHORT, "--ae_max_steps", steps, "--max_steps", steps, "--model", model,
                 "--data", folder / "foxes4", "--out_dir", folder / "out"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
            train.main()
    return folder
