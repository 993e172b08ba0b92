"""The page in a browser: what a camera's film, files, keys and a server in trouble make of it.

Screenshots are kept in the folder that PAGE_SCREENSHOTS names, or with the test's other files.
"""

import base64
import io
import json
import os
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mlx_fastvlm import load
from tests.browser import FILM, chromium, jpeg, visiting, write_film
from tests.live_server import EXAMPLES, SlowSteps, serving, wait_until

for _module in ("fastapi", "uvicorn", "prometheus_client", "playwright.sync_api", "axe_playwright_python"):
    pytest.importorskip(_module, reason=f"the page's tests need {_module}: pip install 'mlx-fastvlm[server,browser]'")

BRIEF = "Describe the image in English. Output should be brief, about 15 words or less."
ANSWERS = {name: answers[BRIEF] for name, answers in json.loads((EXAMPLES / "answers.json").read_text()).items()}
REFUSED = "Failed to load resource"  # how the console notes an error of the server's


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def steps():
    """Makes the server's steps slow for a while."""
    with pytest.MonkeyPatch.context() as patch:
        slow = SlowSteps()
        slow.may_go.set()
        slow.install(patch)
        yield slow


@pytest.fixture(scope="module")
def live(demo, steps):
    with serving(*demo) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    film = tmp_path_factory.mktemp("film") / "film.mjpeg"
    write_film(film)
    with chromium(film) as started:
        yield started


@pytest.fixture
def visit(browser, live):
    with visiting(browser, address(live)) as visit:
        visit.open()
        yield visit


@pytest.fixture
def slowly(steps):
    steps.seconds = 0.15
    yield
    steps.seconds = 0.0


def address(server) -> str:
    return server.url.removesuffix("/v1")


def total(figures: dict[str, float], name: str, label: str = "") -> float:
    """A figure of /metrics, whatever its other labels are."""
    return sum(value for key, value in figures.items() if key.partition("{")[0] == name and label in key)


def open_files(visit, *files) -> None:
    visit.page.set_input_files("#files", list(files))


def sent_pictures(body) -> list[Image.Image]:
    """The pictures of a question, as they are stored: without the turn that EXIF asks for."""
    parts = [part for message in body["messages"] if message["role"] == "user" for part in message["content"]]
    urls = [part["image_url"]["url"] for part in parts if isinstance(part, dict) and part["type"] == "image_url"]
    return [picture_in(url) for url in urls]


def picture_in(data_url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2])))


def answer_to(thumbnail: Image.Image) -> str:
    """What the model says of the scene that a thumbnail shows. Chromium plays MJPEG with too much contrast."""

    def difference(scene) -> float:
        pixels = [np.asarray(picture.resize((32, 24)), np.float32) for picture in (thumbnail, scene.draw())]
        return float(np.abs(pixels[0] - pixels[1]).mean())

    shown, other = sorted(FILM, key=difference)
    assert 2 * difference(shown) < difference(other)
    return shown.answer


# The camera


def test_continuous_answers_follow_the_camera_and_still_frames_are_held_back(visit):
    visit.press("Start camera")
    visit.wait_for_answers(3)  # the film's two scenes, and the first again
    visit.wait_for_state("watching")
    held = visit.number("#held")
    visit.press("Stop")
    visit.wait_for_state("idle")
    entries = visit.page.locator(".entry").evaluate_all(
        "items => items.map((item) => [item.querySelector('.entry-answer').innerText, item.querySelector('img').src])"
    )
    answers = [answer for answer, _ in entries][-3:]
    assert answers == [answer_to(picture_in(thumbnail)) for _, thumbnail in entries][-3:]
    assert len(set(answers[:2])) == len(set(answers[1:])) == 2  # one answer a scene
    assert len(visit.asked) <= len(entries) + 1 and held >= 5

    visit.press("Start")

    visit.page.locator("#gate").fill("0")
    visit.wait_for_answers(len(entries) + 5)  # of far fewer scenes


