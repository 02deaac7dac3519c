"""Replicas that verify one another: who is asked, and who is taken out."""

from lockstep.receipts.verdict import TRUE, Verdict, false, unchecked
from lockstep.replicas.checks import Check, Checks

RIGHT, WRONG = Verdict(TRUE), false("token", 5, 6, "token 3 is not the model's", 3)


class Replica:
    """A replica as the checks see it."""

    def __init__(self, state="ready", streams=()):
        self.state, self.streams, self.verifying = state, streams, set()


def checks_of(maker):
    made = Checks(1.0)
    vars(made)["_waiting"].append(Check(None, maker))
    return made


def test_an_idle_replica_other_than_the_maker_is_asked():
    maker, busy, gone, idle = Replica(), Replica(streams=[1]), Replica(state="lost"), Replica()
    made = checks_of(maker)
    assert made.next([maker, busy, gone]) is None
    check, judge = made.next([maker, busy, gone, idle])
    assert check.maker is maker and judge is idle and made.next([idle]) is None


def test_a_third_replica_decides():
    maker, doubter, third = links = [Replica(), Replica(), Replica()]
    for verdict, wrong in ((WRONG, maker), (RIGHT, doubter)):
        made = checks_of(maker)
        check, judge = made.next([maker, doubter])
        assert judge is doubter and made.judged(check, judge, WRONG, links) is None
        again, judge = made.next(links)
        assert again is check and judge is third and made.judged(check, judge, verdict, links) is wrong
        assert made.num_wrong == 1 and made.num_checked == 2


def test_without_a_third_the_maker_is_taken_out():
    maker, _ = links = [Replica(), Replica()]
    made = checks_of(maker)
    check, judge = made.next(links)
    assert made.judged(check, judge, WRONG, links) is maker


def test_a_true_answer_and_one_that_cannot_be_checked_take_nobody_out():
    maker, judge = links = [Replica(), Replica()]
    made = checks_of(maker)
    check, _ = made.next(links)
    assert made.judged(check, judge, RIGHT, links) is None and made.num_checked == 1
    assert made.judged(check, judge, unchecked("engine", "no"), links) is None and made.num_checked == 1
