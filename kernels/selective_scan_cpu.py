"""The selective scan in PyTorch, fast on a CPU: the forward and, written by hand, the backward pass.

The formula is slow not for its loop (a PyTorch call costs a microsecond) but for (a) several calls per step,
(b) tensors of L·N numbers per channel, which do not stay in the cache, (c) automatic differentiation through
a slice x[:, l], whose backward pass fills a tensor of the size of x with zeros, at every step. Hence:

  * 36 steps at a time, and as many channels as make BLOCK numbers per step: buffers that stay in the cache;
  * in such a stretch, a = exp(d A) and b = d u B of all steps in one call each; then one in-place call per
    step, which adds a_l h_{l-1} to b_l and so makes it h_l; then one product with C for all steps;
  * the backward pass takes the stretches from the last to the first, builds the states of each again from the
    one before it, which the forward pass has kept, and walks back with one call per step.

Buffers are (B, 36, N, E): channels last, so that d (…, 1, E) and B (…, N, 1) both spread over long rows.
Dividing by running products of a would need no loop, but they underflow, and it is no faster.

Read      walk → forward_cpu → backward_cpu, the gradients as formulas; letters as in selective_scan.py
"""
import math
from typing import Iterator, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import working_type

Maybe = Optional[Tensor]    # an argument that may be absent
CHUNK = 6                   # the state before every 6th step is kept for the backward pass
STRETCH = 6 * CHUNK         # steps that are done together
BLOCK = 3 * 2 ** 13         # numbers per step and buffer: a stretch of them in float32 is 3.5 MB

# ----------------------------------------------------------------------------- memory, for the kernels, too


