#![allow(clippy::unwrap_used, reason = "tests")]

use checkpoint::ChatTemplate;

use super::*;

/// ChatML with a default system message, as SmolLM2's template has it.
const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nDefault<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + \
message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// No system role, strict alternation, begin mark: what Gemma-2's template insists on.
const STRICT: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) \
+ '\n' + m.content | trim + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}";

/// Renders tools and calls by itself.
const NATIVE: &str = "{%- if tools %}TOOLS{% for t in tools %} {{ t | tojson }}{% endfor %}\n{% endif -%}\
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}\
CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}[/]\n{% endfor -%}\
{%- if add_generation_prompt %}[assistant]{% endif %}";

fn template(source: &str) -> ChatTemplate {
    ChatTemplate {
        origin: "test.jinja".into(),
        source: source.into(),
        tool_source: None,
        bos_token: "<bos>".into(),
        eos_token: "<eos>".into(),
    }
}

fn dialect(source: &str) -> Dialect {
    Dialect::new(&template(source), ToolFormat::Auto, None).unwrap()
}

fn row() -> Row {
    serde_json::from_value(json!({
        "id": "r1", "index": 0,
        "tools": [{"type": "function", "function": {"name": "area", "parameters": {"a": 1.5}}}],
        "messages": [
            {"role": "user", "content": "How large?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "area", "arguments": {"w": 2, "unit": "m²"}}}]},
            {"role": "tool", "content": "{\"area\": 4}"},
            {"role": "assistant", "content": "4 m²."}]
    }))
    .unwrap()
}

const OFFER: &str = "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\
You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n\
{\"type\": \"function\", \"function\": {\"name\": \"area\", \"parameters\": {\"a\": 1.5}}}\n</tools>\n\n\
For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n\
<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>";

#[test]
fn chatml_without_tools_gets_the_hermes_layout() {
    let text = render(&dialect(CHATML), &row()).unwrap().text;
    let expected = format!(
        "<|im_start|>system\nYou are a helpful assistant.{OFFER}<|im_end|>\n\
         <|im_start|>user\nHow large?<|im_end|>\n\
         <|im_start|>assistant\n<tool_call>\n{{\"name\": \"area\", \"arguments\": {{\"w\": 2, \"unit\": \"m²\"}}}}\n</tool_call><|im_end|>\n\
         <|im_start|>user\n<tool_response>\n{{\"area\": 4}}\n</tool_response><|im_end|>\n\
         <|im_start|>assistant\n4 m².<|im_end|>\n"
    );
    assert_eq!(text, expected);
}

#[test]
fn strict_template_gets_the_tools_in_the_first_user_turn() {
    let dialect = dialect(STRICT);
    assert_eq!((dialect.name(), dialect.end_mark()), ("hermes in the first user message", "<end>"));
    let text = render(&dialect, &row()).unwrap().text;
    let start = format!(
        "<bos><turn>user\nYou are a helpful assistant.{OFFER}\n\nHow large?<end>\n<turn>model\n<tool_call>"
    );
    assert!(text.starts_with(&start), "{text}");
}

#[test]
fn native_template_renders_tools_itself() {
    let dialect = dialect(NATIVE);
    assert_eq!(dialect.name(), "native");
    let text = render(&dialect, &row()).unwrap().text;
    assert!(text.contains("CALL area {\"w\": 2, \"unit\": \"m²\"}[/]"), "{text}");
}

#[test]
fn response_spans_are_what_the_model_says_with_its_end_mark() {
    for (source, first) in [
        (
            CHATML,
            "<tool_call>\n{\"name\": \"area\", \"arguments\": {\"w\": 2, \"unit\": \"m²\"}}\n</tool_call><|im_end|>\n",
        ),
        (NATIVE, "CALL area {\"w\": 2, \"unit\": \"m²\"}[/]\n"),
    ] {
        let row = render(&dialect(source), &row()).unwrap();
        let said: Vec<&str> = row.response_spans.iter().map(|[a, b]| &row.text[*a..*b]).collect();
        assert_eq!(said[0], first);
        assert!(said[1].starts_with("4 m²."));
    }
}

#[test]
fn prompts_are_the_assistant_turns_that_answer_a_user() {
    let dialect = dialect(CHATML);
    let prompts = prompts(&dialect, &[row()], Turns::All).unwrap();
    assert_eq!(prompts.len(), 1);
    let expected = prompts[0].expected.as_ref().unwrap();
    assert_eq!(expected.calls[0].arguments["w"], json!([2]));
    assert!(prompts[0].text.ends_with("How large?<|im_end|>\n<|im_start|>assistant\n"));
    assert_eq!((prompts[0].class(), prompts[0].end_mark.as_str()), (Some("call"), "<|im_end|>"));
}

#[test]
fn template_errors_name_line_and_row() {
    let endless = "{{ messages[0].content }}{% if messages | length > 1 %}{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}{% endif %}";
    let error = Dialect::new(&template(endless), ToolFormat::Auto, None).err().unwrap();
    assert!(error.contains("more work"), "{error}");
    let broken = Dialect::new(&template("a\n{% if %}"), ToolFormat::Auto, None).err().unwrap();
    assert!(broken.starts_with("chat template test.jinja:2: "), "{broken}");
    let raising = STRICT.replace("'model' if", "raise_exception('no assistants') if");
    assert!(
        Dialect::new(&template(&raising), ToolFormat::Auto, None)
            .err()
            .unwrap()
            .contains("no assistants")
    );
    let file = "{% include 'secret' %}";
    assert!(Dialect::new(&template(file), ToolFormat::Auto, None).is_err());
}

#[test]
fn generation_tags_render_nothing() {
    let tagged = CHATML
        .replace("{{'<|im_start|>'", "{%- generation -%}{{'<|im_start|>'")
        .replace("{% endfor %}", "{% endgeneration %}{% endfor %}");
    let plain = render(&dialect(CHATML), &row()).unwrap();
    assert_eq!(render(&dialect(&tagged), &row()).unwrap().text, plain.text);
}
