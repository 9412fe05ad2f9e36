"""Attention with its tangent in plain PyTorch: the specification, and the backend that runs
everywhere.

Symbols: `t*` is a tangent, `d*` a cotangent.

    S  = scale Q K^T + mask                    P = softmax(S)
    T  = scale (tQ K^T + Q tK^T) + tmask       H = P * T        mu = rowsum(H)
    O  = P V                                   tO = H V - mu O + P tV

tO is the derivative of O along (tQ, tK, tV, tmask): dP = P * (T - mu), and mu O = (mu P) V. It does
not change when a constant is added to a row of T, which is what the shift c below uses.

One streaming pass over tiles of keys keeps, for every row, m l mu c and two accumulators:

    m' = max(m, rowmax(S))      a = exp(m - m')      p = exp(S - m')      h = p * (T - c)
    l  = a l + rowsum(p)        acc  = a acc  + p V
    mu = a mu + rowsum(h)       tacc = a tacc + h V + p tV
    end:  O = acc / l      tO = tacc / l - (mu / l) O      lse = m + log l      mu = mu / l + c

lse is kept in two numbers, its rounding and what that has lost: P = exp(S - lse - lse_low) has all
digits where scores are large, and where an added mask drowns them (finfo.min + log l is finfo.min).

c is the mean of T by p, rowsum(p T) / rowsum(p), of the first tile that has a live key, and again
of each later one beside which all that came before is lost in rounding (a l is below eps / 1024).
Without it a component that all of tK shares must cancel in tacc - mu O; with it, where one key
takes all of these tiles, h is 0 to the last digit, as in eager's formula. Kernels of half types
without a mask, whose rounding hides that, take the plain mean of the first tile. A row without a
live key gives O = tO = mu = 0 and lse = -inf.

Backward, with cotangents dO and dtO, and the same tiles:

    beta  = rowsum(dtO * O)         delta = rowsum(dO * O) + rowsum(dtO * tO)
    A  = dO V^T + dtO tV^T          B = dtO V^T          tP = P (T - mu)
    gT = P (B - beta)               gS = P (A - delta) + gT (T - mu)
    dQ = scale (gS K + gT tK)       dK = scale (gS^T Q + gT^T tQ)       dV = P^T dO + tP^T dtO
    dtQ = scale gT K                dtK = scale gT^T Q                  dtV = P^T dtO
    dmask = gS                      dtmask = gT

T enters a gradient as T - mu alone, for the same reason as c. Where rows see the keys of one tile
alone, mu, beta and delta are summed again, of the very T, B and A that they are taken from: where
one key takes all, those cancel to the last digit, as in eager's formula. The C++ kernels, in
float32, sum beta and delta in the order of B and A, so that they do over any number of tiles. The
sums of gS and of gT over the keys are 0, but for what rounding leaves: that lies on the keys by P,
and dQ and dtQ would have it times the mean of the keys by P. It is taken off again, times the key
that has more than half of P, or, where none has, what all keys have in common (not under a mask or
causally: a row gets nothing of keys that it does not see). Triton does the former, in float32.

The online softmax is Milakov & Gimelshein (arXiv 1805.02867), the tiling FlashAttention's (arXiv
2205.14135); the tangent in the same pass is Lu & Song's (arXiv 2410.11081, appendix on JVP of flash
attention).
"""

import math

import torch
from torch import Tensor

from scm_kernels.attention.config import reference_tiles
from scm_kernels.attention.problem import Backward, Forward


def unavailable() -> str | None:
    """PyTorch is all that it needs."""
    return None


def refuses(problem: Forward | Backward) -> str | None:
    """It takes every problem."""
    return None


