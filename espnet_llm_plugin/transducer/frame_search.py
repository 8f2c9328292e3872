"""What the time-synchronous searches of CTC and of transducers have in common.

B utterances, G scale settings of each, T frames, D encoder size.
"""

from abc import ABC, abstractmethod
from typing import Optional, Sequence

import torch

from espnet_llm_plugin.transducer.hypothesis import Hypothesis, Scales
from espnet_llm_plugin.transducer.prefix_tree import PrefixTree
from espnet_llm_plugin.transducer.search_state import SearchState


class FrameSearch(ABC):
    """A search that goes over encoder frames, chunk by chunk.

    Attributes:
        takes_batches: Utterances of different lengths can be searched together.
    """

    takes_batches = True

    @abstractmethod
    def start(
        self, scales: Sequence[Scales], tree: Optional[PrefixTree] = None, utterances: int = 1
    ) -> SearchState:
        """State before the first frame.

        Args:
            scales: G settings, searched side by side with common prefixes.
            tree: Prefixes of an earlier search with the same networks, to be reused.
            utterances: B.
        """

    @abstractmethod
    def step(
        self,
        state: SearchState,
        encoder_out: torch.Tensor,
        lengths: Optional[torch.Tensor] = None,
    ) -> SearchState:
        """Search the next chunk; chunks one after another equal all frames at once.

        Args:
            state: Left as it is.
            encoder_out: Frames (B, T, D), or (T, D) of the only utterance.
            lengths: Frames of each utterance in this chunk, 0 allowed (B,); default: all.

        Raises:
            SearchError: A score is not a number.
        """

    def __call__(
        self,
        encoder_out: torch.Tensor,
        scales: Optional[Scales] = None,
        nbest: int = 1,
        normalize_length: bool = False,
    ) -> list[Hypothesis]:
        """Search one utterance (T, D): at most ``nbest`` hypotheses, best first."""
        lengths = torch.tensor([encoder_out.size(0)])
        return self.batch(encoder_out[None], lengths, scales, nbest, normalize_length)[0]

    def batch(
        self,
        encoder_out: torch.Tensor,
        lengths: torch.Tensor,
        scales: Optional[Scales] = None,
        nbest: int = 1,
        normalize_length: bool = False,
    ) -> list[list[Hypothesis]]:
        """Search utterances (B, T, D) with ``lengths`` (B,) frames: an n-best list of each."""
        state = self.start([scales or Scales()], utterances=len(encoder_out))
        return self.step(state, encoder_out, lengths).nbest(nbest, normalize_length)
