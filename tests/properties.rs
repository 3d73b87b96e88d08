//! Properties of files and graphs that nobody wrote: what is written is read, order changes nothing, a graph is
//! walked as its edges say.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use pipe::digest::{Digest, Fingerprint};
use pipe::fingerprint::{Identity, SCHEMA, canonical};
use pipe::graph::StageGraph;
use pipe::pipeline::{Kinds, Overrides, Pipeline};
use pipe::yaml;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Any JSON value.
fn value() -> impl Strategy<Value = Value> {
    let text = prop_oneof!["[a-z]{1,6}", ".{0,12}", "[-+.0-9eE_x:#&*!|>'\"%@`{}\\[\\], ~]{0,8}"];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_filter("finite", |f| f.is_finite()).prop_map(Value::from),
        text.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(text.clone(), inner, 0..6)
                .prop_filter("a merge is no key", |map| !map.contains_key("<<"))
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// YAML as people write it: blocks outside, flow and plain words where the dice say so.
fn written(value: &Value, indent: usize, dice: &mut u32, out: &mut String) {
    *dice = dice.rotate_left(5).wrapping_mul(0x9e37_79b1).wrapping_add(1);
    let pad = " ".repeat(indent);
    match value {
        Value::Object(map) if !map.is_empty() && !dice.is_multiple_of(3) => {
            for (key, value) in map {
                let _ = write!(out, "\n{pad}{}:", word(key, *dice));
                written(value, indent + 2, dice, out);
            }
        }
        Value::Array(items) if !items.is_empty() && !dice.is_multiple_of(3) => {
            for item in items {
                let _ = write!(out, "\n{pad}-");
                written(item, indent + 2, dice, out);
            }
        }
        Value::String(text) => out.push_str(&format!(" {}", word(text, *dice))),
        // JSON is YAML.
        other => out.push_str(&format!(" {}", escaped(&other.to_string()))),
    }
    if dice.is_multiple_of(7) && out.ends_with(|c: char| c.is_alphanumeric()) {
        out.push_str(" # a comment: {");
    }
}

fn word(text: &str, dice: u32) -> String {
    let plain = !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_lowercase())
        && !["null", "true", "false"].contains(&text);
    match dice % 4 {
        0 | 1 if plain => text.to_owned(),
        2 if text.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'\'') => {
            format!("'{text}'")
        }
        _ => escaped(&Value::from(text).to_string()),
    }
}

/// JSON with escapes for what YAML does not allow as it is.
fn escaped(json: &str) -> String {
    let plain = |c: char| {
        matches!(c, ' '..='~' | '\u{a0}'..='\u{d7ff}' | '\u{e000}'..='\u{fdff}' | '\u{1f300}'..='\u{1faff}')
            && !"\u{2028}\u{2029}".contains(c)
    };
    let mut out = String::new();
    for c in json.chars() {
        if plain(c) {
            out.push(c);
        } else {
            c.encode_utf16(&mut [0; 2])
                .iter()
                .for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
        }
    }
    out
}

/// The same with every mapping in another order.
fn shuffled(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let reversed: Map<String, Value> =
                map.iter().rev().map(|(k, v)| (k.clone(), shuffled(v))).collect();
            Value::Object(reversed)
        }
        Value::Array(items) => items.iter().map(shuffled).collect(),
        other => other.clone(),
    }
}

