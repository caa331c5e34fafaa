"""How a page looks: light and dark by the reader's setting, one column on a phone."""

LIGHT = ("#2f5fd0", "#b4540a", "#18794e", "#a3328f", "#0e7490", "#8a6d00", "#b42318", "#5b5b55")
DARK = ("#8fb0ff", "#ffb066", "#4cc38a", "#f09ae0", "#5fd0e6", "#e6c84d", "#ff8a7a", "#b8b8b0")
COLOURS = len(LIGHT)


def _variables(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{i}: {colour}; " for i, colour in enumerate(colours))


STYLE = f"""
:root {{ color-scheme: light dark; --ground: #fff; --card: #f5f5f2; --text: #1c1c1a; --soft: #66665f; --line: #d8d8d2;
  --right: #18794e; --wrong: #b42318; {_variables(LIGHT)}}}
@media (prefers-color-scheme: dark) {{ :root {{ --ground: #161615; --card: #21211f; --text: #ecece6; --soft: #a3a39a;
  --line: #3c3c38; --right: #4cc38a; --wrong: #ff8a7a; {_variables(DARK)}}} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0; }} h2 {{ font-size: 1.2rem; margin: 2.5rem 0 .5rem; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .5rem; }} p, dl {{ max-width: 44rem; }} .soft {{ color: var(--soft); }}
.wide {{ overflow-x: auto; }} img {{ max-width: 100%; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }}
caption {{ text-align: left; font-weight: 600; padding: .3rem 0; }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th:first-child {{ text-align: left; padding-left: 0; }} thead th {{ color: var(--soft); font-weight: 500; }}
.words td, .words th {{ text-align: left; vertical-align: top; }}
.words td {{ white-space: normal; min-width: 7rem; max-width: 46rem; }} .strong {{ font-weight: 650; }}
dt {{ font-weight: 600; }} dd {{ margin: 0 0 .5rem; color: var(--soft); }}
.gallery {{ display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(var(--least), 100%), 1fr)); }}
.gallery figure {{ margin: 0; padding: .6rem; background: var(--card); border-radius: .5rem; font-size: .9rem;
  border: 2px solid transparent; }}
.gallery figure.wrong {{ border: 2px dashed var(--wrong); }}
.gallery img {{ width: 100%; max-height: 16rem; object-fit: contain; border-radius: .3rem; display: block; margin-bottom: .4rem; }}
.right .strong {{ color: var(--right); }} .wrong .strong {{ color: var(--wrong); }}
.picture {{ margin: 0 0 1rem; }} .picture img {{ border-radius: .3rem; background: #fff; }}
.curves {{ display: grid; gap: 1.2rem 1rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }}
.curves figure {{ margin: 0; min-width: 0; }} figcaption {{ font-size: .9rem; }}
.key {{ display: flex; flex-wrap: wrap; gap: 0 .9rem; font-size: .9rem; }} .key span {{ overflow-wrap: anywhere; }}
svg {{ width: 100%; height: auto; display: block; }} svg text {{ font: 11px system-ui, sans-serif; fill: var(--soft); }}
.axis {{ stroke: var(--soft); fill: none; }} .ruled {{ stroke: var(--line); }}
.chance {{ stroke: var(--text); stroke-dasharray: 5 4; }} svg .level {{ paint-order: stroke; stroke: var(--ground); stroke-width: 3; }}
.line {{ fill: none; stroke-width: 1.8; stroke-linejoin: round; }} .dotted {{ stroke-dasharray: 2 3; }}
details {{ margin: .5rem 0; }} summary {{ cursor: pointer; }}
pre {{ overflow-x: auto; padding: .8rem; background: var(--card); border-radius: .5rem; font-size: .8rem; }}
"""
