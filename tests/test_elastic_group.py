"""Who takes part in which exchange, decided without any process."""

import random

import pytest

from emaopt.elastic._group import Group


class Crowd:
    """Workers that do what the group tells them, when the test lets them."""

    def __init__(self, *workers):
        self.group = Group()
        self.told = {}  # by worker, what it has not read
        self.center = {}  # the fingerprint of each worker's center
        for worker in workers:
            self.arrive(worker)

    def arrive(self, worker, center=7, number=0):
        self.told[worker], self.center[worker] = [], center
        self.group.arrive(worker, ("host", worker), number)

    def begin(self):
        self._deliver(self.group.begin())

    def leave(self, worker):
        del self.told[worker]
        self._deliver(self.group.leave(worker))

    def offer(self, *workers, **changed):
        for worker in workers:
            message = {
                "weight": 1.0,
                "valid": True,
                "fingerprint": self.center[worker],
                "scales": [],
                "kind": "same",
                "leaves": ["w: float32(3,)"],
            }
            self._deliver(self.group.offer(worker, message | changed))

    def done(self, *workers, rounding=0):
        """They have computed the sum that their last plan tells."""
        for worker in workers:
            plan = [m for m in self.told[worker] if m["op"] == "plan"][-1]
            counted = hash((plan["number"], *plan["weights"])) % 1000 + 1000
            self.center[worker] = counted + rounding
            message = {"attempt": plan["attempt"], "fingerprint": self.center[worker]}
            self._deliver(self.group.done(worker, message))

    def read(self, worker):
        told, self.told[worker] = self.told[worker], []
        return told

    def last(self, *workers):
        """The kinds of the last messages to these workers."""
        return [self.told[w][-1]["op"] if self.told[w] else None for w in workers]

    def _deliver(self, outbox):
        for worker, message in outbox:
            self.told[worker].append(message)


def begun(*workers):
    crowd = Crowd(*workers)
    crowd.begin()
    crowd.offer(*workers)
    crowd.done(*workers)
    for worker in workers:
        assert crowd.read(worker)[-1] == {"op": "commit"}
    assert crowd.group.number == 1
    return crowd


def test_the_first_exchange_waits_for_all_that_were_there_at_the_beginning():
    crowd = Crowd(0, 1, 2)
    crowd.offer(0, 1)
    crowd.begin()
    assert crowd.last(0, 1) == [None, None]
    crowd.offer(2)
    assert crowd.last(0, 1, 2) == ["plan"] * 3
    plan = crowd.told[0][-1]
    assert plan["holders"] == [0, 1, 2] and plan["number"] == 1 and plan["is_first"]
    assert plan["addresses"]["1"] == ("host", 1)


def test_nothing_begins_before_the_group_does():
    crowd = Crowd(0)
    crowd.offer(0)
    assert crowd.last(0) == [None]
    crowd.begin()
    assert crowd.last(0) == ["plan"]


def test_an_exchange_happens_when_all_are_done():
    crowd = Crowd(0, 1)
    crowd.begin()
    crowd.offer(0, 1)
    crowd.done(0)
    assert crowd.last(0) == ["plan"]
    crowd.done(1)
    assert crowd.last(0, 1) == ["commit"] * 2


def test_a_death_lets_the_others_begin_anew():
    crowd = begun(0, 1, 2)
    crowd.offer(0, 1, 2)
    crowd.done(0)
    crowd.leave(1)
    assert crowd.last(0, 2) == ["plan"] * 2
    plan = crowd.told[0][-1]
    assert plan["weights"] == {"0": 1.0, "2": 1.0} and plan["attempt"] == 3
    # What was done in the attempt before says nothing now.
    crowd.group.done(0, {"attempt": 2, "fingerprint": 1})
    crowd.done(2)
    assert crowd.last(0, 2) == ["plan"] * 2
    crowd.done(0)
    assert crowd.last(0, 2) == ["commit"] * 2


