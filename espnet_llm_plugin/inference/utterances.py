"""The utterances to decode, read one by one; one that cannot be read does not stop the others."""

from pathlib import Path
from typing import Any, Iterator, Optional, Sequence, Union

import numpy as np
import torch

from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.batches import Utterance


class Utterances(torch.utils.data.Dataset):
    """``(utterance id, speech or None, reason)`` in the order of the key file.

    Args:
        data: ESPnet's ``path,name,type`` triples; one must have the name ``speech``.
        train_args: Training configuration: its preprocessor is applied as ESPnet does.
        sample_rate: The model's (Hz); audio of another rate is not decoded. None: any.
        key_file: Utterances to take (first column); default: those of the first file.
        dtype: Of the speech.

    Raises:
        UserError: A file is missing or broken, an id occurs twice or is not there.
    """

    def __init__(
        self,
        data: Sequence[tuple[str, str, str]],
        train_args: Any,
        sample_rate: Optional[int] = None,
        key_file: Optional[Union[str, Path]] = None,
        dtype: str = "float32",
    ):
        from espnet2.tasks.asr import ASRTask
        from espnet2.train.dataset import ESPnetDataset

        names = [name for _, name, _ in data]
        if names != ["speech"]:
            raise UserError(
                f"--data_path_and_name_and_type gives {', '.join(names)}; decoding reads `speech` "
                "only, e.g. `dump/raw/test/wav.scp,speech,sound`"
            )
        path, _, kind = data[0]
        self.sample_rate = sample_rate
        self.keys = read_keys(key_file if key_file is not None else path)
        if not Path(path).is_file():
            raise UserError(f"--data_path_and_name_and_type: there is no file {path}")
        try:
            self._dataset = ESPnetDataset(
                data,
                preprocess=ASRTask.build_preprocess_fn(train_args, False),
                float_dtype=dtype,
            )
        except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
            raise UserError(f"cannot read {path} as `{kind}`: {error}") from error
        known = self._dataset.loader_dict["speech"]
        for key in self.keys:
            if key not in known.keys():  # noqa: SIM118 (ESPnet's readers have no `in`)
                raise UserError(f"utterance {key} of {key_file} is not in {path}")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[str, Optional[np.ndarray], str]:
        key = self.keys[index]
        try:
            speech = self._dataset[key][1]["speech"]
        except Exception as error:
            # Every audio library has its own errors; all mean that this one cannot be decoded.
            return key, None, f"cannot be read: {error}"
        reason = ""
        rate = getattr(self._dataset.loader_dict["speech"], "rate", None)
        if None not in (rate, self.sample_rate) and rate != self.sample_rate:
            reason = f"has {rate} samples a second, the model needs {self.sample_rate}"
        elif speech.size == 0:
            reason = "has no samples"
        elif not np.isfinite(speech).all():
            reason = "has samples that are not finite numbers"
        return key, (None if reason else speech), reason

    def read(
        self, skip: Sequence[str] = (), num_workers: int = 0
    ) -> Iterator[tuple[str, Optional[np.ndarray], str]]:
        """All utterances but some, read ahead by ``num_workers`` processes."""
        skipped = set(skip)
        order = [index for index, key in enumerate(self.keys) if key not in skipped]
        yield from torch.utils.data.DataLoader(
            self, batch_size=None, sampler=order, num_workers=num_workers, collate_fn=_as_it_is
        )

    def readable(self, failed: dict[str, str], **how: Any) -> Iterator[Utterance]:
        """Those that can be read; reasons of the others go into ``failed``.

        Args:
            failed: By utterance id.
            how: Arguments of :meth:`read`.
        """
        for utt, speech, reason in self.read(**how):
            if reason:
                failed[utt] = reason
            else:
                yield Utterance(utt, speech)


def _as_it_is(item: Any) -> Any:
    return item


def read_keys(path: Union[str, Path]) -> list[str]:
    """First column of a file.

    Raises:
        UserError: No such file, no line, an id twice, or a blank line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path} with utterance ids")
    keys = list(read_clean_table(path, may_be_empty=True))
    if not keys:
        raise UserError(f"{path} has no utterance")
    return keys