def test_the_meter_shows_how_much_the_picture_differs(visit):
    visit.choose("Single shot")
    visit.press("Start camera")
    visit.press("Capture")
    visit.wait_for_answers(1)
    difference = visit.page.locator("#difference")
    wait_until(lambda: float(difference.get_attribute("aria-valuenow")) > 20, "the other scene looks the same")
    wait_until(lambda: float(difference.get_attribute("aria-valuenow")) < 1, "the first scene looks different")
    assert len(visit.asked) == 1  # single shot


def test_a_shot_is_as_large_as_the_model_sees_it_and_no_larger(visit):
    visit.answer_with("Anything.")
    visit.choose("Single shot")
    visit.page.select_option("#resolution", "512")
    visit.press("Start camera")
    visit.press("Capture")
    visit.wait_for_answers(1)
    visit.page.select_option("#fit", "crop")
    visit.press("Capture")
    visit.wait_for_answers(2)
    visit.page.select_option("#resolution", "1024")
    visit.press("Capture")
    visit.wait_for_answers(3)
    pictures = [sent_pictures(body)[0] for body in visit.asked]
    assert [picture.format for picture in pictures] == ["JPEG"] * 3
    assert [picture.size for picture in pictures] == [(512, 384), (640, 480), (640, 480)]  # the film has 640×480
    assert [(body["resolution"], body["fit"]) for body in visit.asked] == [(512, "pad"), (512, "crop"), (1024, "crop")]


def test_the_badge_is_the_servers_time_to_first_token(visit, live):
    streams = []

    def listen(route):
        reply = route.fetch()
        streams.append(reply.text())
        route.fulfill(response=reply)

    visit.page.route("**/v1/chat/completions", listen)
    before = total(live.figures(), "ttft_seconds_sum")
    open_files(visit, EXAMPLES / "shapes-two.png")
    visit.wait_for_answers(1)
    first = json.loads(streams[0].partition("\n\n")[0].removeprefix("data: "))
    assert first["choices"][0]["delta"]["role"] == "assistant"
    ttft = round(1000 * first["timings"]["ttft"])
    assert visit.page.inner_text("#ttft") == f"TTFT {ttft} ms" and visit.number("#ttft-figure") == ttft
    assert total(live.figures(), "ttft_seconds_sum") - before == pytest.approx(ttft / 1000, abs=0.0006)
    visit.page.get_by_text("Where the time went").click()
    seen = re.search(r"First token, as seen here\s+([\d.]+) ms", visit.page.inner_text("#details"))
    assert float(seen[1]) > 1000 * first["timings"]["ttft"]


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_ends_the_answer_here_and_at_the_server(visit, live, slowly, way):
    cancelled = total(live.figures(), "requests_total", 'outcome="cancelled"')
    open_files(visit, EXAMPLES / "shapes-three.png")
    visit.wait_for_state("generating")
    visit.press("Stop") if way == "button" else visit.page.keyboard.press("Escape")
    visit.wait_for_state("idle")
    text = visit.page.inner_text("#answer")
    wait_until(lambda: total(live.figures(), "requests_running") == 0, "the server goes on")
    assert total(live.figures(), "requests_total", 'outcome="cancelled"') == cancelled + 1
    assert ANSWERS["shapes-three.png"].startswith(text) and text != ANSWERS["shapes-three.png"]
    assert visit.page.inner_text("#answer") == text
    assert "stopped" in visit.page.inner_text(".entry-facts")
    assert visit.page.locator("#primary").inner_text() == "Ask"


def test_answers_grow_word_by_word_and_are_announced_whole(visit, slowly):
    visit.page.evaluate(
        """() => {
            window.texts = { answer: [], announcement: [] };
            for (const [id, seen] of Object.entries(window.texts)) {
                const element = document.getElementById(id);
                new MutationObserver(() => seen.push(element.textContent)).observe(element, { childList: true });
            }
        }"""
    )
    open_files(visit, EXAMPLES / "shapes-two.png")
    visit.wait_for_answers(1)
    seen = visit.page.evaluate("window.texts")
    whole = ANSWERS["shapes-two.png"]
    assert seen["announcement"] == [whole]
    assert len(set(seen["answer"])) >= 4 and all(whole.startswith(text) for text in seen["answer"])


