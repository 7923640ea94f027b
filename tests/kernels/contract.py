"""What every backend must do, as one class of tests; a backend is a subclass that names itself.

    class TestXla(AttentionContract):
        implementation = "xla"
        tilings = {"small": XlaConfig(...), ...}

A backend that cannot compute every case says which, and the reason that it will give, in `refusal`.
"""

import contextlib
import dataclasses
import re
import typing

import hypothesis
import jax
import numpy as np
import pytest

from s2jax import BlockSelection, attention
from tests.kernels import truth
from tests.kernels.cases import BY_NAME, Arrays, Case, Selected, arrays, parameters
from tests.kernels.plain import error, tolerances
from tests.kernels.random_cases import random_cases
from tests.kernels.truth import Results

POISON = (np.nan, np.inf, -np.inf)


def traced_forward(case: Case, implementation: str, config=None):
    """The forward pass of a case: query, key, value, sinks and the rest of `arguments(case, given)` -> out and lse."""

    def forward(query, key, value, sinks, rest):
        pattern, offset = case.pattern, rest.get("offset", case.offsets)
        if isinstance(pattern, Selected):
            sizes = pattern.block_size, pattern.query_block, pattern.causal
            pattern = BlockSelection(rest["kv_blocks"], rest["counts"], *sizes)
        return attention(
            query, key, value, pattern,
            scale=case.scale, query_offset=offset,
            query_segment_ids=rest.get("query_segment_ids"), kv_segment_ids=rest.get("kv_segment_ids"),
            logits_soft_cap=case.soft_cap, sinks=sinks, return_lse=True, implementation=implementation, config=config,
        )  # fmt: skip

    return forward


def traced(case: Case, implementation: str, config=None):
    """The computation of a case: `arguments(case, given)` -> out, lse and gradients."""
    forward = traced_forward(case, implementation, config)

    def forward_and_backward(query, key, value, sinks, rest, dout, dlse):
        results, pull = jax.vjp(lambda *inputs: forward(*inputs, rest), query, key, value, sinks)
        return *results, *pull((dout, dlse))

    return forward_and_backward


def arguments(case: Case, given: Arrays) -> tuple:
    names = ("query_segment_ids", "kv_segment_ids", "kv_blocks", "counts")
    rest = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if case.traced:
        rest["offset"] = np.asarray(case.offsets, np.int32)
    return given.query, given.key, given.value, given.sinks, rest, given.dout, given.dlse


def results(found) -> Results:
    return Results(*(None if array is None else np.asarray(array) for array in found))


def precision_of(case: Case):
    """float64 needs an option of jax's."""
    return jax.enable_x64(True) if case.dtype == "float64" else contextlib.nullcontext()


def poisoned(given: Arrays, mask: np.ndarray, num_kv_heads: int) -> Arrays:
    """NaN and Inf wherever no query reads."""
    dead = truth.unread(mask, num_kv_heads)[..., None]

    def poison(array):
        pattern = np.resize(np.asarray(POISON, array.dtype), array.shape[:2])[:, :, None, None]
        return np.where(dead, pattern, array)

    return Arrays(**{**vars(given), "key": poison(given.key), "value": poison(given.value)})


def assert_within(exact: Results, found: Results, allowed: dict[str, float]) -> None:
    far = {}
    for name, array in found.items():
        assert array.shape == getattr(exact, name).shape, name
        distance = error(getattr(exact, name), array)
        if not distance <= allowed[name]:
            far[name] = f"off by {distance:.3g}, allowed {allowed[name]:.3g}"
    assert not far, far


def assert_same_bits(first: Results, second: Results, what: str) -> None:
    different = [
        name for name, array in first.items() if array.tobytes() != np.asarray(getattr(second, name)).tobytes()
    ]
    assert not different, f"{what} changes {', '.join(different)}"


@pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")
@pytest.mark.usefixtures("strict_dtypes")
class AttentionContract:
    implementation: typing.ClassVar[str]
    tilings: typing.ClassVar[dict[str, typing.Any]] = {}
    random_share = 2  # one random case in so many that the profile asks for

    def refusal(self, case: Case) -> str | None:
        """The reason that the backend gives for what it cannot do."""
        return None

    def adapted(self, case: Case) -> Case:
        """The case in a form that the backend computes, where only a dtype is in the way."""
        return case

    def compiled(self, case: Case):
        """`function(*arguments)` of a case, compiled."""
        return jax.jit(traced(case, self.implementation, self.tilings.get(case.tiling)))

    def run(self, case: Case, given: Arrays) -> Results:
        return results(self.compiled(case)(*arguments(case, given)))

    def check(self, case: Case) -> None:
        """The results are right, what is unread reaches nothing, and empty rows are empty."""
        case = self.adapted(case)
        with precision_of(case):
            given = arrays(case)
            mask, function = truth.token_mask(case, given), self.compiled(case)
            reason = self.refusal(case)
            if reason is not None:
                with pytest.raises(NotImplementedError, match=re.escape(reason)):
                    function(*arguments(case, given))
                return
            found = results(function(*arguments(case, given)))
            assert found.out.dtype == case.dtype
            assert found.lse.dtype == ("float64" if case.dtype == "float64" else "float32")
            exact, allowed = tolerances(case, given, mask)
            assert_within(exact, found, allowed)
            again = results(function(*arguments(case, poisoned(given, mask, case.num_kv_heads))))
            assert_same_bits(found, again, "a NaN or Inf that no query reads")
            check_empty_rows(found, mask, given)

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("case", parameters())
    def test_case(self, case: Case):
        self.check(case)

    @pytest.mark.usefixtures("quick_compilation")
    def test_random_cases(self):
        """Any pattern, composition or selection, with any shape and any of the options."""
        profile = hypothesis.settings.default
        few = max(1, profile.max_examples // self.random_share)
        # Shrinking compiles for minutes: the case as it was drawn has to do.
        phases = set(profile.phases) - {hypothesis.Phase.shrink, hypothesis.Phase.explain}
        check = hypothesis.given(random_cases())(self.check)
        hypothesis.settings(max_examples=few, phases=phases)(check)()

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("blocks of 64", marks=pytest.mark.slow),
            "soft cap, low precision",
            pytest.param("an offset for each", marks=pytest.mark.slow),
        ],
    )
    def test_optimised(self, name: str):
        """What XLA's optimisations might spoil: twice compiled, the same bits; what is unread reaches nothing."""
        case = self.adapted(BY_NAME[name])
        given = arrays(case)
        mask = truth.token_mask(case, given)
        found = self.run(case, given)
        exact, allowed = tolerances(case, given, mask)
        assert_within(exact, found, allowed)
        jax.clear_caches()
        function = self.compiled(case)
        assert_same_bits(found, results(function(*arguments(case, given))), "compiling once more")
        assert_same_bits(found, results(function(*arguments(case, given))), "computing once more")
        again = results(function(*arguments(case, poisoned(given, mask, case.num_kv_heads))))
        assert_same_bits(found, again, "a NaN or Inf that no query reads")

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize(
        "case",
        parameters(
            "local stride both ways", "first tokens and a window", "t < s", "strangers", "an offset for each",
            "selection, long rows",
        ),
    )  # fmt: skip
    def test_gradients_show_the_pattern(self, case: Case):
        """∂out[i]/∂v[j] is not zero if and only if i reads j, forward and backward.

        With the identity for the values, out is the weights; with the identity for dout, so is dv, summed over a group.
        """
        features = max(case.query_length, case.kv_length)
        case = dataclasses.replace(case, value_features=features, dtype="float32")
        given, mask = arrays(case), truth.token_mask(case, arrays(case))
        eye = np.eye(features, dtype=np.float32)[:, None]
        given = dataclasses.replace(
            given,
            value=np.broadcast_to(eye[: case.kv_length], given.value.shape),
            dout=np.broadcast_to(eye[: case.query_length], given.dout.shape),
            dlse=np.zeros_like(given.dlse),
        )
        found = self.run(case, given)
        np.testing.assert_array_equal(found.out[..., : case.kv_length].swapaxes(1, 2) != 0, mask)
        by_group = mask.reshape(case.batch, case.num_kv_heads, case.group, *mask.shape[2:]).any(2)
        np.testing.assert_array_equal(found.dvalue[..., : case.query_length].transpose(0, 2, 3, 1) != 0, by_group)

    @pytest.mark.usefixtures("quick_compilation")
    def test_offsets_beyond_the_keys_and_nan_queries_give_nan(self):
        """Positions for which nothing was compiled, and what is no number: no number is better than a wrong one."""
        case = dataclasses.replace(self.adapted(BY_NAME["an offset for each"]), batch=3, offsets=(-1, 91, 57))
        given = arrays(case)
        query = given.query.copy()
        query[2, 7, 1] = np.nan
        found = self.run(case, dataclasses.replace(given, query=query))
        expected = np.zeros(found.lse.shape, bool)
        expected[:2], expected[2, 1, 7] = True, True
        np.testing.assert_array_equal(np.isnan(found.lse), expected)
        out = np.isnan(found.out.astype(np.float32)).swapaxes(1, 2)
        np.testing.assert_array_equal(out, np.broadcast_to(expected[..., None], out.shape))


def check_empty_rows(found: Results, mask: np.ndarray, given: Arrays) -> None:
    """A row that reads nothing is exactly zero, its lse the sink or -inf, and its gradient zero."""
    empty = ~mask.any(-1)
    lse = np.float32(-np.inf) if given.sinks is None else given.sinks[None, :, None]
    np.testing.assert_array_equal(found.lse[empty], np.broadcast_to(lse, empty.shape)[empty])
    for name, array in found.items():
        if name in ("out", "dquery"):
            assert not array.swapaxes(1, 2)[empty].any()
