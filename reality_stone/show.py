"""What the commands find, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bench import Failed, Result
    from .compare import Row, Skipped
    from .doctor import Diagnosis
    from .inspection import Contents
    from .jobs import DirectoryEvaluation, DirectoryTraining
    from .report import Measured
    from .streaming import Decompressed

USUAL = (
    ", rotate=True", ", search=exact", ", symmetric=False", ", clip=0", "layout=dense, ",
    ", group=0", ", compound=False", ", activation=float", ", amplitude=byte", ", basis=kmeans",
    ", functions=all", ", r_max=0", ", mask16=False", ", fit=closed", ", seeds=64", ", bound=0.5",
)  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as they need; the first to the left, the others to the right."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        parts = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def codec(spec: str) -> str:
    """A codec's text without the settings that say nothing to a reader."""
    for usual in USUAL:
        spec = spec.replace(usual, "")
    return spec


def size(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def diagnosis(found: Diagnosis) -> str:
    parts = [table(("versions", ""), found.versions.items())]
    parts[0] += "".join(f"\n{name:<16} {found.packages[name] or '-'}" for name in found.packages)
    set_of = found.isa if found.isa == found.best_isa else f"{found.isa} (best: {found.best_isa})"
    parts.append("\n".join(found.devices) + f"\ninstruction set: {set_of}, {found.threads} threads")
    checks = (
        (check.codec.split("(")[0], "; ".join(check.kernels), check.problem or "ok")
        for check in found.checks
    )
    parts.append("\n".join(f"{name:<10} {result:<4} {kernels}" for name, kernels, result in checks))
    parts += [f"note: {note}" for note in found.notes]
    parts += [f"problem: {problem}" for problem in found.problems]
    parts.append("everything works" if not found.problems else "something is wrong")
    return "\n\n".join(parts)


def evaluation(found: DirectoryEvaluation) -> str:
    e = found.evaluation
    lines = [f"perplexity  {e.perplexity:.3f}"]
    if e.kl is not None:
        lines.append(f"KL          {e.kl:.5f} nats per token from the reference")
    return "\n".join([*lines, f"time        {e.seconds:.1f} s", f"protocol    {found.protocol}"])


def training(found: DirectoryTraining) -> str:
    done = found.training
    lines = []
    if done.blocks:
        kept = sum(block["accepted"] for block in done.blocks)
        lines.append(f"blocks      {kept} of {len(done.blocks)} are better than before")
    if done.losses:
        tenth = max(1, len(done.losses) // 10)
        first, last = (sum(part) / tenth for part in (done.losses[:tenth], done.losses[-tenth:]))
        lines.append(
            f"loss        {first:.4f} to {last:.4f} in {len(done.losses)} steps, "
            f"{done.tokens:,} tokens"
        )
    if done.skipped:
        lines.append(f"skipped     {done.skipped} steps that were not finite")
    if found.before is not None and found.after is not None:
        lines.append(f"perplexity  {found.before.perplexity:.3f} to {found.after.perplexity:.3f}")
        if found.after.kl is not None:
            lines.append(f"KL          {found.before.kl:.5f} to {found.after.kl:.5f}")
    return "\n".join([*lines, f"time        {done.seconds:.1f} s", f"saved       {found.target}"])


def decompressed(found: Decompressed) -> str:
    files = "one file" if len(found.files) == 1 else f"{len(found.files)} files"
    return f"{found.layers} layers decoded to {found.dtype}: {size(found.size)} in {files}"


def report(found: Measured, path: str) -> str:
    lines = [f"bits        {found.contents.bits_per_weight:.3f} per weight"]
    for name, values in (("weights", found.errors), ("outputs", found.output_errors)):
        if values:
            mean = sum(values.values()) / len(values)
            lines.append(f"{name:<10}  {mean:.5f} of the power is lost, mean over layers")
    if found.quality is not None:
        dense = found.quality.dense
        beside = "" if dense is None else f", dense {dense.perplexity:.3f}"
        lines.append(f"perplexity  {found.quality.packed.perplexity:.3f}{beside}")
    lines += [f"left out    {why}" for why in dict.fromkeys(found.gaps.values())]
    return "\n".join([*lines, f"saved       {path}"])


def contents(found: Contents) -> str:
    rows = [
        (layer.name, f"{layer.shape[0]} x {layer.shape[1]}", codec(layer.codec),
         f"{layer.bits_per_weight:.3f}", size(layer.bytes), "DAMAGED" if layer.problem else "")
        for layer in found.layers
    ]  # fmt: skip
    rows += [
        (other.name, " x ".join(map(str, other.shape)) or "1", other.dtype, "", size(other.bytes),
         "DAMAGED" if other.problem else "")
        for other in found.others
    ]  # fmt: skip
    lines = [table(("layer or tensor", "shape", "codec", "b/w", "bytes", ""), rows)] if rows else []
    if found.layers:
        lines.append(
            f"{len(found.layers)} layers at {found.bits_per_weight:.3f} bits per weight, "
            f"{size(found.size)} in the file, version {found.version}"
        )
    problems = [entry.problem for entry in [*found.layers, *found.others] if entry.problem]
    lines += [f"damaged: {problem}" for problem in [*found.problems, *problems]]
    if found.sound:
        checked = "all checksums are right" if found.checksums else "it holds no checksums"
        lines.append(f"{found.path} is sound, {checked}")
    return "\n".join(lines)


def comparison(rows: Sequence[Row], means: Sequence[Row], skipped: Sequence[Skipped]) -> str:
    head = ("matrix", "codec", "b/w", "nmse", "dB from bound", "encode Mw/s", "decode Mw/s",
            "linear us", "torch us")  # fmt: skip
    shown = [*rows, *means] if len(means) < len(rows) else rows
    body = (
        (row.tensor, codec(row.codec), f"{row.bits_per_weight:.3f}", f"{row.nmse:.5f}",
         f"{row.db:.2f}", f"{row.encode_mws:.2f}", f"{row.decode_mws:.0f}", f"{row.linear_us:.0f}",
         f"{row.torch_us:.0f}")
        for row in shown
    )  # fmt: skip
    lines = [table(head, body)] if rows else []
    lines += [f"left out: {one.tensor}, {codec(one.codec)}: {one.reason}" for one in skipped]
    return "\n".join(lines)


BACKWARD = {
    "none": "forward",
    "input": "forward and backward to the input",
    "all": "forward and backward (input, and params or weight; of peers the input alone)",
}


def benchmark(found: Sequence[Result | Failed]) -> str:
    results = [r for r in found if hasattr(r, "seconds")]
    first = results[0]
    head = ("shape", "batch", "what", "b/w", "ms", "spread", f"{first.against} x", "of limit",
            "copies")  # fmt: skip
    body = (
        (f"{r.shape[0]} x {r.shape[1]}", r.batch, codec(r.what), f"{r.bits_per_weight:.3f}",
         f"{r.seconds * 1e3:.3f}", f"{100 * r.spread:.0f} %", f"{r.speedup:.2f}",
         "" if r.share is None else f"{100 * r.share:.0f} % {r.bound}", r.copies)
        for r in results
    )  # fmt: skip
    lines = [table(head, body), *failures(found)]
    lines.append(
        f"{BACKWARD[first.backward]}, accuracy {first.accuracy}, {first.device}, "
        f"{first.threads} threads, {first.isa}; median of interleaved turns, spread is half of the "
        "middle 80 %; copies of the weights rotate and exceed three times the cache"
    )
    if first.share is not None:
        lines.append(limits(results))
    return "\n".join(lines)


def limits(results: Sequence[Result]) -> str:
    """What the shares are of."""
    memory = [r.memory_limit / 1e9 for r in results]
    compute = [r.compute_limit / 1e12 for r in results]
    return (
        f"limits measured in the same turns: {min(memory):.1f} to {max(memory):.1f} GB/s (copying "
        f"or reading), {min(compute):.2f} to {max(compute):.2f} TFLOP/s (torch matmul); operations "
        "are those of a dense product"
    )


def failures(found: Sequence[Result | Failed]) -> list[str]:
    """A line for each peer that is missing or fails, and for how many shapes and batches."""
    cases = len({(r.shape, r.batch, r.backward) for r in found})
    reasons: dict[tuple[str, str], int] = {}
    for r in found:
        if not hasattr(r, "seconds"):
            reasons[r.what, r.reason] = reasons.get((r.what, r.reason), 0) + 1
    return [
        f"left out: {what}: {reason}" + ("" if times == cases else f" ({times} of {cases} cases)")
        for (what, reason), times in reasons.items()
    ]
