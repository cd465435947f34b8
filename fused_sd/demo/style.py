"""The report's styles beside those of a credit map's page, which define the other colours."""

STYLE = """
:root{--c1:#c2571a;--c2:#2b8a57;--c3:#8a4bb0;--c4:#7a6a1d}
@media (prefers-color-scheme:dark){:root{--c1:#f09a5b;--c2:#66c894;--c3:#c796e6;--c4:#cbb85a}}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.6rem 0 .7rem}
p{max-width:44rem}
code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.93em}
.big b{font-size:2.8rem;line-height:1.1;color:var(--c0)}
.big span{color:var(--quiet);padding:0 .3rem}
.big small{display:block;color:var(--quiet);font-size:.95rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1rem}
figure{margin:0;padding:.8rem;background:var(--panel);border:1px solid var(--rule);
border-radius:8px}
figcaption{font-weight:600;font-size:.92rem;margin-bottom:.4rem}
svg{display:block;width:100%;height:auto}
.grid{stroke:var(--rule)}
.tick,.axis{fill:var(--quiet);font-size:14px}
.axis{fill:var(--ink)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}
.s4{stroke:var(--c4)}
circle{fill:var(--panel);stroke-width:1.6}
.reference{stroke:var(--quiet);stroke-dasharray:5 4}
.key{font-size:.82rem;color:var(--quiet);margin-right:.9rem;white-space:nowrap}
.key i{display:inline-block;width:1rem;height:3px;margin-right:.35rem;vertical-align:middle;
background:var(--quiet)}
i.s0{background:var(--c0)}i.s1{background:var(--c1)}i.s2{background:var(--c2)}
i.s3{background:var(--c3)}i.s4{background:var(--c4)}
.wide{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.92rem;min-width:20rem}
th,td{text-align:left;padding:.35rem .8rem .35rem 0;border-bottom:1px solid var(--rule);
vertical-align:top;font-variant-numeric:tabular-nums}
thead th{color:var(--quiet);font-weight:500;white-space:nowrap}
.credit th,.credit td{font-family:ui-monospace,Menlo,Consolas,monospace;white-space:nowrap}
summary{cursor:pointer;color:var(--quiet)}
"""
