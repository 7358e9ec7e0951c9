"""What happens when somebody does something on the demo's page.

A visitor's `Session` is passed by reference, so a handler that took long can see that another question was asked
meanwhile, and then leaves the page as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..images import ImageReadError
from .answers import Answer, Mode
from .curves_svg import curves_svg
from .engine import DemoEngine
from .files import write_files
from .pictures import (
    comparison_figures,
    explanation_figure,
    perturbed_figure,
    perturbed_readout,
    refinement_figures,
    status,
)


_FOLDERS_KEPT = 32
_NO_PHOTOGRAPH = "There is no photograph yet: drop one, or pick a sample."


@dataclass(eq=False)
class Session:
    """What one visitor looks at: the plain map, the refined one if there is one, and which of the two is used.

    `stopping` asks the visitor's refinement to end.
    """

    plain: Answer
    refined: Answer | None = None
    answer: Answer | None = None
    stopping: bool = False

    def __post_init__(self) -> None:
        self.answer = self.plain

    def ask(self, answer: Answer) -> None:
        """Turn to another question."""
        self.plain, self.refined, self.answer = answer, None, answer


class Handlers:
    """The functions behind the controls.

    Args:
        engine: answers.
        gr: the module gradio, for its updates and messages.
        record: facts that the JSON download holds.
    """

    def __init__(self, engine: DemoEngine, gr: Any, record: dict[str, Any]) -> None:
        self.engine, self.gr, self.record = engine, gr, record
        # Gradio copies the files into a cache of its own once the handler is done.
        self._folders: deque[TemporaryDirectory] = deque()

    # ------------------------------------------------------------------------------------------------- new questions
    # Each gives the values of `app._wire`'s list `asked`; the last one empties the place for uploads, which takes the
    # next photograph only then.

    def open_upload(self, session: Session | None, path: str | None, *drawing: Any) -> tuple:
        """Explain an uploaded photograph."""
        if path is None:
            return self._problem(session, "The upload did not arrive; try again.")
        return self._open(session, Path(path), *drawing)

    def open_sample(self, path: Path, session: Session | None, *drawing: Any) -> tuple:
        """Explain a sample."""
        return self._open(session, path, *drawing)

    def _open(self, session: Session | None, path: Path, *drawing: Any) -> tuple:
        try:
            answer = self.engine.explain(self.engine.read(path))
        except (ImageReadError, torch.OutOfMemoryError) as error:
            # The path is that of a copy on the server.
            return self._problem(session, str(error).replace(str(path), path.name))
        return self._question(session, answer, *drawing)

    def choose_top(self, session: Session | None, index: int | None, *drawing: Any) -> tuple:
        """Explain one of the most probable classes."""
        return self._ask(session, index, None if session is None else session.plain.explanation.against, *drawing)

    def choose_other(self, session: Session | None, label: str | None, *drawing: Any) -> tuple:
        """Explain any class by its name."""
        if not label:
            return self._question(session, session.plain, *drawing) if session else self._problem(session)
        return self._ask(session, label, None if session is None else session.plain.explanation.against, *drawing)

    def choose_against(self, session: Session | None, label: str | None, *drawing: Any) -> tuple:
        """Explain why the class rather than another."""
        return self._ask(
            session, None if session is None else session.plain.explanation.target, label or None, *drawing
        )

    def choose_alone(self, session: Session | None, *drawing: Any) -> tuple:
        """Explain the class without another one."""
        return self._ask(session, None if session is None else session.plain.explanation.target, None, *drawing)

    def _ask(
        self, session: Session | None, target: int | str | None, against: int | str | None, *drawing: Any
    ) -> tuple:
        if session is None:
            return self._problem(session)
        try:
            answer = self.engine.explain(session.plain.photograph, target, against=against)
        except (ValueError, torch.OutOfMemoryError) as error:
            return self._problem(session, str(error))
        return self._question(session, answer, *drawing)

    def _question(self, session: Session | None, answer: Answer, *drawing: Any) -> tuple:
        """The values of all outputs of a new question."""
        if session is None:
            session = Session(answer)
        else:
            session.ask(answer)
        explanation, gr = answer.explanation, self.gr
        best = self.engine.classify(answer.photograph)
        choices = [(f"{found.label}  {found.probability:.1%}", found.index) for found in best]
        among = explanation.target in [found.index for found in best]
        return (
            session,
            status(f"Explained with {_passes_of(self.engine, answer)}: {explanation.title}."),
            explanation_figure(answer, *self._drawing(*drawing)),
            gr.update(choices=choices, value=explanation.target if among else None),
            gr.update(value=None if among else explanation.label),
            gr.update(value=explanation.against_label),
            gr.update(visible=explanation.against is not None),
            gr.update(value=False, interactive=False),
            "",
            "",
            *[gr.update(value=None, interactive=False)] * 3,
            None,
        )

    def _problem(self, session: Session | None, sentence: str = _NO_PHOTOGRAPH) -> tuple:
        """Say what happened; everything else stays as it was."""
        gr = self.gr
        gr.Warning(sentence)
        explanation = None if session is None else session.plain.explanation
        shown = session is not None
        among = shown and explanation.target in [c.index for c in self.engine.classify(session.plain.photograph)]
        return (
            session,
            status(sentence, "problem"),
            gr.skip(),
            # The controls go back to the question that is shown.
            gr.update(value=explanation.target if among else None),
            gr.update(value=explanation.label if shown and not among else None),
            gr.update(value=explanation.against_label if shown else None),
            *[gr.skip()] * 7,
            None,
        )

    # --------------------------------------------------------------------------------------------------- one question

    def draw(self, session: Session | None, *drawing: Any) -> Any:
        """The main picture in another view, opacity or colour map."""
        if session is None:
            return self.gr.skip()
        return explanation_figure(session.answer, *self._drawing(*drawing))

    def perturb(self, session: Session | None, share: float, mode: Mode, reference: str) -> tuple:
        """The perturbed photograph, its probability, and the curves with the slider's position."""
        if session is None:
            return (self.gr.skip(),) * 3
        answer, share = session.answer, share / 100
        perturbed = self.engine.perturbed(answer, share, mode, reference)
        if session.answer is not answer:
            return (self.gr.skip(),) * 3
        return (
            perturbed_figure(answer, perturbed, share, mode, reference),
            perturbed_readout(answer, perturbed),
            self._curves(answer, share, mode, reference, perturbed.value),
        )

    def measure(self, session: Session | None, share: float, mode: Mode, reference: str) -> Any:
        """The curves, measured if they were not."""
        if session is None:
            return self.gr.skip()
        answer, share = session.answer, share / 100
        self.engine.curves(answer, reference)
        value = self.engine.perturbed(answer, share, mode, reference).value
        if session.answer is not answer:
            return self.gr.skip()
        return self._curves(answer, share, mode, reference, value)

    def _curves(self, answer: Answer, share: float, mode: Mode, reference: str, value: float) -> str:
        explanation = answer.explanation
        return curves_svg(
            self.engine.known_curves(answer, reference),
            share=share,
            value=value,
            mode=mode,
            label=explanation.label,
            against_label=explanation.against_label,
        )

    def files(self, session: Session | None) -> tuple:
        """The three files to download."""
        if session is None:
            return (self.gr.skip(),) * 3
        answer, gr = session.answer, self.gr
        folder = TemporaryDirectory(prefix="hf-aha-demo-")
        self._folders.append(folder)
        while len(self._folders) > _FOLDERS_KEPT:
            self._folders.popleft().cleanup()
        paths = write_files(answer, self.record, Path(folder.name))
        if session.answer is not answer:
            return (gr.skip(),) * 3
        return tuple(gr.update(value=str(paths[kind]), interactive=True) for kind in ("png", "npy", "json"))

    # ---------------------------------------------------------------------------------------- refining and comparing

    def refine(self, session: Session | None, steps: float, *drawing: Any) -> Iterator[tuple]:
        """Refine the map, saying how far it is; closing the generator, as a closed tab does, ends the work."""
        gr = self.gr
        idle = (gr.update(interactive=True), gr.update(interactive=False))
        if session is None:
            gr.Warning(_NO_PHOTOGRAPH)
            yield status(_NO_PHOTOGRAPH, "problem"), gr.skip(), gr.skip(), *idle
            return
        plain, steps, session.stopping = session.plain, int(steps), False
        busy = (gr.update(interactive=False), gr.update(interactive=True))
        try:
            with closing(self.engine.refining(plain, steps)) as work:
                for found in work:
                    if session.plain is not plain or session.stopping:
                        why = "stopped" if session.stopping else "left for the new question"
                        yield status(f"The refinement was {why}."), "", gr.skip(), *idle
                        return
                    if isinstance(found, int):
                        yield gr.skip(), _progress(found, steps), gr.skip(), *busy
                        continue
                    session.refined = found
                    _, opacity, colormap = self._drawing(*drawing)
                    pictures = refinement_figures(plain, found, opacity, colormap)
                    yield status("Refined."), pictures, gr.update(interactive=True, value=False), *idle
        except torch.OutOfMemoryError:
            sentence = "Memory ran out during the refinement; give fewer people at once, or a smaller classifier."
            gr.Warning(sentence)
            yield status(sentence, "problem"), "", gr.skip(), *idle

    def stop(self, session: Session | None) -> None:
        """Ask the refinement to end, which says so itself."""
        if session is not None:
            session.stopping = True

    def use_refined(self, session: Session | None, wanted: bool, *drawing: Any) -> tuple:
        """Let the picture, the slider and the curves use the refined map, or the plain one again."""
        if session is None or (wanted and session.refined is None):
            return status("There is no refined map yet.", "problem"), self.gr.skip()
        session.answer = session.refined if wanted else session.plain
        sentence = f"Shown is the {'refined' if wanted else 'plain'} map."
        return status(sentence), explanation_figure(session.answer, *self._drawing(*drawing))

    def compare(self, session: Session | None, *drawing: Any) -> tuple:
        """The same class explained by other methods."""
        if session is None:
            self.gr.Warning(_NO_PHOTOGRAPH)
            return status(_NO_PHOTOGRAPH, "problem"), self.gr.skip()
        answer = session.plain
        if answer.explanation.against is not None:
            answer = self.engine.explain(answer.photograph, answer.explanation.target)
        comparison = self.engine.compare(answer)
        _, opacity, colormap = self._drawing(*drawing)
        passes = self.engine.explainer.config.passes_per_explanation
        sentence = f"Compared for {answer.explanation.label}." if comparison.maps else "No other method can run here."
        return status(sentence), comparison_figures(answer, comparison, opacity, colormap, passes)

    @staticmethod
    def _drawing(view: str, opacity: float, colormap: str) -> tuple[str, float, str]:
        return view, opacity / 100, colormap


def _passes_of(engine: DemoEngine, answer: Answer) -> str:
    each = engine.explainer.config.passes_per_explanation
    # The forward pass that gives the features is shared by two classes that are compared.
    count = each if answer.explanation.against is None else 2 * each - 1
    return f"{count} pass{'' if count == 1 else 'es'} of the classifier"


def _progress(done: int, steps: int) -> str:
    text = f"Step {done} of {steps}"
    return f'<p>{text}</p><progress class="aha-progress" value="{done}" max="{steps}" aria-label="{text}"></progress>'
