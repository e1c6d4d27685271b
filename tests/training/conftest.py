"""Small runs of the commands, called in this process."""

import pytest

import lam_kernels.__main__ as command

SMALL = "--width 16 --depth 1 --heads 2 --patch-size 2 --no-pictures --backend reference"


@pytest.fixture
def lam(capsys):
    """lam("train ...") -> (exit code, stdout, stderr)."""

    def call(line: str, *more) -> tuple[int, str, str]:
        code = command.main([*line.split(), *map(str, more)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def train(lam):
    def call(*options, variant="lam-fused"):
        return lam(f"train image-classification --variant {variant} {SMALL}", *options)

    return call


@pytest.fixture
def refused(capsys):
    """The one sentence of a command that ends with exit code 2."""

    def check(result, *parts):
        code, out, err = result
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("lam_kernels: "), err
        assert err.count("\n") == 1, err
        for part in parts:
            assert str(part) in err, (part, err)
        return err

    return check
