//! A chat template compiled the way transformers compiles it: trimmed blocks, Python methods,
//! `tojson`, `raise_exception`. Sandboxed: no files, no other templates, bounded work.

use checkpoint::ChatTemplate;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value, context};
use serde_json::Value as Json;

use crate::python_json::dumps;

/// Instructions that one rendering may take; a long conversation takes thousands.
const FUEL: u64 = 5_000_000;
/// What `strftime_now` says, so that the same rows give the same text on any day: the date that
/// Llama's templates fall back to.
const TODAY: (&str, &str, &str, &str) = ("2024", "07", "Jul", "26");

/// A compiled template.
pub(crate) struct Jinja {
    environment: Environment<'static>,
    origin: String,
    has_tool_template: bool,
    bos_token: String,
    eos_token: String,
}

impl Jinja {
    /// Compiles a model's template.
    ///
    /// # Errors
    /// Place and fault of a syntax error.
    pub(crate) fn new(template: &ChatTemplate) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = minijinja::syntax::SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|e| e.to_string())?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        let jinja = |e: Error| described(&template.origin, &e);
        environment
            .add_template_owned("chat", without_generation_tags(&template.source))
            .map_err(jinja)?;
        if let Some(source) = &template.tool_source {
            environment
                .add_template_owned("tools", without_generation_tags(source))
                .map_err(jinja)?;
        }
        Ok(Self {
            environment,
            origin: template.origin.clone(),
            has_tool_template: template.tool_source.is_some(),
            bos_token: template.bos_token.clone(),
            eos_token: template.eos_token.clone(),
        })
    }

    /// Renders messages; `generate` adds what the model's next turn begins with.
    ///
    /// # Errors
    /// Place and fault: what the template raised, or the limit of work.
    pub(crate) fn render(
        &self,
        messages: &[Json],
        tools: &[Json],
        generate: bool,
    ) -> Result<String, String> {
        let name = if self.has_tool_template && !tools.is_empty() { "tools" } else { "chat" };
        let jinja = |e: Error| described(&self.origin, &e);
        let template = self.environment.get_template(name).map_err(jinja)?;
        let tools = if tools.is_empty() { Value::from(()) } else { Value::from(Serde(tools)) };
        template
            .render(context! {
                messages => Value::from(Serde(messages)),
                tools,
                add_generation_prompt => generate,
                bos_token => self.bos_token.as_str(),
                eos_token => self.eos_token.as_str(),
            })
            .map_err(jinja)
    }
}

fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    // Accepted for Jinja's sake; text is never escaped to ASCII here, as in transformers.
    let _ = options.get::<Option<bool>>("ensure_ascii")?;
    options.assert_all_used()?;
    let value = serde_json::to_value(&value)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from(dumps(&value, indent)))
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: String) -> String {
    let (year, month, name, day) = TODAY;
    let long = if name == "Jul" { "July" } else { name };
    format
        .replace("%Y", year)
        .replace("%m", month)
        .replace("%b", name)
        .replace("%B", long)
        .replace("%d", day)
}

/// `{% generation %}` marks the assistant's text for trainers; it renders nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let Some(end) = rest[at..].find("%}").map(|e| at + e + 2) else { break };
        let tag = &rest[at..end];
        out.push_str(&rest[..at]);
        // Keeps the tag's white space control.
        match tag.trim_matches(|c: char| "{}%-+ \n\t".contains(c)) {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

fn described(origin: &str, error: &Error) -> String {
    let line = error.line().map_or_else(String::new, |l| format!(":{l}"));
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let detail = if error.kind() == ErrorKind::OutOfFuel {
        "the template does more work than a conversation can need".to_owned()
    } else {
        detail
    };
    format!("chat template {origin}{line}: {detail}")
}
