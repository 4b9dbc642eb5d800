"""The selective scan: its plain form against golden numbers, its CPU form and kernels against the plain form.

The kernels run on a GPU if there is one. Else one test starts this file again under Triton's interpreter, which
runs the same source on the CPU; the tests named `test_kernels_...` take part in that.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import selective_scan as scan
from kernels import selective_scan_cpu
from kernels.dispatch import HAS_TRITON, interpreting, working_type
from kernels.selective_scan import selective_scan, selective_scan_plain
from tests.helpers import REFERENCE

ROOT = Path(__file__).parent.parent
GOLDEN = sorted((REFERENCE / "diffusionpose").glob("golden_scan_*.npz"))
SHORT = [path for path in GOLDEN if np.load(path)["grad_out"].shape[2] < 40]    # for the slow interpreter
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of norms
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
SLOW = [] if torch.cuda.is_available() else [pytest.mark.slow]      # marks of what is seconds in Triton's interpreter


def make(batch=2, E=5, L=13, N=4, B=0, C=0, without=(), dtype=torch.float64, device="cpu", shift=-1.0) -> dict:
    """Random arguments. B, C: number of groups, 0 for one matrix per sequence, None for a constant one."""
    random = torch.Generator().manual_seed(L + 100 * E)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def matrix(groups):
        return normal(E, N) if groups is None else normal(batch, *([groups] if groups else []), N, L)

    x = dict(u=normal(batch, E, L), delta=normal(batch, E, L), A=-normal(E, N).exp(), B=matrix(B), C=matrix(C),
             D=normal(E), z=normal(batch, E, L), delta_bias=normal(E) + shift)
    wide = working_type(dtype)                                                  # A, D, bias are parameters
    types = {name: wide if name in ("A", "D", "delta_bias") else dtype for name in NAMES}
    return {name: x[name].to(device, types[name]).requires_grad_() for name in NAMES if name not in without}


def results(form, x: dict, softplus: bool = True) -> dict:
    """out, last_state, and the gradient of every argument for a fixed gradient of out."""
    out, last = form(**x, delta_softplus=softplus, return_last_state=True)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad.to(out.device, out.dtype))
    return dict(out=out.detach(), last_state=last.detach()) | {"d" + name: t.grad for name, t in x.items()}


def assert_equal_forms(x: dict, softplus: bool = True, form=selective_scan):
    """The form equals the plain one in float64 on the same numbers: results, every gradient, types, shapes."""
    exact = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    ours, plain = results(form, x, softplus), results(selective_scan_plain, exact, softplus)
    for name, want in plain.items():
        got, source = ours[name], x.get(name[1:], x["u"])
        kind = working_type(source.dtype) if name == "last_state" else source.dtype
        assert got.shape == want.shape and got.dtype == kind
        wrong = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
        assert wrong < TOLERANCE[x["u"].dtype], f"{name}: relative error {wrong:.1e}"


CASES = [dict(L=1), dict(L=2, N=1), dict(L=5, N=5), dict(L=6, N=16), dict(L=7, E=1), dict(L=12, E=33, batch=1),
         dict(L=19, N=64), dict(B=1, C=1), dict(E=6, B=3, C=2), dict(E=4, B=2, C=0), dict(E=6, B=2, C=None),
         dict(B=None, C=None), dict(B=None), dict(without=("D",)), dict(without=("z",)), dict(without=("delta_bias",)),
         dict(without=("D", "z", "delta_bias"))]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()))

# ----------------------------------------------------------------------------- golden numbers


def golden(path: Path, dtype: torch.dtype, device: str) -> tuple[dict, bool, torch.Tensor, dict]:
    """Arguments, delta_softplus, gradient of out, and what should come of them."""
    file = np.load(path)
    x = {name: file["in_" + name] for name in NAMES if "in_" + name in file}
    x = {name: torch.tensor(t, dtype=dtype, device=device, requires_grad=True) for name, t in x.items()}
    names = ("out", "last_state", *("d" + name for name in x))
    want = {name: torch.tensor(file[name], device=device) for name in names}
    grad = torch.tensor(file["grad_out"], dtype=dtype, device=device)
    return x, json.loads(str(file["meta"]))["delta_softplus"], grad, want


def assert_golden(form, path: Path, dtype: torch.dtype, tolerance: float, device: str = "cpu"):
    x, softplus, grad, want = golden(path, dtype, device)
    out, last = form(**x, delta_softplus=softplus, return_last_state=True)
    out.backward(grad)
    got = dict(out=out, last_state=last) | {"d" + name: t.grad for name, t in x.items()}
    for name in want:
        wrong, largest = (got[name].detach().double() - want[name]).abs().max(), want[name].abs().max()
        assert wrong <= tolerance * largest, f"{name}: wrong by {wrong:.1e}, the largest entry is {largest:.1e}"


@pytest.mark.parametrize("form", [selective_scan_plain, selective_scan], ids=["plain", "cpu"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_forward_last_state_and_every_gradient_equal_the_golden_numbers(path, form):
    assert_golden(form, path, torch.float64, 1e-9)


def test_a_golden_case_of_one_step_where_A_has_no_gradient_can_be_checked(tmp_path):
    x = make(L=1)
    stored = {"in_" + name: t.detach() for name, t in x.items()} | results(selective_scan_plain, x)
    grad = torch.randn(x["u"].shape, generator=torch.Generator().manual_seed(1))            # as in `results`
    assert not stored["dA"].any()
    meta = json.dumps(dict(delta_softplus=True))
    np.savez(tmp_path / "golden_scan_one.npz", meta=meta, grad_out=grad, **stored)
    assert_golden(selective_scan, tmp_path / "golden_scan_one.npz", torch.float64, 1e-9)


def test_there_are_golden_numbers():
    assert GOLDEN, f"no golden_scan_*.npz in {REFERENCE / 'diffusionpose'}"

# ----------------------------------------------------------------------------- the CPU form


@cases
def test_the_cpu_form_equals_plain_form(case):
    assert_equal_forms(make(**case))


@pytest.mark.parametrize("L", [207, 209])
def test_the_cpu_form_equals_plain_form_at_real_lengths(L):
    assert_equal_forms(make(batch=1, E=3, L=L, N=16, shift=-4.0))


@pytest.mark.parametrize("block", [1, 8, 20, 40])
def test_the_cpu_form_does_not_depend_on_how_channels_and_sequences_are_cut(monkeypatch, block):
    monkeypatch.setattr(selective_scan_cpu, "BLOCK", block)         # 4 states: down to one channel of a sequence
    assert_equal_forms(make(batch=3, E=10, L=8, B=2, C=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_form_keeps_the_precision_of_the_type(dtype):
    assert_equal_forms(make(batch=2, E=8, L=40, N=16, dtype=dtype, shift=-2.0))


def test_types_may_differ_between_arguments():
    x = make(dtype=torch.bfloat16)
    x["delta"], x["z"] = (x[name].detach().float().requires_grad_() for name in ("delta", "z"))
    assert_equal_forms(x)


@pytest.mark.parametrize("shift", [30.0, -30.0])
def test_step_sizes_far_into_both_tails_of_softplus(shift):
    x = make(shift=shift)
    x["A"] = (x["A"].detach() * 1e-2).requires_grad_()
    assert_equal_forms(x)


def test_fast_decay_forgets_everything_but_the_last_step_without_nan():
    x = make(dtype=torch.float32, shift=50.0, without=("z", "D"))
    x["A"] = x["A"].detach().clamp(max=-10.0).requires_grad_()
    assert_equal_forms(x)
    d = nn.functional.softplus(x["delta"] + x["delta_bias"][:, None])
    only_last = torch.einsum("be,bn,bn->be", (d * x["u"])[..., -1], x["B"][..., -1], x["C"][..., -1])
    torch.testing.assert_close(selective_scan(**x, delta_softplus=True)[..., -1], only_last)


def test_step_size_zero_keeps_the_state():
    x = make(L=9, without=("delta_bias",))
    x["delta"].data[..., 4:] = 0
    _, state = selective_scan(**x, return_last_state=True)
    first = {name: t[..., :4] if t.shape[-1] == 9 else t for name, t in x.items()}
    _, earlier = selective_scan(**first, return_last_state=True)
    assert torch.equal(state, earlier)


def test_gradcheck_in_float64():
    for case in (dict(B=0, C=0), dict(E=4, B=2, C=None), dict(E=4, B=None, C=4, without=("D", "z", "delta_bias"))):
        x = make(batch=1, L=8, N=2, **{"E": 2, **case})

        def form(*tensors):
            return selective_scan(**dict(zip(x, tensors)), delta_softplus=True)

        assert torch.autograd.gradcheck(form, tuple(x.values()))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_one_argument_alone(name):
    x, alone = make(L=7), make(L=7)
    for other in set(NAMES) - {name}:
        alone[other].requires_grad_(False)
    selective_scan(**x).sum().backward()
    selective_scan(**alone).sum().backward()
    assert torch.equal(x[name].grad, alone[name].grad)
    assert all(alone[other].grad is None for other in set(NAMES) - {name})


def strided(x: dict) -> dict:
    """The shapes of x, other numbers, other strides: time last but channels adjacent, parts of larger tensors."""
    views = {name: t.detach().mT.contiguous().mT if t.ndim > 1 else t.detach() for name, t in x.items()}
    views["u"] = torch.cat([views["u"], views["u"] + 1], 1)[:, :x["u"].shape[1]]
    views["delta"] = torch.stack([views["delta"], views["z"]], -1)[..., 0]
    views["B"] = torch.cat([x["C"].detach(), x["B"].detach()], 1)[:, 4:]
    views["D"] = torch.stack([x["delta_bias"].detach(), x["D"].detach()], 1)[:, 1]
    return {name: t.requires_grad_() for name, t in views.items()}


def test_any_strides_are_read_right_and_out_is_channels_last():
    x = strided(make(batch=2, E=6, L=8))
    assert_equal_forms(x)
    assert selective_scan(**x).mT.is_contiguous()


def test_expanded_gradients_are_read_right():
    x, y = make(L=8), make(L=8)
    selective_scan(**x).sum().backward()                             # the gradient has strides 0
    selective_scan(**y).backward(torch.ones(2, 5, 8, dtype=torch.float64))
    assert torch.equal(x["u"].grad, y["u"].grad) and torch.equal(x["B"].grad, y["B"].grad)


@pytest.mark.parametrize("empty", [dict(L=0), dict(batch=0)], ids=["no steps", "no sequences"])
def test_nothing_in_nothing_out(empty):
    x = make(**empty)
    out, last = selective_scan(**x, return_last_state=True)
    assert out.shape == x["u"].shape and torch.equal(last, torch.zeros(len(x["u"]), 5, 4, dtype=torch.float64))
    out.sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in x.values())


WRONG = {"u .*should be .B, E, L.": dict(u=torch.zeros(5, 13)),
         "A .*with the same E": dict(A=torch.zeros(6, 4)),
         "delta is .2, 5, 12., with u .2, 5, 13.": dict(delta=torch.zeros(2, 5, 12)),
         "z is .2, 5, 1.": dict(z=torch.zeros(2, 5, 1)),
         "D is .4,.": dict(D=torch.zeros(4)),
         "delta_bias is .1,.": dict(delta_bias=torch.zeros(1)),
         "B is .2, 13, 4.": dict(B=torch.zeros(2, 13, 4)),
         "C is .2, 2, 4, 13.": dict(C=torch.zeros(2, 2, 4, 13)),
         "A has type torch.complex64": dict(A=torch.zeros(5, 4, dtype=torch.complex64)),
         "u has type torch.int64": dict(u=torch.zeros(2, 5, 13, dtype=torch.int64)),
         "D is on meta, u on cpu": dict(D=torch.zeros(5, device="meta"))}


@pytest.mark.parametrize("message", WRONG)
def test_inputs_that_do_not_fit_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(make() | WRONG[message]))


def test_the_last_state_has_no_gradient_in_any_form():
    for form in (selective_scan, selective_scan_plain):
        out, last = form(**make(), return_last_state=True)
        assert out.requires_grad and not last.requires_grad


@cases
def test_the_plain_word_gives_the_values_and_gradients_of_the_default_form(case, monkeypatch):
    calls = []
    monkeypatch.setattr(scan, "selective_scan_plain", lambda *x: calls.append(x) or selective_scan_plain(*x))
    default = results(selective_scan, make(**case))
    assert not calls
    monkeypatch.setenv("POSE_KERNELS", "plain")
    plain = results(selective_scan, make(**case))
    assert len(calls) == 1
    for name, want in default.items():
        assert (plain[name] - want).norm() <= 1e-11 * want.norm(), name


def test_second_derivative_says_that_there_is_none():
    x = make(L=3)
    grad, = torch.autograd.grad(selective_scan(**x).sum(), x["u"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use selective_scan_plain"):
        grad.sum().backward()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_the_cpu_form_makes_nothing_larger_than_the_kept_states():
    x = [t.detach() for t in make(batch=2, E=48, L=900, N=16, dtype=torch.float32).values()]
    with torch.no_grad(), Largest() as inference:
        scan.forward_cpu(*x, True, False)
    with torch.no_grad(), Largest() as training:
        out, _, states = scan.forward_cpu(*x, True, True)
        scan.backward_cpu(out, *x, states, True)
    assert states.numel() == 2 * 48 * 900 * 16 / scan.CHUNK
    assert training.numbers <= states.numel()
    assert inference.numbers <= max(2 * 48 * 900, 2 * selective_scan_cpu.BLOCK * selective_scan_cpu.STRETCH)

# ----------------------------------------------------------------------------- the operator among PyTorch's tools


class Layer(nn.Module):
    """Linear layers around a scan, as in a Mamba block."""

    def __init__(self, dim=8, N=4):
        super().__init__()
        self.into, self.matrices, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, 2 * N), nn.Linear(dim, dim)
        self.A, self.D = nn.Parameter(-torch.rand(dim, N)), nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        u, z, delta = self.into(x).transpose(1, 2).chunk(3, 1)
        B, C = self.matrices(x).transpose(1, 2).chunk(2, 1)
        return self.out(selective_scan(u, delta, self.A, B, C, self.D, z, self.bias, True).transpose(1, 2))


def test_autocast_gives_bfloat16_outside_and_float32_inside():
    x = {name: t.detach() for name, t in make(dtype=torch.bfloat16, L=30).items()}
    want = selective_scan(**x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(**x), want)                # no product inside was rounded to bfloat16
        out = Layer()(torch.randn(2, 9, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()


def test_compiled_in_one_graph_equals_eager():
    layer, x = Layer(), torch.randn(2, 9, 8)
    want = layer(x)
    want.sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    out.sum().backward()
    torch.testing.assert_close(out, want)
    torch.testing.assert_close([p.grad for p in layer.parameters()], grads)


@pytest.mark.parametrize("case", [dict(), dict(E=4, B=2, C=None, without=("D", "z", "delta_bias"))], ids=["all", "few"])
def test_operators_pass_opcheck(case):
    x = [make(dtype=torch.float32, **case).get(name) for name in NAMES]
    torch.library.opcheck(torch.ops.pose.selective_scan, (*x, True, True))
    x = [None if t is None else t.detach() for t in x]
    out, _, states = scan.forward_op(*x, True, True)
    torch.library.opcheck(torch.ops.pose.selective_scan_backward, (out, *x, states, True))


def test_flops_are_counted():
    x = make(batch=2, E=5, L=13, N=4)
    with FlopCounterMode(display=False) as counter:
        selective_scan(**x).sum().backward()
    assert counter.get_total_flops() == (6 + 20) * 2 * 5 * 13 * 4

# ----------------------------------------------------------------------------- the kernels


@pytest.fixture
def device(monkeypatch) -> str:
    """Where the kernels can run: the GPU, or the CPU in Triton's interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    if not interpreting():
        pytest.skip("needs a GPU; test_kernels_in_tritons_interpreter runs it on the CPU")
    monkeypatch.setenv("POSE_KERNELS", "triton")
    return "cpu"


