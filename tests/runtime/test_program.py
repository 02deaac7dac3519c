"""Programs, their layout in memory, and their rewrites, without a model."""

import ctypes
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lockstep.ops import BACKENDS, backend
from lockstep.ops.elementwise.add import Add
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.ops.linear.linear import Linear
from lockstep.ops.recurrent.conv1d import Conv1d
from lockstep.ops.rewrite import fuse, lower
from lockstep.runtime.backend import Implementation, Layout, swapped
from lockstep.runtime.executor import Executor, aligned, lay_out
from lockstep.runtime.program import Program, Weight
from lockstep.runtime.step_block import STEP_WORDS, StepBlock
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore
from tests.ops.harness import Given
from tests.promise.faults import NATIVE

ROOT = pathlib.Path(__file__).parents[2]
ROWS = {"T": 5, "R": 2, "S": 3}


def chain(length=6):
    """a -> add -> add -> ...: each tensor is read by the next op only."""
    program = Program()
    x = program.emit(Given(out=program.tensor("x", "T", 16)))
    for i in range(length):
        x = add(program, f"x{i}", x, x)
    return program


def add(program, name, x, y):
    return program.emit(Add(out=program.tensor(name, "T", x.width), x=x, y=y, width=x.width))


def linear(program, name, x, weight):
    N, K = weight.shape
    sizes = dict(in_features=K, out_features=N, width=N, column=0)
    return program.emit(Linear(out=program.tensor(name, "T", N), x=x, weight=weight, **sizes))


def mlp(format="q8_0"):
    """norm, linear, silu_mul, linear, add: all that can be fused."""
    program, weight = Program(), lambda name, *shape: Weight(name, format, shape, ())
    tensor = lambda name: program.tensor(name, "T", 32)
    x = program.emit(Given(out=tensor("x")))
    norm = dict(weight=Weight("norm", "f32", (32,), ()), eps=1e-6, offset=0.0)
    h = program.emit(RmsNorm(out=tensor("h"), x=x, width=32, **norm))
    both = linear(program, "both", h, weight("up", 64, 32))
    act = program.emit(GatedMul(out=tensor("act"), x=both, width=32, activation="silu"))
    add(program, "out", x, linear(program, "y", act, weight("down", 32, 32)))
    return program


def live_ranges(program):
    last = {v: i for i, op in enumerate(program.ops) for v in (*op.outputs, *op.inputs)}
    first = {t: i for i, op in reversed(list(enumerate(program.ops))) for t in op.outputs}
    return {t: (first[t], last[t]) for t in first}


@pytest.mark.parametrize("keep_all", [False, True])
def test_tensors_that_live_at_once_never_share_memory(keep_all):
    program = chain()
    offsets, size = lay_out(program, ROWS, keep_all)
    ranges = live_ranges(program)
    for a in offsets:
        for b in offsets:
            live_at_once = ranges[a][0] <= ranges[b][1] and ranges[b][0] <= ranges[a][1]
            if a != b and (keep_all or live_at_once):
                assert abs(offsets[a] - offsets[b]) >= 4 * 16 * ROWS["T"], (a, b)
        assert offsets[a] % 64 == 0 and offsets[a] + 4 * 16 * ROWS["T"] <= size


def test_memory_of_dead_tensors_is_used_again():
    assert lay_out(chain(50), ROWS, False)[1] == lay_out(chain(2), ROWS, False)[1] < lay_out(chain(50), ROWS, True)[1]


def test_names_are_unique():
    program = Program()
    assert [program.tensor("x", "T", 1).name for _ in range(3)] == ["x", "x.2", "x.3"]


def test_lowering_prepares_rows_once():
    program = mlp()
    x = program.ops[1].outputs[0]
    linear(program, "again", x, Weight("other", "q4_0", (32, 32), ()))
    kinds = [op.kind for op in lower(program).ops]
    assert kinds.count("quantize_q8") == 2 and kinds[-1] == "linear_q4_0"
    assert [op.kind for op in lower(mlp("f32")).ops if op.kind.startswith(("quantize", "round"))] == []


