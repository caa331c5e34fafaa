"""The demo page as people meet it: in a browser, without a network, by mouse and keyboard, on a desk and on a phone."""

import re
import shutil

import pytest
from test_web import REPO, runs, served  # noqa: F401

CHROMIUM = shutil.which("chromium")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# Every name but this machine's leads nowhere, as with the network shut.
ARGUMENTS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
WAIT_MS = 60_000
MESSAGES = "#chat [data-testid=user], #chat [data-testid=bot]"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by pip install '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no chromium here; the page is tested in a browser after: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, served):  # noqa: F811
    """Opens the page as another visitor does; what was asked of other hosts, and what failed, ends the test."""
    contexts, foreign = [], []

    def open_page(size=DESK):
        contexts.append(browser.new_context(viewport=size))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda r: r.url.startswith((served.url, "data:", "blob:")) or foreign.append(r.url))
        page.on("response", lambda r: r.status < 400 or foreign.append(f"{r.status} {r.url}"))
        page.on("pageerror", lambda error: foreign.append(str(error)))
        page.goto(served.url)
        page.locator("#upload input[type=file]").wait_for(state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert foreign == []


def drop(page, picture) -> None:
    page.set_input_files("#upload input[type=file]", picture)


def caption_of(page) -> str:
    page.wait_for_function("document.querySelector('#caption textarea').value !== ''")
    return page.input_value("#caption textarea")


def conversation(page, count: int) -> list[str]:
    """The `count` messages of the conversation, once they are all there."""
    page.wait_for_function(f"document.querySelectorAll('{MESSAGES}').length === {count}")
    return [text.strip() for text in page.locator(MESSAGES).all_inner_texts()]


def ask(page, question: str) -> None:
    page.fill("#question textarea", question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function("document.querySelector('#question textarea').value === ''")


def test_a_picture_is_captioned_asked_matched_and_searched(visit, tiny):
    page, pictures = visit(), sorted(tiny.records.parent.glob("*.png"))
    drop(page, pictures[0])
    assert caption_of(page)
    page.get_by_alt_text("the uploaded picture").wait_for()
    ask(page, "what colour ?")
    conversation(page, 2)
    ask(page, "where <b>is</b> it ?")
    messages = conversation(page, 4)
    assert (messages[0], messages[2]) == ("what colour ?", "where <b>is</b> it ?")
    assert all(messages)
    page.get_by_role("tab", name="Attention").click()
    page.get_by_role("button", name="Show attention").click()
    page.locator("#look_queries img").nth(3).wait_for()
    assert page.locator("#look_line").inner_text().strip().startswith("By s2: ")
    page.locator("#looked_for textarea").fill("a red square")
    page.get_by_role("button", name="Show attention").click()
    page.locator("#look_words img").nth(2).wait_for()
    assert page.locator("#look_words").inner_text().split()[-3:] == ["a", "red", "square"]
    page.get_by_role("tab", name="Match").click()
    page.get_by_label("Captions, one a line").fill("a red square\na blue square\na <i>dot</i>")
    page.get_by_role("button", name="Rank").click()
    rows = page.locator("#ranking tbody tr")
    rows.nth(2).wait_for()
    assert rows.count() == 3
    assert "a <i>dot</i>" in page.locator("#ranking").inner_text()
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What is on the picture?").fill("a red square")
    page.get_by_label("What is on the picture?").press("Enter")
    page.locator("#hits img").nth(7).wait_for()
    assert re.search(r"\d\.\d\d \d\d\.png", page.locator("#hits").inner_text())


def test_a_broken_file_costs_a_line_and_the_page_goes_on(visit, tiny, tmp_path):
    page, pictures, events = visit(), sorted(tiny.records.parent.glob("*.png")), []
    page.on("request", lambda r: "/queue/join" in r.url and events.append(r))
    drop(page, pictures[0])
    caption_of(page)
    assert len(events) == 1  # of two Gradio may end the visitor's stream between the first and the next upload's
    ask(page, "what ?")
    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:70])
    page.get_by_label("Clear").first.click()
    page.wait_for_function("document.querySelector('#caption textarea').value === ''")
    drop(page, tmp_path / "broken.png")
    alert = page.get_by_role("alert").filter(has_text="broken.png cannot be read")
    alert.wait_for()
    assert "Traceback" not in page.content()
    assert "\n" not in alert.inner_text().strip()
    conversation(page, 0)
    page.fill("#question textarea", "what ?")
    page.locator("#question textarea").press("Enter")
    page.get_by_text("there is no picture yet; drop one first").wait_for()
    page.get_by_label("Clear").first.click()
    drop(page, pictures[1])
    assert caption_of(page)
    assert alert.count() == 0
    page.get_by_role("button", name="How it writes").click()
    page.get_by_label("Prompt of a question").fill("no place")
    page.get_by_label("Clear").first.click()
    drop(page, pictures[0])
    page.get_by_role("alert").filter(has_text="must hold {} once").wait_for()
    page.get_by_alt_text("the uploaded picture").wait_for()


def test_two_visitors_do_not_see_each_others_conversations(visit, tiny):
    pictures = sorted(tiny.records.parent.glob("*.png"))
    first, second = visit(), visit()
    for page, picture in ((first, pictures[0]), (second, pictures[1])):
        drop(page, picture)
    for page in (first, second):
        caption_of(page)
    ask(first, "what colour ?")
    ask(second, "where ?")
    ask(first, "what is red ?")
    assert conversation(first, 4)[::2] == ["what colour ?", "what is red ?"]
    assert conversation(second, 2)[0] == "where ?"
    first.reload()
    first.locator("#chat").wait_for()
    conversation(first, 0)


def test_it_is_used_by_keyboard_and_every_control_has_a_label(visit, tiny):
    page = visit()
    drop(page, sorted(tiny.records.parent.glob("*.png"))[0])
    caption_of(page)
    page.locator("#writing button").first.click()
    unnamed = page.evaluate("""[...document.querySelectorAll('input:not([type=file]), textarea, button, select')]
        .filter(e => e.offsetParent !== null && !(e.labels && e.labels.length) && !e.getAttribute('aria-label')
            && !e.getAttribute('aria-labelledby') && !e.title && !e.innerText.trim() && !e.querySelector('img[alt]'))
        .map(e => e.outerHTML.slice(0, 200))""")
    assert unnamed == []
    page.locator("#question textarea").focus()
    page.keyboard.type("what colour ?")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText.trim()") == "Ask"
    page.keyboard.press("Enter")
    conversation(page, 2)
    page.get_by_role("tab", name="Ask").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_label("Attention of").wait_for()


def test_a_phone_shows_all_of_it_without_scrolling_sideways(visit, tiny):
    page = visit(PHONE)
    drop(page, sorted(tiny.records.parent.glob("*.png"))[0])
    caption_of(page)
    for tab in ("Attention", "Match", "Search", "Ask"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    sizes = page.evaluate("[...document.querySelectorAll('textarea, button, label')].filter(e => e.offsetParent !== null)"
                          ".map(e => parseFloat(getComputedStyle(e).fontSize))")  # fmt: skip
    assert min(sizes) >= 12
