"""What belongs to the identity of a function that is a pattern: all that its code reads."""

import functools
import types

import jax
import numpy as np
import pytest

from s2jax import MaskMod, compile_schedule

DOCUMENTS = np.arange(60) // 13
SHAPE = {"num_heads": 1, "num_kv_heads": 1, "query_length": 60, "kv_length": 60}


class Rule:
    """What a function may reach through `self`: data, a helper, and what it calls."""

    width = 5

    def __init__(self, ids: np.ndarray):
        self.ids, self.options = ids, types.SimpleNamespace(step=1)

    def helper(self, query, key):
        return query - key < self.width * self.options.step

    def reads(self, head, query, key):
        return self.helper(query, key) & (self.ids[query] == self.ids[key])

    def __call__(self, head, query, key):
        return self.reads(head, query, key)


@pytest.mark.parametrize("of", [lambda rule: rule.reads, lambda rule: rule, lambda rule: lambda *at: rule.reads(*at)])
def test_what_a_method_reads_of_its_object_is_part_of_the_function(of):
    rule = Rule(DOCUMENTS)
    patterns = [MaskMod(of(rule), 16)]
    for change in (
        lambda: setattr(rule, "ids", DOCUMENTS + 1),
        lambda: rule.ids.fill(0),
        lambda: setattr(rule.options, "step", 2),
        lambda: setattr(rule, "width", 3),
    ):
        change()
        patterns.append(MaskMod(of(rule), 16))
    assert len(set(patterns)) == 5
    assert compile_schedule(patterns[-1], **SHAPE).token_mask()[0, 50].sum() == 6
    assert MaskMod(of(rule), 16) == patterns[-1]


@pytest.mark.parametrize("owner", [Rule, types.ModuleType("settings")])
def test_what_code_names_of_classes_and_modules_is_part_of_the_function(owner, monkeypatch):
    monkeypatch.setattr(owner, "width", 5, raising=False)
    before = MaskMod(lambda head, query, key: query - key < owner.width, 16)
    monkeypatch.setattr(owner, "width", 9)
    assert before != MaskMod(before.mask_mod, 16)


class Turned:
    def __init__(self, inner, turned: bool):
        functools.update_wrapper(self, inner)
        self.inner, self.turned = inner, turned

    def __call__(self, head, query, key):
        found = self.inner(head, query, key)
        return ~found if self.turned else found


def test_wrappers_of_one_function_are_not_confused():
    def even(head, query, key):
        return (query - key) % 2 == 0

    assert MaskMod(Turned(even, False)) != MaskMod(Turned(even, True))
    assert MaskMod(jax.jit(even)) == MaskMod(jax.jit(even))


def test_a_pattern_whose_function_has_changed_is_refused_though_compiled_before():
    window = [5]
    pattern = MaskMod(lambda head, query, key: query - key < window[0], 16)
    compile_schedule(pattern, **SHAPE)
    window[0] = 9
    with pytest.raises(ValueError, match="what its function captures has changed"):
        compile_schedule(pattern, **SHAPE)
