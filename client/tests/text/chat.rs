//! Chat templates: those of real models, and hostile ones.

use outrigger::text::{ChatTemplate, Message, TextError};

use crate::gguf::Keys;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, "<s>", "</s>").expect("a template that parses")
}

fn talk() -> [Message; 4] {
    [
        Message::new("system", "Be brief."),
        Message::new("user", "Hi"),
        Message::new("assistant", "<think>\nhm\n</think>\n\nHello <b>"),
        Message::new("user", "Bye"),
    ]
}

/// As in Qwen2-MoE's `tokenizer_config.json`: a system message of its own where there is none.
const QWEN2: &str = "{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// The constructs of Qwen3's: namespace, reversed messages, Python's string methods, white space
/// control, variables that are not given.
const QWEN3: &str = r#"
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and message.content is string and not message.content.startswith('<tool>') %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content and loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"#;

/// As in Mixtral's: no system message, strictly in turns.
const MIXTRAL: &str = "{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}";

#[test]
fn chatml_where_the_file_has_no_template() {
    let chat = ChatTemplate::from_gguf(&Keys::default().metadata()).expect("a default");
    assert_eq!(
        chat.render(&talk()[..2], true).expect("rendered"),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        chat.render(&talk()[1..2], false).expect("rendered"),
        "<|im_start|>user\nHi<|im_end|>\n"
    );
}

#[test]
fn qwen2() {
    assert_eq!(
        template(QWEN2).render(&talk()[1..2], true).expect("rendered"),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
         <|im_start|>assistant\n"
    );
}

#[test]
fn qwen3() {
    assert_eq!(
        template(QWEN3).render(&talk(), true).expect("rendered"),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
         <|im_start|>assistant\nHello <b><|im_end|>\n<|im_start|>user\nBye<|im_end|>\n\
         <|im_start|>assistant\n"
    );
}

#[test]
fn mixtral_with_the_files_own_tokens() {
    let keys = Keys::default()
        .str("tokenizer.chat_template", MIXTRAL)
        .strings("tokenizer.ggml.tokens", &["a", "<BOS>", "<EOS>"])
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2);
    let chat = ChatTemplate::from_gguf(&keys.metadata()).expect("a template");
    assert_eq!(
        chat.render(&talk()[1..], true).expect("rendered"),
        "<BOS>[INST] Hi [/INST]<think>\nhm\n</think>\n\nHello <b><EOS>[INST] Bye [/INST]"
    );
    let error = chat.render(&talk(), true).expect_err("a system message");
    let TextError::Template(cause) = &error else { panic!("{error:?}") };
    assert!(cause.to_string().contains("roles must alternate"), "{cause}");
    let keys = keys.u32("tokenizer.ggml.eos_token_id", 3);
    let error = ChatTemplate::from_gguf(&keys.metadata()).expect_err("no such token");
    assert!(error.to_string().contains("tokenizer.ggml.eos_token_id"), "{error}");
}

#[test]
fn blocks_take_their_line_with_them() {
    // Jinja's `trim_blocks` and `lstrip_blocks`, which Hugging Face sets.
    let chat = template(
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    );
    assert_eq!(chat.render(&talk()[1..2], true).expect("rendered"), "Hi\n");
}

#[test]
fn hostile_templates_end() {
    let error = |source: &str| template(source).render(&talk(), true).expect_err("refused");
    let fuel = |source: &str| match error(source) {
        TextError::Template(cause) => {
            let cause: &minijinja::Error = cause.downcast_ref().expect("the template engine's");
            assert_eq!(cause.kind(), minijinja::ErrorKind::OutOfFuel, "{cause}");
        }
        other => panic!("{other:?}"),
    };
    fuel("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}");
    fuel(
        "{% set ns = namespace(x=0) %}{% for a in range(99999) %}{% for b in range(9) %}{% set ns.x = 1 %}{% endfor %}{% endfor %}",
    );
    let endless = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    assert!(matches!(error(endless), TextError::Template(_)));
    // 2^30 times 1 KiB, ten doublings deep at a time.
    let doubling = "{% macro x(n) %}{% if n %}{{ x(n - 1) }}{{ x(n - 1) }}{% else %}{{ 'x' * 1024 }}{% endif %}{% endmacro %}{{ x(30) }}";
    assert!(matches!(error(doubling), TextError::Template(_) | TextError::TemplateTooLong { .. }));
    let long = "{% for a in range(9999) %}{{ 'x' * 1024 }}{% endfor %}";
    assert!(matches!(error(long), TextError::TemplateTooLong { .. }), "{:?}", error(long));
    let huge = "{{ 'x' * 99999999 }}";
    assert!(matches!(error(huge), TextError::TemplateTooLong { .. }), "{:?}", error(huge));
}

#[test]
fn a_template_that_does_not_parse_is_an_error_on_loading() {
    let keys = Keys::default().str("tokenizer.chat_template", "{% for %}");
    let error = ChatTemplate::from_gguf(&keys.metadata()).expect_err("refused");
    assert!(
        matches!(&error, TextError::Template(_)) && error.to_string().contains("chat_template")
    );
}

#[test]
fn many_messages_have_the_fuel_they_need() {
    let messages =
        vec![[Message::new("user", "Hi"), Message::new("assistant", "Hello")]; 2000].concat();
    let prompt = template(QWEN3).render(&messages, true).expect("rendered");
    assert_eq!(prompt.matches("<|im_start|>").count(), 4001);
}

/// What a fuzzer found: the template engine indexes an empty list.
#[test]
fn a_template_that_makes_the_engine_panic_is_an_error() {
    let error = template("{{ messages[:0][::-5] }}").render(&talk(), true).expect_err("no prompt");
    let TextError::Template(cause) = &error else { panic!("{error:?}") };
    assert!(cause.to_string().contains("the template engine panicked"), "{cause}");
}
