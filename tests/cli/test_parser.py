"""What a mistyped option or value meets: one line with the nearest that exists, status 2, no page of usage."""

import argparse

import pytest

from reprdpo.cli import COMMANDS, main
from reprdpo.cli.arguments import add_fields, take_fields
from reprdpo.cli.parser import Parser
from reprdpo.errors import UserError
from reprdpo.training import ReprDPOConfig


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("train --modle x", "--modle: no such option; did you mean '--model'?"),  # and not: --model is required
        ("train --output-dir x", "--output-dir: no such option; did you mean '--output_dir'?"),
        ("train --weight_dacay=.1", "--weight_dacay: no such option; did you mean '--weight_decay'?"),
        ("experiment table1 --scales tiny", "--scales: no such option; did you mean '--scale'?"),
        ("sample --quux", "--quux: no such option;"),
        ("train --model", "argument --model: expected one argument;"),
        ("fit --limit x", "argument --limit: invalid int value: 'x';"),
        ("fit --C {", "argument --C: '{' is not a value;"),
        ("run", "the following arguments are required: config;"),
        ("run a.yaml b.yaml", "unrecognized arguments: b.yaml;"),
    ],
)
def test_a_mistyped_option_is_one_line(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = words.split()[0]
    assert main(words.split()) == 2
    told = capsys.readouterr()
    assert told.err == f"reprdpo {command}: {complaint} `reprdpo {command} --help` lists what there is\n"
    assert not told.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_what_it_does_not_have(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--jsno"]) == 2
    assert capsys.readouterr().err.startswith(f"reprdpo {command}: --jsno: no such option")


def test_values_that_look_like_options_and_shortened_options_are_taken() -> None:
    parser = Parser(prog="x")
    parser.add_argument("--offset", type=float)
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--off", "-1.5", "-2", "--", "--not_an_option"]) == argparse.Namespace(
        offset=-1.5, rest=["-2", "--not_an_option"]
    )


def test_text_is_not_read_as_yaml() -> None:
    parser = Parser(prog="x")
    add_fields(parser, ReprDPOConfig)
    words = "--output_dir 1 --save_strategy no --run_name 2024 --packing padded --beta 1e-1 --confidence_source fixed"
    config = take_fields(parser.parse_args([*words.split(), "--report_to", "[]"]), ReprDPOConfig)
    found = (config.output_dir, config.save_strategy, config.run_name, config.packing, config.beta, config.report_to)
    assert found == ("1", "no", "2024", "padded", 0.1, [])
    with pytest.raises(UserError, match="bf16: expected bool, got 'perhaps'"):
        take_fields(parser.parse_args(["--output_dir", "x", "--bf16", "perhaps"]), ReprDPOConfig)
