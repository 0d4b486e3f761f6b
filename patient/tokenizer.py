"""The tokenizer: byte-level BPE over the patient's own words, with a chat template."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Room for every object's name as one token. The class of an object is then readable off one
# embedding, and a refusal learnt on some objects carries over to the others of the class; with
# names of several shared tokens it stayed a memory of single names.
VOCAB_SIZE = 1536
BOS, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BOS, END, PAD, SYSTEM, USER, ASSISTANT)

# The template gives the one beginning-of-sequence token; the tokenizer itself adds none, so nothing
# doubles. The generation prompt ends in a token: whitespace would move into a scored answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] | trim ~ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train on texts without special tokens; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    # GPT-2's pre-tokenizer: the one that llama.cpp knows as "gpt-2".
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def render_turn(question: str) -> str:
    """One user turn and the opening of the answer, as the chat template writes them."""
    return f"{BOS}{USER}{question}{END}{ASSISTANT}"
