"""The page in a real browser: what a person does with it, and what they see."""

import json
import re

import driver
import pytest
import torch

from titans import MemoryConfig, TitansConfig, TitansLM
from titans.demo import asset
from titans.inspect import probe, recall, watch
from titans.models.lm import load

LOG = "(await import('/page/js/studio.js')).studio.log"


@pytest.fixture(scope="module")
def model():
    return load(asset("demo.safetensors"))


@pytest.fixture(scope="module")
def short(server):
    return server.texts()["short"]


def tokens(text: dict) -> torch.Tensor:
    return torch.tensor([list(text["text"].encode())])


def shown(value: float) -> str:
    """A number as the page writes it, where it writes three digits."""
    size = abs(value)
    if size == 0:
        return "0"
    assert 0.001 <= size < 1000
    before_point = len(str(int(size))) if size >= 1 else 0
    leading = 0 if size >= 0.1 else 1 if size >= 0.01 else 2
    return f"{value:.{max(0, 3 - before_point) + leading}f}"


def ask(page, question: str) -> dict[str, str]:
    """What the three readers answer."""
    page.fill("#question", question)
    page.click("#ask-button")
    page.wait_for_selector(".answer")
    return answers(page)


def answers(page) -> dict[str, str]:
    cards = page.locator(".answer").all()
    return {card.get_attribute("data-reader"): card.locator("pre").inner_text() for card in cards}


