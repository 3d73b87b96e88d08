//! How tools reach a model: through its own template, or as text in the Hermes layout that
//! Qwen2.5's template writes, for templates that know no tools or no system role.

use checkpoint::ChatTemplate;
use data::{Message, Role, Tool, ToolCall};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::jinja::Jinja;
use crate::python_json::dumps;

/// Which layout to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ToolFormat {
    /// `native` where the template renders tools, else `hermes`.
    #[default]
    Auto,
    /// The model's own template renders tools and calls.
    Native,
    /// `<tools>`, `<tool_call>` and `<tool_response>` as text.
    Hermes,
}

/// System text where tools are on offer and the row has none of its own.
const SYSTEM: &str = "You are a helpful assistant.";

/// A template together with the layout that rows are rendered in.
pub(crate) struct Dialect {
    jinja: Jinja,
    hermes: bool,
    system_role: bool,
    default_system: Option<String>,
    end_mark: String,
}

/// A rendered prefix of a conversation.
pub(crate) struct Turns<'a> {
    dialect: &'a Dialect,
    tools: Vec<Json>,
    /// Template messages, and how many of them stand for each prefix of the row's messages.
    messages: Vec<Message>,
}

impl Dialect {
    /// Compiles a template and finds out what it can do by rendering small conversations.
    ///
    /// # Errors
    /// What the template refuses.
    pub(crate) fn new(
        template: &ChatTemplate,
        format: ToolFormat,
        default_system: Option<String>,
    ) -> Result<Self, String> {
        let jinja = Jinja::new(template)?;
        let user = json!({"role": "user", "content": "q"});
        let tool = json!({"type": "function", "function": {"name": "probe_tool", "description": "d",
            "parameters": {"type": "object", "properties": {}}}});
        let shows = |text: Result<String, String>, what: &str| text.is_ok_and(|t| t.contains(what));
        let native = shows(jinja.render(std::slice::from_ref(&user), &[tool], true), "probe_tool");
        let system = json!({"role": "system", "content": "probe_system"});
        let system_role = shows(jinja.render(&[system, user.clone()], &[], true), "probe_system");
        let hermes = match format {
            ToolFormat::Auto => !native,
            ToolFormat::Hermes => true,
            ToolFormat::Native if native => false,
            ToolFormat::Native => {
                return Err(format!(
                    "{} renders no tools; use `tool_format: hermes`",
                    template.origin
                ));
            }
        };
        let answer = json!({"role": "assistant", "content": "probe_answer"});
        let rendered = jinja.render(&[user, answer], &[], false)?;
        let end = rendered.rsplit("probe_answer").next().unwrap_or_default().trim();
        if end.is_empty() || !rendered.contains("probe_answer") {
            return Err(format!("{} marks no end of the assistant's turn", template.origin));
        }
        let end_mark = end.to_owned();
        Ok(Self { jinja, hermes, system_role, default_system, end_mark })
    }

    /// Text that ends the model's turn.
    pub(crate) fn end_mark(&self) -> &str {
        &self.end_mark
    }

    /// Name of the layout in use, for statistics.
    pub(crate) fn name(&self) -> &'static str {
        match (self.hermes, self.system_role) {
            (false, _) => "native",
            (true, true) => "hermes in the system message",
            (true, false) => "hermes in the first user message",
        }
    }

    /// A conversation ready to be rendered.
    pub(crate) fn turns(&self, messages: &[Message], tools: &[Tool]) -> Turns<'_> {
        let tools = tools.iter().map(|t| json!(t)).collect();
        Turns { dialect: self, tools, messages: messages.to_vec() }
    }
}

impl Turns<'_> {
    /// Text of the first `count` messages.
    ///
    /// # Errors
    /// What the template refuses.
    pub(crate) fn render(&self, count: usize, generate: bool) -> Result<String, String> {
        let Self { dialect, tools, messages } = self;
        let mut messages = messages[..count].to_vec();
        let system = messages.first().is_some_and(|m| m.role == Role::System);
        if let (false, Some(text)) = (system, &dialect.default_system) {
            messages.insert(0, Message::text(Role::System, text.clone()));
        }
        if !dialect.hermes {
            let messages: Vec<Json> = messages.iter().map(native).collect();
            return dialect.jinja.render(&messages, tools, generate);
        }
        if !tools.is_empty() {
            offer(&mut messages, tools);
        }
        let mut plain = Vec::new();
        for message in &messages {
            push(&mut plain, message);
        }
        if !dialect.system_role {
            into_first_user(&mut plain);
        }
        let plain: Vec<Json> =
            plain.iter().map(|(role, text)| json!({"role": role, "content": text})).collect();
        dialect.jinja.render(&plain, &[], generate)
    }
}

/// The layout that transformers' templates expect; scoring data stays behind.
fn native(message: &Message) -> Json {
    let mut native = json!({"role": message.role, "content": message.content});
    if !message.tool_calls.is_empty() {
        native["tool_calls"] = json!(message.tool_calls);
    }
    native
}

/// Puts the tools into the system message in the words of Qwen2.5's template.
fn offer(messages: &mut Vec<Message>, tools: &[Json]) {
    if messages.first().is_none_or(|m| m.role != Role::System) {
        messages.insert(0, Message::text(Role::System, SYSTEM));
    }
    let tools: Vec<String> = tools.iter().map(|t| dumps(t, None)).collect();
    messages[0].content.push_str(&format!(
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\
         You are provided with function signatures within <tools></tools> XML tags:\n\
         <tools>\n{}\n</tools>\n\n\
         For each function call, return a json object with function name and arguments within \
         <tool_call></tool_call> XML tags:\n<tool_call>\n\
         {{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>",
        tools.join("\n")
    ));
}

/// Adds a message as plain text; results of calls become user turns, neighbours of one role merge.
fn push(plain: &mut Vec<(Role, String)>, message: &Message) {
    let (role, text) = match message.role {
        Role::Tool => {
            (Role::User, format!("<tool_response>\n{}\n</tool_response>", message.content))
        }
        Role::Assistant => (Role::Assistant, assistant_text(&message.content, &message.tool_calls)),
        role => (role, message.content.clone()),
    };
    match plain.last_mut() {
        Some((last, before)) if *last == role => {
            before.push('\n');
            before.push_str(&text);
        }
        _ => plain.push((role, text)),
    }
}

/// An assistant turn in the Hermes layout: its words, then one `<tool_call>` block a call.
pub(crate) fn assistant_text(content: &str, calls: &[ToolCall]) -> String {
    let blocks = calls.iter().map(|call| {
        let call = json!({"name": call.function.name, "arguments": call.function.arguments});
        format!("<tool_call>\n{}\n</tool_call>", dumps(&call, None))
    });
    let words = (!content.is_empty()).then(|| content.to_owned());
    words.into_iter().chain(blocks).collect::<Vec<_>>().join("\n")
}

/// For templates without a system role (Gemma-2): system text goes in front of the first user turn.
fn into_first_user(plain: &mut Vec<(Role, String)>) {
    if plain.first().is_none_or(|(role, _)| *role != Role::System) {
        return;
    }
    let (_, system) = plain.remove(0);
    match plain.first_mut() {
        Some((Role::User, text)) => *text = format!("{system}\n\n{text}"),
        _ => plain.insert(0, (Role::User, system)),
    }
}