def test_a_death_between_exchanges_lets_the_others_wait_no_longer():
    crowd = begun(0, 1)
    crowd.offer(0)
    assert crowd.last(0) == [None]
    crowd.leave(1)
    assert crowd.last(0) == ["plan"]


def test_a_newcomer_is_not_waited_for_and_has_no_weight_at_first():
    crowd = begun(0, 1)
    crowd.arrive(2, center=1)
    crowd.offer(0, 1)
    assert crowd.last(0, 1, 2) == ["plan", "plan", None]
    crowd.offer(2)  # in the middle of an exchange of others
    crowd.done(0, 1)
    assert crowd.last(2) == [None]
    crowd.offer(0, 1)
    plan = crowd.told[2][-1]
    assert plan["holders"] == [0, 1] and plan["weights"] == {"0": 1.0, "1": 1.0}
    assert sorted(plan["addresses"]) == ["0", "1", "2"]
    crowd.done(0, 1, 2)
    crowd.offer(0, 1)
    assert crowd.last(0) == ["commit"]  # now it is waited for
    crowd.offer(2)
    assert crowd.told[0][-1]["weights"] == {"0": 1.0, "1": 1.0, "2": 1.0}


def test_a_worker_that_comes_back_has_no_weight_even_with_the_same_center():
    crowd = begun(0, 1)
    center = crowd.center[1]
    crowd.leave(1)
    crowd.arrive(1, center)
    crowd.offer(1)
    crowd.offer(0)
    assert crowd.told[0][-1]["holders"] == [0]


def test_a_run_goes_on_with_the_number_of_its_first_worker():
    crowd = Crowd()
    for worker, number in ((1, 3), (0, 8), (2, 9)):
        crowd.arrive(worker, number=number)
    crowd.begin()
    crowd.offer(0, 1, 2)
    assert crowd.told[1][-1]["number"] == 9
    crowd.done(0, 1, 2)
    crowd.arrive(3, number=100)
    crowd.offer(0, 1, 2)
    assert crowd.told[0][-1]["number"] == 10


def test_a_run_begins_with_the_center_of_its_first_worker():
    crowd = Crowd(0, 1)
    crowd.arrive(2, center=8)
    crowd.begin()
    crowd.offer(2, 1, 0)
    assert crowd.told[2][-1]["holders"] == [0, 1]


@pytest.mark.parametrize(
    "changed, left_out", [({"valid": False}, [1]), ({"weight": 0.0}, [])]
)
def test_commits_that_do_not_count(changed, left_out):
    crowd = begun(0, 1)
    crowd.offer(0)
    crowd.offer(1, **changed)
    plan = crowd.told[0][-1]
    assert (plan["weights"], plan["left_out"]) == ({"0": 1.0}, left_out)
    assert not plan["is_first"]
    assert plan["holders"] == [0, 1]


def test_workers_that_round_differently_pull_the_first_ones_center():
    crowd = begun(0, 1, 2)
    crowd.offer(0, 1, 2)
    crowd.done(0, 2)
    crowd.done(1, rounding=1)
    assert crowd.told[1][-1] == {"op": "repair", "attempt": 2, "sources": [0, 2]}
    assert crowd.last(0, 2) == ["repair"] * 2
    crowd.done(1)
    assert crowd.last(0, 1, 2) == ["commit"] * 3
    crowd.offer(0, 1, 2)
    assert crowd.told[1][-1]["holders"] == [0, 1, 2]


def test_a_worker_that_still_differs_joins_the_next_time():
    crowd = begun(0, 1)
    crowd.offer(0, 1)
    crowd.done(0)
    crowd.done(1, rounding=1)
    crowd.done(1, rounding=2)
    assert crowd.last(0, 1) == ["commit"] * 2
    crowd.offer(1, 0)
    assert crowd.told[1][-1]["holders"] == [0]


def test_a_worker_that_still_differs_is_not_waited_for():
    crowd = begun(0, 1)
    crowd.offer(0, 1)
    crowd.done(0)
    crowd.done(1, rounding=1)
    crowd.done(1, rounding=2)
    crowd.offer(0)
    assert crowd.last(0) == ["plan"]