def test_a_camera_that_is_not_to_be_had_is_explained(visit):
    troubles = {
        "NotAllowedError": "Allow it for this page",
        "NotFoundError": "No camera was found",
        "NotReadableError": "in use by another program",
    }
    for error, advice in troubles.items():
        visit.page.evaluate(
            """(name) => {
                navigator.mediaDevices.getUserMedia = async () => { throw new DOMException("no", name) };
            }""",
            error,
        )
        visit.press("Start camera")
        visit.page.locator("#notices").get_by_text(advice).wait_for()
        assert visit.page.inner_text("#primary") == "Start camera"


def test_a_camera_that_comes_too_late_is_given_back(visit):
    visit.page.evaluate(
        """() => {
            window.lent = [];
            const lend = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
            navigator.mediaDevices.getUserMedia = async (wish) => {
                const stream = await lend(wish);
                await new Promise((resolve) => setTimeout(resolve, 500));
                window.lent.push(stream.getVideoTracks()[0]);
                return stream;
            };
        }"""
    )
    visit.press("Camera")
    visit.press("Camera")
    open_files(visit, EXAMPLES / "word.png")
    assert visit.wait_for_answers(1) == [ANSWERS["word.png"]]
    states = "window.lent.map((track) => track.readyState)"
    wait_until(lambda: visit.page.evaluate(states) == ["ended", "ended"], "a camera stays on")
    assert visit.page.get_attribute("body", "data-shows") == "pictures"
    assert visit.page.inner_text("#notices") == ""


def test_the_screen_can_be_shared(visit):
    visit.answer_with("A page.")
    visit.press("Screen")
    assert "A page." in visit.wait_for_answers(1)  # and more: the page sees itself change
    sent = sent_pictures(visit.asked[0])[0]
    assert max(sent.size) == 256
    assert not visit.page.get_by_label("Which camera").is_visible()
    visit.press("Screen")
    assert visit.page.inner_text("#primary") == "Start camera"


def test_a_prompt_is_not_asked_while_it_is_typed(visit):
    visit.answer_with("Anything.")
    visit.press("Start camera")
    visit.page.locator("#gate").fill("0")  # all frames pass
    visit.wait_for_answers(2)
    visit.page.fill("#prompt", "")
    visit.page.locator("#prompt").press_sequentially("What do you see?", delay=60)
    suffix = visit.page.input_value("#suffix")
    wait_until(lambda: visit.asked_prompts()[-1] == f"What do you see? {suffix}", "the new prompt is not asked")
    assert set(visit.asked_prompts()) == {BRIEF, f"What do you see? {suffix}"}


def test_without_a_secure_context_the_page_says_so_and_takes_files(browser, live):
    insecure = """
        Object.defineProperty(window, "isSecureContext", { value: false });
        Object.defineProperty(navigator, "mediaDevices", { value: undefined });
        Object.defineProperty(crypto, "randomUUID", { value: undefined });
    """
    with visiting(browser, address(live)) as visit:
        visit.page.add_init_script(insecure)
        visit.open()
        visit.press("Start camera")
        visit.page.locator("#notices").get_by_text("localhost, 127.0.0.1 or https").wait_for()
        open_files(visit, EXAMPLES / "word.png")
        assert visit.wait_for_answers(1) == [ANSWERS["word.png"]]


# Pictures


