"""The live demo in a real browser, as people use it: `make demo-test` with Chromium installed; skipped without."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from demo_browser import (
    CHROMIUM,
    CONTROLS,
    FLAGS,
    PATIENCE_SECONDS,
    PHOTOGRAPHS,
    DemoServer,
    Visit,
    expect,
    missing,
    percent,
    save_photograph,
)
from PIL import Image
from test_demo_engine import small_explainer

import hf_aha
from hf_aha import AhaExplainer
from hf_aha.demo.engine import DemoEngine


pytestmark = [pytest.mark.browser, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def server() -> Iterator[DemoServer]:
    with DemoServer("--no-browser", "--port", "17861") as running:
        assert running.address, running.lines
        yield running
        assert running.process.poll() is None, "the server did not survive"
    assert not [line for line in running.lines if "Traceback" in line or "Error" in line], running.lines
    assert running.process.returncode == 0


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def arrive(chromium, server) -> Iterator[Callable[[], Visit]]:
    """Each call is another visitor, with cookies and storage of their own."""
    visits: list[Visit] = []

    def come() -> Visit:
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        visits.append(Visit(context.new_page(), server.address))
        return visits[-1]

    yield come
    for visit in visits:
        visit.page.context.close()
        assert visit.errors == []
        assert visit.hosts == {server.address.split("/")[2]}, "the page may ask its own server alone"


@pytest.fixture
def visit(arrive) -> Visit:
    return arrive()


@pytest.fixture
def church(visit) -> Visit:
    """A visitor who has picked the church."""
    visit.sample("church")
    return visit


@pytest.fixture(scope="module")
def engine() -> DemoEngine:
    """What the server must say, asked in this process."""
    return DemoEngine(AhaExplainer.from_pretrained("imagenette-demo").eval(), bfloat16=False)


# ---------------------------------------------------------------------------------------------------------- explaining


def test_an_uploaded_photograph_is_explained_and_the_next_one_too(visit, engine, tmp_path):
    path = save_photograph(tmp_path / "holiday.png", "garbage-truck", (300, 200))
    visit.upload(path)
    answer = engine.explain(engine.read(path))
    title = " ".join(answer.explanation.title.split())
    assert title.startswith("garbage truck") and title in visit.text("status")
    assert title in visit.text("picture") and "garbage truck" in visit.alt("picture")
    # Small photographs are enlarged, in proportion.
    assert visit.image("picture").shape == (round(512 * 200 / 300), 512, 3)
    options = visit.part("top-classes").locator("label").all_inner_texts()
    found = [(option.strip().rpartition(" ")[0].strip(), percent(option)) for option in options]
    wanted = engine.classify(answer.photograph)
    assert [name for name, _ in found] == [best.label for best in wanted]
    np.testing.assert_allclose([p for _, p in found], [best.probability for best in wanted], atol=0.0011)
    expect(visit.part("top-classes").get_by_label("garbage truck")).to_be_checked()
    visit.upload(save_photograph(tmp_path / "next.jpg", "parachute", (120, 160)))
    assert "parachute" in visit.text("status") and visit.image("picture").shape == (512, 384, 3)


def test_another_class_has_another_map(church):
    first = church.image("picture")
    with church.asking():
        church.choose("top-classes", "parachute")
    assert "parachute" in church.text("status") and "speak for parachute" in church.alt("picture")
    assert church.part("probability").locator(".aha-label").inner_text() == "parachute"
    second = church.image("picture")
    assert first.shape == second.shape and np.abs(first.astype(int) - second).mean() > 1
    with church.asking():
        church.type_into("other-class", "French horn")
    assert "French horn" in church.text("status")
    with church.changing("status"):
        church.type_into("other-class", "French hern")
    assert church.text("status").startswith("Problem: ") and "did you mean 'French horn'" in church.text("status")
    assert "French horn" in church.alt("picture")
    expect(church.part("other-class").get_by_role("combobox")).to_have_value("French horn")


def test_the_slider_moves_the_probability(church, engine):
    photograph = engine.read(PHOTOGRAPHS / "church.jpg")
    answer = engine.explain(photograph)
    whole = answer.explanation.probability

    def said(share: float, mode: str, reference: str) -> float:
        return pytest.approx(engine.perturbed(answer, share, mode, reference).probability, abs=0.02)

    assert church.share(0) == pytest.approx(whole, abs=0.001)
    assert church.share(90) == said(0.9, "deletion", "blur") and church.probability() < whole - 0.3
    assert "the most important 90% removed" in church.text("perturbed")
    assert "The slider stands at 90%" in church.part("curves").locator("svg").get_attribute("aria-label")
    for name, reference in (("Black", "black"), ("Mean colour", "mean"), ("Blurred", "blur")):
        with church.changing("perturbed", "curves"):
            church.choose("reference", name)
        assert church.probability() == said(0.9, "deletion", reference)
        church.page.wait_for_selector("#curves polyline", state="attached")
    with church.changing("perturbed", "probability"):
        church.choose("mode", "Show only them (insertion)")
    assert church.probability() == said(0.9, "insertion", "blur") and church.probability() > 0.9
    assert "the most important 90% shown" in church.text("perturbed")
    assert church.share(1) == said(0.01, "insertion", "blur") and church.probability() < 0.5
    assert church.part("curves").locator("polyline").count() == 2


def test_views_opacity_and_colours(church, engine):
    overlay = church.image("picture")
    with church.changing("picture"):
        church.choose("view", "Original")
    photograph = np.asarray(engine.read(PHOTOGRAPHS / "church.jpg").shown)
    assert np.abs(church.image("picture").astype(int) - photograph).mean() < 3  # JPEG
    assert "classified as church" in church.alt("picture")
    with church.changing("picture"):
        church.choose("view", "Map")
    assert church.alt("picture").startswith("Map of the pixels that speak for church")
    red, green, _ = church.image("picture").astype(int).reshape(-1, 3).mean(0)
    assert red > green  # inferno
    with church.changing("picture"):
        church.type_into("colormap", "viridis")
    red, green, _ = church.image("picture").astype(int).reshape(-1, 3).mean(0)
    assert green > red
    with church.changing("picture"):
        church.choose("view", "Overlay")
    strong = church.image("picture")
    with church.changing("picture"):
        church.slide("opacity", 0)
    faint = church.image("picture")
    assert np.abs(strong.astype(int) - overlay).mean() > 1 and np.abs(strong.astype(int) - faint).mean() > 5
    colourful = np.ptp(faint.astype(int), axis=-1)
    assert np.median(colourful) < np.median(np.ptp(strong.astype(int), axis=-1))


def test_one_class_rather_than_another_and_alone_again(church):
    expect(church.part("alone")).to_be_hidden()
    with church.asking():
        church.type_into("rather-than", "golf ball")
    assert "rather than golf ball" in church.text("picture") and "orange speaks for the first" in church.text(
        "picture"
    )
    assert church.part("probability").locator(".aha-label").all_inner_texts() == ["church", "golf ball"]
    assert "minus that of golf ball" in church.part("curves").locator("svg").get_attribute("aria-label")
    with church.asking():
        church.part("alone").click()
    assert "rather than" not in church.text("picture")
    assert church.part("probability").locator(".aha-label").all_inner_texts() == ["church"]
    expect(church.part("alone")).to_be_hidden()
    expect(church.part("rather-than").get_by_role("combobox")).to_have_value("")


# ---------------------------------------------------------------------------------------------- refining and comparing


def test_refining_shows_before_and_after_and_what_it_cost(church):
    expect(church.part("use-refined").get_by_role("checkbox")).to_be_disabled()
    church.slide("refine-steps", 2)
    church.part("refine").click()
    expect(church.part("refined").locator("figure")).to_have_count(2)
    before, after = (
        float(caption.split()[-1]) for caption in church.part("refined").locator("figcaption").all_inner_texts()
    )
    assert after >= before and church.text("status") == "Refined."
    assert "2 steps" in church.text("refined") and "passes of the classifier" in church.text("refined")
    assert "before refinement" in church.alt("refined", 0) and "after refinement" in church.alt("refined", 1)
    assert church.record()["refinement"] is None
    with church.changing("status", "picture", "perturbed"):
        church.part("use-refined").get_by_role("checkbox").check()
    church.page.wait_for_function("document.querySelector('#curves polyline')")
    assert church.text("picture").endswith(", refined")
    expect(church.part("download-json")).to_be_enabled()
    plain = church.image("perturbed")
    with church.changing("status", "picture", "perturbed"):
        church.part("use-refined").get_by_role("checkbox").uncheck()
    assert "plain map" in church.text("status") and not np.array_equal(plain, church.image("perturbed"))


def test_a_refinement_can_be_stopped_and_started_again(church):
    church.slide("refine-steps", 40)
    church.part("refine").click()
    expect(church.part("refined")).to_contain_text("of 40")
    expect(church.part("refine")).to_be_disabled()
    church.part("refine-stop").click()
    expect(church.part("status")).to_contain_text("The refinement was stopped.")
    expect(church.part("refine-stop")).to_be_disabled()
    church.slide("refine-steps", 1)
    church.part("refine").click()
    expect(church.part("refined").locator("figure")).to_have_count(2)
    assert "1 step took" in church.text("refined")


def test_other_methods_stand_beside_or_say_what_is_missing(church):
    church.part("compare").click()
    expect(church.part("comparison").locator("figure").first).to_be_visible()
    words = church.text("comparison")
    assert "AHA: 1 pass of the classifier" in words and "AHA for church" in church.alt("comparison")
    for module, title in (("captum", "ntegrated gradients"), ("pytorch_grad_cam", "Grad-CAM")):
        there = importlib.util.find_spec(module) is not None
        assert f"{title}: " in words if there else f"{module.split('_')[0]}" in words
    if importlib.util.find_spec("captum") is None:
        assert "pip install" in words


def test_the_downloads_hold_what_is_shown(visit, engine, tmp_path):
    path = save_photograph(tmp_path / "photo.png", "golf-ball", (211, 157))
    visit.upload(path)
    scores = np.load(visit.download("npy"))
    assert scores.dtype == np.float32 and scores.shape == (157, 211)
    np.testing.assert_allclose(scores, engine.explainer.explain(path).scores, atol=1e-3)
    record = visit.record()
    assert record["label"] == "golf ball" and record["image_size"] == {"width": 211, "height": 157}
    assert record["map_size"] == record["image_size"] and record["probability"] > 0.5
    assert record["versions"]["hf_aha"] == hf_aha.__version__ and "imagenette-demo" in str(record["explainer"])
    with Image.open(visit.download("png")) as sheet:
        assert sheet.format == "PNG" and sheet.width > sheet.height > 157


# ----------------------------------------------------------------------------------------------------------- bad input


def test_files_that_are_no_photographs_are_named_and_change_nothing(church, tmp_path):
    before = church.image("picture")
    whole = (PHOTOGRAPHS / "church.jpg").read_bytes()
    contents = {"broken.jpg": whole[: len(whole) // 2], "fake.jpg": b"hello", "empty.png": b"", "notes.txt": b"hello"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with church.changing("status"):
            church.give(tmp_path / name)
        sentence = church.text("status")
        assert sentence.startswith("Problem: ") and name in sentence and str(tmp_path) not in sentence
        assert np.array_equal(church.image("picture"), before)
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(51 * 2**20)
    church.give(tmp_path / "large.jpg")
    expect(church.page.get_by_text('exceed the maximum allowed size of 50.0 Mb: "large.jpg"').first).to_be_visible()
    church.upload(save_photograph(tmp_path / "good.png", "parachute", (200, 200)))
    assert "parachute" in church.text("status")


def test_a_photograph_of_forty_megapixels(visit, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((8000, 5000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=80)
    visit.upload(tmp_path / "large.jpg")
    assert "Explained" in visit.text("status") and visit.image("picture").shape == (480, 768, 3)
    record = visit.record()
    assert record["image_size"] == {"width": 8000, "height": 5000}
    # A map of four million pixels is the largest that is written.
    assert np.load(visit.download("npy")).shape == (record["map_size"]["height"], record["map_size"]["width"])
    assert 3_990_000 < record["map_size"]["height"] * record["map_size"]["width"] < 4_010_000


# ---------------------------------------------------------------------------------------------------- several visitors


def test_two_visitors_at_once_get_their_own_answers(arrive, engine, tmp_path):
    names = {"golf-ball": (200, 150), "parachute": (150, 200)}
    paths = {name: save_photograph(tmp_path / f"{name}.png", name, size) for name, size in names.items()}
    visits = {name: arrive() for name in names}
    for name, visit in visits.items():
        visit.give(paths[name])  # nobody waits for the other
    for name, visit in visits.items():
        expect(visit.part("picture")).to_contain_text(name.replace("-", " "))
        visit.page.wait_for_selector("#download-json:not([disabled])")
    for share in (10, 30, 50, 70):
        for visit in visits.values():
            visit.slide("share", share)
    for name, visit in visits.items():
        expect(visit.part("perturbed")).to_contain_text("important 70% removed")
        answer = engine.explain(engine.read(paths[name]))
        assert visit.probability() == pytest.approx(engine.perturbed(answer, 0.7).probability, abs=0.02)
        assert " ".join(answer.explanation.title.split()) in visit.text("picture")
        record = visit.record()
        assert record["label"] == name.replace("-", " ")
        assert (record["image_size"]["width"], record["image_size"]["height"]) == names[name]
        np.testing.assert_allclose(
            np.load(visit.download("npy")), engine.explainer.explain(paths[name]).scores, atol=1e-3
        )


def test_a_tab_closed_in_the_middle_of_a_refinement_frees_its_place(chromium, monkeypatch):
    """One refinement runs at a time, and that of the first visitor would take hours."""
    from hf_aha.demo import app as page
    from hf_aha.demo.server import free_port, serve

    monkeypatch.setattr(page, "STEPS", (1, 1_000_000))
    app = page.build_app(
        DemoEngine(small_explainer()), name="tiny", samples=[PHOTOGRAPHS / "church.jpg", PHOTOGRAPHS / "golf-ball.jpg"]
    )
    address = serve(app, port=free_port("127.0.0.1", 17890))
    try:
        leaving = Visit(chromium.new_context().new_page(), address)
        leaving.sample("church")
        leaving.slide("refine-steps", 1_000_000)
        leaving.part("refine").click()
        expect(leaving.part("refined")).to_contain_text("of 1000000")
        leaving.page.close()
        staying = Visit(chromium.new_context().new_page(), address)
        staying.sample("golf-ball")
        staying.slide("refine-steps", 1)
        staying.part("refine").click()
        expect(staying.part("refined").locator("figure")).to_have_count(2)
        working = [thread for thread in threading.enumerate() if thread.name.startswith("hf-aha-refine")]
        for thread in working:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
        staying.page.context.close()
    finally:
        app.close(verbose=False)


# ----------------------------------------------------------------------------------------- keyboard and screen readers


def test_the_keyboard_is_enough(visit):
    keys = visit.page.keyboard
    visit.tab_to("#sample-church")
    with visit.asking():
        keys.press("Enter")
    assert "church" in visit.text("status")
    visit.tab_to("#top-classes input")
    with visit.asking():
        keys.press("ArrowDown")
    assert "parachute" in visit.text("status")
    visit.tab_to("#view input")
    with visit.changing("picture"):
        keys.press("ArrowRight")
    assert visit.alt("picture").startswith("Map")
    visit.tab_to("#share input[type=range]")
    with visit.changing("perturbed", "curves"):
        for _ in range(3):
            keys.press("ArrowRight")
    expect(visit.part("perturbed")).to_contain_text("important 23% removed")
    visit.tab_to("#refine-steps input[type=range]")
    keys.press("Home")
    visit.tab_to("#refine")
    keys.press("Enter")
    expect(visit.part("refined").locator("figure")).to_have_count(2)
    expect(visit.part("use-refined").get_by_role("checkbox")).to_be_enabled()
    visit.tab_to("#use-refined input")
    with visit.changing("picture"):
        keys.press("Space")
    assert visit.text("picture").endswith(", refined")


def test_everything_has_a_name_and_every_picture_a_text(visit):
    def check() -> list[tuple[str, str]]:
        found = visit.accessible()
        nameless = [role for role, name in found if role in CONTROLS and not name]
        assert nameless == []
        pictures = [name for role, name in found if role in ("image", "img")]
        assert all(len(name) > 10 for name in pictures), pictures
        assert visit.page.locator("img:not([alt])").count() == 0
        return found

    empty = check()
    assert {role for role, _ in empty} >= {"button", "combobox", "slider", "spinbutton", "radio", "checkbox"}
    assert not [role for role, _ in empty if role in ("image", "img")]  # icons are not read
    visit.sample("church")
    visit.slide("refine-steps", 1)
    visit.part("refine").click()
    expect(visit.part("refined").locator("figure")).to_have_count(2)
    visit.part("compare").click()
    expect(visit.part("comparison").locator("figure").first).to_be_visible()
    found = check()
    pictures = [name for role, name in found if role in ("image", "img")]
    assert len(pictures) >= 6 and len(set(pictures)) == len(pictures)
    groups = [name for role, name in found if role in ("group", "radiogroup")]
    assert {"View", "What to do with them", "A removed pixel becomes"} <= set(groups)
    buttons = [name for role, name in found if role == "button"]
    assert len(set(buttons)) == len(buttons), "two buttons of one name cannot be told apart"
    # What happens is read aloud: both places are live before anything is written there.
    assert visit.page.locator("#status [role=status], #probability [role=status]").count() == 2
    assert visit.page.locator("html").get_attribute("lang") == "en"
