"""What every command does with a problem."""

from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError


def test_a_message_holds_nothing_that_a_terminal_obeys(capsys):
    def refuse():
        raise InputError("a.pt, \x1b]0;title\x07 ä:", ["\u202etxt", "two\rlines", "\ud800"])

    def fail():
        raise OSError(2, "No such file", "\x1b[2J")

    assert run_command("read", refuse) == 2
    expected = ["read: a.pt, \\x1b]0;title\\x07 ä:", "  - \\u202etxt", "  - two\\rlines", "  - \\ud800"]
    assert capsys.readouterr().err.splitlines() == expected
    assert run_command("read", fail) == 2
    assert capsys.readouterr().err == "read: No such file: \\x1b[2J\n"
