"""Each operator plants what it says, on a toy module; one that hits nothing, or more than it says, raises."""

import importlib
import sys

import pytest

from tests.faults import operators as op
from tests.faults.fault import Fault, Import

TOY = '''
"""A toy."""
import functools

SIZE: int = 8
log = []

def wait(name):
    log.append(name)

@functools.lru_cache
def scaled(x, *, factor=2):
    return x * factor

class Walk:
    def step(self, x, limit=3):
        wait("ready")
        wait("free")
        total = 1
        total += x
        if x < limit:
            return scaled(total, factor=limit)
        return [low <= SIZE for low in (total, x)]
'''


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """`planted(where, operator)` imports the toy with a fault; without arguments as it is."""
    folder = tmp_path / "toy" / "deep"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text(TOY)
    (folder / "other.py").write_text("def alone():\n    return 1\n\nclass Other:\n    def alone(self):\n        pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def run(where="SIZE", operator=None):
        for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        if operator is None:
            return importlib.import_module("toy.deep.module")
        fault = Fault("toy", f"toy:{where}", operator, "")
        with Import(*fault.plant(tmp_path)) as hook:
            module = importlib.import_module("toy.deep.module")
        assert hook.happened
        return module

    return run


STEP = {
    "drops_call": (op.drops_call("wait", about="free"), 2, 9, ["ready"]),
    "unwraps": (op.unwraps("scaled"), 2, 3, ["ready", "free"]),
    "passes by keyword": (op.passes("scaled", "factor", "10"), 2, 30, ["ready", "free"]),
    "passes by position": (op.passes("wait", 0, "7", hits=2), 2, 9, [7, 7]),
    "replaces": (op.replaces("(total, x)", "[total]"), 9, [False], ["ready", "free"]),
    "compares": (op.compares("<=", ">="), 9, [True, True], ["ready", "free"]),
    "drops_operand": (op.drops_operand("+", "x"), 2, 3, ["ready", "free"]),
    "decides": (op.decides(True, "limit"), 9, 30, ["ready", "free"]),
    "begins": (op.begins("x = 5"), 2, [True, True], ["ready", "free"]),
    "returns": (op.returns("[result, x]"), 2, [9, 2], ["ready", "free"]),
}


@pytest.mark.parametrize("name", STEP)
def test_operators_change_a_method(planted, name):
    operator, given, expected, log = STEP[name]
    sound, faulty = planted(), planted("Walk.step", operator)
    assert faulty.Walk().step(given) == expected
    assert faulty.log == log
    assert (sound.Walk().step(given), sound.log) != (expected, log)


def test_operators_change_other_definitions(planted):
    assert planted("SIZE", op.becomes("4")).SIZE == 4
    assert not hasattr(planted("scaled", op.drops_decorator("lru_cache")).scaled, "cache_info")
    assert planted("scaled", op.drops_operand("*", "factor")).scaled(3) == 3


@pytest.mark.parametrize(
    ("where", "operator", "message"),
    [
        ("Walk.step", op.drops_call("scaled"), "toy: .*Walk.step drops the call of `scaled`: hits 0 nodes, expected 1"),
        ("Walk.step", op.drops_call("wait"), "hits 2 nodes, expected 1"),
        ("Walk.step", op.drops_call("wait", about="full"), "in what mentions `full`: hits 0"),
        ("Walk.step", op.replaces("x+1", "x", hits=None), "hits 0 nodes, expected some"),
        ("Walk.step", op.passes("wait", 1, "7", hits=2), "hits 0"),
        ("Walk.step", op.compares(">", ">="), "hits 0"),
        ("Walk.step", op.becomes("4"), "a FunctionDef has no value"),
        ("Walk", op.begins("x = 1"), "a ClassDef has no arguments"),
        ("wait", op.returns("result"), "returns nothing"),
        ("Walk.step", op.returns("elsewhere + result"), r"the module has no \['elsewhere'\]"),
        ("Walk.turn", op.returns("result"), "0 definitions of Walk.turn in toy"),
        ("step", op.returns("result"), "0 definitions of step in toy"),
    ],
)
def test_what_hits_nothing_or_too_much_raises(planted, where, operator, message):
    with pytest.raises(ValueError, match=message):
        planted(where, operator)


def test_two_definitions_of_one_name_raise(planted, tmp_path):
    planted()
    (tmp_path / "toy" / "again.py").write_text("SIZE = 1")
    with pytest.raises(ValueError, match="2 definitions of SIZE in toy"):
        planted("SIZE", op.becomes("4"))


def test_a_fault_leaves_no_bytecode(planted):
    assert planted().SIZE == planted("SIZE", op.becomes("4")).SIZE + 4
    assert planted().SIZE == 8