@cases
def test_kernels_equal_plain_form(device, case):
    assert_equal_forms(make(**{"batch": 1, "L": 8} | case, dtype=torch.float32, device=device))


@pytest.mark.parametrize("case", [dict(), dict(E=3, L=1, N=5), pytest.param(dict(N=16, L=19, dtype=torch.bfloat16), marks=SLOW)],
                         ids=str)
def test_kernels_written_naively_equal_plain_form(device, case):
    x = make(**{"dtype": torch.float32} | case, device=device)
    exact = {name: t.detach().double() for name, t in x.items()}
    want = selective_scan_plain(**exact, delta_softplus=True)
    assert (scan.selective_scan_naive(**x) - want).norm() <= TOLERANCE[torch.float32] * want.norm()


@pytest.mark.parametrize("wide", [pytest.param(8, marks=SLOW), pytest.param(16, marks=SLOW), 32])
def test_kernels_equal_plain_form_whatever_channels_a_program_takes(device, monkeypatch, wide):
    monkeypatch.setattr(scan, "channels_per_program", lambda channels, many_registers=False: wide)
    assert_equal_forms(make(dtype=torch.float32, device=device, batch=1, E=2 * wide + 3, L=8))
    assert_equal_forms(make(dtype=torch.float32, device=device, batch=1, E=2 * (wide + 1), L=5, B=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=SLOW)])
