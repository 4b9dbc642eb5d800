"""Mamba's selective scan (Gu & Dao 2023, arXiv 2312.00752, eq. 2; step size, B and C depend on the input).

Idea      Every channel carries N numbers, its state h, along the sequence. A step forgets some of each number and
          adds some of the input; both amounts depend on the step size d, which the input chooses ("selective").

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

Read      selective_scan_plain (the formula) → selective_scan (what methods call) → the twin, fast on a CPU →
          the kernels
Letters   B sequences  E channels  L steps  N states per channel  G groups of E/G neighbouring channels, which
          share B or C
Takes     u, delta, z (B, E, L);  A (E, N) real;  B, C each (B, N, L), (B, G, N, L) or constant (E, N);
          D, delta_bias (E)
Type      out has the type of u. All arithmetic is float32 (float64 if u is), under autocast too: a state in
          bfloat16 drifts.
Memory    Of the states, only that before every 6th step is kept for the backward pass: N/6 floats per channel and
          step. The others are computed again, a few at a time. (B, E, L) views of (B, L, E) tensors are not copied.
Departs   The published operator ignores a gradient that arrives at last_state; here it counts.
"""
import math
from typing import Iterator, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from common.errors import UserError
from kernels.dispatch import choose, tl, triton

Maybe = Optional[Tensor]    # an argument that may be absent
CHUNK = 6                   # the state before every 6th step is kept for the backward pass

# ----------------------------------------------------------------------------- the formula


def selective_scan_plain(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe = None, z: Maybe = None,
                         delta_bias: Maybe = None, delta_softplus: bool = False, return_last_state: bool = False
                         ) -> Tensor | tuple[Tensor, Tensor]:
    """Eq. 2 step by step: the form to read, and the one that the others are tested against. Has all derivatives.

    Takes and returns what `selective_scan` does.
    """
    kind = u.dtype
    u, delta, A, B, C, D, z, delta_bias = (
        None if x is None else x.to(work_type(kind)) for x in (u, delta, A, B, C, D, z, delta_bias))
    B, C = per_channel(B, u), per_channel(C, u)                                       # (B, E, N, L) or (E, N, 1)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    d = F.softplus(delta) if delta_softplus else delta
    h = u.new_zeros(u.shape[0], *A.shape)                                             # (B, E, N)
    y = []
    for l in range(u.shape[2]):
        B_l, C_l = B[..., min(l, B.shape[-1] - 1)], C[..., min(l, C.shape[-1] - 1)]       # constant: all steps alike
        h = (d[..., l, None] * A).exp() * h + (d * u)[..., l, None] * B_l                 # eq. 2a
        y.append((h * C_l).sum(-1))                                                       # eq. 2b
    y = torch.stack(y, 2) if y else torch.zeros_like(u)
    if D is not None:
        y = y + D[:, None] * u
    out = (y if z is None else y * F.silu(z)).to(kind)
    return (out, h) if return_last_state else out


