//! A YAML document as a tree that knows where every key and value was written.
//!
//! Scalars follow the core schema of YAML 1.2. Anchors, aliases and merge keys (`<<`) work; a key
//! given twice in one mapping is an error.

use std::collections::{BTreeMap, HashMap};

use granit_parser::{Event, Parser, ScalarStyle, Span};
use serde_json::{Map, Number, Value};

/// Aliases may multiply a document; beyond this many nodes that aliases brought it is refused.
const MAX_ALIASED: usize = 200_000;
/// Nodes in all beyond which a document is refused: hundreds of thousands of stages.
const MAX_NODES: usize = 4_000_000;
/// Nesting beyond this depth is refused.
const MAX_DEPTH: usize = 64;

/// A range of bytes in one of the sources: the pipeline file (0) or a `--set` argument (1, 2, …).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Which source.
    pub source: usize,
    /// First byte.
    pub start: usize,
    /// Byte after the last.
    pub end: usize,
}

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Where.
    pub place: Place,
    /// Where the `${variable}` stands that brought the value here.
    pub used_at: Option<Place>,
    /// What.
    pub tree: Tree,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Tree {
    /// Null, a boolean or a number.
    Scalar(Value),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A mapping in file order.
    Map(Vec<(Key, Node)>),
}

/// A key and where it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Where.
    pub place: Place,
    /// What.
    pub name: String,
}

/// Why a document does not parse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct YamlError {
    /// What is wrong: lowercase, no full stop.
    pub message: String,
    /// Where.
    pub place: Place,
    /// Where a key was written first, for a key given twice.
    pub first: Option<Place>,
}

impl Node {
    /// The value without places.
    pub fn to_value(&self) -> Value {
        match &self.tree {
            Tree::Scalar(value) => value.clone(),
            Tree::Text(text) => Value::String(text.clone()),
            Tree::List(items) => Value::Array(items.iter().map(Self::to_value).collect()),
            Tree::Map(entries) => Value::Object(
                entries
                    .iter()
                    .map(|(key, node)| (key.name.clone(), node.to_value()))
                    .collect::<Map<_, _>>(),
            ),
        }
    }

    /// The entry of a mapping or list under one step of a path.
    pub fn get(&self, step: &str) -> Option<&Self> {
        match &self.tree {
            Tree::Map(entries) => entries.iter().find(|(k, _)| k.name == step).map(|(_, n)| n),
            Tree::List(items) => items.get(step.parse::<usize>().ok()?),
            _ => None,
        }
    }

    /// What the value is, for error messages.
    pub fn describe(&self) -> &'static str {
        match &self.tree {
            Tree::Scalar(Value::Null) => "null",
            Tree::Scalar(Value::Bool(_)) => "a boolean",
            Tree::Scalar(_) => "a number",
            Tree::Text(_) => "text",
            Tree::List(_) => "a list",
            Tree::Map(_) => "a mapping",
        }
    }
}

/// Parses one document.
///
/// # Errors
/// [`YamlError`] with the place of the fault.
pub fn parse(text: &str, source: usize) -> Result<Node, YamlError> {
    let mut builder = Builder {
        parser: Parser::new_from_str(text),
        text,
        source,
        nodes: 0,
        aliased: 0,
        anchors: BTreeMap::new(),
    };
    builder.document()
}

struct Builder<'a> {
    parser: Parser<'a, granit_parser::StrInput<'a>>,
    text: &'a str,
    source: usize,
    nodes: usize,
    /// Nodes that aliases brought.
    aliased: usize,
    anchors: BTreeMap<usize, (Node, usize)>,
}