def test_fusion_joins_what_the_backend_has_and_nothing_else():
    fused = [op.kind for op in fuse(lower(mlp()), BACKENDS["cpu"]).ops]
    assert fused == ["given", "rms_norm+quantize_q8", "linear_q8_0", "silu_mul+quantize_q8", "linear_q8_0"]
    assert [op.kind for op in fuse(lower(mlp()), BACKENDS["reference"]).ops] == [
        "given",
        "rms_norm",
        "quantize_q8",
        "linear_q8_0",
        "silu_mul",
        "quantize_q8",
        "linear_q8_0",
    ]


def test_a_tensor_that_somebody_else_reads_is_not_fused_away():
    program = mlp()
    y = program.ops[4].outputs[0]
    add(program, "reader", y, y)
    ops = fuse(lower(program), BACKENDS["cpu"]).ops
    assert [op.kind for op in ops][-2:] == ["add", "add"] and any(y in op.outputs for op in ops)


def test_a_residual_reads_what_was_added():
    program = mlp()
    op = fuse(lower(program), BACKENDS["cpu"]).ops[-1]
    assert (op.kind, op.residual.name, op.out.name) == ("linear_q8_0", "x", "out")


def test_a_residual_that_is_made_after_the_product_is_there_when_it_is_added():
    program = Program()
    h = program.emit(Given(out=program.tensor("h", "T", 32)))
    y = linear(program, "y", h, Weight("w", "f32", (32, 32), ()))
    add(program, "out", program.emit(Given(out=program.tensor("later", "T", 32))), y)
    ops = fuse(lower(program), BACKENDS["cpu"]).ops
    assert [op.kind for op in ops] == ["given", "given", "linear_f32"] and ops[-1].residual.name == "later"


def residual_of_a_product_with_one(program, h, b, weight):
    linear(program, "y", h, weight)
    program.ops[-1] = program.ops[-1].changed(residual=b)
    add(program, "out", b, program.ops[-1].out)


def product_of_what_is_written_again(program, h, b, weight):
    y = linear(program, "y", h, weight)
    program.emit(Add(out=h, x=b, y=b, width=32))
    add(program, "out", b, y)


def sum_in_place_of_what_was_multiplied(program, h, b, weight):
    program.emit(Add(out=h, x=b, y=linear(program, "y", h, weight), width=32))


def sum_in_place(program, h, b, weight):
    program.emit(Add(out=b, x=b, y=linear(program, "y", h, weight), width=32))


def product_of_two_parts(program, h, b, weight):
    sizes = dict(weight=Weight("half", "f32", (16, 32), ()), in_features=32, out_features=16, width=32)
    y = program.tensor("y", "T", 32)
    for column in (0, 16):
        program.emit(Linear(out=y, x=h, column=column, **sizes))
    add(program, "out", b, y)


@pytest.mark.parametrize(
    "record",
    [
        residual_of_a_product_with_one,
        product_of_what_is_written_again,
        sum_in_place_of_what_was_multiplied,
        sum_in_place,
        product_of_two_parts,
    ],
)
def test_a_sum_stays_where_joining_it_would_change_what_is_summed(record):
    program = Program()
    h, b = (program.emit(Given(out=program.tensor(name, "T", 32))) for name in "hb")
    record(program, h, b, Weight("w", "f32", (32, 32), ()))
    lowered = lower(program)
    assert fuse(lowered, BACKENDS["cpu"]).ops == lowered.ops


def test_rows_that_are_written_again_are_prepared_again():
    program = Program()
    h, b = (program.emit(Given(out=program.tensor(name, "T", 32))) for name in "hb")
    for name in ("one", "two"):
        linear(program, name, h, Weight(name, "q8_0", (32, 32), ()))
        program.emit(Add(out=h, x=b, y=b, width=32))
    first, second = [op for op in lower(program).ops if op.kind == "quantize_q8"]
    assert first.x == second.x == h and first.out != second.out


