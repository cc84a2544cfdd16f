"""Which attention backend is right on this device, how fast each is, and which one the engine takes.

Every backend that can be tried is compared with float64 on the device. One that is wrong is not used. Of the right
ones the first in the order of preference is taken, unless another is faster by more than `MARGIN`: so small noise
between two measurements does not change which one computes, and with it the bits of a result. Within the life of an
engine it is chosen once: by the first dit, which tells the supervisor, which tells all others. The next engine on this
machine takes the same (`stages/attention/kept.py`).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ipc.errors import BadConfig
from ipc.messages.doctor import AttentionMeasured
from ipc.messages.names import AttentionBackend
from stages.attention import kept
from stages.attention.backends import IMPLEMENTATIONS, Case, attention

LENGTHS = ((1, 1), (77, 331), (515, 515), (1, 130), (130, 1))
"""(queries, keys) of the self-test."""
COMMON_LENGTHS = LENGTHS[1:3]
"""Of the test of a backend that was named: few, so that a dit that takes over from another is quick."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
"""Relative L2 distance from float64 that counts as right; rounding the output to bfloat16 alone gives 1.7e-3."""
LSE_TOLERANCE = 5e-3
"""Absolute, of the log-sum-exp."""
TIMED_TOKENS = {"cuda": 8192, "cpu": 1024}
"""Of the measurement: queries and keys."""
ROUNDS = 7
MARGIN = 0.20
"""By how much faster, as a share, a backend must be to be taken before one that is preferred. Half a minute of a warm
card tells more than a few milliseconds of a cool one: at 12 heads on an H100 cuDNN measures 10 % faster here than
FlashAttention-4, with which a whole forward of 32,760 tokens is 13 % faster."""

log = logging.getLogger(__name__)


def try_backend(
    name: AttentionBackend, case: Case, heads: int, with_lse: bool, lengths: Iterable[tuple[int, int]] = LENGTHS
) -> AttentionMeasured:
    """Compare with float64 at odd lengths, one token, one key, and on views of a fused product. Nothing is raised for
    a backend that fails: it is what the test is for."""
    if missing := IMPLEMENTATIONS[name].missing(case):
        return AttentionMeasured(backend=name, problem=missing)
    try:
        errors = [_errors(name, case, heads, *pair, with_lse) for pair in lengths]
    except Exception as raised:  # whatever a library raises here, it would raise in a request
        text = (str(raised).splitlines() or [""])[0][:200]
        return AttentionMeasured(backend=name, problem=f"{type(raised).__name__}: {text}")
    error, lse_error = (max(column) for column in zip(*errors, strict=True))
    problem = ""
    if not error <= TOLERANCE[case.dtype]:
        problem = f"wrong: {error:.1e} from float64, expected at most {TOLERANCE[case.dtype]:.1e}"
    elif not lse_error <= LSE_TOLERANCE:
        problem = f"wrong log-sum-exp: {lse_error:.1e} from float64, expected at most {LSE_TOLERANCE:.1e}"
    return AttentionMeasured(
        backend=name, version=IMPLEMENTATIONS[name].version(), problem=problem, error=error,
        lse_error=lse_error if with_lse else None,
    )  # fmt: skip


