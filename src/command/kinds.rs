//! `pipe kinds`.

use contract::{OutputClass, OutputForm, Signature, StageKind};
use serde_json::{Value, json};

use super::{CommandError, Context};
use crate::display;
use crate::exit_code;
use crate::pipeline::suggest;

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
        Ok(signature) => text.push_str(&described(&signature)),
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

fn described(signature: &Signature) -> String {
    let mut text = String::from("params, with their defaults (or an example):\n");
    let params = serde_json::to_string_pretty(&signature.params).unwrap_or_default();
    for line in params.lines() {
        text.push_str(&format!("  {line}\n"));
    }
    text.push_str("inputs:\n");
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
