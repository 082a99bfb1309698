"""Chat templates of common model families, written from their documented form, each with that form
in Python: the text of a conversation in pieces, and which of them are the model's own."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import transformers
from conftest import WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Message: TypeAlias = Mapping[str, Any]
Pieces: TypeAlias = list[tuple[str, bool]]  # text, whether the model writes it


@dataclass(frozen=True)
class Family:
    """`system`: whether it takes a system message. `tokens` are special, `bos` and `eos` too."""

    jinja: str
    pieces: Callable[[Sequence[Message]], Pieces]
    bos: str
    eos: str
    tokens: tuple[str, ...] = ()
    system: bool = True


def tokenizer_of(family: Family) -> Any:
    """Byte-level BPE with the family's special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment, unused-ignore]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment, unused-ignore]
    special = list(dict.fromkeys([*filter(None, (family.bos, family.eos)), *family.tokens]))
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 64,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([WORDS], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.bos or None,
        eos_token=family.eos,
        extra_special_tokens=list(family.tokens),
    )
    tokenizer.chat_template = family.jinja
    return tokenizer


def headed(
    before: str, header: str, close: str, after: str = "", trim: bool = False
) -> Callable[[Sequence[Message]], Pieces]:
    """`header` with the role in it, the content, `close` and `after`."""

    def pieces(messages: Sequence[Message]) -> Pieces:
        made: Pieces = [(before, False)]
        for message in messages:
            answer, content = message["role"] == "assistant", message["content"]
            made.append((header.format(message["role"]), False))
            made.append(((content.strip() if trim else content) + close, answer))
            made.append((after, False))
        return made

    return pieces


# ---------------------------------------------------------------- one header for each role

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

MARKED = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- message.content + '<|im_end|>' }}
{%- endif %}{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}"""
LLAMA_3_PROMPT = "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
LLAMA_3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
LLAMA_3_PIECES = headed(
    "<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", trim=True
)

PHI_3 = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""

PHI_4 = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

ZEPHYR = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""

GRANITE = """\
{%- for message in messages %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] }}
{{- '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

OLMO_2 = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>\\n' + message['content'] + eos_token }}
{%- if not loop.last %}{{- '\\n' }}{% endif %}
{%- else %}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}
{%- endif %}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""

COMMAND_R = """\
{{- bos_token }}
{%- set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} %}
{%- for message in messages %}
{{- '<|START_OF_TURN_TOKEN|><|' + names[message['role']] + '_TOKEN|>' }}
{{- message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""
COMMAND_R_ROLES = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"}


def olmo_2(messages: Sequence[Message]) -> Pieces:
    made: Pieces = [("<|endoftext|>", False)]
    for index, message in enumerate(messages):
        answer = message["role"] == "assistant"
        made.append((f"<|{message['role']}|>\n", False))
        made.append((message["content"] + "<|endoftext|>" * answer, answer))
        made.append(("\n" if not answer or index + 1 < len(messages) else "", False))
    return made


def command_r(messages: Sequence[Message]) -> Pieces:
    renamed = [{**message, "role": COMMAND_R_ROLES[message["role"]]} for message in messages]
    form = headed("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
    pieces = form([{**m, "content": m["content"].strip()} for m in renamed])
    return [
        (text, index > 0 and pieces[index - 1][0].endswith("<|CHATBOT_TOKEN|>"))
        for index, (text, _) in enumerate(pieces)
    ]


# ---------------------------------------------------------------- the user's turn frames the answer

LLAMA_2 = """\
{%- if messages[0]['role'] == 'system' %}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- set content = (system if loop.first else '') + message['content'] %}
{%- if message['role'] == 'user' %}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""

MISTRAL_V1 = """\
{{- bos_token }}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{- message['content'] + eos_token + ' ' }}
{%- endif %}
{%- endfor %}"""