/// Every value that differs from this one in one leaf, one key or one element.
fn changed(value: &Value) -> Vec<Value> {
    let mut all = match value {
        Value::Object(map) => {
            let mut all = Vec::new();
            for (key, inner) in map {
                let with = |new: Value| {
                    let mut map = map.clone();
                    map.insert(key.clone(), new);
                    Value::Object(map)
                };
                all.extend(changed(inner).into_iter().map(with));
                let mut without = map.clone();
                without.remove(key);
                all.push(Value::Object(without.clone()));
                without.insert(format!("{key}."), inner.clone());
                all.push(Value::Object(without));
            }
            all
        }
        Value::Array(items) => {
            let mut all = Vec::new();
            for (i, inner) in items.iter().enumerate() {
                let with = |new: Value| {
                    let mut items = items.clone();
                    items[i] = new;
                    Value::Array(items)
                };
                all.extend(changed(inner).into_iter().map(with));
            }
            let reversed: Vec<Value> = items.iter().rev().cloned().collect();
            all.push(Value::Array(reversed));
            all.push(Value::Array([items.as_slice(), &[Value::Null]].concat()));
            all
        }
        Value::String(text) => vec![json!(format!("{text} ")), Value::Null],
        Value::Number(number) => {
            vec![json!(number.to_string()), json!(number.as_f64().unwrap() / 3.0 + 1.0)]
        }
        Value::Bool(bool) => vec![json!(!bool), json!(bool.to_string())],
        Value::Null => vec![json!(false), json!("null"), json!({})],
    };
    all.retain(|other| canonical(other) != canonical(value) || other != value);
    all
}

fn identity(
    params: Value,
    inputs: BTreeMap<String, u8>,
    env: BTreeMap<String, Option<String>>,
) -> Identity {
    let digest = |(name, byte): (String, u8)| (name, Digest([byte; 32]));
    Identity {
        schema: SCHEMA,
        kind: "k".into(),
        version: "1".into(),
        params,
        inputs: inputs.into_iter().map(digest).collect(),
        env,
        lock: None,
        upstream: BTreeMap::new(),
    }
}

/// Edges from lower to higher numbers, as a bit a pair.
fn edges(count: usize, bits: &[bool]) -> Vec<BTreeSet<usize>> {
    let mut bits = bits.iter().copied().cycle();
    (0..count).map(|to| (0..to).filter(|_| bits.next().unwrap()).collect()).collect()
}

fn pipeline(names: &[usize], needs: &[BTreeSet<usize>]) -> String {
    let mut text = "stages:\n".to_owned();
    for stage in names {
        let inputs: Vec<String> = needs[*stage].iter().map(|n| format!("i{n}: s{n}")).collect();
        let _ = writeln!(
            text,
            "  s{stage}: {{kind: command, inputs: {{{}}}, params: {{run: 'true', outputs: {{o: {{file: o}}}}}}}}",
            inputs.join(", ")
        );
    }
    text
}

