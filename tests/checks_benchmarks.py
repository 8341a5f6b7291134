"""What the tests of several benchmarks share."""

from benchmarks.__main__ import main


def assert_bad_input(capsys, arguments, message=""):
    """`python -m benchmarks` with these ends with 2 and one line that says why."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
