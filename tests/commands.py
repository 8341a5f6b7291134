"""The command `vsod` in this process, and what it promises of bad input."""

import pytest

from vsod_models import cli


def vsod(capsys, *arguments):
    """(exit code, stdout, stderr) of `vsod ...`."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    return (stop.value.code or 0, *capsys.readouterr())


def refused(result, *words):
    """One line on stderr, exit code 2, with these words in it."""
    code, _, err = result
    assert code == 2, result
    assert err.startswith("vsod: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err
    return err
