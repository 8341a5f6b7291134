"""The pages that people read: their links lead somewhere, and README's lines run as they stand."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]

PICTURES = [p for p in sorted(ROOT.glob("docs/*")) if p.suffix in (".jpg", ".png", ".svg")]


def anchors(page):
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_each_picture_is_shown_and_can_be_drawn_again(picture):
    assert any(picture.name in page.read_text() for page in PAGES)
    drawn_by = [*ROOT.glob("docs/*.py"), *ROOT.glob("**/recipes/*.sh")]
    series = picture.stem.rpartition("-")[0] + "-{"  # f"serve-try-{name}.jpg"
    code = "\n".join(path.read_text() for path in drawn_by)
    assert picture.name in code or picture.stem in code or series in code


def command(name):
    """The lines between the mark of a command in the README and the end of its block."""
    return re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README.read_text(), re.S)[1]


def test_the_front_page_is_short():
    assert len(README.read_text().splitlines()) <= 110


def test_each_command_sets_itself_up():
    for name in ("example", "tests", "benchmark"):
        (line,) = command(name).splitlines()
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -e '.[")


def test_the_tests_have_every_extra():
    """A test that skips for want of a package is not run."""
    project = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", project, re.S)[1]
    extras = set(re.findall(r"^([\w-]+) = ", section, re.M))
    installed = re.search(r"'\.\[([\w,-]+)\]'", command("tests"))[1]
    assert set(installed.split(",")) == extras
    page = (ROOT / "docs" / "install.md").read_text()
    assert (
        set(re.findall(r"^\| `([\w-]+)` \| (?!\d)", page.split("| variable |")[0], re.M)) == extras
    )


def test_the_map_names_what_is_there():
    """Every path in CONTRIBUTING.md, and every room of its tree."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(
        r"`((?:vsod_ops|vsod_models|csrc|tests|docs|recipes|benchmarks)/[^`\s]+)`", page
    )
    top = ""
    for line in re.search(r"```\n(vsod_ops/.*?)```", page, re.S)[1].splitlines():
        indent, names = re.match(r"( *)((?:\S+  ?)*)", line).groups()
        if len(indent) == 0:
            top = names.split()[0]
            paths.append(top)
        elif len(indent) == 2:
            paths += [top + name for name in names.split() if name.endswith(("/", ".py"))]
    assert len(paths) > 40
    for path in paths:
        assert any(ROOT.glob(path.rstrip("/"))), path


def test_the_tables_of_the_reproduction_are_those_of_its_results():
    script = runpy.run_path(str(ROOT / "docs" / "reproduction.py"))
    results, page = script["RESULTS"], (ROOT / "docs" / "reproduction.md").read_text()
    for name, (first, rows) in script["TABLES"].items():
        assert all((results / f"{file}.json").is_file() for _, file in rows), name
        filled = script["table"](first, rows, results)
        assert f"<!-- table:{name}:begin -->\n\n{filled}\n\n<!-- table:{name}:end -->" in page


def test_the_scores_are_those_of_their_results():
    script = runpy.run_path(str(ROOT / "docs" / "scores.py"))
    page = (ROOT / "docs" / "scores.md").read_text()
    for protocol in script["PROTOCOLS"]:
        filled = script["table"](protocol, script["RESULTS"])
        assert (
            f"<!-- table:{protocol}:begin -->\n\n{filled}\n\n<!-- table:{protocol}:end -->" in page
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_that_are_there(page):
    """By their paths, or the ends of these."""
    folders = ("benchmarks", "csrc", "docs", "recipes", "tests", "vsod_models", "vsod_ops")
    there = [f"/{path}" for folder in folders for path in (ROOT / folder).rglob("*.*")]
    there += [f"/{path}" for path in ROOT.glob("*.*")]
    text = page.read_text()
    there += [f"/{name}" for name in re.findall(r"<!-- example: (\S+) -->", text)]  # it makes these
    for named in re.findall(r"`([\w./-]+\.(?:py|h|cpp|cu|sh))[ :`]", text):
        assert any(path.endswith(f"/{named}") for path in there), named


def lines_of_vsod():
    """Every `vsod ...` of the pages' blocks, continued lines joined, comments dropped."""
    found = {}
    for page in PAGES:
        for block in re.findall(r"^```.*?\n(.*?)^```", page.read_text(), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                for step in re.findall(r"(?:^|&&)\s*(?:\S*/)?vsod (.*?)(?=&&|$)", line):
                    found[f"{page.name}: {step}"[:90]] = shlex.split(step, comments=True)
    return [pytest.param(arguments, id=name) for name, arguments in found.items()]


@pytest.mark.parametrize("arguments", lines_of_vsod())
def test_each_line_of_vsod_is_one_that_it_takes(arguments):
    """By the command's own parser; of `vsod train` the recipe and its changes, too."""
    typer = pytest.importorskip("typer", reason="the extra `models` is not installed")
    from vsod_models import cli
    from vsod_models.training.recipe import read_config

    command, name, rest, context = typer.main.get_command(cli.app), "vsod", arguments, None
    while hasattr(command, "commands"):  # a group
        context = command.make_context(name, list(rest), parent=context)
        words = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, words)
    given = command.make_context(name, list(rest), parent=context).params
    if name == "train" and arguments[0] == "train":
        read_config(given["config"], given["overrides"] or [])


def test_commits_are_linted_as_in_ci():
    """By the same programs, in the same versions."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    in_ci = set(re.findall(r"'([\w-]+~=[\d.]+)'", (ROOT / ".ci" / "run").read_text()))
    assert set(re.findall(r'"([\w-]+~=[\d.]+)"', hooks)) == in_ci


def test_the_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="the extra `models` is not installed")
    from clips import decode, sound_samples

    from vsod_models import cli

    monkeypatch.chdir(tmp_path)
    steps = [shlex.split(step) for step in command("example").split("&&")]
    commands = [arguments for program, *arguments in steps if program == ".venv/bin/vsod"]
    assert [arguments[0] for arguments in commands] == ["example", "predict"]
    for arguments in commands:
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 0
    made, tinted = (Path(name) for name in (commands[0][1], commands[1][-1]))
    assert len(decode(made)[0]) == len(decode(tinted)[0]) == 75
    assert abs(sound_samples(tinted)).max() > 0.01


def test_the_operators_run():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["out"].shape == (1, 4, 16, 64, 64)
    assert names["refined"].shape == names["prob"].shape
