"""Work in the order that its needs allow; deaths of workers are in test_experiments.py."""

from concurrent.futures import ThreadPoolExecutor

from distruction.experiments import workers


def test_jobs_start_after_what_they_need_and_never_after_what_failed():
    needs = {"d": ["b", "c"], "a": [], "b": ["a"], "c": ["a"], "e": ["f"], "f": [], "g": ["e", "a"]}
    ended, started = {}, []

    def work(name):
        if name == "f":
            raise ValueError(name)
        return name.upper()

    with ThreadPoolExecutor(8) as pool:

        def start(name):
            assert all(ended[need] == need.upper() for need in needs[name])
            assert len(started) - len(ended) < 2
            started.append(name)
            return pool.submit(work, name)

        for name, future in workers.done(needs, start, 2):
            ended[name] = future.exception() or future.result()
    assert sorted(started) == ["a", "b", "c", "d", "f"]
    assert isinstance(ended.pop("f"), ValueError)
    assert ended == {name: name.upper() for name in "abcd"}