def test_a_norm_stays_where_its_rows_are_written_before_they_are_prepared():
    program = Program()
    x = program.emit(Given(out=program.tensor("x", "T", 32)))
    norm = dict(weight=Weight("norm", "f32", (32,), ()), eps=1e-6, offset=0.0)
    h = program.emit(RmsNorm(out=program.tensor("h", "T", 32), x=x, width=32, **norm))
    program.emit(Add(out=x, x=x, y=x, width=32))
    linear(program, "y", h, Weight("w", "q8_0", (32, 32), ()))
    kinds = [op.kind for op in fuse(lower(program), BACKENDS["cpu"]).ops]
    assert kinds == ["given", "rms_norm", "add", "quantize_q8", "linear_q8_0"]


def test_a_result_that_is_read_after_the_step_is_not_fused_away():
    program = mlp()
    program.results["act"] = program.ops[3].out
    program.results["y"] = program.ops[4].out
    kinds = [op.kind for op in fuse(lower(program), BACKENDS["cpu"]).ops]
    assert kinds[2:] == ["linear_q8_0", "silu_mul", "quantize_q8", "linear_q8_0", "add"]


def test_an_op_that_no_module_implements_is_named():
    table = {**BACKENDS["reference"], "given": BACKENDS["reference"]["add"]}
    message = r"op both f32\[T, 64\] = linear\(h, up\): the backend has no implementation of 'linear'; .*__init__.py"
    with pytest.raises(ValueError, match=message):
        Executor(mlp("f32"), table, None, WeightStore(), ROWS, {})


def test_no_two_modules_implement_one_kind():
    assert backend("REFERENCE", dict(elementwise="concat rms_norm")).keys() == {"concat", "rms_norm"}
    with pytest.raises(ValueError, match=r"ops/elementwise/add.py: REFERENCE has 'add', as another module's has"):
        backend("REFERENCE", dict(elementwise="add rms_norm add"))


def test_a_swap_with_an_unknown_backend_or_op_is_refused():
    table = BACKENDS["cpu"]
    assert swapped(table, {"add": "reference"}, BACKENDS)["add"] is BACKENDS["reference"]["add"]
    with pytest.raises(ValueError, match="no such backend; there are cpu"):
        swapped(table, {"add": "gpu"}, BACKENDS)
    with pytest.raises(ValueError, match="reference has no op nothing"):
        swapped(table, {"nothing": "reference"}, BACKENDS)


def test_aligned_memory_starts_on_a_cache_line():
    for size in (1, 63, 64, 1000):
        memory = aligned(size)
        assert memory.ctypes.data % 64 == 0 and len(memory) == size and not memory.any()


def test_a_weight_is_laid_out_once_for_each_layout():
    calls, store, weight = [], WeightStore(), Weight("w", "f32", (2, 2), ())
    layout = Layout("one", lambda w: calls.append(w) or (np.zeros((2, 2), np.float32),))
    assert store.arrays(weight, layout) is store.arrays(weight, layout) and len(calls) == 1
    store.arrays(weight, Layout("two", layout.make))
    assert len(calls) == 2


class Recorder:
    """A kernel that notes how it was called."""

    is_cached = True

    def __init__(self):
        self.calls = []
        self._native = NATIVE(lambda op, step, thread, num_threads: self.calls.append((thread, num_threads)))
        self.address = ctypes.cast(self._native, ctypes.c_void_p).value


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_thread_meets_every_op_in_order(num_threads):
    program, kernels = chain(3), [Recorder(), Recorder()]
    backend = {"given": Implementation(kernels[0]), "add": Implementation(kernels[1])}
    team = Team(num_threads)
    executor = Executor(program, backend, team, WeightStore(), ROWS, {})
    for _ in range(20):
        executor.run(np.zeros(STEP_WORDS, np.int64), clock := np.zeros(4, np.int64))
        assert (np.diff(clock) >= 0).all()
    team.close()
    assert len(kernels[0].calls) == 20 * num_threads and len(kernels[1].calls) == 60 * num_threads
    everybody = sorted((i, num_threads) for i in range(num_threads))
    calls = kernels[1].calls
    for at in range(0, len(calls), num_threads):
        assert sorted(calls[at : at + num_threads]) == everybody


