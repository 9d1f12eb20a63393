"""The line that another library's error gives to ours."""

from reprdpo.errors import first_line


def test_the_first_line_and_where_there_is_none_the_kind():
    assert first_line(ValueError("\n what was wrong \nand where")) == "what was wrong "
    assert first_line(OSError(" \n")) == "OSError"
