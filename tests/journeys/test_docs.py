"""The docs site builds without a warning; every page works in a browser, on a phone, in the dark, by keyboard, and without a network."""
import csv
import functools
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from support import ROOT
from support.browser import MISSING, find_browser

pytestmark = pytest.mark.timeout(1200)  # on however busy a machine
needs_browser = pytest.mark.skipif(not find_browser(), reason=MISSING)

# What a page says of itself. `contrasts`: the text below 4.5 : 1 against the ground behind it.
LOOK = """() => {
  const shown = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
  const article = document.querySelector("article") || document.body;
  const images = [...document.images].map(i => ({src: i.src.slice(0, 80), width: i.naturalWidth, alt: i.getAttribute("alt")}));
  const hidden = "mjx-container, [aria-hidden=true], button, svg svg";
  const drawings = [...article.querySelectorAll("svg")].filter(s => !s.closest(hidden) && shown(s));
  return {
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    ids: [...document.querySelectorAll("[id], a[name]")].map(e => e.id || e.name),
    images, unnamed: drawings.filter(s => !s.getAttribute("aria-label") && !s.querySelector("title")).length, drawings: drawings.length,
    maths: document.querySelectorAll("span.math, div.math").length,
    typeset: [...document.querySelectorAll("mjx-container > svg")].filter(s => s.getBoundingClientRect().width > 0).length,
    wrong: [...document.querySelectorAll("mjx-merror, [data-mjx-error], .problematic")].map(e => e.textContent),
    over: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - window.innerWidth,
    headings: document.querySelectorAll("h1").length, lang: document.documentElement.lang,
  }
}"""
CONTRAST = """() => {
  document.getAnimations().forEach(a => a.finish());
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
  const memory = {};
  const rgba = c => memory[c] ??= (canvas.clearRect(0, 0, 1, 1), canvas.fillStyle = c, canvas.fillRect(0, 0, 1, 1),
                                   [...canvas.getImageData(0, 0, 1, 1).data].map((v, i) => i < 3 ? v : v / 255));
  const mix = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = c => c.slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => {
    const c = rgba(getComputedStyle(e).backgroundColor);
    return c[3] === 1 ? c : mix(c, e.parentElement ? ground(e.parentElement) : [255, 255, 255]).concat(1);
  };
  const seen = new Set(), found = [];
  const walker = document.createTreeWalker(document.querySelector("article") || document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement;
    if (!node.data.trim() || seen.has(e) || e.closest("svg, style, script, mjx-container, .headerlink, .copybtn")) continue;
    seen.add(e);
    const below = ground(e), [a, b] = [mix(rgba(getComputedStyle(e).color), below), below].map(light).sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5 && e.checkVisibility()) found.push(`${ratio.toFixed(2)} ${e.tagName}.${e.className} ${node.data.trim().slice(0, 30)}`);
  }
  return found;
}"""


def build(folder: Path) -> subprocess.CompletedProcess:
    "The site, as `make docs` builds it, in `folder/site`."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    laid = subprocess.run([sys.executable, ROOT / "docs" / "prep.py", folder / "source"], capture_output=True, text=True, env=env)
    if laid.returncode:
        return laid
    options = ["-q", "-W", "--keep-going", "-j", "2", "-c", ROOT / "docs"]
    command = [sys.executable, "-m", "sphinx", *options, folder / "source", folder / "site"]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "The site's folder and how its build ended. `ARCHREPAIR_SITE=_docs` looks at one that `make docs` has just built."
    if os.environ.get("ARCHREPAIR_SITE"):
        return ROOT / os.environ["ARCHREPAIR_SITE"], subprocess.CompletedProcess([], 0, "", "")
    folder = tmp_path_factory.mktemp("docs")
    return folder / "site", build(folder)


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def serve(folder: Path) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def visit(chromium, address: str, pages: list[str]) -> dict[str, dict]:
    "What every page says of itself at the width of a phone, in the light and in the dark, with what it complained about and asked for."
    context = chromium.new_context(viewport={"width": 390, "height": 844}, color_scheme="light")
    page, found = context.new_page(), {}
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:100]}"))
    page.on("request", lambda request: asked.append(request.url))
    for name in pages:
        complaints.clear(), asked.clear()
        page.emulate_media(color_scheme="light")
        page.goto(f"{address}/{name}", wait_until="load")
        page.evaluate("async () => window.MathJax?.startup?.promise")
        found[name] = page.evaluate(LOOK) | {"light": page.evaluate(CONTRAST)}
        page.emulate_media(color_scheme="dark")
        found[name] |= {"dark": page.evaluate(CONTRAST), "complaints": [*complaints],
                        "asked": [u for u in asked if urlsplit(u).scheme not in ("data", "blob") and not u.startswith(address)]}
    context.close()
    return found


