"""The style sheet and the one script of the page."""

CSS = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #ffffff; --ink: #1f2430; --muted: #5b6472; --line: #e1e5ea;
  --accent: #0072b2; --heat: #e8743b; --good: #00785a; --bad: #b3430a; --code: #f1f3f6; }
@media (prefers-color-scheme: dark) { :root { --ground: #101318; --card: #171b22; --ink: #e6e9ef; --muted: #9aa4b4;
  --line: #2a303a; --accent: #4ba3e3; --heat: #d9662b; --good: #3cc79d; --bad: #f08a4b; --code: #1e232c; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main, header { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 44px; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .4rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 3rem 0 .3rem; scroll-margin-top: 1rem; }
h3 { font-size: 1rem; margin: 0 0 .6rem; }
p { margin: .3rem 0 1rem; max-width: 52rem; }
a { color: var(--accent); }
.over { color: var(--accent); font-weight: 600; font-size: .8rem; letter-spacing: .08em;
  text-transform: uppercase; margin: 0; }
.lead, .note, figcaption { color: var(--muted); }
.note, figcaption { font-size: .875rem; line-height: 1.45; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 1.2rem 0 0; font-size: .92rem; }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin: 1.6rem 0 0; }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 18px; margin: 0 0 16px; min-width: 0; }
.tile { padding: 13px 16px; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.2; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .85rem; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px;
  margin: 0 0 16px; }
.grid > .card { margin: 0; }
figure.card { padding: 18px 18px 14px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto;
  background: linear-gradient(to left, var(--card) 30%, transparent) right / 40px 100% no-repeat local,
  linear-gradient(to left, rgb(0 0 0 / .22), transparent) right / 12px 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .5rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; }
thead th { color: var(--muted); font-weight: 500; font-size: .82rem; vertical-align: bottom; }
thead button { all: unset; cursor: pointer; } thead button:focus-visible { outline: 2px solid var(--accent); }
thead button::after { content: " \\2195"; opacity: .35; }
[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
.pairs th, .pairs td { padding: .26rem 0; white-space: normal; overflow-wrap: anywhere; }
.pairs th { color: var(--muted); font-weight: 400; }
.heat { table-layout: fixed; min-width: 640px; } .heat th:first-child { width: 24%; white-space: normal; }
.heat td[style] { background: color-mix(in srgb, var(--heat) calc(var(--h) * 85%), transparent); }
.bar td[style] { background: linear-gradient(to left, color-mix(in srgb, var(--accent) 28%, transparent)
  calc(var(--h) * 100%), transparent 0); }
ul.plain { list-style: none; margin: 0; padding: 0; }
ul.plain li { display: flex; gap: .8rem; padding: .5rem 0; border-bottom: 1px solid var(--line); }
ul.plain li:last-child { border: 0; }
.chip { flex: none; align-self: start; border: 1px solid currentColor; border-radius: 99px; font-size: .74rem;
  font-weight: 600; line-height: 1; padding: .28rem .55rem; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--muted); }
ul.plain .chip { min-width: 5.9rem; text-align: center; margin-top: .1rem; }
.absent { border-left: 4px solid var(--heat); }
.absent li { display: list-item; border: 0; padding: .15rem 0; overflow-wrap: anywhere; }
.sample .prompt { margin: 0 0 .8rem; font-weight: 600; max-width: none; }
.sample .grid { gap: 12px 24px; margin: 0; }
.who { display: flex; align-items: center; justify-content: space-between; gap: .6rem; color: var(--muted);
  font-size: .85rem; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 0; }
.reply { border-top: 2px solid var(--line); padding-top: .5rem; min-width: 0; }
pre { background: var(--code); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .84rem;
  line-height: 1.5; margin: .4rem 0 1rem; } pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
details summary { cursor: pointer; font-weight: 600; }
details > div { margin-top: .8rem; }
footer { color: var(--muted); font-size: .85rem; padding: 2.5rem 0 3rem; }
@media (max-width: 720px) { .grid { grid-template-columns: minmax(0, 1fr); } main, header { padding: 0 14px; }
  header { padding-top: 26px; } .card, figure.card { padding: 14px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; } }
@media print { :root { color-scheme: light; } nav { display: none; } .card { break-inside: avoid; } }
"""

SORT = """
document.querySelectorAll("thead th").forEach((head, column) => {
  const table = head.closest("table"), index = head.cellIndex;
  head.firstElementChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const value = row => row.cells[index].dataset.value;
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  });
});
"""
