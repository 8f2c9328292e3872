"""Divide keys among jobs, and merge what the jobs wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import DataDir, read_clean_table, read_lines, write_table
from espnet_llm_plugin.data.problems import EXAMPLES, Problems
from espnet_llm_plugin.errors import UserError

PathLike = Union[str, Path]


def split_keys(key_file: PathLike, nj: int, output_dir: PathLike, name: str = "keys") -> int:
    """Write ``<name>.1.scp`` ... ``<name>.<n>.scp`` with consecutive lines of ``key_file``.

    Sizes differ by one at most, longer ones first (as Kaldi's ``split_scp.pl``). Files of an
    earlier split with more jobs are removed.

    Returns:
        ``n``: ``nj``, or the number of lines if that is smaller.
    """
    if nj < 1:
        raise UserError(f"the number of jobs must be at least 1, not {nj}")
    problems = Problems(str(key_file))
    lines = [line for _, line in read_lines(key_file, problems)]
    problems.check("Correct the file.")
    if not lines:
        raise UserError(f"{key_file} is empty: there is nothing to divide among jobs")
    count = min(nj, len(lines))
    size, longer = divmod(len(lines), count)
    output_dir = Path(output_dir)
    start = 0
    with writing(output_dir):
        for old in output_dir.glob(f"{name}.*.scp"):
            old.unlink()
        for job in range(count):
            stop = start + size + (job < longer)
            with atomic_write(output_dir / f"{name}.{job + 1}.scp") as stream:
                stream.writelines(line + "\n" for line in lines[start:stop])
            start = stop
    return count


def merge_outputs(
    input_dirs: Sequence[PathLike], output_dir: PathLike, key_file: PathLike
) -> dict[str, int]:
    """Merge ``<input>/<n>best_recog/<file>`` of all jobs into ``<output>/<n>best_recog/<file>``.

    Args:
        input_dirs: One directory per decoding job.
        output_dir: Decoding directory.
        key_file: Lines that begin with the keys that were to be decoded.

    Returns:
        Number of lines by merged file.

    Raises:
        UserError: A key decoded twice, or never (``1best_recog``), or an unexpected one.
    """
    expected = set(read_clean_table(key_file, may_be_empty=True))
    names = sorted(
        {
            str(file.relative_to(directory))
            for directory in input_dirs
            for file in Path(directory).glob("*best_recog/*")
            if file.is_file() and not file.name.startswith(".")
        }
    )
    if not names:
        raise UserError(f"no decoding results in {', '.join(map(str, input_dirs))}")
    merged: dict[str, dict[str, str]] = {}
    for name in names:
        table = merged.setdefault(name, {})
        for directory in input_dirs:
            if not (Path(directory) / name).is_file():
                continue  # a job whose utterances have fewer hypotheses than n
            part = read_clean_table(Path(directory) / name, may_be_empty=True)
            for key in part.keys() & table.keys():
                raise UserError(f"{key} was decoded by two jobs ({Path(directory) / name})")
            table.update(part)
        wrong = sorted(table.keys() - expected)
        if name.startswith("1best_recog"):
            wrong += sorted(expected - table.keys())
        if wrong:
            raise UserError(
                f"{name} of the decoding jobs and {key_file} differ in {len(wrong)} key(s): "
                f"{', '.join(wrong[:EXAMPLES])}. Did a job fail? See its log, and decode again"
            )
    with writing(output_dir):
        for name, table in merged.items():
            write_table(Path(output_dir) / name, table)
    return {name: len(table) for name, table in merged.items()}


def select(data: DataDir, keys: Sequence[str], source: str) -> DataDir:
    """The utterances ``keys`` of ``data``; unknown ones are an error that names ``source``."""
    unknown = sorted(set(keys) - set(data.utterances))
    if unknown:
        raise UserError(
            f"{source} names {len(unknown)} utterance(s) that {data.path} does not have: "
            f"{', '.join(unknown[:EXAMPLES])}"
        )
    if not keys:
        raise UserError(f"{source} selects no utterance of {data.path}")
    return data.restrict(set(keys))