@pytest.fixture(scope="session")
def site(built, chromium):
    "Address, a browser, and what all pages said of themselves."
    folder, done = built
    assert not done.returncode, done.stderr[-3000:]
    server = serve(folder)
    address = f"http://127.0.0.1:{server.server_port}"
    pages = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.html") if "_static" not in p.parts)
    yield address, chromium, visit(chromium, address, pages)
    server.shutdown()


def by_page(found: dict[str, dict], key: str) -> dict[str, list]:
    return {name: page[key][:5] for name, page in found.items() if page[key]}


def dead(found: dict[str, dict], address: str) -> list[str]:
    "Links within the site that lead to no page, or to no place on it."
    targets = {name: {*page["ids"], "", "top"} for name, page in found.items()}
    wrong = set()
    for name, page in found.items():
        for link in page["links"]:
            url, anchor = urldefrag(link)
            if not url.startswith(address):
                continue
            path = unquote(urlsplit(url).path).strip("/") or "index.html"
            if path not in targets or unquote(anchor) not in targets[path]:
                wrong.add(f"{name} → {path}#{anchor}")
    return sorted(wrong)


# --- the build


def test_builds_without_a_warning(built):
    folder, done = built
    assert not done.returncode and not done.stderr, done.stderr[-3000:]
    for page in ("index", "start", "paper", "tutorials", "bring", "library", "methods", "api", "results", "leaderboard", "benchmarks",
                 "reliability", "search"):
        assert (folder / f"{page}.html").stat().st_size > 2000
    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if p.stem != "index" and ".ipynb_checkpoints" not in p.parts]
    assert all((folder / p.relative_to(ROOT / "nbs").with_suffix(".html")).exists() for p in notebooks) and len(notebooks) > 50


def test_every_module_is_described_with_its_types(built):
    folder, _ = built
    paths = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / "archrepair").rglob("*.py") if not p.stem.startswith("_")]
    modules = [".".join(path.parts) for path in paths]
    assert not [m for m in modules if not (folder / "api" / f"{m}.html").exists()] and len(modules) > 50
    page = (folder / "api" / "archrepair.repair.localization.html").read_text()
    assert 'id="archrepair.repair.localization.localize"' in page and "Localization" in page and "Suspiciousness of neurons" in page


def test_every_stored_result_is_shown(built):
    folder, _ = built
    page = (folder / "results.html").read_text()
    stored = [p for tier in ("paper", "lite") for kind in ("figures", "tables") for p in (ROOT / "outputs" / tier / kind).glob("*.*")]
    tables = [p for p in stored if p.suffix == ".csv"]
    drawn = {p.stem for p in stored if p.suffix == ".png"}
    assert drawn and not [s for s in drawn if f"lite-{s}." not in page and f"paper-{s}." not in page]
    assert tables and page.count("<table") == len(tables)
    commits = {c for p in tables for row in csv.DictReader(p.open(encoding="utf-8")) for c in row["commit"].split()}
    assert commits and not [c for c in commits if c not in page]


# --- in a browser