def measure(names: Sequence[AttentionBackend], case: Case, heads: int) -> dict[AttentionBackend, float]:
    """Median milliseconds of each over `ROUNDS` rounds in which all take turns, after one to warm up. What this process
    has no memory for, as `math` under a small budget, is left out; raises `torch.OutOfMemoryError` if that is all."""
    tokens = TIMED_TOKENS[case.device.type]
    q, k, v = _qkv(case, heads, tokens, tokens)

    def call(name: AttentionBackend) -> Callable[[], object]:
        return lambda: attention(q, k, v, name)

    times: dict[AttentionBackend, list[float]] = {}
    for name in names:
        try:
            _milliseconds(call(name), case.device)
        except torch.OutOfMemoryError:
            if name == names[-1] and not times:
                raise
        else:
            times[name] = []
    for _ in range(ROUNDS):
        for name, taken in times.items():
            taken.append(_milliseconds(call(name), case.device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def survey(case: Case, heads: int, with_lse: bool) -> list[AttentionMeasured]:
    """Every backend tested, and those that are right timed, in the order of preference."""
    tested = [try_backend(name, case, heads, with_lse) for name in IMPLEMENTATIONS]
    right: list[AttentionBackend] = [entry.backend for entry in tested if not entry.problem]
    times = measure(right, case, heads)
    return [
        AttentionMeasured(
            backend=e.backend, version=e.version, problem=e.problem, error=e.error, lse_error=e.lse_error,
            milliseconds=times.get(e.backend),
        )
        for e in tested
    ]  # fmt: skip


def best(surveyed: Sequence[AttentionMeasured]) -> AttentionBackend:
    """The first that is right, unless another is faster by more than `MARGIN`."""
    timed = [(e.milliseconds, e.backend) for e in surveyed if not e.problem and e.milliseconds is not None]
    assert timed, "the math backend is always right"
    first, name = timed[0]
    fastest = min(timed)
    return fastest[1] if fastest[0] < first * (1 - MARGIN) else name


def automatic(case: Case, heads: int) -> AttentionBackend:
    """What was taken last time if it is still right, else the best, which is kept for the next time."""
    known = kept.recall(case, heads)
    if known is not None and not try_backend(known, case, heads, with_lse=False, lengths=COMMON_LENGTHS).problem:
        return known
    chosen = best(survey(case, heads, with_lse=False))
    kept.remember(case, heads, chosen)
    return chosen


def on_cpu(case: Case, heads: int) -> AttentionBackend:
    """torch's own, if it is right here, else the formula. They are not timed: torch's is several times as fast, and
    what is taken must not depend on what else runs on the cores."""
    tested = try_backend("sdpa", case, heads, with_lse=False, lengths=COMMON_LENGTHS)
    if not tested.problem:
        return "sdpa"
    log.warning("torch's attention is not used: %s", tested.problem)
    return "math"


def choose(wanted: str, case: Case, heads: int) -> AttentionBackend:
    """The backend for `wanted`: `auto` or a name. Raises `BadConfig` if that one does not work here."""
    if wanted == "auto":
        return on_cpu(case, heads) if case.device.type == "cpu" else automatic(case, heads)
    names = {str(name): name for name in IMPLEMENTATIONS}
    tested = try_backend(names[wanted], case, heads, with_lse=False, lengths=COMMON_LENGTHS)
    if tested.problem:
        raise BadConfig(
            f"attention_backend is {wanted}, which does not work on {case.device}: {tested.problem}; use auto, or one "
            "that `engine doctor` finds right"
        )
    return names[wanted]


def _errors(
    name: AttentionBackend, case: Case, heads: int, queries: int, keys: int, with_lse: bool
) -> tuple[float, float]:
    """Relative L2 distance of the output from float64, and the largest difference of the log-sum-exp."""
    q, k, v = _qkv(case, heads, queries, keys)
    expected, expected_lse = attention(q.double(), k.double(), v.double(), "math", return_lse=True)
    lse_error = 0.0
    if with_lse:
        out, lse = attention(q, k, v, name, return_lse=True)
        if lse.shape != expected_lse.shape:
            raise ValueError(f"log-sum-exp of shape {list(lse.shape)}, expected {list(expected_lse.shape)}")
        lse_error = float((lse - expected_lse).abs().max())
    out = attention(q, k, v, name)
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"output {out.dtype} {list(out.shape)}, expected {q.dtype} {list(q.shape)}")
    return float((out.double() - expected).norm() / expected.norm()), lse_error


def _qkv(case: Case, heads: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal values, q a little larger so that some scores stand out; as many queries as keys: views of one tensor."""
    generator = torch.Generator(case.device).manual_seed(queries * 1000 + keys)
    shape = (1, max(queries, keys), 3, heads, case.head_dim)
    fused = torch.randn(shape, generator=generator, device=case.device)
    fused[:, :, 0] *= 2
    q, k, v = fused.to(case.dtype).unbind(2)
    return q[:, :queries], k[:, :keys], v[:, :keys]


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began)
    with torch.cuda.device(device.index or 0):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end))
