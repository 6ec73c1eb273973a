"""What goes wrong while the page waits: impatience, other tabs, and servers that forget or die."""

import json
import urllib.request

import driver
import pytest
from test_page import LOG, load_file, no_sideways

from titans.demo import asset

LONGEST = "n" * 200


def send(server, path: str, content: object, method: str = "POST") -> dict:
    """What another page would do: JSON, or a text."""
    kind = "text/plain; charset=utf-8" if isinstance(content, str) else "application/json"
    body = content if isinstance(content, str) else json.dumps(content)
    request = urllib.request.Request(
        server.url + path, data=body.encode(), headers={"Content-Type": kind}, method=method
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def hold(page, pattern: str) -> list:
    """Requests that wait until the test lets them go."""
    held: list = []
    page.route(pattern, lambda route: held.append(route))
    return held


def wait_for(page, held: list) -> None:
    for _ in range(200):
        if held:
            return
        page.wait_for_timeout(30)
    raise AssertionError("no such request came")


def told(page) -> str:
    page.wait_for_selector("#failure:visible")
    return page.locator("#failure-text").inner_text()


def length(page) -> int:
    return page.evaluate(f"(async () => {LOG}.length)()")


def test_one_erase_at_a_time_and_only_of_what_is_shown(open_page, server):
    """Delete pressed again does nothing; where another tab read on, nothing is erased or left."""
    page = open_page(server.url)
    driver.read(page, "left")
    (session,) = server.sessions()
    held = hold(page, "**/erase")
    page.click("#erase .suggestion >> nth=0")
    page.click("#erase-button")
    wait_for(page, held)
    assert page.locator("#read").is_disabled()
    page.focus("#pane")
    page.keyboard.press("Delete")
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Delete")
    page.wait_for_timeout(200)
    assert page.locator("#erase-button").count() == 0
    assert len(held) == 1
    assert len(server.sessions()) == 2  # with the fork of before
    after = send(server, f"v1/sessions/{session['id']}/read", "and something more")
    open_page.expected.append("409")
    held[0].continue_()
    assert told(page) == "The memory has read on since; nothing was erased."
    assert [one["id"] for one in server.sessions()] == [session["id"]]
    assert server.sessions()[0]["tokens_read"] == after["tokens_read"]
    # The page has caught up, and erases when told so again.
    page.wait_for_selector("#erase .suggestion")
    assert length(page) == after["tokens_read"]
    page.unroute("**/erase")
    page.click("#erase .suggestion >> nth=0")
    page.click("#erase-button")
    page.wait_for_selector("#erase-result")
    assert page.locator("#failure").is_hidden()
    assert length(page) < after["tokens_read"]
    assert len(server.sessions()) == 2


def test_what_was_to_be_read_instead_outlives_a_failure(open_page, server):
    """Whether the server refuses or another tab read on; it goes when another passage is chosen."""
    page = open_page(server.url)
    driver.read(page, "left")
    (session,) = server.sessions()
    page.click("#erase .suggestion >> nth=0")
    quote = page.locator("#erase .quote").inner_text()
    page.fill("#instead", "something of mine")
    page.uncheck("#keep")
    refusal = json.dumps({"error": {"message": "no room", "type": "storage_error", "code": None}})
    page.route("**/erase", lambda route: route.fulfill(status=507, body=refusal))
    open_page.expected += ["507", "409"]
    page.click("#erase-button")
    assert told(page) == "No room."

    def kept():
        page.wait_for_selector("#erase-button:not([disabled])")
        return (
            page.locator("#erase .quote").inner_text() == quote
            and page.input_value("#instead") == "something of mine"
            and not page.is_checked("#keep")
        )

    assert kept()
    page.unroute("**/erase")
    send(server, f"v1/sessions/{session['id']}/read", "and more")
    page.click("#erase-button")
    assert told(page) == "The memory has read on since; nothing was erased."
    assert kept()
    assert page.evaluate("document.activeElement.id") == "erase-button"
    # A longer passage from the same token on is the same one, another place is not.
    page.focus("#pane")
    page.keyboard.press("Shift+ArrowLeft")
    assert page.input_value("#instead") == "something of mine"
    page.keyboard.press("Home")
    page.keyboard.press("Shift+End")
    page.wait_for_selector("#erase .quote")
    assert page.input_value("#instead") == ""
    assert page.is_checked("#keep")


def test_an_erase_can_be_cancelled(open_page, server):
    """Nothing has changed then: not the memory, not what is shown, and there is no fork of it."""
    open_page.expected.append("409")
    text = server.texts()["left"]["text"]
    session = send(server, "v1/sessions", {"name": "long"})
    send(server, f"v1/sessions/{session['id']}/read", text * 20)
    page = open_page(server.url, view="#memories")
    page.click("button:text-is('Open')")
    page.click("#erase .suggestion >> nth=0", timeout=120_000)
    page.fill("#instead", "kept")
    (before,) = server.sessions()
    held = hold(page, "**/v1/sessions")
    page.click("#erase-button")
    wait_for(page, held)
    page.click("#erase >> text=Cancel")  # while the fork is made
    page.wait_for_selector("#erase >> text=Cancel")
    held[0].continue_()
    page.wait_for_selector("#erase-button:not([disabled])")
    page.unroute("**/v1/sessions")
    assert server.sessions() == [before]
    with page.expect_request("**/erase"):
        page.click("#erase-button")
    while page.locator("#erase-button").count() == 0:  # the server may not know of it yet
        page.locator("#erase >> text=Cancel").dispatch_event("click")
        page.wait_for_timeout(100)
    assert server.sessions() == [before]
    assert page.locator("#failure").is_hidden()
    assert page.input_value("#instead") == "kept"
    assert length(page) == before["tokens_read"]


def test_another_memory_opened_while_erasing(open_page, server):
    """It is not taken for the one that was erased, whose fork has a name that the server takes."""
    session = send(server, "v1/sessions", {"name": LONGEST})
    other = send(server, "v1/sessions", {"name": "other"})
    text = server.texts()["left"]["text"]
    for one in (session, other):
        send(server, f"v1/sessions/{one['id']}/read", text)
    page = open_page(server.url, view="#memories")
    page.click(f"[data-id='{session['id']}'] >> button:text-is('Open')")
    page.wait_for_selector("#erase .suggestion")
    held = hold(page, "**/erase")
    page.click("#erase .suggestion >> nth=0")
    page.click("#erase-button")
    wait_for(page, held)
    page.click("nav >> text=Memories")
    page.click(f"[data-id='{other['id']}'] >> button:text-is('Open')")
    page.wait_for_selector("#chip-name:text-is('other')")
    held[0].continue_()
    page.wait_for_selector("#ask-button:not([disabled])")
    assert length(page) == len(text.encode())
    assert page.locator(".gap").count() == 0
    assert page.locator("#erase-result").count() == 0
    read = {one["name"]: one["tokens_read"] for one in server.sessions()}
    fork = LONGEST[: 200 - len(", before erasing")] + ", before erasing"
    assert set(read) == {LONGEST, "other", fork}
    assert read[LONGEST] < read["other"] == read[fork]


def test_erasing_where_there_are_many_notes(open_page, server):
    """The server answers 32 questions; the nearest are asked."""
    session = send(server, "v1/sessions", {"name": "notes"})
    notes = [f"n{letter}{other}" for letter in "abcdef" for other in "abcdefgh"]
    text = "".join(f"some words «{name}: {1000 + n}» " for n, name in enumerate(notes))
    send(server, f"v1/sessions/{session['id']}/read", text)
    page = open_page(server.url, view="#memories")
    page.click(f"[data-id='{session['id']}'] >> button:text-is('Open')")
    page.wait_for_selector("#erase .suggestion")
    page.click("#erase .suggestion >> nth=40")
    page.click("#erase-button")
    page.wait_for_selector("#erase-result")
    assert page.locator("#failure").is_hidden()
    asked = page.locator("#erase-result tbody th").all_inner_texts()
    assert asked == [f"«{name}" for name in notes[16:]]


def test_an_answer_of_another_memory_is_not_shown(open_page, server):
    """It was asked of one, and another was opened meanwhile."""
    session, other = (send(server, "v1/sessions", {"name": name}) for name in ("one", "other"))
    text = server.texts()["left"]["text"]
    for one in (session, other):
        send(server, f"v1/sessions/{one['id']}/read", text)
    page = open_page(server.url, view="#memories")
    page.click(f"[data-id='{session['id']}'] >> button:text-is('Open')")
    page.wait_for_selector("#ask .suggestion")
    held = hold(page, "**/compare-ask")
    page.click("#ask .suggestion >> nth=0")
    wait_for(page, held)
    page.click("nav >> text=Memories")
    page.click(f"[data-id='{other['id']}'] >> button:text-is('Open')")
    page.wait_for_selector("#chip-name:text-is('other')")
    page.wait_for_selector("#ask .suggestion")
    held[0].continue_()
    page.wait_for_timeout(1500)
    assert page.locator("#answers .answer").count() == 0


def test_a_long_past_does_not_hold_up_the_page(open_page, server):
    """It is there at once, says what it does, and can be told to stop."""
    page = open_page(server.url)
    driver.read(page, "left")
    held = hold(page, "**/history")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    wait_for(page, held)
    page.wait_for_selector("#past:visible")
    page.click("nav >> text=Memories")
    page.wait_for_selector(".memory")
    page.click("nav >> text=Read")
    page.click("#stop-past")
    page.wait_for_selector("#read:visible")
    assert page.locator("#chip").is_hidden()
    assert page.locator("#past").is_hidden()
    page.unroute("**/history")
    page.click("nav >> text=Memories")
    page.click("button:text-is('Open')")
    page.wait_for_selector("#ask .suggestion")
    assert length(page) == server.sessions()[0]["tokens_read"]
    # A probe reads it too, and can be called off.
    probes = hold(page, "**/probe")
    page.click("#token .suggestion >> nth=0")
    wait_for(page, probes)
    page.click("#token >> text=Cancel")
    page.wait_for_selector("#token .suggestion")


def compare_two(page) -> None:
    """Two new memories, side by side."""
    page.click("nav >> text=Memories")
    for count in range(2):
        page.click("#fresh")
        page.wait_for_selector(f".memory >> nth={count}")
    page.click("button:text-is('Compare') >> nth=0")
    page.wait_for_selector(".bars")


def test_a_reading_in_a_comparison_can_be_stopped(open_page, server):
    """What was read counts, and the other memory can be chosen anew meanwhile."""
    page = open_page(server.url)
    compare_two(page)
    page.select_option("[data-side=a] select >> nth=1", "own")
    field = page.locator("[data-side=a] textarea")
    field.evaluate("(field) => (field.value = 'some words of a long text\\n'.repeat(4000))")
    page.click("[data-side=a] >> text=Let it read")
    status = page.locator("[data-side=a] [role=status]")
    page.wait_for_selector("[data-side=a] [role=status] >> text=/^[1-9].* tokens …/")
    a = page.locator("[data-side=a] select >> nth=0")
    assert a.is_disabled()
    b = page.locator("[data-side=b] select >> nth=0")
    b.select_option(a.input_value())
    assert page.locator("[data-side=a] >> text=Stop").is_visible()
    page.click("[data-side=a] >> text=Stop")
    page.wait_for_selector("[data-side=a] >> text=Let it read")
    read = max(session["tokens_read"] for session in server.sessions())
    assert 0 < read < 4000 * 26
    assert status.inner_text() == f"{read:,} tokens read"
    assert a.is_enabled()


def test_a_comparison_follows_a_new_name(open_page, server):
    page = open_page(server.url)
    compare_two(page)
    a = page.locator("[data-side=a] select >> nth=0")
    chosen = a.input_value()
    name = page.locator(f"[data-id='{chosen}'] .memory-name")
    name.fill("Renamed")
    name.press("Enter")
    page.wait_for_selector("[data-side=a] option >> text=Renamed", state="attached")
    assert a.input_value() == chosen
    assert a.locator("option:checked").inner_text() == "Renamed"
    page.click("text=Ask both")
    page.wait_for_selector("[data-side=a] h3 >> text=Renamed goes on")


def test_a_reading_in_a_comparison_that_fails_says_so(open_page, server):
    open_page.expected.append("507")
    page = open_page(server.url)
    compare_two(page)
    refusal = {"error": {"message": "there is no room", "type": "storage_error", "code": None}}
    page.route("**/read?*", lambda route: route.fulfill(status=507, json=refusal))
    page.click("[data-side=a] >> text=Let it read")
    assert told(page) == "There is no room."
    page.wait_for_selector("[data-side=a] >> text=Let it read")
    page.wait_for_timeout(500)  # the list of memories is fetched again
    assert told(page) == "There is no room."
    # Closed while one reads, it ends in silence.
    page.unroute("**/read?*")
    held = hold(page, "**/read?*")
    page.click("[data-side=b] >> text=Let it read")
    wait_for(page, held)
    page.click("#comparison >> text=Close")
    page.wait_for_timeout(300)
    assert page.locator("#failure").is_hidden()
    assert page.locator("#comparison").inner_text() == ""


# What a hand would do: the event, and whether the page took it.
DROP = """([text, file, target]) => {
    const data = new DataTransfer();
    if (file) data.items.add(new File([text], "d.txt"));
    else data.setData("text/plain", text);
    return !document.querySelector(target).dispatchEvent(
        new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""
PASTE = """(text) => {
    const data = new DataTransfer();
    data.setData("text/plain", text);
    return !document.querySelector("#own-text").dispatchEvent(
        new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
}"""


def test_texts_of_ones_own(open_page, server):
    """Dropped, pasted, typed, from a file: the last counts; what is no text is refused by name."""
    page = open_page(server.url)
    binary = {"name": "x.bin", "mimeType": "application/octet-stream", "buffer": b"\xff\x00"}
    page.set_input_files("#own-file", binary)
    assert told(page) == "x.bin is not a text in UTF-8."
    assert page.evaluate(DROP, ["from a file", True, "#text"])
    driver.until(page, "document.querySelector('#own-text').value === 'from a file'")
    assert page.locator("#failure").is_hidden()
    assert page.evaluate(DROP, ["words", False, "#text"])
    driver.until(page, "document.querySelector('#own-text').value === 'words'")
    assert not page.evaluate(DROP, ["words", False, "#question"])  # the browser puts them there
    assert page.evaluate(DROP, ["a file", True, "header"])  # and leaves the page where it is
    # What is too long to be shown is kept beside the field, until something is typed.
    assert page.evaluate(PASTE, "line\n" * 100_000)
    page.wait_for_selector("#own-size:text-is('500,000 characters')")
    assert page.input_value("#own-text") == ""
    page.fill("#own-text", "typed")
    page.wait_for_selector("#own-size:text-is('5 characters')")
    driver.read(page, None)
    assert page.evaluate(f"(async () => {LOG}.text.join(''))()") == "typed"


def test_what_two_tabs_read(open_page, server):
    """Reading on after another tab did shows the whole, in the order of the memory."""
    page = open_page(server.url)
    driver.read(page, "left")
    (session,) = server.sessions()
    send(server, f"v1/sessions/{session['id']}/read", "from elsewhere ")
    page.select_option("#text-choice", "own")
    page.fill("#own-text", "and from here")
    driver.read(page, None)
    text = page.evaluate(f"(async () => {LOG}.text.join(''))()")
    assert text == server.texts()["left"]["text"] + "from elsewhere and from here"


def test_a_memory_that_was_deleted_elsewhere(open_page, server):
    """The page lets go of it, and reads what comes next into a new one."""
    open_page.expected.append("404")
    page = open_page(server.url)
    driver.read(page, "left")
    server.forget_all()
    page.click("#ask .suggestion >> nth=0")
    assert told(page).startswith("The server no longer has this memory.")
    assert page.locator("#chip").is_hidden()
    assert length(page) == 0
    driver.read(page, "left")
    assert page.locator("#failure").is_hidden()
    assert length(page) == server.sessions()[0]["tokens_read"]
    for _ in range(2):  # the first Read notices, the second makes a new memory
        server.forget_all()
        page.select_option("#text-choice", "right")
        page.click("#read")
        assert told(page).startswith("The server no longer has this memory.")
        page.wait_for_selector("#read:visible")
        driver.read(page, "right")
    assert len(server.sessions()) == 1
    assert length(page) == server.sessions()[0]["tokens_read"]


def test_a_server_that_dies_while_it_reads(browser, tmp_path):
    """What was shown stays, and the message is the page's, not the browser's."""
    server = driver.Server(tmp_path / "sessions")
    context = browser.new_context(viewport=driver.WIDE)
    try:
        page = context.new_page()
        driver.open_studio(page, server.url)
        page.select_option("#text-choice", "long")
        text = server.texts()["long"]["text"]
        page.click("#read")
        driver.until(page, f"(async () => {LOG}.length > 300)()")
        server.process.kill()
        assert told(page) == "The server does not answer. Is titans studio still running?"
        page.wait_for_selector("#read:visible")
        shown = page.evaluate(f"(async () => {LOG}.text.join(''))()")
        assert len(shown) > 200
        assert text.startswith(shown)
        assert page.locator(".t").count() > 100
    finally:
        context.close()
        server.stop()


@pytest.mark.parametrize("letter", ["W", "\N{GRINNING FACE}"])
def test_long_names_in_a_narrow_window(open_page, server, letter):
    session = send(server, "v1/sessions", {"name": letter * 200})
    page = open_page(server.url, view="#memories", size=driver.NARROW)
    page.click("button:text-is('Fork')")
    page.wait_for_selector("#memory-list .memory >> nth=1")
    no_sideways(page)
    page.click("button:text-is('Compare') >> nth=0")
    page.wait_for_selector(".bars")
    page.click("text=Ask both")
    for side in "ab":
        page.wait_for_selector(f"[data-side={side}] .answer")
    no_sideways(page)
    names = {one["name"] for one in server.sessions()}
    assert names == {session["name"], letter * 194 + ", fork"}


def test_how_numbers_are_written(open_page, server):
    page = open_page(server.url)
    written = page.evaluate(
        "(async () => { const { bytes, number } = await import('/page/js/dom.js');"
        "return [[999, 1000, 999499, 999500, 1e6, 999499999, 999500000].map(bytes),"
        "[999.4, 999.5, 999.7, 1000, 0.001].map(number)]; })()"
    )
    sizes = ["999 B", "1.00 KB", "999 KB", "1.00 MB", "1.00 MB", "999 MB", "1.00 GB"]
    assert written == [sizes, ["999", "1,000", "1,000", "1,000", "0.00100"]]


def open_memory(page, session: dict) -> None:
    """From the list of memories, to its text."""
    page.click(f"[data-id='{session['id']}'] >> button:text-is('Open')")
    page.wait_for_selector("#chip:visible")
    page.wait_for_selector("#read:visible")


def test_whole_characters_are_erased_and_single_ones_can_be(open_page, server):
    """A character of two tokens is neither cut at the end of a selection nor at the cursor."""
    session = send(server, "v1/sessions", {"name": "characters"})
    send(server, f"v1/sessions/{session['id']}/read", "a«b»cd")
    page = open_page(server.url, view="#memories")
    open_memory(page, session)
    driver.until(page, f"(async () => {LOG}.length === 8)()")
    for keys, left in (
        (("Control+Home", "Shift+ArrowRight"), "b»cd"),
        (("Control+Home", "ArrowRight"), "bcd"),
        (("Control+Home",), "cd"),
    ):
        page.focus("#pane")
        for key in keys:
            page.keyboard.press(key)
        page.keyboard.press("Delete")
        driver.until(page, f"(async () => {LOG}.text.join('') === '{left}')()")
        page.wait_for_selector("#erase-result")
    assert page.locator("#failure").is_hidden()


def test_a_model_without_memories_beside_one_with(browser, tmp_path):
    """It reads and erases, and what is explained is the open memory's model."""
    models = {"attention": "demo-attention.safetensors", "demo": "demo.safetensors"}
    named = [f"--model={name}={asset(file)}" for name, file in models.items()]
    server = driver.Server(tmp_path / "sessions", *named)
    context = browser.new_context(viewport=driver.WIDE)
    try:
        page = context.new_page()
        driver.open_studio(page, server.url)
        driver.read(page, "left")
        page.click("#erase .suggestion >> nth=0")
        page.click("#erase-button")
        page.wait_for_selector("#erase-result")
        told_of = page.locator("#erase-result").inner_text()
        assert "erased." in told_of
        assert "weights" not in told_of
        page.click("nav >> text=How it works")
        page.wait_for_selector("#explain [role=alert]")
        session = send(server, "v1/sessions", {"name": "other", "model": "demo"})
        page.click("nav >> text=Memories")
        open_memory(page, session)
        page.click("nav >> text=How it works")
        page.wait_for_selector(".stage canvas")
        assert page.locator("#explain [role=alert]").count() == 0
        assert "A sample" in page.locator("#explain").inner_text()
    finally:
        context.close()
        server.stop()


# What is drawn from now on: places that lines begin at, and labels.
WATCH_DRAWING = """() => {
    window.drawn = [];
    for (const name of ["moveTo", "fillText"]) {
        const really = CanvasRenderingContext2D.prototype[name];
        CanvasRenderingContext2D.prototype[name] = function (...given) {
            window.drawn.push([this.canvas.dataset.quantity, name, ...given]);
            really.apply(this, given);
        };
    }
}"""


def test_curves_of_a_memory_that_had_read_before(open_page, server, tmp_path):
    """Its weights had moved at the first token that is shown, whose position is not 0; and its
    file may have any name."""
    text = server.texts()["left"]["text"]
    first = send(server, "v1/sessions", {"name": "first"})
    send(server, f"v1/sessions/{first['id']}/read", text)
    page = open_page(server.url, view="#memories")
    content = server.get(f"v1/sessions/{first['id']}/memory")
    load_file(page, content, "n" * 79 + "\N{GRINNING FACE}" * 2 + ".memory")
    page.wait_for_selector(f".memory-name >> nth={len(server.sessions()) - 1}")
    driver.until(page, "document.querySelector('.memory-name').value.startsWith('nnn')")
    assert page.input_value(".memory-name >> nth=0") == "n" * 79 + "\N{GRINNING FACE}"
    page.click("nav >> text=Read")
    driver.read(page, "right")
    page.evaluate(WATCH_DRAWING)
    page.hover("canvas[data-quantity=moved]")
    drawn = page.evaluate("window.drawn.filter(([quantity]) => quantity === 'moved')")
    begins = [given for _, name, *given in drawn if name == "moveTo"]
    curves = [y for x, y in begins if x == 52 and y % 1 != 0.5]  # the others are lines of a grid
    assert curves
    assert min(curves) < 79  # of the memory that had moved; 80 is 0, where nothing had been read
    labels = [given[0] for _, name, *given in drawn if name == "fillText"]
    before = len(text.encode())
    after = before + len(server.texts()["right"]["text"].encode())
    assert {f"{before:,}", f"{after:,} tokens"} <= set(labels)