MISTRAL_V3 = """\
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] + '\\n\\n' %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}
{%- endif %}
{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}
{%- set turns = namespace(count=0) %}
{%- for message in rest %}
{%- if message['role'] == 'user' or (message['role'] == 'assistant' and not message.tool_calls) %}
{%- if (message['role'] == 'user') != (turns.count % 2 == 0) %}
{{- raise_exception('After the optional system message, conversation roles must alternate') }}
{%- endif %}
{%- set turns.count = turns.count + 1 %}
{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- set seen = namespace(users=0) %}
{%- for message in rest %}
{%- if message['role'] == 'user' %}
{%- set seen.users = seen.users + 1 %}
{%- set last = seen.users == asked | length %}
{%- if tools and last %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + (system if last else '') + message['content'] + '[/INST]' }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{{- '{"name": ' + call.function.name | tojson + ', "arguments": ' }}
{{- call.function.arguments | tojson + ', "id": ' + call.id | tojson + '}' }}
{%- if not loop.last %}{{- ', ' }}{% endif %}
{%- endfor %}{{- ']' + eos_token }}
{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
{%- elif message['role'] == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + message['content'] + ', "call_id": ' }}
{{- message.tool_call_id | tojson + '}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""

GEMMA_2 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

GEMMA_3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] + '\\n\\n' %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""


def split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    if messages[0]["role"] == "system":
        return str(messages[0]["content"]), messages[1:]
    return None, messages


def llama_2(messages: Sequence[Message]) -> Pieces:
    system, rest = split_system(messages)
    made: Pieces = []
    for index, message in enumerate(rest):
        content = message["content"]
        if index == 0 and system is not None:
            content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
        answer = message["role"] == "assistant"
        text = f" {content.strip()} </s>" if answer else f"<s>[INST] {content.strip()} [/INST]"
        made.append((text, answer))
    return made


def mistral_v1(messages: Sequence[Message]) -> Pieces:
    made: Pieces = [("<s>", False)]
    for message in messages:
        if message["role"] == "user":
            made.append((f"[INST] {message['content']} [/INST]", False))
        else:
            made += [(f"{message['content']}</s>", True), (" ", False)]
    return made


def mistral_v3(messages: Sequence[Message]) -> Pieces:
    system, rest = split_system(messages)
    last = max(index for index, message in enumerate(rest) if message["role"] == "user")
    made: Pieces = [("<s>", False)]
    for index, message in enumerate(rest):
        if message["role"] == "user":
            before = f"{system}\n\n" if index == last and system is not None else ""
            made.append((f"[INST] {before}{message['content']}[/INST]", False))
        else:
            made.append((f" {message['content']}</s>", True))
    return made


def gemma(messages: Sequence[Message]) -> Pieces:
    system, rest = split_system(messages)
    made: Pieces = [("<bos>", False)]
    for index, message in enumerate(rest):
        answer = message["role"] == "assistant"
        made.append((f"<start_of_turn>{'model' if answer else 'user'}\n", False))
        made.append((f"{system}\n\n" if index == 0 and system is not None else "", False))
        made += [(message["content"].strip() + "<end_of_turn>", answer), ("\n", False)]
    return made


# ---------------------------------------------------------------- thoughts

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN_TOOLS = """\
{{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.' }}
{{- '\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{% endfor %}
{{- '\\n</tools>' }}"""
QWEN_CALLS = """\
{%- for call in message.tool_calls %}
{%- if loop.index0 or message.content %}{{- '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}{% endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}"""
QWEN_RESULTS = """\
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}"""

QWEN_2_5 = f"""\
{{%- set own = messages[0]['role'] == 'system' %}}
{{{{- '<|im_start|>system\\n' + (messages[0]['content'] if own else '{QWEN_SYSTEM}') }}}}
{{%- if tools %}}{QWEN_TOOLS}{{% endif %}}
{{{{- '<|im_end|>\\n' }}}}
{{%- for message in messages %}}
{{%- if message.role == 'tool' %}}{QWEN_RESULTS}
{{%- elif not (message.role == 'system' and loop.first) %}}
{{{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}}}
{{%- if message.tool_calls %}}{QWEN_CALLS}{{% endif %}}
{{{{- '<|im_end|>\\n' }}}}
{{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{% endif %}}"""

QWEN_3 = f"""\
{{%- if tools %}}
{{{{- '<|im_start|>system\\n' }}}}
{{%- if messages[0].role == 'system' %}}{{{{- messages[0].content }}}}{{% endif %}}
{QWEN_TOOLS}{{{{- '<|im_end|>\\n' }}}}
{{%- elif messages[0].role == 'system' %}}
{{{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}}}
{{%- endif %}}
{{%- set ns = namespace(last=0) %}}
{{%- for message in messages %}}
{{%- if message.role == 'user' %}}{{%- set ns.last = loop.index0 %}}{{%- endif %}}
{{%- endfor %}}
{{%- for message in messages %}}
{{%- if message.role == 'tool' %}}{QWEN_RESULTS}
{{%- elif message.role == 'assistant' %}}
{{%- set content = message.content or '' %}}
{{%- set thought = '' %}}
{{%- if message.reasoning_content is string %}}{{%- set thought = message.reasoning_content %}}
{{%- elif '</think>' in content %}}
{{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}}
{{%- set content = content.split('</think>')[-1].lstrip('\\n') %}}
{{%- endif %}}
{{{{- '<|im_start|>assistant\\n' }}}}
{{%- if loop.index0 > ns.last and (loop.last or thought) %}}
{{{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}}}
{{%- else %}}{{{{- content }}}}{{% endif %}}
{{%- if message.tool_calls %}}{QWEN_CALLS}{{% endif %}}
{{{{- '<|im_end|>\\n' }}}}
{{%- elif not (message.role == 'system' and loop.first) %}}
{{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}}}
{{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}
{{%- if enable_thinking is defined and not enable_thinking %}}
{{{{- '<think>\\n\\n</think>\\n\\n' }}}}{{% endif %}}
{{%- endif %}}"""

DEEPSEEK = """\
{{- bos_token }}
{%- for message in messages if message['role'] == 'system' %}{{- message['content'] }}{% endfor %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}
{{- '<｜Assistant｜>' + message['content']CUT + '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>PROMPT' }}{% endif %}"""
DEEPSEEK_V3 = DEEPSEEK.replace("CUT", "").replace("PROMPT", "")
DEEPSEEK_R1 = DEEPSEEK.replace("CUT", ".split('</think>')[-1]").replace("PROMPT", "<think>\\n")
DEEPSEEK_R1_WHOLE = DEEPSEEK.replace("CUT", "").replace("PROMPT", "<think>\\n")


def qwen_2_5(messages: Sequence[Message]) -> Pieces:
    system, rest = split_system(messages)
    first = {"role": "system", "content": QWEN_SYSTEM if system is None else system}
    return chatml([first, *rest])


def qwen_3(messages: Sequence[Message]) -> Pieces:
    made: Pieces = []
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    for index, message in enumerate(messages):
        answer, content = message["role"] == "assistant", message["content"]
        thought = ""
        if answer and "reasoning_content" in message:
            thought = message["reasoning_content"]
        elif answer and "</think>" in content:
            thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
        if answer and index > last and (index + 1 == len(messages) or thought):
            stripped = thought.strip("\n")
            content = f"<think>\n{stripped}\n</think>\n\n" + content.lstrip("\n")
        made.append((f"<|im_start|>{message['role']}\n", False))
        made += [(content + "<|im_end|>", answer), ("\n", False)]
    return made


def deepseek(cut: bool, thinks: bool) -> Callable[[Sequence[Message]], Pieces]:
    """`thinks`: the generation prompt begins a thought."""

    def pieces(messages: Sequence[Message]) -> Pieces:
        system, rest = split_system(messages)
        made: Pieces = [("<｜begin▁of▁sentence｜>", False), (system or "", False)]
        for message in rest:
            content = message["content"]
            if message["role"] == "user":
                made.append((f"<｜User｜>{content}", False))
            else:
                content = content.split("</think>")[-1] if cut else content
                prompted = "<think>\n" if thinks and content.startswith("<think>\n") else ""
                made.append((f"<｜Assistant｜>{prompted}", False))
                made.append((f"{content.removeprefix(prompted)}<｜end▁of▁sentence｜>", True))
        return made

    return pieces


# ---------------------------------------------------------------- dates and tools

LLAMA_3_1 = """\
{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' + system }}
{{- '<|eot_id|>' }}
{%- for message in rest %}
{%- if message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if tools and loop.first %}
{{- 'Given the following functions, please respond with a JSON for a function call.\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
{%- endif %}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{%- else %}{{- message['content'] | trim }}
{%- endif %}{{- '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""


def llama_3_1(messages: Sequence[Message]) -> Pieces:
    system, rest = split_system(messages)
    day = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    first = {"role": "system", "content": "@"}
    pieces = LLAMA_3_PIECES([first, *rest])
    pieces[2] = (f"{day}{(system or '').strip()}<|eot_id|>", False)
    return pieces


def always_headed(messages: Sequence[Message]) -> Pieces:
    return [*LLAMA_3_PIECES(messages), ("<|start_header_id|>assistant<|end_header_id|>\n\n", False)]


def phi_3(messages: Sequence[Message]) -> Pieces:
    return [*headed("", "<|{}|>\n", "<|end|>", "\n")(messages), ("<|endoftext|>", False)]


# ---------------------------------------------------------------- without a token at the end

ALPACA = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{- message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- else %}{{- '### Response:\\n' + message['content'] + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{% endif %}"""


def alpaca(messages: Sequence[Message]) -> Pieces:
    made: Pieces = []
    for message in messages:
        answer = message["role"] == "assistant"
        header = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
        made += [(header[message["role"]], False), (message["content"] + "\n\n", answer)]
    return made


chatml = headed("", "<|im_start|>{}\n", "<|im_end|>", "\n")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|im_start|>", "<|im_end|>", "<|im_sep|>")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PROMPTED = "{%- if add_generation_prompt %}" + LLAMA_3_PROMPT + "{% endif %}"
DEEPSEEK_TOKENS = ("<｜User｜>", "<｜Assistant｜>")
GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>")
COMMAND_R_TOKENS = (
    "<|START_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)
MISTRAL_TOKENS = (
    *("[INST]", "[/INST]", "[TOOL_CALLS]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
granite = headed("", "<|start_of_role|>{}<|end_of_role|>", "<|end_of_text|>", "\n")
GRANITE_TOKENS = ("<|start_of_role|>", "<|end_of_role|>")
LLAMA_3_BOS, LLAMA_3_EOS = "<|begin_of_text|>", "<|end_of_text|>"

FAMILIES = {
    "Llama 2": Family(LLAMA_2, llama_2, "<s>", "</s>"),
    "Llama 3": Family(LLAMA_3 + PROMPTED, LLAMA_3_PIECES, LLAMA_3_BOS, LLAMA_3_EOS, LLAMA_3_TOKENS),
    "Llama 3, early copies": Family(
        LLAMA_3 + LLAMA_3_PROMPT, always_headed, LLAMA_3_BOS, LLAMA_3_EOS, LLAMA_3_TOKENS
    ),
    "Llama 3.1": Family(LLAMA_3_1, llama_3_1, LLAMA_3_BOS, "<|eot_id|>", LLAMA_3_TOKENS),
    "Mistral v1": Family(MISTRAL_V1, mistral_v1, "<s>", "</s>", system=False),
    "Mistral v3": Family(MISTRAL_V3, mistral_v3, "<s>", "</s>", MISTRAL_TOKENS),
    "Qwen 2.5": Family(QWEN_2_5, qwen_2_5, "", "<|im_end|>", CHATML_TOKENS),
    "Qwen 3": Family(QWEN_3, qwen_3, "", "<|im_end|>", CHATML_TOKENS),
    "Gemma 2": Family(GEMMA_2, gemma, "<bos>", "<eos>", GEMMA_TOKENS, system=False),
    "Gemma 3": Family(GEMMA_3, gemma, "<bos>", "<eos>", GEMMA_TOKENS),
    "Phi-3": Family(PHI_3, phi_3, "<s>", "<|endoftext|>", ROLE_TOKENS),
    "Phi-4": Family(
        PHI_4, headed("", "<|im_start|>{}<|im_sep|>", "<|im_end|>"), "", "<|im_end|>", HEADERS
    ),
    "DeepSeek R1": Family(DEEPSEEK_R1, deepseek(True, True), BEGIN, END, DEEPSEEK_TOKENS),
    "DeepSeek R1, thoughts kept": Family(
        DEEPSEEK_R1_WHOLE, deepseek(False, True), BEGIN, END, DEEPSEEK_TOKENS
    ),
    "DeepSeek V3": Family(DEEPSEEK_V3, deepseek(False, False), BEGIN, END, DEEPSEEK_TOKENS),
    "ChatML": Family(CHATML, chatml, "", "<|im_end|>", CHATML_TOKENS),
    "ChatML with marks": Family(MARKED, chatml, "", "<|im_end|>", CHATML_TOKENS),
    "Zephyr": Family(ZEPHYR, headed("", "<|{}|>\n", "</s>", "\n"), "<s>", "</s>"),
    "Granite 3": Family(GRANITE, granite, "<|end_of_text|>", "<|end_of_text|>", GRANITE_TOKENS),
    "OLMo 2": Family(OLMO_2, olmo_2, "<|endoftext|>", "<|endoftext|>"),
    "Command-R": Family(
        COMMAND_R, command_r, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", COMMAND_R_TOKENS
    ),
    "Alpaca": Family(ALPACA, alpaca, "<s>", "</s>"),
}


def call(name: str, **arguments: object) -> Mapping[str, Any]:
    """A tool call of an OpenAI message; arguments as JSON text, as that format has them."""
    text = json.dumps(arguments)
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": text}}
