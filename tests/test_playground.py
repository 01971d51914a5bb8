"""The playground in headless Chromium, on a server in this process: what a visitor does and sees, and what must not be."""

import re
import shutil
import time

import httpx
import pytest
import tiny
from playwright.sync_api import expect, sync_playwright
from test_serve import eventually, serving

from tinygpt.checkpoint import load
from tinygpt.config import TokenizerConfig
from tinygpt.engine import Full
from tinygpt.generate import generate
from tinygpt.served import Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
EVIL = "<script>window.evil=1</script><img src=x onerror=window.evil=1>"
LONGEST = 2000
FINISHED = "#view .status.done"


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """Where the model `gpt2` is said to be: nothing is there yet."""
    return tmp_path_factory.mktemp("later") / "model"


@pytest.fixture(scope="module")
def server(tiny_run, later):
    limits = Limits(max_prompt_tokens=500, max_new_tokens=LONGEST, max_waiting=64)
    with serving(tiny_run, gpt2=str(later), limits=limits, playground=True, max_new_tokens=LONGEST) as (address, library):
        yield address, library


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture
def engine(server):
    return server[1].default.engine


@pytest.fixture
def slowly(engine, monkeypatch):
    """A step takes 20 ms at least: the longest text, over half a minute."""
    features = engine.model.features
    monkeypatch.setattr(engine.model, "features", lambda *given: time.sleep(0.02) or features(*given))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens pages, each in a browser of its own; at the end none has asked another host for anything, or failed."""
    contexts, asked, failures = [], [], []

    def open_page(at=address, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(at)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert failures == []
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:"))] == []


@pytest.fixture
def page(visit):
    return visit()


def choose(page, **settings):
    for label, value in settings.items():
        field = {"prompt": "Prompt", "seed": "Seed"}.get(label, f"number input for {label.replace('_', ' ')}")
        page.get_by_label(field).fill(str(value))


def press_write(page, **settings):
    choose(page, **settings)
    page.click("#write")


def written(page, **settings):
    """Press the button, wait for the end; for a page that shows no text yet."""
    press_write(page, **settings)
    page.wait_for_selector(FINISHED)
    return page.locator("#view .text").first.text_content()


def told(page, message):
    expect(page.locator("#view .status.error")).to_contain_text(message)


def test_all_outputs_stream_and_stop_frees_their_places(page, engine, slowly):
    press_write(page, prompt="the cat", Maximum_length=LONGEST, Number_of_outputs=3)
    page.wait_for_function(
        "[...document.querySelectorAll('#view .text')].filter(t => t.querySelector('.token')).length == 3"
    )
    assert page.locator("#view .end").count() == 0
    assert engine.active == 3
    before = page.locator("#view .token").count()
    page.wait_for_function(f"document.querySelectorAll('#view .token').length > {before}")
    expect(page.locator("#write")).to_be_disabled()
    page.click("#stop")
    eventually(lambda: engine.active == 0)
    expect(page.locator("#view .status")).to_contain_text("Stopped")
    assert page.locator("#view .token").count() < 3 * LONGEST
    press_write(page, Maximum_length=5, Number_of_outputs=1)  # and it goes on working
    expect(page.locator("#view .text")).to_have_count(1)
    expect(page.locator("#view .token")).to_have_count(5)


def test_settings_take_effect_and_a_seed_repeats_the_text(page, tiny_run):
    model, tokenizer = load(tiny_run)

    def writes(settings, **options):
        press_write(page, **settings)
        text = generate(model, tokenizer, "the dog", max_new_tokens=40, **options)
        expect(page.locator("#view .text")).to_have_js_property("textContent", text)
        return text

    first = writes({"prompt": "the dog", "Maximum_length": 40, "Temperature": 1, "seed": 7}, temperature=1.0, seed=7)
    assert writes({"seed": 8}, temperature=1.0, seed=8) != first
    assert writes({"seed": 7}, temperature=1.0, seed=7) == first
    writes({"Temperature": 0.3}, temperature=0.3, seed=7)
    writes({"Temperature": 2, "Top-k": 2}, temperature=2.0, top_k=2, seed=7)
    writes({"Top-k": 0, "Top-p": 0.5}, temperature=2.0, top_p=0.5, seed=7)
    page.get_by_label("range slider for Maximum length").fill("3")
    press_write(page, seed="")
    expect(page.locator("#view .token")).to_have_count(3)
    expect(page.locator("#view .status")).to_have_text(re.compile(r"3 tokens in .* s, seed \d+$"))


def test_examples_are_prompts_that_the_model_knows(page, server):
    examples = page.locator("#examples button.gallery-item")
    expect(examples).to_have_text(["The "])  # its text has a T, but neither the O of "Once" nor the I of "It"
    choose(page, prompt="a")
    examples.click()
    expect(page.get_by_label("Prompt")).to_have_value("The ")


def test_tokens_are_coloured_by_probability_with_alternatives_on_hover(page):
    written(page, prompt="the cat", Maximum_length=30, seed=1, Temperature=1.5)
    tokens = page.locator("#view .token")
    for about, kind, text in tokens.evaluate_all("all => all.map(one => [one.about, one.className, one.textContent])"):
        chances = [chance for _, chance in about["top"]]
        assert about["token"] == text
        assert len(chances) == 5
        assert chances == sorted(chances, reverse=True)
        assert about["p"] in chances or about["p"] <= chances[-1]
        assert f"p{sum(about['p'] < least for least in (0.8, 0.5, 0.2, 0.05))}" in kind.split()
    about = tokens.nth(3).evaluate("token => token.about")
    tokens.nth(3).hover()
    expect(page.locator("#hint")).to_be_visible()
    rows = page.locator("#hint .row").all_inner_texts()
    assert len(rows) == 5 + (about["token"] not in [text for text, _ in about["top"]])
    assert f"{100 * about['top'][0][1]:.1f} %" in rows[0]
    assert f"{100 * about['p']:.1f} %" in page.locator("#hint .chosen").inner_text()
    improbable = page.locator("#view .p4, #view .p3").first
    shown = improbable.evaluate("t => getComputedStyle(t).backgroundColor")
    page.get_by_label("Colour tokens by probability").uncheck()
    assert improbable.evaluate("t => getComputedStyle(t).backgroundColor") == "rgba(0, 0, 0, 0)" != shown
    expect(page.locator(".keys")).to_be_hidden()


def test_a_model_is_loaded_when_first_asked_for_and_its_markup_is_text(page, later, tmp_path):
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="gpt2").click()
    press_write(page, prompt=EVIL, Maximum_length=200, Temperature=2, seed=1)
    told(page, "the model 'gpt2' cannot be loaded here")
    assert str(later.parent) not in page.content()
    tags = TokenizerConfig("bpe", vocab_size=300)
    (tmp_path / "text.txt").write_text((EVIL + "\n") * 60)
    later.symlink_to(tiny.run(tmp_path, steps=5, every=5, data={"tokenizer": tags}))
    text = written(page)
    model, tokenizer = load(later)
    assert text == generate(model, tokenizer, EVIL, max_new_tokens=200, temperature=2.0, seed=1)
    assert "<" in text[len(EVIL) :]
    assert page.locator("#view script, #view img, #view b").count() == 0
    assert page.evaluate("window.evil") is None


def test_what_is_wrong_is_said_and_the_page_stays_usable(page, engine, monkeypatch):
    press_write(page, prompt="the <script>", Maximum_length=5)
    told(page, "'<' (U+003C) at position 4 is unknown")
    press_write(page, prompt="the", seed="-1")
    told(page, "the seed '-1' is not a whole number")
    press_write(page, prompt="the" * 200, seed=1)
    told(page, "the prompt has 600 tokens, and this server takes 500")
    page.get_by_label("Prompt").press("Control+a")
    page.keyboard.insert_text("the" * 700_000)  # more than a request may hold
    press_write(page)
    told(page, "the prompt has 174592 tokens")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", lambda *_: (_ for _ in ()).throw(Full(3)))
        press_write(page, prompt="the")
        told(page, "too many texts are waiting")
        patch.setattr(engine, "submit", lambda *_: 1 / 0)
        press_write(page)
        told(page, "the server failed")
        assert "division" not in page.content()
    assert written(page, prompt="the cat sat on " * 3) != ""
    assert "the model read the last 16" in page.inner_text("#view .status")


def test_two_browsers_share_nothing_and_one_that_closes_frees_its_place(visit, engine, slowly):
    one, other, before = visit(), visit(), engine.tokens_drawn
    press_write(one, prompt="the cat", Maximum_length=LONGEST, Number_of_outputs=8)
    one.wait_for_selector("#view .token")
    assert written(other, prompt="a dog", Maximum_length=4).startswith("a dog")
    assert other.locator("#view .text").count() == 1
    assert other.locator("#view .token").count() == 4
    other.evaluate("document.querySelector('#stop').disabled = false")
    other.click("#stop")
    other.wait_for_timeout(200)
    assert engine.active == 8  # the other's stop is not this one's
    assert one.locator("#view .text").count() == 8
    assert "a dog" not in one.inner_text("#view")
    one.close()
    eventually(lambda: engine.active == 0)
    assert engine.tokens_drawn < before + 8 * LONGEST / 2


def test_it_fits_a_phone(visit):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    written(page, prompt="the cat sat on a mat", Maximum_length=60, Number_of_outputs=2, seed=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#view .token").nth(20).tap()
    box = page.locator("#hint").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


def test_the_page_takes_nothing_from_the_api(address):
    with httpx.Client(base_url=address, headers={"Origin": "https://elsewhere.example"}) as client:
        assert client.get("/health").json()["status"] == "ok"
        assert client.get("/docs").status_code == client.get("/metrics").status_code == 200
        assert client.get("/v1/completions").status_code == 405
        assert client.get("/nothing").json()["error"]["message"] == "Not Found"
        assert client.post("/v1/chat/completions", json={}).json()["error"]["type"] == "invalid_request_error"
        assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 404
        page = client.get("/")
        assert page.status_code == 200
        assert not [name for name in page.headers if name.startswith("access-control")]
        assert "/gradio_api/" not in client.get("/openapi.json").text


def test_an_api_key_locks_the_page_too(visit, tiny_run):
    with serving(tiny_run, playground=True, api_key="open sesame") as (address, _):
        assert httpx.get(f"{address}/config").status_code == 401
        page = visit(address)
        for key in ("wrong", "open sesame"):
            assert page.locator("#write").count() == 0
            page.get_by_label("username").fill("anyone")
            page.get_by_label("password").fill(key)
            page.get_by_role("button", name="Login").click()
            page.wait_for_selector("text=Incorrect Credentials" if key == "wrong" else "#write")
        assert written(page, prompt="the", Maximum_length=4).startswith("the")
        page.close()
