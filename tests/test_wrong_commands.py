"""Every option of the commands, given every kind of wrong text: status 2 and a line that says why.

The options are those of the parser, so that a new one is tried without being named here.
"""

import argparse

import pytest

from fused_sd.cli import build_parser, main
from fused_sd.credit import CreditMap

BASE = {
    "verify": ["--losses", "gkd", "--tokens", "4", "--hidden", "8", "--vocab", "40"],
    "bench": ["--losses", "gkd", "--tokens", "8", "--hidden", "8", "--vocab", "128", "--runs", "1"],
    "plan": ["--hidden", "64", "--vocab", "1000", "--tokens", "100"],
}
TEXTS = ("", "no-such", "1e", "\x00", "x" * 5000, "Zürich 🚲")
NUMBERS = {
    int: ("", "x", "1.5", "nan", "-7", "0", str(10**30)),
    float: ("", "x", "nan", "inf", "-1", "1e400", "0x10"),
}
# of options that name a file to be written
PATHS = ("", "\x00", "x" * 5000, ".", "/", "/dev", "no-such-folder/file")
FILES = {("credit", "--html"), ("credit", "--png"), ("verify", "--update")}
# what an option may be after all
LEGAL = {
    ("verify", "--seed"): {"-7", "0"},
    ("bench", "--seed"): {"-7", "0"},
}


def options():
    """Yield each command, with each of its options that takes a value."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for command, parser in commands.choices.items():
        for action in parser._actions:
            hidden = action.help == argparse.SUPPRESS  # an old name of another option
            if action.option_strings and action.nargs is None and not hidden:
                yield command, action.option_strings[0], action.type


def wrong_texts(command, option, kind):
    if (command, option) in FILES:
        return list(PATHS)
    legal = LEGAL.get((command, option), ())
    return [text for text in NUMBERS.get(kind, TEXTS) if text not in legal]


def fault(capsys, option, arguments):
    """Run a command that is to be refused; return what is wrong with the answer, or None."""
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse's way
        status = error.code
    except Exception as error:
        capsys.readouterr()
        return f"{type(error).__name__}: {error}"
    shown = capsys.readouterr()
    if status != 2 or shown.out:
        return f"accepted with status {status}"
    line = shown.err.strip().splitlines()[-1]
    if len(line) > 1200:
        return f"{len(line)} characters"
    name = option.strip("-").replace("-", "_")
    return None if name in line.replace("-", "_") else f"unnamed: {line}"


@pytest.mark.parametrize("command, option, kind", list(options()))
def test_a_wrong_text_is_answered_in_a_line(command, option, kind, capsys, tmp_path):
    given = BASE.get(command)
    if given is None:
        (tmp_path / "map.json").write_text(CreditMap((), "title").to_json(), encoding="utf-8")
        given = [str(tmp_path / "map.json")]
    found = {
        text[:20]: fault(capsys, option, [command, *given, f"{option}={text}"])
        for text in wrong_texts(command, option, kind)
    }
    assert {text: said for text, said in found.items() if said} == {}


def test_each_kind_of_mistake_is_there():
    assert sum(len(wrong_texts(*each)) for each in options()) >= 200