def test_several_files_are_asked_about_one_after_another_or_together(visit):
    names = ["shapes-two.png", "shapes-wide.png", "word.png"]
    open_files(visit, *(EXAMPLES / name for name in names))
    assert visit.wait_for_answers(3) == [ANSWERS[name] for name in reversed(names)]
    assert [len(sent_pictures(body)) for body in visit.asked] == [1, 1, 1]
    url = visit.asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == (EXAMPLES / names[0]).read_bytes()  # a small file as it is

    visit.choose("Together in one question")
    visit.press("Ask about all 3")
    visit.wait_for_answers(4)
    assert len(sent_pictures(visit.asked[3])) == 3


def test_of_pictures_that_come_at_once_the_last_ones_stay(visit):
    visit.page.evaluate(
        """() => {
            const decode = HTMLImageElement.prototype.decode;
            let waits = [500, 0];
            HTMLImageElement.prototype.decode = async function () {
                await new Promise((resolve) => setTimeout(resolve, waits.shift()));
                return decode.call(this);
            };
        }"""
    )
    open_files(visit, EXAMPLES / "shapes-two.png")
    open_files(visit, EXAMPLES / "word.png")
    visit.page.wait_for_timeout(800)
    assert visit.wait_for_answers(1) == [ANSWERS["word.png"]]
    assert visit.page.get_attribute("#picture", "alt") == "word.png"


def transfer_with(page, name: str):
    """A DataTransfer of the page with an example in it, as drops and pastes bring."""
    data = base64.b64encode((EXAMPLES / name).read_bytes()).decode()
    return page.evaluate_handle(
        """async ([data, name]) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [data, name],
    )


def test_a_picture_can_be_dropped(visit):
    transfer = transfer_with(visit.page, "number.png")
    visit.page.dispatch_event("#stage", "dragenter", {"dataTransfer": transfer})
    assert visit.page.get_by_text("Drop to ask").is_visible()
    visit.page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})
    assert visit.wait_for_answers(1) == [ANSWERS["number.png"]]
    assert not visit.page.get_by_text("Drop to ask").is_visible()
    assert visit.page.locator("#picture").get_attribute("alt") == "number.png"
    film = visit.page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["film"], "film.mp4", { type: "video/mp4" }));
            return transfer;
        }"""
    )
    visit.page.dispatch_event("#stage", "drop", {"dataTransfer": film})
    visit.page.locator("#notices").get_by_text("That is no picture").wait_for()


