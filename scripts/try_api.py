"""The Python API as a user writes it, run with an installed wheel: usage: try_api.py BUNDLE IMAGE."""

import multiprocessing
import pickle
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import owl2
from owl2 import BusyError, ContextOverflowError, GenerationConfig, Owl2


def converse(bundle: str, image: str) -> None:
    """Chat, stream, history, undo, fork, raw prompts."""
    with Owl2.load(bundle, progress=print) as owl:
        print(owl2.__version__, owl)
        chat = owl.chat()
        answer = chat.ask("Describe the picture.", images=[image])
        print(answer.text, answer.ids[:3], answer.logprobs[:3], answer.finish_reason, answer.stats.prompt_tokens)
        assert pickle.loads(pickle.dumps(answer)) == answer
        stream = chat.stream("What colour is the largest shape?")
        for chunk in stream:
            print(chunk.text, end="")
        print(f" = {stream.answer.text}")
        content = [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]
        other = owl.chat(messages=[{"role": "user", "content": content}, {"role": "assistant", "content": "Hello"}])
        print(other, other.messages)
        other.fork().ask("Describe the picture.")
        other.undo()
        assert other.messages == []
        prompt = "USER: <|image|>Describe the picture. ASSISTANT:"
        config = GenerationConfig(max_new_tokens=16)
        generated = owl.generate(prompt, images=image, config=config, stop="###")
        assert "".join(chunk.text for chunk in owl.stream(prompt, images=image, config=config)) == generated.text
        print(generated, owl.logits(prompt, images=image).shape)
        for wrong in (owl, chat):
            try:
                pickle.dumps(wrong)
            except owl2.Owl2Error as error:
                print("refused:", error)
        try:
            owl.generate(prompt, max_tokens=5)  # type: ignore[call-arg]
        except owl2.Owl2Error as error:
            print("refused:", error)
    print(owl2.verify(bundle).passed)


def overflow(bundle: str) -> str:
    """More than the context holds, in a worker."""
    return Owl2.load(bundle, context=20).chat().ask("word " * 50).text


def workers(bundle: str) -> None:
    """Raise in workers of both pools, which neither hang nor break."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as pool:
        for future in [pool.submit(overflow, bundle) for _ in range(3)]:
            print("ProcessPoolExecutor:", repr(future.exception(timeout=120)))
    with context.Pool(2) as processes:
        for result in [processes.apply_async(overflow, (bundle,)) for _ in range(3)]:
            try:
                result.get(timeout=120)
            except ContextOverflowError as error:
                print("multiprocessing.Pool:", error)


def threads(bundle: str) -> None:
    """Four threads ask one chat at the same time."""
    chat, barrier, told = Owl2.load(bundle).chat(), threading.Barrier(4), []

    def ask(index: int) -> None:
        barrier.wait()
        try:
            told.append((index, chat.ask(f"Question {index}: what is a circle?", max_new_tokens=64).text))
        except BusyError as error:
            told.append((index, f"refused: {error}"))

    running = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    print(*sorted(told), chat.messages, sep="\n")


if __name__ == "__main__":
    converse(*sys.argv[1:])
    workers(sys.argv[1])
    threads(sys.argv[1])
