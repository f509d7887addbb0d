import signal

import pytest

from trainer.stop import Stopped, Stops


def test_a_signal_stops_at_once():
    with pytest.raises(Stopped) as caught:
        Stops()(signal.SIGTERM, None)
    assert caught.value.code == 143


def test_held_off_it_stops_when_the_work_is_done():
    stops, done = Stops(), []

    def work():
        with stops.held():
            with stops.held():
                stops(signal.SIGINT, None)
                done.append("inner")
            done.append("outer")

    with pytest.raises(Stopped) as caught:
        work()
    assert done == ["inner", "outer"]
    assert caught.value.code == 130


def test_what_went_wrong_meanwhile_is_told_first():
    stops = Stops()

    def work():
        with stops.held():
            stops(signal.SIGTERM, None)
            raise ValueError("the work")

    with pytest.raises(ValueError, match="the work"):
        work()


def test_without_a_signal_nothing_happens():
    with Stops().held():
        pass