def test_a_death_in_a_repair():
    crowd = begun(0, 1, 2)
    crowd.offer(0, 1, 2)
    crowd.done(0, 2)
    crowd.done(1, rounding=1)
    crowd.leave(0)
    assert crowd.last(1, 2) == ["plan"] * 2
    crowd.done(1, 2)
    assert crowd.last(1, 2) == ["commit"] * 2


def test_who_exchanges_something_else_is_refused_and_the_others_go_on():
    crowd = begun(0, 1)
    crowd.offer(1, kind="other", leaves=["w: float32(3,)", "b: float32(4,)"])
    crowd.offer(0)
    (refused,) = crowd.told[1]
    assert refused["op"] == "refused"
    assert (
        "worker 1 exchanges b: float32(4,) where worker 0 has nothing more"
        in (refused["error"])
    )
    assert crowd.last(0) == ["plan"]
    assert crowd.told[0][-1]["holders"] == [0]


def test_the_last_that_has_the_center_may_come_back_with_it():
    crowd = begun(0, 1)
    center = crowd.center[0]
    crowd.leave(1)
    crowd.leave(0)
    crowd.arrive(0, center)
    crowd.arrive(1, center=8)
    crowd.offer(0, 1)
    plan = crowd.told[0][-1]
    assert (plan["holders"], plan["weights"]) == ([0], {"0": 1.0})


def test_a_newcomer_without_anybody_who_has_the_center_is_refused():
    crowd = begun(0, 1)
    crowd.arrive(2)
    crowd.offer(2)
    crowd.leave(0)
    crowd.leave(1)
    assert "no worker is left that has the group's center" in crowd.told[2][-1]["error"]


@pytest.mark.quick(20)
@pytest.mark.parametrize("seed", range(300))
def test_whatever_happens_exchanges_go_on_and_happen_for_all_or_none(seed):
    chance = random.Random(seed)
    num_workers = chance.choice([2, 3, 4, 6])
    crowd = Crowd(*range(num_workers))
    crowd.begin()
    group = crowd.group
    waits = dict.fromkeys(range(num_workers), False)  # in an exchange
    numbers, dead = dict.fromkeys(range(num_workers), 0), set()

    def settle(worker):
        """What a worker reads before it acts."""
        for message in crowd.read(worker):
            if message["op"] == "commit":
                assert waits[worker]
                waits[worker], numbers[worker] = False, plans[worker]["number"]
            elif message["op"] == "plan":
                plans[worker] = message
                assert waits[worker]
                assert set(message["weights"]) <= set(map(str, message["holders"]))
            elif message["op"] == "repair" and worker not in message["sources"]:
                plans[worker] = plans[worker] | {"done": False}

    plans = {}
    for step in range(200):
        last = step > 150  # then nobody dies any more, and all act
        for worker in range(num_workers):
            if worker in dead:
                if last or chance.random() < 0.2:
                    dead.discard(worker)
                    waits[worker], plans[worker] = False, {}
                    crowd.arrive(worker, center=-1)
                continue
            settle(worker)
            if not last and worker and chance.random() < 0.05:
                crowd.leave(worker)
                dead.add(worker)
                continue
            if not (last or chance.random() < 0.5):
                continue
            if not waits[worker]:
                waits[worker], plans[worker] = True, {}
                crowd.offer(worker)
            elif plans.get(worker) and not plans[worker].get("done"):
                plan = plans[worker]
                plans[worker] = plan | {"done": True}
                center = hash((plan["number"], *plan["weights"])) % 10**6
                crowd.center[worker] = center + (not last and chance.random() < 0.1)
                told = {"attempt": plan["attempt"], "fingerprint": crowd.center[worker]}
                crowd._deliver(group.done(worker, told))
        if step == 150:
            before = group.number
    assert group.number > before + 5
    there = [numbers[w] for w in range(num_workers)]
    assert max(there) - min(there) <= 1
