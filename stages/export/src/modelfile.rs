//! The `Modelfile` from which Ollama imports the export (`ollama create NAME -f Modelfile`).
//!
//! Ollama renders prompts with a template of its own, in Go's language. For ChatML models it is
//! written here, tools in the layout of Qwen2.5's template, which is the one that `pipe` trains on;
//! what Ollama puts between the braces of a tool differs in blanks from Python's JSON.

use std::path::Path;

use checkpoint::{ChatTemplate, ModelFolder};
use contract::StageError;

use crate::{gguf, out};

/// System text where tools are on offer and the model's template has no words for them.
const SYSTEM: &str = "You are a helpful assistant.";

/// Writes `Modelfile` into `folder`.
///
/// # Errors
/// What the disk says.
pub(crate) fn write(model: &ModelFolder, is_gguf: bool, folder: &Path) -> Result<(), StageError> {
    let from = if is_gguf { format!("./{}", gguf::FILE) } else { ".".to_owned() };
    let text = modelfile(&from, model.chat_template().ok().as_ref());
    out::bytes(folder, "Modelfile", text.as_bytes())
}

fn modelfile(from: &str, template: Option<&ChatTemplate>) -> String {
    let head = format!("FROM {from}\n# Greedy, as it was evaluated.\nPARAMETER temperature 0\n");
    match template {
        Some(template) if is_chatml(&template.source) => {
            let go = chatml(&template.source);
            format!("{head}PARAMETER stop \"<|im_end|>\"\nTEMPLATE \"\"\"{go}\"\"\"\n")
        }
        Some(template) if !template.eos_token.contains('"') && !template.eos_token.is_empty() => {
            let eos = &template.eos_token;
            format!("{head}PARAMETER stop \"{eos}\"\n")
        }
        _ => head,
    }
}

fn is_chatml(source: &str) -> bool {
    source.contains("<|im_start|>") && source.contains("<|im_end|>")
}

/// The template of a ChatML model in Ollama's language.
fn chatml(source: &str) -> String {
    let default = default_system(source);
    let with_tools = default.filter(|_| source.contains("tools")).unwrap_or(SYSTEM);
    let without =
        default.map(|text| format!("<|im_start|>system\n{text}<|im_end|>\n")).unwrap_or_default();
    format!(
        "{{{{- if or .System .Tools }}}}<|im_start|>system\n\
         {{{{ if .System }}}}{{{{ .System }}}}{{{{ else }}}}{with_tools}{{{{ end }}}}\
         {{{{- if .Tools }}}}\n\n# Tools\n\n\
         You may call one or more functions to assist with the user query.\n\n\
         You are provided with function signatures within <tools></tools> XML tags:\n\
         <tools>{{{{ range .Tools }}}}\n\
         {{\"type\": \"function\", \"function\": {{{{ .Function }}}}}}{{{{ end }}}}\n\
         </tools>\n\n\
         For each function call, return a json object with function name and arguments within \
         <tool_call></tool_call> XML tags:\n<tool_call>\n\
         {{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>\
         {{{{ end }}}}<|im_end|>\n\
         {{{{ else }}}}{without}{{{{ end }}}}{LOOP}"
    )
}

/// Turns of user, assistant and tools, then the beginning of the answer.
const LOOP: &str = r#"{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{- if .Content }}
{{ .Content }}
{{- end }}
{{- range .ToolCalls }}
<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>
{{- end }}
{{- if not $last }}<|im_end|>
{{ end }}
{{- else if eq .Role "tool" }}<|im_start|>user
<tool_response>
{{ .Content }}
</tool_response><|im_end|>
{{ end }}
{{- if and (ne .Role "assistant") $last }}<|im_start|>assistant
{{ end }}
{{- end }}"#;

/// The system text that a Jinja template writes where a conversation has none: what stands between
/// the marks inside one of its strings, where a line may end in `\\n` or in itself.
fn default_system(source: &str) -> Option<&str> {
    let strings = source.split("<|im_start|>system").skip(1);
    let lines = strings.filter_map(|s| s.strip_prefix("\\n").or_else(|| s.strip_prefix('\n')));
    let plain = |text: &&str| !text.is_empty() && !text.contains(['\'', '"', '{', '}', '\\', '\n']);
    lines.filter_map(|rest| rest.split("<|im_end|>").next()).find(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str, eos: &str) -> ChatTemplate {
        ChatTemplate {
            origin: String::new(),
            source: source.to_owned(),
            tool_source: None,
            bos_token: String::new(),
            eos_token: eos.to_owned(),
        }
    }

    const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and \
        messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant \
        named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + \
        message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}";

    #[test]
    fn chatml_models_keep_their_default_system_text() {
        let text = modelfile("./model.gguf", Some(&template(SMOLLM2, "<|im_end|>")));
        assert!(text.starts_with("FROM ./model.gguf\n"), "{text}");
        let own = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by \
            Hugging Face<|im_end|>\n";
        assert!(text.contains(&format!("{{{{ else }}}}{own}{{{{ end }}}}")), "{text}");
        assert!(text.contains("{{ else }}You are a helpful assistant.{{ end }}"), "{text}");
        let unescaped = SMOLLM2.replace("\\n", "\n");
        assert_eq!(modelfile("./model.gguf", Some(&template(&unescaped, "<|im_end|>"))), text);
        assert!(text.contains("PARAMETER stop \"<|im_end|>\""), "{text}");
        let (opened, closed) = (text.matches("{{").count(), text.matches("}}").count());
        assert_eq!(opened, closed, "{text}");
    }

    #[test]
    fn other_models_get_their_end_mark_alone() {
        let text = modelfile(".", Some(&template("{{ messages }}", "</s>")));
        let head = "FROM .\n# Greedy, as it was evaluated.\nPARAMETER temperature 0\n";
        assert_eq!(text, format!("{head}PARAMETER stop \"</s>\"\n"));
        assert_eq!(modelfile(".", None), head);
    }
}