def test_closing_a_team_twice_is_harmless():
    team = Team(3)
    team.close()
    team.close()


def test_a_closed_team_raises_instead_of_waiting_for_its_threads():
    team = Team(2)
    team.close()
    with pytest.raises(RuntimeError, match="closed"):
        team.run(0, 1, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_team_goes_on_in_a_forked_process():
    code = """if True:
        import os, signal
        from lockstep import LLM, SamplingParams
        llm = LLM(threads=2, max_context=64)
        answer = lambda: llm.generate(["import"], SamplingParams(max_tokens=3))[0].token_ids
        expected = answer()
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            os._exit(int(answer() != expected))
        assert os.waitpid(child, 0)[1] == 0
        assert answer() == expected
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, timeout=300)


def foreign(program):
    x = program.emit(Given(out=program.tensor("x", "T", 16)))
    sizes = dict(row_width=16, offset=0, channels=16, conv_width=4)
    taps, state = Weight("taps", "f32", (16, 4), ()), Program().cache("other", "state", "f32", (3, 16))
    program.emit(Conv1d(out=program.tensor("y", "T", 16), x=x, weight=taps, state=state, **sizes))


@pytest.mark.parametrize(
    "record, message",
    [
        (lambda p: add(p, "y", p.tensor("x", "T", 16), p.tensor("z", "T", 16)), "no op before it writes x f32.T, 16."),
        (lambda p: p.tensor("x", "Q", 16), r"tensor x: f32\[Q, 16\], expected one of f32, i32, .* rows of T, S, R"),
        (lambda p: p.tensor("x", 64, "T"), r"tensor x: f32\[64, 'T'\], expected"),
        (lambda p: p.tensor("x", "T", 16, "f64"), r"tensor x: f64\[T, 16\], expected one of f32"),
        (lambda p: p.cache("c", "stat", "f32", (4,)), "expected one of pages, state"),
        (lambda p: p.cache("c", "state", "f32", (-4, 1.5)), "a shape of positive integers"),
        (lambda p: [p.cache("c", "state", "f32", (n,)) for n in (4, 5)], "there is another cache of this name"),
        (lambda p: p.cache("c", "pages", "f32", (4,), -1), "expected a window of 0 or more for pages"),
        (
            lambda p: p.cache("c", "state", "f32", (4,), 9),
            "and none for others",
        ),
        (foreign, "other is no cache of this program"),
    ],
)
def test_invalid_tensors_and_caches_are_refused_while_recording(record, message):
    with pytest.raises(ValueError, match=message):
        record(Program())


def test_pages_of_one_window_are_a_group():
    program = Program()
    program.cache("state", "state", "f32", (4,))
    windows = (9, 9, 0, 70, 0, 9)
    caches = [program.cache(str(i), "pages", "f32", (4,), window) for i, window in enumerate(windows)]
    assert [cache.group for cache in caches] == [0, 0, 1, 2, 1, 0] and program.windows() == [9, 0, 70]
    assert program.rewritten([]).windows() == [9, 0, 70]


def test_a_step_of_more_rows_than_there_is_memory_for_is_refused():
    program, team = chain(2), Team(1)
    try:
        table = {**BACKENDS["cpu"], "given": BACKENDS["cpu"]["add"]}
        executor = Executor(program, table, team, WeightStore(), ROWS, {})
        with pytest.raises(ValueError, match="a step of 6 rows T, this executor was made for at most 5"):
            executor.run(StepBlock.made(num_tokens=6))
    finally:
        team.close()
