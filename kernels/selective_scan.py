"""Mamba's selective scan (Gu & Dao 2023, arXiv 2312.00752, eq. 2; step size, B and C depend on the input).

Idea      Every channel carries N numbers, its state h, along the sequence. A step forgets some of each number
          and adds some of the input; both amounts depend on the step size d, which the input chooses
          ("selective").

              d_l = softplus(delta_l + delta_bias)
              h_l = exp(d_l A) h_{l-1} + d_l u_l B_l        h_0 = 0                               (eq. 2a)
              y_l = Σ_n C_l[n] h_l[n] + D u_l               out_l = y_l · silu(z_l)               (eq. 2b)

                   u_l, d_l              l = 1    2      3      4     …   time, one step after the other
                      │                 ┌──────┬──────┬──────┬──────┬──
            d_l u_l B_l[n]      n = 1   │  h ──┼→ h ──┼→ h ──┼→ h ──┼→    each arrow multiplies by
                      ↓             2   │  h ──┼→ h ──┼→ h ──┼→ h ──┼→    exp(d_l A[n]): one rate of
                 state h_l[n]       …   │  …   │  …   │  …   │  …   │     forgetting per row n
                      ↓             N   │  h ──┼→ h ──┼→ h ──┼→ h ──┼→
              Σ_n C_l[n] h_l[n]         └──┼───┴──┼───┴──┼───┴──┼───┴──
                      ↓                    ↓      ↓      ↓      ↓
                     y_l                  y_1    y_2    y_3    y_4        one such board per channel

Read      selective_scan_plain, the formula → naive_kernel, the same in Triton → forward_kernel, the same fast
          → selective_scan, what methods call. The form that runs on a CPU is in selective_scan_cpu.py
Letters   B sequences  E channels  L steps  N states per channel  G groups of E/G neighbouring channels, which
          share B or C
Type      out has the type of u. All arithmetic is float32 (float64 if u is), under autocast too: a state in
          bfloat16 drifts.
Memory    Of the states, only that before every 6th step is kept for the backward pass, N/6 floats per channel
          and step; the others are computed again. (B, E, L) views of (B, L, E) tensors are not copied.
"""
import math
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import choose, plain, tl, triton, working_type
from kernels.selective_scan_cpu import (CHUNK, Maybe, backward_cpu, forward_cpu, groups_of, new_gradients,
                                        new_outputs)

# ----------------------------------------------------------------------------- the formula