impl<'a> Builder<'a> {
    fn document(&mut self) -> Result<Node, YamlError> {
        let mut root = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => break,
                Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
                _ if root.is_some() => {
                    return Err(fault("a second document in one file", self.place(span)));
                }
                event => root = Some(self.node(event, span, 0)?),
            }
        }
        Ok(root.unwrap_or(Node {
            place: Place { source: self.source, start: 0, end: 0 },
            used_at: None,
            tree: Tree::Scalar(Value::Null),
        }))
    }

    fn next(&mut self) -> Result<(Event<'a>, Span), YamlError> {
        loop {
            let Some(next) = self.parser.next() else {
                let end = self.text.len();
                let place = Place { source: self.source, start: end, end };
                return Err(fault("the document ends too early", place));
            };
            match next {
                Ok((Event::Comment(..), _)) => {}
                Ok(next) => return Ok(next),
                Err(error) => {
                    let marker = error.marker();
                    let start = marker.byte_offset().unwrap_or(0).min(self.text.len());
                    let place = Place { source: self.source, start, end: start };
                    return Err(fault(&error.info(), place));
                }
            }
        }
    }

    fn node(&mut self, event: Event<'a>, span: Span, depth: usize) -> Result<Node, YamlError> {
        self.nodes += 1;
        let place = self.place(span);
        if self.nodes > MAX_NODES || self.aliased > MAX_ALIASED || depth > MAX_DEPTH {
            return Err(fault("the document is too large or nested too deeply", place));
        }
        let (mut node, anchor) = match event {
            Event::Scalar(text, style, anchor, _) => {
                let tree = match style {
                    ScalarStyle::Plain => plain(&text),
                    _ => Tree::Text(text.into_owned()),
                };
                (Node { place, used_at: None, tree }, anchor)
            }
            Event::SequenceStart(_, anchor, _) => (self.list(place, depth)?, anchor),
            Event::MappingStart(_, anchor, _) => (self.mapping(place, depth)?, anchor),
            Event::Alias(id) => {
                let Some((node, size)) = self.anchors.get(&id).cloned() else {
                    return Err(fault("an alias inside its own anchor", place));
                };
                self.aliased += size;
                (node, 0)
            }
            _ => return Err(fault("unexpected structure", place)),
        };
        node.place.end = node.place.end.max(node.place.start);
        if anchor != 0 {
            self.anchors.insert(anchor, (node.clone(), count(&node)));
        }
        Ok(node)
    }

    fn list(&mut self, start: Place, depth: usize) -> Result<Node, YamlError> {
        let mut items: Vec<Node> = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if matches!(event, Event::SequenceEnd) {
                let end = items.last().map_or(self.place(span).end, |n| n.place.end);
                let place = Place { end, ..start };
                return Ok(Node { place, used_at: None, tree: Tree::List(items) });
            }
            items.push(self.node(event, span, depth + 1)?);
        }
    }

    fn mapping(&mut self, start: Place, depth: usize) -> Result<Node, YamlError> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        let mut merged: Vec<(Key, Node)> = Vec::new();
        let mut seen: HashMap<String, Place> = HashMap::new();
        loop {
            let (event, span) = self.next()?;
            let key = match event {
                Event::MappingEnd => break,
                Event::Scalar(text, ..) => Key { place: self.place(span), name: text.into_owned() },
                _ => return Err(fault("a key must be text", self.place(span))),
            };
            let (event, span) = self.next()?;
            let value = self.node(event, span, depth + 1)?;
            if key.name == "<<" {
                Self::merge(value, &mut merged)?;
                continue;
            }
            if let Some(first) = seen.insert(key.name.clone(), key.place) {
                return Err(YamlError {
                    message: format!("`{}` is given twice", key.name),
                    place: key.place,
                    first: Some(first),
                });
            }
            entries.push((key, value));
        }
        for (key, value) in merged {
            if seen.insert(key.name.clone(), key.place).is_none() {
                entries.push((key, value));
            }
        }
        let end = entries.iter().map(|(_, n)| n.place.end).filter(|e| *e >= start.start).max();
        let place = Place { end: end.unwrap_or(start.end), ..start };
        Ok(Node { place, used_at: None, tree: Tree::Map(entries) })
    }

    fn merge(value: Node, into: &mut Vec<(Key, Node)>) -> Result<(), YamlError> {
        match value.tree {
            Tree::Map(entries) => into.extend(entries),
            Tree::List(items) => {
                for item in items {
                    Self::merge(item, into)?;
                }
            }
            _ => return Err(fault("`<<` takes a mapping", value.place)),
        }
        Ok(())
    }

    fn place(&self, span: Span) -> Place {
        let range = span.byte_range().unwrap_or(0..0);
        let (start, mut end) = (range.start.min(self.text.len()), range.end.min(self.text.len()));
        // A span may run over the line break after a plain scalar.
        let written = self.text.get(start..end).unwrap_or_default().trim_end().len();
        end = start + written;
        Place { source: self.source, start, end }
    }
}