def dense(q, k, v, tq, tk, tv, mask, tmask, *, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """(O, tO, lse, mu) by the formula: O(M N) memory, inputs' dtype, any order of derivative."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    groups = q.shape[1] // max(k.shape[1], 1)
    k, v, tk, tv = (
        None if x is None else x.repeat_interleave(groups, dim=1) for x in (k, v, tk, tv)
    )
    scores = scale * q @ k.mT
    scores, live = _masked(scores, mask, causal, rows=slice(0, shape[2]), keys=slice(0, shape[3]))
    if shape[3] > 0:
        peak = scores.detach().amax(-1, keepdim=True)
    else:  # a maximum of nothing, which PyTorch refuses
        peak = scores.new_full((*shape[:3], 1), -math.inf)
    p = torch.exp(scores - peak.masked_fill(peak == -math.inf, 0.0))
    total = p.sum(-1, keepdim=True)
    p = p / total.masked_fill(total == 0, 1.0)
    out = p @ v
    t = torch.zeros_like(scores)
    if tq is not None:
        t = t + scale * tq @ k.mT
    if tk is not None:
        t = t + scale * q @ tk.mT
    if tmask is not None:
        t = t + tmask
    if live is not None:
        t = t.masked_fill(~live, 0.0)
    h = p * t
    mu = h.sum(-1, keepdim=True)
    t_out = h @ v - mu * out
    if tv is not None:
        t_out = t_out + p @ tv
    lse = torch.where(total == 0, -math.inf, peak + total.log())
    return out, t_out, lse.squeeze(-1), mu.squeeze(-1)


def _masked(scores, mask, causal, *, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
    """Scores with the mask applied, and which of them take part (None: all)."""
    live = None
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
        live = scores != -math.inf
    elif mask is not None:
        live = mask
    if causal:
        row = torch.arange(rows.start, rows.stop, device=scores.device)
        key = torch.arange(keys.start, keys.stop, device=scores.device)
        below = row[:, None] >= key
        live = below if live is None else live & below
    if live is not None:
        scores = scores.masked_fill(~live, -math.inf)
    return scores, live


class _Tiles:
    """The inputs of a problem in the dtype of the accumulators, cut into tiles of rows and keys.

    Query heads that share a key head are folded into its rows, so that K and V are never expanded:
    a tile of scores is [B, Hk, G, rows, keys] with H = Hk G.
    """

    def __init__(self, problem: Forward | Backward):
        p = self.problem = problem
        self.dtype = torch.float64 if p.q.dtype == torch.float64 else torch.float32
        self.b, self.h, self.m, _ = p.q.shape
        self.hk, self.n = p.k.shape[1:3]
        self.groups = self.h // self.hk
        self.k, self.v, self.tk, self.tv = map(self._wide, (p.k, p.v, p.tk, p.tv))
        self.block_m, self.block_n = reference_tiles(self.b * self.h, self.m, self.n)

    def _wide(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(self.dtype)

    def row_tiles(self):
        for start in range(0, self.m, self.block_m):
            yield slice(start, min(start + self.block_m, self.m))

    def key_tiles(self, rows: slice):
        """The tiles of keys that a tile of rows sees; those above a causal diagonal are skipped."""
        last = min(self.n, rows.stop) if self.problem.causal else self.n
        for start in range(0, last, self.block_n):
            yield slice(start, min(start + self.block_n, last))

    def rows(self, x: Tensor | None, rows: slice) -> Tensor | None:
        """Rows of a per-query tensor [B, H, M, X] as [B, Hk, G * rows, X]."""
        if x is None:
            return None
        return self._wide(x[:, :, rows]).reshape(self.b, self.hk, -1, x.shape[3])

    def scaled_rows(self, x: Tensor | None, rows: slice) -> Tensor | None:
        """scale Q, or scale tQ, of a tile of rows."""
        return None if x is None else self.rows(x, rows) * self.problem.scale

    def probabilities(self, s: Tensor, rows: slice) -> Tensor:
        """P of a backward, which writes to S; 0 in a dead row."""
        lse = self.rows(self.problem.lse[..., None], rows)
        p = s.sub_(lse.masked_fill(lse == -math.inf, math.inf))
        if self.problem.lse_low is not None:
            p = p.sub_(self.rows(self.problem.lse_low[..., None], rows))
        return p.exp_()

    def scores(self, q, tq, rows: slice, keys: slice):
        """(S, T) of a tile [B, Hk, G, rows, keys] from scaled rows; T None: no tangent."""
        p = self.problem
        k = self.k[:, :, keys].mT
        s = self._unfold(q @ k)
        s, live = _masked(s, self._mask(p.mask, rows, keys), p.causal, rows=rows, keys=keys)
        t = None
        if tq is not None:
            t = self._unfold(tq @ k)
        if self.tk is not None:
            u = self._unfold(q @ self.tk[:, :, keys].mT)
            t = u if t is None else t.add_(u)
        if p.tmask is not None:
            u = self._mask(p.tmask, rows, keys)
            t = u.expand(s.shape) if t is None else t + u
        if t is not None and live is not None:
            t = t.masked_fill(~live, 0.0)
        return s, t

    def _mask(self, mask: Tensor | None, rows: slice, keys: slice) -> Tensor | None:
        """A tile of a mask as [B or 1, Hk or 1, G or 1, rows or 1, keys or 1]."""
        if mask is None:
            return None
        mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
        mask = mask if mask.shape[3] == 1 else mask[..., keys]
        heads = (1, 1) if mask.shape[1] == 1 else (self.hk, self.groups)
        mask = mask.unflatten(1, heads)
        return mask if mask.dtype == torch.bool else mask.to(self.dtype)

    def _unfold(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.groups, -1))


def forward(problem: Forward) -> None:
    """One streaming pass over the keys, for one tile of rows at a time."""
    tiles = _Tiles(problem)
    for rows in tiles.row_tiles():
        q, tq = tiles.scaled_rows(problem.q, rows), tiles.scaled_rows(problem.tq, rows)
        state = _RowState(tiles, q.shape[2])
        for keys in tiles.key_tiles(rows):
            state.add(*tiles.scores(q, tq, rows, keys), keys)
        shape = (tiles.b, tiles.h, rows.stop - rows.start)
        out, t_out, lse, mu, low = state.finish()
        problem.out[:, :, rows] = out.reshape(*shape, -1)
        problem.t_out[:, :, rows] = t_out.reshape(*shape, -1)
        problem.lse[:, :, rows] = lse.reshape(shape)
        problem.mu[:, :, rows] = mu.reshape(shape)
        if problem.lse_low is not None:
            problem.lse_low[:, :, rows] = low.reshape(shape)


class _RowState:
    """The dual online softmax: m l mu c [B, Hk, G rows, 1], acc and tacc [B, Hk, G rows, E]."""

    def __init__(self, tiles: _Tiles, rows: int):
        self.tiles = tiles
        zeros = tiles.k.new_zeros(tiles.b, tiles.hk, rows, 1)
        self.m, self.l, self.mu, self.c = zeros - math.inf, zeros, zeros, zeros
        self.acc = self.tacc = zeros  # of width 1 until the first tile

    def add(self, s: Tensor, t: Tensor | None, keys: slice) -> None:
        """Take in one tile: s, t [B, Hk, G, rows, keys]."""
        tiles, v = self.tiles, self.tiles.v[:, :, keys]
        s = s.flatten(2, 3)
        peak = torch.maximum(self.m, s.amax(-1, keepdim=True))
        finite = peak.masked_fill(peak == -math.inf, 0.0)
        a = torch.exp(self.m - finite)
        p = torch.exp(s.sub_(finite))
        sums = p.sum(-1, keepdim=True)
        if t is not None:
            t = t.flatten(2, 3)
            mean = (p * t).sum(-1, keepdim=True) / sums.clamp(min=1.0)  # or 0 without a live key
            self.c = torch.where(a * self.l < torch.finfo(a.dtype).eps / 1024, mean, self.c)
            h = (t - self.c).mul_(p)
            self.mu = a * self.mu + h.sum(-1, keepdim=True)
            self.tacc = torch.addcmul(h @ v, a, self.tacc)
        elif tiles.tv is not None:
            self.tacc = a * self.tacc
        if tiles.tv is not None:
            self.tacc = self.tacc + p @ tiles.tv[:, :, keys]
        self.l = a * self.l + sums
        self.acc = torch.addcmul(p @ v, a, self.acc)
        self.m = peak

    def finish(self) -> tuple[Tensor, ...]:
        """(O, tO, lse, mu, lse_low), normalised."""
        dead = self.l == 0
        total = self.l.masked_fill(dead, 1.0)
        out, mu = self.acc / total, self.mu / total
        t_out = self.tacc / total - mu * out
        lse = self.m + total.log()
        low = (self.m - lse + total.log()).masked_fill(dead, 0.0)
        return out, t_out, lse, (mu + self.c).masked_fill(dead, 0.0), low


def backward(problem: Backward) -> None:
    """The closed form, one tile of rows and keys at a time; lse and mu stand for the softmax."""
    tiles = _Tiles(problem)
    sums = {
        name: None if x is None else torch.zeros_like(x, dtype=tiles.dtype)
        for name in ("dq", "dk", "dv", "dtq", "dtk", "dtv", "dmask", "dtmask")
        for x in (getattr(problem, name),)
    }
    for rows in tiles.row_tiles():
        row, key_tiles = _RowGradient(tiles, rows), list(tiles.key_tiles(rows))
        for keys in key_tiles:
            row.add(keys, sums, whole=len(key_tiles) == 1)
        row.take_off_rest(sums)
    for name, total in sums.items():
        if total is not None:
            getattr(problem, name).copy_(total)


def _centred(x: Tensor, p: Tensor) -> Tensor:
    """x less its mean under p, which is what rounding has left of one that was taken off before."""
    return x - (p * x).sum(-1, keepdim=True)


class _RowGradient:
    """The gradients that a tile of rows [B, Hk, G rows, X] sends out, a tile of keys at a time."""

    def __init__(self, tiles: _Tiles, rows: slice):
        p = tiles.problem
        self.tiles, self.span = tiles, rows
        self.q, self.tq = tiles.scaled_rows(p.q, rows), tiles.scaled_rows(p.tq, rows)
        out, t_out, self.do, self.dto = (
            tiles.rows(x, rows) for x in (p.out, p.t_out, p.dout, p.dt_out)
        )
        self.delta = tiles.k.new_zeros(*self.q.shape[:3], 1)
        if self.do is not None:
            self.delta += (self.do * out).sum(-1, keepdim=True)
        if self.dto is not None:
            self.mu = tiles.rows(p.mu[..., None], rows)
            self.beta = (self.dto * out).sum(-1, keepdim=True)
            # A tO that float16 does not hold is no part of a gradient that nothing flows back to.
            products = (self.dto * t_out).masked_fill(self.dto == 0, 0.0)
            self.delta += products.sum(-1, keepdim=True)
        self.rest_s = self.rest_t = self.most = torch.zeros_like(self.delta)
        self.heaviest = torch.zeros_like(self.delta, dtype=torch.int64)

    def add(self, keys: slice, sums: dict[str, Tensor | None], *, whole: bool) -> None:
        """`whole`: the rows see no keys but these."""
        tiles, do, dto = self.tiles, self.do, self.dto
        s, t = tiles.scores(self.q, self.tq, self.span, keys)
        p = tiles.probabilities(s.flatten(2, 3), self.span)
        v = tiles.v[:, :, keys]
        a = torch.zeros_like(p) if do is None else do @ v.mT
        grad_t = t_p = None
        if dto is not None:
            if tiles.tv is not None:
                a = a + dto @ tiles.tv[:, :, keys].mT
            t = torch.zeros_like(p) if t is None else t.flatten(2, 3) - self.mu
            b = dto @ v.mT - self.beta
            if whole:
                t, b = _centred(t, p), _centred(b, p)
            t_p, grad_t = p * t, p * b
            a = torch.addcmul(a, b, t)
        a = a - self.delta
        grad_s = p * (_centred(a, p) if whole else a)
        self._scatter(keys, sums, p, t_p, grad_s, grad_t)
        self.rest_s = self.rest_s + grad_s.sum(-1, keepdim=True)
        if grad_t is not None:
            self.rest_t = self.rest_t + grad_t.sum(-1, keepdim=True)
        most, key = p.max(-1, keepdim=True)
        self.heaviest = torch.where(most > self.most, keys.start + key, self.heaviest)
        self.most = torch.maximum(self.most, most)

    def take_off_rest(self, sums: dict[str, Tensor | None]) -> None:
        """What rounding has left of sums of gS and gT that are 0."""
        k, tk = self._near(self.tiles.k), self._near(self.tiles.tk)
        for name, rest, x in (
            *(("dq", self.rest_s, k), ("dq", self.rest_t, tk)),
            ("dtq", self.rest_t, k),
        ):
            if sums[name] is not None and x is not None:
                part = torch.where(rest == 0, 0.0, rest * x)
                part = part.reshape(self.tiles.b, self.tiles.h, -1, x.shape[3])
                sums[name][:, :, self.span].sub_(part, alpha=self.tiles.problem.scale)

    def _near(self, x: Tensor | None) -> Tensor | None:
        """What is near the mean of x by P: the row of a key with most of it, or what all rows have
        in common. Of the means of four parts, the least if all are positive, the largest if all
        are negative, else 0: a few rows that are unlike the others have no part in it."""
        if x is None:
            return None
        p, common = self.tiles.problem, 0.0
        if p.mask is None and not p.causal and x.shape[2] >= 4:
            parts = torch.stack([x[:, :, i::4].mean(2, keepdim=True) for i in range(4)])
            low, high = parts.aminmax(dim=0)
            common = low.clamp(min=0) + high.clamp(max=0)
            common = common.masked_fill(~common.isfinite(), 0.0)
        heaviest = x.gather(2, self.heaviest.expand(-1, -1, -1, x.shape[3]))
        return torch.where(self.most > 0.5, heaviest, common)

    def _scatter(self, keys, sums, p, t_p, grad_s, grad_t) -> None:
        """Add this tile's part to every gradient that is wanted."""
        tiles = self.tiles
        k, tk = tiles.k[:, :, keys], None if tiles.tk is None else tiles.tk[:, :, keys]
        self._to_rows(sums["dq"], (grad_s, k), (grad_t, tk))
        self._to_rows(sums["dtq"], (grad_t, k))
        self._to_keys(sums["dk"], keys, (grad_s, self.q), (grad_t, self.tq))
        self._to_keys(sums["dtk"], keys, (grad_t, self.q))
        self._to_keys(sums["dv"], keys, (p, self.do), (t_p, self.dto))
        self._to_keys(sums["dtv"], keys, (p, self.dto))
        self._to_mask(sums["dmask"], keys, grad_s)
        self._to_mask(sums["dtmask"], keys, grad_t)

    def _to_rows(self, total: Tensor | None, *products) -> None:
        for x, y in products:
            if total is not None and x is not None and y is not None:
                part = (x @ y).reshape(self.tiles.b, self.tiles.h, -1, y.shape[-1])
                total[:, :, self.span].add_(part, alpha=self.tiles.problem.scale)

    def _to_keys(self, total: Tensor | None, keys: slice, *products) -> None:
        for x, y in products:
            if total is not None and x is not None and y is not None:
                total[:, :, keys] += x.mT @ y

    def _to_mask(self, total: Tensor | None, keys: slice, x: Tensor | None) -> None:
        if total is None or x is None:
            return
        total = total if total.shape[2] == 1 else total[:, :, self.span]
        total = total if total.shape[3] == 1 else total[..., keys]
        total += x.reshape(self.tiles.b, self.tiles.h, -1, x.shape[-1]).sum_to_size(total.shape)
