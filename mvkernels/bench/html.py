"""``mvkernels bench --html FOLDER``: one self-contained page that shows a folder of results."""

from __future__ import annotations

import csv
import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mvkernels import report
from mvkernels.bench import plots as bench_plots
from mvkernels.bench import svg
from mvkernels.bench.rows import COLUMNS, Row, geomean, geomeans, read_csv
from mvkernels.files import write

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-top:1px solid #ccc;padding-top:.8em}
table{border-collapse:collapse;font-size:12px}td,th{padding:2px 8px;text-align:right;white-space:nowrap}
th{cursor:pointer;background:#f2f2f2;position:sticky;top:0}tr:nth-child(even) td{background:#fafafa}
td.t,th.t{text-align:left}.scroll{overflow:auto;max-height:32em;border:1px solid #ddd}
.bad{color:#b00020}.bar{display:inline-block;height:9px;background:#3b7dd8;vertical-align:middle}.slow{background:#c77}
.one{border-left:1px solid #000}nav a{margin-right:1em}input{margin:.4em 0;padding:3px 6px;width:24em}
input{max-width:100%;box-sizing:border-box}nav a,figcaption{overflow-wrap:anywhere}figure{margin:0}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26em),1fr));gap:1em}
svg{max-width:100%;height:auto}svg.roof text{font:10px system-ui,sans-serif}summary{cursor:pointer;margin:.6em 0}
"""
_SCRIPT = """
for (const t of document.querySelectorAll('table')) {
  const body = t.tBodies[0];
  t.querySelectorAll('th').forEach((h, i) => h.onclick = () => {
    const up = h.dataset.up = h.dataset.up === '1' ? '0' : '1', rows = [...body.rows];
    const value = r => { const s = r.cells[i].dataset.v ?? r.cells[i].textContent; const n = parseFloat(s);
      return isNaN(n) ? s : n; };
    rows.sort((a, b) => { const x = value(a), y = value(b); const c = typeof x === typeof y ?
      (x > y) - (x < y) : typeof x === 'number' ? -1 : 1; return up === '1' ? c : -c; });
    body.append(...rows);
  });
  const box = t.closest('section').querySelector('input');
  if (box) box.oninput = () => { for (const r of body.rows)
    r.hidden = !box.value.split(' ').every(p => r.textContent.toLowerCase().includes(p.toLowerCase())); };
}
"""
Table = tuple[list[dict[str, str]], list[str]]
"""The rows of a file, and its columns."""
MODE = {"fwd": "forward", "bwd": "backward", "full": "forward and backward"}
_COLOURS = ("#3b7dd8", "#d8793b", "#4a9d5b", "#9a57b5", "#b5574a", "#666666", "#2aa5a0", "#c2a32b")


def command(folder: str, json: Callable[[Any], None] | None) -> int:
    """Write the page and print its path. Raises UsageError if there is nothing to show."""
    path = Path(folder)
    if not path.is_dir():
        raise report.UsageError(f"--html {folder}: there is no such folder")
    files = sorted(path.rglob("*.csv"))
    if not files:
        raise report.UsageError(f"--html {folder}: there is no CSV file in it")
    target = path / "index.html"
    write(target, page(path, files))
    json({"page": str(target), "files": [str(f) for f in files]}) if json is not None else print(f"written: {target}")
    return 0


def page(folder: Path, files: Sequence[Path]) -> str:
    """The page, a section for each file."""
    names = [str(file.relative_to(folder)) for file in files]
    sections, tables, roofs = [], [], []
    for name, file in zip(names, files):
        try:
            tables.append(_read(file))
            rows = read_csv(file) if _of_ops(tables[-1][1]) else []
            sections.append(_section(name, rows, *tables[-1]))
            roofs.append(_roofline(name, rows))
        except (OSError, ValueError, csv.Error) as error:
            raise report.UsageError(f"{file} cannot be read: {error}") from None
    try:
        opening = _opening(tables, "".join(roofs))
    except ValueError as error:
        raise report.UsageError(f"--html {folder}: a speed-up is not a number: {error}") from None
    links = "".join(f'<a href="#{html.escape(name)}">{html.escape(name)}</a> ' for name in names)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>mvkernels: results</title>'
        f"<style>{_STYLE}</style></head><body><h1>mvkernels: results</h1>\n"
        + opening
        + f"<h2>Files</h2><nav>{links}</nav>\n"
        + "\n".join(sections)
        + f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _opening(tables: Sequence[Table], rooflines: str) -> str:
    """What all files come to: pictures of the models' and the ops' speed-up, rooflines, and means."""
    ops: dict[str, list[svg.Bar]] = {}
    models: dict[str, list[svg.Bar]] = {}
    means: list[list[str]] = []
    for lines, columns in tables:
        if _of_ops(columns):
            groups = _grouped(lines, ("op", "device", "dtype", "provider", "mode"), "best_peer")
            for (op, device, dtype, provider, mode), found in groups.items():
                bar = svg.Bar(f"{dtype}, {MODE.get(mode, mode)}, {provider}", geomean(found), True)
                ops.setdefault(f"{op}, {device}", []).append(bar)
                means.append(
                    [f"{op}, {provider}", device, f"{dtype}, {MODE.get(mode, mode)}", "the best peer", *_said(found)]
                )
        elif {"model", "device", "mode", "provider", "speedup_median"} <= set(columns) and "op" not in columns:
            groups = _grouped(lines, ("device", "mode", "provider"), "speedup_median")
            base = next((provider for (*_, provider), found in groups.items() if set(found) == {1.0}), "the first row")
            for (device, mode, provider), found in groups.items():
                if provider == base:
                    continue
                bar = svg.Bar(provider, geomean(found), provider.startswith(("swapped", "fused")))
                models.setdefault(f"{MODE.get(mode, mode)}, {device}, over {base}", []).append(bar)
                means.append([provider, device, MODE.get(mode, mode), base, *_said(found)])
    panels: list[tuple[str, svg.Groups]] = []
    if models:
        panels.append(("Whole models: how many times as fast, geometric mean", list(models.items())))
    if ops:
        panels.append(("Ops: times as fast as the best peer at each shape, geometric mean", list(ops.items())))
    if rooflines:
        caption = "Floors in bytes and FLOPs; the line is the copy and the matrix product measured in the run."
        rooflines = f'<h2>Rooflines</h2><p>{caption}</p><div class="grid">{rooflines}</div>'
    if not panels:
        return rooflines
    header = ("what", "device", "how", "against", "rows", "geometric mean", "worst")
    picture = svg.bars(panels).replace(' xmlns="http://www.w3.org/2000/svg"', "")  # HTML knows it
    return f"{picture}{rooflines}<h2>Geometric means</h2>{_table(header, means)}"


def _read(file: Path) -> Table:
    with file.open(newline="") as text:
        reader = csv.DictReader(text)
        return list(reader), list(reader.fieldnames or ())


def _of_ops(columns: Sequence[str]) -> bool:
    return set(COLUMNS[:18]) <= set(columns)


def _grouped(lines: Sequence[dict[str, str]], by: Sequence[str], needed: str) -> dict[tuple[str, ...], list[float]]:
    """The speed-ups of rows that have one, and something in the column ``needed``, by the values of columns."""
    found: dict[tuple[str, ...], list[float]] = {}
    for line in lines:
        if line.get("speedup_median") and line.get(needed):
            found.setdefault(tuple(line.get(column) or "" for column in by), []).append(float(line["speedup_median"]))
    return found


def _said(values: Sequence[float]) -> list[str]:
    return [str(len(values)), f"{geomean(values):.2f}", f"{min(values):.2f}"]


def _section(name: str, rows: Sequence[Row], lines: list[dict[str, str]], columns: list[str]) -> str:
    head = f'<section id="{html.escape(name)}"><h2>{html.escape(name)}</h2>'
    if not lines:
        return f"{head}<p>No rows.</p></section>"
    body = ""
    constant = {c: lines[0][c] for c in columns if len(lines) > 1 and all(line[c] == lines[0][c] for line in lines)}
    if rows:
        body = _summary(rows) + _bars(rows)
    said = ", ".join(f"{html.escape(c)} {html.escape(v or '')}" for c, v in constant.items() if v)
    shown = [c for c in columns if c not in constant]
    table = _table(shown, [[line[c] or "" for c in shown] for line in lines])
    return (
        f"{head}<p>{said}</p>{body}<details><summary>all {len(lines)} rows</summary>"
        f'<input placeholder="filter: words, all of which a row must have">{table}</details></section>'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numeric = [all(_number(row[i]) is not None or not row[i] for row in rows) for i in range(len(header))]
    kind = ["" if number else ' class="t"' for number in numeric]
    heads = "".join(f"<th{k}>{html.escape(_heading(h))}</th>" for h, k in zip(header, kind))
    lines = [
        "<tr>" + "".join(_cell(name, cell, k) for name, cell, k in zip(header, row, kind)) + "</tr>" for row in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _heading(column: str) -> str:
    """A column of a file in words: the unit of a time is in its cells."""
    return column.removesuffix("_us").replace("_", " ")


def _cell(column: str, text: str, kind: str) -> str:
    value = _number(text)
    if value is None or not column.endswith("_us"):
        return f"<td{kind}>{html.escape(_short(text))}</td>"
    shown = f"{value / 1e3:.4g} ms" if value >= 1e3 else f"{value:.4g} µs"
    return f'<td{kind} data-v="{value}">{shown}</td>'


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _short(text: str) -> str:
    value = _number(text)
    return text if value is None or len(text) < 8 or not math.isfinite(value) or value == int(value) else f"{value:.4g}"


def _summary(rows: Sequence[Row]) -> str:
    found = geomeans(rows)
    return "" if not found else _plain(list(found[0]), [[str(v) for v in line.values()] for line in found])


def _plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    lines = ["<tr>" + "".join(f'<td class="t">{html.escape(c)}</td>' for c in row) + "</tr>" for row in rows]
    return (
        "<details open><summary>geometric means over the best peer</summary>"
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        "</details>"
    )


def _bars(rows: Sequence[Row]) -> str:
    mine = [r for r in rows if r.speedup_median is not None]
    if not mine:
        return ""
    most = max(r.speedup_median or 0 for r in mine)
    unit = 420 / max(most, 1)
    lines = []
    for r in mine:
        value = r.speedup_median or 0
        name = f"{r.model} {r.label} B{r.batch} {r.dtype} {r.layout} {r.mode} {r.provider}"
        slow = " slow" if value < 1 else ""
        bar = f'<span class="bar{slow}" style="width:{value * unit:.0f}px"></span> {value:.2f}× of {r.best_peer}'
        lines.append(f'<tr><td class="t">{html.escape(name)}</td><td class="t" data-v="{value}">{bar}</td></tr>')
    head = '<thead><tr><th class="t">shape</th><th class="t">times as fast as the best peer</th></tr></thead>'
    return (
        f'<details><summary>speed-up, shape by shape</summary><div class="scroll"><table>{head}'
        f"<tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _roofline(name: str, rows: Sequence[Row]) -> str:
    """A log-log scatter of one file as SVG, as :func:`mvkernels.bench.plots.roofline` draws it."""
    rows = [r for r in rows if r.gb_s and r.tflop_s]
    if not rows:
        return ""
    points = [(r, *bench_plots.point(r)) for r in rows]
    low_x, high_x = (f(x for _, x, _ in points) for f in (min, max))
    low_y = min(y for *_, y in points)
    high_y = max(*(y for *_, y in points), bench_plots.roof(rows[0], high_x * 2))
    width, height, edge = 640, 360, 48

    def x_of(value: float) -> float:
        return edge + (width - 2 * edge) * math.log(value / (low_x / 2)) / math.log(4 * high_x / low_x)

    def y_of(value: float) -> float:
        return height - edge - (height - 2 * edge) * math.log(value / (low_y / 2)) / math.log(4 * high_y / low_y)

    at = [low_x / 2 * (4 * high_x / low_x) ** (i / 60) for i in range(61)]
    line = " ".join(f"{x_of(x):.1f},{y_of(max(bench_plots.roof(rows[0], x), low_y / 2)):.1f}" for x in at)
    parts = [f'<polyline points="{line}" fill="none" stroke="#000"/>']
    providers = list(dict.fromkeys(r.provider for r in rows))
    colour = {provider: _COLOURS[i % len(_COLOURS)] for i, provider in enumerate(providers)}
    for r, x, y in points:
        said = html.escape(f"{r.provider}: {r.model} {r.label} B{r.batch} {r.mode}, {y:.3g} GFLOP/s at {x:.3g} FLOP/B")
        parts.append(
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour[r.provider]}" fill-opacity=".7">'
            f"<title>{said}</title></circle>"
        )
    for i, provider in enumerate(providers):
        parts.append(f'<rect x="{edge + 8}" y="{14 + 14 * i}" width="8" height="8" fill="{colour[provider]}"/>')
        parts.append(f'<text x="{edge + 20}" y="{22 + 14 * i}">{html.escape(provider)}</text>')
    for power in range(math.ceil(math.log10(low_x / 2)), math.floor(math.log10(high_x * 2)) + 1):
        parts.append(f'<text x="{x_of(10**power):.0f}" y="{height - edge + 14}">{10.0**power:g}</text>')
    for power in range(math.ceil(math.log10(low_y / 2)), math.floor(math.log10(high_y * 2)) + 1):
        parts.append(f'<text x="6" y="{y_of(10**power):.0f}">{10.0**power:g}</text>')
    parts.append(f'<text x="{width / 2 - 60}" y="{height - 8}">FLOPs per byte of the floor</text>')
    parts.append('<text x="6" y="12">GFLOP/s</text>')
    return (
        f'<figure><figcaption><a href="#{html.escape(name)}">{html.escape(name)}</a></figcaption>'
        f'<svg class="roof" viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(parts)}</svg></figure>'
    )
