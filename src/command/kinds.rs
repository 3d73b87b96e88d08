//! `pipe kinds`.

use contract::{OutputClass, OutputForm, Signature, StageKind};
use serde_json::{Value, json};

use super::{CommandError, Context};
use crate::display;
use crate::exit_code;
use crate::pipeline::suggest;

/// Column in which comments on params begin.
const COMMENTS: usize = 36;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Kind
    kind: Option<String>,
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let Some(name) = &args.kind else {
        let width = context.kinds.names().map(str::len).max().unwrap_or(0);
        let line = |k: &&dyn StageKind| format!("{:width$}  {}", k.name(), k.summary());
        display::out(&context.kinds.0.iter().map(line).collect::<Vec<_>>().join("\n"));
        return Ok(exit_code::OK);
    };
    let Some(kind) = context.kinds.get(name) else {
        let help = suggest(name, context.kinds.names());
        return Err(CommandError::Usage { message: format!("no stage kind `{name}`"), help });
    };
    let resolved = kind.resolve(&Value::Null).or_else(|_| kind.resolve(&example(kind.name())));
    let mut text = format!("{}: {} (version {})\n", kind.name(), kind.summary(), kind.version());
    match resolved {
        Ok(signature) => {
            text.push_str("params:\n");
            written(&kind.params_schema(), 1, &mut text);
            text.push_str(&described(&signature));
        }
        Err(error) => text.push_str(&format!("its params have no complete defaults: {error}\n")),
    }
    display::out(&text);
    Ok(exit_code::OK)
}

/// Params for kinds that cannot do without some.
pub(super) fn example(kind: &str) -> Value {
    match kind {
        "download" => json!({"source": {"path": "data"}}),
        "subsample" => json!({"format": "chat-jsonl", "train": [0, 100], "test": [100, 120]}),
        "select" => json!({"metric": "strict_accuracy.value"}),
        "command" => json!({"run": "…", "outputs": {"result": {"file": "result.txt"}}}),
        _ => Value::Null,
    }
}

/// Params as they may be written, with their defaults and a comment each.
fn written(schema: &Value, depth: usize, text: &mut String) {
    let needed =
        |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|n| n == name));
    for (name, param) in schema["properties"].as_object().into_iter().flatten() {
        let inner = param["properties"].is_object();
        let value = match &param["default"] {
            _ if inner => String::new(),
            Value::Null if needed(name) => " …".to_owned(),
            default => format!(" {}", flow(default)),
        };
        let mut said: Vec<String> = Vec::new();
        said.extend(needed(name).then(|| "needed".to_owned()));
        said.extend(param["description"].as_str().map(|d| d.trim_end_matches('.').to_owned()));
        said.extend(choices(param));
        let line = format!("{}{name}:{value}", "  ".repeat(depth));
        text.push_str(format!("{line:COMMENTS$}  # {}", said.join("; ")).trim_end_matches(" #"));
        text.push('\n');
        if inner {
            written(param, depth + 1, text);
        }
    }
}

/// A value in one line of YAML.
fn flow(value: &Value) -> String {
    match value {
        Value::String(text) if !text.is_empty() && !text.contains([':', '#', ' ']) => text.clone(),
        Value::Array(items) => {
            format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

/// Which values a param may have, where they are few.
fn choices(param: &Value) -> Option<String> {
    let cases = param["oneOf"].as_array().or(param["anyOf"].as_array())?;
    let all: Vec<&str> = cases.iter().filter_map(|case| case["const"].as_str()).collect();
    (!all.is_empty()).then(|| all.join(" | "))
}

fn described(signature: &Signature) -> String {
    let mut text = String::from("inputs:\n");
    for input in &signature.inputs {
        let need = if input.required { "" } else { " (optional)" };
        text.push_str(&format!("  {}{need}: {}\n", input.name, input.help));
    }
    if signature.free_inputs {
        text.push_str("  any name\n");
    }
    text.push_str("outputs:\n");
    for output in &signature.outputs {
        let form = match output.form {
            OutputForm::File => "file",
            OutputForm::Tree => "folder",
        };
        let class = match output.class {
            OutputClass::Artifact => "",
            OutputClass::Telemetry => ", telemetry",
        };
        let need = if output.optional { ", optional" } else { "" };
        text.push_str(&format!("  {}: {form} `{}`{class}{need}\n", output.name, output.file_name));
    }
    text
}
