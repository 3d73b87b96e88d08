//! Renderings equal to transformers', byte for byte, of the templates in TRL's wheel.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use checkpoint::ChatTemplate;

use super::*;

/// `benches/fixtures/chat_templates.py` writes it.
#[derive(Deserialize)]
struct Goldens {
    templates: BTreeMap<String, String>,
    /// Of the templates that begin with one.
    bos_tokens: BTreeMap<String, String>,
    conversations: BTreeMap<String, Conversation>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Conversation {
    tools: Vec<Tool>,
    messages: Vec<Message>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    name: String,
    text: String,
    prompts: Vec<String>,
}

fn read() -> Goldens {
    serde_json::from_str(include_str!("../../../tests/fixtures/chat_templates.json")).unwrap()
}

/// Runs the stage on rows that are both trained and tested on; returns texts and prompts.
fn run_stage(source: &str, rows: &[Row]) -> (Vec<RenderedRow>, Vec<Prompt>) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("model")).unwrap();
    std::fs::write(at("model/config.json"), "{}").unwrap();
    std::fs::write(at("model/chat_template.jinja"), source).unwrap();
    write_jsonl(&at("rows.jsonl"), rows).unwrap();
    let (model, rows) = (at("model"), at("rows.jsonl"));
    let inputs = [("model", &*model), ("train", &*rows), ("test", &*rows)];
    let request = fixtures::request(&Template, &Value::Null, &inputs, dir.path());
    Template.run(&request, &mut Reporter::silent()).unwrap();
    let read = (read_jsonl(&request.outputs["train"]), read_jsonl(&request.outputs["prompts"]));
    (read.0.unwrap(), read.1.unwrap())
}

#[test]
fn the_stage_renders_qwen2_5_as_transformers_does() {
    let goldens = read();
    let mut cases = 0;
    for name in ["qwen2_5", "qwen2_5_training"] {
        let of_template: Vec<&Case> = goldens.cases.iter().filter(|c| c.template == name).collect();
        let rows: Vec<Row> = of_template
            .iter()
            .enumerate()
            .map(|(i, case)| {
                let Conversation { tools, messages } = &goldens.conversations[&case.name];
                let (tools, messages) = (tools.clone(), messages.clone());
                Row { id: case.name.clone(), index: i as u64, tools, messages }
            })
            .collect();
        let (texts, prompts) = run_stage(&goldens.templates[name], &rows);
        for (case, rendered) in of_template.iter().zip(&texts) {
            assert_eq!(rendered.text, case.text, "{name}: {}", case.name);
            cases += 1;
        }
        let expected: Vec<&String> = of_template.iter().flat_map(|c| &c.prompts).collect();
        assert_eq!(prompts.iter().map(|p| &p.text).collect::<Vec<_>>(), expected, "{name}");
    }
    assert!(cases >= 18, "{cases} cases");
}

#[test]
fn other_templates_render_as_in_transformers() {
    let goldens = read();
    for case in &goldens.cases {
        let template = ChatTemplate {
            origin: case.template.clone(),
            source: goldens.templates[&case.template].clone(),
            tool_source: None,
            bos_token: goldens.bos_tokens.get(&case.template).cloned().unwrap_or_default(),
            eos_token: String::new(),
        };
        let dialect = Dialect::new(&template, ToolFormat::Auto, None).unwrap();
        let Conversation { tools, messages } = &goldens.conversations[&case.name];
        let turns = dialect.turns(messages, tools);
        let text = turns.render(messages.len(), false).unwrap();
        assert_eq!(text, case.text, "{}: {}", case.template, case.name);
        let ends = messages
            .windows(2)
            .enumerate()
            .filter(|(_, pair)| pair[0].role == Role::User && pair[1].role == Role::Assistant);
        let prompts: Vec<String> = ends.map(|(i, _)| turns.render(i + 1, true).unwrap()).collect();
        assert_eq!(prompts, case.prompts, "{}: {}", case.template, case.name);
    }
}
