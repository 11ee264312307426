"""The status page: one HTML document that needs nothing else, for phones and wide screens, light and dark."""

from __future__ import annotations

from html import escape
from itertools import groupby

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    Row = dict[str, Any]

# A sign beside the colour, for those who do not see it. States that are not here are at rest.
_KINDS = {
    "ready": "good", "listening": "good", "idle": "good", "done": "good", "starting": "busy", "stopping": "busy",
    "backoff": "warn", "failed": "bad", "bad config": "bad",
}  # fmt: skip
_SIGNS = {"good": "●", "busy": "◐", "warn": "▲", "bad": "✖", "rest": "○"}
_ORDER = ("bad", "warn", "busy", "good", "rest")
_ADDRESSES = 4  # that are shown of one service

_STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1c2128; --dim: #5b6470; --line: #e1e4e8;
  --good: #1a7f37; --busy: #0b5cad; --warn: #8f5f00; --bad: #c0232c; --plot: #4f86c6; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2126; --text: #e4e7eb; --dim: #9aa4b0;
  --line: #30363d; --good: #4cc46a; --busy: #6cb2ff; --warn: #e3b341; --bad: #ff7b72; --plot: #6ea3df; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; margin-bottom: 1rem; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--dim); }
.sum { font-weight: 600; }
ul { list-style: none; margin: 0; padding: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
li { display: grid; gap: .15rem 1rem; padding: .7rem 1rem; align-items: center;
  grid-template-columns: minmax(0, 1.2fr) minmax(0, 1.4fr) 12.5rem 13rem;
  grid-template-areas: "name listen counts plot" "note note note note"; }
li + li { border-top: 1px solid var(--line); }
.name { grid-area: name; min-width: 0; }
.name b { display: block; overflow-wrap: anywhere; }
.listen { grid-area: listen; color: var(--dim); font: .85rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.counts { grid-area: counts; color: var(--dim); font-size: .9rem; font-variant-numeric: tabular-nums; }
.counts b { color: var(--text); }
.plot { grid-area: plot; display: flex; align-items: end; gap: .5rem; color: var(--dim); font-size: .8rem; }
.plot svg { flex: 1; min-width: 0; height: 2rem; border-bottom: 1px solid var(--line); }
.plot path { fill: var(--plot); }
.plot span { width: 4.5rem; }
.note { grid-area: note; margin: .2rem 0 0; font-size: .9rem; overflow-wrap: anywhere; white-space: pre-line; }
.state, .name .rest { font-size: .9rem; white-space: nowrap; }
.good { color: var(--good); } .busy { color: var(--busy); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.rest { color: var(--dim); }
footer { margin-top: 1rem; color: var(--dim); font-size: .85rem; }
a { color: inherit; }
@media (max-width: 46rem) {
  body { padding: 1rem .75rem 2rem; }
  li { grid-template-columns: minmax(0, 1fr) auto; padding: .7rem .8rem;
    grid-template-areas: "name counts" "listen listen" "plot plot" "note note"; }
  .counts { text-align: right; }
}
"""


def render(services: Sequence[Row], problems: Sequence[str], history: Row, host: str, version: str) -> str:
    """services, problems, history: as the control methods List, Health and History give them."""
    plots = {row["name"]: row["connections"] for row in history["services"]}
    rows = sorted(services, key=lambda row: (_ORDER.index(_kind(row)), row["name"]))
    count = f"{len(services)} service{'' if len(services) == 1 else 's'}"
    if problems:
        sign, text = "bad", f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
    else:
        sign, text = "good", "all well"
    items = "".join(_item(row, plots.get(row["name"]), history["slot"]) for row in rows)
    minutes = round(history["span"] / 60)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="10">
<title>{escape(text)} – superd on {escape(host)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header><h1>superd on {escape(host)}</h1>
<p><span class="sum {sign}">{_SIGNS[sign]} {escape(text)}</span> · {count}</p></header>
<main>{f"<ul>{items}</ul>" if items else "<p>No services; put files into conf.d.</p>"}</main>
<footer>superd {escape(version)} · the plots show new connections in the last {minutes} minutes ·
<a href="/metrics">metrics</a> · <a href="/readyz?verbose">readyz</a></footer>
</body>
</html>
"""


def _kind(row: Row) -> str:
    return _KINDS.get(row["state"], "rest")


def _item(row: Row, plot: Sequence[int] | None, slot_s: float) -> str:
    kind = _kind(row)
    listen = [escape(address) for address in row["listen"][:_ADDRESSES]]
    if len(row["listen"]) > _ADDRESSES:
        listen.append(f"and {len(row['listen']) - _ADDRESSES} more")
    counts = [f"<b>{row['now']}</b> now", f"{row['total']} in all"]
    if row["restarts"]:
        counts.append(f"{row['restarts']} restart{'' if row['restarts'] == 1 else 's'}")
    note = f'<p class="note {kind}">{escape(_printable(row["note"]))}</p>' if row["note"] else ""
    drawn = "" if plot is None else _plot(plot, slot_s)
    return (
        f'<li><div class="name"><b>{escape(row["name"])}</b>'
        f'<span class="state {kind}">{_SIGNS[kind]} {escape(row["state"])}</span> '
        f'<span class="rest">{_age(row["for"])}</span></div>'
        f'<div class="listen">{"<br>".join(listen)}</div><div class="counts">{", ".join(counts)}</div>'
        f"{drawn}{note}</li>\n"
    )


def _plot(values: Sequence[int], slot_s: float) -> str:
    """One step a slot, those of one height together."""
    most = max(values, default=0)
    height = 20
    steps = "".join(f"V{height - value * height / max(most, 1):.3g}h{len(list(run))}" for value, run in groupby(values))
    text = f"at most {most} in {slot_s:g} s"
    return (
        f'<div class="plot"><svg viewBox="0 0 {len(values)} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="new connections, {text}"><title>{text}</title><path d="M0 {height}{steps}V{height}z"/></svg>'
        f"<span>max {most}</span></div>"
    )


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"
