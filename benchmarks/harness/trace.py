"""Where the GPU's time went, read from a torch.profiler chrome trace."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = [
    "Activity", "between_marks", "class_of", "covered", "gpu_activities", "merged", "runtime_calls", "stalls", "summarise", "windows",
]  # fmt: skip

Interval = tuple[float, float]

COMMUNICATION = ("NCCL", "peer copies")


@dataclass(frozen=True)
class Activity:
    """One kernel, copy or fill on the GPU; microseconds."""

    name: str
    category: str  # kernel, gpu_memcpy, gpu_memset
    start: float
    duration: float
    stream: int

    @property
    def end(self) -> float:
        return self.start + self.duration


_CLASSES = [
    ("NCCL", r"nccl"),
    ("peer copies", r"symm_?mem|multimem|one_shot|two_shot|stream_write_value|(put|wait)_signal|barrier_kernel"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("GEMM", r"gemm|nvjet|cublas|cutlass|xmma|splitk|_mm_|matmul|wgmma"),
]


def class_of(activity: Activity, main_stream: int) -> str:
    """GEMM, attention, elementwise, NCCL, peer copies, memcpy or memset."""
    if activity.category == "gpu_memset":
        return "memset"
    if activity.category == "gpu_memcpy":
        # Copies beside the computing stream move activations between ranks; those on it belong to the computation.
        return "peer copies" if "PtoP" in activity.name or activity.stream != main_stream else "memcpy"
    name = activity.name.lower()
    return next((title for title, pattern in _CLASSES if re.search(pattern, name)), "elementwise")


def gpu_activities(events: Iterable[dict[str, Any]]) -> list[Activity]:
    """Everything that occupied the GPU, in order of its start."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [
        Activity(e["name"], e["cat"], float(e["ts"]), float(e["dur"]), int(e.get("args", {}).get("stream", 0)))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in kinds
    ]
    return sorted(found, key=lambda a: a.start)


def windows(events: Iterable[dict[str, Any]], name: str) -> list[Interval]:
    """The host's time ranges of the annotation `name`."""
    marks = [e for e in events if e.get("ph") == "X" and e.get("cat") == "user_annotation" and e["name"] == name]
    return sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in marks)


def runtime_calls(events: Iterable[dict[str, Any]], window: Interval) -> dict[str, tuple[int, float]]:
    """CUDA runtime and driver calls of the host inside `window`: name -> (how many, microseconds)."""
    calls: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("cuda_runtime", "cuda_driver"):
            if window[0] <= float(event["ts"]) <= window[1]:
                count, total = calls.get(event["name"], (0, 0.0))
                calls[event["name"]] = (count + 1, total + float(event["dur"]))
    return calls


def between_marks(activities: Sequence[Activity], mark: str) -> list[list[Activity]]:
    """What started between the first and second kernel whose name has `mark`, the third and fourth, and so on."""
    marks = [a for a in activities if mark in a.name]
    pairs = zip(marks[::2], marks[1::2], strict=False)
    return [[a for a in activities if start.start < a.start < end.start] for start, end in pairs]


def stalls(activities: Sequence[Activity]) -> list[dict[str, Any]]:
    """When nothing computed, summed by the classes before and after: ms, how many, and what of it communication ran; longest first."""
    main = _main_stream(activities)
    kinds = {a: class_of(a, main) for a in activities}
    computing = sorted((a for a in activities if kinds[a] not in COMMUNICATION), key=lambda a: a.start)
    communication = merged((a.start, a.end) for a in activities if kinds[a] in COMMUNICATION)
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0, 0.0])
    last = computing[0]
    for activity in computing[1:]:
        if activity.start > last.end:
            found = sums[_short(last, kinds), _short(activity, kinds)]
            found[0] += (activity.start - last.end) / 1e3
            found[1] += 1
            found[2] += covered([(last.end, activity.start)], communication) / 1e3
        last = max(last, activity, key=lambda a: a.end)
    rows = sorted(sums.items(), key=lambda row: -row[1][0])
    return [
        {"after": after, "before": before, "ms": ms, "times": times, "communication_ms": beside}
        for (after, before), (ms, times, beside) in rows
    ]


def _short(activity: Activity, kinds: dict[Activity, str]) -> str:
    """The class, and of what is small the kernel's name too."""
    kind = kinds[activity]
    return (
        kind
        if kind in ("GEMM", "attention")
        else re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", activity.name)[:48]
    )


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals as disjoint intervals in order."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def covered(intervals: Sequence[Interval], by: Sequence[Interval]) -> float:
    """How much of the disjoint `intervals` lies inside the disjoint `by`."""
    starts = [start for start, _ in by]
    total = 0.0
    for start, end in intervals:
        i = max(0, bisect_right(starts, start) - 1)
        while i < len(by) and by[i][0] < end:
            total += max(0.0, min(end, by[i][1]) - max(start, by[i][0]))
            i += 1
    return total


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _main_stream(activities: Sequence[Activity]) -> int:
    """The stream that most kernels' time is on."""
    per_stream: dict[int, float] = defaultdict(float)
    for activity in activities:
        if activity.category == "kernel" and "nccl" not in activity.name.lower():
            per_stream[activity.stream] += activity.duration
    return max(per_stream, key=lambda stream: per_stream[stream]) if per_stream else 0


def summarise(activities: Sequence[Activity], gaps: int = 12) -> dict[str, Any]:
    """Milliseconds from the first kernel to the last of one window.

    `classes` sums kernel times; `communication` and `exposed` are time lines: how long any communication ran, and how long
    it ran with nothing computing beside it; `idle` is when nothing ran at all; `gaps` are the longest of those, with the
    kernels before and after.
    """
    if not activities:
        return {}
    main = _main_stream(activities)
    classes: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    computing, communicating = [], []
    for activity in activities:
        kind = class_of(activity, main)
        classes[kind] += activity.duration / 1e3
        counts[kind] += 1
        (communicating if kind in COMMUNICATION else computing).append((activity.start, activity.end))
    compute, communication = merged(computing), merged(communicating)
    busy = merged([*compute, *communication])
    span = (busy[0][0], busy[-1][1])
    hidden = covered(communication, compute)
    total = _length(communication)
    return {
        "span": (span[1] - span[0]) / 1e3,
        "classes": dict(sorted(classes.items(), key=lambda item: -item[1])),
        "kernels": dict(counts),
        "communication": total / 1e3,
        "exposed": (total - hidden) / 1e3,
        "hidden_share": hidden / total if total else 1.0,
        "idle": (span[1] - span[0] - _length(busy)) / 1e3,
        "gaps": _longest_gaps(activities, busy, gaps),
    }


def _longest_gaps(activities: Sequence[Activity], busy: Sequence[Interval], count: int) -> list[dict[str, Any]]:
    by_start = {a.start: a.name for a in activities}
    by_end = {a.end: a.name for a in activities}
    pairs = sorted(pairwise(busy), key=lambda pair: pair[0][1] - pair[1][0])[:count]
    return [
        {"us": right[0] - left[1], "after": by_end.get(left[1], "?")[:80], "before": by_start.get(right[0], "?")[:80]}
        for left, right in pairs
    ]