def test_a_picture_can_be_pasted_from_the_clipboard(visit):
    visit.page.evaluate(
        """async (transfer) => {
            const blob = new Blob([await transfer.files[0].arrayBuffer()], { type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        transfer_with(visit.page, "word.png"),
    )
    visit.page.keyboard.press("Control+V")
    assert visit.wait_for_answers(1) == [ANSWERS["word.png"]]
    visit.page.locator("#prompt").fill("")
    visit.page.evaluate("navigator.clipboard.writeText('What do you see?')")
    visit.page.locator("#prompt").press("Control+V")
    assert visit.page.input_value("#prompt") == "What do you see?"  # text goes where it belongs


def test_a_large_photo_is_scaled_down_upright(visit, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (1200, 1600, 3), np.uint8)
    photo = Image.fromarray(noise)
    ImageDraw.Draw(photo).rectangle((0, 0, 1600, 600), fill="red")  # the left half, once it is turned
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90° to the left
    (tmp_path / "photo.jpg").write_bytes(jpeg(photo, quality=100, exif=exif))
    open_files(visit, tmp_path / "photo.jpg")
    visit.wait_for_answers(1)
    sent = sent_pictures(visit.asked[0])[0]
    assert sent.size == (192, 256) and sent.getexif().get(0x0112) is None
    red = np.asarray(sent)[:, 10:80].reshape(-1, 3).mean(0)
    assert red[0] > 200 and red[1] < 60

    Image.new("RGB", (5000, 4000), "red").save(tmp_path / "plain.png")  # a small file with as many pixels
    open_files(visit, tmp_path / "plain.png")
    visit.wait_for_answers(2)
    assert sent_pictures(visit.asked[1])[0].size == (256, 205)


def test_what_the_browser_cannot_show_goes_to_the_server_which_says_what_it_is(browser, live, tmp_path):
    (tmp_path / "holiday.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    with visiting(browser, address(live), expected=(REFUSED,)) as visit:
        visit.open()
        open_files(visit, EXAMPLES / "word.png")
        visit.wait_for_answers(1)
        open_files(visit, tmp_path / "holiday.heic")
        visit.page.locator("#notices").get_by_text("HEIC").wait_for()
        assert visit.page.get_by_text("This browser cannot show holiday.heic").is_visible()
        assert visit.page.inner_text("#state-text") == "Error"
        assert visit.page.inner_text("#answer") == ""  # what it said of the other picture does not stay beside this one


def test_a_question_can_follow_about_the_same_picture(visit):
    open_files(visit, EXAMPLES / "shapes-three.png")
    visit.wait_for_answers(1)
    visit.page.fill("#follow-up", "How many shapes are there?")
    visit.page.keyboard.press("Enter")
    visit.wait_for_answers(2)
    roles = [message["role"] for message in visit.asked[1]["messages"]]
    assert roles == ["user", "assistant", "user"] and len(sent_pictures(visit.asked[1])) == 1
    visit.page.get_by_text("Where the time went").click()
    known = re.search(r"(\d+) known from before", visit.page.inner_text("#details"))
    assert int(known[1]) > 16  # the picture, and more
    assert visit.page.locator(".entry-prompt").first.inner_text() == "Then: How many shapes are there?"
    sources = visit.page.locator(".entry img").evaluate_all("images => images.map((image) => image.src)")
    assert sources[0] == sources[1]


# What is asked, and what is remembered


def test_model_resolution_tokens_and_temperature_are_what_is_asked_for(visit):
    facts = {"min_resolution": 256, "max_resolution": 1024, "resolution_step": 64, "max_tokens": 100, "max_images": 2}
    one = {"resolution": 256, "default_resolution": 256, "fit": "pad", "default_fit": "pad"}
    two = {"resolution": 1024, "default_resolution": 448, "fit": "crop", "default_fit": "native"}
    cards = [{"id": name, "mlx_fastvlm": {**facts, **more}} for name, more in (("one", one), ("two", two))]
    visit.page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": cards}))
    visit.answer_with("Anything.")
    visit.open()
    assert visit.page.locator("#resolution option:checked").inner_text() == "256 px, 16 tokens, as trained"
    visit.page.select_option("#model", "two")
    assert visit.page.input_value("#max-tokens") == "100"
    assert visit.page.locator("#resolution option:checked").inner_text() == "448 px, 49 tokens"
    assert visit.page.locator("#resolution option").last.inner_text() == "1024 px, 256 tokens, as trained"
    assert visit.page.locator("#fit option:checked").inner_text() == "Whole picture, no empty bars"
    assert visit.page.locator("#fit option").last.inner_text() == "Central square only, as trained"
    visit.page.select_option("#resolution", "768")
    visit.page.fill("#max-tokens", "5000")
    visit.page.fill("#temperature", "0.7")
    visit.page.press("#temperature", "Tab")
    assert visit.page.input_value("#max-tokens") == "100"
    open_files(visit, EXAMPLES / "word.png")
    visit.wait_for_answers(1)
    body = {name: value for name, value in visit.asked[0].items() if name != "messages"}
    assert body == {
        **{"model": "two", "resolution": 768, "fit": "native", "max_tokens": 100, "temperature": 0.7},
        **{"stream": True, "stream_options": {"include_usage": True}},
    }


def test_resolution_auto_is_left_to_the_server(visit):
    visit.answer_with("Anything.")
    visit.open()
    visit.page.select_option("#resolution", label="auto: as the picture's detail needs it")
    open_files(visit, EXAMPLES / "word.png")
    visit.wait_for_answers(1)
    assert visit.asked[0]["resolution"] == "auto"
    visit.page.get_by_text("Where the time went").click()
    assert "auto resolution" in visit.page.inner_text("#details")


def test_presets_are_edited_added_removed_reset_and_remembered(visit):
    page = visit.page
    page.get_by_text("Read text").click()
    assert page.input_value("#prompt") == "What is written in this image?"
    page.fill("#prompt", "Which number is it?")
    page.fill("#suffix", "")
    page.get_by_text("Edit presets").click()
    visit.press("Add")
    page.fill("#preset-name", "Count")
    page.fill("#prompt", "How many shapes are there?")
    visit.open()
    assert page.locator("#presets label").all_inner_texts()[-1] == "Count"
    assert page.locator("#presets input:checked + span").inner_text() == "Count"
    open_files(visit, EXAMPLES / "shapes-two.png")
    assert visit.wait_for_answers(1) == ["two"]

    page.get_by_text("Read text").click()
    assert (page.input_value("#prompt"), page.input_value("#suffix")) == ("Which number is it?", "")
    page.get_by_text("Edit presets").click()
    visit.press("Remove")
    assert "Read text" not in page.locator("#presets").inner_text()
    visit.press("Reset all")
    assert page.locator("#presets label").all_inner_texts() == ["Describe", "Facial expression", "Read text", "Custom"]
    assert f"{page.input_value('#prompt')} {page.input_value('#suffix')}" == BRIEF


def test_the_history_is_copied_exported_cleared_and_brought_back(visit, tmp_path):
    page = visit.page
    page.fill("#suffix", '<b>"brief"</b>')
    open_files(visit, EXAMPLES / "shapes-two.png", EXAMPLES / "word.png")
    second, first = visit.wait_for_answers(2)
    visit.press("Copy all")
    page.locator("#notices").get_by_text("Copied.").wait_for()
    markdown = page.evaluate("navigator.clipboard.readText()")
    assert markdown.index(first) < markdown.index(second)

    texts = {}
    for kind in ("json", "markdown", "html"):
        page.select_option("#export-format", kind)
        with page.expect_download() as download:
            visit.press("Export")
        texts[kind] = Path(download.value.path()).read_text()
    entries = json.loads(texts["json"])
    assert [entry["text"] for entry in entries] == [second, first]
    assert entries[0]["timings"]["ttft"] > 0 and "messages" not in entries[0]
    assert texts["markdown"] == markdown
    assert "&lt;b&gt;&quot;brief&quot;&lt;/b&gt;" in texts["html"] and "<b>" not in texts["html"]
    assert texts["html"].count('<img src="data:image/jpeg;base64,') == 2

    page.get_by_role("button", name=f"Remove answer: {second}").click()
    assert visit.answers() == [first]
    visit.press("Clear")
    assert visit.answers() == []
    visit.press("Undo")
    assert visit.answers() == [first]


def test_the_history_survives_a_reload_only_if_wanted(visit):
    open_files(visit, EXAMPLES / "shapes-two.png")
    answers = visit.wait_for_answers(1)
    visit.open()
    assert visit.answers() == []
    open_files(visit, EXAMPLES / "shapes-two.png")
    visit.wait_for_answers(1)
    visit.choose("Keep the history")
    open_files(visit, EXAMPLES / "word.png")
    visit.wait_for_answers(2)
    visit.open()
    assert visit.wait_for_answers(2) == [ANSWERS["word.png"], *answers]
    visit.choose("Keep the history")
    visit.open()
    visit.page.wait_for_timeout(300)
    assert visit.answers() == []


# The keyboard


def test_keys_do_what_buttons_do_but_not_while_text_is_typed(visit):
    page = visit.page
    page.keyboard.press("m")
    assert page.get_by_label("Single shot").is_checked()
    page.keyboard.press("3")
    assert page.input_value("#prompt") == "What is written in this image?"
    page.keyboard.press("p")
    page.keyboard.type(" m1?")
    assert page.input_value("#prompt").endswith(" m1?") and page.get_by_label("Single shot").is_checked()
    page.locator("#stage").focus()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Capture").wait_for()
    page.keyboard.press("?")
    assert page.get_by_role("dialog", name="Keyboard shortcuts").is_visible()
    assert faults(page) == []
    page.get_by_label("Single keys do these things").uncheck()
    page.keyboard.press("Escape")
    page.locator("#stage").focus()
    page.keyboard.press("m")
    assert page.get_by_label("Single shot").is_checked()  # off, and remembered
    visit.open()
    page.keyboard.press("m")
    assert page.get_by_label("Single shot").is_checked()


def test_every_control_is_reached_by_tab_and_shows_where_the_focus_is(visit):
    visit.press("Start camera")
    visit.wait_for_answers(1)
    visit.press("Stop")
    visit.page.locator("body").focus()
    describe = """() => {
        const element = document.activeElement;
        const marked = element.matches("[type=radio]") ? element.nextElementSibling : element;
        return [element.id || element.textContent.trim(), getComputedStyle(marked).outlineStyle];
    }"""
    seen = {}
    for _ in range(60):
        visit.page.keyboard.press("Tab")
        name, outline = visit.page.evaluate(describe)
        seen[name] = outline
    wanted = {"model", "theme", "help", "primary", "use-camera", "use-files", "camera", "mirror", "gate", "prompt"}
    wanted |= {
        "suffix",
        "resolution",
        "fit",
        "max-tokens",
        "temperature",
        "export",
        "clear",
        "follow-up",
        "copy-answer",
    }
    assert wanted <= set(seen)
    assert {name for name in wanted if seen[name] == "none"} == set()


def test_new_answers_take_the_focus_from_no_button(visit):
    open_files(visit, EXAMPLES / "word.png")
    visit.wait_for_answers(1)
    copy = visit.page.get_by_role("button", name="Copy answer")
    copy.focus()
    visit.page.evaluate("document.getElementById('primary').click()")
    visit.wait_for_answers(2)
    assert copy.nth(1).evaluate("(button) => button === document.activeElement")


# A server that wants a key, is busy, or goes away


def test_a_key_is_asked_for_and_kept_for_this_tab_only(browser, demo):
    with serving(*demo, api_key="sesame") as server, visiting(browser, address(server), expected=(REFUSED,)) as visit:
        page = visit.page
        page.goto(visit.url)
        page.get_by_label("Key", exact=True).fill("wrong")
        visit.press("Continue")
        page.get_by_text("The server refused that key").wait_for()
        page.get_by_label("Key", exact=True).fill("sésame")  # no header can hold it
        visit.press("Continue")
        assert page.get_by_role("dialog").is_visible()
        page.get_by_label("Key", exact=True).fill("sesame")
        visit.press("Continue")
        page.wait_for_selector("#model option", state="attached")
        open_files(visit, EXAMPLES / "word.png")
        assert visit.wait_for_answers(1) == [ANSWERS["word.png"]]
        visit.open()  # a reload asks no more
        assert "sesame" in page.evaluate("JSON.stringify(sessionStorage)")
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


def test_without_the_key_the_page_says_so_and_asks_again(browser, demo):
    with serving(*demo, api_key="sesame") as server, visiting(browser, address(server), expected=(REFUSED,)) as visit:
        visit.page.goto(visit.url)
        visit.press("Cancel")
        visit.page.locator("#notices").get_by_text("asks for a key").wait_for()
        for button in ("Try again", "Start camera"):
            visit.press(button)
            visit.page.get_by_role("dialog").wait_for()
            visit.press("Cancel")


def test_a_busy_server_is_asked_again_when_it_says(browser, live):
    with visiting(browser, address(live), expected=(REFUSED,)) as visit:
        times = []

        def busy_once(route):
            times.append(time.monotonic())
            if len(times) > 1:
                route.continue_()
            else:
                error = {"error": {"message": "full", "code": "queue_full"}}
                route.fulfill(status=429, headers={"Retry-After": "1"}, json=error)

        visit.page.route("**/v1/chat/completions", busy_once)
        visit.open()
        open_files(visit, EXAMPLES / "word.png")
        visit.wait_for_state("waiting")
        assert visit.page.get_by_text("asking again in 1 s").is_visible()
        assert visit.wait_for_answers(1) == [ANSWERS["word.png"]]
        assert times[1] - times[0] >= 1


def test_what_a_server_broke_off_is_asked_again_when_one_is_back(browser, demo, slowly, steps, monkeypatch):
    from mlx_fastvlm.server import run

    port = free_port()
    open_socket = run.open_socket
    monkeypatch.setattr(run, "open_socket", lambda host, _: open_socket(host, port))
    with visiting(browser, f"http://127.0.0.1:{port}", expected=(REFUSED,)) as visit:
        with serving(*demo):
            visit.open()
            open_files(visit, EXAMPLES / "shapes-three.png")
            visit.wait_for_state("generating")
        visit.wait_for_state("reconnecting")
        assert visit.page.get_by_text("Waiting for it to come back").is_visible()
        steps.seconds = 0.0
        with serving(*demo):
            assert visit.wait_for_answers(1) == [ANSWERS["shapes-three.png"]]
            visit.wait_for_state("idle")


def test_a_server_that_has_failed_for_good_is_not_waited_for(browser, live):
    with visiting(browser, address(live), expected=(REFUSED,)) as visit:
        visit.page.route("**/v1/models", lambda route: route.abort())
        failed = {"status": "failed", "reason": "The model has failed."}
        visit.page.route("**/health", lambda route: route.fulfill(status=503, json=failed))
        visit.page.goto(visit.url)
        visit.page.locator("#notices").get_by_text("The model has failed.").wait_for()
        assert visit.page.get_by_role("button", name="Try again").is_visible()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# How it looks

LOOKS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"color_scheme": "dark", "viewport": {"width": 320, "height": 720}, "device_scale_factor": 2},
}


@pytest.fixture
def screenshots(tmp_path):
    folder = Path(os.environ.get("PAGE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def faults(page) -> list[str]:
    """What axe-core finds serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {fault['nodes'][0]['html']}" for fault in found if fault["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("look", LOOKS)
def test_it_looks_and_reads_well(browser, live, screenshots, look):
    with visiting(browser, address(live), **LOOKS[look]) as visit:
        page = visit.open()
        page.screenshot(path=screenshots / f"{look}-empty.png")
        open_files(visit, EXAMPLES / "shapes-three.png", EXAMPLES / "word.png")
        visit.wait_for_answers(2)
        page.get_by_text("Where the time went").click()
        page.get_by_text("Edit presets").click()
        assert faults(page) == []
        page.screenshot(path=screenshots / f"{look}-pictures.png", full_page=True)
        page.get_by_text("Where the time went").click()
        page.get_by_text("Edit presets").click()
        visit.press("Camera")
        visit.wait_for_answers(4)
        assert faults(page) == []
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=screenshots / f"{look}-camera.png")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        visit.press("Keyboard shortcuts")
        page.screenshot(path=screenshots / f"{look}-shortcuts.png")


def test_the_theme_can_be_chosen_and_is_remembered(browser, live):
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    with visiting(browser, address(live), color_scheme="light") as visit:
        page = visit.open()
        light = page.evaluate(ground)
        page.get_by_role("button", name="Theme: as the system").click()
        assert page.evaluate(ground) == light
        page.get_by_role("button", name="Theme: light").click()
        dark = page.evaluate(ground)
        assert dark != light
        visit.open()
        assert page.evaluate(ground) == dark and page.get_by_role("button", name="Theme: dark").is_visible()


def test_nothing_moves_for_those_who_want_less_motion(browser, live, slowly):
    with visiting(browser, address(live), reduced_motion="reduce") as visit:
        visit.open()
        open_files(visit, EXAMPLES / "shapes-two.png")
        visit.wait_for_state("generating")
        assert visit.page.evaluate("document.getAnimations().length") == 0
        visit.wait_for_answers(1)
