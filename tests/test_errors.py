"""The lines that errors are made of."""

from reprdpo.errors import did_you_mean, first_line


def test_the_first_line_and_where_there_is_none_the_kind():
    assert first_line(ValueError("\n what was wrong \nand where")) == "what was wrong "
    assert first_line(OSError(" \n")) == "OSError"


def test_the_nearest_name_and_nothing_where_none_is_near():
    assert did_you_mean("modle", ["model", "mode_of_travel"]) == "; did you mean 'model'?"
    assert did_you_mean("xyz", ["model"]) == ""