def test_kernels_keep_the_precision_of_the_type(device, dtype):
    assert_equal_forms(make(dtype=dtype, device=device, E=8, L=20, N=16, shift=-2.0))


@pytest.mark.parametrize("shift", [pytest.param(30.0, marks=SLOW), -30.0])
def test_kernels_at_step_sizes_far_into_both_tails_of_softplus(device, shift):
    x = make(dtype=torch.float32, device=device, shift=shift)
    x["A"] = (x["A"].detach() * 1e-2).requires_grad_()
    assert_equal_forms(x)


def test_kernels_without_softplus(device):
    x = make(dtype=torch.float32, device=device, L=9)
    x["delta"] = x["delta"].detach().abs().requires_grad_()
    assert_equal_forms(x, softplus=False)


def test_kernels_read_any_strides(device):
    assert_equal_forms(strided(make(dtype=torch.float32, device=device, E=6, L=8)))


@pytest.mark.parametrize("path", [pytest.param(path, marks=SLOW if "grouped" in path.stem else []) for path in SHORT],
                         ids=lambda path: path.stem)
def test_kernels_equal_the_golden_numbers(device, path):
    assert_golden(selective_scan, path, torch.float32, 1e-5, device)


def test_kernels_give_the_same_bits_twice(device):
    first, second = (results(selective_scan, make(dtype=torch.float32, device=device, E=20, L=4)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(torch.cuda.is_available() or interpreting(), reason="the kernels' tests run by themselves")
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, but no GPU")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_tritons_interpreter(which):
    environment = os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")        # read when Triton is imported
    command = [sys.executable, "-m", "pytest", "-q", "-k", "test_kernels_", __file__, "-p", "no:cacheprovider",
               "-m", which, "-n0"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", run.stdout)[1])
    assert passed >= {"not slow": 20, "slow": 8}[which], run.stdout[-4000:]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, but no GPU")
@pytest.mark.parametrize("more", [[], pytest.param(["80"], marks=pytest.mark.slow)], ids=["sm_90", "both"])
def test_compiled_code_for_two_gpus_spills_no_register(more):
    program = ("import json, sys\n"
               "from kernels.bench import compile_build, selective_scan_builds\n"
               "builds = selective_scan_builds()\n"
               "print(json.dumps([compile_build(build, sm) for build in builds for sm in (90, *map(int, sys.argv[1:]))]))\n")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", program, *more]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(run.stdout)
    assert len([row for row in rows if row["build"].startswith(("forward", "backward"))]) >= 6 * (1 + len(more))
    assert all(row["spilled"] == 0 and row["registers"] <= 255 for row in rows), rows
    instructions = {row["build"]: row["per_sample"] for row in rows if row["sm"] == 90}
    assert instructions["forward fp32"] < 6 and instructions["naive fp32"] > 10 * instructions["forward fp32"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_memory_is_the_kept_states_and_a_few_series():
    x = make(batch=8, E=768, L=209, N=16, dtype=torch.float32, device="cuda")
    selective_scan(**x).sum().backward()
    torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    selective_scan(**x, delta_softplus=True).sum().backward()
    series, states = 8 * 768 * 209 * 4, 8 * 768 * 209 * 16 * 4 / scan.CHUNK
    assert torch.cuda.max_memory_allocated() - before < 16 * series + 1.1 * states      # all states would be 16 series more


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 40 GB")
def test_more_than_two_billion_numbers_are_indexed_right():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs a GPU with 40 GB")
    E, L, N = 2048, 2 ** 20 + 64, 1
    u, matrix = torch.randn(1, L, E, device="cuda", dtype=torch.float16).mT, torch.ones(E, N, device="cuda")
    out = selective_scan(u, u.abs(), -matrix, matrix, matrix)
    end = u[..., -200:]                                              # the state forgets what is further back
    want = selective_scan(end, end.abs(), -matrix, matrix, matrix)
    torch.testing.assert_close(out[..., -50:], want[..., -50:], rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_second_gpu():
    assert_equal_forms(make(dtype=torch.float32, device="cuda:1"))
