"""Chat templates of the kinds that are met, and tiny models whose tokenizer has one."""

from __future__ import annotations

from dataclasses import replace

from cases import build_lm
from emendo.models.lm import LM

TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
BEGUN = "{{ bos_token }}" + TURNS.replace("m['content']", "m['content'] | trim").replace("\n", "\n\n")
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] }} [/Q]"
    "{% else %} {{ m['content'] }} <|end|>{% endif %}{% endfor %}"
)
THINKING = TURNS.replace("<assistant>\n{% endif %}", "<assistant>\n<think>\n{% endif %}")

TEMPLATES = {"turns": TURNS, "begun": BEGUN, "spaced": SPACED, "thinking": THINKING}
"""Nothing before the turns (Qwen's kind); a first token of its own (Llama 3's); the answer behind a space (Llama 2's);
a generation prompt that no finished conversation holds (DeepSeek-R1's)."""


def chat_lm(template: str = TURNS, kind: str = "llama", *, bos: bool = False, seed: int = 0) -> LM:
    """A tiny decoder that reads every prompt in a chat template; with `bos` its tokenizer adds a first token itself."""
    lm = build_lm(kind, bos=bos, seed=seed)
    lm.tokenizer.chat_template = template
    return replace(lm, chat=True)
