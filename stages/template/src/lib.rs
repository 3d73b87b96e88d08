//! Stage kind `template`: renders rows with the model's own chat template, into training texts
//! with their response spans and into prompts for evaluation.
//!
//! Where a template knows no tools, or no system role, they are written as text in the Hermes
//! layout (`dialect`); training and evaluation always use the same one.

mod dialect;
mod jinja;
mod python_json;

use checkpoint::ModelFolder;
use contract::{
    InputSpec, Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError,
    StageKind, parse_params,
};
use data::{
    Expected, ExpectedCall, Message, Prompt, RenderedRow, Role, Row, Tool, read_jsonl, write_json,
    write_jsonl,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::dialect::{Dialect, ToolFormat, assistant_text};

/// Changes when the same rows would be rendered differently.
const VERSION: &str = "1";

/// What to do where the model's template does not work at all.
const OWN_TEMPLATE: &str =
    "a `chat_template.jinja` beside the files of the model goes before its own template";

/// The stage kind `template`.
pub struct Template;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Params {
    tool_format: ToolFormat,
    /// System text for rows that have none.
    default_system: Option<String>,
    turns: Turns,
    /// Questions of the user's own, answered by every evaluation and not scored.
    manual_prompts: Vec<ManualPrompt>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            tool_format: ToolFormat::Auto,
            default_system: None,
            turns: Turns::All,
            manual_prompts: Vec::new(),
        }
    }
}

/// Which assistant turns that answer a user become prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Turns {
    /// Each of them.
    All,
    /// The first of a row.
    First,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ManualPrompt {
    /// The question.
    user: String,
    /// System text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    system: Option<String>,
    /// `{name, description, parameters}` of each tool on offer.
    #[serde(default)]
    tools: Vec<Map<String, Value>>,
}

impl StageKind for Template {
    fn name(&self) -> &'static str {
        "template"
    }

    fn summary(&self) -> &'static str {
        "renders rows with the model's chat template into training texts and evaluation prompts"
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        let params: Params = parse_params(params)?;
        Ok(Signature {
            inputs: vec![
                InputSpec::required("model", "model folder, for its chat template"),
                InputSpec::required("train", "rows to train on"),
                InputSpec::required("test", "rows to evaluate on"),
                InputSpec::optional("dev", "rows to choose by"),
            ],
            outputs: vec![
                OutputSpec::file("train", "train.text.jsonl"),
                OutputSpec::file("dev", "dev.text.jsonl").optional(),
                OutputSpec::file("prompts", "prompts.jsonl"),
                OutputSpec::file("dev_prompts", "dev-prompts.jsonl").optional(),
                OutputSpec::file("manual", "manual-prompts.jsonl"),
                OutputSpec::file("stats", "template-stats.json"),
            ],
            ..Signature::of(&params)?
        })
    }

    fn params_schema(&self) -> Value {
        contract::schema_of::<Params>()
    }

    fn run(&self, request: &Request, _reporter: &mut Reporter) -> Result<Outcome, StageError> {
        let params: Params = request.params()?;
        let template = ModelFolder::open(request.input("model")?)?.chat_template()?;
        let dialect = Dialect::new(&template, params.tool_format, params.default_system.clone())
            .map_err(|fault| StageError::input(fault).help(OWN_TEMPLATE))?;
        let train: Vec<Row> = read_jsonl(request.input("train")?)?;
        let test: Vec<Row> = read_jsonl(request.input("test")?)?;
        let rendered = rendered(&dialect, &train)?;
        write_jsonl(request.output("train")?, &rendered)?;
        let prompts = prompts(&dialect, &test, params.turns)?;
        if prompts.is_empty() {
            return Err(StageError::input("the test rows hold no assistant turn after a user's")
                .help(
                    "look at the rows that `test` is wired to: nothing in them can be evaluated",
                ));
        }
        write_jsonl(request.output("prompts")?, &prompts)?;
        if let Some(dev) = request.optional_input("dev") {
            let dev: Vec<Row> = read_jsonl(dev)?;
            write_jsonl(request.output("dev")?, &self::rendered(&dialect, &dev)?)?;
            let prompts = self::prompts(&dialect, &dev, params.turns)?;
            write_jsonl(request.output("dev_prompts")?, &prompts)?;
        }
        let manual = manual(&dialect, &params.manual_prompts)?;
        write_jsonl(request.output("manual")?, &manual)?;
        let count = |class: &str| prompts.iter().filter(|p| p.class() == Some(class)).count();
        let stats = json!({
            "template": template.origin, "tool_format": dialect.name(),
            "end_mark": dialect.end_mark(), "train_rows": rendered.len(),
            "prompts": prompts.len(), "call": count("call"), "no-call": count("no-call"),
            "no-tools": count("no-tools"),
        });
        write_json(request.output("stats")?, &stats)?;
        Ok(Outcome::default())
    }
}

