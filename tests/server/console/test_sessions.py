"""Sessions end, are bounded, and their forms fit nobody else's."""

from server.console.sessions import Sessions


def test_a_session_ends_in_time() -> None:
    now = 0.0
    sessions = Sessions(lasts=10, clock=lambda: now)
    token = sessions.open("digest")
    now = 9.9
    assert sessions.digest(token) == "digest"
    now = 10.0
    assert sessions.digest(token) is None and sessions.digest("never given out") is None


def test_the_oldest_makes_room() -> None:
    sessions = Sessions(most=2)
    tokens = [sessions.open(str(number)) for number in range(3)]
    assert [sessions.digest(each) for each in tokens] == [None, "1", "2"]
    sessions.close(tokens[2])
    sessions.close("never given out")
    assert sessions.digest(tokens[2]) is None


def test_a_form_fits_one_token_of_one_process() -> None:
    sessions, others = Sessions(), Sessions()
    one, two = sessions.fresh(), sessions.fresh()
    assert one != two and sessions.fits(one, sessions.form_token(one))
    for token, form in ((two, sessions.form_token(one)), (one, others.form_token(one)), (one, ""), (one, "\ud800")):
        assert not sessions.fits(token, form)
    assert not sessions.fits("", sessions.form_token(""))
