"""Writes the newest results into the tables and the plot of docs/speed.md.

python benchmarks/page.py"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import ALONE, RESULTS, Result, load, save, table

PAGE = Path(__file__).resolve().parents[1] / "docs/speed.md"
BEGIN, END = "<!-- {}: written by benchmarks/{}.py -->", "<!-- /{} -->"


class Bar(NamedTuple):
    """What a ratio is to reach."""

    least: float
    aim: float


WORKS = ("ppo", "rollout", "sft", "reward", "pretrain", "quickstart", "peak")
BARS = {
    ("ppo", "S, ending early"): Bar(2.3, 4),
    ("ppo", "S, full length"): Bar(1.4, 2.5),
    ("ppo", "L, ending early"): Bar(1.4, 2.5),
    ("ppo", "L, full length"): Bar(1.4, 2.5),
    ("rollout", "S, ending early"): Bar(3, 5),
    ("rollout", "S, full length"): Bar(1.8, 3),
    ("rollout", "L, ending early"): Bar(1.2, 2),
    ("rollout", "L, full length"): Bar(1.2, 2),
    ("sft", "S, TRL unpacked"): Bar(2.5, 4),
    ("sft", "S, TRL packed"): Bar(1.6, 2),
    ("reward", "S, pairs"): Bar(1.8, 3),
    ("reward", "S, rankings of 6"): Bar(4, 8),
    ("ppo", "135M"): Bar(1, 2),
    ("ppo", "135M, bfloat16"): Bar(1, 2),
    ("rollout", "135M, 64 x 32"): Bar(1, 1.5),
    ("rollout", "135M, 64 x 32, bfloat16"): Bar(1, 1.5),
    ("rollout", "135M, 4 x 32"): Bar(1, 1),
    ("rollout", "135M, 4 x 32, bfloat16"): Bar(1, 1),
    ("sft", "135M, padded loop"): Bar(1, 1),
    ("sft", "135M, padded loop, bfloat16"): Bar(1, 1),
    ("sft", "135M, TRL packed"): Bar(1, 1),
    ("sft", "135M, TRL packed, bfloat16"): Bar(1, 1),
    ("reward", "135M, pairs"): Bar(1, 1),
    ("reward", "135M, pairs, bfloat16"): Bar(1, 1),
    ("pretrain", "S"): Bar(0.97, 1),
    ("pretrain", "L"): Bar(0.97, 1),
    ("quickstart", "the whole quickstart"): Bar(1.5, 3),
    ("peak", "pretraining, S"): Bar(0.7, 0.8),
    ("peak", "pretraining, L"): Bar(0.7, 0.8),
    ("peak", "PPO optimization, S"): Bar(0.5, 0.65),
    ("peak", "PPO optimization, L"): Bar(0.5, 0.65),
    ("peak", "decoding, S"): Bar(0.3, 0.45),
    ("peak", "decoding, L"): Bar(0.3, 0.45),
}


def bars(results: Sequence[Result]) -> str:
    """Every ratio beside its bar and its aim; threads in columns."""
    threads = sorted({r.threads for r in results})
    columns = " | ".join(f"{n} thread{'s' * (n > 1)}" for n in threads)
    lines = [f"| work | case | against | {columns} | at least | aim |", "|---" * (5 + len(threads)) + "|"]
    for (work, case), bar in BARS.items():
        found = {r.threads: r for r in results if (r.work, r.case) == (work, case)}
        if not found:
            lines.append(f"| {work} | {case} | | {'not measured | ' * len(threads)}{bar.least} | {bar.aim} |")
            continue
        cells = [marked(found[n], bar) if n in found else "not measured" for n in threads]
        peer = next(iter(found.values())).peer
        lines.append(f"| {work} | {case} | {peer} | {' | '.join(cells)} | {bar.least} | {bar.aim} |")
    return "\n".join(lines)


def marked(result: Result, bar: Bar) -> str:
    """A ratio, and what it has not reached."""
    missed = ", below the bar" if result.ratio < bar.least else "" if result.ratio >= bar.aim else ", below the aim"
    shared = result.threads == 1 and result.processor_share < ALONE
    beside = f" ({result.cpu_ratio:.2f} by processor time)" if shared else ""
    return f"**{result.ratio:.2f}**{beside}{missed}"


def lost(results: Sequence[Result]) -> str:
    """Where the peer is as fast as ours or faster, and where a bar is not reached."""
    slower = [
        f"- {r.work.removesuffix('_growth')}, {r.case}, {r.threads} thread{'s' * (r.threads > 1)}: "
        f"{r.ratio:.2f} times as fast as {r.peer}."
        for r in results
        if r.work != "peak" and r.ratio < 1
    ]
    missed = [
        f"- {r.work}, {r.case}, {r.threads} thread{'s' * (r.threads > 1)}: {r.ratio:.2f}, where {bar.least} is the bar."
        for r in results
        if (bar := BARS.get((r.work, r.case))) and r.ratio < bar.least and not (r.work != "peak" and r.ratio < 1)
    ]
    return "\n".join(
        [
            "The peer is the faster one in:" if slower else "In no case that was measured is the peer the faster one.",
            *slower,
            "",
            "Faster, but short of the bar, or of the share of the peak:" if missed else "No other bar is missed.",
            *missed,
        ]
    )


def shared_core(results: Sequence[Result]) -> str:
    """Which figures were measured beside other programs."""
    shared = [
        f"{r.work}, {r.case} ({r.processor_share:.0%})" for r in results if r.threads == 1 and r.processor_share < ALONE
    ]
    if not shared:
        return "The core did nothing else while these were measured."
    return (
        "Other programs ran on the same core during these, which had the share in brackets of it; of their figures, "
        f"the ratio by processor time is the one to trust: {'; '.join(shared)}."
    )


def settings(results: Sequence[Result]) -> str:
    """Machine, versions, settings and checks of every result."""
    parts = []
    for machine in dict.fromkeys(", ".join(f"{k} {v}" for k, v in r.machine.items()) for r in results):
        parts.append(f"Machine: {machine}.")
    for r in results:
        if r.threads > 1:
            continue
        chosen = ", ".join(f"{name} {value}" for name, value in r.settings.items())
        checks = "; ".join(f"{c.what} {c.ours:.6g} / {c.theirs:.6g}" for c in r.equal_work)
        packages = ", ".join(f"{name} {version}" for name, version in r.versions.items())
        run = f"- `{r.command}` ({r.date}; {packages})\n  - {chosen}"
        if run not in parts:  # one command may have several results
            parts.append(run)
        if checks:
            parts.append(f"  - equal work, ours / {r.peer}: {checks}")
    return "\n".join(parts)


def overhead(found: dict[str, Any]) -> str:
    """What the start and the logging cost beside the work itself."""

    def rows(part: str, clock: str, *titles: str) -> str:
        lines = [f"| {' | '.join(titles)} |", "|---|---|---|"]
        for name, side in found[part]["sides"].items():
            x = side[clock]
            lines.append(f"| {name} | {x['median']:.2f} ({x['lowest']:.2f}-{x['highest']:.2f}) | {x['more']:+.2f} |")
        return "\n".join(lines)

    start = rows("start", "wall", "until", "seconds", "beyond the first row")
    step = rows("logging", "cpu", "a step of a layer of 8 by 8", "ms of the processor", "more than nothing logged")
    return f"{start}\n\n{step}"


def growth(results: Sequence[Result]) -> str:
    """Plots and tables of how each work grows."""
    parts = []
    for work in dict.fromkeys(r.work for r in results):
        title, rows = work.removesuffix("_growth"), [r for r in results if r.work == work]
        parts.append(f"### {title}\n\n![{title}](../benchmarks/results/{work}.svg)\n\n{table(rows)}")
    return "\n\n".join(parts) or "Not measured yet."


def plot(results: Sequence[Result], path: Path) -> None:
    """Ratios beside their bars; peaks apart."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    results = [r for r in results if r.threads == 1 and (r.work, r.case) in BARS]
    kinds = [[r for r in results if r.work != "peak"], [r for r in results if r.work == "peak"]]
    heights = [max(1, len(kind)) for kind in kinds]
    figure, axes = pyplot.subplots(
        2, 1, figsize=(7.5, 1.4 + 0.3 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    labels = ("times as fast as the peer", "share of torch.mm's rate")
    for axis, kind, label in zip(axes, kinds, labels):
        for row, r in enumerate(kind):
            bar = BARS[r.work, r.case]
            axis.barh(row, r.ratio, color="#1b6ca8" if r.ratio >= bar.least else "#d95f02", height=0.6)
            axis.plot([bar.least] * 2, [row - 0.4, row + 0.4], color="black", linewidth=1.5)
            behind = max(r.ratio, bar.least if r.ratio > 0.9 * bar.least else 0)  # the line would run through it
            axis.annotate(f"{r.ratio:.2f}", (behind, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set(yticks=range(len(kind)), yticklabels=[f"{r.work}: {r.case}" for r in kind], xlabel=label)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def renewed(page: str, parts: dict[str, str], script: str = "page") -> str:
    """``page`` with each part's text between its two marks, which name the ``script``."""
    for name, text in parts.items():
        begin, end = BEGIN.format(name, script), END.format(name)
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page has no place for {name!r}: {begin} ... {end}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main() -> None:
    """Renew the page and its plot."""
    results = [r for work in WORKS for r in load(RESULTS / f"{work}.json")]
    grown = [r for work in WORKS for r in load(RESULTS / f"{work}_growth.json")]
    parts = {
        "bars": bars(results),
        "lost": lost(results + grown),
        "rates": f"{table(results)}\n\n{shared_core(results)}",
        "overhead": overhead(json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))),
        "growth": growth(grown),
        "settings": settings(results),
    }
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), parts), encoding="utf-8")
    plot(results, PAGE.with_suffix(".svg"))
    print(f"{PAGE}: {len(results)} results")


if __name__ == "__main__":
    main()
