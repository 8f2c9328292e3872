#!/usr/bin/env bash
# Ten Indic languages (FLEURS, and larger sets beside it); see README.md:
#
#   ./run.sh --fleurs DIR [--langs "hi bn ta te ml kn gu mr pa ur"] [--llm HF_DIRECTORY_OR_HUB_ID] [OPTION ...]
#   ./run.sh --mini true          the same on synthetic speech in the same layout, in minutes
#
#   --fleurs DIR         of `lhotse download fleurs`, or from https://huggingface.co/datasets/google/fleurs
#   --kathbath DIR, --indicvoices DIR, --shrutilipi DIR     local copies: more training data
#   --text_opts "..."    spelling of transcripts, options of bin.prepare_fleurs, e.g. "--digits native"
#   --balance B          a language with a share p of the audio is drawn in proportion to p^B
#                        (0: all alike; 1: as they are; none: every utterance once an epoch)
#   --llm LLM            adapted to the pieces, fine-tuned on the transcripts and swapped in
#   --lm_train_text "FILE ..."     other text for it, lines `id sentence`
#   --ctc_config, --asr_config, --lm_config, --tune_config FILE     (--ctc_config none: no CTC model;
#                        --lm_config none: the LLM is adapted to the pieces, but not fine-tuned)
#   --system speech_llm      a speech LLM in place of transducers, over --units adapted|native
#   --speech_llm_config FILE    the same with this configuration, e.g. of conf/prefix_tuning
#   --finetune_config FILE   continues the swapped model, e.g. conf/transducer/finetune_mwer.yaml,
#   --finetune_model NAME    and the checkpoint of it to decode (default: valid.loss.ave.pth)
#
# All other options are those of asr_llm.sh, e.g. --ngpu 1 --stage 10:

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")"
. ../../TEMPLATE/asr1/transducer_llama.sh

# shellcheck disable=SC2034  # the sets are used by name
fleurs="" kathbath="" indicvoices="" shrutilipi="" text_opts="" speech_llm_config=""
langs="hi bn ta te ml kn gu mr pa ur" balance=0.5 stop_stage=13
read_options "${shared_options} fleurs kathbath indicvoices shrutilipi text_opts speech_llm_config
    langs balance lm_train_text stop_stage" "$@"
[ -z "${speech_llm_config}" ] || system=speech_llm asr_config=${speech_llm_config}
defaults indic
common=(--stop_stage "${stop_stage}" --bpe_train_text "${datadir}/balanced_text" --bpe_normalization nfkc)
count=$(wc -w <<< "${langs}")
if [ "${mini}" = true ]; then
    common+=(--nbpe $((50 * count)) --inference_nj 1)
    data_options="--mini_dir ${datadir}/corpus"
elif [ -n "${fleurs}" ]; then
    common+=(--nbpe "${num_pieces}")
    data_options="--fleurs ${fleurs}"
else
    # shellcheck disable=SC2086
    names=$(printf -- ' -l %s_in' ${langs} | sed 's/ur_in/ur_pk/')
    die "--fleurs is missing: \`pip install datasets; lhotse download fleurs${names} DIR\`, --fleurs DIR/fleurs"
fi
for name in kathbath indicvoices shrutilipi; do data_options+="${!name:+ --${name} ${!name}}"; done
[ "${balance}" = none ] || asr_args+=" --iterator_type category --batch_type catpow
    --upsampling_factor ${balance} --valid_iterator_type sequence --valid_batch_type numel"

data "${data_options} ${text_opts} --langs ${langs}"
[ "${mini}" = false ] || [ -n "${llm}" ] ||
    small_llm "conf/indic/mini/${small_llama}.yaml" $((55 * count)) "${dumpdir}/raw/train/text"
system
if [ "${stop_stage}" -ge 13 ]; then
    python3 -m espnet_llm_plugin.bin.score_languages "${expdir}"/asr_*/decode*/test --units wer cer ger \
        --utt2lang "${dumpdir}/raw/test/utt2lang" --output "${expdir}/languages.md"
fi