fn parsed(text: &str) -> Result<Pipeline, String> {
    let kinds = Kinds(&[&stage_command::Command]);
    Pipeline::parse(Path::new("p.yaml"), PathBuf::new(), text, Overrides::default(), kinds)
        .map_err(|e| format!("{e:?}"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_is_written_is_read(value in value(), mut dice: u32) {
        let mut text = String::new();
        written(&value, 0, &mut dice, &mut text);
        let read = yaml::parse(&text, 0);
        prop_assert!(read.is_ok(), "{text}\n{read:?}");
        prop_assert_eq!(canonical(&read.unwrap().to_value()), canonical(&value), "{}", text);
    }

    #[test]
    fn order_never_counts_and_everything_else_does(
        params in value(),
        inputs in prop::collection::btree_map("[a-z]{1,3}", any::<u8>(), 0..4),
        env in prop::collection::btree_map("[A-Z]{1,3}", prop::option::of("[a-z ]{0,3}"), 0..3),
    ) {
        let one = identity(params.clone(), inputs.clone(), env.clone());
        let print = one.fingerprint();
        prop_assert_eq!(identity(shuffled(&params), inputs.clone(), env.clone()).fingerprint(), print);
        // What a record keeps gives the same again.
        let kept: Identity = serde_json::from_str(&serde_json::to_string(&one).unwrap()).unwrap();
        prop_assert_eq!(kept.fingerprint(), print);
        for other in changed(&params) {
            let equal = canonical(&other) == canonical(&params);
            prop_assert_eq!(identity(other, inputs.clone(), env.clone()).fingerprint() == print, equal);
        }
        for (name, byte) in &inputs {
            let mut other = one.clone();
            other.inputs.insert(name.clone(), Digest([byte.wrapping_add(1); 32]));
            prop_assert_ne!(other.fingerprint(), print);
            let digest = other.inputs.remove(name).unwrap();
            prop_assert_ne!(other.fingerprint(), print);
            other.inputs.insert(format!("{name}2"), digest);
            prop_assert_ne!(other.fingerprint(), print);
        }
        for (name, text) in &env {
            let mut other = one.clone();
            other.env.insert(name.clone(), text.as_ref().map_or(Some(String::new()), |_| None));
            prop_assert_ne!(other.fingerprint(), print);
            other.env.remove(name);
            prop_assert_ne!(other.fingerprint(), print);
        }
        let others = [
            Identity { schema: SCHEMA + 1, ..one.clone() },
            Identity { kind: "l".into(), ..one.clone() },
            Identity { version: "2".into(), ..one.clone() },
            Identity { lock: Some(params), ..one.clone() },
            Identity { upstream: [("s".to_owned(), Fingerprint([1; 32]))].into(), ..one },
        ];
        for other in others {
            prop_assert_ne!(other.fingerprint(), print);
        }
    }

    #[test]
    fn graphs_are_walked_as_their_edges_say(
        names in Just((0..14).collect::<Vec<usize>>()).prop_shuffle(),
        bits in prop::collection::vec(prop::bool::weighted(0.25), 91),
        selected in prop::collection::btree_set(0..14_usize, 1..4),
    ) {
        let needs = edges(14, &bits);
        let pipeline = parsed(&pipeline(&names, &needs)).unwrap();
        let graph = StageGraph::new(&pipeline);
        let order: Vec<usize> = graph.order().map(|n| n[1..].parse().unwrap()).collect();
        let rank = |stage: usize| order.iter().position(|s| *s == stage).unwrap();
        prop_assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), 14);
        for (to, from) in needs.iter().enumerate().flat_map(|(to, n)| n.iter().map(move |f| (to, *f))) {
            prop_assert!(rank(from) < rank(to));
        }
        // Of the stages that are ready, the first in the file.
        let mut done = BTreeSet::new();
        for stage in &order {
            let ready = names.iter().find(|n| !done.contains(*n) && needs[**n].is_subset(&done)).unwrap();
            prop_assert_eq!(ready, stage);
            done.insert(*stage);
        }
        let reach = |down: bool| {
            let mut reached = selected.clone();
            for _ in 0..14 {
                for (to, from) in needs.iter().enumerate() {
                    if down && from.iter().any(|f| reached.contains(f)) {
                        reached.insert(to);
                    } else if !down && reached.contains(&to) {
                        reached.extend(from);
                    }
                }
            }
            order.iter().filter(|s| reached.contains(s)).map(|s| format!("s{s}")).collect::<Vec<_>>()
        };
        let chosen: Vec<String> = selected.iter().map(|s| format!("s{s}")).collect();
        prop_assert_eq!(graph.with_upstream(&chosen), reach(false));
        prop_assert_eq!(graph.with_downstream(&chosen), reach(true));
    }

    #[test]
    fn a_back_edge_is_a_cycle_and_is_named(
        bits in prop::collection::vec(prop::bool::weighted(0.3), 36), from in 0..9_usize, to in 0..9_usize,
    ) {
        let mut needs = edges(9, &bits);
        let (low, high) = (from.min(to), from.max(to));
        // A way up, and one down.
        if low < high {
            needs[high].insert(low);
        }
        needs[low].insert(high);
        let error = parsed(&pipeline(&(0..9).collect::<Vec<_>>(), &needs)).unwrap_err();
        prop_assert!(error.contains("wait for each other"), "{}", error);
    }
}
