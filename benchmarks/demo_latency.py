"""How long a visitor of the live demo waits: for the first map of a photograph, and for a move of the slider.

The engine's times are of one call; those of the page are of a whole request to the server in the same process, with
Gradio's queue and the transfer, as a browser makes it (`gradio_client`). Every repeat takes a photograph that was not
seen before, so that nothing comes from the cache, after one warm-up. The processor's seconds, of all threads, tell
what the clock would on an idle machine. Goals of the bundled explainer on two CPU cores:
a first map in under 2 s, a move of the slider in under 0.3 s.

    .venv-demo/bin/python benchmarks/demo_latency.py --threads 2 --output latency.json

Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measuring import find_device, provenance, provenance_line, write_json
from PIL import Image, ImageEnhance

from hf_aha import AhaExplainer
from hf_aha.demo.app import build_app
from hf_aha.demo.engine import DemoEngine
from hf_aha.demo.server import SAMPLES, free_port, serve


GOALS = {"first map": 2.0, "slider": 0.3}
DRAWING = ("overlay", 60, "inferno")


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--explainer", default="imagenette-demo", help="Hub id, folder or bundled name")
    parser.add_argument("--classifier", help="Hub id or folder, where the explainer does not say it")
    parser.add_argument("--repeats", type=int, default=10, help="photographs (default: %(default)s)")
    parser.add_argument("--moves", type=int, default=5, help="moves of the slider a photograph (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--engine-only", action="store_true", help="without the page, so without Gradio")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device = find_device(arguments.device)
    explainer = AhaExplainer.from_pretrained(arguments.explainer, classifier=arguments.classifier).to(device).eval()
    engine = DemoEngine(explainer)
    start = time.perf_counter()
    engine.warm_up()
    warm_up = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure_engine(engine, photographs(Path(folder), arguments.repeats + 1, 0.0), arguments.moves)
        if not arguments.engine_only:
            paths = photographs(Path(folder), arguments.repeats + 1, 0.5)
            seconds |= measure_page(engine, paths, arguments.moves)
    result = {
        **provenance(__file__, sys.argv[1:] if argv is None else argv, device),
        "explainer": Path(arguments.explainer).name,
        "bfloat16_for_perturbed": engine.bfloat16,
        "warm_up_s": warm_up,
        "goals_s": GOALS,
        "seconds_clock_and_processor": seconds,
    }
    print(table(seconds))
    print(f"\n{provenance_line(result)}")
    write_json(arguments.output, result)


def photographs(folder: Path, count: int, offset: float) -> Iterator[Path]:
    """Bundled photographs at 1600 pixels, each in another brightness, as JPEG files."""
    sources = sorted(SAMPLES.glob("*.jpg"))
    for index in range(count):
        with Image.open(sources[index % len(sources)]) as image:
            large = image.convert("RGB").resize((1600, 1600 * image.height // image.width))
        path = folder / f"{offset}-{index}.jpg"
        ImageEnhance.Brightness(large).enhance(1 + 0.001 * (index + 1) + 0.1 * offset).save(path)
        yield path


def measure_engine(engine: DemoEngine, paths: Iterator[Path], moves: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of reading and explaining a file, and of a perturbed picture; the first photograph is not counted."""
    from hf_aha.demo.pictures import explanation_figure, perturbed_figure

    maps, slides = [], []
    for path in paths:
        answer = timed(maps, lambda path=path: engine.explain(engine.read(path)))
        explanation_figure(answer, "overlay")
        for move in range(moves):
            share = (move + 1) / (moves + 1)
            timed(
                slides,
                lambda share=share, answer=answer: perturbed_figure(
                    answer, engine.perturbed(answer, share), share, "deletion", "blur"
                ),
            )
    return {"engine: first map": maps[1:], "engine: slider": slides[moves:]}


def measure_page(engine: DemoEngine, paths: Iterator[Path], moves: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of the requests that a photograph and a move of the slider make."""
    from gradio_client import Client, handle_file

    app = build_app(engine)
    address = serve(app, port=free_port("127.0.0.1", 17860))
    try:
        client = Client(address, verbose=False, analytics_enabled=False)
        maps, slides = [], []
        for path in paths:
            timed(maps, lambda path=path: client.predict(handle_file(str(path)), *DRAWING, api_name="/photograph"))
            client.predict(20, "deletion", "blur", api_name="/photograph_curves")
            for move in range(moves):
                share = 100 * (move + 1) / (moves + 1)
                timed(slides, lambda share=share: client.predict(share, "deletion", "blur", api_name="/perturb"))
    finally:
        app.close(verbose=False)
    return {"page: first map": maps[1:], "page: slider": slides[moves:]}


def timed(seconds: list[tuple[float, float]], call: Callable[[], object]) -> object:
    """The call's result; its seconds by the clock and of the processor, all threads together, are appended."""
    start, processor = time.perf_counter(), time.process_time()
    result = call()
    seconds.append((time.perf_counter() - start, time.process_time() - processor))
    return result


def table(seconds: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown: median and largest by the clock, and median of the processor, beside the goal."""
    lines = ["| | median | largest | processor, median | goal |", "|---|---|---|---|---|"]
    for name, values in seconds.items():
        clock, processor = zip(*values, strict=True)
        shown = (statistics.median(clock), max(clock), statistics.median(processor), GOALS[name.split(": ")[1]])
        lines.append(f"| {name} | {' | '.join(f'{1000 * value:.0f} ms' for value in shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
