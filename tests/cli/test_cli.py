"""Invariants of the command: readable help, exit codes, wrong arguments and errors in one line."""

import logging
import re
import warnings

import pytest

from evaluation_fixtures import tiny_model
from mipic_st.cli import COMMANDS, build_parser, main, options
from mipic_st.validation import default_dims


def test_help_lists_the_commands(capsys):
    """--help exits with 0 and names its commands."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in COMMANDS)


def test_without_a_command_the_help_is_shown(capsys):
    """On stderr, with the code of wrong usage, so that a script with an empty variable stops."""
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_an_example_that_parses(capsys, command, tmp_path, monkeypatch):
    """The first line of its docstring is in the list, the example is what the parser takes."""
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    examples = [line.split()[1:] for line in text.splitlines() if line.startswith("  mipic-st")]
    assert examples
    for words in examples:
        assert build_parser().parse_args(words).run


def test_commands_share_their_words():
    """An option has one kind of value in all commands, and a plural's singular is an option only where one is taken."""
    kinds = {}
    for command in next(action.choices for action in build_parser()._actions if action.choices).values():
        for action in command._actions:
            kinds.setdefault(action.option_strings[-1] if action.option_strings else "", set()).add(action.metavar)
    assert {name: found for name, found in kinds.items() if name and len(found) > 1} == {}
    assert {name for name in kinds if f"{name}s" in kinds} == {"--dim", "--precision"}


@pytest.mark.parametrize("given", [["8,16,32"], ["8", "16", "32"], ["8, 16", "32"], ["8,16,", "32"]])
def test_lists_take_commas_and_spaces(given):
    """For numbers and names; a comma in brackets is part of a name."""
    line = ["eval", "m", "--output", "out", "--dims", *given, "--precisions", "int8,binary"]
    args = build_parser().parse_args([*line, "--tasks", "STS13,MTEB(eng, v2)", "STS14"])
    assert args.dims == [8, 16, 32]
    assert args.precisions == ["int8", "binary"]
    assert args.tasks == ["STS13", "MTEB(eng, v2)", "STS14"]