def new_outputs(u: Tensor, A: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for out, last_state and kept states, channels last, as the linear layer behind a scan wants it."""
    (batch, E, L), N = u.shape, A.shape[1]
    real = working_type(u.dtype)
    states = (batch, -(-L // CHUNK), N, E) if save else (0,)
    return (u.new_empty(batch, L, E).transpose(1, 2), u.new_empty(batch, N, E, dtype=real).transpose(1, 2),
            u.new_empty(states, dtype=real))


def new_gradients(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe,
                  delta_bias: Maybe) -> list[Tensor]:
    """Memory for a gradient per argument, of its shape and type, series channels last; empty if absent."""
    return [u.new_empty(0) if x is None else
            x.new_empty(x.shape) if x.ndim < 3 else x.new_empty(x.mT.shape).mT
            for x in (u, delta, A, B, C, D, z, delta_bias)]


def groups_of(matrix: Tensor) -> int:
    return matrix.shape[1] if matrix.ndim == 4 else 1

# ----------------------------------------------------------------------------- pieces
#
# A piece is what is done at once: three slices, of the sequences, the channels (of one group) and the steps.


def load(x: Tensor, piece: tuple, real: torch.dtype) -> Tensor:
    """The piece of x (B, E, L) as a tensor of its own (rows, steps, channels), in the type of the arithmetic."""
    return x[piece].mT.to(real).contiguous()


def load_step_size(delta: Tensor, bias: Maybe, softplus: bool, piece: tuple, real: torch.dtype
                   ) -> tuple[Tensor, Tensor]:
    """delta + bias, and d, its softplus if that is wanted."""
    x = load(delta, piece, real)
    if bias is not None:
        x = x + bias[piece[1]].to(real)
    return x, F.softplus(x) if softplus else x


def matrix_part(matrix: Tensor, piece: tuple, channels: int) -> Tensor:
    """The piece of B or C: a view (rows, steps, N, 1), or (N, channels) if constant; `channels` is E."""
    if matrix.ndim == 2:
        return matrix[piece[1]].t()
    matrix = matrix if matrix.ndim == 4 else matrix[:, None]
    group = piece[1].start // (channels // matrix.shape[1])
    return matrix[piece[0], group, :, piece[2]].mT[..., None]


def blocks(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Iterator[tuple[slice, slice]]:
    """Sequences and channels to do together: about BLOCK numbers per step at most, one group only."""
    batch, channels = u.shape[:2]
    width = channels // math.lcm(groups_of(B), groups_of(C))
    if batch * channels:
        wide = math.ceil(width / math.ceil(width * A.shape[1] / BLOCK))
        high = max(1, BLOCK // (wide * A.shape[1]))
        for row in range(0, batch, high):
            for group in range(0, channels, width):
                for channel in range(group, group + width, wide):
                    last = min(channel + wide, group + width)
                    yield slice(row, min(row + high, batch)), slice(channel, last)


# ----------------------------------------------------------------------------- the scan


def walk(d: Tensor, du: Tensor, A: Tensor, B: Tensor, h0: Tensor, a: Tensor, h: Tensor):
    """Eq. 2a for a stretch of k steps: fill a with exp(d A), h with the states, (rows, k, N, channels) each.

    d and du = d·u (rows, k, channels); A (N, channels); B as of matrix_part; h0 (rows, N, channels) is the
    state before.
    """
    torch.exp(torch.mul(d[:, :, None], A, out=a), out=a)
    torch.mul(du[:, :, None], B, out=h)
    for a_l, h_l in zip(a.unbind(1), h.unbind(1)):
        h0 = h_l.addcmul_(a_l, h0)


def walk_back(a: Tensor, G: Tensor, carry: Tensor):
    """Turn G, in place, from gy_l C_l into the gradients of the states: G_l += exp(d_{l+1} A) G_{l+1}."""
    a, G = a.unbind(1), G.unbind(1)
    G[-1].add_(carry)
    for l in range(len(G) - 2, -1, -1):
        G[l].addcmul_(a[l + 1], G[l + 1])


def sum_states(x: Tensor, matrix: Tensor) -> Tensor:
    """Σ_n x[n] matrix[n], (rows, k, channels): a matrix product if the matrix has no channels of its own."""
    return (x * matrix).sum(2) if matrix.ndim == 2 else (matrix.transpose(2, 3) @ x)[:, :, 0]


def add_matrix_grad(grad: Tensor, x: Tensor, factor: Tensor):
    """To the gradient of B or C (as of matrix_part) add x·factor, summed over what shares the matrix.

    x (rows, k, N, channels), factor (rows, k, channels).
    """
    grad += (x * factor[:, :, None]).sum((0, 1)) if grad.ndim == 2 else x @ factor[..., None]


def forward_cpu(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe,
                delta_bias: Maybe, delta_softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, E, L), last state (B, E, N); to `save`, the states before steps 0, 6, … (B, ⌈L/6⌉, N, E)."""
    real, (_, E, L) = working_type(u.dtype), u.shape
    out, last, states = new_outputs(u, A, save)
    for rows, channels in blocks(u, A, B, C):
        A_here = A[channels].t().to(real).contiguous()
        buffers = A_here.new_empty(2, rows.stop - rows.start, STRETCH, *A_here.shape)
        h0 = torch.zeros_like(buffers[0, :, 0])
        for first in range(0, L, STRETCH):
            piece = rows, channels, slice(first, first + STRETCH)
            a, h = buffers[:, :, :L - first]
            u_here, d = load(u, piece, real), load_step_size(delta, delta_bias, delta_softplus, piece, real)[1]
            walk(d, d * u_here, A_here, matrix_part(B, piece, E).to(real), h0, a, h)
            if save:
                kept = states[rows, first // CHUNK:, :, channels]
                kept[:, 0], kept[:, 1:STRETCH // CHUNK] = h0, h[:, CHUNK - 1:-1:CHUNK]
            h0.copy_(h[:, -1])
            y = sum_states(h, matrix_part(C, piece, E).to(real))                                   # eq. 2b
            if D is not None:
                y = y.addcmul(u_here, D[channels].to(real))
            if z is not None:
                y = y * F.silu(load(z, piece, real))
            out[piece] = y.mT
        last[rows, channels] = h0.transpose(1, 2)
    return out, last, states


def backward_cpu(grad_out: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe,
                 z: Maybe, delta_bias: Maybe, states: Tensor, delta_softplus: bool) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias (empty for those that are absent).

    With g = d out, s = sigmoid(z), y the ungated output, and sums over whatever shares the tensor:

        dz_l = g_l y_l s_l (1 + z_l (1 − s_l))      gy_l = g_l z_l s_l           (without z: gy = g)
        G_l  = gy_l C_l + exp(d_{l+1} A) G_{l+1}    the gradient of h_l, from the last step to the first
        dC   = Σ gy_l h_l      dB = Σ G_l d_l u_l      dD = Σ gy_l u_l      du_l = D gy_l + d_l <G_l, B_l>
        P_l  = G_l exp(d_l A) h_{l-1}               the gradient of d_l A
        dA   = Σ P_l d_l         dd_l = <P_l, A> + u_l <G_l, B_l>      ddelta_l = dd_l sigmoid(delta_l + bias)
    """
    real, (_, E, L) = working_type(u.dtype), u.shape
    grads = new_gradients(u, delta, A, B, C, D, z, delta_bias)
    du, ddelta, dz = grads[0], grads[1], grads[6]
    dA, dB, dC, dD, dbias = sums = [torch.zeros_like(grads[i], dtype=real) for i in (2, 3, 4, 5, 7)]
    for rows, channels in blocks(u, A, B, C):
        A_here = A[channels].t().to(real).contiguous()
        buffers = A_here.new_empty(3, rows.stop - rows.start, STRETCH, *A_here.shape)
        carry = torch.zeros_like(buffers[0, :, 0])              # exp(d_{l+1} A) G_{l+1}, of the stretch after
        for first in reversed(range(0, L, STRETCH)):
            piece = rows, channels, slice(first, first + STRETCH)
            a, h, G = buffers[:, :, :L - first]
            u_here, gy = load(u, piece, real), load(grad_out, piece, real)
            B_here, C_here = (matrix_part(matrix, piece, E).to(real) for matrix in (B, C))
            x, d = load_step_size(delta, delta_bias, delta_softplus, piece, real)
            h0 = states[rows, first // CHUNK, :, channels]
            walk(d, d * u_here, A_here, B_here, h0, a, h)
            if z is not None:
                y = sum_states(h, C_here)
                if D is not None:
                    y = y.addcmul(u_here, D[channels].to(real))
                z_here = load(z, piece, real)
                s = z_here.sigmoid()
                dz[piece] = (gy * y * s * (1 + z_here * (1 - s))).mT
                gy = gy * z_here * s
            torch.mul(gy[:, :, None], C_here, out=G)
            walk_back(a, G, carry)
            add_matrix_grad(matrix_part(dC, piece, E), h, gy)
            add_matrix_grad(matrix_part(dB, piece, E), G, d * u_here)
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
            du[piece], ddelta[piece] = du_here.mT, dd.mT
    for i, total in zip((2, 3, 4, 5, 7), sums):
        grads[i] = total.to(grads[i].dtype)
    return grads
