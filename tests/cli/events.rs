//! Every event and every record has the fields that `docs/json.md` says, and every documented event
//! is made by something here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::programs::{events, many_events, page};
use crate::space::{DIAMOND, Space};

/// Names in backticks of a row's second cell, by those in its first, in one section of the page.
fn documented(section: &str) -> BTreeMap<String, BTreeSet<String>> {
    let names = |cell: &str| -> Vec<String> {
        cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    };
    let page = page();
    let section = page.split("\n## ").find(|text| text.starts_with(section)).unwrap();
    let rows = section.lines().filter(|l| l.starts_with("| `"));
    rows.flat_map(|row| {
        let cells: Vec<&str> = row.split('|').collect();
        let fields: BTreeSet<String> = names(cells[2]).into_iter().collect();
        names(cells[1]).into_iter().map(move |name| (name, fields.clone()))
    })
    .collect()
}

/// A run whose first stage goes on until it is told to stop.
fn endless() -> Space {
    let space = Space::new(DIAMOND);
    space.replace(
        "echo x >> $RUNS/left;",
        "echo x >> $RUNS/left; while [ ! -e $RUNS/go ]; do sleep 0.05; done;",
    );
    space
}

fn start(space: &Space) -> Child {
    space.command(&["run", "--json"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// The first event of this name; the run must make it.
fn await_event(child: &mut Child, name: &str) -> (Value, BufReader<std::process::ChildStdout>) {
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    loop {
        let mut line = String::new();
        assert!(lines.read_line(&mut line).unwrap() > 0, "no {name}");
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["event"] == name {
            return (event, lines);
        }
    }
}

/// Two runs at the same work, of which one is interrupted.
fn waiting_and_interrupted() -> Vec<Value> {
    let space = endless();
    let mut first = start(&space);
    let (_, lines) = await_event(&mut first, "stage-started");
    let mut second = start(&space);
    let (waiting, _lines) = await_event(&mut second, "stage-waiting");
    let holder = waiting["holder"].as_str().unwrap();
    assert!(holder.contains(&first.id().to_string()), "{holder} is not {}", first.id());
    second.kill().unwrap();
    second.wait().unwrap();
    let interrupted = Command::new("kill").arg("-INT").arg(first.id().to_string()).status();
    assert!(interrupted.unwrap().success());
    let rest: Vec<String> = lines.lines().map(Result::unwrap).collect();
    assert_eq!(first.wait().unwrap().code(), Some(130));
    let mut all = events(&rest.join("\n"));
    all.push(waiting);
    all
}

#[test]
fn a_run_says_whose_execution_it_waits_for_and_then_takes_it() {
    let space = endless();
    let mut first = start(&space);
    let (_, lines) = await_event(&mut first, "stage-started");
    let mut second = space.command(&["run"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(second.stderr.take().unwrap()).lines().map(Result::unwrap);
    let said = told.find(|line| line.starts_with("left: waiting for ")).unwrap();
    assert!(said.contains(&format!("process {}", first.id())), "{said}");
    fs::write(space.outside().join("runs/go"), "").unwrap();
    lines.lines().map(Result::unwrap).for_each(drop);
    assert!(first.wait().unwrap().success());
    told.for_each(drop);
    assert!(second.wait().unwrap().success());
    assert_eq!(space.all_runs(), [1, 1, 1, 1]);
}

/// What runs, pushes and pulls say of a remote that is whole, lacks something, and is damaged.
#[cfg(feature = "remote")]
fn of_remotes() -> Vec<Value> {
    let space = Space::new(&format!("remote: {{url: ../remote}}\n{DIAMOND}"));
    let said = |args: &[&str], code: i32| {
        let mut command = space.command(args);
        command.env("PIPE_REMOTE_WRITE", "always").env_remove("PIPE_REMOTE");
        events(&crate::space::ran(&command.output().unwrap()).code(code).out)
    };
    let mut all = said(&["run", "left", "--json"], 0);
    all.extend(said(&["push", "left", "--json"], 0));
    fs::remove_dir_all(space.cache()).unwrap();
    all.extend(said(&["pull", "--json"], 7));
    let damaged = fs::read_dir(space.outside().join("remote/records-v1/command")).unwrap();
    damaged.flatten().for_each(|record| fs::write(record.path(), "{").unwrap());
    fs::remove_dir_all(space.cache()).unwrap();
    all.extend(said(&["run", "left", "--json"], 0));
    all
}

#[cfg(not(feature = "remote"))]
fn of_remotes() -> Vec<Value> {
    Vec::new()
}

#[test]
fn every_event_is_made_and_every_field_of_it_is_documented() {
    let documented = documented("`pipe run --json`");
    let mut made: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let all = [many_events(), waiting_and_interrupted(), of_remotes()].concat();
    for event in &all {
        let name = event["event"].as_str().unwrap().to_owned();
        let fields = event.as_object().unwrap().keys().filter(|k| *k != "event").cloned();
        made.entry(name).or_default().extend(fields);
    }
    for (event, fields) in &made {
        let known = documented.get(event).unwrap_or_else(|| panic!("{event} is not documented"));
        let unknown: Vec<_> = fields.difference(known).collect();
        assert!(unknown.is_empty(), "{event}: {unknown:?} are not documented");
        // Nested names stand in the same cell, and a cell may be of two events.
        let shared = ["stage-fetch", "stage-push"].iter().any(|start| event.starts_with(start));
        if event != "stage-progress" && event != "run-finished" && !shared {
            assert_eq!(known, fields, "{event}");
        }
    }
    if cfg!(feature = "remote") {
        let names = |of: &BTreeMap<String, _>| of.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&made), names(&documented));
    }
    let path = all.iter().find(|e| e["event"] == "run-finished").unwrap();
    for key in path["critical_path"][0].as_object().unwrap().keys() {
        assert!(documented["run-finished"].contains(key), "{key}");
    }
}

#[test]
fn every_field_of_a_record_is_documented() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let plan = space.pipe(&["plan", "--json"]).code(0).out;
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let record = &plan["stages"][0]["record"];
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let documented = documented("A record");
    assert_eq!(keys(record), documented.keys().cloned().collect());
    for (nested, value) in
        [("identity", &record["identity"]), ("outputs", &record["outputs"]["out"])]
    {
        let missing: Vec<_> = keys(value).difference(&documented[nested]).cloned().collect();
        assert!(missing.is_empty(), "{nested}: {missing:?}");
    }
}