def selective_scan_plain(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe = None,
                         z: Maybe = None, delta_bias: Maybe = None, delta_softplus: bool = False,
                         return_last_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Eq. 2 step by step in plain PyTorch: the form to read, which the others are tested against.

    Takes and returns what `selective_scan` does. Has all derivatives.
    """
    dtype = u.dtype
    u, delta, A, B, C, D, z, delta_bias = (
        None if x is None else x.to(working_type(dtype)) for x in (u, delta, A, B, C, D, z, delta_bias))
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    d = F.softplus(delta) if delta_softplus else delta
    h = u.new_zeros(u.shape[0], *A.shape)                                                       # (B, E, N)
    y = []
    for d_l, u_l, B_l, C_l in zip(d.unbind(2), u.unbind(2), by_step(B, u), by_step(C, u)):
        h = (d_l[..., None] * A).exp() * h + (d_l * u_l)[..., None] * B_l                       # eq. 2a
        y.append((h * C_l).sum(-1))                                                             # eq. 2b
    y = torch.stack(y, 2) if y else torch.zeros_like(u)
    if D is not None:
        y = y + D[:, None] * u
    out = (y if z is None else y * F.silu(z)).to(dtype)
    return (out, h.detach()) if return_last_state else out


def by_step(matrix: Tensor, u: Tensor) -> Sequence[Tensor]:
    """B or C, of any of its three shapes, at each of the L steps: (B, E, N), or (E, N) if it is constant."""
    if matrix.ndim == 2:
        return [matrix] * u.shape[2]
    matrix = matrix if matrix.ndim == 4 else matrix[:, None]
    return [x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in matrix.unbind(3)]


# ----------------------------------------------------------------------------- the naive kernel
#
# A GPU runs thousands of small programs, which differ in `tl.program_id` only. A `tl` tensor lies in the
# registers of its program, spread over the 32 lanes of a warp, which go in step; tl.load reads from a tensor
# of addresses (pointer + offsets, in numbers, not bytes); tl.constexpr arguments are known when the kernel is
# compiled. Here a program is one channel of one sequence, and the tensor h are its N states. No method calls
# it: it is where to begin.


@triton.jit
def base_2(x):
    """x log2 e: what exp2 wants for exp(x)."""
    return x * 1.4426950408889634


@triton.jit
def softplus(x):
    """ln(1 + e^x) = max(x, 0) + ln(1 + q), q = e^−|x| ≤ 1; ln(1 + q) = 2 artanh(s), s = q / (2 + q) ≤ 1/3.

    The series of artanh needs seven terms for float32 and loses nothing for small q, where 1 + q would.
    """
    q = tl.exp2(base_2(-tl.abs(x)))
    s = q / (2 + q)
    s2 = s * s
    series = 1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11 + s2 * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(base_2(-x)))


@triton.jit
def naive_kernel(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, L,
                 E: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Eq. 2 as it is written, forward, for contiguous float32 tensors of less than 2³¹ numbers, one group."""
    program = tl.program_id(0)                                              # one of all (sequence, channel)
    sequence, e = program // E, program % E
    n = tl.arange(0, BLOCK_N)
    A = tl.load(A_ptr + e * N + n, n < N, 0.0)
    D, bias = tl.load(D_ptr + e), tl.load(bias_ptr + e)
    h = tl.zeros((BLOCK_N,), tl.float32)
    for l in range(L):
        at = program * L + l
        matrix_at = (sequence * N + n) * L + l
        u, z = tl.load(u_ptr + at), tl.load(z_ptr + at)
        d = softplus(tl.load(delta_ptr + at) + bias)
        h = tl.exp(d * A) * h + d * u * tl.load(B_ptr + matrix_at, n < N, 0.0)                  # eq. 2a
        y = tl.sum(tl.load(C_ptr + matrix_at, n < N, 0.0) * h, 0) + D * u                       # eq. 2b
        tl.store(out_ptr + at, y * z * sigmoid(z))


def selective_scan_naive(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
                         delta_bias: Tensor) -> Tensor:
    """out (B, E, L) by `naive_kernel`, forward only, with delta_softplus; B, C (B, N, L); all are given."""
    tensors = [x.float().contiguous() for x in (u, delta, A, B, C, D, z, delta_bias)]
    (batch, E, L), N = u.shape, A.shape[1]
    out = torch.empty_like(tensors[0])
    with torch.cuda.device_of(u):
        naive_kernel[(batch * E,)](*tensors, out, L, E=E, N=N, BLOCK_N=triton.next_power_of_2(N), num_warps=1)
    return out


# ----------------------------------------------------------------------------- the Triton kernels
#
# A program owns neighbouring channels of one sequence: 32, or fewer if that left most of the GPU idle.
#
#       the tile h, (N, channels):   lane 0   lane 1   …  lane 31         a lane has registers of its own
#           state 1                  h[1,0]   h[1,1]      h[1,31]
#           …                          …        …           …
#           state N                  h[N,0]   h[N,1]      h[N,31]         Σ_n runs down a lane: no exchange
#
# There is little memory traffic: u, delta, z are read and out is written once per step and channel. The time
# goes into instructions. Per step and channel, with N = 16 in float32, a warp executes (`python -m
# kernels.bench --compile`, Triton 3.9, sm_90)
#
#     naive_kernel              70.0    a state per lane, half of the lanes idle, Σ_n an exchange between lanes
#     channels side by side     13.2    below, with BLOCK_E 8, CHUNK 1: four lanes share a channel
#     a lane per channel         6.0    BLOCK_E 32: no exchange, B_l and C_l come in loads of 128 bits
#     six steps unrolled         5.0    CHUNK 6: the kernel as launched; the loads of all six are under way at once
#
# The published CUDA operator scans over time in parallel, by combining pairs (a, b) in log L rounds, and has
# 21. Walking makes each product once, and a sequence here has hundreds of channels, so that there is work
# enough for the GPU without cutting time into pieces. exp(x) is 2^(x log2 e), which the hardware can do.
#   Series lie channels last, so that the 32 numbers of a warp are one piece of memory; other layouts are
# copied. An `if` on a tl.constexpr, or on a pointer that is None, leaves no trace in the machine code. Where
# a tile is larger than what it covers (N or the channels are no power of two; the last steps), offsets are
# clamped or loads masked with 0, and what must not count is not stored. A step past the end has d = 0: the
# state stays as it is.

HALF = CHUNK // 2               # so many steps' states the backward kernel has in registers at once


@triton.jit
def at(pointer, step, stride):
    """The address of a step, in 64 bits: a sequence may have more than 2^31 numbers."""
    return pointer + step.to(tl.int64) * stride


@triton.jit
def tile(pointer, e, N: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr):
    """Addresses of a (BLOCK_N, channels) tile of an (N, E) matrix.

    First the channel, then the constant n·E: one address register for the tile instead of BLOCK_N.
    """
    return (pointer + e)[None, :] + (tl.minimum(tl.arange(0, BLOCK_N), N - 1) * E)[:, None]


@triton.jit
def matrix_row(pointer, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """B_l or C_l, (BLOCK_N, 1), from the address of its first number; 0 in the rows past N."""
    n = tl.arange(0, BLOCK_N)
    return tl.load(pointer + n, n < N, 0.0)[:, None]


@triton.jit
def where_am_i(E: tl.constexpr, groups: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's sequence, group, channels (clamped), their numbers in the group, the group's width."""
    width = E // groups
    per_group = tl.cdiv(width, BLOCK_E)
    program = tl.program_id(0)
    group = program // per_group % groups
    lane = program % per_group * BLOCK_E + tl.arange(0, BLOCK_E)
    sequence, channels = program // (per_group * groups), group * width + tl.minimum(lane, width - 1)
    return sequence.to(tl.int64), group, channels, lane, width


@triton.jit
def inside(lane, width, step, L):
    """Which lanes have something to store at this step: those of real channels, if the step is a real one."""
    return lane < tl.where(step < L, width, 0)


@triton.jit
def forward_kernel(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, last_ptr, states_ptr,
                   L, u_b, delta_b, z_b, B_b, B_g, C_b, C_g,
                   B_l: tl.constexpr, C_l: tl.constexpr, u_l: tl.constexpr, delta_l: tl.constexpr,
                   z_l: tl.constexpr, groups: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Eq. 2 for BLOCK_E channels of one sequence. x_b, x_g, x_l: strides of x over sequences, groups, steps.

    D_ptr, z_ptr, bias_ptr and states_ptr may be None.
    """
    b, group, e, lane, width = where_am_i(E, groups, BLOCK_E)
    exists = (tl.arange(0, BLOCK_N) < N)[:, None] & (lane < width)[None, :]
    A = base_2(tl.load(tile(A_ptr, e, N, E, BLOCK_N)))                      # exp(d A) = exp2(d · this)
    bias = tl.load(bias_ptr + e).to(tl.float32) if bias_ptr is not None else 0.0
    D = tl.load(D_ptr + e).to(tl.float32) if D_ptr is not None else 0.0
    B_ptr, C_ptr = B_ptr + b * B_b + group * B_g, C_ptr + b * C_b + group * C_g
    u_ptr, delta_ptr, out_ptr = u_ptr + b * u_b + e, delta_ptr + b * delta_b + e, out_ptr + b * L * E + e
    if z_ptr is not None:
        z_ptr += b * z_b + e
    if states_ptr is not None:
        states_ptr += b * tl.cdiv(L, CHUNK) * (N * E)

    h = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for i in range(tl.cdiv(L, CHUNK)):
        start = tl.cast(i * CHUNK, tl.int32)                                # a tensor in the interpreter too
        if states_ptr is not None:
            tl.store(tile(states_ptr, e, N, E, BLOCK_N), h, exists)
            states_ptr += N * E
        out = ()                        # stored after all loads: a store in between would hold up the next load
        for k in tl.static_range(CHUNK):
            there, l = inside(lane, width, start + k, L), tl.minimum(start + k, L - 1)
            x = tl.load(delta_ptr + k * delta_l, there, 0.0).to(tl.float32) + bias
            u = tl.load(u_ptr + k * u_l, there, 0.0).to(tl.float32)
            d = tl.where(there, softplus(x) if SOFTPLUS else x, 0.0)
            B, C = matrix_row(at(B_ptr, l, B_l), N, BLOCK_N), matrix_row(at(C_ptr, l, C_l), N, BLOCK_N)
            h = tl.exp2(d[None, :] * A) * h + (d * u)[None, :] * B                              # eq. 2a
            y = tl.sum(h * C, 0) + D * u                                                        # eq. 2b
            if z_ptr is not None:
                z = tl.load(z_ptr + k * z_l, there, 0.0).to(tl.float32)
                y *= z * sigmoid(z)
            out = out + (y,)
        for k in tl.static_range(CHUNK):
            tl.store(out_ptr + k * E, out[k], inside(lane, width, start + k, L))
        u_ptr, delta_ptr, out_ptr = u_ptr + CHUNK * u_l, delta_ptr + CHUNK * delta_l, out_ptr + CHUNK * E
        if z_ptr is not None:
            z_ptr += CHUNK * z_l
    tl.store(tile(last_ptr + b * (N * E), e, N, E, BLOCK_N), h, exists)


# Backwards. The walk from the last step to the first needs h_l and h_{l-1} of every step. Three at a time, they
# are built again from the state kept before every 6th step, and stay in registers until the walk comes by:
#
#       kept ▼     |     ▼     |     ▼
#            0 1 2 | 3 4 5     |                  3 4 5: from the kept state take the detour over 0 1 2, build
#            ──────→ ────→                               the states, come back 5 4 3;
#                    ←────                        0 1 2: likewise, without the detour
#
# The detour is a tenth of all instructions (16 per step and channel, of the published CUDA operator 43) and
# halves what must be kept. Six steps at once do not fit into the 255 registers that a lane may have; three
# do: 3 tiles of states, and one each of A, dA, exp(d A), G, B, C.
#   dB_l[n] and dC_l[n] are sums over channels, that is over lanes. `tl.sum` would pass every number through
# five exchanges between lanes, and cost more than all the rest. `sum_lanes` adds even and odd columns, five
# times: Triton then hands the whole tile over once, through shared memory, so that each lane adds up one row
# in its own registers. Every program writes its sums, the host adds them up: no atomic additions, so the same
# bits in every run.


@triton.jit
def sum_lanes(x, rounds: tl.constexpr):
    """Sum over the 2^rounds columns of x (rows, 2^rounds)."""
    for _ in tl.static_range(rounds):
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        x = even + odd
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def backward_kernel(g_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, states_ptr,
                    du_ptr, ddelta_ptr, dA_ptr, dBC_ptr, dD_ptr, dz_ptr, dbias_ptr, L,
                    g_b, u_b, delta_b, z_b, B_b, B_g, C_b, C_g,
                    B_l: tl.constexpr, C_l: tl.constexpr, g_l: tl.constexpr, u_l: tl.constexpr,
                    delta_l: tl.constexpr, z_l: tl.constexpr, groups: tl.constexpr, E: tl.constexpr,
                    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, ROUNDS: tl.constexpr,
                    CHUNK: tl.constexpr, HALF: tl.constexpr, SOFTPLUS: tl.constexpr):
    """The formulas of backward_cpu for BLOCK_E = 2^ROUNDS channels of a sequence; names as in forward_kernel.

    Sums over this program's steps or channels, for the host to add: dA (B, N, E); dD, dbias (B, E); dB before
    dC in dBC (programs, L, 2, BLOCK_N).
    """
    b, group, e, lane, width = where_am_i(E, groups, BLOCK_E)
    exists = (tl.arange(0, BLOCK_N) < N)[:, None] & (lane < width)[None, :]
    A = base_2(tl.load(tile(A_ptr, e, N, E, BLOCK_N)))
    bias = tl.load(bias_ptr + e).to(tl.float32) if bias_ptr is not None else 0.0
    D = tl.load(D_ptr + e).to(tl.float32) if D_ptr is not None else 0.0
    B_ptr, C_ptr = B_ptr + b * B_b + group * B_g, C_ptr + b * C_b + group * C_g
    dBC_ptr += tl.program_id(0).to(tl.int64) * L * (2 * BLOCK_N)
    halves = tl.cdiv(L, HALF)
    last = tl.cast(halves - 1, tl.int64) * HALF                         # pointers start at the last three steps
    g_ptr, u_ptr = g_ptr + b * g_b + last * g_l + e, u_ptr + b * u_b + last * u_l + e
    delta_ptr += b * delta_b + last * delta_l + e
    du_ptr, ddelta_ptr = du_ptr + (b * L + last) * E + e, ddelta_ptr + (b * L + last) * E + e
    if z_ptr is not None:
        z_ptr, dz_ptr = z_ptr + b * z_b + last * z_l + e, dz_ptr + (b * L + last) * E + e
    states_ptr += b * tl.cdiv(L, CHUNK) * (N * E)

    dA = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dD = tl.zeros((BLOCK_E,), tl.float32)
    dbias = tl.zeros((BLOCK_E,), tl.float32)
    carry = dA                                                              # exp(d_{l+1} A) G_{l+1}
    for i in range(halves):
        start = tl.cast((halves - 1 - i) * HALF, tl.int32)
        h = tl.load(tile(at(states_ptr, start // CHUNK, N * E), e, N, E, BLOCK_N))
        if start % CHUNK != 0:                                              # the detour over the steps before
            for k in tl.static_range(-HALF, 0):
                x = tl.load(delta_ptr + k * delta_l).to(tl.float32) + bias
                d = softplus(x) if SOFTPLUS else x
                u = tl.load(u_ptr + k * u_l).to(tl.float32)
                B = matrix_row(at(B_ptr, start + k, B_l), N, BLOCK_N)
                h = tl.exp2(d[None, :] * A) * h + (d * u)[None, :] * B
        before, ds, us = (h,), (), ()                                       # per step: h_{l-1}, d_l, u_l
        for k in tl.static_range(HALF):
            there = inside(lane, width, start + k, L)
            x = tl.load(delta_ptr + k * delta_l, there, 0.0).to(tl.float32) + bias
            d = tl.where(there, softplus(x) if SOFTPLUS else x, 0.0)
            u = tl.load(u_ptr + k * u_l, there, 0.0).to(tl.float32)
            ds, us = ds + (d,), us + (u,)
            if k < HALF - 1:
                B = matrix_row(at(B_ptr, tl.minimum(start + k, L - 1), B_l), N, BLOCK_N)
                h = tl.exp2(d[None, :] * A) * h + (d * u)[None, :] * B
                before = before + (h,)

        for k in tl.static_range(HALF - 1, -1, -1):
            there, l = inside(lane, width, start + k, L), tl.minimum(start + k, L - 1)
            d, u = ds[k], us[k]
            B, C = matrix_row(at(B_ptr, l, B_l), N, BLOCK_N), matrix_row(at(C_ptr, l, C_l), N, BLOCK_N)
            a = tl.exp2(d[None, :] * A)
            h = before[k + 1] if k < HALF - 1 else a * before[k] + (d * u)[None, :] * B
            gy = tl.load(g_ptr + k * g_l, there, 0.0).to(tl.float32)
            if z_ptr is not None:
                z = tl.load(z_ptr + k * z_l, there, 0.0).to(tl.float32)
                s = sigmoid(z)
                y = tl.sum(h * C, 0) + D * u
                tl.store(dz_ptr + k * E, gy * y * s * (1 + z * (1 - s)), there)
                gy *= z * s
            G = gy[None, :] * C + carry
            carry = a * G
            P = carry * before[k]
            GB = tl.sum(G * B, 0)
            dd = tl.sum(P * A, 0) * 0.6931471805599453 + u * GB             # ln 2: A is in base 2
            dA += P * d[None, :]
            both = tl.permute(tl.join(G * (d * u)[None, :], h * gy[None, :]), (2, 0, 1))
            both = sum_lanes(tl.reshape(both, (2 * BLOCK_N, BLOCK_E)), ROUNDS)
            row = tl.arange(0, 2 * BLOCK_N)
            tl.store(at(dBC_ptr, l, 2 * BLOCK_N) + row, both, inside(row, 2 * BLOCK_N, start + k, L))
            dD += gy * u
            if SOFTPLUS:
                dd *= sigmoid(tl.load(delta_ptr + k * delta_l, there, 0.0).to(tl.float32) + bias)
            dbias += tl.where(there, dd, 0.0)
            tl.store(ddelta_ptr + k * E, dd, there)
            tl.store(du_ptr + k * E, D * gy + d * GB, there)

        g_ptr, u_ptr, delta_ptr = g_ptr - HALF * g_l, u_ptr - HALF * u_l, delta_ptr - HALF * delta_l
        du_ptr, ddelta_ptr = du_ptr - HALF * E, ddelta_ptr - HALF * E
        if z_ptr is not None:
            z_ptr, dz_ptr = z_ptr - HALF * z_l, dz_ptr - HALF * E

    tl.store(tile(dA_ptr + b * (N * E), e, N, E, BLOCK_N), dA, exists)
    tl.store(dD_ptr + b * E + e, dD, lane < width)
    tl.store(dbias_ptr + b * E + e, dbias, lane < width)


def fits_triton(u: Tensor, A: Tensor) -> bool:
    """Whether the kernels are made for these inputs: not for float64, over 256 states, nothing at all."""
    return u.dtype != torch.float64 and A.shape[1] <= 256 and u.numel() > 0


def channels_per_program(channels: int, many_registers: bool = False) -> int:
    """How many of all `channels` (of all sequences) a program takes: 32, where each lane has a channel.

    16 or 8 channels are shared by 2 or 4 lanes each: more programs, and fewer registers per lane.
    """
    most = 32 if channels > 2 ** 14 else 16 if channels > 2 ** 13 else 8
    return min(most, 16) if many_registers else most


def launch_sizes(u: Tensor, A: Tensor, groups: int, wide: int) -> tuple[int, int, dict]:
    """Number of programs per group of a sequence, in all, and the sizes that the kernels are compiled for."""
    (batch, E, _), N = u.shape, A.shape[1]
    per_group, high = triton.cdiv(E // groups, wide), triton.next_power_of_2(N)
    sizes = dict(groups=groups, E=E, N=N, BLOCK_N=high, BLOCK_E=wide, CHUNK=CHUNK, num_warps=max(1, high // 16))
    return per_group, batch * groups * per_group, sizes


def channels_last(x: Maybe) -> tuple[Maybe, int, int]:
    """(B, E, L) with channels side by side, copied if need be; and its strides over sequences and steps."""
    if x is None:
        return None, 0, 0
    x = x if x.stride(1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, x.stride(0), x.stride(2)


def common_groups(B: Tensor, C: Tensor) -> int:
    """A number of groups for both. A constant matrix is a group for each channel, alike at all steps."""
    return math.lcm(*(x.shape[0] if x.ndim == 2 else groups_of(x) for x in (B, C)))


def matrix_rows(matrix: Tensor, groups: int) -> tuple[Tensor, int, int, int]:
    """B or C in float32 with its N numbers side by side, and its strides over sequences, groups, steps."""
    matrix = matrix.to(torch.float32)
    if matrix.ndim == 2:
        return matrix.contiguous(), 0, matrix.shape[1], 0
    matrix = (matrix if matrix.ndim == 4 else matrix[:, None]).transpose(2, 3)                  # (B, G, L, N)
    matrix = matrix if matrix.stride(3) == 1 else matrix.contiguous()
    if matrix.shape[1] == 1:
        matrix = matrix.expand(-1, groups, -1, -1)
    elif matrix.shape[1] < groups:
        matrix = matrix.repeat_interleave(groups // matrix.shape[1], 1)
    return matrix, *matrix.stride()[:3]


def forward_triton(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe,
                   delta_bias: Maybe, delta_softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What forward_cpu does, by one launch of forward_kernel."""
    (batch, E, L), groups = u.shape, common_groups(B, C)
    out, last, states = new_outputs(u, A, save)
    _, programs, sizes = launch_sizes(u, A, groups, channels_per_program(batch * E))
    (u, u_b, u_l), (delta, delta_b, delta_l), (z, z_b, z_l) = map(channels_last, (u, delta, z))
    (B, B_b, B_g, B_l), (C, C_b, C_g, C_l) = matrix_rows(B, groups), matrix_rows(C, groups)
    D, delta_bias = (None if x is None else x.contiguous() for x in (D, delta_bias))
    A = A.t().to(torch.float32).contiguous()
    with torch.cuda.device_of(u):
        forward_kernel[(programs,)](
            u, delta, A, B, C, D, z, delta_bias, out, last, states if save else None, L, u_b, delta_b, z_b,
            B_b, B_g, C_b, C_g, B_l, C_l, u_l, delta_l, z_l, SOFTPLUS=delta_softplus, **sizes)
    return out, last, states


def backward_triton(grad_out: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe,
                    z: Maybe, delta_bias: Maybe, states: Tensor, delta_softplus: bool) -> list[Tensor]:
    """What backward_cpu does, by one launch of backward_kernel, and the sums over its programs."""
    (batch, E, L), N, groups = u.shape, A.shape[1], common_groups(B, C)
    grads = new_gradients(u, delta, A, B, C, D, z, delta_bias)
    du, ddelta, _, _, _, _, dz, _ = grads
    wide = channels_per_program(batch * E, many_registers=N > 16)
    per_group, programs, sizes = launch_sizes(u, A, groups, wide)
    dA, dD, dbias = (states.new_empty(batch, *shape) for shape in ((N, E), (E,), (E,)))
    dBC = states.new_empty(batch, groups, per_group, L, 2, sizes["BLOCK_N"])
    (g, g_b, g_l), (u, u_b, u_l), (delta, delta_b, delta_l), (z, z_b, z_l) = map(
        channels_last, (grad_out, u, delta, z))
    (B, B_b, B_g, B_l), (C, C_b, C_g, C_l) = matrix_rows(B, groups), matrix_rows(C, groups)
    D, delta_bias = (None if x is None else x.contiguous() for x in (D, delta_bias))
    A = A.t().to(torch.float32).contiguous()
    with torch.cuda.device_of(u):
        backward_kernel[(programs,)](
            g, u, delta, A, B, C, D, z, delta_bias, states, du, ddelta, dA, dBC, dD, dz, dbias, L,
            g_b, u_b, delta_b, z_b, B_b, B_g, C_b, C_g, B_l, C_l, g_l, u_l, delta_l, z_l,
            HALF=HALF, ROUNDS=wide.bit_length() - 1, SOFTPLUS=delta_softplus, **sizes)
    grads[2].copy_(dA.sum(0).t())
    grads[3].copy_(sum_programs(dBC[..., 0, :N], grads[3]))
    grads[4].copy_(sum_programs(dBC[..., 1, :N], grads[4]))
    for grad, rows in ((grads[5], dD), (grads[7], dbias)):
        if grad.numel():
            grad.copy_(rows.sum(0))
    return grads


def sum_programs(parts: Tensor, grad: Tensor) -> Tensor:
    """Parts (B, groups, programs, L, N) of the gradient of B or C, added up to the shape of that gradient."""
    if grad.ndim == 2:
        return parts.sum((0, 2, 3))
    parts = parts.unflatten(1, (groups_of(grad), -1)).sum((2, 3)).transpose(2, 3)
    return parts if grad.ndim == 4 else parts[:, 0]


# ----------------------------------------------------------------------------- the operator
#
# PyTorch knows selective_scan as an operator: torch.compile and torch.export keep it as one step, and the
# FLOP counter counts it. Which form runs is decided inside, see dispatch.py.


@torch.library.custom_op("pose::selective_scan", mutates_args=())
def forward_op(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe,
               delta_bias: Maybe, delta_softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, last_state, kept states (empty unless `save`)."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    with torch.autocast(u.device.type, enabled=False):
        if not fits_triton(u, A):
            return forward_cpu(*inputs, delta_softplus, save)
        return choose("selective_scan", forward_triton, forward_cpu, *inputs, delta_softplus, save)


@forward_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
    return new_outputs(u, A, save)


@torch.library.custom_op("pose::selective_scan_backward", mutates_args=())
def backward_op(grad_out: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe,
                z: Maybe, delta_bias: Maybe, states: Tensor, delta_softplus: bool) -> list[Tensor]:
    """One gradient per argument of the scan, empty for those that are absent. Formulas: backward_cpu."""
    inputs = (grad_out, u, delta, A, B, C, D, z, delta_bias, states)
    with torch.autocast(u.device.type, enabled=False):
        if not fits_triton(u, A):
            return backward_cpu(*inputs, delta_softplus)
        return choose("selective_scan backward", backward_triton, backward_cpu, *inputs, delta_softplus)


@backward_op.register_fake
def _(grad_out, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus):
    return new_gradients(u, delta, A, B, C, D, z, delta_bias)


def keep_for_backward(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)                        # no zeros in the shape of the kept states


def backward(ctx, grad_out, *_):
    *inputs, states = ctx.saved_tensors
    grad_out = torch.zeros_like(inputs[0]) if grad_out is None else grad_out
    grads = backward_op(grad_out, *inputs, states, ctx.delta_softplus)
    return *(None if x is None else grad for x, grad in zip(inputs, grads)), None, None


def no_second_derivative(ctx, *grads):
    raise NotImplementedError("selective_scan has no second derivative: use selective_scan_plain for one")


forward_op.register_autograd(backward, setup_context=keep_for_backward)
backward_op.register_autograd(no_second_derivative)


@register_flop_formula(torch.ops.pose.selective_scan)
def forward_flops(u, delta, A, *rest, **options) -> int:
    """Six per state and step: d·A, d u·B, two each for a h + b and for Σ C h. exp counts 0."""
    return 6 * math.prod(u) * A[1]


@register_flop_formula(torch.ops.pose.selective_scan_backward)
def backward_flops(grad_out, u, delta, A, *rest, **options) -> int:
    """Twenty per state and step: six as forward, two each for G, P, <G, B>, <P, A>, dA, dB, dC."""
    return 20 * math.prod(u) * A[1]


# ----------------------------------------------------------------------------- what methods call


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe = None, z: Maybe = None,
                   delta_bias: Maybe = None, delta_softplus: bool = False, return_last_state: bool = False
                   ) -> Tensor | tuple[Tensor, Tensor]:
    """Eq. 2 along the last axis of u, with the names, order and layouts of the published operator.

    Takes    u, delta, z (B, E, L), fastest as views of (B, L, E) memory; A (E, N), negative where states should
             fade; B, C of shape (B, N, L), (B, G, N, L) or (E, N), not necessarily the same for both;
             D, delta_bias (E); delta_softplus: d = softplus(delta + delta_bias), else d = delta + delta_bias
    Returns  out (B, E, L) in the type of u; with return_last_state also h_L (B, E, N), in float32 (float64 if u
             is), which has no gradient, as in the published operator
    L = 0 gives an empty out and a state of zeros. One derivative exists, not two.
    Raises   ValueError for shapes that do not fit together, mixed devices, anything but real numbers
    """
    check(u, delta, A, B, C, D, z, delta_bias)
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if plain():
        return selective_scan_plain(*inputs, delta_softplus, return_last_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, last_state, _ = forward_op(*inputs, delta_softplus, save)
    return (out, last_state) if return_last_state else out


def check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, delta_bias: Maybe):
    """Raise ValueError for inputs that do not fit together."""
    if u.ndim != 3 or A.ndim != 2 or A.shape[0] != u.shape[1] or A.shape[1] == 0:
        raise ValueError(f"selective_scan: u {tuple(u.shape)} should be (B, E, L) and A {tuple(A.shape)} "
                         "(E, N), with the same E and N > 0")
    (batch, E, L), N = u.shape, A.shape[1]
    inputs = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    wanted = dict(delta=(batch, E, L), z=(batch, E, L), D=(E,), delta_bias=(E,))
    for name, x in inputs.items():
        if x is None:
            continue
        shape, problem = tuple(x.shape), ""
        grouped = [(batch, groups, N, L) for groups in shape[1:2] if groups and E % groups == 0]
        if not x.is_floating_point():
            problem = f"has type {x.dtype}, it should be real floating point"
        elif x.device != u.device:
            problem = f"is on {x.device}, u on {u.device}: move all to one device"
        elif shape != wanted.get(name, shape):
            problem = f"is {shape}, with u {batch, E, L} it should be {wanted[name]}"
        elif name in "BC" and shape not in [(batch, N, L), (E, N), *grouped]:
            problem = (f"is {shape}, with u {batch, E, L} and A {E, N} it should be {batch, N, L}, "
                       f"(B, G, N, L) = ({batch}, a divisor of {E}, {N}, {L}) or {E, N}")
        if problem:
            raise ValueError(f"selective_scan: {name} {problem}")
