"""The look of a page, in light and dark mode and on narrow screens."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6470; --rule: #d5dae0; --paper: #fff;
  --panel: #f5f7f9; --s0: #0b62c4; --s1: #b2460c; --s2: #2e7d32; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #a0a9b4; --rule: #3a424b;
  --paper: #14171a; --panel: #1e2327; --s0: #6cb2ff; --s1: #ff9d5c; --s2: #7bd17f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
.lead { margin: 0; font-size: 1.05rem; }
.note { color: var(--soft); font-size: .88rem; margin: .6rem 0 0; max-width: 44rem; }
.scroll { overflow-x: auto; background:
  linear-gradient(to left, var(--paper) 40%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--rule), transparent) right / .9rem 100% no-repeat scroll; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem; text-align: right; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
td { white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--paper); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 7.5rem; }
.heat { width: auto; font-size: .85rem; border-spacing: 2px; }
.heat th, .heat td { padding: .25rem .5rem; border: 0; }
.heat thead th { text-align: center; }
.heat thead th:first-child { text-align: left; }
.heat tbody th { font-weight: 400; max-width: 20rem; }
.heat th:first-child { padding: .25rem .6rem .25rem 0; }
.heat td { text-align: center; vertical-align: middle; border-radius: 3px; }
.heat .none { background: var(--panel); color: var(--soft); }
.heat small { display: block; font-size: .72rem; line-height: 1.2; }
.fine td { padding: 0; width: 1.15rem; min-width: 1.15rem; height: 1.15rem; }
.fine td span { display: block; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.fine tbody th { font-size: .78rem; line-height: 1.15; }
.fine thead th { padding: 0; font-size: .7rem; font-weight: 400; }
.key { margin: 0 0 .5rem; }
.key figcaption { font-weight: 400; color: var(--soft); font-size: .88rem; max-width: 44rem; }
.scale { display: block; width: 100%; max-width: 22rem; height: auto; }
.scale text { font: 11px system-ui, sans-serif; fill: var(--ink); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; }
.tiles div { background: var(--panel); border-radius: 6px; padding: .6rem .8rem; }
.tiles dd { margin: 0; color: var(--soft); font-size: .85rem; }
.tiles b { display: block; color: var(--ink); font-size: 1.35rem; line-height: 1.3; }
details summary { cursor: pointer; color: var(--soft); }
figure { margin: 0 0 1rem; }
figcaption { font-weight: 600; font-size: .92rem; }
blockquote { margin: .3rem 0 0; padding: .6rem .9rem; background: var(--panel);
  border-left: 3px solid var(--s0); }
blockquote p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.plot { display: block; width: 100%; max-width: 38rem; height: auto; }
.plot text { font: 13px system-ui, sans-serif; fill: var(--ink); stroke: var(--paper);
  stroke-width: 3px; paint-order: stroke; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
path.level { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 6 4; }
.p0 { fill: #0072b2; } .p1 { fill: #e69f00; } .p2 { fill: #009e73; } .p3 { fill: #cc79a7; }
.p4 { fill: #56b4e9; } .p5 { fill: #d55e00; } .p6 { fill: #8a8f98; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.s0 circle, .s1 rect, .s2 path:not(.line) { fill: var(--c); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0;
  margin: 0 0 .3rem; font-size: .9rem; }
.legend svg { width: 20px; height: 12px; margin-right: .35rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0;
  font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl:not(.tiles) { display: block; } dd { margin: 0 0 .5rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .plot text { font-size: 16px; }
  .heat tbody th { max-width: 8rem; min-width: 0; }
  .heat:not(.fine) td { padding: .2rem .25rem; }
  th, td { padding: .35rem .4rem; } }
"""