fn in_row(id: &str) -> impl Fn(String) -> StageError + '_ {
    move |fault| {
        StageError::input(format!("row `{id}`: {fault}"))
            .help("if the template cannot take such rows, try `tool_format: hermes`")
    }
}

fn rendered(dialect: &Dialect, rows: &[Row]) -> Result<Vec<RenderedRow>, StageError> {
    rows.iter().map(|row| render(dialect, row).map_err(in_row(&row.id))).collect()
}

/// The whole conversation, and what of it the model is to say.
fn render(dialect: &Dialect, row: &Row) -> Result<RenderedRow, String> {
    let turns = dialect.turns(&row.messages, &row.tools);
    let text = turns.render(row.messages.len(), false)?;
    let mut response_spans = Vec::new();
    for (i, message) in row.messages.iter().enumerate() {
        if message.role != Role::Assistant {
            continue;
        }
        let (before, after) = (turns.render(i, true)?, turns.render(i + 1, false)?);
        if !after.starts_with(&before) || !text.starts_with(&after) {
            return Err(format!(
                "the template renders message {i} differently once more messages follow, so that \
                 the model's own words cannot be told apart"
            ));
        }
        response_spans.push([before.len(), after.len()]);
    }
    Ok(RenderedRow { id: row.id.clone(), text, response_spans })
}

fn prompts(dialect: &Dialect, rows: &[Row], which: Turns) -> Result<Vec<Prompt>, StageError> {
    let mut prompts = Vec::new();
    for row in rows {
        let turns = dialect.turns(&row.messages, &row.tools);
        let decisions = row
            .messages
            .windows(2)
            .enumerate()
            .filter(|(_, pair)| pair[0].role == Role::User && pair[1].role == Role::Assistant);
        let limit = if which == Turns::First { 1 } else { usize::MAX };
        for (i, pair) in decisions.take(limit) {
            let text = turns.render(i + 1, true).map_err(in_row(&row.id))?;
            prompts.push(Prompt {
                id: format!("{}#{}", row.id, i + 1),
                index: row.index,
                turn: i as u64 + 1,
                text,
                end_mark: dialect.end_mark().to_owned(),
                user: pair[0].content.clone(),
                tools: row.tools.clone(),
                expected: Some(expected(&pair[1])),
            });
        }
    }
    prompts.sort_by_key(|p| (p.index, p.turn));
    Ok(prompts)
}

fn expected(reply: &Message) -> Expected {
    let calls = reply.tool_calls.iter().enumerate().map(|(i, call)| {
        let only = || {
            let values = call.function.arguments.iter();
            values.map(|(name, value)| (name.clone(), json!([value]))).collect()
        };
        let arguments = reply.accepted.get(i).cloned().unwrap_or_else(only);
        ExpectedCall { name: call.function.name.clone(), arguments }
    });
    Expected { calls: calls.collect(), text: assistant_text(&reply.content, &reply.tool_calls) }
}

fn manual(dialect: &Dialect, wanted: &[ManualPrompt]) -> Result<Vec<Prompt>, StageError> {
    let one = |(i, prompt): (usize, &ManualPrompt)| {
        let id = format!("manual-{}", i + 1);
        let system = prompt.system.iter().map(|text| Message::text(Role::System, text.clone()));
        let messages: Vec<Message> =
            system.chain([Message::text(Role::User, prompt.user.clone())]).collect();
        let tools: Vec<Tool> = prompt.tools.iter().cloned().map(Tool::new).collect();
        let text = dialect.turns(&messages, &tools).render(messages.len(), true);
        Ok(Prompt {
            text: text.map_err(in_row(&id))?,
            id,
            index: i as u64,
            turn: messages.len() as u64,
            end_mark: dialect.end_mark().to_owned(),
            user: prompt.user.clone(),
            tools,
            expected: None,
        })
    };
    wanted.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod goldens;
#[cfg(test)]
mod tests;