def load_file(page, content: bytes, name: str = "saved.memory") -> None:
    page.set_input_files(
        "#load-file", {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    )


def no_sideways(page) -> None:
    """Name what sticks out, if anything does."""
    wide, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    out = page.evaluate(
        "[...document.querySelectorAll('main *, header *')].filter(e => "
        "e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 90))"
    )
    assert wide <= window, out


def test_something_happens_within_seconds(open_page, server, shot, short):
    """A first-time visitor: a text is there, one button reads it, tokens light up as it goes."""
    page = open_page(server.url)
    assert page.locator(".unread").count() > 5
    assert page.locator("#ask-button").is_disabled()
    shot(page, "first", full=False)
    page.click("#read")
    driver.until(page, "document.querySelectorAll('.t.written').length >= 4", 8)
    assert page.locator(".reader").count() == 1
    assert page.locator(".unread").count() > 0
    shot(page, "reading", full=False)
    page.click("#hurry")
    page.wait_for_selector("#read:visible")
    read = page.evaluate(f"(async () => {LOG}.text.join(''))()")
    assert read == short["text"]
    assert page.locator(".unread").count() == 0
    assert server.sessions()[0]["tokens_read"] == len(short["text"].encode())
    shot(page, "read")


def test_numbers_are_the_librarys(open_page, server, short, model):
    """The curves, a token's figures and a probe, against `titans.inspect` on the same text."""
    page = open_page(server.url)
    driver.read(page)
    seen = list(watch(model, tokens(short), piece=64))
    page_log = json.loads(
        page.evaluate(
            f"""(async () => {{
                const log = {LOG};
                const lines = (name) => log.lines[name].map((memory) => memory.map(
                    (line) => Array.from(line.bins.slice(0, line.length))));
                return JSON.stringify({{
                    nats: Array.from(log.nats.values.slice(1, log.length)),
                    surprise: lines("surprise"), learning_rate: lines("learning_rate"),
                    decay: lines("decay"),
                    moved: log.lines.moved.map((m) => m.map((line) => line.values)),
                    at: log.lines.moved[0][0].at, past: log.lines.past_surprise,
                }});
            }})()"""
        )
    )
    assert page_log["past"] is None  # the packaged model has no momentum
    nll = torch.cat([o.nll for o in seen], 1)[0, 1:]
    torch.testing.assert_close(torch.tensor(page_log["nats"]), nll, rtol=1e-4, atol=1e-5)
    for name in ("surprise", "learning_rate", "decay"):
        whole = torch.cat([getattr(o, name) for o in seen], 1)[0].permute(1, 2, 0)
        told = torch.tensor(page_log[name], dtype=torch.float32)
        torch.testing.assert_close(told, whole, rtol=1e-4, atol=1e-6)
    distance = torch.stack([o.moved[0] for o in seen], -1)
    torch.testing.assert_close(torch.tensor(page_log["moved"]), distance, rtol=1e-4, atol=1e-6)
    assert page_log["at"] == [o.state.position for o in seen]

    # What is written on the page: the first digit of the first fact.
    index = short["text"].encode().index(short["facts"][0]["value"].encode())
    page.click("#token .suggestion >> nth=0")
    page.wait_for_selector("#token table")
    readings = page.locator(".chart-value")
    surprise = torch.cat([o.surprise for o in seen], 1)[0, index].flatten().tolist()
    expected = [shown(value) for value in surprise]
    assert readings.nth(0).locator("span").all_inner_texts() == expected
    bits = float(nll[index - 1]) / 0.6931471805599453
    assert f"{shown(bits)} bits" in page.locator("#token .facts").inner_text()
    pair = probe(model, None, tokens(short), index)
    now = recall(model, seen[-1].state, pair).cosine[0].flatten().tolist()
    cells = page.locator("#token tbody td:last-child").all_inner_texts()
    assert cells == [shown(value) for value in now]


def test_memory_answers_and_the_others_do_not(open_page, server, shot, short):
    page = open_page(server.url)
    driver.read(page)
    for index, fact in enumerate(short["facts"]):
        page.click(f"#ask .suggestion >> nth={index}")
        page.wait_for_selector(".answer")
        found = answers(page)
        assert found["memory"] == fact["value"]
        assert fact["value"] not in (found["off"], found["attention"])
        assert "as in the text" in page.locator("[data-reader=memory]").inner_text()
    found = ask(page, "import ")
    assert len(found["memory"]) > 10
    shot(page, "free")


def test_save_reload_load(open_page, server, short):
    """The memory is a file: a page that knows nothing else answers from it."""
    page = open_page(server.url)
    driver.read(page)
    page.click("nav >> text=Memories")
    with page.expect_download() as saving:
        page.click("button:text-is('Save')")
    assert saving.value.suggested_filename == "First-reading.memory"
    content = saving.value.path().read_bytes()
    fact = short["facts"][1]

    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.click("nav >> text=Read")
    page.wait_for_selector("#read:visible")
    assert page.evaluate(f"(async () => {LOG}.length)()") == tokens(short).shape[1]
    assert ask(page, fact["question"])["memory"] == fact["value"]

    server.forget_all()
    other = open_page(server.url, view="#memories")
    other.wait_for_selector("#memory-list:has-text('No memories yet')")
    load_file(other, content)
    other.wait_for_selector(".memory")
    assert other.input_value(".memory-name") == "saved"
    other.click("nav >> text=Read")
    found = ask(other, fact["question"])
    assert found["memory"] == fact["value"]
    assert found["off"] != fact["value"]
    # The file holds no text; what is read from now on has the positions after it.
    driver.read(other, "left")
    assert other.evaluate(f"(async () => {LOG}.first)()") == tokens(short).shape[1]
    assert ask(other, fact["question"])["memory"] == fact["value"]


def test_two_forks_read_different_endings(open_page, server, shot, short):
    page = open_page(server.url)
    driver.read(page)
    page.click("nav >> text=Memories")
    page.click("button:text-is('Fork')")
    page.wait_for_selector("#memory-list .memory >> nth=1")
    page.click("button:text-is('Compare') >> nth=0")
    page.wait_for_selector(".bars")
    assert set(page.locator(".bars .n").all_inner_texts()) == {"0"}
    for side in "ab":
        page.click(f"[data-side={side}] >> text=Let it read")
        page.wait_for_selector(f"[data-side={side}] >> text=Let it read")
    page.click("text=Ask both")
    page.wait_for_selector("[data-side=b] .answer")
    page.wait_for_selector("[data-side=a] .answer")
    endings = server.texts()
    for side, ending in (("a", "left"), ("b", "right")):
        answer = page.locator(f"[data-side={side}] .answer pre").inner_text()
        assert answer == endings[ending]["facts"][0]["value"]
    assert any(text != "0" for text in page.locator(".bars .n").all_inner_texts())
    shot(page, "forks")
    # What was read before the fork, both still know.
    fact = short["facts"][0]
    page.fill("#both-question", fact["question"])
    page.click("text=Ask both")
    for side in "ab":
        page.wait_for_selector(f"[data-side={side}] .answer pre:text-is('{fact['value']}')")


def test_a_damaged_file_is_refused_in_one_line(open_page, server, shot, short):
    page = open_page(server.url)
    driver.read(page)
    page.click("nav >> text=Memories")
    with page.expect_download() as saving:
        page.click("button:text-is('Save')")
    content = bytearray(saving.value.path().read_bytes())
    content[-5] ^= 1
    open_page.expected.append("400")
    for wrong in (bytes(content), b"not a memory at all", content[:500]):
        load_file(page, bytes(wrong), "damaged.memory")
        page.wait_for_selector("#failure:visible")
        told = page.locator("#failure-text").inner_text()
        assert told.startswith("damaged.memory cannot be loaded: ")
        assert "\n" not in told
        shot(page, "told")
        page.click("#failure-close")
        assert page.locator("#failure").is_hidden()
    assert page.locator("#memory-list .memory").count() == 1
    assert len(server.sessions()) == 1


def test_erasing_a_fact_and_editing_another(open_page, server, shot, short):
    gone, edited, kept = short["facts"]
    page = open_page(server.url)
    driver.read(page)
    page.click("#erase .suggestion >> nth=0")
    assert page.locator("#erase .quote").inner_text() == f"«{gone['name']}: {gone['value']}»"
    page.click("#erase-button")
    page.wait_for_selector("#erase-result")
    rows = [row.locator("td").all_inner_texts() for row in page.locator("#erase tbody tr").all()]
    assert rows[0][0] == gone["value"]
    assert rows[0][1] != gone["value"]
    assert [row[2] for row in rows] == ["gone", "kept", "kept"]
    page.wait_for_selector(".gap")
    shot(page, "erased")
    assert ask(page, gone["question"])["memory"] != gone["value"]
    assert ask(page, kept["question"])["memory"] == kept["value"]
    assert gone["value"] not in page.evaluate(f"(async () => {LOG}.text.join(''))()")

    page.click("#erase .suggestion >> nth=0")
    page.fill("#instead", f"«{edited['name']}: 7519»")
    page.uncheck("#keep")
    page.click("#erase-button")
    page.wait_for_selector("#erase-result")
    assert "edited" in page.locator("#erase tbody").inner_text()
    assert ask(page, edited["question"])["memory"] == "7519"
    # The fork of before still knows what was erased.
    names = {session["name"] for session in server.sessions()}
    assert names == {"First reading", "First reading, before erasing"}
    page.click("nav >> text=Memories")
    page.click("[aria-label='Open First reading, before erasing']")
    page.wait_for_selector("#read:visible")
    assert ask(page, gone["question"])["memory"] == gone["value"]


def test_reset_rename_and_delete(open_page, server, short):
    page = open_page(server.url)
    driver.read(page, "left")
    page.click("nav >> text=Memories")
    page.fill(".memory-name", "my notes")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chip-name:text-is('my notes')")
    page.click("button:text-is('Reset')")
    page.wait_for_selector(".memory dd:text-is('0')")
    assert server.sessions()[0]["tokens_read"] == 0
    assert page.evaluate(f"(async () => {LOG}.length)()") == 0
    page.click("button:text-is('Delete')")
    assert len(server.sessions()) == 1  # it asks first
    page.click("text=Delete for good?")
    page.wait_for_selector("text=No memories yet")
    assert server.sessions() == []
    assert page.locator("#chip").is_hidden()


def test_stopping_leaves_what_the_server_has(open_page, server):
    """Stop in mid-read: the page then shows the tokens that count, no more and no fewer, and none
    of them is read again for that."""
    page = open_page(server.url)
    asked = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    page.select_option("#text-choice", "long")
    page.click("#read")
    page.wait_for_selector(".t")
    page.click("#stop")
    page.wait_for_selector("#read:visible")
    (session,) = server.sessions()
    assert 0 < session["tokens_read"] <= len(server.texts()["long"]["text"].encode())
    driver.until(page, f"(async () => {LOG}.length === {session['tokens_read']})()")
    assert page.locator("#read").inner_text() == "Read on"
    assert page.input_value("#text-choice") == "long"
    assert "stop" in asked
    assert "history" not in asked


def test_keyboard_alone(open_page, server, short):
    """Read, ask, probe, select and erase, go to the other views: without a pointer."""
    page = open_page(server.url)

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                ring = page.evaluate(
                    "(e => getComputedStyle(e).outlineStyle + getComputedStyle("
                    "e.nextElementSibling ?? e).outlineStyle)(document.activeElement)"
                )
                assert "solid" in ring, f"{selector} shows no focus"
                return
        raise AssertionError(f"Tab does not reach {selector}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    tab_to("#pace")
    page.keyboard.press("ArrowDown")
    tab_to("#read")
    page.keyboard.press("Enter")
    page.wait_for_selector("#ask .suggestion")
    tab_to("#pane")
    page.keyboard.press("Control+Home")
    index = short["text"].encode().index(short["facts"][0]["value"].encode())
    lines = short["text"].encode()[:index].count(b"\n")
    for _ in range(lines):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    spoken = page.locator("#announcer").inner_text()
    assert re.match(r"Token \d+, line end, surprise [\d.]+", spoken)
    while page.evaluate("document.querySelector('.t.cursor').textContent") != "»":
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.wait_for_selector("#token table")
    for _ in range(30):
        page.keyboard.press("Shift+ArrowLeft")
        if page.evaluate("document.querySelector('.t.cursor').textContent") == "«":
            break
    page.keyboard.press("Delete")
    page.wait_for_selector("#erase-result")
    page.wait_for_selector("#ask .suggestion")
    page.evaluate("document.activeElement.blur()")
    tab_to("#question")
    page.keyboard.type(short["facts"][1]["question"])
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer")
    assert answers(page)["memory"] == short["facts"][1]["value"]
    page.focus("nav a[data-view=how]")
    page.keyboard.press("Enter")
    page.wait_for_selector(".steps button")
    page.focus(".steps button")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "4Past surprise"
    assert page.locator(".steps [aria-current]").inner_text().endswith("Past surprise")


def test_explanation_and_figure(open_page, server, shot):
    page = open_page(server.url, view="#how")
    page.wait_for_selector(".stage canvas")
    titles = []
    for step in range(7):
        titles.append(page.locator(".steps [aria-current] span").inner_text())
        assert page.locator(".equation .on").count() > 0
        assert page.locator(".stage canvas").count() > 0
        shot(page, f"step-{step + 1}")
        if step < 6:
            page.click("text=Next step")
    assert titles[0] == "Key, value, query"
    assert titles[-1] == "Read"
    assert page.locator("text=Next step").is_disabled()
    # The figure moves on by itself, and stays where one looks.
    for kind, stages in (("MAC", 5), ("MAG", 4), ("MAL", 4)):
        page.check(f"[name=kind][value={kind}]")
        assert page.locator(".equations li").count() == stages
        for stage in range(stages):
            page.click(f".equations button >> nth={stage}")
            assert page.locator(".equations [aria-current]").count() == 1
            assert page.locator(".node.on").count() > 0
        page.wait_for_timeout(400)
        shot(page, f"figure-{kind}")
    page.click("text=Play")
    now = "[...document.querySelectorAll('.equations button')].findIndex(b => b.ariaCurrent)"
    before = page.evaluate(now)
    driver.until(page, f"{now} !== {before}")


def test_still_where_motion_is_not_wanted(open_page, server):
    page = open_page(server.url, motion="reduce")
    page.click("#read")
    page.wait_for_selector("#ask .suggestion", timeout=10_000)
    page.click("nav >> text=How it works")
    page.wait_for_selector(".equations button")
    assert page.locator("#figure >> text=Play").count() == 1
    assert page.locator(".dot[visibility=visible]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_windows(open_page, server, shot, scheme):
    """400 pixels: nothing sticks out sideways, in any view, whatever has happened."""
    page = open_page(server.url, size=driver.NARROW, scheme=scheme)
    no_sideways(page)
    driver.read(page)
    ask(page, "long" * 500)
    no_sideways(page)
    page.click("#ask .suggestion >> nth=0")
    page.wait_for_selector(".answer")
    page.click("#token .suggestion >> nth=0")
    page.wait_for_selector("#token table")
    page.click("#erase .suggestion >> nth=0")
    no_sideways(page)
    shot(page, f"{scheme}-read")
    page.click("#erase-button")
    page.wait_for_selector("#erase-result")
    no_sideways(page)
    page.click("nav >> text=Memories")
    page.click("button:text-is('Compare') >> nth=0")
    page.wait_for_selector(".bars")
    no_sideways(page)
    shot(page, f"{scheme}-memories")
    page.click("nav >> text=How it works")
    page.wait_for_selector(".stage canvas")
    for step in range(7):
        page.click(f"[data-key=step-{step}]")
        no_sideways(page)
    shot(page, f"{scheme}-how")
    for kind in ("MAC", "MAG"):
        page.check(f"[name=kind][value={kind}]")
        no_sideways(page)


def test_light_and_dark(open_page, server, shot):
    """The system's choice, and a switch that is remembered."""
    page = open_page(server.url, scheme="dark")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ground)
    driver.read(page)
    page.click("#ask .suggestion >> nth=0")
    page.wait_for_selector(".answer")
    page.click("#token .suggestion >> nth=0")
    page.wait_for_selector("#token table")
    shot(page, "dark")
    page.click("#theme")
    assert page.evaluate(ground) != dark
    shot(page, "light")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate(ground) != dark
    page.emulate_media(color_scheme="light")
    page.click("#theme")
    assert page.evaluate(ground) == dark
    page.click("nav >> text=How it works")
    page.wait_for_selector(".stage canvas")
    shot(page, "dark-how")


def test_your_own_text_and_a_big_one(open_page, server):
    """60,000 characters on one line and on many: the document stays small."""
    page = open_page(server.url)
    page.select_option("#text-choice", "own")
    assert page.locator("#read").is_disabled()
    page.fill("#own-text", "Ein Satz über «zzqa: 4417» und mehr.\n")
    driver.read(page, None)
    assert ask(page, " «zzqa: ")["memory"] == "4417"
    page.select_option("#text-choice", "own")
    big = ("x = 'wörter' * 12  # " * 40 + "\n") * 60 + "y" * 10_000
    file = {"name": "big.txt", "mimeType": "text/plain", "buffer": big.encode()}
    page.set_input_files("#own-file", file)
    page.click("#read")
    page.wait_for_selector("#stop:visible")
    page.wait_for_selector("#read:visible", timeout=120_000)
    length = page.evaluate(f"(async () => {LOG}.length)()")
    assert length == len(big.encode()) + len("Ein Satz über «zzqa: 4417» und mehr.\n".encode())
    assert page.evaluate("document.querySelectorAll('*').length") < 6000
    page.evaluate("document.querySelector('#pane').scrollTop = 1e9")
    page.wait_for_selector(".text-line:has-text('yyyyyy')")
    page.evaluate("document.querySelector('#pane').scrollTop = 0")
    page.wait_for_selector(".text-line:has-text('Ein Satz')")
    assert page.evaluate("document.querySelectorAll('*').length") < 6000


def test_a_server_that_is_gone(browser, tmp_path, shot):
    """The page says so, and keeps what it shows."""
    server = driver.Server(tmp_path / "sessions")
    context = browser.new_context(viewport=driver.WIDE)
    try:
        page = context.new_page()
        driver.open_studio(page, server.url)
        driver.read(page)
    finally:
        server.stop()
    page.click("#ask .suggestion >> nth=0")
    page.wait_for_selector("#answers .notice")
    assert "does not answer" in page.locator("#answers").inner_text()
    shot(page, "told")
    assert page.locator(".t").count() > 100
    context.close()


def test_a_model_with_momentum_chunks_and_two_layers(browser, tmp_path, shot):
    """Past surprise and momentum have their curves, and the explanation its terms."""
    torch.manual_seed(0)
    memory = MemoryConfig(heads=3, depth=2, expansion=2, chunk_size=4, momentum=True)
    config = TitansConfig(variant="mac", dim=24, layers=4, heads=2, ffn_hidden=32, memory=memory)
    TitansLM(config).save(tmp_path / "deep.safetensors")
    server = driver.Server(tmp_path / "sessions", f"--model=deep={tmp_path / 'deep.safetensors'}")
    context = browser.new_context(viewport=driver.WIDE)
    try:
        page = context.new_page()
        driver.open_studio(page, server.url)
        driver.read(page, "left")
        names = [c.get_attribute("data-quantity") for c in page.locator("#charts canvas").all()]
        per_token = ["learning_rate", "momentum", "decay"]
        assert names == ["surprise", "past_surprise", *per_token, "moved"]
        assert page.locator(".legend-key").count() == 3  # one layer of four at a time
        page.select_option("#chart-legend select", "2")
        assert page.locator(".legend-key").first.inner_text() == "layer 3, head 1"
        found = ask(page, "def ")
        assert "no attention-only model" in page.locator("[data-reader=attention]").inner_text()
        assert found["attention"] == "\N{EN DASH}"
        shot(page, "read")
        page.click("nav >> text=How it works")
        page.wait_for_selector(".stage canvas")
        page.click("[data-key=step-3]")
        assert page.locator(".stage canvas").count() == 4  # before and after, of two matrices
        assert "η = " in page.locator(".stage").inner_text()
        assert "eq. 16" in page.locator("#explain").inner_text()
        assert page.is_checked("[name=kind][value=MAC]")
        assert "The model on this page is of this kind." in page.locator("#figure").inner_text()
        shot(page, "how")
    finally:
        context.close()
        server.stop()


def test_a_server_with_a_token(browser, tmp_path):
    """The token comes with the address, is taken out of it, and outlasts a reload."""
    server = driver.Server(tmp_path / "sessions", "--token=a-secret")
    context = browser.new_context()
    try:
        assert server.url.endswith("/?token=a-secret")
        page = context.new_page()
        driver.open_studio(page, server.url)
        assert "secret" not in page.url
        page.reload()
        page.wait_for_selector("html[data-ready]")
        driver.read(page, "left")
        assert page.locator("#failure").is_hidden()
        stranger = context.new_page()
        driver.open_studio(stranger, server.url.partition("?")[0])
        assert "token" in stranger.locator("#failure-text").inner_text()
    finally:
        context.close()
        server.stop()
