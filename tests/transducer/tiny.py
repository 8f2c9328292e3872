"""Tiny transducers for tests: random weights, an encoder that is a linear layer."""

import torch
from espnet2.asr.ctc import CTC
from espnet2.asr.decoder.transducer_decoder import TransducerDecoder
from espnet2.asr.encoder.abs_encoder import AbsEncoder
from espnet2.asr_transducer.joint_network import JointNetwork

from espnet_llm_plugin.transducer.decoder import FactorizedTransducerDecoder
from espnet_llm_plugin.transducer.model import FactorizedTransducerModel, TransducerModel

TOKENS = ["<blank>", "<unk>", "a", "b", "c", "d", "<sos/eos>"]
VOCAB = len(TOKENS)
LABELS = VOCAB - 2
INPUT, DIM = 3, 4


class LinearEncoder(AbsEncoder):
    """Frame-wise, so that batches cannot differ from single utterances by padding."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(INPUT, DIM)

    def output_size(self):
        return DIM

    def forward(self, xs_pad, ilens, prev_states=None):
        return self.linear(xs_pad).tanh(), ilens, None


def parts(tokens=TOKENS):
    names = ("frontend", "specaug", "normalize", "preencoder", "postencoder")
    return dict(
        vocab_size=len(tokens),
        token_list=list(tokens),
        encoder=LinearEncoder(),
        ctc=CTC(len(tokens), DIM),
        **dict.fromkeys(names),
    )


def rnnt(seed=0, layers=1, rnn_type="lstm", **conf):
    """An RNN-T baseline; ``conf`` is model_conf."""
    torch.manual_seed(seed)
    decoder = TransducerDecoder(
        VOCAB, rnn_type=rnn_type, num_layers=layers, hidden_size=5, embed_pad=0
    )
    joint = JointNetwork(VOCAB, DIM, 5, joint_space_size=6)
    return TransducerModel(**parts(), decoder=decoder, joint_network=joint, **conf)


PREDICTOR_CONF = {
    "stateless": {"embed_dim": 6},
    "lstm": {"embed_dim": 5, "hidden_dim": 6, "num_layers": 2},
}


def decoder(seed=0, tokens=TOKENS, **conf):
    """A factorized decoder that is not at its zero start: every branch has an effect."""
    torch.manual_seed(seed)
    conf = {"predictor": "stateless", "joint_dim": 5, "blank_embed_dim": 3, **conf}
    conf.setdefault("predictor_conf", PREDICTOR_CONF.get(conf["predictor"]))
    made = FactorizedTransducerDecoder(len(tokens), DIM, **conf)
    with torch.no_grad():
        made.blank.output.weight.normal_()
    return made


def factorized(seed=0, model_conf=None, tokens=TOKENS, **conf):
    """A factorized transducer; ``conf`` is decoder_conf."""
    made = decoder(seed, tokens=tokens, **conf)
    return FactorizedTransducerModel(
        **parts(tokens), decoder=made, joint_network=None, **(model_conf or {})
    )


def batch(frames=(6, 4, 5), labels=((2, 3, 4), (1, 1), (5,)), seed=0):
    """speech, speech_lengths, text, text_lengths; text padded with -1."""
    generator = torch.Generator().manual_seed(seed)
    speech = torch.randn(len(frames), max(frames), INPUT, generator=generator)
    longest = max(map(len, labels))
    text = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in labels]).long()
    lengths = torch.tensor([len(row) for row in labels])
    return speech, torch.tensor(frames), text.reshape(len(labels), longest), lengths


def save_llm(directory, tokens=TOKENS, seed=0, **conf):
    """Save a random LLaMA over ``tokens`` with its tokens.txt, as adapt_vocabulary would."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    last = len(tokens) - 1
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=last,
        eos_token_id=last,
        initializer_range=0.5,
        **{"max_position_embeddings": 64, **conf},
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "tokens.txt").write_text("".join(f"{token}\n" for token in tokens))
    return str(directory)