@pytest.fixture
def no_model(monkeypatch):
    """A command that loads a model fails the test."""

    def load(*_):
        raise AssertionError("loaded a model")

    monkeypatch.setattr(options, "load_model", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "m", "--dims", "0"], "--dims: must be a whole number from 1 on, got '0'"),
        (["eval", "m", "--dims", "8", "x"], "--dims: must be a whole number from 1 on, got 'x'"),
        (["eval", "m", "--batch-size", "0"], "--batch-size: must be a whole number from 1 on, got '0'"),
        (["eval", "m", "--data-dir", "FILE"], "--data-dir: .* is a file; name a folder"),
        (["eval", "m", "--data-dir", "NONE"], "--data-dir: .* is not there; name a folder"),
        (["eval", "m", "--output", "FILE"], "--output: .* is a file; name a folder"),
        (["eval", "m", "--output", "FILE/deeper"], "--output: .*file' is a file; name a folder"),
        (["cut", "m", "--dim", "-1"], "--dim: must be a whole number from 1 on, got '-1'"),
        (["cut", "m", "--layer", "0"], "--layer: must be a whole number from 1 on, got '0'"),
        (["cut", "m", "--dim", "8", "--output", "FILE"], "--output: .* is a file; name a folder"),
        # an unset variable of a shell
        (["cut", "m", "--dim", "8", "--output", ""], "--output: is empty"),
        (["cut", "m", "--layer", "2", "--texts", ""], "--texts: is empty"),
        (["rotate", "m", "--pairs", " "], "--pairs: is empty"),
        (["rotate", "m", "--texts", ""], "--texts: is empty"),
        (["eval", "m", "--dims", "8,,16"], "--dims: must be a whole number from 1 on, got ''"),
        (["eval", "m", "--precisions", "int8,int3"], "--precisions: must be among float32, .*, got 'int3'"),
        (["rotate", "m", "--dataset", ""], "--dataset: is empty"),
        (["eval", "m", "--data-dir", ""], "--data-dir: is empty"),
        (["check", "m", "--url", ""], "--url: is empty"),
    ],
)
def test_bad_values_exit_with_2_before_loading(tmp_path, capsys, arguments, message):
    """Numbers out of range, and files for folders, are wrong usage."""
    (tmp_path / "file").write_text("x")
    places = {"FILE": tmp_path / "file", "FILE/deeper": tmp_path / "file" / "deeper", "NONE": tmp_path / "none"}
    needed = [] if arguments[0] == "check" else ["--output", str(tmp_path / "out")]
    needed += ["--tasks", "STS13"] if arguments[0] == "eval" else []
    command, model, *options = arguments
    assert main([command, model, *needed, *(str(places.get(option, option)) for option in options)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./no-such", "--tasks", "STS13"], "model './no-such' cannot be loaded: there is no such folder"),
        (["org/model", "a/b/c", "--tasks", "STS13"], "model 'a/b/c' cannot be loaded: there is no such folder"),
        (["FILE", "--tasks", "STS13"], "file' cannot be loaded: it is a file"),
        (["org/model", "--tasks", "NoSuchTask"], "'NoSuchTask' is neither"),
        (["org/model", "--tasks", "STS13", "--dims", "8", "8"], "--dims has duplicates"),
    ],
)
def test_what_cannot_work_is_said_before_loading(tmp_path, capsys, arguments, message):
    """Also of the second model, before hours went into the first."""
    (tmp_path / "file").write_text("x")
    arguments = [str(tmp_path / "file") if argument == "FILE" else argument for argument in arguments]
    assert main(["eval", *arguments, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "arguments",
    [
        ["rotate", "org/m", "--texts", "x.txt"],
        ["cut", "org/m", "--dim", "8"],
        ["export", "org/m", "--format", "tei"],
        ["eval", "org/m", "--tasks", "STS13"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_output_that_cannot_be_written_is_refused_before_loading(capsys, arguments):
    """Not after the work."""
    assert main([*arguments, "--output", "/proc/mipic-st/out"]) == 1
    assert "folder '/proc/mipic-st/out' cannot be written (" in capsys.readouterr().err


def failure(arguments, capsys):
    """The one line that a failing command leaves on stderr, progress bars and library warnings apart."""
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("mipic-st: ")
    assert printed.count("mipic-st: ") == 1
    return last


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny model, and the command that would cut it."""
    tiny_model(tmp_path).save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model", ["cut", tmp_path / "model", "--dim", "8", "--output", tmp_path / "cut"]


DAMAGE = {
    "weights": ("model.safetensors", b"x" * 100, "SafetensorError: Error while deserializing header"),
    "half of the weights": ("model.safetensors", None, "SafetensorError"),
    "config": ("config.json", b"{", "not a valid JSON file"),
    "architecture": ("config.json", b'{"model_type": "nonsense"}', "model type `nonsense`"),
    "module class": ("modules.json", b'[{"idx": 0, "name": "0", "path": "", "type": "no.Such"}]', "'no.Such'"),
    "no modules": ("modules.json", b"{}", "empty modules list"),
    "pooling": ("1_Pooling/config.json", b'{"nonsense": 1}', "unexpected keyword argument 'nonsense'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_models_are_named_in_one_line(saved, capsys, kind):
    """Whatever a broken file makes the libraries raise: which model, and what they said."""
    folder, command = saved
    name, content, message = DAMAGE[kind]
    content = (folder / name).read_bytes()[:2000] if content is None else content
    (folder / name).write_bytes(content)
    line = failure(command, capsys)
    assert f"model '{folder}' cannot be loaded as a folder: " in line
    assert message in line


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta", ""])
@pytest.mark.parametrize("command", ["cut", "eval"])
@pytest.mark.usefixtures("no_model")
def test_devices_that_are_not_there_are_refused_before_loading(tmp_path, capsys, command, device):
    """With the option's name and what torch says about it."""
    needed = ["--tasks", "STS13"] if command == "eval" else ["--dim", "8"]
    line = failure([command, "org/m", *needed, "--output", tmp_path / "out", "--device", device], capsys)
    assert f"--device {device!r} cannot be used here: " in line


@pytest.mark.parametrize("name", ["", "  "])
@pytest.mark.usefixtures("no_model")
def test_empty_model_names_are_refused(tmp_path, capsys, name):
    """An empty name is not the present folder."""
    for command in (["cut", name, "--dim", "8"], ["eval", "org/m", name, "--tasks", "STS13"]):
        assert "the name is empty" in failure([*command, "--output", tmp_path / "out"], capsys)


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError(), StopIteration(), RuntimeError("two\n  lines")])
def test_errors_that_nobody_foresaw_are_one_line_and_debug_shows_more(tmp_path, capsys, monkeypatch, error):
    """With its kind and the way to see more; ``--debug`` before or after the command shows where it happened."""

    def load(*_):
        raise error

    monkeypatch.setattr(options, "load_model", load)
    command = ["cut", "org/m", "--dim", "8", "--output", str(tmp_path / "out")]
    line = failure(command, capsys)
    if isinstance(error, RuntimeError):
        assert line == "mipic-st: two lines"
    else:
        assert line.startswith(f"mipic-st: {type(error).__name__}")
        assert "run again with --debug" in line
    for place in (0, 1, len(command)):
        assert main([*command[:place], "--debug", *command[place:]]) == 1
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("width", "dims"), [(100, [8, 16, 32, 64, 100]), (64, [8, 16, 32, 64]), (9, [8, 9]), (8, [8]), (1, [1])]
)
def test_default_dims_end_with_the_width(width, dims):
    """One list for every command and example, however wide the model."""
    assert default_dims(width) == dims
    assert default_dims(8192)[-2:] == [4096, 8192]


def test_other_libraries_warnings_stay_off_the_terminal(monkeypatch, capsys):
    """Of a command nobody has written them for; --debug shows them, and what was set is as before afterwards."""

    def run(args):
        warnings.warn("an old name of numpy's", DeprecationWarning, stacklevel=1)
        warnings.warn("a slow path", UserWarning, stacklevel=1)
        logging.getLogger("transformers.modeling_utils").warning("LOAD REPORT")
        logging.getLogger("mipic_st.transforms").warning("worse than truncation")

    monkeypatch.setattr("mipic_st.cli.tasks.run", run)
    level, filters = logging.getLogger("transformers").level, list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert main(["tasks"]) == 0
        assert not seen
        assert main(["tasks", "--debug"]) == 0
        assert len(seen) == 2
    assert logging.getLogger("transformers").level == level
    assert warnings.filters == filters
