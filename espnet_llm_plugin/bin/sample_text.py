"""Plain utterances sampled from a causal LM, in disjoint sets; without LM, from the grammar.

Writes OUTPUT_DIR/{train,dev,test,lm}/text (`id words ...` a line) for make_synthetic_corpus
--text OUTPUT_DIR and for training language models. Stories are cut into utterances of consecutive
sentences; test and dev share no long n-gram with any other story. The same options give the same
text, and what a killed run has sampled is kept. Without --llm the sentences are those of the
grammar of egs2/mini, whose limits are its own.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import write_table
from espnet_llm_plugin.data.synthetic.stories import SETS, Limits, split_stories, utterances
from espnet_llm_plugin.errors import UserError, run_cli

REPORT = "sampled.json"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.sample_text",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", required=True, help="where train/, dev/, ... appear")
    parser.add_argument("--llm", help="LLM with tokenizer: directory or hub id")
    for name, size in (("test", 400), ("dev", 250), ("train", 3000), ("lm", 48000)):
        parser.add_argument(f"--num_{name}", type=int, default=size, help=f"utterances of {name}")
    parser.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("Sampling")
    group.add_argument("--temperature", type=float, default=0.8)
    group.add_argument("--max_tokens", type=int, default=380, help="of a story")
    group.add_argument("--batch_size", type=int, default=256, help="stories sampled together")
    group.add_argument(
        "--max_batches", type=int, default=200, help="give up if that many do not suffice"
    )
    group = parser.add_argument_group("Utterances")
    defaults = Limits()
    group.add_argument("--min_words", type=int, default=defaults.min_words)
    group.add_argument("--max_words", type=int, default=defaults.max_words)
    group.add_argument(
        "--min_word_count",
        type=int,
        default=defaults.min_word_count,
        help="drop utterances with a word that the whole text has less often",
    )
    group.add_argument(
        "--ngram", type=int, default=defaults.ngram, help="test and dev share none of so many words"
    )
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    sizes = {name: getattr(args, f"num_{name}") for name in SETS}
    small = [name for name, size in sizes.items() if size < 1]
    if small:
        raise UserError(f"--num_{small[0]} {sizes[small[0]]}: at least 1 utterance is needed")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} must not be negative")
    limits = Limits(args.min_words, args.max_words, args.min_word_count, args.ngram)
    output = Path(args.output_dir)
    same = {name: value for name, value in vars(args).items() if name != "output_dir"}
    if args.llm:
        from espnet_llm_plugin.llm.backbone import FrozenLLM

        same["fingerprint"] = FrozenLLM(args.llm).fingerprint.hex()
    report = _read(output / REPORT)
    if report.get("options") == same:
        print(f"{output}: already complete")
        return
    with writing(output):
        sets = _from_llm(args, same, sizes, limits, output) if args.llm else _grammar(args, sizes)
        for name, texts in sets.items():
            table = {f"{name}_{n:06d}": text for n, text in enumerate(texts)}
            write_table(output / name / "text", table)
        counts = {name: len(texts) for name, texts in sets.items()}
        words = {name: sum(len(one.split()) for one in texts) for name, texts in sets.items()}
        with atomic_write(output / REPORT) as stream:  # last: it is all there
            json.dump({"options": same, "utterances": counts, "words": words}, stream, indent=1)
    for name, count in counts.items():
        print(f"{output}/{name}/text: {count} utterances, {words[name]} words")


def _grammar(args: argparse.Namespace, sizes: dict[str, int]) -> dict[str, list[str]]:
    from espnet_llm_plugin.data.synthetic.corpus import Sizes, make_texts

    texts = make_texts(Sizes(**sizes), args.seed)
    return {name: [sentence.text for sentence in texts[name]] for name in SETS}


def _from_llm(
    args: argparse.Namespace,
    same: dict[str, Any],
    sizes: dict[str, int],
    limits: Limits,
    output: Path,
) -> dict[str, list[str]]:
    """Sample batch after batch until the sets are full."""
    stories: list[list[str]] = []
    check_at = sum(sizes.values())
    for number, batch in enumerate(_batches(args, same, output)):
        stories += [utterances(text, complete, limits) for text, complete in batch]
        found = sum(map(len, stories))
        print(f"{(number + 1) * args.batch_size} stories, {found} utterances", file=sys.stderr)
        if found >= check_at:
            sets = split_stories(stories, sizes, limits)
            if all(len(sets[name]) == size for name, size in sizes.items()):
                return sets
            check_at = int(1.1 * found) + 1
        if number + 1 == args.max_batches:
            raise UserError(
                f"{found} utterances in {args.max_batches} batches of {args.batch_size} stories do "
                f"not suffice for {sum(sizes.values())} that fit the limits. Give a larger "
                "--max_batches, or look at the stories in "
                f"{output}/stories: does this LLM write plain English?"
            )
    raise AssertionError("sampling does not end")


def _batches(
    args: argparse.Namespace, same: dict[str, Any], output: Path
) -> Iterator[list[tuple[str, bool]]]:
    """Stories that an earlier run of the same sampling has kept, then new ones."""
    sampling = ("llm", "fingerprint", "seed", "temperature", "max_tokens", "batch_size")
    key = {name: same[name] for name in sampling}
    directory = output / "stories"
    number = 0
    while (kept := _read(directory / f"{number:04d}.json")).get("sampling") == key:
        yield [(text, complete) for text, complete in kept["stories"]]
        number += 1

    from espnet_llm_plugin.llm.adaptation import load_tokenizer
    from espnet_llm_plugin.llm.backbone import load_causal_lm, resolve_llm
    from espnet_llm_plugin.llm.sampling import sample_batches

    batches = sample_batches(
        load_causal_lm(args.llm),
        load_tokenizer(resolve_llm(args.llm)),
        seed=args.seed,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        first=number,
    )
    for batch in batches:
        with atomic_write(directory / f"{number:04d}.json") as stream:
            json.dump({"sampling": key, "stories": batch}, stream, ensure_ascii=False, indent=0)
        yield [(sample.text, sample.complete) for sample in batch]
        number += 1


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