@needs_browser
def test_checks_can_fail(tmp_path, chromium):
    (tmp_path / "index.html").write_text("""<!doctype html><html><body><article><p style="color: #777; background: #fff">pale</p>
        <p style="color: #767676; background: #fff">not pale</p><img src="absent.png">
        <div style="width: 900px">wide</div><svg width="9"></svg>
        <a href="absent.html">x</a><a href="#nowhere">y</a><a href="#here" id="here">z</a><span class="math">x</span>
        <script src="http://127.0.0.2:9/x.js"></script><script>console.error("ouch"); oops()</script></article></body></html>""")
    server = serve(tmp_path)
    address = f"http://127.0.0.1:{server.server_port}"
    found = visit(chromium, address, ["index.html"])
    server.shutdown()
    page = found["index.html"]
    assert [c.split()[0] for c in page["light"]] == ["4.48"]
    assert page["images"] == [{"src": f"{address}/absent.png", "width": 0, "alt": None}]
    assert page["over"] > 400 and page["unnamed"] == 1 and page["maths"] == 1 and page["typeset"] == 0
    assert dead(found, address) == ["index.html → absent.html#", "index.html → index.html#nowhere"]
    assert page["asked"] == ["http://127.0.0.2:9/x.js"]
    assert all(any(word in c for c in page["complaints"]) for word in ("ouch", "oops"))


@needs_browser
def test_every_page_loads_quietly_and_asks_no_other_host(site):
    address, _, found = site
    assert len(found) > 100 and not by_page(found, "complaints") and not by_page(found, "asked")
    assert all(page["headings"] == 1 and page["lang"] for name, page in found.items() if name != "search.html")


@needs_browser
def test_links_lead_somewhere(site):
    address, _, found = site
    assert sum(len(p["links"]) for p in found.values()) > 1000 and not dead(found, address)


@needs_browser
def test_figures_show_and_say_what_they_show(site):
    _, _, found = site
    images = [(name, i) for name, page in found.items() for i in page["images"]]
    assert len(images) > 50 and not [(name, i) for name, i in images if not i["width"] or not (i["alt"] or "").strip()]
    assert sum(p["drawings"] for p in found.values()) > 5 and not {n: p["unnamed"] for n, p in found.items() if p["unnamed"]}


@needs_browser
def test_mathematics_is_typeset(site):
    _, _, found = site
    assert sum(p["maths"] for p in found.values()) > 30
    assert not {n: (p["maths"], p["typeset"]) for n, p in found.items() if p["typeset"] != p["maths"]} and not by_page(found, "wrong")


@needs_browser
def test_pages_fit_a_phone(site):
    _, _, found = site
    assert not {name: page["over"] for name, page in found.items() if page["over"] > 0}


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(site, scheme):
    _, _, found = site
    assert not by_page(found, scheme)


