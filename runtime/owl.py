"""The public face: load a bundle, chat about images, read logits."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np

from owl2.runtime.arguments import checked
from owl2.runtime.bundle import Bundle
from owl2.runtime.chat import Chat
from owl2.runtime.config import require
from owl2.runtime.encoded import EncodedImage
from owl2.runtime.engine import BackendName, EngineOptions, Floats
from owl2.runtime.errors import ContextOverflowError, Owl2Error
from owl2.runtime.families.mplug_owl2.template import render, with_images
from owl2.runtime.foreign import shorten
from owl2.runtime.generate import Answer, check_context, prompt_logits
from owl2.runtime.image_files import ImageInput
from owl2.runtime.images import UNREAD, Images, as_list
from owl2.runtime.likelihood import ChoiceLikelihoods, choice_likelihoods
from owl2.runtime.load import Loaded, open_bundle
from owl2.runtime.messages import ChatMessage
from owl2.runtime.placement import CPU, Placement
from owl2.runtime.preprocess import ImageReading, Orientation
from owl2.runtime.sampling import GenerationConfig, GenerationOptions, merge_options
from owl2.runtime.scoring.scale import ScaleSettings, make_scale, preset_for
from owl2.runtime.scoring.score import Score
from owl2.runtime.scoring.scorer import Scorer
from owl2.runtime.scoring.video import MOST_FRAMES, PER_SECOND, WINDOW, VideoScore, read_frames, score_video
from owl2.runtime.spec import KvType
from owl2.runtime.stream import AnswerStream, stream_answer
from owl2.runtime.verification import OnProgress

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack


class Owl2:
    """A loaded bundle.

    Example::

        with Owl2.load("bundle/") as owl:
            chat = owl.chat()
            print(chat.ask("What is in the image?", images=["a.jpg"]).text)
            for chunk in chat.stream("And its colour?"):
                print(chunk.text, end="", flush=True)

    Attributes:
        manifest: of the bundle.
        config: architecture and image preprocessing.
        context: positions that a conversation may take.
        device: what it runs on.
        model: the parts that a generation works with; for extensions, and may change.
    """

    def __init__(self, bundle: Bundle, model: Loaded, device: Placement) -> None:
        """Wrap a loaded bundle; :meth:`load` is the usual way."""
        self.manifest = bundle.manifest
        self.config = model.config
        self.context = model.context
        self.device = device
        self.model = model

    @classmethod
    @checked
    def load(  # noqa: PLR0913 - one parameter per setting
        cls,
        bundle: str | os.PathLike[str],
        *,
        device: str = CPU,
        threads: int | None = None,
        context: int | None = None,
        kv_cache: KvType | None = None,
        backend: BackendName | None = None,
        warm: bool = False,
        check_memory: bool = True,
        verify: bool = False,
        progress: OnProgress | None = None,
    ) -> Owl2:
        """Verify and load a bundle.

        Args:
            bundle: folder written by ``owl2-export``.
            device: ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``, with ``:N`` for another GPU than the first.
                There is no fallback to the CPU: a graph that the GPU cannot run is an error. ``tensorrt`` runs the
                engines in a bundle, and so does ``tensorrt-rtx`` if the bundle is of the dialect onnx.
            threads: that share a step on the CPU; None lets the backend choose.
            context: positions a conversation may take; None for the model's own limit.
            kv_cache: type of the K/V cache: ``fp32``, ``fp16`` or ``int8``. None for ``fp16`` in the native core, or
                ``fp32`` where the weights are in floating point, and elsewhere for that of the bundle's activations.
            backend: on the CPU: ``native`` for the native core, ``onnxruntime``; None for the native core where it can
                run the bundle, which ``owl2 info`` tells.
            warm: open the vision side too; the native core otherwise opens it for the first image.
            check_memory: refuse before anything is loaded if the free memory of the device cannot hold the weights and
                the K/V cache: that of ``context`` if it is given, or else of the first positions.
            verify: hash every file, also those that have not changed since they were last verified.
            progress: called with a :class:`LoadProgress` a few times a second.

        Raises:
            BundleError: the folder is not a bundle, or a file is missing, truncated or changed.
            BackendError: the device is not available or a graph cannot be loaded onto it.
            InsufficientMemoryError: the model cannot fit; gives the figures and what would.
            ConfigError: a setting that cannot work.
        """
        options = EngineOptions(Placement.parse(device), threads, kv_cache, context, backend, warm)
        opened = open_bundle(Path(bundle), options, check_memory=check_memory, verify=verify, on_progress=progress)
        return cls(*opened, options.device)

    def close(self) -> None:
        """Give all memory back, the K/V caches of all chats included; later calls raise BackendError."""
        self.model.close()

    def __enter__(self) -> Owl2:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @checked
    def chat(self, messages: Sequence[ChatMessage] = ()) -> Chat:
        """Begin a conversation with a KV cache of its own.

        Args:
            messages: what has been said before: ``{"role": "user" | "assistant", "content": …}`` in turn, ending with
                the assistant; the content is a text or a list of parts, ``{"type": "text", "text": …}`` and
                ``{"type": "image", "image": …}``.

        Raises:
            PromptError, ImageError: a message or an image in it cannot be used.
        """
        return Chat(self.model, messages)

    @checked
    def load_chat(self, path: str | os.PathLike[str]) -> Chat:
        """Continue a conversation that :meth:`Chat.save` wrote with this bundle: nothing runs again.

        Raises:
            SavedChatError: the file is damaged, something else or of another bundle; says which. Its text alone:
                ``owl.chat(owl2.saved_messages(path))``.
            BackendError: the K/V cache has another type, which the message names; load with that.
        """
        return Chat.load(path, self.model)

    def encode(
        self, image: ImageInput, *, preprocess: str | None = None, reading: ImageReading | None = None
    ) -> EncodedImage:
        """Run an image through the vision tower, to save it or to send it to another device with the same tower.

        Args:
            image: a path, a ``data:`` URI, bytes of a file, an open binary file, a PIL image or a uint8 array
                [H, W, 3].
            preprocess: ``resize``, ``pad`` or ``crop`` instead of the bundle's own mode.
            reading: what to make of EXIF orientation and transparency.

        Raises:
            ImageError: the image cannot be read.
            BackendError: the tower failed.
        """
        return self.model.encode_image(image, preprocess, reading)

    def generate(
        self,
        prompt: str,
        *,
        images: Images = None,
        preprocess: str | None = None,
        reading: ImageReading | None = None,
        config: GenerationConfig | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Answer:
        """Continue a raw prompt, no conversation template added.

        Args:
            prompt: text with one ``<|image|>`` per image.
            images: one or several: paths, ``data:`` URIs, bytes of files, open binary files, PIL images or uint8
                arrays [H, W, 3].
            preprocess: ``resize``, ``pad`` or ``crop`` instead of the bundle's own mode.
            reading: what to make of EXIF orientation and transparency.
            config: how to generate.
            options: fields of :class:`GenerationConfig`, which take precedence over ``config``.

        Raises:
            PromptError: placeholders and images do not agree.
            ImageError: an image cannot be read.
            ContextOverflowError: the prompt does not fit.
            ConfigError: an option that is not known or outside its range.
            BackendError: a step failed.
        """
        stream = self.stream(prompt, images=images, preprocess=preprocess, reading=reading, config=config, **options)
        return stream.read()

    def stream(
        self,
        prompt: str,
        *,
        images: Images = None,
        preprocess: str | None = None,
        reading: ImageReading | None = None,
        config: GenerationConfig | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AnswerStream:
        """Continue a raw prompt as :meth:`generate`, and get the answer as it is generated."""
        settings = merge_options(config, options)
        sources, cache = as_list(images), self.model.new_cache()
        check_context(cache, self.model.encode(prompt, [UNREAD] * len(sources)))  # before an image is decoded
        began = time.perf_counter()
        prepared = self.model.prepare(sources, preprocess, reading)
        seconds = time.perf_counter() - began
        encoded = self.model.encode(prompt, prepared)
        return stream_answer(self.model, cache, encoded, settings, preprocess_seconds=seconds)

    @checked
    def logits(
        self,
        prompt: str,
        *,
        images: Images = None,
        preprocess: str | None = None,
        reading: ImageReading | None = None,
    ) -> Floats:
        """Logits of every position of a raw prompt, image rows included: float32 [T, V].

        Raises:
            PromptError, ImageError, ContextOverflowError, ConfigError, BackendError: as :meth:`generate`.
        """
        sources = as_list(images)
        length = len(self.model.encode(prompt, [UNREAD] * len(sources)).keys)
        if length > self.context:
            raise ContextOverflowError(0, length, self.context, "shorten the prompt or use fewer images")
        encoded = self.model.encode(prompt, self.model.prepare(sources, preprocess, reading))
        return np.concatenate([logits for _, logits in prompt_logits(self.model, self.model.new_cache(), encoded)])

    @checked
    def scorer(
        self,
        task: str | Sequence[str] = "quality",
        *,
        video: bool = False,
        preset: str | os.PathLike[str] | None = None,
        levels: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        prompt: str | None = None,
        preprocess: str | None = None,
    ) -> Scorer:
        """What scores any number of images; see :meth:`score`, which is for a few.

        Args:
            task: one or several, which share the work of the vision tower.
            video: whether the images of an item are the frames of a video.
            preset: the way in which a kind of model is asked, by name or as a JSON file; None for the bundle's own, or
                Q-Align's where it has none.
            levels: words instead of the preset's, from the best to the worst.
            weights: of the levels.
            prompt: raw, with one ``<|image|>`` per image, instead of the preset's.
            preprocess: ``resize``, ``pad`` or ``crop`` instead of the preset's.

        Raises:
            ConfigError: a preset or task that is not known, or words that the tokenizer cannot tell apart.
        """
        chosen = preset_for(preset, self.manifest.preset)
        require(isinstance(task, str | list | tuple), f"task must be a name or a list of names, got {shorten(task)}")
        tasks = [task] if isinstance(task, str) else list(task)
        scales = [
            make_scale(chosen, name, video=video, levels=levels, weights=weights, prompt=prompt, preprocess=preprocess)
            for name in tasks
        ]
        return Scorer(self.model, scales)

    def score(
        self,
        images: Images,
        task: str = "quality",
        *,
        reading: ImageReading | None = None,
        **settings: Unpack[ScaleSettings],
    ) -> list[Score]:
        """Score images, each alone, as Q-Align and its relatives do.

        A score is the same bits whatever images are beside it.

        Args:
            images: one or several: paths, ``data:`` URIs, bytes of files, open binary files, PIL images, uint8 arrays
                [H, W, 3], or encoded images.
            task: ``quality`` or ``aesthetics``, or any name with a prompt of your own.
            reading: what to make of EXIF orientation and transparency. The original ignores both:
                ``ImageReading(orientation="stored", background=None)``.
            settings: as in :meth:`scorer`.

        Raises:
            ImageError: an image cannot be read.
            ConfigError: a setting that cannot work.
            BackendError: a step failed.
        """
        scorer = self.scorer(task, **settings)
        found = []
        for _, scores in scorer.stream(as_list(images), partial(scorer.prepare, reading=reading)):
            if isinstance(scores, Owl2Error):
                raise scores
            found.append(scores[0])
        return found

    def score_video(
        self,
        video: str | os.PathLike[str],
        task: str = "quality",
        *,
        per_second: float = PER_SECOND,
        window: int = WINDOW,
        most_frames: int = MOST_FRAMES,
        orientation: Orientation = "exif",
        **settings: Unpack[ScaleSettings],
    ) -> VideoScore:
        """Score a video: the whole as the original does, where it fits the context, and windows of any length.

        Args:
            video: path.
            task: ``quality``, or any name with a prompt of your own.
            per_second: frames.
            window: frames of a window.
            most_frames: after which a video is refused: a stream need not end.
            orientation: ``exif`` turns frames as the video says; ``stored`` ignores that, as the original.
            settings: as in :meth:`scorer`.

        Raises:
            ImageError: the video cannot be read.
            ConfigError: PyAV is not installed (``pip install 'owl2[video]'``), or a setting that cannot work.
            BackendError: a step failed.
        """
        scorer = self.scorer(task, video=True, **settings)
        read = read_frames(video, per_second, most_frames, orientation=orientation)
        frames = (scorer.prepare(frame) for frame in read)
        [score] = score_video(scorer, frames, os.fspath(video), per_second=per_second, window=window)
        return score

    def choose(
        self,
        question: str,
        answers: Sequence[str],
        images: Images = None,
        *,
        preprocess: str | None = None,
        reading: ImageReading | None = None,
    ) -> ChoiceLikelihoods:
        """How likely each of several whole answers is: a forced choice, as in multiple-choice tests and Co-Instruct.

        Example::

            found = owl.choose("Which image is sharper?", ["the first", "the second"], ["a.jpg", "b.jpg"])
            print(found.best, found.best_per_token, found.probabilities)

        Args:
            question: asked in the conversation template; images go first unless it says where with ``<|image|>``.
            answers: two or more.
            images: as in :meth:`score`.
            preprocess: ``resize``, ``pad`` or ``crop`` instead of the bundle's own mode.
            reading: what to make of EXIF orientation and transparency.

        Raises:
            ConfigError: fewer than two answers, or an empty one.
            PromptError, ImageError, ContextOverflowError, BackendError: as :meth:`generate`.
        """
        texts = not isinstance(answers, str) and all(isinstance(answer, str) and answer.strip() for answer in answers)
        require(texts and len(answers) > 1, f"answers must be two texts or more, got {shorten(answers)}")
        prepared = self.model.prepare(images, preprocess, reading)
        model, cache = self.model, self.model.new_cache()
        return choice_likelihoods(
            lambda messages: model.encode(render(messages), prepared),
            lambda prompt, first: prompt_logits(model, cache, prompt, first),
            model.tokenizer.eos_id,
            with_images(question, len(prepared)),
            answers,
        )

    def __repr__(self) -> str:
        return f"<Owl2 {self.model.name} on {self.device}, context {self.context}>"

    def __reduce__(self) -> NoReturn:
        raise Owl2Error(
            f"a loaded model cannot be pickled; send the folder and load it in the other process: "
            f"Owl2.load({self.model.name!r})"
        )