fn fault(message: &str, place: Place) -> YamlError {
    YamlError { message: message.to_owned(), place, first: None }
}

fn count(node: &Node) -> usize {
    1 + match &node.tree {
        Tree::List(items) => items.iter().map(count).sum(),
        Tree::Map(entries) => entries.iter().map(|(_, n)| count(n)).sum(),
        _ => 0,
    }
}

/// A plain scalar by the core schema of YAML 1.2, section 10.3.2.
fn plain(text: &str) -> Tree {
    let scalar = |value: Value| Tree::Scalar(value);
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return scalar(Value::Null),
        "true" | "True" | "TRUE" => return scalar(Value::Bool(true)),
        "false" | "False" | "FALSE" => return scalar(Value::Bool(false)),
        _ => {}
    }
    number(text).map_or_else(|| Tree::Text(text.to_owned()), |n| scalar(Value::Number(n)))
}

fn number(text: &str) -> Option<Number> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok().map(Number::from);
    }
    if let Some(octal) = text.strip_prefix("0o") {
        return u64::from_str_radix(octal, 8).ok().map(Number::from);
    }
    if unsigned.bytes().all(|b| b.is_ascii_digit()) {
        let integer = text.strip_prefix('+').unwrap_or(text);
        return integer
            .parse::<i64>()
            .map(Number::from)
            .or_else(|_| integer.parse::<u64>().map(Number::from))
            .ok();
    }
    let shape = unsigned.bytes().all(|b| b.is_ascii_digit() || b".eE+-".contains(&b));
    let digits = unsigned.bytes().any(|b| b.is_ascii_digit());
    (shape && digits).then(|| text.parse::<f64>().ok()).flatten().and_then(Number::from_f64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(text: &str) -> Value {
        parse(text, 0).unwrap().to_value()
    }

    #[test]
    fn scalars_follow_the_core_schema() {
        let text = "a: 1e-4\nb: 0x10\nc: no\nd: ~\ne: 1.5\nf: '1'\ng: -3\nh: 2026-01-02\ni: .5\n";
        let expected = json!({"a": 1e-4, "b": 16, "c": "no", "d": null, "e": 1.5, "f": "1",
            "g": -3, "h": "2026-01-02", "i": 0.5});
        assert_eq!(value(text), expected);
    }

    #[test]
    fn anchors_aliases_and_merge_keys_work() {
        let text = "base: &b {r: 16, alpha: 16}\nuse:\n  <<: *b\n  r: 8\nsame: *b\n";
        let found = value(text);
        assert_eq!(found["use"], json!({"r": 8, "alpha": 16}));
        assert_eq!(found["same"], json!({"r": 16, "alpha": 16}));
    }

    #[test]
    fn places_cover_what_was_written() {
        let text = "stages:\n  train:\n    kind: train   # why\n";
        let node = parse(text, 0).unwrap();
        let kind = node.get("stages").unwrap().get("train").unwrap().get("kind").unwrap();
        assert_eq!(&text[kind.place.start..kind.place.end], "train");
    }

    #[test]
    fn a_key_given_twice_names_both_places() {
        let error = parse("a: 1\nb: 2\na: 3\n", 0).unwrap_err();
        assert_eq!(error.message, "`a` is given twice");
        assert_eq!((error.first.unwrap().start, error.place.start), (0, 10));
    }

    #[test]
    fn exploding_aliases_are_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..8 {
            let list = vec![format!("*a{}", i - 1); 10].join(", ");
            text.push_str(&format!("a{i}: &a{i} [{list}]\n"));
        }
        assert!(parse(&text, 0).unwrap_err().message.contains("too large"));
    }
}
