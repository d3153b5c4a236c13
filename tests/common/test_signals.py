"""Commands end cleanly on Ctrl-C and kill, leave ignored signals alone, and put handlers back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.signals import ENDING_SIGNALS, handled, uninterrupted

CAUGHT = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """What runs in the background ignores Ctrl-C. All handlers are put back after a test."""
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in CAUGHT:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_signal_interrupts_and_its_handler_comes_back(number, capsys):
    before = [signal.getsignal(other) for other in ENDING_SIGNALS]
    assert run_command("learn-masks", lambda: send(number)) == 130
    assert capsys.readouterr().err == "learn-masks: interrupted\n"
    assert [signal.getsignal(other) for other in ENDING_SIGNALS] == before


@pytest.mark.parametrize("error, code", [(InputError("bad"), 2), (OSError(28, "No space left"), 2), (None, 0)])
def test_handlers_come_back_however_a_command_ends(error, code):
    def body():
        assert all(callable(signal.getsignal(number)) for number in CAUGHT)
        if error is not None:
            raise error

    assert run_command("learn-masks", body) == code
    assert [signal.getsignal(number) for number in CAUGHT] == [signal.SIG_DFL] * 2
    with pytest.raises(ZeroDivisionError):
        run_command("learn-masks", lambda: 1 / 0)
    assert [signal.getsignal(number) for number in CAUGHT] == [signal.SIG_DFL] * 2


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_an_ignored_signal_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)

    def body():
        send(number)
        with uninterrupted():
            send(number)
        send(number)

    assert run_command("learn-masks", body) == 0
    assert signal.getsignal(number) == signal.SIG_IGN


def test_nohup_survives_a_closed_terminal():
    script = (
        "import os, signal, sys; from pruned_vllm.common.command import run_command\n"
        "sys.exit(run_command('x', lambda: os.kill(os.getpid(), signal.SIGHUP)))"
    )
    plain = subprocess.run([sys.executable, "-c", script], capture_output=True)
    nohup = subprocess.run(["nohup", sys.executable, "-c", script], capture_output=True, stdin=subprocess.DEVNULL)
    assert (plain.returncode, nohup.returncode) == (130, 0), nohup.stderr


def test_commands_run_in_threads():
    codes = []

    def body():
        with uninterrupted():
            raise InputError("bad")

    thread = threading.Thread(target=lambda: codes.append(run_command("learn-masks", body)))
    thread.start()
    thread.join()
    assert codes == [2]


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_clean_up_is_not_interrupted(number):
    done = []

    def body():
        try:
            send(signal.SIGINT)
        finally:
            with uninterrupted():
                send(number)
                done.append(True)

    assert run_command("learn-masks", body) == 130 and done


def test_a_handler_that_python_did_not_set_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: pytest.fail("replaced for good"))
    with handled(CAUGHT, signal.SIG_IGN):
        pass