def per_channel(matrix: Tensor, u: Tensor) -> Tensor:
    """B or C, of any of its three shapes, for every channel: (B, E, N, L), or (E, N, 1) if it is constant."""
    if matrix.ndim == 2:
        return matrix[..., None]
    matrix = matrix if matrix.ndim == 4 else matrix[:, None]
    return matrix.repeat_interleave(u.shape[1] // matrix.shape[1], 1)


def work_type(kind: torch.dtype) -> torch.dtype:
    """The type of all arithmetic for inputs u of type `kind`."""
    return torch.float64 if kind == torch.float64 else torch.float32

# ----------------------------------------------------------------------------- memory, for twin and kernels alike


def new_outputs(u: Tensor, A: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for out, last_state and the kept states, channels last: the linear layer behind a scan wants it so."""
    (batch, E, L), N = u.shape, A.shape[1]
    real = work_type(u.dtype)
    states = (batch, -(-L // CHUNK), N, E) if save else (0,)
    return (u.new_empty(batch, L, E).transpose(1, 2), u.new_empty(batch, N, E, dtype=real).transpose(1, 2),
            u.new_empty(states, dtype=real))


def new_gradients(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, delta_bias: Maybe
                  ) -> list[Tensor]:
    """Memory for one gradient per argument, of its shape and type, series channels last; empty for an absent one."""
    def new(x: Maybe) -> Tensor:
        if x is None:
            return u.new_empty(0)
        if x.ndim < 3:
            return x.new_empty(x.shape)
        return x.new_empty(*x.shape[:-2], x.shape[-1], x.shape[-2]).transpose(-1, -2)

    return [new(x) for x in (u, delta, A, B, C, D, z, delta_bias)]

# ----------------------------------------------------------------------------- the twin: the same, fast on a CPU
#
# What makes the plain form slow is not the loop (a PyTorch call costs a microsecond) but (a) several calls per step,
# (b) tensors of L·N numbers per channel, which do not stay in the cache, (c) automatic differentiation through a
# slice x[:, l], whose backward pass fills a tensor of the size of x with zeros, at every step. Hence:
#   * 36 steps at a time, and as many channels as make BLOCK numbers per step: buffers that stay in the cache;
#   * in such a stretch, a = exp(d A) and b = d u B of all steps in one call each; then one in-place call per step,
#     which adds a_l h_{l-1} to b_l and so makes it h_l; then one product with C for all steps;
#   * the backward pass is written by hand. It takes the stretches from the last to the first, builds the states of
#     each again from the one before it, which the forward pass has kept, and walks back with one call per step.
# Buffers are (B, 36, N, E): channels last, so that d (…, 1, E) and B (…, N, 1) both spread over long rows. Dividing
# by running products of a, instead of walking, would need no loop, but they underflow, and it is no faster.

STRETCH = 6 * CHUNK     # steps that are done together
BLOCK = 3 * 2 ** 13     # numbers per step and buffer: a stretch of them in float32 is 3.5 MB


class Piece:
    """What is done at once: `rows` of the sequences, `channels` of one group, `steps` of one stretch (slices)."""

    def __init__(self, rows: slice, channels: slice, steps: slice, real: torch.dtype):
        self.rows, self.channels, self.steps, self.real = rows, channels, steps, real

    def series(self, x: Tensor) -> Tensor:
        """Its part of x (B, E, L), as a view (rows, steps, channels)."""
        return x[self.rows, self.channels, self.steps].transpose(1, 2)

    def matrix(self, matrix: Tensor, channels: int) -> Tensor:
        """Its part of B or C, as a view: (rows, steps, N, 1), or (N, channels) of a constant one. channels is E."""
        if matrix.ndim == 2:
            return matrix[self.channels].t()
        matrix = matrix if matrix.ndim == 4 else matrix[:, None]
        group = self.channels.start // (channels // matrix.shape[1])
        return matrix[self.rows, group, :, self.steps].transpose(1, 2)[..., None]

    def load(self, x: Tensor) -> Tensor:
        """series(x) as a tensor of its own, in the type of the arithmetic."""
        return self.series(x).to(self.real).contiguous()

    def step_size(self, delta: Tensor, bias: Maybe, softplus: bool) -> tuple[Tensor, Tensor]:
        """delta + bias, and d, its softplus if that is wanted."""
        x = self.load(delta)
        if bias is not None:
            x = x + bias[self.channels].to(self.real)
        return x, F.softplus(x) if softplus else x


def blocks(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Iterator[tuple[slice, slice]]:
    """Sequences and channels that are done together: about BLOCK numbers per step at most, one group only."""
    batch, channels = u.shape[:2]
    width = channels // math.lcm(groups_of(B), groups_of(C))
    if batch * channels:
        wide = math.ceil(width / math.ceil(width * A.shape[1] / BLOCK))
        high = max(1, BLOCK // (wide * A.shape[1]))
        for row in range(0, batch, high):
            for group in range(0, channels, width):
                for channel in range(group, group + width, wide):
                    yield slice(row, min(row + high, batch)), slice(channel, min(channel + wide, group + width))


def groups_of(matrix: Tensor) -> int:
    return matrix.shape[1] if matrix.ndim == 4 else 1


def stretches(steps: int) -> list[slice]:
    return [slice(start, min(start + STRETCH, steps)) for start in range(0, steps, STRETCH)]


def walk(d: Tensor, du: Tensor, A: Tensor, B: Tensor, h0: Tensor, a: Tensor, h: Tensor):
    """Eq. 2a for one stretch of k steps: fill a with exp(d A) and h with the states, (rows, k, N, channels) each.

    d and du = d·u (rows, k, channels); A (N, channels); B as of Piece.matrix; h0 (rows, N, channels): state before.
    """
    torch.exp(torch.mul(d[:, :, None], A, out=a), out=a)
    torch.mul(du[:, :, None], B, out=h)
    for a_l, h_l in zip(a.unbind(1), h.unbind(1)):
        h0 = h_l.addcmul_(a_l, h0)


def sum_states(x: Tensor, matrix: Tensor) -> Tensor:
    """Σ_n x[n] matrix[n], (rows, k, channels): a product of matrices if the matrix has no channels of its own."""
    return (x * matrix).sum(2) if matrix.ndim == 2 else (matrix.transpose(2, 3) @ x)[:, :, 0]


def add_matrix_grad(grad: Tensor, x: Tensor, factor: Tensor):
    """To the gradient of B or C (as of Piece.matrix) add x·factor, summed over what shares the matrix.

    x (rows, k, N, channels), factor (rows, k, channels).
    """
    grad += (x * factor[:, :, None]).sum((0, 1)) if grad.ndim == 2 else x @ factor[..., None]


def forward_twin(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe,
                 delta_bias: Maybe, delta_softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, E, L), last state (B, E, N), and, to `save`, the states before steps 0, 6, 12, … (B, ⌈L/6⌉, N, E)."""
    real, (_, E, L) = work_type(u.dtype), u.shape
    out, last, states = new_outputs(u, A, save)
    for rows, channels in blocks(u, A, B, C):
        A_here = A[channels].t().to(real).contiguous()
        buffers = A_here.new_empty(2, rows.stop - rows.start, STRETCH, *A_here.shape)
        h0 = torch.zeros_like(buffers[0, :, 0])
        for steps in stretches(L):
            piece = Piece(rows, channels, steps, real)
            a, h = buffers[:, :, :steps.stop - steps.start]
            u_here, d = piece.load(u), piece.step_size(delta, delta_bias, delta_softplus)[1]
            walk(d, d * u_here, A_here, piece.matrix(B, E).to(real), h0, a, h)
            if save:
                kept = states[rows, steps.start // CHUNK:, :, channels]
                kept[:, 0], kept[:, 1:STRETCH // CHUNK] = h0, h[:, CHUNK - 1:-1:CHUNK]
            h0.copy_(h[:, -1])
            y = sum_states(h, piece.matrix(C, E).to(real))
            if D is not None:
                y = y.addcmul(u_here, D[channels].to(real))
            if z is not None:
                y = y * F.silu(piece.load(z))
            piece.series(out).copy_(y)
        last[rows, channels] = h0.transpose(1, 2)
    return out, last, states


def backward_twin(grad_out: Tensor, grad_last: Maybe, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                  D: Maybe, z: Maybe, delta_bias: Maybe, states: Tensor, delta_softplus: bool) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias (empty for those that are absent).

    With g = d out, s = sigmoid(z), y the ungated output, and sums over whatever shares the tensor in question:

        dz_l = g_l y_l s_l (1 + z_l (1 − s_l))      gy_l = g_l z_l s_l           (without z: gy = g)
        G_l  = gy_l C_l + exp(d_{l+1} A) G_{l+1}    the gradient of h_l, from the last step to the first
        dC   = Σ gy_l h_l        dB = Σ G_l d_l u_l        dD = Σ gy_l u_l        du_l = D gy_l + d_l <G_l, B_l>
        P_l  = G_l exp(d_l A) h_{l-1}               the gradient of d_l A
        dA   = Σ P_l d_l         dd_l = <P_l, A> + u_l <G_l, B_l>           ddelta_l = dd_l sigmoid(delta_l + bias)
    """
    real, (_, E, L) = work_type(u.dtype), u.shape
    grads = new_gradients(u, delta, A, B, C, D, z, delta_bias)
    du, ddelta, dz = grads[0], grads[1], grads[6]
    dA, dB, dC, dD, dbias = sums = [torch.zeros_like(grads[i], dtype=real) for i in (2, 3, 4, 5, 7)]
    for rows, channels in blocks(u, A, B, C):
        A_here = A[channels].t().to(real).contiguous()
        buffers = A_here.new_empty(3, rows.stop - rows.start, STRETCH, *A_here.shape)
        carry = torch.zeros_like(buffers[0, :, 0])                      # exp(d_{l+1} A) G_{l+1}, of the stretch after
        if grad_last is not None:
            carry += grad_last[rows, channels].transpose(1, 2)
        for steps in reversed(stretches(L)):
            piece = Piece(rows, channels, steps, real)
            a, h, G = buffers[:, :, :steps.stop - steps.start]
            u_here, gy = piece.load(u), piece.load(grad_out)
            B_here, C_here = piece.matrix(B, E).to(real), piece.matrix(C, E).to(real)
            x, d = piece.step_size(delta, delta_bias, delta_softplus)
            h0 = states[rows, steps.start // CHUNK, :, channels]
            walk(d, d * u_here, A_here, B_here, h0, a, h)
            if z is not None:
                y = sum_states(h, C_here)
                if D is not None:
                    y = y.addcmul(u_here, D[channels].to(real))
                z_here = piece.load(z)
                s = z_here.sigmoid()
                piece.series(dz).copy_(gy * y * s * (1 + z_here * (1 - s)))
                gy = gy * z_here * s
            torch.mul(gy[:, :, None], C_here, out=G)
            walk_back(a, G, carry)
            add_matrix_grad(piece.matrix(dC, E), h, gy)
            add_matrix_grad(piece.matrix(dB, E), G, d * u_here)
            GB = sum_states(G, B_here)
            P = a.mul_(G)
            carry.copy_(P[:, 0])
            P[:, 1:] *= h[:, :-1]
            P[:, 0] *= h0
            dd = torch.mul(P, A_here, out=h).sum(2).addcmul_(u_here, GB)
            dA[channels] += P.mul_(d[:, :, None]).sum((0, 1)).t()
            if delta_softplus:
                dd *= x.sigmoid()
            if delta_bias is not None:
                dbias[channels] += dd.sum((0, 1))
            du_here = d * GB
            if D is not None:
                dD[channels] += (gy * u_here).sum((0, 1))
                du_here.addcmul_(gy, D[channels].to(real))
            piece.series(du).copy_(du_here)
            piece.series(ddelta).copy_(dd)
    for i, total in zip((2, 3, 4, 5, 7), sums):
        grads[i] = total.to(grads[i].dtype)
    return grads


def walk_back(a: Tensor, G: Tensor, carry: Tensor):
    """Turn G, which holds gy_l C_l, into the gradients of the states: G_l += exp(d_{l+1} A) G_{l+1}, in place."""
    a, G = a.unbind(1), G.unbind(1)
    G[-1].add_(carry)
    for l in range(len(G) - 2, -1, -1):
        G[l].addcmul_(a[l + 1], G[l + 1])

# ----------------------------------------------------------------------------- the kernels
#
# A GPU runs thousands of small programs. Here a program owns a few neighbouring channels (32, or fewer if that left
# most of the GPU idle) of one sequence and walks along time, as a block of the twin does, all in registers:
#
#       the tile h, (N, channels):   lane 0   lane 1   …  lane 31         a warp is 32 lanes that go in step;
#           state 1                  h[1,0]   h[1,1]      h[1,31]         a lane has registers of its own
#           …                          …        …           …
#           state N                  h[N,0]   h[N,1]      h[N,31]         Σ_n runs down a lane: no communication
#
# Memory: u, delta, z are read and out is written once per step and channel. They lie channels last, so that the 32
# numbers of a warp are one piece of memory; other layouts are copied first. B_l and C_l, N numbers each, are the
# same for all lanes. That is little; the time goes into instructions: for N = 16, 16 exponentials and some 100
# products and sums per step and channel. The published CUDA operator scans over time in parallel, by combining pairs
# (a, b) in log L rounds, and spends 21 instructions of a warp per step and channel, 43 backwards. Walking makes each
# product once: 5, and 15 backwards (counted in machine code: `python -m kernels.bench --compile`). A sequence here
# has hundreds of channels, so there is work enough for the GPU without cutting time into pieces.
# exp(d A) is 2^(d A log2 e), because 2^x is what the hardware has an instruction for.
#
# How to read Triton: a `tl` tensor lives in the registers of the program; tl.load reads from a tensor of addresses
# (pointer + offsets, in numbers, not bytes); tl.constexpr arguments are known when the kernel is compiled, and an
# `if` on them, or on a pointer that is None, leaves no trace in the machine code; a static_range loop is unrolled,
# so that the loads of several steps are under way at once. Where a tile is larger than what it covers (N or the
# channels are no power of two; the last steps), offsets are clamped or loads masked with 0, and what must not count
# is not stored. A step past the end has d = 0, which leaves the state as it is.

HALF = CHUNK // 2               # so many steps' states the backward kernel has in registers at once


@triton.jit
def base_2(x):
    """x log2 e: what exp2 wants for exp(x)."""
    return x * 1.4426950408889634


@triton.jit
def softplus(x):
    """ln(1 + e^x) = max(x, 0) + ln(1 + q) with q = e^−|x| ≤ 1, and ln(1 + q) = 2 artanh(s), s = q / (2 + q) ≤ 1/3.

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
    """B_l or C_l, (BLOCK_N, 1), from the address of its first number. Rows past N repeat the last."""
    n = tl.arange(0, BLOCK_N)
    if N < BLOCK_N:
        n = tl.minimum(n, N - 1)
    return tl.load(pointer + n)[:, None]


@triton.jit
def existing(C, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """C with zeros in the rows past N: what such a state holds then counts nowhere."""
    if N < BLOCK_N:
        C = tl.where((tl.arange(0, BLOCK_N) < N)[:, None], C, 0.0)
    return C


@triton.jit
def where_am_i(E: tl.constexpr, groups: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's sequence, group and channels (clamped), their numbers within the group, the group's width."""
    width = E // groups
    per_group = tl.cdiv(width, BLOCK_E)
    program = tl.program_id(0)
    group = program // per_group % groups
    lane = program % per_group * BLOCK_E + tl.arange(0, BLOCK_E)
    sequence, channels = program // (per_group * groups), group * width + tl.minimum(lane, width - 1)
    return sequence.to(tl.int64), group, channels, lane, width


@triton.jit
def inside(lane, width, step, L):
    """Which lanes have a channel to store to at this step: those of real channels, if the step is a real one."""
    return lane < tl.where(step < L, width, 0)


@triton.jit
def forward_kernel(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, last_ptr, states_ptr, L,
                   u_b, delta_b, z_b, B_b, B_g, B_l, C_b, C_g, C_l,
                   u_l: tl.constexpr, delta_l: tl.constexpr, z_l: tl.constexpr, groups: tl.constexpr,
                   E: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
                   CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, B_MOVES: tl.constexpr, C_MOVES: tl.constexpr):
    """Eq. 2 for BLOCK_E channels of one sequence. x_b, x_g, x_l: strides of x along sequences, groups, steps.

    B_MOVES, C_MOVES: the matrix is one per step (B, groups, L, N); else it is constant (N, E). Pointers may be None.
    """
    b, group, e, lane, width = where_am_i(E, groups, BLOCK_E)
    exists = (tl.arange(0, BLOCK_N) < N)[:, None] & (lane < width)[None, :]
    A = base_2(tl.load(tile(A_ptr, e, N, E, BLOCK_N)))                      # exp(d A) = exp2(d · this)
    bias = tl.load(bias_ptr + e).to(tl.float32) if bias_ptr is not None else 0.0
    D = tl.load(D_ptr + e).to(tl.float32) if D_ptr is not None else 0.0
    B_ptr, C_ptr = B_ptr + b * B_b + group * B_g, C_ptr + b * C_b + group * C_g
    if not B_MOVES:
        B = tl.load(tile(B_ptr, e, N, E, BLOCK_N))
    if not C_MOVES:
        C = existing(tl.load(tile(C_ptr, e, N, E, BLOCK_N)), N, BLOCK_N)
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
            if B_MOVES:
                B = matrix_row(at(B_ptr, l, B_l), N, BLOCK_N)
            if C_MOVES:
                C = existing(matrix_row(at(C_ptr, l, C_l), N, BLOCK_N), N, BLOCK_N)
            h = tl.exp2(d[None, :] * A) * h + (d * u)[None, :] * B                                # eq. 2a
            y = tl.sum(h * C, 0) + D * u                                                          # eq. 2b
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


# Backwards. The walk from the last step to the first needs h_l and h_{l-1} of every step. Three steps at a time,
# they are built again from the state kept before every 6th step, and stay in registers until the walk has come by:
#
#       kept ▼     |     ▼     |     ▼
#            0 1 2 | 3 4 5     |                  3 4 5: from the kept state take the detour over 0 1 2, build the
#            ──────→ ────→                               states, come back 5 4 3;
#                    ←────                        0 1 2: likewise, without the detour
#
# The detour is a tenth of all instructions and halves what must be kept. Six steps at once do not fit into the 255
# registers that a lane may have; three do: 3 tiles of states, and one each of A, dA, exp(d A), G, B, C.
#
# dB_l[n] and dC_l[n] are sums over channels, that is over lanes. `tl.sum` would pass every number through five
# exchanges between lanes, and cost more than all the rest. `sum_lanes` adds even and odd columns, five times: Triton
# then hands the whole tile over once, through shared memory, so that each lane adds up one row in its own registers
# (about 45 instructions for both sums instead of 330). Every program writes its sums, the host adds them up: no
# atomic additions, so the same bits in every run.


@triton.jit
def sum_lanes(x, rounds: tl.constexpr):
    """Sum over the 2^rounds columns of x (rows, 2^rounds)."""
    for _ in tl.static_range(rounds):
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        x = even + odd
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def backward_kernel(g_ptr, g_last_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, states_ptr,
                    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dBC_ptr, dD_ptr, dz_ptr, dbias_ptr, L,
                    g_b, u_b, delta_b, z_b, B_b, B_g, B_l, C_b, C_g, C_l,
                    g_l: tl.constexpr, u_l: tl.constexpr, delta_l: tl.constexpr, z_l: tl.constexpr,
                    groups: tl.constexpr, E: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_E: tl.constexpr, ROUNDS: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr,
                    SOFTPLUS: tl.constexpr, B_MOVES: tl.constexpr, C_MOVES: tl.constexpr):
    """The formulas of backward_twin for BLOCK_E = 2^ROUNDS channels of one sequence; names as in forward_kernel.

    Sums over this program's steps or channels, for the host to add: dA, dB, dC (B, N, E), the last two for constant
    matrices; dBC (programs, L, 2, BLOCK_N), the others, dB before dC; dD, dbias (B, E).
    """
    b, group, e, lane, width = where_am_i(E, groups, BLOCK_E)
    exists = (tl.arange(0, BLOCK_N) < N)[:, None] & (lane < width)[None, :]
    A = base_2(tl.load(tile(A_ptr, e, N, E, BLOCK_N)))
    bias = tl.load(bias_ptr + e).to(tl.float32) if bias_ptr is not None else 0.0
    D = tl.load(D_ptr + e).to(tl.float32) if D_ptr is not None else 0.0
    B_ptr, C_ptr = B_ptr + b * B_b + group * B_g, C_ptr + b * C_b + group * C_g
    if not B_MOVES:
        B = tl.load(tile(B_ptr, e, N, E, BLOCK_N))
        dB = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    if not C_MOVES:
        C = existing(tl.load(tile(C_ptr, e, N, E, BLOCK_N)), N, BLOCK_N)
        dC = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    if B_MOVES or C_MOVES:
        dBC_ptr += tl.program_id(0).to(tl.int64) * L * (2 * BLOCK_N)
    halves = tl.cdiv(L, HALF)
    last = tl.cast(halves - 1, tl.int64) * HALF                             # pointers start at the last three steps
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
    if g_last_ptr is not None:
        carry = tl.load(tile(g_last_ptr + b * (N * E), e, N, E, BLOCK_N), exists, 0.0)
    for i in range(halves):
        start = tl.cast((halves - 1 - i) * HALF, tl.int32)
        h = tl.load(tile(at(states_ptr, start // CHUNK, N * E), e, N, E, BLOCK_N))
        if start % CHUNK != 0:                                              # the detour over the steps before
            for k in tl.static_range(-HALF, 0):
                x = tl.load(delta_ptr + k * delta_l).to(tl.float32) + bias
                d = softplus(x) if SOFTPLUS else x
                if B_MOVES:
                    B = matrix_row(at(B_ptr, start + k, B_l), N, BLOCK_N)
                h = tl.exp2(d[None, :] * A) * h + (d * tl.load(u_ptr + k * u_l).to(tl.float32))[None, :] * B
        before, ds, us = (h,), (), ()                                       # per step: h_{l-1}, d_l, u_l
        for k in tl.static_range(HALF):
            there = inside(lane, width, start + k, L)
            x = tl.load(delta_ptr + k * delta_l, there, 0.0).to(tl.float32) + bias
            d = tl.where(there, softplus(x) if SOFTPLUS else x, 0.0)
            u = tl.load(u_ptr + k * u_l, there, 0.0).to(tl.float32)
            ds, us = ds + (d,), us + (u,)
            if k < HALF - 1:
                if B_MOVES:
                    B = matrix_row(at(B_ptr, tl.minimum(start + k, L - 1), B_l), N, BLOCK_N)
                h = tl.exp2(d[None, :] * A) * h + (d * u)[None, :] * B
                before = before + (h,)

        for k in tl.static_range(HALF - 1, -1, -1):
            there, l = inside(lane, width, start + k, L), tl.minimum(start + k, L - 1)
            d, u = ds[k], us[k]
            if B_MOVES:
                B = matrix_row(at(B_ptr, l, B_l), N, BLOCK_N)
            if C_MOVES:
                C = existing(matrix_row(at(C_ptr, l, C_l), N, BLOCK_N), N, BLOCK_N)
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
            if not B_MOVES:
                dB += G * (d * u)[None, :]
            if not C_MOVES:
                dC += h * gy[None, :]
            if B_MOVES or C_MOVES:
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
    if not B_MOVES:
        tl.store(tile(dB_ptr + b * (N * E), e, N, E, BLOCK_N), dB, exists)
    if not C_MOVES:
        tl.store(tile(dC_ptr + b * (N * E), e, N, E, BLOCK_N), dC, exists)
    if D_ptr is not None:
        tl.store(dD_ptr + b * E + e, dD, lane < width)
    if bias_ptr is not None:
        tl.store(dbias_ptr + b * E + e, dbias, lane < width)


def fits_triton(u: Tensor, A: Tensor) -> bool:
    """Whether the kernels are made for these inputs: not for float64, not for over 256 states, not for nothing."""
    return u.dtype != torch.float64 and A.shape[1] <= 256 and u.numel() > 0


def channels_per_program(channels: int, many_registers: bool = False) -> int:
    """How many of all `channels` (of all sequences) a program takes: 32, where a lane has a channel to itself.

    16 or 8 channels are shared by 2 or 4 lanes each: more programs, and fewer registers per lane.
    """
    most = 32 if channels > 2 ** 14 else 16 if channels > 2 ** 13 else 8
    return min(most, 16) if many_registers else most


def launch_sizes(u: Tensor, A: Tensor, groups: int, wide: int) -> tuple[int, int, dict]:
    """Number of programs per group of a sequence, in all, and the sizes that the kernels are compiled for."""
    (batch, E, _), N = u.shape, A.shape[1]
    per_group = -(-(E // groups) // wide)
    high = 1 << (N - 1).bit_length()
    sizes = dict(groups=groups, E=E, N=N, BLOCK_N=high, BLOCK_E=wide, CHUNK=CHUNK, num_warps=max(1, high // 16))
    return per_group, batch * groups * per_group, sizes


def channels_last(x: Tensor) -> Tensor:
    """(B, E, L) as (B, L, E), neighbouring channels next to each other: a view if the memory is so, else a copy."""
    x = x.transpose(1, 2)
    return x if x.stride(2) == 1 else x.contiguous()


def matrix_for_kernel(matrix: Tensor, groups: int) -> tuple[Tensor, tuple]:
    """B or C in float32 as (B, groups, L, N), or (N, E) if it is constant, and its first strides. The last is 1."""
    if matrix.ndim == 2:
        return matrix.t().to(torch.float32).contiguous(), (0, 0, 0)
    matrix = (matrix if matrix.ndim == 4 else matrix[:, None]).transpose(2, 3).to(torch.float32)
    matrix = matrix if matrix.stride(3) == 1 else matrix.contiguous()
    if matrix.shape[1] == 1:
        matrix = matrix.expand(-1, groups, -1, -1)
    elif matrix.shape[1] < groups:
        matrix = matrix.repeat_interleave(groups // matrix.shape[1], 1)
    return matrix, matrix.stride()[:3]


def forward_triton(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe,
                   delta_bias: Maybe, delta_softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """forward_twin by one launch of forward_kernel."""
    groups = math.lcm(groups_of(B), groups_of(C))
    out, last, states = new_outputs(u, A, save)
    series = [None if x is None else channels_last(x) for x in (u, delta, z)]
    (B_rows, B_strides), (C_rows, C_strides) = matrix_for_kernel(B, groups), matrix_for_kernel(C, groups)
    _, programs, sizes = launch_sizes(u, A, groups, channels_per_program(u.shape[0] * u.shape[1]))
    with torch.cuda.device_of(u):
        forward_kernel[(programs,)](
            series[0], series[1], A.t().to(torch.float32).contiguous(), B_rows, C_rows, D, series[2], delta_bias,
            out, last, states if save else None, u.shape[2],
            *strides(series, 0), *B_strides, *C_strides, *strides(series, 1),
            SOFTPLUS=delta_softplus, B_MOVES=B.ndim > 2, C_MOVES=C.ndim > 2, **sizes)
    return out, last, states


def strides(series: list[Maybe], axis: int) -> list[int]:
    """Of each (B, L, E), from one sequence (axis 0) or step (axis 1) to the next; 0 for an absent one."""
    return [0 if x is None else x.stride(axis) for x in series]


def backward_triton(grad_out: Tensor, grad_last: Maybe, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                    D: Maybe, z: Maybe, delta_bias: Maybe, states: Tensor, delta_softplus: bool) -> list[Tensor]:
    """backward_twin by one launch of backward_kernel, and the sums over its programs."""
    (batch, E, L), N, groups = u.shape, A.shape[1], math.lcm(groups_of(B), groups_of(C))
    grads = new_gradients(u, delta, A, B, C, D, z, delta_bias)
    series = [None if x is None else channels_last(x) for x in (grad_out, u, delta, z)]
    (B_rows, B_strides), (C_rows, C_strides) = matrix_for_kernel(B, groups), matrix_for_kernel(C, groups)
    B_moves, C_moves, new = B.ndim > 2, C.ndim > 2, states.new_empty
    wide = channels_per_program(batch * E, many_registers=N > 16 or not (B_moves and C_moves))
    per_group, programs, sizes = launch_sizes(u, A, groups, wide)
    dA, dB, dC = (new(batch, N, E) if wanted else None for wanted in (True, not B_moves, not C_moves))
    dD, dbias = (None if x is None else new(batch, E) for x in (D, delta_bias))
    dBC = new(batch, groups, per_group, L, 2, sizes["BLOCK_N"]) if B_moves or C_moves else None
    with torch.cuda.device_of(u):
        backward_kernel[(programs,)](
            series[0], None if grad_last is None else grad_last.transpose(1, 2).contiguous(), series[1], series[2],
            A.t().to(torch.float32).contiguous(), B_rows, C_rows, D, series[3], delta_bias, states,
            grads[0], grads[1], dA, dB, dC, dBC, dD, grads[6] if z is not None else None, dbias,
            L, *strides(series, 0), *B_strides, *C_strides, *strides(series, 1),
            HALF=HALF, ROUNDS=wide.bit_length() - 1,
            SOFTPLUS=delta_softplus, B_MOVES=B_moves, C_MOVES=C_moves, **sizes)
    grads[2].copy_(dA.sum(0).t())
    for grad, constant, which in ((grads[3], dB, 0), (grads[4], dC, 1)):
        grad.copy_(constant.sum(0).t() if constant is not None else sum_programs(dBC[..., which, :N], grad))
    for grad, rows in ((grads[5], dD), (grads[7], dbias)):
        if rows is not None:
            grad.copy_(rows.sum(0))
    return grads


def sum_programs(parts: Tensor, grad: Tensor) -> Tensor:
    """Parts (B, groups, programs, L, N) of the gradient of B or C, added up to (B, N, L) or (B, G, N, L)."""
    parts = parts.unflatten(1, (groups_of(grad), -1)).sum((2, 3)).transpose(2, 3)
    return parts if grad.ndim == 4 else parts[:, 0]


# ----------------------------------------------------------------------------- the operators


@torch.library.custom_op("pose::selective_scan", mutates_args=())
def scan_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe,
                 delta_bias: Maybe, delta_softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, last_state, kept states (empty unless `save`). torch.compile does not look inside."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    with torch.autocast(u.device.type, enabled=False):
        if not fits_triton(u, A):
            return forward_twin(*inputs, delta_softplus, save)
        return choose("selective_scan", forward_triton, forward_twin, *inputs, delta_softplus, save)


@scan_forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
    return new_outputs(u, A, save)


@torch.library.custom_op("pose::selective_scan_backward", mutates_args=())
def scan_backward(grad_out: Tensor, grad_last: Maybe, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                  D: Maybe, z: Maybe, delta_bias: Maybe, states: Tensor, delta_softplus: bool) -> list[Tensor]:
    """One gradient per argument of the scan, empty for those that are absent. Formulas: backward_twin."""
    inputs = (grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, states)
    with torch.autocast(u.device.type, enabled=False):
        if not fits_triton(u, A):
            return backward_twin(*inputs, delta_softplus)
        return choose("selective_scan backward", backward_triton, backward_twin, *inputs, delta_softplus)


@scan_backward.register_fake
def _(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus):
    return new_gradients(u, delta, A, B, C, D, z, delta_bias)


def keep_for_backward(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)                        # no zeros in the shape of the kept states


def backward(ctx, grad_out, grad_last, _):
    *inputs, states = ctx.saved_tensors
    grad_out = torch.zeros_like(inputs[0]) if grad_out is None else grad_out
    grads = scan_backward(grad_out, grad_last, *inputs, states, ctx.delta_softplus)
    return *(None if x is None else grad for x, grad in zip(inputs, grads)), None, None


def no_second_derivative(ctx, *grads):
    raise NotImplementedError("selective_scan has no second derivative: use selective_scan_plain, which has one")


scan_forward.register_autograd(backward, setup_context=keep_for_backward)
scan_backward.register_autograd(no_second_derivative)


@register_flop_formula(torch.ops.pose.selective_scan)
def forward_flops(u, delta, A, *rest, **options) -> int:
    """Six per state and step: d·A, d u·B, two each for a h + b and for Σ C h. exp counts 0."""
    return 6 * math.prod(u) * A[1]


@register_flop_formula(torch.ops.pose.selective_scan_backward)
def backward_flops(grad_out, grad_last, u, delta, A, *rest, **options) -> int:
    """Twenty per state and step: six as forward, two each for G, P, <G, B>, <P, A>, dA, dB, dC."""
    return 20 * math.prod(u) * A[1]


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe = None, z: Maybe = None,
                   delta_bias: Maybe = None, delta_softplus: bool = False, return_last_state: bool = False
                   ) -> Tensor | tuple[Tensor, Tensor]:
    """Eq. 2 along the last axis of u, with the names, order and layouts of the published operator.

    Takes    u, delta, z (B, E, L), fastest as views of (B, L, E) memory; A (E, N), negative where states should fade
             B, C of shape (B, N, L), (B, G, N, L) or (E, N), not necessarily the same for both; D, delta_bias (E)
             delta_softplus: d = softplus(delta + delta_bias), else d = delta + delta_bias
    Returns  out (B, E, L) in the type of u, a view of (B, L, E) memory; with return_last_state also h_L (B, E, N),
             in float32 (float64 if u is)
    L = 0 gives an empty out and a state of zeros. One derivative exists, not two.
    Raises UserError (a ValueError) for shapes that do not fit together, mixed devices, anything but real numbers.
    """
    check(u, delta, A, B, C, D, z, delta_bias)
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, last_state, _ = scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save)
    return (out, last_state) if return_last_state else out


def check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, delta_bias: Maybe):
    """Raise UserError for inputs that do not fit together."""
    if u.ndim != 3 or A.ndim != 2 or A.shape[0] != u.shape[1] or A.shape[1] == 0:
        raise UserError(f"selective_scan: u {tuple(u.shape)} should be (B, E, L) and A {tuple(A.shape)} (E, N), "
                        "with the same E and N > 0")
    (batch, E, L), N = u.shape, A.shape[1]
    inputs = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    wanted = dict(delta=(batch, E, L), z=(batch, E, L), D=(E,), delta_bias=(E,))
    for name, x in inputs.items():
        if x is None:
            continue
        shape = tuple(x.shape)
        if not x.is_floating_point():
            raise UserError(f"selective_scan: {name} has type {x.dtype}, it should be real floating point")
        if x.device != u.device:
            raise UserError(f"selective_scan: {name} is on {x.device}, u on {u.device}: move all to one device")
        if shape != wanted.get(name, shape):
            raise UserError(f"selective_scan: {name} is {shape}, with u {batch, E, L} it should be {wanted[name]}")
        if name in "BC" and not fits(shape, batch, E, L, N):
            raise UserError(f"selective_scan: {name} is {shape}, with u {batch, E, L} and A {E, N} it should be "
                            f"{batch, N, L}, (B, G, N, L) = ({batch}, a divisor of {E}, {N}, {L}) or {E, N}")


def fits(shape: tuple, batch: int, E: int, L: int, N: int) -> bool:
    """Whether B or C may have this shape."""
    if len(shape) == 4:
        return shape[1] > 0 and E % shape[1] == 0 and (shape[0], *shape[2:]) == (batch, N, L)
    return shape in ((batch, N, L), (E, N))