PATHS = {  # from the front page: the words of a link, and where it leads
    "tutorial": [("quickstart", "tutorials/quickstart.html")],
    "tutorial of one's own": [("your model", "tutorials/repair_your_model.html")],
    "package": [("packages", "CONTRIBUTING.html#the-packages"), ("repair", "library.html#repair"),
                ("Localization", "00_localization.html"),
                ("archrepair.repair.localization", "api/archrepair.repair.localization.html")],
    "paper": [("localization", "00_localization.html")],
    "claims of the paper": [("research questions 1", "03_rq1.html")],
    "beyond the paper": [("beyond the paper", "07_beyond.html")],
    "methods": [("eleven of them", "methods.html")],
}
WINDOWS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("path", PATHS)
def test_the_front_page_leads_on(site, path, window, scheme):
    "Every reader's path, click by click: each page opens where the link says, fits, can be read, and complains about nothing."
    address, chromium, _ = site
    context = chromium.new_context(viewport=WINDOWS[window], color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{address}/index.html", wait_until="load")
    for words, target in [(None, "index.html"), *PATHS[path]]:
        if words:
            page.locator("article").get_by_role("link", name=words, exact=True).first.click()
            page.wait_for_url(f"{address}/{target}", wait_until="load")
        assert page.locator("h1").first.is_visible() and page.evaluate(LOOK)["over"] <= 0
        anchor = urldefrag(target).fragment
        if anchor:
            page.wait_for_function("id => Math.abs(document.getElementById(id).getBoundingClientRect().top) < innerHeight / 2", arg=anchor)
    assert not page.evaluate(CONTRAST) and not complaints
    context.close()


@needs_browser
def test_every_path_of_the_front_page_is_walked(site):
    "The first links of README's table of readers; the others are checked with all links."
    address, chromium, found = site
    page = chromium.new_page()
    page.goto(f"{address}/index.html")
    first = page.locator("section#where-to-go tbody tr").evaluate_all("rows => rows.map(r => r.querySelector('a')?.textContent)")
    page.close()
    assert {words for (words, _), *_ in PATHS.values()} | {"CONTRIBUTING"} >= set(first) and len(first) > 5


@needs_browser
def test_the_leaderboard_is_sorted_by_a_heading_and_filtered_by_words(site):
    address, chromium, _ = site
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/leaderboard.html")
    table = page.locator("table.sortable").first
    head = table.locator("thead th").all_inner_texts()
    column = [text.split()[0] for text in head].index("change")
    shown = lambda: [float(row.locator("td").nth(column).inner_text()) for row in table.locator("tbody tr:visible").all()]
    heading = table.locator("thead th").nth(column)
    for direction in (True, False):
        heading.get_by_role("button").click()
        values = shown()
        assert len(values) > 10 and values == sorted(values, reverse=direction)
        assert heading.get_attribute("aria-sort") == ("descending" if direction else "ascending")
    page.get_by_role("searchbox").nth(-2).fill("fog surgical")
    rows = table.locator("tbody tr:visible").all_inner_texts()
    assert 0 < len(rows) < len(values) and all("fog" in row and "surgical" in row for row in rows)
    page.close()


@needs_browser
def test_search_finds(site):
    address, chromium, _ = site
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/index.html")
    page.locator("input[name=q]").first.press_sequentially("tarantula")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    page.wait_for_function("document.querySelector('#search-results p')?.textContent.match(/found|matching/)")
    assert "Localization" in page.locator("#search-results li a").all_inner_texts()
    page.goto(f"{address}/search.html?q=xyzzyplugh")
    page.wait_for_function("document.querySelector('#search-results')?.textContent.includes('did not match')")
    page.close()


REACHABLE = """() => [...document.querySelectorAll("a[href], button, input, summary, label[for], [tabindex='0']")]
  .filter(e => e.tabIndex >= 0 && !e.disabled && e.checkVisibility({visibilityProperty: true}) && e.getBoundingClientRect().width > 1)
  .map(e => e.dataset.n ??= String(window.n = (window.n || 0) + 1))"""


@needs_browser
@pytest.mark.parametrize("name", ["index.html", "results.html", "02_finetuning.html"])
def test_keyboard_reaches_everything_and_shows_where_it_is(site, name):
    address, chromium, _ = site
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/{name}")
    wanted, reached, unmarked = set(page.evaluate(REACHABLE)), set(), set()
    for _ in range(len(wanted) + 20):
        page.keyboard.press("Tab")
        at = page.evaluate("""() => { const e = document.activeElement, s = getComputedStyle(e);
            return [e.dataset.n || "", s.outlineStyle !== "none" || s.boxShadow !== "none" || e.matches("input")
            || getComputedStyle(e.closest(".sd-card") || e).outlineStyle !== "none", e.outerHTML.slice(0, 80)] }""")
        reached.add(at[0])
        if at[0] and not at[1]:
            unmarked.add(at[2])
    assert len(wanted) > 20 and not wanted - reached and not unmarked
    assert page.evaluate("!!document.querySelector('input[name=q]').dataset.n && !!document.querySelector('.sidebar-tree a').dataset.n")
    page.close()


@needs_browser
def test_keyboard_opens_the_navigation_of_a_narrow_window(site):
    address, chromium, _ = site
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    page.goto(f"{address}/index.html")
    assert page.locator(".sidebar-tree a").first.bounding_box()["x"] < 0
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('label.nav-overlay-icon')"):
            break
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#__navigation').checked")
    page.wait_for_function("document.querySelector('.sidebar-tree a').getBoundingClientRect().x >= 0")
    page.close()
