"""ESPnet's preprocessor, which also carries the language of an utterance."""

from typing import Union

import numpy as np
from espnet2.train.preprocessor import CommonPreprocessor

from espnet_llm_plugin.data.language_codes import NAME, encode_language
from espnet_llm_plugin.errors import UserError


class MultilingualPreprocessor(CommonPreprocessor):
    """``preprocessor: multilingual``: as ``default``, and the data may have a name ``lang``.

    Its file has ``<utterance> <language code>`` lines and is of the type ``text``:
    ``--train_data_path_and_name_and_type dump/raw/train/utt2lang,lang,text``, which ESPnet takes
    with ``allow_variable_data_keys: true``. An utterance without code has no language. Data without
    ``lang`` pass as they are, so that ESPnet's own inference, which knows no languages, works.

    Arguments are those of ESPnet's ``CommonPreprocessor``.
    """

    def __call__(self, uid: str, data: dict[str, Union[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Speech and text as ever; ``lang`` becomes the bytes (n,) of the code.

        Raises:
            UserError: ``lang`` is no text.
        """
        if NAME not in data:
            return super().__call__(uid, data)
        code = data[NAME]
        if not isinstance(code, str):
            raise UserError(
                f"utterance {uid}: `{NAME}` is no text; give the languages as "
                f"`<file>/utt2lang,{NAME},text`"
            )
        rest = {name: value for name, value in data.items() if name != NAME}
        return {**super().__call__(uid, rest), NAME: encode_language(code)}
