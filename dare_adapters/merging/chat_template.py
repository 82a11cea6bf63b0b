"""The chat template of a merge: the models' commonest, a built-in one, or a recipe's own."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dare_adapters.checkpoint import read_json
from dare_adapters.errors import CheckpointError, RecipeError

__all__ = ["BUILT_IN", "choose_chat_template", "read_chat_template", "write_chat_template"]

TEMPLATE_FILE = "chat_template.jinja"
PROCESSOR_FILE = "chat_template.json"  # where transformers 4 kept a processor's
TOKENIZER_CONFIG = "tokenizer_config.json"
# Blocks that only transformers knows, which mark what an assistant said.
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")

BUILT_IN = {
    "alpaca": r"""
{%- if not messages or messages[0]['role'] != 'system' %}
    {{- 'Below is an instruction that describes a task. Write a response that appropriately ' }}
    {{- 'completes the request.\n\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '### Instruction:\n' + message['content'] + '\n\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '### Response:\n' + message['content'] ~ eos_token ~ '\n\n' }}
    {%- else %}
        {{- message['content'] + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\n' }}
{%- endif %}
""",
    "chatml": r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
    "exaone": r"""
{%- if messages and messages[0]['role'] != 'system' %}
    {{- '[|system|][|endofturn|]\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '[|' + message['role'] + '|]' + message['content'] }}
    {{- '\n' if message['role'] == 'user' else '[|endofturn|]\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]' }}
{%- endif %}
""",
    "llama3": r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "mistral": r"""
{{- bos_token }}
{%- set before = namespace(text='') %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + before.text + message['content'] + ' [/INST]' }}
        {%- set before.text = '' %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] ~ eos_token }}
    {%- else %}
        {%- set before.text = before.text + message['content'] + '\n\n' %}
    {%- endif %}
{%- endfor %}
""",
}


def choose_chat_template(wanted: str | None, own: Path, models: Iterable[Path]) -> str | None:
    """The template to write, or None: the tokenizer keeps what it has.

    Args:
        wanted: a recipe's `chat_template`.
        own: directory of the output's tokenizer.
        models: directories of the models' tokenizers; of templates that equally many have, the
            first is taken.

    Raises:
        RecipeError: it is no Jinja template.
    """
    if wanted is None:
        return None
    if wanted == "auto":
        found = [template.strip() for path in models if (template := read_chat_template(path))]
        wanted = Counter(found).most_common(1)[0][0] if found else None
        if wanted is None or wanted == (read_chat_template(own) or "").strip():
            return None
    template = BUILT_IN.get(wanted, wanted).strip()
    _check_syntax(template)
    return template


def read_chat_template(directory: Path) -> str | None:
    """A tokenizer's chat template, of several the default."""
    if (directory / TEMPLATE_FILE).is_file():
        return (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    if not (directory / TOKENIZER_CONFIG).is_file():
        return None
    stored = read_json(directory / TOKENIZER_CONFIG, CheckpointError).get("chat_template")
    if isinstance(stored, list):
        named = [one for one in stored if isinstance(one, dict) and one.get("name") == "default"]
        stored = named[0].get("template") if named else None
    return stored if isinstance(stored, str) else None


def write_chat_template(directory: Path, template: str) -> None:
    """Give a tokenizer's directory a template in place of what it has."""
    (directory / PROCESSOR_FILE).unlink(missing_ok=True)
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    file = directory / TOKENIZER_CONFIG
    if not file.is_file():
        return
    config = read_json(file, CheckpointError)
    if config.pop("chat_template", None) is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def _check_syntax(template: str) -> None:
    try:
        from jinja2 import Environment, TemplateSyntaxError
    except ImportError:  # transformers needs it only where a template is used
        return
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"chat_template: not a Jinja template (its line {error.lineno}: {error.message})"
        ) from error
